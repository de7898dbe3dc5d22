"""Harmonic phonons of a crystal by finite displacements, beside the teacher's (phonopy).

Force constants are central differences of forces in a supercell, of as few displacements as the
crystal's symmetry allows, made to obey the acoustic sum rule and Newton's third law (Parlinski, Li
and Kawazoe, Phys. Rev. Lett. 78, 4063, 1997; phonopy: Togo, J. Phys. Soc. Jpn. 92, 012001, 2023).
There are no charges in them: polar crystals show no splitting of LO and TO.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ase
import numpy as np
from ase.build import make_supercell
from ase.calculators.calculator import BaseCalculator
from ase.cell import Cell
from pydantic import Field

from potstill.errors import ConfigError, OptionalDependencyError, require
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.tools import relax, require_periodic
from potstill.report.panels import Drawing, Panel, Series, plain_label
from potstill.report.tables import Row, number
from potstill.report.verdicts import Verdict
from potstill.sample.supercell import cell_heights
from potstill.structures import Structures

#: Frequencies below minus this, THz, are imaginary; less is noise of finite differences.
IMAGINARY = 0.1
#: RMSE against the teacher's frequencies that meets the bar, THz.
AIM_PHONONS = 0.3
#: Å; along a reciprocal vector b the mesh has this times |b| / 2 pi divisions, rounded up.
_MESH_LENGTH = 20.0
#: Points along the path per 1/Å of wave vector.
_PATH_DENSITY = 20.0
#: Å, to recognize the symmetry of a relaxed crystal.
_SYMMETRY = 1e-3


@dataclass(frozen=True)
class Phonons(Result):
    """Phonon frequencies of one potential at its own minimum; imaginary ones are negative.

    Wave vectors are in units of the reciprocal primitive cell, and the same for all potentials.

    Parameters
    ----------
    mesh : (int, int, int)
        Divisions of the Brillouin zone, with its center; `mesh_points` are in their order.
    frequencies : ndarray
        (n_q, n_modes) THz on the mesh, in increasing order at each wave vector.
    path : ndarray
        (n_path, 3) wave vectors along the standard path of the Bravais lattice.
    distance : ndarray
        (n_path,) length of the path up to there, 1/Å.
    bands : ndarray
        (n_path, n_modes) THz.
    corners : tuple of (int, str)
        Index in the path and name of its special points.
    n_atoms : int
        Of the supercell.
    length : float
        Least distance between opposite faces of the supercell, Å.
    displacement : float
        Å.
    small : float, optional
        Å, another displacement.
    change : float, optional
        THz RMSE on the mesh between the frequencies from both displacements: harmonic crystals, and
        smooth potentials nearly, have none.
    """

    mesh: tuple[int, int, int]
    frequencies: np.ndarray
    path: np.ndarray
    distance: np.ndarray
    bands: np.ndarray
    corners: tuple[tuple[int, str], ...]
    n_atoms: int
    length: float
    displacement: float
    small: float | None = None
    change: float | None = None

    def comparable(self, other: Phonons) -> bool:
        """Whether both have the same wave vectors, modes and displacement."""
        mine, theirs = ((p.frequencies.shape, p.bands.shape, p.displacement) for p in (self, other))
        return self.mesh == other.mesh and mine == theirs

    def imaginary(self, but: Phonons | None = None, most: int = 4) -> list[Mode]:
        """Name imaginary modes: those at special points, and the lowest of mesh and path.

        `but` are phonons whose own imaginary modes, at the same wave vector and place in the
        order of frequencies, are left out. The lowest comes first; at most `most` are named.
        """
        names = dict(self.corners)
        found: list[Mode] = []
        for points, own, others, named in (
            (self.path, self.bands, but.bands if but else None, names),
            (mesh_points(self.mesh), self.frequencies, but.frequencies if but else None, {}),
        ):
            spurious = own < -IMAGINARY
            if others is not None:
                spurious &= others >= -IMAGINARY
            lowest = np.where(spurious, own, 0.0).min(axis=1)
            for k in dict.fromkeys([*named, int(lowest.argmin())]):
                if lowest[k] < 0.0:
                    q = tuple(points[k].round(4).tolist())
                    found.append(Mode(float(lowest[k]), q, named.get(k, "")))
        # The same frequency again is the same mode at an equivalent wave vector.
        found.sort(key=lambda mode: (round(mode.frequency, 2), not mode.name))
        unique: dict[float, Mode] = {}
        for mode in found:
            unique.setdefault(round(mode.frequency, 2), mode)
        return list(unique.values())[:most]


@dataclass(frozen=True)
class Mode:
    """An imaginary mode: frequency in THz, wave vector, and the name of that if it has one."""

    frequency: float
    q: tuple[float, float, float]
    name: str = ""

    def __str__(self) -> str:
        place = f"({', '.join(f'{c:g}' for c in self.q)})".replace("-", "−")
        return f"{number(self.frequency)} THz at {self.name or 'q'} {place}"


def mesh_points(mesh: Sequence[int]) -> np.ndarray:
    """(n, 3) wave vectors of a regular mesh with its center, each component in (-1/2, 1/2]."""
    axes = [np.arange(n) / n for n in mesh]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return points - (points > 0.5)


def phonons(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    *,
    displacement: float = 0.01,
    small: float | None = None,
    min_length: float = 10.0,
    max_atoms: int = 200,
    relax_cell: bool = True,
    fmax: float = 1e-3,
    max_steps: int = 500,
) -> Phonons:
    """Relax the primitive cell, displace the atoms of a supercell, and diagonalize.

    Each potential is taken at its own minimum, as is usual where machine-learned potentials are
    compared: elsewhere forces and stresses do not vanish, and frequencies mix the harmonic terms
    with an error of the lattice constant. What would double the cell shows as imaginary. Wave
    vectors are those of the given structure in units of the reciprocal cell, so that the ones of
    two potentials correspond.

    Parameters
    ----------
    atoms, calculator : ase.Atoms, BaseCalculator
        A crystal: primitive, conventional or a supercell.
    displacement : float
        Å.
    small : float, optional
        Å, another displacement, from which the frequencies are computed again.
    min_length : float
        Å, aimed at between opposite faces of the supercell.
    max_atoms : int
        The supercell stays below it, even if it is shorter than `min_length` then.
    relax_cell : bool
        Relax the cell as well as the atoms (needs stresses).
    fmax, max_steps : float, int
        Of the relaxation, eV/Å.

    Raises
    ------
    OptionalDependencyError
        If phonopy is not installed.
    ModelError
        If the relaxation does not converge.
    """
    require_periodic(atoms, "a phonon dispersion")
    if displacement <= 0.0:
        raise ConfigError(f"a displacement must be positive, not {displacement:g} Å")
    crystal = displaced(atoms, displacement, min_length, max_atoms)  # says what is not installed
    path = Cell(crystal.primitive.cell).bandpath(density=_PATH_DENSITY, eps=1e-3)
    mesh = mesh_of(crystal.primitive)
    distance, corners = path.get_linear_kpoint_axis()[0], _corners(path)

    start = to_ase(crystal.primitive)
    start.calc = calculator
    relax(start, fmax=fmax, max_steps=max_steps, cell=relax_cell)
    moved = with_forces(crystal, start, displacement)
    frequencies, change = frequencies_at(moved, mesh_points(mesh)), None
    if small is not None:
        other = with_forces(crystal, start, small)
        apart = frequencies - frequencies_at(other, mesh_points(mesh))
        change = float(np.sqrt(np.mean(apart**2)))
    supercell = to_ase(moved.supercell)
    return Phonons(
        mesh=(mesh[0], mesh[1], mesh[2]),
        frequencies=frequencies,
        path=path.kpts,
        distance=distance,
        bands=frequencies_at(moved, path.kpts),
        corners=corners,
        n_atoms=len(supercell),
        length=float(cell_heights(Structures.from_ase(supercell)).min()),
        displacement=displacement,
        small=small,
        change=change,
    )


def with_forces(crystal: Any, primitive: ase.Atoms, displacement: float) -> Any:
    """Phonopy's object with the force constants of a relaxed primitive cell, by its calculator.

    `crystal` is that of `displaced` for the cell before it was relaxed or strained.
    """
    unit = make_supercell(primitive, np.linalg.inv(crystal.primitive_matrix).T.round())
    moved = displaced(unit, displacement, like=crystal)
    forces = []
    for cell in moved.supercells_with_displacements:
        image = to_ase(cell)
        image.calc = primitive.calc
        forces.append(image.get_forces())
    moved.forces = np.array(forces)
    moved.produce_force_constants(show_drift=False)
    moved.symmetrize_force_constants(show_drift=False)
    return moved


def frequencies_at(crystal: Any, points: np.ndarray) -> np.ndarray:
    """(n, n_modes) THz at wave vectors; imaginary ones are negative."""
    crystal.run_qpoints(points)
    return np.sort(crystal.qpoints.frequencies, axis=1).round(5)


def mesh_of(primitive: Any) -> list[int]:
    """Divisions of the Brillouin zone: 20 Å times |b| / 2 pi along a vector b, rounded up."""
    reciprocal = np.linalg.norm(np.linalg.inv(primitive.cell), axis=0)
    return np.ceil((_MESH_LENGTH * reciprocal).round(3)).astype(int).tolist()


def displaced(
    atoms: ase.Atoms,
    displacement: float,
    min_length: float = 10.0,
    max_atoms: int = 200,
    like: Any = None,
) -> Any:
    """Phonopy's object for a crystal, with the displacements that its symmetry asks for.

    `like` is that of the crystal before it was relaxed, whose primitive cell and supercell are
    taken.
    """
    purpose = "for phonons"
    phonopy = require("phonopy", extra="phonons", purpose=purpose)
    cells = require("phonopy.structure.cells", extra="phonons", purpose=purpose)
    structure = require("phonopy.structure.atoms", extra="phonons", purpose=purpose)
    unit = structure.PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        masses=atoms.get_masses(),
        cell=atoms.cell.array,
        scaled_positions=atoms.get_scaled_positions(),
    )
    primitive = own = cells.guess_primitive_matrix(unit, _SYMMETRY)
    if abs(np.linalg.det(own)) > 0.99:
        primitive = np.eye(3)  # the given cell is one: its axes are kept as they are named
    if like is not None:
        primitive = like.primitive_matrix
    # A relaxation may find translations that the given structure lacks: phonopy's symmetrization
    # would be wrong in a cell that is not primitive.
    symmetric = np.isclose(*(abs(np.linalg.det(matrix)) for matrix in (own, primitive)))
    repeats = like.supercell_matrix if like else np.diag(repeats_for(atoms, min_length, max_atoms))
    with warnings.catch_warnings():
        # A long supercell has fewer symmetries than its crystal: more displacements, no error.
        warnings.filterwarnings("ignore", message=".*Point group symmetries of supercell")
        crystal = phonopy.Phonopy(
            unit,
            repeats,
            primitive_matrix=primitive,
            symprec=_SYMMETRY,
            is_symmetry=bool(symmetric),
        )
    crystal.generate_displacements(distance=displacement, is_plusminus="auto")
    return crystal


def repeats_for(atoms: ase.Atoms, min_length: float, max_atoms: int) -> list[int]:
    """Repeats of a cell until opposite faces are `min_length` apart, within `max_atoms`.

    Directions that are equally short grow together: the supercell keeps the crystal's symmetry.
    """
    heights = cell_heights(Structures.from_ase(atoms))[0].numpy()
    repeats = np.ones(3, dtype=int)
    while (shortest := (heights * repeats).min()) < min_length - 1e-6:
        larger = repeats + (heights * repeats < 1.001 * shortest)
        if larger.prod() * len(atoms) > max_atoms:
            break
        repeats = larger
    return repeats.tolist()


def to_ase(cell: Any) -> ase.Atoms:
    """Phonopy's cell as ASE's atoms."""
    return ase.Atoms(
        cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, masses=cell.masses,
        pbc=True,
    )  # fmt: skip


def _corners(path: Any) -> tuple[tuple[int, str], ...]:
    """Index and name of the special points of ASE's path, both of them where it jumps."""
    names = {name: "Γ" if name == "G" else name for name in path.special_points}
    return tuple(
        (k, names[name])
        for k, q in enumerate(path.kpts)
        for name, place in path.special_points.items()
        if np.allclose(q, place, atol=1e-6)
    )


class FiniteDisplacements(Evaluation):
    """Base of evaluations that displace the atoms of a crystal, one for each of its symmetries.

    Parameters
    ----------
    displacement : float
        Å. Models are compared at a finite one, about what 100 K move the atoms of a solid:
        foundation models are often rough at the usual 0.01 Å.
    min_length : float
        Å, aimed at between opposite faces of the supercell.
    max_atoms : int
        Atoms of the supercell at most; larger structures are refused.
    max_displacements : int
        Crystals of so low a symmetry that they need more are refused: each costs a force call.
    """

    section = "Properties"
    needs = "crystal"

    displacement: float = Field(default=0.03, gt=0.0)
    min_length: float = Field(default=10.0, gt=0.0)
    max_atoms: int = Field(default=200, ge=1)
    max_displacements: int = Field(default=60, ge=1)

    def lacks(self, bench: Bench) -> str:
        """Also a crystal that is small and symmetric enough."""
        if lacking := super().lacks(bench):
            return lacking
        if len(bench.atoms) > self.max_atoms:
            return f"a crystal of at most {self.max_atoms} atoms"
        n = self.n_displacements(bench.atoms)
        if n > self.max_displacements:
            return (
                f"a crystal with at most {self.max_displacements} displacements by symmetry, not "
                f"{n}: raise max_displacements"
            )
        return ""

    def n_displacements(self, atoms: ase.Atoms) -> int:
        """How often forces of the supercell are computed; zero where phonopy is not installed."""
        try:
            crystal = displaced(atoms, self.displacement, self.min_length, self.max_atoms)
        except OptionalDependencyError:
            return 0  # a result of its own: `run` says what to install
        return len(crystal.supercells_with_displacements)


class PhononsEvaluation(FiniteDisplacements):
    """Phonons beside the teacher's.

    Parameters
    ----------
    small : float, optional
        Å, a second displacement, which shows how much frequencies depend on it; none if null.
    """

    name = "phonons"
    title = "phonons"
    result = Phonons

    small: float | None = Field(default=0.01, gt=0.0)

    def work(self, atoms: ase.Atoms) -> int:
        """Atoms whose forces are computed, over all displacements."""
        copies = int(np.prod(repeats_for(atoms, self.min_length, self.max_atoms)))
        times = 1 if self.small is None else 2
        return times * self.n_displacements(atoms) * len(atoms) * copies

    def run(self, bench: Bench, candidate: Candidate) -> Phonons:
        """Phonons at the candidate's own minimum."""
        return phonons(
            bench.atoms,
            candidate.calculator,
            displacement=self.displacement,
            small=self.small,
            min_length=self.min_length,
            max_atoms=self.max_atoms,
        )

    @classmethod
    def metrics(cls, result: Phonons) -> dict[str, float]:
        """Ends of the spectrum on the mesh and the path."""
        every = np.concatenate([result.frequencies, result.bands])
        return {"phonon_lowest": float(every.min()), "phonon_highest": float(every.max())}

    @classmethod
    def against(cls, result: Phonons, teacher: Phonons) -> dict[str, float]:
        """RMSE and largest deviation on the mesh; nothing if the meshes differ."""
        if not result.comparable(teacher):
            return {}
        apart = np.abs(result.frequencies - teacher.frequencies)
        return {
            "phonon_rmse": float(np.sqrt(np.mean(apart**2))),
            "phonon_largest_deviation": float(apart.max()),
        }

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Ends of the spectrum, distance from the teacher's, and the lowest imaginary mode."""
        yield from super().rows(found)
        modes = {m: r.imaginary() for m, r in found.of(cls.name, Phonons).items()}
        if modes:
            words = {m: str(own[0]) if own else "none" for m, own in modes.items()}
            yield Row("Lowest imaginary phonon", words)
        changes = {m: r.change for m, r in found.of(cls.name, Phonons).items()}
        if any(change is not None for change in changes.values()):
            yield Row("Change of phonons with the displacement (THz)", changes)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Dispersion along the standard path."""
        results = found.of(cls.name, Phonons)
        if not results:
            return
        first = results.get(found.teacher) or next(iter(results.values()))
        same = {m: r for m, r in results.items() if r.comparable(first)}
        # The teacher's dots on top of the others' lines.
        series = [Series(m, *_lines(r), kind="line") for m, r in same.items()]
        panel = Panel(
            "Wave vector", "Frequency (THz)", series, zero_line=True, x_ticks=_ticks(first)
        )
        caption = (
            f"Phonons at each model's own minimum, from displacements of {first.displacement:g} Å "
            f"in a supercell of {first.n_atoms} atoms; negative: imaginary."
        )
        yield Drawing("phonons", "Phonon dispersion", caption, [panel], height=4.0, width=7.6)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Distance from the teacher's phonons, and imaginary modes."""
        results = found.of(cls.name, Phonons)
        ours, theirs = results.get(found.student), results.get(found.teacher)
        for model in (found.student, found.teacher):
            own = results[model].imaginary() if model in results else []
            if own and (model == found.teacher or theirs is None):
                yield Verdict(
                    f"The {plain_label(model)}'s own phonons are imaginary: "
                    f"{'; '.join(map(str, own))}: its relaxed crystal is no minimum."
                )
            r = results.get(model)
            if r is not None and r.change is not None and r.change > AIM_PHONONS:
                yield Verdict(
                    f"The {plain_label(model)}'s phonons change by {number(r.change)} THz (RMSE) "
                    f"between displacements of {r.small:g} and {r.displacement:g} Å: it is rough "
                    "at the scale of small displacements."
                )
        if ours is None or theirs is None or not ours.comparable(theirs):
            return
        numbers = cls.against(ours, theirs)
        rmse, largest = numbers["phonon_rmse"], numbers["phonon_largest_deviation"]
        met = rmse <= AIM_PHONONS
        yield Verdict(
            f"Phonons from displacements of {ours.displacement:g} Å, up to "
            f"{number(cls.metrics(ours)['phonon_highest'])} THz (teacher "
            f"{number(cls.metrics(theirs)['phonon_highest'])} THz): RMSE {number(rmse)} THz, "
            f"{'within' if met else 'beyond'} the bar of {AIM_PHONONS:g} THz; largest deviation "
            f"{number(largest)} THz.",
            f"phonon RMSE of at most {AIM_PHONONS:g} THz ({number(rmse)} THz)",
            met,
        )
        spurious = ours.imaginary(but=theirs)
        named = "; ".join(map(str, spurious))
        yield Verdict(
            f"Phonons of the student are imaginary where the teacher's are not: {named}."
            if spurious
            else "No phonon of the student is imaginary where the teacher's is not.",
            f"no imaginary phonons that the teacher lacks{f' ({named})' if spurious else ''}",
            met=not spurious,
        )


def _lines(result: Phonons) -> tuple[np.ndarray, np.ndarray]:
    """All bands as one line, with gaps between bands and where the path jumps."""
    x = result.distance
    jumps = [b for (a, _), (b, _) in pairwise(result.corners) if x[a] == x[b]]
    x = np.insert(x, jumps, np.nan)
    bands = np.insert(result.bands, jumps, np.nan, axis=0).T
    gap = np.full((len(bands), 1), np.nan)
    return np.tile(np.append(x, np.nan), len(bands)), np.concatenate([bands, gap], axis=1).ravel()


def _ticks(result: Phonons) -> list[tuple[float, str]]:
    """Places and names of the corners; both names where the path jumps."""
    ticks: dict[float, str] = {}
    for k, name in result.corners:
        place = float(result.distance[k])
        ticks[place] = f"{ticks[place]}|{name}" if place in ticks else name
    return list(ticks.items())
