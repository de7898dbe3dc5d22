"""Iterative Boltzmann inversion: potentials are found again from the g(r) that they make.

The oracle is the hypernetted-chain theory of mixtures: there g(r) follows from u(r) without noise,
and u(r) from g(r) uniquely.
"""

import json

import numpy as np
import pytest
import torch
from scipy.fft import dst
from typer.testing import CliRunner

from potstill.checkpoint import load_potential
from potstill.cli.app import app
from potstill.coarse import Inversion, Measured, invert
from potstill.errors import ConfigError, DataError
from potstill.models import PairPotential
from potstill.sample.replicas import ReplicaSettings, run_replicas
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.units import BOLTZMANN

BEADS = SpeciesTable((Species("ion", 35.45), Species("urea", 60.06)))
TEMPERATURE = 400.0
BETA = 1.0 / (BOLTZMANN * TEMPERATURE)
WIDTH, N_BINS = 0.1, 1024
R = WIDTH * (np.arange(N_BINS) + 0.5)
K = np.pi / (N_BINS * WIDTH) * (np.arange(N_BINS) + 0.5)
DENSITY = np.array([0.0022, 0.0022])


def soft():
    """Soft cores and wells of different sizes, in the space of the spline."""
    model = PairPotential(BEADS, 9.0, 0.25).double()
    x = (torch.arange(model.n_knots, dtype=torch.float64) - 1.0) * model.spacing
    fade = (1.0 - x / model.cutoff).clamp(min=0.0) ** 3
    rows = [
        fade * (4.0 * torch.exp(-((x / size) ** 2)) - depth * torch.exp(-((x - 5.5) ** 2)))
        for size, depth in ((2.5, 0.05), (2.2, 0.3), (2.8, 0.1))
    ]
    with torch.no_grad():
        model.coefficients.copy_(torch.stack(rows))
    return model


def to_waves(f):
    """Fourier transform of a function of the distance."""
    return 2.0 * np.pi * WIDTH / K * dst(R * f, type=4)


def from_waves(f):
    """The inverse."""
    return dst(K * f, type=4) / (4.0 * np.pi * N_BINS * WIDTH * R)


def hypernetted_chain(model):
    """g(r) by pair, on all of R, of the mixture with the model's potentials."""
    inside = torch.from_numpy(R[model.cutoff > R])
    boltzmann = np.ones((len(model.pairs), N_BINS))
    boltzmann[:, : len(inside)] = np.exp(-BETA * model.table(inside)[0].numpy())
    rows = model.pair_index.numpy()
    root = np.sqrt(np.outer(DENSITY, DENSITY))[None]
    gamma = np.zeros_like(boltzmann)
    for _ in range(2000):
        direct = boltzmann * np.exp(gamma) - gamma - 1.0
        # Ornstein and Zernike in Fourier space.
        matrix = root * to_waves(direct).T[:, rows]
        indirect = (np.linalg.solve(np.eye(2) - matrix, matrix) - matrix) / root
        change = from_waves(indirect[:, *np.triu_indices(2)].T) - gamma
        gamma = gamma + 0.5 * change
        if np.abs(change).max() < 1e-10:
            break
    else:
        raise AssertionError("the theory does not converge")
    return dict(zip(model.pairs, boltzmann * np.exp(gamma), strict=True))


def measured(model):
    near = model.cutoff > R
    return Measured({pair: g[near] for pair, g in hypernetted_chain(model).items()})


def test_fourier_transforms_of_the_oracle():
    """A Gaussian's is known."""
    gaussian = np.exp(-(R**2))
    np.testing.assert_allclose(to_waves(gaussian), np.pi**1.5 * np.exp(-(K**2) / 4), atol=1e-10)
    np.testing.assert_allclose(from_waves(to_waves(gaussian)), gaussian, atol=1e-12)


def problem(**settings):
    truth = soft()
    near = truth.cutoff > R
    return Inversion(R[near], measured(truth).g, TEMPERATURE, **settings)


def run(folder, n_iterations=12, simulate=lambda model, _: measured(model), **settings):
    model = PairPotential(BEADS, 9.0, 0.25).double()
    inversion = problem(**{"step": 1.0, "smoothing": 0.05, "least": 1e-3} | settings)
    return model, invert(inversion, model, simulate, folder, n_iterations=n_iterations)


def test_potentials_are_found_from_their_distributions(tmp_path):
    model, done = run(tmp_path)
    errors = [iteration.mean_error for iteration in done]
    assert errors[0] > 0.05  # the potential of mean force is another one
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3
    truth, target = soft(), problem().target
    for row, pair in enumerate(model.pairs):
        first = R[int((target[pair] >= 0.02).argmax())]
        r = torch.arange(first, 8.9, 0.1, dtype=torch.float64)
        difference = (model.table(r)[0] - truth.table(r)[0])[row]
        assert float(difference.abs().max()) < 0.05 / BETA


def test_the_best_potential_is_kept(tmp_path):
    """Here a later simulation is worse, as noise can make it."""
    calls = []

    def simulate(model, checkpoint):
        calls.append(checkpoint.name)
        found = measured(model)
        return found if len(calls) < 4 else Measured({k: g + 0.5 for k, g in found.g.items()})

    model, done = run(tmp_path, n_iterations=4, simulate=simulate)
    assert calls == [f"iteration_{k:03d}.pt" for k in range(4)]
    assert [iteration.number for iteration in done] == [0, 1, 2, 3]
    kept, _ = load_potential(tmp_path / "iteration_002.pt")
    assert torch.equal(model.coefficients, kept.coefficients)


def test_with_a_pressure_the_last_potential_is_taken(tmp_path):
    def simulate(model, checkpoint):
        worse = 0.5 if checkpoint.name == "iteration_002.pt" else 0.0
        return Measured({k: g + worse for k, g in measured(model).g.items()}, pressure=0.3)

    model, done = run(tmp_path, n_iterations=3, simulate=simulate, pressure=0.1)
    kept, _ = load_potential(tmp_path / "iteration_002.pt")
    assert torch.equal(model.coefficients, kept.coefficients)
    assert done[-1].mean_error > min(iteration.mean_error for iteration in done)


def test_an_interrupted_inversion_continues(tmp_path):
    whole, _ = run(tmp_path / "whole", n_iterations=4)

    def simulate(model, checkpoint):
        if checkpoint.name == "iteration_002.pt":
            raise KeyboardInterrupt
        return measured(model)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", n_iterations=4, simulate=simulate)
    assert len(json.loads((tmp_path / "cut" / "iterations.json").read_text())) == 2
    resumed, done = run(tmp_path / "cut", n_iterations=4)
    assert len(done) == 4
    assert torch.allclose(resumed.coefficients, whole.coefficients, rtol=0, atol=1e-9)


def test_the_ramp_lowers_a_pressure_that_is_too_high(tmp_path):
    """Everything else is converged: all pairs get more attractive, and less so near the goal."""
    lowered = []
    for excess in (0.03, 10.0):
        model = soft()
        at_goal = Measured(measured(model).g, pressure=0.1 + excess)
        inversion = problem(pressure=0.1, smoothing=0.05)
        inversion.improve(model, at_goal)
        r = torch.tensor([4.5], dtype=torch.float64)
        lowered.append((model.table(r)[0] - soft().table(r)[0])[:, 0] * BETA)
    expected = -0.1 * (1.0 - 4.5 / 9.0)
    np.testing.assert_allclose(lowered[1], expected, rtol=0.05)
    np.testing.assert_allclose(lowered[0], 0.1 * lowered[1], rtol=0.05)


def test_targets_are_checked(tmp_path):
    target = problem().target
    with pytest.raises(DataError, match="ion-urea is empty"):
        Inversion(R[:90], {**target, "ion-urea": np.zeros(90)}, TEMPERATURE)
    del target["ion-urea"]
    partial = Inversion(R[:90], target, TEMPERATURE)
    with pytest.raises(ConfigError, match="no target g\\(r\\) of ion-urea"):
        invert(partial, soft(), lambda *_: None, tmp_path, n_iterations=1)


@pytest.mark.parametrize("engine", ["replicas", "lammps"])
def test_the_command_inverts_a_trajectory(tmp_path, engine, request):
    """Dynamics with a known potential; then the potential from its frames alone."""
    if engine == "lammps":
        request.getfixturevalue("lammps")
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3) * 6.0
    start = Structures(
        positions=torch.from_numpy(grid),
        species=torch.arange(27) % 2,
        system_index=torch.zeros(27, dtype=torch.int64),
        cell=18.0 * torch.eye(3, dtype=torch.float64)[None],
        pbc=torch.tensor([[True] * 3]),
        species_table=BEADS,
    )
    settings = ReplicaSettings(TEMPERATURE, 20, 100.0, 1000.0, 20.0, 200.0)
    frames = run_replicas(start.select([0] * 2), soft(), settings).frames.structures
    LabeledStore.create(tmp_path / "beads.zarr", info={"temperature": TEMPERATURE}).append(frames)
    config = tmp_path / "ibi.yaml"
    settings_of_all = (
        f"store: {tmp_path / 'beads.zarr'}\n"
        "model: {cutoff: 9.0, spacing: 0.3}\n"
        "bin_width: 0.3\n"
        f"dynamics: {{engine: {engine}, n_replicas: 2, n_frames: 20, stride: 100,"
        " equilibration: 500, timestep: 20, thermostat_time: 200}\n"
    )
    arguments = ["coarse", "ibi", str(config), "--out", str(tmp_path / "run")]
    for n_iterations in (1, 2):  # the second call goes on
        config.write_text(f"{settings_of_all}n_iterations: {n_iterations}\n")
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert "iteration 0" not in result.output
    record = json.loads((tmp_path / "run" / "iterations.json").read_text())
    assert len(record) == 2
    for entry in record:
        assert max(entry["error"].values()) < 0.6
        assert 0.0 < entry["pressure"] < 0.2
    potential, info = load_potential(tmp_path / "run" / "best.pt")
    assert potential.species_table == BEADS
    assert info["trained_on"]["elements"] == ["ion", "urea"]
    assert (tmp_path / "run" / "best.table").is_file()
