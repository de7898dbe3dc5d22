"""Radial basis functions, envelopes of message-passing networks, and a switch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_basis(r: Tensor, n_functions: int, cutoff: float) -> Tensor:
    """(..., n_functions) Gaussians, evenly spaced from zero to the cutoff.

    exp(-(r - mu_n)² / (2 sigma²)) with sigma the spacing of the centers mu_n.

    Parameters
    ----------
    r : Tensor
        (...) distances, Å.
    n_functions : int
        At least two.
    cutoff : float
        Å.
    """
    centers = torch.linspace(0.0, cutoff, n_functions, dtype=r.dtype, device=r.device)
    width = cutoff / (n_functions - 1)
    return torch.exp(-0.5 * ((r.unsqueeze(-1) - centers) / width).square())


def bessel_basis(r: Tensor, n_functions: int, cutoff: float) -> Tensor:
    """(..., n_functions) sin(n pi r / cutoff) / r, n from 1, in 1/Å; arguments as above."""
    n = torch.arange(1, n_functions + 1, dtype=r.dtype, device=r.device)
    r = r.unsqueeze(-1)
    return torch.sin(r * n * (math.pi / cutoff)) / r


def cosine_envelope(r: Tensor, cutoff: float) -> Tensor:
    """(1 + cos(pi r / cutoff)) / 2, zero beyond; continuous with its first derivative."""
    return 0.5 * (1.0 + torch.cos(r * (math.pi / cutoff))) * (r < cutoff)


def polynomial_envelope(r: Tensor, cutoff: float, exponent: int = 5) -> Tensor:
    """1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2) of x = r / cutoff, zero beyond.

    Continuous with two derivatives; p is the exponent (Gasteiger et al., arXiv:2003.03123, Eq. 8).
    """
    p, x = exponent, (r / cutoff).clamp(max=1.0)
    inner = 0.5 * (p + 1) * (p + 2) - p * (p + 2) * x + 0.5 * p * (p + 1) * x.square()
    return (1.0 - x**p * inner) * (r < cutoff)


def quintic_switch(r: Tensor, inner: float | Tensor, outer: float | Tensor) -> Tensor:
    """1 up to `inner`, 0 from `outer` on, Å; continuous with two derivatives."""
    t = ((r - inner) / (outer - inner)).clamp(0.0, 1.0)
    return 1.0 - t**3 * (10.0 - 15.0 * t + 6.0 * t**2)
