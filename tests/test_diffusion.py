"""Mean-square displacement, diffusion and density, and trajectories in `potstill evaluate`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.io import write
from typer.testing import CliRunner

from potstill.cli import app
from potstill.errors import DataError
from potstill.evaluate.base import Findings
from potstill.evaluate.diffusion import (
    DiffusionEvaluation,
    density,
    diffusion,
    mean_square_displacement,
    unwrapped,
)
from potstill.evaluate.rdf import first_minimum, radial_distribution
from potstill.species import Species, SpeciesTable
from potstill.structures import Structures
from potstill.units import AMU_PER_A3_IN_G_PER_CM3, BOLTZMANN, FS_IN_ASE_TIME
from potstill.workflows.evaluation import EvaluateConfig, TrajectoryData, evaluate

LENGTH = 20.0


def trajectory(path, symbol="Al"):
    """Frames of positions (frames, N, 3) in a cubic cell."""
    n = path.shape[1]
    one = Structures.from_ase(bulk(symbol, "sc", a=LENGTH).repeat((n, 1, 1)))
    cell = LENGTH * torch.eye(3, dtype=torch.float64)[None]
    frames = [replace(one, positions=torch.from_numpy(p.copy()), cell=cell) for p in path]
    return Structures.concatenate(frames)


def walk(n_frames, n_atoms, step, seed):
    rng = np.random.default_rng(seed)
    steps = step * rng.standard_normal((n_frames, n_atoms, 3))
    return rng.uniform(0.0, LENGTH, (n_atoms, 3)) + np.cumsum(steps, axis=0)


def test_mean_square_displacement_is_the_sum_over_all_origins():
    path = walk(40, 7, 0.3, 0)
    found = mean_square_displacement(path, 25)
    direct = [((path[lag:] - path[: 40 - lag]) ** 2).sum(2).mean() for lag in range(25)]
    np.testing.assert_allclose(found, direct, atol=1e-11)


def test_free_flight_is_quadratic():
    velocity = np.random.default_rng(1).standard_normal((50, 3))
    velocity -= velocity.mean(axis=0)
    path = 1e-2 * np.arange(60)[:, None, None] * velocity
    found = diffusion(trajectory(path), 1.0, n_blocks=2)
    expected = 1e-4 * found.lag**2 * (velocity**2).sum(1).mean()
    np.testing.assert_allclose(found.msd, expected, atol=1e-10)
    assert found.exponent == pytest.approx(2.0, abs=1e-6)


def test_brownian_particles_have_einsteins_coefficient_within_the_stated_error():
    """Langevin dynamics of free particles: D = kT/(m γ), by exact steps of velocity and place."""
    friction, mass, kT, stride, n = 0.02, 26.98, BOLTZMANN * 1200.0, 20.0, 200
    exact = kT / (mass * friction) * FS_IN_ASE_TIME**2
    thermal, c = np.sqrt(kT / mass) * FS_IN_ASE_TIME, np.exp(-friction * stride)
    # Covariance of the velocity and the displacement after one stride (Chandrasekhar 1943).
    vv = 1.0 - c * c
    xv = (1.0 - c) ** 2 / friction
    xx = (2.0 * friction * stride - 3.0 + 4.0 * c - c * c) / friction**2
    root = np.linalg.cholesky([[vv, xv], [xv, xx]])
    deviations = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        velocity, place, path = thermal * rng.standard_normal((n, 3)), np.zeros((n, 3)), []
        for _ in range(500):
            noise = np.einsum("ab,bik->aik", thermal * root, rng.standard_normal((2, n, 3)))
            place = place + velocity * (1.0 - c) / friction + noise[1]
            velocity = c * velocity + noise[0]
            path.append(place)
        # 200 particles that are held together as a whole move by (1 - 1/200) less.
        found = diffusion(trajectory(np.array(path)), stride, fit_from=300.0)
        deviations.append((found.coefficient - exact * (1 - 1 / n)) / found.coefficient_error)
        assert found.coefficient == pytest.approx(exact, rel=0.12)
        assert found.diffuses
    # Student's t of five blocks has a standard deviation of 1.4.
    assert np.abs(np.mean(deviations)) < 1.2
    assert 0.5 < np.sqrt(np.mean(np.square(deviations))) < 3.0


def test_wrapping_makes_no_difference():
    path = walk(120, 10, 0.4, 2)
    as_is = diffusion(trajectory(path), 10.0, n_blocks=3)
    wrapped = diffusion(trajectory(path % LENGTH), 10.0, n_blocks=3)
    np.testing.assert_allclose(wrapped.msd, as_is.msd, atol=1e-9)
    assert wrapped.coefficient == pytest.approx(as_is.coefficient, rel=1e-9)
    assert as_is.coefficient == pytest.approx(0.4**2 / 2.0 / 10.0, rel=0.25)


def test_drift_of_the_whole_is_no_diffusion():
    path = walk(100, 10, 0.2, 3)
    drifting = path + 0.5 * np.arange(100)[:, None, None]
    np.testing.assert_allclose(
        unwrapped(trajectory(drifting)) - unwrapped(trajectory(path)), 0, atol=1e-9
    )


def test_a_crystal_has_no_diffusion_coefficient():
    rng = np.random.default_rng(4)
    path = rng.uniform(0.0, LENGTH, (30, 3)) + 0.1 * rng.standard_normal((100, 30, 3))
    found = diffusion(trajectory(path), 10.0)
    assert not found.diffuses
    (verdict,) = DiffusionEvaluation.verdicts(Findings({"diffusion": {"student": found}}))
    assert "no diffusion coefficient" in verdict.text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (walk(30, 5, 0.1, 0), "50 frames or more, not 30"),
        (walk(60, 5, 4.0, 0), "cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused(path, words):
    with pytest.raises(DataError, match=words):
        diffusion(trajectory(path), 10.0)


def test_a_changing_cell_or_order_is_refused():
    frames = trajectory(walk(60, 5, 0.1, 0))
    cells = frames.cell * torch.linspace(1.0, 1.01, 60, dtype=torch.float64)[:, None, None]
    with pytest.raises(DataError, match="constant volume"):
        diffusion(replace(frames, cell=cells), 10.0)
    two = [bulk("NaCl", "rocksalt", a=5.6, cubic=True) for _ in range(2)]
    two[1] = two[1][::-1]
    with pytest.raises(DataError, match="same order"):
        unwrapped(Structures.from_ase(two))


def test_density_is_that_of_the_frames():
    frames = Structures.from_ase([bulk("Al", "fcc", a=a, cubic=True) for a in (4.0, 4.1, 4.2)])
    found = density(frames, n_blocks=3)
    values = [4 * 26.9815385 * AMU_PER_A3_IN_G_PER_CM3 / a**3 for a in (4.0, 4.1, 4.2)]
    assert found.density == pytest.approx(np.mean(values), rel=1e-9)
    assert found.error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3), rel=1e-9)


def test_replicas_are_followed_one_by_one_and_kinds_apart():
    """Two random walks, of which one kind takes steps twice as long as the other."""
    rng = np.random.default_rng(3)
    steps = 0.2 * rng.standard_normal((2, 400, 60, 3))
    steps[:, :, 30:] *= 2.0
    paths = rng.uniform(0.0, LENGTH, (2, 1, 60, 3)) + np.cumsum(steps, axis=1)
    parts = [trajectory(path) for path in paths]
    mixed = [replace(p, group=(f"replica {k}",) * 400) for k, p in enumerate(parts)]
    both = Structures.concatenate(mixed)
    species = torch.tensor([0, 1]).repeat_interleave(30).repeat(800)
    table = SpeciesTable((Species("slow", 10.0), Species("fast", 10.0)))
    both = both.with_fields(species=species, species_table=table)
    found = diffusion(both, 10.0, n_blocks=8)
    assert found.n_blocks == 8
    for kind, step in (("slow", 0.2), ("fast", 0.4)):
        expected = step**2 / (2.0 * 10.0)
        assert found.of_kinds[kind] == pytest.approx(expected, rel=0.15)
        assert abs(found.of_kinds[kind] - expected) < 4.0 * found.of_kinds_error[kind]
    assert found.coefficient == pytest.approx(np.mean(list(found.of_kinds.values())), rel=0.05)
    # Between the end of one replica and the start of the next nothing moves.
    longest = np.sqrt(6.0 * found.coefficient * found.lag[-1])
    assert np.sqrt(found.msd[-1]) == pytest.approx(longest, rel=0.2)

    slower = replace(
        found, coefficient=0.5 * found.coefficient, coefficient_error=0.0,
        of_kinds={"slow": 0.001}, of_kinds_error={"slow": 0.0},
    )  # fmt: skip
    times = DiffusionEvaluation.against(found, slower)
    assert times["diffusion_speedup"] == pytest.approx(2.0)
    relative = found.coefficient_error / found.coefficient
    assert times["diffusion_speedup_error"] == pytest.approx(2.0 * relative)
    rows = DiffusionEvaluation.rows(
        Findings({"diffusion": {"student": found, "reference": slower}})
    )
    labels = {row.label: row.values for row in rows}
    assert set(labels["Diffusion of slow, times the reference's"]) == {"student"}


# -- trajectories in files -------------------------------------------------------------------------


def test_a_trajectory_is_evaluated_without_a_model(tmp_path):
    """A file as `potstill md` writes it: time in every frame."""
    images = trajectory(walk(60, 20, 0.3, 5)).to_ase()
    for k, atoms in enumerate(images):
        atoms.info["time_fs"] = 25.0 * k
    write(tmp_path / "md.xyz", images, format="extxyz")
    out = tmp_path / "out"
    command = ["evaluate", "--trajectory", f"gas={tmp_path / 'md.xyz'}", "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--tests", "rdf,adf,diffusion,density"])
    assert done.exit_code == 0, done.output
    stored = json.loads((out / "diffusion.json").read_text())["gas"]
    assert stored["lag"][1] == 25.0
    assert stored["coefficient"] == pytest.approx(diffusion(trajectory(
        walk(60, 20, 0.3, 5)), 25.0).coefficient, rel=1e-3)  # fmt: skip
    for name in ("rdf", "adf", "diffusion"):
        assert (out / f"{name}.png").is_file()


def test_the_time_between_frames_is_read_or_asked_for(tmp_path):
    images = trajectory(walk(60, 3, 0.1, 0)).to_ase()
    write(tmp_path / "silent.xyz", images, format="extxyz")
    config = EvaluateConfig(
        trajectories={"gas": {"path": str(tmp_path / "silent.xyz")}},
        tests=("diffusion",),
        out=str(tmp_path / "out"),
    )
    (problem,) = evaluate(config).problems
    assert "time between frames" in problem
    for k, atoms in enumerate(images):
        atoms.info["time_fs"] = 25.0 * k + 10.0 * (k == 7)
    write(tmp_path / "uneven.xyz", images, format="extxyz")
    uneven = TrajectoryData(path=str(tmp_path / "uneven.xyz"))
    with pytest.raises(DataError, match="not equally far apart"):
        uneven.time_between_frames()
    assert uneven.model_copy(update={"index": "10::2"}).time_between_frames() == 50.0
    assert uneven.model_copy(update={"stride": 3.0}).time_between_frames() == 3.0


def test_the_first_minimum_lies_between_two_shells():
    crystal = Structures.from_ase(bulk("Cu", "fcc", a=3.6, cubic=True) * (3, 3, 3))
    cutoff = first_minimum(radial_distribution(crystal))
    assert 3.6 / np.sqrt(2) < cutoff < 3.6
