"""Time per step and atom of the same ASE molecular dynamics: potstill checkpoints, CHGNet, EMT.

    python benchmarks/md_speed.py --checkpoint run/student/best.pt --structure Si.cif

Calculators take turns, so that a busy machine hits all of them alike; medians over rounds go to
`benchmarks/results/md_speed.json` with a description of the machine. Without a checkpoint an
untrained HIP-NN is timed: speed does not depend on the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import ase.io
import torch
from ase.build import bulk
from ase.calculators.emt import parameters as emt_parameters

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import save_potential
from potstill.evaluate.base import make_calculator
from potstill.evaluate.memory import memory_per_atom
from potstill.evaluate.speed import SpeedTable, md_speed
from potstill.models import build_model
from potstill.structures import SpeciesTable

RESULTS = Path(__file__).parent / "results" / "md_speed.json"

#: Timed where no checkpoint is given: a student of ordinary size.
UNTRAINED = {
    "n_features": 24,
    "n_sensitivities": 16,
    "dist_soft_min": 1.6,
    "dist_soft_max": 5.0,
    "dist_hard_max": 5.5,
    "n_atom_layers": 3,
    "n_interaction_layers": 1,
    "l_max": 1,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", action="append", default=[], help="may be given repeatedly")
    parser.add_argument("--structure", help="any file that ASE reads")
    parser.add_argument("--element", default="Si", help="its crystal, where no structure is given")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 216, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds-per-round", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--without", nargs="*", default=[], choices=["chgnet", "emt"])
    parser.add_argument("--memory", action="store_true", help="measure memory per atom as well")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def specs_of(args: argparse.Namespace, atoms: ase.Atoms, folder: Path) -> dict[str, str]:
    """Names of calculators, and the text that makes them here and in other processes."""
    specs = {Path(path).stem: path for path in args.checkpoint}
    if len(specs) < len(args.checkpoint):
        specs = {path: path for path in args.checkpoint}
    if not specs:
        table = SpeciesTable.from_symbols(atoms.get_chemical_symbols())
        torch.manual_seed(0)
        path = folder / "untrained.pt"
        save_potential(path, build_model("hipnn", table, UNTRAINED).float(), {})
        specs["hipnn (untrained)"] = str(path)
    specs |= {"chgnet": "chgnet", "emt": "ase.calculators.emt:EMT"}
    unfit = set(args.without)
    if not set(atoms.get_chemical_symbols()) <= set(emt_parameters):
        unfit.add("emt")
    return {name: spec for name, spec in specs.items() if name not in unfit}


def print_table(table: SpeedTable) -> None:
    columns = f"{'calculator':24s} {'atoms':>6s} {'ms/step':>10s}"
    print(f"{columns} {'µs/step/atom':>13s} {'of CPU':>9s}  range")
    for row in table.rows:
        low, high, cpu = (
            1e6 * x / row.n_atoms for x in (row.fastest, row.slowest, row.cpu_seconds_per_step)
        )
        print(
            f"{row.name:24s} {row.n_atoms:6d} {1e3 * row.seconds_per_step:10.3f} "
            f"{row.microseconds_per_atom:13.2f} {cpu:9.2f}  {low:.2f}-{high:.2f}"
        )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    atoms = ase.io.read(args.structure) if args.structure else bulk(args.element, cubic=True)
    record = {"command": " ".join(["python", *sys.argv]), "formula": atoms.get_chemical_formula()}
    with tempfile.TemporaryDirectory() as folder:
        specs = specs_of(args, atoms, Path(folder))
        calculators = {name: make_calculator(spec) for name, spec in specs.items()}
        record["models"] = {
            name: {
                "n_parameters": calculator.potential.n_parameters,
                **calculator.potential.hyperparameters(),
            }
            for name, calculator in calculators.items()
            if isinstance(calculator, PotstillCalculator)
        }
        table = md_speed(
            calculators,
            atoms,
            sizes=args.sizes,
            rounds=args.rounds,
            seconds_per_round=args.seconds_per_round,
            temperature=args.temperature,
        )
        print_table(table)
        record |= table.to_json()
        if args.memory:
            record["memory"] = {
                name: memory_per_atom(spec, atoms, name=name, threads=args.threads).to_json()
                for name, spec in specs.items()
            }
            for name, use in record["memory"].items():
                print(f"{name:24s} {use['bytes_per_atom'] / 1024:8.1f} KiB per atom")
    if "chgnet" in table.names:
        others = [name for name in table.names if name != "chgnet"]
        for key, cpu in (("speedup_over_chgnet", False), ("cpu_speedup_over_chgnet", True)):
            record[key] = {name: table.speedup(name, "chgnet", cpu=cpu) for name in others}
            print(f"{key}: {json.dumps(record[key])}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
