"""How MLflow wants names and values spelled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any


def flattened(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield nested values under names such as `outer.inner`."""
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from flattened(value, name)
        else:
            yield name, value


def text_of(value: Any) -> str:
    """Spell any plain value that a Config holds."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def safe(name: str) -> str:
    """Spell a metric's name: letters, digits and ` /_-.:`; exposures may hold more."""
    return "".join(c if c.isalnum() or c in " /_-.:" else "_" for c in name)


def without_secrets(text: str) -> str:
    """Spell a message on one line, without the name and password of any address in it."""
    return re.sub(r"://[^\s/]*@", "://***@", " ".join(text.split()))
