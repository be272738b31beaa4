"""Further figures of one model: precision against recall, and a map of cells by what was called.

Like `figures`, each returns a `matplotlib.figure.Figure` titled by its claim.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

from endoprint import metrics
from endoprint.report.ink import FAINT, SOFT, legend, paint, sheet

MOST_MAPPED = 1000  # cells: more take long to lay out and hide each other
NEIGHBOURS = 15  # of a cell, on the map; umap-learn's own default
FEWEST_MAPPED = 5  # cells; fewer have no layout


def precision_recall(predictions: pd.DataFrame, *, control: str | None = None) -> Figure:
    """Draw, for every exposure against all others, how many calls are right as more are found."""
    probabilities = metrics.probabilities_of(predictions)
    truth = predictions["truth"].astype(str).astype(object)
    drawn = [str(name) for name in probabilities.columns if 0 < (truth == name).sum() < len(truth)]
    claim = "No exposure has cells on both sides: there is no curve to draw"
    if drawn:
        claim = f"Precision averages {metrics.pr_auc_macro(probabilities, truth):.2f} over recall"
    figure, ax = sheet(9.2 if len(drawn) > 6 else 7.6, 5.4, claim)
    looks = paint([str(name) for name in probabilities.columns], control=control)
    for name in drawn:
        is_it = (truth == name).to_numpy()
        precision, recall, _ = precision_recall_curve(is_it, probabilities[name].to_numpy())
        look = looks[name]
        ax.plot(recall, precision, color=look.colour, ls=look.dash, lw=1.4, label=name)
    if drawn:
        share = float(truth.isin(drawn).mean()) / len(drawn)
        ax.axhline(share, color=SOFT, lw=1, ls=(0, (2, 2)), label="blind guessing, on average")
        legend(ax, "exposure")
    ax.set_xlabel("share of the exposure's cells found (recall)")
    ax.set_ylabel("share of these calls that are right (precision)")
    ax.set_xlim(-0.01, 1.01)
    ax.set_ylim(-0.01, 1.03)
    ax.grid(color=FAINT, lw=0.6)
    return figure


def lay_out(vectors: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return a place in the plane for every cell, x and y (UMAP: McInnes 2018, arXiv 1802.03426).

    vectors: index cell id, one column per axis. At most `MOST_MAPPED` cells, drawn by the seed.
    """
    if len(vectors) > MOST_MAPPED:
        vectors = vectors.sample(MOST_MAPPED, random_state=seed).sort_index()
    varies = int((vectors.std() > 0).sum())
    if len(vectors) < FEWEST_MAPPED or varies < 2:  # no plane to lay them out in
        bare = np.zeros((len(vectors), 2))
        return pd.DataFrame(bare, index=vectors.index, columns=["x", "y"])
    from umap import UMAP  # compiles itself for some seconds: only for who draws a map

    known = vectors.to_numpy(dtype=np.float32)
    # laid out from the first two axes on: of few cells the spectral start is not defined
    made = UMAP(
        n_neighbors=min(NEIGHBOURS, len(known) - 1), init="pca", random_state=seed, n_jobs=1
    )
    found = np.asarray(made.fit_transform(known), dtype=np.float64)
    return pd.DataFrame(found, index=vectors.index, columns=["x", "y"])


def map_of_calls(
    predictions: pd.DataFrame, places: pd.DataFrame, *, control: str | None = None
) -> Figure:
    """Draw cells where `lay_out` put them, in the colour of what they were called.

    A cross marks a cell called wrongly. The layout is for the eye: nothing was fitted on it.
    """
    shown = predictions.loc[predictions.index.intersection(places.index)]
    probabilities = metrics.probabilities_of(shown)
    calls, truth = metrics.call(probabilities), shown["truth"].astype(str)
    is_right = (calls == truth).to_numpy()
    share = float(is_right.mean()) if len(shown) else 0.0
    claim = f"Cells by what they were called: {share:.0%} of those shown are called right"
    figure, ax = sheet(9.2, 6.0, claim)
    looks = paint([str(name) for name in probabilities.columns], control=control)
    for name in probabilities.columns:
        for right, marker, size in ((True, "o", 10.0), (False, "x", 16.0)):
            chosen = shown.index[((calls == name).to_numpy()) & (is_right == right)]
            if len(chosen):
                at = places.loc[chosen]
                label = str(name) if right else None
                ax.scatter(
                    at["x"], at["y"], s=size, marker=marker, lw=0.8, alpha=0.8,
                    color=looks[str(name)].colour, label=label,
                )  # fmt: skip
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("UMAP of the latent, first axis (no unit; distances far apart mean nothing)")
    ax.set_ylabel("second axis")
    if len(shown):
        legend(ax, "called (cross: wrongly)")
    return figure
