"""Readers on files made here, whose content is known, and on published data."""

import gzip
import json

import ase
import ase.build
import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.units import Bohr, GPa, Hartree, kcal, mol

from data import data_path
from potstill.errors import ConfigError, DataError, MissingLabelError
from potstill.readers import DataWarning, KeyMap, Units, read
from test_malformed_inputs import DUMP

KCAL = kcal / mol


def crystal(seed=0, stress=True):
    """Rattled copper with labels in a calculator, as ASE writes and reads them."""
    random = np.random.default_rng(seed)
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.positions += random.normal(0, 0.05, atoms.positions.shape)
    atoms.info["config_type"] = "warm" if seed else "cold"
    labels = {"energy": random.normal(), "forces": random.normal(size=(4, 3))}
    if stress:
        labels["stress"] = random.normal(size=6) * 0.01
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


@pytest.fixture
def crystals():
    return [crystal(seed) for seed in range(4)]


def assert_labels(labels, frames):
    assert labels["energy"].tolist() == pytest.approx([a.calc.results["energy"] for a in frames])
    forces = np.concatenate([a.calc.results["forces"] for a in frames])
    assert labels["forces"].numpy() == pytest.approx(forces, abs=1e-7)
    for row, atoms in zip(labels["stress"].numpy(), frames, strict=True):
        xx, yy, zz, yz, xz, xy = atoms.calc.results["stress"]
        expected = [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]
        assert row == pytest.approx(np.array(expected), abs=1e-7)
    assert all(value.dtype == torch.float64 for value in labels.values.values())


SIX = "0.1 0.2 0.3 0.4 0.5 0.6"
VOIGT = [[0.1, 0.6, 0.5], [0.6, 0.2, 0.4], [0.5, 0.4, 0.3]]
VASP = [[0.1, 0.4, 0.6], [0.4, 0.2, 0.5], [0.6, 0.5, 0.3]]


@pytest.mark.parametrize("name", ["stress", "REF_stress", "virial", "REF_virial"])
@pytest.mark.parametrize(("order", "expected"), [(None, VOIGT), ("xx yy zz xy yz zx", VASP)])
@pytest.mark.parametrize("form", ['"{}"', "'{}'", "[{}]"])
def test_six_numbers_of_a_stress(tmp_path, name, order, expected, form):
    text = form.format(SIX.replace(" ", ", ") if "[" in form else SIX)
    head = f'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 {name}={text} energy=1'
    (tmp_path / "a.xyz").write_text(f"1\n{head}\nAl 0 0 0\n")
    keys = KeyMap(**{name.removeprefix("REF_"): name})
    _, labels = read(tmp_path / "a.xyz", keys=keys, units=Units(stress_order=order))
    factor = -1 / 64 if "virial" in name else 1.0
    assert labels["stress"][0].numpy() == pytest.approx(factor * np.array(expected))


def test_a_stress_without_periodicity_is_left_out_and_counted(tmp_path, crystals):
    crystals[2].pbc = (True, True, False)
    crystals[3].pbc = False
    ase.io.write(tmp_path / "a.xyz", crystals)
    with pytest.warns(DataWarning, match=r"stress of 2 of 4 frames was left out.* a.xyz:2\)"):
        _, labels = read(tmp_path / "a.xyz", allow_partial=True)
    assert labels.presence("stress", 4).tolist() == [True, True, False, False]
    assert labels.presence("forces", 4).all()
    with pytest.warns(DataWarning, match="stress of 2 of 2 frames"):
        _, labels = read(tmp_path / "a.xyz", index="2:")
    assert labels.names == ("energy", "forces")


def test_elements_from_a_column_or_from_types(tmp_path):
    rows = ["Al 1 0 0 0", "Cu 2 2 2 0"]
    head = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=element:S:1:type:I:1:pos:R:3 energy=1'
    (tmp_path / "a.xyz").write_text("\n".join(["2", head, *rows]))
    for keys in (KeyMap(species="element"), KeyMap(species="type", types="Al Cu")):
        structures, _ = read(tmp_path / "a.xyz", keys=keys)
        assert structures.atomic_numbers.tolist() == [13, 29]


def test_lammps_dumps_need_the_elements_of_types(tmp_path):
    path = tmp_path / "a.lammpstrj"
    path.write_text(DUMP)
    structures, labels = read(path, keys=KeyMap(types="Cu Al"))
    assert structures.atomic_numbers.tolist() == [29, 13]
    assert labels["forces"].tolist() == [[0.5, 0, 0], [-0.5, 0, 0]]
    path.write_text(DUMP.replace("id type", "id element").replace("\n1 1", "\n1 Al"))
    path.write_text(path.read_text().replace("\n2 2 2", "\n2 Cu 2"))
    assert read(path)[0].atomic_numbers.tolist() == [13, 29]


def test_a_byte_order_mark_does_not_matter(tmp_path, crystals):
    ase.io.write(tmp_path / "a.xyz", crystals)
    (tmp_path / "b.xyz").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.xyz").read_bytes())
    structures, labels = read(tmp_path / "b.xyz")
    assert structures.fingerprints() == read(tmp_path / "a.xyz")[0].fingerprints()
    assert_labels(labels, crystals)


# -- ASE's formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.extxyz", "a.xyz", "a.extxyz.gz", "a.traj", "a.db", "a.json"])
def test_formats_of_ase_hold_the_same(tmp_path, crystals, name):
    path = tmp_path / name
    if name.endswith(".gz"):
        ase.io.write(tmp_path / "a.extxyz", crystals)
        path.write_bytes(gzip.compress((tmp_path / "a.extxyz").read_bytes()))
    else:
        ase.io.write(path, crystals)
    structures, labels = read(path, require=("energy", "forces", "stress"))
    assert structures.positions.numpy() == pytest.approx(
        np.concatenate([a.positions for a in crystals]), abs=1e-7
    )
    assert structures.pbc.all()
    assert structures.frame_id == tuple(f"{name}:{k}" for k in range(4))
    assert_labels(labels, crystals)


def test_groups_and_index(tmp_path, crystals):
    path = tmp_path / "a.extxyz"
    ase.io.write(path, crystals)
    structures, labels = read(path, index="1::2")
    assert structures.frame_id == ("a.extxyz:1", "a.extxyz:3")
    assert structures.group == ("warm", "warm")
    assert_labels(labels, crystals[1::2])
    assert read(path, index=-1)[0].frame_id == ("a.extxyz:3",)
    assert read(path, index=0)[0].group == ("cold",)
    assert len(read(path, index=slice(2))[0]) == 2
    with pytest.raises(ConfigError, match="start:stop:step"):
        read(path, index="first")
    with pytest.raises(ConfigError, match="step must be positive"):
        read(path, index="::-1")


def test_explicit_keys_beside_those_that_ase_moves(tmp_path, crystals):
    for atoms in crystals:
        atoms.info["dft_energy"] = atoms.calc.results["energy"] + 1
        atoms.arrays["dft_forces"] = 2 * atoms.calc.results["forces"]
        atoms.info["dft_virial"] = np.diag([1.0, 2.0, 3.0])
        atoms.info["phase"] = "solid"
    path = tmp_path / "a.xyz"
    ase.io.write(path, crystals, format="extxyz")
    keys = KeyMap(
        energy="dft_energy", forces="dft_forces", virial="dft_virial", stress=None, group="phase"
    )
    with pytest.raises(DataError, match="both a stress and a virial"):
        read(path, keys=keys)
    for atoms in crystals:
        del atoms.calc.results["stress"]
    ase.io.write(path, crystals, format="extxyz")
    structures, labels = read(path, keys=keys, require=("stress",))
    assert labels["energy"][0] == pytest.approx(crystals[0].calc.results["energy"] + 1)
    assert labels["forces"][:4].numpy() == pytest.approx(2 * crystals[0].calc.results["forces"])
    volume = crystals[0].cell.volume
    assert labels["stress"][0].diagonal().tolist() == pytest.approx(
        [-k / volume for k in (1, 2, 3)]
    )
    assert set(structures.group) == {"solid"}
    # The names that ASE moves into a calculator can be given explicitly, too.
    _, plain = read(path, keys=KeyMap(energy="energy", forces="forces"))
    assert plain["energy"][0] == pytest.approx(crystals[0].calc.results["energy"])


def test_forces_on_fixed_atoms_are_not_zeroed(tmp_path):
    atoms = ase.build.fcc111("Al", (2, 2, 2), vacuum=5.0)
    atoms.info.clear()  # what ASE notes about its slabs cannot be written
    atoms.rattle(0.1, seed=0)
    atoms.calc = EMT()
    forces = atoms.get_forces()
    atoms.set_constraint(FixAtoms([0, 1, 2]))
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=forces)
    for name in ("a.xyz", "a.traj", "a.db"):
        ase.io.write(tmp_path / name, atoms)
        structures, labels = read(tmp_path / name)
        assert labels["forces"].numpy() == pytest.approx(forces, abs=1e-7)
        assert structures.fixed.nonzero().flatten().tolist() == [0, 1, 2]


def test_keys_and_data_of_databases(tmp_path):
    with ase.db.connect(tmp_path / "a.db") as database:
        for k in range(3):
            row = {"ref_forces": np.full((4, 3), float(k))}
            database.write(ase.build.bulk("Al", cubic=True), ref_energy=float(k), data=row)
    _, labels = read(tmp_path / "a.db", keys=KeyMap(energy="ref_energy", forces="ref_forces"))
    assert labels["energy"].tolist() == [0.0, 1.0, 2.0]
    assert labels["forces"][:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_units_are_converted_once(tmp_path, crystals):
    ase.io.write(tmp_path / "a.xyz", crystals)
    plain, expected = read(tmp_path / "a.xyz")
    units = Units(energy="Hartree", length="Bohr", stress="GPa", positive_stress="compression")
    structures, labels = read(tmp_path / "a.xyz", units=units, min_distance=0)
    assert torch.allclose(structures.positions, plain.positions * Bohr)
    assert torch.allclose(structures.cell, plain.cell * Bohr)
    assert torch.allclose(labels["energy"], expected["energy"] * Hartree)
    assert torch.allclose(labels["forces"], expected["forces"] * Hartree / Bohr)
    assert torch.allclose(labels["stress"], -expected["stress"] * GPa)
    # A unit of force can be said by itself.
    _, labels = read(tmp_path / "a.xyz", units=Units(force="kcal/mol/Angstrom"))
    assert torch.allclose(labels["forces"], expected["forces"] * KCAL)
    assert torch.equal(labels["energy"], expected["energy"])


def test_partly_labelled_sets_must_be_meant(tmp_path, crystals):
    frames = [*crystals, crystal(9, stress=False), ase.build.bulk("Cu", cubic=True)]
    ase.io.write(tmp_path / "a.extxyz", frames)
    with pytest.raises(MissingLabelError, match=r"frame 5 has no 'energy', which other frames"):
        read(tmp_path / "a.extxyz")
    with pytest.raises(MissingLabelError, match=r"a\.extxyz, frame 4 has no 'stress'.*2 of 6"):
        read(tmp_path / "a.extxyz", require=("stress",))
    _, labels = read(tmp_path / "a.extxyz", require=("stress",), allow_partial=True)
    assert labels.presence("energy", 6).tolist() == [True] * 5 + [False]
    assert labels.presence("stress", 6).tolist() == [True] * 4 + [False] * 2
    assert labels["stress"][4:].isnan().all()
    assert labels["forces"][-4:].isnan().all()
    # Nobody has charges: that no frame has them is never a matter of partial labels.
    with pytest.raises(MissingLabelError, match="'charges'"):
        read(tmp_path / "a.extxyz", require=("charges",), allow_partial=True)


def test_optional_fields_of_frames(tmp_path):
    frames = [ase.build.molecule("H2O"), ase.build.molecule("OH")]
    frames[0].info["charge"] = 1
    frames[0].arrays["fixed"] = np.array([1, 0, 0])
    frames[1].set_tags([1, 2])
    ase.io.write(tmp_path / "a.extxyz", frames)
    structures, labels = read(tmp_path / "a.extxyz", species=["O", "H", "C"])
    assert structures.species_table.names == ("H", "C", "O")
    assert structures.charge.tolist() == [1.0, 0.0]
    assert structures.fixed.tolist() == [True, False, False, False, False]
    assert structures.tags.tolist() == [0, 0, 0, 1, 2]
    assert not structures.pbc.any()
    assert labels.names == ()


# -- NumPy archives -------------------------------------------------------------------------------


def arrays(n_frames=5):
    random = np.random.default_rng(0)
    water = ase.build.molecule("H2O")
    return {
        "coords": water.positions + random.normal(0, 0.02, (n_frames, 3, 3)),
        "nuclear_charges": water.numbers,
        "energies": random.normal(size=n_frames),
        "forces": random.normal(size=(n_frames, 3, 3)),
    }


def test_rmd17_and_sgdml_layouts(tmp_path):
    held = arrays()
    np.savez(tmp_path / "rmd17.npz", old_indices=np.arange(5), **held)
    structures, labels = read(tmp_path / "rmd17.npz", require=("energy", "forces"))
    assert structures.positions.numpy() == pytest.approx(held["coords"].reshape(-1, 3))
    assert labels["energy"].numpy() == pytest.approx(held["energies"] * KCAL)
    assert labels["forces"].numpy() == pytest.approx(held["forces"].reshape(-1, 3) * KCAL)
    sgdml = {
        "R": held["coords"],
        "z": held["nuclear_charges"],
        "E": held["energies"][:, None],
        "F": held["forces"],
        "type": "d",
    }
    np.savez(tmp_path / "md17.npz", **sgdml)
    _, same = read(tmp_path / "md17.npz")
    assert torch.equal(same["energy"], labels["energy"])
    np.savez(tmp_path / "stated.npz", e_unit="Hartree", r_unit="bohr", **sgdml)
    structures, stated = read(tmp_path / "stated.npz", index=":2")
    assert structures.positions.numpy() == pytest.approx(held["coords"][:2].reshape(-1, 3) * Bohr)
    assert stated["energy"].numpy() == pytest.approx(held["energies"][:2] * Hartree)
    assert stated["forces"].numpy() == pytest.approx(
        held["forces"][:2].reshape(-1, 3) * Hartree / Bohr
    )
    _, overridden = read(tmp_path / "stated.npz", units=Units(energy="eV", length="Angstrom"))
    assert overridden["energy"].numpy() == pytest.approx(held["energies"])


def test_archives_with_other_names_must_state_their_units(tmp_path):
    held = arrays()
    held["pbe"] = held.pop("energies")
    np.savez(tmp_path / "a.npz", **held)
    keys = KeyMap(energy="pbe")
    with pytest.raises(ConfigError, match="does not say its unit of energy"):
        read(tmp_path / "a.npz", keys=keys)
    _, labels = read(tmp_path / "a.npz", keys=keys, units=Units(energy="meV"))
    assert labels["energy"].numpy() == pytest.approx(held["pbe"] * 1e-3)


def test_lattices_of_archives(tmp_path):
    held = arrays()
    lattice = np.array([[8.0, 1, 2], [0, 9, 3], [0, 0, 7]])
    np.savez(tmp_path / "columns.npz", lattice=lattice, **held)
    structures, _ = read(tmp_path / "columns.npz")
    assert structures.pbc.all()
    assert structures.cell[4].numpy() == pytest.approx(lattice.T)
    np.savez(tmp_path / "rows.npz", cell=lattice.T, pbc=[True, True, False], **held)
    structures, _ = read(tmp_path / "rows.npz")
    assert structures.cell[4].numpy() == pytest.approx(lattice.T)
    assert structures.pbc[4].tolist() == [True, True, False]


# -- ANI's HDF5 -----------------------------------------------------------------------------------


def test_ani_al_layout(tmp_path):
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    expected = []
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for k, n in enumerate((4, 2)):
            group = file.create_group(f"data/part{k}")
            cubic = ase.build.bulk("Al", cubic=True)[:n]
            held = {
                "coordinates": cubic.positions + random.normal(0, 0.05, (3, n, 3)),
                "cell": np.stack([cubic.cell.array * f for f in (1, 1.01, 1.02)]),
                "energy": random.normal(size=3),
                "force": random.normal(size=(3, n, 3)),
            }
            for name, value in held.items():
                group[name] = value
            group["species"] = np.array([b"Al"] * n)
            expected.append(held)
    structures, labels = read(tmp_path / "a.h5", require=("energy", "forces"))
    assert structures.n_atoms_per_system.tolist() == [4, 4, 4, 2, 2, 2]
    assert structures.group[::3] == ("data/part0", "data/part1")
    assert structures.pbc.all()
    assert structures.cell[4].numpy() == pytest.approx(expected[1]["cell"][1])
    assert labels["energy"][3:].numpy() == pytest.approx(expected[1]["energy"] * Hartree)
    assert labels["forces"][:12].numpy() == pytest.approx(
        expected[0]["force"].reshape(-1, 3) * Hartree
    )
    some, _ = read(tmp_path / "a.h5", index="2:5")
    assert some.frame_id == ("a.h5/data/part0:2", "a.h5/data/part1:0", "a.h5/data/part1:1")


def test_ani_1x_layout(tmp_path):
    h5py = pytest.importorskip("h5py")
    water = ase.build.molecule("H2O")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("H2O")
        group["atomic_numbers"] = water.numbers.astype("u1")
        group["coordinates"] = np.stack([water.positions, water.positions * 1.01]).astype("f4")
        group["wb97x_dz.energy"] = [-76.0, -75.9]
        group["wb97x_dz.forces"] = np.stack([np.ones((3, 3)), np.full((3, 3), np.nan)])
        group["ccsd(t)_cbs.energy"] = [np.nan, -76.1]
    with pytest.raises(
        MissingLabelError, match=r"did you mean 'ccsd\(t\)_cbs\.energy' or 'wb97x_dz"
    ):
        read(tmp_path / "a.h5", require=("energy",))
    keys = KeyMap(energy="wb97x_dz.energy", forces="wb97x_dz.forces")
    with pytest.raises(MissingLabelError, match=r"frame 1 has no 'wb97x_dz\.forces'"):
        read(tmp_path / "a.h5", keys=keys)
    structures, labels = read(tmp_path / "a.h5", keys=keys, allow_partial=True)
    assert not structures.pbc.any()
    assert labels["energy"].numpy() == pytest.approx(np.array([-76.0, -75.9]) * Hartree)
    assert labels.presence("forces", 2).tolist() == [True, False]


# -- published data -------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "n_systems", "n_atoms", "labels"),
    [
        ("mlearn/Mo_train.extxyz.gz", 194, 10087, {"energy", "forces", "stress"}),
        ("mlearn/Si_test.extxyz.gz", 25, 1525, {"energy", "forces", "stress"}),
        ("ta-snap/ta_snap.extxyz.gz", 363, 4224, {"energy", "forces", "stress"}),
        ("li-al/pure_Al.extxyz.gz", 90, 9512, {"energy", "forces"}),
        ("md17-ethanol/md17_ethanol_2000.extxyz.gz", 2000, 18000, {"energy", "forces"}),
        ("ani-al-model/ani_al_reference_eval.extxyz", 35, 483, {"energy", "forces", "stress"}),
    ],
)
def test_published_sets_are_read_whole(name, n_systems, n_atoms, labels):
    structures, properties = read(data_path(name), require=sorted(labels))
    assert (structures.n_systems, structures.n_atoms) == (n_systems, n_atoms)
    assert set(properties.names) == labels
    for label in labels:
        assert properties.presence(label, n_systems).all()
        assert properties[label].isfinite().all()


@pytest.mark.data
def test_published_values_and_groups():
    structures, labels = read(data_path("mlearn/Mo_test.extxyz.gz"))
    counts = {g: structures.group.count(g) for g in structures.group}
    assert counts == {"AIMD-NVT": 12, "Elastic": 6, "Surface": 2, "Vacancy": 3}
    per_atom = labels["energy"] / structures.n_atoms_per_system
    # The range and the root mean square that the data's own description states.
    assert per_atom.min().item() == pytest.approx(-10.8179, abs=1e-4)
    assert per_atom.max().item() == pytest.approx(-9.5450, abs=1e-4)
    assert labels["forces"].square().mean().sqrt().item() == pytest.approx(1.568, abs=1e-3)


@pytest.mark.data
def test_partly_labelled_published_set():
    path = data_path("wbe-snap/wbe_snap.extxyz.gz")
    with pytest.raises(MissingLabelError, match="no 'stress', which other frames have"):
        read(path, index="::100")
    structures, labels = read(path, index="::100", allow_partial=True)
    present = labels.presence("stress", len(structures))
    groups = {g for g, p in zip(structures.group, present, strict=True) if p}
    assert groups <= {"EOS", "EOS_FCC", "EOS_HCP", "EOS_Data"}
    assert labels.presence("forces", len(structures)).all()


@pytest.mark.data
def test_frozen_atoms_and_many_species():
    structures, labels = read(data_path("oc20-traj/train_24_systems.extxyz.gz"), index=":40")
    assert structures.fixed.any()
    assert labels["forces"][structures.fixed].abs().max() > 0.01
    with pytest.raises(DataError, match=r"frame 0 holds .*, which is not among the species H, O"):
        read(data_path("oc20-traj/train_24_systems.extxyz.gz"), index=":1", species=["O", "H"])


def test_json_files_are_told_apart(tmp_path, crystals):
    ase.io.write(tmp_path / "ase.json", crystals[0])
    assert len(read(tmp_path / "ase.json")[0]) == 1
    data = {
        "Positions": [[0, 0, 0]],
        "AtomTypes": ["Ta"],
        "Lattice": np.eye(3).tolist(),
        "Energy": 1,
    }
    (tmp_path / "fitsnap.json").write_text(json.dumps({"Dataset": {"Data": [data]}}))
    structures, labels = read(tmp_path / "fitsnap.json")
    assert structures.species_table.names == ("Ta",)
    assert labels["energy"].tolist() == [1.0]
