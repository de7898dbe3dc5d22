"""Elastic constants by finite strains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import ase
import numpy as np
from ase.calculators.calculator import BaseCalculator

from potstill.errors import ConfigError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.tools import relax, require_periodic, with_calculator
from potstill.report.tables import Row, number
from potstill.report.verdicts import Verdict
from potstill.units import GPA

# Voigt's order, as ASE has it: xx, yy, zz, yz, xz, xy.
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


@dataclass(frozen=True)
class ElasticConstants(Result):
    """The elastic tensor in Voigt's notation.

    Parameters
    ----------
    tensor : ndarray
        (6, 6) GPa, symmetrized; order xx, yy, zz, yz, xz, xy, engineering shear strains.
    asymmetry : float
        Largest difference between C_ij and C_ji before, GPa (zero by construction from energies).
    pressure : float
        Of the structure strained, GPa. The tensor is that of stress against strain at this
        pressure; it is the usual elastic tensor at zero pressure.
    method : str
        "stress" or "energy".
    relaxed_ions : bool
    strain : float
    """

    derived = ("c11", "c12", "c44", "cubic_deviation", "bulk_modulus", "stable")

    tensor: np.ndarray
    asymmetry: float
    pressure: float
    method: str
    relaxed_ions: bool
    strain: float

    @property
    def c11(self) -> float:
        """Mean of C11, C22, C33, GPa."""
        return float(np.diag(self.tensor)[:3].mean())

    @property
    def c12(self) -> float:
        """Mean of C12, C13, C23, GPa."""
        return float(self.tensor[[0, 0, 1], [1, 2, 2]].mean())

    @property
    def c44(self) -> float:
        """Mean of C44, C55, C66, GPa."""
        return float(np.diag(self.tensor)[3:].mean())

    @property
    def cubic_deviation(self) -> float:
        """Largest difference from the tensor of a cubic crystal along the axes, GPa."""
        cubic = np.zeros((6, 6))
        cubic[:3, :3] = self.c12
        np.fill_diagonal(cubic, [self.c11] * 3 + [self.c44] * 3)
        return float(np.abs(self.tensor - cubic).max())

    @property
    def bulk_modulus(self) -> float:
        """Voigt's average, GPa; exact for cubic crystals."""
        return float(self.tensor[:3, :3].mean())

    @property
    def stable(self) -> bool:
        """Whether every small strain costs energy (Born's criterion)."""
        return not self.instabilities()

    def instabilities(self) -> tuple[str, ...]:
        """Born's criteria that are violated, in words; empty if the crystal is stable.

        The cubic criteria are named; for other crystals the tensor's lowest eigenvalue is.
        """
        cubic = {
            "C11 − C12": self.c11 - self.c12,
            "C11 + 2 C12": self.c11 + 2.0 * self.c12,
            "C44": self.c44,
        }
        broken = [f"{name} = {number(v)} GPa" for name, v in cubic.items() if v <= 0.0]
        lowest = float(np.linalg.eigvalsh(self.tensor).min())
        if not broken and lowest <= 0.0:
            broken = [f"lowest eigenvalue of the elastic tensor = {number(lowest)} GPa"]
        return tuple(broken)


def elastic_constants(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    *,
    strain: float | None = None,
    method: Literal["auto", "stress", "energy"] = "auto",
    relax_cell: bool = False,
    relax_ions: bool = True,
    fmax: float = 1e-3,
    max_steps: int = 500,
) -> ElasticConstants:
    """Elastic tensor from central differences of the stress, or of the energy.

    Parameters
    ----------
    atoms, calculator : ase.Atoms, BaseCalculator
        Periodic structure, best at its own equilibrium for this calculator.
    strain : float, optional
        Size of the strains: 0.003 for stresses and 0.01 for energies by default. Float32 models
        may want larger ones.
    method : {"auto", "stress", "energy"}
        "stress" takes 12 strained cells, "energy" 72; "auto" uses stresses where implemented.
    relax_cell : bool
        Relax cell and atoms first (needs stresses).
    relax_ions : bool
        Relax the atoms in every strained cell: the measurable constants. Without it, the
        clamped-ion constants. Where symmetry fixes every atom there is no difference.
    fmax, max_steps : float, int
        For the relaxations, eV/Å.

    Raises
    ------
    ModelError
        If a relaxation does not converge.
    """
    require_periodic(atoms, "the elastic tensor")
    has_stress = "stress" in calculator.implemented_properties
    if method not in ("auto", "stress", "energy"):
        raise ConfigError(f"method must be 'auto', 'stress' or 'energy', not '{method}'")
    if not has_stress and (method == "stress" or relax_cell):
        raise ConfigError(
            f"{type(calculator).__name__} gives no stress: use method='energy' and relax the cell "
            "by its equation of state"
        )
    if method == "auto":
        method = "stress" if has_stress else "energy"
    size = strain if strain is not None else (0.003 if method == "stress" else 0.01)
    start = with_calculator(atoms, calculator)
    if relax_cell or relax_ions:
        relax(start, fmax=fmax, max_steps=max_steps, cell=relax_cell)

    def strained(voigt: np.ndarray) -> ase.Atoms:
        deformed = deform(start, voigt)
        deformed.calc = calculator
        if relax_ions:
            relax(deformed, fmax=fmax, max_steps=max_steps)
        return deformed

    unit = size * np.eye(6)
    if method == "stress":
        plus = np.array([strained(e).get_stress() for e in unit])
        minus = np.array([strained(-e).get_stress() for e in unit])
        tensor = (plus - minus) / (2.0 * size) / GPA
    else:
        tensor = _from_energies(start, strained, unit) / GPA
    pressure = -start.get_stress()[:3].mean() / GPA if has_stress else _pressure(start)
    return ElasticConstants(
        tensor=0.5 * (tensor + tensor.T),
        asymmetry=float(np.abs(tensor - tensor.T).max()),
        pressure=float(pressure),
        method=method,
        relaxed_ions=relax_ions,
        strain=float(size),
    )


def deform(atoms: ase.Atoms, voigt: np.ndarray) -> ase.Atoms:
    """Return a copy, without calculator, under a homogeneous strain.

    `voigt` (6,) are the strains xx, yy, zz and the engineering shear strains yz, xz, xy.
    """
    matrix = np.zeros((3, 3))
    for value, (a, b) in zip(voigt, _VOIGT, strict=True):
        matrix[a, b] += 0.5 * value
        matrix[b, a] += 0.5 * value
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ (np.eye(3) + matrix), scale_atoms=True)
    return copy


def _from_energies(
    start: ase.Atoms, strained: Callable[[np.ndarray], ase.Atoms], unit: np.ndarray
) -> np.ndarray:
    """(6, 6) second derivatives of the energy by the strains over the volume, eV/Å³."""

    def energy(voigt: np.ndarray) -> float:
        return float(strained(voigt).get_potential_energy())

    middle = float(start.get_potential_energy())
    size = unit[0, 0]
    second = np.zeros((6, 6))
    for i in range(6):
        second[i, i] = energy(unit[i]) + energy(-unit[i]) - 2.0 * middle
        for j in range(i):
            same = energy(unit[i] + unit[j]) + energy(-unit[i] - unit[j])
            opposite = energy(unit[i] - unit[j]) + energy(unit[j] - unit[i])
            second[i, j] = second[j, i] = 0.25 * (same - opposite)
    return second / size**2 / start.get_volume()


def _pressure(atoms: ase.Atoms) -> float:
    """Pressure in GPa from the energies of two volumes."""
    energies, step = [], 1e-4
    for strain in (step, -step):
        scaled = deform(atoms, strain * np.repeat([1.0, 0.0], 3))
        scaled.calc = atoms.calc
        energies.append(scaled.get_potential_energy())
    return -(energies[0] - energies[1]) / (6.0 * step * atoms.get_volume()) / GPA


#: Elastic constants are close when none is off by more than this part of the largest.
AIM_ELASTIC = 0.2


class Elastic(Evaluation):
    """Elastic constants."""

    name = "elastic"
    title = "elastic constants"
    result = ElasticConstants
    section = "Properties"
    needs = "crystal"
    numbers: ClassVar = {
        **{name: name for name in ("c11", "c12", "c44")},
        "elastic_bulk_modulus": "bulk_modulus",
    }

    def run(self, bench: Bench, candidate: Candidate) -> ElasticConstants:
        """Relax cell and atoms, then strain them."""
        return elastic_constants(bench.atoms, candidate.calculator, relax_cell=True)

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Constants, the strain that they were taken at, and stability."""
        yield from super().rows(found)
        results = found.of(cls.name, ElasticConstants)
        if results:
            strains = {m: f"{r.strain:g}" for m, r in results.items()}
            yield Row("Strain of elastic constants", strains)
            stable = {m: "yes" if r.stable else "no" for m, r in results.items()}
            yield Row("Mechanically stable (Born)", stable)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Stability, and the distance from the teacher's constants."""
        results = found.of(cls.name, ElasticConstants)
        ours, theirs = results.get("student"), results.get("teacher")
        broken = () if ours is None else ours.instabilities()
        if ours is not None and broken and (theirs is None or theirs.stable):
            yield Verdict(
                f"The student's crystal is mechanically unstable by Born's criteria: "
                f"{', '.join(broken)} (strain {ours.strain:g}).",
                f"mechanical stability ({', '.join(broken)})",
                met=False,
            )
        if ours is None or theirs is None:
            return
        pairs = {
            name: (getattr(ours, name), getattr(theirs, name)) for name in ("c11", "c12", "c44")
        }
        values = ", ".join(
            f"{k.upper()} {number(a)} ({number(b)}) GPa" for k, (a, b) in pairs.items()
        )
        errors = {name: abs(a - b) for name, (a, b) in pairs.items()}
        worst = max(errors, key=errors.__getitem__)
        met = errors[worst] <= AIM_ELASTIC * max(abs(b) for _, b in pairs.values())
        where = "close to" if met else "far from"
        yield Verdict(
            f"Elastic constants from strains of {ours.strain:g}, the teacher's in parentheses: "
            f"{values}; {where} the teacher's.",
            f"elastic constants ({worst.upper()} {number(pairs[worst][0])} GPa, teacher "
            f"{number(pairs[worst][1])} GPa)",
            met,
        )
