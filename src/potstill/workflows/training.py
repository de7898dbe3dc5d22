"""`potstill train`: one training run, or several stages that hand their best network on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from potstill.checkpoint import load_potential
from potstill.evaluate.errors import evaluate_errors
from potstill.models import Potential
from potstill.teachers import Teacher
from potstill.train import TrainingSet, TrainResult, TrainSettings, train
from potstill.train.features import is_stored
from potstill.workflows.base import (
    Display,
    Settings,
    TeacherSettings,
    claim_folder,
    potential_info,
    seconds_in_words,
    write_json,
)
from potstill.workflows.data import DataSettings, load_parts


class StageConfig(Settings):
    """One stage of a training: what differs from the config's own sections.

    Parameters
    ----------
    name : str
        Name of its folder in the run folder.
    data : DataSettings, optional
        Its own data.
    train : dict
        Settings that replace those of the section `train`, nested alike.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    data: DataSettings | None = None
    train: dict[str, Any] = Field(default_factory=dict)


class TrainConfig(Settings):
    """Settings of `potstill train`.

    Parameters
    ----------
    out : str
        The run folder.
    data : DataSettings, optional
        Training, validation and test sets; stages may bring their own.
    train : TrainSettings
        Model, loss, optimizer and so on.
    stages : tuple of StageConfig
        Train in stages, say on synthetic structures that a teacher has labelled, then on reference
        data; each starts from the best network of the one before.
    initial : str, optional
        Start from this checkpoint.
    teachers : dict of str to TeacherSettings
        Teachers by source that compute during training: their internal features, where the loss
        distils some that the data do not hold, and labels of displaced structures (`augment`).
    """

    out: str
    data: DataSettings | None = None
    train: TrainSettings = Field(default_factory=TrainSettings)
    stages: tuple[StageConfig, ...] = ()
    initial: str | None = None
    teachers: dict[str, TeacherSettings] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name")
        if self.data is None and (not self.stages or any(s.data is None for s in self.stages)):
            raise ValueError("there is no 'data' section")
        for stage in self.stages:
            self.settings_of(stage)
        return self

    def settings_of(self, stage: StageConfig) -> TrainSettings:
        """The section `train` with a stage's changes."""
        return TrainSettings.model_validate(merged(self.train.model_dump(), stage.train))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    result = dict(base)
    for key, value in changes.items():
        own = result.get(key)
        nested = isinstance(own, Mapping) and isinstance(value, Mapping)
        result[key] = merged(own, value) if nested else value  # type: ignore[arg-type]
    return result


def train_from_config(config: TrainConfig, display: Display | None = None) -> TrainResult:
    """Train as a config says, or continue; returns the result of the last stage.

    The run folder gets `config.yaml` and the files of `potstill.train.train`, in one subfolder per
    stage if there are stages, and `test.json` with the errors on the test set, if there is one.
    """
    display = display or Display()
    folder = Path(config.out)
    stages = config.stages or (StageConfig(name="."),)
    data = [
        load_parts(stage.data or config.data, config.settings_of(stage).feature_terms)  # type: ignore[arg-type]
        for stage in stages
    ]
    teachers: dict[str, Teacher] = {}
    claim_folder(folder, config)
    initial = None if config.initial is None else load_potential(config.initial)[0]
    for stage, (parts, sources) in zip(stages, data, strict=True):
        settings = config.settings_of(stage)
        place = folder / stage.name
        for name in _online(settings, parts["train"]):
            # A teacher's package is imported only if it must be.
            if name in config.teachers and name not in teachers:
                teachers[name] = config.teachers[name].make()
        sources = {name: t.info.to_json() for name, t in teachers.items()} | sources
        result = train_with_progress(
            settings,
            parts["train"],
            parts["validation"],
            place,
            display,
            title=f"training {stage.name}" if config.stages else "training",
            info=potential_info(parts["train"].structures, teacher=_teacher(settings, sources)),
            initial=initial,
            teachers=teachers,
        )
        if result.status == "interrupted":
            return result
        initial = load_potential(result.best)[0]
        if "test" in parts:
            write_test_errors(initial, parts["test"], settings, place)
    return result


def train_with_progress(
    settings: TrainSettings,
    training: TrainingSet,
    validation: TrainingSet,
    folder: Path,
    display: Display,
    *,
    title: str,
    info: Mapping[str, Any] | None = None,
    initial: Potential | None = None,
    teachers: Mapping[str, Teacher] | None = None,
) -> TrainResult:
    """`potstill.train.train` with a display."""
    rows = [[source, name, str(n)] for source, name, n in training.summary()]
    if not (folder / "settings.json").is_file():
        display.table(f"{title}: labels", ("source", "property", "structures"), rows)
    with display.task(title, settings.epochs) as task:
        result = train(
            settings,
            training,
            validation,
            folder,
            info=info,
            initial=initial,
            teachers=teachers,
            on_epoch=lambda record: task.update(record["epoch"], note=_note(record)),
            say=display.say,
        )
    if result.status == "stopped early":
        display.say(
            f"{title} stopped early after {result.epochs} epochs; epoch {result.best_epoch} was "
            f"the best ({seconds_in_words(result.seconds)})"
        )
    return result


def write_test_errors(
    potential: Potential, data: TrainingSet, settings: TrainSettings, folder: Path
) -> None:
    """Write errors on a test set to `test.json`, against every source that the loss names."""
    sources = dict.fromkeys(
        (settings.score.source, *(term.source for term in settings.label_terms))
    )
    channels = {
        source: evaluate_errors(
            potential,
            data.structures,
            {"reference" if source == "reference" else "teacher": data.labels[source]},
        ).to_json()
        for source in sources
        if source in data.labels
    }
    write_json(folder / "test.json", channels)


def _note(record: Mapping[str, Any]) -> str:
    """Force and energy error of an epoch in a few words."""
    metrics = record["validation"]
    words = []
    if math.isfinite(metrics.get("forces_rmse", math.nan)):
        words.append(f"forces {metrics['forces_rmse']:.3f} eV/Å")
    if math.isfinite(metrics.get("energy_per_atom_rmse", math.nan)):
        words.append(f"energy {1000.0 * metrics['energy_per_atom_rmse']:.1f} meV/atom")
    return ", ".join(words)


def _online(settings: TrainSettings, training: TrainingSet) -> list[str]:
    """Names of the teachers that compute during the training."""
    if settings.augment is not None:  # the only one then
        return [settings.augment.source]
    return [term.source for term in settings.feature_terms if not is_stored(term, training)]


def _teacher(settings: TrainSettings, sources: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is known of the teacher whose labels the loss uses; one goes into the file."""
    names = [t.source for t in settings.loss if t.source != "reference" and t.ever_active]
    names += [] if settings.augment is None else [settings.augment.source]
    unique = list(dict.fromkeys(names))
    if len(unique) > 1:
        return {"name": " + ".join(unique), "all": {name: sources.get(name) for name in unique}}
    return {"name": unique[0], **sources.get(unique[0], {})} if unique else None
