"""Which epsilon suits the central differences of a network: a scan over data and precision.

Two errors are measured, as in Fig. 1 of Smith et al., arXiv:2006.05475: that of the loss' gradient
(Eq. 11), where the exact one is at hand, and its proxy, which needs energies only. The proxy of the
paper's quadratic loss is that of Eqs. 13 and 14; that of any other loss is |s~ - s| / |s| with
s = Σ g·F + G:σ. Norms run over all parameters and all structures (in batches, if the loss is not
quadratic).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.distill.terms import Batch
from potstill.models import Potential
from potstill.train.data import TrainingSet
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import (
    LENGTH,
    Displacement,
    NetworkPasses,
    Point,
    difference_passes,
    difference_slope,
    epsilon_for,
    loss_cotangents,
)
from potstill.train.objective import BatchLoss, LossValue, Objective
from potstill.train.settings import TrainSettings
from potstill.train.signals import bind_terms

#: Scanned by default: half decades from where rounding rules to where curvature does.
EPSILONS = {
    torch.float64: tuple(10.0 ** (k / 2) for k in range(-18, -1)),
    torch.float32: tuple(10.0 ** (k / 2) for k in range(-12, -1)),
}


@dataclass(frozen=True)
class EpsilonScan:
    """Errors of central differences by epsilon.

    Parameters
    ----------
    loss : {"quadratic", "training"}
        Half the squared force error of each structure (Eq. 2), or the loss of the settings.
    folded : bool
        Whether energies were folded into the displaced passes.
    proxy : tuple of float
        Relative error of the proxy at each epsilon, which rise.
    gradient : tuple of float, optional
        Relative error of the gradient at each, against backpropagation in float64.
    backpropagation : float, optional
        The same error of backpropagation in this precision: no epsilon can do better.
    """

    precision: str
    loss: str
    folded: bool
    n_structures: int
    epsilons: tuple[float, ...]
    proxy: tuple[float, ...]
    gradient: tuple[float, ...] | None
    backpropagation: float | None

    @property
    def recommended(self) -> float:
        """The epsilon with the smallest proxy (Sec. III C of the paper).

        Neighbors on the grid are averaged first: single values can be small by chance.
        """
        return self.epsilons[_smoothed_minimum(self.proxy)]

    @property
    def best(self) -> float | None:
        """The epsilon with the smallest error of the gradient, where that is known."""
        return None if self.gradient is None else self.epsilons[_smoothed_minimum(self.gradient)]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        own = {"length": LENGTH, "recommended": self.recommended, "best": self.best}
        return json.loads(json.dumps(asdict(self) | own))


def scan_epsilon(
    network: Potential,
    data: TrainingSet,
    settings: TrainSettings,
    *,
    loss: Literal["quadratic", "training"] = "quadratic",
    epsilons: Sequence[float] | None = None,
    exact: bool = True,
    scale: float | None = None,
    on_point: Callable[[int], None] | None = None,
) -> EpsilonScan:
    """Measure the errors of central differences for a network and data.

    Parameters
    ----------
    network : Potential
        Conservative, in float32 or float64.
    data : TrainingSet
        With the labels of the loss, less offsets and prior; `quadratic` takes the forces of
        `reference`.
    settings : TrainSettings
        Loss (at its first epoch), regularization, batch size and `force_gradient.folded`.
    exact : bool
        Compare gradients with backpropagation in float64 as well.
    scale : float, optional
        A fixed g0 in the unit of g for all structures, which breaks the invariance (Fig. 2). Atoms
        may then move further than epsilon, and out of the list's margin where that is large.
    on_point : callable, optional
        Progress: how many structures are done.

    Raises
    ------
    ConfigError
        If the network's precision has no digits for differences.
    """
    epsilon_for(None, network)
    epsilons = tuple(sorted(epsilons or EPSILONS[network.dtype]))
    fabric = default_fabric()
    network = network.to(fabric.device)
    # L2 does not depend on epsilon and would only dilute the relative error.
    without_l2 = settings.regularization.model_copy(update={"l2": 0.0})
    changes = {"regularization": without_l2, "loss": settings.label_terms}
    terms = bind_terms(settings.model_copy(update=changes), network)
    data = data.with_neighbors(network.cutoff + 2.0 * LENGTH * epsilons[-1])
    errors = _Errors(network, epsilons, settings.force_gradient.folded, exact, scale)
    done = 0
    for systems in torch.arange(len(data)).split(1 if loss == "quadratic" else settings.batch_size):
        batch = data.batch(systems).to(fabric.device)
        if loss == "quadratic":
            errors.add(batch, ("forces",), _quadratic_loss(batch), quadratic=True)
        else:
            objective = BatchLoss(terms, 1, batch, fabric)
            errors.add(batch, objective.wanted, objective, quadratic=False)
        done += len(systems)
        if on_point is not None:
            on_point(done)
    return EpsilonScan(
        precision=str(network.dtype).removeprefix("torch."),
        loss=loss,
        folded=settings.force_gradient.folded,
        n_structures=len(data),
        epsilons=epsilons,
        proxy=_ratios(errors.slopes, errors.slope_size),
        gradient=_ratios(errors.gradients, errors.gradient_size) if exact else None,
        backpropagation=_ratios([errors.floor], errors.gradient_size)[0] if exact else None,
    )


def _quadratic_loss(batch: Batch) -> Objective:
    """L = Σ |F - f|² / 2 (Eq. 2)."""
    reference = batch.labels["reference"]["forces"]

    def objective(values: Mapping[str, Tensor]) -> LossValue:
        loss = 0.5 * (values["forces"] - reference).square().sum()
        return LossValue(loss, loss.new_zeros(()), {"loss": loss.detach()})

    return objective


class _Errors:
    """Sums of squares over all points, by epsilon."""

    def __init__(
        self,
        network: Potential,
        epsilons: Sequence[float],
        folded: bool,
        exact: bool,
        scale: float | None,
    ) -> None:
        self.network, self.epsilons, self.folded, self.scale = network, epsilons, folded, scale
        self.twin = copy.deepcopy(network).to(torch.float64) if exact else None
        self.slopes, self.gradients = [0.0] * len(epsilons), [0.0] * len(epsilons)
        self.slope_size = self.gradient_size = self.floor = 0.0

    def add(
        self, batch: Batch, wanted: tuple[str, ...], objective: Objective, *, quadratic: bool
    ) -> None:
        """Look at one batch with all epsilons."""
        network = self.network
        point = Point.of(network, batch.structures, batch.neighbors)
        value, cotangents = loss_cotangents(network, point, wanted, objective)
        # L~ - L = (s~ - s) / 2 by Eq. 13: the quadratic loss is measured against 2 L.
        size = 2.0 * value.data.detach() if quadratic else cotangents.slope
        self.slope_size += _square(size)
        exact = None
        if self.twin is not None:
            exact = _backpropagated(self.twin, batch, wanted, objective)
            self.gradient_size += _square(exact)
            self.floor += _square(_backpropagated(network, batch, wanted, objective) - exact)
        g0 = None
        if self.scale is not None:
            g0 = torch.full_like(cotangents.slope, self.scale)
        module = NetworkPasses(network)
        for k, epsilon in enumerate(self.epsilons):
            move = Displacement.along(cotangents, point, epsilon, g0)
            slope = difference_slope(network, point, move)
            self.slopes[k] += _square(slope - cotangents.slope)
            if exact is not None:
                passes = difference_passes(module, point, cotangents, move, folded=self.folded)
                self.gradients[k] += _square(_gradient(network, passes) - exact)


def _backpropagated(
    network: Potential, batch: Batch, wanted: tuple[str, ...], objective: Objective
) -> Tensor:
    module = NetworkPasses(network)
    values = module("predict", batch.structures, batch.neighbors, wanted)
    return _gradient(network, [lambda: objective(values).data])


def _gradient(network: Potential, passes: Iterable[Callable[[], Tensor]]) -> Tensor:
    """(n_parameters,) float64; passes are added in the network's precision, as training does."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for run in passes:
        found = torch.autograd.grad(run(), parameters, materialize_grads=True)
        total = [a + b for a, b in zip(total, found, strict=True)]
    return torch.cat([g.flatten().to(torch.float64) for g in total])


def _square(value: Tensor) -> float:
    return float(value.square().sum())


def _ratios(errors: Sequence[float], size: float) -> tuple[float, ...]:
    return tuple(math.sqrt(error / size) if size > 0 else 0.0 for error in errors)


def _smoothed_minimum(errors: Sequence[float]) -> int:
    """Index of the smallest error, each averaged with its neighbors on a logarithmic scale."""
    logs = [math.log(max(error, 1e-300)) for error in errors]
    near = [logs[max(k - 1, 0) : k + 2] for k in range(len(logs))]
    means = [sum(part) / len(part) for part in near]
    return means.index(min(means))
