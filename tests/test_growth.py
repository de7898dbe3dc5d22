"""What an extension costs: each test adds one as a contributor would, by one line in a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes
from ase.calculators.emt import EMT
from ase.io import write

from potstill import properties
from potstill.deploy import DEPLOYMENTS, deploy
from potstill.errors import ConfigError, DataError, ModelError
from potstill.label import label_store
from potstill.models import HIPNN, SNAP, ZBL, Potential, SpeciesOffsets, SumPotential
from potstill.properties import PropertySpec
from potstill.readers import FORMATS, Frame, KeyMap, Units, read
from potstill.sample import JOBS, make_job
from potstill.sample.base import IndependentJob, Maker
from potstill.species import SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers import TEACHERS, AseTeacher, TeacherInfo, make_teacher


def copper(n: int = 3) -> list[ase.Atoms]:
    frames = [bulk("Cu", cubic=True) for _ in range(n)]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=seed)
    return frames


# -- a property: one row ---------------------------------------------------------------------------


class Magnet(Calculator):
    """EMT whose atoms carry moments, as a spin-polarized method gives them."""

    implemented_properties = ("energy", "forces", "magmoms")

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        inner = atoms.copy()
        inner.calc = EMT()
        self.results = {
            "energy": inner.get_potential_energy(),
            "forces": inner.get_forces(),
            "magmoms": 2.0 + atoms.positions[:, 0],
        }


@pytest.fixture
def magnetic_moments(monkeypatch: pytest.MonkeyPatch) -> PropertySpec:
    """The row that a contributor would add to `properties.py`."""
    row = PropertySpec("magnetic_moments", "atom", (), "μB", ase="magmoms")
    monkeypatch.setitem(properties.PROPERTIES, row.name, row)
    monkeypatch.setitem(properties.ASE_NAMES, row.name, row.ase)
    return row


def test_a_property_is_one_row(tmp_path: Path, magnetic_moments: PropertySpec) -> None:
    frames = copper()
    teacher = AseTeacher(Magnet(), TeacherInfo("magnet", "one"))
    store = LabeledStore.create(tmp_path / "labels.zarr")
    store.append(Structures.from_ase(frames))
    label_store(store, teacher, [magnetic_moments.name])
    found = LabeledStore.open(tmp_path / "labels.zarr").labels("magnet")
    expected = torch.from_numpy(np.concatenate([2.0 + atoms.positions[:, 0] for atoms in frames]))
    assert torch.equal(found[magnetic_moments.name], expected)
    structures = store.structures()
    parts = [found.select(structures.rows([k])) for k in range(3)]
    joined = Properties.concatenate(parts, [structures[k] for k in range(3)])
    assert torch.equal(joined[magnetic_moments.name], expected)
    with pytest.raises(DataError, match="one row per atom"):
        Properties({magnetic_moments.name: torch.zeros(4, 3)})


def test_a_property_of_a_file_is_the_same_row(
    tmp_path: Path, magnetic_moments: PropertySpec
) -> None:
    frames = copper()
    for atoms in frames:
        atoms.calc = Magnet()
        atoms.get_potential_energy()
    write(tmp_path / "frames.extxyz", frames)
    _, labels = read(tmp_path / "frames.extxyz", require=["energy", magnetic_moments.name])
    expected = np.concatenate([2.0 + atoms.positions[:, 0] for atoms in frames])
    np.testing.assert_allclose(labels[magnetic_moments.name], expected, atol=1e-7)


# -- a teacher, a file format, a sampling job: one line in the table -------------------------------


def test_a_teacher_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        TEACHERS, "emt", lambda **args: AseTeacher(EMT(**args), TeacherInfo("emt", str(args)))
    )
    teacher = make_teacher("emt", {"asap_cutoff": True})
    (atoms, *_) = copper()
    labels, failures = teacher.label(Structures.from_ase(atoms), ["energy"])
    atoms.calc = EMT(asap_cutoff=True)
    assert failures == []
    assert float(labels["energy"]) == pytest.approx(atoms.get_potential_energy(), abs=1e-10)


def read_columns(path: Path, keys: KeyMap, index: slice) -> tuple[Iterator[Frame], Units]:
    """A format of four columns, in kcal/mol: element number and position, energy in line one."""

    def frames() -> Iterator[Frame]:
        lines = path.read_text().splitlines()
        table = np.loadtxt(lines[1:])
        yield Frame(
            where=str(path),
            frame_id=f"{path.name}:0",
            numbers=table[:, 0].astype(int),
            positions=table[:, 1:],
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, dtype=bool),
            labels={"energy": float(lines[0])},
            keys=(),
        )

    units = Units(
        energy="kcal/mol",
        length="Angstrom",
        force="kcal/mol/Angstrom",
        stress="GPa",
        positive_stress="tension",
    )
    return frames(), units


def test_a_file_format_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "columns", read_columns)
    (tmp_path / "water.txt").write_text("-10.0\n8 0 0 0\n1 0.96 0 0\n1 -0.24 0.93 0\n")
    structures, labels = read(tmp_path / "water.txt", format="columns", require=["energy"])
    assert structures.to_ase()[0].get_chemical_formula() == "H2O"
    assert float(labels["energy"]) == pytest.approx(-10.0 * 0.0433641, rel=1e-5)


@dataclass(frozen=True, kw_only=True)
class ShearJob(IndependentJob):
    """Frames that are sheared ever more."""

    kind: ClassVar[str] = "shear"

    largest: float = 0.1

    def default_name(self) -> str:
        return f"shear to {self.largest:g}"

    def maker(self, start: Structures, calculator: BaseCalculator | None) -> Maker:
        def make(k: int, generator: np.random.Generator) -> tuple[Structures, str]:
            shear = torch.eye(3, dtype=torch.float64)
            shear[0, 1] = self.spread((0.0, self.largest))[k]
            return start.deformed(shear), ""

        return make


def test_a_sampling_job_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JOBS, "shear", ShearJob)
    job = make_job({"kind": "shear", "n_frames": 3, "largest": 0.2})
    frames = job.run(Structures.from_ase(bulk("Cu", cubic=True)), seed=0)
    cell = frames.structures.cell
    torch.testing.assert_close(
        cell[:, 0, 1] / cell[:, 0, 0], torch.tensor([0.0, 0.1, 0.2]).double()
    )
    torch.testing.assert_close(frames.structures.volume, cell[0].det().expand(3))


# -- a deployment ----------------------------------------------------------------------------------


def tungsten_snap() -> tuple[SNAP, SpeciesOffsets, ZBL]:
    table = SpeciesTable.from_symbols(["W"])
    snap = SNAP(table, twojmax=2, rcutfac=3.5, radii=[0.5], weights=[1.0]).double()
    with torch.no_grad():
        snap.coefficients.copy_(torch.linspace(-0.3, 0.2, snap.n_coefficients)[None])
    return snap, SpeciesOffsets(table, torch.tensor([-12.5])), ZBL(table, 1.5, 2.0, "lammps")


def test_a_deployment_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_cutoff(
        potential: Potential, folder: Path, stem: str, info: Mapping[str, Any]
    ) -> list[Path]:
        file = folder / f"{stem}.txt"
        file.write_text(f"{potential.cutoff}\n")
        return [file]

    monkeypatch.setitem(DEPLOYMENTS, "cutoff", write_cutoff)
    snap, _, _ = tungsten_snap()
    (file,) = deploy(snap, "cutoff", tmp_path / "new")
    assert float(file.read_text()) == snap.cutoff
    with pytest.raises(ConfigError, match="did you mean 'cutoff'"):
        deploy(snap, "cutof", tmp_path)


def test_deployed_snap_has_the_energies_of_potstill(tmp_path: Path) -> None:
    snap, offsets, prior = tungsten_snap()
    whole = SumPotential({"offsets": offsets, "network": snap, "prior": prior})
    coeff, param, commands = deploy(whole, "lammps-snap", tmp_path, "w")
    read_back = SumPotential({"network": SNAP.from_lammps(coeff, param), "prior": prior})
    atoms = bulk("W", cubic=True) * (2, 2, 2)
    atoms.rattle(0.1, seed=0)
    structures = Structures.from_ase(atoms)
    energies = [potential.predict(structures)["energy"] for potential in (whole, read_back)]
    torch.testing.assert_close(*energies, atol=1e-10, rtol=1e-14)
    assert "pair_style hybrid/overlay zbl 1.5 2.0 snap" in commands.read_text()


def test_what_lammps_snap_cannot_run_is_refused(tmp_path: Path) -> None:
    snap, _, _ = tungsten_snap()
    with pytest.raises(ModelError, match="not hipnn"):
        deploy(HIPNN(snap.species_table), "lammps-snap", tmp_path)
    prior = ZBL(snap.species_table, 1.5, 2.0)
    with pytest.raises(ModelError, match="switched differently"):
        deploy(SumPotential({"network": snap, "prior": prior}), "lammps-snap", tmp_path)
    assert list(tmp_path.iterdir()) == []
