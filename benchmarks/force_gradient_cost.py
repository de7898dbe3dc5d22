"""Time and peak memory of a training step: energies only, and the three gradients of a force loss.

    OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 \
        python benchmarks/force_gradient_cost.py --threads 2 --figure docs/figures

A step is the loss and its gradient on one rattled aluminium supercell, without the optimizer. Each
measurement runs in a process of its own, because memory once taken is seldom given back; methods
take turns over several rounds, so that a busy machine hits all of them alike. Methods are compared
by the processor time of all threads, which other jobs change little. Memory is the peak of
the steps above what the process held after one step of four atoms, neighbor list excluded. A
process that asks for more than `--limit` GiB ends, and its point is recorded as too large. Linux
only.

Numbers go to `benchmarks/results/force_gradient_cost.json` with a description of the machine, one
measurement after the other: `--minutes` stops early, and the next call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from ase.build import bulk
from common import ANI_AL, STUDENT

from potstill.core import describe_core
from potstill.distill import LossTerm
from potstill.evaluate.tools import machine_description
from potstill.models import Potential, build_model
from potstill.models.base import Core
from potstill.report.panels import Drawing, Look, Panel, Series
from potstill.report.plots import write_figure
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.train import TrainingSet, TrainSettings
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import ForceGradient, NetworkPasses
from potstill.train.objective import BatchLoss
from potstill.train.settings import ForceGradientSettings, ModelSettings
from potstill.train.signals import bind_terms

RESULTS = Path(__file__).parent / "results" / "force_gradient_cost.json"

HIPNN = ModelSettings(hyperparameters=STUDENT)

#: The aluminium student of the teacher-student study on the native kernels and in PyTorch, SNAP of
#: the size of the published tantalum potential, and ANI with the functions of ANI-Al.
MODELS: dict[str, tuple[ModelSettings, Core]] = {
    "hipnn-native": (HIPNN, "native"),
    "hipnn": (HIPNN, "torch"),
    "snap": (ModelSettings(kind="snap", hyperparameters={"twojmax": 6, "rcutfac": 5.2}), "torch"),
    "ani": (ModelSettings(kind="ani", hyperparameters=ANI_AL), "torch"),
}

ENERGY = LossTerm(property="energy")
FORCES = LossTerm(property="forces", weight=10.0)

#: What is compared: the terms of the loss, and how its gradient is taken. Energies only are learned
#: as `auto` does it: backpropagation in PyTorch, one evaluation and one weighted pass natively.
METHODS = {
    "energies only": ((ENERGY,), ForceGradientSettings()),
    "backpropagation": ((ENERGY, FORCES), ForceGradientSettings(method="backpropagation")),
    "central difference, plain": (
        (ENERGY, FORCES),
        ForceGradientSettings(method="central_difference", folded=False),
    ),
    "central difference, folded": (
        (ENERGY, FORCES),
        ForceGradientSettings(method="central_difference", folded=True),
    ),
    "forward over reverse": (
        (ENERGY, FORCES),
        ForceGradientSettings(method="forward_over_reverse"),
    ),
}

#: These need second derivatives, for which PyTorch stands in for native kernels.
SECOND_ORDER = ("backpropagation", "forward over reverse")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    sizes = [32, 128, 512, 1024, 2048, 4096]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="powers of two")
    parser.add_argument("--precision", default="float32", choices=["float32", "float64"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds-per-point", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=8.0, help="GiB for each process")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing after so long")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, help="folder for the figure")
    return parser.parse_args()


def supercell(n_atoms: int) -> TrainingSet:
    """Rattled aluminium of 4, 8, 16, ... atoms; labels are noise, on which no cost depends."""
    repeats = [1, 1, 1]
    while 4 * repeats[0] * repeats[1] * repeats[2] < n_atoms:
        repeats[repeats.index(min(repeats))] *= 2
    atoms = bulk("Al", cubic=True) * repeats
    if len(atoms) != n_atoms:
        raise SystemExit(f"sizes are 4, 8, 16, ... atoms, not {n_atoms}")
    atoms.rattle(0.1, seed=0)
    generator = torch.Generator().manual_seed(0)
    labels = {
        "energy": torch.zeros(1, dtype=torch.float64),
        "forces": torch.randn(n_atoms, 3, generator=generator, dtype=torch.float64),
    }
    return TrainingSet(Structures.from_ase(atoms), {"reference": Properties(labels)})


def make_network(model: str, precision: str) -> Potential:
    torch.manual_seed(0)
    settings, core = MODELS[model]
    table = SpeciesTable.from_symbols(["Al"])
    network = build_model(settings.kind, table, settings.hyperparameters)
    network.use_core(core)
    return network.to(getattr(torch, precision))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of one point, in this process."""
    torch.set_num_threads(job["threads"])
    terms, how = METHODS[job["method"]]
    network = make_network(job["model"], job["precision"])
    settings = TrainSettings(loss=terms, force_gradient=how)
    # The proxy is looked at every hundredth step: leave it out of the few that are timed.
    force_gradient = ForceGradient(how, network, watch=False)
    fabric = default_fabric()
    passes = fabric.setup_module(NetworkPasses(network))

    def batch_of(n_atoms: int) -> Any:
        reach = network.cutoff + force_gradient.margin
        data = supercell(n_atoms).with_neighbors(reach, packed=force_gradient.takes_compact_lists)
        return data.batch(torch.tensor([0]))

    def step(batch: Any) -> None:
        objective = BatchLoss(bind_terms(settings, network), 1, batch, fabric)
        gradient = force_gradient(passes, batch, objective.wanted, objective)
        network.zero_grad(set_to_none=True)
        gradient.backward(fabric, passes)

    batch = batch_of(job["n_atoms"])
    step(batch_of(4))  # loads all code
    # What building the list left free would hide the steps' own memory.
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    step(batch)
    times: list[float] = []
    processor: list[float] = []
    deadline = time.perf_counter() + job["seconds"]
    while not times or time.perf_counter() < deadline:
        started, used = time.perf_counter(), time.process_time()
        step(batch)
        times.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return {
        "seconds": statistics.median(times),
        "cpu_seconds": statistics.median(processor),  # of all threads
        "peak_bytes": resident("VmHWM") - before,
        "n_pairs": batch.neighbors.n_pairs,
    }


def resident(field: str) -> int:
    """Bytes of one line of this process' status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _answer(pipe: Connection, job: dict[str, Any], limit: float) -> None:
    """Body of a process; memory beyond the limit makes the next allocation fail."""
    n_bytes = int(limit * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    try:
        pipe.send(measure(job))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        pipe.send({"failed": f"needs more than {limit:g} GiB"})


def in_a_process(job: dict[str, Any], limit: float) -> dict[str, Any]:
    """The answer of a process of its own. Nothing may have started torch's threads here."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, job, limit))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return {"failed": "ended with an error"}
    finally:
        process.join()


def points(args: argparse.Namespace) -> Iterator[tuple[str, int, int, str]]:
    """(model, number of atoms, round, method) in the order in which they are measured."""
    for model in args.models:
        for n_atoms in args.sizes:
            for k in range(args.rounds):
                for method in METHODS:
                    if MODELS[model][1] != "native" or method not in SECOND_ORDER:
                        yield model, n_atoms, k, method


def summary(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per model, size and method, and its ratios to energies only.

    Processor time and memory are medians over rounds, the time on the clock is that of the fastest.
    """
    rows: list[dict[str, Any]] = []
    base: dict[tuple[str, int], dict[str, Any]] = {}
    for key in dict.fromkeys((m["model"], m["n_atoms"], m["method"]) for m in measurements):
        row: dict[str, Any] = dict(zip(("model", "n_atoms", "method"), key, strict=True))
        rows.append(row)
        found = [m for m in measurements if all(m[name] == row[name] for name in row)]
        failed = [m["failed"] for m in found if "failed" in m]
        if failed:
            row["failed"] = failed[0]
            continue
        row |= {"n_pairs": found[0]["n_pairs"], "rounds": len(found)}
        row["seconds"] = min(m["seconds"] for m in found)
        for name in ("cpu_seconds", "peak_bytes"):
            row[name] = statistics.median(m[name] for m in found)
        reference = base.setdefault(key[:2], row)
        for ratio, name in (("cpu_ratio", "cpu_seconds"), ("memory_ratio", "peak_bytes")):
            row[ratio] = row[name] / reference[name]
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        start = f"{row['model']:12s} {row['n_atoms']:5d} {row['method']:28s}"
        if "failed" in row:
            print(f"{start} {row['failed']}")
            continue
        clock, processor = (1e6 * row[name] / row["n_atoms"] for name in ("seconds", "cpu_seconds"))
        print(
            f"{start} {clock:9.2f} µs/atom, of processors {processor:9.2f} "
            f"({row['cpu_ratio']:.2f} x)  "
            f"{row['peak_bytes'] / 2**20:8.1f} MiB ({row['memory_ratio']:.2f} x)"
        )


# -- figure --------------------------------------------------------------------------------------

TITLES = {
    "hipnn-native": "HIP-NN, native kernels",
    "hipnn": "HIP-NN, PyTorch",
    "snap": "SNAP",
    "ani": "ANI",
}
STYLES = {
    "energies only": Look("energies only", "#222222", "*", ":"),
    "backpropagation": Look("backpropagation", "#D55E00", "s"),
    "central difference, plain": Look("central difference, plain", "#56B4E9", "v", "--"),
    "central difference, folded": Look("central difference, folded", "#0072B2", "o"),
    "forward over reverse": Look("forward over reverse", "#009E73", "^", "-."),
}


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Time and peak memory per atom against the number of atoms, a column for each model."""
    panels = []
    quantities = (
        ("cpu_seconds", 1e6, "processor time (µs per atom)"),
        ("peak_bytes", 1.0 / 1024.0, "peak memory (KiB per atom)"),
    )
    for quantity, unit, label in quantities:
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model and quantity in row]
            series = []
            for method in dict.fromkeys(row["method"] for row in mine):
                x = [row["n_atoms"] for row in mine if row["method"] == method]
                y = [
                    unit * row[quantity] / row["n_atoms"] for row in mine if row["method"] == method
                ]
                series.append(Series(method, x, y, joined=True))
            panels.append(
                Panel("atoms", label, series, TITLES[model], x_scale="log", y_scale="log")
            )
    title = "Cost of force training"
    drawing = Drawing(
        "force_gradient_cost", title, "", panels, n_columns=len(panels) // 2, width=3.3
    )
    with tempfile.TemporaryDirectory() as scratch:
        drawn = write_figure(Path(scratch), drawing, STYLES)
        (folder / drawn.png.name).write_bytes(drawn.png.read_bytes())


def main() -> None:
    args = arguments()
    setup = {
        "threads": args.threads,
        "precision": args.precision,
        "limit_gib": args.limit,
        "seconds_per_point": args.seconds_per_point,
        "environment": {
            name: os.environ.get(name, "not set")
            for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_WAIT_POLICY")
        },
    }
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_description(),
        "core": describe_core(),
        "setup": setup,
        "models": {name: settings.model_dump() for name, (settings, _) in MODELS.items()},
        "rows": [],
        "measurements": [],
    }
    if args.output.exists():
        before = json.loads(args.output.read_text())
        if before["setup"] != setup:
            raise SystemExit(f"{args.output} has another set-up: remove it, or name another file")
        record["measurements"] = before["measurements"]
    measurements = record["measurements"]
    done = {(m["model"], m["n_atoms"], m["round"], m["method"]) for m in measurements}
    too_large = {(m["model"], m["n_atoms"], m["method"]) for m in measurements if "failed" in m}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    n_left = 0
    for model, n_atoms, k, method in points(args):
        if (model, n_atoms, k, method) in done or (model, n_atoms, method) in too_large:
            continue
        if time.perf_counter() - began > 60.0 * args.minutes:
            n_left += 1
            continue
        job: dict[str, Any] = {"model": model, "n_atoms": n_atoms, "method": method, "round": k}
        how = {
            "precision": args.precision,
            "threads": args.threads,
            "seconds": args.seconds_per_point,
        }
        answer = in_a_process(job | how, args.limit)
        if "failed" in answer:
            too_large.add((model, n_atoms, method))
        measurements.append(job | answer)
        record["rows"] = summary(measurements)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print_table(record["rows"] or summary(measurements))
    print(f"{n_left} measurements left; written to {args.output}")
    if args.figure is not None:
        draw(summary(measurements), args.figure)


if __name__ == "__main__":
    main()
