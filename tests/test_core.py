"""Native kernels against their PyTorch twin, on random systems and on every instruction set."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill import core
from potstill.errors import ConfigError, ModelError
from potstill.models import HIPNN
from potstill.models.base import Edges
from potstill.models.prior import ZBL
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import NeighborList, Structures

if not core.available():
    pytest.skip(f"no native kernels: {core.why_unavailable()}", allow_module_level=True)

#: Relative to the largest entry of an array.
TOLERANCES = {torch.float64: 2e-12, torch.float32: 2e-5}
ELEMENTS = ["Al", "Cu", "Ni"]
SMOOTH = {"invariants": "smooth", "n_channels": 4}


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
    n_sensitivities: int = 5,
    dtype: torch.dtype = torch.float64,
    **named: Any,
) -> HIPNN:
    torch.manual_seed(1)
    table = SpeciesTable.from_symbols(ELEMENTS[:n_species])
    shape = (width, n_sensitivities, 1.5, 4.0, 5.0, n_atom_layers, n_layers, l_max, 1e-3)
    model = HIPNN(table, *shape, cutoff_function, **named).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith(("whitening", "center")):  # as if taken from data
            buffer.add_(0.2 * torch.randn_like(buffer))
    return model


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
    names = [name for name, _ in model.named_parameters()]
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
    # Kernels derive by what they take, which whitening makes of the parameters.
    by_taken = parameters.shape.split(result.parameter_gradient.to(model.dtype))
    taken = [(t, g) for t, g in zip(parameters.tensors, by_taken, strict=True) if t.numel()]
    total = sum((tensor * gradient).sum() for tensor, gradient in taken)
    parts = torch.autograd.grad(total, list(model.parameters()))
    # Sums over atoms may cancel, more so for biases: errors count against the largest gradient.
    largest = max(float(g.abs().max()) for g in twin[1:])
    for name, native, expected in zip(names, parts, twin[1:], strict=True):
        error = float((native - expected.double()).abs().max())
        assert error <= TOLERANCES[model.dtype] * largest, name


#: Species, l_max, interaction layers, cutoff function, threads, and what else is not usual.
#: Fewer radial functions for the tensors of some ranks.
FEW = {"n_sensitivities": 10, "n_high_sensitivities": 5}

CASES = [
    (1, 0, 1, "cosine_squared", 1, {}),
    (1, 1, 1, "cosine_squared", 2, {}),
    (1, 2, 2, "polynomial", 1, {}),
    (2, 1, 1, "polynomial", 1, {}),
    (2, 0, 3, "cosine_squared", 2, {}),
    (3, 2, 1, "cosine_squared", 1, {}),
    (3, 1, 3, "polynomial", 2, {}),
    (1, 0, 1, "polynomial", 1, {**SMOOTH, "n_sensitivities": 1}),
    (2, 1, 1, "polynomial", 2, {**SMOOTH, "n_sensitivities": 2}),
    (1, 2, 2, "polynomial", 1, {**SMOOTH, "n_sensitivities": 17}),
    (3, 3, 1, "cosine_squared", 1, {**SMOOTH, "n_channels": 9}),
    (2, 4, 2, "polynomial", 2, SMOOTH),
    (1, 4, 1, "polynomial", 1, {**SMOOTH, "n_sensitivities": 17, "n_channels": 1}),
    (2, 0, 2, "polynomial", 1, SMOOTH),
    (1, 3, 3, "polynomial", 2, {**SMOOTH, "n_sensitivities": 1}),
    (2, 1, 1, "polynomial", 1, {**SMOOTH, "n_triples": 2}),
    (1, 2, 2, "polynomial", 2, {**SMOOTH, "n_triples": 4}),
    (2, 3, 1, "polynomial", 1, {**SMOOTH, "n_triples": 1}),
    (1, 4, 2, "polynomial", 1, {**SMOOTH, "n_triples": 3}),
    (1, 4, 1, "polynomial", 1, {**SMOOTH, **FEW}),
    (2, 4, 2, "polynomial", 2, {**SMOOTH, "n_sensitivities": 6, "n_high_sensitivities": 1}),
    (3, 3, 1, "polynomial", 2, {**SMOOTH, "n_sensitivities": 5, "n_high_sensitivities": 4}),
    (3, 4, 1, "cosine_squared", 2, {**SMOOTH, "n_channels": 9, "n_triples": 9}),
    (2, 3, 1, "polynomial", 1, {**SMOOTH, **FEW, "first_high_rank": 1}),
    (1, 4, 2, "polynomial", 2, {**SMOOTH, **FEW, "first_high_rank": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_pass_equals_twin(instructions, dtype, case):
    *sizes, cutoff_function, n_threads, named = case
    model = make_model(*sizes, cutoff_function=cutoff_function, dtype=dtype, **named)
    structures = make_structures(model)
    neighbors = build_neighbor_list(structures, 5.6)  # some pairs lie beyond the cutoff
    compare_pass(model, structures, neighbors, n_threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_md_equals_twin(instructions, dtype, case):
    *sizes, cutoff_function, n_threads, named = case
    model = make_model(*sizes, cutoff_function=cutoff_function, dtype=dtype, **named)
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
        prior=zbl,
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
        prior=core.ZblParameters(prior.nuclear_charge, prior.inner, prior.cutoff),
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
    for l_max in (0, 4):
        model = make_model(2, l_max, 2, **SMOOTH)
        shapes = model.native_parameters().shape.parameter_shapes
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert {name: shape for name, shape in shapes.items() if 0 not in shape} == expected


def test_kernels_see_every_change_of_the_parameters(monkeypatch):
    """What they are given is derived again after a change, and only then."""
    derived = []
    given = HIPNN.native_parameters
    monkeypatch.setattr(HIPNN, "native_parameters", lambda m: derived.append(m) or given(m))
    model, other = make_model(1, 2, 1, **SMOOTH), make_model(1, 2, 1, **SMOOTH)
    structures = make_structures(model)
    neighbors = build_neighbor_list(structures, model.cutoff)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)

    def check(model: HIPNN, n_derived: int) -> None:
        derived.clear()
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                native = model.evaluate(structures, neighbors)
        model.use_core("torch")
        twin = model.evaluate(structures, neighbors)
        model.use_core("auto")
        assert_close(native.forces, twin.forces, model.dtype, "forces")
        assert_close(native.terms, twin.terms, model.dtype, "terms")
        assert len(derived) == n_derived

    layer = model.blocks[0][0].layer
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)

    def train() -> None:
        pairs = core.compact_neighbors(neighbors, structures.n_atoms)
        r_ij, weights = pair_vectors(structures, neighbors), torch.ones(structures.n_atoms, 2)
        energy = model.native_kernels().weighted_energy
        energy(structures.species, pairs, r_ij, weights.double()).backward()
        optimizer.step()

    check(model, 1)
    check(model, 0)
    for change in (
        lambda: layer.tensor_weights[1].data.mul_(1.5),  # no new version of the tensor
        lambda: layer.whitening.add_(0.1),
        lambda: layer.center.detach().numpy().__iadd__(0.1),
        lambda: layer.selfint.register_parameter(
            "bias", torch.nn.Parameter(torch.ones(7).double())
        ),
        train,
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.float(),
        lambda: model.double(),
    ):
        change()
        check(model, 1)
        check(model, 0)
    copy = deepcopy(model)
    model.energy_layers[1].weight.data.zero_()
    check(copy, 1)
    check(model, 1)
    check(pickle.loads(pickle.dumps(copy)), 1)
    check(copy, 0)


# -- random systems ------------------------------------------------------------------------------


@st.composite
def systems(draw) -> tuple[Atoms, int]:
    """Any of: tiny cells, open directions, one atom, isolated atoms, several species."""
    n_atoms = draw(st.integers(1, 6))
    n_species = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    length = draw(st.sampled_from([2.6, 3.5, 6.0, 30.0]))
    cell = length * (np.eye(3) + 0.2 * rng.uniform(-1, 1, (3, 3)))
    positions = rng.random((n_atoms, 3)) @ cell
    pbc = [draw(st.booleans()) for _ in range(3)]
    atoms = Atoms("Al" * n_atoms, positions=positions, cell=cell, pbc=pbc)
    atoms.symbols[:] = rng.choice(ELEMENTS[:n_species], n_atoms)
    return atoms, n_species


@settings(max_examples=30, deadline=None, derandomize=True)
@given(systems(), st.integers(0, 2), st.integers(1, 2), st.integers(1, 2))
def test_random_systems_equal_twin(system, l_max, n_layers, n_threads):
    check_random_system(system, n_threads, l_max=l_max, n_layers=n_layers)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    systems(),
    st.integers(0, 4),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2, 3, 8, 17]),
    st.sampled_from([1, 3, 8, 9]),
)
def test_random_systems_equal_the_smooth_twin(
    system, l_max, n_layers, n_threads, n_sens, n_channels
):
    named = dict(invariants="smooth", n_sensitivities=n_sens, n_channels=n_channels)
    check_random_system(system, n_threads, l_max=l_max, n_layers=n_layers, **named)


def check_random_system(system, n_threads, **named):
    atoms, n_species = system
    model = make_model(n_species, width=4, n_atom_layers=1, **named)
    structures = Structures.from_ase(atoms).with_species_table(model.species_table)
    neighbors = build_neighbor_list(structures, 5.5)
    if neighbors.n_pairs and float(pair_vectors(structures, neighbors).norm(dim=1).min()) < 0.3:
        return  # 1/r - 1/mu leaves the range in which twelve digits mean anything
    compare_pass(model, structures, neighbors, n_threads)


# -- what callers rely on ------------------------------------------------------------------------


def prepared(dtype: torch.dtype = torch.float64, n_layers: int = 1, **named: Any) -> tuple:
    model = make_model(2, 1, n_layers, dtype=dtype, **named)
    structures = make_structures(model)
    neighbors = build_neighbor_list(structures, 5.0)
    compact = core.compact_neighbors(neighbors, structures.n_atoms)
    return model, structures, neighbors, compact


@pytest.mark.parametrize("named", [{}, SMOOTH], ids=["norms", "smooth"])
def test_the_same_number_of_threads_gives_the_same_bits(named):
    model, structures, neighbors, compact = prepared(torch.float32, n_layers=2, **named)
    r_ij = pair_vectors(structures, neighbors)
    results = [
        core.hipnn_pass(
            model.native_parameters(),
            structures.species,
            compact,
            r_ij,
            parameter_gradient=True,
            n_threads=2,
        )
        for _ in range(3)
    ]
    for other in results[1:]:
        assert torch.equal(other.terms, results[0].terms)
        assert torch.equal(other.gradient, results[0].gradient)
        assert torch.equal(other.parameter_gradient, results[0].parameter_gradient)


@pytest.mark.parametrize("named", [{}, SMOOTH], ids=["norms", "smooth"])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_pairs_far_beyond_the_cutoff_count_nothing(named, kernels):
    """Polynomials of 24 functions would be 1e38 there: they must not meet the cutoff's zero."""
    model = make_model(1, 2, 2, dtype=torch.float32, n_sensitivities=24, **named)
    model.use_core(kernels)
    atoms = Atoms("Al3", positions=[(0, 0, 0), (2.0, 1.0, 0.5), (0, 0, 600.0)])
    structures = Structures.from_ase(atoms).with_species_table(model.species_table)
    wanted = ("forces", "atomic_energies")
    found = model.predict(structures, build_neighbor_list(structures, 700.0), wanted)
    expected = model.predict(structures, build_neighbor_list(structures, 5.0), wanted)
    for name in wanted:
        assert_close(found[name], expected[name], torch.float32, name)


def test_compact_neighbors_hold_the_same_pairs():
    _, structures, neighbors, _ = prepared()
    compact = core.compact_neighbors(neighbors, structures.n_atoms)
    counts = torch.bincount(neighbors.center, minlength=structures.n_atoms)
    assert torch.equal(compact.row_ptr.diff(), counts)
    assert torch.equal(compact.neighbor.long(), neighbors.neighbor)
    assert compact.image is not None
    assert torch.equal(compact.images[compact.image.to(torch.int64)].long(), neighbors.shifts)
    empty = build_neighbor_list(structures, 0.1)
    compact = core.compact_neighbors(empty, structures.n_atoms)
    assert compact.n_pairs == 0
    assert compact.image is None


@pytest.mark.parametrize("named", [{}, SMOOTH], ids=["norms", "smooth"])
def test_empty_systems(named):
    model = make_model(1, 1, 1, **named)
    none = torch.zeros(0, dtype=torch.int64)
    empty = NeighborList(none, none, torch.zeros(0, 3, dtype=torch.int64), none, 5.0)
    compact = core.compact_neighbors(empty, 0)
    vectors = torch.zeros(0, 3, dtype=torch.float64)
    parameters = model.native_parameters()
    result = core.hipnn_pass(parameters, none, compact, vectors, parameter_gradient=True)
    assert result.terms.shape == (0, 2)
    assert float(result.parameter_gradient.abs().max()) == 0.0
    md = core.hipnn_md(parameters, none, compact, vectors, torch.zeros(3, 3).double(), virial=True)
    assert md.energies.shape == (0,)
    assert float(md.virial.abs().max()) == 0.0


@dataclass
class Domain:
    """Some atoms of a periodic system, then ghosts: all neighbors that are not among them."""

    owners: Tensor
    neighbors: core.CompactNeighbors
    positions: Tensor

    @classmethod
    def of(cls, structures: Structures, neighbors: NeighborList, local: Tensor) -> Domain:
        index = torch.full((structures.n_atoms,), -1).index_put((local,), torch.arange(len(local)))
        pairs = index[neighbors.center] >= 0
        neighbor, shifts = neighbors.neighbor[pairs], neighbors.shifts[pairs]
        inside = (index[neighbor] >= 0) & (shifts == 0).all(dim=1)
        keys = torch.cat([neighbor[:, None], shifts], dim=1)[~inside]
        ghosts, ghost = torch.unique(keys, dim=0, return_inverse=True)
        listed = index[neighbor]
        listed[~inside] = len(local) + ghost
        pairs = NeighborList(
            index[neighbors.center[pairs]],
            listed,
            torch.zeros_like(shifts),
            torch.tensor([len(listed)]),
            neighbors.cutoff,
        )
        owners = torch.cat([local, ghosts[:, 0]])
        shifts = torch.cat([torch.zeros(len(local), 3), ghosts[:, 1:]]).double()
        positions = structures.positions[owners] + shifts @ structures.cell[0]
        return cls(owners, core.compact_neighbors(pairs, len(local)), positions)

    def inputs(self, structures: Structures) -> tuple:
        species = structures.species[self.owners]
        return species, self.neighbors, self.positions, structures.cell[0]


@pytest.mark.parametrize("named", [{}, SMOOTH], ids=["norms", "smooth"])
def test_ghosts_carry_their_owners_forces(named):
    """A periodic cell written out as local atoms and ghosts gives the same energies and forces."""
    model = make_model(2, 2, 1, **named)
    structures = make_structures(model)[4]
    neighbors = build_neighbor_list(structures, 5.0)
    domain = Domain.of(structures, neighbors, torch.arange(structures.n_atoms))
    result = core.hipnn_md(model.native_parameters(), *domain.inputs(structures))
    twin = model.predict(structures, neighbors, ("forces", "atomic_energies"))
    folded = torch.zeros_like(structures.positions).index_add(0, domain.owners, result.forces)
    assert_close(result.energies, twin["atomic_energies"], torch.float64, "energies")
    assert_close(folded, twin["forces"], torch.float64, "forces")
    several = make_model(2, 2, 2).native_parameters()
    with pytest.raises(ModelError, match="without ghosts, or one call per layer"):
        core.hipnn_md(several, *domain.inputs(structures))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("l_max", "n_layers", "named"),
    [
        (0, 1, {}),
        (1, 2, {}),
        (2, 2, {}),
        (1, 3, {}),
        (4, 1, SMOOTH),
        (3, 2, SMOOTH),
        (4, 3, SMOOTH),
    ],
)
def test_two_domains_layer_by_layer_equal_the_whole(
    instructions, dtype, tolerance, l_max, n_layers, named
):
    """Features go to the ghosts, their derivatives come back: an engine's work, done by hand."""
    model = make_model(2, l_max, n_layers, dtype=dtype, **named)
    prior = ZBL(model.species_table, inner=1.0, cutoff=3.0)
    zbl = core.ZblParameters(prior.nuclear_charge, prior.inner, prior.cutoff)
    atoms = bulk("Al", cubic=True).repeat((3, 1, 2))
    atoms.rattle(0.2, seed=1)
    atoms.symbols[::3] = "Cu"
    structures = Structures.from_ase(atoms).with_species_table(model.species_table)
    neighbors = build_neighbor_list(structures, 5.5)  # a skin of 0.5 Å
    compact = core.compact_neighbors(neighbors, structures.n_atoms)
    parameters = model.native_parameters()
    whole = core.hipnn_md(
        *(parameters, structures.species, compact, structures.positions, structures.cell[0]),
        prior=zbl,
        virial=True,
    )
    left = structures.positions[:, 0] < 0.4 * float(structures.cell[0, 0, 0])
    domains = [Domain.of(structures, neighbors, side.nonzero()[:, 0]) for side in (left, ~left)]
    layers = [
        core.HipnnLayers(parameters, *d.inputs(structures), prior=zbl, virial=True, n_threads=1 + k)
        for k, d in enumerate(domains)
    ]
    for k in range(n_layers):
        for domain_layers in layers:
            domain_layers.forward(k)
        if k == n_layers - 1:
            break
        everywhere = torch.empty(structures.n_atoms, model.hyper.n_features, dtype=dtype)
        for d, of in zip(domains, layers, strict=True):
            n_local = d.neighbors.n_local
            everywhere[d.owners[:n_local]] = of.features(k)[:n_local]
        for d, of in zip(domains, layers, strict=True):
            of.features(k).copy_(everywhere[d.owners])
    for k in reversed(range(n_layers)):
        for of in layers:
            of.reverse(k)
        if k == 0:
            break
        everywhere = torch.zeros(structures.n_atoms, model.hyper.n_features, dtype=dtype)
        for d, of in zip(domains, layers, strict=True):
            everywhere.index_add_(0, d.owners, of.cotangents(k - 1))
        for d, of in zip(domains, layers, strict=True):
            n_local = d.neighbors.n_local
            of.cotangents(k - 1)[:n_local] = everywhere[d.owners[:n_local]]
    energies, virial = torch.empty_like(whole.energies), torch.zeros_like(whole.virial)
    forces = torch.zeros_like(whole.forces)
    for d, of in zip(domains, layers, strict=True):
        result = of.finish()
        energies[d.owners[: d.neighbors.n_local]] = result.energies
        forces.index_add_(0, d.owners, result.forces)
        virial += result.virial
    for name, found in (("energies", energies), ("forces", forces), ("virial", virial)):
        expected = getattr(whole, name)
        scale = max(1.0, float(expected.abs().max()))
        assert float((found - expected).abs().max()) <= tolerance * scale, name


def test_layers_are_taken_in_their_order():
    model = make_model(1, 1, 2)
    structures = make_structures(model)[0]
    compact = core.compact_neighbors(build_neighbor_list(structures, 5.0), structures.n_atoms)
    layers = core.HipnnLayers(
        *(model.native_parameters(), structures.species, compact),
        *(structures.positions, structures.cell[0]),
        forces=False,
    )
    with pytest.raises(ModelError, match="forward of layer 1 is not the next step"):
        layers.forward(1)
    layers.forward(0)
    with pytest.raises(ModelError, match="no features to hand on"):
        layers.features(1)
    with pytest.raises(ModelError, match="steps left"):
        layers.finish()
    layers.forward(1)
    with pytest.raises(ModelError, match="reverse of layer 1 is not the next step"):
        layers.reverse(1)  # no forces were asked for
    assert layers.finish().forces is None


def test_wrong_arrays_are_refused():
    model, structures, neighbors, compact = prepared()
    parameters, r_ij = model.native_parameters(), pair_vectors(structures, neighbors)
    with pytest.raises(ModelError, match="r_ij must be"):
        core.hipnn_pass(parameters, structures.species, compact, r_ij[:-1])
    with pytest.raises(ModelError, match="weights must be"):
        core.hipnn_pass(parameters, structures.species, compact, r_ij, torch.ones(3, 2))
    with pytest.raises(ModelError, match="species 2 of 2"):
        core.hipnn_pass(parameters, structures.species + 1, compact, r_ij)
    beyond = replace(compact, neighbor=compact.neighbor + structures.n_atoms)
    with pytest.raises(ModelError, match="does not exist"):
        core.hipnn_pass(parameters, structures.species, beyond, r_ij)
    with pytest.raises(ModelError, match="compute in float32 or float64"):
        make_model(2, 1, 1).half().native_parameters()
    # The kernels check what a shape could ask for beyond the models' own limits.
    norms = replace(parameters.shape, l_max=3)
    wrong = core.HipnnParameters(norms, tuple(map(torch.zeros, norms.parameter_shapes.values())))
    with pytest.raises(ModelError, match="hyper-parameters are out of range"):
        core.hipnn_pass(wrong, structures.species, compact, r_ij)


# -- training's pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("named", [{}, SMOOTH], ids=["norms", "smooth"])
def test_weighted_energy_has_the_gradients_of_the_pass(named):
    model, structures, neighbors, compact = prepared(n_layers=2, **named)
    parameters, r_ij = model.native_parameters(), pair_vectors(structures, neighbors)
    weights = torch.randn(structures.n_atoms, 3, dtype=torch.float64)
    arguments = (parameters, structures.species, compact, r_ij, weights)
    total = core.weighted_energy(*arguments)
    found = torch.autograd.grad(3.0 * total, parameters.tensors)
    result = core.hipnn_pass(*arguments, parameter_gradient=True)
    assert float(total.detach()) == float((weights * result.terms).sum())
    expected = parameters.shape.split(result.parameter_gradient)
    for native, direct in zip(found, expected, strict=True):
        torch.testing.assert_close(native, 3.0 * direct, rtol=1e-14, atol=1e-14)
    total = core.weighted_energy(*arguments)
    first = torch.autograd.grad(total.square(), parameters.tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


@pytest.mark.parametrize("named", [{}, SMOOTH], ids=["norms", "smooth"])
def test_copies_side_by_side_sum_their_energies(named):
    """Two places of one batch in one call, as central differences take them."""
    model, structures, neighbors, compact = prepared(**named)
    moved = replace(structures, positions=structures.positions + 0.01)
    moved.positions[0] += 0.1
    copies = [(at, torch.randn(at.n_atoms, model.n_terms).double()) for at in (structures, moved)]
    total = model.weighted_energy(copies, compact)
    each = [model.weighted_energy([copy], neighbors) for copy in copies]
    parameters = list(model.parameters())
    found = torch.autograd.grad(total, parameters)
    expected = torch.autograd.grad(each[0] + each[1], parameters)
    torch.testing.assert_close(total, each[0] + each[1])
    torch.testing.assert_close(found, expected)


# -- instruction sets and the compiled program ---------------------------------------------------


def test_instruction_set_from_the_environment():
    program = "from potstill import core; print(core.instruction_set())"

    def run(value: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "POTSTILL_SIMD": value}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run("baseline").stdout.strip() == "baseline"
    wrong = run("mmx")
    assert "POTSTILL_SIMD is 'mmx', but known are baseline" in wrong.stderr
    with pytest.raises(ConfigError, match="known are baseline"):
        core.select_instruction_set("mmx")


def test_description_names_the_instruction_set():
    assert core.instruction_set() in core.describe_core()
    assert core.why_unavailable() is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_sanitizers_find_nothing(tmp_path):
    root = Path(__file__).resolve().parents[1]
    configure = ["cmake", "-S", str(root), "-B", str(tmp_path), "-DPOTSTILL_TESTS=ON"]
    for command in (configure, ["cmake", "--build", str(tmp_path)], [str(tmp_path / "test_core")]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all passed\n")
