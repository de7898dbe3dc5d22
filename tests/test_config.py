"""Configs: what is legal, and the sentence that each mistake gets."""

import re

import pytest
from ruamel.yaml import YAML

from potstill.config import (
    SETTINGS,
    DistillConfig,
    EvaluateConfig,
    LabelConfig,
    MdConfig,
    SizesStudy,
    TrainConfig,
    _models_in,
    config_template,
    known_keys,
    load_config,
    write_settings,
)
from potstill.errors import ConfigError
from potstill.template import _model_of, field_docs
from potstill.workflows.base import claim_folder

TRAIN = """
out: run
data:
  files: [{path: train.xyz, keys: {energy: dft_energy}, units: {energy: Hartree}}]
train:
  epochs: 5
  loss:
    - {property: energy, source: reference}
    - {property: forces, source: reference, weight: {epochs: [1, 3], values: [75, 15]}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"

    def write(text):
        path.write_text(text)
        return path

    return write


def test_defaults_of_the_main_job():
    config = load_config(None, DistillConfig)
    assert config.teacher.spec == "chgnet"
    assert config.structure == "silicon"
    assert config.student.energy.prior == "zbl"
    assert config.weights.atomic_energies == 100.0


def test_a_training_config(file):
    config = load_config(file(TRAIN), TrainConfig, {"train": {"seed": 4, "epochs": None}})
    assert (config.train.seed, config.train.epochs) == (4, 5)
    assert config.train.loss[1].weight_at(3) == 15.0


def test_stages_change_the_common_settings(file):
    stages = """
stages:
  - {name: synthetic, data: {store: labels.zarr}, train: {optimizer: {learning_rate: 0.01}}}
  - {name: reference, train: {epochs: 2}}
"""
    config = load_config(file(TRAIN + stages), TrainConfig)
    first, second = (config.settings_of(stage) for stage in config.stages)
    assert (first.optimizer.learning_rate, first.epochs) == (0.01, 5)
    assert (second.optimizer.learning_rate, second.epochs) == (1e-3, 2)


def test_quantities(file):
    config = load_config(file("budget: 10min\ntemperature: 300:900\n"), DistillConfig)
    assert (config.budget, config.temperature) == (600.0, (300.0, 900.0))
    config = load_config(file("budget: 45\ntemperature: 500\n"), DistillConfig)
    assert (config.budget, config.temperature) == (45.0, (500.0, 500.0))
    # YAML 1.2: `1e-3` is a number and `no` is a word.
    text = "model: {spec: no.pt}\nstructure: no\nout: x\ntimestep: 5e-1\n"
    config = load_config(file(text), MdConfig)
    assert (config.timestep, config.structure) == (0.5, "no")


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        (DistillConfig, "bugdet: 3", "unknown key 'bugdet'; did you mean 'budget'?"),
        (DistillConfig, "student: {epoch: 3}", "unknown key 'epoch' in 'student'; did you mean"),
        (
            DistillConfig,
            "student: {model: {kin: hipnn}}",
            "unknown key 'kin' in 'student.model'; did you mean 'kind'?",
        ),
        (DistillConfig, "budget: soon", "'budget': input should be a valid number"),
        (DistillConfig, "budget: -3", "'budget': input should be greater than 0 (it is -3)"),
        (DistillConfig, "temperature: 3:4:5", "'temperature'"),
        (DistillConfig, "- 1\n- 2", "a config must be a mapping of keys to values"),
        (DistillConfig, "seed: 1\nseed: 2", 'line 2: not YAML (found duplicate key "seed"'),
        (DistillConfig, "seed: [1", "not YAML"),
        (TrainConfig, "out: x", "there is no 'data' section"),
        (TrainConfig, TRAIN.replace("out: run", ""), "'out' is missing"),
        (TrainConfig, TRAIN.replace("energy,", "enrgy,"), "'train.loss[0].property'"),
        (
            TrainConfig,
            TRAIN.replace("units: {energy", "units: {enrgy"),
            "'data.files[0].units': there is no 'enrgy'; did you mean 'energy'?",
        ),
        (TrainConfig, TRAIN.replace("[1, 3]", "[2, 3]"), "start at 1"),
        (
            TrainConfig,
            TRAIN.replace("data:", "data:\n  store: labels.zarr"),
            "'data': give either 'store' or 'files'",
        ),
        (LabelConfig, "store: x\nteacher: {spek: chgnet}", "unknown key 'spek' in 'teacher'"),
        (
            EvaluateConfig,
            "models: {a: {spec: a.pt}}\nout: x\ntests: [speeed]",
            "'tests': there is no evaluation 'speeed'; did you mean 'speed'?",
        ),
        (SizesStudy, "name: x\ntitle: y\ndata: {train: a, tests: {}}\nsizes: {}", "'teacher'"),
    ],
)
def test_mistakes_are_one_sentence_with_file_and_key(file, model, text, expected):
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, model)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert "\n" not in message


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nope.yaml cannot be read: No such file"):
        load_config(tmp_path / "nope.yaml", DistillConfig)


def test_written_settings_read_back(tmp_path, file):
    config = load_config(file(TRAIN), TrainConfig)
    write_settings(tmp_path / "again.yaml", config)
    assert load_config(tmp_path / "again.yaml", TrainConfig) == config


def test_a_folder_belongs_to_one_config(tmp_path, file):
    config = load_config(file(TRAIN), TrainConfig)
    folder = tmp_path / "run"
    claim_folder(folder, config)
    claim_folder(folder, config)
    assert YAML(typ="safe").load(folder / "config.yaml")["train"]["epochs"] == 5
    # A setting that is newer than the run has its default there.
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  batch_atoms:\n", ""))
    claim_folder(folder, config)
    other = load_config(file(TRAIN), TrainConfig, {"train": {"epochs": 6}})
    with pytest.raises(ConfigError, match=r"'train.epochs' is 5 there, not 6"):
        claim_folder(folder, other)
    claim_folder(folder, load_config(file(TRAIN), TrainConfig, {"out": "named/otherwise"}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="no run folder"):
        claim_folder(tmp_path / "full", config)


def every_key(model):
    """Names of all keys of settings and of their sections; of a loss, which has terms of many
    kinds, the name alone."""
    names = set(model.model_fields)
    for field in model.model_fields.values():
        inner = _models_in(field.annotation)
        if len(set(inner)) == 1:
            names |= every_key(inner[0])
    return names


def every_section(model):
    """A kind of settings and all that it can hold."""
    inner = [m for field in model.model_fields.values() for m in _models_in(field.annotation)]
    return {model}.union(*(every_section(m) for m in inner))


@pytest.mark.parametrize("command", SETTINGS)
def test_a_template_has_all_keys_and_reads_back_as_the_defaults(command, file):
    model, example = SETTINGS[command]
    text = config_template(command)
    plain = model.model_validate(example).model_dump()
    assert load_config(file(text), model).model_dump() == plain
    # Sections within sections that are absent are left to the documentation.
    studies = command.endswith(("study", "-all"))
    keys = model.model_fields if studies else every_key(model)
    assert [n for n in keys if not re.search(rf"^[ #]*{n}:( |$)", text, re.M)] == []
    for kind in every_section(model):
        alone = {n for n, field in kind.model_fields.items() if not _model_of(field.annotation)}
        assert alone <= set(field_docs(kind)), kind
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_template_says_what_docstrings_say():
    lines = config_template("md").splitlines()
    assert "# Settings of `potstill md`." in lines[0]
    assert lines[lines.index("stride: 50.0") - 1] == "# Time between frames in fs."
    above = " ".join(lines[: lines.index("ensemble: langevin")]).replace(" # ", " ")
    assert above.endswith("(nve | langevin | npt)")


def test_a_template_of_an_unknown_command():
    with pytest.raises(ConfigError, match="did you mean 'distill'"):
        config_template("distil")


def test_known_keys_follow_the_settings():
    assert "learning_rate" in known_keys(DistillConfig, ("student", "optimizer", "x"))
    assert "weight" in known_keys(TrainConfig, ("train", "loss", 0, "x"))
    assert "epochs" in known_keys(TrainConfig, ("train", "loss", 0, "weight", "Schedule", "x"))
