"""Phonons and elastic constants against lattices of springs, whose own are known exactly."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import ase
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.neighborlist import neighbor_list

from potstill.errors import OptionalDependencyError
from potstill.evaluate.base import Bench, BenchSettings, Candidate, Findings
from potstill.evaluate.elastic import (
    Elastic,
    ElasticConstants,
    ElasticScan,
    elastic_scan,
    largest_difference,
)
from potstill.evaluate.phonons import (
    Phonons,
    PhononsEvaluation,
    mesh_points,
    phonons,
    repeats_for,
)
from potstill.evaluate.table import attempt
from potstill.report.plots import write_figure
from potstill.report.verdicts import ordered_verdicts
from potstill.structures import Structures
from potstill.units import GPA
from potstill.workflows.summary import metrics_of

pytest.importorskip("phonopy")

#: THz per sqrt(eV/(Å² amu)).
THZ = ase.units.s / (2e12 * math.pi)


class Springs(Calculator):
    """Springs of given lengths and constants; with `cone` a cusp of finite width on top of each.

    The energy of a pair stretched by x is k x²/2 + cone (sqrt(x² + width²) - width).
    """

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, springs, cone=0.0, width=0.01):
        super().__init__()
        self.springs, self.cone, self.width = springs, cone, width

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        i, d, vector = neighbor_list("idD", atoms, 1.15 * max(self.springs))
        energy, slope = np.zeros(len(d)), np.zeros(len(d))
        for length, constant in self.springs.items():
            x = np.where(abs(d / length - 1.0) < 0.15, d - length, 0.0)
            root = np.sqrt(x**2 + self.width**2)
            energy += 0.5 * constant * x**2 + self.cone * (root - self.width)
            slope += constant * x + self.cone * x / root
        pull = slope[:, None] * vector / d[:, None]
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, pull)
        virial = 0.5 * np.einsum("pa,pb->ab", pull, vector) / atoms.get_volume()
        self.results = {
            "energy": 0.5 * energy.sum(),
            "forces": forces,
            "stress": virial[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]],
        }


def signed_root(square):
    return np.sign(square) * np.sqrt(np.abs(square)) * THZ


def corners_of(found):
    """Index of a special point in the path by its name."""
    return {name: k for k, name in found.corners}


def chain(numbers, d=2.5):
    """Atoms in a row along x, rows far apart."""
    return ase.Atoms(numbers, [(k * d, 0, 0) for k in range(len(numbers))],
                     cell=(d * len(numbers), 12.0, 12.0), pbc=True)  # fmt: skip


@pytest.fixture(scope="module")
def copper():
    return phonons(bulk("Cu", cubic=True), EMT())


# -- phonons against what is known exactly -------------------------------------------------------


@pytest.mark.parametrize("cubic", [True, False])
def test_fcc_springs_have_the_dynamical_matrix_of_the_textbook(cubic):
    a, k = 4.0, 3.0
    atoms = bulk("Al", a=a, cubic=cubic)
    found = phonons(atoms, Springs({a / math.sqrt(2.0): k}), min_length=8.0)
    primitive = bulk("Al", a=a)
    neighbors = neighbor_list("D", primitive, 0.8 * a)
    assert len(neighbors) == 12
    unit = neighbors / np.linalg.norm(neighbors, axis=1)[:, None]
    for points, frequencies in (
        (mesh_points(found.mesh), found.frequencies),
        (found.path, found.bands),
    ):
        phase = 2.0 * np.pi * points @ np.linalg.inv(primitive.cell.array).T @ neighbors.T
        matrix = np.einsum("na,nb,qn->qab", unit, unit, 1.0 - np.cos(phase))
        squares = np.linalg.eigvalsh(k / primitive.get_masses()[0] * matrix)
        np.testing.assert_allclose(frequencies, signed_root(squares), atol=2e-3)
    assert dict(found.corners)[0] == "Γ"
    assert found.length == pytest.approx(8.0, rel=0.2)


def test_a_diatomic_chain():
    atoms, k = chain(["Na", "Cl"]), 2.0
    found = phonons(atoms, Springs({2.5: k}))
    light, heavy = sorted(atoms.get_masses())
    total = 1.0 / light + 1.0 / heavy
    sine = np.sin(np.pi * mesh_points(found.mesh)[:, 0]) ** 2
    root = np.sqrt(total**2 - 4.0 * sine / (light * heavy))
    expected = signed_root(k * np.stack([total - root, total + root], axis=1))
    np.testing.assert_allclose(found.frequencies[:, -2:], expected, atol=2e-3)
    # Nothing holds it across: zero, up to the root of what displacements leave.
    np.testing.assert_allclose(found.frequencies[:, :-2], 0.0, atol=0.02)


def test_an_unstable_chain_is_named():
    # omega² = 2/M (1 - c) (k1 + 2 k2 (1 + c)), c = cos(2 pi q): negative at the zone's edge.
    k1, k2 = -1.0, 2.0
    atoms = chain(["Al"])
    found = phonons(atoms, Springs({2.5: k1, 5.0: k2}))
    lowest = -math.sqrt(-4.0 * k1 / atoms.get_masses()[0]) * THZ
    (edge, *others) = found.imaginary()
    assert edge.frequency == pytest.approx(lowest, abs=2e-3)
    assert edge.q == (0.5, 0.0, 0.0)
    assert edge.name
    assert str(edge) == f"−{-lowest:.2f} THz at {edge.name} (0.5, 0, 0)"
    assert all(abs(mode.frequency - lowest) > 0.01 for mode in others)
    assert found.imaginary(but=found) == []


def test_copper_near_the_zone_center_is_its_elasticity(copper):
    found = copper
    elastic = elastic_scan(bulk("Cu"), EMT(), (0.005,), relax_cell=True).compared
    density = 63.546 / (3.59**3 / 4.0)  # amu/Å³
    for modulus, branch in ((elastic.c44, 0), (elastic.c44, 1), (elastic.c11, 2)):
        velocity = math.sqrt(modulus * GPA / density)  # in ASE's unit of time
        expected = velocity * found.distance[2] * THZ
        assert found.bands[2, branch] == pytest.approx(expected, rel=0.03)
    names = corners_of(found)
    np.testing.assert_allclose(found.bands[names["Γ"]], 0.0, atol=1e-3)  # acoustic sum rule
    assert found.imaginary() == []


def test_a_relaxation_may_find_translations_that_the_given_cell_lacks(copper):
    atoms = bulk("Cu") * (2, 1, 1)
    atoms.rattle(0.03, seed=1)
    found = phonons(atoms, EMT(), min_length=7.0)
    assert found.frequencies.shape[1] == 6
    assert found.imaginary() == []
    # The zone center of two cells is that of one and its edge.
    both = np.sort(np.concatenate([copper.bands[0], copper.bands[corners_of(copper)["L"]]]))
    np.testing.assert_allclose(found.bands[0], both, atol=0.1)


def test_bcc_copper_is_no_crystal():
    # Bain's path: fcc and bcc differ by a shear along which bcc copper in EMT falls.
    found = phonons(bulk("Cu", "bcc", a=2.85, cubic=True), EMT(), min_length=8.0)
    modes = found.imaginary()
    assert modes[0].frequency < -0.5
    assert len(modes) <= 4
    (text,) = (
        v.text for v in PhononsEvaluation.verdicts(Findings({"phonons": {"teacher": found}}))
    )
    assert text.startswith(f"The teacher's own phonons are imaginary: {modes[0]}")


# -- supercells, wave vectors, files -------------------------------------------------------------


def test_supercells_keep_the_symmetry_within_their_bounds():
    silicon = bulk("Si", cubic=True)
    assert repeats_for(silicon, 10.0, 200) == [2, 2, 2]
    assert repeats_for(silicon, 10.0, 63) == [1, 1, 1]
    assert repeats_for(silicon, 12.0, 1000) == [3, 3, 3]
    assert repeats_for(bulk("Mg"), 10.0, 200) == [4, 4, 2]
    points = mesh_points((2, 3, 1))
    assert len(np.unique(points, axis=0)) == 6
    assert points.min() > -0.5
    assert points.max() == 0.5


def test_phonons_survive_json(copper):
    stored = json.loads(json.dumps(copper.to_json(), allow_nan=False))
    again = Phonons.from_json(stored)
    assert again.comparable(copper)
    assert again.corners == copper.corners
    assert PhononsEvaluation.against(again, copper)["phonon_rmse"] == 0.0


def test_the_figure_breaks_where_the_path_jumps(copper, tmp_path):
    found = Findings({"phonons": {"student": copper, "teacher": copper}})
    (drawing,) = PhononsEvaluation.drawings(found)
    panel = drawing.panels[0]
    assert [name for _, name in panel.x_ticks] == [
        "Γ",
        "X",
        "W",
        "K",
        "Γ",
        "L",
        "U",
        "W",
        "L",
        "K|U",
        "X",
    ]
    x, y = panel.series[0].x, panel.series[0].y
    assert np.isnan(x).sum() == np.isnan(y).sum() == 3 * 2  # three bands, one jump each
    assert np.nanmax(y) == copper.bands.max()
    figure = write_figure(tmp_path, drawing)
    assert figure.png.stat().st_size > 10_000


# -- verdicts ------------------------------------------------------------------------------------


def test_bars_of_phonons(copper):
    def lines(student):
        found = Findings({"phonons": {"student": student, "teacher": copper}})
        return ordered_verdicts(list(PhononsEvaluation.verdicts(found)))

    assert lines(copper)[0].startswith("All bars met: phonon RMSE of at most 0.3 THz (0 THz)")
    stiff = replace(copper, frequencies=1.2 * copper.frequencies, bands=1.2 * copper.bands)
    rmse = 0.2 * math.sqrt(np.mean(copper.frequencies**2))
    assert lines(stiff)[0].startswith("Bars missed (1 of 2): phonon RMSE of at most 0.3 THz")
    assert f"RMSE {rmse:.2f} THz, beyond the bar" in lines(stiff)[1]
    names = corners_of(copper)
    bands = copper.bands.copy()
    bands[names["L"], 0] = -0.7
    soft = lines(replace(copper, bands=bands))
    place = f"({', '.join(f'{c:g}' for c in copper.path[names['L']])})"
    assert f"no imaginary phonons that the teacher lacks (−0.700 THz at L {place})" in soft[0]
    both = replace(copper, bands=bands)
    found = Findings({"phonons": {"student": both, "teacher": both}})
    verdicts = list(PhononsEvaluation.verdicts(found))
    assert all(v.met for v in verdicts)  # what the teacher has is not the student's fault
    assert "teacher's own phonons are imaginary" in verdicts[0].text
    metrics = metrics_of(Findings({"phonons": {"student": stiff, "teacher": copper}}))
    assert metrics["student"]["phonon_rmse"] == pytest.approx(rmse)
    assert "phonon_rmse" not in metrics["teacher"]


def test_what_phonons_apply_to(monkeypatch):
    def lacks(atoms, **settings):
        bench = Bench(BenchSettings(), Structures.from_ase(atoms))
        return PhononsEvaluation(**settings).lacks(bench)

    assert lacks(bulk("Cu")) == ""
    assert "periodic along all three axes" in lacks(molecule("N2"))
    assert lacks(bulk("Cu", cubic=True), max_atoms=3) == "a crystal of at most 3 atoms"
    skewed = bulk("Cu", cubic=True) * (2, 1, 1)
    skewed.rattle(0.1, seed=0)
    assert lacks(skewed) == ""
    assert "at most 40 displacements by symmetry, not 48" in lacks(skewed, max_displacements=40)
    assert PhononsEvaluation(small=None).work(bulk("Si", cubic=True)) == 64
    assert PhononsEvaluation().work(bulk("Si", cubic=True)) == 2 * 64

    monkeypatch.setitem(sys.modules, "phonopy", None)
    assert lacks(bulk("Cu")) == ""
    with pytest.raises(OptionalDependencyError, match=r"pip install 'potstill\[phonons\]'"):
        phonons(bulk("Cu"), EMT())
    bench = Bench(BenchSettings(), Structures.from_ase(bulk("Cu")))
    emt = Candidate("teacher", "ase.calculators.emt:EMT")
    assert "'phonopy' is needed for phonons" in attempt(PhononsEvaluation(), bench, emt)["error"]


# -- elastic constants at several strains --------------------------------------------------------


def test_springs_have_the_same_constants_at_all_strains():
    a, k = 4.0, 3.0
    scan = elastic_scan(
        bulk("Al", a=a, cubic=True), Springs({a / math.sqrt(2.0): k}), (0.02, 0.002)
    )
    assert [r.strain for r in scan.constants] == [0.002, 0.02]
    exact = 2.0 * k / a / GPA  # C11 = 2 C12 = 2 C44 = 2 k / a
    small, large = scan.constants
    assert small.named() == pytest.approx(
        {"C11": exact, "C12": exact / 2, "C44": exact / 2}, rel=1e-3
    )
    change = scan.largest_change()
    assert change.relative < 0.01
    assert (change.strains, change.values[1]) == ((0.002, 0.02), large.named()[change.name])
    (verdict,) = Elastic.verdicts(Findings({"elastic": {"student": scan}}))
    assert verdict.met
    assert "smooth at the scale of small displacements" in verdict.text


def test_a_cusp_shows_as_constants_that_depend_on_the_strain():
    a, k, cone, width = 4.0, 3.0, 0.05, 0.01
    rough = Springs({a / math.sqrt(2.0): k}, cone=cone, width=width)
    scan = elastic_scan(bulk("Al", a=a, cubic=True), rough, (0.0005, 0.02))
    small, large = scan.constants
    # For stretches far below its width the cusp is a spring of its own, of constant cone/width.
    assert small.c11 == pytest.approx(2.0 * (k + cone / width) / a / GPA, rel=0.01)
    assert large.c11 < 0.7 * small.c11
    found = Findings({"elastic": {"student": scan, "teacher": scan, "control": scan}})
    verdicts = list(Elastic.verdicts(found))
    missed = [v for v in verdicts if not v.met]
    assert len(missed) == 1
    assert "The elastic constants of the student depend on the strain: C" in missed[0].text
    assert "at 0.0005 and" in missed[0].text
    assert "GPa at 0.02. It is rough at the scale" in missed[0].text
    (teacher,) = (v for v in verdicts if "of the teacher depend on the strain" in v.text)
    assert "a student can be compared with it at finite, stated strains only" in teacher.text
    assert not teacher.bar


def constants(tensor, strain):
    return ElasticConstants(np.asarray(tensor, float), 0.0, 0.0, "stress", True, strain)


def cubic(c11, c12, c44):
    return np.diag([c11] * 3 + [c44] * 3) + np.pad(c12 * (1 - np.eye(3)), (0, 3))


def test_models_are_compared_at_the_same_finite_strain():
    theirs = ElasticScan(
        (constants(cubic(140, -7, 45), 0.001), constants(cubic(120, 50, 45), 0.02))
    )
    ours = ElasticScan((constants(cubic(125, 55, 44), 0.001), constants(cubic(125, 55, 44), 0.02)))
    worst = ours.deviation(theirs)
    assert (worst.name, worst.values, worst.strains) == ("C12", (55, 50), (0.02, 0.02))
    assert worst.relative == pytest.approx(0.1)
    found = Findings({"elastic": {"student": ours, "teacher": theirs}})
    texts = [v.text for v in Elastic.verdicts(found)]
    assert (
        "Elastic constants in GPa at strain 0.02, the teacher's in parentheses: C11 125 (120), "
        "C12 55.0 (50.0), C44 44.0 (45.0); largest deviation 10 % (C12), within the bar of 12 %."
    ) in texts
    assert any("C12 is −7.00 GPa at 0.001 and 50.0 GPa at 0.02" in text for text in texts)
    assert metrics_of(found)["student"]["elastic_deviation"] == pytest.approx(0.1)
    rows = {row.label: row.values for row in Elastic.rows(found)}
    assert rows["C12 at strain 0.001 (GPa)"] == {"student": 55.0, "teacher": -7.0}
    assert rows["C12 at strain 0.02 (GPa)"] == {"student": 55.0, "teacher": 50.0}
    far = ElasticScan((constants(cubic(125, 57, 44), 0.02),))
    (missed,) = (
        v
        for v in Elastic.verdicts(Findings({"elastic": {"student": far, "teacher": theirs}}))
        if not v.met
    )
    assert missed.bar == (
        "elastic constants within 12 % at strain 0.02 (C12 57.0 GPa, teacher 50.0 GPa)"
    )
    elsewhere = ElasticScan((constants(cubic(125, 57, 44), 0.01),))
    assert elsewhere.deviation(theirs) is None


def test_roughness_is_a_change_between_small_strains():
    tensors = (cubic(128, 54, 43), cubic(124, 54, 43), cubic(112, 56, 41))
    strains = (0.002, 0.01, 0.02)
    scan = ElasticScan(tuple(map(constants, tensors, strains)))
    change = scan.largest_change()
    assert (change.name, change.values, change.strains) == ("C11", (128, 124), (0.002, 0.01))
    (verdict,) = Elastic.verdicts(Findings({"elastic": {"student": scan}}))
    assert not verdict.met
    assert "C11 is 128 GPa at 0.002 and 124 GPa at 0.01" in verdict.text


def test_every_element_of_other_crystals_counts():
    hexagonal = cubic(60, 25, 16)
    hexagonal[2, 2] = 65.0
    hexagonal[5, 5] = 17.5
    hexagonal[3, 3] = hexagonal[4, 4] = 12.0
    theirs, wrong = constants(hexagonal, 0.02), hexagonal.copy()
    wrong[0, 3] = wrong[3, 0] = 2.6
    worst = largest_difference(constants(wrong, 0.02), theirs)
    assert worst.name == "C14"
    assert worst.relative == pytest.approx(2.6 / 6.5)  # a zero is judged against a tenth of C33
    assert {"C11", "C33", "C13", "C44", "C66"} <= theirs.named().keys()
    assert "C14" not in theirs.named()
    assert set(theirs.named(every=True)) >= {"C14", "C56"}


def test_files_with_a_single_strain_are_read():
    old = constants(cubic(150, 60, 75), 0.003).to_json()
    scan = ElasticScan.from_json(json.loads(json.dumps(old)))
    assert scan.compared.strain == 0.003
    assert scan.compared.c44 == 75.0
    assert scan.largest_change() is None
    assert Elastic.metrics(scan)["c11"] == 150.0
    again = ElasticScan.from_json(json.loads(json.dumps(scan.to_json())))
    assert again.to_json() == scan.to_json()


def test_a_potential_that_is_rough_at_small_displacements_is_named():
    a, settings = 4.0, PhononsEvaluation(min_length=8.0)
    bench = Bench(BenchSettings(), Structures.from_ase(bulk("Al", a=a)))
    found = {}
    for name, cone in (("student", 0.0), ("teacher", 0.05)):
        candidate = Candidate(name, "springs")
        vars(candidate)["calculator"] = Springs({a / math.sqrt(2.0): 3.0}, cone)
        found[name] = settings.run(bench, candidate)
    assert found["student"].displacement == 0.03
    assert found["student"].change < 0.02  # of the springs' anharmonicity
    assert found["teacher"].change > 0.3
    said = " ".join(v.text for v in PhononsEvaluation.verdicts(Findings({"phonons": found})))
    assert "The teacher's phonons change by" in said
    assert "between displacements of 0.01 and 0.03 Å" in said
    assert "The student's phonons change" not in said
