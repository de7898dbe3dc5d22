"""What a training run can be told, with the defaults of Matin et al. (appendix A.1)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from potstill.distill import FeatureTerm, LossTerm, expand
from potstill.distill.strategies import AnyTerm
from potstill.distill.terms import Line
from potstill.errors import ModelError
from potstill.models import check_hyperparameters
from potstill.sample.jitter import NormOf


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightsSettings(_Settings):
    """Weights that the student's network starts from; see `potstill.train.initialize`.

    Parameters
    ----------
    checkpoint : str
        A potential of the same kind, the teacher's say.
    names : tuple of str
        Patterns of the names of parameters, such as `blocks.*` for the interaction layers; what
        only one of the two networks has is left alone.
    first_channels : bool
        Let layers that are wider in the checkpoint be cut down to their first channels. The same
        channels are kept in all layers, so that the layers still fit one another.
    """

    checkpoint: str
    names: tuple[str, ...] = Field(default=("*",), min_length=1)
    first_channels: bool = False


class ModelSettings(_Settings):
    """The student's network.

    Parameters
    ----------
    kind : str
        One of hipnn, ani, gemnet_oc, schnet, painn, snap; or `module:Class`, a subclass of
        `potstill.models.Potential` that can be imported.
    hyperparameters : dict
        What differs from the defaults of the kind; `potstill.models.model_class(kind).hyper_class`
        documents them.
    initialize : WeightsSettings, optional
        Start from weights of another network in place of random ones.
    """

    kind: str = "hipnn"
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    initialize: WeightsSettings | None = None

    @model_validator(mode="after")
    def _that_can_be_built(self) -> ModelSettings:
        try:
            check_hyperparameters(self.kind, self.hyperparameters)
        except ModelError as error:
            raise ValueError(str(error)) from error
        return self


class EnergySettings(_Settings):
    """Where the energy zero lies, and what holds atoms apart.

    Parameters
    ----------
    zero : {"none", "least_squares"} or dict of str to float
        The per-species energies that are subtracted from energies and atomic energies before
        training and added again in the saved model: a least-squares fit, given values (isolated
        atoms, say) in eV per atom, or none, as Matin et al. train. HIP-NN's first term E0 is fitted
        to what is left, and its hierarchicality regularizer depends on this choice.
    prior : {"none", "zbl"}
        A short-range repulsion, subtracted from the labels and part of the saved model.
    prior_inner, prior_cutoff : float, optional
        Radii of the switch in Å; chosen from covalent radii if absent.
    """

    zero: Literal["none", "least_squares"] | dict[str, float] = "least_squares"
    prior: Literal["none", "zbl"] = "none"
    prior_inner: float | None = None
    prior_cutoff: float | None = None


class OptimizerSettings(_Settings):
    """Adam or AdamW (with AMSGrad), gradient clipping and the moving average of weights.

    Parameters
    ----------
    name : {"adam", "adamw", "amsgrad_adamw"}
        The optimizer.
    learning_rate : float
        At the start.
    weight_decay : float
        As of the optimizer: decoupled from the gradient with AdamW.
    clip_norm : float, optional
        Largest norm of the gradient of all parameters together.
    ema_decay : float, optional
        Per step, of an exponential moving average of the weights, which is validated and saved.
    """

    name: Literal["adam", "adamw", "amsgrad_adamw"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)


class LearningRateSettings(_Settings):
    """How the learning rate changes with the epochs.

    Parameters
    ----------
    schedule : {"plateau", "step", "exponential", "constant"}
        When it is multiplied by `factor`: after `patience` epochs without a better score, every
        `step_epochs`, every epoch, or never.
    factor : float
        What it is multiplied by.
    patience : int
        Epochs, of `plateau`.
    step_epochs : int
        Epochs, of `step`.
    warmup_epochs : int
        Epochs before the schedule, in which it grows from almost nothing.
    minimum : float
        It does not fall below.
    """

    schedule: Literal["plateau", "step", "exponential", "constant"] = "plateau"
    factor: float = Field(default=0.5, gt=0, lt=1)
    patience: int = Field(default=30, ge=0)
    step_epochs: int = Field(default=100, ge=1)
    warmup_epochs: int = Field(default=0, ge=0)
    minimum: float = Field(default=1e-6, ge=0)


class RegularizationSettings(_Settings):
    """Weights of the L2 term and of what models want of their energies, by its name.

    Parameters
    ----------
    l2 : float
        Weight of the sum of all squared weights.
    hierarchicality : float
        Of HIP-NN's energies, Eq. 2 of Matin et al.; see `Potential.regularizers`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0)]] = Field(init=False)

    l2: float = Field(default=1e-6, ge=0)
    hierarchicality: float = Field(default=0.01, ge=0)


class ForceGradientSettings(_Settings):
    """How the gradient of a loss of forces and stress is taken; see docs/force-gradients.md.

    Parameters
    ----------
    method : {"auto", "backpropagation", "central_difference", "forward_over_reverse"}
        Central differences where native kernels serve the model, else backpropagation; or one of
        them: backpropagate twice; or take the loss' gradient as a directional derivative of the
        energy's gradient, by a central difference (needs first derivatives only) or exactly.
    epsilon : float, optional
        Of the central difference: the largest displacement of an atom in Å; by precision if absent.
    folded : bool
        Of the central difference: two passes over the parameters instead of three.
    """

    method: Literal["auto", "backpropagation", "central_difference", "forward_over_reverse"] = (
        "auto"
    )
    epsilon: float | None = Field(default=None, gt=0, le=0.1)
    folded: bool = True


class ScoreSettings(_Settings):
    """The validation score that plateau, early stopping and the choice of the best weights use.

    It is a weighted sum of metrics (keys of `potstill.metrics`) against one source. It knows no
    schedule, so that it stays comparable over a run and between student and control.

    Parameters
    ----------
    source : str
        The label set that is compared with.
    weights : dict of str to float
        By metric.
    """

    source: str = "reference"
    weights: dict[str, float] = Field(
        default_factory=lambda: {
            "energy_mae": 1.0,
            "energy_rmse": 1.0,
            "forces_mae": 10.0,
            "forces_rmse": 10.0,
        }
    )


class MixingSettings(_Settings):
    """How synthetic data (`data.synthetic`) are mixed in; see `potstill.train.mixing`.

    Parameters
    ----------
    alpha : float, optional
        Share of synthetic samples in an epoch, from 0 to 1; by their number where it is not given.
        With 0.5, twice as many reference as synthetic data are gone through half as often.
    r : float
        How much a synthetic sample weighs in the loss relative to another one (Eqs. 9-11).
    """

    alpha: float | None = Field(default=None, ge=0, le=1)
    r: float = Field(default=1.0, gt=0)


class AugmentSettings(_Settings):
    """Noise on positions, labeled by a teacher online; see `potstill.train.augment`.

    Parameters
    ----------
    source : str
        Name of the teacher. Of displaced structures its labels count as `reference`, too.
    norm : float
        Å, of the displacement.
    norm_of : {"structure", "atom"}
        Whether that is the norm of the displacement of all atoms together or of each.
    kind : {"random", "ascent"}
        The direction: at random, or where student and teacher differ more (a potstill potential).
    fraction : float
        Share of the samples that are displaced, each by a draw of its own.
    """

    source: str
    norm: float = Field(default=0.1, gt=0)
    norm_of: NormOf = "structure"
    kind: Literal["random", "ascent"] = "random"
    fraction: float = Field(default=1.0, gt=0, le=1)

    @field_validator("source")
    @classmethod
    def _a_teacher(cls, name: str) -> str:
        if name == "reference":
            raise ValueError("displaced structures have no reference labels: name a teacher")
        return name


def paper_loss(w_forces: float = 10.0) -> tuple[LossTerm, ...]:
    """The loss of teachers and controls: Eq. 2 with w_E = 1."""
    return (
        LossTerm(property="energy", weight=1.0),
        LossTerm(property="forces", weight=w_forces),
    )


class TrainSettings(_Settings):
    """All settings of one training run but its data.

    Parameters
    ----------
    mixing : MixingSettings, optional
        Sampling and weighting ratio of synthetic data.
    augment : AugmentSettings, optional
        Displace the structures of every batch, and let a teacher label them.
    loss : tuple of LossTerm, FeatureTerm, AuxiliaryTerm or CustomLine
        Its lines; those with `distill` name strategies (`potstill.distill.strategies`).
    epochs : int
        At most this many.
    batch_size : int
        Configurations per step, over all processes.
    batch_atoms : int, optional
        Atom budget per step instead: batches are filled up to it.
    early_stopping : int, optional
        Stop after so many epochs without a better score, but not before all schedules have ended.
    precision : {"float32", "float64"}
        Of the network; geometry and energy sums are in float64 always.
    core : {"auto", "native", "torch"}
        Kernels: native ones where they serve the model, always, or never.
    compile : bool
        Let torch.compile make the code of backpropagation where native kernels do not serve: a
        minute once, for faster steps; see docs/performance.md.
    seed : int
        Initial weights and the order of configurations.
    tensorboard : bool
        Write `events/` for TensorBoard beside `metrics.jsonl`; needs the extra of that name.
    """

    model: ModelSettings = Field(default_factory=ModelSettings)
    energy: EnergySettings = Field(default_factory=EnergySettings)
    loss: tuple[AnyTerm, ...] = Field(default_factory=paper_loss)
    force_gradient: ForceGradientSettings = Field(default_factory=ForceGradientSettings)
    regularization: RegularizationSettings = Field(default_factory=RegularizationSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    learning_rate: LearningRateSettings = Field(default_factory=LearningRateSettings)
    score: ScoreSettings = Field(default_factory=ScoreSettings)
    mixing: MixingSettings | None = None
    augment: AugmentSettings | None = None
    epochs: int = Field(default=300, ge=1)
    batch_size: int = Field(default=8, ge=1)
    batch_atoms: int | None = Field(default=None, ge=1)
    early_stopping: int | None = Field(default=50, ge=1)
    precision: Literal["float32", "float64"] = "float32"
    core: Literal["auto", "native", "torch"] = "auto"
    compile: bool = False
    seed: int = 0
    tensorboard: bool = False

    @field_validator("loss", mode="before")
    @classmethod
    def _strategies(cls, lines: Any) -> Any:
        return expand(lines)

    @field_validator("loss")
    @classmethod
    def _some_loss(cls, terms: tuple[Line, ...]) -> tuple[Line, ...]:
        if not any(term.ever_active for term in terms):
            raise ValueError("the loss has no term with a weight other than zero")
        names = [term.name for term in terms]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the loss names the term {name} twice")
        if sum(t.share or 0.0 for t in terms if isinstance(t, FeatureTerm)) >= 1.0:
            raise ValueError("the shares of the loss add up to one or more")
        if all(isinstance(t, FeatureTerm) and t.share is not None for t in terms):
            raise ValueError("a share of the loss needs another term with a weight")
        return terms

    @model_validator(mode="after")
    def _one_source_of_displaced_structures(self) -> TrainSettings:
        if self.augment is None:
            return self
        for term in self.loss:
            if term.ever_active and term.source not in ("reference", self.augment.source):
                raise ValueError(
                    f"only '{self.augment.source}' labels displaced structures (augment), but "
                    f"{term.name} needs labels of '{term.source}': leave out one of the two"
                )
        return self

    @property
    def label_terms(self) -> tuple[LossTerm, ...]:
        """The terms on labels."""
        return tuple(term for term in self.loss if isinstance(term, LossTerm))

    @property
    def feature_terms(self) -> tuple[FeatureTerm, ...]:
        """The terms on internal features that ever weigh."""
        terms = (term for term in self.loss if isinstance(term, FeatureTerm))
        return tuple(term for term in terms if term.ever_active)

    @property
    def schedule_end(self) -> int:
        """The epoch from which on the loss no longer changes."""
        return max(term.schedule_end for term in self.loss)
