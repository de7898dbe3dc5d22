"""Neighbor lists against ASE's, for the cells that break neighbor lists."""

import ase
import ase.build
import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list

from potstill.errors import DataError
from potstill.neighbors import build_neighbor_list, pair_vectors, shortest_distances
from potstill.structures import Structures


def rattled(atoms, seed=0):
    """Break ties of perfect shells, which rounding puts on either side of a cutoff."""
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0.0, 0.05, atoms.positions.shape)
    return atoms


def skewed():
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array @ [[1, 0, 0], [0.9, 1, 0], [-0.8, 1.7, 1]], scale_atoms=True)
    return atoms


def wire():
    atoms = ase.Atoms("Au3", [(0, 0, 0), (0.4, 0.3, 2.5), (-0.2, 0.1, 4.9)])
    atoms.set_cell([0, 0, 7.3])
    atoms.pbc = (False, False, True)
    return atoms


def tilted_wire():
    atoms = wire()
    atoms.set_cell([[0, 0, 0], [0, 0, 0], [1.0, 2.0, 6.5]])
    return atoms


def slab(axis, box=True):
    atoms = ase.build.fcc111("Pt", (2, 2, 3), vacuum=4.0)
    atoms.pbc = (True, True, False)
    if not box:
        atoms.cell[2] = 0.0
    order = np.roll([0, 1, 2], axis)
    atoms.set_cell(atoms.cell.array[order])
    atoms.pbc = atoms.pbc[order]
    return atoms


def unwrapped():
    atoms = ase.build.bulk("Si", cubic=True)
    shifts = np.random.default_rng(1).integers(-4, 5, (len(atoms), 3))
    atoms.positions += shifts @ atoms.cell.array
    return atoms


def left_handed():
    atoms = skewed()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


def open_with_cell():
    atoms = ase.build.bulk("Al", cubic=True) * (2, 2, 2)
    atoms.pbc = False
    return atoms


CASES = {
    "primitive cell, 1 atom": ase.build.bulk("Al"),
    "tiny cell": ase.Atoms("H2", [(0, 0, 0), (0.4, 0.5, 0.6)], cell=[1.3, 1.2, 1.4], pbc=True),
    "flat cell": ase.Atoms("C2", [(0, 0, 0), (0, 1.4, 0)], cell=[20, 2.5, 2.4], pbc=True),
    "bulk, wide": ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True) * (3, 2, 2),
    "skewed cell": skewed(),
    "left-handed cell": left_handed(),
    "unwrapped atoms": unwrapped(),
    "molecule": ase.build.molecule("CH3CH2OH"),
    "molecule far from the origin": ase.Atoms("CO", [(1e4, -1e4, 0), (1e4 + 1.1, -1e4, 0)]),
    "wire": wire(),
    "tilted wire": tilted_wire(),
    "slab without a third vector": slab(0, box=False),
    "slab, open along 3": slab(0),
    "slab, open along 1": slab(1),
    "slab, open along 2": slab(2),
    "open, with a cell": open_with_cell(),
    "planar molecule": ase.build.molecule("C6H6"),
}


def keys(center, neighbor, vectors):
    return sorted(
        (int(i), int(j), *(float(x) for x in np.round(v, 6) + 0.0))
        for i, j, v in zip(center, neighbor, vectors, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cutoff", [1.7, 5.1])
def test_pairs_are_those_of_ase(name, cutoff):
    atoms = rattled(CASES[name])
    batch = Structures.from_ase(atoms)
    neighbors = build_neighbor_list(batch, cutoff)
    i, j, vectors = neighbor_list("ijD", atoms, cutoff)
    ours = keys(neighbors.center, neighbors.neighbor, pair_vectors(batch, neighbors).numpy())
    assert np.array(ours) == pytest.approx(np.array(keys(i, j, vectors)), abs=3e-6)
    assert bool((neighbors.center.diff() >= 0).all()), "sorted by center"


def test_a_batch_is_its_systems_side_by_side():
    frames = [rattled(atoms, seed) for seed, atoms in enumerate(CASES.values())]
    batch = Structures.from_ase(frames)
    whole = build_neighbor_list(batch, 4.0)
    single = [build_neighbor_list(Structures.from_ase(atoms), 4.0) for atoms in frames]
    assert whole.n_pairs_per_system.tolist() == [n.n_pairs for n in single]
    offsets = batch.atom_offsets.tolist()
    centers = torch.cat([n.center + k for n, k in zip(single, offsets[:-1], strict=True)])
    assert torch.equal(whole.center, centers)


@pytest.mark.parametrize("seed", range(20))
def test_random_cells(seed):
    random = np.random.default_rng(seed)
    cell = random.uniform(2.0, 5.0) * (np.eye(3) + random.uniform(-0.6, 0.6, (3, 3)))
    positions = random.uniform(-2, 3, (random.integers(1, 7), 3)) @ cell
    atoms = ase.Atoms("H" * len(positions), positions, cell=cell, pbc=random.random(3) < 0.6)
    batch = Structures.from_ase(atoms)
    neighbors = build_neighbor_list(batch, 4.3)
    i, j, vectors = neighbor_list("ijD", atoms, 4.3)
    ours = keys(neighbors.center, neighbors.neighbor, pair_vectors(batch, neighbors).numpy())
    assert np.array(ours) == pytest.approx(np.array(keys(i, j, vectors)), abs=3e-6)


def test_pair_vectors_are_differentiable_in_positions_and_cell():
    batch = Structures.from_ase(rattled(ase.build.bulk("Cu")))
    neighbors = build_neighbor_list(batch, 3.0)

    def vectors(positions, cell):
        return pair_vectors(
            Structures(**{**vars(batch), "positions": positions, "cell": cell}), neighbors
        )

    inputs = batch.positions.requires_grad_(), batch.cell.requires_grad_()
    assert torch.autograd.gradcheck(vectors, inputs)


def test_shortest_distances_per_pair_of_species():
    batch = Structures.from_ase(
        [ase.build.molecule("H2O"), ase.Atoms("O2", [(0, 0, 0), (0, 0, 1.2)])]
    )
    shortest = shortest_distances(batch, build_neighbor_list(batch, 3.0))
    assert shortest["O-O"] == pytest.approx(1.2)
    assert shortest["H-O"] == pytest.approx(0.9686, abs=1e-3)
    assert set(shortest) == {"H-H", "H-O", "O-O"}


def test_faulty_cells_and_positions_are_refused():
    hole = ase.Atoms("H", cell=[3, 3, 0], pbc=True, info={"frame_id": "a.xyz:3"})
    with pytest.raises(
        DataError, match=r"a\.xyz:3: periodic along lattice vector 3, which is zero"
    ):
        build_neighbor_list(Structures.from_ase(hole), 3.0)
    nan = ase.Atoms("H", [(np.nan, 0, 0)])
    with pytest.raises(DataError, match="not finite"):
        build_neighbor_list(Structures.from_ase(nan), 3.0)
    flat = ase.Atoms("H", cell=[[3, 0, 0], [0, 3, 0], [1, 1, 0]], pbc=True)
    with pytest.raises(DataError, match="linearly dependent"):
        build_neighbor_list(Structures.from_ase(flat), 3.0)
