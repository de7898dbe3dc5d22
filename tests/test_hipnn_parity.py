"""HIP-NN against hippynn's own networks with copied weights (an independent implementation)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from potstill.models.hipnn import HIPNN, Residual, hierarchicality
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    hippynn = pytest.importorskip("hippynn", reason="the parity oracle hippynn is not installed")
    from hippynn.custom_kernels import set_custom_kernels
    from hippynn.layers.targets import HEnergy
    from hippynn.networks.hipnn import Hipnn, HipnnQuad, HipnnVec

NETWORKS = {0: Hipnn, 1: HipnnVec, 2: HipnnQuad}
HYPER = dict(
    n_features=11,
    n_sensitivities=7,
    dist_soft_min=0.8,
    dist_soft_max=4.2,
    dist_hard_max=5.0,
    n_atom_layers=2,
)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    # Where numba is installed, hippynn takes kernels with fast math that agree to 1e-9 only.
    set_custom_kernels("pytorch")
    # hippynn compiles its sums over neighbors on first use; plain eager mode computes the same.
    with torch.compiler.set_stance("force_eager"):
        yield


def _systems(kind: str) -> Structures:
    rng = np.random.default_rng(5)
    if kind == "open":
        frames = [molecule(name) for name in ("CH3CH2OH", "H2O", "CO2")]
    else:  # two species, and one cell much smaller than the cutoff: many images of one pair
        frames = [
            bulk("NaCl", "rocksalt", a=5.6, cubic=True),
            bulk("NaCl", "rocksalt", a=5.4),
        ]
    for atoms in frames:
        atoms.positions += 0.08 * rng.standard_normal(atoms.positions.shape)
    return Structures.from_ase(frames)


def _pair_of_models(
    table: SpeciesTable, l_max: int, n_blocks: int
) -> tuple[HIPNN, torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(3)
    ours = HIPNN(table, **HYPER, l_max=l_max, n_interaction_layers=n_blocks).double()
    options = {} if l_max == 0 else {"cusp_reg": ours.hyper.cusp_reg}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = NETWORKS[l_max](
            **HYPER, n_interaction_layers=n_blocks, n_input_features=len(table), **options
        ).double()
    energy = HEnergy(network.feature_sizes).double()
    with torch.no_grad():
        for block, theirs in zip(ours.blocks, network.blocks, strict=True):
            for layer, other in zip(block, theirs, strict=True):
                _copy_residual(layer, other)
        for layer, other in zip(ours.energy_layers, energy.layers, strict=True):
            other.load_state_dict(layer.state_dict())
    return ours, network, energy


def _copy_residual(layer: Residual, other: torch.nn.Module) -> None:
    other.res_layer.load_state_dict(layer.res_layer.state_dict())
    if layer.adjust is not None:
        other.adjust_layer.load_state_dict(layer.adjust.state_dict())
    inner, base = layer.layer, other.base_layer
    if isinstance(inner, torch.nn.Linear):
        base.load_state_dict(inner.state_dict())
        return
    base.int_weights.copy_(inner.int_weights)
    base.selfint.load_state_dict(inner.selfint.state_dict())
    base.sensitivity.mu.copy_(inner.sensitivity.mu[None])
    base.sensitivity.sigma.copy_(inner.sensitivity.sigma[None])
    for name, scale in zip(("vecscales", "quadscales"), inner.scales, strict=False):
        getattr(base, name).copy_(scale)


@pytest.mark.parametrize("kind", ["open", "periodic"])
@pytest.mark.parametrize("n_blocks", [1, 2, 3])
@pytest.mark.parametrize("l_max", [0, 1, 2])
def test_energies_and_forces_agree_with_hippynn(kind: str, n_blocks: int, l_max: int) -> None:
    structures = _systems(kind)
    ours, network, energy = _pair_of_models(structures.species_table, l_max, n_blocks)
    neighbors = build_neighbor_list(structures, ours.cutoff)
    prediction = ours.predict(
        structures,
        neighbors,
        ("energy", "forces", "atomic_energies"),
        taps=("hierarchical_energies",),
    )

    r_ij = pair_vectors(structures, neighbors).requires_grad_(True)
    distance = torch.linalg.vector_norm(r_ij, dim=1)
    one_hot = torch.nn.functional.one_hot(
        structures.species, len(structures.species_table)
    ).double()
    inputs = [one_hot, neighbors.center, neighbors.neighbor, distance]
    features = network(*inputs) if l_max == 0 else network(*inputs, r_ij)
    total, atomic, _, hierarchy, *_ = energy(
        features, structures.system_index, structures.n_systems
    )
    gradient = torch.autograd.grad(total.sum(), r_ij)[0]
    total, atomic = total.detach(), atomic.detach()
    forces = torch.zeros_like(structures.positions)
    forces = forces.index_add(0, neighbors.center, gradient)
    forces = forces.index_add(0, neighbors.neighbor, -gradient)

    tolerance = 1e-10 * float(forces.abs().max())
    assert float((prediction["forces"] - forces).abs().max()) < tolerance
    assert float((prediction["energy"] - total[:, 0]).abs().max()) < tolerance
    assert float((prediction["atomic_energies"] - atomic[:, 0]).abs().max()) < tolerance
    own = hierarchicality(prediction.features["hierarchical_energies"])
    own = own.new_zeros(structures.n_systems).index_add(0, structures.system_index, own)
    torch.testing.assert_close(own, hierarchy[:, 0].detach(), rtol=1e-10, atol=1e-12)


def test_regularized_weights_are_those_of_hippynn() -> None:
    structures = _systems("open")
    ours, network, _ = _pair_of_models(structures.species_table, 2, 2)
    own = sum(float(w.detach().square().sum()) for w in ours.regularized_weights())
    theirs = sum(float(w.detach().square().sum()) for w in network.regularization_params())
    assert own == pytest.approx(theirs, rel=1e-12)
