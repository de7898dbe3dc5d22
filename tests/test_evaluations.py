"""Evaluations as objects: what applies, what they say, and the physics behind their numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import write

from potstill.errors import DataError
from potstill.evaluate import lattice
from potstill.evaluate.base import Bench, BenchSettings, Candidate, Evaluation, Findings, Result
from potstill.evaluate.elastic import Elastic, ElasticConstants, ElasticScan
from potstill.evaluate.eos import EquationOfState, equation_of_state
from potstill.evaluate.errors import ErrorReport, Errors, S2EFErrors, evaluate_errors
from potstill.evaluate.memory import MemoryUse
from potstill.evaluate.nve import run_nve
from potstill.evaluate.parity import ParityPoints
from potstill.evaluate.speed import SpeedRow, SpeedTable, Throughput
from potstill.evaluate.table import EVALUATIONS
from potstill.evaluate.tools import repeat_to
from potstill.evaluate.vibrations import Vibrations, VibrationsEvaluation, vibrations
from potstill.metrics import METRICS, Estimate
from potstill.report.tables import number
from potstill.report.verdicts import ordered_verdicts
from potstill.structures import Properties, Structures
from potstill.units import OMEGA_IN_WAVE_NUMBERS
from potstill.workflows.base import Display
from potstill.workflows.evaluation import (
    EvaluateConfig,
    evaluate,
    read_findings,
    run_evaluations,
)
from potstill.workflows.planning import Counts, Order
from potstill.workflows.report import verdicts, write_report
from potstill.workflows.summary import result_rows, summarize, summary_rows
from test_soundness import Bond, carbon_monoxide

# -- the conventional cell -----------------------------------------------------------------------


@pytest.mark.parametrize("repeat", [(1, 1, 1), (3, 3, 3), (1, 2, 3)])
def test_the_lattice_constant_of_a_supercell_is_that_of_its_unit(repeat):
    ordered = bulk("Cu", "fcc", a=3.87, cubic=True)
    ordered.numbers[[0, 1]] = 79  # CuAu: layers along an axis
    assert lattice.repeats(ordered * repeat) == repeat
    np.testing.assert_allclose(lattice.conventional_lengths(ordered * repeat), 3.87, atol=1e-9)


@pytest.mark.parametrize("cubic", [True, False])
@pytest.mark.parametrize("repeat", [1, 2])
def test_primitive_and_cubic_cells_have_one_lattice_constant(cubic, repeat):
    for name, structure, a in (("Al", "fcc", 4.05), ("Si", "diamond", 5.43), ("Fe", "bcc", 2.87)):
        atoms = bulk(name, structure, a=a, cubic=cubic) * (repeat, repeat, repeat)
        np.testing.assert_allclose(lattice.conventional_lengths(atoms), a, rtol=1e-6)
    hexagonal = bulk("Mg", "hcp", a=3.2, c=5.2) * (repeat, 1, repeat)
    np.testing.assert_allclose(lattice.conventional_lengths(hexagonal), [3.2, 3.2, 5.2], rtol=1e-6)


def test_displaced_atoms_are_no_supercell():
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.rattle(0.1, seed=0)
    assert lattice.repeats(atoms) == (1, 1, 1)
    np.testing.assert_allclose(lattice.conventional_lengths(atoms), 2 * 3.61)


def test_equation_of_state_of_a_supercell_has_the_constant_of_the_cell():
    one, eight = (
        equation_of_state(bulk("Cu", cubic=True) * (n, n, n), EMT(), n_points=7) for n in (1, 2)
    )
    assert eight.lattice_constant == pytest.approx(one.lattice_constant, rel=1e-6)
    assert eight.cell_lengths[0] == pytest.approx(2.0 * one.lattice_constant, rel=1e-6)
    old = {k: v for k, v in eight.to_json().items() if k != "lattice_lengths"}
    assert EquationOfState.from_json(old).lattice_constant == eight.cell_lengths[0]


# -- elastic stability ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constants", "broken"),
    [
        ((160.0, 60.0, 80.0), ()),
        ((160.0, 60.0, -4.0), ("C44",)),
        ((60.0, 90.0, 40.0), ("C11 − C12",)),
        ((100.0, -76.0, 40.0), ("C11 + 2 C12",)),
    ],
)
def test_born_criteria_are_named(constants, broken):
    c11, c12, c44 = constants
    tensor = np.diag([c11] * 3 + [c44] * 3) + np.pad(c12 * (1 - np.eye(3)), (0, 3))
    result = ElasticConstants(tensor, 0.0, 0.0, "stress", True, 0.003)
    assert [text.partition(" =")[0] for text in result.instabilities()] == list(broken)
    assert result.stable == (not broken)
    scan = ElasticScan((result,))
    lines = ordered_verdicts(list(Elastic.verdicts(Findings({"elastic": {"student": scan}}))))
    assert len(lines) == (2 if broken else 0)
    if broken:
        assert "mechanically unstable" in lines[1]
        assert lines[1].endswith("at strain 0.003.")
        assert lines[0].startswith(f"Bars missed (1 of 1): mechanical stability ({broken[0]}")


def test_instability_that_no_cubic_criterion_sees_is_found():
    tensor = np.diag([100.0] * 3 + [90.0, 90.0, -1.0])
    (text,) = ElasticConstants(tensor, 0.0, 0.0, "stress", True, 0.003).instabilities()
    assert text == "lowest eigenvalue of the elastic tensor = −1.00 GPa"


# -- vibrations ----------------------------------------------------------------------------------


def test_one_spring_has_one_frequency():
    atoms, constant = carbon_monoxide(), 80.0
    found = vibrations(atoms, Bond(1.13, constant)).frequencies
    reduced = 1.0 / (1.0 / atoms.get_masses()).sum()
    hertz = math.sqrt(constant / reduced) * ase.units.s / (2.0 * math.pi)
    assert found == pytest.approx([hertz / (100.0 * ase.units._c)], rel=1e-4)


def test_rigid_motions_are_left_out():
    assert len(vibrations(molecule("H2O"), EMT(), fmax=0.01).frequencies) == 3
    assert len(vibrations(molecule("N2"), EMT(), fmax=0.01).frequencies) == 1
    assert len(vibrations(bulk("Cu", cubic=True), EMT()).frequencies) == 9
    slab = fcc111("Cu", (1, 1, 3), vacuum=6.0)
    slab.set_constraint(FixAtoms([0]))
    held = vibrations(slab, EMT())
    assert len(held.frequencies) == 6
    assert held.n_imaginary == 0
    assert (held.frequencies > 10.0).all()


def test_plans_count_the_calls_of_vibrations():
    class Counting(EMT):
        n_calls = 0

        def calculate(self, *args, **kwargs):
            self.n_calls += 1
            super().calculate(*args, **kwargs)

    calculator, slab = Counting(), fcc111("Cu", (1, 1, 4), vacuum=6.0)
    vibrations(slab, calculator)
    start = Structures.from_ase(slab)
    order = Order(start, 4, 600.0, 0, 0, 1, False, Counts(), start, ("vibrations",))
    assert 24 < calculator.n_calls <= order.teacher_calls(lean=False) <= 40
    large = slab * (1, 1 + VibrationsEvaluation().max_atoms // 4, 1)
    order = replace(order, unit_cell=Structures.from_ase(large))
    assert order.teacher_calls(lean=False) == 0
    # Of crystals there are phonons instead: one displacement of 64 atoms, and a relaxation.
    silicon = Structures.from_ase(bulk("Si", cubic=True))
    order = replace(order, unit_cell=silicon, teacher_tests=("vibrations", "phonons"))
    assert order.teacher_calls(lean=False) == (2 * 64 + 10 * 8) / 4
    assert VibrationsEvaluation().lacks(Bench(BenchSettings(), silicon)).endswith("have phonons")


def test_crystal_vibrations_against_forces_along_the_mode():
    # The optical mode of a two-atom cell: one atom against the other, omega² = 2 k / m.
    atoms = bulk("Cu", "bcc", a=2.85, cubic=True)
    found = vibrations(atoms, EMT(), fmax=0.01)
    moved = atoms.copy()
    moved.positions[0, 0] += 0.01
    moved.calc = EMT()
    force = 0.5 * (moved.get_forces()[1, 0] - moved.get_forces()[0, 0])
    square = 2.0 * force / 0.01 / atoms.get_masses()[0]
    expected = math.copysign(math.sqrt(abs(square)), square) * OMEGA_IN_WAVE_NUMBERS
    assert np.abs(found.frequencies - expected).min() < 0.02 * abs(expected)


# -- what applies to molecules and slabs ---------------------------------------------------------


def test_molecules_and_slabs_can_be_made_larger():
    water = molecule("H2O")
    many = repeat_to(water, 20)
    assert len(many) == 21
    assert not many.pbc.any()
    distances = many.get_all_distances()
    together = np.repeat(np.arange(7), 3)
    apart = together[:, None] != together[None, :]
    assert distances[apart].min() > 10.0
    slab = repeat_to(fcc111("Cu", (1, 1, 3), vacuum=6.0), 20)
    assert len(slab) >= 20
    assert slab.cell.lengths()[2] == pytest.approx(fcc111("Cu", (1, 1, 3), vacuum=6.0).cell[2, 2])


def test_a_molecule_gets_what_applies_and_one_line_on_the_rest(tmp_path):
    bench = Bench(
        BenchSettings(temperature=50.0, timestep=0.5), Structures.from_ase(molecule("N2"))
    )
    emt = Candidate("teacher", "ase.calculators.emt:EMT")
    options = {"speed": {"sizes": (8,), "rounds": 1}, "nve": {"duration": 0.02}}
    chosen = [
        (EVALUATIONS[name].model_validate(options.get(name, {})), [emt])
        for name in ("eos", "elastic", "rdf", "vibrations", "speed", "nve")
    ]
    said = []

    class Listening(Display):
        def say(self, text):
            said.append(text)

    found = run_evaluations(bench, chosen, tmp_path, Listening())
    assert set(found.results) == {"vibrations", "speed", "nve"}
    assert len(said) == 1
    assert said[0].startswith("Does not apply here: equation of state, elastic constants (needs a")
    assert list(read_findings(tmp_path).problems) == said
    assert found.of("speed", SpeedTable)["teacher"].rows[0].n_atoms == 8
    assert len(found.of("vibrations", Vibrations)["teacher"].frequencies) == 1


# -- roles ---------------------------------------------------------------------------------------


def test_roles_not_names_tell_who_is_compared_with_whom(tmp_path):
    """Files from before roles were recorded go by the start of a name."""
    report = {"channels": {}, "groups": {}, "n_systems": 1, "n_atoms": 2}
    names = ("fast", "plain", "slow", "student")
    (tmp_path / "errors.json").write_text(json.dumps(dict.fromkeys(names, report)))
    old = read_findings(tmp_path)
    assert (old.models, old.controls) == (("student", "fast", "plain", "slow"), ())
    assert (old.student, old.teacher) == ("student", "teacher")
    roles = {"fast": "student", "plain": "control", "slow": "teacher", "student": "other"}
    (tmp_path / "roles.json").write_text(json.dumps(roles))
    found = read_findings(tmp_path)
    assert found.models == names
    assert (found.student, found.controls, found.teacher) == ("fast", ("plain",), "slow")


def test_a_config_states_roles_or_names_have_them(tmp_path):
    emt = {"spec": "ase.calculators.emt:EMT"}
    models = {"mine": {**emt, "role": "student"}, "teacher": emt, "another": emt}
    structure = tmp_path / "cu.xyz"
    write(structure, bulk("Cu", cubic=True))
    given = {"models": models, "structure": str(structure), "tests": ["eos"]}
    found = evaluate(EvaluateConfig.model_validate({**given, "out": str(tmp_path / "out")}))
    assert found.models == ("mine", "teacher", "another")
    (verdict,) = EVALUATIONS["eos"].verdicts(found)
    assert "teacher" in verdict.text


def test_the_first_sentence_is_on_the_bars_of_what_is_handed_out():
    def scan(c44: float) -> ElasticScan:
        tensor = np.diag([160.0] * 3 + [c44] * 3) + np.pad(60.0 * (1 - np.eye(3)), (0, 3))
        return ElasticScan((ElasticConstants(tensor, 0.0, 0.0, "stress", True, 0.02),))

    scans = {"student": scan(80.0), "control_wf30": scan(-4.0), "teacher": scan(80.0)}
    found = Findings({"elastic": scans})
    own = verdicts(found)
    assert own[0].startswith("All bars met: elastic constants")
    assert verdicts(found, {"model": "student"}) == own
    first, second, *others = verdicts(found, {"model": "control_wf30", "reason": "was asked for"})
    assert first.startswith("student.pt is the control (w_F = 30), which was asked for. ")
    assert "Bars missed (2 of 2): mechanical stability (C44" in first
    assert second == f"Of the student: {own[0]}"
    assert tuple(others) == own[1:]


# -- one evaluation more -------------------------------------------------------------------------


@dataclass(frozen=True)
class Mass(Result):
    """What `Heaviness` finds."""

    mass: float


class Heaviness(Evaluation):
    """An evaluation in one class, and one line in the table."""

    name = "heaviness"
    title = "heaviness"
    result = Mass
    section = "Properties"
    needs = "structure"

    factor: float = 1.0

    def run(self, bench, candidate):
        return Mass(self.factor * float(bench.atoms.get_masses().sum()))

    @classmethod
    def metrics(cls, result):
        return {"total_mass": result.mass}


def test_an_evaluation_is_one_class_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(EVALUATIONS, "heaviness", Heaviness)
    write(tmp_path / "Cu.xyz", bulk("Cu"))
    config = {
        "models": {"teacher": {"spec": "ase.calculators.emt:EMT"}},
        "structure": str(tmp_path / "Cu.xyz"),
        "tests": {"heaviness": {"factor": 2.0}},
        "out": str(tmp_path / "run" / "evaluation"),
    }
    found = evaluate(EvaluateConfig.model_validate(config))
    assert result_rows(found) == [["Total mass", "teacher", "127.1"]]
    assert summarize(tmp_path / "run")["metrics"] == {"teacher": {"total_mass": 2 * 63.546}}
    write_report(tmp_path / "run")
    assert "Total mass" in (tmp_path / "run" / "report" / "table_properties.md").read_text()
    with pytest.raises(ValueError, match="factr"):
        EvaluateConfig.model_validate({**config, "tests": {"heaviness": {"factr": 2.0}}})
    with pytest.raises(ValueError, match="no evaluation 'heavyness'; did you mean 'heaviness'"):
        EvaluateConfig.model_validate({**config, "tests": ["heavyness"]})


def test_settings_of_old_configs_reach_their_evaluations():
    old = {"nve_duration": 5.0, "speed_sizes": [8], "memory_sizes": [9, 10], "n_atoms": 30}
    config = EvaluateConfig(models={"a": {"spec": "a.pt"}}, out="x", settings=old)
    assert config.settings.n_atoms == 30
    assert config.options["nve"] == {"duration": 5.0}
    assert config.options["speed"] == {"sizes": [8]}
    assert EvaluateConfig.model_validate(config.model_dump(mode="json")) == config


# -- results read back ---------------------------------------------------------------------------


def test_every_kind_of_result_survives_json():
    forces = {"forces_rmse": math.nan, "energy_mae": 0.5}
    results = [
        ErrorReport({"student-teacher": forces}, {"g": {"student-teacher": forces}}, 3, 9),
        S2EFErrors({"id": {"efwt": Estimate(1.0, math.nan, 1)}}, {"efwt": Estimate(1.0, 0.5, 2)}),
        SpeedTable((SpeedRow("a", 8, 1.0, 0.9, 1.1, 3, 5),), 1.0, 300.0, {"cpu": "x"}),
        MemoryUse("a", np.array([1, 2]), np.array([3, 4]), 1.0, math.nan, 2.0, (5,)),
        run_nve(bulk("Cu"), EMT(), temperature=10.0, duration=0.05, thermalization=0.0),
        equation_of_state(bulk("Cu"), EMT(), n_points=5),
        ElasticScan((ElasticConstants(np.eye(6), 0.1, 0.0, "stress", True, 0.003),)),
        Vibrations(np.array([-1.0, 2.0]), 0.01),
        ParityPoints({"energy": {"label": [1.0], "prediction": [2.0], "n": 1}}),
    ]
    for result in results:
        stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
        again = type(result).from_json(stored)
        assert type(again) is type(result)
        assert json.dumps(again.to_json()) == json.dumps(result.to_json())
    assert isinstance(SpeedTable.from_json(results[2].to_json()).rows[0], SpeedRow)
    assert math.isnan(ErrorReport.from_json(results[0].to_json()).own["forces_rmse"])
    with pytest.raises(DataError, match="lacks 'method'"):
        ElasticConstants.from_json({"tensor": [], "asymmetry": 0.0, "pressure": 0.0})


def test_metrics_of_old_files_have_todays_names():
    old = {"value": 0.1, "standard_error": None, "n": 4}
    stored = {"splits": {"id": {"force_mae": old}}, "average": {"force_cosine": old}}
    found = S2EFErrors.from_json(stored)
    assert found.splits["id"]["free_forces_mae"].n == 4
    assert math.isnan(found.average["free_forces_cosine"].standard_error)


def test_all_numbers_have_a_name():
    """Every metric of every built-in evaluation is in the vocabulary."""
    eos = equation_of_state(bulk("Cu"), EMT(), n_points=5)
    strains = [ElasticConstants(np.eye(6), 0.0, 0.0, "stress", True, s) for s in (0.005, 0.02)]
    results = {
        "eos": eos,
        "elastic": ElasticScan(tuple(strains)),
        "vibrations": Vibrations(np.array([1.0, 2.0]), 0.01),
        "speed": SpeedTable((SpeedRow("a", 8, 1.0, 0.9, 1.1, 3, 5),), 1.0, 300.0),
        "memory": MemoryUse("a", np.array([1, 2]), np.array([3, 4]), 1.0, 0.1, 2.0),
        "throughput": Throughput(1.0, 1.0, 1.0, 1, 1, 1, 1),
    }
    for name, result in results.items():
        evaluation = EVALUATIONS[name]
        metrics = evaluation.metrics(result) | evaluation.against(result, result)
        assert metrics
        assert set(metrics) <= set(METRICS)


# -- fixed atoms ---------------------------------------------------------------------------------


def test_headlines_are_those_of_free_atoms(tmp_path):
    """A slab whose fixed atoms are perfect: over all atoms the error looks smaller than it is."""
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.set_constraint(FixAtoms(indices=[0, 1, 2, 3]))
    structures = Structures.from_ase([slab, slab])
    rng = np.random.default_rng(0)
    forces = torch.from_numpy(rng.normal(size=(24, 3)))
    error = torch.where(structures.fixed[:, None], 0.0, torch.full((24, 3), 0.3))
    label = Properties({"energy": torch.zeros(2, dtype=torch.float64), "forces": forces})
    guess = Properties({"energy": label["energy"] + 0.1, "forces": forces + error})
    report = evaluate_errors(guess, structures, {"teacher": label})
    metrics = report.own
    assert metrics["free_forces_rmse"] == pytest.approx(0.3)
    assert metrics["forces_rmse"] == pytest.approx(0.3 * math.sqrt(2 / 3))
    free = forces[~structures.fixed]
    relative = 0.3 / float(free.std(unbiased=False))
    assert metrics["free_forces_relative_rmse"] == pytest.approx(relative)
    found = Findings({"errors": {"student": report}})
    (verdict,) = Errors.verdicts(found)
    assert f"to {number(100 * relative)} %" in verdict.text
    assert "over free atoms; over all, fixed ones included" in verdict.text
    rows = [row.label for row in Errors.rows(found)]
    assert rows.index("Force RMSE (free atoms) (eV/Å)") < rows.index("Force RMSE (eV/Å)")
    (tmp_path / "evaluation").mkdir()
    text = json.dumps({"student": report.to_json()})
    (tmp_path / "evaluation" / "errors.json").write_text(text)
    first = summary_rows(summarize(tmp_path))[0]
    assert first == ["Force RMSE (free atoms)", "student", "0.3000 eV/Å"]
    assert "free atoms" in write_report(tmp_path).read_text()
