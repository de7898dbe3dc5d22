"""Memory per atom: peak memory of a fresh process for each size of system."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import numpy as np
import psutil
import torch
from ase.md.verlet import VelocityVerlet

from potstill.ase_bridge import NAMES
from potstill.errors import ConfigError, DataError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.tools import make_calculator, repeat_to, set_temperature
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.tables import Row
from potstill.units import FS_IN_ASE_TIME

_GIB = 2**30

#: Seconds that a process may take.
_TIMEOUT = 600.0

#: Share of the free memory that a measurement may take.
_SHARE = 0.7


@dataclass(frozen=True)
class MemoryUse(Result):
    """Peak memory against the number of atoms.

    Parameters
    ----------
    name : str
        Of the calculator.
    n_atoms, peak_bytes : ndarray
        (n_sizes,) sizes, and peak resident memory of the process that ran each.
    bytes_per_atom, error : float
        Slope of the fitted line and its standard error (NaN from two sizes).
    baseline_bytes : float
        The line at no atoms: interpreter, libraries and weights.
    left_out : tuple of int
        Sizes asked for that would not have fitted into the free memory.
    """

    name: str
    n_atoms: np.ndarray
    peak_bytes: np.ndarray
    bytes_per_atom: float
    error: float
    baseline_bytes: float
    left_out: tuple[int, ...] = ()

    def largest_system(self, budget_gib: float) -> int:
        """Number of atoms that fit into a budget in GiB, by the fitted line.

        Raises
        ------
        DataError
            If memory did not grow with the size, so that the line says nothing.
        """
        if not self.bytes_per_atom > 0:
            raise DataError(
                f"the memory of '{self.name}' does not grow over {self.n_atoms.tolist()} atoms: "
                "measure larger systems"
            )
        return max(0, int((budget_gib * _GIB - self.baseline_bytes) / self.bytes_per_atom))


def memory_per_atom(
    spec: str,
    atoms: ase.Atoms,
    *,
    args: dict[str, Any] | None = None,
    name: str | None = None,
    sizes: Sequence[int] = (250, 500, 1000, 2000),
    n_steps: int = 2,
    threads: int = 1,
) -> MemoryUse:
    """Measure peak memory of molecular dynamics in a fresh process for each size.

    A process of its own is needed because memory, once taken, is seldom given back: the second
    size in one process would be measured on top of the first. Sizes are measured in increasing
    order, and those that may not fit into the memory that is free are left out.

    Parameters
    ----------
    spec : str
        What makes the calculator in the new process: a checkpoint `*.pt`, `chgnet`,
        `module:factory`.
    atoms : ase.Atoms
        The structure, repeated to each size (`repeat_to`).
    args : dict, optional
        JSON-able keyword arguments of the calculator.
    name : str, optional
        For the result; `spec` by default.
    sizes : sequence of int
        Least numbers of atoms, at least two different ones.
    n_steps : int
        Steps of velocity Verlet.
    threads : int
        Threads of the process: buffers per thread add up.

    Raises
    ------
    DataError
        If a process fails or does not end in time, or if fewer than two sizes fit.
    """
    if len(set(sizes)) < 2:
        raise ConfigError(f"memory per atom needs at least two sizes, not {list(sizes)}")
    label = name or spec
    unit = {k: atoms.arrays[k].tolist() for k in ("numbers", "positions", "masses", NAMES)
            if k in atoms.arrays}  # fmt: skip
    unit |= {"cell": atoms.cell.array.tolist(), "pbc": atoms.pbc.tolist()}
    job = {"spec": spec, "args": args or {}, "n_steps": n_steps, "threads": threads, "atoms": unit}
    measured: list[tuple[int, int]] = []
    left_out: list[int] = []
    for size in sorted({int(size) for size in sizes}):
        if left_out or (measured and not _fits(measured, size)):
            left_out.append(size)
        else:
            measured.append(_measure({**job, "n_atoms": size}, label))
    n_atoms, peaks = np.array(measured).T
    if len(set(n_atoms.tolist())) < 2:
        raise DataError(
            f"'{label}' needs too much memory for sizes other than {n_atoms[0]} atoms: choose "
            "smaller sizes"
        )
    slope, intercept, error = _line(n_atoms.astype(float), peaks.astype(float))
    return MemoryUse(label, n_atoms, peaks, slope, error, intercept, tuple(left_out))


def _fits(measured: list[tuple[int, int]], size: int) -> bool:
    """Whether a size safely fits into the free memory, judged by smaller ones.

    The kernel ends processes, perhaps others than ours, when memory runs out: we do not try.
    """
    n_atoms, peak = measured[-1]
    expected = peak * size / n_atoms  # too much: the libraries' share does not grow
    if len(measured) > 1:
        line = _line(*np.array(measured, dtype=float).T)
        expected = 1.2 * (line[1] + line[0] * size)
    return expected < _SHARE * psutil.virtual_memory().available


def _measure(job: dict[str, Any], label: str) -> tuple[int, int]:
    """(n_atoms, peak bytes) of one job in a fresh process."""
    where = f"the process that measures the memory of '{label}' with {job['n_atoms']} atoms"
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{where} took longer than {_TIMEOUT:g} s") from None
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"{where} ended with status {process.returncode}: {last}")
    answer = json.loads(process.stdout.strip().splitlines()[-1])
    return answer["n_atoms"], answer["peak_bytes"]


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and standard error of the slope of a least-squares line."""
    centered = x - x.mean()
    spread = (centered**2).sum()
    slope = (centered * y).sum() / spread
    intercept = y.mean() - slope * x.mean()
    if len(x) < 3:
        return float(slope), float(intercept), float("nan")
    residual = y - intercept - slope * x
    error = np.sqrt((residual**2).sum() / (len(x) - 2) / spread)
    return float(slope), float(intercept), float(error)


def _peak_bytes() -> int:
    """Peak resident memory of this process and the calculator's worker, if it has one.

    Linux's VmHWM belongs to the program that runs; `ru_maxrss` is inherited through fork and
    exec, and would report a large parent's memory as ours.
    """
    this = psutil.Process()
    if Path("/proc/self/status").exists():
        status = [Path(f"/proc/{process.pid}/status") for process in (this, *this.children())]
        lines = [line for file in status for line in file.read_text().splitlines()]
        return 1024 * sum(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024
    return peak + sum(process.memory_info().rss for process in this.children())


def _child() -> None:
    """Run one job from standard input and print the peak as JSON."""
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["threads"])
    names = job["atoms"].pop(NAMES, None)
    unit = ase.Atoms(**job["atoms"])
    if names is not None:
        unit.set_array(NAMES, np.array(names))
    atoms = repeat_to(unit, job["n_atoms"])
    atoms.calc = make_calculator(job["spec"], job["args"])
    set_temperature(atoms, 300.0, np.random.default_rng(0))
    VelocityVerlet(atoms, timestep=FS_IN_ASE_TIME).run(job["n_steps"])
    print(json.dumps({"n_atoms": len(atoms), "peak_bytes": _peak_bytes()}))


class Memory(Evaluation):
    """Peak memory of molecular dynamics per atom.

    Parameters
    ----------
    sizes : tuple of int
        Numbers of atoms, at least two.
    """

    name = "memory"
    title = "memory"
    result = MemoryUse
    section = "Cost"
    needs = "structure"

    sizes: tuple[int, ...] = (500, 2000)

    def run(self, bench: Bench, candidate: Candidate) -> MemoryUse:
        """Measure in fresh processes."""
        return memory_per_atom(
            candidate.spec,
            bench.atoms,
            args=candidate.args,
            name=candidate.name,
            sizes=self.sizes,
            threads=torch.get_num_threads(),
        )

    @classmethod
    def metrics(cls, result: MemoryUse) -> dict[str, float]:
        """Slope of the line."""
        return {"memory_per_atom_kib": result.bytes_per_atom / 1024.0}

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Memory per atom with its error, and the largest system."""
        yield from super().rows(found)
        if use := found.of(cls.name, MemoryUse):
            yield Row("Standard error of that (KiB)", {m: r.error / 1024.0 for m, r in use.items()})
            largest = {m: r.largest_system(8.0) for m, r in use.items() if r.bytes_per_atom > 0}
            yield Row("Largest system in 8 GiB (atoms)", largest)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Peak memory against size."""
        series = [
            Series(m, r.n_atoms, r.peak_bytes / 2.0**20, joined=True)
            for m, r in found.of(cls.name, MemoryUse).items()
        ]
        panel = Panel("Atoms", "Peak memory (MiB)", series, x_scale="auto", y_scale="auto")
        caption = "Peak memory of a fresh process against the number of atoms."
        yield Drawing("memory", "Memory", caption, [panel])


if __name__ == "__main__":
    _child()
