"""Whether an exported potential is, elsewhere, what its checkpoint is in ASE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import ase
import numpy as np
import torch
from ase.build import bulk
from ase.calculators.calculator import Calculator
from numpy.typing import NDArray

from potstill.ase_bridge import make_atoms, species_names
from potstill.calculators import PotstillCalculator
from potstill.errors import ModelError
from potstill.models import PairRepulsion, Potential, SpeciesOffsets, summands
from potstill.units import AMU_PER_A3_IN_G_PER_CM3

#: Relative differences that are let pass, by precision.
TOLERANCES = {"float64": 1e-10, "float32": 2e-6}

# What relative differences are relative to, at least: eV, eV/Å, eV/Å³.
_FLOORS = {"energies": 1.0, "forces": 1.0, "stress": 0.01}


@dataclass(frozen=True)
class Parity:
    """What a self-test found.

    Parameters
    ----------
    program : str
        What the exported file runs in.
    steps : int
        Length of the dynamics, fs; zero if there are none.
    rows : list of list of str
        Structure, ranks, precision, and the relative differences of energies, forces and stress.
    drift : list of list of str
        Program, ranks, change of the total energy, and time per atom and step.
    """

    program: str
    steps: int = 0
    rows: list[list[str]] = field(default_factory=list)
    drift: list[list[str]] = field(default_factory=list)

    def judge(
        self,
        name: str,
        precision: str,
        errors: Mapping[str, float],
        noise: Mapping[str, float],
        *,
        ranks: int = 1,
    ) -> None:
        """Note the differences of a structure.

        Two float32 results differ by the order of their sums: `TOLERANCES`, or ten times the
        difference between float32 and float64, the `noise`, are let pass (of 85 trained students on
        three structures the largest was 3.8 times).

        Raises
        ------
        ModelError
            If one is larger.
        """
        shown = [f"{errors[kind]:.1e}" if kind in errors else "" for kind in _FLOORS]
        self.rows.append([name, str(ranks), precision, *shown])
        for kind, error in errors.items():
            allowed = TOLERANCES[precision]
            if precision == "float32":
                allowed = max(allowed, 10.0 * noise[kind])
            if not error <= allowed:
                raise ModelError(
                    f"the exported potential is not the checkpoint: of '{name}' on {ranks} ranks "
                    f"in {precision}, {kind} in {self.program} and ASE differ by {error:.1e} of "
                    f"their size, more than {allowed:.1e}"
                )


def by_ase(
    potential: Potential, atoms: ase.Atoms, calculator: Calculator | None = None
) -> dict[str, NDArray[np.float64]]:
    """What a potential gives, or another calculator in its place.

    Returns
    -------
    dict of str to ndarray
        `energies` (N,), `forces` (N, 3), `stress` (3, 3) of periodic systems; and `zero` (N,), the
        part of the energies that tells nothing of precision. eV and Å.
    """
    atoms = atoms.copy()
    names = potential.species_table.names
    atoms.calc = calculator or PotstillCalculator(potential)
    values = {
        "energies": atoms.get_potential_energies(),
        "forces": atoms.get_forces(apply_constraint=False),
        "zero": zero_energies(potential)[[names.index(name) for name in species_names(atoms)]],
    }
    if atoms.pbc.all():
        values["stress"] = atoms.get_stress(voigt=False, apply_constraint=False)
    return values


def is_single(potential: Potential) -> bool:
    """Whether a part of it computes in float32."""
    return any(p.dtype == torch.float32 for p in potential.parameters())


def zero_energies(potential: Potential) -> NDArray[np.float64]:
    """(n_species,) eV: constant energies of atoms."""
    zero = np.zeros(len(potential.species_table.names))
    for part in summands(potential):
        if isinstance(part, SpeciesOffsets):
            zero += part.offsets.numpy()
    return zero


def differences(
    expected: Mapping[str, NDArray[np.float64]], found: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    """Largest differences of each kind, relative to the largest value or a floor."""
    errors = {}
    for kind, floor in _FLOORS.items():
        if kind not in expected:
            continue
        size = expected[kind] - expected["zero"] if kind == "energies" else expected[kind]
        scale = max(floor, float(np.abs(size).max()))
        errors[kind] = float(np.abs(found[kind] - expected[kind]).max()) / scale
    return errors


def random_structures(
    potential: Potential, density: float | None = None, seed: int = 0
) -> dict[str, ase.Atoms]:
    """Random structures of a potential's species: a vibrating crystal, a hot one, a tiny cell.

    Parameters
    ----------
    potential : Potential
        Of elements or beads.
    density : float, optional
        g/cm³; without it, atoms have 16 Å³ each, and beads as much as their repulsion asks for.
    seed : int
        Of the random numbers.
    """
    generator = np.random.default_rng(seed)
    entries = potential.species_table.entries
    priors = [part for part in summands(potential) if isinstance(part, PairRepulsion)]
    each = max([16.0, *(part.cutoff**3 / np.sqrt(2.0) for part in priors)])

    def crystal(repeat: int, amplitude: float) -> ase.Atoms:
        sites = bulk("X", "fcc", a=4.0, cubic=True) * (repeat, repeat, repeat)
        species = [entries[k % len(entries)] for k in range(len(sites))]
        atoms = make_atoms(species, sites.positions, sites.cell.array, sites.pbc)
        volume = each * len(atoms)
        if density is not None:
            volume = AMU_PER_A3_IN_G_PER_CM3 * float(atoms.get_masses().sum()) / density
        shear = np.eye(3) + np.triu(generator.uniform(-0.2, 0.2, (3, 3)), 1).T
        edge = (volume / np.linalg.det(shear)) ** (1.0 / 3.0)
        atoms.set_cell(edge * shear, scale_atoms=True)
        atoms.positions += amplitude * generator.standard_normal(atoms.positions.shape)
        return atoms

    return {
        "vibrating crystal": crystal(3, 0.05),
        "hot crystal": crystal(3, 0.35),
        "cell of a few atoms": crystal(1, 0.1),
    }
