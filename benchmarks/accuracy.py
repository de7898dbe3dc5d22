"""Errors and cost of HIP-NN with smooth invariants on published frames, three seeds each.

    python benchmarks/accuracy.py --data DATA --work students               # Mo, Si, Cu, W
    python benchmarks/accuracy.py --data DATA --work students --silicon RUN # and a run of distill

Molybdenum, silicon and copper of mlearn (Zuo et al., J. Phys. Chem. A 124, 731 (2020)), the
published split; tungsten labeled by MACE-MP, with its own validation frames. Of mlearn's training
frames a twentieth chooses the best epoch and is not trained on. Every model is trained with the
same settings. Errors are those of the test frames, which nothing was chosen on but these settings
and the numbers of triples and of radial functions: errors of training, validation and test frames
of all four, mostly of molybdenum and copper, seeds 0 and 1.

Cost is that of `pareto.py`: processor time per atom and step of NVE at 300 K through ASE's
calculator, neighbor lists included, of about 4,000 atoms on one thread, the least of `ROUNDS`, with
each instruction set that runs here.

Numbers are added to `--out`; a trained model in `--work` is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from pareto import ELEMENTS as CRYSTALS
from pareto import Worker, student, take_turns

from potstill.checkpoint import load_potential
from potstill.core import describe_core, instruction_sets
from potstill.evaluate.elastic import ElasticScan
from potstill.evaluate.errors import evaluate_errors
from potstill.evaluate.phonons import Phonons, PhononsEvaluation
from potstill.evaluate.tools import machine_description
from potstill.readers import read
from potstill.train import TrainingSet, TrainSettings, train

SEEDS, ROUNDS, SECONDS = (0, 1, 2), 7, 0.5

#: Settings of every training.
SETTINGS: dict[str, Any] = {
    "preset": "student",
    "score": {"weights": {"forces_rmse": 1.0, "energy_per_atom_rmse": 10.0}},
    "batch_size": 8,
    "epochs": 100,
}

#: Points of the front: hyper-parameters of HIP-NN beside the cutoff.
SIZES: dict[str, dict[str, int]] = {
    "l2": {"l_max": 2},
    "l3": {},
    "l4": {"l_max": 4},
    "l4-all": {"l_max": 4, "n_high_sensitivities": 10},
    "l4-24": {"l_max": 4, "n_triples": 24},
}

#: The size whose errors and cost are in the summary.
ACCURATE = "l4"

#: Files and cutoff (Å).
ELEMENTS: dict[str, dict[str, Any]] = {
    "Mo": {"set": "mlearn", "cutoff": 5.2},
    "Si": {"set": "mlearn", "cutoff": 5.2},
    "Cu": {"set": "mlearn", "cutoff": 5.2},
    "W": {"set": "w-mace", "cutoff": 5.2},
}


@cache
def load(element: str, data: Path) -> tuple[TrainingSet, TrainingSet, TrainingSet]:
    """Training, validation and test frames."""
    if ELEMENTS[element]["set"] == "w-mace":
        parts = [data / "w-mace" / f"{n}.xyz.gz" for n in ("training", "validation", "test")]
        return tuple(_read(file) for file in parts)  # type: ignore[return-value]
    frames, test = (
        _read(data / "mlearn" / f"{element}_{part}.extxyz.gz") for part in ("train", "test")
    )
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(1))
    held_out = len(frames) // 20
    return frames.select(order[held_out:]), frames.select(order[:held_out]), test


def _read(file: Path) -> TrainingSet:
    structures, labels = read(file)
    return TrainingSet(structures, {"reference": labels})


def trained(element: str, size: str, seed: int, data: Path, work: Path) -> Path:
    """The checkpoint of a training, which is run if it is not there."""
    folder = work / element / f"{size}-seed{seed}"
    if not (folder / "result.json").is_file():
        training, validation, _ = load(element, data)
        hyper = {"dist_hard_max": ELEMENTS[element]["cutoff"], **SIZES[size]}
        settings = SETTINGS | {
            "model": {"hyperparameters": hyper},
            "seed": seed,
        }
        train(TrainSettings.model_validate(settings), training, validation, folder)
    return folder / "best.pt"


def errors(file: Path, element: str, data: Path) -> dict[str, float]:
    """Force and energy RMSE on the test frames."""
    test = load(element, data)[2]
    found = evaluate_errors(load_potential(file)[0], test.structures, test.labels).own
    return {
        "force_rmse_eV_per_A": found["forces_rmse"],
        "energy_rmse_meV_per_atom": 1000.0 * found["energy_per_atom_rmse"],
    }


def costs(files: dict[str, Path], element: str) -> dict[str, dict[str, float]]:
    """Microseconds per atom and step by instruction set and size, taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.xyz"
        ase.io.write(start, CRYSTALS[element].crystal(), format="extxyz")
        kinds = [name for name, runs in instruction_sets().items() if runs]
        pairs = [(kind, size) for kind in kinds for size in files]
        peers = [student(f"{size} {kind}", [files[size]], kind) for kind, size in pairs]
        workers = [Worker(peer, Path(folder), Path(folder)) for peer in peers]
        measured = take_turns(workers, [start] * len(workers), SECONDS, ROUNDS)
    found: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for (kind, size), row in zip(pairs, measured, strict=True):
        found[kind][size] = row["us_per_atom"]["processor"]
    return found


def of_silicon(folder: Path) -> dict[str, Any]:
    """Numbers of the model that a run of `potstill distill` hands out, against its teacher."""
    name = json.loads((folder / "choice.json").read_text())["model"]
    read_json = {
        test: json.loads((folder / "evaluation" / f"{test}.json").read_text())
        for test in ("errors", "elastic", "phonons")
    }
    channel = read_json["errors"][name]["channels"][f"{name}-teacher"]
    ours, theirs = (ElasticScan.from_json(read_json["elastic"][n]) for n in (name, "teacher"))
    deviation = ours.deviation(theirs)
    waves = (Phonons.from_json(read_json["phonons"][n]) for n in (name, "teacher"))
    change = ours.largest_change()
    return {
        "si_relative_force_rmse_percent": 100.0 * channel["forces_relative_rmse"],
        "si_elastic_worst_percent": None if deviation is None else 100.0 * deviation.relative,
        "si_phonon_rmse_THz": PhononsEvaluation.against(*waves)["phonon_rmse"],
        "si_elastic_change_from_0.002_to_0.01_percent": change and 100.0 * change.relative,
        "si_model": name,
        "si_command": "make distill",
    }


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("students"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy.json"))
    parser.add_argument("--elements", nargs="*", default=list(ELEMENTS), choices=list(ELEMENTS))
    parser.add_argument("--silicon", type=Path, help="folder of a run of `potstill distill`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for element in options.elements:
        found = {}
        for size in SIZES:
            files = [trained(element, size, s, options.data, options.work) for s in SEEDS]
            by_seed = [errors(file, element, options.data) for file in files]
            mean = {key: statistics.mean(e[key] for e in by_seed) for key in by_seed[0]}
            spread = {f"{k}_std": float(np.std([e[k] for e in by_seed], ddof=1)) for k in mean}
            found[size] = mean | spread | {"seeds": by_seed}
            found[size]["n_parameters"] = load_potential(files[0])[0].n_parameters
            print(element, size, mean, flush=True)
        firsts = {s: options.work / element / f"{s}-seed{SEEDS[0]}" / "best.pt" for s in SIZES}
        for instructions, times in costs(firsts, element).items():
            for size, microseconds in times.items():
                found[size].setdefault("us_per_atom_step", {})[instructions] = microseconds
        results.setdefault("elements", {})[element] = found
        _write(options.out, results)
    if options.silicon is not None:
        results.setdefault("summary", {}).update(of_silicon(options.silicon))
    _write(options.out, results)


def _write(file: Path, results: dict[str, Any]) -> None:
    results |= {
        "machine": machine_description(),
        "core": describe_core(),
        "command": "python benchmarks/accuracy.py --data DATA --work FOLDER",
        "settings": SETTINGS | {"sizes": SIZES, "elements": ELEMENTS},
    }
    elements = results.get("elements", {})
    summary = results.setdefault("summary", {})
    for element in ("W", "Mo"):
        if element in elements:
            best = elements[element][ACCURATE]
            key, scale = element.lower(), 1000.0 if element == "W" else 1.0
            unit = "meV_per_A" if element == "W" else "eV_per_A"
            summary[f"{key}_force_rmse_{unit}"] = scale * best["force_rmse_eV_per_A"]
            summary[f"{key}_energy_rmse_meV_per_atom"] = best["energy_rmse_meV_per_atom"]
            summary[f"{key}_us_per_atom_step"] = best["us_per_atom_step"]["avx2"]
            summary[f"{key}_instruction_set"] = "avx2"
            summary[f"{key}_size"] = ACCURATE
            summary[f"{key}_command"] = results["command"]
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
