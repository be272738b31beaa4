"""The search: exact totals after kills and by many, pruning, earlier studies, proposals."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from endoprint.config import Away, Config, Refusal
from endoprint.model import Pruned
from endoprint.search import (
    Limits,
    Trial,
    about,
    best,
    best_within,
    earlier_values,
    front,
    importance,
    n_finished,
    open_study,
    proposal,
    seconds_spent,
    table_of,
    tune,
    winner,
)
from endoprint.search.field import n_rungs, share, survivors
from endoprint.search.limits import seconds_of
from endoprint.search.pruning import Halving


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


# -- limits ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("7s", 7)]
)
def test_a_budget_is_read_as_people_write_it(said, seconds):
    assert seconds_of(said) == seconds


@pytest.mark.parametrize("said", ["2", "h", "2 hours", "-2h", "0s", "2h!"])
def test_a_budget_that_is_no_time_is_one_line(said):
    with pytest.raises(Refusal, match="a budget is a time"):
        seconds_of(said)


def test_without_a_budget_the_default_bounds_the_trials_also_of_a_target():
    def limits(trials: int = 0, budget: str = "", target: float = 0.0) -> Limits:
        return Limits.of(trials=trials, budget=budget, target=target, default=20)

    assert limits() == Limits(trials=20)
    assert limits(target=0.9) == Limits(trials=20, target=0.9)
    assert limits(budget="1m", target=0.9) == Limits(seconds=60, target=0.9)
    assert limits(trials=3, budget="1m") == Limits(trials=3, seconds=60)
    with pytest.raises(Refusal, match="target"):
        limits(target=90)


def test_a_budget_counts_the_time_of_all_runs_and_finishes_the_last_trial(tmp_path, monkeypatch):
    clock = [0.0]
    watch = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("endoprint.search.tuning.time", watch)

    def ten_seconds(trial: Trial) -> float:
        clock[0] += 10.0
        return minus_square(trial)

    counts = []
    for seconds in (25, 25, 45):
        study = begun(tmp_path)
        tune(study, Parabola, {}, ten_seconds, limits=Limits(seconds=seconds))
        counts.append((n_finished(study), seconds_spent(study)))
    assert counts == [(3, 30.0), (3, 30.0), (5, 50.0)]


def test_a_failed_trial_spends_its_time_too(tmp_path, monkeypatch):
    clock = [0.0]
    watch = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("endoprint.search.tuning.time", watch)

    def objective(trial: Trial) -> float:
        clock[0] += 10.0
        if trial.number == 0:
            raise MemoryError("no room")
        return 0.5

    study = begun(tmp_path)
    tune(study, Parabola, {}, objective, limits=Limits(seconds=15))
    assert (n_finished(study), seconds_spent(study)) == (1, 20.0)


def test_a_target_ends_the_search_at_the_first_trial_that_reaches_it(tmp_path):
    study = begun(tmp_path)
    tune(study, Parabola, {"x": 0.5}, minus_square, limits=Limits(trials=50, target=-0.25))
    assert n_finished(study) == 1
    tune(study, Parabola, {}, minus_square, limits=Limits(trials=50, target=-0.1))
    found = [trial.value for trial in study.trials]
    assert found[-1] >= -0.1 > max(found[:-1])


# -- what is asked first --------------------------------------------------------------------------
class Chooses(Config):
    x: Annotated[float, FloatDistribution(-2.0, 2.0)] = 1.5
    kind: Annotated[str | None, CategoricalDistribution(["a", "b"])] = None  # none: the fit's


def test_what_the_fit_chooses_for_itself_is_not_asked_of_the_first_trial(tmp_path):
    heard = []
    study = begun(tmp_path)
    tune(study, Chooses, {}, lambda t: heard.append(t.values) or 0.5, limits=Limits(trials=3))
    assert heard[0] == {"x": 1.5}
    assert all(set(values) == {"x", "kind"} for values in heard[1:])


def an_earlier(folder: Path, name: str, figures: Sequence[float], *, units=("a", "b"), model="m"):
    ranges = Parabola.search_space()
    told = about(model, ranges, development=list(units))
    study = open_study(folder / "s.log", name, seed=len(name), about=told)
    for figure in figures:
        trial = study.ask(ranges)
        study.tell(trial, figure)
    done = sorted(study.trials, key=lambda t: -t.value)
    return study, [t.params for t in done]


def test_an_earlier_studys_values_come_second_and_its_figures_never(tmp_path):
    _, old = an_earlier(tmp_path, "old", [0.2, 0.99])
    _, newer = an_earlier(tmp_path, "newer", [0.1, 0.3, 0.2, 0.25])
    now, _ = an_earlier(tmp_path, "now", [], units=("c",))
    tune(
        now, Parabola, {}, minus_square, limits=Limits(trials=6),
        earlier=lambda: earlier_values(tmp_path / "s.log", now, test=["z"]),
    )  # fmt: skip
    wanted = [{"x": 1.5}, newer[0], old[0], newer[1]]  # each study's best, then the second
    assert [trial.params for trial in now.trials[:4]] == wanted
    assert [trial.value for trial in now.trials[1:4]] == [-(w["x"] ** 2) for w in wanted[1:]]


def test_values_chosen_on_what_is_a_test_unit_today_are_passed_over(tmp_path):
    an_earlier(tmp_path, "old", [0.5], units=("a", "b"))
    now, _ = an_earlier(tmp_path, "now", [])
    assert earlier_values(tmp_path / "s.log", now, test=["b"]) == []
    assert len(earlier_values(tmp_path / "s.log", now, test=["c"])) == 1


def test_values_handed_on_by_a_study_are_passed_over_where_its_own_source_would_be(tmp_path):
    first, _ = an_earlier(tmp_path, "first", [0.5], units=("a",))
    second, _ = an_earlier(tmp_path, "second", [], units=("b",))
    tune(
        second, Parabola, {}, minus_square, limits=Limits(trials=3),
        earlier=lambda: earlier_values(tmp_path / "s.log", second, test=["z"]),
    )  # fmt: skip
    now, _ = an_earlier(tmp_path, "now", [], units=("c",))
    assert earlier_values(tmp_path / "s.log", now, test=["a"]) == []
    assert len(earlier_values(tmp_path / "s.log", now, test=["z"])) == 3


def test_values_of_another_model_or_other_ranges_are_none_of_this_ones(tmp_path):
    an_earlier(tmp_path, "other", [0.5], model="other")
    now, _ = an_earlier(tmp_path, "now", [])
    other = open_study(
        tmp_path / "s.log", "wider", seed=0,
        about=about("m", {"x": FloatDistribution(-9, 9)}, development=["a"]),
    )  # fmt: skip
    other.tell(other.ask({"x": FloatDistribution(-9, 9)}), 0.9)
    assert earlier_values(tmp_path / "s.log", now, test=[]) == []


# -- killed, out of memory, by many ---------------------------------------------------------------
def test_a_resumed_search_asks_what_an_uninterrupted_one_asks(tmp_path):
    for name, totals in (("whole", [9]), ("parts", [2, 3, 9])):
        for total in totals:
            study = open_study(tmp_path / f"{name}.log", "s", seed=3)
            tune(study, Parabola, {}, minus_square, limits=Limits(trials=total))
    whole, parts = (open_study(tmp_path / f"{n}.log", "s", seed=3) for n in ("whole", "parts"))
    assert [t.params for t in whole.trials] == [t.params for t in parts.trials]


BY_MANY = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_search import Limits, Parabola, minus_square, open_study, tune
    fatal = [float(word) for word in sys.argv[4:]]
    def objective(trial):
        if trial.values["x"] in fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return minus_square(trial)
    study = open_study(Path(sys.argv[1]), "s", seed=0)
    tune(study, Parabola, {}, objective, limits=Limits(trials=int(sys.argv[3])))
    """
)


def by_many(folder: Path, n_processes: int, total: int, *fatal: float) -> list[int]:
    """Search with several processes at once; return how each ended."""
    words = [sys.executable, "-c", BY_MANY, str(folder / "s.log"), str(Path(__file__).parent)]
    words += [str(total), *map(str, fatal)]
    started = [subprocess.Popen(words) for _ in range(n_processes)]
    return [process.wait(timeout=300) for process in started]


@pytest.mark.slow
def test_values_that_were_killed_are_tried_once_more_and_not_for_ever(tmp_path):
    for _ in range(2):  # the first values kill their process, as the kernel does for memory
        assert by_many(tmp_path, 1, 3, 1.5) == [-signal.SIGKILL]
    assert by_many(tmp_path, 1, 3, 1.5) == [0]
    study = begun(tmp_path)
    killed = [t.params for t in study.trials if t.state == TrialState.FAIL]
    assert killed == [{"x": 1.5}] * 2
    assert n_finished(study) == 3


@pytest.mark.slow
def test_four_processes_run_exactly_what_was_asked_and_each_first_value_once(tmp_path):
    assert by_many(tmp_path, 4, 13) == [0] * 4
    study = begun(tmp_path)
    counted = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(counted) == 13
    assert [t.params["x"] for t in counted].count(1.5) == 1
    assert len({t.params["x"] for t in counted}) == 13  # nobody asks what another asked
    assert {t.state for t in study.trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    by_many(tmp_path, 4, 13)
    assert n_finished(begun(tmp_path)) == 13


@pytest.mark.slow
def test_of_four_processes_one_is_killed_and_the_others_make_up_for_it(tmp_path):
    ended = by_many(tmp_path, 4, 8, 1.5)
    assert sorted(ended)[:1] == [-signal.SIGKILL]
    by_many(tmp_path, 1, 8)  # where the values killed a second process, or no one was left
    study = begun(tmp_path)
    assert n_finished(study) == 8
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.FAIL}


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), torch.OutOfMemoryError("no room"), np.linalg.LinAlgError()]
)
def test_a_trial_that_fails_for_want_of_memory_is_recorded_and_the_study_goes_on(tmp_path, error):
    def objective(trial: Trial) -> float:
        if trial.number == 1:
            raise error
        return minus_square(trial)

    study = begun(tmp_path)
    tune(study, Parabola, {}, objective, limits=Limits(trials=3))
    table = table_of(study)
    assert list(table["state"]) == ["complete", "failed", "complete", "complete"]
    assert table.loc[1, "error"].startswith(type(error).__name__)


def test_a_database_that_is_not_there_is_one_line_without_its_password(tmp_path, monkeypatch):
    for address in (
        "postgresql+psycopg://lab:hush@127.0.0.1:9/optuna", "nosuch://lab:hush@127.0.0.1/x",
        "postgresql+psycopg://127.0.0.1:9/optuna?user=lab&password=hush", "hush",
    ):  # fmt: skip
        monkeypatch.setenv("OPTUNA_STORAGE", address)
        with pytest.raises(Refusal, match="OPTUNA_STORAGE") as refused:
            begun(tmp_path)
        assert "hush" not in str(refused.value)
        assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    "error", [ConnectionError("a store is away"), Away("a store answers", "none", "start it")]
)
def test_an_error_that_is_not_the_trials_gives_its_values_back_and_is_raised(tmp_path, error):
    def away(trial: Trial) -> float:
        if trial.number == 1:
            raise error
        return minus_square(trial)

    with pytest.raises(type(error)):
        tune(begun(tmp_path), Parabola, {}, away, limits=Limits(trials=3))
    study = begun(tmp_path)  # and the same process goes on, as a flow's second try does
    tune(study, Parabola, {}, minus_square, limits=Limits(trials=3))
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) == 3
    assert TrialState.RUNNING not in states
    assert study.trials[2].params == study.trials[1].params


def test_a_figure_that_is_no_number_is_a_failure_like_others(tmp_path):
    with pytest.raises(Refusal, match="three failures in a row, the last: .*no number"):
        tune(begun(tmp_path), Parabola, {}, lambda trial: math.nan, limits=Limits(trials=9))


# -- pruning --------------------------------------------------------------------------------------
def curves_of(study: optuna.Study, curves: Sequence[Sequence[float]]) -> list[str]:
    """Run trials that report these curves, from epoch 1; return how each ended."""
    told = iter(curves)

    def objective(trial: Trial) -> float:
        for epoch, level in enumerate(next(told), start=1):
            trial.watch(epoch, {"valid_macro_f1": level})
        return 0.5

    tune(study, Parabola, {}, objective, limits=Limits(trials=len(curves)))
    return [trial.state.name for trial in study.trials]


def test_past_half_of_the_epochs_goes_the_better_half_of_those_that_came_there():
    study = optuna.create_study(direction="maximize", pruner=Halving())
    levels = np.random.default_rng(0).random(30)
    # each fit was as good as it is only once: noise after that is not held against it
    ended = curves_of(study, [[0.0, level, *[0.1 * level] * 7] for level in levels])
    for n, level in enumerate(levels):
        rank = int((levels[:n] > level).sum())  # how many before it were better by epoch 5
        goes_on = n == 0 or rank < math.ceil((n + 1) / 2)
        assert ended[n] == ("COMPLETE" if goes_on else "PRUNED"), n
    assert {len(t.intermediate_values) for t in study.trials if t.state.name == "PRUNED"} == {5}


def test_nothing_is_given_up_before_a_trial_came_to_its_end():
    study = optuna.create_study(direction="maximize", pruner=Halving())
    first, second = study.ask(), study.ask()
    for epoch in (1, 2, 3):
        first.report(0.9, epoch)
        second.report(0.1, epoch)
        assert not second.should_prune()


def test_epochs_that_only_a_further_fold_reaches_decide_nothing(tmp_path):
    def objective(trial: Trial) -> float:
        for n_epochs in (3, 8):
            for epoch in range(1, n_epochs + 1):
                trial.watch(epoch, {"valid_macro_f1": 0.5 if epoch < 4 else -trial.number})
        return 0.5

    study = begun(tmp_path)
    tune(study, Parabola, {}, objective, limits=Limits(trials=5))
    assert {t.last_step for t in study.trials} == {3}
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}


def test_penalties_that_are_tried_and_further_folds_decide_nothing(tmp_path):
    def objective(trial: Trial) -> float:
        for epoch in (1, 2, 3):
            trial.watch(epoch, {"valid_macro_f1": 0.5})
        for epoch in (1, 2, 3):  # another fold, which is harder
            trial.watch(epoch, {"valid_macro_f1": 0.5 - 0.1 * trial.number})
        for step in (4, 5, 6):
            trial.watch(step, {"valid_macro_f1": 0.0, "penalty": 1.0})
        return 0.5

    study = begun(tmp_path)
    tune(study, Parabola, {}, objective, limits=Limits(trials=5))
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}
    assert all(t.intermediate_values == {1: 0.5, 2: 0.5, 3: 0.5} for t in study.trials)


# -- quality and cost -----------------------------------------------------------------------------
def test_of_equal_quality_the_cheapest_is_proposed_and_the_front_is_what_none_beats(tmp_path):
    quality = [0.800, 0.795, 0.791, 0.789, 0.700, 0.600]
    cost = [9.0, 5.0, 4.0, 3.0, 1.0, 2.0]
    study = open_study(tmp_path / "s.log", "s", seed=0, objective="quality-cost")

    def objective(trial: Trial) -> tuple[float, float]:
        trial.watch(1, {"valid_macro_f1": 0.0})  # heard, and nothing is pruned for it
        return quality[trial.number], cost[trial.number]

    tune(study, Parabola, {}, objective, limits=Limits(trials=6, target=0.9))
    beaten = [
        any(q >= quality[i] and c <= cost[i] and (q, c) != (quality[i], cost[i])
            for q, c in zip(quality, cost, strict=True))
        for i in range(6)
    ]  # fmt: skip
    assert front(study) == [i for i in range(6) if not beaten[i]] == [0, 1, 2, 3, 4]
    assert best(study).number == 2  # within .01 of the best; the next is cheaper, and is not


def test_the_value_that_decides_is_said_to_matter_most_for_both_objectives(tmp_path):
    class Two(Config):
        x: Annotated[float, FloatDistribution(-2.0, 2.0)] = 1.5
        idle: Annotated[float, FloatDistribution(0.0, 1.0)] = 0.5

    one = begun(tmp_path)
    tune(one, Two, {}, minus_square, limits=Limits(trials=20))
    two = open_study(tmp_path / "s.log", "two", seed=0, objective="quality-cost")
    tune(two, Two, {}, lambda t: (minus_square(t), t.values["idle"]), limits=Limits(trials=20))
    for study in (one, two):
        shares = importance(study)
        assert max(shares, key=lambda name: shares[name]) == "x"
        assert sum(shares.values()) == pytest.approx(1.0)
    few = open_study(tmp_path / "s.log", "few", seed=0)
    tune(few, Two, {}, minus_square, limits=Limits(trials=3))
    assert importance(few) == {}


# -- the field under one budget -------------------------------------------------------------------
@pytest.mark.parametrize("n_models", [1, 2, 3, 7, 8, 10])
def test_halving_spends_the_budget_and_ends_with_one_or_two_models(n_models):
    going = [f"m{i}" for i in range(n_models)]
    figures = {name: float(i) for i, name in enumerate(going)}
    spent = 0.0
    for _ in range(n_rungs(n_models)):
        assert going
        spent += len(going) * share(100.0, n_models, len(going))
        going = survivors(figures, going)
    assert spent == pytest.approx(100.0)
    assert going == [f"m{n_models - 1}"]


def test_the_better_half_goes_on_and_a_model_without_a_figure_is_the_worst():
    assert survivors({"a": 0.1, "b": None, "c": 0.3, "d": 0.3}, ["a", "b", "c", "d"]) == ["c", "d"]
    assert survivors({"a": 0.1, "b": None, "c": 0.3}, ["a", "b", "c"]) == ["a", "c"]


def test_the_best_within_a_time_is_the_same_however_long_the_study_went_on(tmp_path, monkeypatch):
    clock, figures = [0.0], [0.1, 0.3, 0.2, 0.9]
    watch = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("endoprint.search.tuning.time", watch)

    def ten_seconds(trial: Trial) -> float:
        clock[0] += 10.0
        return figures[trial.number]

    heard = []
    for total in (2, 4):
        study = begun(tmp_path)
        tune(study, Parabola, {}, ten_seconds, limits=Limits(trials=total))
        heard.append(best_within(study, 15.0).number)
    assert heard == [1, 1]
    assert best_within(study, 40.0).number == 3
    assert best_within(study, 0.0) is None
