"""Rows of structures in a store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from potstill.errors import DataError
from potstill.species import SpeciesTable, merge_species_tables
from potstill.store.record import ATOM_COLUMNS, TEXTS, Columns, Record, atom_offsets, chain
from potstill.structures import NEUTRAL, Structures

#: Optional fields of structures, with the type in the store.
_OPTIONAL = {
    "velocities": np.dtype("f8"),
    "fixed": np.dtype("?"),
    "tags": np.dtype("i8"),
    "charge": np.dtype("f8"),
    "spin_multiplicity": np.dtype("f8"),
}


def species_table(record: Record) -> SpeciesTable:
    """Species of the structures; elements sorted unless the table was given to `create`."""
    table = SpeciesTable.from_json(record["species"])
    return table if record["species_are_fixed"] else merge_species_tables([table])


def put_structures(columns: Columns, record: Record, structures: Structures) -> None:
    """Write the rows of structures behind all others, and count them."""
    table = SpeciesTable.from_json(record["species"])
    if not record["species_are_fixed"]:
        # New species go to the end, so that indices on disk keep their meaning.
        new = [e for e in structures.species_table.entries if e.name not in table.names]
        table = SpeciesTable((*table.entries, *new))
        record["species"] = table.to_json()
    for entry in structures.species_table.entries:
        if entry.name in table.names and table.entries[table.index(entry.name)] != entry:
            raise DataError(
                f"the species '{entry.name}' has another mass or atomic number in the store"
            )
    structures = structures.with_species_table(table)
    frame, atom = record["n_systems"], record["n_atoms"]
    rows: dict[str, tuple[np.ndarray, Any]] = {
        "positions": (structures.positions.numpy(), np.nan),
        "species": (structures.species.numpy().astype("i4"), 0),
        "atom_end": (atom + structures.atom_offsets[1:].numpy(), 0),
        "cell": (structures.cell.numpy(), np.nan),
        "pbc": (structures.pbc.numpy(), False),
        "fingerprint": (np.array([int(x, 16) for x in structures.fingerprints()], "u8"), 0),
    }
    for name, dtype in _OPTIONAL.items():
        value = getattr(structures, name)
        if value is not None:
            rows[name] = (value.numpy().astype(dtype), NEUTRAL[name])
    for name, (values, fill) in rows.items():
        start = atom if name in ATOM_COLUMNS else frame
        columns.write(record, f"structures/{name}", start, values, fill)
    for name in TEXTS:
        texts = getattr(structures, name)
        if texts is not None:
            columns.write_texts(record, f"structures/{name}", frame, texts)
    record["digest"] = chain(record["digest"], structure_digests(structures))
    record["n_systems"] += structures.n_systems
    record["n_atoms"] += structures.n_atoms


def get_structures(columns: Columns, record: Record, start: int, stop: int) -> Structures:
    """Read the systems start..stop-1."""
    table = species_table(record)
    if not record["n_systems"]:
        return Structures.from_ase([], table=table)
    offsets = atom_offsets(columns, record, start, stop)
    first, last = int(offsets[0]), int(offsets[-1])

    def read(name: str) -> torch.Tensor:
        rows = (first, last) if name in ATOM_COLUMNS else (start, stop)
        return torch.from_numpy(columns.read(record, f"structures/{name}", *rows))

    fields: dict[str, Any] = {
        name: read(name) for name in _OPTIONAL if f"structures/{name}" in record["columns"]
    }
    for name in TEXTS:
        if record["columns"].get(f"structures/{name}_bytes"):
            fields[name] = columns.read_texts(record, f"structures/{name}", start, stop)
    counts = torch.from_numpy(np.diff(offsets))
    structures = Structures(
        positions=read("positions"),
        species=read("species").long(),
        system_index=torch.repeat_interleave(torch.arange(stop - start), counts),
        cell=read("cell"),
        pbc=read("pbc"),
        species_table=SpeciesTable.from_json(record["species"]),
        **fields,
    )
    return structures.with_species_table(table)


def get_fingerprints(columns: Columns, record: Record, start: int, stop: int) -> list[str]:
    """Return `Structures.fingerprints` of the systems start..stop-1, without reading them."""
    if stop <= start:
        return []
    rows = columns.read(record, "structures/fingerprint", start, stop)
    return [f"{x:016x}" for x in rows.tolist()]


def structure_digests(structures: Structures) -> Iterator[bytes]:
    """One hash per system, the same whatever the order of the species table.

    Optional fields with neutral values do not count: a store adds them when other frames need it.
    """
    offsets = structures.atom_offsets.tolist()
    prints = structures.fingerprints()
    for s in range(structures.n_systems):
        digest = hashlib.blake2b(prints[s].encode(), digest_size=16)
        for name in TEXTS:
            texts = getattr(structures, name)
            digest.update(f"{name}={texts[s] if texts is not None else ''}\n".encode())
        for name, dtype in _OPTIONAL.items():
            value = getattr(structures, name)
            if value is None:
                continue
            rows = slice(offsets[s], offsets[s + 1]) if name in ATOM_COLUMNS else slice(s, s + 1)
            array = value[rows].numpy().astype(dtype)
            if not np.array_equal(array, np.full_like(array, NEUTRAL[name]), dtype.kind == "f"):
                digest.update(name.encode() + array.tobytes())
        yield digest.digest()
