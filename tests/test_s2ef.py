"""OC20's metrics over free atoms, shares of a gap, throughput, errors against the wall clock."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from data import rattled_copper
from potstill.checkpoint import save_potential
from potstill.config import EvaluateConfig
from potstill.errors import ConfigError, DataError
from potstill.evaluate.errors import (
    S2EFErrors,
    average_estimates,
    estimate_over_seeds,
    evaluate_s2ef,
    share_of_gap,
)
from potstill.evaluate.learning import progress_panels, read_learning_curves
from potstill.evaluate.speed import Throughput, inference_throughput
from potstill.metrics import ErrorAccumulator, Estimate, S2EFAccumulator
from potstill.models import HIPNN
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.workflows.evaluation import evaluate
from potstill.workflows.summary import result_rows


def random_batch(n_systems: int, seed: int = 0, spread: float = 0.02):
    """Systems of one to eight atoms, about half of them fixed; predictions close to labels."""
    rng = np.random.default_rng(seed)
    sizes = torch.from_numpy(rng.integers(1, 9, n_systems))
    n = int(sizes.sum())
    fixed = torch.from_numpy(rng.random(n) < 0.5)
    fixed[torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)[:-1]])] = False
    structures = Structures(
        positions=torch.from_numpy(rng.normal(size=(n, 3))),
        species=torch.zeros(n, dtype=torch.int64),
        system_index=torch.repeat_interleave(torch.arange(n_systems), sizes),
        cell=torch.zeros(n_systems, 3, 3, dtype=torch.float64),
        pbc=torch.zeros(n_systems, 3, dtype=torch.bool),
        species_table=SpeciesTable.from_symbols(["Cu"]),
        fixed=fixed,
    )
    label = Properties(
        {
            "energy": torch.from_numpy(rng.normal(size=n_systems)),
            "forces": torch.from_numpy(rng.normal(size=(n, 3))),
        }
    )
    label["forces"][3] = 0.0  # a labelled force of zero counts, with a cosine of zero
    noise = spread * rng.random(n_systems)
    force_noise = torch.from_numpy(noise)[structures.system_index, None]
    prediction = Properties(
        {
            "energy": label["energy"] + torch.from_numpy(noise * rng.normal(size=n_systems)),
            "forces": label["forces"] + force_noise * torch.from_numpy(rng.normal(size=(n, 3))),
        }
    )
    return structures, label, prediction


def open_catalyst(structures, label, prediction) -> dict[str, float]:
    """The four metrics by OCP's own steps: free atoms are picked, frames walked through."""
    free = ~structures.fixed
    natoms = torch.bincount(structures.system_index[free], minlength=structures.n_systems)
    forces, target = prediction["forces"][free], label["forces"][free]
    energy_error = (prediction["energy"] - label["energy"]).abs()
    start, success = 0, 0
    for k, n in enumerate(natoms.tolist()):
        worst = (forces - target)[start : start + n].abs().max()
        success += bool(energy_error[k] < 0.02 and worst < 0.03)
        start += n
    return {
        "energy_mae": float(energy_error.mean()),
        "free_forces_mae": float((forces - target).abs().mean()),
        "free_forces_cosine": float(torch.cosine_similarity(forces, target).mean()),
        "efwt": 100.0 * success / structures.n_systems,
    }


def accumulated(structures, label, prediction, batches) -> S2EFAccumulator:
    metrics = S2EFAccumulator()
    for systems in batches:
        part = (x.select(structures.rows(systems)) for x in (prediction, label))
        metrics.update(*part, structures.select(systems))
    return metrics


def test_s2ef_metrics_are_those_of_the_open_catalyst_project():
    batch = random_batch(50)
    found = accumulated(*batch, [torch.arange(50)]).compute()
    expected = open_catalyst(*batch)
    assert 0.0 < expected["efwt"] < 100.0
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-12)
        assert found[name].n == 50


def test_fixed_atoms_count_for_nothing():
    structures, label, prediction = random_batch(20)
    found = accumulated(structures, label, prediction, [torch.arange(20)]).state()
    prediction["forces"][structures.fixed] = 1e6
    again = accumulated(structures, label, prediction, [torch.arange(20)]).state()
    assert torch.equal(found, again)
    everywhere = ErrorAccumulator()
    everywhere.update(prediction, label, structures)
    metrics = everywhere.compute()
    assert metrics["forces_mae"] > 1e4
    free = ~structures.fixed
    errors = (prediction["forces"] - label["forces"])[free]
    assert metrics["free_forces_mae"] == pytest.approx(float(errors.abs().mean()))
    assert metrics["free_forces_rmse"] == pytest.approx(float(errors.square().mean().sqrt()))
    loose = ErrorAccumulator()
    loose.update(prediction, label, replace(structures, fixed=None))
    assert "free_forces_mae" not in loose.compute()


def test_batches_and_ranks_give_the_whole():
    batch = random_batch(31)
    whole = accumulated(*batch, [torch.arange(31)]).compute()
    ranks = [accumulated(*batch, torch.arange(31).split(4)[rank::2]) for rank in range(2)]
    merged = S2EFAccumulator()
    merged.load_state(ranks[0].state() + ranks[1].state())
    for name, estimate in merged.compute().items():
        assert estimate.value == pytest.approx(whole[name].value, rel=1e-12)
        assert estimate.standard_error == pytest.approx(whole[name].standard_error, rel=1e-9)


def test_standard_errors():
    structures, label, prediction = random_batch(200, spread=0.2)
    found = accumulated(structures, label, prediction, [torch.arange(200)]).compute()
    errors = (prediction["energy"] - label["energy"]).abs()
    expected = float(errors.std()) / math.sqrt(200)
    assert found["energy_mae"].standard_error == pytest.approx(expected, rel=1e-9)
    # Ratios: against leaving one frame out at a time.
    single = [accumulated(structures, label, prediction, [torch.tensor([k])]) for k in range(200)]
    total = sum(one.state() for one in single)
    left_out = S2EFAccumulator()
    values: dict[str, list[float]] = {"free_forces_mae": [], "free_forces_cosine": []}
    for one in single:
        left_out.load_state(total - one.state())
        for name, column in values.items():
            column.append(left_out.compute()[name].value)
    for name, column in values.items():
        expected = math.sqrt(199 / 200 * np.sum((np.array(column) - found[name].value) ** 2))
        assert found[name].standard_error == pytest.approx(expected, rel=0.05)


def test_frames_without_labels_are_left_out_and_nan_predictions_are_not():
    structures, label, prediction = random_batch(10)
    present = torch.ones(10, dtype=torch.bool)
    present[4] = False
    partly = Properties(label.values, {"energy": present, "forces": present})
    found = accumulated(structures, partly, prediction, [torch.arange(10)]).compute()
    kept = present.nonzero().flatten()
    rest = [x.select(structures.rows(kept)) for x in (label, prediction)]
    expected = open_catalyst(structures.select(kept), *rest)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value)
        assert found[name].n == 9
    prediction["energy"][0] = torch.nan
    found = accumulated(structures, label, prediction, [torch.arange(10)]).compute()
    assert math.isnan(found["energy_mae"].value)


# -- shares of the gap ---------------------------------------------------------------------------


def test_share_of_the_gap_as_in_the_paper():
    """COLL, PaiNN-small from PaiNN by n2n: 104.0, 85.8 and 92.5 meV close 63.2 % of the gap."""
    student, control, teacher = (Estimate(x, math.nan, 1) for x in (92.5, 104.0, 85.8))
    assert share_of_gap(student, control, teacher).percent == pytest.approx(63.2, abs=0.05)
    cosines = (Estimate(x, 0.0, 1) for x in (0.986, 0.984, 0.988))
    assert share_of_gap(*cosines).percent == pytest.approx(50.0)  # higher is better


def test_a_gap_within_two_standard_errors_is_not_reported():
    teacher = Estimate(1.0, 0.3, 3)
    close, far = Estimate(1.9, 0.4, 3), Estimate(2.1, 0.4, 3)
    student = Estimate(1.5, 0.0, 3)
    assert not share_of_gap(student, close, teacher).reported
    assert share_of_gap(student, far, teacher).reported
    assert not share_of_gap(student, Estimate(1.0, math.nan, 1), teacher).reported
    assert json.dumps(share_of_gap(student, close, teacher).to_json())


def test_the_error_of_a_share_is_that_of_repeated_studies():
    rng = np.random.default_rng(0)
    draws = rng.normal((1.6, 2.0, 1.0), (0.03, 0.04, 0.05), (20_000, 3))
    shares = 100.0 * (draws[:, 1] - draws[:, 0]) / (draws[:, 1] - draws[:, 2])
    found = share_of_gap(Estimate(1.6, 0.03, 3), Estimate(2.0, 0.04, 3), Estimate(1.0, 0.05, 3))
    assert found.percent == pytest.approx(40.0)
    assert found.standard_error == pytest.approx(shares.std(), rel=0.05)


def test_estimates_over_seeds_and_splits():
    estimate = estimate_over_seeds([1.0, 2.0, 3.0])
    assert (estimate.value, estimate.n) == (2.0, 3)
    assert estimate.standard_error == pytest.approx(1.0 / math.sqrt(3))
    assert math.isnan(estimate_over_seeds([1.0]).standard_error)
    parts = [{"efwt": Estimate(2.0, 0.3, 10)}, {"efwt": Estimate(4.0, 0.4, 30)}]
    average = average_estimates(parts)["efwt"]
    assert (average.value, average.standard_error, average.n) == (3.0, 0.25, 40)


# -- the evaluation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copper(tmp_path_factory) -> Path:
    """Two files of frames and a model."""
    folder = tmp_path_factory.mktemp("s2ef")
    frames = rattled_copper(8, 0.1)
    ase.io.write(folder / "id.extxyz", frames[:5])
    ase.io.write(folder / "ood.extxyz", frames[5:])
    torch.manual_seed(0)
    shape = {"n_features": 4, "n_sensitivities": 4, "n_atom_layers": 1}
    radii = {"dist_soft_min": 1.5, "dist_soft_max": 3.5, "dist_hard_max": 4.0}
    model = HIPNN(SpeciesTable.from_symbols(["Cu"]), **shape, **radii)
    save_potential(folder / "model.pt", model, {})
    return folder


def test_evaluate_reports_each_split_and_the_average(copper, tmp_path):
    config = {
        "models": {"model": {"spec": str(copper / "model.pt")}},
        "splits": {name: {"path": str(copper / f"{name}.extxyz")} for name in ("id", "ood")},
        "settings": {"batch_atoms": 8},
    }
    results = evaluate(EvaluateConfig(**config, out=str(tmp_path / "a")))
    found = results.of("s2ef", S2EFErrors)["model"]
    assert set(results.results) == {"s2ef"}
    for name in ("energy_mae", "free_forces_mae", "free_forces_cosine", "efwt"):
        values = [found.splits[split][name].value for split in ("id", "ood")]
        assert found.average[name].value == pytest.approx(np.mean(values))
        assert values[0] != values[1] or name == "efwt"
    asked = EvaluateConfig(**config, out=str(tmp_path / "b"), tests=("throughput", "s2ef"))
    results = evaluate(asked)
    assert results.of("s2ef", S2EFErrors)["model"] == found
    assert results.of("throughput", Throughput)["model"].n_samples == 8
    text = str(result_rows(results))
    assert "average: Force MAE (free atoms) (eV/Å)" in text
    assert "Structures per second (1/s)" in text
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        evaluate(EvaluateConfig(models=config["models"], out=str(tmp_path / "c")))


def test_a_set_without_forces_is_refused(copper):
    from potstill.checkpoint import load_potential
    from potstill.readers import read

    structures, labels = read(copper / "id.extxyz")
    nothing = torch.zeros(5, dtype=torch.bool)
    partly = Properties(labels.values, {"forces": nothing})
    potential = load_potential(copper / "model.pt")[0]
    with pytest.raises(DataError, match="'id' has no frame"):
        evaluate_s2ef(potential, {"id": (structures, partly)})


def test_throughput_counts_every_structure(copper):
    from potstill.checkpoint import load_potential

    structures = Structures.from_ase(rattled_copper(6, 0.1))
    potential = load_potential(copper / "model.pt")[0]
    seen = []
    predict = potential.predict
    potential.predict = lambda batch, *a, **k: seen.append(len(batch)) or predict(batch, *a, **k)
    found = inference_throughput({"model": potential}, structures, max_atoms=8, rounds=2)["model"]
    assert sum(seen) == 2 + 2 * 6  # a first batch that does not count, then two rounds
    assert found.slowest <= found.samples_per_second <= found.fastest
    assert (found.n_samples, found.n_atoms) == (6, 24)


def test_validation_errors_against_the_clock_and_the_steps(tmp_path):
    records = [
        {"epoch": k, "seconds": 10.0 * k, "steps": 4 * k, "validation": {"energy_mae": 1.0 / k}}
        for k in (1, 2, 3)
    ]
    records[1]["validation"]["energy_mae"] = None
    text = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    curves = read_learning_curves(tmp_path)
    assert curves.against("validation/energy_mae") == ((10.0, 30.0), (1.0, 1.0 / 3.0))
    assert curves.against("validation/energy_mae", "steps")[0] == (4.0, 12.0)
    assert curves.against("validation/energy_mae", "epoch")[0] == (1.0, 3.0)
    (panel,) = progress_panels({"student": [curves]}, "steps")
    assert panel.x_label == "Steps"
    assert list(panel.series[0].x) == [4.0, 12.0]
