"""HDF5 files as ANI-1, ANI-1x and ANI-Al are published: Hartree, Å, one group per set of atoms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import DataError, require
from potstill.readers.base import (
    Frame,
    KeyMap,
    Units,
    by_part,
    needed,
    stacked_frames,
)

UNITS = Units("Hartree", "Angstrom", "Hartree/Angstrom", "Hartree/Bohr^3", "tension")

_USUAL = {
    "energy": ("energies", "energy"),
    "forces": ("forces", "force"),
    "stress": ("stress",),
    "atomic_energies": ("atomic_energies",),
}


def read_ani_h5(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Frames of all groups that hold coordinates, in the order of the groups' names.

    ANI-1x names its labels by level of theory (`wb97x_dz.energy`): a key map must choose one. It
    marks labels that were not computed by NaN: such frames lack the label.

    Raises
    ------
    OptionalDependencyError
        If h5py is not installed.
    DataError
        If it is not an HDF5 file or holds no coordinates.
    """
    h5py = require("h5py", extra="hdf5", purpose="to read HDF5 files")
    name = keys.positions or "coordinates"
    try:
        with h5py.File(path, "r") as file:
            sizes = {group.name: len(group[name]) for group in _leaves(file, name)}
    except OSError as error:
        raise DataError(f"{path} is not a readable HDF5 file: {error}") from error
    if not sizes:
        raise DataError(f"{path} has no group with '{name}'")
    chosen = by_part(list(sizes.values()), index)

    def frames() -> Iterator[Frame]:
        with h5py.File(path, "r") as file:
            for group, numbers in zip(sizes, chosen, strict=True):
                if numbers:
                    yield from _frames(path, file[group], numbers, keys)

    return frames(), UNITS


def _leaves(group: Any, positions: str) -> Iterator[Any]:
    """Groups that hold coordinates, depth first in the order of their names."""
    if positions in group and not hasattr(group[positions], "keys"):
        yield group
    for child in group.values():
        if hasattr(child, "keys"):
            yield from _leaves(child, positions)


def _frames(path: Path, held: Any, chosen: list[int], keys: KeyMap) -> Iterator[Frame]:
    """Read the chosen frames of one group; only the arrays that are needed are read."""
    name = held.name.strip("/")
    where = f"{path}, group '{name}'"
    species = needed(held, "species", keys, ("species", "atomic_numbers"), where)
    for frame in stacked_frames(
        held,
        keys,
        _USUAL,
        held[keys.positions or "coordinates"][()],
        species,
        chosen,
        where=where,
        frame_id=f"{path.name}/{name}",
        cell=keys.cell or "cell",
        group=name,
    ):
        labels = {label: v for label, v in frame.labels.items() if not np.isnan(v).all()}
        yield replace(frame, labels=labels)
