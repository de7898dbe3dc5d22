"""Beads, species without an atomic number, on the road of atoms from a file to LAMMPS."""

import json
import re
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ruamel.yaml import YAML
from typer.testing import CliRunner

import potstill
from potstill.ase_bridge import make_atoms, same_species, species_names, species_of
from potstill.calculators import ExtrapolationWarning, PotstillCalculator
from potstill.checkpoint import load_potential
from potstill.cli import app
from potstill.core import available
from potstill.deploy.lammps import lammps_data
from potstill.errors import ConfigError, DataError, DivergenceError
from potstill.evaluate import lammps_md
from potstill.evaluate.base import Bench, BenchSettings
from potstill.evaluate.phonons import PhononsEvaluation
from potstill.evaluate.rdf import radial_distribution
from potstill.models import HIPNN
from potstill.readers import KeyMap, Units, read
from potstill.sample import run_md
from potstill.soundness import Connectivity, closest_pairs
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.workflows import export as export_workflow

#: The name of the second is a chemical symbol, and it is a bead all the same.
CHOLINE, CHLORIDE = Species("CHOL", 104.17), Species("Cl", 35.45)
TABLE = SpeciesTable((CHOLINE, CHLORIDE))


def liquid(n_frames: int, seed: int = 0) -> list[ase.Atoms]:
    """Frames of 32 beads with the forces of soft pair repulsion, and no energies."""
    generator = np.random.default_rng(seed)
    sites = bulk("X", "fcc", a=7.0, cubic=True) * (2, 2, 2)
    species = [(CHOLINE, CHLORIDE)[k % 2] for k in range(len(sites))]
    frames = []
    for _ in range(n_frames):
        positions = sites.positions + 0.5 * generator.standard_normal(sites.positions.shape)
        atoms = make_atoms(species, positions, sites.cell.array, sites.pbc)
        vectors = atoms.get_all_distances(mic=True, vector=True)
        distance = np.linalg.norm(vectors, axis=2, keepdims=True) + 1e9 * np.eye(32)[..., None]
        push = 60.0 * np.exp(-distance / 0.8)
        atoms.arrays["forces"] = -(push * vectors / distance).sum(axis=1)
        frames.append(atoms)
    return frames


def written(folder: Path, frames: list[ase.Atoms]) -> Path:
    ase.io.write(folder / "beads.xyz", frames)
    return folder / "beads.xyz"


def assert_same(found: Structures, frames: list[ase.Atoms]) -> None:
    names = [found.species_table.names[k] for k in found.species.tolist()]
    assert names == [name for atoms in frames for name in species_names(atoms)]
    np.testing.assert_allclose(
        found.masses, np.concatenate([atoms.get_masses() for atoms in frames]), rtol=1e-7
    )
    assert (found.atomic_numbers == -1).all()


def model(cutoff: float = 6.0, **options) -> HIPNN:
    torch.manual_seed(0)
    sizes = {"n_features": 6, "n_sensitivities": 5, "n_atom_layers": 1, **options}
    distances = {"dist_soft_min": 2.0, "dist_soft_max": cutoff - 0.5, "dist_hard_max": cutoff}
    return HIPNN(TABLE, **sizes, **distances).double()


# -- one road ----------------------------------------------------------------------------------


def call(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a store of mapped forces, and a model that has learned a little from it."""
    folder = tmp_path_factory.mktemp("beads")
    structures, labels = read(written(folder, liquid(24)), require=["forces"])
    store = LabeledStore.create(folder / "mapped.zarr")
    store.append(structures, labels)
    config = {
        "out": str(folder / "run"),
        "data": {"store": str(folder / "mapped.zarr"), "split": {"seed": 0}},
        "train": {
            "model": {
                "kind": "hipnn",
                "hyperparameters": {
                    "n_features": 8, "n_sensitivities": 6, "n_atom_layers": 1, "l_max": 1,
                    "dist_soft_min": 2.5, "dist_soft_max": 7.0, "dist_hard_max": 7.5,
                },
            },
            "loss": [{"property": "forces", "weight": 1.0}],
            "score": {"weights": {"forces_rmse": 1.0}},
            "optimizer": {"learning_rate": 1e-2},
            "batch_size": 4,
            "epochs": 40,
        },
    }  # fmt: skip
    with (folder / "train.yaml").open("w") as file:
        YAML().dump(config, file)
    call("train", folder / "train.yaml")
    return folder


def test_forces_alone_train_a_model_whose_mean_energies_are_zero(trained):
    potential, info = load_potential(trained / "run" / "best.pt")
    assert potential.species_table == TABLE
    known = info["trained_on"]
    assert known["elements"] == ["CHOL", "Cl"]
    assert set(known["shortest_distances"]) == {"CHOL-CHOL", "CHOL-Cl", "Cl-Cl"}
    records = [
        json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1]["validation"]["forces_rmse"] < 0.7 * records[0]["validation"]["forces_rmse"]
    data = LabeledStore.open(trained / "mapped.zarr")
    # Of the whole set the training part is 0.8: its means are zero, and the others' nearly so.
    energies = potential.predict(data.structures(), properties=["atomic_energies"])
    for k in range(2):
        chosen = energies["atomic_energies"][data.structures().species == k]
        assert abs(chosen.mean()) < 0.1 * chosen.std() + 1e-3


def test_a_fine_tuned_model_keeps_its_zero(trained, tmp_path):
    """Only fresh runs choose a zero: nothing moves energies that a start has learned."""
    config = YAML(typ="safe").load(trained / "train.yaml")
    config |= {"out": str(tmp_path / "run"), "initial": str(trained / "run" / "best.pt")}
    config["train"]["epochs"] = 1
    with (tmp_path / "tune.yaml").open("w") as file:
        YAML().dump(config, file)
    call("train", tmp_path / "tune.yaml")
    before, after = (
        load_potential(path / "run" / "best.pt")[0]["offsets"].offsets
        for path in (trained, tmp_path)
    )
    assert after.equal(before)


@pytest.fixture(scope="module")
def moved(trained):
    """The folder, with a trajectory of the model."""
    ase.io.write(trained / "start.xyz", liquid(1, seed=7))
    settings = {"duration": 1.0, "equilibration": 0.4, "timestep": 4.0, "stride": 40.0}
    with (trained / "md.yaml").open("w") as file:
        YAML().dump({**settings, "thermostat_time": 40.0}, file)
    call(
        "md", trained / "run" / "best.pt", trained / "start.xyz",
        "--temperature", 300, "--config", trained / "md.yaml", "--out", trained / "md",
    )  # fmt: skip
    return trained


def test_dynamics_are_at_the_temperature_of_the_beads_masses(moved):
    frames, _ = read(moved / "md" / "trajectory.extxyz")
    assert len(frames) == 25
    assert frames.species_table == TABLE
    rows = np.genfromtxt(moved / "md" / "thermo.csv", delimiter=",", names=True)
    ours = [atoms.get_temperature() for atoms in frames.to_ase()]
    np.testing.assert_allclose(rows["temperature_K"], ours, rtol=1e-6)
    # 96 degrees of freedom in 25 frames, correlated over two: 3 percent, five times.
    assert rows["temperature_K"].mean() == pytest.approx(300.0, rel=0.15)


def test_evaluations_name_pairs_of_beads(moved):
    """What knows crystals of elements alone is left out by default, and refused if asked for."""
    call(
        "evaluate", f"student={moved / 'run' / 'best.pt'}", "--store", moved / "mapped.zarr",
        "--trajectory", f"cg={moved / 'md' / 'trajectory.extxyz'}", "--tests", "errors,rdf,adf",
        "--out", moved / "evaluated",
    )  # fmt: skip
    errors = json.loads((moved / "evaluated" / "errors.json").read_text())
    assert "forces_rmse" in json.dumps(errors)
    assert "energy_rmse" not in json.dumps(errors)
    frames = read(moved / "md" / "trajectory.extxyz")[0]
    mixed = radial_distribution(frames, pair=("CHOL", "Cl"))
    assert mixed.g[mixed.r < 2.0].max() == 0.0 < mixed.g.max()
    bench = Bench(BenchSettings(), structure=read(moved / "start.xyz")[0])
    with pytest.raises(ConfigError, match="'phonons' needs a structure of chemical elements"):
        PhononsEvaluation().require(bench)


def test_models_of_beads_label_as_teachers(moved):
    """A model's labels are its own values: of energies, too, which its training had none of."""
    store, best = moved / "student.zarr", moved / "run" / "best.pt"
    call("label", store, moved / "beads.xyz", "--teacher", best)
    held = LabeledStore.open(store)
    (source,) = set(held.sources) - {"reference"}
    labels = held.labels(source)
    found = load_potential(best)[0].predict(held.structures(), properties=["energy", "forces"])
    for name in ("energy", "forces"):
        np.testing.assert_allclose(labels[name], found[name].detach(), rtol=0, atol=1e-5)
    sums = held.structures().sum_by_system(labels["atomic_energies"])
    np.testing.assert_allclose(sums, labels["energy"], atol=1e-5)


def test_a_session_trains_on_forces_alone(tmp_path):
    data = read(written(tmp_path, liquid(12)))
    small = {"dist_soft_min": 2.5, "dist_soft_max": 5.5, "dist_hard_max": 6.0, "n_features": 4}
    model = {"kind": "hipnn", "hyperparameters": small}
    result = potstill.train(data, tmp_path / "run", epochs=2, model=model)
    assert set(potstill.evaluate(result.best, data)) >= {"forces_rmse", "forces_mae"}
    frames = potstill.md(result.best, liquid(1)[0], duration=0.1, timestep=4.0, equilibration=0)
    assert frames.structures.species_table == TABLE


# -- the calculator ----------------------------------------------------------------------------


class Counted(PotstillCalculator):
    calls = 0

    def calculate(self, *args, **options):
        self.calls += 1
        super().calculate(*args, **options)


def test_beads_that_did_not_move_are_not_computed_again():
    (atoms,) = liquid(1)
    atoms.calc = Counted(model())
    energy = atoms.get_potential_energy()
    atoms.get_forces()
    atoms.get_stress()
    assert atoms.calc.calls == 1
    atoms.positions += 0.01
    atoms.get_forces()
    assert (atoms.calc.calls, atoms.calc.n_neighbor_lists) == (2, 1)
    # All beads are of the atomic number zero: it is their names that say what they are.
    for name in ("species_name", "masses"):
        atoms.arrays[name][:2] = atoms.arrays[name][1::-1].copy()
    assert abs(atoms.get_potential_energy() - energy) > 1e-6
    assert atoms.calc.calls == 3
    swapped = atoms.copy()
    swapped.calc = PotstillCalculator(model())
    assert swapped.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    del atoms.arrays["species_name"]  # as in a .traj: masses tell which bead is which
    atoms.set_masses(liquid(1)[0].get_masses())
    atoms.positions -= 0.01
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-10)


@pytest.mark.parametrize("core", ["torch", pytest.param("native", marks=pytest.mark.skipif(
    not available(), reason="needs the native core"))])  # fmt: skip
def test_forces_and_stress_are_derivatives(core):
    (atoms,) = liquid(1)
    atoms.calc = PotstillCalculator(model(), core=core)
    forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
    assert np.abs(forces).max() > 1e-3
    numerical = calculate_numerical_forces(atoms, 1e-4, iatoms=[0, 1])
    np.testing.assert_allclose(numerical, forces[:2], rtol=0, atol=1e-7)
    numerical = calculate_numerical_stress(atoms, 1e-5, voigt=False)
    np.testing.assert_allclose(numerical, stress, rtol=0, atol=1e-8)


def test_foreign_beads_are_named():
    other = make_atoms([Species("UREA", 60.06)], np.zeros((1, 3)), np.eye(3) * 9, np.ones(3, bool))
    other.calc = PotstillCalculator(model())
    with pytest.raises(DataError, match="holds UREA, but the potential knows only CHOL, Cl"):
        other.get_potential_energy()
    element = ase.Atoms("Cl", cell=[9, 9, 9], pbc=True, calculator=PotstillCalculator(model()))
    with pytest.raises(DataError, match="holds Cl as an element"):
        element.get_potential_energy()


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz.gz", "a.traj", "a.db", "a.npz", "a.h5"])
def test_files_keep_beads(tmp_path, name):
    frames, path = liquid(3), tmp_path / name
    keys = KeyMap(beads="CHOL 104.17, Cl 35.45", forces="forces")
    units = Units(energy="eV", length="Angstrom")
    arrays = {
        "positions": np.stack([a.positions for a in frames]),
        "forces": np.stack([a.arrays["forces"] for a in frames]),
        "species": np.array(species_names(frames[0])),
        "masses": frames[0].get_masses(),
        "cell": np.stack([a.cell.array for a in frames]),
    }
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        keys = KeyMap(positions="positions", cell="cell", forces="forces", beads=keys.beads)
    elif path.suffix == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[f"mapped/{key}"] = value.astype("S") if value.dtype.kind == "U" else value
        keys = KeyMap(positions="positions", forces="forces", beads=keys.beads)
    elif path.suffix in (".traj", ".db"):
        # ASE keeps neither names nor arrays of forces there, but masses.
        keys = KeyMap(beads=keys.beads)
        ase.io.write(path, frames)
    else:
        ase.io.write(path, frames, format="extxyz")
    structures, labels = read(path, keys=keys, units=units)
    assert_same(structures, frames)
    assert ("forces" in labels) == (path.suffix not in (".traj", ".db"))
    np.testing.assert_allclose(structures.positions, np.concatenate([a.positions for a in frames]),
                               atol=1e-7)  # fmt: skip


def test_extended_xyz_of_other_programs_has_beads_for_elements(tmp_path):
    head = 'Lattice="9 0 0 0 9 0 0 0 9" Properties=species:S:1:pos:R:3'
    path = tmp_path / "a.xyz"
    path.write_text(f"3\n{head}\nCHOL 0 0 0\nCl 3 3 3\nCHOL 6 6 6\n")
    structures, _ = read(path, keys=KeyMap(beads="CHOL 104.17, Cl 35.45"))
    assert structures.species_table == SpeciesTable((CHOLINE, CHLORIDE))
    # A name that is not among the beads may be an element.
    structures, _ = read(path, keys=KeyMap(beads="CHOL 104.17"), species=["CHOL", "Cl"])
    assert structures.species_table.atomic_numbers.tolist() == [17, -1]
    with pytest.raises(DataError, match="'CHOL' is not a chemical symbol; if it is a bead"):
        read(path, keys=KeyMap(beads="UREA 60.06"))
    with pytest.raises(ConfigError, match="not names, each with its mass"):
        read(path, keys=KeyMap(beads="CHOL Cl 35.45"))
    with pytest.raises(DataError, match="holds CHOL, which is not among the species Cl"):
        read(path, keys=KeyMap(beads="CHOL 104.17"), species=["Cl"])


def test_lammps_dumps_have_types_of_beads(tmp_path):
    path = tmp_path / "a.lammpstrj"
    path.write_text(
        "ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n2\nITEM: BOX BOUNDS pp pp pp\n0 9\n0 9\n0 9\n"
        "ITEM: ATOMS id type x y z\n1 2 0 0 0\n2 1 3 3 3\n"
    )
    keys = KeyMap(types="CHOL Cl", beads="CHOL 104.17, Cl 35.45")
    structures, _ = read(path, keys=keys)
    assert [structures.species_table.names[k] for k in structures.species] == ["Cl", "CHOL"]


def test_beads_without_masses_or_names_are_refused(tmp_path):
    (atoms,) = liquid(1)
    del atoms.arrays["masses"]
    path = written(tmp_path, [atoms])
    with pytest.raises(DataError, match=r"frame 0: the bead CHOL has no mass.*KeyMap\(beads="):
        read(path)
    assert read(path, keys=KeyMap(beads="CHOL 104.17, Cl 35.45"))[0].species_table == TABLE
    atoms.set_masses([72.0] * len(atoms))
    del atoms.arrays["species_name"]
    with pytest.raises(DataError, match="has no name and may be A or B: name the beads"):
        species_of(atoms, [Species("A", 72.0), Species("B", 72.0)])
    atoms.arrays["species_name"] = np.array(["A"] * len(atoms))
    atoms.set_masses([72.0, 71.0] * 16)
    with pytest.raises(DataError, match="the bead A has two masses, 72 and 71"):
        Structures.from_ase(atoms)
    with pytest.raises(DataError, match="must be one word"):
        SpeciesTable((Species("A B", 72.0),))


def test_what_ase_does_with_atoms_it_does_with_beads(tmp_path):
    (atoms,) = liquid(1)
    last = atoms[::-1]
    assert species_names(last) == species_names(atoms)[::-1]
    assert not same_species(last, atoms)
    assert same_species(atoms.copy(), atoms)
    assert species_names(atoms * (2, 1, 1)) == 2 * species_names(atoms)


# -- dynamics ----------------------------------------------------------------------------------


class Funnel(PotstillCalculator):
    """Pulls all beads to the middle."""

    def calculate(self, *args, **options):
        super().calculate(*args, **options)
        arms = self.atoms.positions - self.atoms.positions.mean(axis=0)
        self.results["forces"] = -0.01 * arms


def test_beads_fuse_where_they_are_far_closer_than_in_training():
    frames = Structures.from_ase(liquid(2))
    shortest = closest_pairs(frames)
    # Tables of beads differ in their order, and so do the names of pairs.
    turned = {"-".join(reversed(pair.split("-"))): value for pair, value in shortest.items()}
    for known in (shortest, turned):
        whole = Connectivity.of(frames[0], known)
        assert whole.symptom(frames[1]) == ""
        near = frames[0].to_ase()[0]
        near.positions[1] = near.positions[0] + [0.6 * shortest["CHOL-Cl"], 0, 0]
        assert "fused: a CHOL-Cl pair" in whole.symptom(Structures.from_ase(near))
    info = {"trained_on": {"shortest_distances": shortest}}
    with pytest.warns(ExtrapolationWarning), pytest.raises(DivergenceError, match="fused"):
        run_md(
            frames[0], Funnel(model(), info=info), temperature=300.0, n_frames=100, seed=0,
            stride=20.0, equilibration=0.0, timestep=4.0, thermostat_time=20.0,
        )  # fmt: skip


# -- LAMMPS ------------------------------------------------------------------------------------


def test_lammps_runs_the_same_beads(trained, lammps, plugin, monkeypatch, tmp_path):
    """The self-test of the export passes, and its example runs, with masses of its own."""
    monkeypatch.setattr(export_workflow, "build_plugin", lambda _: plugin)
    best = trained / "run" / "best.pt"
    found = call("export", best, tmp_path, "--structure", trained / "beads.xyz")
    assert "beads.xyz" in found.output
    example = (tmp_path / "best.in").read_text()
    assert "pair_coeff * * ${model} CHOL Cl\n" in example
    assert "mass 1 104.17    # CHOL\nmass 2 35.45    # Cl\n" in example
    assert "timestep 0.01 " in example  # that of beads
    assert "fix bath all langevin ${temperature}" in example
    (atoms,) = liquid(1)
    data, _ = lammps_data(atoms, TABLE.names)
    (tmp_path / "structure.data").write_text(data.replace("1 104.17 #", "1 1.0 #"))
    script = example.replace("run 1000", 'run 0\nprint "$(mass(all)) g"').replace("* *", "* *")
    (tmp_path / "example.in").write_text(script)
    text = lammps.run(tmp_path, "example.in", 1, ("-var", "plugin", str(plugin)))
    total = re.search(r"^(\S+) g$", text, re.MULTILINE)
    assert float(total[1]) == pytest.approx(atoms.get_masses().sum())


def test_lammps_moves_beads(trained, lammps, plugin, monkeypatch, tmp_path):
    monkeypatch.setattr(lammps_md, "build_plugin", lambda _: plugin)
    ase.io.write(tmp_path / "start.xyz", liquid(1, seed=3))
    settings = {"duration": 1.0, "equilibration": 0.4, "timestep": 4.0, "stride": 40.0}
    with (tmp_path / "md.yaml").open("w") as file:
        YAML().dump({**settings, "thermostat_time": 40.0, "engine": "lammps"}, file)
    call(
        "md", trained / "run" / "best.pt", tmp_path / "start.xyz",
        "--temperature", 300, "--config", tmp_path / "md.yaml", "--out", tmp_path / "md",
    )  # fmt: skip
    frames, _ = read(tmp_path / "md" / "trajectory.extxyz")
    temperatures = [atoms.get_temperature() for atoms in frames.to_ase()]
    assert np.mean(temperatures) == pytest.approx(300.0, rel=0.15)
