"""HDF5 files as ANI-1, ANI-1x and ANI-Al are published: Hartree, Å, one group per set of atoms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import DataError, require
from potstill.readers.base import Frame, KeyMap, Units, atomic_numbers_of, cells_of, pick_label

UNITS = Units("Hartree", "Angstrom", "Hartree/Angstrom", "Hartree/Bohr^3", "tension")

_USUAL = {
    "energy": ("energies", "energy"),
    "forces": ("forces", "force"),
    "stress": ("stress",),
    "atomic_energies": ("atomic_energies",),
    "charges": (),
    "dipole": (),
    "virial": (),
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
    chosen = np.arange(sum(sizes.values()))[index]

    def frames() -> Iterator[Frame]:
        start = 0
        with h5py.File(path, "r") as file:
            for group, size in sizes.items():
                low, high = np.searchsorted(chosen, (start, start + size))
                yield from _frames(path, file[group], chosen[low:high] - start, keys)
                start += size

    return frames(), UNITS


def _leaves(group: Any, positions: str) -> Iterator[Any]:
    """Groups that hold coordinates, depth first in the order of their names."""
    if positions in group and not hasattr(group[positions], "keys"):
        yield group
    for child in group.values():
        if hasattr(child, "keys"):
            yield from _leaves(child, positions)


def _frames(path: Path, held: Any, chosen: np.ndarray, keys: KeyMap) -> Iterator[Frame]:
    """Read the chosen frames of one group; only the arrays that are needed are read."""
    if len(chosen) == 0:
        return
    name = held.name.strip("/")
    where = f"{path}, group '{name}'"
    positions = held[keys.positions or "coordinates"][()]
    if positions.ndim != 3 or positions.shape[2] != 3:
        raise DataError(
            f"{where}: 'coordinates' has shape {positions.shape}, not (frames, atoms, 3)"
        )
    n_frames, n_atoms = positions.shape[:2]
    numbers = _atomic_numbers(held, keys, where)
    if len(numbers) != n_atoms:
        raise DataError(f"{where}: {len(numbers)} species for {n_atoms} atoms")
    labels: dict[str, np.ndarray] = {}
    for label, usual in _USUAL.items():
        dataset = pick_label(held, label, keys, usual, where)
        if dataset is None:
            continue
        if len(dataset.shape) == 0 or dataset.shape[0] != n_frames:
            raise DataError(f"{where}: '{label}' has shape {dataset.shape} for {n_frames} frames")
        labels[label] = dataset[()]
    cell, pbc = _cells(held, keys, n_frames, where)
    for k in chosen.tolist():
        yield Frame(
            where=f"{where}, frame {k}",
            frame_id=f"{path.name}/{name}:{k}",
            numbers=numbers,
            positions=positions[k],
            cell=cell[k],
            pbc=pbc[k],
            labels={label: v[k] for label, v in labels.items() if not np.isnan(v[k]).all()},
            keys=tuple(held),
            group=name,
        )


def _atomic_numbers(held: Mapping[str, Any], keys: KeyMap, where: str) -> np.ndarray:
    value = pick_label(held, "species", keys, ("species", "atomic_numbers"), where)
    if value is None:
        wanted = keys.species or "species' or 'atomic_numbers"
        raise DataError(f"{where} has no '{wanted}'; it holds {', '.join(held)}")
    return atomic_numbers_of(value[()], where)


def _cells(
    held: Mapping[str, Any], keys: KeyMap, n_frames: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    name = keys.cell or "cell"
    if name not in held:
        if keys.cell:
            raise DataError(f"{where} has no '{keys.cell}'; it holds {', '.join(held)}")
        return cells_of(None, None, n_frames, where)
    periodic = held.get(keys.pbc or "pbc")
    pbc = None if periodic is None else periodic[()]
    return cells_of(held[name][()], pbc, n_frames, f"{where}: '{name}'")
