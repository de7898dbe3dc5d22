"""Make a store and label it with a cheap teacher; run by tests that kill it.

Usage: label_worker.py STORE
"""

import sys

import ase.build
import numpy as np
import torch
from ase.calculators.lj import LennardJones

from potstill.label import label_store
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers.ase import ask_ase_calculator
from potstill.teachers.base import Teacher, TeacherInfo

N_FRAMES, APPENDED_AT_ONCE = 40, 5


class PartialLennardJones(Teacher):
    """Lennard-Jones argon that cannot do every seventh frame."""

    def __init__(self) -> None:
        self.info = TeacherInfo("lj", "fingerprint-of-lj", license="none", versions={"ase": "any"})
        self.properties = frozenset({"energy", "forces", "stress", "atomic_energies"})

    def compute(self, structures, properties):
        if int(structures.frame_id[0].split(":")[1]) % 7 == 3:
            raise RuntimeError("did not converge")
        calculator = LennardJones(sigma=3.4, epsilon=0.01, rc=8.0, smooth=True)
        return ask_ase_calculator(calculator, structures, properties)


def argon() -> tuple[Structures, Properties]:
    """Rattled crystals of 1 to 8 atoms, and an energy for each as reference."""
    frames = []
    for k in range(N_FRAMES):
        atoms = ase.build.bulk("Ar", "fcc", a=5.2, cubic=k % 2 == 0)
        atoms.positions += np.random.default_rng(k).normal(0.0, 0.1, atoms.positions.shape)
        atoms.info.update(frame_id=f"argon:{k}", config_type="warm" if k % 3 else "cold")
        frames.append(atoms)
    energy = torch.arange(N_FRAMES, dtype=torch.float64)
    return Structures.from_ase(frames), Properties({"energy": energy})


def fill(path: str) -> LabeledStore:
    """Append the structures in parts, going on where a killed run stopped."""
    try:
        store = LabeledStore.open(path, "a")
    except Exception:
        store = LabeledStore.create(path, info={"license": "none", "seed": 0})
    structures, reference = argon()
    for start in range(0, N_FRAMES, APPENDED_AT_ONCE):
        part = range(start, start + APPENDED_AT_ONCE)
        store.append(
            structures.select(part), reference.select(structures.rows(part)), skip_existing=True
        )
    return store


def run(path: str) -> LabeledStore:
    """Fill a store and label it."""
    store = fill(path)
    teacher, names = PartialLennardJones(), ("energy", "forces", "stress", "atomic_energies")
    label_store(store, teacher, names, chunk=3, commit_seconds=0.0)
    return store


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1])
