"""The Python examples of the documentation run, in the order in which a reader meets them."""

import json
import re
import runpy
from pathlib import Path

import ase.io
import pytest
import torch
import typer
from ruamel.yaml import YAML

import potstill
from data import rattled_copper
from potstill.checkpoint import save_potential
from potstill.cli import app
from potstill.config import TrainConfig, load_config, load_study
from potstill.models import HIPNN
from potstill.species import SpeciesTable
from potstill.train import TrainSettings
from potstill.workflows.training import train_from_config

DOCS = Path(__file__).resolve().parents[1] / "docs"


def examples(page: str) -> str:
    """All Python blocks of a page, joined; each may use what those before it defined."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the examples read."""
    monkeypatch.chdir(tmp_path)
    frames = rattled_copper(3, 0.05)
    ase.io.write("data.extxyz", frames)
    for atoms in frames:
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        virial = -atoms.get_stress(voigt=False) * atoms.get_volume()
        atoms.calc = None
        atoms.info |= {"REF_energy": energy, "REF_virial": virial}
        atoms.arrays["REF_forces"] = forces
    ase.io.write("other.xyz", frames, format="extxyz")
    torch.manual_seed(0)
    shape = {"n_features": 4, "n_sensitivities": 4, "n_atom_layers": 1}
    radii = {"dist_soft_min": 2.0, "dist_soft_max": 4.5, "dist_hard_max": 5.0}
    model = HIPNN(SpeciesTable.from_symbols(["Si"]), **shape, **radii)
    info = {"trained_on": {"elements": ["Si"]}, "teacher": None, "versions": {}, "seed": 0}
    save_potential("model.pt", model, info)
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        *("data-formats.md", "teachers.md", "feature-distillation.md"),
        *("engines.md", "lammps.md", "models.md"),
    ],
)
def test_examples_run(folder, page):
    if page == "engines.md":
        pytest.importorskip("torch_sim", reason="needs the extra 'torch-sim'")
    code = examples(page)
    assert code
    exec(compile(code, page, "exec"), {})


@pytest.mark.slow
def test_the_tutorial_runs(folder, capsys):
    names: dict = {}
    exec(compile(examples("tutorial.md"), "tutorial.md", "exec"), names)
    metrics = names["errors"].channels["student-teacher"]
    assert metrics["forces_relative_rmse"] < 0.3
    lattice = re.findall(r"a = (\d\.\d+) Å", capsys.readouterr().out)
    teacher, student = (float(text) for text in lattice)
    assert student == pytest.approx(teacher, rel=0.02)


@pytest.mark.slow
def test_the_session_of_the_readme_runs(folder):
    code = examples("../README.md")
    assert code
    (folder / "runs/silicon").mkdir(parents=True)
    (folder / "model.pt").rename(folder / "runs/silicon/student.pt")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    if "data" in names:  # a session of its own
        assert potstill.evaluate(names["student"], names["data"])["forces_relative_rmse"] < 0.2
        assert len(names["trajectory"]) == 10


# Of four atoms, one structure at a time, the slope that differences are compared with may vanish.
@pytest.mark.filterwarnings("ignore:central differences:UserWarning")
def test_the_config_for_own_data_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.yaml").write_text(block)
    frames = rattled_copper(12, 0.05)
    for atoms in frames:
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        virial = -atoms.get_stress(voigt=False) * atoms.get_volume()
        atoms.calc = None
        atoms.info |= {"REF_energy": energy, "REF_virial": virial}
        atoms.arrays["REF_forces"] = forces
    ase.io.write("dft.extxyz", frames)
    quick = {
        "train": {"epochs": 20, "batch_size": 1, "model": {"hyperparameters": {"n_features": 8}}}
    }
    result = train_from_config(load_config("train.yaml", TrainConfig, quick))
    assert result.best == Path("runs/dft/best.pt")
    records = [json.loads(x) for x in Path("runs/dft/metrics.jsonl").read_text().splitlines()]
    forces = [record["validation"]["forces_rmse"] for record in records]
    assert min(forces) < 0.7 * forces[0]
    assert json.loads(Path("runs/dft/test.json").read_text())["reference"]["n_systems"] >= 1


def test_every_page_with_examples_is_run():
    with_code = {path.name for path in DOCS.glob("*.md") if examples(path.name)}
    assert with_code == {
        "data-formats.md",
        "engines.md",
        "feature-distillation.md",
        "lammps.md",
        "models.md",
        "teachers.md",
        "tutorial.md",
    }


def test_examples_of_configs_of_feature_distillation_are_valid():
    text = (DOCS / "feature-distillation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    sections = [YAML(typ="safe", pure=True).load(block) for block in blocks]
    losses = [section["loss"] for section in sections if "loss" in section]
    assert len(losses) >= 2
    for loss in losses:
        assert TrainSettings(loss=loss).feature_terms
    (model,) = [section["model"] for section in sections if "model" in section]
    assert TrainSettings(model=model).model.initialize is not None
    (teachers,) = [section["teachers"] for section in sections if "teachers" in section]
    assert set(TrainConfig(out="run", data={"store": "x"}, teachers=teachers).teachers) == {
        "chgnet",
        "big",
    }


def test_the_section_that_records_cka_is_valid():
    text = (DOCS / "cka.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    section = YAML(typ="safe", pure=True).load(block)
    config = TrainConfig(out="run", data={"store": "x"}, **section)
    assert config.cka is not None
    assert config.cka.student_taps == ("block_0", "block_1")


def test_the_example_of_a_feature_study_is_valid(tmp_path):
    text = (DOCS / "feature-study.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "study.yaml").write_text(block)
    experiment = load_study(tmp_path / "study.yaml")
    # 2 models and 2 strategies with three seeds; 7 taps of the student, 14 of the teacher with one.
    assert len(experiment.runs()) == 12 + 7 * 14


@pytest.mark.parametrize("name", ["3bpa", "3bpa_weights", "oc20"])
def test_configs_of_feature_studies_are_valid(name):
    experiment = load_study(DOCS.parent / f"studies/feature_distillation/{name}.yaml")
    assert experiment.runs()


def shell_commands() -> list[str]:
    """All calls of `potstill` in documentation, Makefile and comments of the studies' configs."""
    root, found = DOCS.parent, []
    configs = root.glob("studies/**/*.yaml")
    for path in [*DOCS.glob("*.md"), root / "README.md", root / "Makefile", *configs]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
            text = "\n".join([*blocks, *re.findall(r"`(potstill [^`]+)`", text)])
        text = text.replace("\\\n#", "")
        found += re.findall(r"(?:^|[\t/]|^# +)potstill ([a-z][^#\n]*)", text, re.MULTILINE)
    return found


def test_documented_commands_and_options_exist():
    commands = dict(typer.main.get_command(app).commands)
    groups = {name for name, command in commands.items() if hasattr(command, "commands")}
    for group in groups:
        inner = commands.pop(group).commands
        commands |= {f"{group} {name}": command for name, command in inner.items()}
    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in commands.items()
    }
    calls = [call.split() for call in shell_commands()]
    calls = [[" ".join(c[:2]), *c[2:]] if c[0] in groups else c for c in calls]
    assert {call[0] for call in calls} == set(known)
    wrong = [
        f"{call[0]} {word}"
        for call in calls
        for word in call[1:]
        if word.startswith("--") and word.partition("=")[0] not in known[call[0]]
    ]
    assert wrong == []


def test_the_page_of_commands_is_up_to_date():
    script = runpy.run_path(str(DOCS / "extensions/commands.py"))
    assert script["page"]() == (DOCS / "commands.md").read_text(encoding="utf-8"), (
        "run: python docs/extensions/commands.py"
    )
