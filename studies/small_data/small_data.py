"""A student of a strong teacher against a control, where reference data are few.

    python studies/small_data/small_data.py --work runs/small_data
    python studies/small_data/small_data.py --work runs/small_data --collect small_data.json

Every seed draws its own few frames, of which a fifth choose the best epoch. The teacher is a
committee of larger HIP-NN models trained on these frames alone. It makes structures (rattles,
strains, molecular dynamics, all from the training frames) and labels them; structures that it does
not agree on are left out. The student is trained on the frames and on the teacher's structures, the
control, of the same size, on the frames alone. A network that is trained for long on so few frames
overfits, so the control is trained for several numbers of steps and weights of L2 (`Setup.trials`),
and the one with the best validation score counts. Nothing else is known to any of them: errors are
those of frames of the set that no model of the seed has seen.

A model in `--work` that is trained already is not trained again; what was killed is resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as students_t
from torch import Tensor

from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.errors import DivergenceError
from potstill.evaluate.errors import evaluate_errors
from potstill.evaluate.tools import machine_description
from potstill.readers import read
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.plots import write_figure
from potstill.sample import Job, MDJob, RattleJob, SamplingPlan, StrainJob, run_plan
from potstill.soundness import closest_pairs, fused
from potstill.structures import Structures
from potstill.teachers.committee import CommitteeTeacher
from potstill.teachers.potential import PotentialTeacher
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.state import versions

SEEDS = (0, 1, 2)
LABELS = ("energy", "forces")
METRICS = ("force_rmse_meV_per_A", "energy_rmse_meV_per_atom")

#: Settings of every training, but for `Setup.trials`.
SETTINGS: dict[str, Any] = {
    "loss": [
        {"property": "energy", "weight": 1.0},
        {"property": "forces", "weight": 30.0},
    ],
    "optimizer": {"learning_rate": 0.01, "ema_decay": 0.99, "beta2": 0.99},
    "learning_rate": {"schedule": "one_cycle"},
    "score": {"weights": {"forces_rmse": 1.0, "energy_per_atom_rmse": 10.0}},
    "batch_size": 4,
    "early_stopping": None,
}

#: Of the default when the results were made: tensors to rank 4, no products of three of them, and
#: all radial functions for every rank.
THEN = {"l_max": 4, "n_triples": 0, "n_high_sensitivities": 10}

#: Hyper-parameters of HIP-NN beside the cutoff.
SIZES: dict[str, dict[str, int]] = {
    "default": THEN,
    "fast": {**THEN, "l_max": 1, "n_features": 12, "n_channels": 12},
    "wide": {**THEN, "n_features": 40, "n_channels": 40},
}
STUDENTS = ("default", "fast")
ROLES = ("teacher", *(f"{role}-{size}" for size in STUDENTS for role in ("student", "control")))

#: A structure is left out where the standard deviation of the committee's forces is more than this
#: many times that on the validation frames (root mean squares over atoms).
MAX_SPREAD = 4.0


@dataclass(frozen=True)
class Setup:
    """A set of frames, and what is done with it."""

    training: str
    test: str | None  # without a file: the frames that no seed drew
    n_frames: int
    cutoff: float
    temperatures: tuple[float, ...]
    timestep: float
    displacement: tuple[float, float]
    max_strain: float
    #: Sizes of the teacher's members; they take turns in the jobs from each frame, so that their
    #: number and that of these jobs should have no factor in common.
    members: tuple[str, ...]
    #: Steps and L2 weights by role, or role and size; of several, the best on validation counts.
    trials: dict[str, tuple[tuple[int, float], ...]]


SETS = {
    "Mo": Setup(
        training="mlearn/Mo_train.extxyz.gz",
        test="mlearn/Mo_test.extxyz.gz",
        n_frames=20,
        cutoff=5.2,
        temperatures=(300.0, 1500.0, 3000.0, 5000.0),
        timestep=2.0,
        displacement=(0.02, 0.25),
        max_strain=0.06,
        members=("wide",) * 7,
        trials={
            "member": ((2500, 5e-2),),
            "control": ((1000, 1e-2), (2500, 1e-2), (2500, 5e-2)),
            "student": ((6000, 0.0),),
        },
    ),
    "ethanol": Setup(
        training="md17-ethanol/md17_ethanol_2000.extxyz.gz",
        test=None,
        n_frames=50,
        cutoff=5.2,
        temperatures=(500.0, 800.0),
        timestep=0.5,
        displacement=(0.02, 0.1),
        max_strain=0.0,
        members=("wide",) * 5,
        trials={
            "member": ((1500, 1e-3),),
            "control": ((700, 0.0), (1500, 0.0)),
            "control-fast": ((1500, 0.0), (5000, 0.0), (5000, 1e-2)),
            "student": ((5000, 0.0),),
        },
    ),
}


# -- data ------------------------------------------------------------------------------------------


def load(name: str, seed: int, data: Path) -> tuple[TrainingSet, TrainingSet, TrainingSet]:
    """The few frames of a seed, four fifths and one fifth of them, and the test frames."""
    setup = SETS[name]
    frames = _read(data / setup.training)
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))
    drawn = _in_proportion(frames.structures, order, setup.n_frames)
    n_held_out = setup.n_frames // 5
    test = _read(data / setup.test) if setup.test else frames.select(_rest(drawn, len(frames)))
    return frames.select(drawn[n_held_out:]), frames.select(drawn[:n_held_out]), test


def _in_proportion(structures: Structures, order: Tensor, n: int) -> Tensor:
    """The first n systems of an order, of each group its share."""
    assert structures.group is not None
    ranked: dict[str, int] = {}
    keys = []
    for system in order.tolist():
        group = structures.group[system]
        ranked[group] = ranked.get(group, 0) + 1
        keys.append((ranked[group] - 0.5) / structures.group.count(group))
    return order[torch.tensor(keys).argsort(stable=True)[:n]]


def _rest(drawn: Tensor, n: int) -> Tensor:
    return torch.tensor(sorted(set(range(n)) - set(drawn.tolist())))


def _read(file: Path) -> TrainingSet:
    structures, labels = read(file)
    return TrainingSet(structures, {"reference": labels})


# -- models ----------------------------------------------------------------------------------------


def fit(
    folder: Path,
    size: str,
    setup: Setup,
    role: str,
    seed: int,
    training: TrainingSet,
    validation: TrainingSet,
) -> Path:
    """The best on validation of a role's trials, which are run if they are not there."""
    scores = {}
    for steps, l2 in setup.trials.get(f"{role}-{size}", setup.trials[role]):
        out = folder / f"{steps}-{l2:g}"
        if not (out / "result.json").is_file():
            own = {
                "model": {"hyperparameters": {"dist_hard_max": setup.cutoff, **SIZES[size]}},
                "regularization": {"l2": l2, "hierarchicality": 0.0},
                "epochs": max(1, round(steps / math.ceil(len(training) / SETTINGS["batch_size"]))),
                "seed": seed,
            }
            train(TrainSettings.model_validate(SETTINGS | own), training, validation, out)
        scores[out / "best.pt"] = json.loads((out / "result.json").read_text())["best_score"]
    return min(scores, key=scores.__getitem__)


def members_of(
    work: Path, setup: Setup, seed: int, training: TrainingSet, validation: TrainingSet
) -> list[PotentialTeacher]:
    """Larger models that differ in their initial weights and the order of frames."""
    members = []
    for k, size in enumerate(setup.members):
        own = 1000 * (seed + 1) + k
        folder = work / f"member{k}"
        file = fit(folder, size, setup, "member", own, training, validation)
        members.append(PotentialTeacher.from_checkpoint(file))
    return members


# -- what the teacher makes ------------------------------------------------------------------------


def jobs_from(start: Structures, setup: Setup) -> list[Job]:
    """Rattles, strains and dynamics at every temperature, from each of the structures."""
    jobs: list[Job] = []
    for system in range(len(start)):
        rattle = RattleJob(n_frames=12, system=system, displacement=setup.displacement)
        jobs.append(replace(rattle, closest=0.5))
        if setup.max_strain:
            strain = StrainJob(n_frames=12, system=system, max_strain=setup.max_strain)
            jobs.append(replace(strain, displacement=0.1))
        jobs += [
            MDJob(
                n_frames=15,
                system=system,
                temperature=temperature,
                timestep=setup.timestep,
                stride=10 * setup.timestep,
                equilibration=10 * setup.timestep,
                thermostat_time=50.0,
            )
            for temperature in setup.temperatures
        ]
    return jobs


def made_by(
    members: list[PotentialTeacher],
    work: Path,
    setup: Setup,
    seed: int,
    training: TrainingSet,
    validation: TrainingSet,
) -> tuple[TrainingSet, dict[str, int]]:
    """Structures that the teacher makes and labels, and how many there are.

    Members take turns in the dynamics, which costs less than the mean of all at every step.
    """
    jobs = jobs_from(training.structures, setup)
    unstable: list[DivergenceError] = []
    parts = [
        run_plan(
            SamplingPlan(training.structures, jobs[k :: len(members)], 1000 * seed + k),
            PotstillCalculator(member.potential),
            work / f"frames{k}",
            driver=member.info.fingerprint,
            on_divergence=unstable.append,
        ).structures
        for k, member in enumerate(members)
    ]
    frames, teacher = Structures.concatenate(parts), CommitteeTeacher(members)
    labels, _ = teacher.label(frames, (*LABELS, "forces_std"))
    known = teacher.label(validation.structures, ("forces_std",))[0]["forces_std"]
    limit = MAX_SPREAD * float(_rms(known, validation.structures).square().mean().sqrt())
    kept = sound(frames, labels["forces_std"], limit, closest_pairs(training.structures))
    counts = {"made": len(frames), "kept": int(kept.sum()), "unstable_runs": len(unstable)}
    made = TrainingSet(frames, {"reference": labels.only(LABELS)})
    return made.select(kept.nonzero()[:, 0]), counts


def sound(frames: Structures, spread: Tensor, limit: float, closest: dict[str, float]) -> Tensor:
    """(S,) bool: where no atoms have fused and the teacher agrees with itself.

    `spread`, (N, 3), is the standard deviation of the forces, of which the root mean square over
    atoms must be below `limit`, eV/Å; `closest` are the shortest distances of the known frames.
    """
    each = (frames[system] for system in range(len(frames)))
    whole = torch.tensor([not fused(closest_pairs(frame), closest) for frame in each])
    return whole & (_rms(spread, frames) < limit)  # false for the NaN of a failure


def _rms(values: Tensor, structures: Structures) -> Tensor:
    """(S,) root mean squares over atoms of the lengths of (N, 3) vectors."""
    square = structures.sum_by_system(values.square().sum(dim=1))
    return (square / structures.n_atoms_per_system).sqrt()


# -- results ---------------------------------------------------------------------------------------


def errors(predictor: Any, test: TrainingSet) -> dict[str, float]:
    """Force and energy RMSE on the test frames."""
    found = evaluate_errors(predictor, test.structures, test.labels).own
    values = (found["forces_rmse"], found["energy_per_atom_rmse"])
    return {key: 1000.0 * value for key, value in zip(METRICS, values, strict=True)}


def run(name: str, seed: int, roles: list[str], data: Path, work: Path) -> None:
    """Train what is missing of a seed, and write its errors as they are known."""
    setup, folder = SETS[name], work / name / f"seed{seed}"
    training, validation, test = load(name, seed, data)

    def note(key: str, value: dict[str, Any]) -> None:
        print(name, seed, key, value, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.json").write_text(json.dumps(value) + "\n")

    def judge(role: str, size: str, frames: TrainingSet) -> None:
        key = f"{role}-{size}"
        best = fit(folder / key, size, setup, role, seed, frames, validation)
        potential = load_potential(best)[0]
        note(key, errors(potential, test) | {"n_parameters": potential.n_parameters})

    if "control" in roles:
        for size in STUDENTS:
            judge("control", size, training)
    if "student" not in roles:
        return
    members = members_of(folder, setup, seed, training, validation)
    each = [errors(member.potential, test) for member in members]
    note("member", {key: float(np.mean([e[key] for e in each])) for key in METRICS})
    answer = CommitteeTeacher(members).label(test.structures, LABELS)[0]
    note("teacher", errors(answer, test) | {"n_members": len(each)})
    made, counts = made_by(members, folder, setup, seed, training, validation)
    note("structures", counts)
    for size in STUDENTS:
        judge("student", size, training.with_synthetic(made))


def collect(work: Path) -> dict[str, Any]:
    """Means over the seeds that are done, and intervals of differences of student and control."""
    results: dict[str, Any] = {}
    for name, setup in SETS.items():
        by_seed = {
            seed: {
                file.stem: json.loads(file.read_text())
                for file in sorted((work / name / f"seed{seed}").glob("*.json"))
            }
            for seed in SEEDS
        }
        by_seed = {k: v for k, v in by_seed.items() if v.keys() >= set(ROLES)}
        if not by_seed:
            continue
        results[name] = {"setup": asdict(setup), "by_seed": by_seed, "models": {}}
        for key in METRICS:
            values = {role: [e[role][key] for e in by_seed.values()] for role in ROLES}
            for role, found in values.items():
                results[name]["models"].setdefault(role, {})[key] = _summary(found)
            for size in STUDENTS:
                pair = zip(values[f"student-{size}"], values[f"control-{size}"], strict=True)
                gain = [100.0 * (s / c - 1.0) for s, c in pair]
                own = results[name].setdefault("student_against_control_percent", {})
                own.setdefault(size, {})[key] = _summary(gain)
    return results


def _summary(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation, and the mean's 95 % interval by Student's t."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"mean": mean, "n": n}
    spread = float(np.std(values, ddof=1))
    half = float(students_t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return {"mean": mean, "std": spread, "interval": [mean - half, mean + half], "n": n}


def table(results: dict[str, Any]) -> str:
    """As in docs/studies.md."""
    lines = []
    for name, found in results.items():
        lines += [f"{name}, {found['setup']['n_frames']} frames", ""]
        lines += ["| | forces (meV/Å) | energy (meV/atom) |", "|---|---:|---:|"]
        for role in ROLES:
            own = found["models"][role]
            cells = [f"{own[k]['mean']:.4g} ± {own[k].get('std', math.nan):.2g}" for k in METRICS]
            lines.append(f"| {role} | {' | '.join(cells)} |")
        for size, own in found["student_against_control_percent"].items():
            cells = [f"{own[k]['mean']:+.0f} % {_range(own[k])}" for k in METRICS]
            lines.append(f"| student against control, {size} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _range(summary: dict[str, Any]) -> str:
    low, high = summary.get("interval", (math.nan, math.nan))
    return f"({low:+.0f} to {high:+.0f})"


def drawing_of(results: dict[str, Any]) -> Drawing:
    """Force errors of student, control and teacher: means and standard deviations over seeds."""
    panels = []
    for name, found in results.items():
        models = {role: own[METRICS[0]] for role, own in found["models"].items()}
        sizes = range(len(STUDENTS))
        series = []
        for role in ("student", "control"):
            own = [models[f"{role}-{size}"] for size in STUDENTS]
            spread = [value.get("std", math.nan) for value in own]
            series.append(Series(role, [value["mean"] for value in own], list(sizes), spread))
        teacher = [models["teacher"]["mean"]] * 2
        series.append(Series("teacher", teacher, [-0.4, len(STUDENTS) - 0.6], kind="line"))
        title = f"{name}, {found['setup']['n_frames']} frames"
        panels.append(Panel("force RMSE (meV/Å)", "", series, title, categories=STUDENTS))
    return Drawing("small_data", "", "", panels, height=2.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/small_data"))
    parser.add_argument("--set", choices=list(SETS), help="one set; by default all")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="one seed; by default all")
    both = ["control", "student"]
    parser.add_argument("--roles", nargs="+", choices=both, default=both)
    parser.add_argument("--collect", type=Path, help="only write the results to this JSON file")
    parser.add_argument("--figures", type=Path, help="with --collect: folder of small_data.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.collect is None:
        for name in SETS if options.set is None else (options.set,):
            for seed in SEEDS if options.seed is None else (options.seed,):
                run(name, seed, options.roles, options.data, options.work)
        return
    results = collect(options.work)
    about = {
        "command": "python studies/small_data/small_data.py --data DATA --work FOLDER",
        "machine": machine_description(),
        "versions": versions(),
        "settings": SETTINGS | {"sizes": SIZES, "max_spread": MAX_SPREAD},
    }
    options.collect.write_text(json.dumps(about | {"sets": results}, indent=1) + "\n")
    print(table(results))
    if options.figures is not None:
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(write_figure(Path(scratch), drawing_of(results)).png, options.figures)


if __name__ == "__main__":
    main()
