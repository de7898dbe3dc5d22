"""The training loop: learning, exact resume, ranks, interruption, divergence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT

from potstill.checkpoint import load_potential
from potstill.distill import LossTerm, Schedule
from potstill.errors import ConfigError, DivergenceError, MissingLabelError
from potstill.structures import Properties, Structures
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.data import epoch_batches, fit_offsets
from potstill.train.settings import EnergySettings, ModelSettings, OptimizerSettings

SMALL = ModelSettings(
    hyperparameters=dict(
        n_features=6,
        n_sensitivities=5,
        dist_soft_min=1.6,
        dist_soft_max=3.6,
        dist_hard_max=4.0,
        n_atom_layers=1,
    )
)


def emt_set(n: int, seed: int = 0) -> TrainingSet:
    """Rattled copper-gold cells with the energies, forces and atomic energies of EMT."""
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(n):
        atoms = bulk("Cu", cubic=True, a=3.6 * (1 + 0.02 * rng.standard_normal()))
        atoms *= (1 + k % 2, 1, 1)
        atoms.symbols[0] = "Au"
        atoms.positions += 0.1 * rng.standard_normal(atoms.positions.shape)
        atoms.calc = EMT()
        frames.append(atoms)

    def column(values: list) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.atleast_1d(v) for v in values]))

    reference = Properties(
        {
            "energy": column([a.get_potential_energy() for a in frames]),
            "forces": column([a.get_forces() for a in frames]),
            "stress": column([a.get_stress(voigt=False)[None] for a in frames]),
        }
    )
    teacher = Properties({"atomic_energies": column([a.get_potential_energies() for a in frames])})
    return TrainingSet(Structures.from_ase(frames), {"reference": reference, "teacher": teacher})


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict]:
    """Records of a run, less what differs from one run to the next."""
    times = ("seconds", "processor_seconds")
    return [{k: v for k, v in r.items() if k not in times} for r in records_of(folder)]


def settings(**changes: object) -> TrainSettings:
    defaults: dict = {
        "model": SMALL,
        "epochs": 4,
        "batch_size": 4,
        "precision": "float64",
        "loss": (
            LossTerm(property="energy"),
            LossTerm(property="forces", weight=10.0),
            LossTerm(property="stress", weight=10.0),
            LossTerm(property="atomic_energies", source="teacher", weight=5.0),
        ),
    }
    return TrainSettings(**{**defaults, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_potential(path)[0].state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_training_lowers_the_error_and_saves_a_usable_potential(tmp_path: Path) -> None:
    data, held_out = emt_set(16), emt_set(4, seed=9)
    run = settings(
        epochs=25,
        optimizer=OptimizerSettings(learning_rate=5e-3, ema_decay=0.9, clip_norm=100.0),
        energy=EnergySettings(zero="least_squares", prior="zbl"),
    )
    result = train(run, data, held_out, tmp_path / "run", info={"licence": "none"})
    records = records_of(tmp_path / "run")
    assert len(records) == result.epochs == 25
    assert records[-1]["validation"]["forces_rmse"] < 0.5 * records[0]["validation"]["forces_rmse"]
    potential, info = load_potential(result.best)
    assert set(potential.components) == {"offsets", "prior", "network"}
    assert info["licence"] == "none"
    prediction = potential.predict(held_out.structures, properties=("energy", "forces"))
    error = (prediction["forces"] - held_out.labels["reference"]["forces"]).square().mean().sqrt()
    expected = records[result.best_epoch - 1]["validation"]["forces_rmse"]
    assert float(error) == pytest.approx(expected, rel=1e-6)


def test_offsets_leave_energies_and_atomic_energies_in_agreement() -> None:
    from potstill.models import SpeciesOffsets

    data = emt_set(6)
    offsets, rank = fit_offsets(data.structures, data.labels["reference"]["energy"])
    assert rank == 2
    reduced = data.minus(SpeciesOffsets(data.structures.species_table, offsets))
    atomic = reduced.labels["teacher"]["atomic_energies"]
    summed = torch.zeros(6, dtype=torch.float64)
    summed = summed.index_add(0, data.structures.system_index, atomic)
    torch.testing.assert_close(summed, reduced.labels["reference"]["energy"])


def test_a_rank_deficient_fit_says_so() -> None:
    data = emt_set(4).select(torch.tensor([0, 2]))  # one composition, two species
    _, rank = fit_offsets(data.structures, data.labels["reference"]["energy"])
    assert rank == 1


def test_interrupted_and_killed_runs_end_with_the_same_weights(tmp_path: Path) -> None:
    data, held_out = emt_set(12), emt_set(3, seed=9)
    run = settings(epochs=6, optimizer=OptimizerSettings(ema_decay=0.9))
    whole = train(run, data, held_out, tmp_path / "whole")

    stops = iter([1, 3])

    def interrupt(record: dict) -> None:
        if record["epoch"] == next_stop[0]:
            next_stop[0] = next(stops, 99)
            os.kill(os.getpid(), signal.SIGTERM)

    next_stop = [next(stops)]
    statuses = []
    while not statuses or statuses[-1] == "interrupted":
        result = train(run, data, held_out, tmp_path / "parts", on_epoch=interrupt)
        statuses.append(result.status)
    assert statuses == ["interrupted", "interrupted", "finished"]
    assert_same_weights(whole.best, result.best)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


def _n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_kill_9_at_random_moments_of_training_changes_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from test_train import emt_set, settings, train\n"
        "from pathlib import Path\n"
        "train(settings(epochs=60), emt_set(12), emt_set(3, seed=9), Path(sys.argv[2]))\n"
    )

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-c", script, str(Path(__file__).parent), str(folder)]

    subprocess.run(command(tmp_path / "whole"), check=True)
    rng = np.random.default_rng(0)
    folder = tmp_path / "killed"
    met = 0
    for _ in range(10):
        process = subprocess.Popen(command(folder))
        # a process that starts anew does not get far before it has logged an epoch
        seen, deadline = _n_lines(folder / "metrics.jsonl"), time.monotonic() + 60
        while _n_lines(folder / "metrics.jsonl") <= seen and time.monotonic() < deadline:
            time.sleep(0.005)
            if process.poll() is not None:
                break
        time.sleep(rng.uniform(0.0, 0.2))
        met += process.poll() is None
        process.kill()
        process.wait()
    assert met >= 5  # at least so many were killed while they trained
    subprocess.run(command(folder), check=True)
    assert_same_weights(tmp_path / "whole/best.pt", folder / "best.pt")


def run_on_two_ranks(script: str, tmp_path: Path) -> None:
    """Run a script under torchrun; its `sys.argv[2]` is the folder `two` of `tmp_path`."""
    head = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "import warnings; warnings.simplefilter('ignore')\n"
    )
    path = tmp_path / "ddp.py"
    path.write_text(head + script)
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path))
    arguments = (str(Path(__file__).parent), str(tmp_path / "two"))
    subprocess.run([sys.executable, *run, *arguments], check=True, timeout=300)


@pytest.mark.slow
def test_two_ranks_equal_one_rank_with_the_whole_batch(tmp_path: Path) -> None:
    # an odd number of frames: in the last step one rank has nothing
    script = (
        "from test_train import emt_set, settings, train\n"
        "train(settings(), emt_set(9), emt_set(3, seed=9), sys.argv[2])\n"
    )
    run_on_two_ranks(script, tmp_path)
    one = train(settings(), emt_set(9), emt_set(3, seed=9), tmp_path / "one")
    first, second = weights(one.best), weights(tmp_path / "two/best.pt")
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-9, atol=1e-11)


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    data = emt_set(4)
    train(settings(epochs=1), data, data, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="other settings"):
        train(settings(epochs=2), data, data, tmp_path)
    with pytest.raises(ConfigError, match="other training data"):
        train(settings(epochs=1), emt_set(4, seed=1), data, tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_missing_label_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data = emt_set(4)
    bare = TrainingSet(data.structures, {"reference": data.labels["reference"]})
    with pytest.raises(MissingLabelError, match="'teacher'"):
        train(settings(), bare, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_divergence_stops_and_says_why(tmp_path: Path) -> None:
    data = emt_set(4)
    run = settings(optimizer=OptimizerSettings(learning_rate=1e200), epochs=20)
    with pytest.raises(DivergenceError, match="training diverged in epoch"):
        train(run, data, data, tmp_path)
    assert (tmp_path / "settings.json").exists()


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra 'tensorboard' is not installed",
    )
    data = emt_set(4)
    train(settings(epochs=2, tensorboard=True), data, data, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    written = [event.value for event in events.Scalars("validation/forces_rmse")]
    expected = [record["validation"]["forces_rmse"] for record in records_of(tmp_path)]
    assert written == pytest.approx(expected, rel=1e-6)


def test_early_stopping_waits_for_the_schedule(tmp_path: Path) -> None:
    data = emt_set(2)
    schedule = Schedule(epochs=(1, 6), values=(1.0, 2.0))
    run = settings(
        loss=(LossTerm(property="energy", weight=schedule),),
        optimizer=OptimizerSettings(learning_rate=1e-12),
        early_stopping=2,
        epochs=50,
    )
    result = train(run, data, data, tmp_path)
    assert result.status == "stopped early"
    assert result.epochs >= 8


def test_fine_tuning_starts_from_a_trained_potential(tmp_path: Path) -> None:
    data = emt_set(4)
    first = train(settings(epochs=2), data, data, tmp_path / "first")
    initial, _ = load_potential(first.best)
    run = settings(epochs=1, optimizer=OptimizerSettings(learning_rate=1e-9))
    second = train(run, data, data, tmp_path / "second", initial=initial)
    for name, value in weights(second.best).items():
        torch.testing.assert_close(value, weights(first.best)[name], rtol=1e-5, atol=1e-6)


def test_batches_cover_everything_once_and_respect_the_atom_budget() -> None:
    structures = emt_set(7).structures  # 4 and 8 atoms in turn
    for batches in (
        epoch_batches(structures, batch_size=3, batch_atoms=None, seed=1, epoch=2),
        epoch_batches(structures, batch_size=3, batch_atoms=12, seed=1, epoch=2),
    ):
        assert sorted(torch.cat(batches).tolist()) == list(range(7))
    sizes = structures.n_atoms_per_system
    budgeted = epoch_batches(structures, batch_size=3, batch_atoms=12, seed=1, epoch=2)
    assert max(int(sizes[b].sum()) for b in budgeted) <= 12
    again = epoch_batches(structures, batch_size=3, batch_atoms=12, seed=1, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(budgeted, again, strict=True))
    other = epoch_batches(structures, batch_size=7, batch_atoms=None, seed=1, epoch=3)
    same = epoch_batches(structures, batch_size=7, batch_atoms=None, seed=1, epoch=2)
    assert not torch.equal(other[0], same[0])
