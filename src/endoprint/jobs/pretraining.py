"""The job that makes a backbone by masked learning."""

from __future__ import annotations

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
from endoprint.workspace import Workspace


def pretrain(workspace: str, *, start: str = "") -> str:
    """Pre-train a small backbone on the pool; return its run id.

    The same pool, vocabulary and values give the run that stands already. `start`: a backbone to
    go on from, a folder or a published name, at a tenth of the learning rate unless params.yaml
    says one; what comes of it lies in `.endoprint/backbones/RUN`, for `checkpoint` to name.
    """
    space = Workspace.open(workspace)
    from endoprint import cells, runs, tokens, tracking
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
        if begun is not None:
            runs.fetch(space, done[0], "backbone", space.local / "backbones")
        return done[0]
    with (
        progress.task("pretrain", config.epochs) as step,
        tracking.run(space, name="pretrain", kind="pretrain") as run,
        work_folder(space, {"pretrain": key}, run.run_id) as work,
    ):
        folder = work / "backbone"
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
        for file in sorted(folder.iterdir()):
            run.file(file, "backbone")
        run.tags({"pretrain_key": key, "vocabulary_sha256": vocabulary.sha256})
    if begun is not None:
        runs.fetch(space, run.run_id, "backbone", space.local / "backbones")
    return run.run_id
