"""The contract that every potential keeps, as checks that anybody's model can be put through.

With pytest::

    @pytest.mark.parametrize("name", CONTRACT)
    def test_contract(name):
        CONTRACT[name](my_potential())

Every check takes a float64 potential of any kind with any species, makes its own structures (in
units of the potential's cutoff), leaves the potential as it was, and raises `AssertionError` with a
number and a tolerance where the contract is broken. Tolerances are relative to the largest value of
the quantity in question, or to one eV (eV/Å, eV/Å³) if that is larger.

Models with direct forces have no stress and no Hessian, and their forces are nobody's gradient: the
checks of these see to it that stress and Hessian are refused, and all others hold.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from potstill.checkpoint import load_potential, save_potential
from potstill.errors import ModelError
from potstill.models.base import Edges, Potential, Prediction
from potstill.models.graph import forces_from_pairs, virial_from_pairs
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.properties import LEARNABLE
from potstill.species import SpeciesTable
from potstill.structures import Structures

# Step of finite differences, Å (or strain), and the fourth-order stencil: offset -> weight.
_STEP = 5e-4
_STENCIL = {-2: 1.0 / 12.0, -1: -8.0 / 12.0, 1: 8.0 / 12.0, 2: -1.0 / 12.0}


# -- symmetry ----------------------------------------------------------------------------------


def check_rotation_and_reflection(potential: Potential) -> None:
    """Energies are invariant; forces, stress and vector taps turn with the structure."""
    structures = contract_structures(potential)
    before = _predict(potential, structures)
    generator = torch.Generator().manual_seed(1)
    for determinant in (1.0, -1.0):
        q, _ = torch.linalg.qr(_normal((3, 3), generator))
        q = q * determinant * torch.linalg.det(q)  # in three dimensions, -q flips the sign
        turned = replace(
            structures, positions=structures.positions @ q.T, cell=structures.cell @ q.T
        )
        after = _predict(potential, turned)
        _same(after, before, names=("energy", "atomic_energies"), tolerance=1e-9)
        _close(after["forces"], before["forces"] @ q.T, 1e-8, "forces")
        if not potential.direct_forces:
            periodic = structures.pbc.all(dim=1)
            expected = q @ before["stress"][periodic] @ q.T
            _close(after["stress"][periodic], expected, 1e-8, "stress")
        for name, spec in potential.taps.items():
            feature = before.features[name]
            if spec.kind == "node_vector":
                feature = torch.einsum("ab,nbf->naf", q.to(feature.dtype), feature)
            if spec.kind != "edge_scalar":  # the order of pairs may change
                _close(after.features[name], feature, 1e-8, f"tap {name}")


def check_translation(potential: Potential) -> None:
    """Nothing changes when systems move, or single atoms move by lattice vectors."""
    structures = contract_structures(potential)
    generator = torch.Generator().manual_seed(2)
    shift = potential.cutoff * _normal((structures.n_systems, 3), generator)
    images = torch.randint(-1, 2, (structures.n_atoms, 3), generator=generator)
    images = images * structures.pbc[structures.system_index]
    positions = structures.positions + shift[structures.system_index]
    cells = structures.cell[structures.system_index]
    positions = positions + torch.einsum("nk,nkd->nd", images.to(torch.float64), cells)
    moved = replace(structures, positions=positions)
    _same(_predict(potential, moved), _predict(potential, structures), tolerance=1e-8)


def check_permutation(potential: Potential) -> None:
    """Reordering the atoms of a system reorders its atoms' results."""
    structures = contract_structures(potential)
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(structures.n_atoms, generator=generator)
    order = torch.argsort(structures.system_index + 0.9 * noise)
    permuted = replace(
        structures, positions=structures.positions[order], species=structures.species[order]
    )
    before, after = _predict(potential, structures), _predict(potential, permuted)
    _same(after, before, names=("energy", "stress"), tolerance=1e-9)
    for name in ("forces", "atomic_energies"):
        _close(after[name], before[name][order], 1e-9, name)


def check_extensivity(potential: Potential) -> None:
    """A supercell has as many times the energy; atoms and stress do not notice."""
    small = contract_structures(potential)[0]
    before = _predict(potential, small)
    for repeats in ((2, 1, 1), (1, 3, 2)):
        n = repeats[0] * repeats[1] * repeats[2]
        after = _predict(potential, _supercell(small, repeats))
        _close(after["energy"], n * before["energy"], 1e-9, "energy")
        _same(after, before, names=("stress",), tolerance=1e-9)
        _close(after["forces"], before["forces"].repeat(n, 1), 1e-9, "forces")
        expected = before["atomic_energies"].repeat(n)
        _close(after["atomic_energies"], expected, 1e-9, "atomic energies")


def check_atomic_energies_sum_to_the_energy(potential: Potential) -> None:
    """The energy is the sum of the atomic energies, and these of their terms, in float64."""
    structures = contract_structures(potential)
    prediction = _predict(potential, structures)
    assert prediction.terms.shape == (structures.n_atoms, potential.n_terms)
    atomic = prediction.terms.sum(dim=1)
    _close(atomic, prediction["atomic_energies"], 1e-12, "sum of the terms")
    for name, penalty in potential.regularizers().items():
        values = penalty(prediction.terms)
        assert values.shape == (structures.n_atoms,), f"{name} gives {tuple(values.shape)}"
        assert bool(torch.isfinite(values).all()), f"{name} is not finite"
    total = torch.zeros(structures.n_systems, dtype=torch.float64)
    total = total.index_add(0, structures.system_index, prediction["atomic_energies"])
    _close(prediction["energy"], total, 1e-12, "energy")


# -- derivatives -------------------------------------------------------------------------------


def check_forces_are_the_gradient(potential: Potential) -> None:
    """Finite differences of the energy along random directions."""
    if potential.direct_forces:
        return
    structures = contract_structures(potential)
    forces = _predict(potential, structures)["forces"]
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        direction = _normal((structures.n_atoms, 3), generator)

        def energy(t: float, direction: Tensor = direction) -> Tensor:
            moved = replace(structures, positions=structures.positions + t * direction)
            return potential.predict(moved, properties=["energy"])["energy"]

        slope = torch.zeros(structures.n_systems, dtype=torch.float64)
        slope = slope.index_add(0, structures.system_index, (forces * direction).sum(dim=1))
        _close(-slope, _derivative(energy), 1e-6, "force along a direction")


def check_stress_is_the_strain_derivative(potential: Potential) -> None:
    """Finite differences of the energy for the six strains; positive in tension."""
    if potential.direct_forces:
        _refused(
            lambda: potential.predict(contract_structures(potential), properties=["stress"]),
            "a model with direct forces gave a stress",
        )
        return
    structures = contract_structures(potential).select([0, 3])
    stress = _predict(potential, structures)["stress"]
    for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        strain = torch.zeros(3, 3, dtype=torch.float64)
        strain[a, b] += 0.5
        strain[b, a] += 0.5

        def energy(t: float, strain: Tensor = strain) -> Tensor:
            deform = torch.eye(3, dtype=torch.float64) + t * strain
            strained = replace(
                structures, positions=structures.positions @ deform, cell=structures.cell @ deform
            )
            return potential.predict(strained, properties=["energy"])["energy"]

        _close(stress[:, a, b], _derivative(energy) / structures.volume, 1e-6, f"stress {a}{b}")


def check_hessian_vector_product(potential: Potential) -> None:
    """Finite differences of the forces, and the Hessian's symmetry."""
    structures = contract_structures(potential)
    generator = torch.Generator().manual_seed(5)
    u, v = _normal((2, structures.n_atoms, 3), generator)
    if potential.direct_forces:
        _refused(
            lambda: potential.hessian_vector_product(structures, v),
            "a model with direct forces gave a Hessian",
        )
        return

    def forces(t: float) -> Tensor:
        moved = replace(structures, positions=structures.positions + t * v)
        return potential.predict(moved, properties=["forces"])["forces"]

    product = potential.hessian_vector_product(structures, v)
    _close(product, -_derivative(forces), 1e-5, "Hessian times a vector")
    other = potential.hessian_vector_product(structures, u)
    _close((u * product).sum(), (v * other).sum(), 1e-9, "u H v and v H u")


def check_force_losses_can_be_trained(potential: Potential) -> None:
    """The gradient of a loss of energies and forces by the weights, against finite differences."""
    potential = copy.deepcopy(potential)
    weights = [p for p in potential.parameters() if p.requires_grad]
    if not weights:
        return
    structures = contract_structures(potential)
    scale = potential.predict(structures, properties=["forces"])["forces"].abs().max().clamp(1.0)

    def loss(create_graph: bool) -> Tensor:
        prediction = potential.predict(structures, create_graph=create_graph)
        return prediction["energy"].sum() + (prediction["forces"] / scale).square().sum()

    value = loss(create_graph=True)
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    generator = torch.Generator().manual_seed(6)
    directions = [_normal(tuple(w.shape), generator).to(w) for w in weights]
    start = [w.detach().clone() for w in weights]

    def along(t: float) -> Tensor:
        with torch.no_grad():
            for w, s, d in zip(weights, start, directions, strict=True):
                w.copy_(s + 0.1 * t * d)
        return loss(create_graph=False).detach()

    slope = sum(
        (0.1 * (g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None),
        start=torch.zeros((), dtype=torch.float64),
    )
    _close(slope, _derivative(along), 1e-5, "derivative of the loss by the weights")


def check_first_order_passes(potential: Potential) -> None:
    """`evaluate` and `weighted_energy`, which kernels may serve, agree with `forward`."""
    structures = contract_structures(potential).with_species_table(potential.species_table)
    neighbors = build_neighbor_list(structures, potential.cutoff)
    edges = Edges(neighbors.center, neighbors.neighbor)
    r_ij = pair_vectors(structures, neighbors)
    n = structures.n_atoms
    found = potential.evaluate(structures, neighbors)
    partial = found.terms
    assert partial.shape == (n, potential.n_terms), f"evaluate gives {tuple(partial.shape)}"
    for value in (partial, found.forces, found.virial):
        assert not value.requires_grad, "evaluate leaves a graph"
    variable = r_ij.clone().requires_grad_(True)
    output = potential(structures.species, edges, variable, n)
    atomic = output.atomic_energies
    _close(partial.sum(dim=1), atomic.detach(), 1e-10, "energies of evaluate")
    if output.forces is not None:
        _close(found.forces, output.forces.detach(), 1e-10, "forces of evaluate")
        assert bool(found.virial.isnan().all()), "a model with direct forces gave a virial"
    elif atomic.requires_grad:
        (gradient,) = torch.autograd.grad(atomic.sum(), variable, materialize_grads=True)
        _close(found.forces, forces_from_pairs(gradient, edges, n), 1e-10, "forces of evaluate")
        virial = virial_from_pairs(gradient, r_ij, edges, structures)
        _close(found.virial, virial, 1e-10, "virial of evaluate")
    weights = _normal(tuple(partial.shape), torch.Generator().manual_seed(8))
    energy = potential.weighted_energy([(structures, weights)], neighbors)
    _close(energy.detach(), (weights * partial).sum(), 1e-10, "weighted energy")
    parameters = [p for p in potential.parameters() if p.requires_grad]
    if not parameters:
        return
    terms = potential.partial_energies(structures.species, edges, r_ij, n)
    expected_by_parameter = torch.autograd.grad(
        (weights * terms).sum(), parameters, materialize_grads=True
    )
    by_parameter = torch.autograd.grad(energy, parameters, materialize_grads=True)
    for one, other in zip(by_parameter, expected_by_parameter, strict=True):
        _close(one, other, 1e-9, "derivative of the weighted energy")


# -- limits ------------------------------------------------------------------------------------


def check_prepared_terms(potential: Potential) -> None:
    """Compilable potentials give the same in two parts as in one."""
    if not potential.compilable:
        return
    structures = contract_structures(potential).with_species_table(potential.species_table)
    neighbors = build_neighbor_list(structures, potential.cutoff)
    edges = Edges(neighbors.center, neighbors.neighbor)
    arguments = (structures.species, edges, pair_vectors(structures, neighbors))
    prepared = potential.prepare(*arguments, structures.n_atoms)
    with torch.no_grad():
        found = potential.prepared_terms(prepared, arguments[2])
        expected = potential.partial_energies(*arguments, structures.n_atoms)
    _close(found, expected, 1e-12, "prepared terms")


def check_one_atom(potential: Potential) -> None:
    """One atom, free or in a wide cell: finite energy, no force, no stress."""
    edge = 4.0 * potential.cutoff
    for periodic in (False, True):
        for species in range(len(potential.species_table)):
            atom = _structure(
                potential.species_table,
                torch.full((1, 3), 0.3, dtype=torch.float64),
                [species],
                edge * torch.eye(3, dtype=torch.float64),
                (periodic,) * 3,
            )
            prediction = _predict(potential, atom)
            assert bool(torch.isfinite(prediction["energy"]).all()), "energy of one atom"
            _zero(prediction["forces"], "forces on one atom")
            if periodic and not potential.direct_forces:
                _zero(prediction["stress"], "stress of one atom")
            for name, feature in prediction.features.items():
                assert bool(torch.isfinite(feature).all()), f"tap {name} of one atom"
            if not potential.direct_forces:
                ones = torch.ones(1, 3, dtype=torch.float64)
                _zero(potential.hessian_vector_product(atom, ones), "Hessian of one atom")


def check_isolated_atoms(potential: Potential) -> None:
    """Atoms out of each other's reach: their energies add up and no force acts."""
    table = potential.species_table
    kinds = [s for s in range(len(table)) for _ in range(2)]
    distance = 2.5 * potential.cutoff
    positions = torch.zeros(len(kinds), 3, dtype=torch.float64)
    positions[:, 0] = distance * torch.arange(len(kinds))
    together = _structure(table, positions, kinds)
    alone = Structures.concatenate(
        [_structure(table, torch.zeros(1, 3, dtype=torch.float64), [s]) for s in kinds]
    )
    prediction = _predict(potential, together)
    expected = _predict(potential, alone)["energy"]
    _close(prediction["atomic_energies"], expected, 1e-12, "energies of isolated atoms")
    _zero(prediction["forces"], "forces on isolated atoms")


def check_no_atoms(potential: Potential) -> None:
    """An empty system inside a batch, and an empty batch."""
    structures = contract_structures(potential)
    nothing = _structure(
        potential.species_table, torch.zeros(0, 3, dtype=torch.float64), [], structures.cell[0]
    )
    some = structures.select([1])
    batch = Structures.concatenate([nothing, some, nothing])
    prediction = _predict(potential, batch)
    _close(prediction["energy"][1:2], _predict(potential, some)["energy"], 1e-12, "energy")
    _zero(prediction["energy"][[0, 2]], "energy of nothing")
    for empty in (nothing, structures.select([])):
        prediction = _predict(potential, empty)
        assert prediction["energy"].shape == (empty.n_systems,)
        assert prediction["forces"].shape == (0, 3)
        if not potential.direct_forces:
            assert prediction["stress"].shape == (empty.n_systems, 3, 3)


def check_perfect_crystals_have_no_forces(potential: Potential) -> None:
    """Simple cubic, bcc, fcc, diamond, and two-species crystals where there are two species."""
    scale = float(_predict(potential, contract_structures(potential))["forces"].abs().max())
    for name, crystal in _crystals(potential):
        forces = _predict(potential, crystal)["forces"]
        worst = float(forces.abs().max())
        assert worst <= 1e-9 * max(scale, 1.0), f"force of {worst:.2e} eV/Å in perfect {name}"


def check_continuity(potential: Potential) -> None:
    """No jump in energy or forces while an atom leaves; nothing is left at the cutoff."""
    cutoff = potential.cutoff
    table = potential.species_table
    last = len(table) - 1
    distance = torch.linspace(0.4 * cutoff, 1.1 * cutoff, 701, dtype=torch.float64)
    frames = []
    for r in (*distance.tolist(), cutoff * (1.0 - 1e-6)):
        positions = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.45 * cutoff, 0.0], [r, 0.0, 0.0]])
        frames.append(_structure(table, positions.to(torch.float64), [0, last, last]))
    batch = Structures.concatenate(frames)
    prediction = _predict(potential, batch)
    energy = prediction["energy"]
    force = prediction["forces"].view(-1, 3, 3)[:, 2, 0]  # on the leaving atom, along its path
    scale = max(float(force.abs().max()), 1.0)
    if potential.direct_forces:
        jumps = torch.maximum(_jumps(energy[:-1]), _jumps(force[:-1]))
        tolerance, what = 1e-2 * scale, "the energy or force jumps"
    else:
        # The trapezoid's own error is of third order in the step and far below the tolerance.
        work = 0.5 * (force[1:-1] + force[:-2]) * distance.diff()
        jumps = (energy[:-1].diff() + work).abs()
        tolerance, what = 2e-3 * scale * float(distance.diff()[0]), "the energy jumps"
    worst = int(jumps.argmax())
    assert float(jumps[worst]) <= tolerance, (
        f"{what} by {float(jumps[worst]):.2e} near {float(distance[worst]):.3f} Å"
    )
    # Out of reach of the first atom; the second, farther away still, is so, too.
    _close(energy[-1], energy[-2], 1e-6 * scale, "energy at the cutoff", scaled=False)
    _zero(force[-1], "force at the cutoff", 1e-4 * scale)
    beyond = distance > cutoff
    _zero(force[:-1][beyond], "force beyond the cutoff")


# -- bookkeeping -------------------------------------------------------------------------------


def check_batched_equals_single(potential: Potential) -> None:
    """Systems of a batch do not notice one another."""
    structures = contract_structures(potential)
    together = _predict(potential, structures)
    offsets = structures.atom_offsets.tolist()
    for s in range(structures.n_systems):
        alone = _predict(potential, structures[s])
        for name in ("energy", "stress"):
            if name in alone.properties and (name == "energy" or bool(structures.pbc[s].all())):
                _close(together[name][s], alone[name][0], 1e-10, f"{name} of system {s}")
        for name in ("forces", "atomic_energies"):
            rows = together[name][offsets[s] : offsets[s + 1]]
            _close(rows, alone[name], 1e-10, f"{name} of system {s}")


def check_longer_lists_change_nothing(potential: Potential) -> None:
    """Pairs beyond the cutoff are ignored, and a list that is too short is refused."""
    structures = contract_structures(potential)
    expected = _predict(potential, structures)
    longer = build_neighbor_list(structures, 1.4 * potential.cutoff)
    taps = [name for name, spec in potential.taps.items() if spec.kind != "edge_scalar"]
    after = potential.predict(structures, longer, _names(potential), taps=taps)
    _same(after, expected, tolerance=1e-10)
    for name in taps:
        _close(after.features[name], expected.features[name], 1e-10, f"tap {name}")
    shorter = build_neighbor_list(structures, 0.9 * potential.cutoff)
    _refused(
        lambda: potential.predict(structures, shorter),
        "a neighbor list shorter than the cutoff was accepted",
    )


def check_ghosts(potential: Potential) -> None:
    """Explicit images as ghost atoms give the periodic result, as in LAMMPS.

    A model whose atoms must know their neighbors' neighbors may refuse ghosts with `ModelError`;
    it must not be wrong.
    """
    structures = contract_structures(potential).select([0])
    expected = _predict(potential, structures)
    neighbors = build_neighbor_list(structures, potential.cutoff)
    n = structures.n_atoms
    images = torch.cat([neighbors.neighbor[:, None], neighbors.shifts], dim=1)
    outside = neighbors.shifts.any(dim=1)
    ghosts, ghost_of_pair = torch.unique(images[outside], dim=0, return_inverse=True)
    neighbor = neighbors.neighbor.clone()
    neighbor[outside] = n + ghost_of_pair
    owner = torch.cat([torch.arange(n), ghosts[:, 0]])
    species = structures.species[owner]
    edges = Edges(neighbors.center, neighbor)
    r_ij = pair_vectors(structures, neighbors).requires_grad_(True)
    try:
        output = potential(species, edges, r_ij, n)
    except ModelError:
        return
    energies = output.atomic_energies
    assert energies.shape == (n,), f"{tuple(energies.shape)} energies for {n} local atoms"
    _close(energies.detach(), expected["atomic_energies"], 1e-10, "atomic energies")
    if output.forces is not None:
        _close(output.forces.detach(), expected["forces"], 1e-10, "forces on local atoms")
        return
    if not energies.requires_grad:
        return
    (gradient,) = torch.autograd.grad(energies.sum(), r_ij, allow_unused=True)
    gradient = torch.zeros_like(r_ij) if gradient is None else gradient
    forces = torch.zeros(len(species), 3, dtype=torch.float64)
    forces.index_add_(0, edges.center, gradient).index_add_(0, edges.neighbor, -gradient)
    folded = torch.zeros(n, 3, dtype=torch.float64).index_add(0, owner, forces)
    _close(folded, expected["forces"], 1e-10, "forces, those on ghosts given to their owners")


def check_single_precision(potential: Potential) -> None:
    """Cast to float32, results are float64 tensors that agree to single precision."""
    structures = contract_structures(potential)
    expected = _predict(potential, structures)
    single = copy.deepcopy(potential).to(torch.float32)
    after = _predict(single, structures)
    for name in _names(potential):
        assert after[name].dtype == torch.float64, f"{name} is {after[name].dtype}"
    # Sums over neighbors and layers lose a few digits of the seven.
    _same(after, expected, tolerance=2e-4)


def check_save_and_load(potential: Potential) -> None:
    """A checkpoint gives the same numbers, in both precisions."""
    structures = contract_structures(potential)
    for dtype in (torch.float64, torch.float32):
        saved = copy.deepcopy(potential).to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "potential.pt"
            save_potential(path, saved, {"seed": 7})
            loaded, info = load_potential(path)
        assert info == {"seed": 7}
        assert loaded.dtype == saved.dtype
        assert loaded.direct_forces == saved.direct_forces
        _same(_predict(loaded, structures), _predict(saved, structures), tolerance=0.0)


def check_taps(potential: Potential) -> None:
    """Features have the shapes that they declare; asking for some changes nothing else.

    An unknown name is refused, and the default tap is one of them.
    """
    structures = contract_structures(potential)
    n_pairs = build_neighbor_list(structures, potential.cutoff).n_pairs
    prediction = _predict(potential, structures)
    features = prediction.features
    default = potential.default_tap
    assert default is None or default in potential.taps, f"there is no default tap {default}"
    assert set(features) == set(potential.taps), f"asked for {set(potential.taps)}: {set(features)}"
    for name, spec in potential.taps.items():
        expected = {
            "node_scalar": (structures.n_atoms, spec.width),
            "node_vector": (structures.n_atoms, 3, spec.width),
            "edge_scalar": (n_pairs, spec.width),
        }[spec.kind]
        shape = tuple(features[name].shape)
        assert shape == expected, f"tap {name} has shape {shape}, not {expected}"
    for name in list(features)[-1:]:
        alone = potential.predict(structures, taps=[name]).features
        assert set(alone) == {name}, f"asked for {name} alone: {set(alone)}"
        _close(alone[name], features[name], 1e-12, f"tap {name} alone")
    without = potential.predict(structures, properties=_names(potential))
    _same(without, prediction, tolerance=1e-12)
    _refused(
        lambda: potential.predict(structures, taps=["no such tap"]), "an unknown tap was accepted"
    )


def check_nothing_is_touched(potential: Potential) -> None:
    """Predicting changes neither structures nor potential, and results carry no graph."""
    structures = contract_structures(potential)
    positions, cell = structures.positions.clone(), structures.cell.clone()
    state = {name: value.clone() for name, value in potential.state_dict().items()}
    prediction = _predict(potential, structures)
    assert torch.equal(positions, structures.positions)
    assert torch.equal(cell, structures.cell)
    for name, value in potential.state_dict().items():
        assert torch.equal(state[name], value), f"{name} has changed"
    assert all(p.grad is None for p in potential.parameters()), "gradients were accumulated"
    for name in _names(potential):
        assert not prediction[name].requires_grad, f"{name} carries a graph"


#: All checks by name.
CONTRACT: dict[str, Callable[[Potential], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_rotation_and_reflection,
        check_translation,
        check_permutation,
        check_extensivity,
        check_atomic_energies_sum_to_the_energy,
        check_forces_are_the_gradient,
        check_stress_is_the_strain_derivative,
        check_hessian_vector_product,
        check_force_losses_can_be_trained,
        check_first_order_passes,
        check_prepared_terms,
        check_one_atom,
        check_isolated_atoms,
        check_no_atoms,
        check_perfect_crystals_have_no_forces,
        check_continuity,
        check_batched_equals_single,
        check_longer_lists_change_nothing,
        check_ghosts,
        check_single_precision,
        check_save_and_load,
        check_taps,
        check_nothing_is_touched,
    )
}


# -- structures --------------------------------------------------------------------------------


def contract_structures(potential: Potential, seed: int = 0) -> Structures:
    """Four disordered systems in units of the cutoff, with all species.

    A triclinic cell with many images of its 12 atoms within reach, an open cluster, a slab, and one
    atom in a small cell.
    """
    generator = torch.Generator().manual_seed(seed)
    spacing = 0.55 * potential.cutoff
    n_species = len(potential.species_table)
    parts = []
    for grid, pbc in (
        ((2, 2, 3), (True, True, True)),
        ((2, 2, 2), (False, False, False)),
        ((2, 2, 2), (True, True, False)),
        ((1, 1, 1), (True, True, True)),
    ):
        axes = [torch.arange(k, dtype=torch.float64) for k in grid]
        corners = torch.cartesian_prod(*axes)  # (n, 3)
        shear = torch.eye(3, dtype=torch.float64) + 0.12 * _normal((3, 3), generator)
        positions = spacing * (corners @ shear)
        positions = positions + 0.1 * spacing * _normal((len(corners), 3), generator)
        cell = spacing * torch.diag(torch.tensor(grid, dtype=torch.float64)) @ shear
        cell = torch.where(torch.tensor(pbc)[:, None], cell, 0.0)
        species = (torch.arange(len(corners)) % n_species).tolist()
        parts.append(_structure(potential.species_table, positions, species, cell, pbc))
    return Structures.concatenate(parts)


def _crystals(potential: Potential) -> list[tuple[str, Structures]]:
    """Crystals whose neighbor shells avoid the cutoff."""
    nearest = 0.47 * potential.cutoff
    half, quarter = 0.5, 0.25
    fcc = [(0, 0, 0), (0, half, half), (half, 0, half), (half, half, 0)]
    diamond = fcc + [(x + quarter, y + quarter, z + quarter) for x, y, z in fcc]
    rock_salt = fcc + [(x + half, y, z) for x, y, z in fcc]
    bcc = [(0, 0, 0), (half, half, half)]
    edge = {"sc": 1.0, "bcc": 2 / 3**0.5, "fcc": 2**0.5, "diamond": 4 / 3**0.5}
    sites: dict[str, list[tuple[float, float, float]]] = {
        "sc": [(0, 0, 0)],
        "bcc": bcc,
        "fcc": fcc,
        "diamond": diamond,
    }
    table = potential.species_table
    plans = [
        (f"{name} {table.names[s]}", sites[name], edge[name], [s] * len(sites[name]))
        for name in sites
        for s in range(len(table))
    ]
    if len(table) > 1:
        plans.append(("CsCl", bcc, edge["bcc"], [0, 1]))
        plans.append(("NaCl", rock_salt, 2.0, [0] * 4 + [1] * 4))
    result = []
    for name, fractional, ratio, species in plans:
        cell = nearest * ratio * torch.eye(3, dtype=torch.float64)
        positions = torch.tensor(fractional, dtype=torch.float64) @ cell
        result.append((name, _structure(table, positions, species, cell, (True,) * 3)))
    return result


def _structure(
    table: SpeciesTable,
    positions: Tensor,
    species: Sequence[int],
    cell: Tensor | None = None,
    pbc: tuple[bool, ...] = (False, False, False),
) -> Structures:
    """One system."""
    cell = torch.zeros(3, 3, dtype=torch.float64) if cell is None else cell
    return Structures(
        positions=positions,
        species=torch.tensor(list(species), dtype=torch.int64),
        system_index=torch.zeros(len(species), dtype=torch.int64),
        cell=cell[None],
        pbc=torch.tensor([pbc]),
        species_table=table,
    )


def _supercell(structures: Structures, repeats: tuple[int, int, int]) -> Structures:
    """Repeat one periodic system; copies follow one another."""
    axes = [torch.arange(k, dtype=torch.float64) for k in repeats]
    shifts = torch.cartesian_prod(*axes) @ structures.cell[0]  # (n, 3)
    positions = (shifts[:, None] + structures.positions).flatten(0, 1)
    scale = torch.tensor(repeats, dtype=torch.float64)[:, None]
    return _structure(
        structures.species_table,
        positions,
        structures.species.repeat(len(shifts)).tolist(),
        structures.cell[0] * scale,
        (True, True, True),
    )


# -- comparing ---------------------------------------------------------------------------------


def _names(potential: Potential) -> tuple[str, ...]:
    """What a potential predicts."""
    return tuple(name for name in LEARNABLE if name != "stress" or not potential.direct_forces)


def _predict(potential: Potential, structures: Structures) -> Prediction:
    return potential.predict(structures, properties=_names(potential), taps=list(potential.taps))


def _refused(call: Callable[[], object], otherwise: str) -> None:
    try:
        call()
    except ModelError:
        return
    raise AssertionError(otherwise)


def _jumps(values: Tensor) -> Tensor:
    """Fourth differences: steps of a series stand out, and what is smooth cancels."""
    return values.diff(n=4).abs()


def _derivative(function: Callable[[float], Tensor]) -> Tensor:
    """Fourth-order central difference at zero."""
    terms = [weight * function(k * _STEP) for k, weight in _STENCIL.items()]
    return torch.stack(terms).sum(dim=0) / _STEP


def _same(
    after: Prediction,
    before: Prediction,
    *,
    names: Sequence[str] = LEARNABLE,
    tolerance: float,
) -> None:
    for name in names:
        if name in before.properties:
            _close(after[name], before[name], tolerance, name)


def _close(
    actual: Tensor, expected: Tensor, tolerance: float, what: str, *, scaled: bool = True
) -> None:
    """Compare, relative to the largest expected value or one; NaN must meet NaN."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected"
    )
    missing = torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), missing), f"{what}: NaN in other places"
    actual, expected = actual[~missing], expected[~missing]
    if not actual.numel():
        return
    scale = max(1.0, float(expected.abs().max())) if scaled else 1.0
    worst = float((actual - expected).abs().max())
    assert worst <= tolerance * scale, f"{what} differs by {worst:.2e}, tolerance {tolerance:.0e}"


def _zero(value: Tensor, what: str, tolerance: float = 1e-12) -> None:
    worst = float(value.abs().max()) if value.numel() else 0.0
    assert worst <= tolerance, f"{what}: {worst:.2e} where zero was expected"


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
