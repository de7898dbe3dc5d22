"""The bispectrum of a density on the sphere in four dimensions, and its derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _constant(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Remember what a function of hashable arguments returns.

    Tensors are made outside of inference mode, whatever the first caller's: they serve training.
    """
    cached = lru_cache(maxsize=None)(torch.inference_mode(False)(function))
    return cast(Callable[_P, _T], wraps(function)(cached))


@lru_cache
def component_labels(twojmax: int) -> tuple[tuple[int, int, int], ...]:
    """Doubled labels (j1, j2, j) of the bispectrum components, in LAMMPS' order."""
    return tuple(
        (j1, j2, j)
        for j1 in range(twojmax + 1)
        for j2 in range(j1 + 1)
        for j in range(j1 - j2, min(twojmax, j1 + j2) + 1, 2)
        if j >= j1
    )


def half_layers(a: Tensor, b: Tensor, weight: Tensor, twojmax: int) -> Iterator[Tensor]:
    """Yield Wigner's U of every pair times its weight, layer by layer: rows up to the middle.

    The recursion of Varshalovich et al. (section 4.8.2) runs over the layers of all pairs at once;
    being linear, it carries the weight along from the first layer. The other rows follow from
    u[j - m', j - m] = (-1)^(m' + m) conj(u[m', m]).

    Parameters
    ----------
    a, b : Tensor
        (K, n) complex, conjugate Cayley-Klein parameters; or (D, K, n), of which all but the first
        are derivatives of it, which are carried along.
    weight : Tensor
        (K, n) or (D, K, n) real, zero for unused slots.
    twojmax : int
        Largest j.

    Yields
    ------
    Tensor
        (j // 2 + 1, j + 1, K, n), or with D before
    """
    a, b, layer = (x.unsqueeze(-3).unsqueeze(-3) for x in (a, b, weight.to(a.dtype)))
    yield layer  # (rows, columns, K, n), or with D before
    for j in range(1, twojmax + 1):
        if j % 2 == 0:  # the middle row follows from one beyond the middle of the layer before
            signs = _signs(j - 1, a.real.dtype, a.device)[j // 2]
            mirror = layer.select(-4, -1).flip(-3).conj() * signs[:, None, None]
            layer = torch.cat([layer, mirror.unsqueeze(-4)], dim=-4)
        left, right = _recursion_factors(j, a.real.dtype, a.device)
        left = torch.nn.functional.pad(_product(a, layer * left), (0, 0, 0, 0, 0, 1))
        right = torch.nn.functional.pad(_product(b, layer * right), (0, 0, 0, 0, 1, 0))
        layer = left - right
        yield layer


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Product; with D before, that of the first, and by the product rule its derivatives."""
    if y.ndim == 4:
        return x * y
    product = x[:1] * y
    product[1:] += x[1:] * y[:1]
    return product


def whole_layer(half: Tensor, j: int) -> Tensor:
    """(n, j + 1, j + 1) from rows (j // 2 + 1, j + 1, n); the atom itself adds the unit matrix."""
    half = half.permute(2, 0, 1)
    signs = _signs(j, half.real.dtype, half.device)
    rest = half[:, : (j + 1) // 2].flip(1, 2).conj() * signs[j // 2 + 1 :]
    unit = torch.eye(j + 1, dtype=half.real.dtype, device=half.device)
    return torch.cat([half, rest], dim=1) + unit


def components_of(density: list[Tensor], twojmax: int) -> Tensor:
    """(n, n_components) from the density's layers, (n, j + 1, j + 1) each."""
    labels = component_labels(twojmax)
    return torch.stack([_component(density, *label) for label in labels], dim=1)


def _component(density: list[Tensor], j1: int, j2: int, j: int) -> Tensor:
    """(n,) the density's layers j1 and j2 coupled to j, times layer j."""
    first, second, third = density[j1], density[j2], density[j][:, : j // 2 + 1]
    n = len(first)
    columns, rows = _couplings(j1, j2, j, first.real.dtype, first.device)
    # Columns first: sum over m2 as a matrix product, over m1 as one per atom, then the rows.
    inner = (second @ columns).view(n, j2 + 1, j1 + 1, j + 1)
    inner = inner.transpose(1, 2).reshape(n, j1 + 1, (j2 + 1) * (j + 1))
    inner = (first @ inner).view(n, (j1 + 1) * (j2 + 1), j + 1)
    coupled = rows @ inner  # (n, j // 2 + 1, j + 1); the mirrored rows give the same again
    return (coupled * third.conj()).real.sum(dim=(1, 2))


def components_and_slopes(half: list[Tensor], twojmax: int) -> tuple[Tensor, Tensor]:
    """Components from the layers' rows (j // 2 + 1, j + 1, n), and their derivatives by these.

    Returns
    -------
    components : Tensor
        (n, n_components).
    slopes : Tensor
        (n, n_components, 2 U) by the real and the imaginary parts of the U elements of the rows.
    """
    components, slopes = [], []
    with torch.enable_grad():
        half = [rows.detach().requires_grad_(True) for rows in half]
        density = [whole_layer(rows, j) for j, rows in enumerate(half)]
        for label in component_labels(twojmax):
            # One at a time: a backward pass through all of them together would compute 55 times
            # as much, most of it zeros.
            component = _component(density, *label)
            found = torch.autograd.grad(
                component.sum(), half, retain_graph=True, materialize_grads=True
            )
            components.append(component.detach())
            slopes.append(torch.cat([x.flatten(0, 1) for x in found]))  # (U, n)
    by_part = torch.view_as_real(torch.stack(slopes)).permute(2, 0, 1, 3)
    return torch.stack(components, dim=1), by_part.flatten(2)


@_constant
def _signs(j: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(j + 1, j + 1) of (-1)^(m' + m)."""
    sign = (-1.0) ** torch.arange(j + 1, dtype=dtype, device=device)
    return sign[:, None] * sign


@_constant
def _recursion_factors(j: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """sqrt((j - m) / (j - m')) and sqrt((m + 1) / (j - m')), (j // 2 + 1, j, 1, 1) each."""
    row = torch.arange(j // 2 + 1, dtype=torch.float64)[:, None]
    column = torch.arange(j, dtype=torch.float64)
    factors = ((j - column) / (j - row)).sqrt(), ((column + 1.0) / (j - row)).sqrt()
    left, right = (x[:, :, None, None].to(device=device, dtype=dtype) for x in factors)
    return left, right


@_constant
def _couplings(
    j1: int, j2: int, j: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Clebsch-Gordan coefficients as complex matrices for columns and for rows.

    The first is (j2 + 1, (j1 + 1) (j + 1)); the second (j // 2 + 1, (j1 + 1) (j2 + 1)), with rows
    before the middle doubled to stand for those after it.
    """
    table = clebsch_gordan(j1, j2, j)  # (m1, m2, m)
    twice = torch.full((j // 2 + 1,), 2.0, dtype=torch.float64)
    if j % 2 == 0:
        twice[-1] = 1.0
    columns = table.permute(1, 0, 2).reshape(j2 + 1, -1)
    rows = table.reshape(-1, j + 1).T[: j // 2 + 1] * twice[:, None]
    kind = dtype.to_complex()
    return columns.to(device=device, dtype=kind), rows.to(device=device, dtype=kind)


@_constant
def clebsch_gordan(j1: int, j2: int, j: int) -> Tensor:
    """(j1 + 1, j2 + 1, j + 1) float64 coefficients <j1 m1 j2 m2 | j m>, labels j doubled.

    Racah's formula in exact integers; index k along an axis stands for m = k - j / 2.
    """
    f = math.factorial
    table = torch.zeros(j1 + 1, j2 + 1, j + 1, dtype=torch.float64)
    a, b, c = (j1 + j2 - j) // 2, (j1 - j2 + j) // 2, (j2 - j1 + j) // 2
    triangle = Fraction((j + 1) * f(a) * f(b) * f(c), f(a + b + c + 1))
    for p in range(j1 + 1):
        for q in range(max(0, a - p), min(j2, a + j - p) + 1):
            m = p + q - a
            total = Fraction(0)
            for z in range(max(0, a - p, q - c), min(a, j1 - p, q) + 1):
                below = f(z) * f(a - z) * f(j1 - p - z) * f(q - z) * f(p - a + z) * f(c - q + z)
                total += Fraction((-1) ** z, below)
            square = triangle * f(p) * f(j1 - p) * f(q) * f(j2 - q) * f(m) * f(j - m)
            table[p, q, m] = float(total) * math.sqrt(square)
    return table
