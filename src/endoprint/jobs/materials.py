"""What a fit is given: cells and split, what the workspace offers, room to work in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.data import load_vocabulary
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from endoprint.design import Split
    from endoprint.model import ExposureModel, Resources, Watch


def cells_and_split(space: Workspace) -> tuple[AnnData, Split]:
    """Return the curated cells and their split."""
    from endoprint import cells
    from endoprint.design import Split

    absent = [each.name for each in (space.cells, space.audit, space.split) if not each.is_file()]
    if absent:
        raise Refusal(
            "a fit needs curated cells, their audit and a split",
            f"no {', no '.join(absent)} yet",
            "run `dvc repro` first",
        )
    return cells.load(space.cells), Split.read(space.split)


def resources(space: Workspace, kind: type[ExposureModel]) -> Resources:
    """Return what the workspace offers models of a kind; what it lacks is None.

    A backbone is one of today's pool, vocabulary and values: another would be another's.
    """
    from endoprint import backbones, runs
    from endoprint.model import Resources

    sha256 = vocabulary_sha256(space)
    # else every fit makes its own, on its training cells
    has_tokens = space.tokens.is_file() and sha256 is not None
    backbone = None
    if space.params.checkpoint and kind.takes_backbone:
        backbone = named_backbone(space, space.params.checkpoint)
    elif space.params.pretrain and kind.takes_backbone:
        found = runs.finished(space, "pretrain", {"pretrain_key": pretrain_key(space)})
        if not found:
            raise Refusal(
                f"{kind.name} starts from the backbone that params.yaml asks for",
                "none of today's pool, vocabulary and values",
                "run `endoprint pretrain` first, or empty `pretrain`",
            )
        backbone = backbones.folder(space, backbones.of_run(space, found[0]).address)
    return Resources(
        vocabulary=space.vocabulary if has_tokens else None,
        tokens=space.tokens if has_tokens else None,
        backbone=backbone,
        activations=space.local / "activations",
        machine=space.local / "machine.json",
    )


def vocabulary_sha256(space: Workspace) -> str | None:
    """Return the digest of the workspace's vocabulary; None where every fit makes its own."""
    if not space.vocabulary.is_file():
        return None
    said = json.loads(space.vocabulary.read_text()).get("sha256")
    return None if said is None else str(said)


def pretrain_key(space: Workspace) -> str:
    """Return what a pre-training is known by: its pool, vocabulary, values and seed."""
    from endoprint.cells import md5
    from endoprint.encoder.pretrain import PretrainConfig
    from endoprint.lineage import hash_of

    return hash_of(
        {
            "pool": md5(space.pool) if space.pool.is_file() else None,
            "vocabulary": vocabulary_sha256(space),
            "config": space.params.section("pretrain", PretrainConfig).model_dump(mode="json"),
            "seed": space.params.seed,
            "kept": "registered",  # earlier runs kept a plain folder
        }
    )


def refuse_held_out_lines(space: Workspace, pool: AnnData) -> None:
    """Refuse a pool that knows a line which is held out whole: the claim is about new lines."""
    from endoprint.design import Split

    if not space.split.is_file() or "line" not in pool.obs:
        return
    split = Split.read(space.split)
    judged = {*split.test, *split.development} if split.scheme == "line" else set()
    both = sorted(judged & set(pool.obs["line"].astype(str)))
    if both:
        raise Refusal(
            "where whole lines are held out, the pool is of other lines",
            f"line {both[0]!r} in both",
            "leave that line out of the pool, or set design.scheme to unit",
        )


def latest_fits(space: Workspace) -> pd.DataFrame:
    """Return the newest fit of every model of the field on today's cells and split, by model."""
    from endoprint import tracking
    from endoprint.cells import md5
    from endoprint.design import Split

    split_hash = Split.read(space.split).hash
    table = tracking.runs_table(space, kind="train", split_hash=split_hash)
    is_asked = table["model"].isin(list(space.params.models))
    # fits of other counts were judged on other cells: they stand beside nothing here
    is_of_these = table["cells_md5"].isna() | (table["cells_md5"] == md5(space.cells))
    latest = table[is_asked & is_of_these].drop_duplicates("model", keep="first")
    return latest.reset_index("run_id").set_index("model")


def named_backbone(space: Workspace, named: str) -> Path:
    """Return the folder of a backbone that has seen no unit of this workspace's labelled cells."""
    from endoprint import cells
    from endoprint.encoder import backbone

    dictionaries = str(space.params.tokens.get("dictionaries") or "")
    folder = backbone_folder(
        space, named, dictionaries=dictionaries and str(space.root / dictionaries)
    )
    seen = set(backbone.origin_of(folder).units) - {""}
    if seen and space.cells.is_file():
        both = sorted(seen & set(cells.read_obs(space.cells)["unit"].astype(str)))
        if both:
            raise Refusal(
                "a backbone has seen no unit that a fit is judged on",
                f"unit {both[0]!r} among those {folder.name} was pre-trained on",
                "pre-train it without these units",
            )
    return folder


def backbone_folder(space: Workspace, named: str, *, dictionaries: str = "") -> Path:
    """Return the folder of a backbone: a path seen from the workspace, an address, or a name.

    An address is one of `endoprint backbones`: registered here, fetched and checked. A published
    one is fetched once, with its vocabulary, into `.endoprint/checkpoints/NAME`.
    `dictionaries`: folder of the official ones; none: the environment's, else fetched.
    """
    folder = space.root / Path(named).expanduser()
    if (folder / "config.json").is_file():
        return folder
    from endoprint import backbones
    from endoprint.encoder import checkpoints

    if named.startswith(backbones.PREFIX):
        return backbones.folder(space, named)
    row = checkpoints.published(named)  # refuses, before anything is fetched, what is none
    vocabulary = load_vocabulary(row.series, dictionaries, space)
    with progress.task(f"fetch {named}") as step:
        return checkpoints.fetch(named, space.local / "checkpoints", vocabulary, watch=step.reach)


@contextmanager
def work_folder(space: Workspace, job: Mapping[str, Any], run_id: str) -> Iterator[Path]:
    """Give the folder in which a job that was killed is taken up again; done, it is gone.

    `job`: all that makes it this job. Asked for twice at once, the second works in a folder of
    its own run, which no other takes up.
    """
    from filelock import Timeout

    from endoprint import runs
    from endoprint.lineage import git_state, hash_of

    key = hash_of({**job, "seed": space.params.seed, "code": git_state(space.root)[0]})[:16]
    place = space.local / "work"
    place.mkdir(parents=True, exist_ok=True)
    folder, lock = place / key, runs.lock_of(place / key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        folder = place / run_id
    folder.mkdir(exist_ok=True)
    try:
        yield folder
        shutil.rmtree(folder)
    finally:
        lock.release()


def both(first: Watch, second: Watch) -> Watch:
    """Tell two watchers."""

    def watch(epoch: int, metrics: dict[str, float]) -> None:
        first(epoch, metrics)
        second(epoch, metrics)

    return watch
