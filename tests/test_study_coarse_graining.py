"""The parts of the coarse-graining study that its numbers rest on."""

import json

import numpy as np
import pytest
import torch

from potstill.store import LabeledStore
from scripts import STUDIES, loaded

FOLDER = STUDIES / "coarse_graining"


@pytest.fixture(scope="module")
def exact():
    with loaded(FOLDER / "exact_liquid.py"), loaded(FOLDER / "exact.py") as module:
        yield module


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("MDAnalysis", reason="mean forces are measured with MDAnalysis")
    with loaded(FOLDER / "mean_forces.py"), loaded(FOLDER / "mean_force_table.py") as module:
        yield module


@pytest.fixture(scope="module")
def liquid(exact):
    return exact.ExactLiquid()


@pytest.fixture(scope="module")
def frames(liquid):
    """Positions and labels of a few frames."""
    return liquid.sample(8, seed=1, equilibration=10)


# -- beads in an ideal solvent ---------------------------------------------------------------------


def numerical(energy, at, bead, step=1e-4):
    """Minus the derivatives of an energy with respect to a bead's coordinates."""
    shifts = step * np.eye(3)
    moved = [[at.copy() for _ in range(2)] for _ in range(3)]
    for axis in range(3):
        moved[axis][0][bead] += shifts[axis]
        moved[axis][1][bead] -= shifts[axis]
    return np.array([energy(minus) - energy(plus) for plus, minus in moved]) / (2 * step)


def test_mean_force_is_minus_the_gradient_of_the_free_energy(liquid, frames):
    beads = frames[0][-1]
    _, forces, _ = liquid.exact(beads)
    for bead in (0, 7, 20):  # of both kinds
        found = numerical(lambda at: liquid.exact(at)[0], beads, bead)
        np.testing.assert_allclose(found, forces[bead], rtol=0, atol=1e-7)


def test_label_is_minus_the_gradient_of_the_energy(liquid, frames):
    beads = frames[0][-1]
    solvent = liquid.draw_solvent(beads, np.random.default_rng(0))
    label = liquid.mapped_forces(beads, solvent)
    for bead in (3, 15):
        found = numerical(
            lambda at: liquid.direct(at)[0] + liquid.solvent_forces(at, solvent)[0], beads, bead
        )
        np.testing.assert_allclose(found, label[bead], rtol=0, atol=1e-7)


def test_grid_is_fine_enough(liquid, frames):
    for coarse, fine in zip(
        liquid.exact(frames[0][0]), liquid.exact(frames[0][0], grid=72), strict=True
    ):
        np.testing.assert_allclose(coarse, fine, rtol=0, atol=1e-12)


def test_labels_average_to_the_mean_force_with_the_predicted_variance(liquid, frames):
    beads, rng, n = frames[0][0], np.random.default_rng(2), 300
    _, mean, noise = liquid.exact(beads)
    labels = np.array(
        [liquid.mapped_forces(beads, liquid.draw_solvent(beads, rng)) for _ in range(n)]
    )
    z = (labels.mean(0) - mean) / (noise / np.sqrt(n))
    assert np.abs(z).max() < 4.5
    # 72 nearly independent components: their mean square is 1 +- 0.17.
    assert 0.5 < np.square(z).mean() < 1.6
    assert np.mean(labels.var(0, ddof=1) / noise**2) == pytest.approx(1.0, abs=0.05)


def test_labels_of_a_trajectory_have_the_predicted_noise(liquid, frames):
    exact = [liquid.exact(beads) for beads in frames[0]]
    z = [(label - mean) / noise for label, (_, mean, noise) in zip(frames[1], exact, strict=True)]
    assert np.mean(np.square(z)) == pytest.approx(1.0, abs=0.25)
    assert abs(np.mean(z)) < 0.2


def test_pairs_of_beads_are_distributed_by_the_free_energy(exact):
    """Two beads: the mean of one of the potential's Fourier components over exp(-A / kT)."""
    liquid = exact.ExactLiquid(n_beads=(1, 1), n_solvent=20, box=7.0)
    positions, _ = liquid.sample(900, seed=3, sweeps=1, equilibration=20)
    wave = 2 * np.pi / liquid.box
    found = np.cos(wave * (positions[:, 0] - positions[:, 1])).mean(1)
    # The same by sums over a grid of separations.
    points = np.arange(10) * liquid.box / 10
    weights, values = [], []
    for x, y, z in np.stack(np.meshgrid(points, points, points), -1).reshape(-1, 3):
        if x <= y <= z:  # the others are equivalent
            separation = np.array([x, y, z])
            beads = np.stack([separation, np.zeros(3)])
            times = {3: 1, 2: 3, 1: 6}[1 + (x == y) + (y == z)]
            weights.append(times * np.exp(-liquid.exact(beads, 24)[0] / liquid.kt))
            values.append(np.cos(wave * separation).mean())
    expected = np.average(values, weights=weights)
    blocks = found.reshape(15, -1).mean(1)
    assert abs(expected) > 0.05
    assert found.mean() == pytest.approx(expected, abs=4 * blocks.std(ddof=1) / np.sqrt(15))


def test_a_reduced_study_denoises(exact, monkeypatch, tmp_path):
    monkeypatch.setattr(exact, "STEPS", 16)
    monkeypatch.setattr(exact, "N_TEACHERS", 2)
    monkeypatch.setattr(exact, "N_TEST", 4)
    monkeypatch.setattr(exact, "FRAMES", (15,))
    liquid = exact.ExactLiquid()
    found = exact.run(tmp_path, liquid, 0, 15)
    store = LabeledStore.open(tmp_path / "frames_0.zarr")
    assert store.sources == ("reference", "exact")
    positions = store.structures().positions.numpy().reshape(15, -1, 3)
    noise = np.sqrt(np.mean([liquid.exact(beads)[2] ** 2 for beads in positions]))
    assert found["raw label"][1] == pytest.approx(1000 * noise, rel=0.1)
    # Even these beat labels and zeros; which model is best is not settled by so short trainings.
    models = [name for name in found if name not in ("raw label", "zero forces")]
    assert len(models) == 2 + len(exact.MODELS)
    assert max(found[name][0] for name in models) < found["raw label"][0]
    assert found["ensemble of 8"][0] < found["one teacher (mean of 8)"][0]
    assert "| ensemble of 8 |" in exact.table({"15": {"0": found}})
    assert exact.run(tmp_path, liquid, 0, 15) == found  # nothing is trained again


# -- measured mean forces --------------------------------------------------------------------------


def runs_with(within, states, heated, n_frames=6, n=40, n_samples=1000):
    """Runs of frames whose mean forces, fast noise and scatter of orientations are known."""
    rng = np.random.default_rng(0)
    runs, truth = {}, {}
    for frame in range(n_frames):
        truth[frame] = rng.normal(size=(n, 3))
        runs[frame] = []
        for repeat in range(3 if frame < n_frames - 1 else 1):
            state = truth[frame] + (heated if repeat else states) * rng.normal(size=(n, 3))
            kept = state + within * rng.normal(size=(n_samples, n, 3))
            own = {"repeat": repeat, "times": 0.04 * np.arange(n_samples), "kept": kept}
            runs[frame].append(own | {"mean": kept.mean(0), "constraint_mean": -kept.mean(0)})
    return runs, truth


def test_noise_and_errors_of_runs_are_those_that_were_put_in(table):
    within, states, heated = 0.3, 0.1, 0.2
    runs, _ = runs_with(within, states, heated, n=100)
    found = table.statistics(runs, np.arange(100) < 80)
    assert found["noise_within_runs"] == pytest.approx(within, rel=0.01)
    assert found["noise_of_states"] == pytest.approx(states, rel=0.15)
    assert found["label_noise"] == pytest.approx(np.hypot(within, states), rel=0.02)
    assert found["error_by_halves"] == pytest.approx(within / np.sqrt(1000), rel=0.1)
    assert found["error_of_the_run_from_the_frame"] == pytest.approx(states, rel=0.15)
    assert found["error_of_a_heated_run"] == pytest.approx(heated, rel=0.15)
    assert found["with_force_of_constraint"] == 0.0
    assert abs(found["autocorrelation"]["0.2"]) < 0.01


def test_errors_of_labels_and_models_are_freed_of_those_of_the_measurement(table, tmp_path):
    rng = np.random.default_rng(1)
    within, states, heated, error = 0.2, 0.1, 0.15, 0.07
    runs, truth = runs_with(within, states, heated, n_frames=8, n=120, n_samples=400)
    kinds = np.repeat(["CHOL", "Cl", "UREA"], 40)
    for frame, own in runs.items():
        raw = own[0]["kept"][0]
        start = [table.DISCARDED[min(run["repeat"], 1)] for run in own]
        for run, begin in zip(own, start, strict=True):
            steps = np.arange(1.0, 5.0)[:, None]
            np.savez(
                tmp_path / f"frame{frame:04d}_run{run['repeat']}.npz",
                frame=frame,
                repeat=run["repeat"],
                cell=np.full(3, 20.0),
                molecules=kinds,
                masses=np.repeat([104.0, 35.0, 60.0], 40),
                centers=rng.uniform(0, 20, (120, 3)),
                raw=raw,
                times=begin + run["times"],
                forces=run["kept"].astype(np.float32),
                constraint_times=begin + steps[:, 0],
                constraint=np.repeat(-run["mean"][None], 4, 0),
                energies=np.hstack([begin + steps, 0 * steps]),
                axes=np.ones((2, 120, 3)) / np.sqrt(3),
                moved=0.0,
                performance="50.0",
                version="2022.5",
            )
    table.collect(tmp_path, tmp_path / "store.zarr", tmp_path / "noise.json")
    store = LabeledStore.open(tmp_path / "store.zarr")
    assert store.sources == ("reference", "mean_forces", "from_frame", "heated")
    exact = torch.tensor(np.concatenate(list(truth.values())))
    mean = store.labels("mean_forces")
    z = (mean["forces"] - exact) / mean["forces_std"]
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.2)
    model = exact + error * torch.tensor(rng.normal(size=exact.shape))
    found = table.against(model, store)
    for kind in ("choline", "chloride", "urea", "all"):
        assert found["corrected"][kind][0] == pytest.approx(error, abs=0.02)
    assert found["crossed"]["all"][0] == pytest.approx(error, abs=0.01)
    raw = table.against(store.labels("reference")["forces"], store, is_raw=True)
    assert raw["corrected"]["all"][0] == pytest.approx(np.hypot(within, states), rel=0.05)
    table.table(store.path, [], tmp_path / "table.json")
    assert set(json.loads((tmp_path / "table.json").read_text())["eV_per_A"]) == {
        "zero forces",
        "raw label",
    }


def test_the_first_few_frames_are_spread_over_the_trajectory(table):
    from mean_forces import chosen_frames

    frames = chosen_frames(1201, 12)
    assert sorted(frames) == list(range(100, 1201, 100))
    assert max(np.diff(sorted([*frames[:4], 1200]))) <= 400
