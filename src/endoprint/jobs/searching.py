"""The job that tunes a model, and what its study came to."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from endoprint import progress
from endoprint.config import Config, Refusal
from endoprint.jobs.materials import (
    both,
    cells_and_split,
    pretrain_key,
    resources,
    vocabulary_sha256,
)
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from optuna import Study
    from optuna.trial import FrozenTrial

    from endoprint.search import Figures, Limits, Objective, Trial
    from endoprint.tracking import Run

OBJECTIVES: tuple[Objective, ...] = ("quality", "quality-cost")


def search(
    workspace: str,
    *,
    model: str,
    trials: int = 0,
    budget: str = "",
    target: float = 0.0,
    objective: str = "",
    workers: int = 1,
) -> str:
    """Tune a model on development folds; return the run id of the study.

    It ends at whichever comes first: `trials` (of params.yaml, unless told or a budget is), the
    `budget` ("2h", of fitting, summed over trials), the `target` macro-F1. All count over every
    run of the study. `objective`: "quality" or "quality-cost". `workers`: processes.
    """
    space = Workspace.open(workspace)
    from endoprint import tracking
    from endoprint.search import Limits, SearchConfig

    default = space.params.section("search", SearchConfig).trials
    limits = Limits.of(trials=trials, budget=budget, target=target, default=default)
    if workers < 1:
        raise Refusal("a search has at least one process", f"workers {workers}", "say 1 or more")
    asked = _objective(objective)
    tuning = Tuning.of(space, model, asked)
    with (
        progress.task(f"search {model}", limits.trials or int(limits.seconds or 0)) as step,
        tracking.run(space, name=f"search {model}", kind="search", model=model) as parent,
    ):
        with _helpers(workers - 1, workspace, model, asked, limits, parent.run_id):
            tuning.run(limits, parent.run_id, told=step.reach)
        report(space, tuning, parent)
    return parent.run_id


def _objective(named: str) -> Objective:
    for known in OBJECTIVES:
        if named in (known, ""):
            return known
    raise Refusal("a search has an objective it knows", named, f"say {' or '.join(OBJECTIVES)}")


# -- one study ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tuning:
    """One model's study in a workspace, and all that a trial is fitted with."""

    space: Workspace
    model: str
    study: Study
    chosen: dict[str, Any]  # what params.yaml says of the model

    @classmethod
    def of(cls, space: Workspace, model: str, objective: Objective = "quality") -> Tuning:
        """Open (or begin) a model's study."""
        from endoprint import search as optuna_search
        from endoprint.model import model_class

        _, split = cells_and_split(space)
        ranges = model_class(model).Config.search_space()
        study = optuna_search.open_study(
            journal_of(space, model),
            study_name(space, model, objective),
            seed=space.params.seed,
            objective=objective,
            about=optuna_search.about(model, ranges, development=list(split.development)),
        )
        return cls(space, model, study, dict(space.params.models.get(model, {})))

    def run(
        self,
        limits: Limits,
        parent: str,
        *,
        told: Any = lambda done, total: None,
        is_wanted: Any = lambda: True,
    ) -> None:
        """Run trials until a limit is reached, each a run in MLflow nested under `parent`."""
        from endoprint import search as optuna_search
        from endoprint.model import model_class

        space, cls = self.space, model_class(self.model)
        cells, split = cells_and_split(space)
        config = space.params.section("search", optuna_search.SearchConfig)
        fit = _Fit(self, parent, cells, split, range(min(config.n_folds, split.n_folds)))
        optuna_search.tune(
            self.study, cls.Config, self.chosen, fit, limits=limits, told=told,
            is_wanted=is_wanted,
            earlier=lambda: optuna_search.earlier_values(
                journal_of(space, self.model), self.study, test=list(split.test)
            ),
        )  # fmt: skip


class _Fit:
    """Fit one trial on development folds, tracked; return what it is judged by."""

    def __init__(self, tuning: Tuning, parent: str, cells: Any, split: Any, folds: range) -> None:
        from endoprint.model import model_class

        self._tuning, self._parent = tuning, parent
        self._cells, self._split, self._folds = cells, split, folds
        self._cls = model_class(tuning.model)
        self._offered = resources(tuning.space, self._cls)

    def __call__(self, trial: Trial) -> Figures:
        from endoprint import judge, tracking
        from endoprint.model import Pruned

        space, model = self._tuning.space, self._tuning.model
        values = self._cls.Config.of(
            {**self._tuning.chosen, **trial.values}, where=f"models.{model}"
        )
        seed = space.params.seed
        given_up: Pruned | None = None
        with tracking.run(
            space, name=f"{model} trial {trial.number}", kind="trial", model=model,
            parent=self._parent,
            tags={"study": self._tuning.study.study_name, "split_hash": self._split.hash},
        ) as run:  # fmt: skip
            trial.mark("run_id", run.run_id)
            run.params(values)
            try:
                judged = judge.cross_fit(
                    lambda: self._cls(values, seed=seed, resources=self._offered),
                    self._cells, self._split, folds=self._folds,
                    watch=both(run.watch, trial.watch), seed=seed,
                )  # fmt: skip
            except Pruned as error:
                # FINISHED, and marked: it did what was asked of it, and its curve is worth
                # keeping. KILLED is what a crash leaves, which `endoprint gc` deletes
                run.tags({"pruned": True})
                run.description(f"given up: {error}")
                given_up = error
            except (Refusal, MemoryError, OSError):
                raise  # said well enough; or a disk that is away, which is no fault of the values
            except Exception as error:  # a library's own kind: the trial's, and the study goes on
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            else:
                run.metrics(judged.metrics)
        if given_up is not None:
            raise given_up
        quality, cost = judged.metrics["macro_f1"], judged.metrics["cpu_seconds"]
        trial.mark("cpu_seconds", round(cost, 3))
        return quality if len(self._tuning.study.directions) == 1 else (quality, cost)


# -- further processes ----------------------------------------------------------------------------
@contextmanager
def _helpers(
    n: int, workspace: str, model: str, objective: Objective, limits: Limits, parent: str
) -> Iterator[None]:
    """Let `n` further processes work on a study beside the block; each ends its last trial."""
    context = multiprocessing.get_context("spawn")  # threads of this one are not copied
    words = (workspace, model, objective, limits, parent, os.getpid())
    started: list[SpawnProcess] = []
    try:
        for _ in range(n):
            process = context.Process(target=_help, args=words, daemon=True)
            process.start()
            started.append(process)
        yield
        for each in started:
            each.join()
    finally:
        for each in started:
            if each.is_alive():
                each.kill()
            each.join()


def _help(
    workspace: str, model: str, objective: Objective, limits: Limits, parent: str, lead: int
) -> None:
    """Run trials of a study that another process leads, until it is over or the lead is gone."""
    tuning = Tuning.of(Workspace.open(workspace), model, objective)
    with suppress(Refusal):  # the lead meets the same, and says it
        tuning.run(limits, parent, is_wanted=lambda: os.getppid() == lead)


# -- what it came to ------------------------------------------------------------------------------
def report(
    space: Workspace, tuning: Tuning, parent: Run, *, best: FrozenTrial | None = None
) -> None:
    """Keep with a study's run what it came to: figures, table, winner, and the proposal.

    `best`: the trial that is proposed; none: the study's best.
    """
    from endoprint import report as drawn
    from endoprint import search as optuna_search
    from endoprint.model import model_class

    study, model = tuning.study, tuning.model
    result = result_of(space, model, study, best=best)
    table = optuna_search.table_of(study)
    shares = optuna_search.importance(study)
    ranges = model_class(model).Config.search_space()
    parent.params(result["values"])
    parent.metrics({"best_macro_f1": result["best_macro_f1"], "n_trials": result["n_finished"]})
    parent.record("winner", result)
    parent.table("trials", table)
    parent.text("proposal.diff", result["diff"] and result["diff"] + "\n")
    parent.figure("history", drawn.search_history(table, model=model))
    parent.figure("importance", drawn.search_importance(shares, model=model))
    parent.figure("slice", drawn.search_slices(table, ranges, best=result["trial"]))
    if len(study.directions) > 1:
        on_front = optuna_search.front(study)
        parent.figure("front", drawn.search_front(table, on_front, best=result["trial"]))
    said = drawn.described_search(result, table, shares)
    parent.tags({"study": study.study_name, "tuned_trials": result["n_finished"]})
    parent.description(said)


def search_result(workspace: str, *, model: str, objective: str = "") -> dict[str, Any]:
    """Return the winner of a model's study: values, figure, and the diff it proposes.

    Of the study that was worked on last, unless an objective is told.
    """
    space = Workspace.open(workspace)
    cells_and_split(space)
    found = _studies(space, model)
    if objective:
        found = {_objective(objective): found[_objective(objective)]} if objective in found else {}
    if not found:
        raise Refusal(
            "tuned values come from a search on these cells, split and other values",
            f"none of {model}",
            f"run `endoprint search {model}` first",
        )
    return result_of(space, model, max(found.values(), key=_last_worked_on))


def _studies(space: Workspace, model: str) -> dict[str, Study]:
    """Return a model's studies on today's cells, split and values, by objective."""
    from endoprint import search as optuna_search

    journal = journal_of(space, model)
    found = {
        objective: optuna_search.find_study(journal, study_name(space, model, objective))
        for objective in OBJECTIVES
    }
    return {objective: study for objective, study in found.items() if study is not None}


def _last_worked_on(study: Study) -> str:
    begun = [t.datetime_start for t in study.get_trials(False) if t.datetime_start]
    return max(map(str, begun), default="")  # queued ones were not worked on


def journal_of(space: Workspace, model: str) -> Any:
    """Return the file in which a model's studies are kept, where no database is."""
    return space.journals / f"{model}.log"


def study_name(space: Workspace, model: str, objective: Objective = "quality") -> str:
    """Return what a study is known by: trials compare only where all but the searched is equal."""
    from optuna.distributions import distribution_to_json

    from endoprint.cells import md5
    from endoprint.design import Split
    from endoprint.lineage import hash_of
    from endoprint.model import model_class
    from endoprint.search import SearchConfig

    cls = model_class(model)
    ranges = cls.Config.search_space()
    chosen = cls.Config.of(dict(space.params.models.get(model, {})), where=f"models.{model}")
    fixed = chosen.model_dump(mode="json", exclude=set(ranges))
    digest = hash_of(
        {
            "cells": md5(space.cells),
            "split": Split.read(space.split).hash,
            "n_folds": space.params.section("search", SearchConfig).n_folds,
            "fixed": fixed,
            "ranges": {name: distribution_to_json(each) for name, each in ranges.items()},
            "vocabulary": vocabulary_sha256(space),
            "backbone": space.params.checkpoint or (space.params.pretrain and pretrain_key(space)),
            "seed": space.params.seed,
        }
    )
    kind = "" if objective == "quality" else f"-{objective}"
    return f"{space.params.task}-{model}{kind}-{digest[:12]}"


def n_trials_behind(space: Workspace, model: str, config: Config) -> int:
    """Return how many trials on the development units chose these values; 0: none did."""
    from endoprint import search as optuna_search

    said = config.model_dump()
    chosen = [0]
    for study in _studies(space, model).values():
        for trial in optuna_search.complete(study):
            # what a trial was not asked, its fit chose for itself
            is_it = all(said[name] == trial.params.get(name) for name in config.search_space())
            # today's values come first: nobody chose them for their figure unless they won
            if is_it and (trial.number or trial == optuna_search.best(study)):
                chosen.append(optuna_search.n_finished(study))
    return max(chosen)


def result_of(
    space: Workspace, model: str, study: Study, *, best: FrozenTrial | None = None
) -> dict[str, Any]:
    """Return a study's winner as plain values, with the text a person reads."""
    from endoprint import search as optuna_search

    best = best or optuna_search.best(study)
    values = dict(best.params)
    diff = optuna_search.proposal(
        space.root / "params.yaml", {model: news_of(space, model, values)}
    )
    figure, n_finished = float(best.values[0]), optuna_search.n_finished(study)
    said = f"{figure:.3f} macro-F1 on development folds, the best of {n_finished} trials"
    result = {
        "model": model,
        "study": study.study_name,
        "trial": best.number,
        "values": values,
        "best_macro_f1": figure,
        "n_finished": n_finished,
        "diff": diff,
    }
    if len(study.directions) > 1:
        result["cpu_seconds"] = float(best.values[1])
        said = (
            f"{figure:.3f} macro-F1 on development folds for {best.values[1]:.1f} CPU s a fit, "
            f"the cheapest within {optuna_search.TOLERANCE:g} of the best of {n_finished} trials"
        )
    return result | {
        "text": f"{model}: {said}\n{diff}" if diff else f"{model}: {said}; params.yaml has them"
    }


def news_of(space: Workspace, model: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return those of a winner's values that are not what params.yaml comes to already."""
    from endoprint.model import model_class

    chosen = dict(space.params.models.get(model, {}))
    now = model_class(model).Config.of(chosen, where=f"models.{model}").model_dump()
    return {name: value for name, value in values.items() if now[name] != value}
