"""Packed neighbor lists against vesin's and ASE's, for cells that break neighbor lists."""

import ase
import ase.build
import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from potstill import core
from potstill.calculators import PotstillCalculator
from potstill.errors import DataError, ModelError
from potstill.models import HIPNN
from potstill.neighbors import build_neighbor_list
from potstill.species import SpeciesTable
from potstill.structures import Structures
from test_neighbors import CASES, keys, rattled

if not core.available():
    pytest.skip(f"no native kernels: {core.why_unavailable()}", allow_module_level=True)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def spelled_out(compact):
    """(E, 5) int64 rows center, neighbor, shift, sorted."""
    centers = torch.arange(compact.n_local).repeat_interleave(compact.row_ptr.diff())
    image = torch.zeros_like(centers) if compact.image is None else compact.image.long()
    rows = torch.column_stack([centers, compact.neighbor.long(), compact.images[image].long()])
    return sorted(map(tuple, rows.tolist()))


def vesin_pairs(structures, cutoff):
    found = build_neighbor_list(structures, cutoff)
    rows = torch.column_stack([found.center, found.neighbor, found.shifts])
    return sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cutoff", [1.7, 5.1])
def test_pairs_are_those_of_ase(name, cutoff, threads):
    atoms = rattled(CASES[name])
    structures = Structures.from_ase(atoms)
    compact = core.build_compact_neighbors(structures, cutoff)
    vectors = core.compact_pair_vectors(structures, compact, torch.float64).numpy()
    centers = torch.arange(len(atoms)).repeat_interleave(compact.row_ptr.diff())
    i, j, expected = neighbor_list("ijD", atoms, cutoff)
    ours = keys(centers, compact.neighbor, vectors)
    assert np.array(ours) == pytest.approx(np.array(keys(i, j, expected)), abs=3e-6)
    assert compact.cutoff == cutoff


def test_a_batch_of_all_cells_is_that_of_vesin(threads):
    structures = Structures.from_ase([rattled(a, seed) for seed, a in enumerate(CASES.values())])
    compact = core.build_compact_neighbors(structures, 4.0)
    assert spelled_out(compact) == vesin_pairs(structures, 4.0)


coordinates = st.floats(-1.0, 1.0, allow_subnormal=False)


@settings(max_examples=100, deadline=None)
@given(
    edges=st.tuples(*[st.floats(1.5, 30.0)] * 3),
    skew=st.tuples(*[st.floats(-1.5, 1.5)] * 3),
    periodic=st.tuples(*[st.booleans()] * 3),
    fractions=st.lists(st.tuples(*[coordinates] * 3), min_size=1, max_size=12),
    spread=st.sampled_from([0.5, 1.0, 4.0]),
    cutoff=st.floats(0.3, 7.0),
)
def test_random_systems(edges, skew, periodic, fractions, spread, cutoff):
    """Skewed cells of all sizes, atoms far outside of them, coinciding atoms, open directions."""
    cell = np.diag(edges) @ (np.eye(3) + np.tril(np.array([skew] * 3).T, -1))
    positions = spread * np.array(fractions) @ cell
    atoms = ase.Atoms("H" * len(positions), positions, cell=cell, pbc=periodic)
    structures = Structures.from_ase(atoms)
    expected = build_neighbor_list(structures, cutoff + 1e-6)
    offsets = expected.shifts.double() @ structures.cell[0]
    x = structures.positions
    distance = torch.linalg.vector_norm(x[expected.neighbor] - x[expected.center] + offsets, dim=1)
    rows = torch.column_stack([expected.center, expected.neighbor, expected.shifts])
    surely = set(map(tuple, rows[distance < cutoff - 1e-6].tolist()))
    shifts = torch.cat([expected.shifts, torch.zeros(1, 3, dtype=torch.int64)])
    n_images = int((shifts.max(dim=0).values - shifts.min(dim=0).values + 1).prod())
    assume(n_images <= 65536)  # more are refused: see below
    found = spelled_out(core.build_compact_neighbors(structures, cutoff))
    assert len(set(found)) == len(found), "no pair comes twice"
    # What is closer to the cutoff than rounding may go either way.
    assert surely <= set(found) <= set(map(tuple, rows.tolist()))


def test_large_crystals_have_the_neighbors_of_small_ones(threads):
    """Many bins along each axis, atoms in random order, some cells away."""
    atoms = ase.build.bulk("Al", cubic=True, a=4.05).repeat((9, 5, 7))
    random = np.random.default_rng(0)
    atoms.positions += random.normal(0.0, 0.1, atoms.positions.shape)
    atoms.positions += random.integers(-2, 3, atoms.positions.shape) @ atoms.cell.array
    structures = Structures.from_ase(atoms[random.permutation(len(atoms))])
    for cutoff in (2.9, 6.3):
        compact = core.build_compact_neighbors(structures, cutoff)
        assert spelled_out(compact) == vesin_pairs(structures, cutoff)


def test_distant_atoms_need_no_memory_for_the_space_between():
    atoms = ase.Atoms("H4", [(0, 0, 0), (1, 0, 0), (3e5, -2e5, 1e5), (3e5, -2e5, 1e5 + 1.0)])
    compact = core.build_compact_neighbors(Structures.from_ase(atoms), 1.5)
    assert compact.row_ptr.tolist() == [0, 1, 2, 3, 4]
    assert compact.neighbor.tolist() == [1, 0, 3, 2]
    assert compact.image is None


def test_the_list_does_not_depend_on_the_threads():
    structures = Structures.from_ase([rattled(atoms) for atoms in CASES.values()])
    lists = []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        lists.append(core.build_compact_neighbors(structures, 5.0))
    torch.set_num_threads(1)
    for other in lists[1:]:
        assert torch.equal(other.neighbor, lists[0].neighbor)
        assert torch.equal(other.image, lists[0].image)


def test_nothing_has_no_neighbors():
    empty = Structures.from_ase([ase.Atoms(), ase.Atoms("H"), ase.Atoms()])
    compact = core.build_compact_neighbors(empty, 3.0)
    assert compact.row_ptr.tolist() == [0, 0]
    assert compact.n_pairs == 0


def test_faulty_cells_and_positions_are_refused():
    hole = ase.Atoms("H", cell=[3, 3, 0], pbc=True, info={"frame_id": "a.xyz:3"})
    with pytest.raises(DataError, match=r"a\.xyz:3: periodic along lattice vector 3"):
        core.build_compact_neighbors(Structures.from_ase(hole), 3.0)
    nan = ase.Atoms("H", [(np.nan, 0, 0)])
    with pytest.raises(DataError, match="not finite"):
        core.build_compact_neighbors(Structures.from_ase(nan), 3.0)
    tiny = ase.Atoms("H", cell=[1e-7, 5, 5], pbc=True)
    with pytest.raises(ModelError, match="far smaller than the cutoff"):
        core.build_compact_neighbors(Structures.from_ase(tiny), 3.0)
    apart = ase.Atoms("H2", [(0, 0, 0), (2e5, 2e5, 1)], cell=[2, 2, 2], pbc=True)
    with pytest.raises(ModelError, match="at most 65536 fit: wrap the positions"):
        core.build_compact_neighbors(Structures.from_ase(apart), 3.0)


def test_native_dynamics_pack_their_list():
    """The calculator's native path never spells out its pairs."""
    torch.manual_seed(0)
    model = HIPNN(SpeciesTable.from_symbols(["Al"]), 4, 4, 1.9, 4.0, 4.5, 1, 1, 1).float()
    atoms = rattled(ase.build.bulk("Al", cubic=True).repeat(4))
    energies = []
    for kernels in ("native", "torch"):
        atoms.calc = PotstillCalculator(model, core=kernels)
        energies.append(atoms.get_potential_energy())
        packed = isinstance(atoms.calc._list, core.CompactNeighbors)
        assert packed == (kernels == "native")
    assert energies[0] == pytest.approx(energies[1], rel=1e-6)
