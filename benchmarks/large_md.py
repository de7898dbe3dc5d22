"""Molecular dynamics at the limits of a student: how large, and how well the energy is conserved.

    OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 \
        python benchmarks/large_md.py --model runs/aluminium/student-small-0/best.pt

First a crystal of about `--atoms` atoms for a few steps through ASE, with the peak memory of the
process; then `--duration` ps at constant energy with 4,000 atoms, and the fitted drift.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import ase
import torch
from ase.build import bulk
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.units import fs

from potstill.calculators import PotstillCalculator
from potstill.core import describe_core
from potstill.evaluate.nve import run_nve
from potstill.evaluate.tools import machine_description

RESULTS = Path(__file__).parent / "results" / "large_md.json"


def largest(model: str, crystal: ase.Atoms, n_atoms: int, n_steps: int, temperature: float) -> dict:
    repeat = round((n_atoms / len(crystal)) ** (1.0 / 3.0))
    atoms = crystal.repeat(repeat)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature)
    atoms.calc = PotstillCalculator(model)
    dynamics = VelocityVerlet(atoms, 1.0 * fs)
    began = time.perf_counter()
    dynamics.run(1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    dynamics.run(n_steps)
    step = (time.perf_counter() - began) / n_steps
    return {
        "n_atoms": len(atoms),
        "seconds_first_step": first,
        "seconds_per_step": step,
        "us_per_atom": 1e6 * step / len(atoms),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--element", default="Al")
    parser.add_argument("--lattice-constant", type=float, default=4.05, help="Å")
    parser.add_argument("--atoms", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=600.0, help="K")
    parser.add_argument("--duration", type=float, default=50.0, help="ps of NVE")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    crystal = bulk(args.element, cubic=True, a=args.lattice_constant)
    record: dict = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_description(),
        "core": describe_core(),
        "threads": args.threads,
    }
    if args.atoms:
        arguments = (args.model, crystal, args.atoms, args.steps, args.temperature)
        record["largest"] = largest(*arguments)
        print(json.dumps(record["largest"]), flush=True)
    if args.duration:
        run = run_nve(
            crystal.repeat(10),
            PotstillCalculator(args.model),
            temperature=args.temperature,
            timestep=1.0,
            duration=args.duration,
            sample_every=100,
        )
        record["nve"] = run.to_json()
        print(run.reason or f"drift {run.drift:+.3g} meV/atom over {run.duration:g} ps")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
