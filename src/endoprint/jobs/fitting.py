"""Jobs that fit and compare: train, leaderboard. Every fit is an MLflow run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.data import write_json
from endoprint.jobs.materials import (
    cells_and_split,
    latest_fits,
    resources,
    work_folder,
)
from endoprint.jobs.negatives import BAR, blinded, shuffled
from endoprint.jobs.searching import OBJECTIVES, n_trials_behind, search_result
from endoprint.jobs.together import Member, Plan, team
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from endoprint.design import Parts, Split
    from endoprint.judge import Judgement
    from endoprint.model import ExposureModel
    from endoprint.tracking import Run

MAPPED_AXES = 20  # of the latent, behind the map of cells


# -- training -----------------------------------------------------------------------------------
def train(workspace: str, *, model: str, tuned: str = "", night: str = "") -> str:
    """Fit a model: in every development fold, to judge it, then on all development units.

    `tuned`: not empty: with the values its search found, of the objective it names or the last.
    `night`: a name for this night's work; a fit that was finished under it is not made again,
    whoever was killed before hearing of it.
    Returns the run id; the run holds figures, tables, lineage and the fitted model. Under
    `torchrun` the processes train together (docs/many-devices.md): the lead tracks and returns the
    id, the others fit with it and return nothing.
    """
    if night:
        from endoprint import runs

        made = runs.finished(Workspace.open(workspace), "train", {"model": model, "night": night})
        if made:
            return made[0]
    with team() as member:
        if member.is_lead:
            return _train(workspace, model=model, tuned=tuned, night=night, member=member)
        _train_along(workspace, model, member.told({}))
        return ""


def _train_along(workspace: str, model: str, plan: Plan) -> None:
    """Fit what the lead fits, and keep nothing: gradients are what it is for."""
    space = Workspace.open(workspace)
    from endoprint import judge
    from endoprint.model import Resources, model_class

    cls = model_class(model)
    config = cls.Config.of(plan["config"], where=f"models.{model}")
    offered = {name: path and Path(path) for name, path in plan["resources"].items()}
    build = partial(cls, config, seed=space.params.seed, resources=Resources(**offered))
    cells, split = cells_and_split(space)
    work = Path(plan["work"])
    judge.cross_fit(build, cells, split, work=work, seed=space.params.seed)
    parts = split.parts(cells.obs, None)
    build().fit(cells[parts.train].copy(), cells[parts.valid].copy(), work=work / "fit")


def _train(workspace: str, *, model: str, tuned: str, night: str, member: Member) -> str:
    space = Workspace.open(workspace)
    from endoprint import artefact, identity, judge, tracking
    from endoprint.cells import md5
    from endoprint.lineage import metered
    from endoprint.model import model_class

    cls = model_class(model)
    values = dict(space.params.models.get(model, {}))
    if tuned:
        objective = tuned if tuned in OBJECTIVES else ""
        values |= search_result(workspace, model=model, objective=objective)["values"]
    config = cls.Config.of(values, where=f"models.{model}")
    cells, split = cells_and_split(space)
    n_trials = n_trials_behind(space, model, config)
    offered = resources(space, cls)
    build = partial(cls, config, seed=space.params.seed, resources=offered)
    said = config.model_dump(mode="json")
    job = {"train": model, "config": said, "cells": md5(space.cells), "split": split.hash}
    with (
        progress.task(f"train {model}", split.n_folds + 1) as step,
        tracking.run(
            space,
            name=model,
            kind="train",
            model=model,
            tags={
                "tuned": n_trials > 0,
                "tuned_trials": n_trials,
                "cells_md5": md5(space.cells),
                "trainer": identity.known_as(space.tracking_uri),
                "night": night or None,
            },
        ) as run,
        work_folder(space, job, run.run_id) as work,
    ):
        run.params(config)
        run.record("config", said)
        paths = {name: path and str(path) for name, path in vars(offered).items()}
        member.told({"config": said, "resources": paths, "work": str(work)})
        with metered() as meter:
            judged = judge.cross_fit(
                build, cells, split, work=work,
                told=lambda done, total: step.reach(done, total + 1), seed=space.params.seed,
            )  # fmt: skip
            parts = split.parts(cells.obs, None)
            final = build().fit(
                cells[parts.train].copy(), cells[parts.valid].copy(),
                watch=run.watch, work=work / "fit",
            )  # fmt: skip
        folder = work / "model"
        final.save(folder)
        run.model(folder, sha256=artefact.digest(folder))
        _log_judgement(run, judged, cells)
        run.metrics({"n_parameters": final.n_parameters()})
        run.record("audit", json.loads(space.audit.read_text()))
        _log_origin(space, run, final, cells, split, parts, meter.cost)
    return run.run_id


def figures_of(workspace: str, run_id: str) -> dict[str, float]:
    """Return the final figures of a run."""
    from endoprint import runs

    return runs.final_metrics(Workspace.at(workspace), run_id)


def _log_judgement(run: Run, judged: Judgement, cells: AnnData) -> None:
    from endoprint import report as figures
    from endoprint.breakdown import breakdown

    control = str(cells.uns["endoprint"]["control"])
    run.metrics(judged.metrics)
    run.table("predictions", judged.predictions.rename_axis("cell_id"))
    run.table("samples", judged.samples.rename_axis("sample"))
    run.table("folds", judged.folds)
    by_unit = judged.by_unit["macro_f1"].astype(float)
    units = {str(name): figure for name, figure in by_unit.items()}
    run.record("by_unit", units)
    part = "unit" if judged.is_replicated else "part"
    run.description(figures.fitted(judged.metrics, units, part=part))
    run.figure("confusion", figures.confusion(judged.predictions))
    run.figure("roc", figures.roc(judged.predictions, control=control))
    run.table("breakdown", breakdown(judged.predictions))
    run.figure("precision_recall", figures.precision_recall(judged.predictions, control=control))
    run.figure("reliability", figures.reliability(judged.predictions))
    chance = 1.0 / judged.predictions["truth"].nunique()
    table = by_unit.to_frame(judged.model)
    run.figure("per_unit", figures.per_unit(table, chance=chance, part=part))


def _log_origin(
    space: Workspace, run: Run, final: ExposureModel, cells: AnnData, split: Split,
    parts: Parts, cost: Any,
) -> None:  # fmt: skip
    """Say which cells, units, code and base model the run's figures and model come from."""
    from endoprint.cells import md5
    from endoprint.lineage import BaseModelUsed, Lineage, pretraining_units

    unit = cells.obs["unit"].astype(str)
    backbone = final.provenance.get("backbone")
    note = final.provenance.get("note")  # what the model's name does not say
    said = [text for text in (backbone and backbone["label"], note) if text]
    lineage = Lineage.of(
        space,
        model=final.name,
        seed=space.params.seed,
        exposures=final.exposures,
        units={
            "training": sorted(set(unit.iloc[parts.train])),
            "validation": sorted(set(unit.iloc[parts.valid])),
            "development": split.development,
            "test": split.test,
            "pretraining": sorted(pretraining_units(final.provenance)),
        },
        split_hash=split.hash,
        base_model=BaseModelUsed(label="; ".join(said), sha256=backbone["sha256"])
        if backbone
        else None,
        cost=cost,
    )
    run.lineage(lineage)
    run.dataset(
        "cells",
        cells.obs[["exposure", "unit"]],
        path=space.cells,
        md5=md5(space.cells),
        used="training",
    )


# -- leaderboard --------------------------------------------------------------------------------
def leaderboard(workspace: str, *, controls: str = "") -> str:
    """Compare the latest fit of every model on the same split; return the board's path (JSON).

    The bar and the leader also meet shuffled labels, where there are units enough to shuffle in.
    `controls`: "all" shuffles for every model, and adds to the bar's and the leader's what is left
    with parts of the genes, depth alone and batches.
    """
    space = Workspace.open(workspace)
    if controls not in ("", "all"):
        raise Refusal("controls are those of the bar and the leader, or all", controls, "say all")
    import pandas as pd

    from endoprint import runs, tracking
    from endoprint.report import Board, described, headline, leaderboard_page

    cells, split = cells_and_split(space)
    latest = latest_fits(space)
    if not len(latest):
        raise Refusal(
            "a leaderboard ranks fitted models",
            "none of these cells and this split",
            "run `endoprint train MODEL`",
        )
    bar = BAR if BAR in latest.index else str(latest.index[0])
    leader = str(latest["macro_f1"].astype(float).idxmax())
    asked = list(latest.index) if controls else [bar, leader]
    said: list[str] = []
    for model in dict.fromkeys(map(str, asked)):
        run_id = str(latest.loc[model, "run_id"])
        control = shuffled(space, model, run_id, cells, split)
        if control.get("is_informative"):
            latest.loc[model, "shuffled_macro_f1"] = control["macro_f1"]
            latest.loc[model, "against_shuffled"] = _against(space, run_id, control)
        said.append(str(control["said"]))
        if controls and model in (bar, leader):
            said += [str(one["said"]) for one in blinded(space, model, run_id, cells, split)]
    by_unit = {
        model: runs.read_record(space, str(row["run_id"]), "by_unit")
        for model, row in latest.iterrows()
    }
    audit = json.loads(space.audit.read_text())
    columns = [name for name in latest.columns if not name.startswith("param.")]
    board = Board(
        task=space.params.task,
        table=latest[columns],
        by_unit=pd.DataFrame(by_unit),
        audit=audit,
        bar=bar,
        n_exposures=len(audit["exposures"]),
        labels={str(m): str(b) for m, b in latest["base_model"].dropna().items()},
        flags=(*split.notes, *_tuned(latest), *_borrowed(latest), *dict.fromkeys(said)),
        scheme=split.scheme,
    )
    path = write_json(space.local / "leaderboard.json", board.to_json())
    page = space.local / "leaderboard.html"
    predictions = {
        model: runs.read_table(space, str(latest.loc[model, "run_id"]), "predictions")
        for model in dict.fromkeys((bar, leader))
    }
    vehicle = str(cells.uns["endoprint"]["control"])
    page.write_text(
        leaderboard_page(
            board,
            predictions=predictions,
            control=vehicle,
            provenance={"split": split.hash},
            vectors=_vectors(cells, predictions[leader]),
        )
    )
    with tracking.run(space, name="leaderboard", kind="leaderboard") as run:
        run.file(Path(path))
        run.file(page)
        run.tags({"split_hash": split.hash, "leader": leader})
        run.description(described(board))
        run.of_task(
            headline(
                board,
                experiment=run.experiment_id,
                run_id=run.run_id,
                versions=space.experiment,
            )
        )
        run.metrics({"macro_f1": float(board.ranked["macro_f1"].iloc[0])})
    return path


def _tuned(latest: pd.DataFrame) -> list[str]:
    """Say of every model whose values were chosen by these very figures that they were."""
    tried = latest["tuned_trials"].fillna("0").astype(int)  # tags are text
    return [
        f"{model}: tuned on these units. Its values are the best of {n} trials on them, so that "
        "its figure flatters it beside a model that was not tuned."
        for model, n in tried.items()
        if n
    ]


def _against(space: Workspace, run_id: str, control: dict[str, Any]) -> str:
    """Say whether a model is better than its own shuffled-label control, unit by unit."""
    import pandas as pd

    from endoprint import runs
    from endoprint.paired import compare_units

    if "by_unit" not in control:  # a control kept before units were
        return ""
    own = pd.Series(runs.read_record(space, run_id, "by_unit"), dtype=float)
    return compare_units(own, pd.Series(control["by_unit"], dtype=float)).verdict


def _borrowed(latest: pd.DataFrame) -> list[str]:
    """Say where a model knew genes that were found in an atlas like the one it is judged on."""
    if "signature" not in latest.index:
        return []
    return [
        "signature: its published panels come from the neural-organoid atlas (NOHA). On cells of "
        "that atlas, or simulated after it, it has seen what it is judged on."
    ]


def _vectors(cells: AnnData, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return judged cells in the latent, for a picture alone: fitted on the very cells shown."""
    import pandas as pd

    from endoprint.latent import Latent

    shown = cells[cells.obs_names.isin(predictions.index)]
    place = Latent.fit(shown, width=MAPPED_AXES).transform(shown)
    return pd.DataFrame(place, index=shown.obs_names)
