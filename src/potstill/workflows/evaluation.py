"""`potstill evaluate`: the same tests for several potentials, one JSON file per test.

Each file maps the name of a potential to its result, or to `{"error": ...}` where the test could
not be done; what a file holds already is not computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ase
from ase.calculators.calculator import BaseCalculator
from pydantic import Field, field_validator

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.errors import ConfigError, PotstillError, suggest
from potstill.evaluate.base import make_calculator
from potstill.evaluate.elastic import elastic_constants
from potstill.evaluate.eos import equation_of_state
from potstill.evaluate.errors import evaluate_errors, evaluate_s2ef, predict_all
from potstill.evaluate.memory import memory_per_atom
from potstill.evaluate.nve import run_nve
from potstill.evaluate.rdf import radial_distribution
from potstill.evaluate.speed import inference_throughput, md_speed
from potstill.models import Potential
from potstill.report import parity_points
from potstill.sample import smallest_supercell
from potstill.structures import Properties, Structures
from potstill.train import TrainingSet
from potstill.workflows.base import (
    Display,
    Settings,
    TeacherSettings,
    claim_folder,
    limited_threads,
    read_json,
    read_start,
    threads,
    write_json,
)
from potstill.workflows.data import FileData, load_store, read_files


class BenchSettings(Settings):
    """How the tests are done.

    Parameters
    ----------
    n_atoms : int
        Size of the supercell for dynamics.
    temperature : float
        K, of dynamics.
    nve_duration, timestep : float
        ps and fs.
    speed_sizes, memory_sizes : tuple of int
        Numbers of atoms.
    batch_atoms : int
        Atoms per batch of the tests `s2ef` and `throughput`.
    seed : int
        Of velocities.
    force_nonconservative : bool
        Do the NVE test with models whose forces are direct, too.
    """

    n_atoms: int = Field(default=64, ge=1)
    temperature: float = Field(default=300.0, gt=0)
    nve_duration: float = Field(default=20.0, gt=0)
    timestep: float = Field(default=1.0, gt=0)
    speed_sizes: tuple[int, ...] = (64, 512)
    memory_sizes: tuple[int, ...] = (500, 2000)
    batch_atoms: int = Field(default=4096, ge=1)
    seed: int = 0
    force_nonconservative: bool = False


class EvaluateConfig(Settings):
    """Settings of `potstill evaluate`.

    Parameters
    ----------
    models : dict of str to TeacherSettings
        Checkpoints or teachers, by the name that tables show; `teacher` is compared with, too.
    out : str
        Folder of the results.
    store : str, optional
        A labelled store to compute errors on.
    source : str
        Its label set.
    files : tuple of FileData
        Files with reference labels, instead of a store.
    splits : dict of str to FileData
        Validation sets of the test `s2ef` by name; without them it takes the store or the files.
    structure : str, optional
        Where properties and dynamics start from; without it only errors are computed.
    tests : tuple of str, optional
        Which tests; if absent all that the data allow, `s2ef` only with `splits`, and without
        `throughput`.
    settings : BenchSettings
        How.
    """

    models: dict[str, TeacherSettings] = Field(min_length=1)
    out: str
    store: str | None = None
    source: str = "reference"
    files: tuple[FileData, ...] = ()
    splits: dict[str, FileData] = Field(default_factory=dict)
    structure: str | None = None
    tests: tuple[str, ...] | None = None
    settings: BenchSettings = Field(default_factory=BenchSettings)

    @field_validator("tests")
    @classmethod
    def _known_tests(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if name not in TESTS:
                raise ValueError(f"there is no test '{name}'{suggest(name, TESTS)}")
        return names


@dataclass(frozen=True)
class Candidate:
    """A potential under test: its name, and how to make it."""

    name: str
    model: TeacherSettings

    @cached_property
    def potential(self) -> Potential | None:
        """The potential itself, if it is a checkpoint."""
        return load_potential(self.model.spec)[0] if self.is_checkpoint else None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is one of potstill's own files."""
        spec = self.model.spec
        return spec.endswith(".pt") and "," not in spec and "*" not in spec

    @cached_property
    def calculator(self) -> BaseCalculator:
        """An ASE calculator."""
        if self.is_checkpoint:
            # Tests look at what a model does, extrapolating or not: no warnings.
            return PotstillCalculator(load_potential(self.model.spec)[0])
        return make_calculator(self.model.spec, self.model.args)


@dataclass(frozen=True)
class Bench:
    """What the tests work on.

    Parameters
    ----------
    settings : BenchSettings
        How.
    structure : Structures, optional
        One system to start from.
    structures, labels, channel
        Held-out structures, their labels, and who gave them: "teacher" or "reference".
    frames : dict of str to Structures
        Trajectories by name of the potential, for radial distributions.
    splits : dict of str to (Structures, Properties)
        Validation sets by name, for OC20's metrics.
    """

    settings: BenchSettings
    structure: Structures | None = None
    structures: Structures | None = None
    labels: Properties | None = None
    channel: str = "reference"
    frames: Mapping[str, Structures] | None = None
    splits: Mapping[str, tuple[Structures, Properties]] = field(default_factory=dict)

    @property
    def sets(self) -> Mapping[str, tuple[Structures, Properties]]:
        """The validation sets, or the held-out structures as the only one."""
        if self.splits or self.structures is None or self.labels is None:
            return self.splits
        return {"all": (self.structures, self.labels)}

    @property
    def cell(self) -> ase.Atoms:
        """The structure as it was given."""
        assert self.structure is not None
        return self.structure.to_ase()[0]

    @property
    def supercell(self) -> ase.Atoms:
        """The structure, repeated for dynamics."""
        assert self.structure is not None
        return smallest_supercell(self.structure, min_atoms=self.settings.n_atoms).to_ase()[0]


# -- the tests: one function each, from a bench and a candidate to plain JSON ----------------------


def _errors(bench: Bench, candidate: Candidate) -> Any:
    assert bench.structures is not None
    assert bench.labels is not None
    predictor = candidate.potential or candidate.calculator
    labels = {bench.channel: bench.labels}
    return evaluate_errors(predictor, bench.structures, labels, name=candidate.name).to_json()


def _parity(bench: Bench, candidate: Candidate) -> Any:
    assert bench.structures is not None
    assert bench.labels is not None
    predictor = candidate.potential or candidate.calculator
    prediction = predict_all(predictor, bench.structures, bench.labels.names)
    return parity_points(prediction, bench.labels, bench.structures, seed=bench.settings.seed)


def _s2ef(bench: Bench, candidate: Candidate) -> Any:
    predictor = candidate.potential or candidate.calculator
    return evaluate_s2ef(predictor, bench.sets, max_atoms=bench.settings.batch_atoms).to_json()


def _throughput(bench: Bench, candidate: Candidate) -> Any:
    if candidate.potential is None:
        raise ConfigError("only checkpoints are timed in batches")
    structures = Structures.concatenate([structures for structures, _ in bench.sets.values()])
    potentials = {candidate.name: candidate.potential}
    found = inference_throughput(potentials, structures, max_atoms=bench.settings.batch_atoms)
    return found[candidate.name].to_json()


def _speed(bench: Bench, candidate: Candidate) -> Any:
    return md_speed(
        {candidate.name: candidate.calculator},
        bench.cell,
        sizes=bench.settings.speed_sizes,
        rounds=3,
        timestep=bench.settings.timestep,
        temperature=bench.settings.temperature,
        seed=bench.settings.seed,
    ).to_json()


def _memory(bench: Bench, candidate: Candidate) -> Any:
    return memory_per_atom(
        candidate.model.spec,
        bench.cell,
        args=candidate.model.args,
        name=candidate.name,
        sizes=bench.settings.memory_sizes,
        threads=threads(),
    ).to_json()


def _nve(bench: Bench, candidate: Candidate) -> Any:
    with limited_threads(1 if candidate.is_checkpoint else threads()):
        return run_nve(
            bench.supercell,
            candidate.calculator,
            temperature=bench.settings.temperature,
            duration=bench.settings.nve_duration,
            timestep=bench.settings.timestep,
            seed=bench.settings.seed,
            force_nonconservative=bench.settings.force_nonconservative,
        ).to_json()


def _eos(bench: Bench, candidate: Candidate) -> Any:
    return equation_of_state(bench.cell, candidate.calculator).to_json()


def _elastic(bench: Bench, candidate: Candidate) -> Any:
    return elastic_constants(bench.cell, candidate.calculator, relax_cell=True).to_json()


def _rdf(bench: Bench, candidate: Candidate) -> Any:
    frames = (bench.frames or {}).get(candidate.name)
    if frames is None:
        raise ConfigError("there is no trajectory of it")
    return radial_distribution(frames).to_json()


TESTS: dict[str, Callable[[Bench, Candidate], Any]] = {
    "errors": _errors,
    "parity": _parity,
    "s2ef": _s2ef,
    "throughput": _throughput,
    "eos": _eos,
    "elastic": _elastic,
    "rdf": _rdf,
    "speed": _speed,
    "memory": _memory,
    "nve": _nve,
}

#: Tests that need a crystal.
PERIODIC = frozenset({"eos", "elastic", "rdf", "speed", "memory"})


#: Tests that are only done when they are asked for.
ON_REQUEST = frozenset({"s2ef", "throughput"})


def default_tests(bench: Bench) -> tuple[str, ...]:
    """Tests that are done when none are named."""
    asked = {"s2ef"} if bench.splits else set()
    return tuple(name for name in possible_tests(bench) if name not in ON_REQUEST - asked)


def possible_tests(bench: Bench) -> tuple[str, ...]:
    """Tests that the data at hand allow."""
    structure = bench.structure
    periodic = structure is not None and bool(structure.pbc.all())
    allowed = {
        "errors": bench.structures is not None,
        "parity": bench.structures is not None,
        "s2ef": bool(bench.sets),
        "throughput": bool(bench.sets),
        "nve": structure is not None,
        "rdf": periodic and bool(bench.frames),
    }
    return tuple(name for name in TESTS if allowed.get(name, periodic))


def run_tests(
    bench: Bench,
    candidates: Mapping[str, list[Candidate]],
    folder: Path,
    display: Display,
) -> dict[str, dict[str, Any]]:
    """Do tests for candidates, skip what `folder` holds already, and return all results.

    Parameters
    ----------
    bench : Bench
        What they work on.
    candidates : mapping
        Name of a test to the potentials that undergo it.
    folder : Path
        Gets one file per test.
    display : Display
        Where progress is shown.

    Returns
    -------
    dict
        Test to name of a potential to its result, or `{"error": ...}`.
    """
    total = sum(len(entries) for entries in candidates.values())
    results: dict[str, dict[str, Any]] = {}
    done = 0
    with display.task("evaluation", total) as task:
        for test, entries in candidates.items():
            file = folder / f"{test}.json"
            results[test] = read_json(file) if file.is_file() else {}
            for candidate in entries:
                task.update(done, note=f"{test}: {candidate.name}")
                if candidate.name not in results[test]:
                    results[test][candidate.name] = _attempt(test, bench, candidate)
                    write_json(file, results[test])
                done += 1
        task.update(done)
    return results


def _attempt(test: str, bench: Bench, candidate: Candidate) -> Any:
    """Do a test; one that cannot be done is a result, not the end of the evaluation."""
    try:
        result = TESTS[test](bench, candidate)
    except PotstillError as error:
        return {"error": str(error)}
    return json.loads(json.dumps(result))


# -- the command -----------------------------------------------------------------------------------


def evaluate(config: EvaluateConfig, display: Display | None = None) -> dict[str, dict[str, Any]]:
    """Do the tests of a config, or what is left of them."""
    bench = Bench(
        settings=config.settings,
        structure=None if config.structure is None else read_start(config.structure)[0],
        channel="reference" if config.source == "reference" else "teacher",
        splits={name: file.read() for name, file in config.splits.items()},
        **_held_out(config),
    )
    tests = config.tests or default_tests(bench)
    for name in tests:
        if name not in possible_tests(bench):
            data = name in {"errors", "parity"} | ON_REQUEST
            need = "data with labels" if data else "a periodic structure"
            raise ConfigError(f"the test '{name}' needs {need}")
    candidates = [Candidate(name, model) for name, model in config.models.items()]
    claim_folder(Path(config.out), config)
    table = {test: candidates for test in tests}
    return run_tests(bench, table, Path(config.out), display or Display())


def _held_out(config: EvaluateConfig) -> dict[str, Any]:
    if config.store is not None:
        data, _ = load_store(config.store, [config.source])
        return {"structures": data.structures, "labels": data.labels[config.source]}
    if config.files:
        parts = read_files(config.files)
        structures = [part[0] for part in parts]
        labels = Properties.concatenate([part[1] for part in parts], structures)
        return {"structures": Structures.concatenate(structures), "labels": labels}
    if config.structure is None and not config.splits:
        raise ConfigError("there is nothing to evaluate on: give data with labels or a structure")
    return {}


def bench_of(data: TrainingSet, source: str, **others: Any) -> Bench:
    """A bench whose held-out structures carry labels of `source`."""
    return Bench(
        structures=data.structures,
        labels=data.labels[source],
        channel="reference" if source == "reference" else "teacher",
        **others,
    )
