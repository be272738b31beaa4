"""The job that tunes a model, and what its study came to."""

from __future__ import annotations

from typing import Any

from endoprint import progress
from endoprint.jobs.materials import both, cells_and_split, resources
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
    offered = resources(space)
    seed = space.params.seed
    name = f"{space.params.task}-{model}-{split.hash[:12]}"
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
    from endoprint.design import Split

    name = f"{space.params.task}-{model}-{Split.read(space.split).hash[:12]}"
    study = optuna_search.open_study(space.journals / f"{model}.log", name, seed=space.params.seed)
    return _search_result(space, model, study)


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
