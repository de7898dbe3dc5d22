"""ASE calculators that misbehave on frames of three atoms, each in its own way."""

import os
import signal
import sys
import warnings

from ase.calculators.calculator import all_changes
from ase.calculators.lj import LennardJones


class Misbehaving(LennardJones):
    """Lennard-Jones that kills its process, exits or raises on three atoms.

    A frame that raises leaves damage behind, which only a new calculator is without. It changes
    the working directory, and warns, on every frame.
    """

    def __init__(self, how="raise_"):
        super().__init__(sigma=2.3, epsilon=0.2, rc=5.0)
        self.how, self.damage = how, 0.0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        os.chdir("/")
        warnings.warn("out of range", stacklevel=1)
        if len(atoms) == 3:
            getattr(self, self.how)()
        super().calculate(atoms, properties, system_changes)
        self.results["energy"] += self.damage

    def segfault(self):
        os.kill(os.getpid(), signal.SIGSEGV)

    def fortran(self):
        sys.stderr.write("Fortran runtime error: Index out of bounds\n")
        sys.stderr.flush()
        os._exit(3)

    def exit(self):
        sys.exit("no license")

    def raise_(self):
        self.damage = 1.0
        raise RuntimeError("not\nconverged")


class InGPa(LennardJones):
    """Lennard-Jones with its stress in GPa."""

    def __init__(self):
        super().__init__(sigma=2.3, epsilon=0.2, rc=5.0)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results["stress"] = 160.21766 * self.results["stress"]


def deadly():
    """Die before there is a calculator."""
    os._exit(7)
