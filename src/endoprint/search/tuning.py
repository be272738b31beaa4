"""Ask, fit, tell: by one process or many, to the exact total, whatever is killed on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from optuna import Study
from optuna import Trial as Asked
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from endoprint import alive
from endoprint.config import Away, Config, Refusal
from endoprint.model import Pruned, Watch
from endoprint.search.limits import Limits
from endoprint.search.study import (
    ERROR,
    FINISHED,
    SECONDS,
    WORKER,
    n_finished,
    seconds_spent,
)
from endoprint.spelled import without_secrets

Figures = float | tuple[float, float]  # macro-F1, and processor seconds where they count
WAIT_SECONDS = 1.0  # between two looks at what others do
BIRTH_SECONDS = 30.0  # a trial is asked for, then marked with its process: in milliseconds
LOST_SECONDS = 24 * 3600.0  # what another machine began so long ago is over: as long as a flow may
MOST_FAILURES = 3  # in a row
# errors that are the trial's own; others (a store that is away, Ctrl-C) have it tried once more
TRIALS_OWN = (ArithmeticError, MemoryError, RuntimeError, ValueError)
ONCE, NAMES, STARTS = "once", "names", "starts"  # marks of trials, and of the study, with values
TAKEN = (*FINISHED, TrialState.RUNNING)


@dataclass(frozen=True)
class Trial:
    """What one trial is told: its number, the values to fit with, and whom to report to."""

    number: int
    values: dict[str, Any]
    watch: Watch  # hears of every epoch; raises Pruned
    mark: Callable[[str, Any], None] = lambda name, value: None  # keeps a word with the trial


Fit = Callable[[Trial], Figures]


def tune(
    study: Study,
    config: type[Config],
    chosen: Mapping[str, Any],
    objective: Fit,
    *,
    limits: Limits,
    earlier: Callable[[], Sequence[dict[str, Any]]] = list,
    told: Callable[[int, int], None] = lambda done, total: None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Run trials until a limit is reached; the chosen values go first, then those found earlier.

    `chosen`: what `params.yaml` says now. `earlier`: asked once, when the study begins.
    `told(done, total)`: trials, or seconds where only they are bounded. `is_wanted`: looked at
    between trials. A trial that fails, also for want of memory, is recorded and the study goes on;
    three failures in a row stop it, since then it is the set-up that is wrong.

    Several processes may tune one study. Together they run exactly `limits.trials`: who finds no
    place left waits for the trials of this machine, and takes over what a killed process leaves.
    """
    space = config.search_space()
    if not space:
        raise Refusal(
            "a search needs fields with ranges",
            f"{config.__qualname__} without any",
            "annotate a field with an Optuna distribution, or search another model",
        )
    _begin(study, space, config.of(dict(chosen), where="params.yaml"), earlier)
    failures = 0
    while is_wanted():
        close_orphans(study)
        told(*_progress(study, limits))
        if _is_over(study, limits):
            break
        asked = _claim(study, space, limits.trials)
        if asked is None:
            if not _others_run_here(study):
                break
            time.sleep(WAIT_SECONDS)
            continue
        is_done = _run(study, asked, objective)
        failures = 0 if is_done else failures + 1
        if failures == MOST_FAILURES:
            last = study.get_trials(deepcopy=False)[asked.number].user_attrs[ERROR]
            raise Refusal(
                "a search goes on while trials succeed",
                f"three failures in a row, the last: {last}",
                "mend that first; finished trials are kept",
            )
    told(*_progress(study, limits))


def _run(study: Study, asked: Asked, objective: Fit) -> bool:
    """Run one trial and tell its end; whether it came to one that counts."""
    began = time.monotonic()

    def seconds() -> float:
        return round(time.monotonic() - began, 3)

    trial = Trial(
        asked.number, dict(asked.params), _watch(study, asked, seconds), asked.set_user_attr
    )
    try:
        figures = objective(trial)
        if np.isnan(figures).any():
            raise ArithmeticError("a figure that is no number")
    except Pruned:
        asked.set_user_attr(SECONDS, seconds())
        study.tell(asked, state=TrialState.PRUNED)
    except BaseException as error:
        asked.set_user_attr(SECONDS, seconds())
        if isinstance(error, Away) or not isinstance(error, TRIALS_OWN):
            _give_back(study, study.get_trials(deepcopy=False)[asked.number])
            raise
        said = without_secrets(f"{type(error).__name__}: {error}")
        asked.set_user_attr(ERROR, said[:500])  # never hidden
        study.tell(asked, state=TrialState.FAIL)
        return False
    else:
        asked.set_user_attr(SECONDS, seconds())
        study.tell(asked, figures)
    return True


def _watch(study: Study, asked: Asked, seconds: Callable[[], float]) -> Watch:
    """Report epochs, and give up what is not worth finishing.

    An epoch is one where validation cells were called after learning; the steps of a model that
    tries penalties are none. Epochs that come again are another fold's: the first one decides.
    """
    heard, is_first_fold = -1, True

    def watch(epoch: int, metrics: dict[str, float]) -> None:
        nonlocal heard, is_first_fold
        asked.set_user_attr(SECONDS, seconds())  # also of a trial that is killed
        is_epoch = "valid_macro_f1" in metrics and "penalty" not in metrics
        if len(study.directions) > 1 or not is_epoch:
            return
        is_first_fold = is_first_fold and epoch > heard
        if not is_first_fold:
            return
        heard = epoch
        asked.report(metrics["valid_macro_f1"], epoch)
        if asked.should_prune():
            raise Pruned(f"trial {asked.number} at epoch {epoch}")

    return watch


# -- limits ---------------------------------------------------------------------------------------
def _is_over(study: Study, limits: Limits) -> bool:
    if limits.trials is not None and n_finished(study) >= limits.trials:
        return True
    if limits.seconds is not None and seconds_spent(study) >= limits.seconds:
        return True
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return limits.target is not None and any(t.values[0] >= limits.target for t in done)


def _progress(study: Study, limits: Limits) -> tuple[int, int]:
    if limits.trials is not None:
        return n_finished(study), limits.trials
    total = int(limits.seconds or 0)
    return min(int(seconds_spent(study)), total), total


# -- a trial's place ------------------------------------------------------------------------------
def _begin(
    study: Study,
    space: Mapping[str, BaseDistribution],
    now: Config,
    earlier: Callable[[], Sequence[dict[str, Any]]],
) -> None:
    """Put the first trials in the queue: today's values, then earlier studies'.

    Whatever two processes, or one that was killed, put there twice is run once (`_claim`).
    """
    if STARTS not in study.user_attrs:
        if study.trials:
            return
        # None says that the fit chooses for itself: no point of the space, and nothing is asked
        values = now.model_dump()
        own = {name: values[name] for name in space if values[name] is not None}
        starts = [own, *(each for each in earlier() if each != own)]
        study.set_user_attr(STARTS, [each for each in starts if each])
    known = {trial.user_attrs.get(ONCE) for trial in study.get_trials(deepcopy=False)}
    for number, values in enumerate(study.user_attrs[STARTS]):
        if f"start {number}" not in known:
            marks = {ONCE: f"start {number}", NAMES: list(values)}
            study.enqueue_trial(values, user_attrs=marks)


def _claim(study: Study, space: Mapping[str, BaseDistribution], most: int | None) -> Asked | None:
    """Ask for a trial and take a place for it; None where no place is left.

    The storage numbers trials one after the other. A trial may run where fewer than `most` trials
    of lower numbers have a place or wait for one: so however many ask at once, of those that run
    never more than `most` come to an end that counts.
    """
    while most is None or len(study.get_trials(deepcopy=False, states=TAKEN)) < most:
        asked = study.ask()
        asked.set_user_attr(WORKER, alive.named())
        trials = study.get_trials(deepcopy=False)
        marks = trials[asked.number].user_attrs
        before = [
            trial
            for trial in trials[: asked.number]
            if trial.state in (*TAKEN, TrialState.WAITING)
        ]
        is_again = ONCE in marks and any(t.user_attrs.get(ONCE) == marks[ONCE] for t in before)
        if is_again or (most is not None and len(before) >= most):
            asked.set_user_attr(ERROR, "another process was first")
            study.tell(asked, state=TrialState.FAIL)
            continue
        for name in marks.get(NAMES, space):
            _suggest(asked, name, space[name])
        return asked
    return None


def _suggest(asked: Asked, name: str, range_: BaseDistribution) -> None:
    if isinstance(range_, FloatDistribution):
        asked.suggest_float(name, range_.low, range_.high, step=range_.step, log=range_.log)
    elif isinstance(range_, IntDistribution):
        asked.suggest_int(name, range_.low, range_.high, step=range_.step, log=range_.log)
    elif isinstance(range_, CategoricalDistribution):
        asked.suggest_categorical(name, range_.choices)


def _others_run_here(study: Study) -> bool:
    """Whether trials of this machine run, or are just being begun."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(_host(trial) in (alive.named()["host"], None) for trial in running)


# -- trials that nobody will finish ---------------------------------------------------------------
def close_orphans(study: Study) -> None:
    """Mark trials whose process is gone as failed, and put their values in the queue once more.

    Once: values that kill their process, for want of memory, would else do so for ever.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _lives(trial):
            _give_back(study, trial)


def _give_back(study: Study, trial: FrozenTrial) -> None:
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    values = trial.system_attrs.get("fixed_params") or trial.params
    if values and not str(trial.user_attrs.get(ONCE)).startswith("again"):
        kept = {NAMES: trial.user_attrs[NAMES]} if NAMES in trial.user_attrs else {}
        study.enqueue_trial(values, user_attrs={ONCE: f"again {trial.number}", **kept})


def _lives(trial: FrozenTrial) -> bool:
    begun = trial.datetime_start
    age = (datetime.now() - begun).total_seconds() if begun else 0.0
    if _host(trial) is None:
        return age < BIRTH_SECONDS
    if _host(trial) != alive.named()["host"]:
        return age < LOST_SECONDS  # only its own machine can tell
    return alive.is_named(trial.user_attrs[WORKER])


def _host(trial: FrozenTrial) -> str | None:
    worker: dict[str, str] = trial.user_attrs.get(WORKER, {})
    return worker.get("host")
