"""Where a study lives, what it asks next, and what earlier studies are worth trying for it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError

from endoprint.config import Away, Refusal
from endoprint.search.limits import Objective
from endoprint.search.pruning import pruner

STORAGE = "OPTUNA_STORAGE"  # Optuna's own name for a database that several machines share
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
MOST_EARLIER = 3  # trials that begin with what earlier studies found (a guess)
RANDOM_TRIALS = 5  # before the model of good values is believed
SECONDS, WORKER, ERROR = "seconds", "worker", "error"  # what a trial is marked with


# -- a study --------------------------------------------------------------------------------------
def open_study(
    journal: Path,
    name: str,
    *,
    seed: int,
    objective: Objective = "quality",
    about: Mapping[str, Any] | None = None,
) -> Study:
    """Open (or begin) a study that maximises macro-F1, or that and the saving of seconds.

    `about`: what later studies need to know of this one (`earlier_values`).
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    up, down = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    study = optuna.create_study(
        study_name=name,
        storage=storage(journal),
        directions=[up] if objective == "quality" else [up, down],
        load_if_exists=True,
        sampler=ByNumber(seed),
        pruner=pruner(),
    )
    for key, value in (about or {}).items():
        if key not in study.user_attrs:
            study.set_user_attr(key, value)
    return study


def find_study(journal: Path, name: str) -> Study | None:
    """Return a study that was begun, to be read; None where there is none."""
    if not journal.is_file() and not os.environ.get(STORAGE):
        return None
    try:
        return optuna.load_study(study_name=name, storage=storage(journal))
    except KeyError:
        return None


def n_finished(study: Study) -> int:
    """How many trials count towards the total."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def seconds_spent(study: Study) -> float:
    """How long all trials took, those included that failed or were killed."""
    return float(sum(trial.user_attrs.get(SECONDS, 0.0) for trial in study.get_trials(False)))


def storage(journal: Path) -> BaseStorage:
    """Return where studies live: the environment's database, else a journal file here."""
    shared = os.environ.get(STORAGE)
    if shared:
        return _database(shared)
    journal.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(journal)))


def _database(address: str) -> RDBStorage:
    """Open a database, making its tables on first use; an error never spells the password."""
    place = _place(address)
    for patience in (1, 2, 4, 0):
        try:
            return RDBStorage(address, engine_kwargs={"pool_pre_ping": True})
        except (IntegrityError, ProgrammingError) as error:
            if not patience:
                raise _no_storage(place, error) from None
            time.sleep(patience)  # others are making the tables
        except (OperationalError, ArgumentError, ImportError, ValueError) as error:
            raise _no_storage(place, error) from None
    raise AssertionError("unreachable")


def _place(address: str) -> str:
    """Return host and database of an address, and nothing that may be a secret."""
    try:
        url = make_url(address)
    except ArgumentError:
        return "an address that can not be read"
    return f"{url.host or 'this machine'}/{url.database or ''}"


def _no_storage(place: str, error: Exception) -> Refusal:
    kind = Away if isinstance(error, OperationalError) else Refusal
    return kind(
        f"the database that {STORAGE} names answers",
        f"{type(error).__name__} from {place}",
        f"start it, or mend {STORAGE}",
    )


# -- what to ask next -----------------------------------------------------------------------------
class ByNumber(BaseSampler):
    """Ask by the tree-structured Parzen estimator, drawn by seed and number of the trial.

    What a trial is asked depends on the seed, its number and what is finished, and not on who
    asks: processes that begin together ask differently, and a resumed search as if it had not been
    cut short. (Bergstra 2011, NeurIPS 24; the estimator is Optuna's, over one or two objectives.)
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._own = TPESampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        drawn = np.random.SeedSequence([self._seed, trial.number]).generate_state(1)
        self._own = TPESampler(seed=int(drawn[0]), n_startup_trials=RANDOM_TRIALS)
        self._own.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._own.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._own.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._own.sample_independent(study, trial, param_name, param_distribution)


# -- what earlier studies found -------------------------------------------------------------------
def about(
    model: str, ranges: Mapping[str, BaseDistribution], *, development: list[str]
) -> dict[str, Any]:
    """Return what later studies need to know of one: its model, ranges and units."""
    said = {name: distribution_to_json(each) for name, each in ranges.items()}
    return {"model": model, "ranges": said, "development": sorted(development)}


def earlier_values(journal: Path, study: Study, *, test: list[str]) -> list[dict[str, Any]]:
    """Return the best values of earlier studies of the same model and ranges, newest study first.

    At most three, each study's best before any's second. Values only: figures on other cells or
    splits say nothing here. A study that was judged on a unit which is a test unit today is passed
    over: its values were chosen by what the test is to judge. So a study that takes values also
    takes over, as its own, the units that they were chosen on.
    """
    asked = study.user_attrs
    found = [
        each
        for each in optuna.get_all_study_summaries(storage(journal))
        if each.study_name != study.study_name
        and all(each.user_attrs.get(key) == asked.get(key) for key in ("model", "ranges"))
        and not set(each.user_attrs.get("development", ())) & set(test)
        and each.datetime_start is not None
    ]
    found.sort(key=lambda each: str(each.datetime_start), reverse=True)
    ranked = []
    for each in found:
        other = optuna.load_study(study_name=each.study_name, storage=storage(journal))
        done = other.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        done.sort(key=lambda trial: trial.values[0], reverse=True)
        units = set(each.user_attrs.get("development", ()))
        ranked.append([(dict(trial.params), units) for trial in done[:MOST_EARLIER]])
    values: list[dict[str, Any]] = []
    behind = set(asked.get("development", ()))
    for rank in range(MOST_EARLIER):
        for best in ranked:
            if rank >= len(best) or len(values) == MOST_EARLIER:
                continue
            taken, units = best[rank]
            if taken and taken not in values:
                values.append(taken)
                behind |= units
    study.set_user_attr("development", sorted(behind))
    return values
