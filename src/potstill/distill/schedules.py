"""Weights that change with the epoch."""

from __future__ import annotations

import bisect
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator


class Schedule(BaseModel):
    """A weight as a function of the epoch, counted from 1.

    Parameters
    ----------
    epochs : tuple of int
        Increasing; the first is 1.
    values : tuple of float
        The weight from each of these epochs on.
    interpolation : {"constant", "linear"}
        Piecewise constant (Table 1 of Matin et al.), or linear between the given epochs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: tuple[int, ...]
    values: tuple[float, ...]
    interpolation: Literal["constant", "linear"] = "constant"

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if len(self.epochs) != len(self.values) or not self.epochs:
            raise ValueError("a schedule needs as many values as epochs, and at least one")
        if self.epochs[0] != 1 or list(self.epochs) != sorted(set(self.epochs)):
            raise ValueError("the epochs of a schedule must increase and start at 1")
        return self

    def at(self, epoch: int) -> float:
        """Value in the given epoch (from 1)."""
        k = bisect.bisect_right(self.epochs, epoch) - 1
        if self.interpolation == "constant" or k + 1 == len(self.epochs):
            return self.values[k]
        fraction = (epoch - self.epochs[k]) / (self.epochs[k + 1] - self.epochs[k])
        return self.values[k] + fraction * (self.values[k + 1] - self.values[k])

    @property
    def end(self) -> int:
        """The epoch from which on the value is final."""
        return self.epochs[-1]

    def compressed(self, factor: float) -> Schedule:
        """The same schedule with its epochs scaled by `factor`, for a shorter training."""
        epochs = [1]
        for epoch in self.epochs[1:]:
            epochs.append(max(epochs[-1] + 1, round(epoch * factor)))
        return self.model_copy(update={"epochs": tuple(epochs)})
