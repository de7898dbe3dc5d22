"""The parts of the force-gradient studies that their numbers rest on."""

import ase.build
import pytest
import torch

from data import data_path
from potstill.models import ANI, SNAP
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.train import TrainingSet, TrainSettings
from potstill.train.settings import LearningRateSettings, OptimizerSettings
from scripts import STUDIES, loaded

FOLDER = STUDIES / "force_gradient"


@pytest.fixture(scope="module")
def tantalum():
    with loaded(FOLDER / "snap_tantalum.py") as module:
        yield module


@pytest.fixture(scope="module")
def table1():
    with loaded(FOLDER / "ani_table1.py") as module:
        yield module


def crystals(symbol="Ta", a=3.3):
    """Three shaken cells and a perfect one."""
    frames = [ase.build.bulk(symbol, cubic=True, a=a).repeat(2) for _ in range(4)]
    for seed, atoms in enumerate(frames[:3]):
        atoms.rattle(0.1 * (seed + 1), seed=seed)
    return Structures.from_ase(frames)


def test_directional_derivative_is_the_gradient_of_the_force_loss(tantalum):
    structures = crystals()
    model = tantalum.random_model(0)
    generator = torch.Generator().manual_seed(1)
    forces = torch.randn(structures.n_atoms, 3, generator=generator, dtype=torch.float64)
    perfect = structures.system_index == 3
    predicted = model.predict(structures)["forces"]
    forces[perfect] = predicted[perfect]  # g0 = 0: contributes nothing
    g = predicted - forces
    exact = tantalum.exact_gradient(model, structures, g)
    twice = tantalum.iterated_backpropagation(model, structures, forces)
    torch.testing.assert_close(exact.sum(0), twice, rtol=1e-10, atol=1e-10 * twice.abs().max())
    g0 = torch.stack([g[structures.system_index == s].norm(dim=1).max() for s in range(4)])
    eta = torch.where(g0 > 0.0, 1e-5 / g0, 0.0)
    estimate, slope = tantalum.directional_gradient(model, structures, g, eta)
    assert tantalum.relative(estimate, exact) < 1e-8
    assert float(estimate[3].abs().max()) == 0.0
    expected = -tantalum.by_system((g * predicted).sum(1), structures)
    torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-8)
    # The error is of second order in epsilon.
    errors = []
    for epsilon in (1e-2, 1e-3):
        eta = torch.where(g0 > 0.0, epsilon / g0, 0.0)
        estimate, _ = tantalum.directional_gradient(model, structures, g, eta)
        errors.append(tantalum.relative(estimate, exact))
    assert errors[0] / errors[1] == pytest.approx(100.0, rel=0.3)


def test_a_scan_has_its_minimum_between_round_off_and_curvature(tantalum):
    structures = crystals()
    forces = torch.zeros(structures.n_atoms, 3, dtype=torch.float64)
    subject = tantalum.Subject("random", tantalum.random_model(0), forces)
    curve = tantalum.scan(subject, structures, [1e-10, 1e-5, 1e-1], torch.float64, False)
    for name in ("gradient", "proxy"):
        assert curve[f"best_{name}"]["epsilon"] == 1e-5
        assert curve[f"best_{name}"]["error"] < 1e-8
    assert isinstance(subject.model, SNAP)


def ani_data(table1, network):
    structures = crystals("Al", 3.0)
    energy = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
    data = TrainingSet(structures, {"reference": Properties({"energy": energy})})
    return table1.Described.of(network, data, "reference")


def ani(n_members):
    torch.manual_seed(4)
    return ANI(
        SpeciesTable.from_symbols(["Al"]),
        radial_cutoff=4.0,
        angular_cutoff=3.2,
        eta_r=4.0,
        shifts_r=[1.5, 2.5, 3.5],
        eta_a=2.0,
        zeta=8.0,
        shifts_a=[2.0],
        shifts_z=[0.5, 1.5],
        hidden_widths=[8],
        n_members=n_members,
    ).double()


def test_members_that_train_together_train_alone(table1):
    together = ani(3)
    alone = [together.member(k) for k in range(3)]
    described = ani_data(table1, together)
    before = described.losses(together)
    settings = TrainSettings(
        epochs=15,
        batch_size=2,
        optimizer=OptimizerSettings(learning_rate=0.01),
        learning_rate=LearningRateSettings(schedule="exponential", factor=0.95),
    )
    together = table1.train_on_energies(together, described, described, settings)
    assert float((described.losses(together).sum() / before.sum()).detach()) < 0.1
    for k, network in enumerate(alone):
        network = table1.train_on_energies(network, described, described, settings)
        for name, value in together.member(k).state_dict().items():
            torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-9, atol=1e-12)
    joined = table1.ensemble([together.member(k) for k in range(3)])
    for name, value in together.state_dict().items():
        assert torch.equal(value, joined.state_dict()[name])


def test_energies_from_descriptors_are_the_models(table1):
    network = ani(2)
    described = ani_data(table1, network)
    energies = described.member_energies(network).mean(1)
    expected = network.predict(described.structures, properties=["energy"])["energy"]
    torch.testing.assert_close(energies, expected)
    part = described.select(torch.tensor([2, 0]))
    torch.testing.assert_close(part.member_energies(network).mean(1), expected[[0, 2]])


@pytest.mark.slow
@pytest.mark.data
def test_the_fit_to_tantalum_is_fitsnaps(tantalum):
    """Errors that FitSNAP keeps with its example, made with LAMMPS' descriptors."""
    structures, labels, check = tantalum.load(data_path("ta-snap"), 1)
    assert check["n_files"] == 24
    assert max(check["largest_difference"].values()) < 1e-12
    zbl = tantalum.ZBL(tantalum.TABLE, 4.0, 4.8, switching="lammps")
    model, found = tantalum.fit(structures, labels, zbl)
    assert (found.rank, found.n_rows) == (31, 363 + 3 * 4224 + 6 * 363)
    assert float(found.coefficients[0, 0]) == pytest.approx(-2.97994848705, abs=1e-6)
    potential = tantalum.SumPotential({"zbl": zbl, "snap": model})
    table = tantalum.errors_by_group(potential, structures, labels)
    for group, energy, forces in (
        ("all", 112.787, 0.0757576),
        ("Displaced_BCC", 1.88368, 0.143397),
        ("Liquid", 5.66804, 0.353795),
        ("Surface", 13.5232, 0.047601),
    ):
        assert table[group]["energy_meV_per_atom_mae"] == pytest.approx(energy, rel=1e-4)
        assert table[group]["forces_eV_per_A_mae"] == pytest.approx(forces, rel=1e-4)
