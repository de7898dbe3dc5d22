"""Many replicas at a time: ensembles, energy, reproducibility, and replicas that break down."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import units
from ase.md.verlet import VelocityVerlet

from potstill.calculators import BatchCalculator, PotstillCalculator
from potstill.errors import ConfigError, DataError
from potstill.evaluate.tools import limited_threads
from potstill.models import HIPNN, LocalOutput, Potential
from potstill.sample.replicas import ReplicaSettings, run_replicas
from potstill.species import Species, SpeciesTable
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME
from students import student

BEADS = SpeciesTable((Species("heavy", 100.0), Species("light", 25.0)))
STIFFNESS = 50.0


class Springs(Potential):
    """Harmonic springs of length zero between all pairs: E = k/2 Σ r²."""

    kind = "springs"

    def __init__(self):
        super().__init__(BEADS, 9.0)

    def hyperparameters(self):
        return {}

    def forward(self, species, edges, r_ij, n_local, taps=()):
        own = 0.25 * STIFFNESS * r_ij.square().sum(dim=1)
        return LocalOutput(edges.sum_to_centers(own, n_local))


def dumbbells(n):
    """Systems of a heavy and a light bead, without a cell."""
    positions = torch.tensor([[0.0, 0.0, 0.0], [0.03, 0.01, 0.0]], dtype=torch.float64)
    return Structures(
        positions=positions.repeat(n, 1),
        species=torch.tensor([0, 1]).repeat(n),
        system_index=torch.arange(n).repeat_interleave(2),
        cell=torch.zeros(n, 3, 3, dtype=torch.float64),
        pbc=torch.zeros(n, 3, dtype=torch.bool),
        species_table=BEADS,
    )


def liquid(n_replicas, n=27, length=12.0, seed=0):
    """Beads on a shaken lattice, the same for all replicas."""
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)[:n] * length / 3
    positions = grid + 0.2 * np.random.default_rng(seed).standard_normal((n, 3))
    return Structures(
        positions=torch.from_numpy(np.tile(positions, (n_replicas, 1))),
        species=(torch.arange(n) % 2).repeat(n_replicas),
        system_index=torch.arange(n_replicas).repeat_interleave(n),
        cell=(length * torch.eye(3, dtype=torch.float64)).repeat(n_replicas, 1, 1),
        pbc=torch.ones(n_replicas, 3, dtype=torch.bool),
        species_table=BEADS,
    )


def bead_model(dtype=torch.float64):
    torch.manual_seed(0)
    distances = {"dist_soft_min": 2.0, "dist_soft_max": 5.0, "dist_hard_max": 5.5}
    model = HIPNN(BEADS, n_features=6, n_sensitivities=5, n_atom_layers=1, l_max=1, **distances)
    return model.to(dtype)


def coordinates(frames):
    """(frames, n, 3) of one replica."""
    return frames.positions.numpy().reshape(len(frames), -1, 3)


def test_positions_of_an_oscillator_are_exact_at_a_long_timestep():
    """BAOAB: <r²> = 3 kT/k whatever the timestep, here a sixth of the period."""
    temperature, n = 300.0, 100
    reduced = 100.0 * 25.0 / 125.0
    period = 2.0 * np.pi * np.sqrt(reduced / STIFFNESS) / FS_IN_ASE_TIME
    settings = ReplicaSettings(
        temperature, n_frames=60, stride=2.0 * period, timestep=period / 6.0,
        thermostat_time=period, equilibration=4.0 * period,
    )  # fmt: skip
    run = run_replicas(dumbbells(n), Springs(), settings)
    assert run.breakdowns == (None,) * n
    x = run.frames.structures.positions.numpy().reshape(n, -1, 2, 3)
    squares = ((x[:, :, 1] - x[:, :, 0]) ** 2).sum(axis=2).mean(axis=1)  # of each replica
    expected = 3.0 * BOLTZMANN * temperature / STIFFNESS
    error = squares.std(ddof=1) / np.sqrt(n)
    assert error < 0.02 * expected
    assert abs(squares.mean() - expected) < 3.5 * error
    # Where velocity Verlet with friction in the forces gives kT/k / (1 - (ω dt/2)²), 37 % more.
    assert abs(squares.mean() - expected) < 0.08 * expected


@pytest.mark.parametrize("temperature", [150.0, 600.0])
def test_the_temperature_is_that_of_the_thermostat(temperature):
    settings = ReplicaSettings(
        temperature, n_frames=40, stride=20.0, timestep=0.5, thermostat_time=10.0,
        equilibration=40.0,
    )  # fmt: skip
    run = run_replicas(dumbbells(200), Springs(), settings)
    kelvin = np.array(run.temperature)
    error = kelvin.std(ddof=1) / np.sqrt(len(kelvin))
    assert error < 0.02 * temperature
    assert abs(kelvin.mean() - temperature) < 3.5 * error
    assert run.frames.temperature.unique().tolist() == [temperature]
    # Every kind of bead has it, with its own mass.
    v = run.frames.structures.velocities.numpy() / FS_IN_ASE_TIME
    masses = run.frames.structures.masses.numpy()
    for mass in (100.0, 25.0):
        own = (mass * v[masses == mass] ** 2).mean() / BOLTZMANN
        assert own == pytest.approx(temperature, rel=0.03)


def test_without_friction_it_is_velocity_verlet_and_conserves_energy():
    model = student("Al", "Cu")
    table = model.species_table
    start = liquid(2, length=9.0)
    atoms = replace(start, species_table=table).to_ase()
    rng = np.random.default_rng(1)
    for image in atoms:
        image.set_velocities(0.02 * rng.standard_normal((27, 3)))
    drift = []
    for timestep in (2.0, 1.0):
        settings = ReplicaSettings(
            300.0, n_frames=20, stride=10.0, timestep=timestep, thermostat_time=None
        )
        run = run_replicas(Structures.from_ase(atoms, table=table), model, settings)
        moving = run.frames.structures
        v = moving.velocities.numpy() / FS_IN_ASE_TIME
        kinetic = 0.5 * (moving.masses.numpy() * (v**2).sum(axis=1)).reshape(-1, 27).sum(axis=1)
        total = (run.frames.energy.numpy() + kinetic).reshape(2, -1)
        drift.append(np.abs(total - total[:, :1]).max())
    assert drift[1] < 0.35 * drift[0] < 0.01  # second order in the timestep
    image = atoms[0].copy()
    image.calc = PotstillCalculator(model)
    VelocityVerlet(image, timestep=units.fs).run(200)
    last = moving[19].positions.numpy()
    np.testing.assert_allclose(image.positions, last, rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match="thermostat_time of replicas must be positive"):
        ReplicaSettings(300.0, n_frames=1, thermostat_time=0.0)


def test_a_replica_is_the_same_in_any_company_and_after_an_interruption(tmp_path):
    settings = ReplicaSettings(400.0, n_frames=6, stride=20.0, equilibration=20.0, seed=3)
    run = run_replicas(liquid(3), bead_model(), settings)
    alone = run_replicas(liquid(1), bead_model(), settings)
    first = coordinates(run.frames.structures)[:6]
    np.testing.assert_array_equal(first, coordinates(alone.frames.structures))
    assert np.abs(first - coordinates(run.frames.structures)[6:12]).max() > 0.01
    assert run.frames.structures.group[:7] == ("replica 0",) * 6 + ("replica 1",)
    np.testing.assert_allclose(run.frames.time[:6], 20.0 * np.arange(2, 8))

    class Interruption(Exception):
        pass

    def stop(done, total):
        if done >= 0.5 * total:
            raise Interruption

    with pytest.raises(Interruption):
        run_replicas(liquid(3), bead_model(), settings, folder=tmp_path, progress=stop)
    resumed = run_replicas(liquid(3), bead_model(), settings, folder=tmp_path)
    for name in ("positions", "velocities"):
        ours, theirs = (getattr(r.frames.structures, name) for r in (resumed, run))
        assert torch.equal(ours, theirs)
    other = run_replicas(liquid(3), bead_model(), replace(settings, seed=4))
    assert not torch.equal(other.frames.structures.positions, run.frames.structures.positions)


def test_molecules_without_a_cell_share_a_call_and_stay_the_same_in_any_company():
    settings = ReplicaSettings(400.0, n_frames=6, stride=20.0, seed=3)
    start = liquid(3)
    start = start.with_fields(pbc=torch.zeros_like(start.pbc), cell=torch.zeros_like(start.cell))
    run = run_replicas(start, bead_model(), settings)
    alone = run_replicas(start.select([0]), bead_model(), settings)
    first = coordinates(run.frames.structures)[:6]
    np.testing.assert_array_equal(first, coordinates(alone.frames.structures))
    moved = run.frames.structures.select([5, 11, 17])
    twin = bead_model()
    twin.use_core("torch")
    expected = twin.predict(moved, properties=("energy", "forces"))
    found = BatchCalculator(bead_model()).compute(moved, stress=True)
    for name in ("energy", "forces"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-11)
    assert bool(found["stress"].isnan().all())


def test_one_that_breaks_down_leaves_the_others_alone():
    model = student("Al", "Cu")
    start = liquid(3, length=9.0).with_fields(species_table=model.species_table)
    broken = start.positions.clone()
    broken[27] = broken[28] + 0.05  # two atoms of the second replica
    settings = ReplicaSettings(300.0, n_frames=5, stride=10.0, timestep=1.0)
    run = run_replicas(start.with_fields(positions=broken), model, settings)
    assert [b is None for b in run.breakdowns] == [True, False, True]
    assert "temperature reached" in run.breakdowns[1].reason
    assert 0.0 < run.breakdowns[1].time <= 10.0
    assert len(run.frames) == 10
    sound = run_replicas(start, model, settings)
    for replica in ("replica 0", "replica 2"):
        ours, theirs = (
            coordinates(r.frames.structures)[[g == replica for g in r.frames.structures.group]]
            for r in (run, sound)
        )
        np.testing.assert_array_equal(ours, theirs)

    watched = run_replicas(
        start, model, settings,
        watch=lambda frame: "too far" if float(frame.positions[0, 0]) > -10.0 else "",
    )  # fmt: skip
    assert [b.time for b in watched.breakdowns] == [10.0] * 3
    assert len(watched.frames) == 0


def test_fixed_atoms_stay_and_strangers_are_refused():
    start = liquid(2)
    fixed = torch.zeros(54, dtype=torch.bool)
    fixed[[0, 27]] = True
    settings = ReplicaSettings(400.0, n_frames=2, stride=20.0)
    run = run_replicas(start.with_fields(fixed=fixed), bead_model(), settings)
    moved = coordinates(run.frames.structures) - coordinates(start)[0]
    assert not moved[:, 0].any()
    assert moved[:, 1:].any(axis=2).all()
    with pytest.raises(DataError, match="not among the species"):
        run_replicas(start, student("Al"), settings)
    with pytest.raises(ConfigError, match="same atoms in the same order"):
        run_replicas(Structures.concatenate([start[0], dumbbells(1)]), bead_model(), settings)


@pytest.mark.parametrize(("core", "threads"), [("native", 1), ("native", 2), ("torch", 1)])
def test_batches_are_computed_as_the_potential_computes_them(core, threads):
    model = bead_model()
    frames = liquid(3)
    twin = bead_model()
    twin.use_core("torch")
    model.use_core(core)
    calculator = BatchCalculator(model, skin=0.5)
    rng = np.random.default_rng(2)
    for _ in range(10):
        moved = frames.positions + torch.from_numpy(0.1 * rng.standard_normal((81, 3)))
        frames = frames.with_fields(positions=moved)
        with limited_threads(threads):
            found = calculator.compute(frames, stress=True)
        expected = twin.predict(frames, properties=("energy", "forces", "stress"))
        for name in ("energy", "forces", "stress"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-11)
