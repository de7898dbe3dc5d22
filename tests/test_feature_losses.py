"""Feature losses and aggregations against plain loops, and what they must not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.distill.aggregate import edges_to_nodes, edges_to_vectors, match_pairs
from potstill.distill.feature_losses import FEATURE_LOSSES, Rows, linear_cka
from potstill.distill.transforms import make_transform
from potstill.errors import ConfigError
from potstill.features import Feature, pairs_within
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import Structures
from test_train import emt_set


@pytest.fixture(scope="module")
def structures() -> Structures:
    return emt_set(4, seed=2).structures


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def loss(
    name: str,
    x: Tensor,
    y: Tensor,
    structures: Structures,
    atoms: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    atoms = torch.ones(structures.n_atoms, dtype=torch.bool) if atoms is None else atoms
    pairs = build_neighbor_list(structures, 3.0)
    by_row = None if weights is None else weights[structures.system_index]
    rows = Rows(structures, atoms, pairs, by_row)
    return FEATURE_LOSSES[name].value(
        FEATURE_LOSSES[name].sums(x, y, rows), x.shape[-1], y.shape[-1]
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


# -- losses against loops --------------------------------------------------------------------------


def test_mean_errors(structures: Structures) -> None:
    x, y = normal(structures.n_atoms, 3), normal(structures.n_atoms, 3, seed=1)
    assert float(loss("mse", x, y, structures)) == pytest.approx(float((x - y).square().mean()))
    assert float(loss("mae", x, y, structures)) == pytest.approx(float((x - y).abs().mean()))


def test_relations_between_neighbors(structures: Structures) -> None:
    x, y = normal(structures.n_atoms, 5), normal(structures.n_atoms, 5, seed=1)
    pairs = build_neighbor_list(structures, 3.0)
    terms = []
    for i in range(structures.n_atoms):
        around = pairs.neighbor[pairs.center == i].tolist()
        for place, j in enumerate(around):
            scores = [cosine(x[j] - x[i], y[k] - y[i]) / 0.1 for k in around]
            terms.append(-float(torch.log_softmax(torch.tensor(scores).double(), 0)[place]))
    assert len(terms) == pairs.n_pairs > 0
    assert float(loss("fork", x, y, structures)) == pytest.approx(np.mean(terms))
    assert float(loss("fork", y, y, structures)) < 0.5 * np.mean(terms)


@pytest.mark.parametrize("vectors", [False, True])
def test_local_structure_preservation(structures: Structures, vectors: bool) -> None:
    shape = (3, 5) if vectors else (5,)
    x, y = normal(structures.n_atoms, *shape), normal(structures.n_atoms, *shape, seed=1)
    pairs = build_neighbor_list(structures, 3.0)
    total, n_centers = 0.0, 0
    for i in range(structures.n_atoms):
        around = pairs.neighbor[pairs.center == i].tolist()
        if not around:
            continue
        n_centers += 1
        p, q = (
            torch.softmax(torch.tensor([cosine(z[i], z[j]) for j in around]).double(), dim=0)
            for z in (x, y)
        )
        total += float((p * (p / q).log()).sum())
    assert n_centers
    assert float(loss("lsp", x, y, structures)) == pytest.approx(total / n_centers)


def test_global_structure_preservation(structures: Structures) -> None:
    x, y = normal(structures.n_atoms, 5), normal(structures.n_atoms, 7, seed=1)
    means = []
    for s in range(structures.n_systems):
        atoms = (structures.system_index == s).nonzero().flatten().tolist()
        means.append(
            np.mean([(cosine(x[i], x[j]) - cosine(y[i], y[j])) ** 2 for i in atoms for j in atoms])
        )
    assert float(loss("gsp", x, y, structures)) == pytest.approx(np.mean(means))


def test_centered_kernel_alignment(structures: Structures) -> None:
    n = structures.n_atoms
    x, y = normal(n, 4) + 3.0, normal(n, 6, seed=1)
    y[:, :4] += 2.0 * x
    center = np.eye(n) - 1.0 / n
    k, m = (center @ (z @ z.T).numpy() @ center for z in (x, y))
    expected = np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))
    assert 0.1 < expected < 0.99
    assert float(loss("cka", x, y, structures)) == pytest.approx(1.0 - expected)
    assert linear_cka(x, y) == pytest.approx(expected)
    q, _ = torch.linalg.qr(normal(6, 6, seed=2))
    assert linear_cka(x, 7.0 * y @ q + 1.0) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["lsp", "gsp", "cka", "fork"])
def test_losses_of_vectors_do_not_turn(structures: Structures, name: str) -> None:
    x, y = normal(structures.n_atoms, 3, 4), normal(structures.n_atoms, 3, 4, seed=1)
    q, _ = torch.linalg.qr(normal(3, 3, seed=3))
    turned = torch.einsum("ab,nbf->naf", q, x), torch.einsum("ab,nbf->naf", q, y)
    value = float(loss(name, x, y, structures))
    assert value > 1e-4
    assert float(loss(name, *turned, structures)) == pytest.approx(value)


@pytest.mark.parametrize("name", list(FEATURE_LOSSES))
def test_sums_add_up_over_the_parts_of_a_batch(structures: Structures, name: str) -> None:
    x, y = normal(structures.n_atoms, 4), normal(structures.n_atoms, 4, seed=1)
    measure = FEATURE_LOSSES[name]
    total = torch.zeros(())
    for systems in ([0, 1, 2], [3], []):
        part = structures.select(systems)
        rows = torch.cat(
            [(structures.system_index == s).nonzero()[:, 0] for s in systems]
            or [torch.zeros(0, dtype=torch.int64)]
        )
        everyone = torch.ones(part.n_atoms, dtype=torch.bool)
        pairs = build_neighbor_list(part, 3.0)
        total = total + measure.sums(x[rows], y[rows], Rows(part, everyone, pairs))
    assert float(measure.value(total, 4, 4)) == pytest.approx(float(loss(name, x, y, structures)))


@pytest.mark.parametrize("name", ["lsp", "gsp", "fork"])
def test_atoms_that_do_not_count(structures: Structures, name: str) -> None:
    x, y = normal(structures.n_atoms, 4), normal(structures.n_atoms, 4, seed=1)
    atoms = structures.system_index < 2
    part = structures.select([0, 1])
    expected = float(loss(name, x[atoms], y[atoms], part))
    assert float(loss(name, x, y, structures, atoms)) == pytest.approx(expected)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("name", list(FEATURE_LOSSES))
def test_a_system_weighs_as_often_as_it_is_there(
    structures: Structures, name: str, vectors: bool
) -> None:
    """Weight zero leaves a system and its gradient out, two repeats it, equal ones do nothing."""
    shape = (3, 4) if vectors else (4,)
    x, y = (normal(structures.n_atoms, *shape, seed=k).requires_grad_(k == 0) for k in (0, 1))
    for weights, systems in (([1, 0, 2, 1], [0, 2, 2, 3]), ([3, 3, 3, 3], [0, 1, 2, 3])):
        (found,) = torch.autograd.grad(
            value := loss(name, x, y, structures, weights=torch.tensor(weights).double()), x
        )
        rows = torch.cat([(structures.system_index == s).nonzero()[:, 0] for s in systems])
        expected = loss(name, x[rows], y[rows], structures.select(systems))
        (gradient,) = torch.autograd.grad(expected, x)
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in FEATURE_LOSSES if name != "fork"])
def test_equal_features_have_no_loss(structures: Structures, name: str) -> None:
    x = normal(structures.n_atoms, 4).requires_grad_(True)
    value = loss(name, x, x.detach(), structures)
    value.backward()
    assert abs(float(value.detach())) < 1e-12
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


# -- pairs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_pairs(structures: Structures) -> Feature:
    pairs = build_neighbor_list(structures, 3.0)
    return Feature("edge_scalar", normal(pairs.n_pairs, 5), pairs, "all pairs within 3 Å")


def test_pairs_become_nodes_and_vectors(structures: Structures, of_pairs: Feature) -> None:
    assert of_pairs.graph is not None
    nodes = torch.zeros(structures.n_atoms, 5, dtype=torch.float64)
    vectors = torch.zeros(structures.n_atoms, 3, 5, dtype=torch.float64)
    for k, r in enumerate(pair_vectors(structures, of_pairs.graph)):
        i = int(of_pairs.graph.center[k])
        nodes[i] += of_pairs.values[k]
        vectors[i] += torch.outer(r / r.norm(), of_pairs.values[k])
    torch.testing.assert_close(edges_to_nodes(of_pairs, structures), nodes)
    torch.testing.assert_close(edges_to_vectors(of_pairs, structures), vectors)


def test_pairs_are_matched_by_identity(structures: Structures) -> None:
    short, long = (build_neighbor_list(structures, cutoff) for cutoff in (3.0, 4.0))
    order = torch.randperm(long.n_pairs, generator=torch.Generator().manual_seed(0))
    long = type(long)(
        long.center[order], long.neighbor[order], long.shifts[order], long.n_pairs_per_system, 4.0
    )
    mine, theirs = match_pairs(short, long)
    assert mine.tolist() == list(range(short.n_pairs))
    for name in ("center", "neighbor", "shifts"):
        assert torch.equal(getattr(short, name), getattr(long, name)[theirs])
    fewer, _ = pairs_within(structures, short, 2.6)
    back, there = match_pairs(short, fewer)
    assert 0 < len(back) == fewer.n_pairs < short.n_pairs
    assert torch.equal(short.shifts[back], fewer.shifts[there])


def test_features_follow_their_systems(structures: Structures, of_pairs: Feature) -> None:
    for feature in (of_pairs, Feature("node_vector", normal(structures.n_atoms, 3, 2))):
        parts = [structures.select([s]) for s in range(4)]
        pieces = [feature.select(structures.rows([s])) for s in range(4)]
        joined = Feature.concatenate(pieces, parts)
        assert torch.equal(joined.values, feature.values)
        swapped = feature.select(structures.rows([3, 1]))
        two = structures.select([3, 1])
        again = Feature.concatenate([pieces[3], pieces[1]], [parts[3], parts[1]])
        assert torch.equal(swapped.values, again.values)
        assert (swapped.graph is not None) == (feature is of_pairs)
        if swapped.graph is not None and again.graph is not None:
            assert torch.equal(swapped.graph.center, again.graph.center)
            assert torch.equal(swapped.graph.neighbor, again.graph.neighbor)
            r = torch.linalg.vector_norm(pair_vectors(two, swapped.graph), dim=1)
            assert float(r.max()) < 3.0


# -- transformations -------------------------------------------------------------------------------


def test_linear_maps_of_vectors_turn_with_them() -> None:
    linear = make_transform("linear", 4, 3, vector=True).double()
    x = normal(7, 3, 4)
    q, _ = torch.linalg.qr(normal(3, 3, seed=3))
    torch.testing.assert_close(
        linear(torch.einsum("ab,nbf->naf", q, x)), torch.einsum("ab,nbf->naf", q, linear(x))
    )
    with pytest.raises(ConfigError, match="would break equivariance"):
        make_transform("mlp", 4, 3, vector=True)
