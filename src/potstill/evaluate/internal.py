"""Internal coordinates of a molecule: bonds, angles, dihedrals, and free energies of two of these.

The frames may be of beads or of atoms, in a cell or without one. What a trajectory visits gives the
probability p of a coordinate, and F = -kT ln(p / p_max) its free energy. Dihedrals have the sign of
IUPAC: positive where the bond in front turns clockwise into the one behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from potstill.errors import ConfigError, DataError, suggest
from potstill.evaluate.base import Bench, Candidate, Findings
from potstill.evaluate.distributions import (
    Array,
    Blocks,
    Distribution,
    Distributions,
    PackedDistribution,
    bins_of,
)
from potstill.evaluate.structure import DistributionEvaluation
from potstill.report.panels import Colors, Drawing, Panel
from potstill.report.tables import Row, Table, number
from potstill.structures import Structures
from potstill.units import BOLTZMANN, energy_factor

#: Atoms or beads of a coordinate: two for a distance, three for an angle, four for a dihedral;
#: names that occur once in a frame, or numbers counted from 0.
Atoms = Annotated[tuple[int | str, ...], Field(min_length=2, max_length=4)]

#: Share of a reference's range by which the bins of distances and angles reach beyond it.
_MARGIN = 0.25


# -- values --------------------------------------------------------------------------------------


def coordinate_values(frames: Structures, atoms: Sequence[int | str]) -> np.ndarray:
    """(frames,) distances in Å, angles or dihedrals in degrees, along a trajectory.

    Parameters
    ----------
    frames : Structures
        Frames of the same atoms in the same order. Neighbors among `atoms` are less than half a
        periodic cell apart.
    atoms : sequence of int or str
        Two, three or four: numbers counted from 0, or names that occur once in a frame.

    Raises
    ------
    ConfigError
        If a name does not say which atom is meant, or there is no such atom.
    DataError
        If there is no frame, or frames differ in their atoms.
    """
    names = _names(frames)
    places = [_place(atom, names) for atom in atoms]
    x = frames.positions.numpy().reshape(len(frames), len(names), 3)[:, places]
    steps = _shortest(np.diff(x, axis=1), frames)
    length = np.linalg.norm(steps, axis=2)
    if len(places) == 2:
        return length[:, 0]
    if len(places) == 3:
        cosine = -(steps[:, 0] * steps[:, 1]).sum(axis=1) / (length[:, 0] * length[:, 1])
        return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))
    first, middle, last = steps.swapaxes(0, 1)
    before, after = np.cross(first, middle), np.cross(middle, last)
    sine = length[:, 1] * (first * after).sum(axis=1)
    return np.degrees(np.arctan2(sine, (before * after).sum(axis=1)))


def _names(frames: Structures) -> list[str]:
    """Names of the atoms, which all frames have in common."""
    if not len(frames):
        raise DataError("internal coordinates need at least one frame of a trajectory")
    sizes = frames.n_atoms_per_system
    species = frames.species.view(len(frames), -1) if bool((sizes == sizes[0]).all()) else None
    if species is None or bool((species != species[0]).any()):
        raise DataError("internal coordinates need frames of the same atoms in the same order")
    return [frames.species_table.names[k] for k in species[0].tolist()]


def _place(atom: int | str, names: Sequence[str]) -> int:
    if isinstance(atom, int):
        if not 0 <= atom < len(names):
            raise ConfigError(f"there is no atom {atom}: the frames have 0 to {len(names) - 1}")
        return atom
    if atom not in names:
        raise ConfigError(f"the frames hold no {atom}{suggest(atom, names)}")
    if (n := names.count(atom)) > 1:
        raise ConfigError(
            f"{n} atoms of a frame are called {atom}: give the number of one, counted from 0"
        )
    return names.index(atom)


def _shortest(vectors: Array, frames: Structures) -> Array:
    """The images of (frames, n, 3) vectors nearest to the origin, along periodic axes."""
    periodic = frames.pbc.numpy()
    if not periodic.any():
        return vectors
    cells = frames.cell.numpy()
    shifts = np.round(vectors @ np.linalg.pinv(cells)) * periodic[:, None]
    return vectors - shifts @ cells


# -- distributions of one coordinate -------------------------------------------------------------


@dataclass(frozen=True)
class InternalDistribution(Distribution):
    """Distribution of one internal coordinate.

    Parameters
    ----------
    name : str
    value : ndarray
        (n_bins,) middles of the bins, Å or degrees.
    density, error : ndarray
        (n_bins,) per Å or degree, and its standard error from blocks. What lies beyond the bins
        of a distance or angle counts in the outermost ones.
    quantity : {"distance", "angle", "dihedral"}
    n_frames, n_blocks : int
    blocks : ndarray, optional
        (n_blocks, n_bins) means of the density over the blocks.
    """

    name: str
    value: np.ndarray
    density: np.ndarray
    error: np.ndarray
    quantity: str
    n_frames: int
    n_blocks: int
    blocks: np.ndarray | None = None

    @property
    def label(self) -> str:
        """The name."""
        return self.name

    @property
    def values(self) -> np.ndarray:
        """The density."""
        return self.density

    @property
    def measure(self) -> np.ndarray:
        """Width of the bins, Å or degrees."""
        return np.array(self.value[1] - self.value[0])

    @property
    def grid(self) -> tuple[np.ndarray, ...]:
        """Middles of the bins."""
        return (self.value,)


@dataclass(frozen=True)
class InternalDistributions(Distributions):
    """Distributions of internal coordinates by name."""

    parts: dict[str, InternalDistribution]  # type: ignore[assignment]


_QUANTITIES = {2: "distance", 3: "angle", 4: "dihedral"}


def bin_edges(values: np.ndarray, quantity: str, n_bins: int) -> np.ndarray:
    """(n_bins + 1,) edges for a coordinate of a reference: the circle, or somewhat past its range.

    Parameters
    ----------
    values : ndarray
        (frames,) of the reference, Å or degrees.
    quantity : {"distance", "angle", "dihedral"}
    n_bins : int
    """
    if quantity == "dihedral":
        return np.linspace(-180.0, 180.0, n_bins + 1)
    margin = max(_MARGIN * float(np.ptp(values)), 1e-3)
    low, high = max(0.0, float(values.min()) - margin), float(values.max()) + margin
    return np.linspace(low, min(high, 180.0) if quantity == "angle" else high, n_bins + 1)


def internal_distribution(
    name: str,
    values: np.ndarray,
    edges: np.ndarray,
    quantity: str,
    *,
    n_blocks: int = 10,
    mirror_images: bool = False,
) -> InternalDistribution:
    """Distribution of a coordinate over a trajectory.

    Parameters
    ----------
    name : str
    values : ndarray
        (frames,) Å or degrees, in order of time.
    edges : ndarray
        (n_bins + 1,) edges of bins of equal width.
    quantity : {"distance", "angle", "dihedral"}
    n_blocks : int
        Consecutive blocks of frames whose scatter gives the error; fewer if frames are fewer.
    mirror_images : bool
        Count dihedrals with both signs.
    """
    n = len(edges) - 1
    inside = np.clip(values, edges[0], edges[-1])
    images = [inside, -inside] if mirror_images and quantity == "dihedral" else [inside]
    bins = np.stack([bins_of(image, edges) for image in images])
    found = _histograms(bins, n, n_blocks, 1.0 / (edges[1] - edges[0]))
    return InternalDistribution(
        name=name,
        value=0.5 * (edges[1:] + edges[:-1]),
        density=found.mean,
        error=found.error,
        quantity=quantity,
        n_frames=len(values),
        n_blocks=len(found.means),
        blocks=found.means,
    )


def _histograms(bins: Array, n_bins: int, n_blocks: int, scale: float) -> Blocks:
    """Histograms of (images, frames) bins by block of frames, which sum to the scale."""
    parts = np.array_split(bins, min(n_blocks, bins.shape[1]), axis=1)
    counts = [np.bincount(part.ravel(), minlength=n_bins) / part.size for part in parts]
    return Blocks(scale * np.stack(counts), np.array([part.shape[1] for part in parts]))


class _OfMolecules(DistributionEvaluation):
    """Base of evaluations of internal coordinates, of molecules in a cell or without one.

    Parameters
    ----------
    mirror_images : bool
        Count every frame and its mirror image, that is dihedrals with both signs. Potentials of
        distances and angles alone cannot tell mirror images apart; where no bead is a chiral
        center, their dihedrals can be compared in this way only.
    """

    needs = "trajectories"
    on_request = True

    mirror_images: bool = False


class Internal(_OfMolecules):
    """Distributions of named bonds, angles and dihedrals in molecular dynamics.

    Parameters
    ----------
    coordinates : dict of str to tuple
        Atoms by name of the coordinate, two for a distance, three for an angle, four for a
        dihedral: `{phi: [C_ACE, N, CA, C]}`. Names that occur once, or numbers counted from 0.
    n_bins : int
        Bins of equal width: of dihedrals over the circle, of others over somewhat more than the
        range of the reference.
    """

    name = "internal"
    title = "internal coordinates"
    result = InternalDistributions
    symbol = "p(q)"
    key = "internal"
    axes = ("Coordinate", "Density")

    coordinates: dict[str, Atoms] = Field(default_factory=dict)
    n_bins: int = Field(default=60, ge=2)

    def lacks(self, bench: Bench) -> str:
        """Trajectories, or what to look at."""
        return super().lacks(bench) or ("" if self.coordinates else "'coordinates' to look at")

    def run(self, bench: Bench, candidate: Candidate) -> InternalDistributions:
        """Take the distributions of the candidate's trajectory, on the bins of the standard."""
        frames = self.frames_of(bench, candidate)
        parts = {}
        for label, atoms in self.coordinates.items():
            parts[label] = internal_distribution(
                label,
                coordinate_values(frames, atoms),
                self._edges(bench, candidate, atoms),
                _QUANTITIES[len(atoms)],
                n_blocks=self.n_blocks,
                mirror_images=self.mirror_images,
            )
        return InternalDistributions(parts)

    def _edges(self, bench: Bench, candidate: Candidate, atoms: Atoms) -> Array:
        """Bins of a coordinate that all candidates share: those of the standard."""
        name, standard = bench.standard_for(candidate)
        quantity = _QUANTITIES[len(atoms)]

        def edges() -> Array:
            return bin_edges(coordinate_values(standard, atoms), quantity, self.n_bins)

        return bench.once(("bins", name, atoms), edges)

    @classmethod
    def axes_of(cls, part: Distribution) -> tuple[str, str]:
        """The coordinate and its density, with their units."""
        assert isinstance(part, InternalDistribution)
        unit = "Å" if part.quantity == "distance" else "°"
        return f"{part.name} ({unit})", f"Density (1/{unit})"


# -- free energies of two dihedrals --------------------------------------------------------------


@dataclass(frozen=True)
class FreeEnergySurface(PackedDistribution):
    """Probability of two dihedrals, and their free energy.

    Parameters
    ----------
    pair : str
        "phi, psi".
    angle : ndarray
        (n_bins,) middles of the bins along both axes, degrees.
    density, error : ndarray
        (n_bins, n_bins) over that of two angles that are anywhere alike, and its standard error.
    kT : float
        In `unit`.
    unit : str
        Of the free energy.
    n_frames, n_blocks : int
    populations, population_errors : dict of str to float
        Shares of frames in named regions, and their standard errors from blocks.
    blocks : ndarray, optional
        (n_blocks, n_bins, n_bins) means of the density over the blocks.
    """

    pair: str
    angle: np.ndarray
    density: np.ndarray
    error: np.ndarray
    kT: float
    unit: str
    n_frames: int
    n_blocks: int
    populations: dict[str, float] = field(default_factory=dict)
    population_errors: dict[str, float] = field(default_factory=dict)
    blocks: np.ndarray | None = None

    @property
    def label(self) -> str:
        """The pair."""
        return self.pair

    @property
    def values(self) -> np.ndarray:
        """The density."""
        return self.density

    @property
    def measure(self) -> np.ndarray:
        """Share of a bin in the square."""
        return np.array(1.0 / self.density.size)

    @property
    def grid(self) -> tuple[np.ndarray, ...]:
        """Middles of the bins."""
        return (self.angle,)

    @property
    def edges(self) -> np.ndarray:
        """Edges of the bins along both axes, degrees."""
        return np.linspace(-180.0, 180.0, len(self.angle) + 1)

    @property
    def free_energy(self) -> np.ndarray:
        """(n_bins, n_bins) above the lowest one, in `unit`; NaN where no frame was."""
        with np.errstate(divide="ignore"):
            found = -self.kT * np.log(self.density / self.density.max())
        return np.where(np.isfinite(found), found, np.nan)


@dataclass(frozen=True)
class FreeEnergySurfaces(Distributions):
    """The surface of a pair, by its name."""

    parts: dict[str, FreeEnergySurface]  # type: ignore[assignment]


#: Range of an angle in degrees; from the larger to the smaller number by way of 180.
Arc = tuple[float, float]


def free_energy_surface(
    pair: str,
    first: np.ndarray,
    second: np.ndarray,
    *,
    n_bins: int = 36,
    n_blocks: int = 10,
    regions: Mapping[str, tuple[Arc, Arc]] | None = None,
    mirror_images: bool = False,
    kT: float = 1.0,
    unit: str = "kT",
) -> FreeEnergySurface:
    """Free energy of two dihedrals from their values along a trajectory.

    Parameters
    ----------
    pair : str
        What they are called together.
    first, second : ndarray
        (frames,) degrees between -180 and 180, in order of time.
    n_bins : int
        Bins of equal width along both axes.
    n_blocks : int
        Consecutive blocks of frames whose scatter gives the errors.
    regions : mapping, optional
        Ranges of both angles by name; their populations are taken.
    mirror_images : bool
        Count every frame with both signs.
    kT : float
        In `unit`.
    unit : str
    """
    signs = (1.0, -1.0) if mirror_images else (1.0,)
    x, y = (np.stack([sign * angle for sign in signs]) for angle in (first, second))
    edges = np.linspace(-180.0, 180.0, n_bins + 1)
    bins = bins_of(x.ravel(), edges) * n_bins + bins_of(y.ravel(), edges)
    found = _histograms(bins.reshape(x.shape), n_bins**2, n_blocks, float(n_bins**2))
    populations, errors = {}, {}
    for name, (across, along) in (regions or {}).items():
        inside = (_within(x, across) & _within(y, along)).mean(axis=0)
        parts = np.array_split(inside, len(found.means))
        shares = Blocks(np.array([part.mean() for part in parts]), found.sizes)
        populations[name], errors[name] = float(shares.mean), float(shares.error)
    return FreeEnergySurface(
        pair=pair,
        angle=0.5 * (edges[1:] + edges[:-1]),
        density=found.mean.reshape(n_bins, n_bins),
        error=found.error.reshape(n_bins, n_bins),
        kT=kT,
        unit=unit,
        n_frames=x.shape[1],
        n_blocks=len(found.means),
        populations=populations,
        population_errors=errors,
        blocks=found.means.reshape(-1, n_bins, n_bins),
    )


def _within(angle: Array, arc: Arc) -> Array:
    low, high = arc
    if low <= high:
        return (angle >= low) & (angle < high)
    return (angle >= low) | (angle < high)


class FreeEnergy(_OfMolecules):
    """Free energy of two dihedrals in molecular dynamics, and populations of its basins.

    Parameters
    ----------
    dihedrals : dict of str to tuple
        Atoms of the two dihedrals by their names: `{phi: [...], psi: [...]}`.
    n_bins : int
        Bins of equal width along both axes.
    regions : dict of str to pair of ranges
        Basins by name, in degrees of the first and of the second: `{alpha: [[-180, 0], [-120,
        50]]}`. A range from a larger to a smaller number goes by way of 180.
    energy_unit : {"kT", "kJ/mol"}
        Of the free energy, at the temperature of the bench.
    """

    name = "free_energy"
    title = "free energy of two dihedrals"
    result = FreeEnergySurfaces
    symbol = "p(φ, ψ)"
    key = "free_energy"
    axes = ("First dihedral (°)", "Second dihedral (°)")

    dihedrals: dict[str, Annotated[Atoms, Field(min_length=4)]] = Field(default_factory=dict)
    n_bins: int = Field(default=36, ge=2)
    regions: dict[str, tuple[Arc, Arc]] = Field(default_factory=dict)
    energy_unit: Literal["kT", "kJ/mol"] = "kT"

    def lacks(self, bench: Bench) -> str:
        """Trajectories, or which dihedrals."""
        two = len(self.dihedrals) == 2
        return super().lacks(bench) or ("" if two else "two 'dihedrals' to look at")

    def run(self, bench: Bench, candidate: Candidate) -> FreeEnergySurfaces:
        """Take the surface of the candidate's trajectory."""
        frames = self.frames_of(bench, candidate)
        first, second = (coordinate_values(frames, atoms) for atoms in self.dihedrals.values())
        thermal = BOLTZMANN * bench.settings.temperature
        pair = ", ".join(self.dihedrals)
        found = free_energy_surface(
            pair,
            first,
            second,
            n_bins=self.n_bins,
            n_blocks=self.n_blocks,
            regions=self.regions,
            mirror_images=self.mirror_images,
            kT=1.0 if self.energy_unit == "kT" else thermal / energy_factor(self.energy_unit),
            unit=self.energy_unit,
        )
        return FreeEnergySurfaces({pair: found})

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Differences, and populations of the regions."""
        yield from super().rows(found)
        surfaces = _surfaces(found)
        for region in _regions(surfaces):
            values = {m: _population(s, region) for m, s in surfaces.items()}
            yield Row(f"Population of {region} (%)", values)

    @classmethod
    def tables(cls, found: Findings) -> Iterable[Table]:
        """Differences, and populations by model."""
        yield from super().tables(found)
        surfaces = _surfaces(found)
        if regions := _regions(surfaces):
            rows = [(m, *(_population(s, k) for k in regions)) for m, s in surfaces.items()]
            columns = ("model", *(f"{region} (%)" for region in regions))
            note = "Shares of frames with standard errors from blocks of the trajectories."
            yield Table("populations", "Populations of basins", columns, tuple(rows), note)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Maps of reference, student and controls, on one scale."""
        surfaces = _surfaces(found)
        standard = found.standard(surfaces)
        shown = [standard, found.student, *found.controls]
        shown = [m for m in shown if m in surfaces] or list(surfaces)[:3]
        top = max((float(np.nanmax(surfaces[m].free_energy)) for m in shown), default=0.0)
        panels = []
        for model in shown:
            surface = surfaces[model]
            labels = [f"{name} (°)" for name in surface.pair.split(", ")]
            colors = Colors(surface.edges, surface.edges, surface.free_energy, top=top)
            title = f"{model}, F in {surface.unit}"
            panels.append(Panel(labels[0], labels[1], [], title, colors=colors))
        unit = next(iter(surfaces.values())).unit if surfaces else ""
        caption = (
            f"Free energy in {unit} above the lowest bin; white: no frame. Bins are "
            "counted, so that those near the upper end of the scale hold one frame or two."
        )
        heading = "Free energy of two dihedrals"
        yield Drawing(cls.name, heading, caption, panels, height=3.0, legend=False)


def _surfaces(found: Findings) -> dict[str, FreeEnergySurface]:
    """The surface of every model."""
    results = found.of(FreeEnergy.name, FreeEnergySurfaces)
    return {model: next(iter(result.parts.values())) for model, result in results.items()}


def _regions(surfaces: Mapping[str, FreeEnergySurface]) -> list[str]:
    return list(dict.fromkeys(k for s in surfaces.values() for k in s.populations))


def _population(surface: FreeEnergySurface, region: str) -> str:
    share, error = surface.populations.get(region), surface.population_errors.get(region, math.nan)
    if share is None:
        return "–"
    return f"{number(100.0 * share)} ± {number(100.0 * error, 2)}"
