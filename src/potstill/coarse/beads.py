"""Which atoms make which bead, and how molecules are made whole."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import breadth_first_order, connected_components

from potstill.coarse.settings import MappingSettings
from potstill.coarse.topology import Topology
from potstill.errors import ConfigError, DataError
from potstill.species import Species, SpeciesTable

#: Å; no bond between atoms is that long.
_LONGEST_BOND = 4.0


@dataclass(frozen=True)
class MoleculeType:
    """Molecules of the same atoms, mapped alike; n copies of k atoms and b beads.

    Parameters
    ----------
    name : str
        Names of its residues.
    atoms : ndarray
        (n, k) int64, atoms of each copy in the same order.
    beads : ndarray
        (n, b) int64, beads of each copy.
    bead_names : tuple of str
        b names.
    bead_of : ndarray
        (k,) int64, which of the b beads an atom is in; -1 if excluded.
    weights : ndarray
        (b, k) position of each bead as a linear combination of the atoms' positions.
    bonds : ndarray
        (n_bonds, 2) int64, of the k atoms.
    """

    name: str
    atoms: np.ndarray
    beads: np.ndarray
    bead_names: tuple[str, ...]
    bead_of: np.ndarray
    weights: np.ndarray
    bonds: np.ndarray

    @property
    def sum_map(self) -> np.ndarray:
        """(b, k) plain sum: one for the atoms of a bead."""
        return (self.bead_of == np.arange(len(self.bead_names))[:, None]).astype(np.float64)

    @property
    def bead_bonds(self) -> list[list[int]]:
        """Pairs of its beads that a bond connects."""
        pairs = np.sort(self.bead_of[self.bonds], axis=1)
        pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs[:, 0] >= 0)]
        return np.unique(pairs, axis=0).tolist()


@dataclass(frozen=True)
class Beads:
    """Beads of a topology.

    Parameters
    ----------
    topology : Topology
    names : tuple of str
        Kind of each bead; beads are ordered by their first atoms.
    bead_of : ndarray
        (N,) int64, bead of each atom; -1 for excluded atoms.
    weights : ndarray
        (N,) weight of an atom in the position of its bead; they sum to one in each.
    masses : ndarray
        (n_beads,) amu, sums of the atoms' masses.
    edges : ndarray
        (n_edges, 2) bonds, and connections within beads that bonds leave in pieces.
    """

    topology: Topology
    names: tuple[str, ...]
    bead_of: np.ndarray
    weights: np.ndarray
    masses: np.ndarray
    edges: np.ndarray

    @cached_property
    def species_table(self) -> SpeciesTable:
        """Kinds of beads in the order in which they are first met.

        Raises
        ------
        ConfigError
            If beads of one kind have different masses.
        """
        masses: dict[str, float] = {}
        for name, mass in zip(self.names, self.masses.tolist(), strict=True):
            if abs(masses.setdefault(name, mass) - mass) > 1e-3:
                raise ConfigError(
                    f"beads called '{name}' have masses of {masses[name]:.3f} and {mass:.3f} amu: "
                    f"give different beads different names"
                )
        # Rounded, so that masses in single and double precision are those of the same species.
        return SpeciesTable(tuple(Species(name, round(m, 4)) for name, m in masses.items()))

    @cached_property
    def center_map(self) -> sparse.csr_array:
        """(n_beads, N) positions of the beads from those of whole molecules."""
        return self._matrix(self.weights)

    @cached_property
    def sum_map(self) -> sparse.csr_array:
        """(n_beads, N) plain sum of forces."""
        return self._matrix(np.ones(len(self.weights)))

    @cached_property
    def molecules(self) -> tuple[MoleculeType, ...]:
        """Kinds of molecules that have beads: connected by bonds, or residues where there are none.

        Excluded atoms belong to their molecules, for optimal force maps may use them.
        """
        top = self.topology
        edges = self.edges
        if not len(top.bonds):
            first = np.unique(top.residues, return_index=True)[1]
            edges = np.concatenate([edges, np.stack([first[top.residues], np.arange(len(top))], 1)])
        count, member = connected_components(_graph(edges, len(top)), directed=False)
        by_molecule = np.split(
            np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1]
        )
        bonds: list[list[np.ndarray]] = [[] for _ in range(count)]
        for bond in np.sort(top.bonds, axis=1):
            bonds[member[bond[0]]].append(bond)
        alike: dict[tuple, list[np.ndarray]] = defaultdict(list)
        for atoms, own in zip(by_molecule, bonds, strict=True):
            beads = np.unique(self.bead_of[atoms])
            beads = beads[beads >= 0]
            if not len(beads):
                continue
            local = np.where(
                self.bead_of[atoms] < 0, -1, np.searchsorted(beads, self.bead_of[atoms])
            )
            key = (
                tuple(top.names[atoms]),
                tuple(top.residue_names[top.residues[atoms]]),
                tuple(self.names[b] for b in beads),
                local.tobytes(),
                np.round(self.weights[atoms], 9).tobytes(),
                tuple(sorted(map(tuple, np.searchsorted(atoms, own).tolist()))) if own else (),
            )
            alike[key].append(atoms)
        return tuple(self._molecule_type(key, copies) for key, copies in alike.items())

    def _molecule_type(self, key: tuple, copies: list[np.ndarray]) -> MoleculeType:
        atoms = np.stack(copies)
        _, residues, names, local, _, bonds = key
        bead_of = np.frombuffer(local, dtype=np.int64)
        weights = np.zeros((len(names), atoms.shape[1]))
        mapped = np.flatnonzero(bead_of >= 0)
        weights[bead_of[mapped], mapped] = self.weights[atoms[0, mapped]]
        first = [np.flatnonzero(bead_of == b)[0] for b in range(len(names))]
        return MoleculeType(
            name="-".join(dict.fromkeys(name for name in residues if name)) or "molecule",
            atoms=atoms,
            beads=self.bead_of[atoms[:, first]],
            bead_names=names,
            bead_of=bead_of,
            weights=weights,
            bonds=np.array(bonds, dtype=np.int64).reshape(-1, 2),
        )

    # -- molecules across the boundary -------------------------------------------------------------

    @cached_property
    def _tree(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Atoms and the atom each is placed next to, from the roots of the molecules outward."""
        n = len(self.topology)
        _, member = connected_components(_graph(self.edges, n), directed=False)
        roots = np.unique(member, return_index=True)[1]
        # One more node, connected to all roots, makes one search of all molecules.
        edges = np.concatenate([self.edges, np.stack([np.full(len(roots), n), roots], axis=1)])
        order, parent = breadth_first_order(_graph(edges, n + 1), n, directed=False)
        depth = np.zeros(n + 1, dtype=np.int64)
        for node in order[1:]:
            depth[node] = depth[parent[node]] + 1
        levels = [np.flatnonzero(depth[:n] == level) for level in range(2, int(depth.max()) + 1)]
        return [(atoms, parent[atoms]) for atoms in levels]

    def whole(
        self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, where: str
    ) -> np.ndarray:
        """(N, 3) positions with the atoms of each molecule at their nearest images.

        Bonds are followed; atoms of a bead that no bonds connect lie around its first.

        Raises
        ------
        DataError
            If a bead is larger than half of the cell, where nearest images mean nothing.
        """
        if not pbc.any():
            return positions
        inverse = np.linalg.pinv(cell)
        whole = positions.copy()
        for atoms, parents in self._tree:
            steps = nearest(whole[atoms] - whole[parents], cell, inverse, pbc)
            whole[atoms] = whole[parents] + steps
        starts, atoms = self._sorted
        inside = (whole @ inverse)[atoms]
        extent = np.maximum.reduceat(inside, starts) - np.minimum.reduceat(inside, starts)
        # 1e-9: a file may round to the cell's half.
        if bool((too_large := (extent[:, pbc] >= 0.5 - 1e-9).any(axis=1)).any()):
            bead = int(too_large.argmax())
            raise DataError(
                f"{where}: bead {bead} ('{self.names[bead]}') is larger than half of the cell, so "
                f"that its atoms cannot be brought together: choose smaller beads"
            )
        return whole

    def check_bonds(
        self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, where: str
    ) -> None:
        """Refuse bonds that no atoms have: then topology and trajectory are not of one system."""
        bonds = self.topology.bonds
        if not len(bonds):
            return
        vectors = positions[bonds[:, 0]] - positions[bonds[:, 1]]
        lengths = np.linalg.norm(nearest(vectors, cell, np.linalg.pinv(cell), pbc), axis=1)
        if lengths.max() > _LONGEST_BOND:
            i, j = bonds[lengths.argmax()]
            raise DataError(
                f"{where}: the bond of {self.topology.atom(i)} and {self.topology.atom(j)} is "
                f"{lengths.max():.1f} Å long: {self.topology.where} and the trajectory do not "
                f"belong together"
            )

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each bead begins among the atoms in order of beads, and these atoms."""
        atoms = np.argsort(self.bead_of, kind="stable")[int((self.bead_of < 0).sum()) :]
        return np.searchsorted(self.bead_of[atoms], np.arange(len(self.names))), atoms

    def _matrix(self, values: np.ndarray) -> sparse.csr_array:
        """(n_beads, N) with the atoms' values."""
        atoms = np.flatnonzero(self.bead_of >= 0)
        return sparse.csr_array(
            (values[atoms], (self.bead_of[atoms], atoms)), (len(self.names), len(values))
        )


def nearest(
    vectors: np.ndarray, cell: np.ndarray, inverse: np.ndarray, pbc: np.ndarray
) -> np.ndarray:
    """Images of vectors nearest to zero.

    Rounding fractional coordinates finds every vector that is shorter than half of the smallest
    distance between opposite faces of the cell, however skewed.
    """
    return vectors - (np.round(vectors @ inverse) * pbc) @ cell


def find_beads(topology: Topology, settings: MappingSettings) -> Beads:
    """Apply the selections of a mapping to a topology.

    Raises
    ------
    ConfigError
        If a selection is empty or names something unknown, an atom is in two beads, or in none
        and not excluded, or a mass is unknown.
    """
    n = len(topology)
    kinds: list[tuple[str, np.ndarray]] = []
    if settings.mapped:
        kinds = [(str(name), np.array([k])) for k, name in enumerate(topology.names)]
    for name, selections in settings.beads.items():
        for selection in selections:
            atoms = np.flatnonzero(topology.select(selection, f"bead '{name}'"))
            atoms = atoms[np.argsort(topology.residues[atoms], kind="stable")]
            cuts = np.flatnonzero(np.diff(topology.residues[atoms])) + 1
            kinds += [(name, part) for part in np.split(atoms, cuts)]
    kinds.sort(key=lambda kind: int(kind[1][0]))
    bead_of = np.full(n, -1, dtype=np.int64)
    for bead, (name, atoms) in enumerate(kinds):
        if bool((taken := bead_of[atoms] >= 0).any()):
            atom = int(atoms[taken.argmax()])
            raise ConfigError(
                f"{topology.atom(atom)} is in two beads, '{kinds[bead_of[atom]][0]}' and '{name}'"
            )
        bead_of[atoms] = bead
    excluded = np.zeros(n, dtype=bool)
    for selection in settings.exclude:
        excluded |= topology.select(selection, "exclude")
    for wrong, words in (
        (excluded & (bead_of >= 0), "is excluded, but it is in a bead as well"),
        (~excluded & (bead_of < 0), "is in no bead: add it to one, or to 'exclude'"),
    ):
        if wrong.any():
            more = int(wrong.sum()) - 1
            others = f" ({more} other atoms as well)" if more else ""
            raise ConfigError(f"{topology.atom(int(wrong.argmax()))} {words}{others}")
    return _make(topology, settings, kinds, bead_of)


def _make(
    topology: Topology,
    settings: MappingSettings,
    kinds: list[tuple[str, np.ndarray]],
    bead_of: np.ndarray,
) -> Beads:
    mapped = bead_of >= 0
    if bool((unknown := np.isnan(topology.masses) & mapped).any()):
        names = sorted(set(topology.names[unknown].tolist()))
        raise ConfigError(
            f"the masses of {', '.join(names[:5])}{' and others' * (len(names) > 5)} are not known "
            f"from {topology.where}: give them in 'masses', by names of atoms, in amu"
        )
    masses = np.bincount(bead_of[mapped], topology.masses[mapped], len(kinds))
    if not (masses > 0).all():
        raise ConfigError(f"a bead '{kinds[int(masses.argmin())][0]}' has no mass")
    share = topology.masses if settings.center == "mass" else np.ones(len(topology))
    total = np.bincount(bead_of[mapped], share[mapped], len(kinds))
    weights = np.where(mapped, share / total[bead_of], 0.0)
    _, piece = connected_components(_graph(topology.bonds, len(topology)), directed=False)
    links = [
        (atoms[0], atoms[k])
        for _, atoms in kinds
        for k in np.unique(piece[atoms], return_index=True)[1]
        if piece[atoms[k]] != piece[atoms[0]]
    ]
    edges = np.concatenate([topology.bonds, np.array(links, dtype=np.int64).reshape(-1, 2)])
    return Beads(topology, tuple(name for name, _ in kinds), bead_of, weights, masses, edges)


def _graph(edges: np.ndarray, n: int) -> sparse.csr_array:
    return sparse.csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), (n, n))
