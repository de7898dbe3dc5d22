"""Frames from relaxations: what a teacher passes on its way to a minimum.

Synthetic data of Ekström Kelvinius et al. (appendix D.2): relaxations of at most 200 steps with a
trained teacher, of whose frames about a tenth are drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.optimize import BFGS

from potstill.errors import ConfigError, DivergenceError
from potstill.sample.base import Call, Job, SampledFrames, as_frame, gaussian_step
from potstill.structures import Structures

#: A force in eV/Å that no relaxation recovers from.
_EXPLODED = 1e4


@dataclass(frozen=True, kw_only=True)
class RelaxJob(Job):
    """Frames of one relaxation at constant cell, drawn at random from its steps.

    A relaxation that converges in fewer steps than there are frames to be drawn gives fewer.

    Parameters
    ----------
    displacement : float
        Å, the width of a Gaussian displacement of the free atoms beforehand; each job of a plan
        draws its own.
    max_steps : int
        Steps at most.
    fmax : float
        eV/Å; ends where no free atom feels more.
    """

    kind: ClassVar[str] = "relax"

    displacement: float = 0.1
    max_steps: int = 200
    fmax: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.displacement < 0.0 or self.max_steps < 1 or not self.fmax > 0.0:
            raise ConfigError(
                f"'{self.name}': a relaxation needs a displacement of 0 or more, at least one step "
                "and a positive fmax"
            )
        if self.n_frames > self.max_steps + 1:
            raise ConfigError(
                f"'{self.name}': {self.n_frames} frames cannot be drawn from {self.max_steps} steps"
            )

    def default_name(self) -> str:
        """Say where it starts."""
        return f"relax from {self.displacement:g} Å"

    @property
    def n_evaluations(self) -> int:
        """Calls of the calculator, at most."""
        return self.max_steps + 1

    def make(
        self, start: Structures, calculator: BaseCalculator | None, call: Call
    ) -> SampledFrames:
        """Relax, and draw the frames.

        Raises
        ------
        DivergenceError
            If forces leave the finite numbers or exceed 10,000 eV/Å.
        """
        generator = call.generator()
        atoms = start.to_ase()[0]
        step = gaussian_step(start, self.displacement, generator).numpy()
        atoms.set_positions(atoms.positions + step, apply_constraint=False)
        atoms.calc = calculator
        path: list[np.ndarray] = []
        energies: list[float] = []

        def note() -> None:
            forces = atoms.get_forces()
            if not np.isfinite(forces).all() or np.abs(forces).max() > _EXPLODED:
                raise DivergenceError(
                    f"'{self.name}' diverged after {len(path)} steps: choose a smaller "
                    "displacement, or check the calculator"
                )
            path.append(atoms.get_positions())
            energies.append(float(atoms.get_potential_energy()))
            call.tell(len(path), self.n_evaluations)

        optimizer = BFGS(atoms, logfile=None)
        optimizer.attach(note)
        optimizer.run(fmax=self.fmax, steps=self.max_steps)
        n = min(self.n_frames, len(path))
        drawn = np.sort(generator.choice(len(path), n, replace=False)).tolist()
        frames = []
        for step in drawn:
            moved = replace(start, positions=torch.from_numpy(path[step]))
            frames.append(as_frame(moved, self.name, f"{self.name}: step {step}"))
        found = SampledFrames.independent(Structures.concatenate(frames))
        energy = torch.tensor([energies[step] for step in drawn], dtype=torch.float64)
        return replace(found, energy=energy)
