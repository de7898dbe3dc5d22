"""What a report says about one run, collected from its folder.

| file of the run folder | what it gives |
|---|---|
| `config.yaml`, `plan.json`, `stages.json` | command, seed, counts, durations |
| `<model>/metrics.jsonl` | learning curves |
| `<model>/best.pt`, `student.pt` | numbers of parameters, teacher, licence, versions |
| `evaluation/<test>.json` | model to the result of a test, or to `{"error": ...}` |
| `evaluation/parity.json` | model to `parity_points` |

Everything may be absent but the folder: what is not there is not reported.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from potstill.checkpoint import load_potential
from potstill.errors import DataError, PotstillError
from potstill.evaluate.learning import LearningCurves, read_learning_curves
from potstill.properties import property_spec
from potstill.store import LabelledStore
from potstill.structures import Properties, Structures

#: Tests whose results a report shows, by the names of their files.
TESTS = ("errors", "speed", "memory", "nve", "eos", "elastic", "rdf", "parity")


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows of one run.

    Parameters
    ----------
    folder : Path
        The run folder.
    title : str
        Heading.
    about : dict of str to str
        What, when, teacher, licence, versions, seed: in the order of display.
    results : dict
        Test to model to the plain JSON of its result.
    problems : tuple of str
        Tests that could not be done, and why.
    curves : dict of str to tuple of LearningCurves
        By model; several where there are several seeds.
    n_parameters : dict of str to int
        By model.
    trained_on : dict
        What the student's file says of its training structures.
    plan : dict
        Content of `plan.json`.
    """

    folder: Path
    title: str
    about: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    curves: dict[str, tuple[LearningCurves, ...]] = field(default_factory=dict)
    n_parameters: dict[str, int] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """Students, controls, teacher, then others, as far as anything is known of them."""
        names = {*self.curves, *(name for test in self.results.values() for name in test)}
        return tuple(sorted(names, key=_model_order))

    def test(self, name: str) -> dict[str, dict[str, Any]]:
        """Results of one test by model, in the order of `models`; empty if it was not done."""
        found = self.results.get(name, {})
        return {model: found[model] for model in self.models if model in found}

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the control students."""
        return tuple(name for name in self.models if name.startswith("control"))

    @property
    def target(self) -> str:
        """Whose labels errors are quoted against: "reference" if there are any, else "teacher"."""
        channels = [c for r in self.test("errors").values() for c in r.get("channels", {})]
        return "reference" if "student-reference" in channels else "teacher"

    def errors(self, model: str, target: str | None = None) -> dict[str, float]:
        """Metrics of a model against a target, by the keys of `potstill.metrics`."""
        wanted = f"{model}-{target or self.target}"
        for result in [self.test("errors").get(model, {}), *self.test("errors").values()]:
            if wanted in result.get("channels", {}):
                return _finite(result["channels"][wanted])
        return {}


def collect(folder: str | Path) -> ReportData:
    """Read what a run folder holds.

    Parameters
    ----------
    folder : path
        The folder of `potstill distill`.

    Returns
    -------
    ReportData

    Raises
    ------
    DataError
        If there is no such folder, or a JSON file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: a report needs the folder of a run")
    config, plan = _config(folder / "config.yaml"), _json(folder / "plan.json")
    results, problems = _results(folder / "evaluation")
    student, info = _potential(folder / "student.pt", folder / "student" / "best.pt")
    curves, parameters = {}, {}
    if student is not None:
        parameters["student"] = student
    for part in sorted(p.parent for p in folder.glob("*/metrics.jsonl")):
        curves[part.name] = (read_learning_curves(part),)
        if part.name not in parameters:
            number, other = _potential(part / "best.pt")
            info = info or other
            if number is not None:
                parameters[part.name] = number
    stages = _json(folder / "stages.json")
    about = _about(folder, config, info, stages, results)
    return ReportData(
        folder=folder,
        title=_title(info),
        about=about,
        results=results,
        problems=tuple(problems),
        # a draft that only explored is no result
        curves={name: c for name, c in curves.items() if not name.startswith("draft")},
        n_parameters=parameters,
        trained_on=info.get("trained_on") or {},
        plan=plan,
    )


def parity_points(
    prediction: Properties,
    label: Properties,
    structures: Structures,
    *,
    max_points: int = 3000,
    seed: int = 0,
) -> dict[str, Any]:
    """Pairs of labels and predictions for parity plots, a seeded sample where there are many.

    Parameters
    ----------
    prediction, label : Properties
        Of all of `structures`; what both have is taken.
    structures : Structures
        The held-out structures.
    max_points : int
        Pairs to keep of each property.
    seed : int
        Of the sample.

    Returns
    -------
    dict
        `energy` (eV/atom), `forces` (eV/Å, components), `atomic_energies` (eV), each
        `{"label": [...], "prediction": [...], "n": pairs before sampling}`; plain JSON.
    """
    points = {}
    for name in ("energy", "forces", "atomic_energies"):
        if name not in prediction or name not in label:
            continue
        present = prediction.presence(name, structures.n_systems)
        present = present & label.presence(name, structures.n_systems)
        n_atoms = structures.n_atoms_per_system.to(torch.float64)
        pair = [side[name].detach().to(torch.float64) for side in (label, prediction)]
        if property_spec(name).level == "atom":
            present = present[structures.system_index]
        elif name == "energy":
            pair = [side / n_atoms for side in pair]
        flat = torch.stack([side[present].flatten() for side in pair])
        flat = flat[:, torch.isfinite(flat).all(dim=0)]
        n = flat.shape[1]
        generator = torch.Generator().manual_seed(seed)
        flat = flat[:, torch.randperm(n, generator=generator)[:max_points].sort().values]
        points[name] = {"label": flat[0].tolist(), "prediction": flat[1].tolist(), "n": n}
    return points


# -- files -------------------------------------------------------------------------------------


def _results(folder: Path) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """Results by test and model, and sentences about tests that failed."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    problems = []
    for test in TESTS:
        for model, result in _json(folder / f"{test}.json").items():
            if not isinstance(result, dict):
                raise DataError(f"{folder / test}.json: the result of '{model}' is no JSON object")
            if set(result) == {"error"}:  # some results have a field of that name
                problems.append(f"The test “{test}” of the {model} was not done: {result['error']}")
            else:
                results.setdefault(test, {})[model] = result
    return results, problems


def _json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path}: not a JSON file ({error}); remove it and evaluate again"
        ) from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a JSON object by names, found a {type(content).__name__}"
        )
    return content


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = YAML(typ="safe", pure=True).load(path)
    return content if isinstance(content, dict) else {}


def _potential(*paths: Path) -> tuple[int | None, dict[str, Any]]:
    """Number of parameters of the first file there is, and what is known of it."""
    for path in paths:
        if path.is_file():
            try:
                potential, info = load_potential(path)
            except PotstillError:
                continue  # a damaged file is not a reason to withhold all other results
            return potential.n_parameters, info
    return None, {}


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else float(value) for key, value in metrics.items()}


# -- words -------------------------------------------------------------------------------------


def _title(info: Mapping[str, Any]) -> str:
    teacher = (info.get("teacher") or {}).get("name")
    elements = (info.get("trained_on") or {}).get("elements")
    title = f"{teacher} distilled" if teacher else "A distilled potential"
    return f"{title} for {'-'.join(elements)}" if elements else title


def _about(
    folder: Path,
    config: Mapping[str, Any],
    info: Mapping[str, Any],
    stages: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> dict[str, str]:
    teacher = info.get("teacher") or {}
    machine = next((r.get("machine") for r in results.get("speed", {}).values()), None) or {}
    versions = info.get("versions") or machine.get("versions") or {}
    seconds = {name: entry.get("seconds") for name, entry in stages.items() if entry}
    entries = {
        "Repeat with": _command(folder) if config else None,
        "Run": str(folder.resolve()),
        "Written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "Seed": str(config.get("seed", info.get("seed", ""))),
        "Trained on": _trained_on(info.get("trained_on") or {}),
        "Teacher": _joined(
            [teacher.get("name"), teacher.get("level_of_theory"), _known("fingerprint", teacher)]
        ),
        "Labels": _labels(folder / "labels.zarr"),
        "Licence": teacher.get("licence"),
        "Citation": teacher.get("citation"),
        "Versions": ", ".join(f"{name} {v}" for name, v in versions.items()),
        "Machine": _machine(machine),
        "Durations": ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items() if v is not None),
    }
    return {name: str(text) for name, text in entries.items() if text}


def _known(key: str, values: Mapping[str, Any]) -> str | None:
    return f"{key} {values[key]}" if values.get(key) else None


def _joined(parts: Sequence[str | None]) -> str:
    return "; ".join(part for part in parts if part and part != "unknown")


def _trained_on(known: Mapping[str, Any]) -> str:
    parts = []
    if known.get("n_frames"):
        parts.append(f"{known['n_frames']:,} structures of {', '.join(known.get('elements', ()))}")
    if known.get("temperature_K"):
        parts.append("{:g} to {:g} K".format(*known["temperature_K"]))
    if known.get("density_g_cm3"):
        parts.append("{:.3g} to {:.3g} g/cm³".format(*known["density_g_cm3"]))
    return "; ".join(parts)


def _command(folder: Path) -> str:
    """What does the run again; `config.yaml` holds all settings, defaults included."""
    return f"potstill distill --config {folder / 'config.yaml'} --out another-folder"


def _labels(path: Path) -> str:
    """Fingerprint of the labelled store, as far as there is one."""
    if not path.is_dir():
        return ""
    try:
        store = LabelledStore.open(path)
    except PotstillError:
        return ""
    return f"{store.n_systems:,} structures, fingerprint {store.fingerprint()}"


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return ""
    threads = machine.get("threads")
    parts = [machine.get("gpu"), machine.get("cpu"), f"{threads} threads" if threads else None]
    return _joined(parts)


def _model_order(name: str) -> tuple[int, str]:
    for k, start in enumerate(("student", "control", "teacher")):
        if name.startswith(start):
            return k, name
    return 3, name
