"""What a study found: its table of trials, the winner, the front, which values matter."""

from __future__ import annotations

import warnings
from typing import Any

import optuna
import pandas as pd
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from endoprint.config import Refusal
from endoprint.search.study import ERROR, SECONDS

TOLERANCE = 0.01  # macro-F1: what differs by less counts as equal (benchmarks: "equal quality")
FEWEST = 8  # complete trials before it is said which values matter (a guess)
VALUE = "value."  # prefix of the columns that hold searched values


def best(study: Study) -> FrozenTrial:
    """Return the best complete trial: of equal macro-F1 the cheapest, where cost counts.

    Where it counts, macro-F1 is equal that is within .01 of the front's best.
    """
    done = complete(study)
    if not done:
        raise Refusal(
            "a winner needs a complete trial", f"none in {study.study_name}", "run more trials"
        )
    return _best(done, study)


def best_within(study: Study, seconds: float) -> FrozenTrial | None:
    """Return the best of the trials that were begun within the first so many seconds of a study.

    Trials in their order, each as long as it took: whoever asks later hears the same.
    """
    spent, heard = 0.0, list[FrozenTrial]()
    for trial in study.get_trials(deepcopy=False):
        if spent >= seconds:
            break
        spent += trial.user_attrs.get(SECONDS, 0.0)
        if trial.state == TrialState.COMPLETE:
            heard.append(trial)
    return _best(heard, study) if heard else None


def winner(study: Study) -> dict[str, Any]:
    """Return the values of the best complete trial."""
    return dict(best(study).params)


def complete(study: Study) -> list[FrozenTrial]:
    """Return the trials that came to a figure."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _best(done: list[FrozenTrial], study: Study) -> FrozenTrial:
    if len(study.directions) == 1:
        return max(done, key=lambda trial: (trial.values[0], -trial.number))
    first = max(trial.values[0] for trial in done)
    equal = [trial for trial in done if trial.values[0] >= first - TOLERANCE]
    return min(equal, key=lambda trial: (trial.values[1], trial.number))


def front(study: Study) -> list[int]:
    """Return the numbers of the trials that none beats on macro-F1 and cost at once."""
    if len(study.directions) == 1:
        return []
    return sorted(trial.number for trial in study.best_trials)


def importance(study: Study) -> dict[str, float]:
    """Return the share of what macro-F1 owes to each value, largest first; empty: too few trials.

    PED-ANOVA (Watanabe 2023, arXiv 2304.10255) over complete trials.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < FEWEST or len({trial.values[0] for trial in done}) < 2:
        return {}
    names = sorted(set().union(*(trial.params for trial in done)))
    varied = [name for name in names if len({t.params.get(name) for t in done} - {None}) > 1]
    if not varied:
        return {}
    # told a target, the estimator looks for low ones
    target = None if len(study.directions) == 1 else lambda trial: -trial.values[0]
    with warnings.catch_warnings():
        # that a value which few trials have is judged by few: shares are shown without digits
        warnings.simplefilter("ignore", UserWarning)
        found = optuna.importance.get_param_importances(study, params=varied, target=target)
    return {name: float(share) for name, share in found.items()}


def table_of(study: Study) -> pd.DataFrame:
    """Return one row per trial that ran: what was tried, and what it came to.

    Index number; columns state (complete, pruned, failed, running), macro_f1, cpu_seconds (both of
    complete trials), last_valid_macro_f1 and epochs (of those that report them), seconds, error,
    run_id, `value.<name>` for each searched value.
    """
    rows = [
        {
            "number": trial.number,
            "state": {"fail": "failed"}.get(trial.state.name.lower(), trial.state.name.lower()),
            "macro_f1": trial.values[0] if trial.values else None,
            "cpu_seconds": trial.user_attrs.get("cpu_seconds"),
            "last_valid_macro_f1": trial.intermediate_values.get(trial.last_step or 0),
            "epochs": trial.last_step,
            "seconds": trial.user_attrs.get(SECONDS),
            "error": trial.user_attrs.get(ERROR),
            "run_id": trial.user_attrs.get("run_id"),
            **{VALUE + name: value for name, value in trial.params.items()},
        }
        for trial in study.get_trials(deepcopy=False)
        if trial.params and trial.state != TrialState.WAITING
    ]
    columns = None if rows else ["number", "state", "macro_f1"]
    return pd.DataFrame(rows, columns=columns).set_index("number")
