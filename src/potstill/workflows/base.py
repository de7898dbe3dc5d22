"""What all workflows share: strict settings, run folders, a display, structures by name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Annotated, Any

import ase
from ase.build import bulk
from ase.io import write
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML

from potstill.ase_bridge import NAMES
from potstill.display import Display as Display
from potstill.display import Task as Task
from potstill.display import seconds_in_words as seconds_in_words
from potstill.errors import ConfigError, DataError, suggest
from potstill.evaluate.tools import limited_threads as limited_threads
from potstill.files import write_atomically
from potstill.readers import read
from potstill.soundness import closest_pairs
from potstill.structures import Structures
from potstill.teachers import Teacher, make_teacher
from potstill.train.state import versions
from potstill.units import AMU_PER_A3_IN_G_PER_CM3


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def one_of(first: str, second: str) -> Any:
    """A check of settings in which either of two keys must be given, and not both."""

    def check(settings: Any) -> Any:
        if bool(getattr(settings, first)) == bool(getattr(settings, second)):
            raise ValueError(f"give either '{first}' or '{second}'")
        return settings

    return model_validator(mode="after")(check)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    result = dict(base)
    for key, value in changes.items():
        own = result.get(key)
        nested = isinstance(own, Mapping) and isinstance(value, Mapping)
        result[key] = merged(own, value) if nested else value  # type: ignore[arg-type]
    return result


# -- quantities as people write them ---------------------------------------------------------------

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def parse_duration(value: Any) -> Any:
    """Seconds from `90`, `"90s"`, `"10min"` or `"2h"`; anything else is left to the validator."""
    match = re.fullmatch(r"\s*([\d.]+)\s*(s|min|h)\s*", value) if isinstance(value, str) else None
    return float(match[1]) * _SECONDS[match[2]] if match else value


def parse_range(value: Any) -> Any:
    """(low, high) from `300`, `"300:900"` or a pair; anything else is left to the validator."""
    if isinstance(value, str):
        value = value.split(":")
    if isinstance(value, int | float):
        value = [value]
    if isinstance(value, Sequence) and len(value) == 1:
        value = [value[0], value[0]]
    return value


#: Seconds; configs may say `10min`.
Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]

#: A pair; configs may say `300:900` or one number.
Range = Annotated[tuple[float, float], BeforeValidator(parse_range)]


class TeacherSettings(Settings):
    """A teacher, or any other potential: see `potstill.teachers.make_teacher`.

    Parameters
    ----------
    spec : str
        A name such as `chgnet`, a checkpoint (or several: a committee), or `module:factory`.
    args : dict
        Keyword arguments of the teacher.
    """

    spec: str
    args: dict[str, Any] = Field(default_factory=dict)

    def make(self) -> Teacher:
        """Make the teacher."""
        return make_teacher(self.spec, self.args)


# -- run folders -----------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write plain values as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, absent: Any = None) -> Any:
    """Read what `write_json` wrote; without a file, `absent` if it is given.

    Raises
    ------
    DataError
        If the file is not JSON.
    """
    if absent is not None and not path.is_file():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a JSON file ({error})") from error


def write_extxyz(path: Path, images: Sequence[ase.Atoms], columns: Sequence[str]) -> None:
    """Write frames as extended XYZ, atomically; beads with their names and masses."""
    text = StringIO()
    if any(NAMES in atoms.arrays for atoms in images):
        columns = [*columns, NAMES, "masses"]
    write(text, images, format="extxyz", columns=list(columns))
    write_atomically(path, text.getvalue())


def write_settings(path: Path, settings: BaseModel) -> None:
    """Write settings with all defaults filled in as YAML, atomically."""
    buffer = BytesIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(settings.model_dump(mode="json"), buffer)
    write_atomically(path, buffer.getvalue())


def claim_folder(
    folder: Path, settings: BaseModel, free: Callable[[str], bool] = lambda key: False
) -> None:
    """Write `config.yaml` into a new run folder, or check that the folder belongs to the same run.

    `free` is as of `check_folder`.

    Raises
    ------
    ConfigError
        As of `check_folder`.
    """
    if not check_folder(folder, settings, free):
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder / "config.yaml", settings)


def check_folder(
    folder: Path, settings: BaseModel, free: Callable[[str], bool] = lambda key: False
) -> bool:
    """Whether a folder holds the run of these settings already; False if it is new.

    Where the folder lies (`out`) is no setting to compare: it may be moved or named otherwise.
    `free` tells whether a setting, given as `counts.epochs`, may still be changed.

    Raises
    ------
    ConfigError
        If it holds something else; of another run, the message names the settings that differ.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is no run folder: choose another --out")
        return False
    stored = stored_settings(folder)
    # Settings that are newer than the run have their defaults in it.
    with contextlib.suppress(ValidationError):
        stored = type(settings).model_validate(stored).model_dump(mode="json")
    changed = {
        key: values
        for key, values in differences(stored, settings.model_dump(mode="json")).items()
        if key != "out" and not free(key)
    }
    if changed:
        words = [
            f"'{k}' is {_short(old)} there, not {_short(new)}" for k, (old, new) in changed.items()
        ]
        more = f", and {len(words) - 3} more" if len(words) > 3 else ""
        raise ConfigError(
            f"{folder} holds a run with other settings ({', '.join(words[:3])}{more}): resume it "
            f"with --config {file}, or choose another folder"
        )
    return True


def stored_settings(folder: Path) -> dict[str, Any]:
    """Settings of the run that a folder holds, as they were written; none if it is new."""
    file = folder / "config.yaml"
    content = YAML(typ="safe", pure=True).load(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def differences(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Old and new value of every key that differs between plain values, as `loss[0].weight`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        parts = [(f"{key}.{k}" if key else str(k), k) for k in dict.fromkeys([*old, *new])]
        pairs = [(name, old.get(k), new.get(k)) for name, k in parts]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}[{k}]", *both) for k, both in enumerate(zip(old, new, strict=True))]
    else:
        return {} if old == new else {key: (old, new)}
    return {k: v for name, a, b in pairs for k, v in differences(a, b, name).items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 or isinstance(value, str) else text[:57] + "..."


class Stages:
    """Which stages of a run are finished, and how long they took: `stages.json`."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "stages.json"
        self._done: dict[str, Any] = read_json(self._file, {})

    def __contains__(self, name: str) -> bool:
        return name in self._done

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per finished stage, of the call that finished it."""
        return {name: entry["seconds"] for name, entry in self._done.items()}

    def note(self, name: str) -> str:
        """Message that a finished stage left."""
        return str(self._done[name].get("note", ""))

    @contextmanager
    def running(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a stage; it is marked finished if nothing is raised."""
        started = time.perf_counter()
        entry: dict[str, Any] = {}
        yield entry
        entry["seconds"] = round(time.perf_counter() - started, 2)
        self._done[name] = entry
        write_json(self._file, self._done)


# -- structures and what is known of them ----------------------------------------------------------


#: Structures that need no file.
BUILT_IN = {"silicon": bulk("Si", "diamond", a=5.43, cubic=True)}


def read_start(spec: str, *, index: str = ":") -> Structures:
    """Read starting structures: a name in `BUILT_IN`, or those of a file at `index`.

    Raises
    ------
    DataError
        If there is neither.
    """
    if spec in BUILT_IN:
        return Structures.from_ase(BUILT_IN[spec])
    if not Path(spec).exists():
        raise DataError(
            f"{spec}: no such file, and no built-in structure of that name{suggest(spec, BUILT_IN)}"
        )
    return read(spec, allow_partial=True, index=index)[0]


def trained_on(
    structures: Structures, temperature: tuple[float, float] | None = None
) -> dict[str, Any]:
    """What a potential's file says of its training structures, and of MD's temperatures in K."""
    mass = structures.composition() @ structures.species_table.masses
    periodic = structures.pbc.all(dim=1)
    density = (mass / structures.volume * AMU_PER_A3_IN_G_PER_CM3)[periodic]
    return {
        "elements": list(structures.species_table.names),
        "density_g_cm3": [float(density.min()), float(density.max())] if len(density) else None,
        "temperature_K": list(temperature) if temperature else None,
        "shortest_distances": closest_pairs(structures),
        "n_frames": structures.n_systems,
    }


def potential_info(
    structures: Structures,
    *,
    teacher: Mapping[str, Any] | None = None,
    temperature: tuple[float, float] | None = None,
    role: str = "",
) -> dict[str, Any]:
    """What to write into a trained potential: data, teacher, versions and role, if it has one."""
    return {
        "trained_on": trained_on(structures, temperature),
        "teacher": dict(teacher) if teacher else None,
        "versions": versions(),
        **({"role": role} if role else {}),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
