"""What a training run remembers: its state in memory, its folder, and signals to stop."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import lightning_fabric
import torch
from torch import Tensor

from potstill import __version__
from potstill.checkpoint import FORMAT_VERSION, read_payload
from potstill.distill.taps import TapPair
from potstill.distill.terms import Terms
from potstill.errors import ConfigError, DivergenceError, require
from potstill.files import write_atomically
from potstill.models import SumPotential
from potstill.train.data import TrainingSet
from potstill.train.settings import OptimizerSettings, TrainSettings


@dataclass
class Trainee:
    """Everything that changes while a student is trained.

    Of the student only the component `network` is trained, and with it the terms' own parameters,
    which are not saved with the student.

    Parameters
    ----------
    average : dict of str to Tensor, optional
        Exponential moving average of the weights.
    epoch, step : int
        The epoch under way, from 1, and the next step in it, from 0.
    best_score : float
        Lowest validation score so far, reached in `best_epoch`.
    plateau_epochs, plateau_scale : int, float
        Epochs since the last improvement or cut, and the product of all cuts.
    seconds, processor_seconds : float
        On the clock and of this process, over all resumed parts, as are the `steps`.
    sums : dict of str to float
        Parts of the loss, summed over the steps of the epoch under way that have been read.
    pending : list of dict of str to Tensor
        Parts of the loss of the steps since, on their device.
    """

    student: SumPotential
    terms: Terms
    optimizer: torch.optim.Optimizer
    average_decay: float | None
    average: dict[str, Tensor] | None
    epoch: int = 1
    step: int = 0
    best_score: float = float("inf")
    best_epoch: int = 0
    plateau_epochs: int = 0
    plateau_scale: float = 1.0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    pending: list[dict[str, Tensor]] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        student: SumPotential,
        terms: Terms,
        settings: TrainSettings,
        fabric: lightning_fabric.Fabric,
        steps_per_epoch: int,
    ) -> Trainee:
        """Move student and terms to the device and make their optimizer."""
        network = student["network"].to(fabric.device)
        terms.to(fabric.device)
        trained: list[Tensor] = [*network.parameters(), *terms.parameters()]
        decayed = [*network.regularized_weights(), *terms.parameters()]
        optimizer = _optimizer(settings.optimizer, trained, decayed)
        decay = settings.optimizer.ema_decay
        if decay == "auto":
            decay = max(0.0, 1.0 - 10.0 / (settings.epochs * steps_per_epoch))
        average = None
        if decay is not None:
            average = {k: v.detach().clone() for k, v in network.state_dict().items()}
        return cls(student, terms, optimizer, decay, average)

    # -- learning rate -------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """The rate in force."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_learning_rate(self, settings: TrainSettings) -> None:
        """Set the rate of the epoch under way, from the epoch and the plateaus so far."""
        rule = settings.learning_rate
        done = self.epoch - 1 - rule.warmup_epochs
        scale = self.plateau_scale
        if done < 0:
            scale *= self.epoch / (rule.warmup_epochs + 1)
        elif rule.schedule == "one_cycle":
            scale *= one_cycle((self.epoch - 0.5) / settings.epochs)
        elif rule.schedule == "exponential":
            scale *= rule.factor**done
        elif rule.schedule == "step":
            scale *= rule.factor ** (done // rule.step_epochs)
        initial = settings.optimizer.learning_rate
        rate = max(initial * scale, min(initial, rule.minimum))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    # -- progress ------------------------------------------------------------------------------

    def take_step(self, parts: dict[str, Tensor]) -> None:
        """Move the weights and their average, unless the loss is infinite or NaN.

        That is decided on the device, as for mixed precision: nothing is read back.
        """
        self.optimizer.found_inf = (~torch.isfinite(parts["loss"])).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.pending.append(parts)
        self.step += 1
        self.steps += 1
        if self.average is not None and self.average_decay is not None:
            with torch.no_grad():
                for name, value in self.student["network"].state_dict().items():
                    self.average[name].lerp_(value, 1.0 - self.average_decay)

    def read_pending(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Parts of the loss of each step that has not been read, with its number in the epoch."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        names = list(pending[0])
        table = torch.stack([torch.stack([p[n].double() for n in names]) for p in pending])
        for step, row in enumerate(table.tolist(), start=self.step - len(pending) + 1):
            parts = dict(zip(names, row, strict=True))
            for name, value in parts.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            yield step, parts

    def count_time(self, since: tuple[float, float]) -> None:
        """Add the time since `now()` was asked for `since`."""
        clock, processor = now()
        self.seconds += clock - since[0]
        self.processor_seconds += processor - since[1]

    def epoch_means(self) -> dict[str, float]:
        """Parts of the loss, averaged over the steps of the epoch."""
        return {name: value / max(self.step, 1) for name, value in self.sums.items()}

    def register_score(self, score: float) -> bool:
        """Note a validation score; True if it is the best so far by more than `_THRESHOLD`."""
        improved = score < self.best_score * (1.0 - _THRESHOLD)
        if improved:
            self.best_score, self.best_epoch, self.plateau_epochs = score, self.epoch, 0
        else:
            self.plateau_epochs += 1
        return improved

    def next_epoch(self, settings: TrainSettings) -> None:
        """Move on to the next epoch, cutting the learning rate after a plateau."""
        rule = settings.learning_rate
        if rule.schedule == "plateau" and self.plateau_epochs > rule.patience:
            self.plateau_epochs = 0
            self.plateau_scale *= rule.factor
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    def should_stop(self, settings: TrainSettings) -> bool:
        """Whether patience has run out since the best epoch and since the schedules ended."""
        if settings.early_stopping is None:
            return False
        reference = max(self.best_epoch, settings.schedule_end)
        return self.epoch - 1 - reference >= settings.early_stopping

    @property
    def trained(self) -> list[Tensor]:
        """All parameters that the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the moving average into the network for validation and saving."""
        if self.average is None:
            yield
            return
        network = self.student["network"]
        current = {k: v.detach().clone() for k, v in network.state_dict().items()}
        network.load_state_dict(self.average)
        try:
            yield
        finally:
            network.load_state_dict(current)


def now() -> tuple[float, float]:
    """Seconds on the clock, and of this process: on a busy machine only the second tell costs."""
    return time.perf_counter(), time.process_time()


#: Relative improvement that counts; that of torch's ReduceLROnPlateau.
_THRESHOLD = 1e-4

#: Fields of a trainee that are plain numbers and go into the snapshot's header.
_COUNTERS = tuple(f.name for f in fields(Trainee) if f.type in ("int", "float", "dict[str, float]"))


@dataclass(frozen=True)
class RunFolder:
    """The files of a training run, which one process alone `writes` (rank 0)."""

    path: Path
    writes: bool

    @classmethod
    def open(
        cls,
        path: Path,
        settings: TrainSettings,
        training: TrainingSet,
        fabric: lightning_fabric.Fabric,
        taps: Mapping[str, TapPair] | None = None,
    ) -> RunFolder:
        """Make the folder; ConfigError if it holds a run with other settings or other data.

        What is known of the taps that learn from one another goes into `settings.json`.
        """
        fingerprint = data_fingerprint(training)
        run = cls(path, fabric.is_global_zero)
        file = path / "settings.json"
        if file.is_file():
            stored = json.loads(file.read_text())
            # Through the class, so that settings that are newer than the run take their defaults.
            same = TrainSettings.model_validate(stored["settings"]) == settings
            if not same or stored["data_fingerprint"] != fingerprint:
                what = "training data" if same else "settings"
                raise ConfigError(
                    f"{path} holds a run with other {what}: choose another folder, or remove it"
                )
        elif run.writes:
            record: dict[str, Any] = {
                "settings": settings.model_dump(mode="json"),
                "data_fingerprint": fingerprint,
                "versions": versions(),
                "labels": training.summary(),
            }
            if taps:
                record["features"] = {name: pair.to_json() for name, pair in taps.items()}
            write_atomically(file, json.dumps(record, indent=2))
        fabric.barrier()
        return run

    @property
    def best(self) -> Path:
        """The potential with the best score."""
        return self.path / "best.pt"

    @property
    def last(self) -> Path:
        """The state to resume from."""
        return self.path / "last.pt"

    @property
    def metrics(self) -> Path:
        """One JSON record per epoch."""
        return self.path / "metrics.jsonl"

    def log(self, record: dict[str, Any]) -> None:
        """Append an epoch's record."""
        if self.writes:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")

    @contextmanager
    def event_log(
        self, settings: TrainSettings, trainee: Trainee
    ) -> Iterator[Callable[[dict[str, Any]], None]]:
        """What takes the records of epochs into TensorBoard's `events/`, if settings ask for them.

        Raises OptionalDependencyError if tensorboard is not installed.
        """
        if not (settings.tensorboard and self.writes):
            yield lambda record: None
            return
        require("tensorboard", extra="tensorboard", purpose="to write TensorBoard's event files")
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process wrote from the first epoch of a resumed run on is dropped.
        with SummaryWriter(str(self.path / "events"), purge_step=trainee.epoch) as writer:

            def log(record: dict[str, Any]) -> None:
                scalars = {name: record[name] for name in ("score", "learning_rate")}
                for part in ("train", "validation"):
                    scalars |= {f"{part}/{name}": value for name, value in record[part].items()}
                for name, value in scalars.items():
                    writer.add_scalar(name, value, record["epoch"])
                writer.flush()

            yield log

    def drop_records_from(self, epoch: int) -> None:
        """Remove records of epochs that a resumed run will do again."""
        if not self.writes or not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote this line
                break
            if record["epoch"] < epoch:
                kept.append(line + "\n")
        write_atomically(self.metrics, "".join(kept))

    def read_parts(self, trainee: Trainee) -> None:
        """Read the parts of the loss of the steps since the last time.

        If that of a step is no longer a number, DivergenceError: no step from there on is saved.
        """
        for step, parts in trainee.read_pending():
            if math.isfinite(parts["loss"]):
                continue
            shown = ", ".join(f"{name} = {value:.3g}" for name, value in parts.items())
            kept = f"the best potential so far is {self.best}" if self.best.is_file() else "nothing"
            raise DivergenceError(
                f"training diverged in epoch {trainee.epoch}, step {step} ({shown}); {kept} was "
                "kept: try a smaller learning rate, clip_norm, or look for wrong labels"
            )

    def close(self, status: str, trainee: Trainee) -> dict[str, Any]:
        """Write and return how the run ended."""
        result = {
            "status": status,
            "best_epoch": trainee.best_epoch,
            "epochs": trainee.epoch - 1,
            "best_score": trainee.best_score,
            "seconds": trainee.seconds,
        }
        if self.writes and status != "interrupted":
            write_atomically(self.path / "result.json", json.dumps(result, indent=2))
        return result


def snapshot(run: RunFolder, trainee: Trainee) -> None:
    """Write everything that a resumed run needs to continue bit for bit."""
    if not run.writes:
        return
    payload = {
        "potstill_format": FORMAT_VERSION,
        "header": json.dumps({name: getattr(trainee, name) for name in _COUNTERS}),
        "state": trainee.student["network"].state_dict(),
        "optimizer": trainee.optimizer.state_dict(),
        "average": trainee.average,
    }
    if len(trainee.terms.members):
        payload["heads"] = trainee.terms.state_dict()
        payload["scales"] = trainee.terms.scales
    write_atomically(run.last, lambda file: torch.save(payload, file))


def restore(run: RunFolder, trainee: Trainee) -> bool:
    """Continue from the folder's snapshot; False if there is none.

    Raises
    ------
    ConfigError
        If the snapshot is of another network or optimizer than this version makes of the settings.
    """
    if not run.last.is_file():
        run.drop_records_from(0)
        return False
    payload = read_payload(run.last)
    try:
        trainee.student["network"].load_state_dict(payload["state"])
        trainee.optimizer.load_state_dict(payload["optimizer"])
    except (RuntimeError, ValueError):
        raise ConfigError(
            f"{run.path} holds a run of an older potstill, whose defaults for the model or the "
            "optimizer were others: train into another folder, or continue it with that version"
        ) from None
    if trainee.average is not None:
        trainee.average = payload["average"]
    if len(trainee.terms.members):
        trainee.terms.load_state_dict(payload["heads"])
        trainee.terms.scales = payload["scales"]
    for name, value in json.loads(payload["header"]).items():
        setattr(trainee, name, value)
    run.drop_records_from(trainee.epoch)
    return True


class Interruption:
    """Turns SIGINT and SIGTERM into a request that the loop honors after the step under way.

    A second SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: leave signals to whoever owns it
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def data_fingerprint(data: TrainingSet) -> str:
    """Short hash of structures and labels."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update("".join(data.structures.fingerprints()).encode())
    for source, labels in sorted(data.labels.items()):
        for name in sorted(labels.names):
            digest.update(f"{source}/{name}".encode())
            digest.update(labels[name].cpu().contiguous().numpy().tobytes())
    if data.synthetic is not None:
        digest.update(data.synthetic.numpy().tobytes())
    for source, taps in sorted(data.features.items()):
        for tap, feature in sorted(taps.items()):
            digest.update(f"{source}/{tap}".encode())
            digest.update(feature.values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what produces the numbers."""
    import ase
    import numpy
    import vesin

    return {
        "potstill": __version__,
        "torch": torch.__version__,
        "ase": ase.__version__,
        "numpy": numpy.__version__,
        "vesin": getattr(vesin, "__version__", "unknown"),
    }


def one_cycle(done: float, rise: float = 0.15, start: float = 0.04) -> float:
    """Share of the full learning rate after a share of the training (Smith, arXiv:1803.09820)."""
    if done < rise:
        return start + (1.0 - start) * 0.5 * (1.0 - math.cos(math.pi * done / rise))
    return 0.5 * (1.0 + math.cos(math.pi * (done - rise) / (1.0 - rise)))


def _optimizer(
    settings: OptimizerSettings, parameters: list[Tensor], decayed: list[Tensor]
) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    betas = (0.9, settings.beta2)
    # Fused: networks are many small tensors, and one call per tensor and operation takes longer
    # than the kernels of a small batch.
    if settings.name == "adam":
        return torch.optim.Adam(parameters, rate, betas, weight_decay=decay, fused=True)
    amsgrad = settings.name == "amsgrad_adamw"
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if decay > 0.0:
        known = {id(p) for p in decayed}
        spared = [p for p in parameters if id(p) not in known]
        groups = [{"params": [p for p in parameters if id(p) in known]}]
        groups.append({"params": spared, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, rate, betas, weight_decay=decay, amsgrad=amsgrad, fused=True)
