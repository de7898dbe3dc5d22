"""Stability over many runs, structure of models' own dynamics, pressure."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.io import read, write
from typer.testing import CliRunner

from potstill.checkpoint import load_potential, save_potential
from potstill.cli import app
from potstill.errors import ConfigError
from potstill.evaluate.base import Bench, BenchSettings, Findings
from potstill.evaluate.pressure import Pressure, pressure
from potstill.evaluate.stability import OwnDynamics, Stability, with_departures
from potstill.models import SpeciesOffsets
from potstill.sample.replicas import ReplicaSettings, run_replicas
from potstill.soundness import Liquid, energy_departure, overheated, widest_hole
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME, PRESSURE
from potstill.workflows.evaluation import EvaluateConfig, evaluate
from potstill.workflows.report import verdicts
from students import student


def aluminium(n=2):
    return bulk("Al", "fcc", a=4.2, cubic=True) * (n, n, n)


def test_the_widest_hole_of_a_lattice_is_its_interstice():
    for lattice, radius in (("sc", math.sqrt(3) / 2), ("fcc", 0.5), ("bcc", math.sqrt(5) / 4)):
        crystal = Structures.from_ase(bulk("Al", lattice, a=4.0, cubic=True) * (2, 2, 2))
        for shift in (0.0, 1.3):
            moved = crystal.with_fields(positions=crystal.positions + shift)
            assert widest_hole(moved, spacing=0.25) == pytest.approx(4.0 * radius, abs=0.25)
    vacancy = aluminium()
    del vacancy[5]
    assert widest_hole(Structures.from_ase(vacancy), 0.25) == pytest.approx(4.2 / math.sqrt(2), 0.1)


def test_fused_atoms_holes_and_heat_are_found_by_the_reference():
    rng = np.random.default_rng(0)
    frames = [aluminium() for _ in range(5)]
    for atoms in frames:
        atoms.positions += 0.1 * rng.standard_normal(atoms.positions.shape)
    liquid = Liquid.of(Structures.from_ase(frames))
    assert liquid.symptom(Structures.from_ase(frames[2])) == ""
    near = frames[0].copy()
    near.positions[0] = near.positions[1] + [1.2, 0.0, 0.0]
    assert "fused: a Al-Al pair came to 1.20 Å" in liquid.symptom(Structures.from_ase(near))
    hollow = frames[0][np.argsort(frames[0].get_all_distances(mic=True)[0])[6:]]
    assert "density was lost" in liquid.symptom(Structures.from_ase(hollow))
    warm = Structures.from_ase(frames[0])
    speed = math.sqrt(BOLTZMANN * 300.0 / 26.98) * FS_IN_ASE_TIME
    velocities = speed * torch.from_numpy(rng.standard_normal((32, 3)))
    assert overheated(warm.with_fields(velocities=velocities), 300.0) == ""
    assert "temperature reached" in overheated(warm.with_fields(velocities=2 * velocities), 300.0)


@pytest.fixture
def folder(tmp_path):
    """A sound model, its trajectory as a reference, and a structure to start from."""
    model = student("Al", l_max=1)
    save_potential(tmp_path / "best.pt", model, {})
    write(tmp_path / "al.xyz", aluminium())
    start = Structures.from_ase(aluminium()).select([0, 0])
    settings = ReplicaSettings(
        600.0, n_frames=20, stride=50.0, timestep=5.0, equilibration=200.0, thermostat_time=100.0,
        seed=7,
    )  # fmt: skip
    run = run_replicas(start, model, settings)
    write(tmp_path / "reference.xyz", run.frames.structures.to_ase(), format="extxyz")
    return tmp_path


@pytest.fixture(params=["replicas", "lammps"])
def engine(request):
    """Both ways to run models."""
    if request.param == "lammps":
        request.getfixturevalue("plugin")
    return request.param


def test_models_run_by_themselves_and_are_judged_beside_the_reference(folder, engine):
    config = EvaluateConfig(
        models={"student": {"spec": str(folder / "best.pt")}},
        trajectories={"reference": str(folder / "reference.xyz")},
        dynamics={"n_runs": 3, "duration": 1.0, "equilibration": 0.2, "stride": 50.0,
                  "thermostat_time": 100.0, "engine": engine},
        settings={"temperature": 600.0, "timestep": 5.0},
        tests={"rdf": {"n_blocks": 3, "n_bins": 40}, "stability": {}},
        out=str(folder / "out"),
    )  # fmt: skip
    found = evaluate(config)
    runs = found.of("stability", Stability)["student"]
    assert runs.n_failed == 0
    assert runs.survived == (1.2, 1.2, 1.2)
    assert runs.mean_temperature == pytest.approx(600.0, rel=0.1)
    assert runs.at_least == pytest.approx(1.2)
    sentences = verdicts(found)
    assert any("3 of 3 runs of 1.2 ps reached their end" in line for line in sentences)
    assert any("g(r)" in line and "unclear" in line for line in sentences)
    images = read(folder / "out" / "dynamics" / "student" / "trajectory.extxyz", ":")
    assert len(images) == 60
    assert images[20].info["config_type"] == "replica 1"
    # The trajectory as a file gives the same, and says its time between frames.
    again = EvaluateConfig(
        trajectories={
            "student": str(folder / "out" / "dynamics" / "student" / "trajectory.extxyz"),
            "reference": str(folder / "reference.xyz"),
        },
        tests={"rdf": {"n_blocks": 3, "n_bins": 40}},
        out=str(folder / "again"),
    )
    evaluate(again)
    ours, theirs = (
        json.loads((folder / out / "rdf.json").read_text())["student"]["parts"]["all"]["g"]
        for out in ("out", "again")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert again.trajectories["student"].time_between_frames() == 50.0


def test_runs_that_fail_are_counted_with_when_and_why(folder, engine):
    config = EvaluateConfig(
        models={"student": {"spec": str(folder / "best.pt")}},
        structure=str(folder / "al.xyz"),
        dynamics={"n_runs": 4, "duration": 5.0, "equilibration": 0.0, "stride": 100.0,
                  "engine": engine},
        settings={"temperature": 600.0, "timestep": 100.0, "n_atoms": 32},
        tests=("stability",),
        out=str(folder / "out"),
    )  # fmt: skip
    found = evaluate(config)
    runs = found.of("stability", Stability)["student"]
    assert runs.n_failed == 4
    assert all(0.0 <= time < 5.0 for time in runs.survived)
    assert runs.time_to_failure == pytest.approx(sum(runs.survived) / 4)
    (sentence,) = (line for line in verdicts(found) if "reached their end" in line)
    assert "0 of 4 runs" in sentence
    assert ("exploded" if engine == "lammps" else "temperature reached") in sentence
    with pytest.raises(ConfigError, match="need where to start"):
        OwnDynamics().starts(Bench(BenchSettings()))


def test_a_run_that_changes_its_phase_has_failed(folder):
    """As a liquid that freezes: nothing fuses, the thermostat holds, but the energy is another."""
    rng, scale = np.random.default_rng(0), 32 * BOLTZMANN * 600.0
    noise = 0.1 * scale * rng.standard_normal((200, 100))
    noise = 0.5 * (noise[:, 1:] + noise[:, :-1])
    assert sum(energy_departure(each, scale) is not None for each in noise) <= 1
    assert energy_departure(noise[0, :15] - 9.0, scale) is None
    times = np.arange(99)
    first, change = energy_departure(noise[1] - scale * (times >= 60), scale)
    assert 50 <= first <= 70
    assert change == pytest.approx(-scale, rel=0.1)
    first, change = energy_departure(noise[2] + scale * times / 99, scale)  # slowly
    assert 30 <= first <= 60
    assert change == pytest.approx(0.7 * scale, rel=0.1)

    start = Structures.from_ase(aluminium()).select([0, 0])
    settings = ReplicaSettings(600.0, n_frames=99, stride=5.0, timestep=5.0, equilibration=0.0)
    run = run_replicas(start, SpeciesOffsets(start.species_table, [0.0]), settings)
    energy = torch.from_numpy(np.concatenate([noise[0], noise[1] - scale * (times >= 60)]))
    run = replace(run, frames=replace(run.frames, energy=energy))
    one, other = with_departures(run, 600.0).breakdowns
    assert one is None
    assert other.reason == "the potential energy fell by 1.00 kT per atom: another phase"
    assert 250.0 <= other.time <= 350.0


def numbers_in(value):
    """All numbers of a result in JSON, in its order."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for each in inner for number in numbers_in(each)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("reference", ["trajectory", "teacher"])
def test_several_models_at_a_time_give_what_they_give_one_by_one(folder, reference):
    save_potential(folder / "other.pt", student("Al", l_max=0), {})
    given = {
        "models": {
            "student": {"spec": str(folder / "other.pt")},
            "teacher": {"spec": str(folder / "best.pt")},
        },
        "structure": str(folder / "al.xyz"),
        "dynamics": {"n_runs": 2, "duration": 0.5, "equilibration": 0.1, "stride": 50.0},
        "settings": {"temperature": 600.0, "timestep": 5.0, "n_atoms": 32, "seed": 3},
        "tests": {"rdf": {"n_blocks": 2}, "adf": {"cutoff": 3.5}, "stability": {}, "pressure": {}},
    }
    if reference == "trajectory":
        given["trajectories"] = {"reference": str(folder / "reference.xyz")}
    for workers in (1, 2):
        evaluate(EvaluateConfig(**given, out=str(folder / f"out-{workers}"), workers=workers))
    for name in given["tests"]:
        one, several = (
            json.loads((folder / f"out-{n}" / f"{name}.json").read_text()) for n in (1, 2)
        )
        np.testing.assert_allclose(numbers_in(one), numbers_in(several), rtol=1e-9, atol=1e-12)
        assert set(one["student"]) != {"error"}
        assert list(one) == list(several)
    assert not list((folder / "out-2" / "parts").glob("*"))
    summed = json.loads((folder / "out-2" / "numbers.json").read_text())
    assert summed["teacher"]["failed_runs"] == 0.0
    assert summed["student"]["rdf_error"] > summed["student"]["rdf_noise"] > 0.0


def test_evaluations_may_be_added_and_keep_their_settings(folder):
    given = {
        "trajectories": {"reference": str(folder / "reference.xyz")},
        "out": str(folder / "out"),
    }
    evaluate(EvaluateConfig(**given, tests={"rdf": {"n_blocks": 2}}))
    before = (folder / "out" / "rdf.json").read_bytes()
    evaluate(EvaluateConfig(**given, tests={"rdf": {"n_blocks": 2}, "adf": {"n_blocks": 3}}))
    assert (folder / "out" / "rdf.json").read_bytes() == before
    assert (folder / "out" / "adf.json").is_file()
    with pytest.raises(ConfigError, match=r"'options\.rdf\.n_blocks' is 2 there, not 4"):
        evaluate(EvaluateConfig(**given, tests={"rdf": {"n_blocks": 4}}))


# -- pressure --------------------------------------------------------------------------------------


def test_pressure_is_that_of_the_gas_and_the_change_of_energy_with_volume():
    model = student("Al", l_max=1)
    frames = Structures.from_ase([aluminium(), aluminium()])
    moved = 0.2 * np.random.default_rng(1).standard_normal((64, 3))
    frames = frames.with_fields(positions=frames.positions + torch.from_numpy(moved))
    nothing = torch.zeros(2, 3, 3, dtype=torch.float64)
    gas = pressure(frames, nothing, 500.0)
    volume = 8 * 4.2**3
    assert gas.pressure == pytest.approx(32 * BOLTZMANN * 500.0 / volume / PRESSURE["bar"])
    speed = math.sqrt(BOLTZMANN * 500.0 / 26.98) * FS_IN_ASE_TIME
    drawn = speed * torch.from_numpy(np.random.default_rng(2).standard_normal((64, 3)))
    thermal = pressure(frames.with_fields(velocities=drawn), nothing, None)
    assert thermal.kinetic == pytest.approx(gas.kinetic, rel=0.3)

    stress = model.predict(frames, properties=("stress",))["stress"]
    found = pressure(frames, stress, 500.0)
    energies = []
    for scale in (1.0 - 1e-4, 1.0 + 1e-4):
        scaled = frames.deformed(scale * torch.eye(3, dtype=torch.float64))
        energies.append(float(model.predict(scaled, properties=("energy",))["energy"].mean()))
    slope = (energies[1] - energies[0]) / (6e-4 * volume)
    assert found.virial == pytest.approx(-slope / PRESSURE["bar"], rel=1e-4)
    assert found.pressure == pytest.approx(found.kinetic + found.virial)
    assert not found.beads


def test_pressure_is_computed_along_a_trajectory(folder):
    config = EvaluateConfig(
        models={"student": {"spec": str(folder / "best.pt")}},
        trajectories={
            "student": str(folder / "reference.xyz"),
            "reference": str(folder / "reference.xyz"),
        },
        settings={"temperature": 600.0},
        tests={"pressure": {"n_frames": 5}},
        out=str(folder / "out"),
    )
    found = evaluate(config)
    result = found.of("pressure", Pressure)["student"]
    frames = Structures.from_ase(read(folder / "reference.xyz", ":")).select([0, 10, 20, 29, 39])
    stress = load_potential(folder / "best.pt")[0].predict(frames, properties=("stress",))["stress"]
    expected = pressure(frames, stress, 600.0)
    assert result.pressure == pytest.approx(expected.pressure, rel=1e-6)
    assert not found.problems  # the reference has no model, hence no pressure
    beads = Findings({"pressure": {"student": replace(expected, beads=True)}})
    assert any("not that of the liquid" in line for line in verdicts(beads))


# -- potstill md -----------------------------------------------------------------------------------


def test_md_runs_replicas_into_one_trajectory(folder):
    command = ["md", str(folder / "best.pt"), str(folder / "al.xyz"), "--n-replicas", "3",
               "--temperature", "500", "--duration", "0.5", "--timestep", "5",
               "--out", str(folder / "md")]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    images = read(folder / "md" / "trajectory.extxyz", ":")
    assert len(images) == 30
    assert {atoms.info["config_type"] for atoms in images} == {f"replica {k}" for k in range(3)}
    assert len((folder / "md" / "thermo.csv").read_text().splitlines()) == 31
    before = (folder / "md" / "trajectory.extxyz").read_bytes()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (folder / "md" / "trajectory.extxyz").read_bytes() == before
    for option, message in (("--ensemble=npt", "constant volume"), ("--engine=lammps", "one run")):
        refused = CliRunner().invoke(app, [*command[:-1], str(folder / "other"), option])
        assert refused.exit_code != 0
        assert message in " ".join(refused.output.split())
    slow = ["--timestep", "100", "--duration", "5", "--stride", "100"]
    hot = [*command[:-1], str(folder / "hot"), *slow]
    exploded = CliRunner().invoke(app, hot)
    assert exploded.exit_code != 0
    assert "of 3 replicas broke down" in " ".join(exploded.output.split())
