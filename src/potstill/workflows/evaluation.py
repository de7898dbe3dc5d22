"""`potstill evaluate`: the same evaluations for several potentials, one JSON file for each.

Each file maps the name of a potential to its result, or to `{"error": ...}` where it could not be
done; what a file holds already is not computed again, unless the model has been trained anew since.
`skipped.json` says which evaluations do not apply to the data at hand, and what they need;
`roles.json` says what each potential is for, and `models.json` which weights it had. `numbers.json`
sums up all results in one number each, by potential.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from potstill.checkpoint import potential_fingerprint
from potstill.errors import ConfigError, DataError
from potstill.evaluate.base import (
    Bench,
    BenchSettings,
    Candidate,
    Evaluation,
    Findings,
    Result,
    Role,
    as_json,
)
from potstill.evaluate.stability import OwnDynamics
from potstill.evaluate.table import (
    EVALUATIONS,
    Options,
    attempt,
    evaluation_class,
    make_evaluations,
)
from potstill.experiments.scheduler import Progress, run_jobs
from potstill.readers import as_slice
from potstill.readers.ase import read_text
from potstill.report.plots import write_figure
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.train import TrainingSet
from potstill.workflows.base import (
    Display,
    Settings,
    TeacherSettings,
    claim_folder,
    read_json,
    read_start,
    stored_settings,
    write_json,
)
from potstill.workflows.data import FileData, is_store, read_labeled
from potstill.workflows.dynamics import write_trajectory

#: Files of the evaluations that do not apply, of the models' roles and of their fingerprints.
SKIPPED, ROLES, MODELS = "skipped.json", "roles.json", "models.json"
#: File of all numbers by model.
NUMBERS = "numbers.json"

#: Folder of results that a process of its own has just found.
PARTS = "parts"

#: Needs of evaluations that take no times, so that several may be under way at once.
_OF_TRAJECTORIES = ("frames", "trajectories", "runs")

#: Settings that older configs have among those of the bench: their evaluation and its setting.
_MOVED = {
    "nve_duration": ("nve", "duration"),
    "force_nonconservative": ("nve", "force_nonconservative"),
    "speed_sizes": ("speed", "sizes"),
    "memory_sizes": ("memory", "sizes"),
}


class TestedModel(TeacherSettings):
    """A model to evaluate: a checkpoint, or a teacher.

    Parameters
    ----------
    role : {"student", "control", "teacher", "other"}, optional
        Its role: verdicts compare the student with the teacher and the controls. By default the
        one that its name starts with.
    """

    role: Role | None = None


class TrajectoryData(FileData):
    """A trajectory of molecular dynamics in one file: of `potstill md`, a dump of LAMMPS, others.

    A label store is one as well: its structures, in their order.

    Parameters
    ----------
    stride : float, optional
        Time between two frames that are read, fs. Files of `potstill md` and dumps of LAMMPS with
        `dump_modify time yes` (in ps) say it themselves.
    role : {"student", "control", "teacher", "reference", "other"}, optional
        Of a trajectory without a model: others are compared with the reference, else the teacher.
        By default the one that its name starts with.
    """

    stride: float | None = Field(default=None, gt=0)
    role: Role | None = None

    def frames(self) -> Structures:
        """Read the frames."""
        if not is_store(self.path):
            return self.read()[0]
        stored = LabeledStore.open(self.path)
        wanted = range(stored.n_systems)[as_slice(self.index)]
        structures = stored.structures()
        return structures if len(wanted) == len(structures) else structures.select(list(wanted))

    def time_between_frames(self) -> float | None:
        """In fs, if it is given or the file says it.

        Raises
        ------
        DataError
            If the frames are not equally far apart.
        """
        if self.stride is not None or is_store(self.path):
            return self.stride
        text = read_text(Path(self.path))
        times = [1.0 * float(x) for x in re.findall(r"\btime_fs=([\d.eE+-]+)", text)]
        times = times or [1e3 * float(x) for x in re.findall(r"ITEM: TIME\n\s*(\S+)", text)]
        steps = np.diff(times[as_slice(self.index)])
        steps = steps[steps > 0.0]  # time begins anew with every replica
        if len(steps) and not np.allclose(steps, steps[0], rtol=1e-6, atol=1e-3):
            raise DataError(
                f"the frames of {self.path} are not equally far apart in time: choose some by "
                "'index', or take it apart"
            )
        return float(steps[0]) if len(steps) else None


class EvaluateConfig(Settings):
    """Settings of `potstill evaluate`.

    Parameters
    ----------
    models : dict of str to TestedModel
        Checkpoints or teachers, by the names shown in tables.
    out : str
        Folder for the results.
    store : str, optional
        Label store to compute errors on.
    source : str
        Label set of the store.
    files : tuple of FileData
        Files with reference labels, instead of a store.
    splits : dict of str to FileData
        Validation sets for `s2ef`, by name; the store or the files by default.
    structure : str, optional
        Starting structure for properties and MD; without it only errors are computed.
    trajectories : dict of str to TrajectoryData
        Trajectories for `rdf`, `adf`, `cdf`, `coordination`, `density`, `diffusion` and `pressure`,
        and of molecules for `internal` and `free_energy`, by the names of the models that made
        them, or any other names. Distributions are compared with those of the first one called
        `reference...`, else `teacher...`.
    tests : dict of str to dict, or list of str, optional
        Evaluations (`potstill.evaluate.table`) to run, with their settings if any:
        `{eos: {}, nve: {duration: 5}}`. By default all that apply, except `throughput`,
        `defects`, `expansion`, `adf`, `cdf`, `coordination`, `internal`, `free_energy`,
        `diffusion`, `pressure`, `melting`, `stability` and `headroom`, and `s2ef` only with
        `splits`.
    options : dict of str to dict
        Settings of evaluations, whether or not `tests` names them.
    settings : BenchSettings
        Settings shared by all evaluations.
    dynamics : OwnDynamics, optional
        Run the models without a trajectory, several runs of each at a time, at the temperature and
        timestep of `settings`: their frames are then trajectories as well, in `dynamics/`, and
        `stability` counts the runs that failed.
    workers : int
        Models at a time, each in a process with one thread, for own dynamics and evaluations of
        trajectories. What measures times is alone on the machine all the same.
    """

    models: dict[str, TestedModel] = Field(default_factory=dict)
    out: str
    store: str | None = None
    source: str = "reference"
    files: tuple[FileData, ...] = ()
    splits: dict[str, FileData] = Field(default_factory=dict)
    structure: str | None = None
    trajectories: dict[str, TrajectoryData] = Field(default_factory=dict)
    tests: tuple[str, ...] | None = None
    options: Options = Field(default_factory=dict)
    settings: BenchSettings = Field(default_factory=BenchSettings)
    dynamics: OwnDynamics | None = None
    workers: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _options_in_place(cls, data: Any) -> Any:
        """Move settings given with `tests`, or in `settings` as in older configs, to `options`."""
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        options = {name: dict(own) for name, own in (data.get("options") or {}).items()}
        if isinstance(data.get("tests"), Mapping):
            for name, own in data["tests"].items():
                options.setdefault(name, {}).update(own or {})
            data["tests"] = tuple(data["tests"])
        if isinstance(data.get("settings"), Mapping):
            data["settings"] = dict(data["settings"])
            for old, (name, new) in _MOVED.items():
                if old in data["settings"]:
                    options.setdefault(name, {})[new] = data["settings"].pop(old)
        return {**data, "options": options}

    @model_validator(mode="after")
    def _something_to_evaluate(self) -> EvaluateConfig:
        if not self.models and not self.trajectories:
            raise ValueError("'models' is missing: give models, or trajectories")
        return self

    @field_validator("tests")
    @classmethod
    def _known_tests(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            evaluation_class(name)
        return names


def run_evaluations(
    bench: Bench,
    chosen: Iterable[tuple[Evaluation, Sequence[Candidate]]],
    folder: Path,
    display: Display,
) -> Findings:
    """Evaluate candidates, skip what `folder` holds already, and return all results.

    The folder gets one file per evaluation. Those that do not apply to the bench are skipped, and
    `skipped.json` says so.
    """
    chosen = list(chosen)
    skipped = {e.name: lacking for e, _ in chosen if (lacking := e.lacks(bench))}
    if skipped:
        write_json(folder / SKIPPED, skipped)
        display.say(_does_not_apply(skipped))
    roles = {candidate.name: candidate.role for _, group in chosen for candidate in group}
    write_json(folder / ROLES, read_json(folder / ROLES, {}) | roles)
    chosen = [(e, group) for e, group in chosen if e.name not in skipped]
    with display.task("evaluation", sum(len(group) for _, group in chosen)) as task:
        done = 0
        for evaluation, group in chosen:
            file = folder / f"{evaluation.name}.json"
            results = read_json(file, {})
            for candidate in group:
                task.update(done, note=f"{evaluation.title}: {candidate.name}")
                if candidate.name not in results:
                    results[candidate.name] = attempt(evaluation, bench, candidate)
                    write_json(file, results)
                done += 1
        task.update(done)
    return read_findings(folder)


def read_findings(folder: Path) -> Findings:
    """Read the results in a folder, with one sentence for each kind of thing that was not done.

    Raises
    ------
    DataError
        If a file is damaged.
    """
    results: dict[str, dict[str, Result]] = {}
    failed: dict[str, dict[str, str]] = {}
    for name, evaluation in EVALUATIONS.items():
        file = folder / f"{name}.json"
        for model, stored in read_json(file, {}).items():
            if not isinstance(stored, dict):
                raise DataError(f"{file}: the result of '{model}' is not a JSON object")
            if set(stored) == {"error"}:  # some results have a field of that name
                failed.setdefault(name, {})[model] = stored["error"]
            else:
                results.setdefault(name, {})[model] = evaluation.result.from_json(stored)
    problems = []
    if skipped := read_json(folder / SKIPPED, {}):
        problems.append(_does_not_apply(skipped))
    for name, reasons in failed.items():
        for reason in dict.fromkeys(reasons.values()):
            whose = ", ".join(model for model, other in reasons.items() if other == reason)
            problems.append(f"Not done: {EVALUATIONS[name].title} of {whose} ({reason}).")
    roles = {name: Role(role) for name, role in read_json(folder / ROLES, {}).items()}
    return Findings(results, roles=roles, problems=tuple(problems), failed=failed)


def numbers_of(found: Findings) -> dict[str, dict[str, float]]:
    """Single numbers of all results by model, by the keys of `potstill.metrics.METRICS`."""
    numbers: dict[str, dict[str, float]] = {}
    for name in found.results:
        for model, own in EVALUATIONS[name].numbers_of(found).items():
            own = {key: float(value) for key, value in own.items()}
            numbers.setdefault(model, {}).update(own)
    return numbers


def _does_not_apply(skipped: Mapping[str, str]) -> str:
    """One sentence on all evaluations that do not apply."""
    by_need: dict[str, list[str]] = {}
    for name, need in skipped.items():
        by_need.setdefault(need, []).append(EVALUATIONS[name].title)
    parts = [f"{', '.join(titles)} (needs {need})" for need, titles in by_need.items()]
    return f"Does not apply here: {'; '.join(parts)}."


# -- the command -----------------------------------------------------------------------------------


def evaluate(
    config: EvaluateConfig, display: Display | None = None, *, figures: bool = True
) -> Findings:
    """Run the evaluations of a config, or those that are left.

    Parameters
    ----------
    config : EvaluateConfig
    display : Display, optional
    figures : bool
        Whether to draw what is seen in trajectories and to write `numbers.json`; tables of what is
        seen are written in any case.

    Raises
    ------
    ConfigError
        If an evaluation that is asked for by name does not apply to the data.
    """
    display, folder = display or Display(), Path(config.out)
    bench, candidates = _prepared(config)
    if config.dynamics is None:
        _asked(config, bench)  # what does not apply is refused before anything is written
    _claim(config, folder)
    _forget_retrained(_models(config, candidates), bench, folder, display)
    if config.workers > 1:
        _in_processes(config, bench, candidates, display)
    seen = _seen(config, candidates)
    if config.dynamics is not None:
        # Trajectories that all has been seen in are not read again, but for one that says which
        # evaluations apply, and what the others are compared with.
        kept = {*list(config.models)[:1], bench.standard or _standard(candidates, candidates)}
        left = {n: c for n, c in candidates.items() if n not in seen or n in kept}
        said = Display() if config.workers > 1 else display  # these only read what is there
        bench = _with_dynamics(bench, config.dynamics, left, folder, said)
    chosen = []
    for evaluation in _asked(config, bench):
        if evaluation.needs in ("frames", "trajectories"):
            moved = {*(bench.frames or {}), *seen}
            given = [c for name, c in candidates.items() if name in moved]
        else:
            given = _models(config, candidates)
        chosen.append((evaluation, [c for c in given if c.spec or not evaluation.needs_model]))
    found = run_evaluations(bench, chosen, folder, display)
    found = _of(candidates, found)
    if figures:
        write_json(folder / NUMBERS, as_json(numbers_of(found)))
    for evaluation, _ in chosen if bench.frames else ():
        for drawing in evaluation.drawings(found) if figures else ():
            if not drawing.empty:
                write_figure(folder, drawing)
        for table in evaluation.tables(found):
            table.write(folder)
    return found


def _prepared(config: EvaluateConfig) -> tuple[Bench, dict[str, Candidate]]:
    """The bench without own dynamics, and all candidates by name."""
    frames, strides = {}, {}
    for name, file in config.trajectories.items():
        frames[name] = file.frames()
        if (stride := file.time_between_frames()) is not None:
            strides[name] = stride
    candidates = {name: Candidate(name, "", role=t.role) for name, t in config.trajectories.items()}
    for name, model in config.models.items():
        candidates[name] = Candidate(name, model.spec, model.args, model.role)
    bench = Bench(
        settings=config.settings,
        structure=None if config.structure is None else read_start(config.structure)[0],
        channel="reference" if config.source == "reference" else "teacher",
        frames=frames,
        strides=strides,
        standard=_standard(candidates, frames),
        splits={name: file.read() for name, file in config.splits.items()},
        **_held_out(config),
    )
    return bench, candidates


def _models(config: EvaluateConfig, candidates: Mapping[str, Candidate]) -> list[Candidate]:
    """Candidates that are models, in the order of the config."""
    return [candidates[name] for name in config.models]


def _every(config: EvaluateConfig) -> dict[str, Evaluation]:
    """All evaluations, with the settings that the config has for them."""
    return make_evaluations({name: config.options.get(name, {}) for name in EVALUATIONS})


def _asked(config: EvaluateConfig, bench: Bench) -> list[Evaluation]:
    """The evaluations of a config, by default those that apply.

    Raises
    ------
    ConfigError
        If one that is named does not apply to the bench.
    """
    every = _every(config)
    if config.tests is not None:
        for name in config.tests:
            every[name].require(bench)
        return [every[name] for name in config.tests]
    by_default = {"s2ef"} if bench.splits else set()
    return [
        evaluation
        for name, evaluation in every.items()
        if not evaluation.lacks(bench) and (not evaluation.on_request or name in by_default)
    ]


def _forget_retrained(
    models: Sequence[Candidate], bench: Bench, folder: Path, display: Display
) -> None:
    """Delete dynamics and results of models that are others than when these were made."""
    known = read_json(folder / MODELS, {})
    now = {
        model.name: f"{model.spec} {json.dumps(model.args, sort_keys=True, default=str)}"
        if model.potential is None
        else potential_fingerprint(model.potential)
        for model in models
    }
    changed = {name for name, weights in now.items() if known.get(name, weights) != weights}
    for name in sorted(changed):
        display.say(f"{name} is another model now: its dynamics and evaluations are done again")
        shutil.rmtree(folder / "dynamics" / name, ignore_errors=True)
    # Without a reference, the trajectory of a teacher may be what all are compared with.
    standard = bench.standard in {"", *changed} and any(
        model.role in (Role.TEACHER, Role.REFERENCE) for model in models if model.name in changed
    )
    for name, evaluation in EVALUATIONS.items() if changed else ():
        results = read_json(folder / f"{name}.json", {})
        gone = set(results) if standard and evaluation.needs == "frames" else changed
        if gone & set(results):
            write_json(folder / f"{name}.json", {k: v for k, v in results.items() if k not in gone})
    if known | now != known:
        write_json(folder / MODELS, known | now)


def _of(candidates: Mapping[str, Candidate], found: Findings) -> Findings:
    """Findings without those of models that are no longer asked for."""
    results = {
        name: {model: result for model, result in own.items() if model in candidates}
        for name, own in found.results.items()
    }
    return replace(found, results={name: own for name, own in results.items() if own})


def _claim(config: EvaluateConfig, folder: Path) -> None:
    """Claim the folder; models come and go, and change where it is known what they were.

    Evaluations do so as well, but one with results keeps its settings.
    """
    stored = stored_settings(folder).get("models", {})
    other = {f"models.{name}" for name in set(stored) ^ set(config.models)} | {"tests", "workers"}
    changed = tuple(f"models.{name}." for name in config.models)
    changed = changed if (folder / MODELS).is_file() else ()
    new = {name for name in EVALUATIONS if not (folder / f"{name}.json").is_file()}

    def free(key: str) -> bool:
        section, _, name = key.partition(".")
        unused = section == "options" and name.partition(".")[0] in new
        return key in other or key.startswith(changed) or unused

    claim_folder(folder, config, free=free)


def _standard(candidates: Mapping[str, Candidate], frames: Collection[str]) -> str:
    """The trajectory that others are compared with: a reference, else a teacher, else none."""
    moving = [candidate for name, candidate in candidates.items() if name in frames]
    ranked = (c.name for role in (Role.REFERENCE, Role.TEACHER) for c in moving if c.role is role)
    return next(ranked, "")


def _with_dynamics(
    bench: Bench,
    dynamics: OwnDynamics,
    candidates: Mapping[str, Candidate],
    folder: Path,
    display: Display,
) -> Bench:
    """The bench with own dynamics of all models that have no trajectory; runs resume."""
    frames, strides, runs = dict(bench.frames or {}), dict(bench.strides), {}
    settings = dynamics.settings(bench)
    for name, candidate in candidates.items():
        if name in frames:
            continue
        own = folder / "dynamics" / name
        with display.task(f"{dynamics.n_runs} runs of {name}", 1.0) as task:
            run = dynamics.run(bench, candidate, own, lambda done, total: task.update(done / total))
        runs[name] = run, settings
        if len(run.frames):
            write_trajectory(own / "trajectory.extxyz", run.frames)
            frames[name] = run.frames.structures
            strides[name] = settings.steps_per_frame * settings.timestep
    standard = bench.standard or _standard(candidates, frames)
    return replace(bench, frames=frames, strides=strides, runs=runs, standard=standard)


# -- several models at a time ----------------------------------------------------------------------


def _in_processes(
    config: EvaluateConfig, bench: Bench, candidates: Mapping[str, Candidate], display: Display
) -> None:
    """Own dynamics and evaluations of trajectories of all candidates, several at a time.

    Dynamics are left in their folders and results in the usual files, so that what comes after
    finds both.
    """
    folder = Path(config.out)
    moving = list(bench.frames or {}) if config.dynamics is None else list(candidates)
    standard = bench.standard or _standard(candidates, moving)
    names = _of_trajectories(config)
    for part in (folder / PARTS).glob("*"):  # of an interrupted run
        _collect(folder, part.name, candidates)
    done = _seen(config, moving)

    def size(name: str) -> int:
        file = Path(candidates[name].spec)
        return file.stat().st_size if file.is_file() else 0

    def finish(progress: Progress[str]) -> None:
        done.add(progress.job)
        _collect(folder, progress.job, candidates)
        task.update(progress.done, note=progress.job)

    with display.task("dynamics and their evaluation", len(moving)) as task:
        run_jobs(
            sorted(moving, key=size, reverse=True),  # an ensemble that is left over is long alone
            _OneAtATime(config, tuple(names), standard),
            is_finished=lambda name: name in done,
            is_ready=lambda name: standard in ("", name, *done),
            workers=config.workers,
            on_progress=finish,
        )


def _of_trajectories(config: EvaluateConfig) -> list[str]:
    """Evaluations that look at trajectories or runs, of those that a config asks for."""
    names = config.tests or [n for n, e in EVALUATIONS.items() if not e.on_request]
    return [name for name in names if EVALUATIONS[name].needs in _OF_TRAJECTORIES]


def _seen(config: EvaluateConfig, names: Iterable[str]) -> set[str]:
    """Those of the names whose trajectories all these evaluations have seen."""
    files = [Path(config.out) / f"{name}.json" for name in _of_trajectories(config)]
    return set(names).intersection(*(read_json(file, {}) for file in files)) if files else set()


@dataclass(frozen=True)
class _OneAtATime:
    """Own dynamics of a candidate and what is seen in its trajectory, into the folder of parts."""

    config: EvaluateConfig
    evaluations: tuple[str, ...]
    standard: str
    memory: dict = field(default_factory=dict)  # of what all candidates share, in one process

    def __call__(self, name: str, threads: int) -> None:
        """Work on the candidate called `name`."""
        torch.set_num_threads(threads)
        folder, both = Path(self.config.out), (name, self.standard)
        given = {
            key: {n: own for n, own in getattr(self.config, key).items() if n in both}
            for key in ("models", "trajectories")
        }
        no_labels: dict[str, Any] = {"store": None, "files": (), "splits": {}}
        config = self.config.model_copy(update=given | no_labels)
        bench, candidates = _prepared(config)
        bench = replace(bench, memory=self.memory)
        if config.dynamics is not None:
            bench = _with_dynamics(bench, config.dynamics, candidates, folder, Display())
        candidate, moved = candidates[name], name in (bench.frames or {})
        chosen = []
        for evaluation in map(_every(config).__getitem__, self.evaluations):
            applies = (moved or evaluation.needs == "runs") and not evaluation.lacks(bench)
            applies = applies and bool(candidate.spec or not evaluation.needs_model)
            if applies and name not in read_json(folder / f"{evaluation.name}.json", {}):
                chosen.append((evaluation, [candidate]))
        run_evaluations(bench, chosen, folder / PARTS / name, Display())


def _collect(folder: Path, name: str, order: Iterable[str]) -> None:
    """Results of one candidate from the folder of parts to those of all, in the given order."""
    part = folder / PARTS / name
    for evaluation in EVALUATIONS:
        if own := read_json(part / f"{evaluation}.json", {}):
            file = folder / f"{evaluation}.json"
            known = own | read_json(file, {})
            places = [n for n in order if n in known]
            write_json(file, {n: known[n] for n in dict.fromkeys([*places, *known])})
    shutil.rmtree(part, ignore_errors=True)


def _held_out(config: EvaluateConfig) -> dict[str, Any]:
    if config.store is not None or config.files:
        structures, labels = read_labeled(config.store, config.files, config.source)
        return {"structures": structures, "labels": labels}
    if config.structure is None and not config.splits and not config.trajectories:
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
