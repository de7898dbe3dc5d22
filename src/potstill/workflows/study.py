"""Teacher-student studies: sizes x strategies x seeds from one config, resumable.

One cell of a study is one training run. Teachers come first, label the training set with their
atomic energies, and students and controls follow; every cell is a folder of its own, so that a
study continues where it was interrupted, on as many processes as asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from potstill.checkpoint import load_potential
from potstill.distill import LossTerm, Schedule
from potstill.errors import ConfigError, suggest
from potstill.evaluate.errors import compare, predict_all
from potstill.evaluate.learning import read_learning_curves
from potstill.files import write_atomically
from potstill.models import Potential
from potstill.neighbors import build_neighbor_list, shortest_distances
from potstill.properties import LEARNABLE
from potstill.readers import read
from potstill.report.study import StudyRow, write_study_report
from potstill.store import LabelledStore
from potstill.structures import Properties, Structures
from potstill.teachers.potential import PotentialTeacher
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.settings import ScoreSettings
from potstill.train.state import versions
from potstill.units import AMU_PER_A3_IN_G_PER_CM3
from potstill.workflows.base import write_json
from potstill.workflows.cells import (
    StudyProgress,
    finished_cells,
    result_file,
    run_cells,
    write_results,
)
from potstill.workflows.study_measures import (
    REFERENCE,
    MeasureSettings,
    TrainedModel,
    measure_study,
    stored_distribution,
)

#: Table 1 of Matin et al.: first epoch of each stage, and the weights from there on.
BORN_AGAIN_EPOCHS = (1, 200, 250, 300, 350, 400)
BORN_AGAIN_WEIGHTS = {
    "atomic_energies": (200.0, 160.0, 120.0, 80.0, 40.0, 0.0),
    "forces": (75.0, 63.0, 51.0, 39.0, 27.0, 15.0),
    "energy": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
}

Role = Literal["teacher", "student", "control"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Strategy(_Strict):
    """How one kind of run is trained.

    Parameters
    ----------
    role : {"teacher", "student", "control"}
        Controls see no atomic energies; students see their teacher's of the same seed.
    teacher : str
        With the role `student`: the strategy, of role `teacher`, whose models are its teachers.
    w_energy, w_forces, w_atomic_energies : float
        Static weights of Eq. 5.
    born_again : bool
        Use Table 1's schedule instead of the static weights.
    last_w_forces : float, optional
        With `born_again`, replace the schedule's final force weight: Table 1 ends at 15, where the
        paper's text says that it ends at the teacher's 10.
    sizes : tuple of str, optional
        Train only these sizes with it; all if absent.
    """

    role: Role
    teacher: str = "teacher"
    w_energy: float = 1.0
    w_forces: float = 10.0
    w_atomic_energies: float = 0.0
    born_again: bool = False
    last_w_forces: float | None = None
    sizes: tuple[str, ...] | None = None

    def loss(self, *, source: str, schedule_factor: float) -> tuple[LossTerm, ...]:
        """Loss terms; energies and forces come from `source`, atomic energies from `teacher`."""
        weights: dict[str, float | Schedule] = {
            "energy": self.w_energy,
            "forces": self.w_forces,
            "atomic_energies": self.w_atomic_energies,
        }
        if self.born_again:
            for name, values in BORN_AGAIN_WEIGHTS.items():
                if name == "forces" and self.last_w_forces is not None:
                    values = (*values[:-1], self.last_w_forces)
                schedule = Schedule(epochs=BORN_AGAIN_EPOCHS, values=values)
                weights[name] = schedule.compressed(schedule_factor)
        return tuple(
            LossTerm(
                property=name,
                source="teacher" if name == "atomic_energies" else source,
                weight=weight,
            )
            for name, weight in weights.items()
            if weight != 0.0
        )


#: The strategies of Matin et al. by name; a study may add its own.
STRATEGIES: dict[str, Strategy] = {
    "teacher": Strategy(role="teacher"),
    "student": Strategy(role="student", w_forces=30.0, w_atomic_energies=100.0),
    "control_wf10": Strategy(role="control", w_forces=10.0),
    "control_wf30": Strategy(role="control", w_forces=30.0),
    "born_again": Strategy(role="student", born_again=True, sizes=("teacher",)),
    "born_again_wf10": Strategy(
        role="student", born_again=True, last_w_forces=10.0, sizes=("teacher",)
    ),
    "born_again_static": Strategy(
        role="student", w_forces=30.0, w_atomic_energies=100.0, sizes=("teacher",)
    ),
}


class StudyData(_Strict):
    """Where a study's structures and labels come from.

    Parameters
    ----------
    train : str
        A structure file or a labelled store.
    tests : dict of str to str
        Held-out files or stores by name; the first is the one that tables show.
    source : str
        The label set that plays the reference: `reference`, or a teacher's name in the store.
    validation_fraction : float
        Share of the training file held out for the score, evenly over its groups.
    validation_seed : int
        Seed of that split, the same for all cells.
    atomic_energies_from : str, optional
        Take atomic energies from this label set of the store instead of from the study's own
        teacher models: a published ensemble, say.
    """

    train: str
    tests: dict[str, str]
    source: str = "reference"
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    validation_seed: int = 0
    atomic_energies_from: str | None = None


class StudyConfig(_Strict):
    """A whole study.

    Parameters
    ----------
    name, title : str
        Short name of the study, and one line for the report.
    data : StudyData
        Training and test sets.
    seeds : tuple of int
        Every cell is trained once for each.
    sizes : dict of str to dict
        Hyper-parameters by size; `teacher` must be there and belongs to the teacher.
    strategies : tuple of str
        Keys of `STRATEGIES`, or of `extra_strategies`.
    extra_strategies : dict of str to Strategy
        Strategies of the study's own, such as a second teacher and its students.
    common : TrainSettings
        Everything else, shared by all runs; its model, loss, score and seed are filled in.
    measure : MeasureSettings, optional
        Molecular dynamics with the trained models; none if absent.
    baselines : dict of str to dict
        Published potentials and their errors on the first test set, by keys of
        `potstill.metrics`.
    schedule_factor : float
        Table 1's epochs are multiplied by it.
    """

    name: str
    title: str
    data: StudyData
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: dict[str, dict[str, Any]]
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    extra_strategies: dict[str, Strategy] = Field(default_factory=dict)
    common: TrainSettings = Field(default_factory=TrainSettings)
    measure: MeasureSettings | None = None
    baselines: dict[str, dict[str, float]] = Field(default_factory=dict)
    schedule_factor: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if "teacher" not in self.sizes:
            raise ValueError("sizes must name the teacher's size as 'teacher'")
        for name in self.strategies:
            if name not in {**STRATEGIES, **self.extra_strategies}:
                raise ValueError(f"unknown strategy '{name}'{suggest(name, STRATEGIES)}")
            strategy = self.strategy(name)
            if strategy.role == "student" and self.data.atomic_energies_from is None:
                self._check_teacher(name, strategy.teacher)
        return self

    def _check_teacher(self, student: str, teacher: str) -> None:
        if teacher not in self.strategies or self.strategy(teacher).role != "teacher":
            raise ValueError(
                f"the strategy '{student}' learns from '{teacher}', which is not among the "
                "study's strategies of role 'teacher'"
            )

    def strategy(self, name: str) -> Strategy:
        """The strategy of that name."""
        return {**STRATEGIES, **self.extra_strategies}[name]

    def teacher_of(self, cell: Cell) -> Cell | None:
        """The run that a cell is compared with, and whose atomic energies its student learns.

        Controls are compared with the first teacher of the study; teachers with none.
        """
        strategy = self.strategy(cell.strategy)
        if strategy.role == "teacher":
            return None
        name = strategy.teacher
        if strategy.role == "control":
            teachers = [s for s in self.strategies if self.strategy(s).role == "teacher"]
            name = teachers[0] if teachers else name
        return Cell(name, "teacher", cell.seed)

    def cells(self) -> list[Cell]:
        """All runs, teachers first."""
        cells = []
        for name in self.strategies:
            strategy = self.strategy(name)
            if strategy.role == "teacher":
                sizes: Iterable[str] = ["teacher"]
            else:
                sizes = strategy.sizes or [size for size in self.sizes if size != "teacher"]
            cells += [Cell(name, size, seed) for seed in self.seeds for size in sizes]
        return sorted(cells, key=lambda cell: self.strategy(cell.strategy).role != "teacher")


@dataclass(frozen=True)
class Cell:
    """One training run of a study."""

    strategy: str
    size: str
    seed: int

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.strategy}-{self.size}-{self.seed}"


def run_study(
    config: StudyConfig,
    folder: str | Path,
    *,
    workers: int = 1,
    on_progress: Callable[[StudyProgress], None] | None = None,
) -> list[dict[str, Any]]:
    """Train every cell of a study that is not finished yet, and return the cells' results.

    Parameters
    ----------
    config : StudyConfig
        What to train.
    folder : path
        One subfolder per cell; a finished cell has `cell.json`.
    workers : int
        Processes; each uses one thread when there are several.
    on_progress : callable, optional
        Called after every cell.

    Returns
    -------
    list of dict
        One record per cell, in the order of `config.cells()`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, config)
    cells = config.cells()
    run_cells(
        cells,
        partial(run_cell, config, folder),
        is_finished=lambda cell: result_file(folder, cell).is_file(),
        is_ready=lambda cell: _is_ready(config, folder, cell),
        cost=lambda cell: _cost(config, cell),
        workers=workers,
        on_progress=on_progress,
    )
    return [json.loads(result_file(folder, cell).read_text()) for cell in cells]


def run_cell(config: StudyConfig, folder: Path, cell: Cell, threads: int) -> None:
    """Train and test one cell; a teacher also labels the training set for its students."""
    torch.set_num_threads(threads)
    strategy = config.strategy(cell.strategy)
    training, validation = _training_sets(config, folder, cell, strategy)
    settings = _settings(config, cell, strategy)
    info = {
        "trained_on": _trained_on(training.structures),
        "teacher": None,
        "versions": versions(),
    }
    started = time.process_time()
    result = train(settings, training, validation, folder / cell.name, info=info)
    processor = time.process_time() - started
    if result.status == "interrupted":
        raise KeyboardInterrupt
    potential, _ = load_potential(result.best)
    sets = {"train": training, "validation": validation, **_test_sets(config)}
    record = {
        "strategy": cell.strategy,
        "size": cell.size,
        "seed": cell.seed,
        "n_parameters": potential.n_parameters,
        "hyperparameters": config.sizes[cell.size],
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "seconds": result.seconds,
        # Says more than the clock on a busy machine; of this process, so less than all if resumed.
        "processor_seconds": processor,
        "threads": threads,
        "metrics": {
            name: errors(potential, data.structures, data.labels[config.data.source])
            for name, data in sets.items()
        },
    }
    write_json(result_file(folder, cell), record)


def report_study(
    config: StudyConfig,
    folder: str | Path,
    *,
    command: str = "",
    on_model: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure what has been trained so far and write tables, figures and the report page.

    Parameters
    ----------
    config : StudyConfig
        The study.
    folder : path
        As given to `run_study`; gets `report.html`, `report/` and `results.json`.
    command : str
        What was typed, for the record.
    on_model : callable, optional
        Called with the name of each model before it is measured.

    Returns
    -------
    dict
        What `results.json` holds: one record per trained cell, config, versions and machine.
    """
    folder = Path(folder)
    records = finished_cells(config, folder)
    if config.measure is not None:
        finished = [cell for cell in config.cells() if cell.name in records]
        models = [_trained_model(config, folder, cell) for cell in finished]
        measured = measure_study(models, config.measure, folder / "measures", on_model=on_model)
        for name, values in measured.items():
            records[name]["md"] = values
    rows = [_row(config, folder, name, record) for name, record in records.items()]
    liquid = stored_distribution(folder / "measures", REFERENCE)
    reference_liquid = None if liquid is None else liquid.to_json()
    result, about = write_results(
        config, folder, command, records, reference_liquid=reference_liquid
    )
    reference = config.measure.reference if config.measure is not None else None
    write_study_report(
        rows,
        folder,
        title=config.title,
        about=about,
        baselines=config.baselines or None,
        liquid=(reference.name, liquid) if reference and liquid else None,
    )
    return result


def _trained_model(config: StudyConfig, folder: Path, cell: Cell) -> TrainedModel:
    teacher = config.teacher_of(cell)
    has_teacher = teacher is not None and result_file(folder, teacher).is_file()
    return TrainedModel(
        cell.name,
        cell.size,
        folder / cell.name / "best.pt",
        teacher.name if teacher is not None and has_teacher else None,
    )


def _row(config: StudyConfig, folder: Path, name: str, record: dict[str, Any]) -> StudyRow:
    first_test = next(iter(config.data.tests))
    md = {k: v for k, v in record.get("md", {}).items() if isinstance(v, float)}
    return StudyRow(
        name=name,
        strategy=record["strategy"],
        size=record["size"],
        n_parameters=record["n_parameters"],
        seed=record["seed"],
        metrics={**record["metrics"][f"test:{first_test}"], **md},
        learning_curve=read_learning_curves(folder / name / "metrics.jsonl"),
        rdf=stored_distribution(folder / "measures", name),
    )


def errors(potential: Potential, structures: Structures, labels: Properties) -> dict[str, float]:
    """Metrics of a potential against labels."""
    names = [name for name in LEARNABLE if name in labels]
    return compare(predict_all(potential, structures, names), labels, structures)


# -- parts of run_cell ---------------------------------------------------------------------------


def _settings(config: StudyConfig, cell: Cell, strategy: Strategy) -> TrainSettings:
    """The common settings with the cell's model, loss and seed."""
    model = config.common.model
    hyperparameters = {**model.hyperparameters, **config.sizes[cell.size]}
    source = config.data.source
    return config.common.model_copy(
        update={
            "model": model.model_copy(update={"hyperparameters": hyperparameters}),
            "loss": strategy.loss(source=source, schedule_factor=config.schedule_factor),
            "score": ScoreSettings(source=source, weights=config.common.score.weights),
            "seed": cell.seed,
        }
    )


def _training_sets(
    config: StudyConfig, folder: Path, cell: Cell, strategy: Strategy
) -> tuple[TrainingSet, TrainingSet]:
    """Training and validation set, with the teacher's labels where the strategy uses them."""
    data = load_set(config.data.train, config.data.source)
    if strategy.role == "student":
        labels = dict(data.labels)
        if config.data.atomic_energies_from is not None:
            own = LabelledStore.open(config.data.train).labels(config.data.atomic_energies_from)
        else:
            teacher = Cell(strategy.teacher, "teacher", cell.seed)
            potential, _ = load_potential(folder / teacher.name / "best.pt")
            own, failures = PotentialTeacher(potential).label(data.structures, ["atomic_energies"])
            if failures:
                raise ConfigError(f"the teacher could not label {len(failures)} structures")
        labels["teacher"] = own
        data = TrainingSet(data.structures, labels)
    held_out = split_by_groups(
        data.structures, config.data.validation_fraction, config.data.validation_seed
    )
    return data.select((~held_out).nonzero()[:, 0]), data.select(held_out.nonzero()[:, 0])


def load_set(path: str, source: str) -> TrainingSet:
    """A structure file or labelled store as a training set with one label source."""
    if Path(path).is_dir():
        store = LabelledStore.open(path)
        return TrainingSet(store.structures(), {source: store.labels(source)})
    structures, labels = read(path, require=("energy", "forces"))
    return TrainingSet(structures, {source: labels})


def split_by_groups(structures: Structures, fraction: float, seed: int) -> torch.Tensor:
    """(S,) bool: a seeded share of every group's systems, rounded to the nearest number."""
    generator = torch.Generator().manual_seed(seed)
    groups = structures.group or ("",) * structures.n_systems
    held_out = torch.zeros(structures.n_systems, dtype=torch.bool)
    for group in sorted(set(groups)):
        members = torch.tensor([k for k, g in enumerate(groups) if g == group])
        order = members[torch.randperm(len(members), generator=generator)]
        held_out[order[: round(fraction * len(members))]] = True
    return held_out


def _test_sets(config: StudyConfig) -> dict[str, TrainingSet]:
    return {
        f"test:{name}": load_set(path, config.data.source)
        for name, path in config.data.tests.items()
    }


def _trained_on(structures: Structures) -> dict[str, Any]:
    """What a potential's file says of its training structures."""
    mass = structures.composition() @ structures.species_table.masses
    periodic = structures.pbc.all(dim=1)
    density = (mass / structures.volume * AMU_PER_A3_IN_G_PER_CM3)[periodic]
    shortest = shortest_distances(structures, build_neighbor_list(structures, 4.0))
    return {
        "elements": list(structures.species_table.names),
        "density_g_cm3": [float(density.min()), float(density.max())] if len(density) else None,
        "temperature_K": None,
        "shortest_distances": shortest,
        "n_frames": structures.n_systems,
    }


def _is_ready(config: StudyConfig, folder: Path, cell: Cell) -> bool:
    """Whether the teacher that a student needs is there."""
    strategy = config.strategy(cell.strategy)
    if strategy.role != "student" or config.data.atomic_energies_from is not None:
        return True
    return result_file(folder, Cell(strategy.teacher, "teacher", cell.seed)).is_file()


def _claim(folder: Path, config: StudyConfig) -> None:
    """Write the config into the folder, or check that the folder belongs to it."""
    file = folder / "study.json"
    own = json.loads(config.model_dump_json())
    if not file.is_file():
        write_atomically(file, json.dumps(own, indent=1))
        return
    # Through the class, so that settings that are newer than the study take their defaults. Seeds,
    # sizes and strategies may be added to a study that runs already.
    stored = StudyConfig.model_validate_json(file.read_text())
    for key in ("data", "common", "schedule_factor"):
        if getattr(stored, key) != getattr(config, key):
            raise ConfigError(f"{folder} holds a study with another '{key}': choose another folder")
    write_atomically(file, json.dumps(own, indent=1))


def _cost(config: StudyConfig, cell: Cell) -> float:
    """Relative cost of a cell, for the projected time: pairs x sensitivities, and dense layers."""
    size = {**config.common.model.hyperparameters, **config.sizes[cell.size]}
    features, sensitivities = size.get("n_features", 32), size.get("n_sensitivities", 16)
    layers = size.get("n_atom_layers", 2)
    return float(200 * sensitivities + 8 * features * sensitivities + 2 * layers * features**2)
