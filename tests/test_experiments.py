"""Experiments: the runs of every config in `studies/`, derived controls, the scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import Work
from potstill.config import load_study
from potstill.distill.taps import TapPair
from potstill.errors import DataError, PotstillError
from potstill.experiments.run import read_results
from potstill.experiments.scheduler import Progress, run_jobs
from potstill.experiments.spec import Experiment, GivenTeacher, Role, Run, StoredTeacher, Variant

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "study_runs.json").read_text())


def learns_from(experiment: Experiment, run: Run) -> str | None:
    teacher = run.variant.teacher
    if not run.variant.taught:
        return None
    if isinstance(teacher, StoredTeacher):
        return teacher.source
    if isinstance(teacher, GivenTeacher):
        return teacher.model.spec
    trained = experiment.teacher_of(run)
    return trained and trained.name


def contains(found: Any, expected: Any) -> bool:
    """Whether all that was recorded is there; settings that are newer than the record are not."""
    if isinstance(expected, dict):
        return all(k in found and contains(found[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(contains, found, expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("path", GOLDEN)
def test_every_run_of_every_study_trains_as_before(path: str) -> None:
    golden, experiment = GOLDEN[path], load_study(ROOT / path)
    runs = {run.name: run for run in experiment.runs()}
    assert set(runs) == set(golden["runs"])
    for name, (model, loss, teacher, compared, changes) in golden["runs"].items():
        run = runs[name]
        expected = {
            **golden["common"],
            **changes,
            "model": golden["models"][model],
            "loss": golden["losses"][loss],
        }
        assert contains(run.settings.model_dump(mode="json"), expected), name
        assert learns_from(experiment, run) == teacher, name
        if compared is not None:
            beside = experiment.teacher_of(run)
            # Where no teacher is trained there was a name, and no run of that name.
            assert (beside and beside.name) == (compared if compared in runs else None), name
    tests = {
        name: [test.store or (test.file and test.file.path), test.forces_only]
        for name, test in experiment.data.tests.items()
    }
    assert tests == golden["tests"]


@pytest.mark.parametrize("path", GOLDEN)
def test_a_control_is_its_student_without_the_teacher(path: str) -> None:
    """Nothing but weights of terms on labels differs, in every study."""
    experiment = load_study(ROOT / path)
    for student in experiment.variants:
        for name in student.against:
            control = experiment.by_name[name]
            if control.role is not Role.CONTROL:
                continue
            assert control.taught == ()
            one, other = (v.settings_of(0).model_dump() for v in (student, control))
            own = {t.name for t in student.settings.loss}
            assert {term.name for term in control.settings.loss} == own
            assert one | {"loss": None} == other | {"loss": None}


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("studies/teacher_student/results/*.json"))
    + sorted(ROOT.glob("studies/feature_distillation/results/*.json")),
    ids=lambda path: path.stem,
)  # fmt: skip
def test_results_of_earlier_versions_are_read(path: Path) -> None:
    records = read_results(path)
    runs = {run.name for run in load_study(path.parents[1] / f"{path.stem}.yaml").runs()}
    assert set(records) <= runs
    for name, record in records.items():
        assert name == f"{record.variant}-{record.seed}"
        if record.tests is None:
            assert 0 < record.metrics["train"]["forces_rmse"] < 5
        else:
            assert record.tests.average["free_forces_mae"].value > 0
        assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record
    n2n = records.get("similar.n2n-0")
    if n2n is not None:
        assert n2n.distilled == TapPair(("interaction_5",), ("update_6",))


def test_a_file_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match="no results of a study"):
        read_results(tmp_path / "results.json")


def test_a_variant_that_learns_from_nobody_is_refused() -> None:
    experiment = load_study(ROOT / "studies/teacher_student/molybdenum.yaml")
    student = experiment.by_name["student-small"]
    with pytest.raises(PotstillError, match="'student-small' learns from 'teacher-teacher'"):
        Experiment("x", "X", experiment.data, (student,))
    control = student.control("c")
    with pytest.raises(PotstillError, match="two variants of the experiment are called"):
        Experiment("x", "X", experiment.data, (control, control))


def test_weights_of_a_control() -> None:
    experiment = load_study(ROOT / "studies/teacher_student/molybdenum.yaml")
    student: Variant = experiment.by_name["born_again-teacher"]
    weights = {t.name: t.weight for t in student.control("c", forces=3.0).settings.loss}
    assert weights["forces:reference"] == 3.0
    assert weights["energy:reference"] == student.settings.loss[0].weight
    without = student.control("c", energy=0.0).settings.loss
    assert [t.name for t in without] == ["forces:reference"]
    stress = student.control("c", stress=2.0).settings.loss[-1]
    assert (stress.name, stress.weight) == ("stress:reference", 2.0)


# -- the scheduler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_wait_for_what_they_build_upon_and_are_done_once(tmp_path: Path, workers: int) -> None:
    work, told = Work(tmp_path), []
    (tmp_path / "c.done").write_text("from before")

    def ready(job: str) -> bool:
        return job != "a" or work.done("b")

    def note(progress: Progress[str]) -> None:
        told.append((progress.job, progress.done, progress.total))

    kwargs: dict[str, Any] = {"is_finished": work.done, "is_ready": ready, "workers": workers}
    run_jobs(["a", "b", "c", "d"], work, on_progress=note, **kwargs)
    assert {job for job, _, _ in told} == {"a", "b", "d"}
    assert [count for _, count, _ in told][-1] == 4
    assert "b" in (tmp_path / "a.done").read_text()
    assert (tmp_path / "c.done").read_text() == "from before"
    if workers == 2:
        assert (tmp_path / "d.done").read_text().startswith("1 ")


def test_what_goes_wrong_in_a_process_is_told(tmp_path: Path) -> None:
    work = Work(tmp_path)
    with pytest.raises(DataError, match="this cannot be done") as caught:
        run_jobs(["wrong", "b"], work, is_finished=work.done, workers=2)
    assert "jobs.py" in caught.value.__notes__[0]  # where it happened
    with pytest.raises(PotstillError, match="the process of 'crash' ended with exit code 7"):
        run_jobs(["crash", "b2"], work, is_finished=work.done, workers=2)
