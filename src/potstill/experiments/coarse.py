"""Denoising by distillation: teachers on noisy mapped forces, students on what teachers say.

The protocol of Olowookere et al. (*Knowledge Distillation of Noisy Force Labels for Improved
Coarse-Grained Force Fields*), of which the abstract is public: an ensemble of teachers is trained
on mapped forces alone, and students on any combination of forces (mapped, of one teacher, of the
ensemble) and energies (none, total, of each bead). What the abstract leaves open is ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from potstill.checkpoint import load_potential
from potstill.distill import LossTerm
from potstill.errors import DataError
from potstill.evaluate.errors import predict_all
from potstill.experiments.exploration import Exploration, Explored
from potstill.experiments.measures import Finished
from potstill.experiments.recipes import Study
from potstill.experiments.spec import (
    TEACHER,
    Committee,
    Experiment,
    ExperimentData,
    Role,
    TrainedTeacher,
    Variant,
)
from potstill.models import MeanPotential, Potential
from potstill.structures import Properties, Structures
from potstill.train.settings import ScoreSettings, TrainSettings
from potstill.workflows.base import Settings, merged
from potstill.workflows.data import DataSettings, read_labeled

#: Name of the variant whose runs are the ensemble, and of that as a whole.
TEACHERS, ENSEMBLE = "teacher", "all teachers"
#: Name of the trajectory's own forces beside those of models.
MAPPED_FORCES = "mapped forces"

_ENERGIES = {"total": "energy", "per_bead": "atomic_energies"}


class Learned(Settings):
    """What a student learns from.

    Parameters
    ----------
    forces : {"mapped", "teacher", "ensemble"}
        Those of the trajectory, of the teacher with the student's seed, or of all teachers.
    energies : {"none", "total", "per_bead"}
        Of the same teachers, or of the ensemble where forces are mapped ones. Energies have no
        absolute value here: each teacher's mean energy of every kind of bead, over its training
        set, is zero.
    by_spread : bool
        Weigh forces and energies of beads less where the teachers of the ensemble differ.
    hyperparameters : dict
        Of this student, beside those of all students: a smaller one, say.
    explored_by : tuple of str
        Students whose dynamics (`exploration`) visits more frames for this one to learn from, with
        the ensemble's labels. It then knows better where their dynamics go wrong.
    """

    forces: Literal["mapped", "teacher", "ensemble"] = "ensemble"
    energies: Literal["none", "total", "per_bead"] = "none"
    by_spread: bool = False
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    explored_by: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _labels_everywhere(self) -> Learned:
        if self.explored_by and self.forces != "ensemble":
            raise ValueError("only an ensemble labels frames that dynamics explores")
        return self

    @model_validator(mode="after")
    def _spread_of_several(self) -> Learned:
        ensemble = self.forces == "ensemble" or (self.forces == "mapped" and self.taught)
        if self.by_spread and not ensemble:
            raise ValueError("only an ensemble has a spread")
        return self

    @property
    def taught(self) -> bool:
        """Whether a teacher has a part in it."""
        return self.forces != "mapped" or self.energies != "none"


#: Students of the table by name; the first is the control.
STUDENTS = {
    "mapped": Learned(forces="mapped"),
    "one-teacher": Learned(forces="teacher"),
    "one-teacher+bead": Learned(forces="teacher", energies="per_bead"),
    "ensemble": Learned(),
    "ensemble+total": Learned(energies="total"),
    "ensemble+bead": Learned(energies="per_bead"),
    "mapped+bead": Learned(forces="mapped", energies="per_bead"),
}


class MeanForces(Settings):
    """Errors against measured mean forces, which tell of noise what mapped forces cannot.

    Parameters
    ----------
    store : str
        Label store of beads that no model is trained on, with mapped forces as reference labels.
    source : str
        Its mean forces; their standard errors, `forces_std`, are taken off where it has them.
    apart : str, optional
        Mean forces of runs that share nothing with the frames but the places of the beads, which
        the mapped forces are compared with where a frame has them; `null` leaves these out.
    """

    store: str
    source: str = "mean_forces"
    apart: str | None = "heated"

    def measure(self, finished: Finished) -> dict[str, Any]:
        """Root mean square error of a component by run; of others, and of mapped forces."""
        structures, mean = read_labeled(self.store, (), self.source)

        def forces_of(potential: Potential) -> Tensor:
            return predict_all(potential, structures, ["forces"])["forces"]

        found = {
            run.name: forces_of(load_potential(finished.best(run))[0]) for run in finished.records
        }
        members = [found[run.name] for run in finished.records if run.variant.name == TEACHERS]
        others = {ENSEMBLE: torch.stack(members).mean(dim=0)}
        others |= {
            name: forces_of(potential)
            for name, potential in finished.beside.items()
            if name not in others
        }
        errors = {name: _error(forces, mean, structures) for name, forces in others.items()}
        if self.apart is not None:
            apart = read_labeled(self.store, (), self.apart)[1]
            mapped = read_labeled(self.store)[1]["forces"]
            errors[MAPPED_FORCES] = _error(mapped, apart, structures)
        runs = {name: _error(forces, mean, structures) for name, forces in found.items()}
        return {"runs": runs, "others": errors}


def _error(forces: Tensor, mean: Properties, structures: Structures) -> dict[str, float]:
    """Error against mean forces, without that of these themselves, in the frames that have them."""
    there = structures.per_row("forces", mean.presence("forces", len(structures)))
    if not there.any():
        raise DataError("no frame of the measured mean forces has any: choose another source")
    square = (forces - mean["forces"])[there].square().mean()
    if "forces_std" in mean:
        square = square - mean["forces_std"][there].square().mean()
    return {"mean_force_rmse": float(square.clamp(min=0.0).sqrt())}


def ensemble_of(finished: Finished) -> MeanPotential:
    """The ensemble of all teachers as one potential."""
    runs = [run for run in finished.records if run.variant.name == TEACHERS]
    return MeanPotential({str(run.seed): load_potential(finished.best(run))[0] for run in runs})


class CoarseStudy(Study):
    """Teachers on mapped forces, and students on combinations of forces and energies.

    Parameters
    ----------
    kind : "coarse"
        Tells the study from others.
    data : DataSettings
        Beads with mapped forces, as `potstill coarse map` writes them, and how they are split.
    mean_forces : MeanForces, optional
        Measured mean forces to compare with.
    n_teachers : int
        Members of the ensemble, with seeds from 0.
    bootstrap : bool
        Each teacher is trained on as many frames as there are, drawn with replacement.
    teacher, student : dict
        Hyper-parameters beside those of `common`; a student is like a teacher by default.
    students : dict of str to Learned
        Students by name. One on mapped forces alone is the control of those of its size.
    exploration : Exploration
        Dynamics of students that explore for others.
    measure : None
        Liquids of beads are judged by `potstill coarse run`.
    w_total, w_bead : float
        Weights of total energies (per bead) and of energies of beads beside forces, which have 1.
    """

    kind: Literal["coarse"] = "coarse"
    data: DataSettings
    mean_forces: MeanForces | None = None
    n_teachers: int = Field(default=8, ge=1)
    bootstrap: bool = False
    teacher: dict[str, Any] = Field(default_factory=dict)
    student: dict[str, Any] | None = None
    students: dict[str, Learned] = Field(default_factory=lambda: dict(STUDENTS))
    exploration: Exploration = Field(default_factory=Exploration)
    measure: None = None
    w_total: float = Field(default=1.0, ge=0)
    w_bead: float = Field(default=1.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _forces_alone(cls, data: Any) -> Any:
        """What training on mapped forces needs, unless the settings say otherwise."""
        if not isinstance(data, dict):
            return data
        own = {
            "preset": "student",
            "loss": [{"property": "forces"}],
            "score": {"weights": {"forces_rmse": 1.0}},
            # The zero of energies is chosen once a teacher is trained; see `train.refit`.
            "energy": {"zero": "least_squares", "refit": False},
        }
        return {**data, "common": merged(own, data.get("common") or {})}

    @model_validator(mode="after")
    def _known(self) -> CoarseStudy:
        if self.data.store is None:
            raise ValueError("data.store is missing: beads with mapped forces")
        if self.n_teachers < max(self.seeds, default=0) + 1:
            raise ValueError(
                f"{self.n_teachers} teachers are fewer than the seeds ask for ({max(self.seeds)})"
            )
        if self.n_teachers < 2 and any(own.forces == "ensemble" for own in self.students.values()):
            raise ValueError("an ensemble has at least two teachers")
        return self

    @cached_property
    def experiment(self) -> Experiment:
        """The teachers and all students."""
        members = tuple(range(self.n_teachers))
        teachers = Variant(
            TEACHERS,
            Role.TEACHER,
            strategy=TEACHERS,
            group="",
            settings=self._settings(self.teacher),
            seeds=members,
            bootstrap=self.bootstrap,
        )
        students = [self._student(name, own, members) for name, own in self.students.items()]
        experiment = self._experiment(ExperimentData(self.data, {}), [teachers, *students])
        if self.mean_forces is None:
            return experiment
        return replace(
            experiment,
            measures={**experiment.measures, "mean_forces": self.mean_forces},
        )

    def _settings(self, hyperparameters: dict[str, Any]) -> TrainSettings:
        model = self.common.model
        own = {**model.hyperparameters, **hyperparameters}
        return self.common.model_copy(
            update={
                "model": model.model_copy(update={"hyperparameters": own}),
                "score": ScoreSettings(weights=self.common.score.weights),
            }
        )

    def _student(self, name: str, own: Learned, members: tuple[int, ...]) -> Variant:
        """A student: the terms of the common loss are its own where forces are mapped ones."""
        size = self.teacher if self.student is None else self.student
        settings = self._settings({**size, **own.hyperparameters})
        taught: list[LossTerm] = []
        if own.forces != "mapped":
            forces = [t for t in settings.label_terms if t.property == "forces"]
            taught += [t.model_copy(update={"source": TEACHER}) for t in forces]
            settings = settings.model_copy(update={"loss": ()})
        if own.energies != "none":
            total = own.energies == "total"
            taught.append(
                LossTerm(
                    property=_ENERGIES[own.energies],
                    source=TEACHER,
                    weight=self.w_total if total else self.w_bead,
                    per_atom=total,
                )
            )
        if own.by_spread:
            taught = [
                t.model_copy(update={"spread": f"{t.property}_std"})
                for t in taught
                if t.property != "energy"
            ]
        one = TrainedTeacher(TEACHERS)
        controls = tuple(
            other
            for other, its in self.students.items()
            if not its.taught and its.hyperparameters == own.hyperparameters
        )
        if not controls and {**size, **own.hyperparameters} == self.teacher:
            controls = (TEACHERS,)
        return Variant(
            name,
            Role.STUDENT if own.taught else Role.CONTROL,
            strategy=name,
            group="",
            settings=settings,
            taught=tuple(taught),
            teacher=one if own.forces == "teacher" else Committee(TEACHERS, members),
            against=controls if own.taught else (),
            seeds=self.seeds,
            explored=Explored(own.explored_by, self.exploration) if own.explored_by else None,
        )
