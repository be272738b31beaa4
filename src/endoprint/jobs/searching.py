"""The job that tunes a model, and what its study came to."""

from __future__ import annotations

from typing import Any

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


def search(workspace: str, *, model: str, trials: int) -> str:
    """Tune a model on development folds; return the run id of the study."""
    space = Workspace.open(workspace)
    from endoprint import judge, tracking
    from endoprint import search as optuna_search
    from endoprint.model import model_class

    config = space.params.section("search", optuna_search.SearchConfig)
    cls = model_class(model)
    chosen = dict(space.params.models.get(model, {}))
    cells, split = cells_and_split(space)
    offered = resources(space, cls)
    seed = space.params.seed
    name = study_name(space, model)
    study = optuna_search.open_study(space.journals / f"{model}.log", name, seed=seed)
    folds = range(min(config.n_folds, split.n_folds))

    with (
        progress.task(f"search {model}", trials) as step,
        tracking.run(space, name=f"search {model}", kind="search", model=model) as parent,
    ):

        def objective(trial: optuna_search.Trial) -> float:
            values = cls.Config.of({**chosen, **trial.values}, where=f"models.{model}")
            with tracking.run(
                space, name=f"{model} trial {trial.number}", kind="trial", model=model,
                parent=parent.run_id, tags={"study": name, "split_hash": split.hash},
            ) as run:  # fmt: skip
                run.params(values)
                judged = judge.cross_fit(
                    lambda: cls(values, seed=seed, resources=offered),
                    cells, split, folds=folds, watch=both(run.watch, trial.watch), seed=seed,
                )  # fmt: skip
                run.metrics(judged.metrics)
            return judged.metrics["macro_f1"]

        optuna_search.tune(study, cls.Config, chosen, objective, n_trials=trials, told=step.reach)
        result = _search_result(space, model, study)
        parent.metrics({"best_macro_f1": result["best_macro_f1"], "n_trials": float(trials)})
        parent.params(result["values"])
        parent.record("winner", result)
    return parent.run_id


def search_result(workspace: str, *, model: str) -> dict[str, Any]:
    """Return the winner of a model's study: values, figure, and the diff it proposes."""
    space = Workspace.open(workspace)
    from endoprint import search as optuna_search

    cells_and_split(space)
    journal = space.journals / f"{model}.log"
    study = optuna_search.find_study(journal, study_name(space, model))
    if study is None:
        raise Refusal(
            "tuned values come from a search on these cells, split and other values",
            f"none of {model}",
            f"run `endoprint search {model}` first",
        )
    return _search_result(space, model, study)


def study_name(space: Workspace, model: str) -> str:
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
    return f"{space.params.task}-{model}-{digest[:12]}"


def n_trials_behind(space: Workspace, model: str, config: Config) -> int:
    """Return how many trials on the development units chose these values; 0: none did."""
    from endoprint import search as optuna_search

    journal = space.journals / f"{model}.log"
    study = optuna_search.find_study(journal, study_name(space, model))
    n_trials = 0 if study is None else optuna_search.n_finished(study)
    if study is None or not n_trials:
        return 0
    best = optuna_search.winner(study)
    said = config.model_dump()
    return n_trials if all(said[name] == value for name, value in best.items()) else 0


def _search_result(space: Workspace, model: str, study: Any) -> dict[str, Any]:
    from endoprint import search as optuna_search

    values = optuna_search.winner(study)
    diff = optuna_search.proposal(space.root / "params.yaml", model, values)
    said = (
        f"{study.best_value:.3f} macro-F1 on development folds, "
        f"the best of {optuna_search.n_finished(study)} trials"
    )
    return {
        "model": model,
        "values": values,
        "best_macro_f1": float(study.best_value),
        "n_finished": optuna_search.n_finished(study),
        "diff": diff,
        "text": f"{model}: {said}\n{diff}" if diff else f"{model}: {said}; params.yaml has them",
    }
