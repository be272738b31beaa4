"""The field judged on whole lines or whole batches never met, where the design allows it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.data import write_json
from endoprint.jobs.materials import cells_and_split, latest_fits
from endoprint.jobs.negatives import BAR, builder
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from endoprint.design import Split

BY = ("line", "batch")


def leaderboard_by(workspace: str, *, by: str) -> str:
    """Refit every model of the leaderboard with whole lines, or batches, held out in turn.

    On development units alone: test units stay closed. Returns the path of `leaderboard-BY.json`;
    the page stands beside it. Raises Refusal where the design has nothing to hold out.
    """
    space = Workspace.open(workspace)
    if by not in BY:
        raise Refusal("a board holds out whole lines or batches", by, f"one of {', '.join(BY)}")
    import pandas as pd

    from endoprint import runs, tracking
    from endoprint.report import Board, leaderboard_page

    scheme: Literal["line", "batch"] = "line" if by == "line" else "batch"
    cells, split = _held_out_by(space, scheme)
    latest = latest_fits(space)
    if not len(latest):
        raise Refusal("a leaderboard ranks fitted models", "none", "run `endoprint train MODEL`")
    rows: dict[str, dict[str, float]] = {}
    parts: dict[str, dict[str, float]] = {}
    predictions: dict[str, pd.DataFrame] = {}
    for model in map(str, latest.index):
        run_id = _judged(space, model, str(latest.loc[model, "run_id"]), cells, split)
        rows[model] = runs.final_metrics(space, run_id)
        parts[model] = runs.read_record(space, run_id, "by_unit")
        predictions[model] = runs.read_table(space, run_id, "predictions")
    table = pd.DataFrame.from_dict(rows, orient="index")
    bar = BAR if BAR in table.index else str(table.index[0])
    audit = json.loads(space.audit.read_text())
    board = Board(
        task=f"{space.params.task}, by {by}",
        table=table,
        by_unit=pd.DataFrame(parts),
        audit=audit,
        bar=bar,
        n_exposures=len(audit["exposures"]),
        flags=tuple(split.notes),
        scheme=split.scheme,
    )
    path = write_json(space.local / f"leaderboard-{by}.json", board.to_json())
    page = space.local / f"leaderboard-{by}.html"
    shown = {model: predictions[model] for model in dict.fromkeys((bar, board.leader))}
    page.write_text(
        leaderboard_page(
            board,
            predictions=shown,
            control=str(cells.uns["endoprint"]["control"]),
            provenance={"split": split.hash},
        )
    )
    with tracking.run(space, name=f"leaderboard by {by}", kind="leaderboard") as run:
        run.file(page)
        run.tags({"split_hash": split.hash, "leader": board.leader})
    return path


def _held_out_by(space: Workspace, scheme: Literal["line", "batch"]) -> tuple[AnnData, Split]:
    """Return the development cells and a split of them by whole lines or batches."""
    from endoprint.design import DesignConfig, make_split

    cells, split = cells_and_split(space)
    if split.is_technical:
        raise Refusal(
            f"a {scheme} is held out whole where units are replicated",
            "no units",
            "the leaderboard's technical folds are all there is",
        )
    # positions of all that may be fitted on; units of the test part stay closed
    final = split.parts(cells.obs, None)
    rows = sorted({*map(int, final.train), *map(int, final.valid)})
    development = cells[rows].copy()
    config = DesignConfig(scheme=scheme, n_test_units=0)
    bare = development.obs.drop(columns="split", errors="ignore")
    development.obs = bare
    return development, make_split(bare, config, space.params.seed)


def _judged(space: Workspace, model: str, run_id: str, cells: AnnData, split: Split) -> str:
    """Judge a model on this split, or find where that was done; return the run's id."""
    from endoprint import judge, runs, tracking

    tags: dict[str, Any] = {"held_out_of": run_id, "split_hash": split.hash}
    done = runs.finished(space, "control", tags)
    if done:
        return done[0]
    with (
        progress.task(f"{model} by {split.scheme}", split.n_folds) as step,
        tracking.run(
            space, name=f"{model} by {split.scheme}", kind="control", model=model,
            parent=run_id, tags=tags,
        ) as run,
    ):  # fmt: skip
        found = judge.cross_fit(
            builder(space, model, run_id), cells, split, told=step.reach, seed=space.params.seed
        )
        run.metrics(found.metrics)
        run.table("predictions", found.predictions.rename_axis("cell_id"))
        run.record("by_unit", found.by_unit["macro_f1"].astype(float).to_dict())
    return run.run_id
