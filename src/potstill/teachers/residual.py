"""How far a teacher's forces are from the gradient of its energy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from potstill.errors import TeacherError
from potstill.structures import Structures
from potstill.teachers.base import Teacher


@dataclass(frozen=True)
class Residual:
    """|F + dE/dr| over sampled force components, eV/Å.

    Parameters
    ----------
    rms, max : float
        Root mean square and largest of the residual.
    force_rms : float
        Root mean square of the sampled forces, for comparison.
    n_components : int
        Sampled components.
    step : float
        Displacement of the finite differences, Å.
    """

    rms: float
    max: float
    force_rms: float
    n_components: int
    step: float


def nonconservative_residual(
    teacher: Teacher,
    structures: Structures,
    *,
    n_components: int = 12,
    step: float = 0.01,
    seed: int = 0,
) -> Residual:
    """Compare forces with central differences of the energy, on a random sample.

    A conservative teacher's residual is of the order of step squared and of its rounding over the
    step; direct forces show a residual that does not shrink with the step.

    Parameters
    ----------
    teacher : Teacher
        Gives energy and forces.
    structures : Structures
        Where to look; components of all atoms are sampled alike.
    n_components : int
        How many (atom, axis) pairs; each costs two energies.
    step : float
        Displacement, Å.
    seed : int
        Of the sample.

    Raises
    ------
    TeacherError
        If the teacher fails on one of the frames.
    """
    forces = _answer(teacher, structures, "forces")
    generator = torch.Generator().manual_seed(seed)
    n_components = min(n_components, forces.numel())
    if n_components == 0:
        raise TeacherError("there are no atoms to compare forces of")
    sample = torch.randperm(forces.numel(), generator=generator)[:n_components]
    differences = []
    for component in sample.tolist():
        atom, axis = divmod(component, 3)
        system = int(structures.system_index[atom])
        one = structures[system]
        row = atom - int(structures.atom_offsets[system])
        energies = []
        for sign in (1.0, -1.0):
            positions = one.positions.clone()
            positions[row, axis] += sign * step
            energies.append(_answer(teacher, replace(one, positions=positions), "energy")[0])
        differences.append((energies[0] - energies[1]) / (2.0 * step))
    picked = forces.flatten()[sample]
    residual = picked + torch.stack(differences)
    return Residual(
        rms=float(residual.square().mean().sqrt()),
        max=float(residual.abs().max()),
        force_rms=float(picked.square().mean().sqrt()),
        n_components=n_components,
        step=step,
    )


def _answer(teacher: Teacher, structures: Structures, name: str) -> torch.Tensor:
    labels, failures = teacher.label(structures, [name])
    if failures:
        where = structures.name_of(failures[0].system)
        raise TeacherError(f"the teacher '{teacher.name}' failed on {where}: {failures[0].reason}")
    return labels[name]
