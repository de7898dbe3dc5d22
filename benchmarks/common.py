"""What the benchmarks share: systems, steps and timing. Needs torch and ASE, potstill only if used.

Competitors run in environments of their own, which need not have potstill.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import ase
import numpy as np
import torch
from ase.build import bulk

if TYPE_CHECKING:
    from potstill.models import Potential
    from potstill.train import TrainingSet

LATTICE_CONSTANT = 4.05  # Å, aluminium

#: Hyper-parameters of the aluminium student of the teacher-student study.
STUDENT: dict[str, Any] = {
    "n_features": 24,
    "n_sensitivities": 10,
    "dist_soft_min": 1.8,
    "dist_soft_max": 7.0,
    "dist_hard_max": 7.5,
    "n_atom_layers": 2,
    "l_max": 1,
}

#: Hyper-parameters of ANI with the functions and layers of ANI-Al.
ANI_AL: dict[str, Any] = {
    "radial_cutoff": 7.0,
    "angular_cutoff": 5.0,
    "eta_r": 43.9,
    "shifts_r": [1.2 + 0.18125 * k for k in range(32)],
    "eta_a": 6.5,
    "zeta": 69.4,
    "shifts_a": [1.2, 1.675, 2.15, 2.625, 3.1, 3.575, 4.05, 4.525],
    "shifts_z": [0.19634954 + 0.39269908 * k for k in range(8)],
    "hidden_widths": [96, 96, 64],
}

Step = Callable[[], object]


def crystals(n: int, repeat: int) -> list[ase.Atoms]:
    """Rattled aluminium of 4 repeat^3 atoms each."""
    frames = []
    for seed in range(n):
        atoms = bulk("Al", cubic=True, a=LATTICE_CONSTANT).repeat(repeat)
        atoms.rattle(0.1, seed=seed)
        frames.append(atoms)
    return frames


def labels(n_systems: int, n_atoms: int) -> dict[str, torch.Tensor]:
    """Energies and forces in float64: noise, which costs the same."""
    generator = torch.Generator().manual_seed(0)
    return {
        "energy": torch.randn(n_systems, dtype=torch.float64, generator=generator),
        "forces": torch.randn(n_atoms, 3, dtype=torch.float64, generator=generator),
    }


def md_step(atoms: ase.Atoms) -> Step:
    """Forces through the calculator of `atoms`, which move as far as in 1 fs at 600 K."""
    velocity = 0.0043 * np.random.default_rng(0).normal(size=(len(atoms), 3))
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        # To and fro, as in a solid: a list with a skin is built anew now and then.
        atoms.positions += velocity * np.cos(2.0 * np.pi * count / 150.0)
        atoms.get_forces()

    return step


def potstill_training_set(n_systems: int, repeat: int = 3) -> TrainingSet:
    """Structures of 4 repeat^3 atoms with labels."""
    from potstill.species import SpeciesTable
    from potstill.structures import Properties, Structures
    from potstill.train import TrainingSet

    table = SpeciesTable.from_symbols(["Al"])
    structures = Structures.from_ase(crystals(n_systems, repeat), table=table)
    values = labels(structures.n_systems, structures.n_atoms)
    return TrainingSet(structures, {"reference": Properties(values)})


def potstill_training(network: Potential, data: TrainingSet) -> Step:
    """A step as the training loop takes it: drawing the batch and Adam included."""
    import lightning_fabric

    from potstill.distill import LossTerm
    from potstill.train import TrainSettings
    from potstill.train.force_gradient import ForceGradient, NetworkPasses
    from potstill.train.objective import BatchLoss
    from potstill.train.settings import RegularizationSettings
    from potstill.train.signals import bind_terms

    loss = (LossTerm(property="energy"), LossTerm(property="forces", weight=10.0))
    plain = RegularizationSettings(l2=0.0, hierarchicality=0.0)
    settings = TrainSettings(loss=loss, regularization=plain)
    terms = bind_terms(settings, network)
    gradient = ForceGradient(settings.force_gradient, network)
    reach = network.cutoff + gradient.margin
    data = data.with_neighbors(reach, packed=gradient.takes_compact_lists)
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    passes = fabric.setup_module(NetworkPasses(network))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        batch = data.batch(torch.randperm(len(data)))
        objective = BatchLoss(terms, 1, batch, fabric)
        found = gradient(passes, batch, objective.wanted, objective)
        optimizer.zero_grad()
        found.backward(fabric, passes)
        optimizer.step()

    return step


def potstill_md(network: Potential, repeat: int) -> Step:
    """A step of molecular dynamics through ASE."""
    from potstill.calculators import PotstillCalculator

    (atoms,) = crystals(1, repeat)
    atoms.calc = PotstillCalculator(network)
    return md_step(atoms)


class Times(NamedTuple):
    """Seconds per call: on the clock, and of all threads' processors."""

    clock: float
    processor: float


def timed(step: Step, seconds: float) -> Times:
    """Times over about `seconds`."""
    count, began, used = 0, time.perf_counter(), time.process_time()
    while count == 0 or time.perf_counter() - began < seconds:
        step()
        count += 1
    clock, processor = time.perf_counter() - began, time.process_time() - used
    return Times(clock / count, processor / count)


def us_per_atom(rounds: list[Times], n_atoms: int) -> dict[str, float]:
    """What is kept of several rounds; the least processor time feels other jobs least."""
    clock = [1e6 * times.clock / n_atoms for times in rounds]
    return {
        "median": statistics.median(clock),
        "fastest": min(clock),
        "slowest": max(clock),
        "processor": 1e6 * min(times.processor for times in rounds) / n_atoms,
    }


def in_words(row: dict[str, float]) -> str:
    """A row of `us_per_atom`."""
    spread = f"({row['fastest']:.2f} to {row['slowest']:.2f})"
    return f"{row['median']:9.2f} µs per atom {spread}, of processors {row['processor']:.2f}"


def environment() -> dict[str, str]:
    """The variables that timings depend on; `potstill` sets them by itself."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_WAIT_POLICY")
    return {name: os.environ.get(name, "not set") for name in names}
