"""ANI trained to energies alone and to energies and forces: the shape of Table I of Smith et al.

For each set of the config, a group of networks learns energies only, on descriptors that are
computed once and shared, and some networks learn energies and forces; both start from Adam with the
same schedule and are judged on the same held-out configurations, each network by itself and all of
a kind together as an ensemble.

    python ani_table1.py ani_table1.yaml --runs runs/ani_table1 --out results/ani_table1.json

Interrupted, the same command goes on: finished networks are not trained again, and a network that
learns forces continues where it was. `--tiny` trains two epochs on a few configurations, `--only`
takes one set of the config and leaves the others' results in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from potstill.checkpoint import load_potential, save_potential
from potstill.config import load_config
from potstill.distill import LossTerm
from potstill.errors import ConfigError, PotstillError
from potstill.evaluate.tools import machine_description
from potstill.experiments.run import property_errors
from potstill.experiments.spec import HeldOutSet
from potstill.files import write_atomically
from potstill.models import ANI, Edges, SpeciesOffsets, SumPotential
from potstill.neighbors import pair_vectors
from potstill.structures import Structures
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.data import fit_offsets
from potstill.train.mixing import mixed_batches
from potstill.train.settings import EnergySettings, ModelSettings, ScoreSettings
from potstill.train.state import versions
from potstill.units import ENERGY
from potstill.workflows.data import share_of_groups

DESCRIPTOR_ATOMS = 512  # per batch, while descriptors are computed


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SetConfig(_Strict):
    """One set of structures and the networks for it.

    Parameters
    ----------
    train : str
        A structure file or a labelled store.
    test : str, optional
        Another one; without it, configurations of `train` that are not trained on.
    source : str
        Labels to learn.
    n_train, n_test : int
        Configurations to use, drawn with `split_seed`; validation comes on top of neither.
    max_atoms : int, optional
        Leave out larger configurations of `train`.
    split_seed : int
        Of the draw.
    energy_zero : float, optional
        Same constant for all atoms, eV; a least-squares fit by species if absent.
    hyperparameters : dict
        Of `ANI`, without `n_members`.
    """

    train: str
    test: str | None = None
    source: str = "reference"
    n_train: int = Field(default=300, ge=2)
    n_test: int = Field(default=300, ge=1)
    max_atoms: int | None = None
    split_seed: int = 0
    energy_zero: float | None = None
    hyperparameters: dict[str, Any]


class Table1Config(_Strict):
    """The whole table.

    Parameters
    ----------
    sets : dict of str to SetConfig
        By name.
    energy_members, force_members : int
        Networks that learn energies only, and energies and forces.
    w_forces : float
        Weight of the force term beside that of the energy, 1.
    validation_fraction : float
        Share of the training configurations that chooses the best epoch.
    common : TrainSettings
        Epochs, batches, optimizer and schedule of all networks.
    """

    sets: dict[str, SetConfig]
    energy_members: int = Field(default=8, ge=1)
    force_members: int = Field(default=3, ge=1)
    w_forces: float = Field(default=10.0, gt=0)
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    common: TrainSettings = Field(default_factory=TrainSettings)


# -- energies only -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """Descriptors and energies of a training set."""

    structures: Structures
    aev: Tensor
    energy: Tensor

    @classmethod
    def of(cls, network: ANI, data: TrainingSet, source: str) -> Described:
        """(N, aev_width) environment vectors, computed once without gradients."""
        blocks = []
        data = data.with_neighbors(network.cutoff)
        with torch.no_grad():
            for systems in data.structures.batches(DESCRIPTOR_ATOMS):
                part = data.batch(systems)
                edges = Edges(part.neighbors.center, part.neighbors.neighbor)
                r_ij = pair_vectors(part.structures, part.neighbors)
                species, n_atoms = part.structures.species, part.structures.n_atoms
                blocks.append(network.aev(species, edges, r_ij, n_atoms))
        return cls(data.structures, torch.cat(blocks), data.labels[source]["energy"])

    def select(self, systems: Tensor) -> Described:
        """Some of the configurations."""
        wanted = torch.zeros(self.structures.n_systems, dtype=torch.bool)
        wanted[systems] = True
        # In ascending order: the loss does not depend on it.
        atoms = wanted[self.structures.system_index]
        part = self.structures.select(wanted)
        return Described(part, self.aev[atoms], self.energy[wanted])

    def member_energies(self, network: ANI) -> Tensor:
        """(S, n_members) eV, float64."""
        atomic = self.aev.new_zeros(len(self.aev), network.n_members)
        for s, mlp in enumerate(network.networks):
            atoms = (self.structures.species == s).nonzero()[:, 0]
            atomic = atomic.index_copy(0, atoms, mlp(self.aev[atoms])[-1])
        total = atomic.new_zeros(self.structures.n_systems, network.n_members).double()
        return total.index_add(0, self.structures.system_index, atomic.double())

    def losses(self, network: ANI) -> Tensor:
        """(n_members,) RMSE + MAE of the energies, eV."""
        difference = self.member_energies(network) - self.energy[:, None]
        return difference.square().mean(0).sqrt() + difference.abs().mean(0)


def train_on_energies(
    network: ANI, training: Described, validation: Described, settings: TrainSettings
) -> ANI:
    """Train all members side by side, each on its own loss; return each at its best epoch.

    Adam works parameter by parameter and the loss is the members' sum, so that every member is
    trained as if it were alone.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.optimizer.learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, settings.learning_rate.factor)
    best = torch.full((network.n_members,), torch.inf, dtype=torch.float64)
    weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
    for epoch in range(1, settings.epochs + 1):
        for systems in mixed_batches(training.structures, None, settings, epoch):
            penalty = sum(w.square().sum() for w in network.regularized_weights())
            loss = training.select(systems).losses(network).sum()
            loss = loss + settings.regularization.l2 * penalty
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            score = validation.losses(network)
        better = score < best
        best = torch.where(better, score, best)
        for name, value in network.state_dict().items():
            weights[name][better] = value[better]
    network.load_state_dict(weights)
    return network


# -- cells ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """What a set's networks are trained on, chosen by, and judged on."""

    training: TrainingSet
    validation: TrainingSet
    test: TrainingSet
    offsets: SpeciesOffsets


def load_set(path: str, source: str) -> TrainingSet:
    structures, labels = HeldOutSet.at(path).read(source)
    return TrainingSet(structures, {source: labels})


def load_split(config: Table1Config, name: str) -> Split:
    own = config.sets[name]
    data = load_set(own.train, own.source)
    if own.max_atoms is not None:
        small = data.structures.n_atoms_per_system <= own.max_atoms
        data = data.select(small.nonzero()[:, 0])
    generator = torch.Generator().manual_seed(own.split_seed)
    order = torch.randperm(len(data), generator=generator)
    if len(order) < own.n_train:
        raise ConfigError(f"{own.train} has {len(order)} configurations, fewer than n_train")
    if own.test is None:
        test = data.select(order[own.n_train : own.n_train + own.n_test])
    else:
        test = load_set(own.test, own.source)
        test = test.select(torch.arange(min(len(test), own.n_test)))
    if not len(test):
        raise ConfigError(f"{name} has no configurations left to test on")
    data = data.select(order[: own.n_train].sort().values)
    held_out = share_of_groups(data.structures, config.validation_fraction, own.split_seed)
    training, validation = (data.select(mask.nonzero()[:, 0]) for mask in (~held_out, held_out))
    table = data.structures.species_table
    if own.energy_zero is None:
        zero = fit_offsets(training.structures, training.labels[own.source]["energy"])[0]
    else:
        zero = torch.full((len(table),), own.energy_zero, dtype=torch.float64)
    return Split(training, validation, test, SpeciesOffsets(table, zero))


def energies_cell(config: Table1Config, name: str, split: Split, folder: Path) -> list[ANI]:
    """Networks that learn energies only."""
    own = config.sets[name]
    settings = config.common
    torch.manual_seed(settings.seed)
    network = ANI(
        split.training.structures.species_table,
        **own.hyperparameters,
        n_members=config.energy_members,
    ).to(getattr(torch, settings.precision))
    start = time.perf_counter()
    described = [
        Described.of(network, data.minus(split.offsets), own.source)
        for data in (split.training, split.validation)
    ]
    seconds = {"descriptors": time.perf_counter() - start}
    network = train_on_energies(network, *described, settings)
    seconds["total"] = time.perf_counter() - start
    potential = SumPotential({"offsets": split.offsets, "network": network})
    save_potential(folder / "potential.pt", potential, {"seconds": seconds})
    return [network.member(k) for k in range(network.n_members)]


def forces_cell(config: Table1Config, name: str, split: Split, folder: Path, seed: int) -> ANI:
    """One network that learns energies and forces."""
    own = config.sets[name]
    zero = dict(zip(split.offsets.species_table.names, split.offsets.offsets.tolist(), strict=True))
    settings = config.common.model_copy(
        update={
            "model": ModelSettings(kind="ani", hyperparameters=own.hyperparameters),
            "energy": EnergySettings(zero=zero),
            "loss": (
                LossTerm(property="energy", source=own.source),
                LossTerm(property="forces", source=own.source, weight=config.w_forces),
            ),
            "score": ScoreSettings(source=own.source),
            "seed": seed,
        }
    )
    result = train(settings, split.training, split.validation, folder)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    potential, info = load_potential(result.best)
    save_potential(
        folder / "potential.pt", potential, {**info, "seconds": {"total": result.seconds}}
    )
    network = potential["network"]
    assert isinstance(network, ANI)
    return network


def ensemble(members: list[ANI]) -> ANI:
    """Networks of the same shape as one model; the inverse of `ANI.member`."""
    first = members[0]
    joined = ANI(first.species_table, **(first.hyperparameters() | {"n_members": len(members)}))
    joined = joined.to(first.dtype)
    states = [member.state_dict() for member in members]
    joined.load_state_dict({k: torch.cat([s[k] for s in states]) for k in states[0]})
    return joined


def run_cell(config: Table1Config, name: str, kind: str, folder: Path, split: Split) -> None:
    """Train one kind of a set's networks, unless that is done, and write their errors."""
    file = folder / f"{name}-{kind}.json"
    if file.is_file():
        return
    if kind == "energies":
        members = energies_cell(config, name, split, made(folder / f"{name}-energies"))
        _, info = load_potential(folder / f"{name}-energies" / "potential.pt")
        seconds = info["seconds"]
    else:
        members, seconds = [], {"total": 0.0}
        for seed in range(config.force_members):
            own = made(folder / f"{name}-forces-{seed}")
            members.append(forces_cell(config, name, split, own, seed))
            _, info = load_potential(own / "potential.pt")
            seconds["total"] += info["seconds"]["total"]
    alone = [judge(split, member) for member in members]
    record = {
        "n_members": len(members),
        "n_parameters": members[0].n_parameters,
        "seconds": seconds,
        "members": alone,
        "ensemble": judge(split, ensemble(members)),
    }
    # So that ensembles of unequal size can be compared.
    record["ensemble_of_as_many"] = judge(split, ensemble(members[: config.force_members]))
    text = json.dumps(record, indent=1)
    write_atomically(file, text)


def judge(split: Split, network: ANI) -> dict[str, float]:
    """Errors on the test set, by the keys of `potstill.metrics`."""
    potential = SumPotential({"offsets": split.offsets, "network": network})
    (labels,) = split.test.labels.values()
    return property_errors(potential, split.test.structures, labels)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- the table -----------------------------------------------------------------------------------

KINDS = ("energies", "forces")


def summarize(config: Table1Config, name: str, folder: Path, split: Split) -> dict[str, Any]:
    """One column of the table, and what it rests on."""
    result: dict[str, Any] = {
        "n_train": len(split.training),
        "n_validation": len(split.validation),
        "n_test": len(split.test),
        "n_atoms_train": split.training.structures.n_atoms,
        "largest": int(split.training.structures.n_atoms_per_system.max()),
    }
    for kind in KINDS:
        record = json.loads((folder / f"{name}-{kind}.json").read_text())
        rows = {}
        for key in ("energy_per_atom_rmse", "energy_rmse", "forces_rmse"):
            values = [member[key] for member in record["members"]]
            rows[key] = {
                "mean": mean(values),
                "standard_deviation": stdev(values) if len(values) > 1 else None,
                "ensemble": record["ensemble"][key],
                "ensemble_of_as_many": record["ensemble_of_as_many"][key],
            }
        result[kind] = {k: record[k] for k in ("n_members", "n_parameters", "seconds")} | rows
    return result


def show(name: str, column: dict[str, Any]) -> None:
    """Print a set's part of the table in both units of the paper."""
    kcal = ENERGY["kcal/mol"]
    for kind in KINDS:
        energy, forces = column[kind]["energy_rmse"], column[kind]["forces_rmse"]
        per_atom = column[kind]["energy_per_atom_rmse"]
        print(
            f"{name:12s} {kind:9s} energy {1000 * per_atom['mean']:.2f} meV/atom, "
            f"{energy['mean'] / kcal:.2f} kcal/mol; forces {forces['mean']:.4f} eV/Å, "
            f"{forces['mean'] / kcal:.2f} kcal/mol/Å; ensemble "
            f"{1000 * per_atom['ensemble']:.2f} meV/atom, {forces['ensemble']:.4f} eV/Å"
        )


def tiny(config: Table1Config) -> Table1Config:
    """The same at a scale of seconds."""
    sets = {
        name: own.model_copy(update={"n_train": 10, "n_test": 4})
        for name, own in config.sets.items()
    }
    common = config.common.model_copy(update={"epochs": 2})
    changes = {"sets": sets, "energy_members": 3, "force_members": 2, "common": common}
    return config.model_copy(update=changes | {"validation_fraction": 0.3})


def claim(folder: Path, config: Table1Config) -> None:
    """Write the config into the folder, or check that the folder belongs to it."""
    file = made(folder) / "config.json"
    text = config.model_dump_json(indent=1)
    if file.is_file() and json.loads(file.read_text()) != json.loads(text):
        raise ConfigError(f"{folder} holds runs of another config: choose another folder")
    write_atomically(file, text)


def write_results(file: Path, config: Table1Config, columns: dict[str, Any]) -> None:
    """Write the sets of this run beside those of earlier runs with the same config."""
    made_by = {
        "command": " ".join(["python", "studies/force_gradient/ani_table1.py", *sys.argv[1:]]),
        "versions": versions(),
        "machine": machine_description(),
    }
    sets = {}
    if file.is_file():
        earlier = json.loads(file.read_text("utf-8"))
        # through the class, so that settings newer than the file take their defaults
        if Table1Config.model_validate(earlier["config"]) == config:
            sets = earlier["sets"]
    sets |= {name: column | made_by for name, column in columns.items()}
    own = json.loads(config.model_dump_json())
    results = {"study": "ani_table1", "config": own, "sets": sets}
    made(file.parent)
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--runs", type=Path, required=True, help="folder for the networks")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", help="one set of the config")
    parser.add_argument("--tiny", action="store_true", help="two epochs, a few configurations")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, Table1Config)
        config = tiny(config) if arguments.tiny else config
        if arguments.only is not None and arguments.only not in config.sets:
            raise ConfigError(f"the config has no set '{arguments.only}'")
        claim(arguments.runs, config)
        columns = {}
        for name in config.sets if arguments.only is None else [arguments.only]:
            split = load_split(config, name)
            for kind in KINDS:
                run_cell(config, name, kind, arguments.runs, split)
            columns[name] = summarize(config, name, arguments.runs, split)
            show(name, columns[name])
    except PotstillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    write_results(arguments.out, config, columns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
