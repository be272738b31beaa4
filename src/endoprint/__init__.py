"""endoprint reads the endocrine fingerprint that an exposure leaves in a cell's transcriptome."""

__version__ = "0.1.0"
