"""Potentials in torch-sim. Needs the extra `torch-sim`."""

import ase.units
import numpy as np
import pytest
import torch
from ase.build import bulk

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import save_potential
from potstill.errors import DataError, ModelError
from potstill.models import ZBL, PaiNN, SpeciesOffsets
from potstill.models import SumPotential as Sum
from potstill.species import Species, SpeciesTable
from students import crystal, in_ase, student

ts = pytest.importorskip("torch_sim", reason="needs the extra 'torch-sim'")
from torch_sim.models.interface import validate_model_outputs  # noqa: E402

from potstill.deploy.torch_sim import TorchSimModel  # noqa: E402

TABLE = SpeciesTable.from_symbols(["Al", "Cu"])
CPU = torch.device("cpu")


def with_torch():
    """A potential that PyTorch computes, all systems together."""
    torch.manual_seed(1)
    parts = {
        "offsets": SpeciesOffsets(TABLE, [-3.0, -4.0]),
        "prior": ZBL(TABLE, 1.0, 2.8, "lammps"),
        "network": PaiNN(TABLE, 6, 2, 5, 3.6).double(),
    }
    return Sum(parts)


def repulsive():
    """Atoms that only repel one another, by native kernels: the network's energies are zero."""
    potential = student("Al")
    with torch.no_grad():
        for parameter in potential["network"].energy_layers.parameters():
            parameter.zero_()
    return Sum({"prior": ZBL(potential.species_table, 2.2, 3.4), "network": potential["network"]})


def batch():
    frames = [crystal("Al", "Cu"), crystal("Cu", "Al", seed=2) * (1, 2, 1), crystal("Al")[:5]]
    frames[2].set_cell([12.0, 12.0, 12.0])
    return frames


@pytest.mark.parametrize("make", [lambda: student("Al", "Cu"), with_torch])
def test_a_batch_of_systems_is_that_of_ase(make):
    potential, frames = make(), batch()
    model = TorchSimModel(potential)
    state = ts.initialize_state(frames, CPU, torch.float64)
    found = model(state)
    names = ("positions", "cell", "pbc", "atomic_numbers", "system_idx")
    same = model({name: getattr(state, name) for name in names})
    assert all(torch.equal(found[name], same[name]) for name in found)
    expected = [in_ase(potential, atoms) for atoms in frames]
    energy = [values["energies"].sum() for values in expected]
    np.testing.assert_allclose(found["energy"], energy, rtol=0, atol=1e-10)
    forces = np.concatenate([values["forces"] for values in expected])
    np.testing.assert_allclose(found["forces"], forces, rtol=0, atol=1e-11)
    stress = [values["stress"] for values in expected]
    np.testing.assert_allclose(found["stress"], stress, rtol=0, atol=1e-11)


def test_open_systems_and_lower_precision():
    potential, atoms = student("Al", "Cu"), crystal("Al", "Cu")
    atoms.pbc = False
    found = TorchSimModel(potential, dtype=torch.float32)(
        ts.initialize_state([atoms], CPU, torch.float32)
    )
    atoms.calc = PotstillCalculator(potential)
    assert {value.dtype for value in found.values()} == {torch.float32}
    np.testing.assert_allclose(found["forces"], atoms.get_forces(), atol=1e-4)
    assert bool(found["stress"].isnan().all())


def test_the_contract_of_torch_sim_is_kept(tmp_path):
    table = SpeciesTable.from_symbols(["Si", "Fe"])
    torch.manual_seed(0)
    save_potential(tmp_path / "best.pt", PaiNN(table, 6, 2, 5, 4.0).double(), {})
    model = TorchSimModel(tmp_path / "best.pt")
    validate_model_outputs(model, CPU, torch.float64)
    assert model.memory_scales_with == "n_atoms_x_density"


def test_lists_last_while_nothing_can_be_missing():
    """Whatever takes a place in the batch: atoms that moved, another cell, another system."""
    potential = student("Al", "Cu")
    model = TorchSimModel(potential, skin=0.5)
    generator = np.random.default_rng(0)
    frames, n_lists = batch(), 0
    for step in range(30):
        last = [kept.pairs for kept in model._calculator._kept] or [None] * 3
        for atoms in frames:
            atoms.positions += 0.03 * generator.standard_normal(atoms.positions.shape)
        if step == 10:
            frames[0].set_cell(frames[0].cell.array * 1.05, scale_atoms=True)
        if step == 20:
            frames = [frames[1], frames[0], frames[2]]
        found = model(ts.initialize_state(frames, CPU, torch.float64))
        expected = np.concatenate([in_ase(potential, atoms)["forces"] for atoms in frames])
        np.testing.assert_allclose(found["forces"], expected, rtol=0, atol=1e-11)
        n_lists += sum(
            kept.pairs is not old
            for kept, old in zip(model._calculator._kept, last or [None] * 3, strict=True)
        )
    assert 3 < n_lists < 45


def dynamics(integrator, frames, temperature, femtoseconds):
    """A state of a batch and what moves it."""
    kT = torch.tensor(temperature * ase.units.kB, dtype=torch.float64)
    dt = torch.tensor(femtoseconds * ase.units.fs, dtype=torch.float64)
    init, update = integrator(model=TorchSimModel(repulsive()), kT=kT, dt=dt)
    return init(state=ts.initialize_state(frames, CPU, torch.float64), seed=1), update, float(kT)


def of_momenta(function, state):
    found = function(momenta=state.momenta, masses=state.masses, system_idx=state.system_idx)
    return found.numpy()


def test_energy_is_conserved_in_a_batch():
    frames = [bulk("Al", "fcc", a=a, cubic=True) * (2, 2, 2) for a in (4.0, 4.2)]
    state, update, _ = dynamics(ts.nve, frames, 600.0, 1.0)
    potential, totals = [], []
    for _ in range(200):
        state = update(state=state)
        potential.append(state.energy.numpy() / 32)
        totals.append(potential[-1] + of_momenta(ts.calc_kinetic_energy, state) / 32)
    assert np.ptp(potential, axis=0).min() > 0.01
    assert np.ptp(totals, axis=0).max() < 1e-4


def test_a_thermostat_keeps_the_temperature():
    frames = [bulk("Al", "fcc", a=4.0, cubic=True) * (n, 2, 2) for n in (2, 3)]
    state, update, kT = dynamics(ts.nvt_langevin, frames, 500.0, 4.0)
    found = []
    for step in range(1500):
        state = update(state=state)
        if step > 300:
            found.append(of_momenta(ts.calc_kT, state))
    np.testing.assert_allclose(np.mean(found, axis=0) / kT, 1.0, atol=0.1)


def test_what_cannot_be_run_is_told():
    beads = SpeciesTable((Species("W", 72.0),))
    with pytest.raises(ModelError, match="beads have none"):
        TorchSimModel(PaiNN(beads, 6, 1, 5, 3.6))
    with pytest.raises(ModelError, match="must not be negative"):
        TorchSimModel(student("Al"), skin=-1.0)
    state = ts.initialize_state([bulk("Au"), bulk("Si")], CPU, torch.float64)
    with pytest.raises(DataError, match="atomic numbers 14, 79, but the potential knows only Al"):
        TorchSimModel(student("Al"))(state)
    direct = TorchSimModel(PaiNN(TABLE, 6, 1, 5, 3.6, direct_forces=True))
    assert not direct.compute_stress
    assert set(direct(ts.initialize_state([crystal("Al")], CPU, torch.float64))) == {
        "energy",
        "forces",
    }
