"""Vacancy and surface energies of a crystal at each potential's own minimum.

Atoms relax in a fixed cell. Surfaces keep the periodicity of the ideal plane, that of the primitive
cell: they may relax, but not reconstruct.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import ase
import numpy as np
from ase.build import surface
from ase.calculators.calculator import BaseCalculator
from pydantic import Field, field_validator

from potstill.errors import ConfigError, ModelError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.eos import relaxed_crystal
from potstill.evaluate.lattice import CrystalLattice, crystal_lattice
from potstill.evaluate.tools import relax, require_periodic
from potstill.metrics import metric_of
from potstill.report.panels import Drawing, Panel, Series, plain_label
from potstill.report.tables import Cell, Row, number
from potstill.report.verdicts import Verdict
from potstill.sample.supercell import smallest_supercell
from potstill.structures import Structures
from potstill.units import JOULE_PER_SQUARE_METER

Indices = tuple[int, int, int]

#: Faces by default: of cubic crystals, and of others (of hcp basal and prismatic planes).
_CUBIC: tuple[Indices, ...] = ((1, 0, 0), (1, 1, 0), (1, 1, 1))
_OTHER: tuple[Indices, ...] = ((0, 0, 1), (1, 0, 0), (1, 1, 0))


@dataclass(frozen=True)
class DefectEnergy(Result):
    """Energy of one defect before and after its atoms relax.

    Parameters
    ----------
    unrelaxed : float
        With all atoms on sites of the perfect crystal: eV of a vacancy, J/m² of a surface.
    relaxed : float, optional
        None if the relaxation did not converge.
    n_atoms : int
        Of the cell with the defect.
    problem : str
        Why there is no relaxed energy.
    """

    unrelaxed: float
    relaxed: float | None
    n_atoms: int
    problem: str = ""


@dataclass(frozen=True)
class Defects(Result):
    """Defects of one potential's own crystal.

    Parameters
    ----------
    lattice : str
        Bravais lattice in ASE's abbreviation, "FCC".
    cell_lengths : ndarray
        (3,) Å, of the conventional cell, to which Miller indices refer.
    bulk_energy : float
        Of the perfect crystal, eV/atom.
    vacancy : DefectEnergy, optional
        E(N - 1) - (N - 1)/N E(N), eV; only for crystals of one element.
    surfaces : dict of str to DefectEnergy
        By Miller indices, "111": (E - n E_bulk) / 2A, J/m².
    """

    lattice: str
    cell_lengths: np.ndarray
    bulk_energy: float
    vacancy: DefectEnergy | None
    surfaces: dict[str, DefectEnergy]

    def named(self) -> dict[str, DefectEnergy]:
        """All defects by the keys of their metrics."""
        found = {f"surface_{name}": energy for name, energy in self.surfaces.items()}
        return found if self.vacancy is None else {"vacancy_formation": self.vacancy, **found}

    def relaxed(self) -> dict[str, float]:
        """Relaxed energies by the keys of their metrics, where relaxations converged."""
        return {k: e.relaxed for k, e in self.named().items() if e.relaxed is not None}

    def deviations(self, teacher: Defects) -> dict[str, float]:
        """Relative deviations from the teacher's relaxed energies; none for another lattice."""
        theirs = teacher.relaxed() if teacher.lattice == self.lattice else {}
        ours = self.relaxed()
        return {k: ours[k] / v - 1.0 for k, v in theirs.items() if k in ours and v}


def defects(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    *,
    surfaces: Sequence[Sequence[int]] | None = None,
    min_length: float = 10.0,
    slab_thickness: float = 12.0,
    vacuum: float = 15.0,
    max_atoms: int = 300,
    fmax: float = 0.01,
    max_steps: int = 200,
) -> Defects:
    """Relax the crystal, then remove an atom of a supercell, and cut slabs.

    Parameters
    ----------
    atoms, calculator : ase.Atoms, BaseCalculator
        A crystal: primitive, conventional or a supercell. Where its atoms are on inequivalent
        sites the vacancy is that of the first one. A calculator without stresses gets its cell
        from its equation of state, which keeps the shape.
    surfaces : sequence of three integers, optional
        Miller indices of the conventional cell (`potstill.evaluate.lattice.crystal_lattice`); by
        default (100), (110), (111) of cubic crystals and (001), (100), (110) of others. Planes are
        cut where they are furthest apart. A slab consists of whole primitive cells, so that one of
        a compound is stoichiometric; if its two faces differ, the energy is their mean.
    min_length : float
        Å, the least distance between opposite faces of the vacancy's supercell.
    slab_thickness, vacuum : float
        Å, of the slab at least, and between it and its image.
    max_atoms : int
        Refuse larger cells.
    fmax, max_steps : float, int
        Of the relaxations of defects, eV/Å. One that does not converge is no error: its defect has
        no relaxed energy, and a `problem`.

    Raises
    ------
    DataError
        If the structure is not periodic.
    ConfigError
        If there are no such planes, or a cell is too large.
    ModelError
        If the perfect crystal cannot be relaxed.
    """
    require_periodic(atoms, "a vacancy or surface")
    planes = None if surfaces is None else [lowest_indices(indices) for indices in surfaces]
    lattice = crystal_lattice(relaxed_crystal(atoms, calculator))
    conventional = lattice.conventional
    (supercell,) = smallest_supercell(
        Structures.from_ase(conventional), min_length=min_length, max_atoms=max_atoms
    ).to_ase()
    supercell.calc = calculator
    bulk_energy = float(supercell.get_potential_energy()) / len(supercell)

    def energy_of(defect: ase.Atoms, per: float) -> DefectEnergy:
        defect.calc = calculator

        def energy() -> float:
            return float(defect.get_potential_energy() - len(defect) * bulk_energy) / per

        unrelaxed = energy()
        try:
            relax(defect, fmax=fmax, max_steps=max_steps)
        except ModelError as error:
            return DefectEnergy(unrelaxed, None, len(defect), str(error))
        return DefectEnergy(unrelaxed, energy(), len(defect))

    vacancy = None
    if len(set(supercell.numbers.tolist())) == 1:
        vacancy = energy_of(supercell[1:], 1.0)
    faces = {}
    for plane in planes if planes is not None else _CUBIC if lattice.cubic else _OTHER:
        slab = make_slab(lattice, plane, slab_thickness, vacuum)
        name = "".join(map(str, plane))
        if len(slab) > max_atoms:
            raise ConfigError(
                f"a slab of ({name}) planes of {slab_thickness:g} Å needs {len(slab)} atoms, more "
                f"than {max_atoms}: ask for less or raise the limit"
            )
        area = float(np.linalg.norm(np.cross(slab.cell[0], slab.cell[1])))
        faces[name] = energy_of(slab, 2.0 * area * JOULE_PER_SQUARE_METER)
    lengths = conventional.cell.lengths()
    return Defects(lattice.name, lengths, bulk_energy, vacancy, faces)


def lowest_indices(indices: Sequence[int]) -> Indices:
    """Miller indices without a common factor: (200) planes are (100) planes.

    Raises
    ------
    ConfigError
        If they are not three integers, or all zero.
    """
    whole = [int(i) for i in indices if int(i) == i]
    if len(whole) != 3 or len(indices) != 3 or not any(whole):
        text = " ".join(map(str, indices))
        raise ConfigError(f"Miller indices are three integers, not all zero; ({text}) are not")
    divisor = int(np.gcd.reduce(whole))
    h, k, l = (i // divisor for i in whole)  # noqa: E741
    return h, k, l


def make_slab(
    lattice: CrystalLattice, indices: Indices, thickness: float, vacuum: float
) -> ase.Atoms:
    """Cut a slab of whole primitive cells, its planes along x and y.

    Parameters
    ----------
    lattice : CrystalLattice
    indices : (int, int, int)
        Of the conventional cell.
    thickness : float
        Å; the slab's volume over its area is at least that.
    vacuum : float
        Å, between the outermost atoms of the slab and of its image.
    """
    indices, crystal = lattice.primitive_indices(indices), lattice.primitive.copy()
    normal = np.linalg.inv(crystal.cell.array) @ indices  # over 2 pi; its length is 1 / spacing
    spacing = 1.0 / float(np.linalg.norm(normal))
    heights = np.sort(crystal.positions @ normal % 1.0)
    gaps = np.diff(heights, append=heights[0] + 1.0)
    widest = int(np.argmax((gaps * spacing).round(2)))
    crystal.positions -= (heights[widest] + 0.5 * gaps[widest]) * normal * spacing**2
    layers = max(1, int(np.ceil(thickness / spacing - 1e-6)))
    return surface(crystal, indices, layers, vacuum=0.5 * vacuum, periodic=True)


class DefectsEvaluation(Evaluation):
    """Vacancy formation energy and surface energies beside the teacher's.

    Parameters
    ----------
    surfaces : tuple of (int, int, int), optional
        Miller indices of the conventional cell; by default (100), (110), (111) of cubic crystals
        and (001), (100), (110) of others.
    min_length : float
        Å, the least distance between opposite faces of the vacancy's supercell.
    slab_thickness, vacuum : float
        Å, of slabs at least, and between a slab and its image.
    max_atoms : int
        Larger cells are refused.
    fmax, max_steps : float, int
        Of relaxations, eV/Å.
    """

    name = "defects"
    title = "vacancy and surfaces"
    result = Defects
    section = "Properties"
    needs = "crystal"
    on_request = True

    surfaces: tuple[tuple[Annotated[int, Field(ge=-9, le=9)], ...], ...] | None = None
    min_length: float = Field(default=10.0, gt=0.0)
    slab_thickness: float = Field(default=12.0, gt=0.0)
    vacuum: float = Field(default=15.0, gt=0.0)
    max_atoms: int = Field(default=300, ge=1)
    fmax: float = Field(default=0.01, gt=0.0)
    max_steps: int = Field(default=200, ge=1)

    @field_validator("surfaces")
    @classmethod
    def _planes(cls, planes: Any) -> Any:
        try:
            return planes and tuple(dict.fromkeys(map(lowest_indices, planes)))
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def lacks(self, bench: Bench) -> str:
        """Also a crystal of one element, where no surface is asked for."""
        if lacking := super().lacks(bench):
            return lacking
        if self.surfaces == () and len(set(bench.atoms.numbers.tolist())) > 1:
            return "a crystal of one element, or surfaces"
        return ""

    def run(self, bench: Bench, candidate: Candidate) -> Defects:
        """Defects of the candidate's own crystal."""
        return defects(bench.atoms, candidate.calculator, **self.model_dump())

    @classmethod
    def metrics(cls, result: Defects) -> dict[str, float]:
        """Relaxed energies."""
        return result.relaxed()

    @classmethod
    def against(cls, result: Defects, teacher: Defects) -> dict[str, float]:
        """Largest relative deviation from the teacher's energies."""
        apart = result.deviations(teacher).values()
        return {"defects_deviation": max(map(abs, apart))} if apart else {}

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Energies, relaxed and not, and the distance from the teacher's."""
        results = found.of(cls.name, Defects)
        named = {m: r.named() for m, r in results.items()}
        for key in dict.fromkeys(key for energies in named.values() for key in energies):
            metric, at = metric_of(key), {m: e[key] for m, e in named.items() if key in e}
            relaxed: dict[str, Cell] = {
                m: "not converged" if e.relaxed is None else e.relaxed for m, e in at.items()
            }
            yield Row(metric.label, relaxed)
            unrelaxed = {m: e.unrelaxed for m, e in at.items()}
            yield Row(f"{metric.name}, unrelaxed ({metric.unit})", unrelaxed)
        if without := [m for m, r in results.items() if r.vacancy is None]:
            words = "only for crystals of one element"
            yield Row(metric_of("vacancy_formation").label, dict.fromkeys(without, words))
        yield from (row for key, row in cls.metric_rows(found) if key == "defects_deviation")

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Surface energies against the teacher's."""
        results = {m: r.relaxed() for m, r in found.of(cls.name, Defects).items()}
        theirs = results.pop(found.teacher, {})
        series = []
        for model, ours in results.items():
            keys = [key for key in theirs if key in ours and key.startswith("surface_")]
            x, y = ([energies[key] for key in keys] for energies in (theirs, ours))
            series.append(Series(model, x, y))
        panel = Panel("Teacher (J/m²)", "Student (J/m²)", series, diagonal=True)
        caption = "Energies of relaxed, unreconstructed surfaces, each of the model's own crystal."
        yield Drawing("surfaces", "Surface energies", caption, [panel])

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """What did not converge, defects that cost no energy, and the distance from the teacher."""
        results = found.of(cls.name, Defects)
        for model, result in results.items():
            for key, energy in result.named().items():
                if energy.problem:
                    what = f"{_inline(key)} of the {plain_label(model)}"
                    yield Verdict(f"There is no relaxed {what}: {energy.problem}.")
        ours, theirs = results.get(found.student), results.get(found.teacher)
        if ours is None:
            return
        own, other = ours.relaxed(), theirs.relaxed() if theirs else {}
        if free := [key for key, value in own.items() if value <= 0.0 < other.get(key, np.inf)]:
            named = ", ".join(f"{_inline(key)} {_value(key, own[key])}" for key in free)
            yield Verdict(
                f"Defects cost the student's crystal no energy: {named}.",
                f"positive energies of defects ({named})",
                met=False,
            )
        if theirs is not None and theirs.lattice != ours.lattice:
            yield Verdict(
                f"The student's crystal relaxes to another lattice ({ours.lattice}) than the "
                f"teacher's ({theirs.lattice}): their defects are not compared."
            )
        apart = ours.deviations(theirs) if theirs else {}
        if not apart:
            return
        values = ", ".join(
            f"{_inline(key)} {_value(key, own[key])} ({number(other[key])})" for key in apart
        )
        worst = max(apart, key=lambda key: abs(apart[key]))
        text = (
            f"Relaxed defects, the teacher's in parentheses: {values}; largest deviation "
            f"{number(100.0 * abs(apart[worst]), 2)} % ({_inline(worst)})"
        )
        faces = [key for key in apart if key.startswith("surface_")]
        if len(faces) > 1:
            same = sorted(faces, key=own.__getitem__) == sorted(faces, key=other.__getitem__)
            text += f"; surfaces are {'' if same else 'not '}in the teacher's order"
        yield Verdict(f"{text}.")


def _inline(key: str) -> str:
    """Name of an energy as it stands within a sentence."""
    name = metric_of(key).name
    return name[0].lower() + name[1:]


def _value(key: str, energy: float) -> str:
    return f"{number(energy)} {metric_of(key).unit}"
