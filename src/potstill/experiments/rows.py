"""One row per run: what all tables and figures of a study are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from potstill.evaluate.errors import S2EFErrors
from potstill.evaluate.learning import LearningCurves
from potstill.evaluate.rdf import RadialDistribution
from potstill.experiments.spec import Run, Variant


@dataclass(frozen=True)
class RunRow:
    """One trained model in tables and figures.

    Parameters
    ----------
    run : Run
        Variant and seed; a teacher from elsewhere has the seed -1.
    n_parameters : int
        Trainable numbers.
    metrics : mapping
        By the keys of `potstill.metrics.METRICS`: on the first test set, and what was measured.
    tests : S2EFErrors, optional
        By test set and averaged.
    taps : (str, str), optional
        Tap of the student that learned from one of the teacher's.
    curve : LearningCurves, optional
        Of the training.
    rdf : RadialDistribution, optional
        Of the liquid.
    """

    run: Run
    n_parameters: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    tests: S2EFErrors | None = None
    taps: tuple[str, str] | None = None
    curve: LearningCurves | None = None
    rdf: RadialDistribution | None = None

    @property
    def variant(self) -> Variant:
        """How it was trained."""
        return self.run.variant

    @property
    def strategy(self) -> str:
        """What tables call that."""
        return self.variant.strategy

    @property
    def group(self) -> str:
        """Size or pair of models."""
        return self.variant.group

    def value(self, key: str) -> float:
        """One metric; NaN where it was not measured."""
        number = self.metrics.get(key)
        return math.nan if number is None else float(number)
