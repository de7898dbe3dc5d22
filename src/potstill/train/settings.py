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
        A potential of the same kind, for example the teacher's.
    names : tuple of str
        Patterns of parameter names, such as `blocks.*` for the interaction layers; parameters of
        only one of the two networks are skipped.
    first_channels : bool
        Truncate layers that are wider in the checkpoint to their first channels, the same ones in
        all layers.
    """

    checkpoint: str
    names: tuple[str, ...] = Field(default=("*",), min_length=1)
    first_channels: bool = False


class ModelSettings(_Settings):
    """The student's network.

    Parameters
    ----------
    kind : str
        One of hipnn, ani, gemnet_oc, schnet, painn, snap, pair; or `module:Class`, a subclass of
        `potstill.models.Potential` that can be imported.
    hyperparameters : dict
        Hyper-parameters that differ from the defaults of the kind, which
        `potstill.models.model_class(kind).hyper_class` documents.
    initialize : WeightsSettings, optional
        Start from the weights of another network instead of random ones.
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
    """Energy zero and short-range repulsion.

    Parameters
    ----------
    zero : {"none", "least_squares"} or dict of str to float
        The per-species energies that are subtracted from energies and atomic energies before
        training and added back in the saved model: a least-squares fit, given values (for example
        of isolated atoms) in eV per atom, or none, as in Matin et al. HIP-NN's first term E0 is
        fitted to the remainder, and its hierarchicality regularizer depends on this choice.
        Where a run knows forces alone the fit is that to zero: the mean energy of each species over
        the training set, which such labels leave open, is zero in the saved model.
    refit : bool
        Fit the per-species energies of the best potential to the training energies at the end,
        without which all energies per atom may be off by a fraction of a meV. Errors of validation
        in the run's files are those before.
    prior : {"none", "zbl"} or str
        A fixed potential, subtracted from the labels and part of the saved model: a short-range
        repulsion of elements, or what a checkpoint (`prior.pt`) holds, such as a repulsion of beads
        (`potstill.coarse.prior`).
    prior_inner, prior_cutoff : float, optional
        Inner and outer switching radius in Å; by default from covalent radii.
    """

    zero: Literal["none", "least_squares"] | dict[str, float] = "least_squares"
    refit: bool = False
    prior: Literal["none", "zbl"] | Annotated[str, Field(pattern=r"\.pt$")] = "none"
    prior_inner: float | None = None
    prior_cutoff: float | None = None


class OptimizerSettings(_Settings):
    """Optimizer, gradient clipping and moving average of the weights.

    Parameters
    ----------
    name : {"adam", "adamw", "amsgrad_adamw"}
        Adam, AdamW, or AdamW with AMSGrad.
    learning_rate : float
        Initial learning rate.
    weight_decay : float
        Weight decay. With AdamW it is decoupled from the gradient, and spares what the
        regularization spares, such as biases and energy layers.
    beta2 : float
        Decay per step of the squared gradients' average; 0.99 suits runs of a few thousand steps.
    clip_norm : float, optional
        Clip the norm of the gradient of all parameters to this value.
    ema_decay : float or "auto", optional
        Decay per step of a moving average of the weights, which is then validated and saved.
        `auto` averages over a tenth of the run: 1 - 10 / steps.
    """

    name: Literal["adam", "adamw", "amsgrad_adamw"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    beta2: float = Field(default=0.999, gt=0, lt=1)
    clip_norm: float | None = Field(default=None, gt=0)
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None = None


class LearningRateSettings(_Settings):
    """Learning-rate schedule.

    Parameters
    ----------
    schedule : {"plateau", "one_cycle", "step", "exponential", "constant"}
        When the learning rate is multiplied by `factor`: after `patience` epochs without a better
        score, every `step_epochs`, every epoch, or never. `one_cycle` rises from a twenty-fifth to
        the full rate over the first 15 % of the epochs and falls to nearly zero along a cosine.
    factor : float
        Factor by which the learning rate is reduced.
    patience : int
        Epochs without improvement before a reduction (`plateau`).
    step_epochs : int
        Epochs between reductions (`step`).
    warmup_epochs : int
        Epochs of linear warm-up before the schedule.
    minimum : float
        Lower bound of the learning rate.
    """

    schedule: Literal["plateau", "one_cycle", "step", "exponential", "constant"] = "plateau"
    factor: float = Field(default=0.5, gt=0, lt=1)
    patience: int = Field(default=30, ge=0)
    step_epochs: int = Field(default=100, ge=1)
    warmup_epochs: int = Field(default=0, ge=0)
    minimum: float = Field(default=1e-6, ge=0)


class RegularizationSettings(_Settings):
    """Weights of regularization terms: L2, and those of the model by name.

    Parameters
    ----------
    l2 : float
        Weight of the sum of all squared weights.
    hierarchicality : float
        Weight of HIP-NN's hierarchicality term, Eq. 2 of Matin et al.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0)]] = Field(init=False)

    l2: float = Field(default=1e-6, ge=0)
    hierarchicality: float = Field(default=0.01, ge=0)


class ForceGradientSettings(_Settings):
    """How gradients of force and stress losses are computed; see docs/force-gradients.md.

    Parameters
    ----------
    method : {"auto", "backpropagation", "central_difference", "forward_over_reverse"}
        `auto`: central differences where native kernels support the model, else backpropagation.
        `backpropagation`: twice through the model. The others take a directional derivative of the
        energy's gradient, by a central difference (first derivatives only) or exactly.
    epsilon : float, optional
        Largest displacement of an atom in Å (`central_difference`); by default from the precision.
    folded : bool
        Two passes over the parameters instead of three (`central_difference`).
    """

    method: Literal["auto", "backpropagation", "central_difference", "forward_over_reverse"] = (
        "auto"
    )
    epsilon: float | None = Field(default=None, gt=0, le=0.1)
    folded: bool = True


class ScoreSettings(_Settings):
    """Validation score for learning rate, early stopping and the selection of the best weights.

    It is a weighted sum of metrics (keys of `potstill.metrics`) against one source. It has no
    schedule, so it is comparable over a run and between student and control.

    Parameters
    ----------
    source : str
        Label set to compare with.
    weights : dict of str to float
        Weights by metric.
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
        Fraction of synthetic samples in an epoch, from 0 to 1; by default that of the data. With
        0.5 and twice as many reference as synthetic data, the former are seen half as often.
    r : float
        Weight of a synthetic sample in the loss relative to a reference sample (Eqs. 9-11).
    """

    alpha: float | None = Field(default=None, ge=0, le=1)
    r: float = Field(default=1.0, gt=0)


class AugmentSettings(_Settings):
    """Noise on positions, labeled by a teacher online; see `potstill.train.augment`.

    Parameters
    ----------
    source : str
        Name of the teacher; its labels replace `reference` for displaced structures.
    norm : float
        Norm of the displacement in Å.
    norm_of : {"structure", "atom"}
        Norm over all atoms of a structure, or of each atom.
    kind : {"random", "ascent"}
        Random directions, or toward larger disagreement with the (potstill) teacher.
    fraction : float
        Fraction of the samples that are displaced, drawn at random.
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


#: Settings by name, for `TrainSettings.preset`.
PRESETS: dict[str, dict[str, Any]] = {
    # As in benchmarks/accuracy.py, but for the number of steps, which suits sets of any size.
    "student": {
        "energy": {"refit": True},
        "loss": [
            {"property": "energy", "weight": 30.0, "per_atom": True},
            {"property": "forces", "weight": 30.0},
        ],
        "optimizer": {
            "name": "adamw",
            "learning_rate": 0.01,
            "weight_decay": 0.01,
            "beta2": 0.99,
            "ema_decay": "auto",
        },
        "learning_rate": {"schedule": "one_cycle"},
        "regularization": {"l2": 0.0, "hierarchicality": 0.0},
        "epochs": 1000,
        "max_steps": 10_000,
        "early_stopping": None,
    }
}


class TrainSettings(_Settings):
    """All settings of one training run except its data.

    Parameters
    ----------
    preset : "student", optional
        What is not given has the values of this preset instead of the defaults, which are those of
        Matin et al.: `student` is what the default network is best trained with.
    mixing : MixingSettings, optional
        Sampling and weighting of synthetic data.
    augment : AugmentSettings, optional
        Displace the structures of every batch and have a teacher label them.
    loss : tuple of LossTerm, FeatureTerm, AuxiliaryTerm or CustomLine
        Terms of the loss; those with `distill` name a strategy of feature distillation.
    epochs : int
        Maximum number of epochs.
    max_steps : int, optional
        Maximum number of steps, up to a whole epoch.
    batch_size : int
        Structures per step, over all processes.
    batch_atoms : int, optional
        Atoms per step, instead of a number of structures.
    early_stopping : int, optional
        Stop after this many epochs without improvement, but not before all schedules have ended.
    precision : {"float32", "float64"}
        Precision of the network; geometry and energy sums are always in float64.
    core : {"auto", "native", "torch"}
        Native kernels where they support the model, always, or never.
    compile : bool
        Use torch.compile for backpropagation where native kernels do not support the model: about a
        minute once, then faster steps; see docs/performance.md.
    seed : int
        Seed of initial weights and of the order of structures.
    tensorboard : bool
        Write TensorBoard files to `events/`; needs the extra `tensorboard`.
    """

    preset: Literal["student"] | None = None
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
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    batch_atoms: int | None = Field(default=None, ge=1)
    early_stopping: int | None = Field(default=50, ge=1)
    precision: Literal["float32", "float64"] = "float32"
    core: Literal["auto", "native", "torch"] = "auto"
    compile: bool = False
    seed: int = 0
    tensorboard: bool = False

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        preset = PRESETS.get(str(values.get("preset"))) if isinstance(values, dict) else None
        if preset is None:
            return values
        merged = dict(preset)
        for key, value in values.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if both else value
        return merged

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
    def _energies_to_refit_to(self) -> TrainSettings:
        if self.energy.refit and not any(
            t.property == "energy" and t.ever_active for t in self.label_terms
        ):
            raise ValueError("energy.refit needs a term of energies in the loss")
        return self

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
