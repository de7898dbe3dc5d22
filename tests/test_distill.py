"""The main job in small: ASE's EMT as the teacher of copper, a kill at every stage."""

import json

import pytest
from ase.build import bulk
from ase.io import write

from potstill.checkpoint import load_potential
from potstill.config import DistillConfig, validate
from potstill.errors import ConfigError
from potstill.store import LabelledStore
from potstill.workflows import distill as job
from potstill.workflows.planning import Counts, Order, Timings, decide, expected_seconds

COUNTS = {
    "n_temperatures": 1,
    "n_md_frames": 40,
    "n_random_frames": 6,
    "n_on_policy_frames": 4,
    "draft_epochs": 10,
    "epochs": 3,
    "nve_duration": 0.02,
    "md_duration": 0.16,
}


@pytest.fixture
def settings(tmp_path):
    write(tmp_path / "Cu.xyz", bulk("Cu", cubic=True))
    student = json.loads(job.default_student().model_dump_json())
    student["model"]["hyperparameters"] |= {
        "n_features": 8,
        "n_sensitivities": 8,
        "dist_hard_max": 4.5,
        "dist_soft_max": 4.0,
        "n_atom_layers": 1,
        "l_max": 1,
    }
    return {
        "teacher": {"spec": "ase.calculators.emt:EMT", "args": {"name": "emt"}},
        "structure": str(tmp_path / "Cu.xyz"),
        "temperature": 300,
        "n_atoms": 8,
        "student": student,
        "counts": COUNTS,
        "controls": [10.0],
        "pressure": [],
        "trainings_at_once": 1,
        "tests": {"errors": ["student", "control"], "eos": ["student", "teacher"]},
    }


def run(settings, folder, **kwargs):
    config = validate({**settings, "out": str(folder)}, DistillConfig)
    return job.distill(config, **kwargs)


class Killed(BaseException):
    """Stands in for a kill."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:constrained_layout:UserWarning")  # tiny figures
def test_a_run_killed_at_every_stage_ends_like_one_that_was_not(settings, tmp_path, monkeypatch):
    whole = run(settings, tmp_path / "whole")
    stages = dict(job.STAGES)
    settings["trainings_at_once"] = 2  # in processes of their own: the same weights
    for name, stage in stages.items():

        def killed(context, stage=stage):
            stage(context)  # its files are there, but it is not marked as finished
            raise Killed

        monkeypatch.setitem(job.STAGES, name, killed)
        with pytest.raises(Killed):
            run(settings, tmp_path / "killed")
        monkeypatch.setitem(job.STAGES, name, stage)
    again = run(settings, tmp_path / "killed")

    first, second = (LabelledStore.open(r.folder / "labels.zarr") for r in (whole, again))
    assert first.n_systems == 50
    assert first.fingerprint() == second.fingerprint()
    for name in ("student", "control_wf10"):
        a, b = (load_potential(r.folder / name / "best.pt")[0] for r in (whole, again))
        assert all((x == y).all() for x, y in zip(a.parameters(), b.parameters(), strict=True))

    folder = whole.folder
    for name in ("student.pt", "report.html", "md/trajectory.extxyz", "md/thermo.csv"):
        assert (folder / name).is_file()
    errors = json.loads((folder / "evaluation" / "errors.json").read_text())
    assert set(errors) == {"student", "control_wf10"}
    assert whole.summary["errors"]["student"]["forces_relative_rmse"] > 0
    # A student of three epochs may have no equation of state: then that is its result.
    eos = json.loads((folder / "evaluation" / "eos.json").read_text())
    assert set(eos) == {"student", "teacher"}
    assert "teacher" in whole.summary["bulk_modulus"]
    info = load_potential(folder / "student.pt")[1]
    assert info["trained_on"]["temperature_K"] == [300.0, 300.0]
    assert info["teacher"]["fingerprint"]


def test_held_out_frames_are_not_next_to_training_frames(settings, tmp_path):
    config = validate({**settings, "out": str(tmp_path / "run")}, DistillConfig)
    context = job.Run.open(config, job.Display())
    job._sample(context)
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    # Frames 0..39 are one trajectory, those after it are independent.
    for held_out in ("validation", "test"):
        assert split[held_out]
        for frame in split[held_out]:
            assert frame < 40
            assert not {frame - 1, frame + 1} & {k for k in split["train"] if k < 40}
    assert set(split["train"]) >= set(range(40, 46))


def test_dry_run_stops_after_the_plan(settings, tmp_path):
    result = run(settings, tmp_path / "run", dry_run=True)
    assert result.plan.counts.epochs == 3
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.yaml", "plan.json"}


def test_a_folder_keeps_its_settings(settings, tmp_path):
    run(settings, tmp_path / "run", dry_run=True)
    with pytest.raises(ConfigError, match="another 'seed'"):
        run({**settings, "seed": 3}, tmp_path / "run", dry_run=True)


@pytest.mark.parametrize("budget", [60.0, 180.0, 600.0, 7200.0])
@pytest.mark.parametrize("label", [0.001, 0.3, 5.0])
def test_plans_keep_to_their_budget(budget, label):
    from potstill.workflows.base import read_start

    start = read_start("silicon")
    order = Order(start, budget, lambda n: 2 * n, 1, 2, True, Counts())
    timings = Timings(label=label, step=0.7 * label, train=0.012, student_step=0.004)
    counts = decide(order, timings, 2.0)
    expected = sum(expected_seconds(order, counts, timings, 2.0).values())
    assert counts.n_md_frames >= 10
    assert counts.epochs >= 8
    if label <= 0.3 and budget >= 600.0:
        assert expected < 1.1 * budget
