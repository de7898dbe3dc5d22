"""Any trained potstill model as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill import __version__
from potstill.checkpoint import load_potential, potential_fingerprint
from potstill.distill.taps import potential_features
from potstill.features import Feature
from potstill.models import ANI, MeanPotential, Potential, SumPotential, TapSpec
from potstill.properties import LEARNABLE
from potstill.structures import Structures
from potstill.teachers.base import Teacher, TeacherInfo, stated, versions_of


class PotentialTeacher(Teacher):
    """A potential that labels in batches; by default it is named after its kind."""

    properties = frozenset(LEARNABLE)
    batch_atoms = 512

    def __init__(self, potential: Potential, info: TeacherInfo | None = None) -> None:
        self.potential = potential
        if potential.direct_forces:
            self.properties = self.properties - {"stress"}
        self.info = info or describe_potential(potential, potential.kind, {})

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> PotentialTeacher:
        """Load a checkpoint; the teacher is named after the file."""
        potential, info = load_potential(path)
        return cls(potential, describe_potential(potential, Path(path).stem, info))

    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        """Predict on the potential's device."""
        structures = structures.to(self.potential.device)
        prediction = self.potential.predict(structures, properties=properties)
        return prediction.properties.to("cpu").values

    def to(self, device: torch.device | str) -> PotentialTeacher:
        """Move the potential."""
        self.potential.to(device)
        return self

    @property
    def taps(self) -> Mapping[str, TapSpec]:
        """Those of the potential."""
        return self.potential.taps

    @property
    def default_tap(self) -> str | None:
        """That of the potential."""
        return self.potential.default_tap

    def compute_features(self, structures: Structures, taps: Sequence[str]) -> dict[str, Feature]:
        """Named taps, and outputs of submodules by path, on the potential's device."""
        features = potential_features(
            self.potential, structures.to(self.potential.device), tuple(taps)
        )
        return {name: feature.to("cpu") for name, feature in features.items()}


def describe_potential(potential: Potential, name: str, info: Mapping[str, Any]) -> TeacherInfo:
    """Identity of a potential, from its checkpoint.

    A distilled potential inherits the license and the level of theory of its own teacher.
    """
    return TeacherInfo(
        name=name,
        fingerprint=potential_fingerprint(potential),
        **stated(info.get("teacher") or info),
        versions={"potstill": __version__} | versions_of("torch"),
        conservative=not potential.direct_forces,
    )


def ensemble_members(potential: Potential) -> list[Potential]:
    """Take an ensemble apart: a mean, or ANI with several members, alone or as the network of a sum.

    Empty if the potential is no ensemble.
    """
    if isinstance(potential, MeanPotential):
        return list(potential.members)
    if isinstance(potential, ANI) and potential.n_members > 1:
        return [potential.member(k) for k in range(potential.n_members)]
    if isinstance(potential, SumPotential) and "network" in potential.components:
        others = {k: potential[k] for k in potential.components if k != "network"}
        networks = ensemble_members(potential["network"])
        return [SumPotential({**others, "network": network}) for network in networks]
    return []
