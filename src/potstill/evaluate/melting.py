"""Melting point from the coexistence of crystal and liquid, in LAMMPS.

Half of a long crystal is molten while the other half is held; then both move together at constant
enthalpy and pressure (Morris et al., Phys. Rev. B 49, 3109 (1994)). What is too hot melts a little
more of the crystal and cools down by it, and the other way round: the temperature becomes that of
coexistence, without a search, as long as both phases are there.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import ase
import numpy as np
import torch
from pydantic import Field

from potstill.errors import ConfigError, ModelError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.lammps_md import (
    BAR,
    LammpsEngine,
    create_velocities,
    lammps_engine,
    lammps_seed,
    read_dump,
)
from potstill.evaluate.tools import require_periodic
from potstill.report.tables import number
from potstill.report.verdicts import Verdict
from potstill.sample.md import MDJob
from potstill.soundness import Connectivity
from potstill.structures import Structures

#: Less or more crystal than this at the end is no coexistence.
_LEAST, _MOST = 0.1, 0.9

#: Order of a layer that is crystal: near the melting point it is 0.6 to 0.9, in a liquid 0.1.
_ORDERED = 0.4

#: Halves of the run that differ by more than this many standard errors are no equilibrium.
_APART = 3.0

#: Expansion of the box that no liquid reaches.
_BOILED = 1.4

#: Time between two frames and lines of numbers, fs.
_STRIDE = 100.0

_SCRIPT = """\
fix move all npt temp {t!r} {t!r} 0.1 iso {p!r} {p!r} 1.0
run {heating}
unfix move
region upper block INF INF INF INF $(0.5*(zlo+zhi)) INF units box
group liquid region upper
group solid subtract all liquid
velocity liquid create {hot!r} {seed} dist gaussian
fix move liquid npt temp {hot!r} {hot!r} 0.1 z {p!r} {p!r} 1.0 dilate liquid
run {melting}
unfix move
fix move liquid npt temp {hot!r} {t!r} 0.1 z {p!r} {p!r} 1.0 dilate liquid
run {cooling}
unfix move
velocity solid create {t!r} {seed} dist gaussian
velocity all zero linear
fix move all npt temp {t!r} {t!r} 0.1 aniso {p!r} {p!r} 1.0
run {joining}
unfix move
velocity all zero linear
fix move all nph aniso {p!r} {p!r} 1.0
run {settling}
fix numbers all print {every} "$(temp:%.10g) $(press:%.10g) $(pzz:%.10g)" file numbers.txt screen no
dump frames all custom {every} dump.txt id xu yu zu
dump_modify frames sort id format float %.8g
run {production}
"""


@dataclass(frozen=True)
class MeltingPoint(Result):
    """Temperature at which crystal and liquid coexist.

    Parameters
    ----------
    temperature, error : float
        Mean of the run at constant enthalpy, K, and its standard error from blocks.
    guess : float
        K, what the run started at.
    halves : (float, float)
        Means of the first and the second half, K.
    pressure, normal_pressure : float
        Mean pressure, and the one along the normal of the interfaces, GPa.
    solid_fractions : ndarray
        (n_blocks,) part of the box that is crystal in the course of the run.
    n_atoms : int
    duration : float
        ps.
    """

    temperature: float
    error: float
    guess: float
    halves: tuple[float, float]
    pressure: float
    normal_pressure: float
    solid_fractions: np.ndarray
    n_atoms: int
    duration: float

    @property
    def settled(self) -> bool:
        """Whether the halves of the run differ by no more than their errors."""
        return abs(self.halves[1] - self.halves[0]) <= _APART * 2.0 * self.error


def melting_point(
    crystal: ase.Atoms,
    engine: LammpsEngine,
    guess: float,
    folder: Path,
    *,
    n_atoms: int = 4000,
    pressure: float = 0.0,
    duration: float = 100.0,
    settling: float = 50.0,
    timestep: float = 2.0,
    overheating: float = 1.7,
    melting: float = 10.0,
    seed: int = 0,
    n_blocks: int = 10,
) -> MeltingPoint:
    """Melting point of a crystal by coexistence at constant enthalpy and pressure.

    The stated error is statistical. The box adds some K to it (by its size, and by the strain of
    the crystal if the guess was far off: repeat the run with the result as the guess). The guess
    may be wrong by some 15 %, the latent heat of half a box over its heat capacity.

    Parameters
    ----------
    crystal : ase.Atoms
        A cell with three right angles, periodic.
    engine : LammpsEngine
        The potential.
    guess : float
        K.
    folder : Path
        For the files of LAMMPS.
    n_atoms : int
        At least so many; the box is twice as long as it is wide.
    pressure : float
        GPa.
    duration, settling : float
        ps at constant enthalpy that count, and before.
    timestep : float
        fs.
    overheating : float
        At how many times the guess half of the crystal is molten.
    melting : float
        ps that this takes.
    seed : int
        Of the velocities.
    n_blocks : int
        Blocks that give the error.

    Raises
    ------
    ConfigError
        If the cell has other angles.
    ModelError
        If there are no two phases at the end, with what to change, or atoms have fused.
    """
    require_periodic(crystal, "the melting point")
    if not np.allclose(crystal.cell.angles(), 90.0, atol=1e-3):
        raise ConfigError(
            "the melting point needs a cell with three right angles: give the conventional cell"
        )
    repeats = coexistence_repeats(crystal, n_atoms)
    box = crystal.repeat(repeats)
    steps = {
        "heating": round(5000.0 / timestep),
        "melting": round(1000.0 * melting / timestep),
        "cooling": round(2000.0 / timestep),
        "joining": round(1000.0 / timestep),
        "settling": round(1000.0 * settling / timestep),
        "production": round(1000.0 * duration / timestep),
        "every": max(1, round(_STRIDE / timestep)),
    }
    job = MDJob(n_frames=1, temperature=guess, stride=_STRIDE, timestep=timestep)
    moves = _SCRIPT.format(
        t=float(guess),
        hot=float(overheating * guess),
        p=pressure / BAR,
        seed=lammps_seed(seed) + 1,
        **steps,
    )
    structures = Structures.from_ase(box)
    head = engine.script(job, structures, create_velocities(guess, seed))
    engine.run(folder, structures, head + moves)
    numbers = np.loadtxt(folder / "numbers.txt")[1:]  # the first is before the first step
    frames = read_dump(folder / "dump.txt")
    if np.linalg.det(frames[0][1]) > _BOILED * box.get_volume():
        raise ModelError(
            f"the liquid boiled at {overheating * guess:.0f} K and {pressure:g} GPa: choose a "
            "smaller overheating or a higher pressure"
        )
    blocks = np.array_split(numbers[:, 0], n_blocks)
    means = np.array([block.mean() for block in blocks])
    ends = np.linspace(0, len(frames) - 1, n_blocks + 1).astype(int)[1:]
    check_apart(structures, ((frames[k][2][:, 1:4], frames[k][1]) for k in ends))
    order = LayerOrder(crystal, repeats)
    fractions = np.array([order.solid_fraction(frames[k][2][:, 1:4], frames[k][1]) for k in ends])
    if not _LEAST <= fractions[-1] <= _MOST:
        gone, change = ("crystal", "lower") if fractions[-1] < _LEAST else ("liquid", "higher")
        raise ModelError(
            f"no {gone} is left at {numbers[-len(blocks[-1]) :, 0].mean():.0f} K: start from a "
            f"{change} guess than {guess:g} K"
        )
    half = len(numbers) // 2
    return MeltingPoint(
        temperature=float(numbers[:, 0].mean()),
        error=float(means.std(ddof=1) / math.sqrt(n_blocks)),
        guess=float(guess),
        halves=(float(numbers[:half, 0].mean()), float(numbers[half:, 0].mean())),
        pressure=float(BAR * numbers[:, 1].mean()),
        normal_pressure=float(BAR * numbers[:, 2].mean()),
        solid_fractions=fractions,
        n_atoms=len(box),
        duration=float(duration),
    )


def check_apart(start: Structures, frames: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Refuse frames in which atoms have fused, as in the liquid of a poor student.

    Parameters
    ----------
    start : Structures
        The crystal.
    frames : iterable of (ndarray, ndarray)
        Positions (N, 3) and cells (3, 3) later on, Å.

    Raises
    ------
    ModelError
        With the atoms and their distance.
    """
    whole = Connectivity.of(start)
    for positions, cell in frames:
        frame = replace(
            start, positions=torch.from_numpy(positions), cell=torch.from_numpy(cell[None])
        )
        if symptom := whole.symptom(frame, apart=False):
            raise ModelError(
                f"there is no melting point, {symptom}: the potential fails in the liquid"
            )


def coexistence_repeats(crystal: ase.Atoms, n_atoms: int) -> tuple[int, int, int]:
    """Repeats of a cell that make a box twice as long along z as it is wide."""
    lengths, volume = crystal.cell.lengths(), crystal.get_volume() / len(crystal)
    width = (0.5 * n_atoms * volume) ** (1.0 / 3.0)
    nx, ny = (max(2, round(width / length)) for length in lengths[:2])
    nz = math.ceil(n_atoms / len(crystal) / (nx * ny))
    return nx, ny, nz + nz % 2


class LayerOrder:
    """How crystalline the layers of a box are, by the Fourier component of the lattice in them.

    Parameters
    ----------
    crystal : ase.Atoms
        The unit cell, of right angles.
    repeats : (int, int, int)
        How often it is repeated in the box.
    """

    def __init__(self, crystal: ase.Atoms, repeats: tuple[int, int, int]) -> None:
        self.n_layers = repeats[2]
        waves = np.array(
            [(h, k) for h, k in itertools.product(range(-3, 4), range(4)) if k or h > 0]
        )
        place = crystal.get_scaled_positions()[:, :2]
        strength = np.abs(np.exp(2j * np.pi * place @ waves.T).mean(axis=0))
        length = np.linalg.norm(waves / crystal.cell.lengths()[:2], axis=1)
        strong = strength > strength.max() - 1e-3
        # The shortest of the strongest: thermal motion weakens these least.
        self.waves = waves[strong & (length < 1.01 * length[strong].min())] * repeats[:2]

    def of_layers(self, positions: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """(n_layers,) order of the layers along z, 1 for a perfect crystal and 0 for a liquid."""
        scaled = positions @ np.linalg.inv(cell)
        layer = np.floor(scaled[:, 2] % 1.0 * self.n_layers).astype(int) % self.n_layers
        phases = np.exp(2j * np.pi * scaled[:, :2] @ self.waves.T)
        counts = np.maximum(np.bincount(layer, minlength=self.n_layers), 1)
        sums = [
            np.abs(
                np.bincount(layer, wave.real, self.n_layers)
                + 1j * np.bincount(layer, wave.imag, self.n_layers)
            )
            for wave in phases.T
        ]
        return np.mean(sums, axis=0) / counts

    def solid_fraction(self, positions: np.ndarray, cell: np.ndarray) -> float:
        """Part of the layers that are crystal."""
        return float((self.of_layers(positions, cell) > _ORDERED).mean())


class Melting(Evaluation):
    """Melting point by coexistence in LAMMPS, of checkpoints and potentials of LAMMPS.

    Parameters
    ----------
    guess : float
        K, within some 15 % of the melting point; it must be given.
    n_atoms : int
        Size of the box.
    pressure : float
        GPa.
    duration, settling : float
        ps at constant enthalpy that count, and before.
    overheating : float
        At how many times the guess half of the crystal is molten.
    melting : float
        ps that this takes.
    n_ranks : int
        MPI ranks.
    """

    name = "melting"
    title = "melting point"
    result = MeltingPoint
    section = "Dynamics"
    needs = "crystal"
    on_request = True

    guess: float | None = Field(default=None, gt=0)
    n_atoms: int = Field(default=4000, ge=500)
    pressure: float = 0.0
    duration: float = Field(default=100.0, gt=0)
    settling: float = Field(default=50.0, ge=0)
    overheating: float = Field(default=1.7, gt=1)
    melting: float = Field(default=10.0, gt=0)
    n_ranks: int = Field(default=1, ge=1)

    def run(self, bench: Bench, candidate: Candidate) -> MeltingPoint:
        """Melt half of the candidate's crystal."""
        if self.guess is None:
            raise ConfigError("the melting point needs a first guess: melting: {guess: 900}")
        settings = self.model_dump(exclude={"guess", "n_ranks"})
        settings |= {"timestep": bench.settings.timestep, "seed": bench.settings.seed}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            engine = lammps_engine(candidate.spec, candidate.args, folder, n_ranks=self.n_ranks)
            return melting_point(bench.atoms, engine, self.guess, folder, **settings)

    @classmethod
    def metrics(cls, result: MeltingPoint) -> dict[str, float]:
        """Temperature and its statistical error."""
        return {"melting_point": result.temperature, "melting_point_error": result.error}

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Warn where the temperature still drifts."""
        for model, r in found.of(cls.name, MeltingPoint).items():
            if not r.settled:
                yield Verdict(
                    f"The coexistence of '{model}' has not settled: the halves of the run are at "
                    f"{number(r.halves[0], 4)} and {number(r.halves[1], 4)} K. Run it longer, or "
                    "from a guess in between."
                )
