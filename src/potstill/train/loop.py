"""The training loop, from top to bottom in one place.

Data-parallel runs (`torchrun`) give the numbers of a single process with the whole batch: error
sums are all-reduced before square roots are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning_fabric
from torch import Tensor, nn

from potstill.checkpoint import save_potential
from potstill.distill.terms import Batch
from potstill.models import Potential
from potstill.teachers.base import Teacher
from potstill.train.augment import Augmentation
from potstill.train.compilation import network_passes
from potstill.train.data import TrainingSet
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import ForceGradient
from potstill.train.initialize import initial_student
from potstill.train.mixing import batch_weights, mixed_batches, within_steps
from potstill.train.objective import BatchLoss
from potstill.train.refit import energies_are_free, refit_energy_zero
from potstill.train.settings import TrainSettings
from potstill.train.signals import (
    FeatureSources,
    average_over_ranks,
    bind_terms,
    check_labels,
    choose_scales,
    learning_taps,
)
from potstill.train.state import Interruption, RunFolder, Trainee, now, restore, snapshot
from potstill.train.validation import Validation

#: Called after every epoch with the epoch's record (what also goes into metrics.jsonl).
EpochCallback = Callable[[dict[str, Any]], None]

#: Steps between two looks at the loss: reading it makes a GPU wait.
READ_EVERY = 50


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Parameters
    ----------
    status : {"finished", "stopped early", "interrupted"}
        Interrupted runs continue when `train` is called again with the same folder.
    best : Path
        The potential with the best validation score (`ScoreSettings`), reached in `best_epoch`.
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
    settings = within_steps(settings, training)
    p = prepare(settings, training, validation, folder, initial, teachers or {}, say, fabric)
    run, trainee = p.run, p.trainee
    with Interruption() as interruption, run.event_log(settings, trainee) as log_events:
        while trainee.epoch <= settings.epochs and not trainee.should_stop(settings):
            # -- one pass over the training set ------------------------------------------------
            started = now()
            epoch = trainee.epoch
            trainee.set_learning_rate(settings)
            p.network.train()
            batches = mixed_batches(p.data.structures, p.data.synthetic, settings, epoch)
            for systems in batches[trainee.step :]:
                if interruption.requested:
                    break
                batch = p.draw(systems, epoch, trainee.step)
                objective = BatchLoss(trainee.terms, epoch, batch, p.fabric)
                gradient = p.force_gradient(p.passes, batch, objective.wanted, objective)
                trainee.optimizer.zero_grad(set_to_none=True)
                gradient.backward(p.fabric, p.passes)
                average_over_ranks(trainee.terms, p.fabric)
                if settings.optimizer.clip_norm is not None:
                    nn.utils.clip_grad_norm_(trainee.trained, settings.optimizer.clip_norm)
                trainee.take_step(gradient.parts)
                if trainee.step % READ_EVERY == 0:
                    run.read_parts(trainee)
            run.read_parts(trainee)  # a run that has diverged ends here, its folder untouched
            if interruption.requested and trainee.step < len(batches):
                trainee.count_time(started)
                snapshot(run, trainee)
                return _result(p, "interrupted")

            # -- validation, best weights, snapshot ----------------------------------------------
            with trainee.averaged_weights():
                metrics = p.validation.metrics()
                score = sum(w * metrics[key] for key, w in settings.score.weights.items())
                improved = trainee.register_score(score)
                if improved and p.fabric.is_global_zero:
                    about = {"seed": settings.seed, "settings": settings.model_dump(mode="json")}
                    about["training"] = {"epoch": epoch, "validation": metrics}
                    save_potential(run.best, trainee.student, {**(info or {}), **about})
            trainee.count_time(started)
            record = {
                "epoch": epoch,
                "steps": trainee.steps,
                "learning_rate": trainee.learning_rate,
                "weights": {line.name: line.weight_at(epoch) for line in settings.label_terms}
                | trainee.terms.weights(epoch),
                "train": trainee.epoch_means(),
                "validation": metrics,
                "score": score,
                "best": improved,
                "seconds": trainee.seconds,
                "processor_seconds": trainee.processor_seconds,
            }
            trainee.next_epoch(settings)
            run.log(record)
            log_events(record)
            snapshot(run, trainee)
            if on_epoch is not None and p.fabric.is_global_zero:
                on_epoch(record)
            if interruption.requested:
                return _result(p, "interrupted")
    refit = settings.energy.refit or (initial is None and energies_are_free(settings, p.data))
    if refit and p.fabric.is_global_zero and run.best.is_file():
        refit_energy_zero(run.best, p.data, settings)
    return _result(p, "finished" if trainee.epoch > settings.epochs else "stopped early")


@dataclass(frozen=True)
class Prepared:
    """Everything that the loop works with, checked and on its device."""

    settings: TrainSettings
    fabric: lightning_fabric.Fabric
    network: Potential
    data: TrainingSet
    features: FeatureSources
    augmentation: Augmentation | None
    run: RunFolder
    trainee: Trainee
    force_gradient: ForceGradient
    passes: nn.Module
    validation: Validation

    def draw(self, systems: Tensor, epoch: int, step: int) -> Batch:
        """A process's share of a step's configurations: weighed, displaced, with features."""
        mine = slice(self.fabric.global_rank, None, self.fabric.world_size)
        weights = batch_weights(self.data.synthetic, systems, self.settings)
        batch = self.data.batch(systems[mine], None if weights is None else weights[mine])
        if self.augmentation is not None:
            batch = self.augmentation(batch, epoch, step, range(len(systems))[mine])
        return self.features.complete(batch).to(self.fabric.device)


def prepare(
    settings: TrainSettings,
    training: TrainingSet,
    validation: TrainingSet,
    folder: str | Path,
    initial: Potential | None,
    teachers: Mapping[str, Teacher],
    say: Callable[[str], None] | None,
    fabric: lightning_fabric.Fabric | None,
) -> Prepared:
    """Check all that a run needs, make what it works with, and resume it if it was interrupted."""
    fabric = fabric or default_fabric()
    check_labels(settings, training, validation)
    if settings.augment is not None:  # stored features are those of other positions
        training = replace(training, features={})
    table = initial.species_table if initial is not None else training.structures.species_table
    training, validation = (d.with_species_table(table) for d in (training, validation))
    student, training = initial_student(settings, training, initial)
    network, baseline = student["network"], student.without("network")
    network.use_core(settings.core)
    network.to(fabric.device)  # before native kernels are chosen, which are for the CPU
    features = FeatureSources(training, teachers)
    terms = bind_terms(settings, network, features)
    augmentation = None
    if settings.augment is not None:
        augmentation = Augmentation(settings, student, teachers, fabric.device)
    tapped = any(name in network.taps for term in terms.all for name in term.needs)
    force_gradient = ForceGradient(settings.force_gradient, network, features=tapped)
    say = say if fabric.is_global_zero else None
    passes = network_passes(network, force_gradient, compiled=settings.compile, say=say)
    reach = network.cutoff + force_gradient.margin
    training = training.with_neighbors(reach, packed=force_gradient.takes_compact_lists)

    run = RunFolder.open(Path(folder), settings, training, fabric, learning_taps(terms))
    order = mixed_batches(training.structures, training.synthetic, settings, epoch=1)
    trainee = Trainee.create(student, terms, settings, fabric, len(order))
    features.to(fabric.device)
    residual = validation.minus(baseline)
    validated = Validation(settings, network, residual, terms, features, fabric)
    p = Prepared(
        settings,
        fabric,
        network,
        training,
        features,
        augmentation,
        run,
        trainee,
        force_gradient,
        fabric.setup_module(passes),
        validated,
    )
    if not restore(run, trainee):
        choose_scales(settings, network, terms, p.draw, order, fabric)
    return p


def _result(p: Prepared, status: str) -> TrainResult:
    record = p.run.close(status, p.trainee)
    p.fabric.barrier()  # what rank 0 writes is there when any rank goes on
    return TrainResult(best=p.run.best, **record)
