"""Native kernels against their PyTorch twin, on random systems and on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from potstill import core
from potstill.models import HIPNN
from potstill.models.base import Edges
from potstill.models.prior import ZBL
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import NeighborList, SpeciesTable, Structures

if not core.available():
    pytest.skip(f"no native kernels: {core.why_unavailable()}", allow_module_level=True)

#: Relative to the largest entry of an array.
TOLERANCES = {torch.float64: 2e-12, torch.float32: 2e-5}
ELEMENTS = ["Al", "Cu", "Ni"]


@pytest.fixture(params=list(core.instruction_sets()))
def instructions(request):
    if not core.instruction_sets()[request.param]:
        pytest.skip(f"this processor cannot run {request.param}")
    core.select_instruction_set(request.param)
    yield request.param
    core.select_instruction_set(None)


def make_model(
    n_species: int,
    l_max: int,
    n_layers: int,
    *,
    width: int = 7,
    n_atom_layers: int = 2,
    cutoff_function: str = "cosine_squared",
    dtype: torch.dtype = torch.float64,
) -> HIPNN:
    torch.manual_seed(1)
    table = SpeciesTable.from_symbols(ELEMENTS[:n_species])
    shape = (width, 5, 1.5, 4.0, 5.0, n_atom_layers, n_layers, l_max, 1e-3, cutoff_function)
    return HIPNN(table, *shape).to(dtype)


def make_structures(model: HIPNN, seed: int = 0) -> Structures:
    """Crystals with tiny cells, a molecule, an isolated atom and a slab, all disturbed."""
    rng = np.random.default_rng(seed)
    slab = bulk("Al", cubic=True).repeat((2, 1, 2))
    slab.pbc = (True, True, False)
    open_cluster = Atoms("Al5", positions=3.0 * rng.random((5, 3)) * [1.0, 2.0, 3.0])
    frames = [slab, bulk("Al"), open_cluster, Atoms("Al"), bulk("Al", cubic=True)]
    names = list(model.species_table.names)
    for atoms in frames:
        atoms.positions += 0.2 * rng.standard_normal(atoms.positions.shape)
        atoms.symbols[:] = rng.choice(names, len(atoms))
    return Structures.from_ase(frames).with_species_table(model.species_table)


def assert_close(native: Tensor, twin: Tensor, dtype: torch.dtype, what: str) -> None:
    assert native.shape == twin.shape, what
    scale = float(twin.detach().abs().max()) if twin.numel() else 0.0
    error = float((native.double() - twin.detach().double()).abs().max()) if twin.numel() else 0.0
    assert error <= TOLERANCES[dtype] * max(scale, 1e-6), f"{what}: {error:.2g} of {scale:.2g}"


def compare_pass(
    model: HIPNN, structures: Structures, neighbors: NeighborList, n_threads: int = 1
) -> None:
    """Terms, pair gradients and parameter gradients of random weights equal the twin's."""
    r_ij = pair_vectors(structures, neighbors).to(model.dtype).requires_grad_(True)
    edges = Edges(neighbors.center, neighbors.neighbor)
    tap = "hierarchical_energies"
    local = model(structures.species, edges, r_ij, structures.n_atoms, (tap,))
    terms = local.features[tap]
    weights = torch.randn(terms.shape, dtype=torch.float64)
    inputs = [r_ij, *model.parameters()]
    twin = torch.autograd.grad((weights * terms).sum(), inputs, materialize_grads=True)
    parameters = model.native_parameters()
    result = core.hipnn_pass(
        parameters,
        structures.species,
        core.compact_neighbors(neighbors, structures.n_atoms),
        r_ij,
        weights,
        parameter_gradient=True,
        n_threads=n_threads,
    )
    assert_close(result.terms, terms, model.dtype, "terms")
    assert_close(result.gradient, twin[0], model.dtype, "dE/dr_ij")
    names = parameters.shape.parameter_shapes
    parts = parameters.shape.split(result.parameter_gradient)
    # Sums over atoms may cancel, more so for biases: errors count against the largest gradient.
    largest = max(float(g.abs().max()) for g in twin[1:])
    for name, native, expected in zip(names, parts, twin[1:], strict=True):
        error = float((native - expected.double()).abs().max())
        assert error <= TOLERANCES[model.dtype] * largest, name


#: Species, l_max, interaction layers, cutoff function, threads.
CASES = [
    (1, 0, 1, "cosine_squared", 1),
    (1, 1, 1, "cosine_squared", 2),
    (1, 2, 2, "polynomial", 1),
    (2, 1, 1, "polynomial", 1),
    (2, 0, 3, "cosine_squared", 2),
    (3, 2, 1, "cosine_squared", 1),
    (3, 1, 3, "polynomial", 2),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_pass_equals_twin(instructions, dtype, case):
    n_species, l_max, n_layers, cutoff_function, n_threads = case
    model = make_model(n_species, l_max, n_layers, cutoff_function=cutoff_function, dtype=dtype)
    structures = make_structures(model)
    neighbors = build_neighbor_list(structures, 5.6)  # some pairs lie beyond the cutoff
    compare_pass(model, structures, neighbors, n_threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_md_equals_twin(instructions, dtype, case):
    n_species, l_max, n_layers, cutoff_function, n_threads = case
    model = make_model(n_species, l_max, n_layers, cutoff_function=cutoff_function, dtype=dtype)
    prior = ZBL(model.species_table, inner=1.0, cutoff=3.0)
    zbl = core.ZblParameters(prior.nuclear_charge, prior.inner, prior.cutoff)
    batch = make_structures(model)
    for k in range(batch.n_systems):
        structures = batch[k]
        compare_md(model, structures, n_threads)
        compare_md(model, structures, n_threads, prior, zbl)


def compare_md(model, structures, n_threads, prior=None, zbl=None):
    neighbors = build_neighbor_list(structures, 6.0)  # a skin of 1 Å
    wanted = ("forces", "stress", "atomic_energies")
    twin = model.predict(structures, neighbors, wanted).properties.values
    if prior is not None:
        repulsion = prior.predict(structures, neighbors, wanted)
        twin = {name: twin[name] + repulsion[name] for name in wanted}
    result = core.hipnn_md(
        model.native_parameters(),
        structures.species,
        core.compact_neighbors(neighbors, structures.n_atoms),
        structures.positions,
        structures.cell[0],
        zbl=zbl,
        virial=True,
        n_threads=n_threads,
    )
    # Forces and virial are sums that nearly cancel in crystals: pairs set the scale.
    scale = max(1.0, float(twin["forces"].abs().max()))
    tolerance = TOLERANCES[model.dtype]
    torch.testing.assert_close(
        result.energies, twin["atomic_energies"].double(), rtol=tolerance, atol=tolerance
    )
    difference = (result.forces - twin["forces"]).abs().max()
    assert float(difference) <= 5 * tolerance * scale
    if bool(structures.pbc.all()):
        virial = twin["stress"][0] * structures.volume[0]
        symmetric = 0.5 * (result.virial + result.virial.T)
        scale = max(1.0, float(virial.abs().max()))
        assert float((symmetric - virial).abs().max()) <= 5 * tolerance * scale


def test_zbl_alone_equals_twin():
    table = SpeciesTable.from_symbols(["Al", "Cu"])
    prior = ZBL(table, inner=1.0, cutoff=3.0)
    structures = make_structures(make_model(2, 0, 1))[0]
    neighbors = build_neighbor_list(structures, 4.0)
    twin = prior.predict(structures, neighbors, ("forces", "atomic_energies"))
    result = core.hipnn_md(
        None,
        structures.species,
        core.compact_neighbors(neighbors, structures.n_atoms),
        structures.positions,
        structures.cell[0],
        zbl=core.ZblParameters(prior.nuclear_charge, prior.inner, prior.cutoff),
    )
    assert float(twin["atomic_energies"].sum()) > 0
    assert_close(result.energies, twin["atomic_energies"], torch.float64, "energies")
    assert_close(result.forces, twin["forces"], torch.float64, "forces")


def test_parameters_are_those_of_the_model():
    for n_species, l_max, n_layers, width in ((1, 0, 1, 7), (2, 1, 2, 7), (3, 2, 3, 3)):
        model = make_model(n_species, l_max, n_layers, width=width)
        parameters = model.native_parameters()
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert parameters.shape.parameter_shapes == expected
        assert list(parameters.shape.parameter_shapes) == list(expected)
        assert parameters.shape._native is not None
        assert parameters.flat().shape == (parameters.shape.n_parameters,)
