"""The table of models: one row each, plain words, so that reading it imports no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One model of the field: where its class is, and what to know before using it."""

    cls: str  # import string, module:Class
    line: str
    cost: str  # seconds | minutes | hours, for some thousand cells on two cores
    licence: str
    citation: str
    needs: str = "nothing beyond endoprint"
    overrides: tuple[tuple[str, Any], ...] = ()  # defaults that are this row's, not the Config's


TABLE: dict[str, Row] = {
    "logistic": Row(
        "endoprint.models.logistic:Logistic",
        "multinomial logistic regression on every gene, by groups of like cells: the bar",
        "seconds",
        "BSD-3-Clause (scikit-learn)",
        "Cox 1958",
    ),
    "signature": Row(
        "endoprint.models.signature:Signature",
        "known target genes per pathway, scored: what a biologist would try first",
        "seconds",
        "Apache-2.0",
        "NOHA, bioRxiv 10.1101/2025.08.14.669814",
    ),
    "boosting": Row(
        "endoprint.models.boosting:Boosting",
        "gradient-boosted trees on log-normalised variable genes: thresholds and interactions",
        "seconds",
        "MIT (LightGBM)",
        "Friedman 2001; LightGBM: Ke 2017, NeurIPS 30",
    ),
    "neighbours": Row(
        "endoprint.models.neighbours:Neighbours",
        "vote of the most similar training cells, along the axes that tell exposures apart",
        "seconds",
        "Apache-2.0",
        "Cover & Hart 1967; metric of Hastie & Tibshirani 1996, IEEE PAMI 18:607",
    ),
    "geneformer": Row(
        "endoprint.models.geneformer:Geneformer",
        "transformer over genes ranked by expression, fine-tuned on exposure",
        "minutes",
        "Apache-2.0",
        "Theodoris 2023, Nature 618:616",
        "a backbone (published checkpoint or own pre-training), else it starts from scratch",
    ),
    "scgpt": Row(
        "endoprint.models.scgpt:Scgpt",
        "transformer over genes and the bins of their expression, fine-tuned on exposure",
        "minutes",
        "MIT",
        "Cui 2024, Nature Methods 21:1470",
        "a checkpoint folder (args.json, vocab.json, weights), else it starts from scratch",
    ),
    "probe": Row(
        "endoprint.models.geneformer:Geneformer",
        "logistic regression on an encoder's vectors: what it knew before any fine-tuning",
        "seconds",
        "Apache-2.0",
        "Alain & Bengio 2016, arXiv 1610.01644",
        "a backbone that was pre-trained, else its vectors are random",
        overrides=(("head_only", True), ("has_votes", False)),
    ),
    "transport": Row(
        "endoprint.models.transport:Transport",
        "entropic optimal transport with frozen potentials: a kernel density on the latent",
        "seconds",
        "MIT (POT)",
        "Cuturi 2013, arXiv 1306.0895",
    ),
    "diffusion": Row(
        "endoprint.models.diffusion:Diffusion",
        "denoising diffusion on the latent: the exposure under which noise is best removed",
        "minutes",
        "Apache-2.0",
        "Li 2023, arXiv 2303.16203",
    ),
    "bridge": Row(
        "endoprint.models.bridge:Bridge",
        "diffusion Schrodinger bridge on the latent: carries control cells to every exposure",
        "minutes",
        "Apache-2.0",
        "Shi 2023, arXiv 2303.16852",
        "control cells among the exposures",
    ),
}
