"""What all ways of sampling share: seeded generators, sampled frames, jobs, atomic files."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from potstill.errors import ConfigError, DataError
from potstill.files import write_atomically
from potstill.species import SpeciesTable
from potstill.structures import Structures

#: Called with (work done, work in all); the unit of work is one call of the calculator.
Progress = Callable[[int, int], None]


#: Atoms that are this many times hotter than asked have exploded.
EXPLODED = 10.0
#: Below this temperature in K the limit stays where it is here: a strained start may heat a
#: cold run for a moment.
COLD = 300.0


# -- random numbers ------------------------------------------------------------------------------


def make_generator(seed: int, *key: int) -> np.random.Generator:
    """Make an independent random generator for each (seed, key).

    The key says what it is for: the number of a job and of a frame in it, say.
    """
    if seed < 0:
        raise ConfigError(f"a seed must not be negative: {seed}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *key])))


def dump_generator(generator: np.random.Generator) -> str:
    """Write the state of a generator as JSON; `load_generator` continues exactly there."""
    return json.dumps(generator.bit_generator.state)


def load_generator(state: str) -> np.random.Generator:
    """Inverse of `dump_generator`."""
    bits = np.random.PCG64()
    bits.state = json.loads(state)
    return np.random.Generator(bits)


# -- files ---------------------------------------------------------------------------------------


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays to a .npz file, atomically."""
    write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a file of sampled frames ({error})") from error


# -- frames --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampledFrames:
    """Structures and where they come from.

    Parameters
    ----------
    structures : Structures
        S systems; velocities in Å/fs are zero where nothing moved, `group` is the name of the job,
        and `frame_id` says in words where the frame comes from.
    temperature : Tensor
        (S,) float64, K, the target at that moment; NaN without a thermostat.
    pressure : Tensor
        (S,) float64, GPa, the target; NaN at constant volume.
    energy : Tensor
        (S,) float64, eV, by the calculator that drove the sampling; NaN where none was called.
    job : Tensor
        (S,) int64, number of the job in its plan.
    time : Tensor
        (S,) float64, fs since the start of the job; NaN for frames that are independent of one
        another.
    """

    structures: Structures
    temperature: Tensor
    pressure: Tensor
    energy: Tensor
    job: Tensor
    time: Tensor

    def __post_init__(self) -> None:
        n = self.structures.n_systems
        for name in _COLUMNS:
            if tuple(getattr(self, name).shape) != (n,):
                raise DataError(f"{name} has shape {tuple(getattr(self, name).shape)}, not ({n},)")

    def __len__(self) -> int:
        return self.structures.n_systems

    @classmethod
    def independent(cls, structures: Structures) -> SampledFrames:
        """Frames without dynamics: no temperature, pressure, energy or time."""
        nan = torch.full((structures.n_systems,), torch.nan, dtype=torch.float64)
        job = torch.zeros(structures.n_systems, dtype=torch.int64)
        return cls(structures, nan, nan.clone(), nan.clone(), job, nan.clone())

    def select(self, frames: Sequence[int] | Tensor) -> SampledFrames:
        """Return the given frames in the given order."""
        frames = torch.as_tensor(frames, dtype=torch.int64)
        columns = {name: getattr(self, name)[frames] for name in _COLUMNS}
        return SampledFrames(self.structures.select(frames), **columns)

    @classmethod
    def concatenate(cls, parts: Sequence[SampledFrames]) -> SampledFrames:
        """Join frames."""
        structures = Structures.concatenate([part.structures for part in parts])
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS}
        return cls(structures, **columns)

    def save(self, path: Path) -> None:
        """Write all values, bit for bit and atomically, to a .npz file."""
        arrays = structures_to_arrays(self.structures)
        write_arrays(path, arrays | {name: getattr(self, name).numpy() for name in _COLUMNS})

    @classmethod
    def load(cls, path: Path) -> SampledFrames:
        """Inverse of `save`."""
        arrays = read_arrays(path)
        columns = {name: torch.from_numpy(arrays.pop(name)) for name in _COLUMNS}
        return cls(structures_from_arrays(arrays), **columns)


_COLUMNS = ("temperature", "pressure", "energy", "job", "time")


def structures_to_arrays(structures: Structures) -> dict[str, np.ndarray]:
    """Fields of a batch as plain arrays; names and the species table become JSON text."""
    arrays = {}
    for item in fields(structures):
        value = getattr(structures, item.name)
        if isinstance(value, Tensor):
            arrays[item.name] = value.cpu().numpy()
        elif isinstance(value, SpeciesTable):
            arrays[item.name] = np.array(json.dumps(value.to_json()))
        elif value is not None:
            arrays[item.name] = np.array(json.dumps(list(value)))
    return arrays


def structures_from_arrays(arrays: dict[str, np.ndarray]) -> Structures:
    """Inverse of `structures_to_arrays`."""
    values: dict[str, Any] = {}
    for name, array in arrays.items():
        if name == "species_table":
            values[name] = SpeciesTable.from_json(json.loads(str(array)))
        elif name in ("group", "frame_id"):
            values[name] = tuple(json.loads(str(array)))
        else:
            values[name] = torch.from_numpy(array)
    return Structures(**values)


# -- jobs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """How a job is run, as of `Job.run`: seed and number, folder for checkpoints, progress."""

    seed: int
    number: int = 0
    folder: Path | None = None
    progress: Progress | None = None

    def generator(self, *key: int) -> np.random.Generator:
        """The job's own random generator, or one for a key within it."""
        return make_generator(self.seed, self.number, *key)

    def tell(self, done: int, total: int) -> None:
        """Report progress, if requested."""
        if self.progress is not None:
            self.progress(done, total)


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """One way of making frames from one starting structure.

    A job is a plain record: running it twice with the same starting structure, calculator and
    seed gives the same frames bit for bit, whether or not it was interrupted.

    Parameters
    ----------
    n_frames : int
        How many frames it makes.
    system : int
        Which of the plan's starting structures it starts from.
    name : str
        Becomes the `group` of its frames; made from the settings where empty.
    """

    kind: ClassVar[str]

    n_frames: int
    system: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if self.n_frames < 1:
            raise ConfigError(f"a {self.kind} job needs at least one frame, not {self.n_frames}")
        if self.system < 0:
            raise ConfigError(f"a {self.kind} job's system must not be negative: {self.system}")
        if not self.name:
            object.__setattr__(self, "name", self.default_name())

    @abstractmethod
    def default_name(self) -> str:
        """Name the job by its settings."""

    @property
    def n_evaluations(self) -> int:
        """How often the calculator will be called, at least."""
        return 0

    def check(self, start: Structures, calculator: BaseCalculator | None) -> None:
        """Refuse a starting structure or calculator that the job cannot use.

        Raises
        ------
        ConfigError
            In words that name the job.
        """
        if self.n_evaluations and calculator is None:
            raise ConfigError(f"the job '{self.name}' needs a calculator")

    def run(
        self,
        start: Structures,
        calculator: BaseCalculator | None = None,
        *,
        seed: int,
        number: int = 0,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> SampledFrames:
        """Make the frames of one system, `start`, with a calculator where the job needs one.

        `seed` of the plan and `number` of the job in it seed its random numbers. Long jobs keep
        checkpoints in `folder` and resume from them. `progress` is called with (work done, work in
        all).

        Raises
        ------
        ConfigError
            If the job cannot use the start or the calculator.
        DivergenceError
            If atoms leave the finite numbers.
        """
        self.check(one_system(start), calculator)
        return self.make(start, calculator, Call(seed, number, folder, progress))

    @abstractmethod
    def make(
        self, start: Structures, calculator: BaseCalculator | None, call: Call
    ) -> SampledFrames:
        """Make the frames from a start and with a calculator that have been checked."""

    def to_json(self) -> dict[str, Any]:
        """Settings as plain values, with the kind."""
        return {"kind": self.kind, **asdict(self)}


#: From the number of a frame and its generator to the frame, and a few words about it.
Maker = Callable[[int, np.random.Generator], tuple[Structures, str]]


@dataclass(frozen=True, kw_only=True)
class IndependentJob(Job):
    """Independent frames, each with its own random generator."""

    @abstractmethod
    def maker(self, start: Structures, calculator: BaseCalculator | None) -> Maker:
        """Return the function that makes the frames."""

    def make(
        self, start: Structures, calculator: BaseCalculator | None, call: Call
    ) -> SampledFrames:
        """Make the frames one by one."""
        make = self.maker(start, calculator)
        frames = []
        for k in range(self.n_frames):
            frame, words = make(k, call.generator(k))
            frames.append(as_frame(frame, self.name, f"{self.name}: frame {k}{words}"))
        return SampledFrames.independent(Structures.concatenate(frames))

    def spread(self, value: float | Sequence[float]) -> list[float]:
        """`n_frames` evenly spaced numbers of a range."""
        return np.linspace(*as_pair(value), self.n_frames).tolist()


def one_system(start: Structures) -> Structures:
    """Return `start` if it holds exactly one system with atoms, or raise `ConfigError`."""
    if start.n_systems != 1 or start.n_atoms == 0:
        raise ConfigError(
            f"sampling starts from one structure with atoms, not {start.n_systems} structures "
            f"with {start.n_atoms} atoms"
        )
    return start


def gaussian_step(structure: Structures, width: float, generator: np.random.Generator) -> Tensor:
    """(N, 3) Gaussian displacements of the given width in Å, zero for fixed atoms."""
    step = torch.from_numpy(generator.normal(0.0, 1.0, (structure.n_atoms, 3))) * width
    step[~structure.free] = 0.0
    return step


def random_strain(
    structure: Structures, max_strain: float, generator: np.random.Generator
) -> Structures:
    """Apply a symmetric strain with components even in [-max_strain, max_strain]."""
    xx, yy, zz, yz, xz, xy = generator.uniform(-max_strain, max_strain, 6)
    strain = torch.tensor([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], dtype=torch.float64)
    return structure.deformed(torch.eye(3, dtype=torch.float64) + strain)


def as_frame(structure: Structures, group: str, origin: str) -> Structures:
    """One system with its group, where it comes from, and velocities of zero."""
    return replace(
        structure,
        velocities=torch.zeros_like(structure.positions),
        group=(group,),
        frame_id=(origin,),
    )


def as_pair(value: float | Sequence[float]) -> tuple[float, float]:
    """Read a number as the range from it to itself."""
    low, high = value if isinstance(value, Sequence) else (value, value)
    return float(low), float(high)


def span(value: float | Sequence[float]) -> str:
    """Write a number or a range, as in `300` or `300-1500`."""
    low, high = as_pair(value)
    return f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}"
