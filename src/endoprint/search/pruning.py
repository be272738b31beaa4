"""When a trial is given up before its end: by successive halving, at a third of its epochs."""

from __future__ import annotations

import math

from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

REDUCTION = 3  # the third that goes on, at a third of the epochs: eta of both papers


class Halving(BasePruner):
    """Let a trial go on past a third of the epochs if it is in the best third of those there.

    Asynchronous successive halving with two rungs (ASHA: Li 2018, arXiv 1810.05934): a trial is
    held against all that came as far before it, so that no process waits for another. Epochs are
    counted by the longest complete trial of the study; before there is one, nothing is given up.
    """

    def __init__(self, reduction: int = REDUCTION) -> None:
        self.reduction = reduction

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        trials = study.get_trials(deepcopy=False)
        ends = [t.last_step for t in trials if t.state == TrialState.COMPLETE and t.last_step]
        if not ends or trial.last_step is None:
            return False
        rung = math.ceil(max(ends) / self.reduction)
        if trial.last_step != rung:
            return False
        heard = {
            t.number: t.intermediate_values[rung] for t in trials if rung in t.intermediate_values
        }
        heard[trial.number] = trial.intermediate_values[rung]
        n_going_on = math.ceil(len(heard) / self.reduction)
        better = sum(value > heard[trial.number] for value in heard.values())
        return better >= n_going_on


def pruner() -> BasePruner:
    """Return the rule that studies prune by."""
    return Halving()
