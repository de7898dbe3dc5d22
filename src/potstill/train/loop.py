"""The training loop, from top to bottom in one place.

Data-parallel runs (`torchrun`) give the numbers of a single process with the whole batch: error
sums are all-reduced before square roots are taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning_fabric
from torch import nn

from potstill.checkpoint import save_potential
from potstill.distill.heads import check_auxiliary
from potstill.distill.losses import LossTerm, check_signals
from potstill.errors import ConfigError
from potstill.models import Potential
from potstill.teachers.base import Teacher
from potstill.train.augment import Augmentation
from potstill.train.batches import BatchSource
from potstill.train.compilation import network_passes
from potstill.train.data import TrainingSet
from potstill.train.devices import default_fabric
from potstill.train.features import FeatureSources, average_over_ranks
from potstill.train.force_gradient import ForceGradient
from potstill.train.initialize import initial_student
from potstill.train.mixing import check_mixing, mixed_batches
from potstill.train.objective import BatchLoss
from potstill.train.settings import TrainSettings
from potstill.train.state import Interruption, RunFolder, Trainee, now, restore, snapshot
from potstill.train.validation import Validation

#: Called after every epoch with the epoch's record (what also goes into metrics.jsonl).
EpochCallback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Parameters
    ----------
    status : {"finished", "stopped early", "interrupted"}
        Interrupted runs continue when `train` is called again with the same folder.
    best : Path
        The potential with the best validation score.
    best_epoch, epochs : int
        Epochs are counted from 1.
    best_score : float
        See `ScoreSettings`.
    seconds : float
        Time spent in the loop, over all resumed parts.
    """

    status: str
    best: Path
    best_epoch: int
    epochs: int
    best_score: float
    seconds: float


def train(
    settings: TrainSettings,
    training: TrainingSet,
    validation: TrainingSet,
    folder: str | Path,
    *,
    info: Mapping[str, Any] | None = None,
    initial: Potential | None = None,
    teachers: Mapping[str, Teacher] | None = None,
    on_epoch: EpochCallback | None = None,
    say: Callable[[str], None] | None = None,
    fabric: lightning_fabric.Fabric | None = None,
) -> TrainResult:
    """Train a student, or continue a run that was interrupted in the same folder.

    Parameters
    ----------
    settings : TrainSettings
        Model, loss, optimizer and so on.
    training, validation : TrainingSet
        Structures with labels from every source that the loss and the score ask for.
    folder : path
        The run's folder; gets `settings.json`, `metrics.jsonl`, `last.pt`, `best.pt`,
        `result.json`.
    info : mapping, optional
        What to write into the saved potential (data, teacher, versions).
    initial : Potential, optional
        Start from this potential's weights, offsets and prior (fine-tuning) instead of anew.
    teachers : mapping, optional
        Teachers by source, which compute the features that the training set does not hold, and
        label displaced structures.
    on_epoch : callable, optional
        Progress display.
    say : callable, optional
        Receives sentences for the user, such as how long compiling takes.
    fabric : lightning_fabric.Fabric, optional
        Devices and processes; by default a GPU if there is one, and what `torchrun` started.

    Returns
    -------
    TrainResult
        With the path of the best potential.

    Raises
    ------
    MissingLabelError
        If a label or feature that the loss or the score asks for is absent.
    DivergenceError
        If the loss becomes infinite or NaN; the last good weights stay in the folder.
    ConfigError
        If the folder holds a run with other settings or data.
    """
    fabric = fabric or default_fabric()
    if settings.augment is None:
        check_signals(settings.label_terms, training.labels, "training set")
        check_auxiliary(settings.auxiliary_terms, training.labels, "training set")
    else:
        # A teacher labels what is displaced; stored features are those of other positions.
        given = [term for term in settings.label_terms if term.source == "reference"]
        check_signals(given, training.labels, "training set")
        training = replace(training, features={})
    score_needs = [_score_term(key, settings.score.source) for key in settings.score.weights]
    check_signals(score_needs, validation.labels, "validation set")
    check_mixing(settings, training.structures, training.synthetic)

    table = initial.species_table if initial is not None else training.structures.species_table
    training, validation = (d.with_species_table(table) for d in (training, validation))
    student, training = initial_student(settings, training, initial)
    network, baseline = student["network"], student.without("network")
    network.use_core(settings.core)
    network.to(fabric.device)  # before native kernels are chosen, which are for the CPU
    features = FeatureSources(settings, training, teachers or {}, network)
    heads = features.heads
    augmentation = None
    if settings.augment is not None:
        augmentation = Augmentation(settings, student, teachers or {}, fabric.device)
    force_gradient = ForceGradient(settings.force_gradient, network, features=bool(heads.all))
    own_passes = network_passes(
        network,
        force_gradient,
        compiled=settings.compile,
        say=say if fabric.is_global_zero else None,
    )
    reach = network.cutoff + force_gradient.margin
    training = training.with_neighbors(reach, packed=force_gradient.takes_compact_lists)

    run = RunFolder.open(Path(folder), settings, training, fabric, features.summary())
    trainee = Trainee.create(student, heads, settings, fabric)
    features.to(fabric.device)
    validated = Validation(settings, network, validation.minus(baseline), features, fabric)
    passes = fabric.setup_module(own_passes)
    draw = BatchSource(settings, training, augmentation, features, fabric)
    if not restore(run, trainee):
        order = mixed_batches(training.structures, training.synthetic, settings, epoch=1)
        features.choose_scales(settings, network, draw, order, fabric)

    with Interruption() as interruption, run.event_log(settings, trainee) as events:
        while trainee.epoch <= settings.epochs and not trainee.should_stop(settings):
            # -- one pass over the training set ------------------------------------------------
            started = now()
            epoch = trainee.epoch
            trainee.set_learning_rate(settings)
            network.train()
            batches = mixed_batches(training.structures, training.synthetic, settings, epoch)
            for systems in batches[trainee.step :]:
                if interruption.requested:
                    break
                batch = draw(systems, epoch, trainee.step)  # weighed, displaced, with features
                objective = BatchLoss(settings, epoch, network, batch, fabric, heads)
                gradient = force_gradient(passes, batch, objective.wanted, objective)
                if not math.isfinite(gradient.parts["loss"]):
                    run.report_divergence(epoch, trainee.step, gradient.parts)
                trainee.optimizer.zero_grad(set_to_none=True)
                gradient.backward(fabric, passes)
                average_over_ranks(heads, fabric)
                if settings.optimizer.clip_norm is not None:
                    nn.utils.clip_grad_norm_(trainee.trained, settings.optimizer.clip_norm)
                trainee.optimizer.step()
                trainee.after_step(gradient.parts)
            if interruption.requested and trainee.step < len(batches):
                trainee.count_time(started)
                snapshot(run, trainee)
                return _result(run, trainee, "interrupted", fabric)

            # -- validation, best weights, snapshot ----------------------------------------------
            with trainee.averaged_weights():
                metrics = validated.metrics()
                score = sum(w * metrics[key] for key, w in settings.score.weights.items())
                improved = trainee.register_score(score)
                if improved and fabric.is_global_zero:
                    save_potential(run.best, student, _info(info, settings, epoch, metrics))
            trainee.count_time(started)
            record = {
                "epoch": epoch,
                "steps": trainee.steps,
                "learning_rate": trainee.learning_rate,
                "weights": {t.name: t.weight_at(epoch) for t in settings.label_terms}
                | {head.term.name: heads.weight(head.term, epoch) for head in heads.all},
                "train": trainee.epoch_means(),
                "validation": metrics,
                "score": score,
                "best": improved,
                "seconds": trainee.seconds,
                "processor_seconds": trainee.processor_seconds,
            }
            trainee.next_epoch(settings)
            run.log(record)
            if events is not None:
                events.log(record)
            snapshot(run, trainee)
            if on_epoch is not None and fabric.is_global_zero:
                on_epoch(record)
            if interruption.requested:
                return _result(run, trainee, "interrupted", fabric)
    status = "finished" if trainee.epoch > settings.epochs else "stopped early"
    return _result(run, trainee, status, fabric)


def _score_term(metric: str, source: str) -> LossTerm:
    """The label that a metric of the score needs, as a loss term, so that it can be checked."""
    for name in ("atomic_energies", "energy", "forces", "stress"):
        if metric.removeprefix("free_").startswith(name):
            return LossTerm(property=name, source=source)
    raise ConfigError(f"the score's metric '{metric}' is not one of potstill.metrics")


def _info(
    info: Mapping[str, Any] | None,
    settings: TrainSettings,
    epoch: int,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    return {
        **(info or {}),
        "seed": settings.seed,
        "settings": json.loads(settings.model_dump_json()),
        "training": {"epoch": epoch, "validation": dict(metrics)},
    }


def _result(
    run: RunFolder, trainee: Trainee, status: str, fabric: lightning_fabric.Fabric
) -> TrainResult:
    record = run.close(status, trainee)
    fabric.barrier()  # what rank 0 writes is there when any rank goes on
    return TrainResult(best=run.best, **record)
