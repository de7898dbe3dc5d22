"""ANI: the formula spelled out with loops, ensembles, and the published ensemble for aluminium."""

import itertools
import math

import ase.io
import numpy as np
import pytest
import torch

from data import data_path
from potstill.errors import ModelError, TeacherError
from potstill.models import ANI, Edges
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures
from potstill.teachers import load_ani_al
from potstill.testing import contract_structures

TABLE = SpeciesTable.from_symbols(["H", "C", "O"])
HYPER = dict(
    radial_cutoff=4.5,
    angular_cutoff=3.4,
    eta_r=16.0,
    shifts_r=[0.9, 1.4, 1.9, 2.4],
    eta_a=8.0,
    zeta=32.0,
    shifts_a=[0.9, 1.6],
    shifts_z=[0.2, 0.6, 2.8],
    hidden_widths=[6, 5],
)


def ani(**changes):
    torch.manual_seed(1)
    return ANI(TABLE, **(HYPER | changes)).double()


def aev_by_loops(model, structures):
    """The textbook sums, one neighbor and one pair of neighbors at a time, with the arccos."""

    def switch(r, cutoff):
        return 0.5 * math.cos(math.pi * r / cutoff) + 0.5

    h = model.hyperparameters()
    neighbors = build_neighbor_list(structures, model.cutoff)
    vectors = pair_vectors(structures, neighbors).numpy()
    n_species = len(structures.species_table)
    pairs = list(itertools.combinations_with_replacement(range(n_species), 2))
    n_r, n_a, n_z = len(h["shifts_r"]), len(h["shifts_a"]), len(h["shifts_z"])
    radial = np.zeros((structures.n_atoms, n_species, n_r))
    angular = np.zeros((structures.n_atoms, len(pairs), n_a, n_z))
    for i in range(structures.n_atoms):
        shell = (neighbors.center == i).nonzero()[:, 0].tolist()
        kinds = {e: int(structures.species[neighbors.neighbor[e]]) for e in shell}
        length = {e: float(np.linalg.norm(vectors[e])) for e in shell}
        for e in shell:
            if length[e] < h["radial_cutoff"]:
                for k, shift in enumerate(h["shifts_r"]):
                    gauss = math.exp(-h["eta_r"] * (length[e] - shift) ** 2)
                    radial[i, kinds[e], k] += 0.25 * gauss * switch(length[e], h["radial_cutoff"])
        near = [e for e in shell if length[e] < h["angular_cutoff"]]
        for e, f in itertools.combinations(near, 2):
            p = pairs.index(tuple(sorted((kinds[e], kinds[f]))))
            theta = math.acos(0.95 * vectors[e] @ vectors[f] / (length[e] * length[f]))
            weight = 2.0
            for x in (length[e], length[f]):
                weight *= switch(x, h["angular_cutoff"])
            for a, shift_a in enumerate(h["shifts_a"]):
                gauss = math.exp(-h["eta_a"] * (0.5 * (length[e] + length[f]) - shift_a) ** 2)
                for z, shift_z in enumerate(h["shifts_z"]):
                    cosine = (0.5 + 0.5 * math.cos(theta - shift_z)) ** h["zeta"]
                    angular[i, p, a, z] += weight * gauss * cosine
    n = structures.n_atoms
    return np.concatenate([radial.reshape(n, -1), angular.reshape(n, -1)], axis=1)


def test_environment_vectors_are_the_textbook_sums():
    model = ani()
    structures = contract_structures(model)
    aev = model.predict(structures, taps=["aev"]).features["aev"].numpy()
    expected = aev_by_loops(model, structures)
    assert aev.shape == expected.shape
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(aev, expected, rtol=1e-10, atol=1e-14)


def test_width_of_ani_1x():
    table = SpeciesTable.from_symbols(["H", "C", "N", "O"])
    model = ANI(
        table,
        radial_cutoff=5.2,
        angular_cutoff=3.5,
        eta_r=16.0,
        shifts_r=[0.9 + 0.26875 * k for k in range(16)],
        eta_a=8.0,
        zeta=32.0,
        shifts_a=[0.9, 1.55, 2.2, 2.85],
        shifts_z=[math.pi * (2 * k + 1) / 16 for k in range(8)],
        hidden_widths={"H": [160, 128, 96], "C": [144, 112, 96], "N": [128, 112, 96], "O": [128]},
        n_members=2,
    )
    assert model.aev_width == 384
    assert set(model.taps) == {"aev", "member_energies"}
    hydrogen = 384 * 160 + 160 + 160 * 128 + 128 + 128 * 96 + 96 + 96 + 1
    assert sum(p.numel() for p in model.networks[0].parameters()) == 2 * hydrogen


def test_the_energy_is_the_mean_of_the_members():
    model = ani(n_members=4)
    structures = contract_structures(model)
    whole = model.predict(
        structures, properties=["atomic_energies", "forces"], taps=["member_energies"]
    )
    members = [
        model.member(k).predict(structures, properties=["atomic_energies", "forces"])
        for k in range(4)
    ]
    energies = torch.stack([m["atomic_energies"] for m in members], dim=1)
    torch.testing.assert_close(whole.features["member_energies"], energies, rtol=0, atol=1e-13)
    torch.testing.assert_close(whole["atomic_energies"], energies.mean(dim=1), rtol=0, atol=1e-13)
    forces = torch.stack([m["forces"] for m in members]).mean(dim=0)
    torch.testing.assert_close(whole["forces"], forces, rtol=0, atol=1e-12)
    assert float(energies.std(dim=1).min()) > 1e-4
    with pytest.raises(ModelError, match="4 members"):
        model.member(4)


def test_hidden_layers_lead_to_the_energy():
    model = ani(n_members=2)
    structures = contract_structures(model)
    features = model.predict(structures, taps=["hidden_1", "member_energies"]).features
    carbon = structures.species == 1
    hidden = features["hidden_1"][carbon].view(-1, 2, 5)  # members side by side
    network = model.networks[1]
    last = torch.einsum("nmh,mho->nm", hidden, network.weights[-1]) + network.biases[-1][:, 0, 0]
    torch.testing.assert_close(last.detach(), features["member_energies"][carbon])


def test_atoms_on_a_line_have_finite_derivatives():
    model = ani()
    positions = torch.tensor([[0.0, 0.0, 0.0], [1.1, 0.0, 0.0], [2.2, 0.0, 0.0]]).double()
    chain = Structures(
        positions=positions,
        species=torch.tensor([2, 1, 2]),
        system_index=torch.zeros(3, dtype=torch.int64),
        cell=torch.zeros(1, 3, 3, dtype=torch.float64),
        pbc=torch.zeros(1, 3, dtype=torch.bool),
        species_table=TABLE,
    )
    forces = model.predict(chain)["forces"]
    assert torch.isfinite(forces).all()
    assert float(forces[:, 1:].abs().max()) < 1e-14
    product = model.hessian_vector_product(chain, torch.ones(3, 3, dtype=torch.float64))
    assert float(product.abs().max()) < 1e-10  # a translation


def test_triplets_come_from_the_angular_cutoff_only():
    model = ani()
    species = torch.tensor([0, 1, 2])
    edges = Edges(torch.tensor([0, 0]), torch.tensor([1, 2]))
    r_ij = torch.tensor([[1.5, 0.0, 0.0], [0.0, 3.5, 0.0]], dtype=torch.float64)
    aev = model.aev(species, edges, r_ij, 1)
    n_radial = 3 * len(HYPER["shifts_r"])
    assert float(aev[:, :n_radial].abs().max()) > 0.0
    assert float(aev[:, n_radial:].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zeta": 0.0}, "zeta: .* greater than 0"),
        ({"radial_cutoff": -1.0}, "radial_cutoff: .* greater than 0"),
        ({"n_members": 0}, "n_members"),
        ({"hidden_widths": {"H": [4], "C": [4]}}, "no entry for O"),
    ],
)
def test_wrong_hyperparameters_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        ani(**change)


@pytest.mark.data
def test_published_aluminium_ensemble():
    folder = data_path("ani-al-model")
    frames = ase.io.read(folder / "ani_al_reference_eval.extxyz", ":")
    structures = Structures.from_ase(frames)
    n_atoms = structures.n_atoms_per_system
    result = load_ani_al(folder).predict(
        structures, properties=["energy", "forces", "stress"], taps=["member_energies"]
    )
    energy = torch.tensor([a.get_potential_energy() for a in frames])
    forces = torch.from_numpy(np.concatenate([a.get_forces() for a in frames]))
    stress = torch.from_numpy(np.array([a.get_stress(voigt=False) for a in frames]))
    assert len(frames) == 35
    assert float(((result["energy"] - energy) / n_atoms).abs().max()) < 1e-6
    assert float((result["forces"] - forces).abs().max()) < 1e-5
    assert float((result["stress"] - stress).abs().max()) < 1e-6
    # The members' energies lack the constant of the atoms.
    members = torch.zeros(35, 8, dtype=torch.float64)
    members.index_add_(0, structures.system_index, result.features["member_energies"])
    offset = float(load_ani_al(folder)["offsets"].offsets[0])
    members = members / n_atoms[:, None] + offset
    expected = torch.from_numpy(np.array([a.info["ens_energies"] for a in frames]))
    assert float((members - expected / n_atoms[:, None]).abs().max()) < 1e-6


def test_other_files_are_not_taken_for_the_ensemble(tmp_path):
    with pytest.raises(TeacherError, match="no such file"):
        load_ani_al(tmp_path)
    np.savez(tmp_path / "ani_al_weights.npz", a=np.zeros(3))
    with pytest.raises(TeacherError, match="not the weights of ANI-Al"):
        load_ani_al(tmp_path)
