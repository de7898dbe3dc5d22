"""The main numbers of a distillation, from the files in its run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.checkpoint import load_potential
from potstill.workflows.base import Stages, read_json


def summarize(folder: Path) -> dict[str, Any]:
    """Gather the main numbers; what was not computed is left out.

    Returns
    -------
    dict
        `errors` (model to relative force RMSE and others), `nve` (model to drift in meV/atom and
        the shortest distance over that of the training data), `lattice_constant` in Å,
        `bulk_modulus` in GPa, `speed_ratio` by number of atoms, `seconds` by stage, `student.pt`
        (the `model` that it is, and the `validation_scores` by which it was chosen).
    """
    tests = {file.stem: read_json(file) for file in sorted((folder / "evaluation").glob("*.json"))}
    done = {
        test: {name: r for name, r in results.items() if set(r) != {"error"}}
        for test, results in tests.items()
    }
    eos = done.get("eos", {})
    choice = folder / "choice.json"
    summary = {
        "errors": {name: _errors(r) for name, r in done.get("errors", {}).items()},
        "nve": {name: _nve(r, folder / name) for name, r in done.get("nve", {}).items()},
        "lattice_constant": {name: r["cell_lengths"][0] for name, r in eos.items()},
        "bulk_modulus": {name: r["bulk_modulus"] for name, r in eos.items()},
        "speed_ratio": _speed_ratio(done.get("speed", {})),
        "seconds": Stages(folder).seconds,
        "student.pt": read_json(choice) if choice.is_file() else {},
    }
    return {key: value for key, value in summary.items() if value}


def summary_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """What was measured, for whom, and the value: for a table."""
    rows = []
    if "student.pt" in summary:
        model, scores = summary["student.pt"]["model"], summary["student.pt"]["validation_scores"]
        words = ", ".join(f"{name} {_number(score)}" for name, score in scores.items())
        rows.append(["student.pt: best validation score", model, words])
    for name, errors in summary.get("errors", {}).items():
        if "forces_relative_rmse" in errors:
            value = f"{100.0 * errors['forces_relative_rmse']:.2f} %"
            rows.append(["relative force RMSE", name, value])
        if "energy_per_atom_rmse" in errors:
            value = f"{1000.0 * errors['energy_per_atom_rmse']:.2f} meV/atom"
            rows.append(["energy RMSE", name, value])
    for name, nve in summary.get("nve", {}).items():
        words = f"{nve['drift_meV_per_atom']:+.3f} meV/atom in {nve['duration_ps']:g} ps"
        if not nve["stable"]:
            words = f"exploded after {nve['duration_ps']:g} ps"
        rows.append([f"NVE drift at {nve['temperature_K']:g} K", name, words])
        rows.append(["shortest distance / training", name, _number(nve["distance_ratio"])])
    for key, label, unit in (
        ("lattice_constant", "lattice constant", "Å"),
        ("bulk_modulus", "bulk modulus", "GPa"),
    ):
        for name, value in summary.get(key, {}).items():
            rows.append([label, name, f"{_number(value)} {unit}"])
    for size, ratio in summary.get("speed_ratio", {}).items():
        rows.append([f"MD speed, {size} atoms", "student / teacher", f"{ratio:.0f} x"])
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _errors(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics against whoever gave the labels."""
    channels = result["channels"]
    own = [metrics for name, metrics in channels.items() if not name.startswith("teacher-")]
    return dict(own[0]) if own else {}


def _nve(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Drift, and how close atoms came compared with the training data."""
    trained = load_potential(folder / "best.pt")[1]["trained_on"]["shortest_distances"]
    met = result["shortest_distances"]
    ratios = [met[pair] / trained[pair] for pair in met if met[pair] and trained.get(pair)]
    return {
        "drift_meV_per_atom": result["drift"],
        "slope_meV_per_atom_ps": result["slope"],
        "duration_ps": result["duration"],
        "temperature_K": result["temperature"],
        "stable": result["exploded_at"] is None,
        "distance_ratio": min(ratios, default=None),
    }


def _speed_ratio(results: Mapping[str, Any]) -> dict[str, float]:
    """How many times faster the student is than the teacher, by number of atoms."""
    times = {
        name: {row["n_atoms"]: row["seconds_per_step"] for row in result["rows"]}
        for name, result in results.items()
    }
    student, teacher = times.get("student", {}), times.get("teacher", {})
    return {str(n): teacher[n] / student[n] for n in student if n in teacher}
