"""Features of teachers during training: where they come from, and the heads that compare them.

A teacher's features come with the training set, from a labelled store, or are computed for every
batch by the teacher itself; the loss sees no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import lightning_fabric
import torch
from torch import Tensor

from potstill.distill import FeatureTerm
from potstill.distill.heads import AuxiliaryHead, FeatureHead, FeatureHeads, Head
from potstill.distill.taps import split_tap
from potstill.errors import ConfigError, MissingLabelError
from potstill.features import Feature
from potstill.models import Potential, TapSpec
from potstill.structures import Properties
from potstill.teachers.base import Teacher
from potstill.train.data import Batch, TrainingSet
from potstill.train.force_gradient import ForceGradient, NetworkPasses
from potstill.train.objective import BatchLoss
from potstill.train.settings import TrainSettings

#: Batches of the first epoch that the initial loss is averaged over where a term asks for a share.
SHARE_BATCHES = 8

#: Configurations that a teacher is asked about before the first step; it may fail on some.
_EXAMPLES = 4


class FeatureSources:
    """The teachers' features, by source: stored ones, else those of a teacher that is at hand.

    Parameters
    ----------
    settings : TrainSettings
        With the terms.
    training : TrainingSet
        With stored features.
    teachers : mapping
        Teachers that compute online, by source.
    network : Potential
        The student's network.

    Raises
    ------
    MissingLabelError
        If the features of a term are neither stored nor to be computed.
    ConfigError
        If a tap is unknown or does not fit the term.
    """

    def __init__(
        self,
        settings: TrainSettings,
        training: TrainingSet,
        teachers: Mapping[str, Teacher],
        network: Potential,
    ) -> None:
        self._online: dict[str, Teacher] = {}
        self._examples: dict[str, dict[str, Feature]] = {}
        heads: list[Head] = []
        # The student starts from the weights of a control: its random numbers stay untouched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            for term in settings.feature_terms:
                specs, default, teacher = _origin(term, training, teachers)
                head = FeatureHead(term, network, specs, default)
                heads.append(head)
                if teacher is not None:
                    self._online[term.source] = teacher
                    known = self._examples.setdefault(term.source, {})
                    new = [tap for tap in head.teacher_taps if tap not in known]
                    known |= _features_of_some(teacher, training, new)
            heads += [AuxiliaryHead(term, network) for term in settings.auxiliary_terms]
        self.heads = FeatureHeads(heads)

    def complete(self, batch: Batch, *, pairs: bool = True) -> Batch:
        """The batch, on the CPU, with what teachers compute online and it does not hold.

        Parameters
        ----------
        batch : Batch
            With what is stored.
        pairs : bool
            Whether features of pairs are computed, too.
        """
        features = {source: dict(taps) for source, taps in batch.features.items()}
        for source, teacher in self._online.items():
            held, like = features.setdefault(source, {}), self._examples[source]
            missing = [
                tap
                for tap, example in like.items()
                if tap not in held and (pairs or example.graph is None)
            ]
            if missing:
                held |= teacher.features(batch.structures, missing, like)[0]
        return replace(batch, features=features) if self._online else batch

    def heads_for(self, data: TrainingSet) -> list[Head]:
        """Heads whose term can be evaluated on a set: what they compare is there, or online."""
        found: list[Head] = []
        for head in self.heads.all:
            source = head.term.source
            if isinstance(head, AuxiliaryHead):
                labels = data.labels.get(source, Properties({}))
                there = bool(labels.presence(head.term.learn, len(data)).any())
            else:
                known = {*data.features.get(source, {}), *self._examples.get(source, {})}
                there = known.issuperset(head.teacher_taps)
            found += [head] if there else []
        return found

    def to(self, device: torch.device | str) -> None:
        """Move the teachers to the device of the training, those that can be moved."""
        for teacher in self._online.values():
            teacher.to(device)

    def summary(self) -> dict[str, str]:
        """Per term, which tap learns from which."""
        return {head.term.name: head.taps_in_words for head in self.heads.all}

    def choose_scales(
        self,
        settings: TrainSettings,
        network: Potential,
        draw: Callable[[Tensor, int, int], Batch],
        order: Sequence[Tensor],
        fabric: lightning_fabric.Fabric,
    ) -> None:
        """Scale the weights of terms that are to have a share of the initial loss.

        With R the sum of the terms with given weights and s_k the shares, the whole is
        R / (1 - Σ s_k), and term k gets the weight that makes it s_k of that. All are means over
        the first batches of the first epoch, without regularization.

        Parameters
        ----------
        settings, network, fabric
            As of the training.
        draw : callable
            Makes a batch out of indices of configurations, the epoch and the step.
        order : sequence of Tensor
            The indices of each step of the first epoch.
        """
        shares = {t.name: t.share for t in settings.feature_terms if t.share is not None}
        if not shares:
            return
        gradient = ForceGradient(
            settings.force_gradient, network, watch=False, features=bool(self.heads.all)
        )
        batches = order[:SHARE_BATCHES]
        means: dict[str, float] = {}
        for step, systems in enumerate(batches):
            batch = draw(systems, 1, step)
            objective = BatchLoss(settings, 1, network, batch, fabric, self.heads)
            parts = gradient(NetworkPasses(network), batch, objective.wanted, objective).parts
            for term in settings.loss:
                value = term.weight_at(1) * parts.get(term.name, 0.0)
                means[term.name] = means.get(term.name, 0.0) + value / len(batches)
        whole = sum(v for k, v in means.items() if k not in shares) / (1.0 - sum(shares.values()))
        for name, share in shares.items():
            if not means[name] > 0.0 or not whole > 0.0:
                raise ConfigError(
                    f"{name} cannot have a share of the initial loss: it is {means[name]:.3g} of "
                    f"{whole:.3g}; give it a weight"
                )
            self.heads.scales[name] = share * whole / means[name]


def average_over_ranks(heads: FeatureHeads, fabric: lightning_fabric.Fabric) -> None:
    """Average the gradients of the heads, which data-parallel wrappers do not see."""
    if fabric.world_size == 1:
        return
    for parameter in heads.parameters():
        if parameter.grad is not None:
            total = fabric.all_reduce(parameter.grad, reduce_op="mean")
            parameter.grad.copy_(cast(Tensor, total))


def is_stored(term: FeatureTerm, training: TrainingSet) -> bool:
    """Whether the training set holds the teacher's features that a term asks for."""
    stored = training.features.get(term.source, {})
    if term.teacher_tap:
        return all(tap in stored for tap in split_tap(term.teacher_tap))
    return any(feature.kind in term.kinds.teacher for feature in stored.values())


def _origin(
    term: FeatureTerm, training: TrainingSet, teachers: Mapping[str, Teacher]
) -> tuple[dict[str, TapSpec], str | None, Teacher | None]:
    """Taps for a term, the default among them, and the teacher if it computes online."""
    stored = training.features.get(term.source, {})
    named = split_tap(term.teacher_tap) if term.teacher_tap else ()
    if is_stored(term, training):
        specs = {tap: TapSpec(f.kind, f.width) for tap, f in stored.items()}
        return specs, next(reversed(specs)), None
    if term.source not in teachers:
        raise MissingLabelError(
            f"the loss distils {' and '.join(named) or 'features'} of '{term.source}' "
            f"({term.name}), but the data hold {', '.join(stored) or 'no features'} of it: store "
            "them with `potstill label --taps`, or name the teacher under 'teachers' to compute "
            "them online"
        )
    teacher = teachers[term.source]
    specs = dict(teacher.taps)
    by_path = [tap for tap in named if tap not in specs]
    if by_path:
        found = _features_of_some(teacher, training, by_path)
        specs |= {tap: TapSpec(f.kind, f.width) for tap, f in found.items()}
    return specs, teacher.default_tap, teacher


def _features_of_some(
    teacher: Teacher, training: TrainingSet, taps: list[str]
) -> dict[str, Feature]:
    """Features of the first few configurations: their kind and width, and whether there are any."""
    if not taps:
        return {}
    some = range(min(_EXAMPLES, len(training)))
    return teacher.features(training.structures.select(list(some)), taps)[0]
