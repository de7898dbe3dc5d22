"""What an experiment measures once its runs are trained; what has been measured is kept in files.

Timings are taken one after the other, never beside training; one model stands for all of its
architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ase
import torch
from ase.build import bulk
from ase.calculators.calculator import BaseCalculator
from pydantic import Field, model_validator

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.distill.taps import CHOSEN_PAIRS, TapPair
from potstill.errors import PotstillError
from potstill.evaluate.base import Bench, BenchSettings, Candidate
from potstill.evaluate.cka import cka_matrix, linear_probes
from potstill.evaluate.distributions import compare_distributions
from potstill.evaluate.memory import memory_per_atom
from potstill.evaluate.rdf import RadialDistribution, radial_distribution
from potstill.evaluate.speed import inference_throughput, md_speed
from potstill.evaluate.table import EVALUATIONS, Options, attempt, make_evaluations
from potstill.experiments.run import RunRecord, best_of, held_out_errors
from potstill.experiments.spec import Experiment, GivenTeacher, Run, TrainedTeacher
from potstill.models import Potential
from potstill.sample.md import run_md
from potstill.soundness import closest_pairs, fused
from potstill.structures import Structures
from potstill.teachers.base import TeacherCalculator
from potstill.workflows.base import (
    Settings,
    TeacherSettings,
    read_json,
    read_start,
    write_json,
)
from potstill.workflows.data import load_parts

#: Timesteps between two frames of a distribution.
_STRIDE = 20

#: Stands for the reference liquid among those of the runs.
REFERENCE = "reference"


@dataclass(frozen=True)
class Finished:
    """The finished runs of an experiment; measures of them are kept in the folder `measures/`.

    `say` is told what is measured next; `others` are checkpoints of potentials that are judged
    beside the runs, by name.
    """

    experiment: Experiment
    folder: Path
    records: Mapping[Run, RunRecord]
    say: Callable[[str], None] | None = None
    others: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def beside(self) -> dict[str, Potential]:
        """The potentials of `others`, loaded once."""
        return {name: load_potential(file)[0] for name, file in self.others.items()}

    def cached(self, kind: str, of: str, measure: Callable[..., Any], *args: Any) -> Any:
        """Read a measure of a run, size or model, or take it with these arguments and keep it."""
        file = self.folder / "measures" / f"{kind}-{of}.json"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            if self.say is not None:
                self.say(file.stem)
            write_json(file, measure(*args))
        return read_json(file)

    def best(self, run: Run) -> Path:
        """The potential of a run."""
        return best_of(self.folder, run)


# -- the liquid, and the cost of dynamics ----------------------------------------------------------


class ReferenceLiquid(Settings):
    """An external potential whose liquid is the reference for those of the models.

    Its MD starts from the liquid of the first model that has one, since it may be slow.

    Parameters
    ----------
    name : str
        Name in tables and figures.
    teacher : str
        The potential, as `potstill label` takes a teacher.
    arguments : dict
        Keyword arguments of the teacher.
    equilibration, production : float
        Duration in fs.
    """

    name: str
    teacher: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    equilibration: float = 1000.0
    production: float = 4000.0


class LiquidSettings(Settings):
    """Molecular dynamics with the trained models.

    Parameters
    ----------
    element, crystal, lattice_constant : str, str, float
        Crystal to melt and to time, as in `ase.build.bulk` (lattice constant in Å).
    repeat : int
        Cubic cells along each axis for the liquid.
    melting_temperature : float
        Temperature in K at which the crystal is melted. Far above the training data, atoms may
        fuse in potentials without a short-range prior.
    temperature : float
        Temperature of the liquid in K.
    density_scale : float
        Linear expansion of the cell before melting.
    timestep : float
        MD timestep in fs.
    melting, equilibration, production : float
        Duration in fs.
    reference : ReferenceLiquid, optional
        External potential whose liquid is measured as well.
    speed_sizes : tuple of int
        Numbers of atoms for timings, in NVE with steps of 1 fs.
    memory_sizes : tuple of int
        Numbers of atoms for memory measurements.
    seed : int
        Seed of the velocities.
    """

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

    def measure(self, finished: Finished) -> dict[str, Any]:
        """Structure of the liquid, and speed and memory.

        Returns
        -------
        dict
            `reference`: the g(r) of the reference liquid or None. `runs`, by name: `rdf_error` (Å,
            integral of the absolute difference to its teacher's RDF), `rdf_error_noise`,
            `rdf_error_reference` and its noise (the same to the reference liquid), `rdf_failure`
            (what went wrong in MD), `time_per_step_atom_us`, `memory_per_atom_kib`.
        """
        runs = list(finished.records)
        liquids = {
            run.name: finished.cached("rdf", run.name, self._liquid, finished.best(run))
            for run in runs
        }
        if self.reference is not None:
            own = finished.cached("rdf", REFERENCE, self._reference, finished, liquids)
            liquids[REFERENCE] = own
        rdfs = {name: _distribution(found) for name, found in liquids.items()}
        found: dict[str, dict[str, Any]] = {run.name: {} for run in runs}
        for run in runs:
            own, teacher = rdfs[run.name], finished.experiment.teacher_of(run)
            if own is None:
                found[run.name]["rdf_failure"] = liquids[run.name]["failure"]
                continue
            for key, name in (("", teacher and teacher.name), ("_reference", REFERENCE)):
                other = rdfs.get(str(name))
                if other is not None:
                    found[run.name] |= _difference(f"rdf_error{key}", own, other)
        # All sizes are timed in one go, so that they can be compared: a new one means new timings.
        models = {run.variant.group: finished.best(run) for run in reversed(runs)}
        speeds = finished.cached("speed", "-".join(sorted(models)), self._speeds, models)
        for size, path in models.items():
            memory = finished.cached("memory", size, self._memory, path)
            for run in runs:
                if run.variant.group == size:
                    found[run.name]["time_per_step_atom_us"] = speeds[size]
                    found[run.name]["memory_per_atom_kib"] = memory["bytes_per_atom"] / 1024
        reference = rdfs.get(REFERENCE)
        return {"runs": found, "reference": reference and reference.to_json()}

    def _liquid(self, path: Path) -> dict[str, Any]:
        """RDF of the liquid, or why there is none: the dynamics exploded, or atoms fused."""
        potential, info = load_potential(path)
        calculator = PotstillCalculator(potential)
        try:
            frames = self._sample(self._melt(calculator), calculator, self)
        except PotstillError as error:
            return {"failure": str(error)}
        # No potential knows what is there once atoms have fused, and some have a hole.
        distances = closest_pairs(frames)
        if symptom := fused(distances, info["trained_on"]["shortest_distances"]):
            return {"failure": symptom}
        return {
            "rdf": radial_distribution(frames).to_json(),
            "closest": min(distances.values(), default=None),
        }

    def _reference(self, finished: Finished, liquids: Mapping[str, Any]) -> dict[str, Any]:
        """RDF of the reference liquid; an interrupted one resumes where it stopped."""
        reference = self.reference
        assert reference is not None
        intact = [run for run in finished.records if "rdf" in liquids[run.name]]
        if not intact:
            return {"failure": "no model has a stable liquid to start from"}
        teacher = TeacherSettings(spec=reference.teacher, args=reference.arguments).make()
        melt = self._melt(PotstillCalculator(load_potential(finished.best(intact[0]))[0]))
        folder = finished.folder / "measures" / REFERENCE
        frames = self._sample(melt, TeacherCalculator(teacher), reference, folder)
        return {"rdf": radial_distribution(frames).to_json()}

    def _melt(self, calculator: BaseCalculator) -> Structures:
        """The crystal, melted well above its melting point."""
        crystal = self.crystal_cell.repeat(self.repeat)
        crystal.set_cell(crystal.cell * self.density_scale, scale_atoms=True)
        frames = run_md(
            Structures.from_ase(crystal),
            calculator,
            temperature=self.melting_temperature,
            n_frames=1,
            seed=self.seed,
            equilibration=self.melting,
            timestep=self.timestep,
            stride=_STRIDE * self.timestep,
        )
        return frames.structures[-1]

    def _sample(
        self,
        melt: Structures,
        calculator: BaseCalculator,
        times: ReferenceLiquid | LiquidSettings,
        folder: Path | None = None,
    ) -> Structures:
        """Frames of the liquid at the temperature of the distribution."""
        stride = _STRIDE * self.timestep
        frames = run_md(
            melt,
            calculator,
            temperature=self.temperature,
            n_frames=round(times.production / stride),
            seed=self.seed + 1,
            equilibration=times.equilibration,
            timestep=self.timestep,
            stride=stride,
            folder=folder,
        )
        return frames.structures

    def _speeds(self, models: Mapping[str, Path]) -> dict[str, float]:
        """Time per step and atom (µs) of the system nearest to the largest size."""
        calculators = {size: PotstillCalculator(path) for size, path in models.items()}
        sizes, cell = self.speed_sizes, self.crystal_cell
        table = md_speed(calculators, cell, sizes=sizes, rounds=3, timestep=1.0)
        found = {}
        for size in models:
            rows = table.of(size)
            row = rows[min(rows, key=lambda n: abs(n - max(sizes)))]
            found[size] = 1e6 * row.seconds_per_step / row.n_atoms
        return found

    def _memory(self, path: Path) -> dict[str, float]:
        use = memory_per_atom(str(path), self.crystal_cell, sizes=self.memory_sizes)
        return {"bytes_per_atom": use.bytes_per_atom, "error": use.error}


def stored_distribution(folder: Path, name: str) -> RadialDistribution | None:
    """The g(r) of a run, or of the `REFERENCE`; None where it failed or was not measured."""
    return _distribution(read_json(folder / "measures" / f"rdf-{name}.json", {}))


def _distribution(found: Mapping[str, Any]) -> RadialDistribution | None:
    return RadialDistribution.from_json(found["rdf"]) if "rdf" in found else None


def _difference(
    key: str, own: RadialDistribution, other: RadialDistribution
) -> dict[str, float | None]:
    difference = compare_distributions(own, other)
    return {
        key: difference.integrated_absolute_error,
        f"{key}_sum": difference.total_absolute_error,
        f"{key}_noise": difference.expected_from_noise,
    }


# -- any evaluation --------------------------------------------------------------------------------


class EvaluationsSettings(Settings):
    """Evaluations of `potstill.evaluate.table` for every trained model.

    Parameters
    ----------
    tests : dict of str to dict
        Evaluations to run, with their settings: `{eos: {}, nve: {duration: 5}}`.
    structure : str, optional
        Starting structure for properties and MD.
    settings : BenchSettings
        Settings shared by all evaluations.
    """

    tests: Options = Field(min_length=1)
    structure: str | None = None
    settings: BenchSettings = Field(default_factory=BenchSettings)

    @model_validator(mode="after")
    def _applicable(self) -> EvaluationsSettings:
        for name in self.tests:
            needs = EVALUATIONS[name].needs
            moving = needs in ("frames", "trajectories")
            if moving or (needs in ("structure", "crystal") and not self.structure):
                what = "trajectories" if moving else "a 'structure'"
                raise ValueError(f"the evaluation '{name}' needs {what}")
        return self

    def measure(self, finished: Finished) -> dict[str, Any]:
        """Evaluate every run, on the first test set where labels are needed.

        Returns
        -------
        dict
            `runs`: numbers by run, with the keys of `potstill.metrics.METRICS`; `results`: all
            that was found, by evaluation and run.
        """
        data = finished.experiment.data
        sets = {name: test.read(data.source) for name, test in data.tests.items()}
        structures, labels = next(iter(sets.values()), (None, None))
        bench = Bench(
            settings=self.settings,
            structure=read_start(self.structure)[0] if self.structure else None,
            structures=structures,
            labels=labels,
            splits=sets,
        )
        results: dict[str, dict[str, Any]] = {name: {} for name in self.tests}
        numbers: dict[str, dict[str, float]] = {run.name: {} for run in finished.records}
        for name, evaluation in make_evaluations(self.tests).items():
            evaluation.require(bench)
            for run in finished.records:
                candidate = Candidate(run.name, str(finished.best(run)))
                found = finished.cached(name, run.name, attempt, evaluation, bench, candidate)
                results[name][run.name] = found
                if set(found) != {"error"}:
                    result = evaluation.result.from_json(found)
                    numbers[run.name] |= evaluation.metrics(result)
        return {"runs": numbers, "results": results}


# -- throughput, and the similarity of features ----------------------------------------------------


class SimilaritySettings(Settings):
    """Throughput, similarity of features and linear probes of the models of the first seed.

    Parameters
    ----------
    max_atoms : int
        Maximum number of atoms per batch in timings.
    rounds : int
        Timing rounds per model, of which the median counts.
    n_structures : int
        Structures of the validation set for similarities and probes.
    probes : bool
        Score every tap by linear probes.
    """

    max_atoms: int = Field(default=1024, ge=1)
    rounds: int = Field(default=5, ge=1)
    n_structures: int = Field(default=40, ge=4)
    probes: bool = True

    def measure(self, finished: Finished) -> dict[str, Any]:
        """Compare each student before (its control) and after with its teacher.

        Returns
        -------
        dict
            `throughput` by model, `cka` by run (student with teacher `after` and `before`),
            `probes` by model and run, `teachers`: errors of external teachers.
        """
        experiment, data = finished.experiment, load_parts(finished.experiment.data.parts)
        validation = data[0]["validation"]
        count = min(self.n_structures, len(validation))
        some = validation.select(torch.linspace(0, len(validation) - 1, count).long())
        first = [run for run in finished.records if run.seed == experiment.seeds[0]]
        models = {r.variant.name: finished.best(r) for r in first if r.variant.teacher is None}
        # All models are timed in one go, so that they can be compared: another set is timed anew.
        found: dict[str, Any] = {
            "throughput": finished.cached(
                "throughput",
                "-".join(sorted(models)),
                self._throughput,
                models,
                validation.structures,
            ),
            "cka": {},
            "probes": {},
        }
        files = dict(models)
        for run in first:
            teacher = _teacher_file(finished, run)
            (control,) = run.variant.against or ("",)
            if teacher is None or not teacher.is_file() or control not in models:
                continue
            files[run.name] = finished.best(run)
            two = {"after": files[run.name], "before": models[control]}
            taps = finished.records[run].distilled
            found["cka"][run.name] = finished.cached(
                "cka", run.name, _similarity, two, teacher, taps, some.structures
            )
        if self.probes:
            for name, file in files.items():
                labels = some.labels["reference"]
                found["probes"][name] = finished.cached(
                    "probes", name, _probes, file, some.structures, labels
                )
        found["teachers"] = {
            name: finished.cached("teacher", name, _errors_of_teacher, experiment, model)
            for name, model in experiment.given_teachers.items()
        }
        return found

    def _throughput(self, models: Mapping[str, Path], structures: Structures) -> dict[str, Any]:
        potentials = {name: _load(file) for name, file in models.items()}
        table = inference_throughput(
            potentials, structures, max_atoms=self.max_atoms, rounds=self.rounds
        )
        return {
            name: row.to_json() | {"n_parameters": potentials[name].n_parameters}
            for name, row in table.items()
        }


def _teacher_file(finished: Finished, run: Run) -> Path | None:
    """Checkpoint of the teacher; external teachers without one have no file."""
    given = run.variant.teacher
    if isinstance(given, GivenTeacher):
        return Path(given.model.spec)
    teacher = finished.experiment.teacher_of(run)
    if not isinstance(given, TrainedTeacher) or teacher is None:
        return None
    return finished.best(teacher)


def _similarity(
    students: Mapping[str, Path],
    teacher_file: Path,
    taps: TapPair | None,
    structures: Structures,
) -> dict[str, Any]:
    """CKA between the taps of the kinds that were distilled; scalars of atoms by default."""
    teacher, found = _load(teacher_file), {}
    for when, file in students.items():
        student = _load(file)
        found[when] = cka_matrix(
            student,
            teacher,
            structures,
            first_taps=_alike(student, None if taps is None else taps.student),
            second_taps=_alike(teacher, None if taps is None else taps.teacher),
        ).to_json()
    return found


def _alike(potential: Potential, taps: tuple[str, ...] | None) -> list[str]:
    """The taps of a potential of the same kind as these; a module's path is no tap."""
    own = None if taps is None else potential.taps.get(taps[0])
    kind = "node_scalar" if own is None else own.kind
    return [k for k, spec in potential.taps.items() if spec.kind == kind and k != CHOSEN_PAIRS]


def _probes(file: Path, structures: Structures, labels: Any) -> list[dict[str, Any]]:
    return [score.to_json() for score in linear_probes(_load(file), structures, labels)]


def _errors_of_teacher(experiment: Experiment, model: TeacherSettings) -> dict[str, Any]:
    return held_out_errors(experiment, model.make().ase_calculator()).to_json()


def _load(file: Path) -> Potential:
    return load_potential(file)[0].eval()
