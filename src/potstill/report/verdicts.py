"""Sentences that say who is better, computed from numbers and honest about chance.

Two strategies differ when the 95 % interval of Welch's t test, which does not assume equal
spreads, excludes zero. With one run each nothing can be said about chance, and the sentence says
that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from potstill.metrics import Metric
from potstill.report.tables import Spread, number


@dataclass(frozen=True)
class Verdict:
    """A sentence about a result, and whether a bar is met.

    Parameters
    ----------
    text : str
        The sentence, with numbers and units.
    bar : str
        A few words that name the bar, "relative force RMSE below 10 %"; empty if there is none.
    met : bool
        Whether it is.
    """

    text: str
    bar: str = ""
    met: bool = True


def ordered_verdicts(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """First a line on the bars, the missed ones named; then all sentences, missed bars first."""
    bars = [v for v in verdicts if v.bar]
    missed = [v for v in bars if not v.met]
    lines = [v.text for v in (*missed, *(v for v in verdicts if v.met))]
    if missed:
        names = "; ".join(v.bar for v in missed)
        lines.insert(0, f"Bars missed ({len(missed)} of {len(bars)}): {names}.")
    elif bars:
        lines.insert(0, f"All bars met: {'; '.join(v.bar for v in bars)}.")
    return tuple(lines)


@dataclass(frozen=True)
class Comparison:
    """A metric of one strategy, `ours`, against another's, `theirs`.

    Parameters
    ----------
    metric : Metric
        What is compared.
    ours, theirs : Spread
        In the metric's stored unit.
    change : float
        (ours - theirs) / theirs.
    low, high : float
        95 % interval of `change` (Welch), NaN where a side has fewer than two runs.
    """

    metric: Metric
    ours: Spread
    theirs: Spread
    change: float
    low: float
    high: float

    @property
    def outcome(self) -> Literal["better", "worse", "equal", "unclear", "unknown"]:
        """`unclear`: not beyond chance; `unknown`: a side is missing."""
        if math.isnan(self.change):
            return "unknown"
        if self.change == 0:
            return "equal"
        if not math.isnan(self.low) and self.low <= 0.0 <= self.high:
            return "unclear"
        return "better" if (self.change < 0) == self.metric.lower_is_better else "worse"

    @property
    def tested(self) -> bool:
        """Whether repetitions allow a statement about chance."""
        return not math.isnan(self.low)


def compare(metric: Metric, ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Compare the values of two strategies over their seeds."""
    ours = [v for v in ours if math.isfinite(v)]
    theirs = [v for v in theirs if math.isfinite(v)]
    a, b = Spread.of(ours), Spread.of(theirs)
    if not ours or not theirs or b.mean == 0:
        return Comparison(metric, a, b, math.nan, math.nan, math.nan)
    low = high = math.nan
    if len(ours) > 1 and len(theirs) > 1 and a.deviation + b.deviation > 0:
        from scipy import stats  # takes half a second, and few need it

        interval = stats.ttest_ind(np.array(ours), np.array(theirs), equal_var=False)
        bounds = interval.confidence_interval(0.95)
        low, high = sorted((bounds.low / b.mean, bounds.high / b.mean))
    return Comparison(metric, a, b, (a.mean - b.mean) / b.mean, float(low), float(high))


def sentence(comparison: Comparison, ours: str, theirs: str) -> str:
    """One sentence: both values, their difference, and whether it is significant.

    `ours` and `theirs` are what the two are called, without article.
    """
    metric, c = comparison.metric, comparison
    name = metric.name[0].lower() + metric.name[1:] if metric.name[1].islower() else metric.name
    values = f"{_value(c.ours, metric)} against {_value(c.theirs, metric)}"
    start = f"{name[0].upper()}{name[1:]}: {values}"
    if c.outcome == "unknown":
        return f"{start}: no comparison, because a value is missing."
    if c.outcome == "equal":
        return f"{start}: the {ours} and the {theirs} are equal."
    if c.outcome == "unclear":
        return (
            f"{start}: no difference between the {ours} and the {theirs} beyond the spread over "
            f"seeds ({_percent(c.change)}, 95 % interval {_percent(c.low)} to {_percent(c.high)})."
        )
    verdict = f"the {ours} is {c.outcome} than the {theirs} by {abs(100 * c.change):.2g} %"
    if abs(c.change) >= 1:
        verdict = f"the {ours} is {c.outcome} than the {theirs} by {100 * abs(c.change):,.0f} %"
    if c.tested:
        return f"{start}: {verdict} (95 % interval {_percent(c.low)} to {_percent(c.high)})."
    return f"{start}: {verdict}; {_untested(comparison)}, so the role of chance is unknown."


def over_sizes(group: Sequence[tuple[str, Comparison]], ours: str, theirs: str) -> str:
    """One sentence over several sizes: where the first is ahead, and by how much.

    `group` holds the label of each size with the comparison at it, all of one metric; names are
    those of `sentence`.
    """
    if len(group) == 1:
        return sentence(group[0][1], ours, theirs)
    metric = group[0][1].metric
    ahead = [c for _, c in group if c.change != 0 and (c.change < 0) == metric.lower_is_better]
    changes = ", ".join(f"{size} {_percent(c.change)}" for size, c in group)
    start = f"{metric.name}: the mean of the {ours} is better than that of the {theirs} at "
    start = f"{start}{len(ahead)} of {len(group)} sizes (change: {changes})"
    if not any(c.tested for _, c in group):
        return f"{start}; {_untested(group[0][1])}, so the role of chance is unknown."
    better = [size for size, c in group if c.tested and c.outcome == "better"]
    worse = [size for size, c in group if c.tested and c.outcome == "worse"]
    beyond = [f"better at {', '.join(better)}"] if better else []
    beyond += [f"worse at {', '.join(worse)}"] if worse else []
    if not beyond:
        return f"{start}; none of these differences is beyond the spread over seeds."
    return f"{start}; beyond the spread over seeds it is {' and '.join(beyond)}."


def over_metrics(group: Sequence[Comparison], ours: str, theirs: str) -> str:
    """One sentence over several metrics: in which the first is better, worse, or neither."""
    outcomes: dict[str, list[str]] = {}
    for c in group:
        if c.outcome in ("unclear", "equal"):
            how = "no difference beyond the spread over seeds in"
        else:
            how = f"{c.outcome} in" if c.tested else f"{c.outcome} ({_untested(c)}) in"
        outcomes.setdefault(how, []).append(f"{c.metric.name} ({_percent(c.change)})")
    ranked = sorted(
        outcomes.items(), key=lambda item: ("better", "worse", "no").index(item[0].split()[0])
    )
    parts = [f"{how} {', '.join(metrics)}" for how, metrics in ranked]
    return f"{ours} against {theirs}: {'; '.join(parts)}."


def _untested(comparison: Comparison) -> str:
    runs = {comparison.ours.n, comparison.theirs.n}
    return "one run each" if runs == {1} else "one of them has a single run"


def _value(spread: Spread, metric: Metric) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    shown = str(spread.scaled(metric.scale))
    return f"({shown}){unit}" if "±" in shown and unit else f"{shown}{unit}"


def _percent(fraction: float) -> str:
    sign = "−" if fraction < 0 else "+"
    return f"{sign}{number(abs(100 * fraction), 2)} %"
