"""Rows of labels in a store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from potstill.errors import DataError
from potstill.properties import property_spec
from potstill.store.record import Columns, Record, atom_offsets, chain
from potstill.structures import Properties, Structures


def new_source(info: Mapping[str, Any]) -> Record:
    """Entry of an empty label set."""
    return {"info": dict(info), "properties": [], "n_done": 0, "n_failed": 0, "digest": ""}


def put_labels(
    columns: Columns,
    record: Record,
    source: str,
    start: int,
    properties: Properties,
    structures: Structures,
) -> None:
    """Write the labels of the systems from `start` on; the record already counts the systems."""
    own = record["sources"][source]
    first_atom = int(atom_offsets(columns, record, start, start)[0])
    for name in properties.names:
        row = first_atom if property_spec(name).level == "atom" else start
        value = properties[name].detach().double().numpy()
        mask = properties.presence(name, structures.n_systems).numpy()
        columns.write(record, f"labels/{source}/values/{name}", row, value, torch.nan)
        columns.write(record, f"labels/{source}/present/{name}", start, mask, False)
        if name in properties.weights:
            weight = properties.row_weights(name, structures).double().numpy()
            columns.write(record, f"labels/{source}/weights/{name}", row, weight, 1.0)
    own["properties"] = list(dict.fromkeys([*own["properties"], *properties.names]))
    own["n_done"] = start + structures.n_systems
    own["digest"] = chain(own["digest"], label_digests(properties, structures))


def get_labels(columns: Columns, record: Record, source: str, start: int, stop: int) -> Properties:
    """Read the labels of the systems start..stop-1; NaN and not present where absent."""
    offsets = atom_offsets(columns, record, start, stop)
    atoms = int(offsets[0]), int(offsets[-1])
    found: dict[str, dict[str, Tensor]] = {"values": {}, "present": {}, "weights": {}}
    for name in record["sources"][source]["properties"]:
        per_atom = property_spec(name).level == "atom"
        for kind, result in found.items():
            column = f"labels/{source}/{kind}/{name}"
            if column in record["columns"]:
                rows = atoms if per_atom and kind != "present" else (start, stop)
                result[name] = torch.from_numpy(columns.read(record, column, *rows))
    return Properties(**found)


def check_rows(properties: Properties, structures: Structures) -> None:
    """Refuse labels that do not fit the structures or are not finite where present."""
    for name in properties.names:
        level, rows = property_spec(name).level, structures.n_rows(name)
        value = properties[name]
        if value.shape[0] != rows:
            raise DataError(f"'{name}' has {value.shape[0]} rows for {rows} {level}s")
        mask = properties.presence(name, structures.n_systems)
        there = structures.per_row(name, mask)
        finite = value.reshape(rows, -1).isfinite().all(1)
        if bool((there & ~finite).any()):
            row = int((there & ~finite).nonzero()[0])
            system = row if level == "system" else int(structures.system_index[row])
            raise DataError(f"{structures.name_of(system)}: '{name}' is not finite")


def without(properties: Properties, structures: Structures, systems: Sequence[int]) -> Properties:
    """Mark all properties of some systems as absent, values NaN."""
    if not systems:
        return properties
    gone = torch.zeros(structures.n_systems, dtype=torch.bool)
    gone[list(systems)] = True
    values, present = {}, {}
    for name in properties.names:
        values[name] = properties[name].clone()
        values[name][structures.per_row(name, gone)] = torch.nan
        present[name] = properties.presence(name, structures.n_systems) & ~gone
    return replace(properties, values=values, present=present)


def label_digests(properties: Properties, structures: Structures) -> Iterator[bytes]:
    """One hash per system of the labels that it has, and of weights other than one."""
    offsets = structures.atom_offsets.tolist()
    columns = [
        (
            name,
            property_spec(name).level == "atom",
            properties[name].detach().double().numpy(),
            properties.presence(name, structures.n_systems).tolist(),
            properties.row_weights(name, structures).double().numpy(),
        )
        for name in sorted(properties.names)
    ]
    for s in range(structures.n_systems):
        digest = hashlib.blake2b(digest_size=16)
        for name, per_atom, values, present, weights in columns:
            rows = slice(offsets[s], offsets[s + 1]) if per_atom else slice(s, s + 1)
            if present[s]:
                digest.update(name.encode() + values[rows].tobytes())
            if (weights[rows] != 1).any():
                digest.update(b"weight " + name.encode() + weights[rows].tobytes())
        yield digest.digest()
