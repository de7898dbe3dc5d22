r"""Noise of mapped forces, and errors of models, against measured mean forces (`mean_forces`).

python studies/coarse_graining/mean_force_table.py collect RUNS mean_forces.zarr --out noise.json
python studies/coarse_graining/mean_force_table.py table mean_forces.zarr \
    --model "one teacher=t0/best.pt" --model "ensemble=t0/best.pt,t1/best.pt" --out table.json

The average over the run from the frame is o = F + e. Its error e is mostly that of orientations,
which hardly change within a run, so that the run's own scatter does not show it. Where there are
heated runs h1, h2, ..., whose errors are independent of it and of one another,

    <e²> = <(o - hi) (o - hj)>,  i ≠ j

(the three-cornered hat), and likewise for the heated runs, whose errors are larger: what they froze
in on cooling. The measured mean force weighs the runs of a frame by their inverse variances; s² is
the variance of its error. For a model m that has not seen these frames

    <(m - F)²> = <(m - measured)²> - s² = <(m - o) (m - h)>,

the latter without any variance, where there are heated runs (h, their mean). The raw label has the
orientations of the run from the frame: what it shares with it is added. Error bars are standard
deviations over bootstrap samples of the configurations. Give models that were not trained on these
frames.
"""

from __future__ import annotations

import itertools
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

#: Label sets of the store: over all runs, over the run from the frame, over heated runs.
MEAN, OWN, HEATED = "mean_forces", "from_frame", "heated"

#: Blocks (ps) for the error of one run, and lags (ps) at which the correlation is given.
BLOCK, LAGS = 4.0, (0.04, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

N_BOOTSTRAP = 1000

app = typer.Typer(no_args_is_help=True)


def load_runs(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Finished runs by frame: what the file holds, and means over the part that counts.

    The first run of a frame starts from the frame itself, the others are heated.
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
    return {frame: runs for frame, runs in found.items() if int(runs[0]["repeat"]) == 0}


def autocorrelation(series: np.ndarray) -> np.ndarray:
    """(T,) mean over columns of the normalized autocorrelation of (T, n) values."""
    x = series - series.mean(0)
    power = np.abs(np.fft.rfft(x, n=2 * len(x), axis=0)) ** 2
    c = np.fft.irfft(power, axis=0)[: len(x)].mean(1) / np.arange(len(x), 0, -1)
    return c / c[0]


def three_cornered(of: np.ndarray, others: list[np.ndarray]) -> float:
    """Mean square of the error of `of`, by two or more others with errors independent of it."""
    pairs = itertools.combinations(others, 2)
    return float(np.mean([np.mean((of - a) * (of - b)) for a, b in pairs]))


def statistics(runs: dict[int, list[dict[str, Any]]], of: np.ndarray) -> dict[str, Any]:
    """Noise of the label and errors of the mean, eV/Å per component, for the beads of one kind."""
    own = [some[0] for some in runs.values()]
    spacing = float(own[0]["times"][1] - own[0]["times"][0])
    series = [run["kept"][:, of].reshape(len(run["kept"]), -1) for run in own]
    within = np.mean([x.var(0).mean() for x in series])
    halves = [np.array_split(x, 2) for x in series]
    # The difference of halves has four times the variance of the mean over both.
    sampling = np.mean([(a.mean(0) - b.mean(0)) ** 2 for a, b in halves]) / 4
    several = [[run["mean"][of] for run in some] for some in runs.values() if len(some) > 2]
    if not several:
        raise typer.BadParameter("no frame has two heated runs, which measure the error")
    errors = [three_cornered(some[0], some[1:]) for some in several]
    heated = [
        three_cornered(some[k], some[:k] + some[k + 1 :])
        for some in several
        for k in range(1, len(some))
    ]
    error = max(float(np.mean(errors)), sampling)
    states = error - sampling
    opposite = [
        run["mean"][of] + run["constraint_mean"][of] for some in runs.values() for run in some
    ]
    correlation = np.mean([autocorrelation(x) for x in series_of_one_length(series)], axis=0)
    return {
        "mean_force": float(np.std([run["mean"][of] for run in own])),
        "label_noise": float(np.sqrt(within + error)),
        "noise_within_runs": float(np.sqrt(within)),
        "noise_of_states": float(np.sqrt(states)),
        "error_of_the_run_from_the_frame": float(np.sqrt(error)),
        "error_by_halves": float(np.sqrt(sampling)),
        "error_of_a_heated_run": float(np.sqrt(max(sampling, np.mean(heated)))),
        "squared_error_by_frame": errors,
        "with_force_of_constraint": float(np.sqrt(np.mean(np.square(opposite)))),
        "autocorrelation": {str(t): float(correlation[round(t / spacing)]) for t in LAGS},
    }


def series_of_one_length(series: list[np.ndarray]) -> list[np.ndarray]:
    """All cut to the shortest."""
    return [x[: min(map(len, series))] for x in series]


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
    gained = [run["energy"] - own[0]["energy"] for own in found.values() for run in own[1:]]
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
    written = LabeledStore.create(store, table, {"temperature": TEMPERATURE})
    written.append(structures, _labels([own[0]["raw"] for own in found.values()]))
    variances = [
        np.array([noise[name][f"error_of_{run}"] ** 2 for name in names])[:, None]
        for run in ("the_run_from_the_frame", "a_heated_run")
    ]
    for source, pick in ((MEAN, slice(None)), (OWN, slice(1)), (HEATED, slice(1, None))):
        combined = [weighted(own[pick] or own, variances) for own in found.values()]
        there = torch.tensor([len(own[pick]) > 0 for own in found.values()])
        forces, bars = (list(values) for values in zip(*combined, strict=True))
        labels = _labels(forces, bars, there)
        states = {name: noise[name]["noise_of_states"] for name in table.names}
        info = {"fingerprint": source, "properties": list(labels.values), "states": states}
        written.begin_labels(source, info)
        written.write_labels(source, 0, labels, structures, [])
        for name in table.names if source == MEAN else ():
            squares = np.square([bar[names == name] for bar in bars])
            noise[name]["error_of_the_measured_mean"] = float(np.sqrt(squares.mean()))
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


def weighted(
    runs: list[dict[str, Any]], variances: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) mean over runs by inverse variances, (n, 1) of runs from a frame and of heated ones.

    Returns also its (n, 3) standard error.
    """
    weights = [1.0 / variances[min(int(run["repeat"]), 1)] for run in runs]
    mean = sum(w * run["mean"] for w, run in zip(weights, runs, strict=True)) / sum(weights)
    return mean, np.broadcast_to(1.0 / np.sqrt(sum(weights)), mean.shape)


def _labels(
    forces: list[np.ndarray],
    spread: list[np.ndarray] | None = None,
    there: torch.Tensor | None = None,
) -> Properties:
    values = {"forces": torch.tensor(np.concatenate(forces))}
    if spread is not None:
        values["forces_std"] = torch.tensor(np.concatenate(spread))
    return Properties(values, {} if there is None else dict.fromkeys(values, there))


# -- models ----------------------------------------------------------------------------------------


def forces_of(files: str, structures: Structures) -> torch.Tensor:
    """(N, 3) forces of a checkpoint, or of the mean over several (separated by commas)."""
    members = [PotentialTeacher.from_checkpoint(file) for file in files.split(",")]
    teacher = members[0] if len(members) == 1 else CommitteeTeacher(members)
    labels, failures = teacher.label(structures, ("forces",))
    if failures:
        raise typer.BadParameter(f"{files} cannot predict {failures[0].reason}")
    return labels["forces"]


def by_kind(
    squares: torch.Tensor, structures: Structures, there: torch.Tensor | None = None
) -> dict[str, list[float]]:
    """Roots of the means of (N, 3) values by kind of bead and over all, and their error bars.

    `there` (S,) says which systems count.
    """
    frames = np.arange(len(structures)) if there is None else there.nonzero()[:, 0].numpy()
    species, system = structures.species.numpy(), structures.system_index.numpy()
    draws = np.random.default_rng(0).choice(frames, (N_BOOTSTRAP, len(frames)))
    result = {}
    for kind, name in [*enumerate(structures.species_table.names), (None, "all")]:
        of = species == kind if kind is not None else np.ones_like(species, dtype=bool)
        sums = np.bincount(system[of], squares.mean(1).numpy()[of], len(structures))
        counts = np.bincount(system[of], minlength=len(structures))
        mean = sums[frames].sum() / counts[frames].sum()
        samples = sums[draws].sum(1) / counts[draws].sum(1)
        spread = np.sqrt(np.maximum(samples, 0.0)).std()
        result[name] = [float(np.sqrt(max(0.0, mean))), float(spread)]
    return result


def against(
    forces: torch.Tensor, store: LabeledStore, *, is_raw: bool = False
) -> dict[str, dict[str, list[float]]]:
    """RMSE of forces against the true mean forces, eV/Å: `corrected` and, of a model, `crossed`."""
    structures, mean, own = store.structures(), store.labels(MEAN), store.labels(OWN)
    variance = mean["forces_std"].square()
    squares = (forces - mean["forces"]).square() - variance
    if is_raw:
        states = store.source_info(MEAN)["states"]
        shared = torch.tensor([states[name] ** 2 for name in structures.species_table.names])
        weight = variance / own["forces_std"].square()  # of the run from the frame
        shared = shared[structures.species, None] * weight
        return {"corrected": by_kind(squares + 2 * shared, structures)}
    heated = store.labels(HEATED)
    there = heated.presence("forces", len(structures))
    crossed = (forces - own["forces"]) * (forces - heated["forces"])
    return {
        "corrected": by_kind(squares, structures),
        "crossed": by_kind(crossed, structures, there),
    }


def over_seeds(several: list[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Means over models of one name, whose bars are then standard deviations between models."""
    if len(several) == 1:
        return several[0]
    found: dict[str, Any] = {}
    for kind, own in several[0].items():
        values = {bead: [one[kind][bead][0] for one in several] for bead in own}
        found[kind] = {
            bead: [float(np.mean(v)), float(np.std(v, ddof=1))] for bead, v in values.items()
        }
    return found


@app.command()
def table(
    store: Annotated[Path, typer.Argument(help="store written by `collect`")],
    model: Annotated[
        list[str],
        typer.Option(help="name=checkpoint[,checkpoint...]; models of one name are averaged"),
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """RMSE of the raw label and of models against the mean forces, by kind of bead, meV/Å.

    Error bars are those of the configurations, of several models of one name those of the models.
    """
    held = LabeledStore.open(store)
    structures = held.structures()
    raw = held.labels("reference")["forces"]
    results: dict[str, Any] = {
        "zero forces": against(torch.zeros_like(raw), held),
        "raw label": against(raw, held, is_raw=True),
    }
    named: dict[str, list[Any]] = defaultdict(list)
    for entry in model:
        name, _, files = entry.partition("=")
        named[name].append(against(forces_of(files, structures), held))
    results |= {name: over_seeds(several) for name, several in named.items()}
    kinds = [*structures.species_table.names, "all"]
    n_heated = int(held.labels(HEATED).presence("forces", len(structures)).sum())
    titles = [*kinds, f"all, crossed ({n_heated} of {len(structures)} configurations)"]
    lines = [f"| RMSE, meV/Å | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for name, found in results.items():
        values = [found["corrected"][kind] for kind in kinds]
        values += [found["crossed"]["all"]] if "crossed" in found else []
        cells = [f"{1e3 * value:.1f} ± {1e3 * bar:.1f}" for value, bar in values]
        cells += ["-"] * (len(titles) - len(cells))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    bars = by_kind(held.labels(MEAN)["forces_std"].square(), structures)
    cells = [f"{1e3 * bars[kind][0]:.1f}" for kind in kinds]
    lines.append(f"| error of the measured mean (taken off) | {' | '.join(cells)} | - |")
    typer.echo("\n".join(lines))
    if out is not None:
        facts = {"machine": machine_description(), "versions": versions(), "models": model}
        out.write_text(json.dumps(facts | {"eV_per_A": results}, indent=1) + "\n")


if __name__ == "__main__":
    app()
