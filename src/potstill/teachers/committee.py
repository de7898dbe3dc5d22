"""A committee of teachers: the mean and the spread of every signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from potstill.errors import TeacherError
from potstill.properties import PROPERTIES
from potstill.structures import Structures
from potstill.teachers.base import Teacher, TeacherInfo, fingerprint_of


class CommitteeTeacher(Teacher):
    """Mean over teachers, and the standard deviation between them as `<property>_std`.

    The mean of the energies has the mean of the forces as its gradient, so a committee of
    conservative teachers is conservative. The standard deviation is the population's (divided by
    the number of members).

    Parameters
    ----------
    members : sequence of Teacher
        At least two. A frame fails if one of them fails.
    whole : Teacher, optional
        A teacher that gives the members' mean at once, such as an ensemble within one model. It
        answers when no spread is asked for.
    info : TeacherInfo, optional
        Identity of the committee; by default gathered from the members.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        name: str = "committee",
        *,
        whole: Teacher | None = None,
        info: TeacherInfo | None = None,
    ) -> None:
        if len(members) < 2:
            raise TeacherError(f"a committee needs at least two members, not {len(members)}")
        self.members = tuple(members)
        self.whole = whole
        self.batch_atoms = min(member.batch_atoms for member in members)
        common = frozenset.intersection(*(member.properties for member in members))
        spreads = {f"{p}_std" for p in common} & set(PROPERTIES)
        self.properties = common | spreads
        self.info = info or _gather(self.members, name)

    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        """Ask every member, and take means and standard deviations over them."""
        spreads = [p for p in properties if p not in self.members[0].properties]
        if self.whole is not None and not spreads:
            return self.whole.compute(structures, properties)
        signals = list(dict.fromkeys(p.removesuffix("_std") for p in properties))
        answers = [member.compute(structures, signals) for member in self.members]
        stacked = {p: torch.stack([answer[p] for answer in answers]) for p in signals}
        result = {p: values.mean(dim=0) for p, values in stacked.items()}
        result |= {f"{p}_std": values.std(dim=0, correction=0) for p, values in stacked.items()}
        return {p: result[p] for p in properties}


def _gather(members: Sequence[Teacher], name: str) -> TeacherInfo:
    def joined(attribute: str) -> str:
        return "; ".join(dict.fromkeys(str(getattr(m.info, attribute)) for m in members))

    versions: dict[str, str] = {}
    for member in members:
        versions |= member.info.versions
    return replace(
        members[0].info,
        name=name,
        fingerprint=fingerprint_of("committee", [m.info.fingerprint for m in members]),
        license=joined("license"),
        citation=joined("citation"),
        level_of_theory=joined("level_of_theory"),
        versions=versions,
        conservative=all(m.info.conservative for m in members),
    )
