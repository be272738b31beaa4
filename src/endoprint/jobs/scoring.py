"""Jobs that score: cells with the champion, late labels against scores, an inbox file by file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.data import write_json
from endoprint.roles import NotAllowed
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from endoprint.model import ExposureModel
    from endoprint.scoring import Job, ScoreSummary

SAMPLES, DRIFT, UNITS, PROJECTION = "samples.json", "drift.json", "units.json", "projection.json"
REPORT = "report.html"


def score(
    workspace: str,
    *,
    file: str,
    out: str,
    model: str = "",
    by: str = "sample",
    control: str = "",
    annotate: str = "",
    workers: int = 1,
) -> str:
    """Score a file, a folder or a pattern of cells; return the summary's path (JSON).

    `by`: the column of `obs` whose populations are called. `control`: populations that met the
    vehicle only, comma-separated: the others are then projected on the known exposures.
    `annotate`: an h5ad to write with the scores in it. The same job again does nothing.
    """
    space = Workspace.open(workspace)
    from endoprint import registry, scoring, smoke
    from endoprint.cells import CellsConfig
    from endoprint.scoring import annotated, inputs, populations
    from endoprint.scoring import workers as crew

    config = space.params.section("cells", CellsConfig).located(space.root)
    version, folder = registry.resolve(space, model or f"models:/{space.experiment}@champion")
    fitted = smoke.opened(folder, version.label)
    place, where = space.root / out, _below(space.root, file)
    files = inputs.find(where)
    populations.check_by(files, config, by, place)
    if annotate:
        annotated.refuse_unwritable([str(path) for path in files], space.root / annotate)
    with progress.task("score") as step:
        job = scoring.plan(
            fitted,
            version,
            where,
            place,
            cells=config,
            look=lambda name: step(0, note=name),
            is_begun=True,
        )
        missing = scoring.finished(place, job.key) is None
        with crew.helpers((workers - 1) * missing, job, place, folder, space.environment()):
            summary = scoring.score_job(
                fitted,
                job,
                place,
                watch=_Pace(step).reach,
                by=by if not control else f"{by}, control {control}",
                describe=lambda told: _describe(
                    space, fitted, job, told, place, by=by, control=control
                ),
            )
        with scoring.alone(place):  # one run is logged, and of these scores
            if scoring.finished(place, job.key) is None:
                raise Refusal(
                    "a folder of scores is one job's",
                    f"other scores, which another command wrote into {place.name} meanwhile",
                    "give each a folder of its own",
                )
            if annotate:
                annotated.annotate(
                    summary, files[0], place / scoring.SCORES, space.root / annotate
                )
            with suppress(NotAllowed):  # a reader's scores are described by their summary alone
                _log_once(space, summary, place)
    return str(place / scoring.SUMMARY)


def score_part(workspace: str, *, plan: str, begin: int = 0) -> int:
    """Work on a planned job beside other workers; return how many parts this one made."""
    from endoprint.scoring import workers

    return workers.work_on(Workspace.at(workspace).root / plan, begin=begin)


def plan_scoring(workspace: str, *, file: str, out: str, model: str = "") -> str:
    """Decide a job that workers elsewhere share; return the path of its plan."""
    space = Workspace.open(workspace)
    from endoprint import registry, scoring, smoke
    from endoprint.cells import CellsConfig
    from endoprint.scoring import workers

    config = space.params.section("cells", CellsConfig).located(space.root)
    version, folder = registry.resolve(space, model or f"models:/{space.experiment}@champion")
    place = space.root / out
    fitted = smoke.opened(folder, version.label)
    job = scoring.plan(fitted, version, _below(space.root, file), place, cells=config)
    return workers.write_plan(job, place, folder)


def score_if_live(workspace: str, *, file: str, out: str) -> str:
    """End a story: score with the champion, or, where a verdict left none live, not at all ("").

    A first version that is held or rejected is an answer too, and the story tells it.
    """
    from endoprint import registry

    is_live = registry.champion(Workspace.at(workspace)) is not None
    return score(workspace, file=file, out=out) if is_live else ""


def evaluate_scores(workspace: str, *, scores: str, labels: str) -> dict[str, Any]:
    """Join labels that came late to scores by cell id; return how right the scores were."""
    space = Workspace.open(workspace)
    from endoprint import tracking
    from endoprint.cells import CellsConfig
    from endoprint.scoring import late

    config = space.params.section("cells", CellsConfig)
    found = late.evaluate(space.root / scores, space.root / labels, cells=config)
    tags = {"job_key": found["job_key"], "model_sha256": found["model_sha256"], "is_late": True}
    with tracking.run(space, name="late labels", kind="score", tags=tags) as run:
        run.metrics(_numbers(found))
        run.record("late_labels", found)
    return found


# -- beside the scores --------------------------------------------------------------------------
def _describe(
    space: Workspace, model: ExposureModel, job: Job, summary: ScoreSummary, place: Path,
    *, by: str, control: str,
) -> list[str]:  # fmt: skip
    """Write the report, the calls per population, the drift and the projection; name them."""
    from endoprint import drift, report
    from endoprint.scoring import populations

    vehicle = space.params.cells.get("control")
    told = populations.tell(model, job, place, by=by, control=vehicle)
    projection = _projection(space, job, place, by=by, names=control) if control else None
    meta = {
        **summary.to_json(),
        "by": by,
        "task": space.params.task,
        "audit": json.loads(space.audit.read_text()) if space.audit.is_file() else {},
        "is_calibration_unit_validated": model.provenance["is_calibration_unit_validated"],
        "control": vehicle,
        "scored_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    html = report.scores_page(
        told.calls, told.shares, meta, drift=told.drift, drifted=drift.sentences(told.drift),
        units=told.units, projection=projection,
    )  # fmt: skip
    beside = place / f".{REPORT}.part"
    beside.write_text(html)
    os.replace(beside, place / REPORT)
    written = {
        SAMPLES: json.loads(told.calls.to_json(orient="index")),
        UNITS: json.loads(told.units.to_json(orient="index")),
        DRIFT: json.loads(told.drift.to_json(orient="index")),
    }
    if projection is not None:
        written[PROJECTION] = projection
    for name, values in written.items():
        write_json(place / name, values)
    return [REPORT, *written]


def _projection(space: Workspace, job: Job, place: Path, *, by: str, names: str) -> dict[str, Any]:
    """Project every population on the workspace's known exposures."""
    from endoprint import curated
    from endoprint.cells import CellsConfig
    from endoprint.projection import projected
    from endoprint.scoring import populations

    control = space.params.section("cells", CellsConfig).control_label
    cells = populations.read_again(job, place, by=by)
    vehicles = {name.strip() for name in names.split(",")}
    absent = vehicles - set(cells.obs["population"])
    if absent:
        raise Refusal(
            f"--control names populations of {by}",
            f"no {', '.join(sorted(absent))}",
            f"one of {', '.join(sorted(set(cells.obs['population']))[:5])} ...",
        )
    try:
        found = projected(
            curated.load(space.cells),
            cells,
            control=control,
            is_control=cells.obs["population"].isin(vehicles).to_numpy(),
            by="population",
        )
    except Refusal as refusal:  # the calls stand without it
        return {"samples": {}, "null": "no null", "left_out": {"all": str(refusal)}}
    return found.to_json()


# -- MLflow -------------------------------------------------------------------------------------
def _log_once(space: Workspace, summary: ScoreSummary, place: Path) -> None:
    """Track a scoring as one run, also where an earlier command ended before it could."""
    from endoprint import tracking

    store = tracking.client(space)
    tracking.sweep(space)
    asked = f"tags.kind = 'score' and tags.job_key = '{summary.job_key}' and "
    asked += f"tags.by = '{_quoted(summary.by)}' and attributes.status = 'FINISHED'"
    if store.search_runs([tracking.experiment(space, store)], asked, max_results=1):
        return
    drift = json.loads((place / DRIFT).read_text())
    tags = {
        "job_key": summary.job_key,
        "by": _quoted(summary.by),
        "model_version": summary.model_version,
        "model_sha256": summary.model_sha256,
    }
    name = f"score {summary.inputs[0].file}"
    name += f" and {len(summary.inputs) - 1} more" if len(summary.inputs) > 1 else ""
    with tracking.run(space, name=name, kind="score", model=summary.model, tags=tags) as run:
        run.metrics(_numbers(summary.to_json()))
        run.metrics({"cells_per_second": summary.n_cells / max(summary.seconds, 1e-9)})
        run.metrics({"gene_share": min(each.gene_share for each in summary.inputs)})
        for quantity, row in drift.items():
            run.metrics(
                {f"drift.{quantity}.{key}": row[key] for key in ("ks", "psi", "has_drifted")}
            )
        run.record("summary", summary.to_json())
        run.record("drift", drift)
        run.file(place / REPORT)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return what is a figure among plain values."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _quoted(text: str) -> str:
    return text.replace("'", "").replace('"', "")[:200]


def _below(root: Path, file: str) -> str:
    """Spell a file, folder or pattern of the workspace as one that holds from anywhere."""
    return str(root / file)


class _Pace:
    """How fast cells are scored, and how long it may take yet."""

    def __init__(self, step: progress.Task) -> None:
        self._step = step
        self._began, self._first = time.monotonic(), -1

    def reach(self, done: int, total: int) -> None:
        """Show where scoring stands; what an earlier command did counts for no speed."""
        if self._first < 0:
            self._began, self._first = time.monotonic(), done
        seconds = time.monotonic() - self._began
        if seconds > 0 and done > self._first:
            speed = (done - self._first) / seconds
            left = (total - done) / speed
            unit = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
            self._step.note = f"{speed:,.0f} cells/s, {unit} left"
        self._step.reach(done, total)
