"""Displacements of a fixed norm: at random, or where student and teacher disagree more.

Data jittering of Ekström Kelvinius et al. (appendix D.1): noise δ is added to the positions and the
teacher labels the result. The direction of δ is random, or that of the gradient of the discrepancy
between student and teacher at δ = 0, a single step of gradient ascent; its norm is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from potstill.checkpoint import load_potential
from potstill.errors import ConfigError
from potstill.models import Potential
from potstill.sample.base import IndependentJob, Maker, as_pair, span
from potstill.structures import Structures
from potstill.teachers.ase import ask_ase_calculator

#: What the norm is of: the displacement of each atom, or of all atoms of a structure together.
NormOf = Literal["structure", "atom"]

#: Root mean square displacement of atoms in Å, for derivatives of the forces of a calculator.
_EPSILON = 0.003


def random_jitter(
    structures: Structures,
    norm: float,
    generator: np.random.Generator,
    *,
    direction: Tensor | None = None,
    norm_of: NormOf = "structure",
) -> Structures:
    """Displace the free atoms of each structure by a fixed norm in Å, in a random direction.

    Or along a `direction`, (N, 3), wherever it does not vanish: `discrepancy_gradient` makes it one
    step of gradient ascent. Random ones are uniform on the sphere. `norm_of` says whether δ is
    the displacement of all atoms of a structure together, as the paper writes it, or of each.
    """
    drawn = torch.from_numpy(generator.normal(size=tuple(structures.positions.shape)))
    towards = drawn if direction is None else direction
    return displaced(structures, towards, norm, norm_of=norm_of, spare=drawn)


def displaced(
    structures: Structures,
    direction: Tensor,
    norm: float,
    *,
    norm_of: NormOf = "structure",
    spare: Tensor | None = None,
) -> Structures:
    """Move the free atoms along a direction, (N, 3) of any length, by a fixed norm in Å.

    Where the direction vanishes, `spare` (N, 3) takes its place.
    """
    if norm < 0.0:
        raise ConfigError(f"the norm of a jitter must not be negative: {norm:g} Å")
    if spare is not None:
        direction = torch.where(_lengths(direction, structures, norm_of) > 0, direction, spare)
    direction = torch.where(structures.free[:, None], direction, 0.0)
    length = _lengths(direction, structures, norm_of)
    step = norm * direction / torch.where(length > 0, length, 1.0)
    return replace(structures, positions=structures.positions + step)


def _lengths(direction: Tensor, structures: Structures, norm_of: NormOf) -> Tensor:
    """(N, 1) norm of the displacement that each atom's is scaled with, of free atoms."""
    square = torch.where(structures.free, direction.square().sum(dim=1), 0.0)
    if norm_of == "structure":
        square = structures.sum_by_system(square)[structures.system_index]
    return square.sqrt().unsqueeze(1)


# -- where student and teacher differ ------------------------------------------------------------


def discrepancy(
    energy: Tensor, forces: Tensor, structures: Structures, weights: tuple[float, float]
) -> Tensor:
    """(S,) how far two potentials are apart, from the differences of their values.

    Half the squared difference of energies plus half the mean squared difference of the force
    components of free atoms, each with its weight.
    """
    free = structures.free.to(forces.dtype)
    n_free = structures.sum_by_system(free).clamp(min=1.0)
    square = structures.sum_by_system(free * forces.square().sum(dim=1))
    return 0.5 * (weights[0] * energy.square() + weights[1] * square / (3.0 * n_free))


def discrepancy_gradient(
    student: Potential,
    teacher: Potential | BaseCalculator,
    structures: Structures,
    *,
    energy_weight: float = 1.0,
    forces_weight: float = 100.0,
) -> Tensor:
    """Gradient of the discrepancy of each structure with respect to its positions.

    Of two potentials it is taken exactly, by automatic differentiation. A calculator gives forces
    only: their derivative along the difference of forces is then a central difference, which is
    the gradient provided that both derive their forces from an energy.

    Parameters
    ----------
    energy_weight : float
        1/eV², of half the squared difference of energies.
    forces_weight : float
        Å²/eV², of half the mean squared difference of force components. 1 and 100 are the ratio
        of the paper's losses.

    Returns
    -------
    Tensor
        (N, 3), 1/Å, float64.
    """
    weights = (energy_weight, forces_weight)
    if isinstance(teacher, Potential):
        at = replace(structures, positions=structures.positions.detach().requires_grad_(True))
        energy, forces = _difference(student, teacher, at, create_graph=True)
        total = discrepancy(energy, forces, at, weights).sum()
        if not total.requires_grad:
            return torch.zeros_like(structures.positions)
        (gradient,) = torch.autograd.grad(total, at.positions, allow_unused=True)
        return torch.zeros_like(at.positions) if gradient is None else gradient.detach()
    energy, forces = _difference(student, teacher, structures)
    gradient = -energy_weight * energy[structures.system_index, None] * forces
    free = structures.free
    along = torch.where(free.unsqueeze(1), forces, 0.0)
    # Steps of this width on average over the atoms of a structure.
    n_atoms = structures.n_atoms_per_system.clamp(min=1).sqrt()[structures.system_index, None]
    length = _lengths(along, structures, "structure") / n_atoms
    scale = torch.where(length > 0, length, 1.0)
    ends = [
        _difference(
            student,
            teacher,
            replace(structures, positions=structures.positions + sign * _EPSILON * along / scale),
        )[1]
        for sign in (1.0, -1.0)
    ]
    slope = (ends[0] - ends[1]) / (2.0 * _EPSILON) * scale
    n_free = torch.bincount(structures.system_index[free], minlength=structures.n_systems)
    per_component = forces_weight / (3.0 * n_free.clamp(min=1))
    return gradient + per_component[structures.system_index, None] * slope


def _difference(
    student: Potential,
    teacher: Potential | BaseCalculator,
    structures: Structures,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """(S,) energies and (N, 3) forces of the student minus those of the teacher."""
    names = ("energy", "forces")
    mine = student.predict(structures, properties=names, create_graph=create_graph)
    if isinstance(teacher, Potential):
        its = teacher.predict(structures, properties=names, create_graph=create_graph)
        return mine["energy"] - its["energy"], mine["forces"] - its["forces"]
    values = ask_ase_calculator(teacher, structures, names)
    return mine["energy"] - values["energy"], mine["forces"] - values["forces"]


# -- jobs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JitterJob(IndependentJob):
    """Frames displaced at random by a fixed norm.

    Parameters
    ----------
    norm : float or (low, high)
        Å; from a range, the norms are spread evenly.
    norm_of : {"structure", "atom"}
        As of `random_jitter`.
    """

    kind: ClassVar[str] = "jitter"

    norm: float | Sequence[float] = 0.1
    norm_of: NormOf = "structure"

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = as_pair(self.norm)
        if not 0.0 < low <= high:
            raise ConfigError(f"the norm of a jitter must be 0 < low <= high, not {low} and {high}")
        if self.norm_of not in ("structure", "atom"):
            raise ConfigError(
                f"the norm of a jitter is over a structure or an atom, not '{self.norm_of}'"
            )

    def default_name(self) -> str:
        """Say how far atoms are displaced."""
        return f"{self.kind} {span(self.norm)} Å"

    def maker(self, start: Structures, calculator: BaseCalculator | None) -> Maker:
        """Displace the atoms by norms that grow from frame to frame."""
        norms, direction = self.spread(self.norm), self._direction(start, calculator)

        def make(k: int, generator: np.random.Generator) -> tuple[Structures, str]:
            norm, norm_of = norms[k], self.norm_of
            moved = random_jitter(start, norm, generator, direction=direction, norm_of=norm_of)
            return moved, f", {norm:.3f} Å"

        return make

    def _direction(self, start: Structures, calculator: BaseCalculator | None) -> Tensor | None:
        """(N, 3) where to; at random if None."""
        return None


@dataclass(frozen=True, kw_only=True)
class AscentJob(JitterJob):
    """Frames displaced to where a student and the calculator, the teacher, differ more.

    There is one direction of steepest ascent: several frames differ in their norms, from a range.

    Parameters
    ----------
    student : str
        A checkpoint.
    energy_weight, forces_weight : float
        As of `discrepancy_gradient`.
    """

    kind: ClassVar[str] = "ascent"

    student: str
    energy_weight: float = 1.0
    forces_weight: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = as_pair(self.norm)
        if self.n_frames > 1 and low == high:
            raise ConfigError(
                f"'{self.name}': several steps of the same norm from one structure are identical: "
                "give a range of norms"
            )

    @property
    def n_evaluations(self) -> int:
        """Calls of the calculator: where it is, and to both sides."""
        return 3

    def _direction(self, start: Structures, calculator: BaseCalculator | None) -> Tensor | None:
        assert calculator is not None
        student, _ = load_potential(self.student)
        weights = {"energy_weight": self.energy_weight, "forces_weight": self.forces_weight}
        return discrepancy_gradient(student, calculator, start, **weights)
