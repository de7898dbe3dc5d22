"""HIP-NN's own conventions, beyond the contract of every model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from numpy.polynomial import chebyshev, legendre

from potstill.errors import ModelError
from potstill.models import HIPNN
from potstill.models.base import Edges, StartingData
from potstill.models.hipnn import CUTOFF_FUNCTIONS, hierarchicality
from potstill.models.hipnn.interactions import TRIPLES, Chebyshev, Triples, tensor_components
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures

AL = SpeciesTable.from_symbols(["Al"])
SIZES: dict[str, Any] = dict(
    n_features=6,
    n_sensitivities=5,
    dist_soft_min=1.5,
    dist_soft_max=4.0,
    dist_hard_max=4.5,
    n_atom_layers=1,
    cutoff_function="polynomial",
)
SMOOTH: dict[str, Any] = dict(SIZES, l_max=4, invariants="smooth", n_channels=6, n_triples=2)
NORMS: dict[str, Any] = dict(SIZES, l_max=2, invariants="norms", cusp_reg=1e-6)


def network(table: SpeciesTable = AL, **hyperparameters: Any) -> HIPNN:
    torch.manual_seed(2)
    return HIPNN(table, **hyperparameters).double()


def test_sensitivities_start_between_the_soft_distances() -> None:
    model = HIPNN(AL, 4, 10, 1.5, 7.0, 7.5, 1)
    sensitivity = model.blocks[0][0].layer.sensitivity.requires_grad_(False)
    assert float(sensitivity.mu.max()) == pytest.approx(7.0, rel=1e-6)
    assert float(sensitivity.mu.min()) == pytest.approx(1.5, rel=1e-6)
    assert sensitivity.sigma.tolist() == pytest.approx([2 * 10 * 1.5] * 10)
    steps = (1.0 / sensitivity.mu).diff()
    assert float(steps.std()) < 1e-6 * float(steps.mean().abs()) + 1e-7


@pytest.mark.parametrize(("name", "n_smooth"), [("cosine_squared", 1), ("polynomial", 2)])
def test_cutoff_functions_end_as_smoothly_as_they_say(name: str, n_smooth: int) -> None:
    r = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    value = CUTOFF_FUNCTIONS[name](r, 5.0)
    derivatives = [float(value.detach())]
    for _ in range(n_smooth):
        (value,) = torch.autograd.grad(value.sum(), r, create_graph=True)
        derivatives.append(float(value.detach()))
    assert derivatives == pytest.approx([0.0] * (n_smooth + 1), abs=1e-12)
    assert float(CUTOFF_FUNCTIONS[name](torch.zeros(1), 5.0)) == pytest.approx(1.0)


def test_hierarchicality_is_zero_where_both_terms_vanish() -> None:
    terms = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    value = hierarchicality(terms)
    assert value.tolist() == pytest.approx([0.0, 16.0 / 25.0])
    (gradient,) = torch.autograd.grad(value.sum(), terms)
    assert torch.isfinite(gradient).all()


def test_energy_layers_start_near_the_linear_fit() -> None:
    torch.manual_seed(1)
    model = HIPNN(AL, 6, 5, 1.6, 4.0, 4.5, 1, n_interaction_layers=2)
    before = [layer.weight.detach().clone() for layer in model.energy_layers]
    model.initialize_from(StartingData(torch.tensor([-3.7]), ()))
    assert model.energy_layers[0].weight.item() == pytest.approx(-3.7)
    for k, scale in ((1, 1e-2), (2, 1e-4)):
        torch.testing.assert_close(model.energy_layers[k].weight.detach(), before[k] * scale)
    crystal = Structures.from_ase(bulk("Al", cubic=True))
    energy = model.predict(crystal, properties=("energy",))["energy"]
    assert float(energy) / 4 == pytest.approx(-3.7, abs=0.1)


def test_bad_hyper_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match="l_max must be"):
        HIPNN(AL, 4, 4, 1.5, 4.0, 5.0, 1, l_max=3)
    with pytest.raises(ModelError, match="dist_soft_min < dist_soft_max"):
        HIPNN(AL, 4, 4, 4.5, 4.0, 5.0, 1)
    with pytest.raises(ModelError, match="did you mean 'polynomial'"):
        HIPNN(AL, 4, 4, 1.5, 4.0, 5.0, 1, cutoff_function="polynomail")
    with pytest.raises(ModelError, match="'n_feature'; did you mean 'n_features'"):
        HIPNN(AL, n_feature=4)
    with pytest.raises(ModelError, match=r"n_features: .* greater than or equal to 1 \(it is 0\)"):
        HIPNN(AL, 0)
    for named in ({"n_channels": 3, "n_triples": 4}, {"invariants": "norms", "n_triples": 1}):
        with pytest.raises(ModelError, match="n_triples must be at most n_channels"):
            HIPNN(AL, **named)
    for named in ({"n_high_sensitivities": 11}, {"invariants": "norms", "n_high_sensitivities": 5}):
        with pytest.raises(ModelError, match="n_high_sensitivities must be at most n_sens"):
            HIPNN(AL, **named)
    with pytest.raises(ModelError, match=r"too many .*: n_features"):
        HIPNN(AL, 4, n_features=4)


def test_defaults_are_a_small_student_and_complete_configs_keep_the_old_ones() -> None:
    small = HIPNN(AL)
    assert (small.hyper.invariants, small.hyper.cutoff_function) == ("smooth", "polynomial")
    assert HIPNN(AL, invariants="norms").hyper.cusp_reg == 1e-2
    old = HIPNN(AL, 4, 4, 1.5, 4.0, 5.0, 1)
    assert (old.hyper.invariants, old.hyper.cutoff_function) == ("norms", "cosine_squared")
    assert (old.hyper.l_max, old.hyper.cusp_reg) == (1, 1e-6)
    for model in (small, old):
        assert HIPNN(AL, **model.hyperparameters()).hyper == model.hyper
    assert "invariants" not in old.hyperparameters()  # fingerprints of old potentials stay
    assert old.hyper.n_triples == 0 < small.hyper.n_triples
    later = {"n_triples", "n_high_sensitivities"}
    before = {k: v for k, v in small.hyperparameters().items() if k not in later}
    without = HIPNN(AL, **before)  # a file from before there were products
    assert (without.hyper.n_triples, without.hyper.n_high_sensitivities) == (0, 10)
    assert without.hyperparameters() == before
    assert HIPNN(AL, **before, n_triples=3).hyper.n_triples == 3
    assert HIPNN(AL, n_channels=3).hyper.n_triples == 3
    assert HIPNN(AL, n_channels=3, n_triples=1).hyper.n_triples == 1
    assert small.hyper.n_high_sensitivities == 5
    assert HIPNN(AL, n_sensitivities=7).hyper.n_high_sensitivities == 4
    for n in (1, 3, 7):  # dropped or not, the values come back
        model = HIPNN(AL, l_max=4, n_sensitivities=7, n_high_sensitivities=n)
        again = HIPNN(AL, **model.hyperparameters())
        assert again.hyper.n_tensor_sensitivities == (7, 7, n, n)
        cheap = HIPNN(AL, **{**model.hyperparameters(), "first_high_rank": 1})
        again = HIPNN(AL, **cheap.hyperparameters())
        assert again.hyper.n_tensor_sensitivities == (n, n, n, n)
    assert "first_high_rank" not in small.hyperparameters()  # fingerprints stay here as well


def test_integers_stay_integers_where_fingerprints_hashed_them() -> None:
    old = HIPNN(AL, 4, 4, 1, 4, 5, 1).hyperparameters()
    assert json.dumps([old["dist_soft_min"], old["dist_soft_max"]]) == "[1, 4]"
    assert json.dumps(old["dist_hard_max"]) == "5.0"


# -- smooth invariants -----------------------------------------------------------------------------


def directions(n: int) -> torch.Tensor:
    """(n, 3) random unit vectors."""
    torch.manual_seed(3)
    return torch.nn.functional.normalize(torch.randn(n, 3, dtype=torch.float64), dim=1)


def ranks(components: torch.Tensor) -> list[torch.Tensor]:
    """Components from rank 1 on; of rank 2 all nine."""
    _, one, two, three, four = components.split([1, 3, 5, 7, 9], dim=1)
    xx, xy, xz, yy, yz = two.unbind(1)
    full = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, -xx - yy], dim=1)
    return [one, full, three, four]


def test_tensors_obey_the_addition_theorem() -> None:
    """Inner products are Legendre polynomials of the angle: |T| is 1 in ranks 1, 3 and 4."""
    u, v = directions(20), directions(40)[20:]
    cosines = (u * v).sum(dim=1).numpy()
    for unit, angle in ((v, cosines), (u, np.ones(20))):
        pairs = zip(ranks(tensor_components(u, 4)), ranks(tensor_components(unit, 4)), strict=True)
        for rank, (a, b) in enumerate(pairs, start=1):
            expected = legendre.legval(angle, np.eye(5)[rank]) * (2 / 3 if rank == 2 else 1)
            assert (a * b).sum(dim=1).numpy() == pytest.approx(expected, abs=1e-13)


def test_tensors_of_a_rank_rotate_into_one_another() -> None:
    rotation = torch.linalg.matrix_exp(
        torch.tensor([[0, 1, -2], [-1, 0, 0.7], [2, -0.7, 0]]).double()
    )
    u = directions(40)
    rotated = ranks(tensor_components(u @ rotation, 4))
    for before, after in zip(ranks(tensor_components(u, 4)), rotated, strict=True):
        matrix = torch.linalg.lstsq(before, after, driver="gelsd").solution
        torch.testing.assert_close(before @ matrix, after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 17])
def test_radial_functions_are_chebyshev_polynomials(n: int) -> None:
    model = network(**(SMOOTH | {"n_sensitivities": n}))
    r = torch.linspace(0.1, 6.0, 60, dtype=torch.float64)
    values = Chebyshev(model.hyper)(r)
    envelope = CUTOFF_FUNCTIONS["polynomial"](r, 4.5).numpy()
    x = (2.0 * r / 4.5 - 1.0).clamp(max=1.0).numpy()
    assert values.numpy() == pytest.approx(
        chebyshev.chebvander(x, n - 1) * envelope[:, None], abs=1e-13
    )
    assert float(values[r >= 4.5].abs().max()) == 0.0


def curvature(model: HIPNN, crystal: Atoms, displace: Any, step: float) -> float:
    """Second difference of the energy, eV, by a step."""
    energies = []
    for sign in (-1, 0, 1):
        atoms = crystal.copy()
        displace(atoms, sign * step)
        energies.append(model.predict(Structures.from_ase(atoms), properties=("energy",))["energy"])
    return float(energies[0] + energies[2] - 2.0 * energies[1]) / step**2


def move(atoms: Atoms, by: float) -> None:
    atoms.positions[0] += by * np.array([0.6, 0.8, 0.0])


def shear(atoms: Atoms, by: float) -> None:
    """The strain of C': (C11 - C12) / 2."""
    atoms.set_cell(atoms.cell.array @ np.diag([1.0 + by, 1.0 - by, 1.0]), scale_atoms=True)


@pytest.mark.parametrize("structure", ["bcc", "diamond"])
@pytest.mark.parametrize(
    ("displace", "steps"), [(move, (0.001, 0.01, 0.03)), (shear, (0.001, 0.01))]
)
def test_crystals_have_curvatures_that_do_not_depend_on_the_step(
    structure: str, displace: Any, steps: tuple[float, ...]
) -> None:
    """Norms of tensors that vanish by symmetry are cones there."""
    edge = 5.43 if structure == "diamond" else 3.1
    crystal = bulk("Al", structure, a=edge, cubic=True)
    crystal = crystal if structure == "diamond" else crystal.repeat(2)
    smooth = [curvature(network(**SMOOTH), crystal, displace, step) for step in steps]
    # Without triples the curvature is 6 eV; here parts of that size nearly cancel.
    assert smooth == pytest.approx([smooth[0]] * len(steps), rel=0.015, abs=0.05)
    cone = [abs(curvature(network(**NORMS), crystal, displace, step)) for step in steps]
    assert cone[0] > 2.0 * cone[-1]


@pytest.mark.parametrize("name", CUTOFF_FUNCTIONS)
def test_energies_end_at_the_cutoff_as_their_cutoff_function_does(name: str) -> None:
    """A third atom passes the cutoff: with the polynomial, not even the curvature jumps."""
    model = network(**(SMOOTH | {"cutoff_function": name}))
    edges = Edges(torch.tensor([0, 0]), torch.tensor([1, 2]))

    def derivatives(r: float) -> list[float]:
        x = torch.tensor(r, dtype=torch.float64, requires_grad=True)
        vectors = torch.stack([torch.tensor([0.0, 2.0, 1.0]).double(), x * directions(1)[0]])
        species = torch.zeros(3, dtype=torch.int64)
        (value,) = model(species, edges, vectors, 1).atomic_energies
        found = [value]
        for _ in range(2):
            found += torch.autograd.grad(found[-1], x, create_graph=True)
        return [float(d.detach()) for d in found]

    beyond = derivatives(4.6)
    assert beyond[1:] == [0.0, 0.0]
    near, nearer = (np.abs(np.subtract(derivatives(4.5 - h), beyond)) for h in (2e-4, 1e-4))
    order = np.log2(near[1:] / nearer[1:])  # of the slope and the curvature
    assert order == pytest.approx([2.0, 1.0] if name == "polynomial" else [1.0, 0.0], abs=0.02)


def test_whitening_makes_the_covariances_of_the_sums_the_identity() -> None:
    table = SpeciesTable.from_symbols(["Al", "Cu"])
    model = network(table, **(SMOOTH | {"n_sensitivities": 3, "n_interaction_layers": 2}))
    atoms = bulk("Al", cubic=True).repeat((3, 3, 2))
    atoms.rattle(0.3, seed=0)
    atoms.symbols[::3] = "Cu"
    batch = Structures.from_ase(atoms).with_species_table(table)
    offsets = torch.zeros(2, dtype=torch.float64)
    model.initialize_from(StartingData(offsets, (batch,)))
    pairs = build_neighbor_list(batch, model.cutoff)
    layer = model.blocks[0][0].layer
    geometry = []
    layer.register_forward_pre_hook(lambda _, inputs: geometry.append(inputs))
    model(batch.species, Edges.of(batch, pairs), pair_vectors(batch, pairs), batch.n_atoms)
    sums = layer.environment(*geometry[0]).detach()  # (n, 25, n_sums)
    n_atoms, _, n_sums = sums.shape
    torch.testing.assert_close(layer.center, sums[:, 0].mean(dim=0))
    sums[:, 0] -= layer.center
    whitened = [sums[:, m] @ layer.whitening[int(m**0.5)] for m in range(25)]
    scalar, *tensors = torch.stack(whitened, dim=1).split([1, 3, 5, 7, 9], dim=1)
    xx, xy, xz, yy, yz = tensors[1].unbind(1)
    tensors[1] = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, -xx - yy], dim=1)
    for rank in (scalar, *tensors):
        covariance = torch.einsum("nme,nmf->ef", rank, rank) / n_atoms
        torch.testing.assert_close(covariance, torch.eye(n_sums).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("l_max", [0, 4])
def test_all_matrices_but_those_of_energies_are_regularized(l_max: int) -> None:
    model = network(**(SMOOTH | {"l_max": l_max, "n_interaction_layers": 2}))
    named = dict(model.named_parameters())
    covered = {id(weight) for weight in model.regularized_weights()}
    left_out = {name for name, p in named.items() if p.ndim > 1 and id(p) not in covered}
    assert left_out == {f"energy_layers.{k}.weight" for k in range(3)}
    crystal = Structures.from_ase(bulk("Al"))
    model.use_core("torch")
    energy = model.predict(crystal, properties=("energy",), create_graph=True)["energy"]
    gradients = torch.autograd.grad(energy.sum(), list(named.values()), allow_unused=True)
    unused = {name for name, g in zip(named, gradients, strict=True) if g is None}
    assert not unused


def triple(components: torch.Tensor, ranks: tuple[int, int, int]) -> torch.Tensor:
    """(n,) product of a channel's tensors from (n, 24) components, not divided by their size."""
    number = TRIPLES.index(ranks)
    zeros = torch.zeros(len(components), 4, 1, dtype=torch.float64)
    return Triples.up_to(4)(components.unsqueeze(2), zeros)[:, number, 0]


def test_triples_of_low_rank_are_what_matrices_give() -> None:
    torch.manual_seed(4)
    v, full = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 3, 3, dtype=torch.float64)
    q = full + full.transpose(1, 2)
    q = q - torch.eye(3) * q.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    others = torch.randn(20, 16, dtype=torch.float64)
    components = torch.cat([v, q[:, [0, 0, 0, 1, 1], [0, 1, 2, 1, 2]], others], dim=1)
    # of a unit vector n and n n - 1/3: n·Q·n = 2/3 and tr Q³ = 2/9, where |Q|² = 2/3
    v_q_v = torch.einsum("ni,nij,nj->n", v, q, v)
    expected = (2 / 3) ** 0.5 * v_q_v / (2 / 3)
    torch.testing.assert_close(triple(components, (1, 1, 2)), expected)
    cubed = torch.linalg.matrix_power(q, 3).diagonal(dim1=1, dim2=2).sum(dim=1)
    expected = (2 / 3) ** 1.5 * cubed / (2 / 9)
    torch.testing.assert_close(triple(components, (2, 2, 2)), expected)


@pytest.mark.parametrize("ranks", TRIPLES)
def test_triples_do_not_change_when_all_tensors_are_rotated(ranks: tuple[int, int, int]) -> None:
    """Tensors are sums over directions: rotating these rotates the tensors."""
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]  # or a reflection
    near = directions(12)

    def product(turn: torch.Tensor) -> torch.Tensor:
        sums = tensor_components(near @ turn, 4).reshape(3, 4, 25).sum(dim=1)
        return triple(sums[:, 1:], ranks)

    still = product(torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(product(rotation), still)
    assert float(still.abs().min()) > 1e-4


def test_triples_tell_apart_neighbors_with_the_same_distances_and_angles() -> None:
    """0, 1, 2, 5 and 0, 1, 3, 4 of eight points on a circle are homometric.

    The six distances between the points of one are those of the other: an atom in the middle sees
    the same three-body terms, and only those with three angles differ.
    """
    energies = {}
    for n_triples in (0, 2):
        model = network(**(SMOOTH | {"n_triples": n_triples}))
        model.use_core("torch")
        for points in ((0, 1, 2, 5), (0, 1, 3, 4)):
            angle = np.array(points) * np.pi / 4
            ring = 2.2 * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
            atoms = Atoms("Al5", positions=[(0, 0, 0), *ring])
            found = model.predict(Structures.from_ase(atoms), properties=("atomic_energies",))
            energies[n_triples, points] = float(found["atomic_energies"][0])
    same, different = (energies[n, (0, 1, 2, 5)] - energies[n, (0, 1, 3, 4)] for n in (0, 2))
    assert abs(same) < 1e-12
    assert abs(different) > 1e-6


def test_fewer_radial_functions_of_high_ranks_are_weights_of_zero() -> None:
    few = network(**(SMOOTH | {"n_sensitivities": 6, "n_high_sensitivities": 2}))
    full = network(**(SMOOTH | {"n_sensitivities": 6, "n_high_sensitivities": 6}))
    values = full.state_dict()
    for name, value in few.state_dict().items():
        if values[name].shape != value.shape:
            assert name.endswith(("tensor_weights.2", "tensor_weights.3"))
            value = torch.nn.functional.pad(value, (0, 0, 0, 0, 0, 4))
        values[name] = value
    full.load_state_dict(values)
    atoms = bulk("Al", cubic=True)
    atoms.rattle(0.2, seed=0)
    found = []
    for model in (few, full):
        model.use_core("torch")  # test_core compares the kernels
        found.append(model.predict(Structures.from_ase(atoms)))
    for name in ("energy", "forces"):
        torch.testing.assert_close(found[0][name], found[1][name])


def test_channels_are_not_of_norms() -> None:
    with pytest.raises(
        ModelError, match="n_channels is of smooth invariants; norms have n_features"
    ):
        HIPNN(AL, 4, 4, 1.5, 4.0, 5.0, 1, n_channels=3)
    assert list(HIPNN(AL, 4, 4, 1.5, 4.0, 5.0, 1).hyperparameters()) == [
        *("n_features", "n_sensitivities", "dist_soft_min", "dist_soft_max", "dist_hard_max"),
        *("n_atom_layers", "n_interaction_layers", "l_max", "cusp_reg", "cutoff_function"),
    ]
