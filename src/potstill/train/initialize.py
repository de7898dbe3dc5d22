"""What training starts from: offsets, prior and network, with fresh weights or another's."""

from __future__ import annotations

import fnmatch

import torch
from torch import Tensor

from potstill.checkpoint import load_potential
from potstill.errors import ConfigError
from potstill.models import (
    ZBL,
    Potential,
    SpeciesOffsets,
    StartingData,
    SumPotential,
    build_model,
)
from potstill.species import SpeciesTable
from potstill.train.data import TrainingSet, fit_offsets
from potstill.train.mixing import cut
from potstill.train.settings import TrainSettings, WeightsSettings

#: How many batches of the training set a network sees in `initialize_from`.
_TYPICAL_BATCHES = 4


def initial_student(
    settings: TrainSettings, data: TrainingSet, initial: Potential | None = None
) -> tuple[SumPotential, TrainingSet]:
    """Make the student that training starts from, and leave its network the rest of the labels.

    With `initial`, in whose species table the data are, its network, offsets and prior are taken.

    Returns
    -------
    student : SumPotential
        Offsets, prior and network, the network in the run's precision.
    residual : TrainingSet
        The training set without what offsets and prior give.
    """
    dtype = getattr(torch, settings.precision)
    table = data.structures.species_table
    if initial is not None:
        if not isinstance(initial, SumPotential) or "network" not in initial.components:
            raise ConfigError("fine-tuning starts from a potential that potstill has trained")
        initial.components["network"].to(dtype)
        return initial, data.minus(initial.without("network"))
    torch.manual_seed(settings.seed)
    network = build_model(settings.model.kind, table, settings.model.hyperparameters).to(dtype)
    zero = _energy_zero(settings, data, table)
    components: dict[str, Potential] = {"offsets": SpeciesOffsets(table, zero)}
    if settings.energy.prior == "zbl":
        components["prior"] = _zbl(settings, table)
    elif settings.energy.prior != "none":
        components["prior"] = stored_prior(settings.energy.prior, table)
    residual = data.minus(SumPotential(components))
    # A few batches of configurations from all over the training set.
    n = len(residual)
    spread = torch.linspace(0, n - 1, min(n, _TYPICAL_BATCHES * settings.batch_size)).long()
    cuts = cut(residual.structures, spread, settings)[:_TYPICAL_BATCHES]
    batches = [residual.structures.select(systems) for systems in cuts]
    network.initialize_from(StartingData(_fitted_offsets(settings, residual), batches))
    if settings.model.initialize is not None:
        initialize_weights(network, settings.model.initialize)
    return SumPotential({**components, "network": network}), residual


def _zbl(settings: TrainSettings, table: SpeciesTable) -> ZBL:
    inner, cutoff = settings.energy.prior_inner, settings.energy.prior_cutoff
    if inner is None and cutoff is None:
        return ZBL.for_species(table)
    if inner is None or cutoff is None:
        raise ConfigError("the ZBL prior needs both prior_inner and prior_cutoff, or neither")
    return ZBL(table, inner, cutoff)


def stored_prior(path: str, table: SpeciesTable) -> Potential:
    """Read a prior from a checkpoint.

    Raises
    ------
    ConfigError
        If it is of other species, or has parameters.
    """
    prior, _ = load_potential(path)
    if prior.species_table.names != table.names:
        raise ConfigError(
            f"the prior {path} is of {', '.join(prior.species_table.names)}, and the data are of "
            f"{', '.join(table.names)}"
        )
    if prior.n_parameters:
        raise ConfigError(f"{path} holds a model with parameters, and a prior is fixed")
    return prior


def _energy_zero(settings: TrainSettings, data: TrainingSet, table: SpeciesTable) -> Tensor:
    zero = settings.energy.zero
    if isinstance(zero, dict):
        missing = [name for name in table.names if name not in zero]
        if missing:
            raise ConfigError(f"energy.zero gives no value for {', '.join(missing)}")
        return torch.tensor([zero[name] for name in table.names], dtype=torch.float64)
    if zero == "least_squares":
        return _fitted_offsets(settings, data)
    return torch.zeros(len(table), dtype=torch.float64)


def _fitted_offsets(settings: TrainSettings, data: TrainingSet) -> Tensor:
    """(n_species,) least-squares energies; zero where a run knows no energies."""
    sources = [t.source for t in settings.label_terms if t.property == "energy"]
    known = (source for source in sources if source in data.labels)
    labels = data.labels.get(next(known, settings.score.source))
    if labels is None or "energy" not in labels:
        return torch.zeros(len(data.structures.species_table), dtype=torch.float64)
    return fit_offsets(data.structures, labels["energy"])[0]


def initialize_weights(network: Potential, settings: WeightsSettings) -> list[str]:
    """Copy weights from a checkpoint's network in place, and return the names of what was set.

    Raises
    ------
    ConfigError
        If no parameter matches, or a shape does not fit.
    """
    potential, _ = load_potential(settings.checkpoint)
    if isinstance(potential, SumPotential) and "network" in potential.components:
        potential = potential["network"]
    if potential.species_table.names != network.species_table.names:
        raise ConfigError(
            f"{settings.checkpoint} knows the species {', '.join(potential.species_table.names)}, "
            f"and the student {', '.join(network.species_table.names)}: their weights do not "
            "correspond"
        )
    source = dict(potential.named_parameters())
    names = [
        name
        for name, _ in network.named_parameters()
        if name in source and any(fnmatch.fnmatchcase(name, p) for p in settings.names)
    ]
    if not names:
        raise ConfigError(
            f"{settings.checkpoint} has no parameter in common with the student that matches "
            f"{', '.join(settings.names)}: its parameters are {', '.join(source)}"
        )
    with torch.no_grad():
        for name in names:
            target = network.get_parameter(name)
            target.copy_(_fitted(source[name], tuple(target.shape), name, settings))
    return names


def _fitted(weight: Tensor, shape: tuple[int, ...], name: str, settings: WeightsSettings) -> Tensor:
    """A weight, or its part that belongs to the first channels."""
    own = tuple(weight.shape)
    if own == shape:
        return weight
    narrower = len(own) == len(shape) and all(n <= m for n, m in zip(shape, own, strict=True))
    if not (settings.first_channels and narrower):
        raise ConfigError(
            f"{name} has shape {shape} in the student and {own} in {settings.checkpoint}: leave it "
            "out of initialize.names"
            + ("" if not narrower else ", or set initialize.first_channels to cut layers down")
        )
    return weight[tuple(slice(n) for n in shape)]
