"""Mean forces of the centers of mass of all molecules of a liquid, at fixed centers.

python studies/coarse_graining/mean_forces.py sample ../shared/data/reline runs/mean_forces

The force label of a bead is the sum of the forces on the atoms of its molecule: the bead's mean
force in this configuration of beads, plus noise. `sample` measures the mean: GROMACS runs the
atoms at 425 K (stochastic dynamics) with every center of mass held exactly where it was in a frame
of the trajectory, by constraints of the pull code along x, y and z. Shifting a molecule as a whole
leaves its shape, its constrained bonds and the volume element as they are, so that the derivative
of the free energy with respect to its center is the mean of minus the sum of its atoms' forces,
without further terms. The mean force of constraint is the opposite of the mean force: a second
estimate, from every step.

Each configuration is sampled from the frame itself, whose orientations are a fair draw from their
distribution at these centers. Molecules hardly turn while their centers are held, so that the error
of this average is more than its blocks show. It is measured by runs of some configurations that
were heated to 1200 K, where urea turns, and cooled: see `mean_force_table`.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import MDAnalysis
import numpy as np
import typer

from potstill.units import energy_factor

#: Temperatures in K, times in ps. Heated runs are cooled from 8 to 24 ps.
TEMPERATURE, HOT, COOLING = 425, 1200, (8, 24)
#: What runs from the frame and heated runs leave out at their start, and how long they are.
DISCARDED, LENGTHS = (2, 25), (24, 40)
STEP, FORCES_EVERY, AXES_EVERY, CONSTRAINT_EVERY = 0.002, 20, 200, 500  # the latter in steps

#: Distance (nm) from the centers to the points they are held from: GROMACS refuses zero.
LEVER = 0.5

#: Frames of the trajectory that are equilibration.
EQUILIBRATION = 100

#: kJ/mol in eV; GROMACS' files have nm, which MDAnalysis makes Å.
KJ_PER_MOL = energy_factor("kJ/mol")

MDP = """integrator = sd
dt = {step}
nsteps = {n_steps}
cutoff-scheme = verlet
coulombtype = PME
rcoulomb = 1.2
rvdw = 1.2
DispCorr = EnerPres
tc-grps = System
tau_t = 1.0
ref_t = {temperature}
ld-seed = {seed}
gen_vel = yes
gen_temp = {temperature}
gen_seed = {seed}
constraints = h-bonds
comm-mode = none
nstlog = 5000
nstenergy = {energies_every}
nstxout = {axes_every}
nstfout = {forces_every}
"""

ANNEALING = """annealing = single
annealing-npoints = 3
annealing-time = 0 {start} {end}
annealing-temp = {hot} {hot} {temperature}
"""

app = typer.Typer(no_args_is_help=True)


@app.callback()
def main() -> None:
    """Mean forces of the centers of mass of the molecules of a liquid."""


def chosen_frames(n_frames: int, count: int) -> list[int]:
    """Evenly spread frames after the equilibration, so ordered that any first few are spread."""
    even = np.linspace(EQUILIBRATION, n_frames - 1, count).round().astype(int)
    order = sorted(range(count), key=lambda k: int(f"{k:016b}"[::-1], 2))
    return [int(even[k]) for k in order]


def pull_settings(centers: np.ndarray) -> str:
    """Hold every center (nm) by three constraints of GROMACS' pull code."""
    lines = ["pull = yes", f"pull-ngroups = {len(centers)}", f"pull-ncoords = {3 * len(centers)}"]
    lines += ["pull-nstxout = 0", f"pull-nstfout = {CONSTRAINT_EVERY}", "pull-fout-average = yes"]
    for k, center in enumerate(centers):
        lines.append(f"pull-group{k + 1}-name = m{k + 1}")
        for axis in range(3):
            name = f"pull-coord{3 * k + axis + 1}"
            lines += [
                f"{name}-type = constraint",
                f"{name}-geometry = direction",
                f"{name}-groups = 0 {k + 1}",
                f"{name}-vec = {' '.join(str(int(d == axis)) for d in range(3))}",
                f"{name}-origin = {' '.join(f'{x:.6f}' for x in center - LEVER * np.eye(3)[axis])}",
                f"{name}-init = {LEVER}",
            ]
    return "\n".join(lines) + "\n"


def sum_per_molecule(universe: MDAnalysis.Universe, values: np.ndarray) -> np.ndarray:
    """(molecules, 3) sums of (atoms, 3) values."""
    total = np.zeros((len(universe.residues), 3))
    np.add.at(total, universe.atoms.resindices, values)
    return total


def axes(universe: MDAnalysis.Universe) -> np.ndarray:
    """(molecules, 3) unit vectors that turn with the molecules: C-O of urea, N-O of choline."""
    ends = {"CHOL": (3, 7), "UREA": (0, 1), "Cl": (0, 0)}
    pairs = np.array([r.atoms.indices[list(ends[r.resname])] for r in universe.residues])
    d = universe.atoms.positions[pairs[:, 1]] - universe.atoms.positions[pairs[:, 0]]
    d -= universe.dimensions[:3] * np.round(d / universe.dimensions[:3])
    return d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-9)


def gromacs(folder: Path, command: str, *arguments: object) -> None:
    """Run GROMACS in a folder, no nicer than this process; what it says is in gmx.log there."""
    with (folder / "gmx.log").open("a") as log:
        line = ["gmx", command, "-nice", "0", *map(str, arguments)]
        subprocess.run(line, cwd=folder, check=True, stdout=log, stderr=log)


def energies(folder: Path) -> np.ndarray:
    """(samples, 2) times (ps) and potential energies (kJ/mol) of a run."""
    command = ["gmx", "energy", "-nice", "0", "-f", "run.edr", "-o", "energy.xvg"]
    subprocess.run(
        command, cwd=folder, check=True, input="Potential\n", text=True, capture_output=True
    )
    return np.loadtxt(folder / "energy.xvg", comments=("#", "@"))


def prepare(data: Path, frame: int, repeat: int, to: Path) -> Path:
    """Folder of one run at the centers of one frame, ready for mdrun."""
    universe = MDAnalysis.Universe(data / "reline_425K.tpr", data / "reline_425K.trr")
    universe.trajectory[frame]
    raw = sum_per_molecule(universe, universe.atoms.forces) * KJ_PER_MOL
    universe.atoms.unwrap(compound="residues", reference="com")
    centers = universe.atoms.center_of_mass(compound="residues")
    folder = to.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    universe.atoms.write(folder / "start.gro")
    groups = [("System", universe.atoms)]
    groups += [(f"m{k + 1}", r.atoms) for k, r in enumerate(universe.residues)]
    lines = ["\n".join([f"[ {name} ]", *map(str, a.indices + 1)]) for name, a in groups]
    (folder / "index.ndx").write_text("\n".join(lines) + "\n")
    settings = MDP.format(
        step=STEP,
        n_steps=round(LENGTHS[min(repeat, 1)] / STEP),
        temperature=TEMPERATURE,
        seed=10_000 * repeat + frame + 1,
        axes_every=AXES_EVERY,
        energies_every=CONSTRAINT_EVERY,
        forces_every=FORCES_EVERY,
    )
    if repeat:
        start, end = COOLING
        settings += ANNEALING.format(start=start, end=end, hot=HOT, temperature=TEMPERATURE)
    (folder / "run.mdp").write_text(settings + pull_settings(centers / 10))
    files = ["-f", "run.mdp", "-c", "start.gro", "-n", "index.ndx", "-o", "run.tpr"]
    topology = data.resolve() / "topology" / "reline_60.top"
    gromacs(folder, "grompp", *files, "-p", topology, "-maxwarn", 1)
    np.savez(
        folder / "start.npz",
        frame=frame,
        repeat=repeat,
        cell=universe.dimensions[:3],
        molecules=universe.residues.resnames.astype("U4"),
        masses=universe.residues.masses,
        centers=centers,
        raw=raw,
    )
    return folder


def reduce(data: Path, folder: Path, to: Path) -> None:
    """Mapped forces of a finished run, and what is needed to judge them, in one file."""
    with np.load(folder / "start.npz") as held:
        start = {name: held[name] for name in held.files}
    centers = start["centers"]
    run = MDAnalysis.Universe(data / "reline_425K.tpr", folder / "run.trr")
    times, forces, turning, moved = [], [], [], 0.0
    for step in run.trajectory:
        # The part before is not used, and would be most of the file.
        if step.time >= DISCARDED[min(int(start["repeat"]), 1)]:
            times.append(step.time)
            forces.append(sum_per_molecule(run, run.atoms.forces) * KJ_PER_MOL)
        if step.has_positions and round(step.time / STEP) % AXES_EVERY == 0:
            run.atoms.unwrap(compound="residues", reference="com")
            away = run.atoms.center_of_mass(compound="residues") - centers
            away -= run.dimensions[:3] * np.round(away / run.dimensions[:3])
            moved = max(moved, float(np.abs(away).max()))
            turning.append(axes(run))
    pull = np.loadtxt(folder / "pull.xvg", comments=("#", "@"))
    log = (folder / "run.log").read_text().split("\n")
    np.savez_compressed(
        to.with_suffix(".partial.npz"),
        **start,
        times=np.array(times),
        forces=np.array(forces, dtype=np.float32),
        constraint_times=pull[1:, 0],
        constraint=(pull[1:, 1:].reshape(-1, *centers.shape) * KJ_PER_MOL / 10).astype(np.float32),
        axes=np.array(turning, dtype=np.float32),
        moved=moved,
        performance=next(x for x in log if "Performance" in x).split()[1],
        version=next(x for x in log if "GROMACS version" in x).split()[-1],
        energies=energies(folder),
    )
    to.with_suffix(".partial.npz").rename(to)


def sample_one(data: Path, frame: int, repeat: int, threads: int, to: Path) -> None:
    """Prepare, run and reduce one run, and remove its folder."""
    folder = prepare(data, frame, repeat, to)
    threading = ["-ntmpi", 1, "-ntomp", threads]
    gromacs(folder, "mdrun", "-s", "run.tpr", "-deffnm", "run", "-pf", "pull.xvg", *threading)
    reduce(data, folder, to)
    shutil.rmtree(folder)


@app.command()
def sample(
    data: Annotated[Path, typer.Argument(help="folder with reline_425K.trr, .tpr and topology/")],
    out: Annotated[Path, typer.Argument(help="folder of the runs; finished ones are kept")],
    configurations: int = 12,
    heated: Annotated[int, typer.Option(help="heated runs of each configuration")] = 2,
    jobs: Annotated[int, typer.Option(help="runs at a time")] = 2,
    threads: Annotated[int, typer.Option(help="of each run")] = 1,
) -> None:
    """Run what is missing; those from the frames first."""
    out.mkdir(parents=True, exist_ok=True)
    trajectory = MDAnalysis.Universe(data / "reline_425K.tpr", data / "reline_425K.trr").trajectory
    frames = chosen_frames(len(trajectory), configurations)
    order = [(frame, repeat) for repeat in range(heated + 1) for frame in frames]
    missing = [
        (frame, repeat, to)
        for frame, repeat in order
        if not (to := out / f"frame{frame:04d}_run{repeat}.npz").exists()
    ]
    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(sample_one, data, f, r, threads, to): to for f, r, to in missing}
        for run in as_completed(runs):
            run.result()
            typer.echo(f"{runs[run].name} done")


if __name__ == "__main__":
    app()
