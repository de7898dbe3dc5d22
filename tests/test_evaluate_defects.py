"""Vacancies and surfaces against plain ASE, lattice sums and a published number."""

from __future__ import annotations

import json
from itertools import product

import ase
import ase.lattice as bravais
import numpy as np
import pytest
from ase.build import bulk, fcc100, fcc110, fcc111, make_supercell
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.io import write
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS

from data import tersoff_silicon
from potstill.errors import ConfigError, DataError
from potstill.evaluate.base import Bench, BenchSettings, Candidate, Findings
from potstill.evaluate.defects import (
    DefectEnergy,
    Defects,
    DefectsEvaluation,
    defects,
    make_slab,
)
from potstill.evaluate.lattice import crystal_lattice
from potstill.metrics import metric_of
from potstill.report.verdicts import ordered_verdicts
from potstill.structures import Structures
from potstill.workflows.evaluation import EvaluateConfig, evaluate
from potstill.workflows.report import write_report
from potstill.workflows.summary import metrics_of, result_rows

PER_SQUARE_METER = ase.units.J / ase.units.m**2
FACES = ("100", "110", "111")


class NoStress(EMT):
    """EMT that cannot give stresses."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012


@pytest.fixture(scope="module")
def copper():
    return defects(bulk("Cu"), EMT())


def energies(found: Defects) -> list[float]:
    every = found.named().values()
    return [value for e in every for value in (e.unrelaxed, e.relaxed)]


# -- the lattice ---------------------------------------------------------------------------------

LATTICES = {
    "CUB": {"a": 3.0},
    "FCC": {"a": 3.0},
    "BCC": {"a": 3.0},
    "BCT": {"a": 3.0, "c": 4.0},
    "ORC": {"a": 3.0, "b": 4.0, "c": 5.0},
    "ORCF": {"a": 3.0, "b": 4.0, "c": 5.0},
    "ORCI": {"a": 3.0, "b": 4.0, "c": 5.0},
    "ORCC": {"a": 3.0, "b": 4.0, "c": 5.0},
    "HEX": {"a": 3.0, "c": 5.0},
    "RHL": {"a": 3.0, "alpha": 57.0},
    "MCLC": {"a": 3.0, "b": 4.0, "c": 5.0, "alpha": 70.0},
}


@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize(
    "matrix", [np.eye(3), np.diag([2, 3, 2]), [[1, 1, 0], [0, 2, 1], [1, 0, 2]]]
)
def test_a_lattice_is_found_in_any_supercell(name, matrix):
    lattice = getattr(bravais, name)(**LATTICES[name])
    atoms = make_supercell(ase.Atoms("Cu", cell=lattice.tocell(), pbc=True), np.array(matrix, int))
    atoms.rattle(1e-3, seed=0)
    atoms.rotate(33, (1, 2, 3), rotate_cell=True)
    found = crystal_lattice(atoms)
    assert (found.name, len(found.primitive)) == (name, 1)
    cell, expected = found.conventional.cell, lattice.conventional().tocell()
    np.testing.assert_allclose(np.sort(cell.lengths()), np.sort(expected.lengths()), atol=1e-3)
    np.testing.assert_allclose(np.sort(cell.angles()), np.sort(expected.angles()), atol=1e-2)


def test_axes_of_a_conventional_cell_keep_their_order():
    """Miller indices are those of the given axes; ASE's own orthorhombic lattice has a < b < c."""
    atoms = ase.Atoms("Cu2", cell=[5, 3, 4], pbc=True, scaled_positions=[[0, 0, 0], [0.5] * 3])
    found = crystal_lattice(atoms * (2, 1, 3))
    assert (found.name, len(found.primitive)) == ("ORCI", 1)
    np.testing.assert_allclose(found.conventional.cell.array, np.diag([5, 3, 4]), atol=1e-9)
    slab = make_slab(found, (1, 0, 0), 12.0, 10.0)  # (100) planes of this cell are 2.5 Å apart
    assert len(slab) == 5
    np.testing.assert_allclose(np.diff(np.sort(slab.positions[:, 2])), 2.5)


def test_displaced_atoms_have_no_smaller_cell():
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.rattle(0.2, seed=0)
    found = crystal_lattice(atoms)
    assert len(found.primitive) == len(found.conventional) == 32


# -- energies ------------------------------------------------------------------------------------


def plain(atoms: ase.Atoms, bulk_energy: float) -> tuple[float, float]:
    """Excess energy before and after relaxation, by ASE alone."""
    atoms.calc = EMT()
    before = atoms.get_potential_energy()
    assert BFGS(atoms, logfile=None).run(fmax=0.002, steps=100)
    after = atoms.get_potential_energy()
    return before - len(atoms) * bulk_energy, after - len(atoms) * bulk_energy


def test_copper_in_emt_against_plain_ase(copper):
    a = copper.cell_lengths[0]
    perfect = bulk("Cu", a=a)
    perfect.calc = EMT()
    e = perfect.get_potential_energy()
    assert abs(perfect.get_stress()).max() < 1e-4
    assert copper.bulk_energy == pytest.approx(e, abs=1e-9)
    hole = bulk("Cu", a=a, cubic=True) * (3, 3, 3)
    del hole[50]
    assert copper.vacancy.n_atoms == 107
    before, after = plain(hole, e)
    assert copper.vacancy.unrelaxed == pytest.approx(before, abs=1e-6)
    assert copper.vacancy.relaxed == pytest.approx(after, abs=1e-3)
    for name, build, layers in (("100", fcc100, 7), ("110", fcc110, 10), ("111", fcc111, 6)):
        slab = build("Cu", (2, 2, layers), a=a, vacuum=8.0)
        area = np.linalg.norm(np.cross(slab.cell[0], slab.cell[1]))
        before, after = (x / (2.0 * area * PER_SQUARE_METER) for x in plain(slab, e))
        assert copper.surfaces[name].n_atoms == layers
        assert copper.surfaces[name].unrelaxed == pytest.approx(before, abs=1e-6)
        assert copper.surfaces[name].relaxed == pytest.approx(after, abs=1e-3)


def test_close_packed_faces_cost_least_and_relaxation_gains(copper):
    relaxed = [copper.surfaces[name].relaxed for name in ("111", "100", "110")]
    assert relaxed == sorted(relaxed)
    assert all(e.relaxed < e.unrelaxed + 1e-9 for e in copper.named().values())
    assert not any(e.problem for e in copper.named().values())


def test_silicon_against_published_numbers():
    # Balamane, Halicioglu and Tiller, Phys. Rev. B 46, 2250 (1992): 3.70 eV for this potential.
    calculator = tersoff_silicon()
    found = defects(bulk("Si"), calculator, surfaces=[(1, 1, 1)])
    assert found.vacancy.relaxed == pytest.approx(3.70, abs=0.03)
    assert found.vacancy.n_atoms == 63


PAIR = {"sigma": 3.4, "epsilon": 0.0104, "rc": 8.0}


def pair_energy(r: np.ndarray) -> np.ndarray:
    """Lennard-Jones as ASE shifts it, eV."""

    def bare(r):
        return 4.0 * PAIR["epsilon"] * ((PAIR["sigma"] / r) ** 12 - (PAIR["sigma"] / r) ** 6)

    return np.where(r < PAIR["rc"], bare(r) - bare(PAIR["rc"]), 0.0)


@pytest.mark.parametrize(
    ("structure", "planes"),
    [
        ("fcc", ((1, 1, 1), (2, 1, 0), (3, 1, -2))),
        ("bcc", ((1, 1, 0), (1, 0, 0), (2, 1, 1))),
        ("sc", ((1, 0, 0), (1, 1, 0))),
    ],
)
def test_unrelaxed_defects_of_pair_potentials_are_lattice_sums(structure, planes):
    """Removing an atom costs minus the energy per atom, cutting along a plane what crosses it."""
    found = defects(
        bulk("Ar", structure, a={"fcc": 5.2, "bcc": 4.2, "sc": 3.6}[structure]),
        LennardJones(**PAIR), surfaces=planes, max_steps=0,
    )  # fmt: skip
    assert found.vacancy.unrelaxed == pytest.approx(-found.bulk_energy, abs=1e-9)
    a = found.cell_lengths[0]
    centers = {"fcc": [[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]], "bcc": [[0] * 3, [1] * 3]}
    basis = np.array(centers.get(structure, [[0, 0, 0]])) / 2.0
    cells = np.array(list(product(range(-4, 5), repeat=3)))
    vectors = a * (cells[:, None] + basis).reshape(-1, 3)
    vectors = vectors[np.linalg.norm(vectors, axis=1) > 0.1]
    pairs = pair_energy(np.linalg.norm(vectors, axis=1))
    assert found.bulk_energy == pytest.approx(0.5 * pairs.sum(), abs=1e-9)
    for plane in planes:
        # Bonds along R that cross a unit of area: density times R's component along the normal.
        across = np.clip(vectors @ plane / np.linalg.norm(plane), 0.0, None)
        cut = -(across * pairs).sum() * len(basis) / a**3
        name = "".join(map(str, plane))
        expected = 0.5 * cut / PER_SQUARE_METER
        assert found.surfaces[name].unrelaxed == pytest.approx(expected, rel=1e-6)


def test_results_do_not_depend_on_cell_orientation_or_origin(copper):
    moved = bulk("Cu", a=3.6) * (2, 1, 1)
    moved.rotate(40, (1, 2, 3), rotate_cell=True)
    moved.positions += (0.3, 0.1, -0.4)
    skew = make_supercell(bulk("Cu", a=3.65), [[1, 1, 0], [0, 2, 1], [1, 0, 2]])
    for atoms in (moved, skew, bulk("Cu", cubic=True) * (2, 2, 2)):
        found = defects(atoms, EMT())
        assert list(found.surfaces) == list(FACES)
        assert found.vacancy.n_atoms == 107
        np.testing.assert_allclose(energies(found), energies(copper), atol=2e-4)


def test_supercells_and_slabs_converge(copper):
    vacancies = [
        defects(bulk("Cu"), EMT(), surfaces=[], min_length=length).vacancy.relaxed
        for length in (7.0, 14.0)
    ]
    assert abs(copper.vacancy.relaxed - vacancies[1]) < abs(vacancies[0] - vacancies[1])
    assert copper.vacancy.relaxed == pytest.approx(vacancies[1], abs=0.01)
    thick = defects(bulk("Cu"), EMT(), slab_thickness=20.0, vacuum=25.0, min_length=3.0)
    for name in FACES:
        assert thick.surfaces[name].n_atoms > copper.surfaces[name].n_atoms
        assert thick.surfaces[name].relaxed == pytest.approx(
            copper.surfaces[name].relaxed, rel=1e-3
        )


def test_planes_are_cut_where_they_are_furthest_apart():
    """Silicon (111): one bond per atom, not three; every atom keeps three neighbors or four."""
    slab = make_slab(crystal_lattice(bulk("Si", cubic=True)), (1, 1, 1), 15.0, 10.0)
    coordination = np.bincount(neighbor_list("i", slab, 2.6), minlength=len(slab))
    assert sorted(coordination) == [3, 3] + [4] * (len(slab) - 2)
    heights = np.sort(slab.positions[:, 2])
    assert slab.cell[2, 2] - np.ptp(heights) == pytest.approx(10.0)
    assert slab.get_volume() / slab.cell[2, 2] == pytest.approx(np.sqrt(3) / 4 * 5.43**2)


def test_hexagonal_crystals_have_their_own_faces():
    found = defects(bulk("Ar", "hcp", a=3.75, c=6.1), LennardJones(**PAIR))
    assert found.lattice == "HEX"
    assert list(found.surfaces) == ["001", "100", "110"]
    assert found.surfaces["001"].relaxed == min(e.relaxed for e in found.surfaces.values())


def test_a_calculator_without_stress_has_the_cell_of_its_equation_of_state(copper):
    found = defects(bulk("Cu", a=3.65), NoStress())
    np.testing.assert_allclose(energies(found), energies(copper), atol=2e-3)


def test_slabs_of_compounds_are_stoichiometric_and_vacancies_are_left_out():
    atoms = bulk("Cu", "sc", a=3.75)
    atoms = ase.Atoms(
        "AuCu3", cell=atoms.cell, pbc=True,
        scaled_positions=[[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
    )  # fmt: skip
    found = defects(atoms, EMT())
    assert found.vacancy is None
    assert all(e.relaxed > 0.5 for e in found.surfaces.values())
    slab = make_slab(crystal_lattice(atoms), (1, 1, 0), 12.0, 10.0)
    assert 3 * (slab.symbols == "Au").sum() == (slab.symbols == "Cu").sum()
    rows = {r.label: r.values for r in DefectsEvaluation.rows(Findings({"defects": {"a": found}}))}
    assert rows["Vacancy formation energy (eV)"] == {"a": "only for crystals of one element"}
    bench = Bench(BenchSettings(), Structures.from_ase(atoms))
    assert DefectsEvaluation().lacks(bench) == ""
    lacking = DefectsEvaluation(surfaces=()).lacks(bench)
    assert lacking == "a crystal of one element, or surfaces"


# -- what is refused and what is said ------------------------------------------------------------


def test_what_is_no_crystal_and_no_plane_is_refused():
    with pytest.raises(DataError, match=r"a vacancy or surface needs a structure .* Cu4 is not"):
        defects(fcc111("Cu", (1, 1, 4), vacuum=6.0), EMT())
    words = r"three integers, not all zero; \(0 0 0\) are not"
    with pytest.raises(ConfigError, match=words):
        defects(bulk("Cu"), EMT(), surfaces=[(0, 0, 0)])
    config = {"models": {"a": {"spec": "a.pt"}}, "out": "x", "structure": "silicon"}
    for plane in ([0, 0, 0], [1, 0], [1, 0, 0, 1]):
        with pytest.raises(ValueError, match="three integers, not all zero"):
            EvaluateConfig.model_validate({**config, "tests": {"defects": {"surfaces": [plane]}}})
    with pytest.raises(ConfigError, match=r"more than 20: ask for less or raise the limit"):
        defects(bulk("Cu"), EMT(), max_atoms=20)
    with pytest.raises(ConfigError, match=r"a slab of \(976\) planes of 40 Å needs .* raise the"):
        defects(bulk("Cu"), EMT(), surfaces=[(9, 7, 6)], slab_thickness=40.0, max_atoms=110)
    assert DefectsEvaluation(surfaces=[[2, 0, 0], [1, 0, 0]]).surfaces == ((1, 0, 0),)


def test_a_relaxation_that_does_not_converge_is_said(copper):
    stuck = defects(bulk("Cu"), EMT(), fmax=1e-4, max_steps=1)
    for key, energy in stuck.named().items():
        assert energy.relaxed is None
        assert energy.unrelaxed == pytest.approx(copper.named()[key].unrelaxed, abs=1e-6)
        assert "did not reach 0.0001 eV/Å in 1 steps" in energy.problem
    found = Findings({"defects": {"student": stuck, "teacher": copper}})
    rows = {row.label: row.values for row in DefectsEvaluation.rows(found)}
    assert rows["Surface energy (111) (J/m²)"]["student"] == "not converged"
    assert rows["Surface energy (111), unrelaxed (J/m²)"]["student"] > 1.0
    texts = [v.text for v in DefectsEvaluation.verdicts(found)]
    assert len(texts) == 4
    start = "There is no relaxed vacancy formation energy of the student: relaxing Cu107 did not"
    assert texts[0].startswith(start)
    assert "surface_111" not in metrics_of(found)["student"]


def of(vacancy: float, *surfaces: float, lattice: str = "FCC") -> Defects:
    """Result with these relaxed energies."""
    faces = {k: DefectEnergy(v + 0.1, v, 7) for k, v in zip(FACES, surfaces, strict=True)}
    return Defects(lattice, np.full(3, 4.0), -3.4, DefectEnergy(vacancy + 0.1, vacancy, 107), faces)


def said(**results: Defects) -> tuple[str, ...]:
    return ordered_verdicts(list(DefectsEvaluation.verdicts(Findings({"defects": results}))))


def test_energies_are_compared_with_the_teachers():
    teacher = of(0.7, 0.9, 1.0, 0.8)
    assert said(student=of(0.7, 0.9, 1.1, 0.6), teacher=teacher) == (
        "Relaxed defects, the teacher's in parentheses: vacancy formation energy 0.700 eV (0.700), "
        "surface energy (100) 0.900 J/m² (0.900), surface energy (110) 1.10 J/m² (1.00), surface "
        "energy (111) 0.600 J/m² (0.800); largest deviation 25 % (surface energy (111)); surfaces "
        "are in the teacher's order.",
    )
    (text,) = said(student=of(0.7, 1.2, 1.1, 0.6), teacher=teacher)
    assert text.endswith("surfaces are not in the teacher's order.")
    (text,) = said(student=of(0.7, 1.2, 1.1, 0.6, lattice="TRI"), teacher=teacher)
    assert "another lattice (TRI) than the teacher's (FCC)" in text
    first, second, _ = said(student=of(-0.2, 0.9, 1.0, 0.8), teacher=teacher)
    assert first == (
        "Bars missed (1 of 1): positive energies of defects (vacancy formation energy −0.200 eV)."
    )
    assert second.startswith("Defects cost the student's crystal no energy")
    assert said(student=of(0.7, 0.9, 1.0, 0.8)) == ()


# -- as an evaluation ----------------------------------------------------------------------------


def test_results_survive_json(copper):
    for result in (
        copper,
        of(0.5, 1.0, 1.1, 0.9),
        defects(bulk("Cu"), EMT(), max_steps=0, fmax=1e-9),
    ):
        stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
        again = Defects.from_json(stored)
        assert again.to_json() == stored
        assert again.named() == result.named()


def test_evaluate_compares_potentials(tmp_path):
    write(tmp_path / "Cu.xyz", bulk("Cu"))
    emt = "ase.calculators.emt:EMT"
    config = {
        "models": {
            "student": {"spec": emt, "args": {"asap_cutoff": True}},
            "control": {"spec": emt},
            "teacher": {"spec": emt},
        },
        "structure": str(tmp_path / "Cu.xyz"),
        "tests": {"defects": {"surfaces": [[1, 1, 1], [1, 0, 0]], "min_length": 7}},
        "out": str(tmp_path / "run" / "evaluation"),
    }
    found = evaluate(EvaluateConfig.model_validate(config))
    numbers = metrics_of(found)
    assert set(numbers["teacher"]) == {"vacancy_formation", "surface_111", "surface_100"}
    assert numbers["control"]["defects_deviation"] == 0.0
    apart = [numbers["student"][k] / numbers["teacher"][k] - 1.0 for k in numbers["teacher"]]
    assert numbers["student"]["defects_deviation"] == pytest.approx(max(map(abs, apart)))
    assert 0.0 < max(map(abs, apart)) < 0.1
    assert metric_of("surface_111").label == "Surface energy (111) (J/m²)"
    assert ["Surface energy (111) (J/m²)", "teacher", "1.044"] in result_rows(found)
    write_report(tmp_path / "run")
    table = (tmp_path / "run" / "report" / "table_properties.md").read_text()
    assert "Vacancy formation energy (eV)" in table
    assert "student − teacher (%)" in table
    assert (tmp_path / "run" / "report" / "surfaces.png").is_file()


def test_defects_are_computed_only_where_they_are_asked_for(tmp_path, monkeypatch):
    ran = []

    def note(bench, chosen, folder, display):
        ran.extend(evaluation.name for evaluation, _ in chosen)
        return Findings({})

    monkeypatch.setattr("potstill.workflows.evaluation.run_evaluations", note)
    write(tmp_path / "Cu.xyz", bulk("Cu"))
    models = {"teacher": {"spec": "ase.calculators.emt:EMT"}}
    given = {"models": models, "structure": str(tmp_path / "Cu.xyz"), "out": str(tmp_path / "out")}
    evaluate(EvaluateConfig.model_validate(given))
    assert "elastic" in ran
    assert "defects" not in ran
    with pytest.raises(ConfigError, match="periodic along all three axes"):
        DefectsEvaluation().require(
            Bench(BenchSettings(), Structures.from_ase(fcc111("Cu", (1, 1, 3))))
        )
    teacher = Candidate("teacher", "ase.calculators.emt:EMT")
    bench = Bench(BenchSettings(), Structures.from_ase(bulk("Cu")))
    assert DefectsEvaluation(surfaces=()).run(bench, teacher).surfaces == {}
