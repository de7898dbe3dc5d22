"""SchNet and PaiNN: graph-pes and equations written out as oracles, taps, caps, training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

from data import rattled_copper
from golden import make_graph_pes as golden
from potstill.checkpoint import load_potential
from potstill.distill import LossTerm
from potstill.errors import ModelError
from potstill.models import Edges, PaiNN, SchNet, SpeciesOffsets, SumPotential
from potstill.models.painn import PAINN_BIG, PAINN_SMALL
from potstill.models.schnet import SCHNET
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.radial import (
    bessel_basis,
    cosine_envelope,
    gaussian_basis,
    polynomial_envelope,
)
from potstill.species import Species, SpeciesTable
from potstill.structures import Properties, Structures
from potstill.testing import contract_structures
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.settings import (
    EnergySettings,
    ModelSettings,
    OptimizerSettings,
)

TABLE = SpeciesTable.from_symbols(golden.SYMBOLS)
RESULTS = json.loads(Path(golden.__file__).with_name("graph_pes.json").read_text())["results"]


def filled(model):
    """The model with the parameters of the golden file."""
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.from_numpy(golden.parameter(name, tuple(parameter.shape)))
            parameter.copy_(value)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", golden.structures())
@pytest.mark.parametrize("kind", ["schnet", "painn"])
def test_agrees_with_graph_pes(kind, name, dtype, tolerance):
    model = SchNet(TABLE, **golden.SCHNET) if kind == "schnet" else PaiNN(TABLE, **golden.PAINN)
    model = filled(model).to(dtype)
    expected = RESULTS[f"{kind} {name}"]
    structures = Structures.from_ase(golden.structures()[name])
    found = model.predict(structures, properties=list(expected))
    for key, value in expected.items():
        value = np.array(value)
        ours = found[key].numpy()
        ours = ours[0] if key in ("energy", "stress") else ours
        error = np.abs(ours - value).max() / np.abs(value).max()
        assert error < tolerance, f"{key}: {error:.1e}"


# -- the equations of PaiNN, pair by pair ----------------------------------------------------------


def written_out(model, structures):
    """Atomic energies and direct forces by loops over pairs and atoms, in NumPy."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    ocp, cutoff, width = model.hyper.variant == "ocp", model.cutoff, model.hyper.hidden_channels

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)

    def silu(x):
        return x / (1.0 + np.exp(-x)) / (0.6 if ocp else 1.0)

    def network(name, x):
        return linear(f"{name}.2", silu(linear(f"{name}.0", x)))

    def norm(x):
        return np.sqrt((x**2).sum(axis=1) + 1e-8)

    def normalized(name, x):
        if not ocp:
            return x
        y = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return y * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def radial(r):
        n, x = np.arange(model.hyper.num_rbf), r / cutoff
        if not ocp:
            return np.sin((n + 1) * np.pi * x) / r, 0.5 * (1.0 + np.cos(np.pi * x))
        spacing = 1.0 / (model.hyper.num_rbf - 1)
        gaussians = np.exp(-((x - n * spacing) ** 2) / (2.0 * spacing**2))
        return gaussians, 1.0 - 21.0 * x**5 + 35.0 * x**6 - 15.0 * x**7

    neighbors = build_neighbor_list(structures, cutoff)
    vectors = pair_vectors(structures, neighbors).numpy()
    pairs = list(zip(neighbors.center.tolist(), neighbors.neighbor.tolist(), vectors, strict=True))
    x = weights["embedding.weight"][structures.species.numpy()]
    v = np.zeros((len(x), width, 3))
    for k in range(model.hyper.num_layers):
        dx, dv = np.zeros_like(x), np.zeros_like(v)
        for i, j, r_ij in pairs:
            r = np.linalg.norm(r_ij)
            basis, envelope = radial(r)
            phi = network(f"messages.{k}.network", normalized(f"messages.{k}.norm", x[j]))
            s, u, c = (phi * linear(f"messages.{k}.filters", basis) * envelope).reshape(3, width)
            dx[i] += s
            message = np.outer(u, r_ij / r) + c[:, None] * v[j] / (np.sqrt(3.0) if ocp else 1.0)
            dv[i] += message / (np.sqrt(width) if ocp else 1.0)
        x, v = (x + dx) / (np.sqrt(2.0) if ocp else 1.0), v + dv
        for i in range(len(x)):
            first, second = np.split(linear_vectors(weights[f"updates.{k}.mix.weight"], v[i]), 2)
            both = np.concatenate([x[i], norm(second)])
            a, b, c = network(f"updates.{k}.network", both).reshape(3, width)
            dot = (first * second).sum(axis=1) / (np.sqrt(width) if ocp else 1.0)
            x[i] += (a + b * dot) / (np.sqrt(2.0) if ocp else 1.0)
            v[i] += c[:, None] * first
    energies = [linear("energy_layer", silu(linear("hidden.0", row)))[0] for row in x]
    forces = []
    for scalar, vector in zip(x, v, strict=True):
        for k in range(2):
            name = f"force_blocks.{k}"
            size = norm(linear_vectors(weights[f"{name}.for_norms.weight"], vector))
            both = network(f"{name}.network", np.concatenate([scalar, size]))
            scalar, gate = np.split(both, 2)
            mixed = linear_vectors(weights[f"{name}.for_vectors.weight"], vector)
            scalar, vector = silu(scalar), gate[:, None] * mixed
        forces.append(vector[0])
    return np.array(energies), np.array(forces)


def linear_vectors(matrix, vectors):
    """(n_out, 3) from (n_in, 3)."""
    return matrix @ vectors


@pytest.mark.parametrize("variant", ["original", "ocp"])
def test_painn_is_what_its_equations_say(variant):
    hyperparameters = golden.PAINN | {"num_layers": 2, "direct_forces": True, "variant": variant}
    model = filled(PaiNN(TABLE, **hyperparameters))
    structures = Structures.from_ase(golden.structures()["crystal"])
    found = model.predict(structures, properties=["atomic_energies", "forces"])
    energies, forces = written_out(model, structures.with_species_table(TABLE))
    assert np.abs(forces).max() > 1e-5
    np.testing.assert_allclose(found["atomic_energies"], energies, rtol=1e-11)
    np.testing.assert_allclose(found["forces"], forces, rtol=1e-9, atol=1e-14)


# -- sizes -----------------------------------------------------------------------------------------


def elements(n):
    return SpeciesTable(tuple(Species(f"X{k}", 1.0) for k in range(n)))


def test_sizes_of_the_models_of_the_tables():
    # Counted by hand from the layers of the Open Catalyst Project's programs, with 83 and 100
    # embeddings.
    assert PaiNN(elements(83), **PAINN_BIG["oc20"]).n_parameters == 20_073_475
    assert SchNet(elements(100), **SCHNET["oc20"]).n_parameters == 9_088_513
    for preset in (PAINN_BIG, PAINN_SMALL):
        model = PaiNN(TABLE, **preset["coll"])
        assert model.direct_forces
        assert model.hyper.variant == "ocp"
        assert (model.cutoff, model.hyper.num_rbf, model.hyper.max_neighbors) == (12.0, 128, 50)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (PaiNN, {"variant": "oc"}, "variant: .*'ocp' .it is 'oc'"),
        (PaiNN, {"num_layers": 0}, "num_layers: .* equal to 1"),
        (PaiNN, {"max_neighbors": 0}, "max_neighbors: .* equal to 1"),
        (SchNet, {"num_gaussians": 1}, "num_gaussians: .* equal to 2"),
    ],
)
def test_impossible_sizes_are_refused(kind, wrong, message):
    with pytest.raises(ModelError, match=message):
        kind(TABLE, **wrong)


# -- radial functions ------------------------------------------------------------------------------


@pytest.mark.parametrize(("envelope", "order"), [(cosine_envelope, 1), (polynomial_envelope, 2)])
def test_envelopes_vanish_smoothly(envelope, order):
    r = torch.tensor([0.0, 3.0 - 1e-7, 3.0, 3.5], dtype=torch.float64, requires_grad=True)
    value = envelope(r, 3.0)
    assert value[0] == 1.0
    for _ in range(order):
        assert value[1].abs() < 1e-5
        assert not value[2:].any()
        (value,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    assert value[1].abs() < 1e-5


def test_radial_functions_at_known_points():
    r = torch.tensor([1.0, 2.0], dtype=torch.float64)
    gaussians = gaussian_basis(r, 5, 4.0)  # centers 0, 1, 2, 3, 4 and width 1
    torch.testing.assert_close(gaussians[0, 1:3], torch.tensor([1.0, np.exp(-0.5)]).to(r))
    bessel = bessel_basis(r, 2, 4.0)
    expected = [[np.sqrt(0.5), 1.0], [0.5, 0.0]]
    torch.testing.assert_close(bessel, torch.tensor(expected).to(r), atol=1e-12, rtol=0.0)


# -- neighbors -------------------------------------------------------------------------------------


def test_nearest_neighbors_are_symmetric_and_keep_shells_whole():
    structures = contract_structures(painn())
    neighbors = build_neighbor_list(structures, 4.0)
    distance = torch.linalg.vector_norm(pair_vectors(structures, neighbors), dim=1)
    edges = edges_of(neighbors)
    kept = edges.among_nearest(distance, structures.n_atoms, 6)
    columns = [neighbors.center, neighbors.neighbor, *neighbors.shifts.T]
    forward = torch.stack(columns, dim=1)[kept].tolist()
    columns = [neighbors.neighbor, neighbors.center, *-neighbors.shifts.T]
    assert sorted(forward) == sorted(torch.stack(columns, dim=1)[kept].tolist())
    for atom in range(structures.n_atoms):
        mine = neighbors.center == atom
        last = distance[mine].sort().values[: int(mine.sum())][min(5, int(mine.sum()) - 1)]
        assert bool(kept[mine & (distance <= last)].all())
        others = kept & mine & (distance > last * 1.001)
        for pair in others.nonzero()[:, 0].tolist():  # there for the other atom's sake
            its = neighbors.center == int(neighbors.neighbor[pair])
            assert int((distance[its] < distance[pair] - 1e-9).sum()) < 6
    assert 0 < int(kept.sum()) < len(kept)
    # Six neighbors of a simple cubic lattice are one shell: asking for three gives all six.
    cubic = Structures.from_ase(simple_cubic())
    neighbors = build_neighbor_list(cubic, 2.5)
    distance = torch.linalg.vector_norm(pair_vectors(cubic, neighbors), dim=1)
    assert int(edges_of(neighbors).among_nearest(distance, 1, 3).sum()) == 6


def simple_cubic():
    return golden.ase.Atoms("C", cell=1.5 * np.eye(3), pbc=True)


def edges_of(neighbors):
    return Edges(neighbors.center, neighbors.neighbor)


# -- taps ------------------------------------------------------------------------------------------


def painn(**changes):
    return filled(PaiNN(TABLE, **(golden.PAINN | changes)))


def test_taps_are_where_they_say():
    model = painn(direct_forces=True)
    structures = contract_structures(model)
    names = [*model.taps]
    assert names[:5] == [
        "embedding",
        "message_1",
        "message_1.vector",
        "update_1",
        "update_1.vector",
    ]
    assert model.default_tap == "last"
    found = model.predict(structures, properties=["atomic_energies"], taps=names)
    energies = model.energy_layer(found.features["last"])[:, 0]
    torch.testing.assert_close(found["atomic_energies"], energies.detach())
    last = model.hidden(found.features["update_3"])
    torch.testing.assert_close(found.features["last"], last.detach())
    _, update = list(model._layers())[2]
    x, vector = found.features["message_3"], found.features["message_3.vector"]
    dx, dv = update(x, vector)
    torch.testing.assert_close(found.features["update_3"], (x + dx).detach())
    torch.testing.assert_close(found.features["update_3.vector"], (vector + dv).detach())


def test_schnet_filters_belong_to_their_pairs():
    model = filled(SchNet(TABLE, **golden.SCHNET))
    structures = contract_structures(model)
    neighbors = build_neighbor_list(structures, 5.0)
    distance = torch.linalg.vector_norm(pair_vectors(structures, neighbors), dim=1)
    found = model.predict(structures, neighbors, ["energy"], taps=["filter_2", "last"]).features
    assert set(found) == {"filter_2", "last"}
    beyond = distance > 4.0
    assert bool(beyond.any())
    assert not found["filter_2"][beyond].any()
    block = model.interactions[1]
    basis = gaussian_basis(distance, golden.RADIAL, 4.0)
    expected = block.filters(basis, cosine_envelope(distance, 4.0)).detach()
    torch.testing.assert_close(found["filter_2"], expected)


def test_the_default_tap_of_a_sum_is_its_networks():
    network = painn()
    total = SumPotential({"offsets": SpeciesOffsets(TABLE, [1.0, 2.0]), "network": network})
    assert total.default_tap == "last"
    assert SumPotential({"offsets": SpeciesOffsets(TABLE, [1.0, 2.0])}).default_tap is None


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["schnet", "painn", "painn direct", "painn ocp direct"])
def test_training_lowers_the_loss(tmp_path, case):
    kind, *flags = case.split()
    sizes = {"hidden_channels": 12, "cutoff": 3.5}
    if kind == "schnet":
        sizes |= {"num_filters": 12, "num_interactions": 2, "num_gaussians": 12}
    else:
        variant = "ocp" if "ocp" in flags else "original"
        sizes |= {"num_layers": 2, "num_rbf": 8}
        sizes |= {"direct_forces": "direct" in flags, "variant": variant}
    settings = TrainSettings(
        model=ModelSettings(kind=kind, hyperparameters=sizes),
        energy=EnergySettings(zero="least_squares"),
        loss=(LossTerm(property="energy"), LossTerm(property="forces", weight=10.0)),
        optimizer=OptimizerSettings(name="amsgrad_adamw", learning_rate=5e-3),
        epochs=8,
        batch_size=4,
    )
    result = train(settings, copper_gold(12), copper_gold(4, seed=7), tmp_path / "run", info={})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 8
    first, last = (r["validation"]["forces_rmse"] for r in (records[0], records[-1]))
    assert last < 0.8 * first, f"force RMSE from {first:.3f} to {last:.3f} eV/Å"
    potential, _ = load_potential(result.best)
    assert potential.direct_forces == ("direct" in flags)


def copper_gold(n, seed=0):
    """Rattled cells of four and eight atoms with the energies and forces of EMT."""
    frames = rattled_copper(n, 0.1)
    for k, atoms in enumerate(frames):
        atoms.symbols[k % 4] = "Au"
    frames = [atoms * (1 + k % 2, 1, 1) for k, atoms in enumerate(frames)]
    rng = np.random.default_rng(seed)
    for atoms in frames:
        atoms.positions += 0.1 * rng.standard_normal(atoms.positions.shape)
        atoms.calc = EMT()
    energy = torch.tensor([a.get_potential_energy() for a in frames], dtype=torch.float64)
    forces = torch.from_numpy(np.concatenate([a.get_forces() for a in frames]))
    labels = Properties({"energy": energy, "forces": forces})
    return TrainingSet(Structures.from_ase(frames), {"reference": labels})
