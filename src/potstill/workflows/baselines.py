"""Pair potentials that networks of beads have to beat, from the same trajectory and labels.

Force matching on the mapped forces, the same on the forces of all teachers (a pair-only student),
and iterative Boltzmann inversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from potstill.models.pair import PairHyperparameters
from potstill.store import LabeledStore
from potstill.teachers.potential import PotentialTeacher
from potstill.workflows.base import Display, Settings, check_folder
from potstill.workflows.data import DataSettings
from potstill.workflows.fitting import FitConfig, PairModel, fit
from potstill.workflows.ibi import IbiConfig, IbiSettings, invert_distributions
from potstill.workflows.labeling import label_with_progress

#: Frames per call of the ensemble.
_CHUNK = 32


class PairFit(Settings):
    """A pair potential by least squares on forces.

    Parameters
    ----------
    model : PairHyperparameters
        Cutoff, and knots of the splines.
    ridge : tuple of float
        Penalties on roughness, as of `potstill fit`; the validation set decides.
    """

    model: PairHyperparameters = Field(default_factory=PairHyperparameters)
    ridge: tuple[float, ...] = Field(
        default=(1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0), min_length=1
    )


class Baselines(Settings):
    """Pair potentials that are judged beside the networks; `null` leaves one out.

    Parameters
    ----------
    pair : PairFit, optional
        Force matching on the mapped forces.
    pair_student : PairFit, optional
        Force matching on the forces of all teachers.
    ibi : IbiSettings, optional
        Iterative Boltzmann inversion, which runs dynamics and takes minutes.
    """

    pair: PairFit | None = Field(default_factory=PairFit)
    pair_student: PairFit | None = Field(default_factory=PairFit)
    ibi: IbiSettings | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are wanted."""
        return tuple(name for name, settings in self if settings is not None)

    def found(self, folder: Path) -> dict[str, Path]:
        """Checkpoints of those that are finished in a folder, by name."""
        files = {name: folder / name / "best.pt" for name in self.names}
        return {name: file for name, file in files.items() if file.is_file()}


@dataclass(frozen=True)
class Beads:
    """What baselines are made of.

    Parameters
    ----------
    store : str
        Beads with mapped forces.
    data : DataSettings
        The same, as it is split for the networks.
    temperature : float
        K.
    prior : str, optional
        Checkpoint with bonds and angles.
    ensemble : Path
        Checkpoint of all teachers, whose forces the pair student learns.
    """

    store: str
    data: DataSettings
    temperature: float
    prior: str | None
    ensemble: Path


def make_baselines(wanted: Baselines, beads: Beads, folder: Path, display: Display) -> None:
    """Make what is wanted, or what is left of it, each in a subfolder of its name.

    The store gets the forces of all teachers, as the label set `ensemble`.

    Raises
    ------
    ConfigError
        If a subfolder holds a baseline of other settings.
    """
    if wanted.pair is not None:
        _match(wanted.pair, beads, "reference", folder / "pair", display)
    if wanted.pair_student is not None:
        teacher = PotentialTeacher.from_checkpoint(beads.ensemble)
        store = LabeledStore.open(beads.store, mode="a")
        label_with_progress(store, teacher, ("forces",), display, chunk=_CHUNK, check=False)
        _match(wanted.pair_student, beads, teacher.name, folder / "pair_student", display)
    if wanted.ibi is not None:
        display.say("iterative Boltzmann inversion")
        own = {"out": str(folder / "ibi"), "store": beads.store, "temperature": beads.temperature}
        invert_distributions(IbiConfig.model_validate(dict(wanted.ibi) | own), display)


def _match(own: PairFit, beads: Beads, source: str, folder: Path, display: Display) -> None:
    """Fit forces of a source, once."""
    config = FitConfig(
        out=str(folder),
        data=beads.data.model_copy(update={"sources": ("reference", source)}),
        source=source,
        model=PairModel(kind="pair", **dict(own.model)),
        prior=beads.prior,
        ridge=own.ridge,
    )
    if not (check_folder(folder, config) and (folder / "errors.json").is_file()):
        fit(config, display)
