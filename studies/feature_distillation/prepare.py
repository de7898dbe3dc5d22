"""Split the reference data of the feature distillation study into files.

python studies/feature_distillation/prepare.py 3bpa ../shared/data/3bpa runs/fd/3bpa
python studies/feature_distillation/prepare.py oc20 ../shared/data/oc20-traj runs/fd/oc20

`3bpa` (Kovács et al. 2021): of the 500 configurations at 300 K a part is for training, validation
and test each, drawn at random; those at 300, 600 and 1200 K are a second test set, without the
geometries that the first file has, too.

`oc20` (24 relaxations of OC20): four whole systems, of elements that the others have, are a test
set of their own, where only forces of free atoms count. Of every other relaxation a contiguous
block of steps is for validation and another for testing, with a gap of steps on either side that
are not used, since neighboring steps are alike. Energies are relative to the mean of the training
frames of their system: 24 systems of 38 elements leave the energies of the elements undetermined.
Atoms that the relaxation moved have tag 1 and frozen ones tag 0, as OC20 marks the layers below a
surface; adsorbates are not told apart from the surface.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Annotated

import ase.io
import numpy as np
import typer
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

#: Systems that are held out as a whole.
N_NEW_SYSTEMS = 4

#: Shares of a relaxation: validation block, test block, and each of the four gaps around them.
VALIDATION, TEST, GAP = 0.08, 0.12, 0.04

#: Frames per relaxation and part, evenly spread: training, validation, test, new systems.
FRAMES = {"train": 24, "validation": 3, "test": 5, "new_systems": 15}

app = typer.Typer()


def read(path: Path) -> list[Atoms]:
    """All frames of a zipped extended XYZ file."""
    text = gzip.decompress(path.read_bytes()).decode()
    return ase.io.read(io.StringIO(text), ":", format="extxyz")


def write(folder: Path, parts: dict[str, list[Atoms]]) -> None:
    """One file per part; also print how large energies and forces are: the errors of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frames in parts.items():
        ase.io.write(folder / f"{name}.extxyz", frames, format="extxyz")
        energies = np.array([frame.get_potential_energy() for frame in frames])
        forces = np.concatenate([f.get_forces(apply_constraint=False)[free(f)] for f in frames])
        print(
            f"{folder / name}.extxyz: {len(frames)} frames, {sum(map(len, frames))} atoms; mean of "
            f"|E - mean| {1e3 * np.abs(energies - energies.mean()).mean():.0f} meV, of |E| "
            f"{1e3 * np.abs(energies).mean():.0f} meV, of |F| {1e3 * np.abs(forces).mean():.1f} "
            "meV/Å over free atoms"
        )


def free(frame: Atoms) -> np.ndarray:
    """(N,) bool: atoms that may move."""
    return ~np.asarray(frame.arrays.get("fixed", np.zeros(len(frame)))).astype(bool)


@app.command("3bpa")
def bpa(source: Path, out: Path, seed: Annotated[int, typer.Option()] = 0) -> None:
    """Molecules: 400 for training, 40 for validation, 60 and the mixed temperatures for testing."""
    cold, mixed = read(source / "train_300K.extxyz.gz"), read(source / "train_mixedT.extxyz.gz")
    known = {frame.positions.round(4).tobytes() for frame in cold}
    new = [frame for frame in mixed if frame.positions.round(4).tobytes() not in known]
    order = np.random.default_rng(seed).permutation(len(cold))
    cold = [cold[k] for k in order]
    parts = {"train": cold[:400], "validation": cold[400:440], "test": cold[440:], "mixed": new}
    write(out, parts)


@app.command()
def oc20(source: Path, out: Path, seed: Annotated[int, typer.Option()] = 0) -> None:
    """Relaxations on surfaces, split as the module's text says."""
    rng = np.random.default_rng(seed)
    systems: dict[str, list[Atoms]] = {}
    for frame in read(source / "train_24_systems.extxyz.gz"):
        systems.setdefault(frame.info["config_type"], []).append(frame)
    new = held_out({name: set(own[0].symbols) for name, own in systems.items()}, rng)
    parts: dict[str, list[Atoms]] = {name: [] for name in FRAMES}
    for name, frames in sorted(systems.items()):
        split = {"new_systems": frames} if name in new else blocks(frames, rng)
        split = {part: thinned(own, FRAMES[part]) for part, own in split.items()}
        zero = np.mean([f.get_potential_energy() for f in split.get("train", frames)])
        for part, own in split.items():
            parts[part] += [prepared(frame, zero) for frame in own]
    write(out, parts)
    print("new systems:", ", ".join(sorted(new)))


def held_out(elements: dict[str, set[str]], rng: np.random.Generator) -> list[str]:
    """Systems whose elements all occur in the others, too."""
    new: list[str] = []
    for name in rng.permutation(sorted(elements)).tolist():
        others = [own for k, own in elements.items() if k != name and k not in new]
        if len(new) < N_NEW_SYSTEMS and elements[name] <= set().union(*others):
            new.append(name)
    return new


def blocks(frames: list[Atoms], rng: np.random.Generator) -> dict[str, list[Atoms]]:
    """Cut a relaxation: two held-out blocks in random order, apart from the rest and each other."""
    n = len(frames)
    widths = {"validation": max(round(VALIDATION * n), 1), "test": max(round(TEST * n), 1)}
    gap = max(round(GAP * n), 1)
    first, second = rng.permutation(list(widths)).tolist()
    used = sum(widths.values()) + 4 * gap
    before, between = (rng.multinomial(n - used, [1 / 3] * 3))[:2]
    start = before + gap
    other = start + widths[first] + gap + between + gap
    held = {
        first: range(start, start + widths[first]),
        second: range(other, other + widths[second]),
    }
    near = {k for block in held.values() for k in range(block.start - gap, block.stop + gap)}
    train = [k for k in range(n) if k not in near]
    return {name: [frames[k] for k in rows] for name, rows in {"train": train, **held}.items()}


def thinned(frames: list[Atoms], n: int) -> list[Atoms]:
    """At most n frames, evenly spread."""
    rows = np.unique(np.linspace(0, len(frames) - 1, min(n, len(frames))).round().astype(int))
    return [frames[k] for k in rows]


def prepared(frame: Atoms, zero: float) -> Atoms:
    """The frame with tags, and its energy relative to `zero`."""
    own = frame.copy()
    own.set_tags(free(frame).astype(int))
    own.calc = SinglePointCalculator(
        own,
        energy=frame.get_potential_energy() - zero,
        forces=frame.get_forces(apply_constraint=False),
    )
    return own


if __name__ == "__main__":
    app()
