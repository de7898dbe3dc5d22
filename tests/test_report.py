"""Reports: a synthetic run and a synthetic study, all numbers of which are known."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from potstill.checkpoint import save_potential
from potstill.errors import DataError
from potstill.evaluate.base import Findings, as_json
from potstill.evaluate.elastic import ElasticConstants
from potstill.evaluate.eos import EquationOfState
from potstill.evaluate.errors import ErrorReport
from potstill.evaluate.learning import LearningCurves
from potstill.evaluate.memory import MemoryUse
from potstill.evaluate.nve import NVERun
from potstill.evaluate.parity import parity_points
from potstill.evaluate.rdf import RadialDistribution
from potstill.evaluate.speed import SpeedRow, SpeedTable
from potstill.experiments.figures import main_figures
from potstill.experiments.report import main_tables, report_sections
from potstill.experiments.report import verdicts as study_verdicts
from potstill.experiments.results import Results, RunRow
from potstill.experiments.spec import Role, Run, Variant
from potstill.experiments.tables import runs_tables
from potstill.metrics import METRICS
from potstill.models import HIPNN, SpeciesOffsets, SumPotential
from potstill.report.page import Page, write_page
from potstill.report.panels import Drawing, Panel, Series, looks
from potstill.report.plots import write_figure
from potstill.report.tables import Spread, Table, number
from potstill.report.verdicts import compare, over_metrics, over_sizes, sentence
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.train import TrainSettings
from potstill.workflows.report import collect, verdicts, write_report

MODELS = ("student", "control_wf10", "teacher")
SCALE = {"student": 1.0, "control_wf10": 1.2, "teacher": 0.0}


# -- a synthetic run ---------------------------------------------------------------------------


def metrics(scale, n=30):
    return {
        "forces_rmse": 0.050 * scale,
        "forces_mae": 0.035 * scale,
        "forces_relative_rmse": 0.062 * scale,
        "forces_cosine": 1.0 - 0.01 * scale,
        "energy_per_atom_rmse": 0.0021 * scale,
        "energy_per_atom_mae": 0.0016 * scale,
        "energy_rmse": 0.13 * scale,
        "stress_rmse": 0.0012 * scale,
        "atomic_energies_rmse": 0.011 * scale,
        "efwt": 41.0 / max(scale, 0.5),
        "efwt_n": n,
    }


def errors(model, scale):
    channel = f"{model}-teacher"
    groups = {"300 K": 0.5, "900 K": 0.9, "1500 K": 1.4, "rattled": 1.1}
    return ErrorReport(
        channels={channel: metrics(scale)},
        groups={group: {channel: metrics(scale * f)} for group, f in groups.items()},
        n_systems=30,
        n_atoms=1920,
    )


def speed(model):
    cost = {"student": 20e-6, "control_wf10": 20.4e-6, "teacher": 3.1e-3}[model]
    sizes = (64, 512) if model != "teacher" else (64, 216)
    rows = tuple(
        SpeedRow(model, n, s := cost * n * (1 + 10 / n), 0.95 * s, 1.1 * s, 3, 20) for n in sizes
    )
    machine = {"cpu": "A processor", "threads": 2, "versions": {"torch": "2.13.0"}}
    return SpeedTable(rows, timestep=2.0, temperature=1200.0, machine=machine)


def memory(model):
    slope = {"student": 21e3, "control_wf10": 21e3, "teacher": 1.9e6}[model]
    n = np.array([500, 1000, 2000])
    return MemoryUse(model, n, (3e8 + slope * n).astype(int), slope, 0.01 * slope, 3e8)


def nve(model):
    time = np.arange(0.0, 20.0, 0.02)
    rng = np.random.default_rng(0)
    energy = 0.004 * time * SCALE[model] + 0.02 * rng.normal(size=len(time))
    distances = {"Si-Si": 2.01}
    return NVERun(1200.0, 590.0, 2.0, 20.0, 64, time, energy, 0.004, 4e-4, 0.08, 0.02,
                  distances, None, "")  # fmt: skip


def eos(model):
    v = np.linspace(18.0, 22.0, 11)
    shift = {"student": 0.01, "control_wf10": -0.02, "teacher": 0.0}[model]
    e = -5.4 + 0.02 * (v - 20.1 - shift) ** 2
    lengths = (5.43 + shift, 5.43 + shift, 5.43 + shift)
    return EquationOfState(v, e, 20.1 + shift, -5.4, 95.0 + 100 * shift, 4.1, lengths, 1e-4)


def elastic(model):
    c11, c12, c44 = 150.0 + SCALE[model], 60.0, 75.0 + SCALE[model]
    tensor = np.diag([c11] * 3 + [c44] * 3) + np.pad(c12 * (1 - np.eye(3)), (0, 3))
    return ElasticConstants(tensor, 0.1, 0.0, "stress", True, 0.005)


def rdf(model):
    r = np.linspace(0.05, 7.95, 80)
    g = 1.0 + np.exp(-((r - 2.4) ** 2) / 0.02) * (3 - 0.1 * SCALE[model]) - np.exp(-r)
    g = np.where(r < 1.9, 0.0, g)
    error = np.full_like(r, 0.02 if model == "teacher" else 0.01)
    return RadialDistribution(r, g, error, np.cumsum(g), "all", 0.05, 100, 5)


def parity(scale):
    rng = np.random.default_rng(1)
    f = rng.normal(size=2000)
    e = -5.4 + 0.1 * rng.normal(size=30)
    return {
        "forces": {"label": f, "prediction": f + 0.05 * scale * rng.normal(size=2000), "n": 5760},
        "energy": {"label": e, "prediction": e + 0.002 * scale * rng.normal(size=30), "n": 30},
    }


def write_curve(folder, scale):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for epoch in range(1, 61):
        value = scale * (0.05 + math.exp(-epoch / 8))
        record = {"epoch": epoch, "train": {"forces:chgnet": 1.7 * value, "loss": 40 * value},
                  "validation": {"forces_rmse": value}, "best": True}  # fmt: skip
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_evaluation(folder, scale=SCALE):
    folder.mkdir(parents=True, exist_ok=True)
    students = ("student", "control_wf10")
    tests = {
        "errors": {m: errors(m, scale[m]) for m in students},
        "speed": {m: speed(m) for m in MODELS},
        "memory": {m: memory(m) for m in MODELS},
        "nve": {m: nve(m) for m in students},
        "eos": {m: eos(m) for m in MODELS},
        "elastic": {m: elastic(m) for m in MODELS},
        "rdf": {m: rdf(m) for m in ("student", "teacher")},
        "parity": {m: parity(scale[m]) for m in students},
    }
    for test, results in tests.items():
        (folder / f"{test}.json").write_text(json.dumps(as_json(results)))


def write_run(folder):
    """A run folder as `potstill distill` leaves it."""
    write_evaluation(folder / "evaluation")
    table = SpeciesTable.from_names(["Si"]) if hasattr(SpeciesTable, "from_names") else None
    table = table or Structures.from_ase(silicon()).species_table
    network = HIPNN(table, n_features=4, n_sensitivities=4, dist_soft_min=1.5, dist_soft_max=4.0,
                    dist_hard_max=5.0, n_atom_layers=1)  # fmt: skip
    potential = SumPotential({"offsets": SpeciesOffsets(table, torch.zeros(1)), "network": network})
    info = {
        "trained_on": {"elements": ["Si"], "n_frames": 300, "temperature_K": [300.0, 1200.0],
                       "density_g_cm3": [2.1, 2.5], "shortest_distances": {"Si-Si": 2.1}},
        "teacher": {"name": "chgnet", "license": "BSD-3-Clause <all>", "citation": "Deng 2023",
                    "level_of_theory": "PBE+U", "fingerprint": "abc123"},
        "versions": {"potstill": "0.1", "torch": "2.13.0"},
        "seed": 7,
    }  # fmt: skip
    save_potential(folder / "student.pt", potential, info)
    for name in ("student", "control_wf10"):
        write_curve(folder / name, SCALE[name])
    (folder / "config.yaml").write_text("seed: 7\nteacher:\n  spec: chgnet\n")
    (folder / "plan.json").write_text(json.dumps({"n_atoms": 64}))
    (folder / "stages.json").write_text(json.dumps({"label": {"seconds": 301.2}}))
    return folder


def silicon():
    from ase.build import bulk

    return bulk("Si", "diamond", a=5.43, cubic=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run):
    path = write_report(run, about={"Command": "potstill distill --teacher chgnet"})
    return path.read_text(encoding="utf-8").replace("\u00a0", " ")


FIGURES = ("parity", "groups", "learning", "pareto", "speed", "memory", "eos", "nve", "rdf")
TABLES = ("table_errors", "table_cost", "table_properties", "table_dynamics")


# -- pages -------------------------------------------------------------------------------------


class References(HTMLParser):
    """What a page asks a browser to fetch, and whether its tags match."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.ids, self.images = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "action", "data", "background", "poster"):
                self.fetched.append(value)
            if name == "href" and not value.startswith("#"):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_self_contained(text):
    found = References(text)
    assert not found.open
    assert all(value.startswith("data:image/svg+xml;base64,") for value in found.fetched)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert all(image["alt"] for image in found.images)
    assert len(set(found.ids)) == len(found.ids)
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert set(anchors) <= set(found.ids)
    return found


def read_csv(path):
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def check_figure(folder, name):
    picture = imread(folder / f"{name}.png")
    assert picture.shape[0] > 100
    assert picture[..., :3].std() > 0.02
    svg = (folder / f"{name}.svg").read_text()
    assert "nan" not in re.sub(r"base64,[^\"]*", "", svg).lower()
    rows = read_csv(folder / f"{name}.csv")
    assert rows
    assert all(row["series"] and row["y quantity"] is not None for row in rows)
    return rows


def test_report_is_one_file_without_references(page):
    found = check_self_contained(page)
    assert len(found.images) == len(FIGURES)


def test_every_figure_and_table_has_its_files(run, page):
    for name in FIGURES:
        rows = check_figure(run / "report", name)
        column = "x" if name == "groups" else "y"
        assert all(math.isfinite(float(row[column])) for row in rows)
    for name in TABLES:
        assert (run / "report" / f"{name}.csv").stat().st_size > 50
        assert (run / "report" / f"{name}.md").read_text().startswith("**")


def test_header_says_what_when_and_whose(page):
    for text in ("chgnet distilled for Si", "potstill distill --teacher chgnet", "abc123",
                 "Deng 2023", "BSD-3-Clause &lt;all&gt;", "torch 2.13.0", "<dt>Seed</dt><dd>7",
                 "300 structures of Si", "A processor; 2 threads", "label 301 s",
                 "potstill distill --config"):  # fmt: skip
        assert text in page


def test_summary_is_computed(page):
    for text in ("<dd>6.20 <", "to 6.20 % (RMSE", "below the bar of 10 %",
                 "0.0500 eV/Å against 0.0600 eV/Å: "
                 "the student is better than the control (w_F = 10) by 17 %",
                 "one run each, so the role of chance is unknown",
                 "155 times faster", "drifts by +0.080 ± 0.0080 meV/atom",
                 "2.01 Å apart, 0.96 times", "at strain 0.005, the",
                 "C11 151 (150), C12 60.0 (60.0), C44 76.0 (75.0); largest deviation 1.3 % (C44)",
                 "Lattice constant 5.440 Å (teacher 5.430 Å, +0.18 %)"):  # fmt: skip
        assert text in page


def quantities(path):
    """Rows of a table by quantity."""
    return {row["Quantity"]: row for row in read_csv(path)}


def test_tables_hold_the_numbers(run, page):
    rows = quantities(run / "report" / "table_errors.csv")
    models = ["Quantity", "student", "control (w_F = 10)"]
    assert list(rows["Force RMSE (eV/Å)"]) == models
    assert float(rows["Force RMSE (eV/Å)"]["control (w_F = 10)"]) == pytest.approx(0.060)
    assert float(rows["Energy RMSE (meV/atom)"]["student"]) == pytest.approx(2.1)
    stress = float(rows["Stress RMSE (GPa)"]["student"])
    assert stress == pytest.approx(0.0012 * 160.21766, rel=1e-5)
    n_parameters = collect(run).found.n_parameters["student"]
    assert int(rows["Parameters"]["student"]) == n_parameters > 10
    crystal = quantities(run / "report" / "table_properties.csv")
    bulk_modulus = crystal["Bulk modulus, E(V) (GPa)"]
    assert float(bulk_modulus["student − teacher (%)"]) == pytest.approx(100 / 95)
    assert float(crystal["C44 at strain 0.005 (GPa)"]["student"]) == 76.0
    deviation = crystal["Elastic deviation, largest (%)"]
    assert float(deviation["student"]) == pytest.approx(100 / 75)
    dynamics = quantities(run / "report" / "table_dynamics.csv")
    total = sum(abs(a - b) for a, b in zip(rdf("student").g, rdf("teacher").g, strict=True))
    distance = dynamics["g(r): sum over bins of absolute differences"]["student"]
    assert float(distance) == pytest.approx(total)
    assert dynamics["NVE run"]["student"] == "sound"
    assert float(dynamics["NVE drift (meV/atom)"]["student"]) == pytest.approx(0.08)
    cost = quantities(run / "report" / "table_cost.csv")
    faster = cost["Times faster than the teacher (largest common size)"]["student"]
    assert float(faster) == pytest.approx(155.0)
    assert float(cost["Memory per atom (KiB)"]["student"]) == pytest.approx(21e3 / 1024)


def summary(folder):
    """Verdicts and the facts above them as one text."""
    return " ".join(verdicts(collect(folder).found))


def test_verdict_is_honest_when_the_control_wins(tmp_path):
    write_evaluation(tmp_path / "evaluation", {"student": 2.0, "control_wf10": 1.0, "teacher": 0.0})
    text = summary(tmp_path)
    assert "the student is worse than the control (w_F = 10) by 100 %" in text
    assert "12.4 % (RMSE over the standard deviation of the forces), above the bar of 10 %" in text
    assert "is better than" not in text


def test_wrong_elastic_constants_are_said(tmp_path):
    write_evaluation(tmp_path / "evaluation")
    wrong = np.diag([151.0] * 3 + [-4.0] * 3) + np.pad(-90.0 * (1 - np.eye(3)), (0, 3))
    wrong = dataclasses.replace(elastic("student"), tensor=wrong)
    both = {"student": wrong.to_json(), "teacher": elastic("teacher").to_json()}
    write_only(tmp_path, eos={m: as_json(eos(m)) for m in MODELS}, elastic=both)
    lines = verdicts(collect(tmp_path).found)
    assert "C12 −90.0 (60.0), C44 −4.00 (75.0); largest deviation 250 % (C12)" in " ".join(lines)
    assert lines[0].startswith(
        "Bars missed (2 of 2): mechanical stability (C11 + 2 C12 = −29.0 GPa"
    )
    assert "C44 = −4.00 GPa" in lines[0]
    assert "at strain 0.005 (C12 −90.0 GPa, teacher 60.0 GPa)" in lines[0]


def test_what_fails_for_the_student_alone_is_a_missed_bar(tmp_path):
    write_evaluation(tmp_path / "evaluation")
    stuck = {"error": "relaxing Si8 did not reach 0.001 eV/Å"}
    crystal = {"student": stuck, "teacher": elastic("teacher").to_json()}
    write_only(tmp_path, eos={m: as_json(eos(m)) for m in MODELS}, elastic=crystal)
    lines = verdicts(collect(tmp_path).found)
    assert lines[0] == "Bars missed (1 of 1): elastic constants of the student (not done)."
    assert lines[1].endswith("could not be computed: relaxing Si8 did not reach 0.001 eV/Å.")
    write_only(tmp_path, elastic={"student": stuck, "teacher": stuck})  # phonopy, say, is missing
    found = collect(tmp_path).found
    assert found.problems[0].startswith("Not done: elastic constants of student, teacher (relaxing")
    assert not verdicts(found)


def test_untimed_controls_are_drawn_at_the_cost_of_the_student(run, tmp_path):
    data = collect(run)
    results = {
        "errors": data.found.results["errors"],
        "speed": {m: speed(m) for m in ("student", "teacher")},
    }
    found = Findings(results, n_parameters={"student": 9, "control_wf10": 9})
    write_report(dataclasses.replace(data, folder=tmp_path, found=found, curves={}))
    rows = read_csv(tmp_path / "report" / "pareto.csv")
    x = {row["series"]: float(row["x"]) for row in rows if row["kind"] == "points"}
    assert x["control_wf10"] == x["student"] < x["teacher"]


def test_unstable_dynamics_is_said(tmp_path):
    write_evaluation(tmp_path / "evaluation")
    broken = dataclasses.replace(nve("student"), exploded_at=3.5, reason="the temperature rose")
    write_only(tmp_path, nve={"student": broken.to_json()})
    assert "broke down after 3.5 ps: the temperature rose" in summary(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "unstable" in text
    table = (tmp_path / "report" / "table_dynamics.md").read_text()
    assert "broke down after 3.5 ps" in table
    assert "drift" not in table.split("Slope:")[0]
    assert "below the bar" not in summary(tmp_path).split("NVE")[1]


def write_only(folder, **tests):
    """Replace all evaluations by these."""
    for path in (folder / "evaluation").glob("*.json"):
        path.unlink()
    for test, results in tests.items():
        (folder / "evaluation" / f"{test}.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("present", "figures"),
    [
        (("errors",), {"groups"}),
        (("speed", "memory"), {"speed", "memory"}),
        (("errors", "memory"), {"groups", "memory", "pareto"}),
        (("eos",), {"eos"}),
        (("elastic",), set()),
        (("rdf", "nve"), {"rdf", "nve"}),
    ],
)
def test_what_is_absent_is_left_out(tmp_path, present, figures):
    write_evaluation(tmp_path / "evaluation")
    for path in (tmp_path / "evaluation").glob("*.json"):
        if path.stem not in present:
            path.unlink()
    found = check_self_contained(write_report(tmp_path).read_text())
    drawn = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert drawn == figures
    assert len(found.images) == len(drawn)


def test_an_empty_run_still_gives_a_page(tmp_path):
    text = write_report(tmp_path).read_text()
    assert "Nothing has been evaluated yet." in text
    assert not check_self_contained(text).images


def test_failed_tests_are_reported(tmp_path):
    write_evaluation(tmp_path / "evaluation")
    failed = {"student": eos("student").to_json(), "teacher": {"error": "it <broke>"}}
    write_only(tmp_path, eos=failed)
    text = write_report(tmp_path).read_text()
    assert "Not done: equation of state of teacher (it &lt;broke&gt;)." in text
    assert (tmp_path / "report" / "eos.png").is_file()


def test_reports_can_be_written_again(tmp_path):
    write_evaluation(tmp_path / "evaluation")
    write_only(tmp_path, nve={"student": as_json(nve("student"))})
    write_report(tmp_path)
    before = (tmp_path / "report" / "nve.svg").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "report" / "nve.svg").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_no_folder_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist: a report needs the folder of a run"):
        write_report(tmp_path / "nothing")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "nve.json").write_text("{")
    with pytest.raises(DataError, match=r"nve\.json: not a JSON file"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_parity_points_sample_what_both_have():
    structures = Structures.from_ase([silicon(), silicon()])
    forces = torch.arange(48, dtype=torch.float64).reshape(16, 3)
    label = Properties(
        {"energy": torch.tensor([8.0, 16.0], dtype=torch.float64), "forces": forces},
        {"forces": torch.tensor([True, False])},
    )
    prediction = Properties({"energy": torch.tensor([8.8, 16.0]), "forces": forces + 1.0})
    points = parity_points(prediction, label, structures, max_points=10).to_json()
    assert points["energy"]["prediction"] == pytest.approx([1.1, 2.0])
    assert points["forces"]["n"] == 24
    assert len(points["forces"]["label"]) == 10
    assert points["forces"]["label"] == [v - 1.0 for v in points["forces"]["prediction"]]
    json.dumps(points, allow_nan=False)


# -- studies -----------------------------------------------------------------------------------


def curve(value, epochs):
    epochs = np.arange(1, epochs + 1)
    values = value + np.exp(-epochs / 6)
    return LearningCurves(
        tuple(int(e) for e in epochs),
        {"train/forces:reference": tuple(1.7 * values), "validation/forces_rmse": tuple(values)},
    )


def study_row(strategy, size, n_parameters, seed=0, **others):
    roles = {"student": Role.STUDENT, "control_wf10": Role.CONTROL}
    against = (f"control_wf10-{size}",) if strategy == "student" else ()
    variant = Variant(
        f"{strategy}-{size}",
        roles.get(strategy, Role.TEACHER),
        strategy,
        size,
        TrainSettings(),
        against=against,
    )
    return RunRow(Run(variant, seed), n_parameters, **others)


def study_rows(control=1.2, seeds=3, sizes=(("small", 3000), ("large", 20000))):
    rows = []
    for size, n in sizes:
        for strategy, factor in (("student", 1.0), ("control_wf10", control)):
            for seed in range(seeds):
                value = factor * (0.3 if size == "small" else 0.2) + 0.004 * (seed - 1)
                numbers = {"forces_rmse": value, "energy_per_atom_rmse": value / 50,
                           "rdf_error": 3 * value, "time_per_step_atom_us": 5 + n / 2000,
                           "memory_per_atom_kib": 4 + n / 5000}  # fmt: skip
                rows.append(
                    study_row(strategy, size, n, seed, metrics=numbers,
                              curve=curve(value, 30 + seed))
                )  # fmt: skip
    errors = {"forces_rmse": 0.15}
    rows.append(study_row("teacher", "teacher", 90000, 0, metrics=errors, curve=curve(0.15, 40)))
    return rows


BASELINES = {"SNAP": {"forces_rmse": 0.376}}


def test_study_tables_are_means_and_deviations():
    results = Results(study_rows(), BASELINES)
    table, cost, comparisons = main_tables(results)
    runs, _ = runs_tables(results)
    assert table.name == "table_errors"
    row = next(r for r in table.rows if r[:2] == ("control (w_F = 10)", "small"))
    assert row[2:4] == (3000, 3)
    assert isinstance(row[4], Spread)
    assert row[4].mean == pytest.approx(0.36)
    assert row[4].deviation == pytest.approx(0.004)
    assert "| 0.3600 ± 0.0040 |" in table.markdown()
    assert "| SNAP | published | – | – | 0.376 |" in table.markdown()
    written = next(line for line in table.csv().splitlines() if line.startswith("control"))
    assert [float(cell) for cell in written.split(",")[4:7]] == pytest.approx([0.36, 0.004, 3])
    assert cost.columns[-2:] == ("Time per step and atom (µs)", "Memory per atom (KiB)")
    change = next(r for r in comparisons.rows if r[0] == "small" and "Force" in r[2])
    assert change[5] == pytest.approx(100 * (0.30 - 0.36) / 0.36)
    assert change[6] < change[5] < change[7]
    assert change[8] == "better"
    assert len(runs.rows) == 13


def test_study_verdicts_follow_the_numbers():
    better = study_verdicts(Results(study_rows(control=1.2)))[0]
    assert "better than that of the control (w_F = 10) at 2 of 2 sizes" in better
    assert "beyond the spread over seeds it is better at small, large" in better
    worse = study_verdicts(Results(study_rows(control=0.8)))[0]
    assert "at 0 of 2 sizes" in worse
    assert "it is worse at small, large" in worse
    equal = study_verdicts(Results(study_rows(control=1.003)))[0]
    assert "none of these differences is beyond the spread over seeds" in equal
    mixed = [r for r in study_rows() if r.run.variant.strategy != "student" or r.run.seed == 0]
    assert "one of them has a single run, so the role" in study_verdicts(Results(mixed))[0]
    single = study_verdicts(Results(study_rows(seeds=1)))[0]
    assert "one run each, so the role of chance is unknown" in single


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    results = Results(study_rows(), BASELINES)
    sections = report_sections(results, folder / "report")
    about = (("Command", "potstill study x.yaml"),)
    page = Page("A & B", about, study_verdicts(results), (), ("A note.",), sections)
    return write_page(page, folder / "report.html").read_text(), folder / "report"


def test_study_figures(study):
    folder = study[1]
    names = ["pareto", "capacity", "learning_small", "learning_large", "learning_teacher", "cost",
             "seeds"]  # fmt: skip
    assert sorted(path.stem for path in folder.glob("*.svg")) == sorted(names)
    for name in names:
        check_figure(folder, name)
    rows = read_csv(folder / "capacity.csv")
    student = [r for r in rows if r["series"] == "student" and r["panel"] == "A"]
    assert [float(r["x"]) for r in student] == [3000.0, 20000.0]
    assert float(student[0]["y"]) == pytest.approx(0.3)
    assert float(student[0]["y spread"]) == pytest.approx(0.004)


def test_liquids_are_compared_with_the_reference(tmp_path):
    reference = RadialDistribution.from_json(rdf("teacher").to_json())
    shifts = {"teacher": 0.0, "student": 0.1, "control_wf10": 0.2}
    rows = []
    for row in study_rows():
        shift = shifts[row.run.variant.strategy] + 0.01 * row.run.seed
        rows.append(replace(row, rdf=replace(reference, g=reference.g + shift)))
    figures = main_figures(Results(rows, liquid=("ANI-Al", reference)), tmp_path)
    assert "rdf" in [figure.name for figure in figures]
    check_figure(tmp_path, "rdf")
    student = [
        row
        for row in read_csv(tmp_path / "rdf.csv")
        if row["series"] == "student" and row["panel"] == "B"
    ]
    assert float(student[10]["y"]) == pytest.approx(0.11)  # mean of three seeds
    assert float(student[10]["y spread"]) == pytest.approx(0.01)
    (tmp_path / "without").mkdir()
    main_figures(
        Results(rows), tmp_path / "without"
    )  # the teacher's is what others are compared with
    lines = read_csv(tmp_path / "without" / "rdf.csv")
    differences = [row for row in lines if row["panel"] != "A"]
    assert {row["series"] for row in differences} == {"student", "control_wf10"}


def test_learning_curves_average_where_all_seeds_have_come(study):
    rows = read_csv(study[1] / "learning_small.csv")
    mean = [r for r in rows if r["series"] == "student" and r["kind"] == "line"]
    assert max(float(r["x"]) for r in mean if r["panel"] == "B") == 30
    thin = [r for r in rows if r["series"] == "student" and r["kind"] == "thin"]
    assert max(float(r["x"]) for r in thin) == 32
    last = next(r for r in mean if r["panel"] == "B" and float(r["x"]) == 30)
    assert float(last["y"]) == pytest.approx(0.3 + math.exp(-5))


def test_study_report(study):
    text, folder = study
    found = check_self_contained(text)
    assert len(found.images) == 7
    assert "<title>A &amp; B</title>" in text
    assert "<p>A note.</p>" in text
    assert (folder / "table_errors.md").is_file()


def test_study_figures_without_a_page(tmp_path):
    rows = [row for row in study_rows() if row.run.variant.group == "teacher"]
    figures = report_sections(Results(rows), tmp_path / "made")[0].figures
    assert [figure.name for figure in figures] == ["capacity", "learning_teacher", "seeds"]
    assert all(figure.png.is_file() and figure.caption for figure in figures)


def test_one_row_of_an_unknown_strategy_is_enough(tmp_path):
    rows = [study_row("novel_idea", "s", 100, metrics={"forces_rmse": 0.1})]
    sections = report_sections(Results(rows), tmp_path)
    assert study_verdicts(Results(rows)) == ("There is no pair of strategies to compare.",)
    assert "novel idea" in sections[1].tables[0].markdown()


def test_bad_studies_are_refused():
    with pytest.raises(DataError, match="at least one run"):
        Results([])
    row = study_row("student", "s", 100)
    with pytest.raises(DataError, match="two runs of the study are called 'student-s-0'"):
        Results([row, row])


# -- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (123456.0, "123,456"), (0.0, "0"), (2.0, "2.00"), (-0.5, "−0.500"),
     (1.5e-7, "1.50e−07"), (math.nan, "–")],
)  # fmt: skip
def test_numbers_are_readable(value, text):
    assert number(value) == text


def test_spreads_show_two_digits_of_the_deviation():
    assert str(Spread(0.0834, 0.0031, 4)) == "0.0834 ± 0.0031"
    assert str(Spread.of([1.0])) == "1.00"
    assert str(Spread.of([])) == "–"
    assert str(Spread.of([1.0, math.nan, 3.0])) == "2.0 ± 1.4"
    assert str(Spread(1234.5, 99.7, 3)) == "1234 ± 100"


def test_tables_escape_text():
    table = Table("t", "T", ("a|b", "n"), (("x|y<z>", 1),), "note")
    assert "x\\|y<z>" in table.markdown()
    assert "x|y&lt;z&gt;" in table.html()


def test_a_single_difference_within_chance_is_called_unclear():
    metric = METRICS["forces_rmse"]
    text = sentence(compare(metric, [0.10, 0.12], [0.105, 0.121]), "student", "control")
    assert "no difference between the student and the control beyond the spread" in text
    missing = compare(metric, [math.nan], [0.1])
    assert missing.outcome == "unknown"
    assert "a value is missing" in sentence(missing, "student", "control")
    cosine = compare(METRICS["forces_cosine"], [0.99], [0.98])
    assert cosine.outcome == "better"
    assert "is better than" in over_sizes([("s", cosine)], "student", "control")


def test_one_sentence_tells_where_a_student_is_ahead():
    forces, rdf, adf = (METRICS[key] for key in ("forces_rmse", "rdf_error", "adf_error"))
    group = [
        compare(rdf, [0.30, 0.34], [0.31, 0.32]),
        compare(forces, [0.100, 0.101], [0.200, 0.202]),
        compare(adf, [0.04], [0.02]),
    ]
    assert over_metrics(group, "student", "control") == (
        f"student against control: better in {forces.name} (−50 %); worse (one run each) in "
        f"{adf.name} (+100 %); no difference beyond the spread over seeds in {rdf.name} (+1.6 %)."
    )


def test_colors_are_the_same_everywhere():
    one, other = looks(["student", "x", "y"]), looks(["teacher", "student"])
    assert one["student"] == other["student"]
    assert len({look.color for look in one.values()}) == 3
    many = looks(map(str, range(20)))
    assert len({(look.color, look.line) for look in many.values()}) == 20


def test_figures_leave_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    backend = matplotlib.get_backend()
    panel = Panel("x (Å)", "y (eV)", [Series("student", [1, 2], [1.0, math.nan])], x_scale="auto")
    write_figure(tmp_path, Drawing("f", "F", "Caption.", [panel]))
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend


def test_template_is_part_of_the_package():
    import potstill.report

    assert (Path(potstill.report.__file__).parent / "templates" / "page.html").is_file()
