"""Dense layers, residual layers and scale factors of GemNet-OC."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

INV_SQRT_2 = 1.0 / math.sqrt(2.0)


class Dense(nn.Linear):
    """x W without bias, then silu(.) / 0.6 unless `activate` is off.

    The activation's factor keeps the variance of normally distributed values.
    """

    def __init__(self, n_in: int, n_out: int, *, activate: bool = True) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.activate = activate
        he_orthogonal_(self.weight, fan_in=n_in)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_out) from (..., n_in)."""
        x = super().forward(x)
        return nn.functional.silu(x) / 0.6 if self.activate else x


class Residual(nn.Module):
    """(x + two dense layers of x) / sqrt(2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(Dense(width, width), Dense(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) from (..., width)."""
        return (x + self.layers(x)) * INV_SQRT_2


def residuals(n: int, width: int) -> nn.Sequential:
    """Stack n residual layers."""
    return nn.Sequential(*(Residual(width) for _ in range(n)))


@torch.no_grad()
def he_orthogonal_(weight: Tensor, fan_in: int) -> None:
    """Random orthogonal matrix, its rows standardized and scaled to the variance 1 / fan_in.

    Decorrelated outputs with the variance of the inputs (Gasteiger et al., GemNet, 2021).
    """
    nn.init.orthogonal_(weight)
    variance, mean = torch.var_mean(weight, dim=1, keepdim=True)
    weight.sub_(mean).div_(torch.sqrt((variance + 1e-6) * fan_in))


class ScaleFactor(nn.Module):
    """A constant that gives an intermediate result the variance of what it was made from.

    It is 1 until `fit_scale_factors` sets it, and not trained.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        #: Called with the module, the values before scaling and the reference while fitting.
        self.observer: Callable[[ScaleFactor, Tensor, Tensor], None] | None = None

    def forward(self, x: Tensor, reference: Tensor, rows: Tensor | None = None) -> Tensor:
        """Give (R, F) values the variance of (R', F') others.

        `rows` of `reference` count, some perhaps several times; by default all of them.
        """
        if self.observer is not None:
            self.observer(self, x, reference if rows is None else reference[rows])
        return x * self.scale
