"""The conventional cell behind a supercell or a primitive cell, from translations alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import ase
import numpy as np
from ase.build import make_supercell
from ase.cell import Cell
from ase.geometry import find_mic
from ase.lattice import identify_lattice

#: Å; atoms that a translation brings this close to others of their kind are the same.
_TOLERANCE = 0.05


def repeats(atoms: ase.Atoms) -> tuple[int, int, int]:
    """How often the structure repeats itself along each of its cell's vectors.

    A supercell of n x m x k cells gives (n, m, k), and where atoms are displaced from their sites
    by more than 0.05 Å (1, 1, 1): it is no supercell then.
    """
    numbers, counts = np.unique(atoms.numbers, return_counts=True)
    rarest = numbers[counts.argmin()]
    # A translation carries the atoms of every kind into one another: n divides each count.
    most = int(np.gcd.reduce(counts))
    found = []
    for axis in range(3):
        best = 1
        for n in range(most, 1, -1):
            if most % n == 0 and _is_translation(atoms, atoms.cell[axis] / n, rarest):
                best = n
                break
        found.append(best)
    return found[0], found[1], found[2]


def conventional_lengths(atoms: ase.Atoms) -> np.ndarray:
    """(3,) lengths in Å of the conventional cell of a crystal.

    A supercell is brought back to its unit. Where that has right angles its own lengths are
    returned, for other cells those of the conventional cell of its Bravais lattice: 4.05 Å for
    the cubic and the primitive cell of aluminum and for any supercell of them.
    """
    unit = Cell(atoms.cell.array / np.array(repeats(atoms))[:, None])
    if np.allclose(unit.angles(), 90.0, atol=0.1):
        return unit.lengths()
    try:
        return unit.get_bravais_lattice(eps=1e-3).conventional().cellpar()[:3]
    except RuntimeError:  # not recognized within the tolerance
        return unit.lengths()


@dataclass(frozen=True)
class CrystalLattice:
    """The primitive cell of a crystal, and what the conventional one is made of.

    Parameters
    ----------
    primitive : ase.Atoms
    matrix : ndarray
        (3, 3) integers: vectors of the conventional cell in units of the primitive ones, as rows.
    name : str
        Bravais lattice in ASE's (AFLOW's) abbreviation, "FCC".
    """

    primitive: ase.Atoms
    matrix: np.ndarray
    name: str

    @property
    def conventional(self) -> ase.Atoms:
        """The crystal in its conventional cell."""
        return make_supercell(self.primitive, self.matrix)

    @property
    def cubic(self) -> bool:
        """Whether the lattice is a cubic one."""
        return self.name in ("CUB", "FCC", "BCC")

    def primitive_indices(self, indices: tuple[int, int, int]) -> tuple[int, int, int]:
        """Miller indices of the conventional cell as those of the primitive cell."""
        # Indices are components of a reciprocal vector: they transform like the cell's vectors.
        adjugate = np.linalg.inv(self.matrix) * np.linalg.det(self.matrix)
        h, k, l = (int(i) for i in np.rint(adjugate @ indices))  # noqa: E741
        divisor = int(np.gcd.reduce((h, k, l)))
        return h // divisor, k // divisor, l // divisor


def crystal_lattice(atoms: ase.Atoms) -> CrystalLattice:
    """Find the Bravais lattice of a crystal in any of its cells.

    Axes of a cell that is conventional, and of its supercells, keep their order. A lattice that is
    not recognized (to a thousandth) counts as triclinic.
    """
    counts = repeats(atoms)
    unit = _in_cell(atoms, atoms.cell.array / np.array(counts)[:, None])
    primitive = _primitive(unit)
    name, cell = "TRI", primitive.cell.array
    try:
        bravais, op = identify_lattice(primitive.cell, eps=1e-3)
    except RuntimeError:
        pass
    else:
        # ASE's operation takes the standard cell to the given one, up to a rotation.
        standard, conventional = bravais.tocell(), bravais.conventional().tocell()
        cell = conventional.array @ np.linalg.inv(standard) @ np.linalg.inv(op).T @ cell
        name = bravais.name
    ours, its = (np.sort(Cell(c).cellpar().reshape(2, 3)) for c in (unit.cell.array, cell))
    if np.allclose(ours, its, rtol=1e-3):
        cell = unit.cell.array
    matrix = np.rint(cell @ np.linalg.inv(primitive.cell.array)).astype(int)
    return CrystalLattice(primitive, matrix if np.linalg.det(matrix) > 0 else -matrix, name)


def _primitive(atoms: ase.Atoms) -> ase.Atoms:
    """The smallest cell: its vectors are the three shortest independent translations."""
    cell = atoms.cell.minkowski_reduce()[0].array
    numbers, counts = np.unique(atoms.numbers, return_counts=True)
    rarest = numbers[counts.argmin()]
    here = atoms.positions[atoms.numbers == rarest]
    moves = [v for v in here - here[0] if _is_translation(atoms, v, rarest)]
    if len(moves) == 1:
        return atoms
    # n translations form a group: n times each is a vector of the cell, whatever the noise.
    parts = np.rint(len(moves) * np.array(moves) @ np.linalg.inv(cell)) / len(moves)
    near = np.array(list(product((-1, 0, 1), repeat=3)))
    images = ((parts % 1.0)[:, None] + near).reshape(-1, 3) @ cell
    lengths = np.linalg.norm(images, axis=1)
    basis = np.zeros((0, 3))
    for vector in images[np.argsort(lengths.round(6), kind="stable")]:
        longer = np.vstack([basis, vector])
        if len(basis) < 3 and np.linalg.matrix_rank(longer, tol=1e-3) == len(longer):
            basis = longer
    if not np.isclose(abs(np.linalg.det(basis)) * len(moves), atoms.get_volume()):
        return atoms  # displaced atoms: no group
    return _in_cell(atoms, basis * np.sign(np.linalg.det(basis)))


def _in_cell(atoms: ase.Atoms, cell: np.ndarray) -> ase.Atoms:
    """One of each set of atoms that a smaller cell's vectors carry into one another."""
    kept: list[int] = []
    for i, here in enumerate(atoms.positions):
        if not kept or find_mic(atoms.positions[kept] - here, cell)[1].min() > 2.0 * _TOLERANCE:
            kept.append(i)
    smaller = atoms[kept]
    smaller.set_cell(cell)
    return smaller


def _is_translation(atoms: ase.Atoms, vector: np.ndarray, rarest: int) -> bool:
    for kind in sorted(set(atoms.numbers.tolist()), key=lambda kind: kind != rarest):
        here = atoms.positions[atoms.numbers == kind]
        for moved in here + vector:
            _, distances = find_mic(here - moved, atoms.cell, pbc=True)
            if distances.min() > _TOLERANCE:
                return False
    return True
