"""What the terms of a run need, where it comes from, and that it is there before the first step.

A teacher's features come with the training set, from a labeled store, or are computed for every
batch by the teacher itself; the loss sees no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import lightning_fabric
import torch
from torch import Tensor

from potstill.distill import FeatureTerm, LossTerm
from potstill.distill.feature_terms import FeatureHead
from potstill.distill.regularizers import EnergyRegularizer, SquaredWeights
from potstill.distill.taps import TapPair
from potstill.distill.terms import Batch, Line, Term, Terms, check_signals, holds
from potstill.errors import ConfigError, MissingLabelError, suggest
from potstill.features import Feature
from potstill.models import Potential, TapSpec
from potstill.properties import LEARNABLE
from potstill.teachers.base import Teacher
from potstill.train.data import TrainingSet
from potstill.train.force_gradient import ForceGradient, NetworkPasses
from potstill.train.mixing import check_mixing
from potstill.train.objective import BatchLoss
from potstill.train.settings import TrainSettings

#: Batches of the first epoch that the initial loss is averaged over where a term asks for a share.
SHARE_BATCHES = 8

#: Configurations that a teacher is asked about before the first step; it may fail on some.
_EXAMPLES = 4


def check_labels(settings: TrainSettings, training: TrainingSet, validation: TrainingSet) -> None:
    """Refuse a run that lacks labels of its loss or its score, or data that it is to mix.

    The first is a MissingLabelError, the others are ConfigErrors.
    """
    lines: Sequence[Line] = settings.loss
    if settings.augment is not None:  # a teacher labels what is displaced
        lines = [line for line in settings.label_terms if line.source == "reference"]
    check_signals(lines, training.labels, "training set")
    score = [_scored(metric, settings.score.source) for metric in settings.score.weights]
    check_signals(score, validation.labels, "validation set")
    check_mixing(settings, training.structures, training.synthetic)


def _scored(metric: str, source: str) -> LossTerm:
    """The label that a metric of the score needs, as a line of a loss."""
    for name in sorted(LEARNABLE, key=len, reverse=True):
        if metric.removeprefix("free_").startswith(name):
            return LossTerm(property=name, source=source)
    raise ConfigError(f"the score's metric '{metric}' is not one of potstill.metrics")


def bind_terms(
    settings: TrainSettings, network: Potential, features: FeatureSources | None = None
) -> Terms:
    """All terms of a run: those of the loss, what the model asks of its energies, and L2.

    Raises
    ------
    MissingLabelError
        If the features of a term are neither stored nor to be computed.
    ConfigError
        If a tap is unknown or does not fit the term.
    """
    features = features or FeatureSources(None, {})
    lines = sorted(settings.loss, key=lambda line: line.order)
    # The student starts from the weights of a control: its random numbers stay untouched.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        terms: list[Term] = [line.bind(network, features) for line in lines if line.ever_active]
    weights, penalties = settings.regularization.model_dump(), network.regularizers()
    for name in settings.regularization.model_extra or {}:
        if name not in penalties:
            known = [*type(settings.regularization).model_fields, *penalties]
            raise ConfigError(
                f"{network.kind} has no regularizer '{name}'{suggest(name, known)}: there are "
                f"{', '.join(dict.fromkeys(known))}"
            )
    terms += [EnergyRegularizer(n, f, weights.get(n, 0.0)) for n, f in penalties.items()]
    return Terms([*terms, SquaredWeights(network, weights["l2"])])


class FeatureSources:
    """The teachers' features, by source: stored ones, else those of a teacher that is at hand."""

    def __init__(self, training: TrainingSet | None, teachers: Mapping[str, Teacher]) -> None:
        self._training, self._teachers = training, teachers
        self._online: dict[str, Teacher] = {}
        self._examples: dict[str, dict[str, Feature]] = {}

    def taps_for(self, line: FeatureTerm) -> tuple[dict[str, TapSpec], str | None]:
        """Taps for a line of the loss, and the default among them; MissingLabelError if none."""
        training, source = self._training, line.source
        stored = {} if training is None else training.features.get(source, {})
        if training is not None and is_stored(line, training):
            specs = {tap: TapSpec(f.kind, f.width) for tap, f in stored.items()}
            return specs, next(reversed(specs))
        named = line.teacher_tap or ()
        if source not in self._teachers:
            raise MissingLabelError(
                f"the loss distills {' and '.join(named) or 'features'} of '{source}' "
                f"({line.name}), but the data hold {', '.join(stored) or 'no features'} of it: "
                "store them with `potstill label --taps`, or name the teacher under 'teachers' to "
                "compute them online"
            )
        teacher = self._online[source] = self._teachers[source]
        specs = dict(teacher.taps)
        found = self._of_some(source, [tap for tap in named if tap not in specs])  # by path
        specs |= {tap: TapSpec(f.kind, f.width) for tap, f in found.items()}
        return specs, teacher.default_tap

    def will_ask(self, source: str, taps: Sequence[str]) -> None:
        """Note which taps of a source are needed; a teacher at hand is asked for an example."""
        if source in self._online:
            known = self._examples.setdefault(source, {})
            known |= self._of_some(source, [tap for tap in taps if tap not in known])

    def _of_some(self, source: str, taps: list[str]) -> dict[str, Feature]:
        """Features of the first few configurations: their kind and width, and if there are any."""
        if not taps or self._training is None:
            return {}
        structures = self._training.structures
        some = structures.select(list(range(min(_EXAMPLES, structures.n_systems))))
        return self._online[source].features(some, taps)[0]

    def complete(self, batch: Batch, *, pairs: bool = True) -> Batch:
        """The batch, on the CPU, with what teachers compute online and it does not hold.

        Features of pairs are left out if they are not asked for.
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

    def known_of(self, term: Term, data: TrainingSet) -> bool:
        """Whether what a term compares the student with is there for a set, or online."""
        line = term.line
        if line is None or not all(holds(data.labels, line.source, n) for n in line.labels):
            return False
        taps = term.taps.teacher if isinstance(term, FeatureHead) else ()
        stored = data.features.get(line.source, {})
        return {*stored, *self._examples.get(line.source, {})}.issuperset(taps)

    def to(self, device: torch.device | str) -> None:
        """Move the teachers to the device of the training, those that can be moved."""
        for teacher in self._online.values():
            teacher.to(device)


def learning_taps(terms: Terms) -> dict[str, TapPair]:
    """Per term on features, which taps learn from which."""
    pairs = {term.name: getattr(term, "taps", None) for term in terms.all}
    return {name: pair for name, pair in pairs.items() if isinstance(pair, TapPair)}


def choose_scales(
    settings: TrainSettings,
    network: Potential,
    terms: Terms,
    draw: Callable[[Tensor, int, int], Batch],
    order: Sequence[Tensor],
    fabric: lightning_fabric.Fabric,
) -> None:
    """Scale the weights of terms that are to have a share of the initial loss.

    With R the sum of the terms with given weights and s_k the shares, the whole is
    R / (1 - Σ s_k), and term k gets the weight that makes it s_k of that. All are means over the
    first batches of the first epoch, without regularization; `draw` makes them out of the indices
    of configurations in `order`, the epoch and the step.
    """
    shares = {t.name: t.share for t in settings.feature_terms if t.share is not None}
    if not shares:
        return
    gradient = ForceGradient(settings.force_gradient, network, watch=False, features=True)
    batches, weights = order[:SHARE_BATCHES], terms.weights(1)
    means: dict[str, float] = {}
    for step, systems in enumerate(batches):
        objective = BatchLoss(terms, 1, draw(systems, 1, step), fabric)
        batch = objective.batch
        parts = gradient(NetworkPasses(network), batch, objective.wanted, objective).parts
        for line in settings.loss:
            value = weights.get(line.name, 0.0) * float(parts.get(line.name, 0.0))
            means[line.name] = means.get(line.name, 0.0) + value / len(batches)
    whole = sum(v for k, v in means.items() if k not in shares) / (1.0 - sum(shares.values()))
    scales = {}
    for name, share in shares.items():
        if not means[name] > 0.0 or not whole > 0.0:
            raise ConfigError(
                f"{name} cannot have a share of the initial loss: it is {means[name]:.3g} of "
                f"{whole:.3g}; give it a weight"
            )
        scales[name] = share * whole / means[name]
    terms.scales = scales


def average_over_ranks(terms: Terms, fabric: lightning_fabric.Fabric) -> None:
    """Average the gradients of the terms' parameters, which data-parallel wrappers do not see."""
    if fabric.world_size == 1:
        return
    for parameter in terms.parameters():
        if parameter.grad is not None:
            total = fabric.all_reduce(parameter.grad, reduce_op="mean")
            parameter.grad.copy_(cast(Tensor, total))


def is_stored(term: FeatureTerm, training: TrainingSet) -> bool:
    """Whether the training set holds the teacher's features that a term asks for."""
    stored = training.features.get(term.source, {})
    if term.teacher_tap:
        return all(tap in stored for tap in term.teacher_tap)
    return any(feature.kind in term.kinds.teacher for feature in stored.values())
