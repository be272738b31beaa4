"""Jobs on backbones: make one by masked learning, list those that were registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.materials import (
    both,
    named_backbone,
    pretrain_key,
    refuse_held_out_lines,
    vocabulary_sha256,
    work_folder,
)
from endoprint.jobs.together import Member, Plan, team
from endoprint.workspace import Workspace


def pretrain(workspace: str, *, start: str = "") -> str:
    """Pre-train a small backbone on the pool and register it; return its run id.

    The same pool, vocabulary and values give the run that stands already. `start`: a backbone to
    go on from, a folder, a published name or an address of `endoprint backbones`, at a tenth of
    the learning rate unless params.yaml says one. Under `torchrun` the processes learn together
    (docs/many-devices.md); all but the lead return nothing.
    """
    with team() as member:
        if member.is_lead:
            return _pretrain(workspace, start=start, member=member)
        plan = member.told({})
        if plan:
            _learn_along(workspace, plan)
        return ""


def _pretrain(workspace: str, *, start: str, member: Member) -> str:
    space = Workspace.open(workspace)
    from endoprint import artefact, backbones, cells, runs, tokens, tracking
    from endoprint.encoder import backbone
    from endoprint.encoder.pretrain import PretrainConfig
    from endoprint.encoder.pretrain import pretrain as learn
    from endoprint.lineage import hash_of
    from endoprint.vocabulary import Vocabulary

    config = space.params.section("pretrain", PretrainConfig)
    if not space.pool.is_file():
        raise Refusal(
            "pre-training learns from a pool of unlabelled cells of other units",
            f"none at {space.pool.relative_to(space.root)}",
            "name cells.pool in params.yaml and run `endoprint run`",
        )
    if vocabulary_sha256(space) is None:
        raise Refusal(
            "pre-training and every fit after it share one vocabulary",
            "one fitted inside every fit" if space.vocabulary.is_file() else "none yet",
            "set tokens.vocabulary to pool, v1, v2 or a folder, and run `dvc repro`",
        )
    vocabulary = Vocabulary.read(space.vocabulary)
    pool = cells.load(space.pool)
    refuse_held_out_lines(space, pool)
    key = pretrain_key(space)
    begun = named_backbone(space, start) if start else None
    if begun is not None:
        origin = backbone.origin_of(begun)
        if origin.vocabulary_sha256 is not None:
            vocabulary.require(origin.vocabulary_sha256, "the backbone")
        key = hash_of({"pretrain": key, "start": origin.sha256})
        if "lr" not in config.model_fields_set:
            config = config.model_copy(update={"lr": config.lr / 10})
    done = runs.finished(space, "pretrain", {"pretrain_key": key})
    if done:
        member.told({})
        return done[0]
    with (
        progress.task("pretrain", config.epochs) as step,
        tracking.run(space, name="pretrain", kind="pretrain") as run,
        work_folder(space, {"pretrain": key}, run.run_id) as work,
    ):
        folder = work / "backbone"
        said = config.model_dump(mode="json")
        member.told({"config": said, "start": begun and str(begun), "work": str(work)})
        run.params(config)
        told = learn(
            tokens.of(pool, vocabulary),
            vocabulary,
            config,
            folder,
            units=sorted(set(pool.obs["unit"].astype(str))),
            start=begun,
            seed=space.params.seed,
            watch=both(run.watch, step.watch),
            work=work,
        )
        figures = ("n_cells", "epochs", "loss_before", "loss_after", "loss_of_frequencies")
        run.metrics({name: told[name] for name in figures})
        run.model(folder, sha256=artefact.digest(folder), kind=backbones.KIND)
        run.tags({"pretrain_key": key, "vocabulary_sha256": vocabulary.sha256})
        backbones.register(space, run.run_id, told)
    return run.run_id


def _learn_along(workspace: str, plan: Plan) -> None:
    """Learn what the lead learns, and keep nothing: gradients are what it is for."""
    space = Workspace.open(workspace)
    from endoprint import cells, tokens
    from endoprint.encoder.pretrain import PretrainConfig
    from endoprint.encoder.pretrain import pretrain as learn
    from endoprint.vocabulary import Vocabulary

    vocabulary = Vocabulary.read(space.vocabulary)
    work = Path(plan["work"])
    learn(
        tokens.of(cells.load(space.pool), vocabulary),
        vocabulary,
        PretrainConfig.of(plan["config"], where="pretrain"),
        work / "backbone",
        units=[],
        start=plan["start"] and Path(plan["start"]),
        seed=space.params.seed,
        work=work,
    )


def backbones(workspace: str) -> list[dict[str, Any]]:
    """Return the registered backbones, newest first: address, label, vocabulary, units."""
    from endoprint import backbones as registered

    return [each.to_json() for each in registered.versions(Workspace.open(workspace))]


def backbone_of(workspace: str, run_id: str) -> dict[str, Any]:
    """Return the backbone that a pre-training run has made."""
    from endoprint import backbones as registered

    return registered.of_run(Workspace.open(workspace), run_id).to_json()
