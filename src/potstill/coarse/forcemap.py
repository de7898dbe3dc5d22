r"""Linear force maps that fit a mapping of positions, and the one with the least noise.

Beads at R = W r (rows of W sum to one) feel the mean force -dA/dR = <C f | R> for every matrix C
with C Wᵀ = 1 whose displacements keep the simulation's constraints: moving the atoms along a row
of C then moves one bead, leaves the others in place, and no constraint force does work (Ciccotti
et al., ChemPhysChem 6, 1809 (2005); Noid et al., J. Chem. Phys. 128, 244114 (2008)). The condition
is met by the plain sum, one for all atoms of a bead, whatever the weights of the center are, as
long as no constrained bond leaves the bead. All such maps have the same mean but differ in noise:
the optimal one minimizes <|C f|²> (Krämer et al., J. Phys. Chem. Lett. 14, 3970 (2023)).

A row of C that gives atoms of a constrained bond the same coefficient moves them as one, so that
its length and the weights by which constraints enter the ensemble are kept.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import null_space
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from potstill.coarse.beads import MoleculeType, nearest
from potstill.errors import DataError

#: Å; pairs of atoms further apart at the start are not looked at as constrained.
_REACH = 3.0

#: Distances needed to tell a constraint from one that happens not to change.
_MIN_SAMPLES = 10


class MoleculeStatistics:
    """Second moments of forces and fluctuations of distances of one kind of molecule.

    Parameters
    ----------
    kind : MoleculeType
    """

    def __init__(self, kind: MoleculeType) -> None:
        self.kind = kind
        self.n_frames = 0
        n_atoms = kind.atoms.shape[1]
        self._forces = np.zeros((n_atoms, n_atoms))
        self.pairs = np.zeros((0, 2), dtype=np.int64)
        self._distance = np.zeros((3, 0))  # sums of (d - d0) and (d - d0)², and d0

    def add(
        self, positions: np.ndarray, forces: np.ndarray, cell: np.ndarray, pbc: np.ndarray
    ) -> None:
        """Take a frame: (N, 3) positions and forces of all atoms of the trajectory."""
        inverse, atoms = np.linalg.pinv(cell), self.kind.atoms
        if not self.n_frames:
            i, j = np.triu_indices(atoms.shape[1], 1)
            steps = nearest(positions[atoms[0, i]] - positions[atoms[0, j]], cell, inverse, pbc)
            near = np.linalg.norm(steps, axis=1) < _REACH
            bonds = np.sort(self.kind.bonds, axis=1)
            self.pairs = np.unique(np.concatenate([np.stack([i, j], 1)[near], bonds]), axis=0)
        i, j = self.pairs.T
        steps = nearest(positions[atoms[:, i]] - positions[atoms[:, j]], cell, inverse, pbc)
        distances = np.linalg.norm(steps, axis=2)
        if not self.n_frames:
            self._distance = np.zeros((3, len(i)))
            self._distance[2] = distances[0]
        shifted = distances - self._distance[2]
        self._distance[0] += shifted.sum(0)
        self._distance[1] += (shifted**2).sum(0)
        rows = forces[atoms].transpose(1, 0, 2).reshape(atoms.shape[1], -1)
        self._forces += rows @ rows.T
        self.n_frames += 1

    @property
    def n_samples(self) -> int:
        """Copies of the molecule in all frames."""
        return self.n_frames * len(self.kind.atoms)

    @property
    def moments(self) -> np.ndarray:
        """(k, k) mean products of the forces on two atoms per Cartesian component, (eV/Å)²."""
        return self._forces / (3 * self.n_samples)

    def constrained(self, tolerance: float) -> np.ndarray:
        """(n, 2) pairs of atoms whose distance fluctuates by less than `tolerance` of its mean.

        Raises
        ------
        DataError
            If there are too few distances to tell.
        """
        if not tolerance or not len(self.pairs):
            return np.zeros((0, 2), dtype=np.int64)
        if self.n_samples < _MIN_SAMPLES:
            raise DataError(
                f"{self.n_samples} configurations of {self.kind.name} are too few to tell which of "
                f"its bonds are constrained: map more frames, or state constraint_tolerance: 0 if "
                f"there are no constraints"
            )
        shift = self._distance[0] / self.n_samples
        variance = np.maximum(self._distance[1] / self.n_samples - shift**2, 0.0)
        mean = self._distance[2] + shift
        return self.pairs[np.sqrt(variance) < tolerance * mean]


def cut_bonds(kind: MoleculeType, constrained: np.ndarray) -> np.ndarray:
    """Those of the constrained pairs that lie in different beads, or with one atom in none."""
    return constrained[kind.bead_of[constrained[:, 0]] != kind.bead_of[constrained[:, 1]]]


def optimal_force_map(
    moments: np.ndarray,
    weights: np.ndarray,
    constrained: np.ndarray,
    plain: np.ndarray,
    ridge: float = 0.0,
) -> np.ndarray:
    """Force map of least variance that is consistent with a mapping and with constraints.

    Parameters
    ----------
    moments : ndarray
        (k, k) mean products of atomic forces.
    weights : ndarray
        (b, k) positions of the beads as linear combinations of those of the atoms.
    constrained : ndarray
        (n, 2) pairs of atoms that get the same coefficient.
    plain : ndarray
        (b, k) the plain sum; the feasible map nearest to it is where `ridge` pulls, so that the
        result is never noisier than a plain sum that is feasible.
    ridge : float
        Strength of the pull relative to the mean variance of the forces.

    Returns
    -------
    ndarray
        (b, k) coefficients C with C weightsᵀ = 1, minimizing tr(C moments Cᵀ).

    Raises
    ------
    DataError
        If there is no such map, because constraints tie beads together.
    """
    n_beads, n_atoms = weights.shape
    links = csr_array((np.ones(len(constrained)), constrained.T), (n_atoms, n_atoms))
    n_groups, group = connected_components(links, directed=False)
    gather = np.zeros((n_atoms, n_groups))
    gather[np.arange(n_atoms), group] = 1.0
    size = gather.sum(0)
    condition = weights @ gather
    hessian = gather.T @ moments @ gather
    # The feasible map that is nearest to the plain sum.
    start = plain @ gather / size
    gap = np.eye(n_beads) - start @ condition.T
    start = start + gap @ np.linalg.pinv(condition / size @ condition.T) @ (condition / size)
    if np.abs(start @ condition.T - np.eye(n_beads)).max() > 1e-8:
        raise DataError("no linear force map fits both the beads and the constrained bonds")
    free = null_space(condition)
    pull = ridge * np.trace(moments) / n_atoms
    stiff = free.T @ (hessian + pull * np.diag(size)) @ free
    change = np.linalg.lstsq(stiff, -free.T @ hessian @ start.T, rcond=None)[0]
    return (start + (free @ change).T) @ gather.T
