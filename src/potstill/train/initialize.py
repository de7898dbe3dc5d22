"""Starting a student's network from the weights of another one, layer by layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch

from potstill.checkpoint import load_potential
from potstill.errors import ConfigError
from potstill.models import Potential, SumPotential
from potstill.train.settings import WeightsSettings


def initialize_weights(network: Potential, settings: WeightsSettings) -> list[str]:
    """Copy weights from a checkpoint's network, or as much of them as fits.

    Parameters
    ----------
    network : Potential
        Its parameters are overwritten in place.
    settings : WeightsSettings
        Which checkpoint, which parameters, and whether wider layers may be cut down.

    Returns
    -------
    list of str
        Names of the parameters that were set.

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
    names = [n for n, _ in network.named_parameters() if _matches(n, settings.names)]
    names = [name for name in names if name in source]
    if not names:
        raise ConfigError(
            f"{settings.checkpoint} has no parameter that the student has, too, and that matches "
            f"{', '.join(settings.names)}: its parameters are {', '.join(source)}"
        )
    with torch.no_grad():
        for name in names:
            target = network.get_parameter(name)
            target.copy_(_fitted(source[name], tuple(target.shape), name, settings))
    return names


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _fitted(
    weight: torch.Tensor, shape: tuple[int, ...], name: str, settings: WeightsSettings
) -> torch.Tensor:
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
