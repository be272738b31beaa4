"""Jobs with what is live: score, gc."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from endoprint import progress
from endoprint.jobs.data import write_json
from endoprint.workspace import Workspace


def score(workspace: str, *, file: str, out: str, model: str = "") -> str:
    """Score a file or folder of cells with the champion; return the summary's path (JSON).

    Beside the scores lies `report.html`, which says one sentence per sample first.
    """
    space = Workspace.open(workspace)
    from endoprint import registry, scoring
    from endoprint.cells import CellsConfig

    config = space.params.section("cells", CellsConfig).located(space.root)
    version, fitted = registry.load_version(space, model or f"models:/{space.experiment}@champion")
    place = space.root / out
    with progress.task("score") as step:
        scoring.score(fitted, version, space.root / file, place, cells=config, watch=step.reach)
        return _report(space, fitted, version, place)


def score_if_live(workspace: str, *, file: str, out: str) -> str:
    """End a story: score with the champion, or, where a verdict left none live, not at all ("").

    A first version that is held or rejected is an answer too, and the story tells it.
    """
    from endoprint import registry

    is_live = registry.champion(Workspace.at(workspace)) is not None
    return score(workspace, file=file, out=out) if is_live else ""


def _report(space: Workspace, model: Any, version: Any, place: Path) -> str:
    """Write `report.html` and `samples.json` beside the scores; return the summary's path."""
    import pandas as pd
    from anndata import AnnData

    from endoprint import report, scoring
    from endoprint.population import sample_calls

    summary = json.loads((place / scoring.SUMMARY).read_text())
    scores = pd.read_parquet(place / scoring.SCORES)
    answered = scores[scores["call"].notna()].set_index("cell_id", drop=False)
    columns = [f"p_{exposure}" for exposure in model.exposures]
    calls = sample_calls(
        model,
        AnnData(obs=answered[["sample", "unit"]].fillna("").astype(str)),
        probabilities=answered[columns].set_axis(model.exposures, axis=1),
        novelty=answered["novelty"].to_numpy(),
    )
    meta = {
        **summary,
        "task": space.params.task,
        "audit": json.loads(space.audit.read_text()) if space.audit.is_file() else {},
        "is_calibration_unit_validated": model.provenance["is_calibration_unit_validated"],
        "control": space.params.cells.get("control"),
        "scored_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    beside = place / ".report.html.part"
    beside.write_text(report.scores_page(scores, calls, meta))
    beside.replace(place / "report.html")
    write_json(place / "samples.json", json.loads(calls.to_json(orient="index")))
    return str(place / scoring.SUMMARY)


def gc(workspace: str, *, delete: bool = False) -> dict[str, Any]:
    """Find (or delete) what no version needs: failed and killed runs, scratch, old backbones."""
    space = Workspace.open(workspace)
    from endoprint import runs, tracking

    closed = tracking.sweep(space)
    unneeded, scratch = runs.unneeded(space), runs.scratch(space)
    items = [f"run {run_id} ({status})" for run_id, status in unneeded.items()]
    items += [f"scratch of run {path.name}" for path in scratch]
    torn = runs.torn(space)
    items += [f"half-written {path.relative_to(space.root)}" for path in torn]
    if delete:
        runs.delete(space, list(unneeded))
        runs.clear([*scratch, *torn])
    return {"items": items, "closed": closed, "deleted": delete}
