"""What a search would change, as a diff of `params.yaml`; nothing is changed here."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


def proposal(params_file: Path, winners: Mapping[str, Mapping[str, Any]]) -> str:
    """Return winners (model -> values) as a unified diff of `params.yaml`; comments survive."""
    yaml = YAML()  # round trip
    yaml.preserve_quotes = True
    yaml.width = 99
    before = params_file.read_text()
    document = yaml.load(before)
    section = document.setdefault("models", {})
    for model, values in winners.items():
        if not values:
            continue
        if not section.get(model):
            section[model] = {}
        section[model].update(values)
    normal, after = io.StringIO(), io.StringIO()
    yaml.dump(yaml.load(before), normal)  # so that only values differ, not the layout
    yaml.dump(document, after)
    lines = difflib.unified_diff(
        normal.getvalue().splitlines(), after.getvalue().splitlines(), "params.yaml", "proposed",
        lineterm="", n=2,
    )  # fmt: skip
    return "\n".join(lines)
