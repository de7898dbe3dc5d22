"""What stands between features of student and teacher while a student is trained.

A head belongs to one term of the loss and holds its transformations. Heads are trained along with
the student and are no part of it: a saved student knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from potstill.distill.aggregate import edges_to_nodes, edges_to_vectors, match_pairs
from potstill.distill.feature_losses import FEATURE_LOSSES, Rows
from potstill.distill.taps import CHOSEN_PAIRS, default_tap, split_tap
from potstill.distill.terms import AuxiliaryTerm, FeatureTerm
from potstill.distill.transforms import make_transform
from potstill.errors import ConfigError, MissingLabelError, ModelError, suggest
from potstill.features import Feature, FeatureKind, pairs_at, pairs_within
from potstill.models import Potential, TapSpec
from potstill.structures import NeighborList, Properties, Structures


def resolve_taps(
    name: str | None,
    taps: Mapping[str, TapSpec],
    preferred: str | None,
    kinds: tuple[FeatureKind, ...],
    *,
    owner: str,
    term: str,
) -> tuple[tuple[str, ...], TapSpec]:
    """Find the taps that a term names, or the default, and check that they fit.

    Parameters
    ----------
    name : str, optional
        Names joined by `+`.
    taps : mapping
        What there is.
    preferred : str, optional
        The owner's default tap.
    kinds : tuple of str
        What fits, the best first.
    owner, term : str
        Whose taps, and what asks for them, for messages.

    Returns
    -------
    names : tuple of str
        The taps.
    spec : TapSpec
        Of all of them side by side.

    Raises
    ------
    ConfigError
        If a tap is unknown or of the wrong kind.
    """
    try:
        names = split_tap(name) if name else (default_tap(taps, preferred, kinds, owner),)
    except ModelError as error:
        raise ConfigError(f"{term}: {error}") from None
    for part in names:
        if part not in taps:
            raise ConfigError(f"{term}: {owner} has no feature tap '{part}'{suggest(part, taps)}")
    found = list(dict.fromkeys(taps[part].kind for part in names))
    if len(found) > 1 or found[0] not in kinds:
        raise ConfigError(
            f"{term} needs a tap of {owner} of the kind {' or '.join(kinds)}, but '{name}' is of "
            f"the kind {' and '.join(found)}: choose another tap or strategy"
        )
    return names, TapSpec(found[0], sum(taps[part].width for part in names))


class FeatureHead(nn.Module):
    """The transformations and the loss of one term.

    Parameters
    ----------
    term : FeatureTerm
        The term.
    student : Potential
        Whose taps are looked at.
    teacher_taps : mapping
        The teacher's taps by name.
    teacher_default : str, optional
        Its own choice among them.

    Raises
    ------
    ConfigError
        If a tap is unknown or of the wrong kind, or widths differ where they must agree.
    """

    def __init__(
        self,
        term: FeatureTerm,
        student: Potential,
        teacher_taps: Mapping[str, TapSpec],
        teacher_default: str | None = None,
    ) -> None:
        super().__init__()
        self.term = term
        self.cutoff = student.cutoff
        self.loss = FEATURE_LOSSES[term.error]
        self.student_taps, mine = resolve_taps(
            term.student_tap,
            student.taps,
            student.default_tap,
            (term.kinds.student,),
            owner=f"the student ({student.kind})",
            term=term.name,
        )
        self.teacher_taps, theirs = resolve_taps(
            term.teacher_tap,
            teacher_taps,
            teacher_default,
            term.kinds.teacher,
            owner=f"the teacher '{term.source}'",
            term=term.name,
        )
        identities = [t == "identity" for t in (term.student_transform, term.teacher_transform)]
        if self.loss.same_width and all(identities) and mine.width != theirs.width:
            raise ConfigError(
                f"{term.name}: the student's feature has {mine.width} channels and the teacher's "
                f"{theirs.width}, and {term.error} compares them one by one: use a linear "
                "transformation"
            )
        # The common space is the teacher's own where its features stay as they are.
        width = mine.width if identities[0] and not identities[1] else theirs.width
        vector = term.kinds.student == "node_vector"
        options = {"vector": vector}
        self.student_transform = make_transform(
            term.student_transform, mine.width, width, **options
        )
        self.teacher_transform = make_transform(
            term.teacher_transform, theirs.width, width, **options
        )
        self.widths = (
            mine.width if identities[0] else width,
            theirs.width if identities[1] else width,
        )
        self._student_chooses = CHOSEN_PAIRS in student.taps
        self.to(student.dtype)

    @property
    def wanted(self) -> tuple[str, ...]:
        """What the student is asked for."""
        if self.term.distill == "e2e" and self._student_chooses:
            return (*self.student_taps, CHOSEN_PAIRS)
        return self.student_taps

    @property
    def taps_in_words(self) -> str:
        """Which tap learns from which, with defaults filled in."""
        return f"{'+'.join(self.student_taps)} <- {'+'.join(self.teacher_taps)}"

    def sums(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Feature],
        structures: Structures,
        neighbors: NeighborList,
        weights: Tensor | None = None,
    ) -> Tensor:
        """(k,) float64 sums over the batch, which `value` makes a loss of.

        Parameters
        ----------
        student : mapping
            The student's features by tap.
        teacher : mapping
            The teacher's features of the same systems by tap.
        structures : Structures
            The batch.
        neighbors : NeighborList
            The student's; it may reach beyond the student's cutoff.
        weights : Tensor, optional
            (S,) float64 of the systems; all weigh one if absent.
        """
        feature = _joined([teacher[tap] for tap in self.teacher_taps], self.term.name)
        present = feature.presence(structures.n_systems)
        system = structures.system_index
        atoms = present[system]
        x = torch.cat([student[tap] for tap in self.student_taps], dim=-1)
        pairs = None
        if self.term.distill == "e2e":
            if self._student_chooses:
                rows = student[CHOSEN_PAIRS][:, 0].long()
            else:
                rows = pairs_within(structures, neighbors, self.cutoff)[1].nonzero()[:, 0]
                x = x[rows]
            x, y, system = self._shared_pairs(
                x, pairs_at(structures, neighbors, rows), feature, system
            )
        else:
            y = self._of_atoms(feature, structures)
            if self.loss.row_wise:
                x, y, system = x[atoms], y[atoms], system[atoms]
            else:
                shape = (-1, *[1] * (y.ndim - 1))
                y = torch.where(atoms.reshape(shape), y, 0.0)  # NaN where there is none
                pairs, _ = pairs_within(structures, neighbors, self.cutoff)
        x, y = (self._cast(z) for z in (x, y))
        x, y = self.student_transform(x), self.teacher_transform(y)
        by_row = None if weights is None else weights[system]
        return self.loss.sums(x, y, Rows(structures, atoms, pairs, by_row))

    def value(self, sums: Tensor) -> Tensor:
        """Scalar loss, from sums over the whole batch."""
        return self.loss.value(sums, *self.widths)

    def _of_atoms(self, feature: Feature, structures: Structures) -> Tensor:
        if feature.graph is None:
            return feature.values
        if self.term.distill == "e2n":
            return edges_to_nodes(feature, structures)
        return edges_to_vectors(feature, structures)

    def _shared_pairs(
        self, x: Tensor, own: NeighborList, teacher: Feature, system: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the pairs that both have, and the system of each; `system` is by atom."""
        assert teacher.graph is not None
        mine, theirs = match_pairs(own, teacher.graph)
        if own.n_pairs and teacher.graph.n_pairs and not len(mine):
            raise ConfigError(
                f"{self.term.name}: student and teacher have no pair in common, so that features "
                "of pairs cannot be compared: let both work on one graph"
            )
        return x[mine], teacher.values[theirs], system[own.center[mine]]

    def _cast(self, value: Tensor) -> Tensor:
        for parameter in self.parameters():
            return value.to(parameter.dtype)
        return value.double()


class AuxiliaryHead(nn.Module):
    """Reads a property off the student's features, for one term.

    Parameters
    ----------
    term : AuxiliaryTerm
        The term.
    student : Potential
        Whose tap is looked at.

    Raises
    ------
    ConfigError
        If the tap is unknown or of the wrong kind.
    """

    def __init__(self, term: AuxiliaryTerm, student: Potential) -> None:
        super().__init__()
        self.term = term
        self.loss = FEATURE_LOSSES[term.error]
        self.student_taps, spec = resolve_taps(
            term.student_tap,
            student.taps,
            student.default_tap,
            ("node_scalar",),
            owner=f"the student ({student.kind})",
            term=term.name,
        )
        self.wanted = self.student_taps
        self.readout = make_transform(term.transform, spec.width, 1, vector=False)
        self.to(student.dtype)

    @property
    def taps_in_words(self) -> str:
        """Where the property is read off."""
        return "+".join(self.student_taps)

    def sums(
        self,
        student: Mapping[str, Tensor],
        labels: Properties,
        structures: Structures,
        weights: Tensor | None = None,
    ) -> Tensor:
        """(2,) float64 sums over the batch, from the student's features and the labels.

        (S,) `weights` of the systems count as in `FeatureHead.sums`.
        """
        system = structures.system_index
        x = torch.cat([student[tap] for tap in self.student_taps], dim=-1)
        dtype = next(self.parameters()).dtype
        charges = self.readout(x.to(dtype))[:, 0].double()
        present = labels.presence(self.term.learn, structures.n_systems)
        if self.term.learn == "charges":
            atoms = present[system]
            predicted, label = charges[atoms].unsqueeze(1), labels["charges"][atoms].unsqueeze(1)
            by_row = None if weights is None else weights[system][atoms]
        else:
            present = present & ~structures.pbc.any(dim=1)
            if structures.charge is not None:
                present = present & (structures.charge == 0)
            n_systems, sizes = structures.n_systems, structures.n_atoms_per_system
            total = charges.new_zeros(n_systems).index_add(0, system, charges)
            neutral = charges - (total / sizes.clamp(min=1))[system]
            moments = neutral.unsqueeze(1) * structures.positions
            dipole = moments.new_zeros(n_systems, 3).index_add(0, system, moments)
            predicted, label = dipole[present], labels["dipole"][present]
            by_row = None if weights is None else weights[present]
        return self.loss.sums(predicted, label, Rows(structures, present[system], weights=by_row))

    def value(self, sums: Tensor) -> Tensor:
        """Scalar loss, from sums over the whole batch."""
        return self.loss.value(sums, 1, 1)


#: A head of either kind.
Head = FeatureHead | AuxiliaryHead


class FeatureHeads(nn.Module):
    """The heads of all terms of a loss.

    Parameters
    ----------
    heads : iterable of FeatureHead or AuxiliaryHead
        In the order of the terms.
    """

    def __init__(self, heads: Iterable[Head] = ()) -> None:
        super().__init__()
        self.members = nn.ModuleList(heads)
        #: Factors of the weights by term, where a share of the initial loss was asked for.
        self.scales: dict[str, float] = {}

    @property
    def all(self) -> list[Head]:
        """The heads."""
        return [cast(Head, head) for head in self.members]

    def active(self, epoch: int) -> list[Head]:
        """Those whose term weighs in an epoch."""
        return [head for head in self.all if head.term.weight_at(epoch) != 0.0]

    def weight(self, term: FeatureTerm | AuxiliaryTerm, epoch: int) -> float:
        """The weight of a term in an epoch."""
        return term.weight_at(epoch) * self.scales.get(term.name, 1.0)


def check_auxiliary(
    terms: Iterable[AuxiliaryTerm], labels: Mapping[str, Properties], where: str
) -> None:
    """Refuse a run whose auxiliary terms ask for labels that are not there.

    Raises
    ------
    MissingLabelError
        Naming the term and what is there instead.
    """
    for term in terms:
        have = labels.get(term.source, Properties({}))
        if term.learn not in have or not bool(have.presence(term.learn, 1).any()):
            raise MissingLabelError(
                f"{where}: the loss asks for '{term.learn}' from '{term.source}', which holds only "
                f"{', '.join(have.names) or 'nothing'}"
            )


def _joined(features: list[Feature], term: str) -> Feature:
    """Features side by side; those of pairs must share one graph."""
    first = features[0]
    if len(features) == 1:
        return first
    for other in features[1:]:
        if first.graph is not None and other.graph is not None:
            columns = zip(vars(first.graph).values(), vars(other.graph).values(), strict=True)
            if not all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in columns):
                raise ConfigError(f"{term}: taps on different graphs cannot be joined")
    values = torch.cat([feature.values for feature in features], dim=-1)
    masks = [feature.present for feature in features if feature.present is not None]
    present = torch.stack(masks).all(dim=0) if masks else None
    return Feature(first.kind, values, first.graph, first.recipe, present)
