"""Elastic constants by finite strains, at several of them: a rough potential gives itself away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal, Self

import ase
import numpy as np
from ase.calculators.calculator import BaseCalculator
from pydantic import Field

from potstill.errors import ConfigError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.tools import relax, require_periodic, with_calculator
from potstill.report.panels import plain_label
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
    def cubic(self) -> bool:
        """Whether the tensor is that of a cubic crystal along the axes, to five percent."""
        return self.cubic_deviation <= 0.05 * float(np.abs(self.tensor).max())

    def named(self, *, cubic: bool | None = None, every: bool = False) -> dict[str, float]:
        """Constants by name, GPa: C11, C12 and C44 of a cubic crystal, else elements of the tensor.

        `cubic` says what the crystal is where another tensor decides; without `every` elements
        below a tenth of the largest are left out.
        """
        if self.cubic if cubic is None else cubic:
            return {"C11": self.c11, "C12": self.c12, "C44": self.c44}
        least = 0.0 if every else _FLOOR * float(np.abs(self.tensor).max())
        upper = zip(*np.triu_indices(6), strict=True)
        named = {f"C{i + 1}{j + 1}": float(self.tensor[i, j]) for i, j in upper}
        return {name: value for name, value in named.items() if abs(value) >= least}

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


#: Models are compared at the strain closest to this one.
COMPARED_STRAIN = 0.02
#: Largest relative deviation of a constant from the teacher's that meets the bar.
AIM_ELASTIC = 0.12
#: Constants that change by more than this part between two strains up to `SMALL_STRAIN` tell of a
#: rough potential; beyond that strain, smooth ones may change as well.
ROUGH, SMALL_STRAIN = 0.03, 0.01
#: Constants below this part of the largest are judged against that part: zeros stay zeros.
_FLOOR = 0.1


@dataclass(frozen=True)
class Difference:
    """The constant that differs most between two tensors.

    Parameters
    ----------
    name : str
        `C12`.
    relative : float
        Its absolute difference over its value in the second tensor, or over a tenth of the largest
        constant there if that is more.
    values, strains : (float, float)
        In the first and the second tensor, GPa, and the strains of these.
    """

    name: str
    relative: float
    values: tuple[float, float]
    strains: tuple[float, float]


def largest_difference(ours: ElasticConstants, theirs: ElasticConstants) -> Difference:
    """Which constant differs most: of three if the second crystal is cubic, else of 21."""
    a, b = (r.named(cubic=theirs.cubic, every=True) for r in (ours, theirs))
    least = _FLOOR * max(abs(value) for value in b.values())
    apart = {name: abs(a[name] - b[name]) / max(abs(b[name]), least) for name in b}
    worst = max(apart, key=apart.__getitem__)
    return Difference(worst, apart[worst], (a[worst], b[worst]), (ours.strain, theirs.strain))


@dataclass(frozen=True)
class ElasticScan(Result):
    """Elastic constants of one potential at several strains.

    Parameters
    ----------
    constants : tuple of ElasticConstants
        In the order of their strains.
    """

    constants: tuple[ElasticConstants, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read also a file from before there were several strains: its only tensor."""
        return super().from_json({"constants": [data]} if "tensor" in data else data)

    @property
    def compared(self) -> ElasticConstants:
        """At the strain that models are compared at."""
        return min(self.constants, key=lambda r: abs(r.strain - COMPARED_STRAIN))

    @property
    def stable(self) -> bool:
        """Whether Born's criteria hold at every strain."""
        return all(r.stable for r in self.constants)

    def at(self, strain: float) -> ElasticConstants | None:
        """Constants at this strain, if it is among those of the scan."""
        return next((r for r in self.constants if np.isclose(r.strain, strain)), None)

    def instabilities(self) -> tuple[str, ...]:
        """Born's criteria that are violated at the smallest strain where any is, in words."""
        for r in self.constants:
            if broken := r.instabilities():
                return (*broken[:-1], f"{broken[-1]} at strain {r.strain:g}")
        return ()

    def largest_change(self) -> Difference | None:
        """The largest change of a constant between two strains; None with a single strain.

        Strains up to `SMALL_STRAIN`, if there are two of them, else all.
        """
        small = [r for r in self.constants if r.strain <= SMALL_STRAIN]
        used = small if len(small) > 1 else self.constants
        pairs = [largest_difference(a, b) for a, b in combinations(used, 2)]
        return max(pairs, key=lambda d: d.relative, default=None)

    def deviation(self, teacher: ElasticScan) -> Difference | None:
        """The largest deviation from the teacher's constants at the strain of `compared`.

        None if the teacher's constants were taken at other strains.
        """
        theirs = teacher.at(self.compared.strain)
        return None if theirs is None else largest_difference(self.compared, theirs)


def elastic_scan(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    strains: Sequence[float],
    *,
    relax_cell: bool = False,
    fmax: float = 1e-3,
    max_steps: int = 500,
    **settings: Any,
) -> ElasticScan:
    """Elastic tensors at several strains; the structure is relaxed once.

    Parameters
    ----------
    atoms, calculator : ase.Atoms, BaseCalculator
        As for `elastic_constants`, whose other settings `settings` are.
    strains : sequence of float
        Central differences cancel odd orders: for a smooth potential the constants at 0.002 and
        0.01 are the same to a fraction of a percent.
    """
    require_periodic(atoms, "the elastic tensor")
    start = with_calculator(atoms, calculator)
    if relax_cell:
        _relax_cell(start, fmax, max_steps)
    settings |= {"fmax": fmax, "max_steps": max_steps}
    return ElasticScan(
        tuple(
            elastic_constants(start, calculator, strain=strain, **settings)
            for strain in sorted(set(strains))
        )
    )


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
        For the relaxations, eV/Å. Strained cells are relaxed to a tenth of the strain in eV/Å if
        that is less: what is left of their forces is then small beside what the strain makes.

    Raises
    ------
    ModelError
        If a relaxation does not converge.
    """
    require_periodic(atoms, "the elastic tensor")
    has_stress = "stress" in calculator.implemented_properties
    if method not in ("auto", "stress", "energy"):
        raise ConfigError(f"method must be 'auto', 'stress' or 'energy', not '{method}'")
    if not has_stress and method == "stress":
        raise _no_stress(calculator)
    if method == "auto":
        method = "stress" if has_stress else "energy"
    size = strain if strain is not None else (0.003 if method == "stress" else 0.01)
    start = with_calculator(atoms, calculator)
    if relax_cell:
        _relax_cell(start, fmax, max_steps)
    elif relax_ions:
        relax(start, fmax=fmax, max_steps=max_steps)

    def strained(voigt: np.ndarray) -> ase.Atoms:
        deformed = deform(start, voigt)
        deformed.calc = calculator
        if relax_ions:
            relax(deformed, fmax=min(fmax, 0.1 * size), max_steps=max_steps)
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


def _relax_cell(atoms: ase.Atoms, fmax: float, max_steps: int) -> None:
    """Relax cell and atoms in place, or say why that cannot be."""
    assert atoms.calc is not None
    if "stress" not in atoms.calc.implemented_properties:
        raise _no_stress(atoms.calc)
    relax(atoms, fmax=fmax, max_steps=max_steps, cell=True)


def _no_stress(calculator: BaseCalculator) -> ConfigError:
    return ConfigError(
        f"{type(calculator).__name__} gives no stress: use method='energy' and relax the cell by "
        "its equation of state"
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


class Elastic(Evaluation):
    """Elastic constants at several strains, compared with the teacher's at one of them.

    Parameters
    ----------
    strains : tuple of float
        Sizes of the strains. Models are compared at the one closest to 0.02: a teacher that is
        rough at the scale of small displacements has no constants of its own below.
    """

    name = "elastic"
    title = "elastic constants"
    result = ElasticScan
    section = "Properties"
    needs = "crystal"

    strains: tuple[Annotated[float, Field(gt=0.0, lt=0.2)], ...] = Field(
        default=(0.002, 0.005, 0.01, 0.02), min_length=1
    )

    def run(self, bench: Bench, candidate: Candidate) -> ElasticScan:
        """Relax cell and atoms, then strain them."""
        return elastic_scan(bench.atoms, candidate.calculator, self.strains, relax_cell=True)

    @classmethod
    def metrics(cls, result: ElasticScan) -> dict[str, float]:
        """Constants at the strain that models are compared at, and how they change with it."""
        at = result.compared
        numbers = {"c11": at.c11, "c12": at.c12, "c44": at.c44}
        numbers["elastic_bulk_modulus"] = at.bulk_modulus
        if change := result.largest_change():
            numbers["elastic_change_with_strain"] = change.relative
        return numbers

    @classmethod
    def against(cls, result: ElasticScan, teacher: ElasticScan) -> dict[str, float]:
        """Largest relative deviation from the teacher's constants at the same strain."""
        found = result.deviation(teacher)
        return {} if found is None else {"elastic_deviation": found.relative}

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Constants at every strain, the distance from the teacher's, and stability."""
        results = found.of(cls.name, ElasticScan)
        if not results:
            return
        for strain in sorted({r.strain for scan in results.values() for r in scan.constants}):
            at = {m: r for m, scan in results.items() if (r := scan.at(strain)) is not None}
            model = found.teacher if found.teacher in at else next(iter(at))
            named = {m: r.named(cubic=at[model].cubic, every=True) for m, r in at.items()}
            for name in at[model].named():
                values = {m: constants[name] for m, constants in named.items()}
                yield Row(f"{name} at strain {strain:g} (GPa)", values)
        inline = {"c11", "c12", "c44"}
        yield from (row for key, row in cls.metric_rows(found) if key not in inline)
        stable = {m: "yes" if scan.stable else "no" for m, scan in results.items()}
        yield Row("Mechanically stable (Born)", stable)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Stability, smoothness, and the distance from the teacher's constants."""
        results = found.of(cls.name, ElasticScan)
        ours, theirs = results.get(found.student), results.get(found.teacher)
        if ours is not None and not ours.stable and (theirs is None or theirs.stable):
            broken = ", ".join(ours.instabilities())
            yield Verdict(
                f"The student's crystal is mechanically unstable by Born's criteria: {broken}.",
                f"mechanical stability ({broken})",
                met=False,
            )
        for model, scan in results.items():
            yield from _roughness(model, found, scan)
        if ours is None or theirs is None or (worst := ours.deviation(theirs)) is None:
            return
        strain = worst.strains[1]
        at = theirs.at(strain)
        assert at is not None  # else there is no deviation
        a, b = ours.compared.named(cubic=at.cubic, every=True), at.named()
        values = ", ".join(f"{k} {number(a[k])} ({number(v)})" for k, v in b.items())
        met, bar = worst.relative <= AIM_ELASTIC, f"{100.0 * AIM_ELASTIC:g} %"
        yield Verdict(
            f"Elastic constants in GPa at strain {strain:g}, the teacher's in parentheses: "
            f"{values}; largest deviation {number(100.0 * worst.relative, 2)} % ({worst.name}), "
            f"{'within' if met else 'beyond'} the bar of {bar}.",
            f"elastic constants within {bar} at strain {strain:g} ({worst.name} "
            f"{number(worst.values[0])} GPa, teacher {number(worst.values[1])} GPa)",
            met,
        )


def _roughness(model: str, found: Findings, scan: ElasticScan) -> Iterable[Verdict]:
    """Warn where constants depend on the strain; the student has a bar for it."""
    change = scan.largest_change()
    if change is None:
        return
    bar = "elastic constants that do not depend on the strain" if model == found.student else ""
    (a, b), (small, large) = change.values, change.strains
    if change.relative <= ROUGH:
        if bar:
            yield Verdict(
                f"The student's elastic constants change by {number(100.0 * change.relative, 2)} % "
                f"at most between strains of {small:g} and {large:g}: it is smooth at the scale of "
                "small displacements.",
                bar,
            )
        return
    effect = (
        "a student can be compared with it at finite, stated strains only"
        if model == found.teacher
        else "its constants hold at the stated strain only, and its phonons are those of the "
        "displacement"
    )
    text = (
        f"The elastic constants of the {plain_label(model)} depend on the strain: {change.name} is "
        f"{number(a)} GPa at {small:g} and {number(b)} GPa at {large:g}. It is rough at the scale "
        f"of small displacements: {effect}."
    )
    words = f"{bar} ({change.name} {number(a)} GPa at {small:g}, {number(b)} GPa at {large:g})"
    yield Verdict(text, words if bar else "", met=not bar)
