"""potstill distils accurate interatomic potentials into fast ones."""

__version__ = "0.1.0"
