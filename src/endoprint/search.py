"""Optuna asks, a fit answers: tuning on development units, resumable to the exact total.

The space is what the model's Config annotations carry, and nothing else. A study lives in a
journal file, so that a killed search is finished by the next one; the winner is a proposal, shown
as a diff of `params.yaml`, and nothing is changed by it.
"""

from __future__ import annotations

import difflib
import io
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ruamel.yaml import YAML

from endoprint.config import Config, Refusal
from endoprint.model import Pruned, Watch

STORAGE = "OPTUNA_STORAGE"  # Optuna's own name for a database that several machines share
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class SearchConfig(Config):
    """How far a search goes."""

    model: str | None = None  # the row that `endoprint run` tunes; none: no search
    trials: int = 20  # complete and pruned ones, over all runs of the study
    n_folds: int = 1  # development folds a trial is judged on; more are surer and dearer


@dataclass(frozen=True)
class Trial:
    """What one trial is told: its number, the values to fit with, and whom to report to."""

    number: int
    values: dict[str, Any]
    watch: Watch  # reports `valid_macro_f1` by epoch; raises Pruned


Objective = Callable[[Trial], float]


def open_study(journal: Path, name: str, *, seed: int) -> optuna.Study:
    """Open (or begin) a study that maximises macro-F1; trials of dead processes are closed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name,
        storage=_storage(journal),
        direction="maximize",
        load_if_exists=True,
        # a fresh stream on every resume: the same seed would ask the same questions again
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=5),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )
    _close_orphans(study)
    study.sampler.reseed_rng() if len(study.trials) else None
    return study


def find_study(journal: Path, name: str) -> optuna.Study | None:
    """Return a study that was begun, to be read; None where there is none."""
    if not journal.is_file() and not os.environ.get(STORAGE):
        return None
    try:
        return optuna.load_study(study_name=name, storage=_storage(journal))
    except KeyError:
        return None


def _storage(journal: Path) -> BaseStorage:
    """Return where studies live: the environment's database, else a journal file here."""
    shared = os.environ.get(STORAGE)
    if shared:
        return RDBStorage(shared)
    journal.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(journal)))


def tune(
    study: optuna.Study,
    config: type[Config],
    chosen: dict[str, Any],
    objective: Objective,
    *,
    n_trials: int,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run trials until `n_trials` are complete or pruned in all; the chosen values go first.

    `chosen`: what `params.yaml` says now. A trial that fails is recorded and the study goes on;
    three failures in a row stop it, since then it is the set-up that is wrong.
    """
    space = config.search_space()
    if not space:
        raise Refusal(
            "a search needs fields with ranges",
            f"{config.__qualname__} without any",
            "annotate a field with an Optuna distribution, or search another model",
        )
    if not study.trials:
        now = config.of(chosen, where="params.yaml").model_dump()
        # None says that the fit chooses for itself: no point of the space
        study.enqueue_trial({name: now[name] for name in space if now[name] is not None})
    failures = 0
    while (done := n_finished(study)) < n_trials:
        told(done, n_trials)
        trial = study.ask(space)
        trial.set_user_attr("host", platform.node())
        trial.set_user_attr("pid", os.getpid())
        trial.set_user_attr("born", psutil.Process().create_time())
        try:
            figure = objective(Trial(trial.number, dict(trial.params), _watch(trial)))
        except Pruned:
            study.tell(trial, state=TrialState.PRUNED)
            failures = 0
        except (ArithmeticError, MemoryError, RuntimeError) as error:  # recorded, never hidden
            trial.set_user_attr("error", f"{type(error).__name__}: {error}"[:500])
            study.tell(trial, state=TrialState.FAIL)
            failures += 1
            if failures == 3:
                raise Refusal(
                    "a search goes on while trials succeed",
                    f"three failures in a row, the last: {error}",
                    "mend that first; finished trials are kept",
                ) from error
        else:
            study.tell(trial, figure)
            failures = 0
    told(n_trials, n_trials)


def n_finished(study: optuna.Study) -> int:
    """How many trials count towards the total."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def winner(study: optuna.Study) -> dict[str, Any]:
    """Return the values of the best complete trial."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise Refusal(
            "a winner needs a complete trial", f"none in {study.study_name}", "run more trials"
        )
    return dict(study.best_params)


def proposal(params_file: Path, model: str, values: dict[str, Any]) -> str:
    """Return the winner as a unified diff of `params.yaml`; comments in the file survive."""
    yaml = YAML()  # round trip
    yaml.preserve_quotes = True
    yaml.width = 99
    before = params_file.read_text()
    document = yaml.load(before)
    section = document.setdefault("models", {})
    if not section.get(model):
        section[model] = {}
    section[model].update(values)
    normal, after = io.StringIO(), io.StringIO()
    yaml.dump(yaml.load(before), normal)  # so that only values differ, not the layout
    yaml.dump(document, after)
    lines = difflib.unified_diff(
        normal.getvalue().splitlines(), after.getvalue().splitlines(), "params.yaml", "proposed",
        lineterm="", n=2,
    )  # fmt: skip
    return "\n".join(lines)


def _watch(trial: optuna.Trial) -> Watch:
    def watch(epoch: int, metrics: dict[str, float]) -> None:
        if "valid_macro_f1" in metrics:
            trial.report(metrics["valid_macro_f1"], epoch)
            if trial.should_prune():
                raise Pruned(f"trial {trial.number} at epoch {epoch}")

    return watch


def _close_orphans(study: optuna.Study) -> None:
    """Mark trials whose process is gone as failed: they hold no result and count nowhere."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get("host", platform.node()) != platform.node():
            continue  # only its own machine can tell
        pid, born = trial.user_attrs.get("pid"), trial.user_attrs.get("born")
        try:
            alive = pid is not None and psutil.Process(pid).create_time() == born
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            study.tell(trial.number, state=TrialState.FAIL)
