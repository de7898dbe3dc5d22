"""Frames that a student's own dynamics visits, for the next one to learn from its teachers.

A student is trained where the trajectory has been, and its dynamics may find low energies where it
has not. Teachers can label such frames; mapped forces exist on the trajectory alone, so that no
model without a teacher can learn from them. One round of dataset aggregation: Ross, Gordon and
Bagnell, AISTATS 2011, algorithm 3.1, with the ensemble as the expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from potstill.errors import ConfigError
from potstill.evaluate.base import Bench, BenchSettings, Candidate
from potstill.evaluate.stability import OwnDynamics
from potstill.sample.replicas import ReplicaRun
from potstill.structures import Structures

#: The spread of forces between the members of a committee.
FORCES_STD = "forces_std"


class Exploration(OwnDynamics):
    """Dynamics of students whose frames others learn from.

    Parameters
    ----------
    n_runs : int
        Runs of each student, which start from frames of the training set.
    duration, equilibration : float
        ps; rare failures need long runs.
    stride : float
        fs between frames.
    thermostat_time : float, optional
        fs, the inverse of Langevin's friction; `null` for constant energy.
    engine : {"replicas", "lammps"}
        All runs at a time in this process, or one after the other in LAMMPS, which is faster for
        one small box.
    temperature : float, optional
        K; by default that of the mapped trajectory.
    timestep : float
        fs.
    max_spread : float
        A frame is left out where the teachers differ, in the forces on any bead, by more than so
        many times what they differ by at most in the training set: they do not know it, either.
    """

    duration: float = Field(default=1000.0, gt=0)
    equilibration: float = Field(default=0.0, ge=0)
    stride: float = Field(default=20000.0, gt=0)
    temperature: float | None = Field(default=None, gt=0)
    timestep: float = Field(default=5.0, gt=0)
    max_spread: float = Field(default=1.5, gt=0)

    def explore(
        self, checkpoint: Path, start: Structures, temperature: float, seed: int, folder: Path
    ) -> ReplicaRun:
        """Run the dynamics of a model from some of the structures, or what is left of it."""
        shared = BenchSettings(temperature=temperature, timestep=self.timestep, seed=seed)
        bench = Bench(shared, frames={"reference": start}, standard="reference")
        return self.run(bench, Candidate(checkpoint.parent.name, str(checkpoint)), folder)

    def known(self, frames: Structures, spread: Tensor, trained: float) -> Tensor:
        """(S,) bool, the frames whose forces have a spread, (N, 3), as known from training.

        `trained` is the largest there, eV/Å.

        Raises
        ------
        ConfigError
            If there is none.
        """
        known = frames.longest_by_system(spread) <= self.max_spread * trained
        if not known.any():
            raise ConfigError(
                f"the teachers know none of the {len(known)} frames that the dynamics visited: "
                "raise exploration.max_spread, or let a better student explore"
            )
        return known


@dataclass(frozen=True)
class Explored:
    """Variants whose runs of the same seed explore, and how."""

    variants: tuple[str, ...]
    settings: Exploration


def summary(run: ReplicaRun, known: Tensor) -> dict[str, Any]:
    """What exploring found: frames, how many teachers know, and runs that failed, with reasons."""
    reasons = [b.reason for b in run.breakdowns if b is not None]
    return {"frames": len(known), "used": int(known.sum()), "failed": reasons}
