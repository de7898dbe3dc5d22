"""Size and speed of a student's file beside its control's: what distilling features leaves behind.

    python benchmarks/distilled_speed.py --threads 1

For each of PaiNN, SchNet, HIP-NN and GemNet-OC-small a control and a student are trained for a few
steps; the student's loss has the heaviest terms on features that its taps allow. Then `best.pt` of
both is read back. Files are compared by their tensors and bytes, and predictions of energies and
forces and steps of ASE's dynamics take turns: control, student, and the control's file once more,
whose ratio to the control says what noise makes. All move along the same path, so that neighbor
lists are built equally often. Without any noise, the operations that torch is asked for are listed
and compared. Numbers go to `benchmarks/results/distilled_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    STUDENT,
    Step,
    Times,
    crystals,
    environment,
    md_step,
    potstill_training_set,
    timed,
)
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential, read_payload
from potstill.evaluate.tools import machine_description
from potstill.models import build_model
from potstill.models.gemnet_oc import PRESETS
from potstill.structures import Structures
from potstill.teachers import PotentialTeacher, TeacherInfo
from potstill.train import TrainSettings, train

RESULTS = Path(__file__).parent / "results" / "distilled_speed.json"

#: Kind, the student's hyper-parameters, what its teacher of the same kind has more of, and the
#: lines that distil it. Heads are MLPs where they may be: not of vectors.
MODELS: dict[str, dict[str, Any]] = {
    "PaiNN": {
        "kind": "painn",
        "student": {},
        "teacher": {"hidden_channels": 192},
        "lines": [
            {"distill": "n2n", "student_transform": "mlp", "teacher_transform": "mlp"},
            {"distill": "v2v", "student_transform": "linear", "teacher_transform": "linear"},
        ],
    },
    "SchNet": {
        "kind": "schnet",
        "student": {},
        "teacher": {"hidden_channels": 192, "num_filters": 192},
        "lines": [
            {"distill": "n2n", "student_transform": "mlp", "teacher_transform": "mlp"},
            {"distill": "e2e", "student_transform": "mlp", "teacher_transform": "mlp"},
        ],
    },
    "HIP-NN": {
        "kind": "hipnn",
        "student": STUDENT,
        "teacher": {"n_features": 48},
        "lines": [
            {
                "distill": "n2n",
                "student_tap": "interaction_0+block_0",
                "student_transform": "mlp",
                "teacher_transform": "mlp",
            },
        ],
    },
    "GemNet-OC-small": {
        "kind": "gemnet_oc",
        "student": PRESETS["gemnet_oc_small"],
        "teacher": {"num_blocks": 1, "emb_size_edge": 320},
        "lines": [
            {"distill": "n2n", "student_transform": "mlp", "teacher_transform": "mlp"},
            {"distill": "e2e", "student_transform": "mlp", "teacher_transform": "mlp"},
        ],
    },
}

CONTROL, DISTILLED, AGAIN = "control", "student", "control again"

#: Structures are of 4 repeat^3 atoms, and so many are predicted at a time.
REPEAT = 2
PREDICTED = {"PaiNN": 4, "SchNet": 4, "HIP-NN": 4, "GemNet-OC-small": 1}


def trained(name: str, folder: Path) -> dict[str, Path]:
    """Files of control and student after a few steps on small cells."""
    model = MODELS[name]
    data = potstill_training_set(2, repeat=1)
    torch.manual_seed(1)
    wider = build_model(
        model["kind"], data.structures.species_table, {**model["student"], **model["teacher"]}
    )
    teacher = PotentialTeacher(wider.eval(), TeacherInfo("teacher", "untrained"))
    reference: list[dict[str, Any]] = [{"property": "energy"}, {"property": "forces"}]
    distilled = [{"source": "teacher", **line} for line in model["lines"]]
    files = {}
    for who, loss in {CONTROL: reference, DISTILLED: reference + distilled}.items():
        settings = TrainSettings(
            model={"kind": model["kind"], "hyperparameters": model["student"]},
            loss=loss,
            epochs=2,
            batch_size=1,
            optimizer={"learning_rate": 1e-5},
            early_stopping=None,
        )
        files[who] = train(settings, data, data, folder / who, teachers={"teacher": teacher}).best
    return files


class Operations(TorchDispatchMode):
    """Writes down what torch is asked for, with shapes; native kernels are seen from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else type(a) for a in args]
        self.listed.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))


def compared_files(files: dict[str, Path]) -> dict[str, Any]:
    """Bytes, parameters, tensors and operations of both files."""
    found, states, tensors, keys, operations = {}, {}, {}, {}, {}
    for who, path in files.items():
        payload = read_payload(path)
        header = json.loads(payload["header"])
        state = states[who] = payload["state"]
        tensors[who] = {k: (list(v.shape), str(v.dtype)) for k, v in state.items()}
        keys[who] = (sorted(payload), sorted(header), sorted(header["info"]))
        predict = prediction(path, 1)
        with Operations() as seen:
            predict()
        operations[who] = seen.listed
        found[who] = {
            "bytes": path.stat().st_size,
            "bytes of settings and history": len(payload["header"].encode()),
            "bytes of tensors": sum(v.numel() * v.element_size() for v in state.values()),
            "tensors": len(state),
            "parameters": sum(p.numel() for p in load_potential(path)[0].parameters()),
            "tensors of heads in last.pt": len(
                read_payload(path.with_name("last.pt")).get("heads", {})
            ),
        }
    return found | {
        "same tensors": tensors[CONTROL] == tensors[DISTILLED],
        "same weights": all(
            torch.equal(*(states[who][k] for who in files)) for k in tensors[CONTROL]
        ),
        "same keys": keys[CONTROL] == keys[DISTILLED],
        "same operations": operations[CONTROL] == operations[DISTILLED],
        "operations": len(operations[DISTILLED]),
        "list of tensors": tensors[DISTILLED],
    }


def prediction(path: Path, n_structures: int) -> Step:
    """Energies and forces of several structures, neighbor lists included."""
    potential, _ = load_potential(path)
    structures = Structures.from_ase(crystals(n_structures, REPEAT))
    return lambda: potential.predict(structures)


def dynamics(path: Path) -> Step:
    """A step of molecular dynamics through ASE."""
    (atoms,) = crystals(1, REPEAT)
    atoms.calc = PotstillCalculator(path)
    return md_step(atoms)


def taking_turns(steps: dict[str, Step], rounds: int, seconds: float) -> dict[str, list[Times]]:
    """Times of all in every round; who comes first changes from round to round."""
    for step in steps.values():
        step()
    times: dict[str, list[Times]] = {name: [] for name in steps}
    names = list(steps)
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(steps[name], seconds))
    return times


def in_numbers(times: dict[str, list[Times]], per: int) -> dict[str, Any]:
    """Medians in ms for one of `per` structures, and ratios to the control round by round."""
    result: dict[str, Any] = {"rounds": len(times[CONTROL])}
    for clock in Times._fields:
        values = {who: np.array([getattr(t, clock) for t in rows]) for who, rows in times.items()}
        result[clock] = {who: 1e3 * float(np.median(v)) / per for who, v in values.items()}
        result[f"{clock} ratio"] = {
            who: {
                "median": float(np.median(values[who] / values[CONTROL])),
                "quartiles": np.quantile(values[who] / values[CONTROL], (0.25, 0.75)).tolist(),
            }
            for who in (DISTILLED, AGAIN)
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.15, help="of a turn, at least one step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "machine": machine_description(),
        "environment": environment(),
        "threads": options.threads,
        "atoms": 4 * REPEAT**3,
        "models": {},
    }
    for name in options.models:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            files = trained(name, Path(folder))
            row: dict[str, Any] = {"lines": MODELS[name]["lines"], "file": compared_files(files)}
            contestants = {**files, AGAIN: files[CONTROL]}
            for task in ("prediction", "dynamics"):
                many = PREDICTED[name] if task == "prediction" else 1
                steps = {
                    who: prediction(path, many) if task == "prediction" else dynamics(path)
                    for who, path in contestants.items()
                }
                row[task] = in_numbers(taking_turns(steps, options.rounds, options.seconds), many)
                print(f"  {task}: {json.dumps(row[task])}", flush=True)
        result["models"][name] = row
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
