"""The conventional cell behind a supercell or a primitive cell, from translations alone."""

from __future__ import annotations

import ase
import numpy as np
from ase.cell import Cell
from ase.geometry import find_mic

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


def _is_translation(atoms: ase.Atoms, vector: np.ndarray, rarest: int) -> bool:
    for kind in sorted(set(atoms.numbers.tolist()), key=lambda kind: kind != rarest):
        here = atoms.positions[atoms.numbers == kind]
        for moved in here + vector:
            _, distances = find_mic(here - moved, atoms.cell, pbc=True)
            if distances.min() > _TOLERANCE:
                return False
    return True
