"""What all readers share: key maps, units, frames, and the checks that every file must pass.

A reader turns a file into frames, in the units of the file. `gather` checks the frames, converts
them and joins them into one batch, so that a fault is found and worded once for all formats.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from ase.data import atomic_numbers as _NUMBERS
from ase.data import chemical_symbols

from potstill import units as conversion
from potstill.errors import ConfigError, DataError, MissingLabelError
from potstill.neighbors import check_cell, system_pairs
from potstill.properties import PROPERTIES, property_spec
from potstill.species import Species, SpeciesTable
from potstill.structures import NEUTRAL, Properties, Structures


class DataWarning(UserWarning):
    """Data were read, but something about them should be checked."""


@dataclass(frozen=True)
class KeyMap:
    """Names under which a file holds labels and structures; None means the format's usual name.

    A label that is named here is asked for: a file without it is refused.

    Parameters
    ----------
    energy, forces, stress, atomic_energies, charges, dipole : str, optional
        Labels.
    virial : str, optional
        Where the file holds a virial instead of a stress: stress = -virial / volume.
    group : str, optional
        Name of a frame's group (ASE formats: an `info` key, usually `config_type`).
    species : str, optional
        Column or array of chemical symbols, names of beads or atomic numbers.
    positions, cell, pbc : str, optional
        Arrays of a structure (NumPy archives and HDF5 only).
    types : str, optional
        Elements or beads by the numeric atom types of LAMMPS, type 1 first: "Al Cu".
    beads : str, optional
        Names of beads, which are no elements, and their masses in amu where the file has none:
        "W 72.06, C 15.03". A name that is also a chemical symbol means the bead.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    atomic_energies: str | None = None
    charges: str | None = None
    dipole: str | None = None
    virial: str | None = None
    group: str | None = None
    positions: str | None = None
    species: str | None = None
    cell: str | None = None
    pbc: str | None = None
    types: str | None = None
    beads: str | None = None

    @property
    def bead_species(self) -> tuple[Species, ...]:
        """The beads that are named.

        Raises
        ------
        ConfigError
            If a mass is missing, or no positive number.
        """
        words = (self.beads or "").replace(",", " ").split()
        try:
            found = tuple(
                Species(n, float(m)) for n, m in zip(words[::2], words[1::2], strict=True)
            )
        except ValueError:
            found = ()
        if words and (not found or not all(0.0 < bead.mass < math.inf for bead in found)):
            raise ConfigError(
                f"beads '{self.beads}' are not names, each with its mass in amu, as in "
                "KeyMap(beads='W 72.06, C 15.03') (in a config: keys: {beads: ...})"
            )
        return found

    @property
    def labels(self) -> dict[str, str]:
        """Labels that are named explicitly, with their names in the file."""
        named = {name: getattr(self, name) for name in LABELS}
        return {name: key for name, key in named.items() if key is not None}


@dataclass(frozen=True)
class Units:
    """Units of a file; None means the format's own.

    Parameters
    ----------
    energy : str, optional
        A name from `potstill.units.ENERGY`; also the unit of atomic energies and virials.
    length : str, optional
        A name from `potstill.units.LENGTH`; also the unit of cells and of dipoles (e times it).
    force : str, optional
        `<energy>/<length>`; follows from the two above if they are given and this is not.
    stress : str, optional
        A name from `potstill.units.PRESSURE`.
    positive_stress : {"tension", "compression"}, optional
        What a positive diagonal element means; ASE and potstill say tension.
    stress_order : str, optional
        What the numbers are where a stress or virial has six: ASE's is "xx yy zz yz xz xy", which
        is taken in ASE's formats, VASP's is "xx yy zz xy yz zx".
    """

    energy: str | None = None
    length: str | None = None
    force: str | None = None
    stress: str | None = None
    positive_stress: Literal["tension", "compression"] | None = None
    stress_order: str | None = None

    def over(self, default: Units) -> Units:
        """Fill what is not given from the units of a format.

        Raises
        ------
        ConfigError
            If a unit is unknown or not stated.
        """
        stated = {name: value for name, value in vars(self).items() if value is not None}
        values = vars(default) | stated
        if self.force is None and (self.energy or self.length):
            values["force"] = f"{values['energy']}/{values['length']}"
        merged = Units(**values)
        for name, value in values.items():
            if value is None and name != "stress_order":
                raise ConfigError(
                    f"the file does not say its unit of {name}: state it, as in "
                    f"Units(energy='eV', length='Angstrom')"
                )
        if merged.positive_stress not in ("tension", "compression"):
            raise ConfigError(
                f"positive_stress must be 'tension' or 'compression', "
                f"not '{merged.positive_stress}'"
            )
        merged.factors()
        if merged.stress_order is not None:
            merged.stress_positions()
        return merged

    def stress_positions(self) -> list[tuple[int, int]]:
        """Row and column of each of the six numbers of a stress or virial.

        Raises
        ------
        ConfigError
            If `stress_order` is not an order of the six.
        """
        words = (self.stress_order or "").replace(",", " ").split()
        places = [tuple(sorted("xyz".find(letter) for letter in word)) for word in words]
        if sorted(places) != [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]:
            raise ConfigError(
                f"stress_order '{self.stress_order}' is not an order of xx, yy, zz, yz, xz and xy"
            )
        return [(place[0], place[1]) for place in places]

    def factors(self) -> dict[str, float]:
        """Factor per quantity that turns numbers of the file into potstill's units."""
        energy = conversion.energy_factor(self.energy or "eV")
        length = conversion.length_factor(self.length or "Angstrom")
        sign = -1.0 if self.positive_stress == "compression" else 1.0
        return {
            "length": length,
            "energy": energy,
            "atomic_energies": energy,
            "virial": energy,
            "forces": conversion.force_factor(self.force or "eV/Angstrom"),
            "stress": sign * conversion.pressure_factor(self.stress or "eV/A^3"),
            "charges": 1.0,
            "dipole": length,
        }


#: ASE's units, which are potstill's.
ASE_UNITS = Units("eV", "Angstrom", "eV/Angstrom", "eV/A^3", "tension", "xx yy zz yz xz xy")

#: Labels that a file can hold.
LABELS = ("energy", "forces", "stress", "atomic_energies", "charges", "dipole", "virial")


@dataclass(frozen=True)
class Frame:
    """One configuration as a file holds it, in the file's units.

    Parameters
    ----------
    where : str
        Place for messages: "path, frame 12".
    frame_id : str
        Short name kept with the data: "file.xyz:12".
    numbers : ndarray
        (n,) atomic numbers; -1, -2, ... for the first, second, ... of `beads`.
    positions, cell, pbc : ndarray
        (n, 3), (3, 3) rows, (3,).
    labels : mapping of str to array
        Labels by their names in potstill (or "virial"), in whatever shape the file has them.
    keys : tuple of str
        Names of everything the file holds here, for suggestions.
    group : str
        Empty if there is none.
    fixed, tags, velocities, charge, spin_multiplicity : optional
        As in `Structures`; velocities already in Å/fs.
    left_out : tuple of str
        Labels that the file holds here and that mean nothing: a stress without periodicity.
    beads : tuple of Species
        Species without an atomic number that may occur here.
    """

    where: str
    frame_id: str
    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    labels: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    group: str = ""
    fixed: np.ndarray | None = None
    tags: np.ndarray | None = None
    velocities: np.ndarray | None = None
    charge: float | None = None
    spin_multiplicity: float | None = None
    left_out: tuple[str, ...] = ()
    beads: tuple[Species, ...] = ()


@dataclass(frozen=True)
class Checks:
    """Requirements on a file, as in `read`."""

    require: Sequence[str] = ()
    allow_partial: bool = False
    species: SpeciesTable | None = None
    min_distance: float = 0.3


def pick_label(
    held: Mapping[str, Any], name: str, keys: KeyMap, usual: Sequence[str], where: str
) -> Any | None:
    """Return the value of one label, from its name in the key map or from its usual names.

    Raises
    ------
    DataError
        If two of the usual names are there, so that the choice would be a guess.
    """
    explicit = getattr(keys, name, None)
    if explicit is not None:
        return held.get(explicit)
    found = [key for key in usual if key in held]
    if len(found) > 1:
        raise DataError(
            f"{where} holds {_quoted(found)}, which could all be '{name}': "
            f"name one of them in the key map"
        )
    return held[found[0]] if found else None


def pick_labels(
    held: Mapping[str, Any], keys: KeyMap, usual: Mapping[str, Sequence[str]], where: str
) -> dict[str, Any]:
    """Labels that are there, by their names in potstill; as `pick_label`."""
    names = dict.fromkeys((*LABELS, *usual))
    found = {name: pick_label(held, name, keys, usual.get(name, ()), where) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def needed(
    held: Mapping[str, Any], name: str, keys: KeyMap, usual: Sequence[str], where: str
) -> np.ndarray:
    """An array of a structure; as `pick_label`, and refused if it is not there."""
    value = pick_label(held, name, keys, usual, where)
    if value is None:
        wanted = getattr(keys, name) or "' or '".join(usual)
        raise DataError(f"{where} has no '{wanted}'; it holds {', '.join(held) or 'nothing'}")
    return value[()]


def species_numbers(
    values: Any, keys: KeyMap, where: str, masses: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[Species, ...]]:
    """Atomic numbers and beads of a `Frame`, in the shape of the values.

    Parameters
    ----------
    values : array_like
        Chemical symbols and names of beads, text or bytes, or whole numbers.
    keys : KeyMap
        Its beads are known.
    where : str
        For messages.
    masses : ndarray, optional
        amu, in the shape of the values: what is no chemical symbol is then a bead, too.

    Raises
    ------
    DataError
        If a value is neither a chemical symbol nor a bead whose mass is known.
    """
    values = np.asarray(values)
    if values.dtype.kind in "iuf":
        return values.astype(np.int64), ()
    names = values.astype(bytes).astype(str) if values.dtype.kind == "S" else values
    kinds, first, place = np.unique(names.astype(str), return_index=True, return_inverse=True)
    beads = {bead.name: bead for bead in keys.bead_species}
    numbers = []
    for name, k in zip(kinds.tolist(), first.tolist(), strict=True):
        if name not in beads and _NUMBERS.get(name, 0) == 0:
            if masses is None:
                raise DataError(
                    f"{where}: '{name}' is not a chemical symbol; if it is a bead, give its mass "
                    f"in amu, as in KeyMap(beads='{name} 72.06')"
                )
            beads[name] = Species(name, float(masses.reshape(-1)[k]))
        numbers.append(-1 - list(beads).index(name) if name in beads else _NUMBERS[name])
    return np.array(numbers, dtype=np.int64)[place].reshape(values.shape), tuple(beads.values())


def stacked_frames(
    held: Mapping[str, Any],
    keys: KeyMap,
    usual: Mapping[str, Sequence[str]],
    positions: np.ndarray,
    species: np.ndarray,
    chosen: Iterable[int],
    *,
    where: str,
    frame_id: str,
    cell: str,
    group: str = "",
) -> Iterator[Frame]:
    """The chosen frames of arrays with a row for each: positions (S, n, 3), species (n,) or (S, n).

    Labels are picked as by `pick_labels`; `cell` is the name of the cells, and masses of beads are
    in an array `masses` of the shape of the species.
    """
    masses = held["masses"][()] if "masses" in held else None
    if masses is not None and np.shape(masses) != np.shape(species):
        masses = None  # of something else
    numbers, beads = species_numbers(species, keys, where, masses)
    if positions.ndim != 3 or positions.shape[2] != 3:
        raise DataError(f"{where}: 'positions' has shape {positions.shape}, not (frames, atoms, 3)")
    n_frames, n_atoms = positions.shape[:2]
    if numbers.shape not in ((n_atoms,), (n_frames, n_atoms)):
        shape = " x ".join(map(str, numbers.shape))
        raise DataError(f"{where}: {shape} species for {n_atoms} atoms in {n_frames} frames")
    labels = pick_labels(held, keys, usual, where)
    for name, value in labels.items():
        if len(value.shape) == 0 or value.shape[0] != n_frames:
            raise DataError(f"{where}: '{name}' has shape {value.shape} for {n_frames} frames")
    labels = {name: value[()] for name, value in labels.items()}
    cells, pbc = frame_cells(held, cell, keys, n_frames, where)
    numbers = np.broadcast_to(numbers, (n_frames, n_atoms))
    for k in chosen:
        yield Frame(
            where=f"{where}, frame {k}",
            frame_id=f"{frame_id}:{k}",
            numbers=numbers[k],
            positions=positions[k],
            cell=cells[k],
            pbc=pbc[k],
            labels={name: value[k] for name, value in labels.items()},
            keys=tuple(held),
            group=group,
            beads=beads,
        )


def frame_cells(
    held: Mapping[str, Any], name: str, keys: KeyMap, n_frames: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """(S, 3, 3) cells and (S, 3) periodicity from one for all frames or one for each.

    Without a cell nothing is periodic; a cell without periodicity is periodic.
    """
    if name not in held:
        if keys.cell:
            raise DataError(f"{where} has no '{name}'; it holds {', '.join(held)}")
        return np.zeros((n_frames, 3, 3)), np.zeros((n_frames, 3), bool)
    cell, pbc = held[name][()], held.get(keys.pbc or "pbc")
    if name == "lattice":
        cell = np.swapaxes(cell, -1, -2)  # sGDML stores lattice vectors as columns
    try:
        full = np.broadcast_to(np.asarray(cell, dtype=np.float64), (n_frames, 3, 3))
        return full, np.broadcast_to(True if pbc is None else pbc[()].astype(bool), (n_frames, 3))
    except ValueError:
        raise DataError(f"{where}: '{name}' has shape {np.shape(cell)}, not (3, 3)") from None


def by_part(sizes: Sequence[int], index: slice) -> list[list[int]]:
    """Which frames of each part of a set an index of the whole set means."""
    ends = np.cumsum(sizes)
    chosen = np.arange(sum(sizes))[index]
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [(part - end + n).tolist() for part, end, n in zip(parts, ends, sizes, strict=True)]


def gather(
    frames: Iterable[Frame], path: str, units: Units, keys: KeyMap, checks: Checks
) -> tuple[Structures, Properties]:
    """Check frames, convert them to potstill's units and join them into one batch.

    `path` is for messages; `units` are those of the file, none of them None.

    Raises
    ------
    DataError
        If a frame is faulty; the message names file, frame and key.
    MissingLabelError
        If a label is absent that `keys` or `checks` ask for.
    """
    for name in checks.require:
        property_spec(name)
    good = [_check_frame(_convert(frame, units), checks) for frame in frames]
    if not good:
        raise DataError(f"{path} holds no frames, or none at the requested index")
    _check_presence(good, keys, checks)
    flat = [frame for frame in good if frame.left_out]
    if flat:
        warnings.warn(
            f"{path}: the stress of {len(flat)} of {len(good)} frames was left out, because they "
            f"are not periodic along all three lattice vectors (the first is {flat[0].frame_id})",
            DataWarning,
            stacklevel=3,
        )
    return _join_structures(good, checks.species), _join_labels(good)


# -- one frame ------------------------------------------------------------------------------------


def _convert(frame: Frame, units: Units) -> Frame:
    """Bring arrays to float64, the right shapes and potstill's units."""
    n, factors = len(frame.numbers), units.factors()
    pbc = np.asarray(frame.pbc, dtype=bool).reshape(3)
    held = any(frame.labels.get(name) is not None for name in ("stress", "virial"))
    cell = _shaped(frame, "cell", frame.cell, (3, 3)) * factors["length"]
    labels = {}
    for name, raw in frame.labels.items():
        if raw is None or (name in ("stress", "virial") and not pbc.all()):
            continue
        if name in ("stress", "virial"):
            value = _tensor_3x3(frame, name, raw, units) * factors[name]
        else:
            spec = PROPERTIES[name]
            shape = (n, *spec.shape) if spec.level == "atom" else spec.shape
            value = _shaped(frame, name, raw, shape) * factors.get(name, 1.0)
        if not np.isfinite(value).all():
            raise DataError(f"{frame.where}: '{name}' holds NaN or infinite numbers")
        labels[name] = value
    if not np.isfinite(cell).all():
        raise DataError(f"{frame.where}: 'cell' holds NaN or infinite numbers")
    try:
        check_cell(cell, pbc)
    except DataError as error:
        raise DataError(f"{frame.where}: {error}") from None
    if "virial" in labels:
        if "stress" in labels:
            raise DataError(
                f"{frame.where} holds both a stress and a virial: name only one of them"
            )
        labels["stress"] = -labels.pop("virial") / abs(np.linalg.det(cell))
    return replace(
        frame,
        numbers=np.asarray(frame.numbers, dtype=np.int64),
        positions=_shaped(frame, "positions", frame.positions, (n, 3)) * factors["length"],
        cell=cell,
        pbc=pbc,
        labels=labels,
        left_out=() if pbc.all() or not held else ("stress",),
    )


def _shaped(frame: Frame, name: str, raw: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        value = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{frame.where}: '{name}' does not hold plain numbers") from None
    # Scalars are often stored as arrays of one number, per-atom scalars as one column.
    same = value.size == 1 if shape == () else value.shape in (shape, (*shape, 1))
    if not same:
        raise DataError(f"{frame.where}: '{name}' has shape {value.shape}, not {shape}")
    return value.reshape(shape)


def _tensor_3x3(frame: Frame, name: str, raw: Any, units: Units) -> np.ndarray:
    """Bring 3x3, nine numbers or six in the file's order to 3x3."""
    value = np.asarray(raw, dtype=np.float64)
    if value.size == 9:
        return value.reshape(3, 3)
    if value.size != 6:
        raise DataError(f"{frame.where}: '{name}' has shape {value.shape}, not (3, 3) or (6,)")
    if units.stress_order is None:
        raise DataError(
            f"{frame.where}: '{name}' has six numbers: state their order, as in "
            "Units(stress_order='xx yy zz yz xz xy')"
        )
    full = np.zeros((3, 3))
    for number, (i, j) in zip(value.reshape(6), units.stress_positions(), strict=True):
        full[i, j] = full[j, i] = number
    return full


def _check_frame(frame: Frame, checks: Checks) -> Frame:
    if len(frame.numbers) == 0:
        raise DataError(f"{frame.where} holds no atoms")
    if not np.isfinite(frame.positions).all():
        raise DataError(f"{frame.where}: 'positions' hold NaN or infinite numbers")
    known = (frame.numbers != 0) & (frame.numbers < len(chemical_symbols))
    known &= frame.numbers >= -len(frame.beads)
    if not known.all():
        bad = frame.numbers[int(known.argmin())]
        raise DataError(f"{frame.where}: {bad} is not the atomic number of a chemical element")
    if checks.species is not None:
        foreign = checks.species.indices(frame.numbers, frame.beads) < 0
        if foreign.any():
            z = int(frame.numbers[int(foreign.argmax())])
            name = chemical_symbols[z] if z > 0 else frame.beads[-1 - z].name
            raise DataError(
                f"{frame.where} holds {name}, which is not among the species "
                f"{', '.join(checks.species.names)}"
            )
    _check_overlap(frame, checks.min_distance)
    return frame


def _check_overlap(frame: Frame, min_distance: float) -> None:
    if min_distance <= 0:
        return
    # A list of at least 1 Å keeps the number of bins in wide boxes small.
    cutoff = max(min_distance, 1.0)
    i, j, shift = system_pairs(frame.positions, frame.cell, frame.pbc, cutoff)
    if len(i) == 0:
        return
    vectors = frame.positions[j] - frame.positions[i] + shift @ frame.cell
    distance = np.linalg.norm(vectors, axis=1)
    worst = int(distance.argmin())
    if distance[worst] < min_distance:
        raise DataError(
            f"{frame.where}: atoms {i[worst]} and {j[worst]} are {distance[worst]:.3f} Å apart, "
            f"closer than {min_distance:g} Å"
        )


# -- all frames -----------------------------------------------------------------------------------


def _check_presence(frames: Sequence[Frame], keys: KeyMap, checks: Checks) -> None:
    asked = {**{name: name for name in checks.require}, **keys.labels}
    if "virial" in asked:
        asked["stress"] = asked.pop("virial")
    found = {name for frame in frames for name in frame.labels}
    for name in (*asked, *sorted(found - set(asked))):
        lacking = [frame for frame in frames if name not in frame.labels]
        if not lacking or (checks.allow_partial and name in found):
            continue
        frame, key = lacking[0], asked.get(name, name)
        flat = " that means anything, because it is not periodic along all three lattice vectors"
        lacks = f"{frame.where} has no '{key}'{flat if name in frame.left_out else ''}"
        if name in found:
            raise MissingLabelError(
                f"{lacks}, which other frames have ({len(lacking)} of {len(frames)} frames lack "
                "it): allow partly labeled data (allow_partial) if this is intended"
            )
        hint = "" if name in frame.left_out else _near_miss(key, frame.keys)
        raise MissingLabelError(f"{lacks}{hint}")


def _near_miss(key: str, present: Sequence[str]) -> str:
    lower = {name.lower(): name for name in present}
    near = difflib.get_close_matches(key.lower(), lower, n=1)
    near = near or [name for name in lower if key.lower() in name][:4]
    if near:
        guess = " or ".join(f"'{lower[name]}'" for name in near)
        return f"; did you mean {guess}? Then name it in the key map"
    return f"; it holds {_quoted(present)}" if present else "; it holds no labels at all"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _join_structures(frames: Sequence[Frame], table: SpeciesTable | None) -> Structures:
    if table is None:
        numbers = {z for frame in frames for z in set(frame.numbers.tolist())}
        beads = dict.fromkeys(b for f in frames for b in _occurring(f))
        table = SpeciesTable.from_atomic_numbers(numbers, list(beads))
    species = [table.indices(frame.numbers, frame.beads) for frame in frames]
    counts = torch.tensor([len(frame.numbers) for frame in frames], dtype=torch.int64)
    return Structures(
        positions=torch.from_numpy(np.concatenate([frame.positions for frame in frames])),
        species=torch.from_numpy(np.concatenate(species)),
        system_index=torch.repeat_interleave(torch.arange(len(frames)), counts),
        cell=torch.from_numpy(np.stack([frame.cell for frame in frames])),
        pbc=torch.from_numpy(np.stack([frame.pbc for frame in frames])),
        species_table=table,
        group=tuple(f.group for f in frames) if any(f.group for f in frames) else None,
        frame_id=tuple(frame.frame_id for frame in frames),
        **_optional_fields(frames),
    )


def _occurring(frame: Frame) -> list[Species]:
    """The beads of a frame that are there."""
    present = set(frame.numbers.tolist()) if frame.beads else set()
    return [bead for k, bead in enumerate(frame.beads, 1) if -k in present]


def _optional_fields(frames: Sequence[Frame]) -> dict[str, torch.Tensor]:
    """Fields that some frames have; an atom is free, has tag 0, a frame charge 0 if not said."""
    result: dict[str, torch.Tensor] = {}
    for name, dtype in (("fixed", bool), ("tags", np.int64)):
        held = [(getattr(frame, name), len(frame.numbers)) for frame in frames]
        rows = [
            np.zeros(n, dtype) if column is None else np.reshape(column, n) for column, n in held
        ]
        joined = np.concatenate(rows).astype(dtype)
        if joined.any():
            result[name] = torch.from_numpy(joined)
    if all(frame.velocities is not None for frame in frames):
        velocities = [np.asarray(frame.velocities, dtype=np.float64) for frame in frames]
        result["velocities"] = torch.from_numpy(np.concatenate(velocities))
    for name in ("charge", "spin_multiplicity"):
        numbers = [getattr(frame, name) for frame in frames]
        if any(number is not None for number in numbers):
            filled = [float(NEUTRAL[name] if number is None else number) for number in numbers]
            result[name] = torch.tensor(filled, dtype=torch.float64)
    return result


def _join_labels(frames: Sequence[Frame]) -> Properties:
    names = [name for name in PROPERTIES if any(name in frame.labels for frame in frames)]
    values, present = {}, {}
    for name in names:
        spec = PROPERTIES[name]
        rows = []
        for frame in frames:
            count = len(frame.numbers) if spec.level == "atom" else 1
            absent = np.full((count, *spec.shape), np.nan)
            rows.append(np.reshape(frame.labels.get(name, absent), (count, *spec.shape)))
        values[name] = torch.from_numpy(np.concatenate(rows))
        present[name] = torch.tensor([name in frame.labels for frame in frames])
    return Properties(values, present)
