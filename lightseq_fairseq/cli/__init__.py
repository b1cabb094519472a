"""Console scripts: each reads its arguments and makes one call."""
