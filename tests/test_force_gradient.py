"""Three gradients of one loss: backpropagation as the oracle of the two directional derivatives."""

from __future__ import annotations

import json
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import lightning_fabric
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.io import write
from torch import Tensor
from typer.testing import CliRunner

from data import rattled_copper
from potstill.cli import app
from potstill.distill import LossTerm
from potstill.errors import ConfigError, ModelError
from potstill.models import (
    ANI,
    HIPNN,
    ZBL,
    PaiNN,
    Potential,
    SchNet,
    SpeciesOffsets,
    SumPotential,
)
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.testing import CONTRACT
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.devices import default_fabric
from potstill.train.epsilon import EpsilonScan, scan_epsilon
from potstill.train.force_gradient import (
    Cotangents,
    Displacement,
    ForceGradient,
    NetworkPasses,
    Point,
    loss_cotangents,
    proxy_error,
)
from potstill.train.objective import BatchLoss
from potstill.train.settings import ForceGradientSettings, OptimizerSettings, RegularizationSettings
from potstill.train.signals import bind_terms
from test_train import SMALL, assert_same_weights, emt_set, run_on_two_ranks, settings, weights

EVERYTHING = (
    LossTerm(property="energy", per_atom=True),
    LossTerm(property="forces", weight=10.0),
    LossTerm(property="stress", weight=20.0, error="rmse"),
    LossTerm(property="atomic_energies", source="teacher", weight=5.0, error="mse"),
)
BACKPROPAGATION = ForceGradientSettings(method="backpropagation")
EXACT = ForceGradientSettings(method="forward_over_reverse")
PLAIN = ForceGradientSettings(method="central_difference", folded=False)
FOLDED = ForceGradientSettings(method="central_difference", folded=True)


@pytest.fixture(scope="module")
def fabric() -> lightning_fabric.Fabric:
    return default_fabric()


def hipnn(table: SpeciesTable, **changes: object) -> HIPNN:
    torch.manual_seed(1)
    return HIPNN(table, **{**SMALL.hyperparameters, **changes}).double()  # type: ignore[arg-type]


def ani(table: SpeciesTable) -> ANI:
    torch.manual_seed(2)
    return ANI(
        table,
        radial_cutoff=4.0,
        angular_cutoff=3.2,
        eta_r=4.0,
        shifts_r=[1.5, 2.5, 3.2],
        eta_a=3.0,
        zeta=8.0,
        shifts_a=[1.8, 2.6],
        shifts_z=[0.4, 1.5, 2.5],
        hidden_widths=[8, 6],
    ).double()


class LinearModel(Potential):
    """θ·B with polynomials of the distance as descriptors: linear in its parameters."""

    kind = "linear"

    def __init__(self, table: SpeciesTable) -> None:
        super().__init__(table, 4.0)
        self.theta = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, species, edges, r_ij, n_local, taps=()):  # type: ignore[no-untyped-def]
        from potstill.models import LocalOutput

        x = (1.0 - torch.linalg.vector_norm(r_ij.to(self.dtype), dim=1) / self.cutoff).clamp(min=0)
        descriptors = torch.stack([x**3, x**4, x**5], dim=1)
        sums = x.new_zeros(n_local, 3).index_add(0, edges.center, descriptors)
        return LocalOutput(sums @ self.theta)

    def hyperparameters(self) -> dict:
        return {}


MODELS = {
    **{
        f"hipnn l_max={rank} layers={n}": lambda t, r=rank, n=n: hipnn(
            t, l_max=r, n_interaction_layers=n
        )
        for rank in (0, 1, 2)
        for n in (1, 2)
    },
    "ani": ani,
    "linear": LinearModel,
    "schnet": lambda t: SchNet(t, 8, 8, 2, 8, cutoff=4.0).double(),
    "painn": lambda t: PaiNN(t, 8, 2, 8, cutoff=4.0, variant="ocp").double(),
}


def partly_labelled() -> TrainingSet:
    """Cells of two sizes and a molecule-like cluster; stress for some, weights for some atoms."""
    data = emt_set(4, seed=3)
    structures = data.structures
    pbc = structures.pbc.clone()
    pbc[3] = torch.tensor([True, True, False])
    reference = data.labels["reference"]
    generator = torch.Generator().manual_seed(0)
    force_weight = torch.rand(structures.n_atoms, generator=generator, dtype=torch.float64)
    reference = Properties(
        dict(reference.values),
        {"stress": torch.tensor([True, False, True, True])},
        {"forces": force_weight, "energy": torch.tensor([1.0, 0.5, 2.0, 0.0]).double()},
    )
    labels = {"reference": reference, "teacher": data.labels["teacher"]}
    return TrainingSet(replace(structures, pbc=pbc), labels)


def gradient_of(
    network: Potential,
    data: TrainingSet,
    fabric: lightning_fabric.Fabric,
    how: ForceGradientSettings,
    loss: tuple[LossTerm, ...] = EVERYTHING,
    **regularization: float,
) -> tuple[Tensor, dict[str, float]]:
    """The gradient of the loss over all parameters, flat, and the loss' parts."""
    run = TrainSettings(loss=loss, regularization=RegularizationSettings(**regularization))
    method = ForceGradient(how, network)
    data = data.with_species_table(network.species_table)
    batch = data.with_neighbors(network.cutoff + method.margin).batch(torch.arange(len(data)))
    module = fabric.setup_module(NetworkPasses(network))
    objective = BatchLoss(bind_terms(run, network), 1, batch, fabric)
    network.zero_grad(set_to_none=True)
    found = method(module, batch, objective.wanted, objective)
    found.backward(fabric, module)
    # Backpropagation leaves None where a loss of forces alone does not depend on a parameter (E0).
    flat = [
        (torch.zeros_like(p) if p.grad is None else p.grad).to(torch.float64).flatten()
        for p in network.parameters()
    ]
    return torch.cat(flat), {name: float(value) for name, value in found.parts.items()}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", MODELS)
def test_all_ways_agree_on_a_loss_of_everything(name: str, fabric: lightning_fabric.Fabric) -> None:
    data = partly_labelled()
    network = MODELS[name](data.structures.species_table)
    regularization = {"hierarchicality": 0.3, "l2": 0.01}
    expected, parts = gradient_of(network, data, fabric, BACKPROPAGATION, **regularization)
    for how, tolerance in ((EXACT, 1e-10), (PLAIN, 1e-7), (FOLDED, 1e-7)):
        found, same_parts = gradient_of(network, data, fabric, how, **regularization)
        assert distance(found, expected) < tolerance
        assert same_parts == pytest.approx(parts, rel=1e-12)
    if isinstance(network, HIPNN):
        assert parts["hierarchicality"] > 0


@pytest.mark.parametrize("name", ["energy", "forces", "stress", "atomic_energies"])
def test_every_term_alone(name: str, fabric: lightning_fabric.Fabric) -> None:
    data = partly_labelled()
    network = hipnn(data.structures.species_table, n_interaction_layers=2)
    source = "teacher" if name == "atomic_energies" else "reference"
    loss = (LossTerm(property=name, source=source),)
    for hierarchicality in (0.0, 0.1):
        kwargs = {"loss": loss, "l2": 0.0, "hierarchicality": hierarchicality}
        expected, _ = gradient_of(network, data, fabric, BACKPROPAGATION, **kwargs)
        for how in (EXACT, PLAIN, FOLDED):
            found, _ = gradient_of(network, data, fabric, how, **kwargs)
            assert distance(found, expected) < (1e-10 if how is EXACT else 1e-7)


@pytest.mark.parametrize("error", ["huber", "l2mae"])
def test_every_error_measure_goes_with_every_method(
    error: str, fabric: lightning_fabric.Fabric
) -> None:
    data = partly_labelled()
    network = hipnn(data.structures.species_table, n_interaction_layers=2)
    loss: tuple[LossTerm, ...] = (
        LossTerm(property="forces", error=error, delta=0.5, weight=3.0),  # type: ignore[arg-type]
    )
    if error == "huber":
        loss += (LossTerm(property="energy", error=error, per_atom=True),)
        loss += (LossTerm(property="stress", error=error, delta=0.02),)
    expected, _ = gradient_of(network, data, fabric, BACKPROPAGATION, loss=loss)
    for how in (EXACT, PLAIN, FOLDED):
        found, _ = gradient_of(network, data, fabric, how, loss=loss)
        assert distance(found, expected) < (1e-10 if how is EXACT else 1e-7)


@pytest.mark.filterwarnings("ignore:central differences")
def test_the_error_of_differences_falls_with_the_square_of_epsilon(
    fabric: lightning_fabric.Fabric,
) -> None:
    data = emt_set(3)
    network = hipnn(data.structures.species_table, cutoff_function="polynomial")
    expected, _ = gradient_of(network, data, fabric, BACKPROPAGATION)
    for folded in (False, True):
        errors = []
        for epsilon in (4e-3, 2e-3, 1e-3):
            how = ForceGradientSettings(method="central_difference", folded=folded, epsilon=epsilon)
            errors.append(distance(gradient_of(network, data, fabric, how)[0], expected))
        assert np.divide(errors[:-1], errors[1:]) == pytest.approx([4.0, 4.0], rel=0.1)


@pytest.mark.filterwarnings("ignore:central differences")
def test_the_default_in_float32_suits_smooth_invariants(fabric: lightning_fabric.Fabric) -> None:
    """Rounding is farther below the difference than with the step of networks that have cusps."""
    data = emt_set(3)
    torch.manual_seed(1)
    network = HIPNN(data.structures.species_table, dist_hard_max=4.0)
    expected, _ = gradient_of(network.double(), data, fabric, BACKPROPAGATION)
    network = network.float()
    default, small = (
        distance(gradient_of(network, data, fabric, how)[0], expected)
        for how in (FOLDED, FOLDED.model_copy(update={"epsilon": 1e-3}))
    )
    assert default < 0.5 * small
    norms = hipnn(data.structures.species_table).float()
    assert ForceGradient(FOLDED, norms).epsilon == 1e-3 < ForceGradient(FOLDED, network).epsilon


def own_labels(network: Potential, structures: Structures) -> TrainingSet:
    """Labels that the network meets exactly, so that no force is wrong."""
    found = network.predict(structures, properties=("energy", "forces", "stress")).properties
    return TrainingSet(structures, {"reference": found})


FORCES_AND_STRESS = (LossTerm(property="forces"), LossTerm(property="stress"))


@pytest.mark.parametrize("how", [EXACT, PLAIN, FOLDED])
def test_systems_without_force_errors_contribute_nothing(
    how: ForceGradientSettings, fabric: lightning_fabric.Fabric
) -> None:
    crystal = Structures.from_ase([bulk("Cu", cubic=True), bulk("Cu", cubic=True) * (2, 1, 1)])
    network = hipnn(crystal.species_table, l_max=2)
    found, _ = gradient_of(
        network,
        own_labels(network, crystal),
        fabric,
        how,
        FORCES_AND_STRESS,
        l2=0.0,
        hierarchicality=0.0,
    )
    assert torch.equal(found, torch.zeros_like(found))


def crystals_and_rattled() -> TrainingSet:
    """Perfect copper, whose forces vanish by symmetry, beside rattled copper with EMT's labels."""
    rattled = emt_set(2)
    perfect = Structures.from_ase([bulk("Cu", cubic=True)], table=rattled.structures.species_table)
    zeros = Properties(
        {
            "energy": torch.zeros(1, dtype=torch.float64),
            "forces": torch.zeros(4, 3, dtype=torch.float64),
            "stress": torch.zeros(1, 3, 3, dtype=torch.float64),
        }
    )
    structures = Structures.concatenate([rattled.structures, perfect])
    labels = Properties.concatenate(
        [rattled.labels["reference"], zeros], [rattled.structures, perfect]
    )
    return TrainingSet(structures, {"reference": labels})


def test_perfect_crystals_beside_thermal_frames(fabric: lightning_fabric.Fabric) -> None:
    data = crystals_and_rattled()
    loss = (LossTerm(property="energy"), LossTerm(property="forces", error="rmse"))
    network = hipnn(data.structures.species_table, l_max=0)
    expected, _ = gradient_of(network, data, fabric, BACKPROPAGATION, loss)
    for how, tolerance in ((EXACT, 1e-10), (PLAIN, 1e-7), (FOLDED, 1e-7)):
        found, _ = gradient_of(network, data, fabric, how, loss)
        assert bool(found.isfinite().all())
        assert distance(found, expected) < tolerance


def test_no_atom_moves_further_than_epsilon_and_the_graph_holds() -> None:
    """Pairs outside of the list are beyond the cutoff at r, r+ and r-, strain included."""
    data = partly_labelled().with_species_table(emt_set(1).structures.species_table)
    network = hipnn(data.structures.species_table)
    epsilon = 0.05
    reach = network.cutoff + 2 * epsilon
    generator = torch.Generator().manual_seed(0)
    everything = build_neighbor_list(data.structures, 2.0 * reach)
    whole = Point.of(network, data.structures, everything)
    for share in (0.0, 0.5, 1.0):
        forces = (1 - share) * torch.randn(data.structures.n_atoms, 3, generator=generator)
        strain = share * torch.randn(4, 3, 3, generator=generator)
        strain = (strain + strain.transpose(1, 2)) * 0.2
        slope = torch.zeros(4, dtype=torch.float64)
        cotangents = Cotangents(None, forces.double(), strain.double(), slope)
        point = replace(whole, neighbors=replace(everything, cutoff=reach))
        move = Displacement.along(cotangents, point, epsilon)
        for sign in (1.0, 0.0, -1.0):
            moved = pair_vectors(move.apply(whole.structures, sign), everything).norm(dim=1)
            listed = torch.linalg.vector_norm(whole.r_ij, dim=1) <= reach
            assert bool((moved[~listed] >= network.cutoff).all())
        eta = 0.5 / move.rate
        assert float(
            (forces.double() * eta[data.structures.system_index, None]).norm(dim=1).max()
        ) <= epsilon * (1 + 1e-12)
    alone = Cotangents(None, forces.double() + 1.0, None, slope)
    move = Displacement.along(alone, whole, epsilon)
    largest = (alone.forces * (0.5 / move.rate)[data.structures.system_index, None]).norm(dim=1)
    per_system = torch.zeros(4, dtype=torch.float64).scatter_reduce(
        0, data.structures.system_index, largest, "amax"
    )
    torch.testing.assert_close(per_system, torch.full_like(per_system, epsilon))


def test_a_list_without_the_margin_is_refused(fabric: lightning_fabric.Fabric) -> None:
    data = emt_set(1)
    network = hipnn(data.structures.species_table)
    batch = data.with_neighbors(network.cutoff).batch(torch.tensor([0]))
    objective = BatchLoss(bind_terms(TrainSettings(loss=EVERYTHING), network), 1, batch, fabric)
    with pytest.raises(ModelError, match="displaced atoms need"):
        ForceGradient(FOLDED, network)(NetworkPasses(network), batch, objective.wanted, objective)


def test_half_precision_and_direct_forces_are_refused() -> None:
    network = hipnn(emt_set(1).structures.species_table)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ConfigError, match="central differences need float32 or float64"):
            ForceGradient(FOLDED, network.to(dtype))
    network = network.double()
    network.direct_forces = True
    for how in (FOLDED, EXACT):
        with pytest.raises(ConfigError, match="predicts forces directly"):
            ForceGradient(how, network)
    ForceGradient(BACKPROPAGATION, network)


def test_a_loss_of_second_derivatives_needs_backpropagation(
    fabric: lightning_fabric.Fabric,
) -> None:
    data = emt_set(1)
    network = hipnn(data.structures.species_table)
    batch = data.with_neighbors(5.0).batch(torch.tensor([0]))
    objective = BatchLoss(bind_terms(TrainSettings(loss=EVERYTHING), network), 1, batch, fabric)
    with pytest.raises(ConfigError, match="hessian_rows"):
        ForceGradient(EXACT, network)(
            NetworkPasses(network), batch, ("forces", "hessian_rows"), objective
        )


# -- the model's first-order passes ----------------------------------------------------------------


def test_sums_of_potentials_sum_the_first_order_passes_of_their_parts() -> None:
    table = emt_set(1).structures.species_table
    network = hipnn(table, n_interaction_layers=2)
    parts = {
        "offsets": SpeciesOffsets(table, [1.0, -2.0]),
        "prior": ZBL(table, 1.0, 2.0),
        "network": network,
    }
    CONTRACT["first_order_passes"](SumPotential(parts))
    assert all(p.requires_grad for p in network.parameters())


def test_an_override_of_the_first_order_passes_serves_training_and_prediction(
    fabric: lightning_fabric.Fabric,
) -> None:
    calls = []

    class Native(LinearModel):
        def evaluate(self, *args):  # type: ignore[no-untyped-def]
            calls.append("evaluate")
            return super().evaluate(*args)

        def weighted_energy(self, copies, neighbors):  # type: ignore[no-untyped-def]
            calls.append("weighted_energy")
            ((structures, weights),) = copies  # one graph alive at a time
            assert weights.shape == (structures.n_atoms, self.n_terms)
            assert weights.is_contiguous()
            return super().weighted_energy(copies, neighbors)

        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            calls.append("forward")
            return super().forward(*args, **kwargs)

    data = emt_set(1)
    network = Native(data.structures.species_table)
    network.predict(data.structures)
    assert calls == ["evaluate", "forward"]
    calls.clear()
    loss = (LossTerm(property="forces"), LossTerm(property="energy"))
    gradient_of(network, data, fabric, FOLDED, loss)
    names = [name for name in calls if name != "forward"]
    # The force pass, two looks of the proxy, and two passes over the parameters.
    assert names == ["evaluate"] * 3 + ["weighted_energy"] * 2
    gradient_of(network, data, fabric, PLAIN, FORCES_AND_STRESS)  # no energies: weights by system
    gradient_of(network, data, fabric, PLAIN, loss)
    assert calls.count("weighted_energy") == 2 + 2 + 3


# -- the proxy -------------------------------------------------------------------------------------


def proxy_of(network: Potential, data: TrainingSet, epsilon: float) -> float:
    run = TrainSettings(loss=FORCES_AND_STRESS)
    batch = data.with_neighbors(network.cutoff + 0.3).batch(torch.arange(len(data)))
    point = Point.of(network, batch.structures, batch.neighbors)
    objective = BatchLoss(bind_terms(run, network), 1, batch, default_fabric())
    _, cotangents = loss_cotangents(network, point, objective.wanted, objective)
    return proxy_error(network, point, cotangents, Displacement.along(cotangents, point, epsilon))


def test_the_proxy_follows_epsilon_and_ignores_constant_energies() -> None:
    data = emt_set(3)
    network = hipnn(data.structures.species_table, cutoff_function="polynomial")
    errors = [proxy_of(network, data, epsilon) for epsilon in (0.04, 0.02, 1e-5)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.2)
    assert errors[2] < 1e-8
    with torch.no_grad():
        network.energy_layers[0].weight += 1e6  # type: ignore[operator]
    assert proxy_of(network, data, 1e-5) < 1e-8


def test_training_warns_once_when_epsilon_does_not_suit(tmp_path: Path) -> None:
    data = emt_set(4)
    unsafe = ForceGradientSettings(method="central_difference", epsilon=0.1)
    with pytest.warns(UserWarning, match="potstill epsilon") as caught:
        train(settings(epochs=4, force_gradient=unsafe), data, data, tmp_path / "unsafe")
    assert len(caught) == 1
    with warnings.catch_warnings():  # two batches might have slopes that vanish by chance
        warnings.simplefilter("error")
        train(settings(epochs=2, force_gradient=unsafe), data, data, tmp_path / "short")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(settings(epochs=2, force_gradient=FOLDED), data, data, tmp_path / "safe")


# -- in the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [EXACT, PLAIN, FOLDED])
def test_training_takes_the_same_path(how: ForceGradientSettings, tmp_path: Path) -> None:
    data, held_out = emt_set(8), emt_set(2, seed=9)
    optimizer = OptimizerSettings(ema_decay=0.9, clip_norm=1.0)
    by_backpropagation = settings(epochs=3, optimizer=optimizer)
    expected = train(by_backpropagation, data, held_out, tmp_path / "a")
    run = settings(epochs=3, optimizer=optimizer, force_gradient=how)
    found = train(run, data, held_out, tmp_path / "b")
    assert found.best_score == pytest.approx(expected.best_score, rel=1e-6)
    for name, value in weights(found.best).items():
        torch.testing.assert_close(value, weights(expected.best)[name], rtol=1e-5, atol=1e-6)


def test_resume_is_bitwise(tmp_path: Path) -> None:
    data, held_out = emt_set(8), emt_set(2, seed=9)
    run = settings(epochs=4, force_gradient=FOLDED)
    whole = train(run, data, held_out, tmp_path / "whole")

    def interrupt(record: dict) -> None:
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    first = train(run, data, held_out, tmp_path / "parts", on_epoch=interrupt)
    assert first.status == "interrupted"
    second = train(run, data, held_out, tmp_path / "parts")
    assert_same_weights(whole.best, second.best)


@pytest.mark.slow
def test_two_ranks_equal_one_rank(tmp_path: Path) -> None:
    # an odd number of frames: in the last step one rank has nothing
    script = (
        "from test_force_gradient import EXACT, FOLDED, PLAIN\n"
        "from test_train import emt_set, settings, train\n"
        "for name, how in {'exact': EXACT, 'folded': FOLDED, 'plain': PLAIN}.items():\n"
        "    run = settings(force_gradient=how)\n"
        "    train(run, emt_set(9), emt_set(3, seed=9), f'{sys.argv[2]}/{name}')\n"
    )
    run_on_two_ranks(script, tmp_path)
    for name, how in {"exact": EXACT, "folded": FOLDED, "plain": PLAIN}.items():
        data, held_out = emt_set(9), emt_set(3, seed=9)
        one = train(settings(force_gradient=how), data, held_out, tmp_path / f"one/{name}")
        # Differences carry rounding times 1 / (2 epsilon), and ranks add in another order.
        tolerance = 1e-9 if how is EXACT else 1e-6
        first, second = weights(one.best), weights(tmp_path / f"two/{name}/best.pt")
        for key, value in first.items():
            torch.testing.assert_close(value, second[key], rtol=tolerance, atol=1e-2 * tolerance)


# -- the scan of epsilon ---------------------------------------------------------------------------


def scanned(network: Potential, data: TrainingSet, **options: object) -> EpsilonScan:
    return scan_epsilon(network, data, TrainSettings(loss=EVERYTHING), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["quadratic", "training"])
def test_a_scan_falls_with_curvature_and_rises_with_rounding(loss: str) -> None:
    data = emt_set(4)
    network = hipnn(data.structures.species_table)
    scan = scanned(network, data, loss=loss, epsilons=[1e-10, 1e-5, 1e-3, 3e-2])
    assert scan.gradient is not None
    for errors in (scan.proxy, scan.gradient):
        assert errors[1] < 1e-7
        assert errors[0] > 3 * errors[1]
        assert errors[3] / errors[2] == pytest.approx(900.0, rel=0.3)  # second order
    assert scan.backpropagation == 0.0
    single = scanned(network.float(), data, loss=loss)
    assert single.precision == "float32"
    assert single.backpropagation is not None
    assert 1e-9 < single.backpropagation < 1e-5
    assert 1e-4 <= single.recommended <= 1e-2
    assert min(single.gradient or ()) > single.backpropagation


def test_the_quadratic_proxy_is_equation_14() -> None:
    data = emt_set(2)
    network = hipnn(data.structures.species_table)
    scan = scanned(network, data, epsilons=[1e-2], exact=False)
    assert scan.gradient is None
    errors, losses = [], []
    for k in range(2):
        one = data.select(torch.tensor([k]))
        positions, reference = one.structures.positions, one.labels["reference"]["forces"]
        forces = network.predict(one.structures)["forces"]
        g = forces - reference
        eta = 1e-2 / g.norm(dim=1).max()
        plus, minus = (
            network.predict(replace(one.structures, positions=positions + sign * eta * g))["energy"]
            for sign in (1, -1)
        )
        loss = 0.5 * g.square().sum()
        approximate = -(plus - minus) / (4 * eta) - 0.5 * (g * reference).sum()
        errors.append(float(approximate - loss))
        losses.append(float(loss))
    expected = np.linalg.norm(errors) / np.linalg.norm(losses)
    assert scan.proxy[0] == pytest.approx(expected, rel=1e-6)


def test_a_fixed_scale_moves_the_best_epsilon_with_the_size_of_the_errors() -> None:
    data = emt_set(3)
    network = hipnn(data.structures.species_table, cutoff_function="polynomial")
    own = scanned(network, data, epsilons=[1e-2])
    fixed = [scanned(network, data, epsilons=[e], scale=1.0).proxy[0] for e in (1e-2, 1e-3)]
    assert fixed[0] / fixed[1] == pytest.approx(100.0, rel=0.2)
    assert fixed[0] != pytest.approx(own.proxy[0], rel=0.05)


def test_the_command_writes_numbers_and_plot(tmp_path: Path) -> None:
    write(tmp_path / "frames.xyz", rattled_copper(6, 0.1))
    (tmp_path / "train.yaml").write_text(
        f"out: {tmp_path}/run\n"
        f"data: {{files: [{{path: {tmp_path}/frames.xyz}}]}}\n"
        "train:\n  model:\n    hyperparameters:\n"
        "      {n_features: 4, n_sensitivities: 4, dist_soft_min: 1.8, dist_soft_max: 4.0,\n"
        "       dist_hard_max: 4.5, n_atom_layers: 1}\n"
    )
    out = tmp_path / "epsilon"
    options = ["--precision", "float64", "--n-structures", "2", "--out", str(out)]
    result = CliRunner().invoke(app, ["epsilon", str(tmp_path / "train.yaml"), *options])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "epsilon.json").read_text())
    assert found["precision"] == "float64"
    assert found["n_structures"] == 2
    assert f"{found['recommended']:.1e}" in result.output
    lines = (out / "epsilon.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found["epsilons"])
    for kind in ("svg", "png"):
        assert (out / f"epsilon_scan.{kind}").stat().st_size > 1000
