"""potstill in a Python session: the jobs of the commands as functions of plain arguments.

`import potstill` offers them as `potstill.sample`, `potstill.label` and so on.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ase
import torch
from ase.calculators.calculator import BaseCalculator

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.config import DistillConfig, MdConfig, validate
from potstill.display import Display
from potstill.errors import DataError, TeacherError
from potstill.evaluate.errors import evaluate_errors
from potstill.evaluate.tools import make_calculator
from potstill.models import Potential
from potstill.readers.splits import split_by_seed
from potstill.sample import SampledFrames, run_plan, split_in_blocks, standard_plan
from potstill.structures import Properties, Structures
from potstill.teachers import AseTeacher, Teacher, TeacherInfo, make_teacher
from potstill.teachers.base import fingerprint_of, versions_of
from potstill.train import TrainingSet, TrainResult, TrainSettings
from potstill.workflows.base import potential_info, read_start
from potstill.workflows.distill import DistillResult
from potstill.workflows.distill import distill as run_distill
from potstill.workflows.distill_run import Weights, default_student, settings_for
from potstill.workflows.dynamics import simulate
from potstill.workflows.labeling import learnable
from potstill.workflows.planning import timestep_for
from potstill.workflows.training import train_with_progress

#: A name such as `chgnet`, a checkpoint, `module:factory`, or an ASE calculator.
AnyTeacher: TypeAlias = str | Path | BaseCalculator | Teacher
#: A file or the name of a built-in structure, or structures of ASE or potstill.
AnyStructures: TypeAlias = str | Path | ase.Atoms | Sequence[ase.Atoms] | Structures | SampledFrames

#: Shares of training, validation and test.
SPLIT = {"train": 0.8, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Data:
    """Labeled structures in three parts.

    Parameters
    ----------
    train, validation, test : TrainingSet
    source : str
        Name of the labels: the teacher's, or `reference`.
    teacher : mapping, optional
        Identity of the teacher, stored in the trained potential.
    """

    train: TrainingSet
    validation: TrainingSet
    test: TrainingSet
    source: str
    teacher: Mapping[str, Any] | None = None


#: What `label` returns, or what `read` does: structures and their reference labels.
AnyData: TypeAlias = Data | tuple[Structures, Properties]


def sample(
    structures: AnyStructures,
    teacher: AnyTeacher,
    *,
    temperature: float | tuple[float, float],
    n_frames: int = 100,
    seed: int = 0,
    out: str | Path | None = None,
    **settings: Any,
) -> SampledFrames:
    """Make structures by MD with a teacher, rattling and straining.

    Parameters
    ----------
    structures : str, Path, Atoms, list of Atoms or Structures
        Starting structures; cells should be large enough for MD.
    teacher : str, Path, Teacher or ASE calculator
        What drives MD.
    temperature : float or (lowest, highest)
        K.
    n_frames, seed : int
        Number of frames, and seed of all random numbers.
    out : path, optional
        Keep the frames there; called again, an interrupted run resumes.
    **settings
        Of `potstill.sample.standard_plan`.
    """
    start, who = _structures(structures), _teacher(teacher)
    settings = {"timestep": timestep_for(start), **settings}
    plan = standard_plan(start, temperature=temperature, n_frames=n_frames, seed=seed, **settings)
    with _folder(out) as folder:
        return run_plan(plan, who.ase_calculator(), folder, driver=who.info.fingerprint)


def label(
    structures: AnyStructures,
    teacher: AnyTeacher,
    *,
    properties: Sequence[str] | None = None,
    split: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Data:
    """Label structures with a teacher, and split them; for many, use a store (`label_store`).

    Parameters
    ----------
    structures : str, Path, Atoms, list of Atoms, Structures or SampledFrames
        Frames of `sample` are split so that held-out ones are not next to training ones in time.
    teacher : str, Path, Teacher or ASE calculator
        Who labels.
    properties : sequence of str, optional
        Properties to compute; by default all that the teacher gives and a student can learn.
    split : mapping of str to float, optional
        Shares of `train`, `validation` and `test`.
    seed : int
        Of the split.

    Raises
    ------
    TeacherError
        If the teacher fails on all structures; a warning counts those that it fails on.
    """
    frames, who = _structures(structures), _teacher(teacher)
    labels, failures = who.label(frames, properties or learnable(who, frames))
    failed = {failure.system for failure in failures}
    if failures:
        text = f"'{who.name}' fails on {len(failed)} of {len(frames)} structures, the first time "
        text += f"because: {failures[0].reason}"
        if len(failed) == len(frames):
            raise TeacherError(text)
        warnings.warn(text, stacklevel=2)
    shares = dict(split or SPLIT)
    if isinstance(structures, SampledFrames):
        parts = split_in_blocks(structures, shares, seed=seed, block=4)
    else:
        parts = split_by_seed(len(frames), shares, seed)
    whole = TrainingSet(frames, {who.name: labels})
    kept = {name: [int(k) for k in part if int(k) not in failed] for name, part in parts.items()}
    return _data(whole, kept, who.name, who.info.to_json())


def train(
    data: AnyData,
    out: str | Path,
    *,
    epochs: int = 100,
    seed: int = 0,
    display: Display | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a student, or resume; `best` of the result is its checkpoint.

    Parameters
    ----------
    data : Data, or (Structures, Properties)
        What `label` or `read` returns.
    out : path
        The run folder.
    epochs, seed : int
        Number of epochs, and seed of all random numbers.
    display : Display, optional
        Where progress is shown.
    **settings
        Of `TrainSettings`, in place of those of `potstill distill`: `model={"kind": "painn", ...}`.
    """
    data = _split(data)
    given = data.train.labels[data.source].names
    student = default_student()
    if bool((data.train.structures.species_table.atomic_numbers < 0).any()):
        energy = student.energy.model_copy(update={"prior": "none"})  # ZBL is of elements
        student = student.model_copy(update={"energy": energy})
    defaults = settings_for(student, Weights(), given, data.source, epochs, seed)
    chosen = TrainSettings.model_validate({**defaults.model_dump(), **settings})
    info = potential_info(data.train.structures, teacher=data.teacher)
    parts = (data.train, data.validation)
    return train_with_progress(
        chosen, *parts, Path(out), display or Display(), title="training", info=info
    )


def evaluate(model: str | Path | Potential | BaseCalculator, data: AnyData) -> dict[str, float]:
    """Errors of a model on the test part of the data: metrics by name, in eV, eV/Å and eV/Å³."""
    data = _split(data)
    predictor = load_potential(model)[0] if isinstance(model, str | Path) else model
    kind = "reference" if data.source == "reference" else "teacher"
    labels = {kind: data.test.labels[data.source]}
    return evaluate_errors(predictor, data.test.structures, labels).channels[f"student-{kind}"]


def distill(
    teacher: str | Path,
    structure: str | Path = "silicon",
    out: str | Path = "run",
    *,
    display: Display | None = None,
    **settings: Any,
) -> DistillResult:
    """Distill a teacher for one material, as `potstill distill` does, or resume.

    Parameters
    ----------
    teacher : str or path
        A name, a checkpoint, or `module:factory` for an ASE calculator.
    structure : str or path
        A file, or a built-in structure.
    out : path
        The run folder: `student.pt`, `report.html` and all that led there.
    display : Display, optional
        Where progress is shown.
    **settings
        Of `DistillConfig`: `temperature="300:900"`, `budget="10min"` and so on.
    """
    given = {"teacher": {"spec": str(teacher)}, "structure": str(structure), "out": str(out)}
    return run_distill(validate({**given, **settings}, DistillConfig), display)


def md(
    model: str | Path | Potential | BaseCalculator,
    structure: AnyStructures,
    *,
    out: str | Path | None = None,
    display: Display | None = None,
    **settings: Any,
) -> SampledFrames:
    """Run molecular dynamics from one structure; `frames.structures.to_ase()` gives ASE's.

    Parameters
    ----------
    model : str, Path, Potential or ASE calculator
        Potential that drives the dynamics.
    structure : str, Path, Atoms or Structures
        Where to start.
    out : path, optional
        Write the trajectory there; called again, an interrupted run resumes.
    display : Display, optional
        Where progress is shown.
    **settings
        Of `MdConfig`: `temperature=600` (K), `duration=5` (ps), `ensemble="npt"` and so on.
    """
    start = _structures(structure)
    if start.n_systems != 1:
        raise DataError(f"MD starts from one structure, not {start.n_systems}")
    if isinstance(model, Potential):
        model = PotstillCalculator(model)
    if isinstance(model, BaseCalculator):
        spec, calculator = type(model).__name__, model
    else:
        spec, calculator = str(model), make_calculator(str(model))
    with _folder(out) as folder:
        given = {"model": {"spec": spec}, "structure": start.name_of(0), "out": str(folder)}
        config = validate({**given, **settings}, MdConfig)
        return simulate(config, start, calculator, folder, display or Display()).frames


def _structures(given: AnyStructures) -> Structures:
    if isinstance(given, SampledFrames):
        return given.structures
    if isinstance(given, Structures):
        return given
    return read_start(str(given)) if isinstance(given, str | Path) else Structures.from_ase(given)


def _teacher(given: AnyTeacher) -> Teacher:
    if isinstance(given, Teacher):
        return given
    if isinstance(given, str | Path):
        return make_teacher(str(given))
    kind = type(given)
    versions = versions_of(kind.__module__.partition(".")[0])
    words = (f"{kind.__module__}.{kind.__qualname__}", repr(getattr(given, "parameters", None)))
    return AseTeacher(given, TeacherInfo(kind.__name__, fingerprint_of(*words), versions=versions))


def _split(data: AnyData) -> Data:
    """Reference labels in three parts, at random."""
    if isinstance(data, Data):
        return data
    structures, labels = data
    parts = split_by_seed(len(structures), SPLIT, seed=0)
    whole = TrainingSet(structures, {"reference": labels})
    return _data(whole, {name: part.tolist() for name, part in parts.items()}, "reference")


def _data(
    whole: TrainingSet,
    parts: Mapping[str, Sequence[int]],
    source: str,
    teacher: Mapping[str, Any] | None = None,
) -> Data:
    for name in SPLIT:
        if not parts.get(name):
            raise DataError(f"{len(whole)} structures are too few to provide any for '{name}'")
    sets = {name: whole.select(torch.tensor(parts[name])) for name in SPLIT}
    return Data(**sets, source=source, teacher=teacher)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
