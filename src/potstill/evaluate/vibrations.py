"""Harmonic vibrations of a molecule or slab at its own minimum; crystals have phonons instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import ase
import numpy as np
from ase.calculators.calculator import BaseCalculator

from potstill.errors import ConfigError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.tools import fixed_atoms, relax, with_calculator
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.tables import number
from potstill.report.verdicts import Verdict
from potstill.units import FS_IN_ASE_TIME, OMEGA_IN_WAVE_NUMBERS

#: Frequencies below minus this, 1/cm, mean that the structure is no minimum.
_IMAGINARY = 20.0


@dataclass(frozen=True)
class Vibrations(Result):
    """Harmonic frequencies.

    Parameters
    ----------
    frequencies : ndarray
        (n_modes,) 1/cm in increasing order, imaginary ones negative; translations, and the
        rotations of a molecule, are left out. Of a crystal those at the center of the Brillouin
        zone of the given cell.
    displacement : float
        Of the finite differences, Å.
    """

    frequencies: np.ndarray
    displacement: float

    @property
    def n_imaginary(self) -> int:
        """Modes along which the relaxed structure is no minimum."""
        return int((self.frequencies < -_IMAGINARY).sum())


def vibrations(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    *,
    displacement: float = 0.01,
    fmax: float = 1e-3,
    max_steps: int = 500,
) -> Vibrations:
    """Relax the atoms in their cell, and take the Hessian by central differences of forces.

    Parameters
    ----------
    atoms, calculator : ase.Atoms, BaseCalculator
        Fixed atoms stay where they are and do not vibrate; forces are asked for six times per free
        atom.
    displacement : float
        Å.
    fmax, max_steps : float, int
        Of the relaxation, eV/Å.

    Raises
    ------
    ModelError
        If the relaxation does not converge.
    """
    moving, free = with_calculator(atoms, calculator), np.flatnonzero(~fixed_atoms(atoms))
    if not len(free):
        raise ConfigError(f"all atoms of {atoms.get_chemical_formula()} are fixed")
    relax(moving, fmax=fmax, max_steps=max_steps)
    origin = moving.get_positions()
    rows = []
    for atom in free:
        for axis in range(3):
            forces = []
            for sign in (1.0, -1.0):
                positions = origin.copy()
                positions[atom, axis] += sign * displacement
                moving.set_positions(positions, apply_constraint=False)
                forces.append(moving.get_forces(apply_constraint=False)[free].ravel())
            rows.append((forces[1] - forces[0]) / (2.0 * displacement))
    moving.set_positions(origin, apply_constraint=False)
    roots = np.sqrt(np.repeat(moving.get_masses()[free], 3))
    hessian = np.array(rows) / roots[:, None] / roots
    hessian = 0.5 * (hessian + hessian.T)
    if len(free) == len(atoms):
        rigid = _rigid_motions(moving, roots)
        # An orthonormal basis of all that is not rigid: the zeros do not mix with soft modes.
        basis = np.linalg.svd(rigid)[0][:, np.linalg.matrix_rank(rigid, tol=1e-6) :]
        hessian = basis.T @ hessian @ basis
    squares = np.linalg.eigvalsh(hessian)
    frequencies = np.sign(squares) * np.sqrt(np.abs(squares)) * OMEGA_IN_WAVE_NUMBERS
    return Vibrations(frequencies, displacement)


def fastest_period(
    atoms: ase.Atoms, calculator: BaseCalculator, *, n_iterations: int = 12, seed: int = 0
) -> float:
    """Period in fs of the fastest harmonic vibration of the free atoms, where they are.

    Power iteration on the mass-weighted Hessian, each product by a central difference of forces;
    its frequency converges from below, to some percent.
    """
    moving, free = with_calculator(atoms, calculator), ~fixed_atoms(atoms)
    origin, roots = moving.get_positions(), np.sqrt(moving.get_masses())[:, None]
    moving.set_constraint()
    mode = np.random.default_rng(seed).normal(size=origin.shape) * free[:, None]
    square = 0.0
    for _ in range(n_iterations if free.any() else 0):
        mode /= np.linalg.norm(mode)
        step = mode / roots
        scale = 0.01 / np.abs(step).max()
        forces = []
        for sign in (1.0, -1.0):
            moving.set_positions(origin + sign * scale * step)
            forces.append(moving.get_forces())
        product = (forces[1] - forces[0]) / (2.0 * scale) / roots * free[:, None]
        square = max(square, float((mode * product).sum()))
        if not np.isfinite(product).all() or not np.any(product):
            break
        mode = product
    return 2.0 * np.pi / np.sqrt(square) / FS_IN_ASE_TIME if square > 0.0 else np.inf


def _rigid_motions(atoms: ase.Atoms, roots: np.ndarray) -> np.ndarray:
    """(3N, k) mass-weighted translations, and rotations where nothing is periodic."""
    shifts = [np.tile(axis, len(atoms)) for axis in np.eye(3)]
    turns = []
    if not atoms.pbc.any():
        arms = atoms.positions - atoms.get_center_of_mass()
        turns = [np.cross(axis, arms).ravel() for axis in np.eye(3)]
    columns = np.stack([*shifts, *turns], axis=1) * roots[:, None]
    return columns / np.linalg.norm(columns, axis=0).max()


class VibrationsEvaluation(Evaluation):
    """Harmonic frequencies of what is no crystal beside the teacher's.

    Parameters
    ----------
    max_atoms : int
        Larger structures are refused: there are six force evaluations per atom.
    """

    name = "vibrations"
    title = "vibrations"
    result = Vibrations
    section = "Properties"
    needs = "structure"

    max_atoms: int = 40

    def lacks(self, bench: Bench) -> str:
        """Also a structure that is small enough, and no crystal."""
        if bench.structure is not None and bool(bench.structure.pbc.all()):
            return "a molecule, chain or slab; crystals have phonons"
        if bench.structure is not None and bench.structure.n_atoms > self.max_atoms:
            return f"a structure of at most {self.max_atoms} atoms"
        return super().lacks(bench)

    def run(self, bench: Bench, candidate: Candidate) -> Vibrations:
        """Relax the structure as it was given, and displace its atoms."""
        return vibrations(bench.atoms, candidate.calculator)

    @classmethod
    def metrics(cls, result: Vibrations) -> dict[str, float]:
        """Ends of the spectrum."""
        if not len(result.frequencies):
            return {}
        return {
            "lowest_frequency": float(result.frequencies[0]),
            "highest_frequency": float(result.frequencies[-1]),
        }

    @classmethod
    def against(cls, result: Vibrations, teacher: Vibrations) -> dict[str, float]:
        """Distance from the teacher's spectrum."""
        return {"vibrations_rmse": _deviation(result, teacher)}

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Frequencies beside the teacher's."""
        results = found.of(cls.name, Vibrations)
        theirs = results.pop(found.teacher, None)
        if theirs is None or not results:
            return
        series = [Series(m, theirs.frequencies, r.frequencies) for m, r in results.items()]
        panel = Panel("Teacher (1/cm)", "Student (1/cm)", series, diagonal=True)
        caption = "Harmonic frequencies, each at its own minimum, in order; negative: imaginary."
        yield Drawing("vibrations", "Vibrations", caption, [panel])

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Deviation from the teacher's, and modes that are imaginary for the student alone."""
        results = found.of(cls.name, Vibrations)
        ours, theirs = results.get(found.student), results.get(found.teacher)
        if ours is None or theirs is None or not len(ours.frequencies):
            return
        met = ours.n_imaginary <= theirs.n_imaginary
        text = (
            f"Vibrations up to {number(ours.frequencies[-1])} 1/cm (teacher "
            f"{number(theirs.frequencies[-1])} 1/cm), RMS deviation "
            f"{number(_deviation(ours, theirs))} 1/cm"
        )
        if not met:
            text += (
                f"; {ours.n_imaginary} imaginary modes where the teacher has {theirs.n_imaginary}: "
                "the student's relaxed structure is not a minimum"
            )
        yield Verdict(f"{text}.", "no spurious imaginary vibrations", met)


def _deviation(ours: Vibrations, theirs: Vibrations) -> float:
    if len(ours.frequencies) != len(theirs.frequencies):
        return float("nan")
    return float(np.sqrt(np.mean((ours.frequencies - theirs.frequencies) ** 2)))
