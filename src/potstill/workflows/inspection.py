"""`potstill inspect`: what a path holds, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.checkpoint import load_potential
from potstill.errors import DataError
from potstill.readers import read
from potstill.store import LabelledStore
from potstill.structures import Properties, Structures
from potstill.workflows.base import Stages, read_json, seconds_in_words, trained_on
from potstill.workflows.summary import summarize, summary_rows


@dataclass(frozen=True)
class Card:
    """One table of an inspection."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: tuple[str, ...] = ("", "")


def inspect(path: str | Path) -> list[Card]:
    """Describe a labelled store, a checkpoint, a run folder or a structure file.

    Raises
    ------
    DataError
        If it is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        if (path / "stages.json").is_file() or (path / "plan.json").is_file():
            return _run(path)
        if (path / "settings.json").is_file():
            return _training(path)
        if (path / "zarr.json").is_file():
            return _store(path)
        raise DataError(f"{path} is neither a labelled store nor a run folder")
    if path.suffix == ".pt":
        return _potential(path)
    structures, labels = read(path, allow_partial=True)
    return [Card(str(path), _structures(structures)), _labels("labels in the file", labels)]


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
        rows.append(["shortest distances", _pairs(known["shortest_distances"])])
    if groups:
        rows.append(["groups", ", ".join(groups[:12]) + (", ..." if len(groups) > 12 else "")])
    return rows


def _pairs(distances: Mapping[str, float]) -> str:
    return ", ".join(f"{pair} {value:.2f} Å" for pair, value in distances.items())


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
    store = LabelledStore.open(path)
    rows = [["fingerprint", store.fingerprint()]]
    rows += [[key, _text(value)] for key, value in store.info.items()]
    cards = [Card(f"labelled store {path}", rows)]
    if not store.n_systems:
        return cards
    cards.append(Card("structures", _structures(store.structures())))
    for source in store.sources:
        info = store.source_info(source)
        cards.append(_labels(f"labels of '{source}'", store.labels(source)))
        about = [[key, _text(value)] for key, value in info.items() if key != "units"]
        failed = store.failures(source)
        about.append(["labelled", f"{store.n_labelled(source)} of {store.n_systems}"])
        about.append(["failed", str(len(failed))])
        about += [[f"  {f.get('frame_id') or f['system']}", f["reason"]] for f in failed[:5]]
        cards.append(Card(f"who gave '{source}'", about))
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
            cards.append(Card(key.replace("_", " "), [[k, _text(v)] for k, v in value.items()]))
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
        rows += [[key, _text(value)] for key, value in read_json(path / "result.json").items()]
    else:
        rows.append(["status", "not finished: the same command continues"])
    cards = [Card(f"training run {path}", rows)]
    if (path / "best.pt").is_file():
        cards += _potential(path / "best.pt")
    return cards


def _run(path: Path) -> list[Card]:
    cards = []
    if (path / "plan.json").is_file():
        plan = read_json(path / "plan.json")
        rows = [[key, _text(value)] for key, value in plan["counts"].items()]
        cards.append(Card(f"distillation {path}: plan", rows))
    stages = Stages(path).seconds
    rows = [[name, seconds_in_words(seconds)] for name, seconds in stages.items()]
    cards.append(Card("finished stages", rows))
    if (path / "evaluation").is_dir() and (path / "student.pt").is_file():
        rows = summary_rows(summarize(path))
        cards.append(Card("results", rows, ("", "model", "value")))
    return cards


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
