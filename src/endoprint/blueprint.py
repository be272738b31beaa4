"""What a new workspace holds: its files as text, and how they are written.

A workspace of one's own and the demo's differ only in `params.yaml` and in the pool of unlabelled
cells, so `dvc.yaml` has this one home; a test holds the demo's file against it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from endoprint.config import Refusal
from endoprint.policy import Policy

DVC_YAML = """\
# Bytes in, bytes out. Anything fitted is MLflow's; nothing here trains.
stages:
  check:
    desc: is the file what it should be? labels, keys, raw counts, gene ids
    cmd: endoprint check
    deps: ["${cells.source}"@pool_source@]
    params: [cells]
    outs: [{data/cells/check.json: {cache: false}}]
  curate:
    desc: raw counts by Ensembl id, quality thresholds, removals counted by reason
    cmd: endoprint curate
    deps: ["${cells.source}"@pool_source@, data/cells/check.json]
    params: [cells]
    outs: [data/cells/cells.h5ad@pool@]
    metrics: [{data/cells/curation.json: {cache: false}}]
  audit:
    desc: what is confounded with what
    cmd: endoprint audit
    deps: [data/cells/cells.h5ad]
    params: [cells]
    metrics: [{data/design/audit.json: {cache: false}}]
  split:
    desc: whole units into test, development folds and validation
    cmd: endoprint split
    deps: [data/cells/cells.h5ad]
    params: [design, seed]
    outs: [{data/design/split.json: {cache: false}}]
  tokenise:
    desc: genes ranked within each cell
    cmd: endoprint tokenize
    deps: [data/cells/cells.h5ad@pool@]
    params: [tokens]
    outs: [data/tokens]
"""

DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
    no_scm = true
    remote = local
['remote "local"']
    url = ../.endoprint/dvc-remote
"""

POLICY = """\
# What is good enough to go live. Every field is explained in registry/schemas/policy.json;
# what is not said here keeps the default of `endoprint.policy.Policy`.
must_beat: logistic
"""

IGNORED = "/data/\n/.endoprint/\n/scores/\n/.dvc/tmp/\n/.dvc/cache/\n/.dvc/config.local\n"

HEAD = """\
# Written by `endoprint init`: a proposal from what stands in the file. Check, before running:
{check}
# What each value means stands beside it in the Config class of the room that owns it.
"""


def dvc_yaml(*, has_pool: bool) -> str:
    """Return the pipeline of a workspace, with or without a pool of unlabelled cells."""
    return DVC_YAML.replace("@pool_source@", ', "${cells.pool}"' if has_pool else "").replace(
        "@pool@", ", data/cells/pool.h5ad" if has_pool else ""
    )


def model_card() -> str:
    """Return the template of a model's card: what a workspace without its own uses."""
    return (resources.files("endoprint") / "report/model_card.md").read_text()


def policy_schema() -> str:
    """Return the JSON schema that explains every field of a policy."""
    schema = Policy.model_json_schema()
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_workspace(
    folder: Path, *, params: dict[str, Any], check: Sequence[str], source: Path
) -> None:
    """Write a new workspace whose cells are a link to the user's file; nothing is copied.

    A folder that already holds a workspace is refused: its values are somebody's choice.
    """
    if (folder / "params.yaml").exists():
        raise Refusal(
            "init makes a new workspace",
            f"one in {folder} already",
            "edit its params.yaml, or name another folder",
        )
    said = "\n".join(f"#   - {sentence}" for sentence in check)
    files = {
        "params.yaml": HEAD.format(check=said)
        + yaml.safe_dump(params, sort_keys=False, allow_unicode=True, width=95),
        "dvc.yaml": dvc_yaml(has_pool=bool(params["cells"].get("pool"))),
        "registry/policy.yaml": POLICY,
        "registry/schemas/policy.json": policy_schema(),
        "registry/cards/model.md": model_card(),
        ".dvc/config": DVC_CONFIG,
        ".dvcignore": ".endoprint\n",
        ".gitignore": IGNORED,
    }
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    link_source(folder / params["cells"]["source"], source)


def link_source(link: Path, source: Path) -> None:
    """Let `link` inside a workspace stand for the user's own file or folder."""
    if not source.exists():
        raise Refusal("the cells are a file", f"nothing at {source}", "check the path")
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise Refusal(
            f"{link.name} in the workspace is a link to the cells",
            "a file of its own",
            "move it away, or leave out --file",
        )
    os.symlink(source.resolve(), link)
