"""GemNet-OC: graphs against loops, continuity at every cutoff, caps, scale factors, training."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk
from scipy.special import eval_legendre, sph_harm_y
from torch import Tensor

from golden.make_gemnet_oc import made_up, structures_of
from potstill.calculators import PotstillCalculator
from potstill.distill.losses import LossTerm
from potstill.errors import DataError, ModelError
from potstill.models import GemNetOC, build_model
from potstill.models.base import Edges
from potstill.models.gemnet_oc import (
    PRESETS,
    GemNetOCSettings,
    fit_scale_factors,
    load_published_weights,
)
from potstill.models.gemnet_oc.bases import Angular, circular_basis, radial_basis
from potstill.models.gemnet_oc.graphs import TIE, Graphs, Groups, build_graphs, reverse_pairs
from potstill.models.gemnet_oc.interactions import Bilinear
from potstill.models.gemnet_oc.layers import ScaleFactor, he_orthogonal_
from potstill.models.graph import forces_from_pairs
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.radial import polynomial_envelope
from potstill.species import Species, SpeciesTable
from potstill.structures import Properties, Structures
from potstill.testing import (
    check_batched_equals_single,
    check_extensivity,
    check_forces_are_the_gradient,
    contract_structures,
)
from potstill.train.data import TrainingSet
from potstill.train.initialize import initial_student
from potstill.train.settings import ModelSettings, TrainSettings

TWO = SpeciesTable.from_symbols(["Mg", "O"])

NO_CAPS = dict.fromkeys(
    ["max_neighbors", "max_neighbors_qint", "max_neighbors_aeaint", "max_neighbors_aint"]
)
CAPS = {
    "max_neighbors": 5,
    "max_neighbors_qint": 3,
    "max_neighbors_aeaint": 4,
    "max_neighbors_aint": 9,
}
CUTOFFS = {"cutoff": 3.6, "cutoff_qint": 2.7, "cutoff_aeaint": 3.1, "cutoff_aint": 4.0}


def small(**changes: Any) -> GemNetOC:
    """One block of little width; all interactions, cutoffs of their own, no caps, float64."""
    torch.manual_seed(5)
    sizes = {
        f"emb_size_{name}": 4
        for name in ("trip_in", "trip_out", "quad_in", "quad_out", "aint_in", "aint_out")
    }
    sizes |= dict.fromkeys(["emb_size_rbf", "emb_size_cbf", "emb_size_sbf"], 4)
    depths = dict.fromkeys(
        ["num_blocks", "num_before_skip", "num_after_skip", "num_concat", "num_atom"], 1
    )
    hyperparameters: dict[str, Any] = {
        **sizes,
        **depths,
        **CUTOFFS,
        **NO_CAPS,
        "emb_size_atom": 6,
        "emb_size_edge": 8,
        "num_spherical": 3,
        "num_radial": 6,
        "num_output_afteratom": 1,
        "num_atom_emb_layers": 1,
        "num_global_out_layers": 1,
        "direct_forces": False,
    }
    model = GemNetOC(TWO, **(hyperparameters | changes)).double()
    for factor in model.scale_factors().values():
        factor.scale.fill_(2.0)  # so that every interaction is felt
    return model


def cluster(positions: Any, species: list[int] | None = None, **fields: Any) -> Structures:
    """One open system."""
    positions = torch.as_tensor(positions, dtype=torch.float64)
    n = len(positions)
    return Structures(
        positions=positions,
        species=torch.tensor(species if species is not None else [k % 2 for k in range(n)]),
        system_index=torch.zeros(n, dtype=torch.int64),
        cell=torch.zeros(1, 3, 3, dtype=torch.float64),
        pbc=torch.zeros(1, 3, dtype=torch.bool),
        species_table=TWO,
        **fields,
    )


def some_cluster(n: int = 7, spacing: float = 2.0, seed: int = 3) -> Structures:
    """An open system of n disordered atoms."""
    generator = torch.Generator().manual_seed(seed)
    corners = spacing * torch.cartesian_prod(*[torch.arange(2, dtype=torch.float64)] * 3)[:n]
    noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return cluster(corners + 0.2 * noise)


def graphs_of(model: GemNetOC, structures: Structures) -> tuple[Graphs, Any, Tensor]:
    neighbors = build_neighbor_list(structures, model.cutoff)
    r_ij = pair_vectors(structures, neighbors)
    edges = Edges.of(structures, neighbors)
    return build_graphs(edges, r_ij, structures.n_atoms, model.hyper), neighbors, r_ij


# -- basis functions and layers ------------------------------------------------------------------


def test_circular_basis_is_spherical_harmonics_of_order_zero() -> None:
    angle = torch.linspace(0.0, torch.pi, 50, dtype=torch.float64)
    basis = circular_basis(torch.cos(angle), 7)
    for k in range(7):
        expected = torch.as_tensor(sph_harm_y(k, 0, angle.numpy(), 0.0).real)
        assert torch.allclose(basis[:, k], expected, atol=1e-13)
        legendre = torch.as_tensor(eval_legendre(k, torch.cos(angle).numpy()))
        assert torch.allclose(basis[:, k] / basis[0, k], legendre, atol=1e-13)


@pytest.mark.parametrize("exponent", [5, 6])
def test_envelope_ends_with_two_derivatives(exponent: int) -> None:
    x = torch.tensor([0.0, 0.5, 1.0 - 1e-9, 1.2], dtype=torch.float64, requires_grad=True)
    value = polynomial_envelope(x, 1.0, exponent)
    assert 0.0 < value[1].item() < 1.0
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert value[0].item() == 1.0
    for derivative in (value, first, second):
        assert derivative[2:].abs().max().item() < 1e-6


def test_radial_basis_is_gaussians_of_scaled_distance() -> None:
    settings = GemNetOCSettings(num_radial=5)
    r = torch.tensor([1.5, 3.0, 6.0], dtype=torch.float64)
    basis = radial_basis(r, 6.0, settings)
    width = 0.25  # between the centers 0, 1/4, ..., 1
    for k in range(5):
        gauss = torch.exp(-0.5 * ((r / 6.0 - k * width) / width) ** 2) * polynomial_envelope(
            r / 6.0, 1.0, 5
        )
        assert torch.allclose(basis[:, k], gauss, atol=1e-14)
    assert float(basis[2].abs().max()) == 0.0


def test_initial_weights_are_decorrelated_and_of_unit_variance() -> None:
    torch.manual_seed(0)
    weight = torch.empty(20, 40)
    he_orthogonal_(weight, fan_in=40)
    product = weight @ weight.T
    assert torch.allclose(product.diagonal(), torch.ones(20), atol=0.05)
    assert float((product - product.diagonal().diag()).abs().max()) < 0.1


def test_the_bilinear_layer_is_the_sum_over_triplets() -> None:
    torch.manual_seed(1)
    n_in, n_basis, n_angular, n_out = 3, 4, 5, 6
    layer = Bilinear(n_in, n_basis, n_out).double()
    group = torch.tensor([0, 0, 2, 2, 2, 3])
    member = torch.tensor([1, 4, 0, 1, 3, 2])
    groups = Groups(member, group, 5)
    radial = torch.randn(5, n_basis, n_angular, dtype=torch.float64)
    angular = torch.randn(6, n_angular, dtype=torch.float64)
    x = torch.randn(5, n_in, dtype=torch.float64)
    expected = torch.zeros(5, n_out, dtype=torch.float64)
    weight = layer.dense.weight.view(n_out, n_basis, n_in)
    for t in range(6):
        basis = radial[group[t]] @ angular[t]  # (n_basis,)
        expected[group[t]] += torch.einsum("oba,b,a->o", weight, basis, x[member[t]])
    basis = Angular(groups, radial, groups.spread(angular))
    assert torch.allclose(layer(basis, x), expected, atol=1e-12)
    onto = torch.tensor([1, 1, 0, 0, 1])
    summed = torch.zeros(2, n_out, dtype=torch.float64).index_add(0, onto, expected)
    assert torch.allclose(layer(basis, x, onto, 2), summed, atol=1e-12)


def test_empty_groups() -> None:
    groups = Groups(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 3)
    assert groups.gather(torch.zeros(0, 4)).shape == (3, 0, 4)
    assert groups.spread(torch.zeros(0, 2)).shape == (3, 0, 2)


# -- graphs, against loops over images -----------------------------------------------------------


class Naive:
    """The same graphs by loops over atoms and images."""

    def __init__(self, structures: Structures, model: GemNetOC) -> None:
        neighbors = build_neighbor_list(structures, model.cutoff)
        r_ij = pair_vectors(structures, neighbors)
        self.edges = [
            (int(i), int(j), tuple(shift.tolist()))
            for i, j, shift in zip(
                neighbors.center, neighbors.neighbor, neighbors.shifts, strict=True
            )
        ]
        self.distance = {
            e: float(d) for e, d in zip(self.edges, torch.linalg.norm(r_ij, dim=1), strict=True)
        }

    @staticmethod
    def reverse(edge: Any) -> Any:
        i, j, shift = edge
        return (j, i, tuple(-s for s in shift))

    def nearest(self, cutoff: float, cap: int | None) -> set[Any]:
        chosen = set()
        for i in {e[0] for e in self.edges}:
            mine = sorted(
                (e for e in self.edges if e[0] == i and self.distance[e] < cutoff),
                key=self.distance.__getitem__,
            )
            if cap is not None and len(mine) > cap:  # an image and its opposite tie
                last = self.distance[mine[cap - 1]] + TIE
                mine = [e for e in mine if self.distance[e] <= last]
            chosen |= set(mine)
        return chosen

    def symmetric(self, edges: set[Any]) -> set[Any]:
        return edges | {self.reverse(e) for e in edges}

    def triplets(self, incoming: set[Any], outgoing: set[Any]) -> set[Any]:
        pairs = itertools.product(incoming, outgoing)
        return {(b, c) for b, c in pairs if b[0] == c[0] and b != c}

    def quadruplets(self, main: set[Any], qint: set[Any]) -> Iterator[Any]:
        by_center: dict[int, list[Any]] = {}
        for e in main:
            by_center.setdefault(e[0], []).append(e)
        for q in qint:
            a, b, to_b = q
            images = {(a, (0, 0, 0)), (b, to_b)}
            for c_edge in by_center.get(a, []):
                c = c_edge[1:]
                for d_edge in by_center.get(b, []):
                    d = (d_edge[1], tuple(s + t for s, t in zip(to_b, d_edge[2], strict=True)))
                    if len(images | {c, d}) == 4:
                        yield (c_edge, q, d_edge)


@pytest.mark.parametrize("caps", [NO_CAPS, CAPS], ids=["no caps", "caps"])
@pytest.mark.parametrize("system", [0, 1, 2, 3])
def test_graphs_against_loops(caps: dict[str, Any], system: int) -> None:
    model = small(**caps, cutoff=2.9, cutoff_qint=2.4, cutoff_aeaint=2.6)
    # A small triclinic cell, an open cluster, a slab, and one atom with its images.
    structures = contract_structures(model)[system]
    if system == 0:
        structures = with_one_atom_less(structures)
    graphs, _, r_ij = graphs_of(model, structures)
    naive = Naive(structures, model)
    s = model.hyper

    def edges(graph: Any) -> list[Any]:
        return [naive.edges[k] for k in graph.pair.tolist()]

    main = naive.symmetric(naive.nearest(s.cutoff, s.max_neighbors))
    near = naive.nearest(s.cutoff_aeaint, s.max_neighbors_aeaint)
    middle = naive.nearest(s.cutoff_qint, s.max_neighbors_qint)
    assert set(edges(graphs.main)) == main
    assert set(edges(graphs.aeaint)) == near
    assert set(edges(graphs.aint)) == naive.nearest(s.cutoff_aint, s.max_neighbors_aint)
    assert set(edges(graphs.qint)) == middle
    listed = edges(graphs.main)
    assert [listed[k] for k in graphs.reverse.tolist()] == [naive.reverse(e) for e in listed]

    def triplets(groups: Groups, incoming: Any, outgoing: Any) -> list[Any]:
        first, second = edges(incoming), edges(outgoing)
        rows = zip(groups.member.tolist(), groups.group.tolist(), strict=True)
        return [(first[b], second[c]) for b, c in rows]

    for groups, incoming, outgoing, expected in (
        (graphs.edge_edge, graphs.main, graphs.main, naive.triplets(main, main)),
        (graphs.atom_edge, graphs.aeaint, graphs.main, naive.triplets(near, main)),
        (graphs.edge_atom, graphs.main, graphs.aeaint, naive.triplets(main, near)),
    ):
        found = triplets(groups, incoming, outgoing)
        assert len(found) == len(set(found))
        assert set(found) == expected

    quads = graphs.quadruplets(r_ij)
    through = edges(graphs.qint)
    found = []
    for c, outer, inner in zip(
        quads.paths.group.tolist(),
        quads.path_outer.tolist(),
        quads.paths.member.tolist(),
        strict=True,
    ):
        assert int(quads.outer_edge[outer]) == c
        q = int(quads.outer_through[outer])
        assert int(quads.inner.group[inner]) == q
        found.append((listed[c], through[q], listed[int(quads.inner.member[inner])]))
    assert len(found) == len(set(found))
    assert set(found) == set(naive.quadruplets(main, middle))
    assert found or system == 3


def with_one_atom_less(structures: Structures) -> Structures:
    return replace(
        structures,
        positions=structures.positions[1:],
        species=structures.species[1:],
        system_index=structures.system_index[1:],
    )


def test_caps_keep_ties_and_do_not_depend_on_order() -> None:
    # A square: of two neighbors at one distance, a cap of 1 keeps both.
    square = cluster([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [2.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    caps = dict.fromkeys(NO_CAPS, 1)
    graphs, *_ = graphs_of(small(**caps), square)
    assert graphs.aint.n_edges == 8
    assert graphs.main.n_edges == 8


def test_the_main_graph_is_symmetric_where_caps_bind() -> None:
    # The nearest neighbor of the last atom has a nearer one itself.
    chain = cluster([[0.0, 0.0, 0.0], [1.5, 0.0, 0.0], [3.5, 0.0, 0.0]])
    graphs, *_ = graphs_of(small(**dict.fromkeys(NO_CAPS, 1)), chain)
    assert graphs.main.center.tolist() == [0, 1, 1, 2]
    assert graphs.main.neighbor.tolist() == [1, 0, 2, 1]
    assert graphs.aint.neighbor.tolist() == [1, 0, 1]


def test_pairs_in_one_direction_are_refused() -> None:
    model = small()
    structures = some_cluster()
    neighbors = build_neighbor_list(structures, model.cutoff)
    half = neighbors.center < neighbors.neighbor
    edges = Edges(neighbors.center[half], neighbors.neighbor[half])
    r_ij = pair_vectors(structures, neighbors)[half]
    with pytest.raises(ModelError, match="both directions"):
        model(structures.species, edges, r_ij, structures.n_atoms)


@pytest.mark.parametrize("crystal", ["Al", "Fe", "Mg", "Si"])
def test_hundreds_of_images_find_their_reverses(crystal: str) -> None:
    structures = Structures.from_ase(bulk(crystal))
    neighbors = build_neighbor_list(structures, 12.0)
    assert neighbors.n_pairs > 400
    for dtype in (torch.float64, torch.float32):
        r_ij = pair_vectors(structures, neighbors).to(dtype)
        reverse = reverse_pairs(Edges.of(structures, neighbors), r_ij)
        assert torch.equal(neighbors.shifts[reverse], -neighbors.shifts)
        assert torch.equal(neighbors.center[reverse], neighbors.neighbor)
        assert torch.equal(neighbors.neighbor[reverse], neighbors.center)


def test_quadruplets_go_through_tagged_atoms() -> None:
    model = small()
    structures = some_cluster()
    plain = model.predict(structures)
    tags = torch.tensor([0, 0, 1, 0, 2, 0, 0])
    tagged = replace(structures, tags=tags)
    graphs, *_ = graphs_of(model, tagged)
    touched = (tags[graphs.qint.center] > 0) | (tags[graphs.qint.neighbor] > 0)
    assert bool(touched.all())
    free, *_ = graphs_of(model, structures)
    assert 0 < graphs.qint.n_edges < free.qint.n_edges
    partial = model.predict(tagged)
    assert float((partial["energy"] - plain["energy"]).abs()) > 1e-6
    # Other systems of a batch do not notice, though joining gives them tags of zero.
    both = model.predict(Structures.concatenate([structures, tagged, structures]))
    expected = torch.cat([plain["energy"], partial["energy"], plain["energy"]])
    assert torch.allclose(both["energy"], expected, atol=1e-11)
    every = small(qint_tags=[0, 1, 2]).predict(tagged)
    assert torch.allclose(every["energy"], plain["energy"], atol=1e-11)


def test_the_calculator_passes_tags_on() -> None:
    model = small()
    tagged = replace(some_cluster(), tags=torch.tensor([0, 0, 1, 0, 2, 0, 0]))
    (atoms,) = tagged.to_ase()
    atoms.calc = PotstillCalculator(model)
    expected = model.predict(tagged)["energy"].item()
    assert atoms.get_potential_energy() == pytest.approx(expected, abs=1e-10)
    atoms.set_tags(0)
    atoms.calc.reset()
    untagged = model.predict(some_cluster())["energy"].item()
    assert atoms.get_potential_energy() == pytest.approx(untagged, abs=1e-10)


# -- continuity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUTOFFS)
def test_an_atom_passes_every_cutoff_without_a_jump(name: str) -> None:
    model = small()
    cutoff = getattr(model.hyper, name)
    structures = some_cluster()
    # Atom 0 is moved to the cutoff's distance from the last atom, and a little beyond.
    away = torch.nn.functional.normalize(structures.positions[0] - structures.positions[-1], dim=0)

    def at(distance: float) -> Structures:
        positions = structures.positions.clone()
        positions[0] = positions[-1] + distance * away
        return replace(structures, positions=positions)

    graph = {"cutoff": "main", "cutoff_qint": "qint"}.get(name, name.removeprefix("cutoff_"))
    step = 1e-7 * cutoff
    inside, outside = at(cutoff - step), at(cutoff + step)
    edges = [getattr(graphs_of(model, s)[0], graph).n_edges for s in (inside, outside)]
    assert edges[0] == edges[1] + 2
    before, after = model.predict(inside), model.predict(outside)
    scale = float(before["forces"].abs().max())
    assert scale > 1e-3
    work = float((before["forces"][0] + after["forces"][0]) @ away) * step
    assert abs(float(after["energy"] - before["energy"]) + work) < 1e-10 * scale
    assert float((after["forces"] - before["forces"]).abs().max()) < 1e-4 * scale


def test_four_atoms_pass_through_a_line_without_a_jump() -> None:
    # The dihedral angle c-a-b-d changes by 180 degrees as c passes the line through a and b.
    model = small(dihedral_reg=1e-3)
    y = torch.linspace(-0.02, 0.02, 9, dtype=torch.float64)
    frames = [
        cluster([[-1.8, float(v), 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [2.9, 1.7, 0.3]])
        for v in y
    ]
    prediction = model.predict(Structures.concatenate(frames))
    energy = prediction["energy"]
    force = prediction["forces"].view(-1, 4, 3)[:, 0, 1]
    # Simpson's rule over each pair of intervals.
    work = (force[:-2:2] + 4.0 * force[1:-1:2] + force[2::2]) * (y[1] - y[0]) / 3.0
    change = energy[2::2] - energy[:-2:2]
    assert torch.allclose(change, -work, atol=2e-5 * float(energy.diff().abs().max()))
    assert float(energy.diff().abs().max()) > 1e-7


@pytest.mark.parametrize("off", ["quad", "atom_edge", "edge_atom", "atom"])
def test_every_interaction_counts_and_can_be_switched_off(off: str) -> None:
    structures = some_cluster()
    model = small()
    without = small(**{f"{off}_interaction": False})
    without.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in without.state_dict()}
    )
    assert without.n_parameters < model.n_parameters
    change = without.predict(structures)["energy"] - model.predict(structures)["energy"]
    assert float(change.abs()) > 1e-6
    check_forces_are_the_gradient(without)


def test_caps_that_do_not_bind_change_nothing() -> None:
    model, capped = small(), small(**dict.fromkeys(NO_CAPS, 1000))
    check_forces_are_the_gradient(capped)
    structures = contract_structures(model)
    expected = model.predict(structures)
    found = capped.predict(structures)
    for name in ("energy", "forces"):
        assert torch.equal(found[name], expected[name])


def test_caps_that_bind() -> None:
    # Forces are the gradient as long as no neighbor changes places.
    capped = small(**CAPS)
    structures = some_cluster(8)
    found = capped.predict(structures)
    assert float((found["energy"] - small().predict(structures)["energy"]).abs()) > 1e-6
    direction = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    energies = [
        capped.predict(replace(structures, positions=structures.positions + t * direction))[
            "energy"
        ]
        for t in (1e-5, -1e-5)
    ]
    slope = float(energies[0] - energies[1]) / 2e-5
    assert slope == pytest.approx(-float((found["forces"] * direction).sum()), rel=1e-6)
    check_extensivity(capped)


# -- direct forces -------------------------------------------------------------------------------


def direct() -> GemNetOC:
    return small(**CAPS, direct_forces=True)


def test_direct_forces_turn_with_the_structure() -> None:
    model = direct()
    structures = contract_structures(model)
    before = model.predict(structures)
    assert float(before["forces"].abs().max()) > 1e-3
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    shift = torch.randn(structures.n_systems, 3, generator=generator, dtype=torch.float64)
    for turn in (q, -q):
        moved = structures.positions @ turn.T + shift[structures.system_index]
        turned = replace(structures, positions=moved, cell=structures.cell @ turn.T)
        after = model.predict(turned)
        assert torch.allclose(after["energy"], before["energy"], atol=1e-9)
        assert torch.allclose(after["forces"], before["forces"] @ turn.T, atol=1e-9)


def test_direct_forces_follow_permutations() -> None:
    model = direct()
    structures = contract_structures(model)
    noise = torch.rand(structures.n_atoms, generator=torch.Generator().manual_seed(2))
    order = torch.argsort(structures.system_index + 0.9 * noise)
    permuted = replace(
        structures, positions=structures.positions[order], species=structures.species[order]
    )
    before, after = model.predict(structures), model.predict(permuted)
    assert torch.allclose(after["energy"], before["energy"], atol=1e-10)
    assert torch.allclose(after["forces"], before["forces"][order], atol=1e-10)


def test_direct_forces_of_a_batch_are_those_of_its_systems() -> None:
    model = direct()
    structures = contract_structures(model)
    together = model.predict(structures)
    alone = [model.predict(structures[s]) for s in range(structures.n_systems)]
    for name in ("energy", "forces"):
        expected = torch.cat([prediction[name] for prediction in alone])
        assert torch.allclose(together[name], expected, atol=1e-10)
    check_batched_equals_single(small(**CAPS))


def test_direct_forces_of_one_atom_and_of_none() -> None:
    model = direct()
    one = cluster([[0.0, 0.0, 0.0]])
    assert float(model.predict(one)["forces"].abs().max()) == 0.0
    far = cluster([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]], [0, 0, 0])
    prediction = model.predict(far)
    assert float(prediction["forces"].abs().max()) == 0.0
    assert torch.allclose(prediction["energy"], 3.0 * model.predict(one)["energy"], atol=1e-12)
    periodic = contract_structures(model)[3]  # one atom, its images on a lattice
    assert float(model.predict(periodic)["forces"].abs().max()) < 1e-12


def test_direct_forces_stay_continuous() -> None:
    model = small(direct_forces=True)
    structures = some_cluster()
    away = torch.nn.functional.normalize(structures.positions[0] - structures.positions[-1], dim=0)
    forces = []
    for distance in (CUTOFFS["cutoff"] - 1e-7, CUTOFFS["cutoff"] + 1e-7):
        positions = structures.positions.clone()
        positions[0] = positions[-1] + distance * away
        forces.append(model.predict(replace(structures, positions=positions))["forces"])
    assert float((forces[1] - forces[0]).abs().max()) < 1e-5 * float(forces[0].abs().max())


def test_direct_forces_have_no_stress() -> None:
    with pytest.raises(ModelError, match="no stress"):
        direct().predict(some_cluster(), properties=["stress"])


# -- taps ----------------------------------------------------------------------------------------


def test_edge_taps_say_which_pairs_they_are() -> None:
    model = direct()
    structures = contract_structures(model)
    neighbors = build_neighbor_list(structures, model.cutoff)
    taps = [name for name in model.taps if name.endswith(".edge")] + ["edges"]
    prediction = model.predict(structures, neighbors, taps=taps)
    pairs = prediction.features["edges"][:, 0]
    assert len(pairs) < neighbors.n_pairs
    for name in taps:
        width = model.taps[name].width
        assert prediction.features[name].shape == (len(pairs), width)
    # The last edge embedding gives the forces along the edges, and no others.
    push = model.force(prediction.features["final.edge"])
    r_ij = pair_vectors(structures, neighbors)[pairs]
    force = -push * r_ij / torch.linalg.norm(r_ij, dim=1, keepdim=True)
    total = torch.zeros(structures.n_atoms, 3, dtype=torch.float64)
    total = total.index_add(0, neighbors.center[pairs], force)
    assert torch.allclose(total, prediction["forces"], atol=1e-12)


def test_node_taps() -> None:
    model = small(num_blocks=2)
    structures = some_cluster()
    taps = [name for name, spec in model.taps.items() if spec.kind == "node_scalar"]
    features = model.predict(structures, taps=taps, properties=["atomic_energies"])
    for k in range(3):
        assert features.features[f"interaction_{k}"].shape == (7, 6)
        assert features.features[f"output_{k}"].shape == (7, 6)
    assert model.default_tap in taps
    energies = model.energy(features.features[model.default_tap])[:, 0]
    assert torch.allclose(energies, features["atomic_energies"], atol=1e-12)


def test_two_models_share_a_graph() -> None:
    # So that edge embeddings of teacher and student can be compared row by row.
    teacher, student = direct(), small(**CAPS, direct_forces=True, emb_size_edge=4)
    structures = contract_structures(teacher)
    one, two = (m.predict(structures, taps=["edges"]).features for m in (teacher, student))
    assert torch.equal(one["edges"], two["edges"])


# -- hyper-parameters ----------------------------------------------------------------------------


def test_parameter_counts() -> None:
    """The public configuration of OCP (configs/s2ef/2M/gemnet/gemnet-oc.yml, 83 elements).

    That code counts 38,864,438 parameters: its 54 scale factors are among them, here they are
    buffers.
    """
    table = SpeciesTable.from_atomic_numbers(range(1, 84))
    with torch.device("meta"):  # no numbers, only shapes
        model = build_model("gemnet_oc", table, PRESETS["gemnet_oc"])
        student = build_model("gemnet_oc", table, PRESETS["gemnet_oc_small"])
    assert model.n_parameters == 38_864_384
    assert len(model.scale_factors()) == 54
    assert model.n_parameters + 54 == 38_864_438
    assert model.direct_forces
    assert student.n_parameters == 8_753_408


def test_hyperparameters_rebuild_the_model() -> None:
    model = direct()
    twin = build_model("gemnet_oc", TWO, model.hyperparameters())
    assert twin.hyperparameters() == model.hyperparameters()
    assert twin.hyper == model.hyper
    assert twin.cutoff == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutoff": 5.0}, "cutoff must be at most cutoff_aint"),
        ({"cutoff_qint": 0.0}, "cutoff_qint: .* greater than 0"),
        ({"max_neighbors_aint": 3}, r"max_neighbors \(no cap\) exceeds max_neighbors_aint \(3\)"),
        ({"max_neighbors": 0}, "max_neighbors: .* equal to 1"),
        ({"emb_size_cbf": 1}, "emb_size_cbf: .* equal to 2"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_concat": -1}, "num_concat: .* equal to 0"),
        ({"dihedral_reg": 0.0}, "dihedral_reg: .* greater than 0"),
        ({"rbf": "bessel"}, "rbf: .*'gaussian' .it is 'bessel'"),
    ],
)
def test_bad_hyperparameters(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        small(**changes)


def test_unknown_hyperparameters_are_named() -> None:
    with pytest.raises(ModelError, match="emb_size_atoms"):
        build_model("gemnet_oc", TWO, {"emb_size_atoms": 4})


# -- the published implementation ----------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gemnet_oc_fairchem.json").read_text())


def published_state() -> dict[str, Tensor]:
    return {name: made_up(name, tuple(shape)) for name, shape in GOLDEN["weights"].items()}


def like_published(case: dict[str, Any], **changes: Any) -> GemNetOC:
    hyperparameters = GOLDEN["hyperparameters"] | case["caps"] | {"dihedral_reg": 1e-16}
    model = GemNetOC(TWO, **(hyperparameters | changes)).double()
    load_published_weights(model, published_state())
    return model


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_numbers_of_the_published_code(number: int) -> None:
    case = GOLDEN["cases"][number]
    model = like_published(case)
    structures = structures_of(case)
    prediction = model.predict(structures)
    forces = torch.tensor(case["direct_forces"], dtype=torch.float64)
    assert float(prediction["energy"]) == pytest.approx(case["energy"], abs=1e-10)
    assert float((prediction["forces"] - forces).abs().max()) < 1e-10
    neighbors = build_neighbor_list(structures, model.cutoff)
    edges = Edges.of(structures, neighbors)
    r_ij = pair_vectors(structures, neighbors).requires_grad_(True)
    energies = model(structures.species, edges, r_ij, structures.n_atoms).atomic_energies
    (by_pair,) = torch.autograd.grad(energies.sum(), r_ij)
    gradient = -forces_from_pairs(by_pair, edges, structures.n_atoms)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    assert float(expected.abs().max()) > 1e-2
    assert float((gradient - expected).abs().max()) < 1e-9 * float(expected.abs().max())
    single = model.to(torch.float32).predict(structures)
    assert float(single["energy"]) == pytest.approx(case["energy"], rel=1e-5)


def test_regularized_dihedral_angles_stay_near_the_published_ones() -> None:
    case = GOLDEN["cases"][1]
    default = GemNetOCSettings().dihedral_reg
    model = like_published(case, dihedral_reg=default)
    difference = abs(float(model.predict(structures_of(case))["energy"]) - case["energy"])
    assert 0.0 < difference < 1e-4


def test_weights_that_do_not_fit_are_refused() -> None:
    model = like_published(GOLDEN["cases"][0])
    state = published_state()
    del state["out_energy.linear.weight"]
    with pytest.raises(ModelError, match=r"(?s)do not fit the model: .*energy\.weight"):
        load_published_weights(model, state)
    state = published_state() | {"extra.linear.weight": torch.zeros(2, 2)}
    with pytest.raises(ModelError, match=r"extra\.weight"):
        load_published_weights(model, state)
    beads = SpeciesTable((Species("W", 72.0),))
    other = GemNetOC(beads, **(GOLDEN["hyperparameters"] | NO_CAPS))
    with pytest.raises(ModelError, match="not for beads"):
        load_published_weights(other, published_state())


# -- scale factors -------------------------------------------------------------------------------


@pytest.mark.parametrize("direct_forces", [False, True])
def test_fitted_scale_factors_preserve_the_variance(direct_forces: bool) -> None:
    model = small(direct_forces=direct_forces)
    batches = [some_cluster(8, seed=seed) for seed in (1, 2)]
    fitted = fit_scale_factors(model, batches)
    assert set(fitted) == set(model.scale_factors())
    sums: dict[str, list[float]] = {}
    names = {id(factor): name for name, factor in model.scale_factors().items()}

    def add(factor: ScaleFactor, value: Tensor, reference: Tensor) -> None:
        total = sums.setdefault(names[id(factor)], [0.0, 0.0])
        scaled = value * factor.scale
        total[0] += float(scaled.var(dim=0).mean()) * len(value)
        total[1] += float(reference.var(dim=0).mean()) * len(value)

    for factor in model.scale_factors().values():
        assert factor.observer is None
        factor.observer = add
    for structures in batches:
        model.predict(structures, properties=["energy"])
    assert set(sums) == set(fitted)
    for name, (after, before) in sums.items():
        assert after / before == pytest.approx(1.0, abs=1e-9), name
    assert max(abs(f - 1.0) for f in fitted.values()) > 0.1
    twin = small(direct_forces=direct_forces)
    twin.load_state_dict(model.state_dict())
    assert {k: float(f.scale) for k, f in twin.scale_factors().items()} == fitted


def test_fitting_scale_factors_to_a_strange_batch_fails_and_leaves_nothing_behind() -> None:
    model = small()
    strange = Structures.from_ase(bulk("Al"))
    with pytest.raises(DataError, match="Al"):
        fit_scale_factors(model, [some_cluster(), strange, some_cluster()])
    assert all(factor.observer is None for factor in model.scale_factors().values())
    assert fit_scale_factors(model, []) == {}


def test_scale_factors_that_meet_nothing_stay() -> None:
    model = small()
    dimer = cluster([[0.0, 0.0, 0.0], [1.8, 0.0, 0.0]])
    fitted = fit_scale_factors(model, [dimer])
    assert "blocks.0.quad.scale_sum" not in fitted
    assert "blocks.0.atom_atom.scale_sum" in fitted
    for name, factor in model.scale_factors().items():
        assert float(factor.scale) == fitted.get(name, 1.0)


# -- training ------------------------------------------------------------------------------------


def morse(structures: Structures) -> tuple[Tensor, Tensor]:
    """Energies of a pair potential, relative to their mean, and its forces."""
    positions = structures.positions.clone().requires_grad_(True)
    neighbors = build_neighbor_list(structures, 8.0)
    r = torch.linalg.norm(pair_vectors(replace(structures, positions=positions), neighbors), dim=1)
    pair = torch.exp(-2.0 * (r - 2.0)) - 2.0 * torch.exp(-(r - 2.0))
    energy = torch.zeros(structures.n_systems, dtype=torch.float64)
    energy = energy.index_add(0, structures.system_index[neighbors.center], 0.5 * pair)
    (gradient,) = torch.autograd.grad(energy.sum(), positions)
    return (energy - energy.mean()).detach(), -gradient


@pytest.mark.parametrize("direct_forces", [False, True])
def test_training_lowers_the_loss(direct_forces: bool) -> None:
    model = small(direct_forces=direct_forces)
    structures = Structures.concatenate([some_cluster(6, seed=seed) for seed in range(4)])
    neighbors = build_neighbor_list(structures, model.cutoff)
    energy, forces = morse(structures)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        prediction = model.predict(structures, neighbors, create_graph=True)
        loss = (prediction["energy"] - energy).square().mean()
        loss = loss + 10.0 * (prediction["forces"] - forces).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = [name for name, p in model.named_parameters() if p.grad is None]
    assert trained == []  # every parameter is reached
    assert losses[-1] < 0.5 * losses[0]


def test_a_new_student_has_fitted_scale_factors() -> None:
    structures = Structures.concatenate([some_cluster(8, seed=seed) for seed in range(6)])
    energy, forces = morse(structures)
    labels = {"reference": Properties({"energy": energy, "forces": forces})}
    run = TrainSettings(
        model=ModelSettings(kind="gemnet_oc", hyperparameters=small().hyperparameters()),
        loss=[LossTerm(property="energy", weight=1.0)],
        batch_size=2,
        precision="float64",
    )
    data = TrainingSet(structures, labels)
    student, residual = initial_student(run, data)
    network = student["network"]
    assert isinstance(network, GemNetOC)
    factors = {name: float(f.scale) for name, f in network.scale_factors().items()}
    # Four batches of two, of which there are but three.
    batches = [residual.structures.select([2 * k, 2 * k + 1]) for k in range(3)]
    assert fit_scale_factors(network, batches) == pytest.approx(factors, rel=1e-9)
