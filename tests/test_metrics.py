"""Streaming metrics against plain numpy on the whole set."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from potstill.errors import DataError
from potstill.metrics import ErrorAccumulator
from potstill.properties import property_spec
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures

SIZES = (3, 1, 7, 4, 2, 5)


@pytest.fixture
def batch() -> Structures:
    rng = np.random.default_rng(0)
    n, s = sum(SIZES), len(SIZES)
    return Structures(
        positions=torch.from_numpy(rng.normal(size=(n, 3))),
        species=torch.zeros(n, dtype=torch.int64),
        system_index=torch.repeat_interleave(torch.arange(s), torch.tensor(SIZES)),
        cell=torch.eye(3, dtype=torch.float64).expand(s, 3, 3) * 20.0,
        pbc=torch.ones(s, 3, dtype=torch.bool),
        species_table=SpeciesTable.from_symbols(["Al"]),
    )


def random_properties(structures: Structures, seed: int, spread: float = 1.0) -> Properties:
    rng = np.random.default_rng(seed)
    values = {}
    for name in ("energy", "forces", "stress", "atomic_energies"):
        spec = property_spec(name)
        rows = structures.n_systems if spec.level == "system" else structures.n_atoms
        values[name] = torch.from_numpy(spread * rng.normal(size=(rows, *spec.shape)))
    return Properties(values)


def full(prediction: Properties, label: Properties, structures: Structures) -> dict[str, float]:
    metrics = ErrorAccumulator()
    metrics.update(prediction, label, structures)
    return metrics.compute()


def test_agrees_with_numpy_on_the_whole_set(batch):
    prediction, label = random_properties(batch, 1), random_properties(batch, 2)
    result = full(prediction, label, batch)
    for name in ("energy", "forces", "stress", "atomic_energies"):
        error = (prediction[name] - label[name]).numpy()
        assert result[f"{name}_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-14)
        assert result[f"{name}_rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-14)
        assert result[f"{name}_n"] == error.size
    per_atom = (prediction["energy"] - label["energy"]).numpy() / np.array(SIZES)
    assert result["energy_per_atom_mae"] == pytest.approx(np.abs(per_atom).mean(), rel=1e-14)
    assert result["energy_per_atom_rmse"] == pytest.approx(np.sqrt((per_atom**2).mean()))
    forces, target = prediction["forces"].numpy(), label["forces"].numpy()
    cosine = (forces * target).sum(1) / np.linalg.norm(forces, axis=1)
    cosine /= np.linalg.norm(target, axis=1)
    assert result["forces_cosine"] == pytest.approx(cosine.mean(), rel=1e-13)
    relative = np.sqrt(((forces - target) ** 2).mean()) / target.std()
    assert result["forces_relative_rmse"] == pytest.approx(relative, rel=1e-13)


def test_states_of_two_halves_add_up_to_the_whole(batch):
    prediction, label = random_properties(batch, 1), random_properties(batch, 2)
    whole = full(prediction, label, batch)
    halves = []
    for systems in ([0, 1], [2, 3, 4, 5]):
        part = ErrorAccumulator()
        part.update(
            prediction.select(batch.rows(systems)),
            label.select(batch.rows(systems)),
            batch.select(systems),
        )
        halves.append(part)
    reduced = ErrorAccumulator()
    reduced.load_state(halves[0].state() + halves[1].state())
    assert reduced.compute() == pytest.approx(whole, rel=1e-13)


def test_state_is_a_copy(batch):
    metrics = ErrorAccumulator()
    metrics.update(random_properties(batch, 1), random_properties(batch, 2), batch)
    before = metrics.compute()
    metrics.state().zero_()
    assert metrics.compute() == before


def test_absent_systems_do_not_count(batch):
    prediction, label = random_properties(batch, 1), random_properties(batch, 2)
    here = [0, 2, 5]
    mask = torch.zeros(len(SIZES), dtype=torch.bool)
    mask[here] = True
    gone = ~mask[batch.system_index]
    values = dict(label.values)
    values["forces"] = torch.where(gone[:, None], torch.nan, label["forces"])
    values["stress"] = torch.where(mask[:, None, None], label["stress"], torch.nan)
    partial = Properties(values, {"forces": mask, "stress": mask})
    result = full(prediction, partial, batch)
    some = full(
        prediction.select(batch.rows(here)), label.select(batch.rows(here)), batch.select(here)
    )
    everything = full(prediction, label, batch)
    for key in ("forces_rmse", "forces_cosine", "forces_relative_rmse", "stress_mae", "efwt_n"):
        assert result[key] == pytest.approx(some[key], rel=1e-14)
    assert result["energy_rmse"] == everything["energy_rmse"]
    # the same without the masks: NaN in a label alone means absent
    assert full(prediction, Properties(values), batch) == result


def test_one_nan_component_leaves_the_whole_system_out(batch):
    prediction, label = random_properties(batch, 1), random_properties(batch, 2)
    label["forces"][4, 1] = torch.nan  # an atom of system 2
    result = full(prediction, label, batch)
    assert result["forces_n"] == 3 * (sum(SIZES) - SIZES[2])


def test_predicted_nan_shows(batch):
    prediction, label = random_properties(batch, 1), random_properties(batch, 2)
    prediction["forces"][0, 0] = torch.nan
    result = full(prediction, label, batch)
    assert math.isnan(result["forces_rmse"])
    assert math.isnan(result["forces_cosine"])
    assert result["efwt"] == 0.0


def test_efwt_needs_energy_and_every_free_atom(batch):
    label = random_properties(batch, 2)
    prediction = Properties({k: v.clone() for k, v in label.values.items()})
    assert full(prediction, label, batch)["efwt"] == 100.0
    prediction["energy"][0] += 0.021  # system 0: energy out
    prediction["energy"][1] += 0.019  # system 1: still within
    prediction["forces"][5, 2] += 0.031  # system 2: one component out
    assert full(prediction, label, batch)["efwt"] == pytest.approx(100.0 * 4 / 6)
    fixed = torch.zeros(batch.n_atoms, dtype=torch.bool)
    fixed[5] = True
    held = replace(batch, fixed=fixed)
    assert full(prediction, label, held)["efwt"] == pytest.approx(100.0 * 5 / 6)


def test_cosine_skips_zero_labels_and_scores_zero_predictions_zero(batch):
    label = random_properties(batch, 2)
    prediction = Properties({"forces": 3.0 * label["forces"]})
    assert full(prediction, label, batch)["forces_cosine"] == pytest.approx(1.0)
    label["forces"][0] = 0.0
    assert full(prediction, label, batch)["forces_cosine"] == pytest.approx(1.0)
    prediction["forces"][1] = 0.0
    n = batch.n_atoms - 1
    assert full(prediction, label, batch)["forces_cosine"] == pytest.approx((n - 1) / n)


def test_nothing_shared_is_nothing_reported(batch):
    label = random_properties(batch, 2)
    assert full(Properties({}), label, batch) == {}
    assert "forces_rmse" not in full(Properties({"energy": label["energy"]}), label, batch)


def test_float32_predictions_are_compared_in_float64(batch):
    label = random_properties(batch, 2, spread=1e5)
    prediction = Properties({"energy": (label["energy"] + 1.0).float()})
    expected = (prediction["energy"].double() - label["energy"]).square().mean().sqrt()
    assert full(prediction, label, batch)["energy_rmse"] == pytest.approx(float(expected))


def test_wrong_sizes_are_refused(batch):
    label = random_properties(batch, 2)
    with pytest.raises(DataError, match="prediction of energy has 2 rows"):
        full(Properties({"energy": torch.zeros(2)}), label, batch)
    with pytest.raises(DataError, match="not 3"):
        ErrorAccumulator().load_state(torch.zeros(3))
