"""Figures of a search: what was tried, what it came to, which values matter, at what cost.

Each returns a `matplotlib.figure.Figure` titled by its claim. `table` is one row per trial, index
number, columns as `search.table_of` gives them: state, macro_f1, cpu_seconds, last_valid_macro_f1,
epochs, seconds, error, value.<name>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from endoprint.report.ink import FAINT, HUES, INK, SOFT, legend, sheet

VALUE = "value."
COMPLETE, PRUNED, FAILED, BEST = HUES[0], SOFT, HUES[1], HUES[2]
PANELS_PER_ROW = 3


def search_history(table: pd.DataFrame, *, model: str) -> Figure:
    """Draw macro-F1 trial by trial, and the best so far."""
    done = _complete(table)
    claim = f"{model}: no trial came to its end"
    if len(done):
        first = done["macro_f1"].idxmax()
        claim = (
            f"{model}: {done['macro_f1'].max():.3f} macro-F1 on development folds, "
            f"found by trial {first} of {len(table)}"
        )
    figure, ax = sheet(8.4, 4.8, claim)
    pruned, failed = table[table["state"] == "pruned"], table[table["state"] == "failed"]
    if len(done):
        best = done["macro_f1"].astype(float).cummax().reindex(table.index).ffill()
        ax.step(best.index, best, where="post", color=BEST, lw=1.8, label="best so far")
        ax.scatter(done.index, done["macro_f1"], s=30, color=COMPLETE, zorder=3, label="complete")
    known = pruned["last_valid_macro_f1"].dropna() if len(pruned) else pd.Series(dtype=float)
    if len(known):
        ax.scatter(
            known.index, known, s=30, marker="v", facecolor="white", edgecolor=PRUNED, zorder=3,
            label="pruned: validation\nmacro-F1 when given up",
        )  # fmt: skip
    if len(failed):
        floor = np.full(len(failed), ax.get_ylim()[0])
        ax.scatter(failed.index, floor, s=34, marker="x", color=FAILED, label="failed")
    ax.set_xlabel("trial")
    ax.set_ylabel("macro-F1 on held-out development units")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(color=FAINT, lw=0.6)
    if len(table):
        legend(ax, "trial")
    return figure


def search_importance(shares: Mapping[str, float], *, model: str) -> Figure:
    """Draw which searched values macro-F1 owes most to; the shares sum to one."""
    ordered = pd.Series(dict(shares), dtype=float).sort_values()
    claim = f"{model}: too few trials to say which value matters"
    if len(ordered):
        claim = f"{model}: {ordered.index[-1]} matters most, {ordered.iloc[-1]:.0%} of what varies"
    figure, ax = sheet(7.6, 1.8 + 0.42 * max(len(ordered), 2), claim)
    ax.barh(range(len(ordered)), ordered, height=0.62, color=COMPLETE)
    for place, share in enumerate(ordered):
        ax.text(share + 0.01, place, f"{share:.0%}", va="center", fontsize=9.5, color=INK)
    ax.set_yticks(range(len(ordered)), [str(name) for name in ordered.index])
    ax.set_xlim(0, max(1.12 * float(ordered.max()), 0.1) if len(ordered) else 1)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("importance (PED-ANOVA over complete trials; shares sum to 100 %)")
    return figure


def search_slices(
    table: pd.DataFrame, ranges: Mapping[str, Any], *, best: int | None = None
) -> Figure:
    """Draw macro-F1 against each searched value; `best`: the trial that is marked."""
    done = _complete(table)
    names = [name for name in ranges if VALUE + name in done and done[VALUE + name].notna().any()]
    if not names:
        return sheet(6.4, 3.0, "No trial came to its end: nothing to draw")[0]
    n_rows = -(-len(names) // PANELS_PER_ROW)
    n_columns = min(len(names), PANELS_PER_ROW)
    figure, ax = sheet(
        1.2 + 3.0 * n_columns, 1.2 + 2.6 * n_rows,
        f"Macro-F1 of {len(done)} complete trials by value; the winner is the star",
    )  # fmt: skip
    ax.remove()
    panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.remove()
    for panel, name in zip(panels.flat, names):
        _slice(panel, done, name, ranges[name], best)
    for row in panels:
        row[0].set_ylabel("macro-F1", fontsize=10, color=INK)
    return figure


def _slice(ax: Axes, done: pd.DataFrame, name: str, range_: Any, best: int | None) -> None:
    values = done[VALUE + name].dropna()
    choices = getattr(range_, "choices", None)
    if choices is not None:
        spelled = [str(choice) for choice in choices]
        values = values.astype(str).map(spelled.index)
        ax.set_xticks(range(len(spelled)), spelled)
        ax.set_xlim(-0.6, len(spelled) - 0.4)
    else:
        ax.set_xlim(range_.low, range_.high)  # all that may be tried, not what was
    values = values.astype(float)
    if getattr(range_, "log", False):
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    quality = done.loc[values.index, "macro_f1"]
    ax.scatter(values, quality, s=26, color=COMPLETE, alpha=0.75, lw=0, clip_on=False)
    if best is not None and best in values.index:
        ax.scatter(values[best], quality[best], s=150, marker="*", color=FAILED, zorder=4)
    ax.set_xlabel(name, fontsize=10, color=INK)
    ax.tick_params(colors=INK, labelsize=9, length=3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(SOFT)
    ax.set_axisbelow(True)
    ax.grid(color=FAINT, lw=0.6)


def search_front(table: pd.DataFrame, front: Sequence[int], *, best: int | None = None) -> Figure:
    """Draw macro-F1 against the processor seconds of a fit, and who is beaten by none."""
    done = _complete(table)
    figure, ax = sheet(8.4, 4.8, _front_claim(done, front, best))
    ax.scatter(
        done["cpu_seconds"], done["macro_f1"], s=26, color=SOFT, alpha=0.6, lw=0, label="trial"
    )
    unbeaten = done.loc[done.index.isin(list(front))].sort_values("cpu_seconds")
    ax.plot(
        unbeaten["cpu_seconds"], unbeaten["macro_f1"], color=COMPLETE, marker="o", ms=6, lw=1.6,
        label="beaten by none\n(Pareto front)",
    )  # fmt: skip
    if best in done.index:
        row = done.loc[best]
        ax.scatter(
            row["cpu_seconds"], row["macro_f1"], s=180, marker="*", color=FAILED, zorder=4,
            label="proposed",
        )  # fmt: skip
    ax.set_xscale("log")
    for each in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        each(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    ax.set_xlabel("processor seconds of a fit (log scale)")
    ax.set_ylabel("macro-F1 on held-out development units")
    ax.grid(color=FAINT, lw=0.6, which="both")
    legend(ax, "")
    return figure


def _front_claim(done: pd.DataFrame, front: Sequence[int], best: int | None) -> str:
    if best is None or best not in done.index:
        return "No trial came to its end: there is no front"
    quality, cost = done["macro_f1"].astype(float), done["cpu_seconds"].astype(float)
    first = int(quality.to_numpy().argmax())
    less = 1 - cost[best] / cost.iloc[first]
    if done.index[first] == best or less <= 0:
        return f"{len(front)} trials that none beats; the best is also the one proposed"
    lost = quality.iloc[first] - quality[best]
    return f"Proposed: {lost:.3f} macro-F1 below the best, for {less:.0%} less processor time"


def described_search(
    result: Mapping[str, Any], table: pd.DataFrame, shares: Mapping[str, float]
) -> str:
    """Return what MLflow's UI shows on a search's run: Markdown, the figure that matters first."""
    counts = table["state"].value_counts()
    told = [f"{int(counts[name])} {name}" for name in ("complete", "pruned", "failed", "running")
            if name in counts]  # fmt: skip
    cost = result.get("cpu_seconds")
    lines = [
        f"**macro-F1 {result['best_macro_f1']:.3f}**, {result['model']}, trial {result['trial']}, "
        f"on held-out development units{f', {cost:.1f} CPU s a fit' if cost else ''}.",
        "",
        f"Trials: {', '.join(told)}. Test units were not opened.",
        "",
        "| value | winner | importance |",
        "|---|---:|---:|",
    ]
    for name, value in result["values"].items():
        said = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {name} | {said} | {f'{shares[name]:.0%}' if name in shares else ''} |")
    lines += ["", "Proposed, and not applied:" if result["diff"] else "params.yaml has these."]
    if result["diff"]:
        lines += ["", "```diff", result["diff"], "```"]
    return "\n".join(lines)


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["state"] == "complete"]
