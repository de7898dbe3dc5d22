"""Reading configs: YAML 1.2, strict, every mistake told in one sentence with its place.

The settings themselves stand beside the workflows that they belong to; this module reads them from
files, merges what the command line adds, and words what is wrong.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from potstill.errors import ConfigError, suggest
from potstill.experiments.coarse import CoarseStudy as CoarseStudy
from potstill.experiments.recipes import PairsStudy as PairsStudy
from potstill.experiments.recipes import SizesStudy as SizesStudy
from potstill.experiments.spec import Experiment
from potstill.models.hipnn import HIPNNHyperparameters
from potstill.template import template
from potstill.workflows.base import merged
from potstill.workflows.base import write_settings as write_settings
from potstill.workflows.cka import CKAConfig as CKAConfig
from potstill.workflows.coarse import CoarseConfig as CoarseConfig
from potstill.workflows.distill import DistillConfig as DistillConfig
from potstill.workflows.dynamics import MdConfig as MdConfig
from potstill.workflows.epsilon import EpsilonConfig as EpsilonConfig
from potstill.workflows.evaluation import EvaluateConfig as EvaluateConfig
from potstill.workflows.fitting import FitConfig as FitConfig
from potstill.workflows.ibi import IbiConfig as IbiConfig
from potstill.workflows.labeling import LabelConfig as LabelConfig
from potstill.workflows.mapping import MapConfig as MapConfig
from potstill.workflows.sampling import SampleConfig as SampleConfig
from potstill.workflows.training import TrainConfig as TrainConfig

Model = TypeVar("Model", bound=BaseModel)

_STUDENT, _TRAINING = {"spec": "run/student.pt"}, {"files": [{"path": "train.extxyz"}]}

#: Settings by command (or kind of study), with values of the keys that have no default.
SETTINGS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "distill": (DistillConfig, {}),
    "sample": (
        SampleConfig,
        {
            "start": "silicon",
            "jobs": [
                {"kind": "rattle", "n_frames": 20, "displacement": [0.02, 0.15]},
                {"kind": "md", "n_frames": 50, "temperature": [300, 900], "timestep": 2.0},
            ],
            "teacher": {"spec": "chgnet"},
            "out": "synthetic",
        },
    ),
    "label": (LabelConfig, {"store": "labels.zarr", "teacher": {"spec": "chgnet"}}),
    "train": (TrainConfig, {"out": "run", "data": _TRAINING, "train": {"preset": "student"}}),
    "fit": (FitConfig, {"out": "fit", "data": _TRAINING}),
    "epsilon": (EpsilonConfig, {"out": "epsilon", "data": _TRAINING}),
    "evaluate": (
        EvaluateConfig,
        {"models": {"student": _STUDENT}, "store": "run/labels.zarr", "out": "results"},
    ),
    "cka": (
        CKAConfig,
        {"student": "run/student.pt", "teacher": "teacher.pt", "data": "labels.zarr", "out": "cka"},
    ),
    "md": (MdConfig, {"model": _STUDENT, "structure": "silicon", "out": "md"}),
    "coarse-map": (
        MapConfig,
        {
            "out": "beads.zarr",
            "trajectory": {"path": "md.trr", "index": "100:"},
            "topology": "md.tpr",
            "beads": {"urea": {"residue": "UREA"}, "ion": {"residue": "Cl"}},
        },
    ),
    "coarse-ibi": (IbiConfig, {"out": "ibi", "store": "beads.zarr"}),
    "coarse-all": (
        CoarseConfig,
        {
            "out": "run",
            "map": {
                "trajectory": "md.trr",
                "topology": "md.tpr",
                "beads": {"urea": {"residue": "UREA"}},
            },
            "train": {"name": "liquid", "title": "A liquid, one bead per molecule"},
        },
    ),
    "study": (
        SizesStudy,
        {
            "name": "copper",
            "title": "Copper: teachers, students and controls of two sizes",
            "data": {"train": "train.extxyz", "tests": {"test": "test.extxyz"}},
            "sizes": {
                "teacher": {"n_features": 64, "n_sensitivities": 20, "n_atom_layers": 3},
                "small": {"n_features": 16, "n_sensitivities": 12, "n_atom_layers": 2},
            },
        },
    ),
    "feature-study": (
        PairsStudy,
        {
            "kind": "features",
            "name": "molecules",
            "title": "Molecules: PaiNN into a smaller one",
            "data": _TRAINING,
            "tests": {"test": {"file": {"path": "test.extxyz"}}},
            "models": {"large": {"kind": "painn"}, "small": {"kind": "painn"}},
            "pairs": {
                "large_small": {
                    "teacher": "large",
                    "student": "small",
                    "strategies": {"n2n": {"distill": "n2n", "source": "teacher"}},
                }
            },
        },
    ),
}


def load_config(
    path: str | Path | None, model: type[Model], overrides: Mapping[str, Any] | None = None
) -> Model:
    """Read a config file; without one everything comes from `overrides` and defaults.

    `overrides` replace values of the file, nested alike; None leaves a value alone.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a key or value is wrong; one sentence with file and key.
    """
    data = {} if path is None else read_yaml(path)
    data = merged(data, _given(overrides or {}))
    return validate(data, model, where="" if path is None else str(path))


def load_study(path: str | Path) -> Experiment:
    """Read the config of a study: of sizes, or of the `kind` that it names."""
    data = read_yaml(path)
    if data.get("kind") == "coarse":
        return validate(data, CoarseStudy, where=str(path)).experiment
    if "kind" in data:
        return validate(data, PairsStudy, where=str(path)).experiment
    return validate(data, SizesStudy, where=str(path)).experiment


def load_mapping(path: str | Path, out: Path | None = None) -> MapConfig:
    """Read the config of a mapping, or of all of `potstill coarse`; `out` is as in that file."""
    if "map" in read_yaml(path):
        return load_config(path, CoarseConfig, {"out": out}).map
    return load_config(path, MapConfig, {"out": out})


def config_template(command: str) -> str:
    """Commented YAML of all settings of a command, which it accepts as it stands.

    Raises
    ------
    ConfigError
        If the command has no settings.
    """
    if command not in SETTINGS:
        raise ConfigError(
            f"there is no config for '{command}'{suggest(command, SETTINGS)}: "
            f"choose one of {', '.join(SETTINGS)}"
        )
    model, example = SETTINGS[command]
    return template(model.model_validate(example), {"hyperparameters": HIPNNHyperparameters})


def validate(data: Mapping[str, Any], model: type[Model], *, where: str = "") -> Model:
    """Turn plain values into settings; `where` names their file in messages."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_in_words(error, model, where)) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML 1.2 file whose top level is a mapping.

    Raises
    ------
    ConfigError
        If there is no such file, or it is not such YAML; also where a key is given twice.
    """
    path = Path(path)
    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{line}: not YAML ({error.problem})") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({error})") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: a config must be a mapping of keys to values")
    return data


def _given(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is None, at all levels; paths become strings."""
    result = {}
    for key, value in overrides.items():
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, Mapping):
            value = _given(value)
            if not value:
                continue
        if value is not None:
            result[key] = value
    return result


def _in_words(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One sentence about the first mistake, and how many more there are."""
    found = error.errors()
    # An unknown key is the likeliest reason of all others; where a value may be one of several
    # things, what a setting's own check says helps most.
    ranks = {"extra_forbidden": 0, "value_error": 1}
    first = min(found, key=lambda e: ranks.get(e["type"], 2))
    place = _key_path(first["loc"])
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        parent = _key_path(first["loc"][:-1])
        inside = f" in '{parent}'" if parent else ""
        text = f"unknown key '{name}'{inside}{suggest(name, known_keys(model, first['loc']))}"
    elif first["type"] == "missing":
        text = f"'{place}' is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        given = repr(first["input"])
        shown = f" (it is {given})" if len(given) <= 60 and place else ""
        text = f"'{place}': {message}{shown}" if place else message
    more = len(found) - 1
    tail = f"; and {more} more" if more and first["type"] != "extra_forbidden" else ""
    return f"{where}: {text}{tail}" if where else f"{text}{tail}"


def _key_path(location: tuple[int | str, ...]) -> str:
    """`data.files[0].path`; names that pydantic adds for unions and functions are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not part[:1].isupper() and part not in _TAGS:
            path += f".{part}" if path else part
    return path


_TAGS = frozenset({"float", "int", "str", "bool", "tuple", "list", "dict"})


def known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Valid keys at the level of the last part of a location."""
    models = [model]
    for part in location[:-1]:
        if not isinstance(part, str):
            continue
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = [m for f in fields for m in _models_in(f.annotation)]
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Settings that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_args(annotation):
        return [m for part in typing.get_args(annotation) for m in _models_in(part)]
    return []
