"""Augmentation while training: noise of a fixed norm, labeled by a teacher online.

Ekström Kelvinius et al., appendix D.1: noise is added to the positions of the samples of a batch,
and the teacher says what energies and forces are there. Its labels take the place of reference
labels, of which there are none at displaced positions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from potstill.core import build_compact_neighbors
from potstill.distill.terms import Batch, required_signals
from potstill.errors import ConfigError
from potstill.models import Potential, SumPotential
from potstill.neighbors import build_neighbor_list
from potstill.properties import property_spec
from potstill.sample.base import make_generator
from potstill.sample.jitter import discrepancy_gradient, displaced
from potstill.structures import NeighborList, Properties, Structures
from potstill.teachers import PotentialTeacher
from potstill.teachers.base import Teacher
from potstill.train.data import TrainingSet
from potstill.train.settings import AugmentSettings, TrainSettings


class Augmentation:
    """Displaces configurations of a batch and lets a teacher label them.

    The student's offsets and prior are subtracted from the teacher's labels; `ascent` looks at all
    of it. The teacher is left as it is and gets no gradient.

    Raises
    ------
    ConfigError
        If the teacher is missing, or no potential where one is needed.
    TeacherError
        If it does not give what the loss asks for.
    """

    def __init__(
        self,
        settings: TrainSettings,
        student: SumPotential,
        teachers: Mapping[str, Teacher],
        device: torch.device | str,
    ) -> None:
        assert settings.augment is not None
        self.settings: AugmentSettings = settings.augment
        self.seed = settings.seed
        name = self.settings.source
        if name not in teachers:
            raise ConfigError(
                f"augment asks the teacher '{name}' to label displaced structures, but there is "
                f"no such teacher: "
                "name it under 'teachers'"
            )
        self.teacher = teachers[name].to(device)
        asked: set[str] = set().union(*required_signals(settings.loss).values())
        self.properties = tuple(sorted(asked))
        self.teacher.require(self.properties)
        self.baseline = student.without("network")
        self._rivals: tuple[SumPotential, Potential] | None = None
        if self.settings.kind == "ascent":
            if not isinstance(self.teacher, PotentialTeacher):
                raise ConfigError(
                    f"augment.kind = ascent differentiates the teacher, but '{name}' is not a "
                    f"potstill potential: use augment.kind = random"
                )
            fixed = copy.deepcopy(self.baseline).to(device)
            whole = SumPotential({**fixed.components, "network": student["network"].to(device)})
            self._rivals = (whole, self.teacher.potential)
        self._warned = False

    def __call__(self, batch: Batch, epoch: int, step: int, samples: Sequence[int]) -> Batch:
        """Displace some or all configurations, label them, and find the neighbors again.

        The seed, epoch, step and the places `samples` of the configurations in the whole batch over
        all processes decide on the displacements. The batch is on the CPU.
        """
        structures, settings = batch.structures, self.settings
        moved, direction = self._draws(structures, epoch, step, samples)
        atoms = moved[structures.system_index]
        part, random = structures.select(moved), direction[atoms]
        if part.n_systems:
            towards = random
            if self._rivals is not None:
                student, teacher = self._rivals
                gradient = discrepancy_gradient(student, teacher, part.to(teacher.device))
                towards = gradient.to(random.device)
            part = displaced(part, towards, settings.norm, norm_of=settings.norm_of, spare=random)
        positions = structures.positions.clone()
        positions[atoms] = part.positions
        structures = replace(structures, positions=positions)
        labels = self._labels(part)
        known = {
            source: _replaced(batch, batch.labels.get(source, Properties({})), labels, moved)
            for source in ("reference", settings.source)
        }
        spelled_out = isinstance(batch.neighbors, NeighborList)
        build = build_neighbor_list if spelled_out else build_compact_neighbors
        neighbors = build(structures, batch.neighbors.cutoff)
        known = {**batch.labels, **known}
        return replace(batch, structures=structures, neighbors=neighbors, labels=known)

    def _draws(
        self, structures: Structures, epoch: int, step: int, samples: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """(S,) bool, which systems move, and (N, 3), where to at random."""
        moved, directions = [], [np.zeros((0, 3))]
        for sample, n_atoms in zip(samples, structures.n_atoms_per_system.tolist(), strict=True):
            generator = make_generator(self.seed, epoch, step, sample)
            moved.append(bool(generator.random() < self.settings.fraction))
            directions.append(generator.normal(size=(n_atoms, 3)))
        return torch.tensor(moved, dtype=torch.bool), torch.from_numpy(np.concatenate(directions))

    def _labels(self, structures: Structures) -> Properties:
        """The teacher's, without what the student's offsets and prior give there."""
        labels, failures = self.teacher.label(structures, self.properties)
        if failures and not self._warned:
            self._warned = True
            warnings.warn(
                f"the teacher '{self.settings.source}' fails on displaced structures, which are "
                f"left out of the loss: {failures[0].reason}",
                stacklevel=2,
            )
        return TrainingSet(structures, {"all": labels}).minus(self.baseline).labels["all"]


def _replaced(batch: Batch, own: Properties, new: Properties, moved: Tensor) -> Properties:
    """Labels of a batch with new ones, or none, for the systems that have moved; weights stay."""
    structures = batch.structures
    values, present, weights = {}, {}, dict(own.weights)
    for name in dict.fromkeys((*own.names, *new.names)):
        spec = property_spec(name)
        per_atom = spec.level == "atom"
        rows = moved[structures.system_index] if per_atom else moved
        value = torch.full((len(rows), *spec.shape), torch.nan, dtype=torch.float64)
        if name in own:
            value = own[name].clone()
        value[rows] = new.values.get(name, torch.nan)
        values[name] = value
        present[name] = own.presence(name, structures.n_systems).clone()
        present[name][moved] = new.presence(name, int(moved.sum()))
        if name not in own and batch.weights is not None:
            weights[name] = batch.weights[structures.system_index] if per_atom else batch.weights
    return Properties(values, present, weights)
