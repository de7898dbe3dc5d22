"""Time of the native kernels per atom, beside the machine's measured peaks.

    python benchmarks/core_kernels.py [--threads 2] [--instruction-sets avx512 avx2 baseline]

Aluminium with 0.1 Å of disorder: the default model, and two with the norms of hippynn and a cutoff
of 7.5 Å. MD of 4,000 atoms with a skin of 1 Å, training on 16 x 108 atoms (one force pass, two
weighted passes with parameter gradients; and both weighted passes as one call). Floating-point
operations and bytes from memory are counted from the algorithm (padding is not work), peaks are
measured here: fused multiply-adds in registers, per second of processor time, and a triad over
large arrays. Medians and minima over runs go to `benchmarks/results/core_kernels.json`; on a busy
machine the least processor time says most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import bulk

from potstill import core
from potstill.core.base import native
from potstill.core.hipnn import N_PRODUCTS
from potstill.evaluate.tools import machine_description
from potstill.models import HIPNN
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "core_kernels.json"
TABLE = SpeciesTable.from_symbols(["Al"])

#: Hyper-parameters: the defaults (l_max 3, 5.5 Å), and norms of l_max 1.
MODELS: dict[str, tuple[float, ...]] = {
    "default": (),
    "student": (24, 10, 1.5, 7.0, 7.5, 2),
    "teacher": (128, 40, 1.5, 7.0, 7.5, 4),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--instruction-sets", nargs="+", default=[None], help="baseline, avx2, avx512 (the best)"
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def crystal(repeat: int, seed: int) -> Any:
    atoms = bulk("Al", cubic=True).repeat(repeat)
    atoms.rattle(0.1, seed=seed)
    return atoms


def measure(call: Callable[[], object], n_atoms: int, rounds: int) -> dict[str, float]:
    """Microseconds per atom: median and minimum on the clock, and of processor time."""
    call()
    clock, cpu = [], []
    for _ in range(rounds):
        began, began_cpu = time.perf_counter(), time.process_time()
        call()
        clock.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    scale = 1e6 / n_atoms
    return {
        "median_us_per_atom": float(np.median(clock)) * scale,
        "minimum_us_per_atom": min(clock) * scale,
        "minimum_cpu_us_per_atom": min(cpu) * scale,
    }


def operations(model: HIPNN, n_pairs: float, *, forces: bool, parameters: bool) -> float:
    """Floating-point operations per atom of one pass; a fused multiply-add counts two."""
    p = model.hyper
    n, width = p.n_sensitivities, p.n_features
    by_rank = (n, *p.n_tensor_sensitivities)
    sums = sum((2 * rank + 1) * count for rank, count in enumerate(by_rank))
    layers = width**2 * (1 + 2 * p.n_atom_layers)
    geometry = 60  # distances, direction, cutoff function, tensor components up to rank 1
    if p.invariants == "smooth":
        radial, radial_backward = 2, 6  # the recurrence, and its derivative
        components = (0, 0, 13, 31, 70)[p.l_max]
        gradients = 20 + (0, 0, 17, 78, 164)[p.l_max]
        n_invariants = p.l_max * p.n_channels + N_PRODUCTS[p.l_max] * p.n_triples
        after = 2 * (n_invariants * width + layers)
        triples = p.n_triples * (0, 0, 72, 248, 830)[p.l_max]
        triples_backward = p.n_triples * (0, 0, 152, 531, 1780)[p.l_max]
        products = 2 * (n * width + (sums - n) * p.n_channels) + after
        through_pairs = forces  # there are no parameters in the radial functions
    else:
        radial = radial_backward = 18  # exp by a polynomial
        components, gradients = 0, 20 + 4 * n
        products = after = 2 * (sums * width + layers)
        triples = triples_backward = 0
        through_pairs = forces or parameters
    work = n_pairs * (geometry + components + n * radial + 2 * sums) + products + triples
    work += triples_backward * (through_pairs or parameters)
    if through_pairs:
        work += n_pairs * (gradients + n * radial_backward + 4 * sums) + products
    elif parameters:
        work += after
    return work + products * parameters


def peak_rates(instruction_set: str) -> dict[str, float]:
    """GFLOP/s of one thread by dtype: the program of core/benchmarks, compiled with cmake."""
    with tempfile.TemporaryDirectory() as folder:
        configure = ["cmake", "-S", str(ROOT), "-B", folder, "-DPOTSTILL_PEAK=ON"]
        for command in (configure, ["cmake", "--build", folder]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        program = str(Path(folder) / f"peak_{instruction_set}")
        output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(("float32", "float64"), map(float, output.split()), strict=True))


def bandwidth(n_threads: int) -> float:
    """GB/s of a triad over arrays that no cache holds."""
    torch.set_num_threads(n_threads)
    a, b, c = (torch.ones(16_000_000) for _ in range(3))
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        torch.add(b, c, alpha=0.5, out=a)
        best = max(best, 3 * 4 * a.numel() / (time.perf_counter() - began) / 1e9)
    return best


def benchmark_md(model: HIPNN, options: argparse.Namespace) -> dict[str, Any]:
    structures = Structures.from_ase(crystal(10, 0)).with_species_table(TABLE)
    neighbors = build_neighbor_list(structures, model.cutoff + 1.0)
    compact = core.compact_neighbors(neighbors, structures.n_atoms)
    parameters, cell = model.native_parameters(), structures.cell[0]
    species, positions = structures.species.to(torch.int32), structures.positions
    result = measure(
        lambda: core.hipnn_md(
            parameters, species, compact, positions, cell, n_threads=options.threads
        ),
        structures.n_atoms,
        options.rounds,
    )
    within = (pair_vectors(structures, neighbors).norm(dim=1) < model.cutoff).sum()
    listed = compact.n_pairs / structures.n_atoms
    result["operations_per_atom"] = operations(
        model, float(within) / structures.n_atoms, forces=True, parameters=False
    )
    # The list twice (it is checked first), positions in and out, forces per thread and in sum.
    result["bytes_per_atom"] = 2 * 6 * listed + 24 + 3 * 32 + options.threads * 64 + 24 + 8
    core.release_memory()
    before = native().scratch_bytes()
    core.hipnn_md(parameters, species, compact, positions, cell, n_threads=options.threads)
    scratch = native().scratch_bytes() - before
    result["memory_per_atom"] = scratch / structures.n_atoms + 6 * listed + 8 + 24 + 24 + 8
    return result


def benchmark_training(model: HIPNN, options: argparse.Namespace) -> dict[str, Any]:
    frames = [crystal(3, seed) for seed in range(16)]
    structures = Structures.from_ase(frames).with_species_table(TABLE)
    neighbors = build_neighbor_list(structures, model.cutoff)
    compact = core.compact_neighbors(neighbors, structures.n_atoms)
    parameters, n_threads = model.native_parameters(), options.threads
    species = structures.species.to(torch.int32)
    r_ij = pair_vectors(structures, neighbors)
    weights = torch.randn(structures.n_atoms, 2, dtype=torch.float64)
    wanted: dict[str, Any] = {"gradient": False, "parameter_gradient": True}

    def forces() -> None:
        core.hipnn_pass(parameters, species, compact, r_ij, n_threads=n_threads)

    def weighted() -> None:
        core.hipnn_pass(parameters, species, compact, r_ij, weights, n_threads=n_threads, **wanted)

    def step() -> None:
        forces()
        weighted()
        weighted()

    results: dict[str, Any] = {}
    n_pairs = compact.n_pairs / structures.n_atoms
    force_work = operations(model, n_pairs, forces=True, parameters=False)
    weighted_work = operations(model, n_pairs, forces=False, parameters=True)
    for name, call, work, n_bytes in (
        ("force_pass", forces, force_work, n_pairs * (4 + 24 + 12)),
        ("weighted_pass", weighted, weighted_work, n_pairs * (4 + 24)),
        ("step", step, force_work + 2 * weighted_work, n_pairs * (3 * 28 + 12)),
    ):
        results[name] = measure(call, structures.n_atoms, options.rounds)
        results[name]["operations_per_atom"] = work
        results[name]["bytes_per_atom"] = n_bytes
    return results


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks and results with the instruction set in use."""
    dtype = getattr(torch, options.dtype)
    peaks = {
        "gflops_per_thread": peak_rates(core.instruction_set())[options.dtype],
        "triad_gb_per_s": bandwidth(options.threads),
    }
    rows: dict[str, Any] = {}
    for name, values in MODELS.items():
        torch.manual_seed(0)
        model = HIPNN(TABLE, *values).to(dtype)
        rows[name] = {
            "md": benchmark_md(model, options),
            **benchmark_training(model, options),
        }
        for what, row in rows[name].items():
            peak = peaks["gflops_per_thread"] * 1e3  # operations per µs of processor time
            fastest = row["minimum_us_per_atom"]
            processor = row["minimum_cpu_us_per_atom"]
            row["fraction_of_peak"] = row["operations_per_atom"] / peak / processor
            row["fraction_of_bandwidth"] = (
                row["bytes_per_atom"] / (peaks["triad_gb_per_s"] * 1e3) / fastest
            )
            memory = f", {row['memory_per_atom']:.0f} B/atom" if "memory_per_atom" in row else ""
            print(
                f"{name:8} {what:14} median {row['median_us_per_atom']:7.3f}, fastest "
                f"{fastest:7.3f} µs/atom, processor {row['minimum_cpu_us_per_atom']:7.3f}; "
                f"{100 * row['fraction_of_peak']:.0f} % of peak operations, "
                f"{100 * row['fraction_of_bandwidth']:.0f} % of bandwidth{memory}"
            )
    return {"peaks": peaks, "results": rows}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    sets: dict[str, Any] = {}
    for name in options.instruction_sets:
        core.select_instruction_set(name)
        print(core.instruction_set())
        sets[core.instruction_set()] = benchmark(options)
    record = {
        "dtype": options.dtype,
        "threads": options.threads,
        "machine": machine_description(),
        "instruction_sets": sets,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
