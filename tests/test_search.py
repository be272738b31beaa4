"""The search: exact totals after a kill, pruning, proposals that keep comments."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from endoprint.config import Config, Refusal
from endoprint.model import Pruned
from endoprint.search import Limits, Trial, n_finished, open_study, proposal, tune, winner


class Parabola(Config):
    x: Annotated[float, FloatDistribution(-2.0, 2.0)] = 1.5
    fixed: int = 3


def begun(folder: Path) -> optuna.Study:
    return open_study(folder / "s.log", "s", seed=0)


def minus_square(trial: Trial) -> float:
    return -(trial.values["x"] ** 2)


def test_the_chosen_values_are_tried_first_and_the_best_trial_wins(tmp_path):
    study = begun(tmp_path)
    tune(study, Parabola, {"x": 0.25}, minus_square, limits=Limits(trials=6))
    assert study.trials[0].params == {"x": 0.25}
    assert n_finished(study) == 6
    assert abs(winner(study)["x"]) <= 0.25


def test_a_second_run_of_the_same_total_adds_nothing(tmp_path):
    for _ in range(2):
        tune(
            begun(tmp_path),
            Parabola,
            {},
            minus_square,
            limits=Limits(trials=4),
        )
    assert len(begun(tmp_path).trials) == 4


def test_a_killed_search_is_finished_to_the_exact_total(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_search import Limits, Parabola, minus_square, open_study, tune
        def objective(trial):
            if trial.number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return minus_square(trial)
        study = open_study(Path(sys.argv[1]), "s", seed=0)
        tune(study, Parabola, {}, objective, limits=Limits(trials=5))
        """
    )
    journal = tmp_path / "s.log"
    command = [sys.executable, "-c", script, str(journal), str(Path(__file__).parent)]
    died = subprocess.run(command, check=False, env=dict(os.environ))
    assert died.returncode == -signal.SIGKILL
    study = open_study(journal, "s", seed=0)
    assert n_finished(study) == 2
    tune(study, Parabola, {}, minus_square, limits=Limits(trials=5))
    states = [trial.state for trial in study.trials]
    assert n_finished(study) == 5
    assert states.count(TrialState.FAIL) == 1  # the killed one, closed and not counted
    assert TrialState.RUNNING not in states


def test_a_failing_trial_is_recorded_and_the_study_goes_on(tmp_path):
    def objective(trial: Trial) -> float:
        if trial.number == 1:
            raise FloatingPointError("loss is not finite")
        return minus_square(trial)

    study = begun(tmp_path)
    tune(study, Parabola, {}, objective, limits=Limits(trials=3))
    failed = study.get_trials(states=(TrialState.FAIL,))
    assert [t.user_attrs["error"] for t in failed] == ["FloatingPointError: loss is not finite"]
    assert n_finished(study) == 3


def test_three_failures_in_a_row_stop_the_search_in_one_line(tmp_path):
    def objective(trial: Trial) -> float:
        raise RuntimeError("always")

    with pytest.raises(Refusal, match="three failures in a row, the last: RuntimeError: always"):
        tune(
            begun(tmp_path),
            Parabola,
            {},
            objective,
            limits=Limits(trials=9),
        )


def test_a_hopeless_trial_is_pruned_by_epoch(tmp_path):
    def objective(trial: Trial) -> float:
        level = 0.9 if trial.number < 4 else 0.1
        for epoch in range(4):
            trial.watch(epoch, {"valid_macro_f1": level})
        return level

    study = begun(tmp_path)
    tune(study, Parabola, {}, objective, limits=Limits(trials=6))
    assert [t.state for t in study.trials[4:]] == [TrialState.PRUNED] * 2


def test_a_pruned_fit_is_not_an_error():
    assert not issubclass(Pruned, (ArithmeticError, MemoryError, RuntimeError))


def test_a_proposal_changes_only_the_model_and_keeps_comments(tmp_path):
    file = tmp_path / "params.yaml"
    before = "task: t # why\nmodels:\n  logistic: {}\n  geneformer:\n    lr: 0.1   # peak\n"
    file.write_text(before)
    diff = proposal(file, {"geneformer": {"lr": 0.2}})
    assert [line for line in diff.splitlines() if line[0] in "+-"][2:] == [
        "-    lr: 0.1   # peak",
        "+    lr: 0.2   # peak",
    ]
    assert file.read_text() == before


def test_a_model_without_ranges_is_refused(tmp_path):
    class Fixed(Config):
        a: int = 1

    with pytest.raises(Refusal, match="fields with ranges"):
        tune(
            begun(tmp_path),
            Fixed,
            {},
            minus_square,
            limits=Limits(trials=1),
        )
