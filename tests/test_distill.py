"""The main job in small: ASE's EMT as the teacher of copper, a kill at every stage."""

import json
import re
from dataclasses import replace

import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write

from potstill.checkpoint import load_potential
from potstill.config import DistillConfig, validate
from potstill.errors import ConfigError, DivergenceError
from potstill.evaluate.base import Bench, BenchSettings
from potstill.evaluate.headroom import HeadroomRuns
from potstill.sample import MDJob, SampledFrames, SamplingPlan, run_plan, smallest_supercell
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.workflows import distill as job
from potstill.workflows import planning
from potstill.workflows.base import parse_duration, read_start
from potstill.workflows.planning import (
    MAX_MINIMUM,
    BudgetError,
    Counts,
    Order,
    Timings,
    decide,
    expected_seconds,
)

COUNTS = {
    "n_temperatures": 1,
    "n_md_frames": 40,
    "n_random_frames": 6,
    "n_minimum_frames": 4,
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
@pytest.mark.filterwarnings("ignore:central differences:UserWarning")  # and errors of a tiny set
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

    first, second = (LabeledStore.open(r.folder / "labels.zarr") for r in (whole, again))
    assert first.n_systems == 54
    assert first.fingerprint() == second.fingerprint()
    for name in ("student", "control_wf10"):
        a, b = (load_potential(r.folder / name / "best.pt")[0] for r in (whole, again))
        assert all((x == y).all() for x, y in zip(a.parameters(), b.parameters(), strict=True))

    folder = whole.folder
    for name in ("student.pt", "report.html", "md/trajectory.extxyz", "md/thermo.csv"):
        assert (folder / name).is_file()
    errors = json.loads((folder / "evaluation" / "errors.json").read_text())
    assert set(errors) == {"student", "control_wf10"}
    assert whole.summary["metrics"]["student"]["forces_relative_rmse"] > 0
    # A student of three epochs may have no equation of state: then that is its result.
    eos = json.loads((folder / "evaluation" / "eos.json").read_text())
    assert set(eos) == {"student", "teacher"}
    assert "bulk_modulus" in whole.summary["metrics"]["teacher"]
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
    assert set(split["train"]) >= set(range(40, 50))
    groups = context.store.structures().group
    assert sum(group.startswith("near the minimum") for group in groups) == 4


def test_a_part_of_the_exploring_is_above_the_highest_temperature(settings, tmp_path):
    settings |= {"temperature": "300:600", "pressure": [0.0]}
    config = validate({**settings, "out": str(tmp_path / "run")}, DistillConfig)
    plan = job.exploring_plan(job.Run.open(config, job.Display()), 100)
    hot = [md for md in plan.jobs if md.temperature == 800.0]
    assert sum(md.n_frames for md in plan.jobs) == 100
    assert [md.n_frames for md in hot] == [5, 5, 5, 5]  # one that breaks down takes few with it
    assert [md.pressure for md in hot] == [None, 0.0] * 2
    others = [md for md in plan.jobs if md not in hot]
    assert {md.temperature for md in others} == {300.0, 600.0}
    assert {md.pressure for md in others} == {None, 0.0}


def explored(n, temperature, number):
    start = Structures.from_ase(bulk("Cu"))
    frames = SampledFrames.independent(Structures.concatenate([start] * n))
    return replace(
        frames,
        temperature=torch.full((n,), temperature, dtype=torch.float64),
        job=torch.full((n,), number),
        time=100.0 * torch.arange(n, dtype=torch.float64),
    )


def test_of_what_the_draft_visits_a_part_is_held_out_and_what_is_hotter_is_not():
    frames = SampledFrames.concatenate([explored(160, 900.0, 0), explored(40, 1200.0, 1)])
    parts = job.split_explored(frames, 900.0, seed=0)
    train = set(parts["train"].tolist())
    assert train >= set(range(160, 200))
    for name, least in (("test", 12), ("validation", 6)):
        held_out = parts[name].tolist()
        assert least <= len(held_out) <= 24
        assert max(held_out) < 160
        assert not train & {k + d for k in held_out for d in (-1, 0, 1)}


def test_runs_from_before_frames_near_the_minimum_resume_as_they_were(settings, tmp_path):
    settings["counts"] = {k: v for k, v in COUNTS.items() if k != "n_minimum_frames"}
    config = validate({**settings, "out": str(tmp_path / "run")}, DistillConfig)
    assert job.Run.open(config, job.Display()).plan.counts.n_minimum_frames >= 3
    file = tmp_path / "run" / "plan.json"
    plan = json.loads(file.read_text())
    del plan["counts"]["n_minimum_frames"]
    file.write_text(json.dumps(plan))
    context = job.Run.open(config, job.Display())
    assert context.plan.counts.n_sampled == 46
    job._sample(context)
    assert context.store.n_systems == 46
    kinds = [
        j["kind"] for j in json.loads((context.folder / "sample" / "plan.json").read_text())["jobs"]
    ]
    assert set(kinds) == {"md", "rattle", "strain", "volume"}


def test_dry_run_stops_after_the_plan(settings, tmp_path):
    result = run(settings, tmp_path / "run", dry_run=True)
    assert result.plan.counts.epochs == 3
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.yaml", "plan.json"}


def test_a_folder_keeps_its_settings(settings, tmp_path):
    run(settings, tmp_path / "run", dry_run=True)
    with pytest.raises(ConfigError, match="'seed' is 0 there, not 3"):
        run({**settings, "seed": 3}, tmp_path / "run", dry_run=True)
    student = json.loads(json.dumps(settings["student"]))
    student["model"]["hyperparameters"]["n_features"] = 16
    with pytest.raises(ConfigError, match=r"'student.model.hyperparameters.n_features' is 8 there"):
        run({**settings, "student": student}, tmp_path / "run", dry_run=True)


def test_tests_that_are_not_given_are_those_of_the_run(settings, tmp_path):
    """The defaults may have been others when the run was evaluated."""
    folder = tmp_path / "run"
    run(settings, folder, dry_run=True)
    (folder / "evaluation").mkdir()
    stored = (folder / "config.yaml").read_text()
    run({key: value for key, value in settings.items() if key != "tests"}, folder, dry_run=True)
    assert (folder / "config.yaml").read_text() == stored
    with pytest.raises(ConfigError, match=r"'tests\.rdf' is null there"):
        run({**settings, "tests": {**settings["tests"], "rdf": ["student"]}}, folder, dry_run=True)


def test_a_folder_may_be_named_otherwise_and_moved(settings, tmp_path, monkeypatch):
    run(settings, tmp_path / "run", dry_run=True)
    monkeypatch.chdir(tmp_path)
    plan = run(settings, "run", dry_run=True).plan
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert run(settings, "elsewhere", dry_run=True).plan == plan


def test_counts_can_be_changed_until_they_are_used(settings, tmp_path):
    folder = tmp_path / "run"
    run(settings, folder, dry_run=True)
    settings["counts"] = {**COUNTS, "epochs": 5, "n_md_frames": 50}
    counts = run(settings, folder, dry_run=True).plan.counts
    assert (counts.epochs, counts.n_md_frames, counts.draft_epochs) == (5, 50, 10)
    assert run(settings, folder, dry_run=True).plan.counts == counts
    (folder / "sample").mkdir()
    settings["counts"] = {**COUNTS, "epochs": 7, "n_md_frames": 60}
    with pytest.raises(ConfigError) as caught:
        run(settings, folder, dry_run=True)
    assert "'counts.n_md_frames' is 50 there, not 60" in str(caught.value)
    assert "epochs" not in str(caught.value)
    settings["counts"]["n_md_frames"] = 50
    assert run(settings, folder, dry_run=True).plan.counts.epochs == 7


def order(budget, n_atoms=64, fixed=None):
    start = smallest_supercell(read_start("silicon"), min_atoms=n_atoms)
    return Order(
        start=start,
        min_atoms=n_atoms,
        budget=budget,
        n_pressure_runs=1,
        n_controls=1,
        at_once=2,
        on_policy=True,
        fixed=fixed or Counts(),
        unit_cell=read_start("silicon"),
        teacher_tests=("eos", "elastic", "phonons", "speed"),
    )


def least(asked, timings):
    """The budget that a refusal names; None without one."""
    try:
        decide(asked, timings, 2.0)
    except BudgetError as error:
        return error.least
    return None


@pytest.mark.parametrize("train", [0.002, 0.012, 0.3])
@pytest.mark.parametrize("label", [0.001, 0.1, 0.3, 1.5, 5.0, 60.0])
@pytest.mark.parametrize("budget", [60.0, 180.0, 360.0, 720.0, 7200.0])
def test_plans_keep_to_their_budget_or_say_which_would_do(budget, label, train):
    timings = Timings(label=label, step=0.7 * label, train=train, student_step=0.004)
    refusal = least(order(budget), timings)
    if refusal is not None:
        assert refusal > 1.1 * budget
        budget = refusal
    counts, md = decide(order(budget), timings, 2.0)
    expected = sum(expected_seconds(order(budget), counts, timings, 2.0, md).values())
    assert expected <= 1.1 * budget
    assert counts.n_md_frames >= 16
    assert counts.epochs >= 8
    assert counts.n_random_frames >= 6
    assert 3 <= counts.n_minimum_frames <= MAX_MINIMUM


def test_a_slow_teacher_gets_less_dynamics_and_more_rattled_frames():
    timings = Timings(label=1.0, step=1.0, train=0.01, student_step=0.004)
    asked = order(600.0)
    usual, lean = planning._full(asked, timings, 2.0), decide(asked, timings, 2.0)[0]
    assert lean.n_random_frames / lean.n_md_frames > 2 * usual.n_random_frames / usual.n_md_frames
    seconds = [
        expected_seconds(asked, counts, timings, 2.0, md)
        for counts, md in ((usual, planning.FULL), decide(asked, timings, 2.0))
    ]
    assert sum(seconds[0].values()) > 1.1 * 600.0
    assert seconds[1]["sample"] < 0.6 * seconds[0]["sample"]


def slow_teacher(monkeypatch, seconds_per_atom):
    def measure(start, *_):
        cost = seconds_per_atom * start.n_atoms
        return Timings(label=cost, step=cost, train=0.01, student_step=0.004)

    monkeypatch.setattr(planning, "measure", measure)


def test_a_slow_teacher_gets_smaller_cells(settings, tmp_path, monkeypatch):
    settings |= {"counts": {}, "n_atoms": 64, "budget": "6min"}
    slow_teacher(monkeypatch, 0.03)  # 2 s for 64 atoms
    plan = run(settings, tmp_path / "run", dry_run=True).plan
    assert 8 <= plan.n_atoms < 64
    assert plan.total_seconds <= 1.1 * 360
    config = validate({**settings, "out": str(tmp_path / "run")}, DistillConfig)
    context = job.Run.open(config, job.Display())
    assert context.start.n_atoms == plan.n_atoms


def test_a_hopeless_budget_is_refused_with_one_that_would_do(settings, tmp_path, monkeypatch):
    settings |= {"counts": {}, "budget": "6min"}
    slow_teacher(monkeypatch, 2.0)
    with pytest.raises(ConfigError, match=r"give at least --budget \d+min") as caught:
        run(settings, tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()
    settings["budget"] = re.search(r"\d+min", str(caught.value).partition("--budget")[2])[0]
    plan = run(settings, tmp_path / "run", dry_run=True).plan
    assert plan.total_seconds <= 1.1 * parse_duration(settings["budget"])


def test_unstable_runs_are_left_out_and_the_others_are_done(tmp_path):
    start = smallest_supercell(Structures.from_ase(bulk("Cu", cubic=True)), min_atoms=8)
    sound = MDJob(temperature=300.0, n_frames=2, stride=10.0, equilibration=0.0, timestep=2.0)
    wild = replace(sound, timestep=100.0, stride=5000.0)
    lost: list[Exception] = []
    plan = SamplingPlan(start, [sound, wild, sound])
    frames = run_plan(plan, EMT(), tmp_path / "a", on_divergence=lost.append)
    assert len(lost) == 1
    assert frames.job.tolist() == [0, 0, 2, 2]
    with pytest.raises(DivergenceError):
        run_plan(plan, EMT(), tmp_path / "b")
    with pytest.raises(DivergenceError):
        run_plan(SamplingPlan(start, [wild]), EMT(), tmp_path / "c", on_divergence=lost.append)


def test_the_better_model_on_validation_is_handed_out(settings, tmp_path, monkeypatch):
    config = validate({**settings, "out": str(tmp_path / "run")}, DistillConfig)
    context = job.Run.open(config, job.Display())
    models = {"student": None, "control_wf10": None}
    broken: set[str] = set()
    monkeypatch.setattr(job.Run, "models", models)
    monkeypatch.setattr(job, "train_students", lambda run: None)
    monkeypatch.setattr(job, "_bench", lambda run: Bench(BenchSettings()))
    monkeypatch.setattr(job, "_candidate", lambda run, name: name)
    monkeypatch.setattr(
        job.Headroom,
        "run",
        lambda self, bench, name: HeadroomRuns(
            400.0, 1.0, 4, 2, 0 if name in broken else 2, None, ""
        ),
    )
    cases = [
        ((0.3, 0.2), (), "control_wf10", "was best on validation"),
        ((0.2, 0.2), (), "student", "was best on validation"),
        ((None, 9.0), (), "control_wf10", "was best on validation"),
        ((0.3, 0.2), ("control_wf10",), "student", "stays sound in MD from 400 K, where the con"),
        ((0.3, 0.2), ("student",), "control_wf10", "was best on validation"),
        ((0.3, 0.2), tuple(models), "control_wf10", "was best on validation"),
    ]
    for scores, unsound, best, reason in cases:
        broken.clear()
        broken.update(unsound)
        for name, score in zip(models, scores, strict=True):
            (context.folder / name).mkdir(exist_ok=True)
            (context.folder / name / "best.pt").write_text(name)
            result = {"best_score": float("nan") if score is None else score}
            (context.folder / name / "result.json").write_text(json.dumps(result))
        note = job._train(context)
        assert f"student.pt is {best}" in note
        assert (context.folder / "student.pt").read_text() == best
        chosen = job.read_json(context.folder / "choice.json")
        assert chosen["model"] == best
        assert chosen["reason"].startswith(reason)
