"""Beads in an ideal solvent: a liquid whose mean forces and noise are known to machine precision.

Beads repel one another and the particles of a solvent, which do not see one another, by periodic
sums of Gaussians (a smooth kin of the model of Asakura and Oosawa). The mapping keeps the beads and
leaves the solvent out. Given the beads R, the M solvent particles are independent, each distributed
as p(r) ~ exp(-u(r) / kT) with u(r) the sum of all beads' repulsions, so that

    free energy     A(R) = V(R) - M kT ln (1/L³) ∫ exp(-u(r) / kT) dr
    mean force      F_i  = -dV/dR_i + M <f_i>,  f_i(r) the force of one particle on bead i
    noise           Var(F_i) = M (<f_i²> - <f_i>²)

with averages over p. The free energy is a many-body function of the beads: solvent is depleted
between any that are near. Integrands are smooth and periodic, so that sums over a grid converge
exponentially, and Gaussians factorize over x, y and z, so that they are cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potstill.units import BOLTZMANN

#: Points of the grid per direction.
GRID = 48


@dataclass(frozen=True)
class ExactLiquid:
    """Two kinds of beads in a cubic box of an ideal solvent; Å, eV, K.

    Parameters
    ----------
    n_beads : tuple of int
        Beads of each kind; those of the first kind come first.
    n_solvent : int
        Solvent particles.
    box, temperature : float
        Edge of the box, temperature.
    bead_heights, bead_widths : tuple of tuple of float
        Gaussians between beads, by kinds.
    solvent_heights, solvent_widths : tuple of float
        Gaussians between beads of each kind and solvent.
    """

    n_beads: tuple[int, int] = (12, 12)
    n_solvent: int = 240
    box: float = 13.0
    temperature: float = 425.0
    bead_heights: tuple[tuple[float, float], ...] = ((0.4, 0.3), (0.3, 0.4))
    bead_widths: tuple[tuple[float, float], ...] = ((1.5, 1.2), (1.2, 1.2))
    solvent_heights: tuple[float, float] = (0.25, 0.15)
    solvent_widths: tuple[float, float] = (1.2, 0.9)

    @property
    def kinds(self) -> np.ndarray:
        """(n,) kind of every bead."""
        return np.repeat([0, 1], self.n_beads)

    @property
    def kt(self) -> float:
        """Thermal energy kT in eV."""
        return BOLTZMANN * self.temperature

    def direct(self, beads: np.ndarray) -> tuple[float, np.ndarray]:
        """Energy of the beads among themselves, and (n, 3) forces."""
        kinds = self.kinds
        pair = np.ix_(kinds, kinds)
        heights = np.array(self.bead_heights)[pair]
        np.fill_diagonal(heights, 0.0)
        widths = np.array(self.bead_widths)[pair]
        values, slopes = self._gaussians(beads[:, None] - beads[None], widths[..., None])
        energies, gradients = _products(values, slopes)
        return 0.5 * float((heights * energies).sum()), -(heights[..., None] * gradients).sum(1)

    def solvent_forces(self, beads: np.ndarray, solvent: np.ndarray) -> tuple[float, np.ndarray]:
        """Energy of beads with solvent, and (n, 3) forces of the solvent on the beads."""
        heights = np.array(self.solvent_heights)[self.kinds][:, None]
        widths = np.array(self.solvent_widths)[self.kinds][:, None, None]
        values, slopes = self._gaussians(beads[:, None] - solvent[None], widths)
        energies, gradients = _products(values, slopes)
        return float((heights * energies).sum()), -(heights[..., None] * gradients).sum(1)

    def mapped_forces(self, beads: np.ndarray, solvent: np.ndarray) -> np.ndarray:
        """(n, 3) forces on the beads in one configuration of everything: a label with its noise."""
        return self.direct(beads)[1] + self.solvent_forces(beads, solvent)[1]

    def draw_solvent(self, beads: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(M, 3) solvent drawn from its distribution at fixed beads, by rejection."""
        found: list[np.ndarray] = []
        heights = np.array(self.solvent_heights)[self.kinds][:, None]
        widths = np.array(self.solvent_widths)[self.kinds][:, None, None]
        while sum(map(len, found)) < self.n_solvent:
            trial = rng.uniform(0.0, self.box, (self.n_solvent, 3))
            values, _ = self._gaussians(beads[:, None] - trial[None], widths)
            energy = (heights * values.prod(-1)).sum(0)
            found.append(trial[rng.random(len(trial)) < np.exp(-energy / self.kt)])
        return np.concatenate(found)[: self.n_solvent]

    def exact(self, beads: np.ndarray, grid: int = GRID) -> tuple[float, np.ndarray, np.ndarray]:
        """Free energy A(R), (n, 3) mean forces, and (n, 3) standard deviations of the noise."""
        points = np.arange(grid) * self.box / grid
        widths = np.array(self.solvent_widths)[self.kinds][:, None, None]
        values, slopes = self._gaussians(beads[:, None] - points[None, :, None], widths)
        heights = np.array(self.solvent_heights)[self.kinds]
        x, y, z = np.moveaxis(values, -1, 0)  # (n, grid) each
        yz = (y[:, :, None] * z[:, None, :]).reshape(len(beads), -1)
        u = (heights[:, None] * x).T @ yz  # (grid, grid²)
        weight = np.exp(-u / self.kt)
        mean_weight = weight.mean()
        p = (weight / weight.sum()).reshape(grid, grid, grid)
        mean, square = np.empty((2, len(beads), 3))
        for axis in range(3):
            factors = [slopes[..., d] if d == axis else values[..., d] for d in range(3)]
            mean[:, axis] = -heights * _integral(p, factors)
            square[:, axis] = heights**2 * _integral(p, [f**2 for f in factors])
        energy, forces = self.direct(beads)
        energy -= self.n_solvent * self.kt * np.log(mean_weight)
        noise = np.sqrt(self.n_solvent * (square - mean**2))
        return energy, forces + self.n_solvent * mean, noise

    def sample(
        self, n_frames: int, seed: int, sweeps: int = 2, equilibration: int = 50
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw (frames, n, 3) positions of the beads and their mapped forces, as in a trajectory.

        Each sweep draws the solvent anew at fixed beads, and moves the beads at fixed solvent by
        hybrid Monte Carlo: together they sample beads and solvent exactly.
        """
        rng = np.random.default_rng(seed)
        n = sum(self.n_beads)
        side = int(np.ceil(n ** (1 / 3)))
        lattice = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)
        beads = self.box / side * rng.permutation(lattice)[:n].astype(float)
        positions, forces = np.empty((2, n_frames, n, 3))
        for frame in range(-equilibration, n_frames):
            for _ in range(sweeps):
                beads = self._moved(beads, self.draw_solvent(beads, rng), rng)
            if frame >= 0:
                positions[frame] = beads
                forces[frame] = self.mapped_forces(beads, self.draw_solvent(beads, rng))
        return positions, forces

    def _moved(
        self, beads: np.ndarray, solvent: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """One step of hybrid Monte Carlo of the beads: unit mass, 8 leaps."""

        def energy_and_forces(at: np.ndarray) -> tuple[float, np.ndarray]:
            own, other = self.direct(at), self.solvent_forces(at, solvent)
            return own[0] + other[0], own[1] + other[1]

        step, moved = 0.8 * rng.uniform(0.5, 1.0), beads.copy()
        momenta = rng.normal(scale=np.sqrt(self.kt), size=beads.shape)
        energy, force = energy_and_forces(moved)
        before = energy + 0.5 * (momenta**2).sum()
        for _ in range(8):
            momenta += 0.5 * step * force
            moved += step * momenta
            energy, force = energy_and_forces(moved)
            momenta += 0.5 * step * force
        after = energy + 0.5 * (momenta**2).sum()
        accepted = rng.random() < np.exp(min(0.0, (before - after) / self.kt))
        return moved % self.box if accepted else beads

    def _gaussians(self, d: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Periodic sums of one-dimensional Gaussians exp(-d²/2w²), and their derivatives."""
        d = d - self.box * np.round(d / self.box)
        value, slope = np.zeros((2, *d.shape))
        for image in (d, d - np.copysign(self.box, d)):  # the others are below 1e-16
            part = np.exp(image**2 * (-0.5 / widths**2))
            value += part
            slope -= image * part
        return value, slope / widths**2


def _products(values: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(...) products over x, y and z of (..., 3) values, and their (..., 3) gradients."""
    x, y, z = np.moveaxis(values, -1, 0)
    others = np.stack([y * z, x * z, x * y], -1)
    return x * y * z, slopes * others


def _integral(p: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
    """(n,) sums over a (grid, grid, grid) density of products of (n, grid) factors."""
    x, y, z = factors
    over_z = p @ z.T  # (grid, grid, n)
    return np.einsum("xyn,nx,ny->n", over_z, x, y, optimize=True)
