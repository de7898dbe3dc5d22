"""The road from a trajectory to force fields of beads: map, train, run, report."""

import csv
import json
import re
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from typer.testing import CliRunner

from data import data_path
from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential, save_potential
from potstill.cli import app
from potstill.config import CoarseConfig, read_yaml, write_settings
from potstill.display import Display
from potstill.errors import ConfigError, DataError
from potstill.evaluate.base import BenchSettings
from potstill.evaluate.stability import OwnDynamics
from potstill.experiments.coarse import ENSEMBLE, CoarseStudy, Learned, MeanForces, _error
from potstill.experiments.exploration import Exploration
from potstill.experiments.measures import Finished
from potstill.experiments.run import _training_data, best_of
from potstill.experiments.spec import TEACHER, Committee, Run, TrainedTeacher
from potstill.models import HIPNN, MeanPotential, PairPotential, SpeciesOffsets, SumPotential
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers import make_teacher
from potstill.testing import CONTRACT
from potstill.workflows import coarse
from potstill.workflows.coarse import PriorSettings, _fitting_tests
from potstill.workflows.evaluation import EvaluateConfig, TrajectoryData, evaluate
from scripts import STUDIES

FOLDER = STUDIES / "coarse_graining"

KT = 0.03
TABLE = SpeciesTable((Species("A", 30.0), Species("B", 18.0)))


def member(seed):
    torch.manual_seed(seed)
    network = HIPNN(TABLE, dist_hard_max=4.5, l_max=1, n_features=4, n_channels=4)
    return SumPotential({"offsets": SpeciesOffsets(TABLE, [0.1 * seed, -0.2]), "network": network})


def liquid(n=12, seed=0):
    rng = np.random.default_rng(seed)
    sites = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
    return Structures(
        positions=torch.from_numpy(2.7 * sites + rng.normal(0, 0.2, (n, 3))),
        species=torch.arange(n) % 2,
        system_index=torch.zeros(n, dtype=torch.int64),
        cell=8.1 * torch.eye(3, dtype=torch.float64)[None],
        pbc=torch.ones(1, 3, dtype=torch.bool),
        species_table=TABLE,
    )


# -- an ensemble as one potential -----------------------------------------------------------------


@pytest.fixture
def mean():
    return MeanPotential({str(k): member(k) for k in range(3)}).to(torch.float64)


@pytest.mark.parametrize("core", ["torch", "auto"])
def test_a_mean_is_the_mean_of_its_members(mean, core):
    structures, wanted = liquid(), ("energy", "forces", "stress", "atomic_energies")
    each = [potential.predict(structures, None, wanted) for potential in mean.members]
    atoms = structures.to_ase()[0]
    atoms.calc = PotstillCalculator(mean, core=core)
    forces = torch.stack([one["forces"] for one in each]).mean(dim=0)
    np.testing.assert_allclose(atoms.get_forces(), forces, rtol=0, atol=1e-12)
    found = mean.predict(structures, None, wanted)
    for name in wanted:
        expected = torch.stack([one[name] for one in each]).mean(dim=0)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("check", ["forces_are_the_gradient", "stress_is_the_strain_derivative"])
def test_a_mean_is_conservative(mean, check):
    CONTRACT[check](mean)


def test_a_mean_is_a_file_and_a_committee(mean, tmp_path):
    save_potential(tmp_path / "mean.pt", mean, {})
    back, _ = load_potential(tmp_path / "mean.pt")
    structures = liquid()
    torch.testing.assert_close(
        back.predict(structures)["forces"], mean.predict(structures)["forces"]
    )
    teacher = make_teacher(str(tmp_path / "mean.pt"))
    labels, _ = teacher.label(structures, ["forces", "forces_std"])
    each = torch.stack([m.predict(structures)["forces"] for m in mean.members])
    torch.testing.assert_close(labels["forces"], each.mean(dim=0))
    torch.testing.assert_close(labels["forces_std"], each.std(dim=0, correction=0))


# -- what students learn --------------------------------------------------------------------------


def study(**changes):
    data = {"name": "x", "title": "x", "data": {"store": "beads.zarr"}, "seeds": [0, 1]}
    return CoarseStudy.model_validate({**data, "n_teachers": 3, **changes})


def test_students_learn_what_their_names_say():
    variants = {v.name: v for v in study().experiment.variants}

    def losses(name):
        return {(t.property, t.source) for t in variants[name].settings_of(0).label_terms}

    assert losses("teacher") == losses("mapped") == {("forces", "reference")}
    assert losses("one-teacher") == losses("ensemble") == {("forces", TEACHER)}
    assert losses("ensemble+bead") == {("forces", TEACHER), ("atomic_energies", TEACHER)}
    assert losses("ensemble+total") == {("forces", TEACHER), ("energy", TEACHER)}
    assert losses("mapped+bead") == {("forces", "reference"), ("atomic_energies", TEACHER)}
    assert variants["one-teacher"].teacher == TrainedTeacher("teacher")
    assert variants["ensemble"].teacher == Committee("teacher", (0, 1, 2))
    assert variants["ensemble"].against == ("mapped",)
    runs = study().experiment.runs()
    assert [run.seed for run in runs if run.variant.name == "teacher"] == [0, 1, 2]
    assert [run.seed for run in runs if run.variant.name == "mapped"] == [0, 1]
    needed = study().experiment.needed_by(next(r for r in runs if r.variant.name == "ensemble"))
    assert [run.name for run in needed] == ["teacher-0", "teacher-1", "teacher-2"]


def test_spread_weighs_terms_of_the_ensemble():
    own = {"s": {"energies": "per_bead", "by_spread": True}}
    terms = study(students=own).experiment.by_name["s"].taught
    assert {t.spread for t in terms} == {"forces_std", "atomic_energies_std"}
    with pytest.raises(ValueError, match="only an ensemble has a spread"):
        Learned(forces="teacher", by_spread=True)


def test_students_of_another_size_have_controls_of_theirs():
    small = {"hyperparameters": {"n_features": 8}}
    students = {
        "mapped": {"forces": "mapped"},
        "ensemble": {},
        "small-mapped": {"forces": "mapped", **small},
        "small-ensemble": {**small},
        "large-ensemble": {"hyperparameters": {"l_max": 3}},
    }
    sizes = {"teacher": {"l_max": 3}, "student": {"l_max": 1}}
    variants = study(students=students, **sizes).experiment.by_name
    # A teacher is what a student of its size would be without the others.
    assert variants["large-ensemble"].against == ("teacher",)
    assert variants["ensemble"].against == ("mapped",)
    assert variants["small-ensemble"].against == ("small-mapped",)
    own = variants["small-ensemble"].settings_of(0).model.hyperparameters
    assert own == {"l_max": 1, "n_features": 8}


def test_students_wait_for_those_that_explore_for_them():
    own = {
        "first": {},
        "second": {"explored_by": ["first", "mapped"]},
        "mapped": {"forces": "mapped"},
    }
    experiment = study(students=own).experiment
    second = Run(experiment.by_name["second"], 1)
    assert [run.name for run in experiment.explorers_of(second)] == ["first-1", "mapped-1"]
    assert experiment.needed_by(second)[-2:] == experiment.explorers_of(second)
    assert [run.seed for run in experiment.teachers_of(second)] == [0, 1, 2]
    assert experiment.by_name["second"].against == ("mapped",)
    with pytest.raises(ConfigError, match="explored by 'fisrt', which does not exist; did you"):
        _ = study(students={"first": {}, "x": {"explored_by": ["fisrt"]}}).experiment
    circle = {"a": {"explored_by": ["b"]}, "b": {"explored_by": ["a"]}}
    with pytest.raises(ConfigError, match="'a' is explored by itself, or by one that"):
        _ = study(students=circle).experiment
    for forces in ("mapped", "teacher"):
        with pytest.raises(ValueError, match="only an ensemble labels frames"):
            Learned(forces=forces, explored_by=("first",))


def test_frames_that_the_teachers_do_not_know_are_left_out():
    """By the bead on which they differ most, whatever the number of beads."""
    frames = Structures.concatenate([liquid(seed=k) for k in range(3)])
    spread = torch.full((frames.n_atoms, 3), 0.1, dtype=torch.float64)
    spread[frames.atom_offsets[1] + 2] = torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64)
    usual = 0.1 * 3**0.5
    torch.testing.assert_close(
        frames.longest_by_system(spread), torch.tensor([usual, 0.5, usual], dtype=torch.float64)
    )
    assert Exploration(max_spread=1.5).known(frames, spread, usual).tolist() == [True, False, True]
    assert Exploration(max_spread=3.0).known(frames, spread, usual).all()
    with pytest.raises(ConfigError, match="know none of the 3 frames"):
        Exploration().known(frames, spread, 0.1)


def test_mistakes_of_a_study_are_told():
    with pytest.raises(ValueError, match="1 teachers are fewer than the seeds ask for"):
        study(n_teachers=1)
    with pytest.raises(ValueError, match="an ensemble has at least two teachers"):
        study(n_teachers=1, seeds=[0])
    with pytest.raises(ValueError, match=r"data.store is missing"):
        study(data={"files": [{"path": "x.xyz"}]})


def test_errors_of_measured_means_are_taken_off(tmp_path):
    """Labels that are off by their stated standard errors are no error of the model's."""
    structures = Structures.concatenate([liquid()] * 2000)
    truth, model = torch.zeros(len(structures.species), 3, dtype=torch.float64), 0.03
    noise = 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    labels = {"forces": truth + noise, "forces_std": torch.full_like(truth, 0.05)}
    found = _error(truth + model, Properties(labels), structures)
    assert found["mean_force_rmse"] == pytest.approx(model, rel=0.02)
    # Frames that were not measured do not count, whatever stands in their place.
    there = torch.arange(2000) < 1500
    labels["forces"] = torch.where(there[structures.system_index, None], labels["forces"], 7.0)
    part = Properties(labels, dict.fromkeys(labels, there))
    found = _error(truth + model, part, structures)
    assert found["mean_force_rmse"] == pytest.approx(model, rel=0.03)
    with pytest.raises(DataError, match="no frame of the measured mean forces has any"):
        _error(truth, Properties(labels, dict.fromkeys(labels, there & ~there)), structures)


def measured_forces(path, sources):
    """Frames with mapped forces that are off by 0.3 and, by source, mean forces of 0.1."""
    structures = Structures.concatenate([liquid(seed=k) for k in range(4)])
    forces = torch.full((len(structures.species), 3), 0.1, dtype=torch.float64)
    store = LabeledStore.create(path, TABLE, {})
    store.append(structures, Properties({"forces": forces + 0.3}))
    for source in sources:
        labels = Properties({"forces": forces})
        store.begin_labels(source, {"fingerprint": source, "properties": ["forces"]})
        store.write_labels(source, 0, labels, structures, [])
    return MeanForces(store=str(path))


@pytest.fixture
def finished(tmp_path):
    """Two teachers whose mean is off by 0.1 from all mean forces: their own are zero."""
    experiment = study(seeds=[0], n_teachers=2).experiment
    runs = [run for run in experiment.runs() if run.variant.name == "teacher"]
    for run in runs:
        (tmp_path / run.name).mkdir()
        save_potential(best_of(tmp_path, run), SpeciesOffsets(TABLE, [0.0, 0.0]), {})
    save_potential(tmp_path / "pair.pt", PairPotential(TABLE, 3.0, 0.2), {})
    others = {"pair": tmp_path / "pair.pt"}
    return Finished(experiment, tmp_path, dict.fromkeys(runs), others=others)


def test_mapped_forces_are_compared_with_runs_apart(finished, tmp_path):
    """By default with the label set that mean_force_table.py writes them under."""
    own = measured_forces(tmp_path / "a.zarr", ["mean_forces", "heated"])
    found = own.measure(finished)
    errors = {name: of["mean_force_rmse"] for name, of in found["others"].items()}
    assert errors == pytest.approx({ENSEMBLE: 0.1, "pair": 0.1, "mapped forces": 0.3})
    assert set(found["runs"]) == {"teacher-0", "teacher-1"}
    lacking = measured_forces(tmp_path / "b.zarr", ["mean_forces"])
    with pytest.raises(DataError, match="holds no labels of 'heated'"):
        lacking.measure(finished)
    without = lacking.model_copy(update={"apart": None}).measure(finished)
    assert set(without["others"]) == {ENSEMBLE, "pair"}


# -- all of it ------------------------------------------------------------------------------------


def springs(n_frames=60, n=27, seed=1):
    """Dimers of two atoms as an extended XYZ trajectory; atoms and forces of soft spheres."""
    rng = np.random.default_rng(seed)
    frames = []
    sites = 4.0 * np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for _ in range(n_frames):
        centers = sites + rng.normal(0, 0.3, (n, 3))
        arm = rng.normal(0, 0.2, (n, 3))
        positions = np.stack([centers + arm, centers - arm], axis=1).reshape(-1, 3)
        atoms = ase.Atoms("CO" * n, positions, cell=[12.0] * 3, pbc=True)
        d = centers[:, None] - centers
        d -= 12.0 * np.round(d / 12.0)
        r = np.linalg.norm(d, axis=-1) + np.eye(n) * 99.0
        pair = np.where(r < 5.5, 0.3 * (1 - r / 5.5), 0.0)
        force = (pair[..., None] * d / r[..., None]).sum(axis=1)
        noise = rng.normal(0, 0.05, (n, 3))
        half = 0.5 * (force + noise)
        forces = np.stack([half - 2.0 * arm, half + 2.0 * arm], axis=1).reshape(-1, 3)
        atoms.arrays["forces"] = forces
        frames.append(atoms)
    return frames


def config(folder: Path):
    ase.io.write(folder / "md.xyz", springs(), format="extxyz")
    own = {
        "out": str(folder / "run"),
        "map": {
            "trajectory": {"path": str(folder / "md.xyz")},
            "residues": [{"name": "CO", "atoms": ["C", "O"], "count": 27}],
            "beads": {"dimer": {"residue": "CO"}},
            "temperature": 300,
        },
        "train": {
            "name": "dimers",
            "title": "Dimers",
            "seeds": [0],
            "n_teachers": 2,
            "common": {
                "model": {"hyperparameters": {"dist_hard_max": 5.5, "l_max": 1}},
                "epochs": 4,
                "batch_size": 2,
            },
            "students": {
                "mapped": {"forces": "mapped"},
                "best": {"energies": "per_bead"},
                "plain": {},
            },
        },
        "run": {
            "timestep": 5.0,
            "stride": 1000.0,
            "dynamics": {"n_runs": 2, "duration": 1.0, "equilibration": 0.2, "stride": 100.0},
            "tests": {"stability": {}, "rdf": {"r_max": 6.0, "n_bins": 30}},
        },
        "baselines": {
            "pair": {"model": {"cutoff": 5.5, "spacing": 0.25}},
            "pair_student": {"model": {"cutoff": 5.5, "spacing": 0.25}},
            "ibi": {
                "model": {"cutoff": 5.5, "spacing": 0.25},
                "n_iterations": 2,
                "dynamics": {"n_replicas": 2, "n_frames": 5, "stride": 100, "equilibration": 100},
            },
        },
    }
    path = folder / "config.yaml"
    write_settings(path, CoarseConfig.model_validate(own))
    return path


def test_one_command_leads_from_a_trajectory_to_a_report(tmp_path, monkeypatch):
    path = config(tmp_path)
    result = CliRunner().invoke(app, ["coarse", "all", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    found = json.loads((run / "results.json").read_text())
    assert set(found["runs"]) == {"teacher-0", "teacher-1", "mapped-0", "best-0", "plain-0"}
    kept = [file.stem.split("_", 1)[1] for file in (run / "labels").iterdir()]
    assert sorted(kept) == ["atomic_energies", "forces"], "students ask the ensemble once"
    numbers = found["measures"]["evaluations"]
    assert {"rdf_error", "rdf_noise", "failed_runs"} <= numbers["runs"]["best-0"].keys()
    beside = {ENSEMBLE, "pair", "pair_student", "ibi"}
    assert numbers["others"].keys() == beside | {"reference"}
    errors = found["measures"]["errors"]["others"]
    assert errors.keys() == beside
    # Forces between dimers are those of pairs: the fit is as good as the noise allows.
    best = errors["pair"]["forces_rmse"]
    assert best == pytest.approx(0.05, rel=0.1)
    assert best < errors["pair_student"]["forces_rmse"]
    summary = (run / "report" / "table_summary.md").read_text()
    rows = re.findall(r"(?m)^\| ([^|]+) \|", summary)
    assert {"all teachers", "pair", "pair student", "ibi", "best"} <= set(rows)
    drawn = (run / "report" / "seeds.csv").read_text()
    assert "pair" in drawn
    assert "reference" not in drawn
    page = (run / "report.html").read_text()
    assert page.index("Force RMSE: smallest of pair") < page.index("All models beside one another")
    assert numbers["runs"]["best-0"]["failed_runs"] == 0.0
    assert (run / "report" / "rdf.png").is_file()
    assert "Structure" in (run / "report.html").read_text()
    ensemble, _ = load_potential(run / "ensemble.pt")
    assert len(ensemble.members) == 2
    student, _ = load_potential(run / "best-0" / "best.pt")
    assert "prior" in student.components
    # The zero of energies: of every kind of bead, the mean over the training set.
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.pt")}
    again = CliRunner().invoke(app, ["coarse", "all", str(path)], catch_exceptions=False)
    assert again.exit_code == 0
    after = {p: p.stat().st_mtime_ns for p in run.rglob("*.pt")}
    assert {p for p in before if before[p] != after[p]} <= {run / "baselines" / "ibi" / "best.pt"}

    def drawn_of(figures):
        data = read_yaml(path)
        data["run"]["figures"] = figures
        write_settings(path, CoarseConfig.model_validate(data))
        redone = CliRunner().invoke(app, ["coarse", "run", str(path)], catch_exceptions=False)
        assert redone.exit_code == 0
        with open(run / "report" / "rdf.csv", encoding="utf-8") as file:
            return {row["series"] for row in csv.DictReader(file)}

    assert drawn_of(["best", "pair"]) == {"reference", "best-0", "pair"}
    monkeypatch.setattr(coarse, "_MOST_IN_FIGURES", 3)
    distance = {
        name: own["rdf_error"] for name, own in numbers["others"].items() if "rdf_error" in own
    }
    others = sorted(("pair", "pair_student", "ibi"), key=distance.__getitem__)
    drawn = drawn_of(None)
    assert {"reference", *others[:2]} < drawn
    assert others[2] not in drawn


def test_a_student_learns_from_frames_of_another_ones_dynamics(tmp_path):
    """With the ensemble's labels, beside the trajectory; once, and under these settings only."""
    path = config(tmp_path)
    data = read_yaml(path)
    data["train"]["students"] = {"plain": {}, "own": {"explored_by": ["plain"]}}
    data["train"]["exploration"] = {"n_runs": 3, "duration": 1.0, "stride": 100, "max_spread": 5}
    data["baselines"] = {"pair": None, "pair_student": None}
    write_settings(path, CoarseConfig.model_validate(data))

    def trained():
        return CliRunner().invoke(app, ["coarse", "train", str(path)])

    assert trained().exit_code == 0, trained().output
    run, settings = tmp_path / "run", CoarseConfig.model_validate(read_yaml(path)).train
    assert settings.exploration.timestep == 5.0, "that of the runs to judge by"
    record = json.loads((run / "own-0" / "run.json").read_text())
    explored = record["explored"]["plain-0"]
    assert explored["frames"] == 30
    assert explored["failed"] == []
    assert 0 < explored["used"] <= 30
    of = settings.experiment.by_name
    parts, _ = _training_data(settings.experiment, run, Run(of["own"], 0))
    alone, _ = _training_data(settings.experiment, run, Run(of["plain"], 0))
    training, n = parts["train"], len(alone["train"])
    assert len(training) == n + explored["used"]
    assert training.synthetic.tolist() == [k >= n for k in range(len(training))]
    assert not training.labels["reference"].presence("forces", len(training))[n:].any()
    assert len(parts["validation"]) == len(alone["validation"])
    visited = training.select(torch.arange(n, len(training)))
    mean = load_potential(run / "ensemble.pt")[0].predict(visited.structures)["forces"]
    torch.testing.assert_close(visited.labels[TEACHER]["forces"], mean)
    hot = visited.structures.velocities
    assert hot is not None
    assert hot.isfinite().all()
    data["train"]["exploration"]["duration"] = 2.0
    write_settings(path, CoarseConfig.model_validate(data))
    refused = trained()
    assert refused.exit_code != 0
    assert "own-0 holds a run with other settings" in refused.output.replace("\n", " ")


def test_baselines_that_cannot_be_are_refused(tmp_path):
    path = config(tmp_path)
    data = read_yaml(path)
    data["prior"] = {"bonds": [["dimer", "dimer"]]}
    with pytest.raises(ValueError, match=r"baselines.ibi knows no bonds"):
        CoarseConfig.model_validate(data)
    data = read_yaml(path)
    data["train"]["students"]["pair"] = {"forces": "mapped"}
    with pytest.raises(ValueError, match="two models are called 'pair'"):
        CoarseConfig.model_validate(data)
    data = read_yaml(path)
    data["run"]["figures"] = ["all teachers", "bets"]
    with pytest.raises(ValueError, match="no model 'bets'; did you mean 'best'"):
        CoarseConfig.model_validate(data)


def test_a_model_that_is_trained_anew_is_judged_anew(tmp_path):
    """Its dynamics and results are made again; those of the others are kept."""
    frames = Structures.concatenate([liquid(seed=k) for k in range(3)])
    store = LabeledStore.create(tmp_path / "beads.zarr", TABLE, {})
    store.append(frames, Properties({}))
    for name in "ab":
        save_potential(tmp_path / f"{name}.pt", SpeciesOffsets(TABLE, [0.0, 0.0]), {})

    class Heard(Display):
        def __init__(self):
            self.said = []

        def say(self, text):
            self.said.append(text)

    def judged(*names):
        heard = Heard()
        settings = EvaluateConfig(
            models={name: {"spec": str(tmp_path / f"{name}.pt")} for name in names},
            out=str(tmp_path / "evaluate"),
            trajectories={"reference": TrajectoryData(path=str(tmp_path / "beads.zarr"))},
            tests=("rdf",),
            options={"rdf": {"r_max": 4.0, "n_bins": 20}},
            settings=BenchSettings(temperature=300.0, timestep=5.0),
            dynamics=OwnDynamics(n_runs=1, duration=0.1, equilibration=0, stride=50),
        )
        assert evaluate(settings, heard).results["rdf"].keys() == {"reference", *names}
        found = json.loads((tmp_path / "evaluate" / "rdf.json").read_text())
        stamps = (tmp_path / "evaluate" / "dynamics").glob("?/segment_000000.npz")
        return found, {p.parent.name: p.stat().st_mtime_ns for p in stamps}, heard.said

    first, made, _ = judged("a")
    both, made_both, said = judged("a", "b")  # models may be added
    assert both["a"] == first["a"]
    assert made_both["a"] == made["a"]
    assert not said
    soft = PairPotential(TABLE, 3.5, 0.25)
    with torch.no_grad():
        soft.coefficients.fill_(0.05)
    save_potential(tmp_path / "a.pt", soft, {})
    again, made_again, said = judged("a", "b")
    assert said == ["a is another model now: its dynamics and evaluations are done again"]
    assert made_again["a"] != made["a"]
    assert made_again["b"] == made_both["b"]
    assert again["b"] == both["b"]
    assert again["a"] != both["a"]
    assert judged("b")[2] == []  # and be left out


# -- reline ---------------------------------------------------------------------------------------


def peak(table, pair):
    """Distance of the maximum of g(r) by model, and where g(r) is zero below."""
    panel = {row["series"]: ([], []) for row in table if row["title"] == pair}
    for row in table:
        if row["title"] == pair:
            panel[row["series"]][0].append(float(row["x"]))
            panel[row["series"]][1].append(float(row["y"]))
    return {
        name: (r[int(np.argmax(g))], min(x for x, y in zip(r, g, strict=True) if y > 0.01))
        for name, (r, g) in panel.items()
    }


def test_a_reduced_study_of_reline(tmp_path):
    """The config of the study with a few frames and epochs, two teachers and short runs."""
    pytest.importorskip("MDAnalysis", reason="reads the trajectory of reline")
    folder = data_path("reline")
    data = read_yaml(FOLDER / "reline.yaml")
    data["out"] = str(tmp_path / "run")
    data["map"] |= {
        "trajectory": {"path": str(folder / "reline_425K.trr"), "index": "100:1200:22"},
        "topology": str(folder / "reline_425K.tpr"),
    }
    small = {"dist_hard_max": 9.0, "l_max": 1, "n_sensitivities": 8, "n_channels": 8}
    data["train"] |= {"seeds": [0], "n_teachers": 2, "data": {}}
    data["train"]["common"] |= {"epochs": 4, "batch_size": 2}
    data["train"]["common"]["model"]["hyperparameters"] = small
    data["train"]["students"] = {"mapped": {"forces": "mapped"}, "ensemble": {}}
    data["baselines"] = {"pair_student": None}
    data["run"]["dynamics"] = {"n_runs": 2, "duration": 2, "equilibration": 1, "stride": 100}
    data["run"]["tests"] = {"stability": {}, "rdf": {"r_max": 12.0, "n_bins": 60}}
    data["run"]["figures"] = None
    path = tmp_path / "reline.yaml"
    write_settings(path, CoarseConfig.model_validate(data))
    result = CliRunner().invoke(app, ["coarse", "all", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    page = (run / "report.html").read_text()
    assert all(f">{name}</h2>" in page for name in ("Models", "Structure", "Figures", "Tables"))
    found = json.loads((run / "results.json").read_text())
    numbers = found["measures"]["evaluations"]
    models = numbers["runs"] | {k: v for k, v in numbers["others"].items() if k != "reference"}
    assert len(models) == 6
    assert all(own["failed_runs"] == 0.0 for own in models.values())  # no bead fused with another
    # Better than no forces at all, whose relative error is one.
    errors = {name: own["metrics"]["test"] for name, own in found["runs"].items()}
    errors |= found["measures"]["errors"]["others"]
    assert all(own["forces_relative_rmse"] < 0.98 for own in errors.values())
    with open(run / "report" / "rdf.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for pair in ("choline-chloride", "chloride-urea", "urea-urea"):
        places = peak(table, next(r["title"] for r in table if pair in r["title"]))
        at, first = places.pop("reference")
        assert len(places) == 5  # one teacher stands for both
        for own, begin in places.values():
            assert own == pytest.approx(at, abs=0.8)
            assert begin == pytest.approx(first, abs=0.8)


def test_a_molecule_goes_the_same_way(tmp_path):
    """The study of alanine dipeptide with few frames, trainings and steps."""
    CoarseConfig.model_validate(YAML(typ="safe").load(FOLDER / "ala2_6bead.yaml"))
    own = YAML(typ="safe").load(FOLDER / "ala2_5bead.yaml")
    own["out"] = str(tmp_path / "run")
    path = data_path("cg-ala2") / "ala2_5bead.npz"
    own["map"]["trajectory"] = {"path": str(path), "index": "::20"}
    own["train"] |= {"n_teachers": 2, "seeds": [0], "students": {"ensemble": {}}}
    own["train"]["common"] |= {"epochs": 1}
    own["run"] |= {"timestep": 2.0}  # few frames make a stiff repulsion
    own["run"]["dynamics"] |= {"n_runs": 4, "duration": 0.8, "equilibration": 0.2, "stride": 100}
    del own["run"]["tests"]["speed"]
    write_settings(tmp_path / "config.yaml", CoarseConfig.model_validate(own))
    command = ["coarse", "all", str(tmp_path / "config.yaml")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    numbers = json.loads((run / "results.json").read_text())["measures"]["evaluations"]
    student = numbers["runs"]["ensemble-0"]
    assert student["failed_runs"] == 0.0
    assert 0.0 < student["free_energy_error"] < 2.0
    assert 0.0 < student["internal_error"] < 2.0
    assert not {"rdf_error", "pressure"} & student.keys()
    assert {p.stem for p in (run / "report").glob("*.png")} >= {"internal", "free_energy"}
    page = (run / "report.html").read_text()
    assert "Population of alpha (%)" in page


def test_evaluations_fit_what_was_mapped():
    prior = PriorSettings(
        bonds=(("A", "B"), ("B", "C"), ("C", "D")), angles=(("A", "B", "C"), ("B", "C", "D"))
    )
    periodic = liquid()
    open_ends = periodic.with_fields(pbc=torch.zeros(1, 3, dtype=torch.bool))
    assert "rdf" in _fitting_tests(periodic, prior)
    tests = _fitting_tests(open_ends, prior)
    assert set(tests) == {"stability", "internal", "speed"}
    assert set(tests["internal"]["coordinates"]) == {
        "A-B", "B-C", "C-D", "A-B-C", "B-C-D", "A-B-C-D",
    }  # fmt: skip
    assert set(_fitting_tests(open_ends, None)) == {"stability", "speed"}


def test_a_temperature_is_needed(tmp_path):
    path = config(tmp_path)
    text = path.read_text().replace("temperature: 300.0", "temperature:")
    path.write_text(text)
    result = CliRunner().invoke(app, ["coarse", "train", str(path)])
    assert result.exit_code != 0
    assert "map.temperature" in result.output
