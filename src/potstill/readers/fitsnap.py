"""FitSNAP's JSON files: one configuration each, folders as groups; and the check of their stress.

Published sets state a unit of stress in every file, and some state it wrongly. Where a set scans
the volume of a cell, dE = -P dV tells the unit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from potstill.errors import DataError, suggest
from potstill.readers.base import Frame, KeyMap, Units, species_numbers
from potstill.structures import Properties, Structures
from potstill.units import PRESSURE, pressure_factor

#: What FitSNAP's *Style entries mean, by the unit that they set.
_STYLES: dict[str, dict[str, str]] = {
    "EnergyStyle": {"electronvolt": "eV", "hartree": "Hartree"},
    "ForcesStyle": {"electronvoltperangstrom": "eV/Angstrom", "hartreeperbohr": "Hartree/Bohr"},
    "StressStyle": {"bar": "bar", "kb": "kB", "kilobar": "kB", "gpa": "GPa", "gigapascal": "GPa"},
    "PositionsStyle": {"angstrom": "Angstrom", "bohr": "Bohr"},
    "LatticeStyle": {"angstrom": "Angstrom", "bohr": "Bohr"},
}

_KEYS = {"energy": "Energy", "forces": "Forces", "stress": "Stress"}


def read_fitsnap(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """Configurations of a JSON file, or of all JSON files in a folder and its subfolders.

    The group of a configuration is the name of the folder that holds its file. Frames come in
    natural order of the paths (BCC_2 before BCC_10).

    Raises
    ------
    DataError
        If there is no JSON file, or one is broken, or the files do not share their units.
    """
    files = sorted(path.rglob("*.json"), key=_natural) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no JSON files")
    loaded = [(file, k, data, n) for file in files for k, data, n in _load(file)]
    styles: dict[str, str] = {}
    for file, _, dataset, _ in loaded:
        _merge_styles(styles, dataset, file)
    length = styles.get("PositionsStyle", "Angstrom")
    if styles.get("LatticeStyle", length) != length:
        raise DataError(
            f"{path} gives the lattice in {styles['LatticeStyle']} and positions in {length}"
        )
    units = Units(
        energy=styles.get("EnergyStyle", "eV"),
        length=length,
        force=styles.get("ForcesStyle", "eV/Angstrom"),
        stress=styles.get("StressStyle", "bar"),
        positive_stress="compression",
    )
    return (_frame(*entry, path, keys) for entry in loaded[index]), units


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]


def _load(file: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(position, data set, number of configurations) of each configuration of a file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    # The first line may be a comment of any form.
    body = text if text.lstrip().startswith("{") else text.partition("\n")[2]
    if not body.strip():
        raise DataError(f"{file} is empty")
    try:
        dataset = json.loads(body, object_pairs_hook=lambda pairs: _unique(pairs, file))["Dataset"]
        count = len(dataset["Data"])
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not complete JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is not a FitSNAP file: it has no Dataset with Data") from error
    for k in range(count):
        yield k, dataset, count


def _unique(pairs: Sequence[tuple[str, Any]], file: Path) -> dict[str, Any]:
    result = dict(pairs)
    for key in result:
        if sum(name == key for name, _ in pairs) > 1:
            raise DataError(f"{file} has the key '{key}' twice")
    return result


def _merge_styles(styles: dict[str, str], dataset: Mapping[str, Any], file: Path) -> None:
    for name, known in _STYLES.items():
        if name not in dataset:
            continue
        stated = str(dataset[name])
        if stated.lower() not in known:
            raise DataError(f"{file}: {name} is '{stated}'{suggest(stated.lower(), known)}")
        unit = known[stated.lower()]
        if styles.setdefault(name, unit) != unit:
            raise DataError(
                f"{file}: {name} is {unit}, but {styles[name]} in earlier files: read them "
                f"separately"
            )


def _frame(
    file: Path, k: int, dataset: Mapping[str, Any], count: int, root: Path, keys: KeyMap
) -> Frame:
    data = dataset["Data"][k]
    where = str(file) if count == 1 else f"{file}, frame {k}"
    for key in ("Positions", "AtomTypes", "Lattice"):
        if key not in data:
            raise DataError(f"{where} has no '{key}'; it holds {', '.join(data)}")
    symbols = data["AtomTypes"]
    if data.get("NumAtoms", len(symbols)) != len(symbols):
        raise DataError(f"{where}: NumAtoms is {data['NumAtoms']} for {len(symbols)} AtomTypes")
    names = {name: getattr(keys, name) or usual for name, usual in _KEYS.items()}
    name = str(file.relative_to(root)) if root.is_dir() else file.name
    numbers, beads = species_numbers([str(symbol) for symbol in symbols], keys, where)
    return Frame(
        where=where,
        frame_id=f"{name}:{k}",
        numbers=numbers,
        positions=data["Positions"],
        cell=data["Lattice"],
        pbc=np.ones(3, dtype=bool),
        labels={label: data[key] for label, key in names.items() if key in data},
        keys=tuple(data),
        group=file.parent.name,
        beads=beads,
    )


# -- the unit of stress ---------------------------------------------------------------------------


@dataclass(frozen=True)
class StressCheck:
    """How well stresses agree with the energies of volume scans of a group.

    Parameters
    ----------
    n_pairs : int
        Pairs of neighboring volumes that were compared.
    ratio : float
        Median over pairs of (work of the stresses) / (difference of the energies); 1 if they
        agree.
    unit, positive_stress : str
        The unit that brings the ratio closest to 1, None if none brings it within a quarter; and
        what a positive number means then.
    """

    group: str
    n_pairs: int
    ratio: float
    unit: str | None
    positive_stress: str


def check_stress_unit(
    structures: Structures,
    properties: Properties,
    unit: str = "eV/A^3",
    positive_stress: str = "tension",
) -> list[StressCheck]:
    """Find the unit of stress in which -dE/dV fits, from frames that are scaled copies.

    Parameters
    ----------
    structures : Structures
        Frames with groups; those without full periodicity are left out.
    properties : Properties
        energy and stress, converted as if they had been in `unit`.
    unit, positive_stress : str
        What the stresses were converted from.

    Returns
    -------
    list of StressCheck
        One per group that has a volume scan; empty if there is none.
    """
    usable = structures.pbc.all(1)
    for name in ("energy", "stress"):
        usable &= properties.presence(name, structures.n_systems)
    ratios: dict[str, list[float]] = {}
    for group, scan in _volume_scans(structures, usable):
        found = _work_ratios(structures.volume[scan], properties, scan, structures)
        ratios.setdefault(group, []).extend(found)
    assumed = pressure_factor(unit) * (-1 if positive_stress == "compression" else 1)
    return [_judge(group, values, assumed) for group, values in ratios.items() if values]


def _volume_scans(structures: Structures, usable: Tensor) -> Iterator[tuple[str, list[int]]]:
    """Sets of frames of one group that are the same crystal at several volumes."""
    groups = structures.group or ("",) * structures.n_systems
    offsets = structures.atom_offsets.tolist()
    scans: list[tuple[str, np.ndarray, np.ndarray, np.ndarray, list[int]]] = []
    for s in usable.nonzero().flatten().tolist():
        part = slice(offsets[s], offsets[s + 1])
        cell = structures.cell[s].numpy()
        shape = cell / abs(np.linalg.det(cell)) ** (1 / 3)
        fractional = np.linalg.solve(cell.T, structures.positions[part].numpy().T).T
        species = structures.species[part].numpy()
        for group, other, points, kinds, members in scans:
            if group != groups[s] or not np.array_equal(kinds, species):
                continue
            apart = fractional - points
            if np.abs(shape - other).max() < 1e-4 and np.abs(apart - apart.round()).max() < 1e-4:
                members.append(s)
                break
        else:
            scans.append((groups[s], shape, fractional, species, [s]))
    for group, *_, members in scans:
        if len(members) > 1:
            yield group, sorted(members, key=lambda s: float(structures.volume[s]))


def _work_ratios(
    volume: Tensor, properties: Properties, scan: Sequence[int], structures: Structures
) -> list[float]:
    """Work of the stresses (trapezoidal rule) over the rise of energy, per pair of volumes."""
    energy = properties["energy"][list(scan)]
    pull = properties["stress"][list(scan)].diagonal(dim1=1, dim2=2).mean(1)  # dE/dV
    n_atoms = int(structures.n_atoms_per_system[scan[0]])
    step, rise = volume.diff(), energy.diff()
    work = 0.5 * (pull[1:] + pull[:-1]) * step
    # Coarse steps integrate badly; flat ones, near the minimum, divide noise by noise.
    good = (
        (volume[1:] / volume[:-1] < 1.5)
        & (volume[1:] / volume[:-1] > 1.001)
        & (rise.abs() > 1e-3 * n_atoms)
    )
    return (work[good] / rise[good]).tolist()


def _judge(group: str, ratios: Sequence[float], assumed: float) -> StressCheck:
    ratio = float(np.median(ratios))
    sign = -1.0 if ratio < 0 else 1.0
    fitted = {name: abs(ratio) * factor / abs(assumed) for name, factor in PRESSURE.items()}
    best = min(fitted, key=lambda name: abs(np.log(fitted[name] + 1e-300)))
    unit = best if 0.8 < fitted[best] < 1.25 else None
    positive = "tension" if sign * assumed > 0 else "compression"
    return StressCheck(group, len(ratios), ratio, unit, positive)
