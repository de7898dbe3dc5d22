"""Whether a frame of dynamics is still the system it started from: no fused atoms, no fragments.

Neither needs a cell: an explosion in vacuum changes no volume. A liquid has a reference besides:
distances that it never takes, and holes that it never has; a molecule has bonds, beads or not, that
its reference never stretches. Two atoms are bonded where they are
closer than 1.3 times the sum of their covalent radii, and stay so up to twice that sum, well past
every stretched bond. A structure has come apart when its atoms, linked by the latter, form more
fragments than the bonds of the start do. Molecules that drift apart in a gas, and noble gases,
which have no bonds to lose, are thus left alone. Beads have no radii: without a reference they have
no bonds, and have fused where they are far closer than any such pair in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from ase.data import covalent_radii
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.spatial import cKDTree

from potstill.neighbors import build_neighbor_list, shortest_distances, system_pairs
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME

#: A bond, and how far it may be stretched, over the sum of the covalent radii.
BONDED, TORN = 1.3, 2.0
#: Atoms have fused below this share of the shortest distance of their kinds in training ...
FUSED = 0.7
#: ... or, where that is not known, below this share of the sum of their covalent radii.
FUSED_RADII = 0.5
#: Neighbor lists of many frames are made for so many atoms at a time.
_ATOMS_AT_A_TIME = 20_000
#: A liquid has lost its density where a hole is this many times as wide as any of the reference.
WIDER = 1.5
#: A bond of a molecule is no longer than so many times its shortest length in the reference, and
#: has broken where it is so many times as long as any of the reference.
STIFF, BROKEN = 2.0, 1.5
#: Frames of a reference that are looked through for holes and bonds.
_LOOKED_THROUGH = 50
#: Kinetic temperatures fluctuate; this many standard deviations are no fluctuation.
_HOT = 10.0


@dataclass(frozen=True)
class Connectivity:
    """What holds a structure together at the start of dynamics.

    Parameters
    ----------
    n_fragments : int
        Parts of the starting structure that bonds connect; an unbonded atom is one.
    closest : float
        Least distance over the sum of covalent radii; infinite where none is known.
    trained : dict of str to float
        Shortest distance in training by pair of species with a bead, Å; empty where none is known.
    """

    n_fragments: int
    closest: float
    trained: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, start: Structures, trained: Mapping[str, float] | None = None) -> Connectivity:
        """Look at one system; `trained` are shortest distances in training by pair, Å."""
        center, neighbor, ratio = _bond_ratios(start)
        n_fragments, _ = _fragments(start.n_atoms, center, neighbor, ratio < BONDED)
        names = start.species_table.names
        beads = [n for n, z in zip(names, start.species_table.atomic_numbers, strict=True) if z < 0]
        pairs = {f"{a}-{b}" for x in names for y in beads for a, b in ((x, y), (y, x))}
        known = {pair: d for pair, d in (trained or {}).items() if pair in pairs}
        return cls(n_fragments, float(ratio.min(initial=math.inf)), known)

    def symptom(self, frame: Structures, *, apart: bool = True) -> str:
        """Say what is wrong with a later frame of the same system; empty if it is sound.

        With `apart`, fragments count as well.
        """
        if self.trained and (what := fused(closest_pairs(frame), self.trained)):
            return what
        center, neighbor, ratio = _bond_ratios(frame)
        if ratio.min(initial=math.inf) < min(FUSED_RADII, FUSED * self.closest):
            k = int(ratio.argmin())
            pair = [int(center[k]), int(neighbor[k])]
            first, second = (frame.species_table.names[int(frame.species[i])] for i in pair)
            distance = ratio[k] * _radii(frame)[pair].sum()
            return f"atoms fused: {first} and {second} at {distance:.2f} Å"
        if not apart:
            return ""
        n_fragments, n_alone = _fragments(frame.n_atoms, center, neighbor, ratio < TORN)
        if n_fragments <= self.n_fragments:
            return ""
        return (
            f"the structure came apart: {n_fragments} fragments, {self.n_fragments} at the start; "
            f"{n_alone} of {frame.n_atoms} atoms have lost all neighbors"
        )


def trained_distances(calculator: object) -> Mapping[str, float] | None:
    """Shortest distances in training by pair, Å, if a calculator knows what it was trained on."""
    info = getattr(calculator, "info", None) or {}
    return (info.get("trained_on") or {}).get("shortest_distances")


@dataclass(frozen=True)
class Liquid:
    """What a trajectory of a liquid shows that later dynamics are judged by.

    Parameters
    ----------
    shortest : dict of str to float
        Shortest distance by pair of species, Å.
    widest : float
        Radius of the widest hole, Å; infinite where nobody looked.
    """

    shortest: dict[str, float]
    widest: float = math.inf

    @classmethod
    def of(cls, frames: Structures, cutoff: float = 8.0) -> Liquid:
        """Look at a periodic trajectory, for distances up to the cutoff in Å."""
        chosen = np.unique(np.linspace(0, len(frames) - 1, _LOOKED_THROUGH).astype(int))
        widest = max(widest_hole(frames[k]) for k in chosen.tolist())
        return cls(closest_pairs(frames, cutoff), widest)

    def symptom(self, frame: Structures) -> str:
        """Say what is wrong with a frame of dynamics of the same system; empty if it is sound."""
        reach = FUSED * max(self.shortest.values(), default=0.0)
        near = closest_pairs(frame, reach) if reach else {}
        if reason := fused(near, self.shortest, "the reference has"):
            return reason
        if not math.isfinite(self.widest):
            return ""
        hole = widest_hole(frame)
        if hole <= WIDER * self.widest:
            return ""
        return (
            f"the density was lost: a hole of {hole:.1f} Å, where the reference has none wider "
            f"than {self.widest:.1f} Å"
        )


@dataclass(frozen=True)
class Skeleton:
    """The bonds of molecules, of beads or atoms alike, as a trajectory without a cell shows them.

    They are the shortest connections that link everything (the minimum spanning tree of the mean
    distances), without those that are no bonds because their lengths vary too much.

    Parameters
    ----------
    bonds : tuple of (int, int)
        Atoms.
    longest : tuple of float
        Greatest length of each in the trajectory, Å.
    """

    bonds: tuple[tuple[int, int], ...]
    longest: tuple[float, ...]

    @classmethod
    def of(cls, frames: Structures) -> Skeleton:
        """Look at a trajectory of the same atoms in the same order."""
        n = frames.n_atoms // len(frames)
        x = frames.positions.numpy().reshape(-1, n, 3)
        chosen = np.unique(np.linspace(0, len(x) - 1, _LOOKED_THROUGH).astype(int))
        mean = np.linalg.norm(x[chosen][:, :, None] - x[chosen][:, None], axis=3).mean(axis=0)
        tree = minimum_spanning_tree(mean).tocoo()
        found = {}
        for i, j in zip(tree.row.tolist(), tree.col.tolist(), strict=True):
            length = np.linalg.norm(x[:, i] - x[:, j], axis=1)
            if length.max() <= STIFF * length.min():
                found[i, j] = float(length.max())
        return cls(tuple(found), tuple(found.values()))

    def symptom(self, frame: Structures) -> str:
        """Say which bond of a later frame has broken; empty if none has."""
        for (i, j), longest in zip(self.bonds, self.longest, strict=True):
            length = float((frame.positions[i] - frame.positions[j]).norm())
            if length > BROKEN * longest:
                names = (frame.species_table.names[int(frame.species[k])] for k in (i, j))
                return (
                    f"the bond {'-'.join(names)} broke: {length:.1f} Å, where the reference has "
                    f"none longer than {longest:.1f} Å"
                )
        return ""


def widest_hole(frame: Structures, spacing: float = 1.5) -> float:
    """Largest distance of a place in a periodic cell from the nearest atom, Å.

    Places are those of a grid with the spacing in Å.
    """
    cell = frame.cell[0].numpy()
    fractions = frame.positions.numpy() @ np.linalg.inv(cell)
    images = np.indices((3, 3, 3)).reshape(3, -1).T - 1
    atoms = ((fractions % 1.0)[:, None] + images).reshape(-1, 3) @ cell
    counts = np.maximum(1, np.ceil(np.linalg.norm(cell, axis=1) / spacing)).astype(int)
    places = (np.indices(counts).reshape(3, -1).T + 0.5) / counts @ cell
    return float(cKDTree(atoms).query(places)[0].max())


def kinetic_temperatures(frames: Structures) -> torch.Tensor:
    """(S,) K, from the velocities of frames."""
    assert frames.velocities is not None
    twice = frames.masses * frames.velocities.square().sum(dim=1) / FS_IN_ASE_TIME**2
    return frames.sum_by_system(twice) / (degrees_of_freedom(frames).clamp(min=1.0) * BOLTZMANN)


def overheated(frame: Structures, temperature: float) -> str:
    """Say that a frame is hotter than a thermostat of so many K lets it be; empty if it is not."""
    kelvin = float(kinetic_temperatures(frame)[0])
    degrees = max(1.0, float(degrees_of_freedom(frame)[0]))
    limit = temperature * (1.0 + _HOT * math.sqrt(2.0 / degrees))
    return f"the temperature reached {kelvin:.0f} K" if kelvin > limit else ""


def energy_departure(energy: np.ndarray, scale: float) -> tuple[int, float] | None:
    """Where the potential energy of a run has left its first mean for good: another phase.

    A run that freezes, demixes or collapses need not have fused atoms or holes, and its temperature
    is that of the thermostat. Its energy tells: the means of the first and last three of ten blocks
    differ by more than a fifth of `scale` and by five standard errors. The latter are from the
    median step between blocks, which neither a jump nor a slow drift enters much.

    Parameters
    ----------
    energy : ndarray
        (n,) in order of time, eV; nothing is said of fewer than 20.
    scale : float
        kT times the number of atoms, eV.

    Returns
    -------
    tuple of int and float, or None
        The frame from which on it is nearer to its last mean, and the change in eV.
    """
    if len(energy) < 20:
        return None
    parts = np.array_split(energy, 10)
    means = np.array([part.mean() for part in parts])
    start, change = means[:3].mean(), means[-3:].mean() - means[:3].mean()
    scatter = np.median(np.abs(np.diff(means))) / 0.954  # of blocks, for a normal distribution
    if abs(change) < max(0.2 * scale, 5.0 * scatter * math.sqrt(2.0 / 3.0)):
        return None
    far = np.abs(means - start) > 0.5 * abs(change)
    return sum(map(len, parts[: int(far.argmax())])), float(change)


def closest_approach(
    distances: Mapping[str, float], trained: Mapping[str, float] | None
) -> tuple[str, float, float] | None:
    """Pair that came closest relative to training: its name, distance in Å, and the ratio.

    Parameters
    ----------
    distances, trained : mapping
        Shortest distance by pair ("Si-Si") in dynamics and in the training structures, Å. Tables
        of beads differ in their order, and with it the names of a pair.
    """
    found = [
        (pair, distance, distance / trained[key])
        for pair, distance in distances.items()
        for key in dict.fromkeys((pair, *_turned(pair)))
        if trained and trained.get(key) and math.isfinite(distance)
    ]
    return min(found, key=lambda entry: entry[2]) if found else None


def _turned(pair: str) -> list[str]:
    """The pair "A-B" as "B-A"; several where names hold a hyphen themselves."""
    words = pair.split("-")
    return ["-".join([*words[k:], *words[:k]]) for k in range(1, len(words))]


def fused(
    distances: Mapping[str, float],
    trained: Mapping[str, float] | None,
    where: str = "the training data have",
) -> str:
    """Say that atoms came far closer than any in training; empty if none did."""
    closest = closest_approach(distances, trained)
    if closest is None or closest[2] >= FUSED:
        return ""
    pair, distance, ratio = closest
    return (
        f"atoms fused: a {pair} pair came to {distance:.2f} Å, where {where} none below "
        f"{distance / ratio:.2f} Å"
    )


def closest_pairs(frames: Structures, cutoff: float | None = None) -> dict[str, float]:
    """Shortest distance in any frame by pair of species, Å.

    None beyond the cutoff in Å: by default 4, or 8 where there are beads, which may be large.
    """
    if cutoff is None:
        cutoff = 8.0 if bool((frames.species_table.atomic_numbers < 0).any()) else 4.0
    found: dict[str, float] = {}
    for systems in frames.batches(_ATOMS_AT_A_TIME):
        part = frames.select(systems)
        neighbors = build_neighbor_list(part, cutoff)
        for pair, distance in shortest_distances(part, neighbors).items():
            found[pair] = min(distance, found.get(pair, math.inf))
    return found


def _radii(structures: Structures) -> np.ndarray:
    """(N,) covalent radii in Å; zero for beads, which then have no bonds."""
    numbers = structures.atomic_numbers.cpu().numpy()
    return np.where(numbers > 0, covalent_radii[numbers.clip(min=0)], 0.0)


def _bond_ratios(system: Structures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j) of one system, and their distances over the sums of covalent radii."""
    radii = _radii(system)
    reach = 2.0 * TORN * float(radii.max(initial=0.0))
    if reach == 0.0:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0)
    positions, cell = system.positions.numpy(), system.cell[0].numpy()
    center, neighbor, shift = system_pairs(positions, cell, system.pbc[0].numpy(), reach)
    distance = np.linalg.norm(positions[neighbor] - positions[center] + shift @ cell, axis=1)
    radius = radii[center] + radii[neighbor]
    known = radius > 0.0
    return center[known], neighbor[known], distance[known] / radius[known]


def _fragments(
    n_atoms: int, center: np.ndarray, neighbor: np.ndarray, linked: np.ndarray
) -> tuple[int, int]:
    """Number of connected parts, and of atoms without any link."""
    pair = center[linked], neighbor[linked]
    links = coo_array((np.ones(len(pair[0]), bool), pair), shape=(n_atoms, n_atoms))
    n_fragments = int(connected_components(links, directed=False, return_labels=False))
    return n_fragments, n_atoms - len(np.unique(pair[0]))


def degrees_of_freedom(structures: Structures) -> torch.Tensor:
    """(S,) kinetic degrees of freedom of each system: three for every atom that is not fixed.

    Dynamics with a thermostat, and what starts from it, moves as a whole as well; where the
    velocity of the whole was taken off, three fewer count.
    """
    return 3.0 * structures.sum_by_system(structures.free.to(torch.float64))
