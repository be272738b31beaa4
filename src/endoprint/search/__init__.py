"""Optuna asks, a fit answers: tuning on development units, resumable to the exact total.

The space is what the model's Config annotations carry, and nothing else. A study lives in a
journal file, or in the database that OPTUNA_STORAGE names, so that a killed search is finished by
the next one and several processes may work on one study. The winner is a proposal, shown as a diff
of `params.yaml`; nothing is changed by it.
"""

from endoprint.search.findings import (
    TOLERANCE,
    best,
    best_within,
    complete,
    front,
    importance,
    table_of,
    winner,
)
from endoprint.search.limits import Limits, Objective, SearchConfig
from endoprint.search.proposal import proposal
from endoprint.search.study import (
    about,
    earlier_values,
    find_study,
    n_finished,
    open_study,
    seconds_spent,
)
from endoprint.search.tuning import Figures, Trial, tune

__all__ = [
    "TOLERANCE",
    "Figures",
    "Limits",
    "Objective",
    "SearchConfig",
    "Trial",
    "about",
    "best",
    "best_within",
    "complete",
    "earlier_values",
    "find_study",
    "front",
    "importance",
    "n_finished",
    "open_study",
    "proposal",
    "seconds_spent",
    "table_of",
    "tune",
    "winner",
]
