"""Jobs that ask what must not be possible: negative controls beside a board, and strangers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.materials import cells_and_split, latest_fits, resources
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from anndata import AnnData

    from endoprint.design import Split
    from endoprint.judge import Build

BAR = "logistic"  # what every model is compared with, unless the field lacks it
# units to refit the bar on. Judging rule 5 calls a shuffle informative from five; at three and
# four the bar's is still run, since it costs seconds, and shown with `not informative` beside it.
# Of two units and two exposures half of all shuffles change nothing.
FEWEST_TO_SHUFFLE = 3


def shuffled(
    space: Workspace, model: str, run_id: str, cells: AnnData, split: Split
) -> dict[str, Any]:
    """Return what a model came to on shuffled labels, made once per run.

    A model dearer than the bar is not refitted where the shuffle could not tell anything; nor is
    the bar where a permutation can hardly be other than the truth or its mirror image.
    """
    from endoprint import negatives
    from endoprint.paired import FEWEST_FOR_INTERVAL

    n_units = 0 if split.is_technical else len(split.development)
    if n_units < (FEWEST_TO_SHUFFLE if model == BAR else FEWEST_FOR_INTERVAL):
        why = f"under {FEWEST_FOR_INTERVAL} units" if n_units else "no independent units"
        said = f"{model}, shuffled labels: not informative ({why}), so not run"
        return {"said": said, "is_informative": False}

    def judged(build: Build) -> list[dict[str, Any]]:
        control = negatives.shuffled_control(build, cells, split, seed=space.params.seed)
        return [_told(model, control)]

    return _once(space, model, run_id, split, "control_of", "shuffled labels", judged)[0]


def blinded(
    space: Workspace, model: str, run_id: str, cells: AnnData, split: Split
) -> list[dict[str, Any]]:
    """Return what a model came to on parts of the genes, on depth alone, and on batches."""
    from endoprint import negatives

    def judged(build: Build) -> list[dict[str, Any]]:
        control = str(cells.uns["endoprint"]["control"])
        seed = space.params.seed
        found = [_told(model, one) for one in negatives.gene_controls(build, cells, split)]
        found.append(_told("any model", negatives.depth_control(cells, split, seed=seed)))
        probe = negatives.batch_probe(build, cells, control=control, seed=seed)
        if isinstance(probe, str):
            return [*found, {"said": f"{model}, {probe}", "is_informative": False}]
        return [*found, _told(model, probe)]

    return _once(space, model, run_id, split, "blinded_of", "negative controls", judged)


def strangers(workspace: str, *, model: str = BAR) -> str:
    """Leave every exposure out of a model in turn and ask whether it is noticed; return a run id.

    On the first development fold: as many fits as there are exposures.
    """
    space = Workspace.open(workspace)
    from endoprint import strangers as asking
    from endoprint import tracking

    cells, split = cells_and_split(space)
    latest = latest_fits(space)
    if model not in latest.index:
        raise Refusal("strangers are shown to a fitted model", model, f"endoprint train {model}")
    run_id = str(latest.loc[model, "run_id"])
    build = builder(space, model, run_id)
    with (
        progress.task(f"novelty, {model}") as step,
        tracking.run(
            space, name=f"{model}, exposures left out", kind="control", model=model,
            parent=run_id, tags={"strangers_of": run_id, "split_hash": split.hash},
        ) as run,
    ):  # fmt: skip
        found = asking.left_out(
            build, cells, split, control=str(cells.uns["endoprint"]["control"]), told=step.reach
        )
        run.table("strangers", found)
        run.record("strangers", found.reset_index().to_dict(orient="records"))
        mean = found.mean().dropna()
        run.metrics({str(name): float(value) for name, value in mean.items()})
    return run.run_id


def strangers_of(workspace: str, run_id: str) -> list[dict[str, Any]]:
    """Return what a run of `strangers` found, one entry per exposure left out."""
    from endoprint import runs

    found: list[dict[str, Any]] = runs.read_record(Workspace.at(workspace), run_id, "strangers")
    return found


def builder(space: Workspace, model: str, run_id: str) -> Build:
    """Return what makes the model of a run anew, unfitted."""
    from endoprint import runs
    from endoprint.model import model_class

    cls = model_class(model)
    values = runs.read_record(space, run_id, "config")
    config = cls.Config.of(values, where=f"models.{model}")
    return partial(cls, config, seed=space.params.seed, resources=resources(space, cls))


def _once(
    space: Workspace, model: str, run_id: str, split: Split, tag: str, what: str, judged: Any
) -> list[dict[str, Any]]:
    """Judge, and keep what came of it as a run beneath the model's; or read what is kept."""
    from endoprint import runs, tracking

    done = runs.finished(space, "control", {tag: run_id})
    if done:
        kept = runs.read_record(space, done[0], "control")
        return kept if isinstance(kept, list) else [kept]
    with (
        progress.task(f"{what}, {model}"),
        tracking.run(
            space, name=f"{model}, {what}", kind="control", model=model,
            parent=run_id, tags={tag: run_id, "split_hash": split.hash},
        ) as run,
    ):  # fmt: skip
        told: list[dict[str, Any]] = judged(builder(space, model, run_id))
        for one in told:
            if "macro_f1" in one:
                name = str(one["name"]).replace(" ", "_")
                run.metrics({f"{name}_macro_f1": one["macro_f1"], f"{name}_chance": one["chance"]})
        run.record("control", told)
    return told


def _told(model: str, control: Any) -> dict[str, Any]:
    return {
        "said": f"{model}, {control.sentence()}",
        "name": control.name,
        "macro_f1": control.macro_f1,
        "chance": control.chance,
        "by_unit": {str(unit): float(value) for unit, value in control.by_unit.items()},
        "is_informative": control.is_informative,
    }
