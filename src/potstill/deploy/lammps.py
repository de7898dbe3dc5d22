"""Potentials for LAMMPS' pair styles potstill and potstill/python, and examples of their use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ase
import ase.units
import numpy as np
import torch
from ase.data import atomic_masses, atomic_numbers

from potstill import __version__
from potstill.ase_bridge import species_names
from potstill.checkpoint import potential_fingerprint, save_potential
from potstill.core.model_file import write_model_file
from potstill.errors import ModelError
from potstill.files import write_atomically
from potstill.lammps_library import lammps_frame
from potstill.models import HIPNN, ZBL, Bonds, PairRepulsion, Potential, SpeciesOffsets, summands
from potstill.models.engines import NativeParts

#: Starts the plugin and the potential, for all scripts.
PAIR_COMMANDS = """\
plugin load ${plugin}
pair_style STYLE
pair_coeff * * ${model} NAMES
"""

#: Pair styles by the ending of the file: the core's model file, and a checkpoint.
STYLES = {".potstill": "potstill", ".pt": "potstill/python"}

_NOTE = """ PyTorch
# computes them, in a Python that the plugin starts: many times slower than a native style."""

_OF_ATOMS = """\
neighbor 1.0 bin
neigh_modify delay 0 every 5 check yes
timestep 0.001          # ps"""

#: A bead moves as far in a step as an atom in several.
BEAD_NEIGHBORS = "neighbor 3.0 bin\nneigh_modify delay 0 every 1 check yes"

_OF_BEADS = f"""\
# A bead moves as far in a step as an atom in several: its list is wide, and checked in every step.
# A time step is short enough if the same run without the thermostat keeps its energy.
{BEAD_NEIGHBORS}
timestep 0.01           # ps
fix bath all langevin ${{temperature}} ${{temperature}} 1.0 4928459"""

_EXAMPLE = """\
# Molecular dynamics with MODEL, a potential of potstill. Its types: TYPES
#
#   potstill lammps build
#   mpiexec -n 2 lmp -in STEM.in -var plugin "$(potstill lammps path)" -var data FILE
#
# FILE is a data file of LAMMPS with the atom types above. In the environment variable
# LAMMPS_PLUGIN_PATH the folder of the plugin saves the command `plugin load`.

variable plugin index potstillplugin.so
variable data index structure.data
variable model index MODEL
variable temperature index 300.0

units metal             # or real
atom_style atomic
boundary p p p
newton on               # off gives the same, and is slower
read_data ${data}
MASSES

# Numbers are computed in the precision that the model was trained in, PRECISION here; the words
# `double` and `single` behind the style choose another one.NOTE
PAIR_COMMANDS
# Elements or beads by atom type; NULL is for types that other styles of a `hybrid/overlay` serve.

DYNAMICS
velocity all create ${temperature} 4928459 mom yes rot yes dist gaussian
fix integrate all nve

thermo 100
thermo_style custom step temp pe etotal press
run 1000
"""


def write_lammps(
    potential: Potential, folder: Path, stem: str, info: Mapping[str, Any]
) -> list[Path]:
    """Write the model, `.potstill` or a checkpoint, and `.in`, a commented example.

    Parameters
    ----------
    potential : Potential
        A HIP-NN, or its sum with offsets and a ZBL prior, or a repulsion and bonds of beads, for
        the core's kernels; anything else is run by PyTorch inside LAMMPS.
    folder : Path
        Where to.
    stem : str
        The files' names without endings.
    info : mapping
        What is known of the potential, as `load_potential` returns it; kept in the model file.

    Raises
    ------
    ModelError
        If its forces are not derived from an energy, or it is in less than single precision.
    """
    potential.check_precision()
    ending = ".potstill" if why_not_native(potential) is None else ".pt"
    files = [folder / f"{stem}{ending}", folder / f"{stem}.in"]
    note = ""
    if ending == ".potstill":
        _write_native(potential, files[0], info)
    else:
        if potential.direct_forces:
            raise ModelError(
                f"{potential.kind} predicts forces directly: without an energy that they derive "
                "from there is no pressure, and dynamics gain or lose energy; not for LAMMPS"
            )
        save_potential(files[0], potential, dict(info))
        note = _NOTE
    names = potential.species_table.names
    of_beads = any(entry.atomic_number is None for entry in potential.species_table.entries)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in potential.parameters()}
    words = {
        "PAIR_COMMANDS": PAIR_COMMANDS,
        "NOTE": note,
        "MASSES": "\n".join(
            f"mass {k} {entry.mass!r}    # {entry.name}"
            for k, entry in enumerate(potential.species_table.entries, 1)
        ),
        "STYLE": STYLES[ending],
        "NAMES": " ".join(names),
        "STEM": stem,
        "MODEL": files[0].name,
        "TYPES": ", ".join(f"{k} {name}" for k, name in enumerate(names, 1)),
        "PRECISION": " and ".join(sorted(dtypes)) or "float64",
        "DYNAMICS": _OF_BEADS if of_beads else _OF_ATOMS,
    }
    text = _EXAMPLE
    for word, value in words.items():
        text = text.replace(word, value)
    write_atomically(files[1], text)
    return files


def _write_native(potential: Potential, file: Path, info: Mapping[str, Any]) -> None:
    network, rest = exported_parts(potential)
    parameters = network.native_parameters().joined()
    names = potential.species_table.names
    energies = torch.zeros(len(names)) if rest.offsets is None else rest.offsets
    teacher = info.get("teacher")
    provenance = {
        "potstill": __version__,
        "fingerprint": potential_fingerprint(potential),
        "license": teacher.get("license", "unknown") if isinstance(teacher, Mapping) else "unknown",
        "info": dict(info),
    }
    write_model_file(file, names, parameters, energies, rest.prior, provenance, rest.bonds)


def why_not_native(potential: Potential) -> str | None:
    """Why the core cannot run a potential in LAMMPS; None if it can."""
    try:
        exported_parts(potential)
    except ModelError as error:
        return str(error)
    return None


def exported_parts(potential: Potential) -> tuple[HIPNN, NativeParts]:
    """The network, and the priors and offsets of a potential that is made of nothing else.

    Raises
    ------
    ModelError
        If it has any other part.
    """
    parts = list(summands(potential))
    networks = [part for part in parts if isinstance(part, HIPNN)]
    if any(isinstance(part, ZBL) and part.switching != "factor" for part in parts):
        raise ModelError(
            "the core multiplies ZBL by its switch, and this prior is switched as in LAMMPS' own "
            "pair style zbl: train with the switching 'factor'"
        )
    rest: NativeParts | None = NativeParts()
    for part in parts:
        if not isinstance(part, HIPNN):
            known = isinstance(part, ZBL | PairRepulsion | Bonds | SpeciesOffsets)
            own = part.native_parts() if known else None
            rest = None if rest is None or own is None else rest.merged(own)
    if len(networks) != 1 or rest is None:
        raise ModelError(
            "LAMMPS' pair style potstill runs a HIP-NN, with offsets and a ZBL prior, or a "
            f"repulsion and bonds of beads, not {', '.join(part.kind for part in parts)}"
        )
    return networks[0], rest


def lammps_data(atoms: ase.Atoms, names: Sequence[str]) -> tuple[str, np.ndarray]:
    """Write a structure for `read_data` with `atom_style atomic`, velocities included.

    Parameters
    ----------
    atoms : ase.Atoms
        Periodic or not; its cell must span the space.
    names : sequence of str
        Elements or beads by atom type; a bead of which there is none gets a mass of 1 amu.

    Returns
    -------
    text : str
        The data file, in metal units, in a frame whose first cell vector is along x and whose
        second is in the plane of x and y.
    rotation : (3, 3) ndarray
        Takes rows of vectors of that frame to those of `atoms` as `rows @ rotation`.

    Raises
    ------
    ModelError
        If the structure holds a species that is not among the names.
    """
    species = species_names(atoms)
    foreign = sorted(set(species) - set(names))
    if foreign:
        raise ModelError(
            f"the structure holds {', '.join(foreign)}, but the model knows only {', '.join(names)}"
        )
    cell, rotation = lammps_frame(atoms.cell)
    c = cell.tolist()
    lines = [
        "LAMMPS data file of potstill\n",
        f"{len(atoms)} atoms",
        f"{len(names)} atom types\n",
        *(f"0 {c[k][k]!r} {axis}lo {axis}hi" for k, axis in enumerate("xyz")),
        f"{c[1][0]!r} {c[2][0]!r} {c[2][1]!r} xy xz yz\n",
        "Masses\n",
    ]
    masses = {name: atomic_masses[atomic_numbers.get(name, 0)] for name in names}
    masses |= dict(zip(species, atoms.get_masses(), strict=True))
    lines += [f"{k} {float(masses[name])!r} # {name}" for k, name in enumerate(names, 1)]
    types = [list(names).index(name) + 1 for name in species]
    rows = (atoms.positions @ rotation.T).tolist()
    lines += ["\nAtoms # atomic\n"]
    lines += [
        f"{k} {kind} {x!r} {y!r} {z!r}"
        for k, (kind, (x, y, z)) in enumerate(zip(types, rows, strict=True), 1)
    ]
    if atoms.has("momenta"):
        # ASE's velocities are Å over its own unit of time, LAMMPS' are Å/ps.
        rows = (atoms.get_velocities() @ rotation.T * (1000.0 * ase.units.fs)).tolist()
        lines += ["\nVelocities\n"]
        lines += [f"{k} {x!r} {y!r} {z!r}" for k, (x, y, z) in enumerate(rows, 1)]
    return "\n".join(lines) + "\n", rotation
