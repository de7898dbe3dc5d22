"""Membership of the Pareto front: what no other point beats in everything."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from potstill.errors import DataError


def pareto_front(costs: ArrayLike) -> np.ndarray:
    """Which points no other point dominates, where less is better in every column.

    Costs are (n, k). A point dominates another if it is nowhere worse and somewhere better; equal
    points do not dominate each other, and one with a NaN is never on the front.

    Returns
    -------
    ndarray
        (n,) bool.

    Raises
    ------
    DataError
        If `costs` is not two-dimensional.
    """
    costs = np.asarray(costs, dtype=float)
    if costs.ndim != 2:
        raise DataError(f"Pareto costs must have shape (points, criteria), not {costs.shape}")
    valid = ~np.isnan(costs).any(axis=1)
    no_worse = (costs[:, None, :] <= costs[None, :, :]).all(axis=2)
    better = (costs[:, None, :] < costs[None, :, :]).any(axis=2)
    dominated = (no_worse & better & valid[:, None]).any(axis=0)
    return valid & ~dominated
