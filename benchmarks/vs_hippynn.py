"""The same HIP-NN in potstill and in hippynn: training steps with forces, and molecular dynamics.

    OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 \
        python benchmarks/vs_hippynn.py --threads 2

Needs hippynn, and numba for its best CPU kernels. Architecture, system, precision, loss and threads
are the same; rounds alternate, medians count, each of hippynn's kernels that runs is tried.
What is timed is not the same, in hippynn's favor: its pair lists are made beforehand and its
"molecular dynamics" is energy and forces at given pairs, while potstill's goes through ASE's
calculator, with moving atoms and the neighbor list that this takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from common import (
    Step,
    Times,
    crystals,
    in_words,
    potstill_md,
    potstill_training,
    potstill_training_set,
    timed,
    us_per_atom,
)

from potstill.core import describe_core, instruction_set, select_instruction_set
from potstill.distill.losses import Moments
from potstill.evaluate.tools import machine_description
from potstill.models import HIPNN
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.species import SpeciesTable
from potstill.structures import Structures

RESULTS = Path(__file__).parent / "results" / "vs_hippynn.json"
SIZES = {
    "student": {"n_features": 24, "n_sensitivities": 10, "n_atom_layers": 2},
    "teacher": {"n_features": 128, "n_sensitivities": 40, "n_atom_layers": 4},
}
COMMON = {"dist_soft_min": 1.9, "dist_soft_max": 7.0, "dist_hard_max": 7.5}
# -- potstill --------------------------------------------------------------------------------------


def potstill_model(size: str) -> HIPNN:
    torch.manual_seed(0)
    return HIPNN(SpeciesTable.from_symbols(["Al"]), **COMMON, **SIZES[size], l_max=1).float()


# -- hippynn ---------------------------------------------------------------------------------------


def use_kernels(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hippynn import custom_kernels

        custom_kernels.set_custom_kernels(name)


def hippynn_model(size: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hippynn.layers.targets import HEnergy
        from hippynn.networks.hipnn import HipnnVec

        network = HipnnVec(**COMMON, **SIZES[size], n_interaction_layers=1, n_input_features=1)
    return network.float(), HEnergy(network.feature_sizes).float()


class Batch:
    """What hippynn's modules take, made beforehand."""

    def __init__(self, structures: Structures) -> None:
        neighbors = build_neighbor_list(structures, COMMON["dist_hard_max"])
        self.r_ij = pair_vectors(structures, neighbors).float().requires_grad_(True)
        self.first, self.second = neighbors.center, neighbors.neighbor
        self.one_hot = torch.ones(structures.n_atoms, 1)
        self.system_index, self.n_systems = structures.system_index, structures.n_systems
        self.n_atoms = structures.n_atoms


def hippynn_forces(
    network: torch.nn.Module, energy: torch.nn.Module, batch: Batch, create_graph: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    distance = torch.linalg.vector_norm(batch.r_ij, dim=1)
    features = network(batch.one_hot, batch.first, batch.second, distance, batch.r_ij)
    total = energy(features, batch.system_index, batch.n_systems)[0][:, 0]
    (slope,) = torch.autograd.grad(total.sum(), batch.r_ij, create_graph=create_graph)
    forces = slope.new_zeros(batch.n_atoms, 3).index_add(0, batch.first, slope)
    return total, forces.index_add(0, batch.second, -slope)


def hippynn_training(size: str) -> Step:
    network, energy = hippynn_model(size)
    data = potstill_training_set(16)
    batch, labels = Batch(data.structures), data.labels["reference"]
    parameters = [*network.parameters(), *energy.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def error(difference: torch.Tensor) -> torch.Tensor:
        measure = Moments("rmse+mae")
        return measure.value(measure.sums(difference, torch.ones_like(difference)))

    def step() -> None:
        total, forces = hippynn_forces(network, energy, batch, create_graph=True)
        loss = error(total - labels["energy"]) + 10.0 * error(forces - labels["forces"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def hippynn_md(size: str, repeat: int) -> Step:
    network, energy = hippynn_model(size)
    batch = Batch(Structures.from_ase(crystals(1, repeat)))
    return lambda: [None, hippynn_forces(network, energy, batch, create_graph=False)][0]


# -- timing ----------------------------------------------------------------------------------------


def compare(steps: dict[str, Step], n_atoms: int, rounds: int, seconds: float) -> dict[str, dict]:
    for name in list(steps):
        try:
            steps[name]()  # compiles, fills caches
        except Exception as error:  # a kernel of hippynn that does not run here
            print(f"  {name} does not run: {type(error).__name__}")
            del steps[name]
    times: dict[str, list[Times]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, seconds))
    found = {name: us_per_atom(t, n_atoms) for name, t in times.items()}
    for name, row in found.items():
        print(f"  {name:20s} {in_words(row)}", flush=True)
    return found


def with_kernels(name: str, step: Step) -> Step:
    def run() -> None:
        use_kernels(name)
        step()

    return run


def memory_of(what: str, size: str, repeat: int, threads: int) -> int:
    """Peak of a fresh process in bytes after three steps."""
    command = [sys.executable, __file__, "--only", what, size, str(repeat)]
    command += ["--threads", str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return int(result.stdout.split()[-1])


def memory_per_atom(what: str, size: str, threads: int) -> float:
    """KiB per atom from the slope between two sizes."""
    small, large = 10, 20  # smaller ones hide behind what importing takes
    peaks = [memory_of(what, size, repeat, threads) for repeat in (small, large)]
    return (peaks[1] - peaks[0]) / (4 * (large**3 - small**3)) / 1024.0


def only(what: str, size: str, repeat: int) -> None:
    package, _, kernels = what.partition(":")
    if package == "hippynn":
        use_kernels(kernels)
    if package == "potstill":
        step = potstill_md(potstill_model(size), repeat)
    else:
        step = hippynn_md(size, repeat)
    for _ in range(3):
        step()
    # `ru_maxrss` would be the parent's where that is larger.
    status = Path("/proc/self/status").read_text().splitlines()
    print(1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="per round and competitor")
    parser.add_argument("--repeat", type=int, default=10, help="cells along an edge in MD")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--instruction-sets", nargs="+", default=[None], help="potstill's")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument("--kernels", nargs="+", default=["numba", "sparse", "pytorch"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # hippynn's, of kernels in beta and of setuptools
    if args.only:
        only(args.only[0], args.only[1], int(args.only[2]))
        return
    record: dict = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_description(),
        "threads": args.threads,
        "malloc": os.environ.get("MALLOC_TRIM_THRESHOLD_", "not tuned"),
        "versions": {"hippynn": _version("hippynn"), "numba": _version("numba")},
    }
    for name in args.instruction_sets:
        select_instruction_set(name)
        print(describe_core())
        found = record.setdefault("instruction_sets", {}).setdefault(instruction_set(), {})
        for size in args.sizes:
            found[size] = compare_size(size, args)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")


def compare_size(size: str, args: argparse.Namespace) -> dict:
    """Training, MD and, if asked for, memory, with the ratios of hippynn's best to potstill."""
    kernels, n_md = args.kernels, 4 * args.repeat**3
    print(f"{size}: training step with forces, 16 x 108 atoms")
    steps = {"potstill": potstill_training(potstill_model(size), potstill_training_set(16))}
    steps |= {f"hippynn:{k}": with_kernels(k, hippynn_training(size)) for k in kernels}
    training = compare(steps, 16 * 108, args.rounds, args.seconds)
    print(f"{size}: energy and forces, {n_md} atoms")
    steps = {"potstill": potstill_md(potstill_model(size), args.repeat)}
    steps |= {f"hippynn:{k}": with_kernels(k, hippynn_md(size, args.repeat)) for k in kernels}
    md = compare(steps, n_md, args.rounds, args.seconds)
    best = min((k for k in md if k != "potstill"), key=lambda k: md[k]["median"])
    row = {
        "training_us_per_atom": training,
        "md_us_per_atom": md,
        "training_ratio": _ratio(training, "median"),
        "training_processor_ratio": _ratio(training, "processor"),
        "md_ratio": _ratio(md, "median"),
        "md_processor_ratio": _ratio(md, "processor"),
    }
    if not args.no_memory:
        memory = {w: memory_per_atom(w, size, args.threads) for w in ("potstill", best)}
        row["md_memory_kib_per_atom"] = memory
        row["memory_ratio"] = memory[best] / memory["potstill"]
    ratios = {k: round(v, 1) for k, v in row.items() if k.endswith("ratio")}
    print(f"{size}: hippynn's best over potstill: {ratios}", flush=True)
    return row


def _ratio(times: dict[str, dict], what: str) -> float:
    others = [t[what] for name, t in times.items() if name != "potstill"]
    return min(others) / times["potstill"][what]


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
