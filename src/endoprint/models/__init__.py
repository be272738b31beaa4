"""One file per model; siblings never import each other."""
