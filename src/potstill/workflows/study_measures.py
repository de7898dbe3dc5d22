"""What a study measures once its cells are trained: liquid structure, speed and memory.

Timings are taken one after the other, never beside training; one model stands for all of its size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ase
import torch
from ase.build import bulk
from ase.calculators.calculator import BaseCalculator
from pydantic import BaseModel, ConfigDict, Field

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.errors import PotstillError
from potstill.evaluate.memory import memory_per_atom
from potstill.evaluate.rdf import RadialDistribution, compare_radial, radial_distribution
from potstill.evaluate.speed import md_speed
from potstill.files import write_atomically
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.sample.md import run_md
from potstill.structures import Structures
from potstill.teachers import make_teacher
from potstill.teachers.base import TeacherCalculator

#: Stands for the reference liquid among the measured models.
REFERENCE = "reference"

#: Timesteps between two frames of a distribution.
_STRIDE = 20

#: Atoms have fused where they come closer than this share of the shortest distance in training:
#: no potential knows what is there, and some have a hole.
_FUSED = 0.7

#: Å; shorter distances are looked for.
_NEAR = 2.5


class ReferenceLiquid(BaseModel):
    """A potential from elsewhere, whose liquid those of the models are compared with.

    It starts from the liquid of the first model that has one, since it may be slow.

    Parameters
    ----------
    name : str
        What it is called in tables and figures.
    teacher : str
        As `potstill label` takes it.
    arguments : dict
        The teacher's.
    equilibration, production : float
        fs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    teacher: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    equilibration: float = 1000.0
    production: float = 4000.0


class MeasureSettings(BaseModel):
    """Molecular dynamics with the trained models.

    Parameters
    ----------
    element, crystal, lattice_constant : str, str, float
        The crystal that is melted and timed, as `ase.build.bulk` takes it (Å).
    repeat : int
        Cubic cells along each axis for the liquid.
    melting_temperature, temperature : float
        K: the crystal is melted at the first, the distribution is taken at the second. Far above
        what the training data hold, atoms may fuse in potentials without a short-range prior.
    density_scale : float
        Linear expansion of the cell before melting.
    timestep : float
        fs.
    melting, equilibration, production : float
        fs.
    reference : ReferenceLiquid, optional
        A potential from elsewhere whose liquid is measured as well.
    speed_sizes : tuple of int
        Atoms of the timings, in NVE with steps of 1 fs.
    memory_sizes : tuple of int
        Atoms of the memory measurements.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    element: str
    crystal: str
    lattice_constant: float
    repeat: int = 4
    melting_temperature: float
    temperature: float
    density_scale: float = 1.0
    timestep: float = 2.0
    melting: float = 2000.0
    equilibration: float = 2000.0
    production: float = 8000.0
    reference: ReferenceLiquid | None = None
    speed_sizes: tuple[int, ...] = (500, 4000)
    memory_sizes: tuple[int, ...] = (1000, 2000, 4000)
    seed: int = Field(default=0, ge=0)

    @property
    def crystal_cell(self) -> ase.Atoms:
        """The cubic unit cell."""
        return bulk(self.element, self.crystal, a=self.lattice_constant, cubic=True)


@dataclass(frozen=True)
class TrainedModel:
    """A finished cell: where its potential is, and which teacher it is compared with."""

    name: str
    size: str
    path: Path
    teacher_name: str | None


def measure_study(
    models: Iterable[TrainedModel],
    settings: MeasureSettings,
    folder: Path,
    *,
    on_model: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure every model; what has been measured before is read from `folder`.

    Returns
    -------
    dict of str to dict
        By model name: `rdf_error` (Å, integral of the absolute difference to its teacher's RDF),
        `rdf_error_noise`, `rdf_error_reference` and its noise (the same to the reference liquid),
        `rdf_failure` (what went wrong in MD), `time_per_step_atom_us`, `memory_per_atom_kib`.
    """
    models = list(models)
    result: dict[str, dict[str, Any]] = {model.name: {} for model in models}
    for model in models:
        if on_model is not None:
            on_model(model.name)
        _cached(folder / f"rdf-{model.name}.json", partial(_liquid, model, settings))
    if settings.reference is not None:
        if on_model is not None:
            on_model(settings.reference.name)
        _cached(folder / f"rdf-{REFERENCE}.json", partial(_reference, models, settings, folder))
    for model in models:
        result[model.name] |= _rdf_errors(model, folder)
    representatives = {model.size: model for model in reversed(models)}
    # All sizes are timed in one go, so that they can be compared: a new size means new timings.
    speed_file = folder / f"speed-{'-'.join(sorted(representatives))}.json"
    speeds = _cached(speed_file, partial(_speeds, representatives, settings))
    for model in models:
        result[model.name]["time_per_step_atom_us"] = speeds[model.size]
    for size, model in representatives.items():
        memory = _cached(folder / f"memory-{size}.json", partial(_memory, model, settings))
        for other in models:
            if other.size == size:
                result[other.name]["memory_per_atom_kib"] = memory["bytes_per_atom"] / 1024
    return result


def stored_distribution(folder: Path, name: str) -> RadialDistribution | None:
    """The RDF of a model, or of the `REFERENCE`; None where it failed or was not measured."""
    file = folder / f"rdf-{name}.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    return RadialDistribution.from_json(record["rdf"]) if "rdf" in record else None


def _liquid(model: TrainedModel, settings: MeasureSettings) -> dict[str, Any]:
    """RDF of the liquid, or why there is none: the dynamics exploded, or atoms fused."""
    potential, info = load_potential(model.path)
    calculator = PotstillCalculator(potential)
    try:
        melt = _melt(calculator, settings)
        frames = _sample(
            melt, calculator, settings, settings.equilibration, settings.production, None
        )
    except PotstillError as error:
        return {"failure": str(error)}
    closest = _closest(frames)
    trained = min(info["trained_on"]["shortest_distances"].values())
    if closest < _FUSED * trained:
        return {
            "failure": f"atoms fused: a pair came to {closest:.2f} Å, where the training data have "
            f"none below {trained:.2f} Å"
        }
    return {"rdf": radial_distribution(frames).to_json(), "closest": closest}


def _closest(frames: Structures) -> float:
    """Shortest distance in any frame, Å."""
    neighbors = build_neighbor_list(frames, _NEAR)
    if neighbors.n_pairs == 0:
        return _NEAR
    return float(torch.linalg.vector_norm(pair_vectors(frames, neighbors), dim=1).min())


def _reference(
    models: Sequence[TrainedModel], settings: MeasureSettings, folder: Path
) -> dict[str, Any]:
    """RDF of the reference liquid; interrupted, it goes on where it was."""
    reference = settings.reference
    assert reference is not None
    intact = [m for m in models if stored_distribution(folder, m.name) is not None]
    if not intact:
        return {"failure": "no model has a liquid for it to start from"}
    calculator = TeacherCalculator(make_teacher(reference.teacher, reference.arguments))
    melt = _melt(PotstillCalculator(load_potential(intact[0].path)[0]), settings)
    times = (reference.equilibration, reference.production)
    frames = _sample(melt, calculator, settings, *times, folder / REFERENCE)
    return {"rdf": radial_distribution(frames).to_json()}


def _melt(calculator: BaseCalculator, settings: MeasureSettings) -> Structures:
    """The crystal, melted well above its melting point."""
    crystal = settings.crystal_cell.repeat(settings.repeat)
    crystal.set_cell(crystal.cell * settings.density_scale, scale_atoms=True)
    frames = run_md(
        Structures.from_ase(crystal),
        calculator,
        temperature=settings.melting_temperature,
        n_frames=1,
        seed=settings.seed,
        equilibration=settings.melting,
        timestep=settings.timestep,
        stride=_STRIDE * settings.timestep,
    )
    return frames.structures[-1]


def _sample(
    melt: Structures,
    calculator: BaseCalculator,
    settings: MeasureSettings,
    equilibration: float,
    production: float,
    folder: Path | None,
) -> Structures:
    """Frames of the liquid at the temperature of the distribution."""
    stride = _STRIDE * settings.timestep
    frames = run_md(
        melt,
        calculator,
        temperature=settings.temperature,
        n_frames=round(production / stride),
        seed=settings.seed + 1,
        equilibration=equilibration,
        timestep=settings.timestep,
        stride=stride,
        folder=folder,
    )
    return frames.structures


def _rdf_errors(model: TrainedModel, folder: Path) -> dict[str, Any]:
    own = stored_distribution(folder, model.name)
    if own is None:
        return {
            "rdf_failure": json.loads((folder / f"rdf-{model.name}.json").read_text())["failure"]
        }
    errors: dict[str, Any] = {}
    others = {"": model.teacher_name, "_reference": REFERENCE}
    for suffix, name in others.items():
        other = None if name is None else stored_distribution(folder, name)
        if other is not None:
            difference = compare_radial(own, other)
            errors[f"rdf_error{suffix}"] = difference.integrated_absolute_error
            errors[f"rdf_error{suffix}_sum"] = difference.total_absolute_error
            errors[f"rdf_error{suffix}_noise"] = difference.expected_from_noise
    return errors


def _speeds(models: dict[str, TrainedModel], settings: MeasureSettings) -> dict[str, float]:
    calculators = {size: PotstillCalculator(m.path) for size, m in models.items()}
    table = md_speed(
        calculators,
        settings.crystal_cell,
        sizes=settings.speed_sizes,
        rounds=3,
        timestep=1.0,
    )
    largest = max(settings.speed_sizes)
    result = {}
    for size in models:
        rows = table.of(size)
        row = rows[min(rows, key=lambda n: abs(n - largest))]
        result[size] = 1e6 * row.seconds_per_step / row.n_atoms
    return result


def _memory(model: TrainedModel, settings: MeasureSettings) -> dict[str, float]:
    use = memory_per_atom(str(model.path), settings.crystal_cell, sizes=settings.memory_sizes)
    return {"bytes_per_atom": use.bytes_per_atom, "error": use.error}


def _cached(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read a measurement, or make and keep it."""
    if file.is_file():
        return json.loads(file.read_text())
    value = measure()
    text = json.dumps(value)
    write_atomically(file, text)
    return value
