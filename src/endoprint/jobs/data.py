"""Jobs on bytes: a workspace's beginning, and the stages of its `dvc.yaml`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from endoprint import progress
from endoprint.config import Refusal
from endoprint.jobs.sharing import push
from endoprint.workspace import Workspace

if TYPE_CHECKING:
    from endoprint.vocabulary import Vocabulary


# -- a workspace's beginning --------------------------------------------------------------------
def init(file: str, *, folder: str, task: str = "") -> dict[str, Any]:
    """Look at a user's cells and write a workspace for them; return what was proposed."""
    from endoprint import blueprint
    from endoprint.propose import propose

    proposed, sentences = propose(file)
    params = {
        "task": task or proposed["task"],
        "seed": 0,
        **{name: section for name, section in proposed.items() if name != "task"},
        "tokens": {"vocabulary": "training"},
        "models": {"logistic": {}, "signature": {}, "geneformer": {}},
    }
    blueprint.write_workspace(Path(folder), params=params, check=sentences, source=Path(file))
    return {"folder": folder, "params": params, "check": sentences}


def attach(workspace: str, *, file: str) -> str:
    """Let a workspace's source be a link to this file; return the link."""
    from endoprint import blueprint

    space = Workspace.open(workspace)
    link = space.root / str(space.params.cells.get("source") or "data/raw/cells.h5ad")
    blueprint.link_source(link, Path(file))
    return str(link)


def simulate(workspace: str) -> str:
    """Simulate the demo's atlas, its pool and its new samples; return the atlas's path."""
    space = Workspace.open(workspace)
    places = {"out": "source", "pool": "pool"}
    paths = {name: space.params.cells.get(key, "") for name, key in places.items()}
    paths |= {"new": space.params.score or ""}
    made = simulate_to(
        space.params.simulate,
        seed=space.params.seed,
        **{name: str(space.root / path) if path else "" for name, path in paths.items()},
    )
    return made["out"]


def simulate_to(
    values: Mapping[str, Any], *, seed: int, out: str, pool: str = "", new: str = ""
) -> dict[str, str]:
    """Simulate an atlas into files; return their paths by name."""
    from endoprint import simulate as simulator

    asked = dict(values)
    if not pool:
        asked["pool_cells"] = 0
    if not new:
        asked["new_cells"] = 0
    config = simulator.SimulateConfig.of(asked, where="simulate")
    paths = {"out": Path(out)}
    paths |= {name: Path(path) for name, path in (("pool", pool), ("new", new)) if path}
    if new:
        paths["truth"] = Path(new).with_suffix(".truth.csv")
    with progress.task("simulate") as step:
        atlas = simulator.simulate(config, seed=seed, watch=step.reach)
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        simulator.save(
            atlas, paths["out"], paths.get("pool"), paths.get("new"), paths.get("truth")
        )
    return {name: str(path) for name, path in paths.items()}


# -- the stages of dvc.yaml ---------------------------------------------------------------------
def prepare(workspace: str) -> str:
    """Bring a workspace's data up to date with `dvc repro`; return the path of dvc.lock.

    One at a time in a workspace: a second one waits for the first. Where the environment names a
    shared remote, what was made is sent there.
    """
    space = Workspace.open(workspace)
    source = str(space.params.cells.get("source") or "")
    if source and "$" not in source and not (space.root / source).exists():
        raise Refusal(
            "a workspace's cells are at cells.source",
            f"nothing at {source}",
            "link yours with `endoprint run --file PATH`",
        )
    space.local.mkdir(parents=True, exist_ok=True)
    with progress.task("prepare (dvc repro)"), FileLock(space.local / "repro.lock"):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=space.root, env=space.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise _refused(done.stderr)
        push(workspace)
    return str(space.root / "dvc.lock")


def _refused(said: str) -> Refusal:
    """Return why `dvc repro` stopped: in a stage's own words, where one refused."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line.removeprefix("endoprint: ") for line in lines if line.startswith("endoprint: ")]
    if own:
        rule, _, rest = own[0].partition("; got ")
        got, _, remedy = rest.rpartition("; ")
        return Refusal(rule, got, remedy)
    if any("Unable to acquire lock" in line or "is busy" in line for line in lines):
        return Refusal(
            "one `dvc repro` at a time", "another one here", "wait for it, run it again"
        )
    return Refusal("dvc repro must succeed", " | ".join(lines[-3:]), "mend that, run it again")


def check(workspace: str) -> str:
    """Read the source and say what is in it, refusing what cannot be used; return the report."""
    space, config = _cells_config(workspace)
    from endoprint import cells

    _, report = cells.curate(cells.read(config.source, config), config)
    found = {"source_md5": cells.md5(config.source), **report.to_json()}
    return write_json(space.root / "data/cells/check.json", found)


def curate(workspace: str) -> str:
    """Curate the labelled cells and the pool; return the report of what was removed and why."""
    space, config = _cells_config(workspace)
    from endoprint import cells

    kept, report = cells.curate(cells.read(config.source, config), config)
    reports = {"cells": report.to_json()}
    pool = None
    if config.pool:
        pool, report = cells.curate(cells.read(config.pool, config), config, labelled=False)
        shared = sorted(set(pool.obs.get("unit", ())) & set(kept.obs["unit"]) - {""})
        # without units, cells in both are all that can be found out
        alike = [] if config.unit_keys else sorted(set(pool.obs_names) & set(kept.obs_names))
        if shared or alike:
            raise Refusal(
                "the pool holds other units than the labelled cells",
                f"unit {shared[0]!r} in both" if shared else f"cell {alike[0]!r} in both",
                "leave that out of the pool: pre-training must not see a judged unit",
            )
        reports["pool"] = report.to_json()
    # written when nothing can be refused any more
    cells.write(kept, space.cells)
    if pool is not None:
        cells.write(pool, space.pool)
    return write_json(space.curation, reports)


def audit(workspace: str) -> str:
    """Say what is confounded with what among the curated cells; return the audit's path."""
    space, config = _cells_config(workspace)
    from endoprint import cells, design

    obs = cells.read_obs(space.cells)
    found = design.audit(
        obs,
        exposure="exposure",
        units=["unit"] if config.unit_keys else [],
        control=config.control_label,
        batch="batch" if config.batch_key else None,
        line="line" if config.line_key else None,
    )
    return write_json(space.audit, found.to_json())


def stops(workspace: str) -> list[str]:
    """Return the sentences of a workspace's audit that must stand before any figure or call."""
    space = Workspace.open(workspace)
    if not space.audit.is_file():
        return []
    from endoprint.report.board import STOPS

    warnings = json.loads(space.audit.read_text())["warnings"]
    return [str(said) for said in warnings if said.startswith(STOPS)]


def audit_file(
    file: str, *, exposure: str, units: Sequence[str], batch: str, control: str
) -> dict[str, Any]:
    """Audit any file of cells by its own columns."""
    from endoprint import cells, design

    return design.audit(
        cells.read_obs(file),
        exposure=exposure,
        units=units,
        batch=batch or None,
        control=control or None,
    ).to_json()


def split(workspace: str) -> str:
    """Divide whole units into test, development folds and validation; return the split's path."""
    space = Workspace.open(workspace)
    from endoprint import cells, design

    config = space.params.section("design", design.DesignConfig)
    made = design.make_split(cells.read_obs(space.cells), config, space.params.seed)
    made.write(space.split)
    return str(space.split)


def tokenise(workspace: str) -> str:
    """Rank the genes of the curated cells; return the path of the vocabulary's JSON.

    Where the vocabulary is fitted inside every fit, there are no tokens to make beforehand, and
    the file says so.
    """
    space = Workspace.open(workspace)
    from endoprint import cells, tokens
    from endoprint.vocabulary import Vocabulary

    config = space.params.section("tokens", tokens.TokensConfig)
    space.vocabulary.parent.mkdir(parents=True, exist_ok=True)
    if config.vocabulary == "training":
        return write_json(space.vocabulary, {"fitted": "inside every fit, on its training cells"})
    if config.vocabulary == "pool":
        if not space.pool.is_file():
            raise Refusal(
                "tokens.vocabulary: pool is fitted on the pool's cells",
                "a workspace without a pool",
                "name cells.pool, or use training, v1, v2 or a folder",
            )
        vocabulary = Vocabulary.fit(cells.load(space.pool), max_length=config.max_length)
    else:
        folder = config.dictionaries and str(space.root / config.dictionaries)
        vocabulary = load_vocabulary(config.vocabulary, folder, space)
    vocabulary.write(space.vocabulary)
    with progress.task("tokenise") as step:
        tokens.tokenize_file(space.cells, space.tokens, vocabulary, watch=step.reach)
    return str(space.vocabulary)


def tokenize_file(
    file: str, *, out: str, vocabulary: str, dictionaries: str = ""
) -> dict[str, Any]:
    """Tokenise any file of cells; return what was made."""
    from dataclasses import asdict

    from endoprint import tokens

    chosen = load_vocabulary(vocabulary, dictionaries, Workspace.at("."))
    with progress.task("tokenise") as step:
        made = tokens.tokenize_file(file, out, chosen, watch=step.reach)
    return {"tokens": out, **asdict(made)}


def load_vocabulary(name: str, dictionaries: str | None, space: Workspace) -> Vocabulary:
    """Load a vocabulary; a published one from a folder told, by the environment, or the hub."""
    from endoprint import tokens

    folder = dictionaries or os.environ.get("ENDOPRINT_DICTIONARIES")
    if name in ("v1", "v2") and not folder:
        folder = str(tokens.fetch(name, space.local / "dictionaries"))
    return tokens.Vocabulary.load(name, folder)


def _cells_config(workspace: str) -> tuple[Workspace, Any]:
    space = Workspace.open(workspace)
    from endoprint.cells import CellsConfig

    return space, space.params.section("cells", CellsConfig).located(space.root)


def write_json(path: Path, values: Mapping[str, Any]) -> str:
    """Write JSON whole or not at all; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(values, indent=1, sort_keys=True, default=str) + "\n")
    os.replace(beside, path)
    return str(path)
