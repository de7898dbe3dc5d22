"""`potstill coarse`: from an all-atom trajectory to validated force fields of beads."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from potstill.checkpoint import load_potential, potential_fingerprint, save_potential
from potstill.coarse.prior import fit_prior
from potstill.errors import ConfigError, suggest
from potstill.evaluate.base import SECTIONS, BenchSettings, Findings, Role
from potstill.evaluate.stability import OwnDynamics
from potstill.evaluate.table import EVALUATIONS, Options
from potstill.evaluate.tools import is_checkpoint
from potstill.experiments.coarse import (
    ENSEMBLE,
    MAPPED_FORCES,
    TEACHERS,
    CoarseStudy,
    ensemble_of,
)
from potstill.experiments.headlines import headlines
from potstill.experiments.measures import Finished
from potstill.experiments.report import report_experiment
from potstill.experiments.run import finished_runs, train_with_progress
from potstill.experiments.spec import Run
from potstill.report.page import Section
from potstill.report.panels import Look, looks
from potstill.report.plots import write_figure
from potstill.report.tables import Table, rows_table
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.workflows.base import (
    Display,
    Settings,
    TeacherSettings,
    merged,
    write_extxyz,
)
from potstill.workflows.baselines import Baselines, Beads, make_baselines
from potstill.workflows.evaluation import (
    EvaluateConfig,
    TestedModel,
    TrajectoryData,
    evaluate,
    numbers_of,
)
from potstill.workflows.mapping import MapConfig, map_to_beads

#: Evaluations of the models' own liquids ...
_LIQUID: dict[str, dict[str, Any]] = {
    "stability": {},
    "rdf": {"r_max": 13.0, "n_bins": 130},
    "adf": {},
    "cdf": {},
    "coordination": {},
    "pressure": {},
    "diffusion": {},
    "speed": {},
}
#: ... and of molecules without a cell, which have neither density nor pressure.
_MOLECULE: dict[str, dict[str, Any]] = {"stability": {}, "internal": {}, "speed": {}}

#: Models that one can tell apart in a figure, beside the reference.
_MOST_IN_FIGURES = 8


class JudgeSettings(Settings):
    """Dynamics of the trained models, compared with the mapped trajectory.

    Parameters
    ----------
    temperature : float, optional
        K; by default that of the mapped trajectory.
    timestep : float
        fs.
    stride : float, optional
        Time between the frames of the mapped trajectory in fs, for diffusion.
    dynamics : OwnDynamics
        Runs of each model.
    tests : dict of str to dict, optional
        Evaluations, with their settings. By default those of liquids; without a cell stability,
        speed, and the prior's bonds and angles with the dihedrals between them.
    seeds : int
        Models of each kind that are judged, those of the first seeds.
    figures : tuple of str, optional
        Kinds of models in the figures of structure, such as `teacher`, `all teachers`, students and
        baselines. By default all if they are few, else the two of every role that are nearest.
    models : dict of str to TeacherSettings
        Others to judge beside them, such as a pair potential.
    """

    temperature: float | None = Field(default=None, gt=0)
    timestep: float = Field(default=5.0, gt=0)
    stride: float | None = Field(default=None, gt=0)
    dynamics: OwnDynamics = Field(default_factory=OwnDynamics)
    tests: Options | None = None
    seeds: int = Field(default=3, ge=1)
    figures: tuple[str, ...] | None = None
    models: dict[str, TeacherSettings] = Field(default_factory=dict)


class PriorSettings(Settings):
    """What the network is added to: a repulsion of all beads, and bonds and angles if given.

    Parameters
    ----------
    bonds, angles : tuple of tuple of str
        Names of beads that are bonded, and of angles between bonds: `[[CA, C], [C, N]]`.
    """

    bonds: tuple[tuple[str, str], ...] = ()
    angles: tuple[tuple[str, str, str], ...] = ()


class CoarseConfig(Settings):
    """Settings of `potstill coarse all`.

    Parameters
    ----------
    out : str
        Folder: beads in `beads.zarr`, models, their dynamics, `results.json` and `report.html`.
    map : MapConfig
        The mapping, without its `out`.
    prior : PriorSettings, optional
        Of the structure of the mapped trajectory; `null` for none.
    train : CoarseStudy
        Teachers and students; the beads and the prior are known.
    baselines : Baselines
        Pair potentials to judge beside them.
    run : JudgeSettings
        Dynamics of the models, and what is looked at.
    workers : int
        Trainings at a time, and models whose dynamics are run and compared.
    """

    out: str
    map: MapConfig
    prior: PriorSettings | None = Field(default_factory=PriorSettings)
    train: CoarseStudy
    baselines: Baselines = Field(default_factory=Baselines)
    run: JudgeSettings = Field(default_factory=JudgeSettings)
    workers: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_store(cls, data: Any) -> Any:
        """The mapping writes the store that the training reads."""
        if not isinstance(data, dict) or "out" not in data:
            return data
        mapping, training = data.get("map"), data.get("train") or {}
        store = str(Path(str(data["out"])) / "beads.zarr")
        if isinstance(mapping, dict):
            data = {**data, "map": {**mapping, "out": store}}
        if isinstance(training, dict):
            own: dict[str, Any] = {"data": {"store": store, "sources": ["reference"]}}
            judged = data.get("run") or {}
            alike = {k: judged[k] for k in ("temperature", "timestep") if judged.get(k) is not None}
            own["exploration"] = alike
            if data.get("prior", {}) is not None:
                own["common"] = {"energy": {"prior": str(Path(str(data["out"])) / "prior.pt")}}
            data = {**data, "train": merged(own, training)}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> CoarseConfig:
        if self.baselines.ibi is not None and self.bonded:
            raise ValueError("baselines.ibi knows no bonds: leave it out (ibi: null)")
        names = [ENSEMBLE, *self.train.students, *self.baselines.names, *self.run.models]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ValueError(f"two models are called '{twice}': give each its own name")
        for name in self.run.figures or ():
            if name not in (known := [TEACHERS, *names]):
                raise ValueError(f"run.figures: there is no model '{name}'{suggest(name, known)}")
        return self

    @property
    def bonded(self) -> bool:
        """Whether the prior holds beads together."""
        return self.prior is not None and bool(self.prior.bonds or self.prior.angles)

    @property
    def prior_file(self) -> Path:
        """The checkpoint of the prior."""
        return Path(self.out) / "prior.pt"

    @property
    def baselines_folder(self) -> Path:
        """Where the baselines are."""
        return Path(self.out) / "baselines"


def train_coarse(config: CoarseConfig, display: Display) -> None:
    """Map, then train all teachers and students and fit the baselines, or what is left of it."""
    map_to_beads(config.map, display)
    _fit_prior(config)
    train_with_progress(config.train.experiment, config.out, display, workers=config.workers)
    beads = Beads(
        store=config.map.out,
        data=config.train.data,
        temperature=_temperature(config),
        prior=str(config.prior_file) if config.bonded else None,
        ensemble=_ensemble_file(_finished(config)),
    )
    make_baselines(config.baselines, beads, config.baselines_folder, display)


def _fit_prior(config: CoarseConfig) -> None:
    """Fit the prior, or check that the folder's is the one that is asked for."""
    if config.prior is None:
        return
    file, temperature = config.prior_file, _temperature(config)
    asked = {"prior": config.prior.model_dump(mode="json"), "temperature": temperature}
    if not file.is_file():
        structures = LabeledStore.open(config.map.out).structures()
        save_potential(file, fit_prior(structures, temperature, **dict(config.prior)), asked)
    elif any(load_potential(file)[1].get(key) != value for key, value in asked.items()):
        raise ConfigError(f"{file} is another prior: choose another folder")


def _temperature(config: CoarseConfig) -> float:
    """In K, of the models' dynamics."""
    stated = config.run.temperature or LabeledStore.open(config.map.out).info.get("temperature")
    if stated is None:
        raise ConfigError("give 'map.temperature' in K, that of the trajectory")
    return float(stated)


def run_coarse(config: CoarseConfig, display: Display, *, command: str = "") -> Path:
    """Run the trained models, compare them with the mapped trajectory, and write the report.

    Returns its file.
    """
    finished, folder = _finished(config), Path(config.out)
    found = judge(finished, config, display)
    (folder / "report").mkdir(exist_ok=True)
    shown = _one_of_each(finished, found)
    drawn = _drawn(finished, shown, config.run.figures)
    known = _looks(finished, config, drawn)
    figures = tuple(
        write_figure(folder / "report", drawing, known)
        for name in EVALUATIONS
        if name in found.results
        for drawing in EVALUATIONS[name].drawings(drawn)
        if not drawing.empty
    )
    report_experiment(
        finished.experiment,
        folder,
        command=command,
        on_model=display.say,
        others=finished.others,
        more={"evaluations": _numbers(finished, found)},
        sections=(Section("Structure", figures=figures, tables=_numbers_shown(shown)),),
        lead=headlines,
        looks=known,
    )
    return folder / "report.html"


def _finished(config: CoarseConfig) -> Finished:
    """Finished runs, and what is judged beside them."""
    experiment, folder = config.train.experiment, Path(config.out)
    finished = Finished(experiment, folder, finished_runs(experiment, folder))
    given = {name: model.spec for name, model in config.run.models.items()}
    others = {
        ENSEMBLE: _ensemble_file(finished),
        **config.baselines.found(config.baselines_folder),
        **{name: Path(spec) for name, spec in given.items() if is_checkpoint(spec)},
    }
    return replace(finished, others=others)


def judge(finished: Finished, config: CoarseConfig, display: Display) -> Findings:
    """Run the models' own dynamics and compare them with the mapped trajectory."""
    folder, own = finished.folder, config.run
    store = LabeledStore.open(config.map.out)
    tests = own.tests if own.tests is not None else _fitting_tests(store.structures(), config.prior)
    start = folder / "start.extxyz"
    write_extxyz(start, store.structures().select([0]).to_ase(), ("symbols", "positions"))
    models = {
        run.name: TestedModel(spec=str(finished.best(run)), role=run.variant.role)
        for run in _first(finished, own.seeds)
    }
    for name, file in finished.others.items():
        role = Role.TEACHER if name == ENSEMBLE else Role.OTHER
        models[name] = TestedModel(spec=str(file), role=role)
    models |= {name: TestedModel(**dict(model)) for name, model in own.models.items()}
    settings = EvaluateConfig(
        models=models,
        out=str(folder / "evaluate"),
        structure=str(start),
        trajectories={"reference": TrajectoryData(path=config.map.out, stride=own.stride)},
        tests=tuple(tests),
        options=tests,
        settings=BenchSettings(temperature=_temperature(config), timestep=own.timestep),
        dynamics=own.dynamics,
        workers=config.workers,
    )
    return evaluate(settings, display, figures=False)  # the report has those of some models


def _fitting_tests(frames: Structures, prior: PriorSettings | None) -> dict[str, dict[str, Any]]:
    """Evaluations of a liquid, or of molecules where frames have no cell."""
    if bool(frames.pbc.any()):
        return _LIQUID
    bonds, angles = (prior.bonds, prior.angles) if prior is not None else ((), ())
    turned = [*angles, *(angle[::-1] for angle in angles)]
    dihedrals = [(*a, b[2]) for a in angles for b in turned if a[1:] == b[:2] and a[0] != b[2]]
    coordinates = {"-".join(names): names for names in (*bonds, *angles, *dihedrals)}
    left_out = () if coordinates else ("internal",)
    tests = {name: dict(own) for name, own in _MOLECULE.items() if name not in left_out}
    if coordinates:
        tests["internal"]["coordinates"] = coordinates
    return tests


def _first(finished: Finished, n: int) -> list[Run]:
    """The runs of the first n seeds of every variant."""
    found: dict[str, list[Run]] = {}
    for run in sorted(finished.records, key=lambda run: run.seed):
        found.setdefault(run.variant.name, []).append(run)
    return [run for runs in found.values() for run in runs[:n]]


def _ensemble_file(finished: Finished) -> Path:
    """All finished teachers as one checkpoint, written again where a teacher is new."""
    file, ensemble = finished.folder / "ensemble.pt", ensemble_of(finished)
    fingerprint = potential_fingerprint(ensemble)
    if not file.is_file() or potential_fingerprint(load_potential(file)[0]) != fingerprint:
        first = next(run for run in finished.records if run.variant.name == TEACHERS)
        save_potential(file, ensemble, load_potential(finished.best(first))[1])
    return file


def _one_of_each(finished: Finished, found: Findings) -> Findings:
    """Results of the first seed of every kind of model, and of the others."""
    shown = {run.name for run in _first(finished, 1)}
    return _without({run.name for run in finished.records} - shown, found)


def _without(left_out: Collection[str], found: Findings) -> Findings:
    """Findings without those of some models."""
    results = {
        name: {model: own for model, own in results.items() if model not in left_out}
        for name, results in found.results.items()
    }
    return replace(found, results=results)


def _drawn(finished: Finished, found: Findings, asked: Collection[str] | None) -> Findings:
    """Findings of as many models as one can tell apart in a figure, and of the reference."""
    by_role: dict[Role, list[str]] = {}
    for model in found.models:
        by_role.setdefault(found.role(model), []).append(model)
    reference = by_role.pop(Role.REFERENCE, [])
    if asked is not None:
        kinds = {run.name: run.variant.name for run in finished.records}
        kept = {model for model in found.models if kinds.get(model, model) in asked}
    elif len(found.models) - len(reference) <= _MOST_IN_FIGURES:
        return found
    else:
        distance = _distances(found)
        nearest = (
            sorted(own, key=lambda model: distance.get(model, math.inf)) for own in by_role.values()
        )
        kept = {model for own in nearest for model in own[:2]}
    return _without(set(found.models) - kept - set(reference), found)


def _distances(found: Findings) -> dict[str, float]:
    """Distance of every model's structure from the reference's, by the first evaluation of it."""
    for name in ("rdf", "internal", "free_energy"):
        if name in found.results:
            numbers = EVALUATIONS[name].numbers_of(found)
            key = f"{name}_error"
            return {model: own[key] for model, own in numbers.items() if key in own}
    return {}


def _looks(finished: Finished, config: CoarseConfig, drawn: Findings) -> dict[str, Look]:
    """Looks of all models, with those of a run like those of its kind in all figures.

    What the figures of structure hold comes first and has colors of its own.
    """
    kinds = {run.name: run.variant.name for run in finished.records}
    names = {*finished.experiment.by_name, *finished.others, *config.run.models}
    if config.train.mean_forces is not None and config.train.mean_forces.apart is not None:
        names.add(MAPPED_FORCES)
    known = looks([*(kinds.get(model, model) for model in drawn.models), *sorted(names)])
    return known | {name: known[kind] for name, kind in kinds.items()}


def _numbers_shown(shown: Findings) -> tuple[Table, ...]:
    """What the evaluations of dynamics found, one column for each kind of model."""
    evaluations = [EVALUATIONS[name] for name in EVALUATIONS if name in shown.results]
    rows = [row for e in evaluations if e.section == "Dynamics" for row in e.rows(shown)]
    name, title, note = SECTIONS["Dynamics"]
    table = rows_table(name, title, rows, note)
    return () if table is None else (table,)


def _numbers(finished: Finished, found: Findings) -> dict[str, Any]:
    """Numbers of what was found, of runs and others, by the keys of `potstill.metrics.METRICS`."""
    numbers, runs = numbers_of(found), {run.name for run in finished.records}
    return {
        "runs": {name: own for name, own in numbers.items() if name in runs},
        "others": {name: own for name, own in numbers.items() if name not in runs},
    }
