r"""Noise of mapped forces, and errors of models, against measured mean forces (`mean_forces`).

python studies/coarse_graining/mean_force_table.py collect RUNS mean_forces.zarr --out noise.json
python studies/coarse_graining/mean_force_table.py table mean_forces.zarr \
    --model "one teacher=t0/best.pt" --model "ensemble=t0/best.pt,t1/best.pt" --out table.json

The mean over runs, F + e, has an error e whose variance s² follows from the scatter between runs.
For a model that has not seen these frames e is independent of its error, so that

    RMSE² against F = RMSE² against F + e - s².

The raw label is of the same orientations as the run from the frame, so that it is compared with the
heated runs alone. Error bars of the table are standard deviations over bootstrap samples of the
configurations. Give frames that no model was trained on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from mean_forces import DISCARDED, STEP, TEMPERATURE

from potstill.evaluate.tools import machine_description
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers.committee import CommitteeTeacher
from potstill.teachers.potential import PotentialTeacher
from potstill.train.state import versions

#: Residues of the trajectory, and names of their beads as in reline.yaml.
BEADS = {"CHOL": "choline", "Cl": "chloride", "UREA": "urea"}

#: Label sets of the store: means over all runs, over the run from the frame, over heated runs.
ALL, OWN, HEATED = "mean_forces", "from_frame", "from_heated"

#: Blocks (ps) for the error of one run, and lags (ps) at which the correlation is given.
BLOCK, LAGS = 4.0, (0.04, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

N_BOOTSTRAP = 1000

app = typer.Typer(no_args_is_help=True)


def load_runs(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Finished runs by frame: what the file holds, and means over the part that counts.

    The first run of a frame starts from the frame itself, the others are heated; frames without any
    of the latter are left out.
    """
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(folder.glob("frame*_run?.npz")):
        with np.load(file) as data:
            run = {name: data[name] for name in data.files}
        start = DISCARDED[min(int(run["repeat"]), 1)]
        run["kept"] = run["forces"][run["times"] >= start].astype(float)
        run["mean"] = run["kept"].mean(0)
        run["constraint_mean"] = run["constraint"][run["constraint_times"] > start].mean(0)
        run["energy"] = run["energies"][run["energies"][:, 0] >= start, 1].mean()
        found[int(run["frame"])].append(run)
    return {frame: runs for frame, runs in found.items() if len(runs) > 1}


def autocorrelation(series: np.ndarray) -> np.ndarray:
    """(T,) mean over columns of the normalized autocorrelation of (T, n) values."""
    x = series - series.mean(0)
    power = np.abs(np.fft.rfft(x, n=2 * len(x), axis=0)) ** 2
    c = np.fft.irfft(power, axis=0)[: len(x)].mean(1) / np.arange(len(x), 0, -1)
    return c / c[0]


def statistics(runs: dict[int, list[dict[str, Any]]], of: np.ndarray) -> dict[str, Any]:
    """Noise of the label and errors of the mean, eV/Å per component, for the beads of one kind."""
    every = [run for own in runs.values() for run in own]
    spacing = float(every[0]["times"][1] - every[0]["times"][0])
    within = np.mean([run["kept"][:, of].var(0).mean() for run in every])
    per_block = round(BLOCK / spacing)
    block_errors = []
    for run in every:
        n = len(run["kept"]) // per_block
        blocks = run["kept"][: n * per_block, of].reshape(n, per_block, -1).mean(1)
        block_errors.append(blocks.var(0, ddof=1).mean() / n)
    means = [np.array([run["mean"][of] for run in own]) for own in runs.values()]
    between = np.mean([of_frame.var(0, ddof=1) for of_frame in means])
    # What the runs differ by beyond their own errors: their orientations and shapes.
    states = max(0.0, between - np.mean(block_errors))
    correlation = np.mean(
        [
            autocorrelation(own[0]["kept"][:, of].reshape(len(own[0]["kept"]), -1))
            for own in runs.values()
        ],
        axis=0,
    )
    halves = [np.array_split(run["kept"][:, of], 2) for run in every]
    drift = np.mean([(a.mean(0) - b.mean(0)) ** 2 for a, b in halves])
    opposite = [run["mean"][of] + run["constraint_mean"][of] for run in every]
    return {
        "mean_force": float(np.std([of_frame.mean(0) for of_frame in means])),
        "label_noise": float(np.sqrt(within + states)),
        "noise_within_runs": float(np.sqrt(within)),
        "noise_between_runs": float(np.sqrt(between)),
        "noise_of_states": float(np.sqrt(states)),
        "error_of_one_run_by_blocks": float(np.sqrt(np.mean(block_errors))),
        "difference_of_halves": float(np.sqrt(drift)),
        "error_of_the_mean": float(np.sqrt(between * np.mean([1 / len(x) for x in means]))),
        "with_force_of_constraint": float(np.sqrt(np.mean(np.square(opposite)))),
        "autocorrelation": {str(t): float(correlation[round(t / spacing)]) for t in LAGS},
    }


def run_facts(found: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """What was run, and how far heated molecules are from where those of the frame are."""
    every = [run for own in found.values() for run in own]
    turned: dict[str, list[np.ndarray]] = defaultdict(list)
    for own in found.values():
        for run in own:
            cosines = (run["axes"][-1] * own[0]["axes"][0]).sum(-1)
            for kind in ("CHOL", "UREA"):
                name = f"{BEADS[kind]}, {'heated' if run['repeat'] else 'from the frame'}"
                turned[name].append(cosines[run["molecules"] == kind])
    gained = [np.mean([r["energy"] for r in own[1:]]) - own[0]["energy"] for own in found.values()]
    return {
        "runs": {str(frame): len(own) for frame, own in found.items()},
        "total_ps": float(sum(run["times"][-1] for run in every)),
        "time_step_ps": STEP,
        "largest_displacement_of_a_center_A": float(max(run["moved"] for run in every)),
        "energy_heated_minus_frame_kJ_per_mol": {
            "mean": float(np.mean(gained)),
            "error": float(np.std(gained, ddof=1) / np.sqrt(len(gained))),
        },
        "cosine_of_turning": {name: float(np.mean(values)) for name, values in turned.items()},
        "share_turned_beyond_60_degrees": {
            name: float(np.mean(np.array(values) < 0.5)) for name, values in turned.items()
        },
        "ns_per_day": [float(run["performance"]) for run in every],
    }


@app.command()
def collect(
    runs: Annotated[Path, typer.Argument(help="folder of mean_forces.py")],
    store: Annotated[Path, typer.Argument(help="labeled store to write")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the noise")] = None,
) -> None:
    """Average the runs; write a store of beads with raw labels and mean forces, and the noise."""
    found = load_runs(runs)
    first = next(iter(found.values()))[0]
    names = np.array([BEADS[name] for name in first["molecules"]])
    masses = {name: float(first["masses"][names == name][0]) for name in BEADS.values()}
    table = SpeciesTable(tuple(Species(name, mass, None) for name, mass in masses.items()))
    n = len(names)
    structures = Structures(
        positions=torch.tensor(np.concatenate([own[0]["centers"] for own in found.values()])),
        species=torch.tensor([table.index(str(name)) for name in names]).repeat(len(found)),
        system_index=torch.arange(len(found)).repeat_interleave(n),
        cell=torch.stack([torch.diag(torch.tensor(o[0]["cell"]).double()) for o in found.values()]),
        pbc=torch.ones(len(found), 3, dtype=torch.bool),
        species_table=table,
        frame_id=tuple(f"reline_425K.trr:{frame}" for frame in found),
    )
    noise = {name: statistics(found, names == name) for name in table.names}
    between = np.array([noise[name]["noise_between_runs"] for name in names])[:, None]
    written = LabeledStore.create(store, table, {"temperature": TEMPERATURE})
    raw = [own[0]["raw"] for own in found.values()]
    written.append(structures, _labels(raw))
    for source, pick in ((ALL, slice(None)), (OWN, slice(1)), (HEATED, slice(1, None))):
        picked = [own[pick] for own in found.values()]
        means = [np.mean([run["mean"] for run in some], axis=0) for some in picked]
        errors = [np.broadcast_to(between / np.sqrt(len(some)), (n, 3)) for some in picked]
        info = {"fingerprint": source, "properties": ["forces", "forces_std"]}
        written.begin_labels(source, info)
        written.write_labels(source, 0, _labels(means, errors), structures, [])
    facts = {
        "command": "python studies/coarse_graining/mean_force_table.py collect RUNS STORE",
        "machine": machine_description(),
        "versions": versions() | {"gromacs": str(first["version"])},
        **run_facts(found),
        "eV_per_A": noise,
    }
    text = json.dumps(facts, indent=1)
    typer.echo(text)
    if out is not None:
        out.write_text(text + "\n")


def _labels(forces: list[np.ndarray], spread: list[np.ndarray] | None = None) -> Properties:
    values = {"forces": torch.tensor(np.concatenate(forces))}
    if spread is not None:
        values["forces_std"] = torch.tensor(np.concatenate(spread))
    return Properties(values)


# -- models ----------------------------------------------------------------------------------------


def forces_of(files: str, structures: Structures) -> torch.Tensor:
    """(N, 3) forces of a checkpoint, or of the mean over several (separated by commas)."""
    members = [PotentialTeacher.from_checkpoint(file) for file in files.split(",")]
    teacher = members[0] if len(members) == 1 else CommitteeTeacher(members)
    labels, failures = teacher.label(structures, ("forces",))
    if failures:
        raise typer.BadParameter(f"{files} cannot predict {failures[0].reason}")
    return labels["forces"]


def corrected(
    forces: torch.Tensor, label: Properties, structures: Structures, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    """RMSE by kind (and of all) against the true mean forces, and its error bar; eV/Å."""
    excess = ((forces - label["forces"]).square() - label["forces_std"].square()).mean(1).numpy()
    species, system = structures.species.numpy(), structures.system_index.numpy()
    draws = rng.integers(0, len(structures), (N_BOOTSTRAP, len(structures)))
    result = {}
    for kind, name in [*enumerate(structures.species_table.names), (None, "all")]:
        of = species == kind if kind is not None else np.ones_like(species, dtype=bool)
        sums = np.bincount(system[of], excess[of], len(structures))
        counts = np.bincount(system[of], minlength=len(structures))
        samples = sums[draws].sum(1) / counts[draws].sum(1)
        rmse = np.sqrt(np.maximum(samples, 0.0))
        result[name] = (float(np.sqrt(max(0.0, sums.sum() / counts.sum()))), float(rmse.std()))
    return result


@app.command()
def table(
    store: Annotated[Path, typer.Argument(help="store written by `collect`")],
    model: Annotated[list[str], typer.Option(help="name=checkpoint[,checkpoint...]")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """RMSE of the raw label and of models against the mean forces, by kind of bead, meV/Å."""
    held = LabeledStore.open(store)
    structures = held.structures()
    sources = [source for source in held.sources if source != "reference"]
    labels = {source: held.labels(source) for source in held.sources}
    raw = labels["reference"]["forces"]
    entries = {"zero forces": torch.zeros_like(raw), "raw label": raw}
    for entry in model:
        name, _, files = entry.partition("=")
        entries[name] = forces_of(files, structures)
    results: dict[str, Any] = {}
    for name, forces in entries.items():
        results[name] = {
            source: corrected(forces, labels[source], structures, np.random.default_rng(0))
            for source in sources
            if (name, source) not in (("raw label", ALL), ("raw label", OWN))
        }
    kinds = [*structures.species_table.names, "all"]
    lines = [f"| RMSE, meV/Å | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for name, by_source in results.items():
        own = by_source.get(ALL) or by_source.get(HEATED)
        if own is None:
            continue
        cells = [f"{1e3 * own[k][0]:.1f} ± {1e3 * own[k][1]:.1f}" for k in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    spread, species = labels[ALL]["forces_std"].square().mean(1), structures.species
    bars = [spread[species == k].mean().sqrt() for k in range(len(kinds) - 1)]
    cells = [f"{1e3 * float(bar):.1f}" for bar in [*bars, spread.mean().sqrt()]]
    lines.append(f"| error of the measured mean (taken off) | {' | '.join(cells)} |")
    typer.echo("\n".join(lines))
    if out is not None:
        facts = {"machine": machine_description(), "versions": versions(), "models": model}
        out.write_text(json.dumps(facts | {"eV_per_A": results}, indent=1) + "\n")


if __name__ == "__main__":
    app()
