"""Gradient-boosted trees on log-normalised variable genes: thresholds and genes that interact.

Trees ask one gene after the other whether it is above a threshold, so that an exposure may show
only in cells that also express something else; linear models can not say that. Exposures weigh
equally whatever their number of cells, and boosting stops where validation cells grow less likely.

n cells, G variable genes, E exposures, D latent width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import lightgbm
import numpy as np
import pandas as pd
from anndata import AnnData
from lightgbm.callback import CallbackEnv
from optuna.distributions import FloatDistribution, IntDistribution

from endoprint.config import Config, Refusal
from endoprint.draws import evenly_drawn
from endoprint.latent import Latent
from endoprint.metrics import balanced_weight
from endoprint.model import ExposureModel, State, Watch

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 4096  # cells answered at once; bounds memory
TOLD_EVERY = 10  # rounds between two words to the watcher

# what LightGBM's text says: once, per tree, and there of every node and of every leaf
HEAD = [
    "version", "num_class", "num_tree_per_iteration", "label_index", "max_feature_idx",
    "objective", "feature_names", "feature_infos", "tree_sizes",
]  # fmt: skip
TREE = [
    "Tree", "num_leaves", "num_cat", "split_feature", "split_gain", "threshold", "decision_type",
    "left_child", "right_child", "leaf_value", "leaf_weight", "leaf_count", "internal_value",
    "internal_weight", "internal_count", "is_linear", "shrinkage",
]  # fmt: skip
NODES = (*TREE[3:9], *TREE[12:15])
LEAVES = TREE[9:12]
WHOLE_NUMBERS = ("split_feature", "decision_type", "left_child", "right_child")
THRESHOLDS = range(0, 16, 2)  # kinds of split that compare numbers: an odd one looks up a category
END = "end of trees\n"
WHOLE = re.compile(r"-?[0-9]{1,9}")
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[-+][0-9]+)?")


class BoostingConfig(Config):
    """What boosted trees may be told."""

    n_genes: Annotated[int, IntDistribution(50, 20_000, log=True)] = 2000  # most variable genes
    rounds: int = 500  # at most; one tree per exposure each
    patience: int = 30  # rounds without a gain on validation cells before stopping
    rounds_unstopped: int = 100  # where there are no validation cells to stop on (a guess)
    lr: Annotated[float, FloatDistribution(0.01, 0.5, log=True)] = 0.1  # share of a tree taken
    leaves: Annotated[int, IntDistribution(2, 127, log=True)] = 6  # per tree
    fewest_cells: Annotated[int, IntDistribution(1, 200, log=True)] = 20  # in a leaf
    # genes a tree is offered; small ones cost less and did better (A549 .91 to .92 macro-F1 at .1
    # and .05), but a pair of genes that speaks only together asks for more
    gene_share: Annotated[float, FloatDistribution(0.01, 1.0, log=True)] = 0.05
    penalty: Annotated[float, FloatDistribution(1e-3, 100.0, log=True)] = 1.0  # L2, on leaves
    bins: int = 63  # thresholds tried per gene; 255 took longer
    latent_width: Annotated[int, IntDistribution(2, 100)] = 30  # components in `embed`
    max_cells: int = 30_000  # training cells used, drawn evenly over unit x exposure
    n_threads: int = 1  # of the processor; the answer is the same under any number


class Boosting(ExposureModel):
    """Ask a cell's genes one threshold after another (Friedman 2001; LightGBM: Ke 2017)."""

    Config = BoostingConfig
    name = "boosting"

    def _learn(self, train: AnnData, valid: AnnData, watch: Watch, work: Path | None) -> None:
        train = evenly_drawn(train, self.config.max_cells, self.seed)
        # one list of genes serves the trees and `embed`
        self._latent = Latent.fit(
            train, n_genes=self.config.n_genes, width=self.config.latent_width
        )
        valid = valid[valid.obs["exposure"].astype(str).isin(self.exposures).to_numpy()]
        fitted = self._boosted(train, valid, watch)
        rounds = fitted.best_iteration if valid.n_obs else fitted.current_iteration()
        self._take(fitted.model_to_string(num_iteration=rounds))
        self.provenance |= {"rounds": rounds}

    def _boosted(self, train: AnnData, valid: AnnData, watch: Watch) -> lightgbm.Booster:
        """Return the booster, stopped on validation cells, units x exposures weighing equally."""
        truth = train.obs["exposure"].astype(str)
        size = truth.map(truth.value_counts()).to_numpy(dtype=np.float64)
        learned = self._dataset(train, train.n_obs / (len(self.exposures) * size))
        stages: list[Callable[[CallbackEnv], None]] = [_reporter(watch)]
        held = []
        if valid.n_obs:
            weight = balanced_weight(
                valid.obs["exposure"].astype(str), valid.obs["unit"].astype(str)
            )
            held = [self._dataset(valid, weight * valid.n_obs, like=learned)]
            stages.append(lightgbm.early_stopping(self.config.patience, verbose=False))
        return lightgbm.train(
            self._parameters(),
            learned,
            num_boost_round=self.config.rounds if held else self.config.rounds_unstopped,
            valid_sets=held,
            valid_names=["validation"] * len(held),
            callbacks=stages,
        )

    def _parameters(self) -> dict[str, Any]:
        """Return the same wishes in LightGBM's words."""
        told = self.config
        return {
            "objective": "multiclass",
            "metric": "multi_logloss",
            "num_class": len(self.exposures),
            "learning_rate": told.lr,
            "num_leaves": told.leaves,
            "min_data_in_leaf": told.fewest_cells,
            "feature_fraction": told.gene_share,
            "lambda_l2": told.penalty,
            "max_bin": told.bins,
            "num_threads": told.n_threads,
            "seed": self.seed,
            "deterministic": True,
            "force_row_wise": True,  # else the layout is timed, and sums differ with it
            "verbosity": -1,
        }

    def _dataset(
        self, cells: AnnData, weight: Array, like: lightgbm.Dataset | None = None
    ) -> lightgbm.Dataset:
        index = pd.Index(self.exposures)
        return lightgbm.Dataset(
            self._latent.expression.of(cells),
            label=index.get_indexer(pd.Index(cells.obs["exposure"].astype(str))),
            weight=weight,
            reference=like,
            params={"max_bin": self.config.bins, "verbosity": -1},
        )

    def _take(self, text: str) -> None:
        """Answer from the text from now on: what is saved is what was judged."""
        self._text = text
        # what follows the trees tells how they were fitted; one colon amiss there is a crash
        self._trees = lightgbm.Booster(model_str=text.partition(END)[0] + END)

    def evidence(self, cells: AnnData) -> Array:
        values = self._latent.expression.of(cells)
        is_here = cells.var_names.get_indexer(self._latent.genes) >= 0
        weighed = np.empty((cells.n_obs, len(self.exposures)))
        for start in range(0, cells.n_obs, BLOCK):
            block = values[start : start + BLOCK].toarray().astype(np.float64)
            # A gene the file lacks was not measured: it counts as average, not as silent.
            block[:, ~is_here] = self._latent.centre[~is_here]
            weighed[start : start + BLOCK] = self._trees.predict(
                block, raw_score=True, num_threads=self.config.n_threads
            )
        return weighed

    def embed(self, cells: AnnData) -> Array:
        return self._latent.with_residual(cells)

    def n_parameters(self) -> int:
        """How many numbers were fitted: leaves, and the gene and threshold of every split."""
        told = [line for line in self._text.splitlines() if line.startswith("num_leaves=")]
        leaves = [int(line.partition("=")[2]) for line in told]
        return super().n_parameters() + sum(3 * n_leaves - 2 for n_leaves in leaves)

    def _state(self) -> State:
        return State(
            {"latent_genes": self._latent.genes, "trees": self._text}, self._latent.arrays()
        )

    def _restore(self, state: State) -> None:
        self._latent = Latent.of(list(state.values["latent_genes"]), state.arrays)
        text = state.values["trees"]
        try:
            _check_text(text, n_genes=len(self._latent.genes), n_exposures=len(self.exposures))
            self._take(text)
        except (LookupError, ValueError, lightgbm.basic.LightGBMError) as error:
            raise Refusal(
                "boosted trees are whole, and ask only for genes there are",
                f"{error}"[:200],
                "train it again",
            ) from None


def _reporter(watch: Watch) -> Callable[[CallbackEnv], None]:
    """Return a LightGBM callback that tells the watcher; what the watcher raises goes through."""

    def tell(stage: CallbackEnv) -> None:
        if stage.iteration % TOLD_EVERY == 0:
            heard = stage.evaluation_result_list
            watch(stage.iteration, {"validation_log_loss": heard[0][2]} if heard else {})

    return tell


# -- the text, before LightGBM reads it ----------------------------------------------------------
def _check_text(text: str, *, n_genes: int, n_exposures: int) -> None:
    """Raise ValueError unless every size, count and index of a saved text agrees with the others.

    LightGBM takes them as they are: a wrong one kills the process, or lets it walk in a circle.
    """
    head, _, body = text.partition("\n\n")
    said = _fields(head.removeprefix("tree\n"), HEAD)
    wanted = {
        "num_class": f"{n_exposures}",
        "num_tree_per_iteration": f"{n_exposures}",
        "max_feature_idx": f"{n_genes - 1}",
        "objective": f"multiclass num_class:{n_exposures}",
    }
    for name, value in wanted.items():
        if said[name] != value:
            raise ValueError(f"{name} {said[name][:30]} instead of {value}")
    if {len(said[name].split(" ")) for name in ("feature_names", "feature_infos")} != {n_genes}:
        raise ValueError(f"names for other than {n_genes} genes")
    sizes, place = _numbers(said["tree_sizes"], WHOLE), 0
    if len(sizes) % n_exposures:
        raise ValueError(f"{len(sizes)} trees for {n_exposures} exposures")
    for number, size in enumerate(map(int, sizes)):
        _check_tree(body[place : place + size], number, n_genes)
        place += size
    if not (text.isascii() and body.startswith(END, place)):
        raise ValueError("trees of other sizes than it says")


def _check_tree(text: str, number: int, n_genes: int) -> None:
    """Raise ValueError unless every node and leaf has one parent and asks for a gene there is."""
    if not text.endswith("\n\n\n"):
        raise ValueError(f"tree {number} cut short")
    said = _fields(text.removesuffix("\n\n\n"), TREE)
    n_leaves = int(said["num_leaves"])
    whole = {name: [int(each) for each in _numbers(said[name], WHOLE)] for name in WHOLE_NUMBERS}
    lengths = {name: len(_numbers(said[name], NUMBER)) for name in (*NODES, *LEAVES)}
    is_sound = (
        (said["Tree"], said["num_cat"], said["is_linear"]) == (f"{number}", "0", "0")
        and all(lengths[name] == n_leaves - 1 for name in NODES)
        and lengths["leaf_value"] == n_leaves  # one leaf alone has no weight
        and all(lengths[name] in (n_leaves, n_leaves - (n_leaves == 1)) for name in LEAVES)
        and all(0 <= gene < n_genes for gene in whole["split_feature"])
        and all(kind in THRESHOLDS for kind in whole["decision_type"])
        and NUMBER.fullmatch(said["shrinkage"])
    )
    # leaves are -1, -2, ...; the root, 0, is nobody's child: so no walk comes back to where it was
    children = sorted(whole["left_child"] + whole["right_child"])
    everyone = [*range(-n_leaves, 0), *range(1, n_leaves - 1)] if n_leaves > 1 else []
    if not is_sound or children != everyone:
        raise ValueError(f"tree {number}, whose nodes do not fit together")


def _fields(text: str, names: list[str]) -> dict[str, str]:
    """Return the lines `name=value` of a text, which must be these, in this order."""
    lines = [line.partition("=") for line in text.split("\n")]
    if [name for name, _, _ in lines] != names:
        raise ValueError(f"other lines than {names[0]}, {names[1]}, ...")
    return {name: value for name, _, value in lines}


def _numbers(text: str, kind: re.Pattern[str]) -> list[str]:
    words = text.split(" ") if text else []
    if not all(map(kind.fullmatch, words)):
        raise ValueError(f"{text[:30]!r} among numbers")
    return words
