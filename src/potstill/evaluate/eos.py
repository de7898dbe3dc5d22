"""Equation of state: energy against volume, lattice constant and bulk modulus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import ase
import numpy as np
from ase.calculators.calculator import BaseCalculator
from numpy.polynomial import Polynomial

from potstill.errors import ConfigError, ModelError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.lattice import conventional_lengths
from potstill.evaluate.tools import relax, require_periodic, with_calculator
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.tables import number, signed
from potstill.report.verdicts import Verdict
from potstill.units import GPA

#: How often the scan may move before we conclude that there is no minimum.
_MOVES = 8


@dataclass(frozen=True)
class EquationOfState(Result):
    """E(V) of one structure under isotropic scaling, and its Birch-Murnaghan fit.

    Parameters
    ----------
    volumes, energies : ndarray
        (n_points,) Å³ and eV, both per atom, in order of volume.
    volume, energy : float
        At the minimum of the fit, per atom, Å³ and eV.
    bulk_modulus : float
        GPa.
    bulk_modulus_derivative : float
        dB/dp at zero pressure.
    cell_lengths : tuple of float
        Lengths of the given cell's vectors at the minimum, Å.
    residual : float
        Root mean square of the fit's residuals, eV per atom.
    lattice_lengths : tuple of float, optional
        Lengths of the conventional cell at the minimum, Å, also where a supercell or a primitive
        cell was given; absent in older files.
    """

    derived = ("lattice_constant",)

    volumes: np.ndarray
    energies: np.ndarray
    volume: float
    energy: float
    bulk_modulus: float
    bulk_modulus_derivative: float
    cell_lengths: tuple[float, float, float]
    residual: float
    lattice_lengths: tuple[float, float, float] | None = None

    @property
    def lattice_constant(self) -> float:
        """First length of the conventional cell (of the given one in older files), Å."""
        return (self.lattice_lengths or self.cell_lengths)[0]

    def fitted_energy(self, volumes: np.ndarray) -> np.ndarray:
        """Birch-Murnaghan energy at volumes per atom: eV per atom."""
        eta = (self.volume / np.asarray(volumes)) ** (2.0 / 3.0) - 1.0
        factor = 9.0 / 16.0 * self.volume * self.bulk_modulus * GPA
        return self.energy + factor * eta**2 * (2.0 + (self.bulk_modulus_derivative - 4.0) * eta)


def equation_of_state(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    *,
    max_strain: float = 0.03,
    n_points: int = 11,
) -> EquationOfState:
    """Scan the volume around its minimum and fit the third-order Birch-Murnaghan equation.

    The scan moves by itself if the minimum lies outside, so that the starting cell may be that of
    another potential.

    Parameters
    ----------
    atoms, calculator : ase.Atoms, BaseCalculator
        Periodic structure; its shape is kept, its volume scanned.
    max_strain : float
        Lengths are scaled by 1 - max_strain to 1 + max_strain around the middle of the scan.
    n_points : int
        Volumes, at least five.

    Raises
    ------
    ModelError
        If no minimum is found.
    """
    require_periodic(atoms, "an equation of state")
    if n_points < 5 or not 0.0 < max_strain < 0.5:
        raise ConfigError(
            "an equation of state needs n_points of at least 5 and max_strain between 0 and 0.5, "
            f"not {n_points} and {max_strain:g}"
        )
    middle = 1.0
    for _ in range(_MOVES):
        scales = middle * np.linspace(1.0 - max_strain, 1.0 + max_strain, n_points)
        energies = np.zeros(n_points)
        for k, scale in enumerate(scales):
            scaled = with_calculator(atoms, calculator)
            scaled.set_cell(atoms.cell * scale, scale_atoms=True)
            energies[k] = scaled.get_potential_energy() / len(atoms)
        volumes = atoms.get_volume() / len(atoms) * scales**3
        lowest = int(np.argmin(energies))
        fit = fit_birch_murnaghan(volumes, energies) if 0 < lowest < n_points - 1 else None
        if fit is None:
            middle = scales[lowest]
            continue
        ratio = (fit[0] * len(atoms) / atoms.get_volume()) ** (1.0 / 3.0)
        # Fit around the minimum, so that two potentials are compared over the same strains.
        if abs(ratio / middle - 1.0) > max_strain / 3.0:
            middle = ratio
            continue
        given, conventional = atoms.cell.lengths() * ratio, conventional_lengths(atoms) * ratio
        state = EquationOfState(
            volumes=volumes,
            energies=energies,
            volume=fit[0],
            energy=fit[1],
            bulk_modulus=fit[2] / GPA,
            bulk_modulus_derivative=fit[3],
            cell_lengths=tuple(given.tolist()),
            residual=0.0,
            lattice_lengths=tuple(conventional.tolist()),
        )
        residual = np.sqrt(np.mean((state.fitted_energy(volumes) - energies) ** 2))
        return replace(state, residual=float(residual))
    raise ModelError(
        f"E(V) of {atoms.get_chemical_formula()} has no minimum near the given cell: the scan "
        f"went to {middle:.2f} times its lengths"
    )


def fit_birch_murnaghan(
    volumes: np.ndarray, energies: np.ndarray
) -> tuple[float, float, float, float] | None:
    """Fit the third-order Birch-Murnaghan equation by linear least squares.

    The equation is exactly a cubic polynomial in V^(-2/3), so that there is nothing to iterate
    and no starting point to choose.

    Parameters
    ----------
    volumes, energies : ndarray
        (n,) with n of at least four, any consistent units.

    Returns
    -------
    tuple of float, or None
        Volume, energy, bulk modulus (energy/volume) and its pressure derivative at the minimum;
        None if the fit has no minimum within the volumes.
    """
    x = volumes ** (-2.0 / 3.0)
    energy_of_x = Polynomial.fit(x, energies, 3)
    slope, curvature, third = (energy_of_x.deriv(k) for k in (1, 2, 3))
    roots = slope.roots()
    inside = [
        root.real
        for root in np.atleast_1d(roots)
        if abs(root.imag) < 1e-9 * abs(root)
        and x.min() <= root.real <= x.max()
        and curvature(root.real) > 0
    ]
    if not inside:
        return None
    x0 = min(inside, key=energy_of_x)
    v0 = x0 ** (-1.5)
    # Chain rule with dE/dx = 0 and x = V^(-2/3): x' = -2/3 V^(-5/3), x'' = 10/9 V^(-8/3).
    x1, x2 = -2.0 / 3.0 * v0 ** (-5.0 / 3.0), 10.0 / 9.0 * v0 ** (-8.0 / 3.0)
    second_v = curvature(x0) * x1**2
    third_v = third(x0) * x1**3 + 3.0 * curvature(x0) * x1 * x2
    return (
        float(v0),
        float(energy_of_x(x0)),
        float(v0 * second_v),
        float(-1.0 - v0 * third_v / second_v),
    )


def relaxed_crystal(atoms: ase.Atoms, calculator: BaseCalculator) -> ase.Atoms:
    """The crystal at the potential's own minimum, as far as it gives stresses."""
    crystal = with_calculator(atoms, calculator)
    crystal.set_constraint()
    has_stress = "stress" in calculator.implemented_properties
    if not has_stress:
        lengths = equation_of_state(crystal, calculator).cell_lengths
        scale = lengths[0] / crystal.cell.lengths()[0]
        crystal.set_cell(crystal.cell * scale, scale_atoms=True)
    relax(crystal, fmax=1e-3, max_steps=500, cell=has_stress)
    return crystal


class Eos(Evaluation):
    """Equation of state."""

    name = "eos"
    title = "equation of state"
    result = EquationOfState
    section = "Properties"
    needs = "crystal"
    numbers: ClassVar = {
        "lattice_constant": "lattice_constant",
        "volume_per_atom": "volume",
        "bulk_modulus": "bulk_modulus",
        "bulk_modulus_derivative": "bulk_modulus_derivative",
    }

    def run(self, bench: Bench, candidate: Candidate) -> EquationOfState:
        """Scan the volume of the structure as it was given."""
        return equation_of_state(bench.atoms, candidate.calculator)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """E(V), and its difference from the teacher's."""
        curves = {
            m: (r.volumes, 1e3 * (r.energies - r.energy))
            for m, r in found.of(cls.name, EquationOfState).items()
        }
        series = [Series(m, v, e, joined=True) for m, (v, e) in curves.items()]
        panels = [Panel("Volume (Å³/atom)", "Energy from minimum (meV/atom)", series, "E(V)")]
        if found.teacher in curves and len(curves) > 1:
            volumes, energies = curves.pop(found.teacher)
            differences = []
            for model, (v, e) in curves.items():
                inside = (v >= volumes.min()) & (v <= volumes.max())
                change = e[inside] - np.interp(v[inside], volumes, energies)
                differences.append(Series(model, v[inside], change, joined=True))
            labels = ("Volume (Å³/atom)", "Difference (meV/atom)")
            panels.append(Panel(*labels, differences, "Minus teacher", zero_line=True))
        caption = (
            "Energy under isotropic strain, each from the minimum of its own Birch-Murnaghan fit, "
            "and the difference from the teacher's curve."
        )
        yield Drawing("eos", "Equation of state", caption, panels)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Lattice constant and bulk modulus beside the teacher's."""
        results = found.of(cls.name, EquationOfState)
        ours, theirs = results.get(found.student), results.get(found.teacher)
        if ours is None or theirs is None:
            return
        length = signed(100.0 * (ours.lattice_constant / theirs.lattice_constant - 1.0))
        modulus = signed(100.0 * (ours.bulk_modulus / theirs.bulk_modulus - 1.0))
        yield Verdict(
            f"Lattice constant {ours.lattice_constant:.3f} Å (teacher "
            f"{theirs.lattice_constant:.3f} Å, {length} %), bulk modulus "
            f"{number(ours.bulk_modulus)} GPa (teacher {number(theirs.bulk_modulus)} GPa, "
            f"{modulus} %)."
        )
