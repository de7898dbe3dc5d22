"""One row per run: what all tables and figures of a study are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from potstill.evaluate.errors import S2EFErrors
from potstill.evaluate.learning import LearningCurves
from potstill.evaluate.rdf import RadialDistribution
from potstill.experiments.spec import GridPoint, Role


@dataclass(frozen=True)
class RunRow:
    """One trained model in tables and figures.

    Parameters
    ----------
    name, variant : str
        Unique name of the run; of all runs that differ in their seed alone.
    role : Role
        What it is for.
    strategy, group : str
        How it was trained, and what it is compared within: its size or its pair of models.
    n_parameters, seed : int
        Trainable numbers; -1 for the seed of a teacher from elsewhere.
    metrics : mapping
        By the keys of `potstill.metrics.METRICS`: on the first test set, and what was measured.
    tests : S2EFErrors, optional
        By test set and averaged.
    against : tuple of str
        Variants that it is judged by.
    teacher : str
        The variant, or teacher from elsewhere, that it has learned from.
    point : GridPoint, optional
        Its place in a grid.
    taps : (str, str), optional
        Tap of the student that learned from one of the teacher's.
    curve : LearningCurves, optional
        Of the training.
    rdf : RadialDistribution, optional
        Of the liquid.
    """

    name: str
    variant: str
    role: Role
    strategy: str
    group: str
    n_parameters: int
    seed: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    tests: S2EFErrors | None = None
    against: tuple[str, ...] = ()
    teacher: str = ""
    point: GridPoint | None = None
    taps: tuple[str, str] | None = None
    curve: LearningCurves | None = None
    rdf: RadialDistribution | None = None

    def value(self, key: str) -> float:
        """One metric; NaN where it was not measured."""
        number = self.metrics.get(key)
        return math.nan if number is None else float(number)
