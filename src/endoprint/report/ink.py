"""Paper and ink of every figure: colours that the colour-blind tell apart, sizes, PNG bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe and Ito 2008 (https://jfly.uni-koeln.de/color), its yellow replaced by indigo, which
# lines on white need; neighbours in this order stay apart under all three common dichromacies.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288")
INK, SOFT, FAINT = "#1f2933", "#5f6b7a", "#d9dee5"
HATCHES = ("", "////", "....", "xxxx")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#9ecae1", "#0072B2", "#003a5c"])


class Paint(NamedTuple):
    """How one exposure looks wherever it is drawn: never told by colour alone."""

    colour: str
    hatch: str
    dash: Any


def paint(exposures: Sequence[str], *, control: str | None = None) -> dict[str, Paint]:
    """Give every exposure its look: one hue a pathway, antagonists hatched, the control grey."""
    stems: dict[str, int] = {}
    looks: dict[str, Paint] = {}
    for exposure in exposures:
        if exposure == control:
            looks[exposure] = Paint("#8a94a0", "", "-")
            continue
        is_antagonist = exposure.endswith("_ANTAGONIST")
        stem = exposure.removesuffix("_ANTAGONIST").removesuffix("_AGONIST")
        number = stems.setdefault(stem, len(stems))
        colour, round_ = HUES[number % len(HUES)], number // len(HUES)
        kind = min(int(is_antagonist) + 2 * min(round_, 1), len(HATCHES) - 1)
        looks[exposure] = Paint(
            _lighter(colour, 0.45) if is_antagonist else colour, HATCHES[kind], DASHES[kind]
        )
    return looks


def png(figure: Figure, *, dpi: int = 150) -> bytes:
    """Return the figure as PNG bytes, the same bytes for the same figure."""
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_figure(
        buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
    )
    return buffer.getvalue()


def sheet(width: float, height: float, claim: str) -> tuple[Figure, Axes]:
    """Return an empty figure titled by its claim, inches."""
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(width, height), layout=engine)
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    title = figure.suptitle("", x=0.015, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    for n_letters in range(120, 16, -4):  # the longest lines that fit
        title.set_text(textwrap.fill(claim, n_letters).replace("$", r"\$"))
        if title.get_window_extent(canvas.get_renderer()).width < (width - 0.4) * figure.dpi:
            break
    ax.tick_params(colors=INK, labelsize=9.5, length=3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(SOFT)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_fontsize(10.5)
        axis.label.set_color(INK)
    ax.set_axisbelow(True)
    return figure, ax


def legend(ax: Axes, title: str) -> None:
    """Put the legend right of the axes, where it covers nothing."""
    drawn = ax.legend(
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=9.5,
        title_fontsize=9.5,
        alignment="left",
        handlelength=2.4,
    )
    drawn.get_title().set_color(SOFT)


def _lighter(colour: str, share: float) -> str:
    return to_hex([c + (1 - c) * share for c in to_rgb(colour)])
