"""`potstill inspect`: what a path holds, in words and tables."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.checkpoint import load_potential
from potstill.errors import DataError
from potstill.evaluate.cka import CKAMatrix
from potstill.evaluate.table import EVALUATIONS
from potstill.metrics import force_key
from potstill.readers import read
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.workflows.base import Stages, read_json, seconds_in_words, trained_on
from potstill.workflows.evaluation import read_findings
from potstill.workflows.report import verdicts
from potstill.workflows.summary import result_rows, summarize, summary_rows


@dataclass(frozen=True)
class Card:
    """One table of `potstill inspect`."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: tuple[str, ...] = ("", "")


def inspect(path: str | Path) -> list[Card]:
    """Describe a label store, a checkpoint, a structure file, or the folder of any command.

    Raises
    ------
    DataError
        If it is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        for marker, describe in FOLDERS:
            if next(path.glob(marker), None) is not None:
                return describe(path)
        raise DataError(f"{path} is neither a label store nor a run folder")
    if path.suffix == ".pt":
        return _potential(path)
    structures, labels = read(path, allow_partial=True)
    return [Card(str(path), _structures(structures)), _labels("labels in the file", labels)]


def _items(values: Mapping[str, Any]) -> list[list[str]]:
    """A row for each key and its value in words, of which long ones are cut."""
    texts = {key: _text(value) for key, value in values.items()}
    return [[key, text if len(text) < 500 else f"{text[:500]} ..."] for key, text in texts.items()]


def _structures(structures: Structures) -> list[list[str]]:
    counts = structures.n_atoms_per_system
    known = trained_on(structures)
    groups = sorted(set(structures.group or ()) - {""})
    rows = [
        ["structures", str(structures.n_systems)],
        ["atoms", f"{structures.n_atoms} ({int(counts.min())} to {int(counts.max())} each)"],
        ["elements", ", ".join(known["elements"])],
        ["periodic along three axes", str(int(structures.pbc.all(dim=1).sum()))],
    ]
    if known["density_g_cm3"]:
        rows.append(["density", "{:.3f} to {:.3f} g/cm³".format(*known["density_g_cm3"])])
    if known["shortest_distances"]:
        pairs = [f"{pair} {value:.2f} Å" for pair, value in known["shortest_distances"].items()]
        rows.append(["shortest distances", ", ".join(pairs)])
    if groups:
        rows.append(["groups", ", ".join(groups[:12]) + (", ..." if len(groups) > 12 else "")])
    return rows


def _labels(title: str, labels: Properties) -> Card:
    rows = []
    for name, value in labels.values.items():
        present = labels.present.get(name)
        n = len(value) if present is None else int(present.sum())
        finite = value[~value.isnan()]
        spread = f"{float(finite.min()):.4g} to {float(finite.max()):.4g}" if len(finite) else "–"
        rows.append([name, str(n), spread])
    return Card(title, rows, ("property", "present", "range"))


def _store(path: Path) -> list[Card]:
    store = LabeledStore.open(path)
    about = [["fingerprint", store.fingerprint()], *_items(store.info)]
    cards = [Card(f"label store {path}", about)]
    if not store.n_systems:
        return cards
    cards.append(Card("structures", _structures(store.structures())))
    for source in store.sources:
        cards.append(_labels(f"labels of '{source}'", store.labels(source)))
        about = [row for row in _items(store.source_info(source)) if row[0] != "units"]
        failed = store.failures(source)
        about.append(["labeled", f"{store.n_labeled(source)} of {store.n_systems}"])
        about.append(["failed", str(len(failed))])
        about += [[f"  {f.get('frame_id') or f['system']}", f["reason"]] for f in failed[:5]]
        cards.append(Card(f"teacher '{source}'", about))
    return cards


def _potential(path: Path) -> list[Card]:
    potential, info = load_potential(path)
    rows = [
        ["kind", potential.kind],
        ["species", ", ".join(potential.species_table.names)],
        ["cutoff", f"{potential.cutoff:g} Å"],
        ["parameters", str(potential.n_parameters)],
    ]
    cards = [Card(f"potential {path}", rows)]
    for key in ("trained_on", "teacher", "training", "versions"):
        value = info.get(key)
        if isinstance(value, Mapping):
            cards.append(Card(key.replace("_", " "), _items(value)))
    return cards


def _training(path: Path) -> list[Card]:
    settings = read_json(path / "settings.json")
    model = settings["settings"]["model"]
    terms = [
        f"{t['weight'] if isinstance(t['weight'], float) else 'scheduled'} x "
        f"{t['property']}:{t['source']}"
        for t in settings["settings"]["loss"]
    ]
    rows = [["model", model["kind"]], ["loss", ", ".join(terms)]]
    if (path / "result.json").is_file():
        rows += _items(read_json(path / "result.json"))
    else:
        rows.append(["status", "not finished: run the same command to resume"])
    cards = [Card(f"training run {path}", rows)]
    if (path / "best.pt").is_file():
        cards += _potential(path / "best.pt")
    return cards


def _trainings(path: Path) -> list[Card]:
    """A study, or a training in stages: one line per training."""
    rows = []
    for file in sorted(path.glob("*/settings.json")):
        result = read_json(file.with_name("result.json"), {})
        status = str(result.get("status", "not finished"))
        rows.append([file.parent.name, status, _text(result.get("best_score", "–"))])
    return [Card(f"training runs in {path}", rows, ("run", "status", "best score"))]


def _study(path: Path) -> list[Card]:
    stored = read_json(path / "results.json")
    records = stored.get("runs") or stored.get("cells") or {}
    about = _items({key: stored[key] for key in ("study", "title", "date") if key in stored})
    rows = []
    for name, record in records.items():
        metrics = record.get("metrics", {})
        test: dict[str, float] = next((m for k, m in metrics.items() if "test" in k), {})
        error = test.get(force_key(test))
        rows.append([name, _text(record.get("n_parameters", "–")), _text(error or "–")])
    columns = ("run", "parameters", "test force RMSE (eV/Å)")
    return [Card(f"study {path}", about), Card("finished runs", rows, columns)]


def _dynamics(path: Path) -> list[Card]:
    with (path / "thermo.csv").open(encoding="utf-8") as file:
        thermo = list(csv.DictReader(file))
    rows = [["frames", str(len(thermo))]]
    for name in thermo[0] if thermo else ():
        values = [float(row[name]) for row in thermo if row[name]]
        if values:
            spread = f"{min(values):.4g} to {max(values):.4g}, mean {sum(values) / len(values):.4g}"
            rows.append([name, spread])
    structures, _ = read(path / "trajectory.extxyz", allow_partial=True)
    return [Card(f"molecular dynamics {path}", rows), Card("frames", _structures(structures))]


def _sampling(path: Path) -> list[Card]:
    structures, _ = read(path / "structures.extxyz", allow_partial=True)
    return [Card(f"sampled structures {path}", _structures(structures))]


def _unfinished_sampling(path: Path) -> list[Card]:
    folder = path / "jobs" if (path / "jobs").is_dir() else path
    jobs = read_json(folder / "plan.json")["jobs"]
    done = len(list(folder.glob("job_*.npz")))
    rows = [["finished jobs", f"{done} of {len(jobs)}"]]
    rows += [[job.get("name") or job["kind"], f"{job['n_frames']} frames"] for job in jobs]
    return [Card(f"sampling {path}: run the same command to resume", rows)]


def _evaluation(path: Path) -> list[Card]:
    found = read_findings(path)
    cards = [Card(f"evaluation {path}", result_rows(found), ("", "model", "value"))]
    lines = [[line] for line in (*verdicts(found), *found.problems)]
    return [*cards, Card("verdicts", lines, ("",))] if lines else cards


def _features(path: Path) -> list[Card]:
    matrix = CKAMatrix.from_json(read_json(path / "cka.json")["student_teacher"])
    rows = [
        [tap, *(f"{x:.3f}" for x in row)]
        for tap, row in zip(matrix.first, matrix.values, strict=True)
    ]
    return [Card(f"CKA {path} ({matrix.n_atoms} atoms)", rows, ("student", *matrix.second))]


def _epsilon(path: Path) -> list[Card]:
    stored = read_json(path / "epsilon.json")
    single = {key: value for key, value in stored.items() if not isinstance(value, list)}
    return [Card(f"epsilon scan {path}", _items(single))]


def _distillation(path: Path) -> list[Card]:
    cards = []
    if (path / "plan.json").is_file():
        plan = read_json(path / "plan.json")
        if "jobs" in plan:
            return _unfinished_sampling(path)
        cards.append(Card(f"distillation {path}: plan", _items(plan["counts"])))
    stages = Stages(path).seconds
    rows = [[name, seconds_in_words(seconds)] for name, seconds in stages.items()]
    cards.append(Card("finished stages", rows))
    if (path / "evaluation").is_dir() and (path / "student.pt").is_file():
        summary = summarize(path)
        lines = [[line] for line in (*summary.get("verdicts", ()), *summary.get("problems", ()))]
        cards.append(Card("verdicts", lines, ("",)))
        cards.append(Card("results", summary_rows(summary), ("", "model", "value")))
    return cards


#: What a folder is known by, the first that fits, and how it is described.
FOLDERS: tuple[tuple[str, Callable[[Path], list[Card]]], ...] = (
    ("stages.json", _distillation),
    ("plan.json", _distillation),
    ("zarr.json", _store),
    ("settings.json", _training),
    ("results.json", _study),
    ("thermo.csv", _dynamics),
    ("structures.extxyz", _sampling),
    ("jobs/plan.json", _unfinished_sampling),
    ("cka.json", _features),
    ("epsilon.json", _epsilon),
    ("*/settings.json", _trainings),
    *((f"{name}.json", _evaluation) for name in EVALUATIONS),
)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
