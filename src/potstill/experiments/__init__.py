"""Experiments: data, variants and seeds; one scheduler trains the runs, one report judges them."""
