"""The commands: options, sentences for mistakes, files that they leave."""

import ast
import csv
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read, write
from typer.testing import CliRunner

from data import rattled_copper
from potstill import __version__, process
from potstill.checkpoint import save_potential
from potstill.cli import app, base, main
from potstill.config import DistillConfig, load_config
from potstill.models import HIPNN, SpeciesOffsets, SumPotential
from potstill.species import SpeciesTable
from potstill.store import LabeledStore
from potstill.workflows import doctor

TRAIN = """
out: FOLDER/run
data:
  files: [{path: FOLDER/frames.xyz}]
  split: {fractions: {train: 0.5, validation: 0.25, test: 0.25}}
train:
  epochs: 2
  model:
    hyperparameters:
      {n_features: 4, n_sensitivities: 4, dist_soft_min: 1.8, dist_soft_max: 4.0,
       dist_hard_max: 4.5, n_atom_layers: 1}
"""

runner = CliRunner()


def call(*args, code=0):
    result = runner.invoke(app, [str(a) for a in args], env={"COLUMNS": "160", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def copper(tmp_path):
    """A file of labelled frames, and one with a structure."""
    write(tmp_path / "frames.xyz", rattled_copper(8, 0.1))
    write(tmp_path / "Cu.xyz", bulk("Cu", cubic=True))
    return tmp_path


@pytest.fixture
def checkpoint(copper):
    torch.manual_seed(0)
    table = SpeciesTable.from_symbols(["Cu"])
    network = HIPNN(table, 4, 4, 1.8, 4.0, 4.5, 1)
    student = SumPotential({"offsets": SpeciesOffsets(table, [1.0]), "network": network})
    save_potential(copper / "student.pt", student, {"trained_on": {"elements": ["Cu"]}})
    return copper / "student.pt"


def test_help_and_version():
    text = call("--help").output
    for command in ("distill", "label", "train", "evaluate", "study", "md", "inspect", "doctor"):
        assert command in text
        assert "Usage" in call(command, "--help").output
    assert __version__ in call("--version").output


LOOK = """
import os, sys
from potstill.cli import app, main
os.execv = lambda *_: sys.exit("restarted")
names = [c.name or c.callback.__name__ for c in app.registered_commands]
calls = [["--help"], ["--version"], ["nope"], [], *([n, "--help"] for n in names)]
calls += [[n, "--no-such-option"] for n in names] + [["train"], ["md", "x", "y", "--duration", "z"]]
for call in calls:
    sys.argv = ["potstill", *call]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, 2), (call, end.code)
print(sorted({m.partition(".")[0] for m in sys.modules}))
"""


def test_help_and_mistakes_in_options_import_next_to_nothing():
    env = {k: v for k, v in os.environ.items() if k not in (*process.MALLOC, "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", LOOK], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert "typer" in imported
    assert not imported & {"torch", "ase", "numpy", "scipy", "matplotlib", "zarr", "ruamel"}


def test_a_command_that_works_restarts_the_process(monkeypatch):
    started = []
    monkeypatch.setattr(process.os, "execv", lambda *args: started.append(args))
    monkeypatch.setattr(process.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in (*process.MALLOC, "OMP_WAIT_POLICY", process.NO_TUNING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(base, "BEFORE_WORK", [])
    monkeypatch.setattr(sys, "argv", ["potstill", "config", "md"])
    with pytest.raises(SystemExit):
        main()
    assert len(started) == 1


def test_config_prints_a_template(copper):
    text = call("config", "distill").stdout
    (copper / "distill.yaml").write_text(text)
    assert load_config(copper / "distill.yaml", DistillConfig) == DistillConfig()
    assert "did you mean 'train'?" in call("config", "trian", code=2).stderr


def test_label_and_inspect_a_store(copper):
    store = copper / "labels.zarr"
    emt = ("--teacher", "ase.calculators.emt:EMT", "--teacher-arg", "name=emt")
    assert (
        "8 structures labeled, 0 failed" in call("label", store, copper / "frames.xyz", *emt).output
    )
    # Once more: nothing is added, nothing is done again.
    call("label", store, copper / "frames.xyz", *emt)
    assert LabeledStore.open(store).n_systems == 8
    text = call("inspect", store).output
    assert "labels of 'emt'" in text
    assert "labels of 'reference'" in text


def test_train_then_inspect_and_evaluate(copper):
    config = copper / "train.yaml"
    config.write_text(TRAIN.replace("FOLDER", str(copper)))
    assert "finished after 2 epochs" in call("train", config).output
    assert json.loads((copper / "run" / "test.json").read_text())["reference"]["n_systems"] == 2
    assert "trained on" in call("inspect", copper / "run").output
    best = copper / "run" / "best.pt"
    text = call(
        *("evaluate", f"mine={best}", "--data", copper / "frames.xyz", "--tests", "errors"),
        *("--out", copper / "results"),
    ).output
    assert "Force RMSE (eV/Å)" in text
    errors = json.loads((copper / "results" / "errors.json").read_text())
    assert "mine-reference" in errors["mine"]["channels"]


@pytest.mark.parametrize("ensemble", ["nve", "langevin", "npt"])
def test_md_writes_a_trajectory_and_goes_on(copper, checkpoint, ensemble):
    out = copper / ensemble
    args = ("md", checkpoint, copper / "Cu.xyz", "--ensemble", ensemble, "--duration", 0.05)
    args += ("--stride", 10, "--out", out)
    call(*args, "--config", _short(copper))
    frames = read(out / "trajectory.extxyz", ":")
    assert len(frames) == 5
    assert frames[-1].get_momenta().any()
    before = (out / "trajectory.extxyz").read_bytes()
    call(*args, "--config", _short(copper))
    assert (out / "trajectory.extxyz").read_bytes() == before
    rows = list(csv.DictReader((out / "thermo.csv").read_text().splitlines()))
    totals = [float(row["total_eV"]) for row in rows]
    if ensemble == "nve":
        assert max(totals) - min(totals) < 1e-3
    assert float(rows[0]["time_fs"]) > 0


def _short(folder):
    path = folder / "md.yaml"
    path.write_text("equilibration: 0.02\n")
    return path


class Bomb(EMT):
    """Copper, for a while."""

    n_calls = 0

    def calculate(self, *args, **kwargs):
        super().calculate(*args, **kwargs)
        self.n_calls += 1
        if self.n_calls > 200:
            self.results["forces"] = self.results["forces"] + 1e6


def test_dynamics_that_explode_leave_their_trajectory(copper):
    out = copper / "md"
    settings = ("--duration", 1.0, "--stride", 10, "--out", out, "--config", _short(copper))
    result = call("md", f"{__name__}:Bomb", copper / "Cu.xyz", *settings, code=2)
    assert "exploded" in result.output
    frames = read(out / "trajectory.extxyz", ":")
    assert 1 <= len(frames) < 100
    rows = list(csv.DictReader((out / "thermo.csv").read_text().splitlines()))
    assert [float(r["time_fs"]) for r in rows] == [f.info["time_fs"] for f in frames]


def test_inspect_structures_and_a_checkpoint(copper, checkpoint):
    text = call("inspect", copper / "frames.xyz").output
    assert "Cu" in text
    assert "energy" in text
    assert "parameters" in call("inspect", checkpoint).output


def test_doctor_finds_itself_well():
    text = call("doctor").output
    assert "self-test" in text
    assert "FAILS" not in text


def test_doctor_is_loud_about_missing_kernels(monkeypatch):
    monkeypatch.setattr(doctor, "TESTS", {"native kernels": doctor.TESTS["native kernels"]})
    monkeypatch.setattr(doctor, "why_unavailable", lambda: "compiling failed")
    text = call("doctor", code=1).output
    assert "FAILS" in text
    assert "compiling failed" in text
    assert "this installation has a problem: native kernels" in text


def test_doctor_knows_all_extras():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - {"docs", "test", "dev"}
    assert extras == {extra for extra, _, _ in doctor.EXTRAS}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("inspect", "nope"), "nope does not exist"),
        (("distill", "--teacher", "chgnett", "--out", "{}/run"), "did you mean 'chgnet'?"),
        (("distill", "--structure", "silicone", "--out", "{}/run"), "did you mean 'silicon'?"),
        (("distill", "--budget", "soon", "--out", "{}/run"), "'budget'"),
        (("label", "{}/labels.zarr", "--teacher", "chgnet"), "no such store"),
        (("train", "{}/nope.yaml"), "cannot be read"),
        (("md", "{}/nope.pt", "silicon", "--out", "{}/md"), "nope.pt"),
        (("md", "chgnet"), "'structure' is missing"),
        (("evaluate", "--out", "{}/x"), "'models'"),
        (("evaluate", "a.pt", "b/a.pt", "--out", "{}/x"), "two models are called 'a'"),
        (("study", "{}/nope.yaml", "--out", "{}/x"), "cannot be read"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, args, expected):
    result = call(*[a.replace("{}", str(tmp_path)) for a in args], code=base.MISTAKE)
    text = result.stderr
    assert text.startswith("potstill: ")
    assert expected in text
    assert text.count("\n") == 1
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_a_new_start_keeps_memory_and_lets_threads_sleep_unless_told_otherwise(monkeypatch):
    started = []
    monkeypatch.setattr(process.os, "execv", lambda *args: started.append(args))
    monkeypatch.setattr(process.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in (*process.MALLOC, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(process.NO_TUNING, "1")
    process.tune_process()
    assert not started
    monkeypatch.delenv(process.NO_TUNING)
    process.tune_process()
    assert started[0][0] == sys.executable
    started.clear()
    process.tune_process()  # the variables are set now
    assert not started
