"""One HTML page that needs nothing else: inline style, figures as data, no address outside it.

Every function takes plain values and returns HTML; whatever a user named is escaped here.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from endoprint.report.ink import png

Weight = Literal["stop", "mind", "fine"]

# The browser itself then refuses to load or run anything that is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { --ink: #1f2933; --soft: #52606d; --line: #d9dee5; --paper: #ffffff; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 24px auto; padding: 36px 44px; background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 40px 0 10px; padding-top: 14px;
  border-top: 1px solid var(--line); }
.lead { font-size: 1.08rem; margin: 14px 0; }
.soft { color: var(--soft); font-size: .92rem; }
ul.said { list-style: none; padding: 0; margin: 18px 0; }
ul.said li { padding: 7px 14px; margin: 5px 0; background: #f4f6f8; border-radius: 4px;
  overflow-wrap: anywhere; }
.word { display: inline-block; min-width: 4.6em; font-weight: 700; font-size: .82rem;
  letter-spacing: .02em; }
.note { padding: 8px 14px; margin: 6px 0; border-left: 5px solid var(--line); background: #fafbfc;
  overflow-wrap: anywhere; }
.note.stop { border-color: #b3261e; background: #fdf3f2; }
.note.mind { border-color: #e69f00; background: #fdf8ec; }
.note.fine { border-color: #009e73; background: #eefaf5; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin: 10px 0; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line);
  padding: 6px 7px; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: 6px 7px; vertical-align: top; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
tr.first td { background: #eef5fb; font-weight: 600; }
figure { margin: 18px 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 10px 0;
  font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; color: var(--blue); margin: 8px 0; }
@media (max-width: 700px) { main { margin: 0; padding: 20px; border: 0; } }
@media print { body { background: none; } main { border: 0; margin: 0; } }
"""


@dataclass(frozen=True)
class Note:
    """One thing a reader must know before the figures; `stop` outweighs `mind`."""

    weight: Weight
    text: str


WORDS: dict[Weight, str] = {"stop": "STOP", "mind": "MIND", "fine": "FINE"}


def document(title: str, blocks: Iterable[str]) -> str:
    """Return the whole page; `blocks` are HTML already, `title` is not."""
    content = "\n".join(blocks)
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><main>\n<h1>{escape(title)}</h1>\n{content}\n</main></body></html>\n"
    )


def heading(text: str) -> str:
    """Return a section's heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, kind: Literal["", "lead", "soft"] = "") -> str:
    """Return a paragraph: plain, leading or soft-spoken."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def notes(items: Sequence[Note]) -> str:
    """Return what a reader must know first, each with its weight in words, not colour alone."""
    return "\n".join(
        f'<div class="note {note.weight}"><span class="word">{WORDS[note.weight]}</span>'
        f"{escape(note.text)}</div>"
        for note in items
    )


def sentences(items: Iterable[str], *, shown: int = 40) -> str:
    """Return one line per sentence; those beyond `shown` fold away, none is left out."""
    lines = [f"<li>{escape(item)}</li>" for item in items]
    html = f'<ul class="said">{"".join(lines[:shown])}</ul>'
    if len(lines) > shown:
        html += (
            f"<details><summary>{len(lines) - shown} more</summary>"
            f'<ul class="said">{"".join(lines[shown:])}</ul></details>'
        )
    return html


def facts(items: Mapping[str, Any]) -> str:
    """Return names and values, those unknown left out."""
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in items.items()
        if value not in (None, "")
    )
    return f"<dl>{rows}</dl>"


def table(
    frame: pd.DataFrame,
    *,
    formats: Mapping[str, Callable[[Any], str]] | None = None,
    left: Collection[str] = (),
    first: bool = False,
) -> str:
    """Return a frame as a table: figures to the right, a dash for what is not known.

    `formats` writes the values of a column; `left` names the columns of words; `first` lifts the
    first row out.
    """
    chosen = formats or {}
    kind = {name: "" if name in left else ' class="number"' for name in frame.columns}
    head = "".join(f"<th{kind[name]}>{escape(str(name))}</th>" for name in frame.columns)
    body = []
    for number, row in enumerate(frame.itertuples(index=False, name=None)):
        cells = "".join(
            f"<td{kind[name]}>{escape(_written(value, chosen.get(str(name))))}</td>"
            for name, value in zip(frame.columns, row)
        )
        lifted = ' class="first"' if first and number == 0 else ""
        body.append(f"<tr{lifted}>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def picture(figure: Figure, *, alt: str, caption: str = "") -> str:
    """Return a figure as an image within the page, with its words for who cannot see it."""
    data = base64.b64encode(png(figure)).decode()
    width = round(figure.get_figwidth() * 100)
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img width="{width}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        f"{said}</figure>"
    )


def folded(summary: str, html: str) -> str:
    """Return a part that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def _written(value: Any, write: Callable[[Any], str] | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return "–"
    if write is not None:
        return write(value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
