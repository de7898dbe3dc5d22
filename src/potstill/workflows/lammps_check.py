"""Whether an exported potential is, in LAMMPS, what its checkpoint is in ASE."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import ase
import ase.units
import numpy as np
import torch
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from potstill.calculators import PotstillCalculator
from potstill.core import build_compact_neighbors
from potstill.core.model_file import ModelFile
from potstill.deploy.lammps import PAIR_COMMANDS, STYLES, lammps_data
from potstill.deploy.lammps_build import Installation
from potstill.errors import ModelError
from potstill.lammps_library import in_a_box
from potstill.models import Potential
from potstill.structures import Structures
from potstill.workflows.parity import Parity, by_ase, differences, is_single, zero_energies

#: LAMMPS' own conversion from bar in its metal units; ASE's differs in the eighth digit.
BAR = 1.0 / 1.6021765e6

#: Largest difference of the two codes' changes of the total energy in NVE, eV per atom.
DRIFT_TOLERANCE = 1e-5

# Length of the dynamics, fs, and fewest atoms: times of smaller systems tell little. With PyTorch
# both are smaller, and the test takes as long.
_DYNAMICS_OF = {"potstill": (100, 500), "potstill/python": (20, 100)}

_STATIC = """\
units metal
atom_style atomic
boundary BOUNDARY
newton NEWTON
box tilt large
read_data structure.data
PAIR
compute energy all pe/atom
compute virial all stress/atom NULL virial
dump all all custom 1 dump.txt id fx fy fz c_energy c_virial[*]
dump_modify all sort id format float %.17g
thermo_style custom pe pxx pyy pzz pyz pxz pxy
run 0
print "$(pe:%.17g) $(pxx:%.17g) $(pyy:%.17g) $(pzz:%.17g) $(pyz:%.17g) $(pxz:%.17g) $(pxy:%.17g)" &
  file results.txt
"""

_DYNAMICS = """\
units metal
atom_style atomic
box tilt large
read_data structure.data
PAIR
neighbor 0.5 bin
neigh_modify delay 0 every 1 check yes
timestep 0.001
fix integrate all nve
thermo EVERY
thermo_style custom etotal
thermo_modify format float %.17g
run STEPS
"""


@dataclass(frozen=True)
class LammpsRun:
    """LAMMPS, its plugin and a model file, and how they are used.

    Parameters
    ----------
    lammps : Installation
        Where to run.
    plugin : Path
        The pair style.
    model : Path
        The exported file.
    names : sequence of str
        Elements by atom type.
    folder : Path
        For the files of a run.
    n_ranks : int
        MPI ranks.
    pair : str
        Commands of the pair style, with the variables `plugin` and `model`; those of the example by
        default.
    newton : str
        "on" or "off".
    patience : float
        Seconds until a run that does not end, as in a deadlock, is ended.
    """

    lammps: Installation
    plugin: Path
    model: Path
    names: Sequence[str]
    folder: Path
    n_ranks: int = 1
    pair: str = ""
    newton: str = "on"
    patience: float = 1200.0

    @property
    def style(self) -> str:
        """The pair style that the file is for."""
        return STYLES[self.model.suffix]

    def commands(self, arguments: str = "") -> str:
        """Return the commands of the example, with arguments of the pair style."""
        style = f"{self.style} {arguments}"
        return PAIR_COMMANDS.replace("NAMES", " ".join(self.names)).replace("STYLE", style)

    def output(self, script: str) -> str:
        """Return what LAMMPS prints.

        Raises
        ------
        ModelError
            If it ends with an error, with its message.
        """
        pair = self.pair or self.commands()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "in.lammps").write_text(
            script.replace("PAIR", pair).replace("NEWTON", self.newton), encoding="utf-8"
        )
        variables = ("-var", "plugin", str(self.plugin), "-var", "model", str(self.model.resolve()))
        return self.lammps.run(self.folder, "in.lammps", self.n_ranks, variables, self.patience)

    def static(self, atoms: ase.Atoms) -> dict[str, NDArray[np.float64]]:
        """Energies (N,), forces (N, 3) and stress (3, 3) in the frame of the atoms.

        Virials (N, 3, 3) are those of `compute stress/atom`, with the sign of the stress.
        """
        atoms = in_a_box(atoms)
        data, rotation = lammps_data(atoms, self.names)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "structure.data").write_text(data, encoding="utf-8")
        boundary = " ".join("p" if periodic else "m" for periodic in atoms.pbc)
        self.output(_STATIC.replace("BOUNDARY", boundary))
        rows = np.loadtxt(self.folder / "dump.txt", skiprows=9, ndmin=2)
        sums = np.array((self.folder / "results.txt").read_text().split(), dtype=float)
        voigt = rows[:, 5:][:, [0, 1, 2, 5, 4, 3]]  # LAMMPS ends with xy, xz, yz
        virials = BAR * np.array([voigt_6_to_full_3x3_stress(row) for row in voigt])
        return {
            "energy": sums[0],
            "energies": rows[:, 4],
            "forces": rows[:, 1:4] @ rotation,
            "stress": rotation.T @ voigt_6_to_full_3x3_stress(-BAR * sums[1:]) @ rotation,
            "virials": rotation.T @ virials @ rotation,
        }

    def dynamics(
        self, atoms: ase.Atoms, steps: int, every: int
    ) -> tuple[NDArray[np.float64], float]:
        """Total energies (eV) every so many steps of 1 fs in NVE, and the seconds of the loop."""
        data, _ = lammps_data(atoms, self.names)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "structure.data").write_text(data, encoding="utf-8")
        script = _DYNAMICS.replace("STEPS", str(steps)).replace("EVERY", str(every))
        text = self.output(script)
        table = re.search(r"TotEng\s*\n(.*?)\nLoop time of (\S+)", text, re.DOTALL)
        if table is None:
            raise ModelError("LAMMPS printed no energies")
        lines = [line for line in table[1].splitlines() if re.fullmatch(r"\s*\S+\s*", line)]
        return np.array(lines, dtype=float), float(table[2])


# -- the self-test -----------------------------------------------------------------------------


def check_parity(
    potential: Potential,
    run: LammpsRun,
    structures: Mapping[str, ase.Atoms],
    *,
    ranks: Sequence[int] = (1, 2),
    steps: int | None = None,
) -> Parity:
    """Compare LAMMPS with ASE: energies, forces and stress of all structures, and drift in NVE.

    A float32 network is compared in its own precision, and in float64, where LAMMPS must agree with
    the core's own evaluation of the file, or with the checkpoint cast to float64.

    Parameters
    ----------
    potential : Potential
        The checkpoint's.
    run : LammpsRun
        How LAMMPS uses the exported file.
    structures : mapping of str to ase.Atoms
        By name; the first periodic one serves for the dynamics, repeated where it is small.
    ranks : sequence of int
        Numbers of MPI ranks.
    steps : int, optional
        Length of the dynamics, fs; by default what the pair style needs no minute for.

    Raises
    ------
    ModelError
        At the first difference beyond what is let pass, or of the drift beyond `DRIFT_TOLERANCE`.
    """
    default, n_moving = _DYNAMICS_OF[run.style]
    found = Parity("LAMMPS", default if steps is None else steps)
    file = ModelFile(run.model) if run.style == "potstill" else None
    single, doubled = is_single(potential), deepcopy(potential).double()
    for name, atoms in structures.items():
        checkpoint = by_ase(potential, atoms)
        exact = by_ase(doubled, atoms) if file is None else _by_core(file, potential, atoms)
        noise = differences(exact, checkpoint)
        # Of a float64 network the checkpoint's own values are wanted.
        wanted = {"float64": exact, "float32": checkpoint} if single else {"float64": checkpoint}
        for n_ranks, precision in itertools.product(ranks, wanted):
            style = "double" if precision == "float64" else "single"
            values = replace(run, n_ranks=n_ranks, pair=run.commands(style)).static(atoms)
            errors = differences(wanted[precision], values)
            found.judge(name, precision, errors, noise, ranks=n_ranks)
    moving = next(atoms for atoms in structures.values() if atoms.pbc.all())
    repeats = math.ceil((n_moving / len(moving)) ** (1 / 3))
    _check_drift(potential, run, moving * ((repeats,) * 3), ranks, found)
    return found


def _by_core(
    file: ModelFile, potential: Potential, atoms: ase.Atoms
) -> dict[str, NDArray[np.float64]]:
    """What the exported file gives in float64, without LAMMPS."""
    structures = Structures.from_ase(atoms, table=potential.species_table)
    neighbors = build_compact_neighbors(structures, file.cutoff)
    place = (structures.positions, structures.cell[0])
    result = file.evaluate(structures.species, neighbors, *place, dtype=torch.float64, n_threads=1)
    assert result.forces is not None
    assert result.virial is not None
    values = {
        "energies": result.energies.numpy(),
        "forces": result.forces.numpy(),
        "zero": zero_energies(potential)[structures.species.numpy()],
    }
    if atoms.pbc.all():
        values["stress"] = (0.5 * (result.virial + result.virial.T) / structures.volume[0]).numpy()
    return values


def _check_drift(
    potential: Potential,
    run: LammpsRun,
    atoms: ase.Atoms,
    ranks: Sequence[int],
    found: Parity,
) -> None:
    steps = found.steps
    every = max(1, steps // 10)
    widths = np.sqrt(atoms.get_masses() * ase.units.kB * 300.0)[:, None]
    momenta = widths * np.random.default_rng(0).standard_normal((len(atoms), 3))
    atoms.set_momenta(momenta - momenta.mean(axis=0))
    moving = atoms.copy()
    moving.calc = PotstillCalculator(potential)
    moving.get_forces()
    energies = [moving.get_total_energy()]
    dynamics = VelocityVerlet(moving, timestep=1.0 * ase.units.fs)
    began = time.perf_counter()
    for _ in range(steps // every):
        dynamics.run(every)
        energies.append(moving.get_total_energy())
    seconds = time.perf_counter() - began
    in_ase = np.array(energies) - energies[0]
    per_step = 1e6 / (len(atoms) * steps)

    def row(program: str, n_ranks: int, changes: NDArray[np.float64], seconds: float) -> None:
        largest = float(np.abs(changes).max()) / len(atoms)
        found.drift.append([program, str(n_ranks), f"{largest:.1e}", f"{seconds * per_step:.2f}"])

    row("ASE", 1, in_ase, seconds)
    for n_ranks in ranks:
        total, seconds = replace(run, n_ranks=n_ranks).dynamics(atoms, steps, every)
        in_lammps = total - total[0]
        row("LAMMPS", n_ranks, in_lammps, seconds)
        difference = float(np.abs(in_lammps - in_ase).max()) / len(atoms)
        if not difference <= DRIFT_TOLERANCE:
            raise ModelError(
                f"the exported potential does not move as the checkpoint: in {steps} fs of NVE on "
                f"{n_ranks} ranks the total energies of LAMMPS and ASE part by {difference:.1e} eV "
                f"per atom, more than {DRIFT_TOLERANCE:g}"
            )
