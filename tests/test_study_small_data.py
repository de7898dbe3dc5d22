"""The study of little reference data: its draws, its guard, its statistics, and a tiny run."""

import json
from collections import Counter
from dataclasses import replace

import ase.io
import pytest
import torch
from scipy.stats import ttest_1samp

from data import rattled_copper
from potstill.soundness import closest_pairs
from potstill.structures import Structures
from scripts import STUDIES, loaded

SCRIPT = STUDIES / "small_data" / "small_data.py"
TRIALS = {
    "member": ((4, 0.0),),
    "control": ((2, 0.0), (6, 1e-2)),
    "student": ((6, 0.0),),
}


@pytest.fixture(scope="module")
def study():
    with loaded(SCRIPT) as module:
        yield module


@pytest.fixture
def copper(study, tmp_path, monkeypatch):
    """Twelve labeled frames in two groups instead of molybdenum, and a folder to work in."""
    frames = rattled_copper(12, 0.1)
    for k, atoms in enumerate(frames):
        atoms.info["config_type"] = "rare" if k % 4 == 0 else "common"
    ase.io.write(tmp_path / "copper.extxyz", frames)
    setup = replace(
        study.SETS["Mo"],
        training="copper.extxyz",
        test=None,
        n_frames=5,
        cutoff=3.5,
        temperatures=(300.0,),
        members=("wide", "wide"),
        trials=TRIALS,
    )
    monkeypatch.setattr(study, "SETS", {"Mo": setup})
    monkeypatch.setitem(study.SIZES, "wide", {"n_features": 6, "n_channels": 4, "l_max": 1})
    monkeypatch.setitem(study.SIZES, "default", {"n_features": 4, "n_channels": 4, "l_max": 1})
    return tmp_path


def test_a_seed_draws_its_own_frames_in_proportion(study, copper):
    drawn = []
    for seed in (0, 1):
        parts = study.load("Mo", seed, copper)
        names = [part.structures.frame_id for part in parts]
        assert [len(part) for part in parts] == [4, 1, 7]
        assert len({name for part in names for name in part}) == 12
        groups = parts[0].structures.group + parts[1].structures.group
        assert Counter(groups) == {"rare": 1, "common": 4}
        drawn.append(set(names[0]))
    assert drawn[0] != drawn[1]


def test_fused_and_disputed_structures_are_left_out(study):
    frames = Structures.from_ase(rattled_copper(4, 0.05))
    closest = closest_pairs(frames)
    fused = frames.positions.clone()
    fused[1] = fused[0] + 0.1
    spread = torch.full((16, 3), 0.1, dtype=torch.float64)
    spread[4] = 1.0
    spread[8] = torch.nan
    kept = study.sound(replace(frames, positions=fused), spread, 0.5, closest)
    assert kept.tolist() == [False, False, False, True]
    assert study.sound(frames, spread, 2.0, closest).tolist() == [True, True, False, True]


def test_intervals_are_those_of_students_t(study):
    found = study._summary([-12.0, -7.0, -9.5])
    expected = ttest_1samp([-12.0, -7.0, -9.5], 0.0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([expected.low, expected.high])


def test_run_and_collect(study, copper, monkeypatch):
    work = copper / "work"
    for seed in (0, 1):
        study.run("Mo", seed, ["control", "student"], copper, work)
    results = study.collect(work)["Mo"]
    gain = results["student_against_control_percent"]["fast"]["force_rmse_meV_per_A"]
    by_seed = results["by_seed"].values()
    pairs = [(e["student-fast"], e["control-fast"]) for e in by_seed]
    ratios = [s["force_rmse_meV_per_A"] / c["force_rmse_meV_per_A"] for s, c in pairs]
    assert gain["mean"] == pytest.approx(100.0 * (sum(ratios) / 2 - 1.0))
    assert gain["n"] == 2
    counts = results["by_seed"][0]["structures"]
    assert counts["made"] + 15 * counts["unstable_runs"] == 4 * (12 + 12 + 15)
    assert 0 < counts["kept"] <= counts["made"]
    scores = {
        trial: json.loads((work / "Mo/seed0/control-fast" / trial / "result.json").read_text())
        for trial in ("2-0", "6-0.01")
    }
    best = min(scores, key=lambda trial: scores[trial]["best_score"])
    assert (
        study.fit(
            work / "Mo/seed0/control-fast", "fast", study.SETS["Mo"], "control", 0, None, None
        ).parent.name
        == best
    )
    assert "student against control, fast" in study.table({"Mo": results})

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(study, "train", refuse)
    study.run("Mo", 0, ["control", "student"], copper, work)
