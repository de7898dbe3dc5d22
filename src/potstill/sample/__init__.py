"""Making structures to learn from: rattling, jittering, straining, dynamics, relaxations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from potstill.errors import ConfigError, suggest
from potstill.sample.base import Job, SampledFrames, as_pair, random_strain
from potstill.sample.dedup import distance_fingerprints, drop_duplicates, farthest_points
from potstill.sample.jitter import (
    AscentJob,
    JitterJob,
    discrepancy_gradient,
    random_jitter,
)
from potstill.sample.md import MDJob, run_md
from potstill.sample.minimum import MinimumJob
from potstill.sample.plan import SamplingPlan, run_plan
from potstill.sample.rattle import RattleJob, rattle
from potstill.sample.relax import RelaxJob
from potstill.sample.split import even_in_temperature, split_in_blocks
from potstill.sample.strain import StrainJob, VolumeJob, scale_volume
from potstill.sample.supercell import smallest_supercell
from potstill.structures import Structures

#: Kinds of jobs by name.
JOBS: dict[str, type[Job]] = {
    "rattle": RattleJob,
    "strain": StrainJob,
    "volume": VolumeJob,
    "minimum": MinimumJob,
    "md": MDJob,
    "relax": RelaxJob,
    "jitter": JitterJob,
    "ascent": AscentJob,
}


def make_job(settings: Mapping[str, Any]) -> Job:
    """Make a job from plain values: its `kind` and its settings.

    Raises
    ------
    ConfigError
        If the kind or a setting is unknown, or a value is out of range.
    """
    settings = dict(settings)
    kind = str(settings.pop("kind", ""))
    if kind not in JOBS:
        raise ConfigError(f"unknown kind of sampling job '{kind}'{suggest(kind, JOBS)}")
    known = JOBS[kind].__dataclass_fields__
    for name in settings:
        if name not in known:
            raise ConfigError(f"a {kind} job has no setting '{name}'{suggest(name, known)}")
    try:
        return JOBS[kind](**settings)
    except TypeError as error:
        raise ConfigError(f"a {kind} job cannot be made of {settings}: {error}") from error


def standard_plan(
    start: Structures,
    *,
    temperature: float | Sequence[float],
    n_frames: int,
    seed: int,
    pressure: Sequence[float] = (),
    n_temperatures: int = 4,
    md_share: float = 0.75,
    n_minimum: int = 0,
    **md_settings: Any,
) -> SamplingPlan:
    """Plan what most materials need: MD over a range of temperatures, rattles and strains.

    The frames are shared evenly among the starting structures. Of each structure's share, about
    three quarters are MD: runs at `n_temperatures` temperatures at constant volume, and at each
    pressure if there are any, at the same temperatures in turn. The rest is random strains, a
    volume scan (periodic structures) and rattles, in equal parts; and, on request, small
    displacements and strains of the relaxed structure (`MinimumJob`).

    Parameters
    ----------
    temperature : float or (lowest, highest)
        K.
    n_frames : int
        How many frames in all.
    pressure : sequence of float
        GPa, pressures of the constant-pressure runs; the calculator must then give stress.
    n_temperatures : int
        How many temperatures, evenly spaced.
    md_share : float
        Share of the frames that are MD, of those that are not near the minimum.
    n_minimum : int
        How many of the frames are near the minimum: for elastic constants and phonons.
    **md_settings
        Settings of all MD jobs, as of `MDJob`.
    """
    low, high = as_pair(temperature)
    temperatures = np.linspace(low, high, 1 if low == high else max(n_temperatures, 2)).tolist()
    jobs: list[Job] = []
    at_rest = even_parts(n_minimum, start.n_systems)
    for system, quota in enumerate(even_parts(n_frames - n_minimum, start.n_systems)):
        n_md = round(md_share * quota)
        pressures = [None, *pressure] if bool(start.pbc[system].all()) else [None]
        runs = [(t, p) for p in pressures for t in temperatures]
        for (t, p), n in zip(runs, even_parts(n_md, len(runs)), strict=True):
            if n:
                jobs.append(
                    MDJob(temperature=t, pressure=p, n_frames=n, system=system, **md_settings)
                )
        kinds = ["rattle", "strain", "volume"] if bool(start.pbc[system].any()) else ["rattle"]
        for kind, n in zip(kinds, even_parts(quota - n_md, len(kinds)), strict=True):
            # The volume scan keeps the perfect crystal: E(V) at rest decides on elasticity.
            extra = {"displacement": 0.05} if kind == "strain" else {}
            if n:
                jobs.append(make_job({"kind": kind, "n_frames": n, "system": system, **extra}))
        if at_rest[system]:
            jobs.append(MinimumJob(n_frames=at_rest[system], system=system))
    return SamplingPlan(start, jobs, seed)


def even_parts(total: int, n: int) -> list[int]:
    """Split `total` into `n` parts as evenly as possible, larger parts first."""
    return [total // n + (k < total % n) for k in range(n)]


__all__ = [
    "SampledFrames",
    "SamplingPlan",
    "run_plan",
    "standard_plan",
    "Job",
    "JOBS",
    "make_job",
    "MDJob",
    "RattleJob",
    "MinimumJob",
    "RelaxJob",
    "JitterJob",
    "AscentJob",
    "StrainJob",
    "VolumeJob",
    "run_md",
    "rattle",
    "random_jitter",
    "discrepancy_gradient",
    "random_strain",
    "scale_volume",
    "smallest_supercell",
    "distance_fingerprints",
    "drop_duplicates",
    "farthest_points",
    "split_in_blocks",
    "even_in_temperature",
]
