"""A head alone: logistic regression on what an encoder at rest makes of each cell.

Every cell is read once. The problem is convex, so it is solved rather than trained: no epochs, no
learning rate, the same answer whatever the seed.

Shapes: n cells, D width, E exposures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from endoprint.encoder.network import Reader
from endoprint.encoder.validation import held_out
from endoprint.linear import Fitted, fit_balanced
from endoprint.model import Watch

Array = np.ndarray[Any, np.dtype[Any]]

# Strength per cell, tried on validation cells from strong to weak: each fit starts from the last
PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)
UNCHOSEN = 0.01  # where there are no validation cells to choose on (a guess)


@dataclass(frozen=True)
class Vectors:
    """The pooled vectors of some cells, (n, D), and which exposure each met, (n,)."""

    vectors: Array
    truth: Array


def fit_head(
    network: Reader, train: Vectors, valid: Vectors, *, penalty: float | None, watch: Watch
) -> dict[str, Any]:
    """Give a network the head that logistic regression finds; return what to say of it.

    Vectors are standardised by their figures over the training cells. `penalty` None: chosen on
    validation cells.
    """
    with torch.no_grad():
        vectors = torch.from_numpy(train.vectors.astype(np.float64))
        network.standardise.running_mean.copy_(vectors.mean(dim=0))  # type: ignore[union-attr]
        network.standardise.running_var.copy_(  # type: ignore[union-attr]
            vectors.var(dim=0, correction=0)
        )
    inputs, asked = _standardised(network, train.vectors), _standardised(network, valid.vectors)
    penalties: tuple[float, ...] = PENALTIES if len(valid.truth) else (UNCHOSEN,)
    if penalty is not None:
        penalties = (penalty,)
    tried: list[tuple[float, Fitted]] = []
    for step, fitted in enumerate(fit_balanced(inputs, train.truth, penalties), start=1):
        said = held_out(asked @ fitted.coefficients.T + fitted.intercept, valid.truth)
        tried.append((said.get("valid_loss", 0.0), fitted))
        watch(step, {"penalty": fitted.penalty, **said})
        if step > 1 and tried[-1][0] > tried[-2][0]:
            break  # past the best: weaker penalties only do worse
    best = min(tried, key=lambda pair: pair[0])[1]
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(best.coefficients))
        network.head.bias.copy_(torch.from_numpy(best.intercept))
    network.eval()
    return {"penalty": best.penalty, "has_converged": best.has_converged}


def _standardised(network: Reader, vectors: Array) -> Array:
    device = network.head.weight.device
    network.eval()
    with torch.inference_mode():
        made: torch.Tensor = network.standardise(torch.from_numpy(vectors).to(device))
    found: Array = made.cpu().numpy().astype(np.float64)
    return found
