"""A neural-organoid hormone atlas to try everything on, with its own likelihood.

Patterned on NOHA (bioRxiv 10.1101/2025.08.14.669814): seven pathways with agonist and antagonist
plus DMSO, two lines in three replicates, progenitors and neurons. Not in it: doublets, ambient
RNA, a cell's own programmes, responses that differ between lines or cells.
"""

from endoprint.simulate.atlas import Atlas, save, simulate
from endoprint.simulate.config import SimulateConfig
from endoprint.simulate.counts import Watch
from endoprint.simulate.law import Law, law_of
from endoprint.simulate.oracle import oracle

__all__ = ["Atlas", "Law", "SimulateConfig", "Watch", "law_of", "oracle", "save", "simulate"]
