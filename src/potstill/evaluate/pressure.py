"""Pressure of a model in dynamics: the virial of its forces, and the kinetic part.

A model that was fitted to forces on beads has their mean forces right at one volume. Its pressure
would also need how its free energy changes with the volume at fixed relative positions of the
beads, which no force on a bead tells (Das and Andersen, J. Chem. Phys. 132, 164106 (2010)): what
the virial gives is not the pressure of the liquid, and dynamics at constant pressure would have a
wrong density. For all-atom models it is the pressure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from potstill.calculators import BatchCalculator
from potstill.errors import ConfigError, ModelError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.distributions import as_periodic
from potstill.report.tables import Row
from potstill.report.verdicts import Verdict
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME, PRESSURE


@dataclass(frozen=True)
class Pressure(Result):
    """Mean pressure over frames.

    Parameters
    ----------
    pressure, error : float
        bar, and its standard error from blocks.
    kinetic, virial : float
        Its parts, bar.
    n_frames, n_blocks : int
    beads : bool
        Whether the system holds beads, whose virial is not that of the liquid.
    """

    pressure: float
    error: float
    kinetic: float
    virial: float
    n_frames: int
    n_blocks: int
    beads: bool


def pressure(
    frames: Structures, stress: torch.Tensor, temperature: float | None, *, n_blocks: int = 5
) -> Pressure:
    """Mean pressure of frames with the stress (S, 3, 3), eV/Å³, that a model gives them.

    The kinetic part is N kT/V at a temperature in K, or that of the frames' velocities without one.
    """
    volume = frames.volume.numpy()
    if temperature is not None:
        twice = 3.0 * frames.n_atoms_per_system.numpy() * BOLTZMANN * temperature
    else:
        assert frames.velocities is not None
        squares = frames.masses * frames.velocities.square().sum(dim=1)
        twice = frames.sum_by_system(squares).numpy() / FS_IN_ASE_TIME**2
    kinetic = twice / (3.0 * volume) / PRESSURE["bar"]
    virial = -torch.einsum("sii->s", stress).cpu().numpy() / 3.0 / PRESSURE["bar"]
    total = kinetic + virial
    n_blocks = min(n_blocks, len(total))
    means = [block.mean() for block in np.array_split(total, n_blocks)]
    return Pressure(
        pressure=float(total.mean()),
        error=float(np.std(means, ddof=1) / math.sqrt(n_blocks)) if n_blocks > 1 else math.nan,
        kinetic=float(kinetic.mean()),
        virial=float(virial.mean()),
        n_frames=len(total),
        n_blocks=n_blocks,
        beads=bool((frames.species_table.atomic_numbers < 0).any()),
    )


class PressureEvaluation(Evaluation):
    """Pressure of a model along its own trajectory, at the temperature of the bench.

    Parameters
    ----------
    n_frames : int
        Frames to compute, spread over the trajectory.
    n_blocks : int
        Blocks that give the error.
    """

    name = "pressure"
    title = "pressure"
    result = Pressure
    section = "Dynamics"
    needs = "frames"
    on_request = True
    numbers: ClassVar[Mapping[str, str]] = {"pressure": "pressure", "pressure_error": "error"}

    n_frames: int = Field(default=200, ge=1)
    n_blocks: int = Field(default=10, ge=1)

    def run(self, bench: Bench, candidate: Candidate) -> Pressure:
        """Compute the stress of frames of the candidate's trajectory."""
        frames = as_periodic(bench.trajectory_of(candidate))
        if not candidate.spec:
            raise ConfigError("there is no model of it, whose forces give the virial")
        places = np.unique(np.linspace(0, len(frames) - 1, self.n_frames).round().astype(int))
        frames = frames.select(places.tolist())
        temperature = bench.settings.temperature
        return pressure(frames, _stress(candidate, frames), temperature, n_blocks=self.n_blocks)

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """The pressure, and its parts."""
        yield from super().rows(found)
        labels = {"Pressure, kinetic part (bar)": "kinetic", "Pressure, virial (bar)": "virial"}
        yield from cls.attribute_rows(found.of(cls.name, Pressure), labels)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Say what the pressure of beads is not."""
        if any(result.beads for result in found.of(cls.name, Pressure).values()):
            yield Verdict(
                "The pressure of a model of beads is not that of the liquid: matching forces fixes "
                "gradients with respect to the positions of the beads, not the derivative with "
                "respect to the volume."
            )


def _stress(candidate: Candidate, frames: Structures) -> torch.Tensor:
    """(S, 3, 3) eV/Å³ of periodic frames."""
    potential = candidate.potential
    if potential is None:
        each = []
        for atoms in frames.to_ase():
            atoms.calc = candidate.calculator
            each.append(torch.from_numpy(atoms.get_stress(voigt=False)))
        return torch.stack(each)
    if potential.direct_forces:
        raise ModelError("direct forces have no virial")
    calculator = BatchCalculator(potential)
    mapped = frames.with_species_table(potential.species_table)
    each = []
    for system in range(len(mapped)):
        each.append(calculator.compute(mapped[system], stress=True)["stress"])
    return torch.cat(each)
