"""Whether a teacher's forces and stress are the derivatives of its energy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from potstill.errors import TeacherError
from potstill.structures import Structures
from potstill.teachers.base import Teacher
from potstill.units import ENERGY, LENGTH, PRESSURE

#: Frames that are tried if the teacher fails on some.
_TRIES = 3
#: Å and strain of the probe, so that neither forces nor stress vanish; Å and strain of differences.
_RATTLE, _EXPAND = 0.05, 0.02
_STEP, _STRAIN = 0.01, 0.003
#: A derivative and its label may differ by this factor: coarse differences, basis sets that change.
_FACTOR = 1.25
#: Rounding of an energy, as a share of it: single precision.
_ROUNDING = 3e-7


@dataclass(frozen=True)
class Residual:
    """|F + dE/dr| over sampled force components, eV/Å.

    Parameters
    ----------
    rms, max : float
        Root mean square and largest of the residual.
    force_rms : float
        Root mean square of the sampled forces, for comparison.
    n_components : int
        Sampled components.
    step : float
        Displacement of the finite differences, Å.
    """

    rms: float
    max: float
    force_rms: float
    n_components: int
    step: float


def nonconservative_residual(
    teacher: Teacher,
    structures: Structures,
    *,
    n_components: int = 12,
    step: float = 0.01,
    seed: int = 0,
) -> Residual:
    """Compare forces with central differences of the energy, on a random sample.

    A conservative teacher's residual is of the order of step squared and of its rounding over the
    step; direct forces show a residual that does not shrink with the step. Components of all atoms
    are sampled alike; each costs two energies. `step` is in Å.

    Raises
    ------
    TeacherError
        If the teacher fails on one of the frames.
    """
    forces = _answer(teacher, structures, "forces")
    if not forces.numel():
        raise TeacherError("there are no atoms to compare forces of")
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(forces.numel(), generator=generator)[:n_components]
    ends = []
    for component in sample.tolist():
        atom, axis = divmod(component, 3)
        for sign in (1.0, -1.0):
            positions = structures.positions.clone()
            positions[atom, axis] += sign * step
            moved = replace(structures, positions=positions)
            ends.append(moved[int(structures.system_index[atom])])
    forth, back = _answer(teacher, Structures.concatenate(ends), "energy").view(-1, 2).unbind(1)
    picked = forces.flatten()[sample]
    residual = picked + (forth - back) / (2.0 * step)
    rms, force_rms = (float(x.square().mean().sqrt()) for x in (residual, picked))
    return Residual(rms, float(residual.abs().max()), force_rms, len(sample), step)


def check_derivatives(teacher: Teacher, structures: Structures, properties: Sequence[str]) -> None:
    """Refuse a teacher whose forces or stress have the wrong unit or sign.

    On the smallest frame, rattled and slightly expanded, labels are compared with differences of
    the energy: forces along themselves, stress along a change of volume and along its own shear.
    This costs the teacher seven frames. A teacher that says of itself that its forces are no
    gradient (`conservative`), or that fails on the frames tried, is not checked.

    Parameters
    ----------
    properties : sequence of str
        What it is asked for; forces and stress among them are checked.

    Raises
    ------
    TeacherError
        If they contradict the energy; it names the unit that would fit.
    """
    names = [name for name in ("forces", "stress") if name in properties]
    if not names or not teacher.info.conservative or "energy" not in teacher.properties:
        return
    counts = structures.n_atoms_per_system
    # An atom alone has no forces, and only crystals have a stress.
    last_choice = (counts < 2) | (~structures.pbc.all(dim=1) & ("stress" in names))
    for system in (counts + 10**9 * last_choice).argsort(stable=True)[:_TRIES].tolist():
        probe = _probe(structures[system])
        labels, failures = teacher.label(probe, names)
        asked = [name for name in names if bool(labels.presence(name, 1)[0])]
        moves = [move for name in asked for move in _moves(name, labels[name], probe)]
        if failures or not moves:
            continue
        ends = Structures.concatenate([end for move in moves for end in move.ends])
        energies, failures = teacher.label(ends, ["energy"])
        if failures:
            continue
        for move, (forth, back) in zip(moves, energies["energy"].view(-1, 2), strict=True):
            slope = float(forth - back) / (2.0 * move.step)
            noise = _ROUNDING * abs(float(forth)) / move.step
            if not _agree(move.slope, slope, noise):
                raise TeacherError(_contradiction(teacher.name, move, slope))
        return


@dataclass(frozen=True)
class _Move:
    """A change of a structure, and the slope of the energy along it by the labels."""

    name: str
    ends: tuple[Structures, Structures]
    step: float
    slope: float
    volume: float


def _probe(one: Structures) -> Structures:
    """The frame with nonzero forces and stress."""
    noise = torch.randn(one.positions.shape, generator=torch.Generator().manual_seed(0))
    scale = 1.0 + _EXPAND if bool(one.pbc.all()) else 1.0
    positions = scale * one.positions + _RATTLE * noise.double()
    return replace(one, positions=positions, cell=scale * one.cell)


def _moves(name: str, label: torch.Tensor, probe: Structures) -> Iterator[_Move]:
    if name == "forces":
        largest = float(label.abs().max())
        if largest > 0.0:
            along = _STEP * label / largest
            ends = (
                replace(probe, positions=probe.positions + along),
                replace(probe, positions=probe.positions - along),
            )
            slope = -float((label * along).sum()) / _STEP
            yield _Move(name, ends, _STEP, slope, math.nan)
        return
    unit, stress = torch.eye(3, dtype=torch.float64), label[0]
    shear = stress - stress.trace() / 3.0 * unit
    volume = float(probe.volume[0])
    for along in (unit, shear / shear.abs().max().clamp(min=1e-300)):
        ends = (probe.deformed(unit + _STRAIN * along), probe.deformed(unit - _STRAIN * along))
        slope = volume * float((stress * along).sum())
        yield _Move(name, ends, _STRAIN, slope, volume)


def _agree(label: float, slope: float, noise: float) -> bool:
    if abs(label - slope) <= noise:
        return True
    return label * slope > 0.0 and 1.0 / _FACTOR < label / slope < _FACTOR


def _contradiction(teacher: str, move: _Move, slope: float) -> str:
    ratio = move.slope / slope if slope else math.inf
    if move.name == "forces":
        verb, derivative, proper = "are", "minus the gradient of its energy", "eV/Å"
        units = {f"{e}/{x}": LENGTH[x] / ENERGY[e] for e in ENERGY for x in LENGTH}
    else:
        verb, derivative = "is", "the derivative of its energy by strain, over the volume"
        proper = "eV/Å³, positive in tension"
        units = {u: 1.0 / factor for u, factor in PRESSURE.items()}
        units["eV, a virial"] = move.volume
    unit = _named(abs(ratio), units)
    guess = [f"in {unit}"] if unit and unit not in ("eV/Angstrom", "eV/A^3") else []
    guess += ["of the opposite sign"] if ratio < 0.0 and (unit or guess) else []
    seems = f" (it seems to be {' and '.join(guess)})" if guess else ""
    return (
        f"the {move.name} of the teacher '{teacher}' {verb} {ratio:.4g} times {derivative}{seems}: "
        f"its calculator must return {proper}; leave {move.name} out of the properties, or pass "
        f"it `conservative: false` if its forces are not meant to be a gradient"
    )


def _named(ratio: float, units: Mapping[str, float]) -> str | None:
    """The unit whose factor is closest, if it is close."""
    if not 0.0 < ratio < math.inf:
        return None
    best = min(units, key=lambda unit: abs(math.log(ratio / units[unit])))
    return best if 1.0 / _FACTOR < ratio / units[best] < _FACTOR else None


def _answer(teacher: Teacher, structures: Structures, name: str) -> torch.Tensor:
    labels, failures = teacher.label(structures, [name])
    if failures:
        where = structures.name_of(failures[0].system)
        raise TeacherError(f"the teacher '{teacher.name}' failed on {where}: {failures[0].reason}")
    return labels[name]
