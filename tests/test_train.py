"""The training loop: learning, exact resume, ranks, interruption, divergence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from kill_helper import kill_until_done
from potstill.checkpoint import load_potential, read_payload
from potstill.config import TrainConfig, validate
from potstill.display import Display
from potstill.distill import LossTerm, Schedule
from potstill.errors import ConfigError, DivergenceError, MissingLabelError
from potstill.readers import read
from potstill.report.tables import number
from potstill.structures import Properties, Structures
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.data import fit_offsets
from potstill.train.initialize import initial_student
from potstill.train.mixing import mixed_batches
from potstill.train.settings import EnergySettings, ModelSettings, OptimizerSettings
from potstill.workflows.training import train_from_config

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
    result = train(run, data, held_out, tmp_path / "run", info={"license": "none"})
    records = records_of(tmp_path / "run")
    assert len(records) == result.epochs == 25
    assert records[-1]["validation"]["forces_rmse"] < 0.5 * records[0]["validation"]["forces_rmse"]
    potential, info = load_potential(result.best)
    assert set(potential.components) == {"offsets", "prior", "network"}
    assert info["license"] == "none"
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


@pytest.mark.slow
def test_kill_9_at_any_file_operation_of_training_changes_nothing(tmp_path: Path) -> None:
    """An epoch has five: two each of best.pt and last.pt, and a line of metrics.jsonl."""
    script, folder = str(Path(__file__).with_name("train_runner.py")), tmp_path / "killed"
    met = kill_until_done([script, str(folder)], folder, (1, 3, 5, 6, 8, 9))
    assert met == [-9] * 6
    train(settings(epochs=6), emt_set(12), emt_set(3, seed=9), tmp_path / "whole")
    assert_same_weights(tmp_path / "whole/best.pt", folder / "best.pt")
    assert without_times(tmp_path / "whole") == without_times(folder)


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


# -- the optimizer, against written-out arithmetic -------------------------------------------------


def one_step_of(folder: Path, **optimizer: object) -> tuple[dict, dict, list[torch.Tensor]]:
    """Weights before and after one step with a rate of 0.01, and Adam's averages of gradients."""
    data = emt_set(3)
    run = settings(
        epochs=1,
        batch_size=3,
        optimizer=OptimizerSettings(learning_rate=0.01, **optimizer),  # type: ignore[arg-type]
    )
    before = initial_student(run, data)[0]["network"].state_dict()
    train(run, data, data, folder)
    payload = read_payload(folder / "last.pt")
    averages = [row["exp_avg"] for row in payload["optimizer"]["state"].values()]
    return before, payload["state"], averages


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    """After the first step Adam's average is 0.1 times the gradient that it was given."""
    *_, whole = one_step_of(tmp_path / "whole")
    *_, loose = one_step_of(tmp_path / "loose", clip_norm=1e9)
    *_, clipped = one_step_of(tmp_path / "clipped", clip_norm=0.5)
    gradient = 10.0 * torch.cat([g.flatten() for g in whole])
    assert float(gradient.norm()) > 1.0
    torch.testing.assert_close(10.0 * torch.cat([g.flatten() for g in loose]), gradient)
    expected = 0.5 * gradient / gradient.norm()
    found = 10.0 * torch.cat([g.flatten() for g in clipped])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_weight_decay_of_adamw_shrinks_weights_and_that_of_adam_adds_to_gradients(
    tmp_path: Path,
) -> None:
    before, free, plain = one_step_of(tmp_path / "free")
    _, decayed, _ = one_step_of(tmp_path / "adamw", name="adamw", weight_decay=0.3)
    *_, coupled = one_step_of(tmp_path / "adam", weight_decay=0.3)
    trained = [name for name in before if not torch.equal(before[name], free[name])]
    assert len(trained) > 5
    network = initial_student(settings(), emt_set(3))[0]["network"]
    weights = {id(weight) for weight in network.regularized_weights()}
    shrunk = {name for name, p in network.named_parameters() if id(p) in weights}
    assert {name.split(".")[-1] for name in set(trained) - shrunk} >= {"bias"}
    for name in trained:
        rate = 0.01 * 0.3 if name in shrunk else 0.0
        expected = free[name] - rate * before[name]
        torch.testing.assert_close(decayed[name], expected, rtol=1e-9, atol=1e-12)
    for weight, one, other in zip(network.parameters(), plain, coupled, strict=True):
        torch.testing.assert_close(other, one + 0.1 * 0.3 * weight.detach())


def test_refit_makes_the_mean_energy_errors_of_the_species_vanish(tmp_path: Path) -> None:
    data = emt_set(12)
    plain, refit = (settings(epochs=2, energy={"refit": refit}) for refit in (False, True))
    files = [train(run, data, data, tmp_path / str(k)).best for k, run in enumerate((plain, refit))]
    (before, _), (after, info) = map(load_potential, files)
    assert train(refit, data, data, tmp_path / "1").best == files[1]  # a finished run is left alone
    assert load_potential(files[1])[1] == info
    wanted = ("energy", "forces")
    reference, old, new = (
        data.labels["reference"]["energy"],
        before.predict(data.structures, properties=wanted),
        after.predict(data.structures, properties=wanted),
    )
    torch.testing.assert_close(old["forces"], new["forces"], rtol=0, atol=0)
    composition = data.structures.composition()
    n_atoms = composition.sum(dim=1)
    shift = torch.tensor([*info["training"]["energy_shift"].values()], dtype=torch.float64)
    torch.testing.assert_close(new["energy"] - old["energy"], composition @ shift)
    errors = [(e["energy"] - reference) / n_atoms for e in (old, new)]
    slopes = (composition / n_atoms[:, None]).T @ errors[1]
    assert float(slopes.abs().max()) < 1e-9 < float(errors[0].abs().max())
    with pytest.raises(ValueError, match=r"energy.refit needs a term of energies"):
        settings(energy={"refit": True}, loss=[{"property": "forces", "weight": 1.0}])


def test_the_moving_average_of_weights_is_validated_and_saved(tmp_path: Path) -> None:
    """One step per epoch, so that `last.pt` holds the weights of every step."""
    data = emt_set(3)
    run = settings(
        epochs=4,
        batch_size=3,
        optimizer=OptimizerSettings(learning_rate=0.01, ema_decay=0.7),
        regularization={"l2": 0.0},
    )
    average = initial_student(run, data)[0]["network"].state_dict()
    steps = []

    def note(record: dict) -> None:
        steps.append(read_payload(tmp_path / "last.pt")["state"])

    result = train(run, data, data, tmp_path, on_epoch=note)
    best = load_potential(result.best)[0]["network"].state_dict()
    assert len(steps) == 4
    for k, state in enumerate(steps, start=1):
        average = {key: 0.7 * average[key] + 0.3 * value for key, value in state.items()}
        if k == result.best_epoch:
            for key, value in average.items():
                torch.testing.assert_close(best[key], value, rtol=1e-9, atol=1e-12)
    last = read_payload(tmp_path / "last.pt")["average"]
    for key, value in average.items():
        torch.testing.assert_close(last[key], value, rtol=1e-9, atol=1e-12)


def rates_of(folder: Path, epochs: int, **rule: object) -> list[float]:
    """Learning rates, in units of the initial one, of a run whose score never gets better."""
    data = emt_set(2)
    run = settings(
        epochs=epochs,
        loss=(LossTerm(property="energy"),),
        optimizer=OptimizerSettings(learning_rate=1e-12),
        learning_rate={"minimum": 0.0, **rule},
        early_stopping=None,
    )
    train(run, data, data, folder)
    return [record["learning_rate"] / 1e-12 for record in records_of(folder)]


def test_a_plateau_cuts_the_rate_after_patience(tmp_path: Path) -> None:
    """The first epoch is the best; each third one without a better score ends a plateau."""
    rates = rates_of(tmp_path, 8, patience=2, factor=0.1)
    assert rates == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01])


def test_the_rate_does_not_fall_below_its_minimum(tmp_path: Path) -> None:
    rates = rates_of(tmp_path, 6, patience=0, factor=0.1, minimum=0.05e-12)
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.05, 0.05, 0.05])


@pytest.mark.parametrize(
    ("rule", "then"),
    [
        ({"schedule": "constant"}, [1.0, 1.0, 1.0]),
        ({"schedule": "exponential", "factor": 0.5}, [1.0, 0.5, 0.25]),
        ({"schedule": "step", "step_epochs": 2, "factor": 0.5}, [1.0, 1.0, 0.5]),
    ],
)
def test_the_rate_warms_up_before_its_schedule_begins(
    tmp_path: Path, rule: dict, then: list[float]
) -> None:
    rates = rates_of(tmp_path, 6, warmup_epochs=3, **rule)
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, *then])


def test_one_cycle_rises_to_the_full_rate_and_falls_along_a_cosine(tmp_path: Path) -> None:
    """The rate of an epoch is that of its middle; the rise takes 15 % of the training."""
    rates = rates_of(tmp_path, 10, schedule="one_cycle")
    cosines = np.cos(np.pi * np.array([0.05 / 0.15, *(np.arange(0.0, 0.9, 0.1) / 0.85)]))
    expected = [0.04 + 0.96 * 0.5 * (1.0 - cosines[0]), *(0.5 * (1.0 + cosines[1:]))]
    assert rates == pytest.approx(expected)
    assert max(rates) == rates[1] == 1.0


def test_a_stopped_one_cycle_goes_on_with_the_same_rates(tmp_path: Path) -> None:
    data = emt_set(2)
    run = settings(
        epochs=8,
        model=ModelSettings(
            hyperparameters=dict(
                n_features=4, n_sensitivities=4, n_channels=3, n_atom_layers=0, dist_hard_max=4.0
            )
        ),
        learning_rate={"schedule": "one_cycle"},
    )

    def interrupt(record: dict) -> None:
        if record["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    train(run, data, data, tmp_path / "whole")
    for status in ("interrupted", "finished"):
        result = train(run, data, data, tmp_path / "stopped", on_epoch=interrupt)
        assert result.status == status
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")
    assert_same_weights(tmp_path / "stopped" / "best.pt", tmp_path / "whole" / "best.pt")
    # Whitening is taken from data once, and is not trained.
    initial = initial_student(run, data)[0]["network"].state_dict()
    trained = read_payload(tmp_path / "whole" / "last.pt")["state"]
    fixed = [name for name in initial if name.endswith(("whitening", "center"))]
    assert len(fixed) == 2
    for name in fixed:
        assert torch.equal(trained[name], initial[name])
    name = "blocks.0.0.layer.tensor_weights.2"
    assert not torch.equal(trained[name], initial[name])


def test_an_automatic_average_is_that_of_a_tenth_of_the_run(tmp_path: Path) -> None:
    """Of 4 frames in twos 24 epochs make 48 steps; of runs of up to ten steps the last is kept."""
    data = emt_set(4)
    averages = []
    for epochs, decay in ((24, "auto"), (24, 1.0 - 10.0 / 48.0), (3, "auto"), (3, None)):
        run = settings(
            epochs=epochs,
            batch_size=2,
            optimizer={"learning_rate": 0.01, "ema_decay": decay},
            early_stopping=None,
        )
        folder = tmp_path / str(len(averages))
        averages.append(train(run, data, data, folder).best)
    assert_same_weights(averages[0], averages[1])
    assert_same_weights(averages[2], averages[3])


# -- the command -----------------------------------------------------------------------------------


class Shown(Display):
    """Keeps the tables that it is shown."""

    def __init__(self) -> None:
        self.tables: dict[str, list[Sequence[str]]] = {}

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.tables[title] = [columns, *rows]


def users_frames(path: Path) -> None:
    """Frames as a user's DFT code writes them: total energies far from zero."""
    frames = []
    for atoms in emt_set(12).structures.to_ase():
        atoms.calc = EMT()
        energy = (
            atoms.get_potential_energy() - 5000.0 * len(atoms) - 3.0e4 * atoms.symbols.count("Au")
        )
        forces = atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        frames.append(atoms)
    write(path, frames)


def test_data_and_a_folder_are_enough_and_errors_of_the_best_epoch_are_shown(
    tmp_path: Path,
) -> None:
    users_frames(tmp_path / "dft.extxyz")
    config = validate(
        {
            "out": str(tmp_path / "run"),
            "data": {
                "files": [str(tmp_path / "dft.extxyz")],
                "split": {"fractions": {"train": 0.5, "validation": 0.25, "test": 0.25}},
            },
            # All else is the default; these only keep the test short, and the last epoch bad.
            "train": {
                "epochs": 3,
                "model": SMALL.model_dump(),
                "optimizer": {"learning_rate": 0.3},
            },
        },
        TrainConfig,
    )
    shown = Shown()
    result = train_from_config(config, shown)
    assert result.best_epoch < result.epochs == 3
    records = records_of(tmp_path / "run")
    best = records[result.best_epoch - 1]["validation"]
    table = shown.tables[f"errors of the best potential, epoch {result.best_epoch}"]
    assert table[0] == ("error", "unit", "validation", "test")
    rows = {row[0]: row[1:] for row in table[1:]}
    expected = number(1000 * best["energy_per_atom_rmse"])
    assert rows["Energy RMSE"][:2] == ["meV/atom", expected]
    assert expected != number(1000 * records[-1]["validation"]["energy_per_atom_rmse"])
    test = json.loads((tmp_path / "run/test.json").read_text())["reference"]["channels"]
    forces = [best["forces_mae"], test["student-reference"]["forces_mae"]]
    assert rows["Force MAE"] == ["eV/Å", *map(number, forces)]
    # Totals of -5,000 eV/atom and more: the fitted zero leaves what EMT itself gives.
    structures, labels = read(tmp_path / "dft.extxyz")
    zero = load_potential(result.best)[0]["offsets"].predict(structures, properties=["energy"])
    left = (labels["energy"] - zero["energy"]) / structures.n_atoms_per_system
    assert float(left.abs().max()) < 1.0


def test_batches_cover_everything_once_and_respect_the_atom_budget() -> None:
    structures = emt_set(7).structures  # 4 and 8 atoms in turn
    plain, filled = TrainSettings(batch_size=3, seed=1), TrainSettings(batch_atoms=12, seed=1)
    for settings in (plain, filled):
        batches = mixed_batches(structures, None, settings, epoch=2)
        assert sorted(torch.cat(batches).tolist()) == list(range(7))
    sizes = structures.n_atoms_per_system
    budgeted = mixed_batches(structures, None, filled, epoch=2)
    assert max(int(sizes[b].sum()) for b in budgeted) <= 12
    again = mixed_batches(structures, None, filled, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(budgeted, again, strict=True))
    whole = TrainSettings(batch_size=7, seed=1)
    other, same = (mixed_batches(structures, None, whole, epoch) for epoch in (3, 2))
    assert not torch.equal(other[0], same[0])


def test_a_run_of_other_defaults_is_not_continued(tmp_path: Path) -> None:
    """As after an update: the settings are the same, and the network has other parameters."""
    data = emt_set(3)

    def interrupt(record: dict) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert train(settings(), data, data, tmp_path, on_epoch=interrupt).status == "interrupted"
    payload = read_payload(tmp_path / "last.pt")
    before = {name: payload[name] for name in ("state", "optimizer")}
    group = payload["optimizer"]["param_groups"][0]
    for changed in (
        {"state": {name: tensor[..., :1] for name, tensor in payload["state"].items()}},
        {"optimizer": {**payload["optimizer"], "param_groups": [group, group]}},
    ):
        torch.save({**payload, **before, **changed}, tmp_path / "last.pt")
        with pytest.raises(ConfigError, match="holds a run of an older potstill"):
            train(settings(), data, data, tmp_path)
    torch.save(payload, tmp_path / "last.pt")
    assert train(settings(), data, data, tmp_path).status == "finished"


def test_a_preset_fills_what_is_not_given() -> None:
    plain, preset = TrainSettings(), TrainSettings(preset="student")
    assert preset.energy.refit
    assert preset.optimizer.name == "adamw"
    assert (preset.max_steps, preset.early_stopping) == (10_000, None)
    changed = TrainSettings(preset="student", optimizer={"learning_rate": 0.005}, epochs=7, seed=2)
    assert (changed.optimizer.learning_rate, changed.optimizer.weight_decay) == (0.005, 0.01)
    assert (changed.epochs, changed.seed, changed.max_steps) == (7, 2, 10_000)
    for one in (plain, preset, changed):  # what a run's folder holds
        assert TrainSettings.model_validate(one.model_dump(mode="json")) == one
    with pytest.raises(ValueError, match="'student'"):
        TrainSettings(preset="studnt")


@pytest.mark.parametrize(("max_steps", "epochs", "expected"), [(5, 9, 2), (6, 9, 2), (99, 4, 4)])
def test_steps_limit_epochs(tmp_path, max_steps, epochs, expected) -> None:
    data = emt_set(10)  # 3 steps of 4
    run = settings(max_steps=max_steps, epochs=epochs, precision="float32")
    result = train(run, data, data, tmp_path)
    assert (result.status, result.epochs) == ("finished", expected)
    assert train(run, data, data, tmp_path).epochs == expected  # again: nothing to do
