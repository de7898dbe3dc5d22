"""The sampling run that test_sample.py kills: `python sample_runner.py FOLDER RESULT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ase.build import bulk
from ase.calculators.emt import EMT

from potstill.sample import MDJob, RattleJob, SamplingPlan, StrainJob, run_plan
from potstill.structures import Structures


def small_plan(n_frames: int = 12) -> SamplingPlan:
    """Make rattles, strains and MD at constant volume and pressure of four copper atoms."""
    start = Structures.from_ase(bulk("Cu", cubic=True))
    md = {"stride": 20.0, "timestep": 4.0, "equilibration": 50.0}
    return SamplingPlan(
        start,
        [
            RattleJob(n_frames=3),
            MDJob(temperature=(300.0, 900.0), n_frames=n_frames, max_force_correlation=0.3, **md),
            StrainJob(n_frames=3, displacement=0.05),
            MDJob(temperature=500.0, pressure=2.0, n_frames=n_frames, **md),
            MDJob(temperature=500.0, pressure=0.0, n_frames=n_frames, isotropic=False, **md),
        ],
        seed=7,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, result = map(Path, sys.argv[1:])
    run_plan(small_plan(40), EMT(), folder).save(result)
