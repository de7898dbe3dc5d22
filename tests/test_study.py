"""A whole small study: teachers, students and controls, resumed and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk
from ase.io import write as ase_write
from pydantic import ValidationError

from potstill.checkpoint import load_potential
from potstill.distill import Schedule
from potstill.errors import ConfigError
from potstill.experiments.recipes import STRATEGIES, SizesStudy
from potstill.experiments.report import report_experiment
from potstill.experiments.run import _training_data, run_experiment
from potstill.experiments.spec import Run
from potstill.workflows.data import load_parts, share_of_groups
from test_train import emt_set


def _config(folder: Path, **changes: object) -> SizesStudy:
    for name, n, seed in (("train", 14, 0), ("test", 4, 9)):
        data = emt_set(n, seed)
        frames = data.structures.to_ase()
        offsets = data.structures.atom_offsets
        for s, atoms in enumerate(frames):
            atoms.info["energy"] = float(data.labels["reference"]["energy"][s])
            part = slice(int(offsets[s]), int(offsets[s + 1]))
            atoms.arrays["forces"] = data.labels["reference"]["forces"][part].numpy()
        ase_write(folder / f"{name}.xyz", frames, format="extxyz")
    hyper = {
        "n_features": 6,
        "n_sensitivities": 5,
        "dist_soft_min": 1.6,
        "dist_soft_max": 3.6,
        "dist_hard_max": 4.0,
        "n_atom_layers": 1,
    }
    settings: dict = {
        "name": "copper",
        "title": "A study of nothing much",
        "data": {
            "train": str(folder / "train.xyz"),
            "tests": {"held out": str(folder / "test.xyz")},
            "validation_fraction": 0.2,
        },
        "seeds": (0, 1),
        "sizes": {"teacher": hyper, "small": {**hyper, "n_features": 3}},
        "strategies": ("teacher", "student", "control_wf10", "born_again"),
        "common": {"epochs": 3, "batch_size": 4, "early_stopping": None},
        "schedule_factor": 0.005,
        **changes,
    }
    return SizesStudy(**settings)


def test_a_study_trains_every_run_once_and_reports(tmp_path: Path) -> None:
    experiment = _config(tmp_path).experiment
    done: list[str] = []
    folder = tmp_path / "study"
    run_experiment(experiment, folder, on_progress=lambda p: done.append(p.job.name))
    assert len(done) == len(experiment.runs()) == 8
    assert all(name.startswith("teacher") for name in done[:2])
    student = load_potential(folder / "student-small-1" / "best.pt")[1]
    terms = {t["property"]: t for t in student["settings"]["loss"]}
    assert terms["atomic_energies"]["source"] == "teacher"
    assert terms["atomic_energies"]["weight"] == 100.0
    control = load_potential(folder / "control_wf10-small-1" / "best.pt")[1]
    assert {t["property"] for t in control["settings"]["loss"]} == {"energy", "forces"}

    before = (folder / "student-small-1" / "best.pt").stat().st_mtime_ns
    again: list[str] = []
    run_experiment(experiment, folder, on_progress=lambda p: again.append(p.job.name))
    assert again == []
    assert (folder / "student-small-1" / "best.pt").stat().st_mtime_ns == before

    record = report_experiment(experiment, folder, command="a test")
    assert record["n_finished"] == 8
    assert json.loads((folder / "results.json").read_text())["command"] == "a test"
    assert "A study of nothing much" in (folder / "report.html").read_text()

    # A run of an earlier version is as good as one of this.
    new = folder / "student-small-0" / "run.json"
    old = json.loads(new.read_text())
    for key in ("variant", "tests", "taps", "teacher_seconds"):
        del old[key]
    new.with_name("cell.json").write_text(json.dumps(old | {"size": old.pop("group")}))
    new.unlink()
    run_experiment(experiment, folder, on_progress=lambda p: again.append(p.job.name))
    assert again == []
    result = report_experiment(experiment, folder)
    assert result["runs"].keys() == record["runs"].keys()
    for key in ("variant", "group", "metrics"):
        assert all(result["runs"][k][key] == record["runs"][k][key] for k in record["runs"])


@pytest.mark.filterwarnings("ignore::potstill.calculators.ExtrapolationWarning")
@pytest.mark.filterwarnings("ignore:constrained_layout:UserWarning")  # tiny figures
def test_models_are_measured_beside_a_reference_from_elsewhere(tmp_path: Path) -> None:
    measure = {
        "element": "Cu",
        "crystal": "fcc",
        "lattice_constant": 3.6,
        "repeat": 2,
        "melting_temperature": 300,
        "temperature": 300,
        "melting": 20,
        "equilibration": 20,
        "production": 120,
        "speed_sizes": (32,),
        "memory_sizes": (32, 108),
        "reference": {
            "name": "EMT",
            "teacher": "ase.calculators.emt:EMT",
            "equilibration": 20,
            "production": 120,
        },
    }
    evaluations = {
        "structure": str(tmp_path / "cell.xyz"),
        "tests": {"errors": {}, "eos": {}},
    }
    ase_write(tmp_path / "cell.xyz", bulk("Cu", cubic=True), format="extxyz")
    config = _config(
        tmp_path,
        measure=measure,
        evaluations=evaluations,
        seeds=(0,),
        strategies=("teacher", "student"),
    )
    experiment, folder = config.experiment, tmp_path / "study"
    run_experiment(experiment, folder)
    result = report_experiment(experiment, folder)
    liquid, evaluated = (result["measures"][key] for key in ("liquid", "evaluations"))
    assert liquid["reference"]["n_frames"] == 3
    teacher, student = (liquid["runs"][name] for name in ("teacher-teacher-0", "student-small-0"))
    assert "rdf_error" not in teacher  # it has no teacher
    assert teacher["rdf_error_reference"] > 0
    assert {"rdf_error", "rdf_error_noise", "rdf_error_reference_noise"} <= set(student)
    assert "EMT: standard error from blocks" in (folder / "report.html").read_text()
    # Evaluations of the table, asked for by name alone.
    own = result["runs"]["student-small-0"]["metrics"]["test:held out"]
    numbers = evaluated["runs"]["student-small-0"]
    assert numbers["forces_rmse"] == pytest.approx(own["forces_rmse"], rel=1e-6)
    assert set(evaluated["results"]) == {"errors", "eos"}
    assert "| student | small |" in (folder / "report" / "table_evaluations.md").read_text()
    measured = {f.name: f.stat().st_mtime_ns for f in (folder / "measures").glob("rdf-*.json")}
    assert len(measured) == 3
    report_experiment(experiment, folder)
    again = {f.name: f.stat().st_mtime_ns for f in (folder / "measures").glob("rdf-*.json")}
    assert again == measured


def test_the_born_again_schedule_ends_where_it_is_told_to() -> None:
    weights = STRATEGIES["born_again_wf10"].weights(0.25)
    forces, energies = weights["forces"], weights["atomic_energies"]
    assert isinstance(forces, Schedule)
    assert isinstance(energies, Schedule)
    assert (forces.at(1), forces.at(100)) == (75.0, 10.0)
    assert (energies.at(1), energies.at(99), energies.at(100)) == (200.0, 40.0, 0.0)


def test_students_learn_from_the_teacher_that_their_strategy_names(tmp_path: Path) -> None:
    config = _config(
        tmp_path,
        seeds=(0,),
        extra_strategies={
            "other_teacher": {"role": "teacher", "w_forces": 30.0},
            "other_student": {
                "role": "student",
                "teacher": "other_teacher",
                "w_atomic_energies": 9.0,
            },
        },
        strategies=("teacher", "other_teacher", "other_student", "control_wf10"),
    )
    experiment, folder = config.experiment, tmp_path / "study"
    run_experiment(experiment, folder)
    parts, _ = load_parts(config.data.parts)
    run = next(r for r in experiment.runs() if r.variant.strategy == "other_student")
    training = _training_data(experiment, folder, run)[0]["train"]
    teacher, _ = load_potential(folder / "other_teacher-teacher-0" / "best.pt")
    expected = teacher.predict(parts["train"].structures, properties=("atomic_energies",))
    torch.testing.assert_close(
        training.labels["teacher"]["atomic_energies"], expected["atomic_energies"]
    )
    first, _ = load_potential(folder / "teacher-teacher-0" / "best.pt")
    other = first.predict(training.structures, properties=("atomic_energies",))
    assert not torch.allclose(other["atomic_energies"], expected["atomic_energies"])
    found = experiment.teacher_of(run)
    assert found is not None
    assert found.name == "other_teacher-teacher-0"
    control = Run(experiment.by_name["control_wf10-small"], 0)
    # The control of the first student, which learns from the second teacher.
    assert experiment.teacher_of(control) == found


def test_a_student_without_its_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'student' learns from 'teacher', which is not"):
        _config(tmp_path, strategies=("student",))


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, strategies=("teacher",), seeds=(0,))
    run_experiment(config.experiment, tmp_path / "study")
    other = _config(tmp_path, common={"epochs": 4}).experiment
    with pytest.raises(ConfigError, match="teacher-teacher-0 holds a run with other settings"):
        run_experiment(other, tmp_path / "study")
    data = {**config.data.model_dump(), "validation_seed": 5}
    with pytest.raises(ConfigError, match="holds a study with other data"):
        run_experiment(_config(tmp_path, data=data).experiment, tmp_path / "study")
    (tmp_path / "study" / "study.json").write_text('{"kind": "features"}')
    with pytest.raises(ConfigError, match="a study of another kind"):
        run_experiment(config.experiment, tmp_path / "study")


def test_a_study_without_a_teacher_size_or_with_a_misspelt_strategy_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValidationError, match="teacher's size"):
        _config(tmp_path, sizes={"small": {}})
    with pytest.raises(ValidationError, match="did you mean 'born_again'"):
        _config(tmp_path, strategies=("born_agian",))


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ({"eso": {}}, "there is no evaluation 'eso'; did you mean 'eos'"),
        ({"eos": {}}, "the evaluation 'eos' needs a 'structure'"),
        ({"rdf": {}}, "the evaluation 'rdf' needs trajectories"),
        ({"errors": {"bins": 3}}, "bins"),
    ],
)
def test_evaluations_that_cannot_be_done_are_refused_before_training(
    tmp_path: Path, tests: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        _config(tmp_path, evaluations={"tests": tests})


def test_validation_is_spread_over_groups() -> None:
    structures = emt_set(20).structures
    grouped = replace(structures, group=("a",) * 10 + ("b",) * 10)
    held_out = share_of_groups(grouped, 0.2, seed=3)
    assert int(held_out[:10].sum()) == int(held_out[10:].sum()) == 2
    assert torch.equal(held_out, share_of_groups(grouped, 0.2, seed=3))
    assert not torch.equal(held_out, share_of_groups(grouped, 0.2, seed=4))
