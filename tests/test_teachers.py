"""Teachers: what they give, what they refuse, and how they fail."""

import json
import sys

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from ase.md.verlet import VelocityVerlet
from ase.units import Bohr, Hartree
from ase.units import GPa as GPA

from data import data_path
from potstill.checkpoint import save_potential
from potstill.errors import OptionalDependencyError, TeacherError
from potstill.models import ANI, SpeciesOffsets, SumPotential
from potstill.properties import PROPERTIES
from potstill.species import SpeciesTable
from potstill.structures import Structures
from potstill.teachers import (
    AseTeacher,
    CommitteeTeacher,
    PotentialTeacher,
    TeacherInfo,
    check_derivatives,
    make_teacher,
    nonconservative_residual,
)

TABLE = SpeciesTable.from_symbols(["Cu", "Au"])
SIGNALS = ["energy", "forces", "stress", "atomic_energies"]


def potential(seed=0, n_members=1):
    torch.manual_seed(seed)
    network = ANI(
        TABLE,
        radial_cutoff=4.0,
        angular_cutoff=3.2,
        eta_r=4.0,
        shifts_r=[1.5, 2.5, 3.5],
        eta_a=2.0,
        zeta=4.0,
        shifts_a=[2.0, 3.0],
        shifts_z=[0.4, 1.6, 2.7],
        hidden_widths=[6],
        n_members=n_members,
    ).double()
    return SumPotential({"offsets": SpeciesOffsets(TABLE, [-3.0, -4.0]), "network": network})


def crystal(symbol="Cu", seed=0, a=3.7):
    atoms = bulk(symbol, "fcc", cubic=True, a=a)
    atoms.rattle(0.1, rng=np.random.default_rng(seed))
    return atoms


def frames():
    slab = fcc111("Cu", (2, 2, 2), vacuum=5.0)
    slab.rattle(0.05, rng=np.random.default_rng(5))
    return Structures.from_ase([crystal(seed=1), slab, crystal("Au", 2, 4.1), molecule("H2")])


# -- every teacher -----------------------------------------------------------------------------


def test_a_frame_that_fails_is_skipped_and_listed():
    teacher = PotentialTeacher(potential())
    structures = frames()
    labels, failures = teacher.label(structures, SIGNALS)
    assert [f.system for f in failures] == [3]
    assert "holds H" in failures[0].reason
    for name in SIGNALS:
        expected = [True, name != "stress", True, False]
        assert labels.presence(name, 4).tolist() == expected
        level = PROPERTIES[name].level
        rows = torch.arange(4) if level == "system" else structures.system_index
        finite = torch.isfinite(labels[name]).reshape(len(rows), -1).all(dim=1)
        assert finite.tolist() == [expected[int(s)] for s in rows]
        assert labels[name].dtype == torch.float64


def test_labels_do_not_depend_on_the_batch():
    structures = frames().select([0, 1, 2])
    teacher = PotentialTeacher(potential())
    together, _ = teacher.label(structures, SIGNALS)
    teacher.batch_atoms = 0
    single, _ = teacher.label(structures, SIGNALS)
    for name in SIGNALS:
        torch.testing.assert_close(together[name], single[name], equal_nan=True)


@pytest.mark.parametrize("batch_atoms", [0, 10**6])
def test_work_around_the_teacher_grows_with_the_frames_alone(monkeypatch, batch_atoms):
    class Quick(PotentialTeacher):
        def compute(self, structures, properties):
            return {"energy": structures.volume}

    class Counted:
        """A look through all atoms of a batch, which an offset per system needs."""

        atoms = 0

        def __call__(self, index, **options):
            self.atoms += len(index)
            return bincount(index, **options)

    structures = Structures.from_ase([crystal(seed=k) for k in range(60)])
    teacher, bincount, counted = Quick(potential()), torch.bincount, Counted()
    teacher.batch_atoms = batch_atoms
    monkeypatch.setattr(torch, "bincount", counted)
    labels, failures = teacher.label(structures, ["energy"])
    assert labels["energy"].equal(structures.volume)
    assert not failures
    assert counted.atoms <= 5 * structures.n_atoms


def test_too_few_rows_are_refused():
    class Short(PotentialTeacher):
        def compute(self, structures, properties):
            return {
                name: value[:1] for name, value in super().compute(structures, properties).items()
            }

    with pytest.raises(TeacherError, match="gives 1 rows of 'energy', and there are 2 systems"):
        Short(potential()).label(frames().select([0, 2]), ["energy"])


def test_what_a_teacher_lacks_is_refused():
    teacher = PotentialTeacher(potential())
    with pytest.raises(TeacherError, match="does not give 'charges'"):
        teacher.label(frames(), ["energy", "charges"])


def test_results_that_are_not_finite_are_failures():
    class Broken(PotentialTeacher):
        def compute(self, structures, properties):
            result = super().compute(structures, properties)
            result["energy"][structures.n_atoms_per_system > 5] = torch.nan
            return result

    labels, failures = Broken(potential()).label(frames().select([0, 1]), ["energy", "forces"])
    assert [(f.system, f.reason) for f in failures] == [(1, "energy not finite")]
    assert labels.presence("forces", 2).tolist() == [True, False]


def test_info_is_plain_data():
    info = PotentialTeacher(potential()).info
    again = TeacherInfo(**json.loads(json.dumps(info.to_json())))
    assert again == info


def test_teachers_drive_molecular_dynamics():
    teacher = PotentialTeacher(potential())
    atoms = crystal()
    atoms.calc = teacher.ase_calculator()
    before = atoms.get_total_energy()
    VelocityVerlet(atoms, 0.1).run(3)
    assert atoms.get_total_energy() == pytest.approx(before, abs=1e-3)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy())
    labels, _ = teacher.label(Structures.from_ase(atoms), SIGNALS)
    np.testing.assert_allclose(atoms.get_stress(voigt=False), labels["stress"][0].numpy())
    foreign = molecule("H2")
    foreign.calc = teacher.ase_calculator()
    with pytest.raises(CalculationFailed, match="holds H"):
        foreign.get_potential_energy()


# -- potentials and committees -------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["license", "licence"])  # the latter in older files
def test_checkpoints(tmp_path, spelling):
    model = potential()
    origin = {spelling: "L", "citation": "C", "level_of_theory": "PBE", "name": "x"}
    save_potential(tmp_path / "student.pt", model, {"teacher": origin})
    teacher = make_teacher(str(tmp_path / "student.pt"))
    assert (teacher.name, teacher.info.license, teacher.info.level_of_theory) == (
        "student",
        "L",
        "PBE",
    )
    structures = frames().select([0, 2])
    labels, failures = teacher.label(structures, SIGNALS)
    assert not failures
    expected = model.predict(structures, properties=SIGNALS)
    for name in SIGNALS:
        torch.testing.assert_close(labels[name], expected[name])
    assert make_teacher(str(tmp_path / "student.pt"), {"name": "other"}).name == "other"
    with pytest.raises(TeacherError, match="no teacher argument 'speed'"):
        make_teacher(str(tmp_path / "student.pt"), {"speed": 1})


def test_fingerprints_follow_the_weights():
    a, b, c = (PotentialTeacher(potential(seed)).info.fingerprint for seed in (0, 0, 1))
    assert a == b != c


def test_committee_of_checkpoints(tmp_path):
    models = [potential(seed) for seed in range(3)]
    for k, model in enumerate(models):
        save_potential(tmp_path / f"member{k}.pt", model, {})
    structures = frames().select([0, 1])
    by_pattern = make_teacher(str(tmp_path / "member*.pt"))
    by_list = make_teacher(",".join(str(tmp_path / f"member{k}.pt") for k in range(3)))
    assert by_pattern.info == by_list.info
    names = [*SIGNALS, "energy_std", "forces_std", "stress_std", "atomic_energies_std"]
    assert set(names) == by_list.properties
    labels, failures = by_list.label(structures, names)
    assert not failures
    single = [m.predict(structures, properties=SIGNALS) for m in models]
    for name in SIGNALS:
        values = torch.stack([p[name] for p in single])
        torch.testing.assert_close(labels[name], values.mean(0), equal_nan=True)
        spread = values.std(0, correction=0)
        torch.testing.assert_close(labels[f"{name}_std"], spread, equal_nan=True)
    assert labels.presence("stress_std", 2).tolist() == [True, False]
    assert float(labels["forces_std"].min()) > 0.0


def test_committee_of_one_is_refused():
    with pytest.raises(TeacherError, match="at least two members"):
        CommitteeTeacher([PotentialTeacher(potential())])


def test_an_ensemble_within_one_model_gives_its_spread(tmp_path):
    model = potential(n_members=3)
    save_potential(tmp_path / "ensemble.pt", model, {})
    teacher = make_teacher(str(tmp_path / "ensemble.pt"))
    structures = frames().select([0, 2])
    alone, _ = teacher.label(structures, SIGNALS)
    spread, _ = teacher.label(structures, [*SIGNALS, "forces_std", "atomic_energies_std"])
    for name in SIGNALS:
        torch.testing.assert_close(alone[name], spread[name])
    features = model.predict(structures, taps=["member_energies"]).features
    expected = features["member_energies"].std(dim=1, correction=0)
    torch.testing.assert_close(spread["atomic_energies_std"], expected)


@pytest.mark.data
def test_published_aluminium_ensemble():
    folder = data_path("ani-al-model")
    reference = ase.io.read(folder / "ani_al_reference_eval.extxyz", ":")
    structures = Structures.from_ase(reference)
    teacher = make_teacher("ani-al", {"path": str(folder)})
    labels, failures = teacher.label(
        structures, [*SIGNALS, "energy_std", "forces_std", "atomic_energies_std"]
    )
    assert not failures
    n_atoms = structures.n_atoms_per_system
    energy = torch.tensor([a.get_potential_energy() for a in reference])
    forces = torch.from_numpy(np.concatenate([a.get_forces() for a in reference]))
    stress = torch.from_numpy(np.array([a.get_stress(voigt=False) for a in reference]))
    assert float(((labels["energy"] - energy) / n_atoms).abs().max()) < 1e-6
    assert float((labels["forces"] - forces).abs().max()) < 1e-5
    assert float((labels["stress"] - stress).abs().max()) < 1e-6
    spread = torch.tensor([a.info["ens_energies"].std() for a in reference])
    assert float((labels["energy_std"] - spread).abs().max()) < 1e-5
    forces_std = torch.from_numpy(np.concatenate([a.arrays["forces_std"] for a in reference]))
    assert float((labels["forces_std"] - forces_std).abs().max()) < 1e-5
    total = torch.zeros(len(reference), dtype=torch.float64)
    total = total.index_add(0, structures.system_index, labels["atomic_energies"])
    torch.testing.assert_close(total, labels["energy"])
    assert "CC BY 4.0" in teacher.info.license
    residual = nonconservative_residual(teacher, structures.select([34]), n_components=4, step=1e-3)
    assert residual.max < 1e-4 * max(1.0, residual.force_rms)


# -- ASE calculators ---------------------------------------------------------------------------


class DirectForces(LennardJones):
    """Forces that are no gradient, and energies per atom that do not sum to the energy."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results["forces"] = self.results["forces"] + 0.05 * np.array([1.0, 0.0, 0.0])
        self.results["energies"] = 1.1 * self.results["energies"]


class Choosy(Calculator):
    """Fails on some frames; a free energy that differs from the energy."""

    implemented_properties = ["energy", "free_energy", "forces", "stress", "charges"]  # noqa: RUF012

    def __init__(self, gap=0.5):
        super().__init__()
        self.gap = gap

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if len(atoms) > 4:
            raise RuntimeError("not\nconverged")
        self.results = {
            "energy": 1.0,
            "free_energy": 1.0 - self.gap,
            "forces": np.ones((len(atoms), 3)),
            "stress": np.arange(6.0),
            "charges": np.zeros(len(atoms)),
        }


def test_ase_calculator_by_its_name():
    teacher = make_teacher("ase.calculators.emt:EMT", {"level_of_theory": "EMT", "name": "emt"})
    assert teacher.name == "emt"
    assert teacher.info.level_of_theory == "EMT"
    assert teacher.info.license == "unknown"
    assert "ase" in teacher.info.versions
    for spelling in ("license", "licence"):
        described = make_teacher("ase.calculators.emt:EMT", {spelling: "LGPL"})
        assert described.info.license == "LGPL"
    structures = frames()
    labels, failures = teacher.label(structures.select([0, 1, 2]), SIGNALS)
    assert not failures
    for k, atoms in enumerate(structures.select([0, 1, 2]).to_ase()):
        atoms.calc = teacher.ase_calculator()
        assert float(labels["energy"][k]) == pytest.approx(atoms.get_potential_energy())
        if k != 1:
            stress = atoms.get_stress(voigt=False)
            np.testing.assert_allclose(labels["stress"][k].numpy(), stress, atol=1e-12)
    assert labels.presence("stress", 3).tolist() == [True, False, True]


def test_failures_of_a_calculator():
    teacher = make_teacher(f"{__name__}:Choosy")
    labels, failures = teacher.label(frames().select([0, 1]), ["energy", "forces", "stress"])
    assert [(f.system, f.reason) for f in failures] == [(1, "not converged")]
    assert float(labels["energy"][0]) == 0.5  # the free energy, which forces derive from
    voigt = labels["stress"][0]
    assert (float(voigt[1, 2]), float(voigt[0, 2]), float(voigt[0, 1])) == (3.0, 4.0, 5.0)
    plain = make_teacher(f"{__name__}:Choosy", {"force_consistent": False})
    assert float(plain.label(frames().select([0]), ["energy"])[0]["energy"][0]) == 1.0


def test_fixed_atoms_keep_their_forces():
    atoms = crystal()
    atoms.set_constraint(FixAtoms(range(len(atoms))))
    teacher = make_teacher("ase.calculators.emt:EMT")
    labels, _ = teacher.label(Structures.from_ase(atoms), ["forces"])
    assert float(labels["forces"].abs().max()) > 0.1


def test_atomic_energies_must_sum_to_the_energy():
    args = {"sigma": 2.3, "epsilon": 0.2, "rc": 5.0}
    honest = make_teacher("ase.calculators.lj:LennardJones", args)
    labels, _ = honest.label(Structures.from_ase(crystal()), ["energy", "atomic_energies"])
    assert float(labels["atomic_energies"].sum()) == pytest.approx(float(labels["energy"][0]))
    teacher = make_teacher(f"{__name__}:DirectForces", args)
    with pytest.raises(
        TeacherError, match=r"do not sum to its energy in frame 0: .* 0\.126 eV/atom"
    ):
        teacher.label(Structures.from_ase(crystal()), ["atomic_energies"])
    teacher.label(Structures.from_ase(crystal()), ["energy"])


def test_direct_forces_are_declared_and_measured():
    args = {"sigma": 2.3, "epsilon": 0.2, "rc": 5.0}
    structures = Structures.from_ase([crystal(), crystal(seed=3)])
    teacher = make_teacher(f"{__name__}:DirectForces", args | {"conservative": False})
    assert not teacher.info.conservative
    residual = nonconservative_residual(teacher, structures, n_components=24, step=1e-3)
    assert residual.max == pytest.approx(0.05, rel=1e-2)
    assert residual.n_components == 24
    honest = make_teacher("ase.calculators.lj:LennardJones", args)
    assert honest.info.conservative
    residual = nonconservative_residual(honest, structures, n_components=24, step=1e-3)
    assert residual.max < 1e-4 * residual.force_rms


class Scaled(LennardJones):
    """Lennard-Jones that scales its forces and its stress."""

    def __init__(self, forces=1.0, stress=1.0, virial=False):
        super().__init__(sigma=2.3, epsilon=0.2, rc=5.0)
        self.factors = {"forces": forces, "stress": stress}
        self.virial = virial

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        for name, factor in self.factors.items():
            if name in self.results:
                self.results[name] = factor * self.results[name]
        if self.virial:
            self.results["stress"] = -atoms.get_volume() * self.results["stress"]


def scaled(conservative=True, **factors):
    info = TeacherInfo("scaled", "x", conservative=conservative)
    return AseTeacher(Scaled(**factors), info)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (
            {"stress": 1 / (0.1 * GPA)},
            r"stress .* is 1[56]\d\d times the derivative .* in k(B|bar)\)",
        ),
        ({"stress": 1 / GPA}, r"is 1[56]\d\S* times .*\(it seems to be in GPa\)"),
        ({"stress": -1.0}, r"is -(1|0\.9)\S* times .*\(it seems to be of the opposite sign\)"),
        ({"virial": True}, r"in eV, a virial and of the opposite sign"),
        (
            {"stress": 3.0},
            r"is (3|2\.9)\S* times .* over the volume: its calculator must return eV/Å³",
        ),
        (
            {"forces": -1.0},
            r"forces .* are -(1|0\.9)\S* times minus the gradient .*opposite sign",
        ),
        ({"forces": 1 / (Hartree / Bohr)}, r"in Hartree/Bohr"),
    ],
)
def test_derivatives_in_other_units_are_refused_and_the_unit_named(factors, message):
    structures = Structures.from_ase([crystal(a=3.6), crystal(seed=3)])
    with pytest.raises(TeacherError, match=message):
        check_derivatives(scaled(**factors), structures, SIGNALS)
    # What is not asked for is not checked, nor who says that its forces are no gradient.
    check_derivatives(scaled(**factors), structures, ["energy"])
    check_derivatives(scaled(conservative=False, **factors), structures, SIGNALS)


def test_honest_derivatives_pass_on_a_handful_of_frames():
    asked = []

    class Counting(AseTeacher):
        def compute(self, structures, properties):
            asked.append(len(structures))
            return super().compute(structures, properties)

    dimer = molecule("H2")
    slab = fcc111("Cu", (2, 2, 2), vacuum=5.0)
    for calculator in (EMT(), LennardJones(sigma=2.3, epsilon=0.2, rc=5.0)):
        teacher = Counting(calculator, TeacherInfo("honest", "x"))
        asked.clear()
        check_derivatives(teacher, Structures.from_ase([crystal(), bulk("Cu"), slab]), SIGNALS)
        assert sum(asked) == 7
        check_derivatives(teacher, Structures.from_ase([ase.Atoms("Cu"), slab]), SIGNALS)
        check_derivatives(teacher, Structures.from_ase([dimer]), SIGNALS)
    check_derivatives(PotentialTeacher(potential()), frames(), SIGNALS)
    check_derivatives(PotentialTeacher(potential().float()), frames(), SIGNALS)


def test_fingerprint_of_a_calculator_holds_arguments_and_files(tmp_path):
    def fingerprint(**args):
        return AseTeacher.from_factory(f"{__name__}:Choosy", args).info.fingerprint

    assert fingerprint() == fingerprint(level_of_theory="PBE")
    assert fingerprint() != fingerprint(gap=1.0)
    path = tmp_path / "parameters.txt"
    path.write_text("a")
    before = fingerprint(gap=str(path))
    path.write_text("b")
    assert before != fingerprint(gap=str(path))


@pytest.mark.parametrize(
    ("spec", "args", "message"),
    [
        ("gfn2xtb", {}, "did you mean 'gfn2-xtb'"),
        ("chgnet", {"modle": "0.3.0"}, "modle"),
        ("chgnet", {"model": "9.9"}, "no model '9.9'"),
        ("gfn2-xtb", {"nonsense": 1}, "nonsense"),
        ("nowhere.pt", {}, "nowhere.pt: no such checkpoint"),
        ("no_such_module:f", {}, "No module named"),
        ("ase.calculators.emt:NotThere", {}, "NotThere"),
        ("ase.calculators.eam:EAM", {"potential": "/nowhere"}, "could not be created"),
        ("math:sqrt", {"x": 4}, "could not be created"),
        ("builtins:dict", {}, "returned dict, not an ASE calculator"),
        ("ani-al", {}, "path"),
        ("ani-al", {"path": "/nowhere"}, "no such file"),
    ],
)
def test_teachers_that_cannot_be_made(spec, args, message):
    with pytest.raises(TeacherError, match=message):
        make_teacher(spec, args)


# -- CHGNet ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chgnet():
    pytest.importorskip("chgnet", reason="the package chgnet is not installed")
    return make_teacher("chgnet")


def silicon():
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.08, rng=np.random.default_rng(1))
    return atoms


def test_chgnet_site_energies_hold_the_reference_once(chgnet):
    atoms = silicon()
    labels, failures = chgnet.label(Structures.from_ase(atoms), SIGNALS)
    assert not failures
    energy = float(labels["energy"][0])
    assert float(labels["atomic_energies"].sum()) == pytest.approx(energy, rel=1e-14)
    # CHGNet's own answer, through its own calculator: eV in all, and eV/Å³ in ASE's sign.
    from chgnet.model.dynamics import CHGNetCalculator

    theirs = CHGNetCalculator(use_device="cpu")
    assert energy == pytest.approx(float(theirs.get_property("energy", atoms)), abs=2e-5)
    np.testing.assert_allclose(labels["forces"], theirs.get_property("forces", atoms), atol=2e-5)
    np.testing.assert_allclose(labels["stress"][0], theirs.get_property("stress", atoms), atol=1e-6)
    # Subtracting the reference of the composition leaves the interaction, far smaller.
    reference = float(chgnet.model.composition_model.fc.weight[0, 13])
    per_atom = labels["atomic_energies"].numpy()
    assert np.abs(per_atom).max() > 4.0
    assert np.abs(per_atom - reference).max() < 1.0


def test_chgnet_stress_and_forces_are_derivatives(chgnet):
    atoms = silicon()
    check_derivatives(chgnet, Structures.from_ase([atoms, molecule("CH3CH2OH")]), SIGNALS)
    stress = chgnet.label(Structures.from_ase(atoms), ["stress"])[0]["stress"][0]
    for a, b in ((0, 0), (1, 2)):
        energies = []
        for sign in (1.0, -1.0):
            strain = np.eye(3)
            strain[a, b] += sign * 0.005
            strain[b, a] += sign * 0.005
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            labels, _ = chgnet.label(Structures.from_ase(strained), ["energy"])
            energies.append(float(labels["energy"][0]))
        slope = (energies[0] - energies[1]) / 0.02 / atoms.get_volume()
        assert float(stress[a, b]) == pytest.approx(slope, abs=5e-4)
    residual = nonconservative_residual(
        chgnet, Structures.from_ase(atoms), n_components=4, step=0.02
    )
    assert residual.max < 0.05 * residual.force_rms


def test_chgnet_does_not_mind_left_handed_cells(chgnet):
    right = silicon()
    left = right.copy()
    left.set_cell(right.cell.array[[1, 0, 2]])
    labels, _ = chgnet.label(Structures.from_ase([right, left]), SIGNALS)
    torch.testing.assert_close(labels["stress"][0], labels["stress"][1], rtol=0, atol=1e-5)
    torch.testing.assert_close(labels["forces"][:8], labels["forces"][8:], rtol=0, atol=1e-4)


def test_chgnet_labels_open_systems_and_refuses_lone_atoms(chgnet):
    ethanol = molecule("CH3CH2OH")
    boxed = ethanol.copy()
    boxed.center(vacuum=9.0)
    boxed.pbc = True
    slab = bulk("Si", cubic=True)
    slab.pbc = [True, False, True]
    padded = slab.copy()
    padded.center(vacuum=9.0, axis=1)
    padded.pbc = True
    structures = Structures.from_ase([ethanol, boxed, slab, padded, ase.Atoms("Si")])
    labels, failures = chgnet.label(structures, SIGNALS)
    assert [f.system for f in failures] == [4]
    assert "isolated" in failures[0].reason
    energy = labels["energy"]
    assert float(energy[0]) == pytest.approx(float(energy[1]), abs=1e-4)
    assert float(energy[2]) == pytest.approx(float(energy[3]), abs=1e-4)
    assert labels.presence("stress", 5).tolist() == [False, True, False, True, False]


def test_chgnet_says_who_it_is(chgnet):
    assert chgnet.info.license.startswith("Modified BSD")
    assert "PBE" in chgnet.info.level_of_theory
    assert {"chgnet", "torch"} <= set(chgnet.info.versions)
    other = make_teacher("chgnet", {"model": "r2scan"})
    assert other.info.fingerprint != chgnet.info.fingerprint
    assert other.name == "chgnet-r2scan"


# -- xTB ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gfn1-xtb", "gfn2-xtb"])
def xtb(request):
    pytest.importorskip("tblite", reason="the package tblite is not installed")
    return make_teacher(request.param)


def test_xtb_gives_all_signals(xtb):
    water = molecule("H2O")
    water.rattle(0.05, rng=np.random.default_rng(2))
    names = [*SIGNALS, "charges", "dipole"]
    labels, failures = xtb.label(Structures.from_ase(water), names)
    assert not failures
    total = float(labels["atomic_energies"].sum())
    assert total == pytest.approx(float(labels["energy"][0]), abs=1e-9)
    assert float(labels["charges"].sum()) == pytest.approx(0.0, abs=1e-9)
    assert float(labels["charges"][0]) < -0.2  # oxygen
    assert labels.presence("stress", 1).tolist() == [False]
    check_derivatives(xtb, Structures.from_ase(water), SIGNALS)
    residual = nonconservative_residual(xtb, Structures.from_ase(water), n_components=3)
    assert residual.max < 1e-3 * residual.force_rms


def test_xtb_takes_charge_and_spin():
    pytest.importorskip("tblite", reason="the package tblite is not installed")
    teacher = make_teacher("gfn2-xtb")
    plain, charged = molecule("H2O"), molecule("OH")
    for atoms, charge, spin in ((plain, 0, 1), (charged, -1, 1)):
        atoms.info |= {"charge": charge, "spin": spin}
    labels, failures = teacher.label(Structures.from_ase([plain, charged]), ["charges"])
    assert not failures
    assert float(labels["charges"][:3].sum()) == pytest.approx(0.0, abs=1e-6)
    assert float(labels["charges"][3:].sum()) == pytest.approx(-1.0, abs=1e-6)


def test_xtb_frames_that_do_not_converge_fail():
    pytest.importorskip("tblite", reason="the package tblite is not installed")
    teacher = make_teacher("gfn2-xtb", {"max_iterations": 2})
    labels, failures = teacher.label(Structures.from_ase(molecule("H2O")), ["energy"])
    assert [f.system for f in failures] == [0]
    assert labels.presence("energy", 1).tolist() == [False]


@pytest.mark.parametrize(
    ("spec", "package"), [("chgnet", "chgnet"), ("gfn1-xtb", "tblite"), ("gfn2-xtb", "tblite")]
)
def test_absent_packages_name_their_extra(spec, package, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(OptionalDependencyError, match=rf"potstill\[{package}\]"):
        make_teacher(spec)
