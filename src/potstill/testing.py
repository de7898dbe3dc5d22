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
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from potstill.checkpoint import load_potential, save_potential
from potstill.contract import (
    close,
    crystals,
    derivative,
    fourth_differences,
    normal,
    predictable,
    predicted,
    refused,
    same,
    structure,
    with_pairs,
    zero,
)
from potstill.contract import contract_structures as contract_structures
from potstill.errors import ModelError
from potstill.models.base import Edges, Potential
from potstill.models.graph import forces_from_pairs, virial_from_pairs
from potstill.neighbors import build_neighbor_list
from potstill.structures import Structures

# -- symmetry ----------------------------------------------------------------------------------


def check_rotation_and_reflection(potential: Potential) -> None:
    """Energies are invariant; forces, stress and vector taps turn with the structure."""
    structures = contract_structures(potential)
    before = predicted(potential, structures)
    generator = torch.Generator().manual_seed(1)
    for determinant in (1.0, -1.0):
        q, _ = torch.linalg.qr(normal((3, 3), generator))
        q = q * determinant * torch.linalg.det(q)  # in three dimensions, -q flips the sign
        after = predicted(potential, structures.deformed(q.T))
        same(after, before, names=("energy", "atomic_energies"), tolerance=1e-9)
        close(after["forces"], before["forces"] @ q.T, 1e-8, "forces")
        if not potential.direct_forces:
            periodic = structures.pbc.all(dim=1)
            expected = q @ before["stress"][periodic] @ q.T
            close(after["stress"][periodic], expected, 1e-8, "stress")
        for name, spec in potential.taps.items():
            feature = before.features[name]
            if spec.kind == "node_vector":
                feature = torch.einsum("ab,nbf->naf", q.to(feature.dtype), feature)
            if spec.kind != "edge_scalar":  # the order of pairs may change
                close(after.features[name], feature, 1e-8, f"tap {name}")


def check_translation(potential: Potential) -> None:
    """Nothing changes when systems move, or single atoms move by lattice vectors."""
    structures = contract_structures(potential)
    generator = torch.Generator().manual_seed(2)
    shift = potential.cutoff * normal((structures.n_systems, 3), generator)
    images = torch.randint(-1, 2, (structures.n_atoms, 3), generator=generator)
    images = images * structures.pbc[structures.system_index]
    positions = structures.positions + shift[structures.system_index]
    cells = structures.cell[structures.system_index]
    positions = positions + torch.einsum("nk,nkd->nd", images.to(torch.float64), cells)
    moved = replace(structures, positions=positions)
    same(predicted(potential, moved), predicted(potential, structures), tolerance=1e-8)


def check_permutation(potential: Potential) -> None:
    """Reordering the atoms of a system reorders its atoms' results."""
    structures = contract_structures(potential)
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(structures.n_atoms, generator=generator)
    order = torch.argsort(structures.system_index + 0.9 * noise)
    permuted = replace(
        structures, positions=structures.positions[order], species=structures.species[order]
    )
    before, after = predicted(potential, structures), predicted(potential, permuted)
    same(after, before, names=("energy", "stress"), tolerance=1e-9)
    for name in ("forces", "atomic_energies"):
        close(after[name], before[name][order], 1e-9, name)


def check_extensivity(potential: Potential) -> None:
    """A supercell has as many times the energy; atoms and stress do not notice."""
    small = contract_structures(potential)[0]
    before = predicted(potential, small)
    for repeats in ((2, 1, 1), (1, 3, 2)):
        n = repeats[0] * repeats[1] * repeats[2]
        after = predicted(potential, small.repeat(repeats))
        close(after["energy"], n * before["energy"], 1e-9, "energy")
        same(after, before, names=("stress",), tolerance=1e-9)
        close(after["forces"], before["forces"].repeat(n, 1), 1e-9, "forces")
        expected = before["atomic_energies"].repeat(n)
        close(after["atomic_energies"], expected, 1e-9, "atomic energies")


def check_atomic_energies_sum_to_the_energy(potential: Potential) -> None:
    """The energy is the sum of the atomic energies, and these of their terms, in float64."""
    structures = contract_structures(potential)
    prediction = predicted(potential, structures)
    assert prediction.terms.shape == (structures.n_atoms, potential.n_terms)
    atomic = prediction.terms.sum(dim=1)
    close(atomic, prediction["atomic_energies"], 1e-12, "sum of the terms")
    for name, penalty in potential.regularizers().items():
        values = penalty(prediction.terms)
        assert values.shape == (structures.n_atoms,), f"{name} gives {tuple(values.shape)}"
        assert bool(torch.isfinite(values).all()), f"{name} is not finite"
    total = structures.sum_by_system(prediction["atomic_energies"])
    close(prediction["energy"], total, 1e-12, "energy")


# -- derivatives -------------------------------------------------------------------------------


def check_forces_are_the_gradient(potential: Potential) -> None:
    """Finite differences of the energy along random directions."""
    if potential.direct_forces:
        return
    structures = contract_structures(potential)
    forces = predicted(potential, structures)["forces"]
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        direction = normal((structures.n_atoms, 3), generator)

        def energy(t: float, direction: Tensor = direction) -> Tensor:
            moved = replace(structures, positions=structures.positions + t * direction)
            return potential.predict(moved, properties=["energy"])["energy"]

        slope = structures.sum_by_system((forces * direction).sum(dim=1))
        close(-slope, derivative(energy), 1e-6, "force along a direction")


def check_stress_is_the_strain_derivative(potential: Potential) -> None:
    """Finite differences of the energy for the six strains; positive in tension."""
    if potential.direct_forces:
        refused(
            lambda: potential.predict(contract_structures(potential), properties=["stress"]),
            "a model with direct forces gave a stress",
        )
        return
    structures = contract_structures(potential).select([0, 3])
    stress = predicted(potential, structures)["stress"]
    for a, b in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        strain = torch.zeros(3, 3, dtype=torch.float64)
        strain[a, b] += 0.5
        strain[b, a] += 0.5

        def energy(t: float, strain: Tensor = strain) -> Tensor:
            deform = torch.eye(3, dtype=torch.float64) + t * strain
            return potential.predict(structures.deformed(deform), properties=["energy"])["energy"]

        close(stress[:, a, b], derivative(energy) / structures.volume, 1e-6, f"stress {a}{b}")


def check_hessian_vector_product(potential: Potential) -> None:
    """Finite differences of the forces, and the Hessian's symmetry."""
    structures = contract_structures(potential)
    generator = torch.Generator().manual_seed(5)
    u, v = normal((2, structures.n_atoms, 3), generator)
    if potential.direct_forces:
        refused(
            lambda: potential.hessian_vector_product(structures, v),
            "a model with direct forces gave a Hessian",
        )
        return

    def forces(t: float) -> Tensor:
        moved = replace(structures, positions=structures.positions + t * v)
        return potential.predict(moved, properties=["forces"])["forces"]

    product = potential.hessian_vector_product(structures, v)
    close(product, -derivative(forces), 1e-5, "Hessian times a vector")
    other = potential.hessian_vector_product(structures, u)
    close((u * product).sum(), (v * other).sum(), 1e-9, "u H v and v H u")


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
    directions = [normal(tuple(w.shape), generator).to(w) for w in weights]
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
    close(slope, derivative(along), 1e-5, "derivative of the loss by the weights")


def check_first_order_passes(potential: Potential) -> None:
    """`evaluate` and `weighted_energy`, which kernels may serve, agree with `forward`."""
    structures, neighbors, edges, r_ij = with_pairs(potential)
    n = structures.n_atoms
    found = potential.evaluate(structures, neighbors)
    partial = found.terms
    assert partial.shape == (n, potential.n_terms), f"evaluate gives {tuple(partial.shape)}"
    for value in (partial, found.forces, found.virial):
        assert not value.requires_grad, "evaluate leaves a graph"
    variable = r_ij.clone().requires_grad_(True)
    output = potential(structures.species, edges, variable, n)
    atomic = output.atomic_energies
    close(partial.sum(dim=1), atomic.detach(), 1e-10, "energies of evaluate")
    if output.forces is not None:
        close(found.forces, output.forces.detach(), 1e-10, "forces of evaluate")
        assert bool(found.virial.isnan().all()), "a model with direct forces gave a virial"
    elif atomic.requires_grad:
        (gradient,) = torch.autograd.grad(atomic.sum(), variable, materialize_grads=True)
        close(found.forces, forces_from_pairs(gradient, edges, n), 1e-10, "forces of evaluate")
        virial = virial_from_pairs(gradient, r_ij, edges, structures)
        close(found.virial, virial, 1e-10, "virial of evaluate")
    weights = normal(tuple(partial.shape), torch.Generator().manual_seed(8))
    energy = potential.weighted_energy([(structures, weights)], neighbors)
    close(energy.detach(), (weights * partial).sum(), 1e-10, "weighted energy")
    parameters = [p for p in potential.parameters() if p.requires_grad]
    if not parameters:
        return
    terms = potential.partial_energies(structures.species, edges, r_ij, n)
    expected_by_parameter = torch.autograd.grad(
        (weights * terms).sum(), parameters, materialize_grads=True
    )
    by_parameter = torch.autograd.grad(energy, parameters, materialize_grads=True)
    for one, other in zip(by_parameter, expected_by_parameter, strict=True):
        close(one, other, 1e-9, "derivative of the weighted energy")


# -- limits ------------------------------------------------------------------------------------


def check_prepared_terms(potential: Potential) -> None:
    """Compilable potentials give the same in two parts as in one."""
    if not potential.compilable:
        return
    structures, _, edges, r_ij = with_pairs(potential)
    arguments = (structures.species, edges, r_ij, structures.n_atoms)
    prepared = potential.prepare(*arguments)
    with torch.no_grad():
        found = potential.prepared_terms(prepared, r_ij)
        expected = potential.partial_energies(*arguments)
    close(found, expected, 1e-12, "prepared terms")


def check_one_atom(potential: Potential) -> None:
    """One atom, free or in a wide cell: finite energy, no force, no stress."""
    edge = 4.0 * potential.cutoff
    for periodic in (False, True):
        for species in range(len(potential.species_table)):
            atom = structure(
                potential.species_table,
                torch.full((1, 3), 0.3, dtype=torch.float64),
                [species],
                edge * torch.eye(3, dtype=torch.float64),
                (periodic,) * 3,
            )
            prediction = predicted(potential, atom)
            assert bool(torch.isfinite(prediction["energy"]).all()), "energy of one atom"
            zero(prediction["forces"], "forces on one atom")
            if periodic and not potential.direct_forces:
                zero(prediction["stress"], "stress of one atom")
            for name, feature in prediction.features.items():
                assert bool(torch.isfinite(feature).all()), f"tap {name} of one atom"
            if not potential.direct_forces:
                ones = torch.ones(1, 3, dtype=torch.float64)
                zero(potential.hessian_vector_product(atom, ones), "Hessian of one atom")


def check_isolated_atoms(potential: Potential) -> None:
    """Atoms out of each other's reach: their energies add up and no force acts."""
    table = potential.species_table
    kinds = [s for s in range(len(table)) for _ in range(2)]
    distance = 2.5 * potential.cutoff
    positions = torch.zeros(len(kinds), 3, dtype=torch.float64)
    positions[:, 0] = distance * torch.arange(len(kinds))
    together = structure(table, positions, kinds)
    alone = Structures.concatenate(
        [structure(table, torch.zeros(1, 3, dtype=torch.float64), [s]) for s in kinds]
    )
    prediction = predicted(potential, together)
    expected = predicted(potential, alone)["energy"]
    close(prediction["atomic_energies"], expected, 1e-12, "energies of isolated atoms")
    zero(prediction["forces"], "forces on isolated atoms")


def check_no_atoms(potential: Potential) -> None:
    """An empty system inside a batch, and an empty batch."""
    structures = contract_structures(potential)
    nothing = structure(
        potential.species_table, torch.zeros(0, 3, dtype=torch.float64), [], structures.cell[0]
    )
    some = structures.select([1])
    batch = Structures.concatenate([nothing, some, nothing])
    prediction = predicted(potential, batch)
    close(prediction["energy"][1:2], predicted(potential, some)["energy"], 1e-12, "energy")
    zero(prediction["energy"][[0, 2]], "energy of nothing")
    for empty in (nothing, structures.select([])):
        prediction = predicted(potential, empty)
        assert prediction["energy"].shape == (empty.n_systems,)
        assert prediction["forces"].shape == (0, 3)
        if not potential.direct_forces:
            assert prediction["stress"].shape == (empty.n_systems, 3, 3)


def check_perfect_crystals_have_no_forces(potential: Potential) -> None:
    """Simple cubic, bcc, fcc, diamond, and two-species crystals where there are two species."""
    scale = float(predicted(potential, contract_structures(potential))["forces"].abs().max())
    for name, crystal in crystals(potential):
        forces = predicted(potential, crystal)["forces"]
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
        frames.append(structure(table, positions.to(torch.float64), [0, last, last]))
    batch = Structures.concatenate(frames)
    prediction = predicted(potential, batch)
    energy = prediction["energy"]
    force = prediction["forces"].view(-1, 3, 3)[:, 2, 0]  # on the leaving atom, along its path
    scale = max(float(force.abs().max()), 1.0)
    if potential.direct_forces:
        jumps = torch.maximum(fourth_differences(energy[:-1]), fourth_differences(force[:-1]))
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
    close(energy[-1], energy[-2], 1e-6 * scale, "energy at the cutoff", scaled=False)
    zero(force[-1], "force at the cutoff", 1e-4 * scale)
    beyond = distance > cutoff
    zero(force[:-1][beyond], "force beyond the cutoff")


# -- bookkeeping -------------------------------------------------------------------------------


def check_batched_equals_single(potential: Potential) -> None:
    """Systems of a batch do not notice one another."""
    structures = contract_structures(potential)
    together = predicted(potential, structures)
    offsets = structures.atom_offsets.tolist()
    for s in range(structures.n_systems):
        alone = predicted(potential, structures[s])
        for name in ("energy", "stress"):
            if name in alone.properties and (name == "energy" or bool(structures.pbc[s].all())):
                close(together[name][s], alone[name][0], 1e-10, f"{name} of system {s}")
        for name in ("forces", "atomic_energies"):
            rows = together[name][offsets[s] : offsets[s + 1]]
            close(rows, alone[name], 1e-10, f"{name} of system {s}")


def check_longer_lists_change_nothing(potential: Potential) -> None:
    """Pairs beyond the cutoff are ignored, and a list that is too short is refused."""
    structures = contract_structures(potential)
    expected = predicted(potential, structures)
    longer = build_neighbor_list(structures, 1.4 * potential.cutoff)
    taps = [name for name, spec in potential.taps.items() if spec.kind != "edge_scalar"]
    after = potential.predict(structures, longer, predictable(potential), taps=taps)
    same(after, expected, tolerance=1e-10)
    for name in taps:
        close(after.features[name], expected.features[name], 1e-10, f"tap {name}")
    shorter = build_neighbor_list(structures, 0.9 * potential.cutoff)
    refused(
        lambda: potential.predict(structures, shorter),
        "a neighbor list shorter than the cutoff was accepted",
    )


def check_ghosts(potential: Potential) -> None:
    """Explicit images as ghost atoms give the periodic result, as in LAMMPS.

    A model whose atoms must know their neighbors' neighbors may refuse ghosts with `ModelError`;
    it must not be wrong.
    """
    structures, neighbors, _, r_ij = with_pairs(potential, [0])
    expected = predicted(potential, structures)
    n = structures.n_atoms
    images = torch.cat([neighbors.neighbor[:, None], neighbors.shifts], dim=1)
    outside = neighbors.shifts.any(dim=1)
    ghosts, ghost_of_pair = torch.unique(images[outside], dim=0, return_inverse=True)
    neighbor = neighbors.neighbor.clone()
    neighbor[outside] = n + ghost_of_pair
    owner = torch.cat([torch.arange(n), ghosts[:, 0]])
    species = structures.species[owner]
    edges = Edges(neighbors.center, neighbor)
    r_ij.requires_grad_(True)
    try:
        output = potential(species, edges, r_ij, n)
    except ModelError:
        return
    energies = output.atomic_energies
    assert energies.shape == (n,), f"{tuple(energies.shape)} energies for {n} local atoms"
    close(energies.detach(), expected["atomic_energies"], 1e-10, "atomic energies")
    if output.forces is not None:
        close(output.forces.detach(), expected["forces"], 1e-10, "forces on local atoms")
        return
    if not energies.requires_grad:
        return
    (gradient,) = torch.autograd.grad(energies.sum(), r_ij, materialize_grads=True)
    forces = torch.zeros(len(species), 3, dtype=torch.float64)
    forces.index_add_(0, edges.center, gradient).index_add_(0, edges.neighbor, -gradient)
    folded = torch.zeros(n, 3, dtype=torch.float64).index_add(0, owner, forces)
    close(folded, expected["forces"], 1e-10, "forces, those on ghosts given to their owners")


def check_reach(potential: Potential) -> None:
    """Atoms beyond the reach that a model states have no part in an atom's energy.

    Engines that divide a system into domains rely on it.
    """
    if potential.reach == math.inf:
        return
    spacing = 0.55 * potential.cutoff
    length = 2 * math.ceil(potential.reach / spacing) + 4
    corners = torch.cartesian_prod(*(torch.arange(k).double() for k in (length, 2, 2)))
    noise = normal((len(corners), 3), torch.Generator().manual_seed(9))
    positions = spacing * (corners + 0.1 * noise)
    kinds = [k % len(potential.species_table) for k in range(len(corners))]
    rod = structure(potential.species_table, positions, kinds)
    center = len(corners) // 2
    distance = torch.linalg.vector_norm(positions - positions[center], dim=1)
    kept = (distance <= potential.reach).nonzero()[:, 0]
    assert len(kept) < len(corners)
    part = structure(potential.species_table, positions[kept], [kinds[k] for k in kept])
    expected = predicted(potential, rod)["atomic_energies"][center]
    found = predicted(potential, part)["atomic_energies"][kept == center]
    close(found, expected[None], 1e-10, "energy without the atoms beyond the reach")


def check_single_precision(potential: Potential) -> None:
    """Cast to float32, results are float64 tensors that agree to single precision."""
    structures = contract_structures(potential)
    expected = predicted(potential, structures)
    single = copy.deepcopy(potential).to(torch.float32)
    after = predicted(single, structures)
    for name in predictable(potential):
        assert after[name].dtype == torch.float64, f"{name} is {after[name].dtype}"
    # Sums over neighbors and layers lose a few digits of the seven.
    same(after, expected, tolerance=2e-4)


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
        same(predicted(loaded, structures), predicted(saved, structures), tolerance=0.0)


def check_taps(potential: Potential) -> None:
    """Features have the shapes that they declare; asking for some changes nothing else.

    An unknown name is refused, and the default tap is one of them.
    """
    structures = contract_structures(potential)
    n_pairs = build_neighbor_list(structures, potential.cutoff).n_pairs
    prediction = predicted(potential, structures)
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
        close(alone[name], features[name], 1e-12, f"tap {name} alone")
    without = potential.predict(structures, properties=predictable(potential))
    same(without, prediction, tolerance=1e-12)
    refused(
        lambda: potential.predict(structures, taps=["no such tap"]), "an unknown tap was accepted"
    )


def check_nothing_is_touched(potential: Potential) -> None:
    """Predicting changes neither structures nor potential, and results carry no graph."""
    structures = contract_structures(potential)
    positions, cell = structures.positions.clone(), structures.cell.clone()
    state = {name: value.clone() for name, value in potential.state_dict().items()}
    prediction = predicted(potential, structures)
    assert torch.equal(positions, structures.positions)
    assert torch.equal(cell, structures.cell)
    for name, value in potential.state_dict().items():
        assert torch.equal(state[name], value), f"{name} has changed"
    assert all(p.grad is None for p in potential.parameters()), "gradients were accumulated"
    for name in predictable(potential):
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
        check_reach,
        check_single_precision,
        check_save_and_load,
        check_taps,
        check_nothing_is_touched,
    )
}
