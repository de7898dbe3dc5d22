"""Studies of feature distillation: runs of a config, shares of the gap, the report."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from typer.testing import CliRunner

from potstill.checkpoint import load_potential
from potstill.cli.app import app
from potstill.config import load_study, validate
from potstill.errors import ConfigError
from potstill.evaluate.errors import S2EFErrors
from potstill.experiments.recipes import PairsStudy
from potstill.experiments.report import report_experiment, verdicts
from potstill.experiments.results import Results, RunRow
from potstill.experiments.run import run_experiment
from potstill.experiments.spec import Role, Run, TrainedTeacher, Variant
from potstill.experiments.tables import result_table, seed_table
from potstill.metrics import Estimate
from potstill.train import TrainSettings
from test_train import emt_set

PAINN = {"hidden_channels": 8, "num_layers": 2, "num_rbf": 8, "cutoff": 4.0}
SCHNET = {"hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "num_gaussians": 8}


def write_frames(path: Path, n: int, seed: int) -> str:
    data = emt_set(n, seed=seed)
    frames = []
    for k, atoms in enumerate(data.structures.to_ase()):
        labels = data.labels["reference"].select(data.structures.rows([k]))
        own = Atoms(atoms)
        own.calc = SinglePointCalculator(
            own, energy=float(labels["energy"][0]), forces=labels["forces"].numpy()
        )
        frames.append(own)
    ase.io.write(path, frames, format="extxyz")
    return str(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A study of two pairs, as a config file holds it."""
    folder = tmp_path_factory.mktemp("data")
    files = {
        name: {"path": write_frames(folder / f"{name}.extxyz", n, seed)}
        for seed, (name, n) in enumerate({"train": 8, "validation": 4, "near": 3, "far": 3}.items())
    }
    return {
        "kind": "features",
        "name": "tiny",
        "title": "Two pairs of models",
        "data": {
            "files": [files["train"]],
            "validation_files": [files["validation"]],
            "split": {"fractions": {"train": 1.0}},
        },
        "tests": {
            "near": {"file": files["near"]},
            "far": {"file": files["far"], "forces_only": True},
        },
        "models": {
            "painn": {"kind": "painn", "hyperparameters": PAINN, "train": {"epochs": 3}},
            "schnet": {"kind": "schnet", "hyperparameters": SCHNET | {"cutoff": 4.0}},
            "unused": {"kind": "schnet", "hyperparameters": SCHNET | {"cutoff": 4.0}},
        },
        "pairs": {
            "similar": {
                "teacher": "painn",
                "student": "schnet",
                "strategies": {
                    "vanilla1": {"distill": "vanilla1", "weight": 0.5},
                    "vanilla2": {"distill": "vanilla2"},
                    "n2n": {"distill": "n2n", "share": 0.3},
                },
                "grids": {
                    "taps": {
                        "line": {"distill": "n2n", "share": 0.3},
                        "over": {
                            "student_tap": ["embedding", "last"],
                            "teacher_tap": ["message_1", "update_2"],
                        },
                        "seeds": [0],
                    }
                },
            }
        },
        "seeds": [0, 1],
        "common": {"epochs": 2, "batch_size": 4, "early_stopping": None},
        "measure": {"rounds": 1, "n_structures": 4},
    }


def write_config(path: Path, plain: dict[str, Any]) -> Path:
    path.write_text(json.dumps(plain))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def done(plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study, run by the command."""
    folder = tmp_path_factory.mktemp("study")
    config = write_config(folder / "study.yaml", plain)
    result = CliRunner().invoke(app, ["study", str(config), "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output.replace("\n", "")
    return folder / "out"


def test_all_stands_for_the_taps_that_fit(plain: dict[str, Any]) -> None:
    grid = {"line": {"distill": "n2n"}, "over": {"student_tap": "all", "teacher_tap": "all"}}
    pair = {"teacher": "painn", "student": "schnet", "grids": {"taps": grid}}
    config = validate({**plain, "pairs": {"p": pair}, "seeds": [0]}, PairsStudy)
    lines = [v.point.options for v in config.experiment.variants if v.point is not None]
    assert {line["student_tap"] for line in lines} == {"embedding", "interaction_1", "last"}
    of_teacher = {line["teacher_tap"] for line in lines}
    assert of_teacher == {"embedding", "message_1", "update_1", "message_2", "update_2", "last"}
    assert len(lines) == 18
    grid["over"] = {"error": "all"}
    with pytest.raises(ConfigError, match="'all' stands for the taps"):
        validate({**plain, "pairs": {"p": pair}}, PairsStudy)


def test_a_teacher_may_come_from_elsewhere(
    plain: dict[str, Any], done: Path, tmp_path: Path
) -> None:
    models = {**plain["models"], "big": {"checkpoint": {"spec": str(done / "painn-0/best.pt")}}}
    line = {"n2n": {"distill": "n2n", "share": 0.3}}
    pair = {"teacher": "big", "student": "schnet", "strategies": line}
    study = {**plain, "models": models, "pairs": {"p": pair}, "seeds": [0]}
    experiment = validate(study, PairsStudy).experiment
    run_experiment(experiment, tmp_path)
    result = report_experiment(experiment, tmp_path)
    assert set(result["runs"]) == {"schnet-0", "p.n2n-0"}
    assert result["measures"]["similarity"]["cka"].keys() == {"p.n2n-0"}
    table = (tmp_path / "report/table_results.md").read_text()
    own = json.loads((done / "painn-0/run.json").read_text())["tests"]["average"]
    assert f"teacher (big) | {1e3 * own['energy_mae']['value']:,.0f} |" in table


def test_every_run_of_a_study_is_there(done: Path, plain: dict[str, Any]) -> None:
    result = json.loads((done / "results.json").read_text())
    names = set(result["runs"])
    runs = ("vanilla1", "vanilla2", "n2n")
    assert names == {
        *(f"{model}-{seed}" for model in ("painn", "schnet") for seed in (0, 1)),
        *(f"similar.{run}-{seed}" for run in runs for seed in (0, 1)),
        *(
            f"similar.taps[student_tap={one},teacher_tap={other}]-0"
            for one in ("embedding", "last")
            for other in ("message_1", "update_2")
        ),
    }
    assert result["n_finished"] == result["n_runs"] == len(names)
    assert result["runs"]["painn-0"]["epochs"] == 3
    run = result["runs"]["similar.taps[student_tap=last,teacher_tap=message_1]-0"]
    taps = {"student": ["last"], "teacher": ["message_1"]}
    assert run["taps"] == {"n2n:teacher[last<-message_1]": taps}
    far = result["runs"]["schnet-0"]["tests"]["splits"]["far"]
    assert set(far) == {"free_forces_mae", "free_forces_cosine"}
    average = result["runs"]["schnet-0"]["tests"]["average"]
    near = result["runs"]["schnet-0"]["tests"]["splits"]["near"]
    both = (near["free_forces_mae"]["value"] + far["free_forces_mae"]["value"]) / 2
    assert average["free_forces_mae"]["value"] == pytest.approx(both)
    assert average["energy_mae"]["value"] == near["energy_mae"]["value"]


def test_what_is_measured_is_of_the_runs(done: Path) -> None:
    measures = json.loads((done / "results.json").read_text())["measures"]["similarity"]
    assert set(measures["throughput"]) == {"painn", "schnet"}
    assert all(one["samples_per_second"] > 0 for one in measures["throughput"].values())
    cka = measures["cka"]["similar.n2n-0"]
    assert cka["before"]["values"] != cka["after"]["values"]
    # The control is the same for all strategies.
    assert cka["before"] == measures["cka"]["similar.vanilla1-0"]["before"]
    assert {p["tap"] for p in measures["probes"]["painn"]} >= {"message_1", "update_2"}


def test_students_carry_nothing_of_their_teachers(done: Path) -> None:
    control, _ = load_potential(done / "schnet-0/best.pt")
    for run in ("vanilla1", "vanilla2", "n2n"):
        student, _ = load_potential(done / f"similar.{run}-0/best.pt")
        shapes = [{k: v.shape for k, v in p.state_dict().items()} for p in (student, control)]
        assert shapes[0] == shapes[1]


def test_the_report_shows_tables_and_figures(done: Path) -> None:
    page = (done / "report.html").read_text()
    for text in (
        "Strategies, mean over the test sets",
        "Size and speed",
        "similarity of student and teacher",
    ):
        assert text in page
    parts = {path.name for path in (done / "report").iterdir()}
    assert {
        "table_results.md",
        "table_results_near.csv",
        "table_models.csv",
        "table_runs.csv",
        "table_similar_taps.md",
        "progress_similar.png",
        "progress_similar_taps.png",
        "grid_similar_taps.csv",
        "cka_similar_n2n.svg",
    } <= parts
    table = (done / "report/table_results.md").read_text()
    assert "control (schnet)" in table
    assert "teacher (painn)" in table


def test_a_finished_study_does_nothing_again(done: Path, plain: dict[str, Any]) -> None:
    before = {p: p.stat().st_mtime_ns for p in done.glob("*/run.json")}
    told: list[Any] = []
    run_experiment(validate(plain, PairsStudy).experiment, done, on_progress=told.append)
    assert not told
    assert before == {p: p.stat().st_mtime_ns for p in done.glob("*/run.json")}


def test_a_finished_run_of_other_settings_is_refused(plain: dict[str, Any], done: Path) -> None:
    other = {**plain, "common": {**plain["common"], "batch_size": 2}}
    with pytest.raises(ConfigError, match=r"painn-0 holds a run with other settings"):
        run_experiment(validate(other, PairsStudy).experiment, done)


def test_stored_and_online_features_give_the_same_student(
    plain: dict[str, Any], done: Path, tmp_path: Path
) -> None:
    pair = plain["pairs"]["similar"]
    only = {**pair, "strategies": {"n2n": pair["strategies"]["n2n"]}, "grids": {}}
    online = {**plain, "features": "online", "seeds": [0], "pairs": {"similar": only}}
    run_experiment(validate(online, PairsStudy).experiment, tmp_path)
    for name in ("schnet-0", "similar.n2n-0"):
        one, other = (load_potential(f / name / "best.pt")[0] for f in (done, tmp_path))
        for key, value in one.state_dict().items():
            assert value.allclose(other.state_dict()[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_study_leaves_no_run_behind(plain: dict[str, Any], tmp_path: Path) -> None:
    models = {**plain["models"], "painn": {**plain["models"]["painn"], "train": {}}}
    common = {**plain["common"], "epochs": 100_000}
    long = {**plain, "models": models, "common": common, "seeds": [0]}
    config = write_config(tmp_path / "study.yaml", long)
    program = Path(sys.executable).with_name("potstill")
    command = [str(program), "study", str(config), "--out", str(tmp_path / "o")]
    command += ["--workers", "2"]
    study = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "o/painn-0/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.is_file() and time.monotonic() < deadline:
        with pytest.raises(subprocess.TimeoutExpired):  # it has not ended
            study.wait(0.1)
    assert metrics.stat().st_size > 0
    children = Path(f"/proc/{study.pid}/task/{study.pid}/children").read_text().split()
    runs = [os.pidfd_open(int(child)) for child in children]
    assert runs
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    for run in runs:  # readable as soon as the process has ended
        assert select.select([run], [], [], 60.0)[0]
        os.close(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairs": {"a": {"teacher": "pain", "student": "schnet"}}}, "did you mean 'painn'"),
        (
            {
                "pairs": {
                    "a": {
                        "teacher": "painn",
                        "student": "schnet",
                        "strategies": {"n2n": {"distill": "n2m"}},
                    }
                }
            },
            "unknown strategy 'n2m'",
        ),
        ({"models": {"painn": {"kind": ""}}}, "either 'kind' or 'checkpoint'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    plain: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = write_config(tmp_path / "study.yaml", {**plain, **change})
    with pytest.raises(ConfigError, match=words):
        load_study(path)


# -- tables ----------------------------------------------------------------------------------------


def row(model: str, run: str, seed: int, energy: float, force: float, pair: str = "") -> RunRow:
    average = {
        "energy_mae": Estimate(energy, 0.01, 50),
        "free_forces_mae": Estimate(force, 0.01, 50),
    }
    learned: dict[str, Any] = {"against": (model,), "teacher": TrainedTeacher("big")}
    variant = Variant(model, Role.TEACHER, run, "", TrainSettings())
    if pair:
        variant = replace(variant, name=f"{pair}.{run}", role=Role.STUDENT, group=pair, **learned)
    return RunRow(Run(variant, seed), 10, tests=S2EFErrors({}, average))


def three(model: str, run: str, energy: float, force: float, **own: Any) -> list[RunRow]:
    return [row(model, run, k, energy + 0.001 * k, force + 0.001 * k, **own) for k in range(3)]


def test_shares_of_the_gap_follow_from_the_means() -> None:
    rows = [
        *three("small", "alone", 0.100, 0.200),
        *three("big", "alone", 0.050, 0.201),
        *three("small", "n2n", 0.075, 0.150, pair="p"),
    ]
    table = result_table(Results(rows))
    assert [line[1] for line in table.rows] == ["control (small)", "teacher (big)", "n2n"]
    assert table.columns[2:4] == ("Energy MAE (meV)", "Force MAE (meV/Å)")
    # The gap in forces, 1 meV/Å, is below two standard errors.
    assert table.rows[2][2:] == (
        "76.0 ± 1.0 (50 ± 1 %)",
        "151.0 ± 1.0",
        "energy −25 % (better), force −25 % (better)",
    )
    assert verdicts(Results(rows))[0] == (
        "p, Energy MAE, compared with the control: better: n2n (−25 %)."
    )


def test_each_seed_stands_beside_the_control_of_its_own_seed() -> None:
    rows = [
        *(row("small", "alone", k, 0.1 + 0.1 * k, 0.2) for k in range(2)),
        *(row("big", "alone", k, 0.05, 0.1) for k in range(2)),
        *(row("small", "n2n", k, 0.11, 0.15, pair="p") for k in range(2)),
    ]
    rows = [
        replace(one, tests=S2EFErrors({"test": one.tests.average}, one.tests.average))
        for one in rows
        if one.tests is not None
    ]
    table = seed_table(Results(rows))
    assert [line[:3] for line in table.rows] == [("p", "n2n", 0), ("p", "n2n", 1)]
    assert [line[3] for line in table.rows] == pytest.approx([10.0, -45.0])
    assert [line[4] for line in table.rows] == pytest.approx([-25.0, -25.0])


def test_a_single_seed_takes_the_errors_over_frames() -> None:
    rows = [
        row("small", "alone", 0, 0.100, 0.200),
        row("big", "alone", 0, 0.090, 0.100),
        row("small", "n2n", 0, 0.095, 0.150, pair="p"),
    ]
    line = result_table(Results(rows)).rows[2]
    assert line[2] == "95.0"  # the gap is 10 +- 14 meV
    assert line[3] == "150 (50 ± 12 %)"
    assert line[-1] == "energy −5 %, force −25 %"
