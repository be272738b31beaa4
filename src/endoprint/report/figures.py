"""Figures that say a claim: what is confused, on which unit, how sure, at what cost.

Every function returns a `matplotlib.figure.Figure` drawn on its own canvas (no global state).
Predictions are one row per cell: index cell id, columns `unit`, `truth` and `p_<exposure>`.
"""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from sklearn.metrics import roc_auc_score

from endoprint import metrics
from endoprint.config import Refusal
from endoprint.paired import FEWEST_FOR_INTERVAL, interval
from endoprint.report.ink import (
    BLUES,
    FAINT,
    HUES,
    INK,
    MARKERS,
    SOFT,
    Paint,
    legend,
    paint,
    sheet,
)

NOTHING_TO_JUDGE = "No cell of known exposure to judge"
NO_CALL = "no call"
FEW = 6  # up to so many exposures a confusion matrix has room for counts


def confusion(predictions: pd.DataFrame) -> Figure:
    """Draw which exposure is called what: each row sums to 100 % of the cells truly so exposed."""
    probabilities, truth, _ = _judged(predictions)
    if not len(truth):
        return sheet(6.4, 4.0, NOTHING_TO_JUDGE)[0]
    table = metrics.confusion(probabilities, truth)
    # no row for what no cell met, no column for what the model cannot say
    table = table.loc[table.sum(axis=1) > 0, table.columns.isin(probabilities.columns)]
    rows, columns = [str(name) for name in table.index], [str(name) for name in table.columns]
    counts = table.to_numpy(dtype=int)
    totals = counts.sum(axis=1)
    share = counts / totals[:, None]
    is_small = len(columns) <= FEW
    side = 0.62 if is_small else 0.42
    figure, ax = sheet(
        max(5.6, 3.4 + side * len(columns)),
        max(3.6, 2.4 + side * len(rows)),
        _confusion_claim(rows, columns, share),
    )
    ax.imshow(share, cmap=BLUES, vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(share):
        text = f"{100 * value:.0f}" if value >= 0.02 else ""
        if is_small:
            text = f"{value:.0%}\n{counts[i, j]:,}"
        ink = "white" if value > 0.5 else INK
        size = 9 if is_small else 7.5
        ax.text(j, i, text, ha="center", va="center", fontsize=size, color=ink)
    ax.set_yticks(range(len(rows)), [f"{row}  (n = {n:,})" for row, n in zip(rows, totals)])
    if len(columns) <= 3:
        ax.set_xticks(range(len(columns)), columns)
    else:
        ax.set_xticks(
            range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor"
        )
    ax.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=FAINT, lw=0.6)
    ax.tick_params(which="minor", length=0)
    ax.set_axisbelow(False)  # the grid parts the squares
    ax.set_xlabel("called (% of the cells of the row)")
    ax.set_ylabel("truly exposed to")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def roc(predictions: pd.DataFrame, *, control: str | None = None) -> Figure:
    """Draw, for every exposure against all others, the cells found against the false alarms."""
    probabilities, truth, _ = _judged(predictions)
    if not len(truth):
        return sheet(6.4, 4.0, NOTHING_TO_JUDGE)[0]
    points = metrics.roc_curves(probabilities, truth)
    curves = {str(name): curve for name, curve in points.groupby("exposure")}
    claim = "No exposure has cells on both sides: there is no curve to draw"
    if curves:
        macro = metrics.auroc_macro(probabilities, truth)
        claim = f"A cell of an exposure ranks above a cell of another in {macro:.1%} of pairs"
    area = {name: float(roc_auc_score(truth == name, probabilities[name])) for name in curves}
    many = len(curves) > FEW
    figure, ax = sheet(9.2 if many else 7.6, 5.4, claim)
    ax.plot([0, 1], [0, 1], color=FAINT, lw=1.2, label="chance  0.500")
    looks = paint(list(probabilities.columns), control=control)
    for name in sorted(curves, key=lambda name: -area[name]):
        false, true = (curves[name][f"{kind}_positive_rate"] for kind in ("false", "true"))
        look, label = looks[name], f"{name}  {area[name]:.3f}"
        ax.plot(false, true, color=look.colour, ls=look.dash, lw=1.6, label=label)
    if len(curves) > 2:
        grid = np.linspace(0, 1, 201)
        mean = np.mean(
            [
                np.interp(grid, curve["false_positive_rate"], curve["true_positive_rate"])
                for curve in curves.values()
            ],
            axis=0,
        )
        ax.plot(grid, mean, color=INK, lw=2.6, label=f"macro average  {macro:.3f}")
    ax.set_xlabel("share of other cells wrongly included")
    ax.set_ylabel("share of the exposure's cells found")
    ax.set_xlim(-0.01, 1.01)
    ax.set_ylim(-0.01, 1.01)
    ax.set_aspect("equal")
    legend(ax, "area under the curve (AUROC)")
    return figure


def reliability(predictions: pd.DataFrame) -> Figure:
    """Draw how often calls of a given confidence are right: on the diagonal, doubt is honest."""
    probabilities, truth, unit = _judged(predictions)
    if not len(truth):
        return sheet(6.4, 4.0, NOTHING_TO_JUDGE)[0]
    bins = metrics.reliability(probabilities, truth, unit)
    calls = bins[bins["exposure"] == "call"]
    error, floor = metrics.calibration_error(probabilities, truth, unit)
    figure, ax = sheet(6.4, 5.9, _reliability_claim(error, floor, calls))
    ax.plot([0, 1], [0, 1], color=SOFT, lw=1, ls=(0, (3, 2)))
    ax.annotate("as sure as right", (0.04, 0.075), rotation=45, color=SOFT, fontsize=9)
    ax.vlines(calls["confidence"], calls["confidence"], calls["accuracy"], color=HUES[1], lw=1.4)
    ax.plot(calls["confidence"], calls["accuracy"], color=HUES[0], lw=1, alpha=0.5)
    ax.scatter(
        calls["confidence"], calls["accuracy"], s=700 * calls["mass"], color=HUES[0], zorder=3
    )
    note = (
        f"ECE {error:.3f}; noise floor {floor:.3f}\n{len(truth):,} cells, "
        f"{unit.nunique()} {'unit' if unit.nunique() == 1 else 'units'}; area of a dot = its share"
    )
    ax.annotate(
        note, (0.98, 0.03), xycoords="axes fraction", ha="right", va="bottom", fontsize=9.5
    )
    ax.set_xlim(-0.02, 1.04)
    ax.set_ylim(-0.02, 1.04)
    ax.set_aspect("equal")
    ax.grid(color=FAINT, lw=0.6)
    ax.set_xlabel("mean confidence of the calls in a bin (probability)")
    ax.set_ylabel("share of those calls that are right")
    return figure


def per_unit(by_unit: pd.DataFrame, *, chance: float | None = None, part: str = "unit") -> Figure:
    """Draw macro-F1 on every unit no model was fitted on, and below it each model's mean.

    by_unit: index units, one column a model, values macro-F1 in [0, 1] or NaN. The bar of a mean
    is the interval over units where there are enough of them, else their range. `part` names
    what is held out; nothing is inferred from a mere "part".
    """
    models = [str(name) for name in by_unit.columns]
    n_units, n_means = len(by_unit), len(models) if len(by_unit) > 1 else 0
    figure, ax = sheet(8.4, 1.9 + 0.3 * (n_units + n_means), _unit_claim(by_unit, part))
    names = [str(unit) for unit in by_unit.index]
    places = list(np.arange(n_units, dtype=float))
    for number, model in enumerate(models):
        scores = by_unit.iloc[:, number].astype(float)
        colour, marker = HUES[number % len(HUES)], MARKERS[number % len(MARKERS)]
        ax.scatter(
            scores,
            np.arange(n_units),
            s=44,
            color=colour,
            marker=marker,
            edgecolor="white",
            linewidth=0.6,
            zorder=3,
            label=model,
        )
        if not n_means:
            continue
        place = n_units + 0.5 + number
        found = interval(scores) if part != "part" else None
        low, high = found or (float(scores.min()), float(scores.max()))
        ax.plot([low, high], [place, place], color=colour, lw=3, alpha=0.45)
        ax.plot([scores.mean()], [place], ms=7, color=colour, marker=marker)
        names.append(f"{model}: mean, {'≈ 95 % interval' if found else 'range'}")
        places.append(place)
    ax.set_yticks(places, names)
    ax.set_ylim(n_units + n_means + (0.1 if n_means else -0.4), -0.6)
    if n_means:
        ax.axhline(n_units - 0.25, color=FAINT, lw=1)
    lowest = min([0.9, *by_unit.to_numpy(dtype=float)[by_unit.notna().to_numpy()]])
    if chance is not None:
        lowest = min(lowest, chance)
        ax.axvline(chance, color=SOFT, lw=1, ls=(0, (2, 2)), label="chance")
    ax.set_xlim(max(-0.02, lowest - 0.08), 1.02)
    ax.set_xlabel(f"macro-F1 on the {part}'s own cells (1 is perfect)")
    ax.set_ylabel(f"held-out {part}")
    ax.grid(axis="x", color=FAINT, lw=0.6)
    if len(models) > 1 or chance is not None:
        legend(ax, "model")
    return figure


def cost_quality(
    board: pd.DataFrame, *, cost: str = "score_seconds_per_1000_cells", quality: str = "macro_f1"
) -> Figure:
    """Draw what every model costs and how good it is; those nothing else beats are joined.

    board: index models, columns `cost` (seconds) and `quality`; rows with a NaN are left out.
    """
    known = board[[cost, quality]].astype(float).replace([np.inf, -np.inf], np.nan).dropna()
    known = known[known[cost] > 0].sort_values([cost, quality], ascending=[True, False])
    front = pareto(known[cost], known[quality])
    claim = (
        f"Worth their cost: {', '.join(map(str, front))}"
        if len(front)
        else "No model has both a cost and a quality"
    )
    figure, ax = sheet(7.6, 4.8, claim)
    labels = {
        "score_seconds_per_1000_cells": "seconds to score 1,000 cells (log scale)",
        "fit_seconds": "seconds to fit (log scale)",
        "macro_f1": "macro-F1 on unseen units",
    }
    ax.set_xlabel(labels.get(cost, cost))
    ax.set_ylabel(labels.get(quality, quality))
    if not len(known):
        return figure
    on_front = known.index.isin(front)
    edge = known.loc[front]
    ax.step(edge[cost], edge[quality], where="post", color=HUES[0], lw=1.4, alpha=0.6, zorder=1)
    for is_front, colour, marker, name in (
        (True, HUES[0], "o", "no cheaper model is as good"),
        (False, SOFT, "X", "a cheaper model is as good"),
    ):
        chosen = known[on_front == is_front]
        if len(chosen):
            ax.scatter(
                chosen[cost], chosen[quality], s=64, color=colour, marker=marker, label=name
            )
    ax.set_xscale("log")
    low, high = float(known[cost].min()), float(known[cost].max())
    # whole decades, with room for a name on the right
    ax.set_xlim(10 ** np.floor(np.log10(low / 1.5)), 10 ** np.ceil(np.log10(high * 4)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    span = max(known[quality].max() - known[quality].min(), 0.1)
    ax.set_ylim(known[quality].min() - 0.2 * span, known[quality].max() + 0.25 * span)
    _name_points(ax, known, cost, quality)
    ax.grid(color=FAINT, lw=0.6)
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9.5
    )
    return figure


def pareto(cost: pd.Series[float], quality: pd.Series[float]) -> list[str]:
    """Return the models no other beats on cost and quality at once, cheapest first."""
    order = pd.DataFrame({"cost": cost, "quality": quality}).dropna()
    order = order.sort_values(["cost", "quality"], ascending=[True, False])
    best, front = -np.inf, []
    for name, row in order.iterrows():
        if row["quality"] > best:
            best = row["quality"]
            front.append(str(name))
    return front


def call_shares(shares: pd.DataFrame, *, control: str | None = None, limit: int = 60) -> Figure:
    """Draw, for every sample, which share of its cells was called what.

    shares: index samples, columns calls (exposures, then "no call"), rows sum to one.
    """
    shown = shares.iloc[:limit]
    claim = "What the cells of each sample were called"
    if len(shares) > limit:
        claim += f" (the first {limit} of {len(shares)} samples)"
    calls = [str(name) for name in shown.columns if (shown[name] > 0).any()]
    n_lines = -(-len(calls) // 3)
    figure, ax = sheet(9.0, 1.5 + 0.36 * len(shown) + 0.22 * n_lines, claim)
    looks = paint([str(name) for name in shares.columns if name != NO_CALL], control=control)
    looks[NO_CALL] = Paint("#ffffff", "xxxx", "-")
    left = np.zeros(len(shown))
    place = np.arange(len(shown))[::-1]
    for name in calls:
        width = shown[name].to_numpy(dtype=float)
        look = looks[name]
        ax.barh(
            place,
            width,
            left=left,
            height=0.74,
            color=look.colour,
            hatch=look.hatch,
            edgecolor="white" if name != NO_CALL else SOFT,
            linewidth=0.4,
            label=name,
        )
        left += width
    ax.set_yticks(place, [textwrap.shorten(str(s), 34, placeholder="…") for s in shown.index])
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    ax.set_xlabel("% of the sample's cells")
    ax.set_ylabel("sample")
    ax.tick_params(axis="y", length=0)
    if calls:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return figure


# -- helpers ------------------------------------------------------------------------------------
def _name_points(ax: Axes, known: pd.DataFrame, cost: str, quality: str) -> None:
    """Write each model's name above its point, higher where it would cover another's."""
    low, high = ax.get_ylim()
    step = (high - low) * 0.055  # height of a line of text
    placed: list[tuple[float, float]] = []  # (log10 cost, height)
    for name, row in known.sort_values(quality).iterrows():
        x, y = float(np.log10(row[cost])), float(row[quality]) + step * 0.55
        while any(abs(x - x_) < 0.6 and abs(y - y_) < step for x_, y_ in placed):
            y += step / 4
        placed.append((x, y))
        ax.annotate(
            str(name),
            (row[cost], row[quality]),
            xytext=(row[cost] * 1.1, y),
            va="center",
            fontsize=9.5,
            color=INK,
        )


# -- what is drawn, and what it says ------------------------------------------------------------
def _judged(predictions: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """Return probabilities, truth and unit of every cell whose truth is known."""
    absent = {"unit", "truth"} - set(predictions.columns)
    probabilities = metrics.probabilities_of(predictions)
    if absent or not len(probabilities.columns):
        raise Refusal(
            "predictions carry `unit`, `truth` and a `p_<exposure>` column for every exposure",
            ", ".join(map(str, predictions.columns)) or "no columns",
            "pass the predictions of a judgement",
        )
    is_known = predictions["truth"].notna() & probabilities.notna().all(axis=1)
    known = predictions.loc[is_known]
    return probabilities.loc[is_known], known["truth"].astype(str), known["unit"].astype(str)


def _confusion_claim(rows: list[str], columns: list[str], share: metrics.Array) -> str:
    is_right = np.asarray(rows)[:, None] == np.asarray(columns)[None, :]
    wrong = np.where(is_right, 0.0, share)
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    if wrong[i, j] == 0:
        return "Every cell is called what it was exposed to"
    return f"The commonest mistake: {rows[i]} called {columns[j]} ({wrong[i, j]:.0%} of its cells)"


def _reliability_claim(error: float, floor: float, calls: pd.DataFrame) -> str:
    if error <= floor:
        return f"The stated confidence is honest: ECE {error:.3f}, within its noise floor"
    lean = float(np.average(calls["confidence"] - calls["accuracy"], weights=calls["mass"]))
    how = "too sure" if lean > 0 else "not sure enough"
    return f"Calls are {how}: ECE {error:.3f}, above its noise floor of {floor:.3f}"


def _unit_claim(by_unit: pd.DataFrame, part: str) -> str:
    mean = by_unit.mean()
    if mean.isna().all():
        return f"No {part} could be judged"
    best = mean.idxmax()
    values = by_unit[best].dropna()
    if len(values) == 1:
        return f"{best}: macro-F1 {values.iloc[0]:.2f} on the one {part} judged, {values.index[0]}"
    is_few = part != "part" and len(values) < FEWEST_FOR_INTERVAL
    return (
        f"{best} does worst on {values.idxmin()}: macro-F1 {values.min():.2f}; "
        f"{values.max():.2f} at best (n = {len(values)} {part}s"
        f"{'; too few for an interval' if is_few else ''})"
    )
