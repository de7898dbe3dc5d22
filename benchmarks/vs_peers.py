"""Molecular dynamics and training to forces beside other packages, at the nearest size.

    for p in graph-pes mace-torch nequip torchani; do
        python -m venv peers/$p && peers/$p/bin/pip install $p
    done
    OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 \
        python benchmarks/vs_peers.py --environments peers --threads 2

These are different architectures, so the comparison is one of cost per atom, not of accuracy. All
see the same neighbors (aluminium, 7.5 Å, about 100) in float32 with one interaction layer of 24
channels, 10 radial functions and vectors where a package has them; ANI has the functions of ANI-Al
(7 and 5 Å) in potstill and in torchani. A step of dynamics is a call for forces through each
package's own ASE calculator with moving atoms and the neighbor list and skin that it keeps; a
training step is loss, gradient and Adam on a batch whose neighbor list is made beforehand. Nothing
is compiled ahead of time. Packages live in environments of their own, each in a process that waits
while others are timed; rounds alternate, medians go to `benchmarks/results/vs_peers.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import (
    ANI_AL,
    Step,
    Times,
    crystals,
    environment,
    in_words,
    labels,
    md_step,
    potstill_md,
    potstill_training,
    potstill_training_set,
    timed,
    us_per_atom,
)

RESULTS = Path(__file__).parent / "results" / "vs_peers.json"
CUTOFF, CHANNELS, RADIAL = 7.5, 24, 10
N_SYSTEMS, REPEAT = 16, 3

#: Energies (S,) and forces (N, 3) of the training batch, with a graph.
Predict = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def training_step(model: torch.nn.Module, predict: Predict) -> Step:
    """RMSE + MAE of energies and ten times that of forces, as in potstill's steps."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    wanted = labels(N_SYSTEMS, N_SYSTEMS * 4 * REPEAT**3)

    def error(difference: torch.Tensor) -> torch.Tensor:
        return difference.square().mean().sqrt() + difference.abs().mean()

    def step() -> None:
        energy, forces = predict()
        loss = error(energy.flatten() - wanted["energy"]) + 10.0 * error(forces - wanted["forces"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# -- competitors -----------------------------------------------------------------------------------


def potstill_steps(kind: str, repeat: int) -> dict[str, Step]:
    from potstill.models import build_model
    from potstill.species import SpeciesTable

    settings: dict[str, Any] = {
        "hipnn": {
            "n_features": CHANNELS,
            "n_sensitivities": RADIAL,
            "n_atom_layers": 2,
            "dist_soft_min": 1.9,
            "dist_soft_max": CUTOFF - 0.5,
            "dist_hard_max": CUTOFF,
            "l_max": 1,
        },
        "ani": ANI_AL,
    }

    def network() -> Any:
        torch.manual_seed(0)
        return build_model(kind, SpeciesTable.from_symbols(["Al"]), settings[kind]).float()

    return {
        "training": potstill_training(network(), potstill_training_set(N_SYSTEMS, REPEAT)),
        "md": potstill_md(network(), repeat),
    }


def graph_pes_steps(kind: str, repeat: int) -> dict[str, Step]:
    from graph_pes import AtomicGraph
    from graph_pes.atomic_graph import to_batch
    from graph_pes.models import PaiNN, SchNet

    def model() -> Any:
        if kind == "schnet":
            return SchNet(
                cutoff=CUTOFF, channels=CHANNELS, expansion_features=RADIAL, layers=1
            ).float()
        return PaiNN(cutoff=CUTOFF, channels=CHANNELS, radial_features=RADIAL, layers=1).float()

    frames = crystals(N_SYSTEMS, REPEAT)
    batch = to_batch([AtomicGraph.from_ase(atoms, CUTOFF) for atoms in frames])
    network = model().train()

    def predict() -> tuple[torch.Tensor, torch.Tensor]:
        found = network.predict(batch, ["energy", "forces"])
        return found["energy"], found["forces"]

    (atoms,) = crystals(1, repeat)
    atoms.calc = model().ase_calculator()
    return {"training": training_step(network, predict), "md": md_step(atoms)}


def mace_steps(kind: str, repeat: int) -> dict[str, Step]:
    import numpy as np
    from mace import data, modules  # before e3nn, for which it sets torch.load
    from mace.calculators import MACECalculator
    from mace.tools import AtomicNumberTable, torch_geometric

    from e3nn import o3  # isort: skip

    def model() -> Any:
        return modules.ScaleShiftMACE(
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
            r_max=CUTOFF,
            num_bessel=RADIAL,
            num_polynomial_cutoff=5,
            max_ell=1,
            interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
            num_interactions=1,
            num_elements=1,
            hidden_irreps=o3.Irreps(f"{CHANNELS}x0e + {CHANNELS}x1o"),
            MLP_irreps=o3.Irreps("16x0e"),
            radial_MLP=[CHANNELS],
            atomic_energies=np.zeros(1),
            avg_num_neighbors=100.0,
            atomic_numbers=[13],
            correlation=2,
            gate=torch.nn.functional.silu,
        ).float()

    torch.set_default_dtype(torch.float32)
    table = AtomicNumberTable([13])
    graphs = [
        data.AtomicData.from_config(data.config_from_atoms(atoms), z_table=table, cutoff=CUTOFF)
        for atoms in crystals(N_SYSTEMS, REPEAT)
    ]
    loader = torch_geometric.dataloader.DataLoader(graphs, batch_size=N_SYSTEMS, shuffle=False)
    batch = next(iter(loader)).to_dict()
    network = model()

    def predict() -> tuple[torch.Tensor, torch.Tensor]:
        found = network(dict(batch), training=True, compute_force=True)
        return found["energy"], found["forces"]

    (atoms,) = crystals(1, repeat)
    atoms.calc = MACECalculator(models=[model()], device="cpu", default_dtype="float32")
    return {"training": training_step(network, predict), "md": md_step(atoms)}


def nequip_steps(kind: str, repeat: int) -> dict[str, Step]:
    from nequip.data import AtomicDataDict, from_ase
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()

    def model() -> Any:
        return NequIPGNNModel(
            seed=0,
            model_dtype="float32",
            r_max=CUTOFF,
            type_names=["Al"],
            num_layers=1,
            l_max=1,
            parity=False,
            num_features=CHANNELS,
            num_bessels=RADIAL,
            radial_mlp_depth=1,
            radial_mlp_width=CHANNELS,
            avg_num_neighbors=100.0,
        )

    transforms = basic_transforms({}, CUTOFF, ["Al"], {"Al": "Al"})

    def prepared(atoms: Any) -> Any:
        found = from_ase(atoms)
        for transform in transforms:
            found = transform(found)
        return found

    batch = AtomicDataDict.batched_from_list([prepared(a) for a in crystals(N_SYSTEMS, REPEAT)])
    network = model().train()

    def predict() -> tuple[torch.Tensor, torch.Tensor]:
        found = network(dict(batch))
        return found["total_energy"], found["forces"]

    (atoms,) = crystals(1, repeat)
    atoms.calc = NequIPCalculator(model().eval(), device="cpu", transforms=transforms)
    return {"training": training_step(network, predict), "md": md_step(atoms)}


def torchani_steps(kind: str, repeat: int) -> dict[str, Step]:
    from torchani.aev import ANIAngular, ANIRadial
    from torchani.arch import Assembler
    from torchani.nn import ANINetworks, AtomicNetwork

    class Networks(ANINetworks):
        @classmethod
        def small(cls, symbols: Any, in_dim: int, **_: Any) -> Networks:
            widths = (in_dim, *ANI_AL["hidden_widths"], 1)
            return cls({s: AtomicNetwork(widths, activation="celu", bias=True) for s in symbols})

    def model(neighbor_list: str) -> Any:
        assembler = Assembler()
        assembler.set_symbols(["Al"])
        assembler.set_zeros_as_self_energies()
        assembler.set_global_cutoff_fn("cosine")
        angular = ANIAngular(
            ANI_AL["eta_a"],
            ANI_AL["zeta"],
            ANI_AL["shifts_a"],
            ANI_AL["shifts_z"],
            cutoff=ANI_AL["angular_cutoff"],
        )
        radial = ANIRadial(ANI_AL["eta_r"], ANI_AL["shifts_r"], cutoff=ANI_AL["radial_cutoff"])
        assembler.set_aev_computer(angular=angular, radial=radial)
        assembler.set_atomic_networks(cls=Networks, ctor="small")
        assembler.set_neighborlist(neighbor_list)
        return assembler.assemble().float()

    # One periodic system at a time has a list: the batch is one system of pairs listed beforehand.
    network = model("all_pairs")
    frames = crystals(N_SYSTEMS, REPEAT)
    n_atoms = len(frames[0])
    pairs, shifts, places = [], [], []
    for k, atoms in enumerate(frames):
        atoms.wrap()
        cell = torch.tensor(atoms.cell.array, dtype=torch.float32)
        here = torch.tensor(atoms.positions, dtype=torch.float32)
        found = network.neighborlist(
            7.0, torch.zeros(1, n_atoms, dtype=torch.long), here[None], cell, torch.ones(3) > 0
        )
        first, second = found.indices
        pairs.append(found.indices + k * n_atoms)
        shifts.append(found.diff_vectors - (here[first] - here[second]))
        places.append(here)
    indices, shift = torch.cat(pairs, dim=1), torch.cat(shifts)
    positions = torch.cat(places)[None].requires_grad_(True)
    species = torch.full((1, N_SYSTEMS * n_atoms), 13)

    def predict() -> tuple[torch.Tensor, torch.Tensor]:
        atomic = network.compute_from_external_neighbors(
            species, positions, indices, shift, atomic=True
        ).energies
        (slope,) = torch.autograd.grad(atomic.sum(), positions, create_graph=True)
        return atomic.view(N_SYSTEMS, n_atoms).sum(dim=1), -slope[0]

    (atoms,) = crystals(1, repeat)
    atoms.calc = model("verlet_cell_list").ase()
    return {"training": training_step(network, predict), "md": md_step(atoms)}


#: Name: environment (the package to install; potstill's is this one), what makes its steps.
COMPETITORS: dict[str, tuple[str, Callable[[str, int], dict[str, Step]], str]] = {
    "potstill HIP-NN": ("potstill", potstill_steps, "hipnn"),
    "graph-pes SchNet": ("graph-pes", graph_pes_steps, "schnet"),
    "graph-pes PaiNN": ("graph-pes", graph_pes_steps, "painn"),
    "MACE": ("mace-torch", mace_steps, "mace"),
    "NequIP": ("nequip", nequip_steps, "nequip"),
    "potstill ANI": ("potstill", potstill_steps, "ani"),
    "torchani ANI": ("torchani", torchani_steps, "ani"),
}


# -- timing ----------------------------------------------------------------------------------------


def worker(name: str, threads: int, repeat: int) -> None:
    """Answer requests `what seconds` on standard input, one line of JSON each."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print goes elsewhere
    torch.set_num_threads(threads)
    package, make, kind = COMPETITORS[name]
    steps = make(kind, repeat)
    for line in sys.stdin:
        what, seconds = line.split()
        steps[what]()  # pages are mapped anew, compiled parts are ready
        found = {"times": timed(steps[what], float(seconds)), "version": version(package)}
        ctypes.CDLL(None).malloc_trim(0)  # others need the memory
        print(json.dumps(found), file=answers, flush=True)


class Competitor:
    """A process in its own environment that waits for requests."""

    def __init__(self, name: str, python: str, args: argparse.Namespace) -> None:
        self.name, self.version = name, ""
        command = [python, __file__, "--worker", name, "--threads", str(args.threads)]
        command += ["--repeat", str(args.repeat)]
        pipe = subprocess.PIPE
        self._log = Path(tempfile.mkstemp(suffix=".log")[1])
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log.open("w"), text=True, bufsize=1
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout

    def ask(self, what: str, seconds: float) -> Times:
        """Times over about so many seconds."""
        try:
            print(what, seconds, file=self._requests, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.name} does not run {what}: see {self._log}")
        found = json.loads(line)
        self.version = found["version"]
        return Times(*found["times"])

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._process.wait()
        self._log.unlink()


def interpreters(args: argparse.Namespace) -> dict[str, str]:
    """The Python of each competitor that has one."""
    found = {}
    for name in args.competitors:
        package = COMPETITORS[name][0]
        path = args.environments / package / "bin" / "python"
        if package == "potstill":
            found[name] = sys.executable
        elif path.exists():
            found[name] = str(path.absolute())
        else:
            print(f"{name} is left out: {path} is not there")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, default=Path("peers"))
    parser.add_argument("--competitors", nargs="+", default=list(COMPETITORS), choices=COMPETITORS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per round and competitor")
    parser.add_argument("--repeat", type=int, default=10, help="cells along an edge in MD")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--steps", nargs="+", default=["training", "md"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.threads, args.repeat)
        return
    from potstill.core import describe_core
    from potstill.evaluate.tools import machine_description

    torch.set_num_threads(args.threads)
    competitors = [Competitor(*item, args) for item in interpreters(args).items()]
    sizes = {"training": N_SYSTEMS * 4 * REPEAT**3, "md": 4 * args.repeat**3}
    record = json.loads(args.output.read_text()) if args.output.exists() else {}
    for what in args.steps:
        n_atoms = sizes[what]
        times: dict[str, list[Times]] = {competitor.name: [] for competitor in competitors}
        for competitor in competitors:
            competitor.ask(what, 0.0)
        for _ in range(args.rounds):
            for competitor in competitors:
                times[competitor.name].append(competitor.ask(what, args.seconds))
        record[what] = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine_description(),
            "core": describe_core(),
            "threads": args.threads,
            "environment": environment(),
            "versions": {competitor.name: competitor.version for competitor in competitors},
            "n_atoms": n_atoms,
            "us_per_atom": {name: us_per_atom(found, n_atoms) for name, found in times.items()},
        }
        print(f"{what}, {n_atoms} atoms")
        for name, row in record[what]["us_per_atom"].items():
            print(f"  {name:20s} {in_words(row)}")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    for competitor in competitors:
        competitor.close()
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
