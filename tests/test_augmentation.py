"""Jitter of fixed norm, gradient ascent, relaxations; synthetic and displaced data in training."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import ase.io
import lightning_fabric
import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from data import rattled_copper
from potstill.calculators import PotstillCalculator
from potstill.checkpoint import load_potential, save_potential
from potstill.config import SampleConfig, TrainConfig, validate
from potstill.distill import LossTerm
from potstill.errors import ConfigError, DivergenceError, TeacherError
from potstill.features import Feature
from potstill.models import HIPNN, ZBL, SpeciesOffsets, SumPotential
from potstill.models.base import LocalOutput, Potential
from potstill.neighbors import build_neighbor_list
from potstill.readers import read
from potstill.sample import (
    AscentJob,
    JitterJob,
    RelaxJob,
    discrepancy_gradient,
    random_jitter,
)
from potstill.sample.jitter import discrepancy
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.teachers import PotentialTeacher, Teacher, make_teacher
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.augment import Augmentation
from potstill.train.mixing import mixed_batches, origin_weights
from potstill.train.objective import BatchLoss
from potstill.train.settings import MixingSettings
from potstill.train.signals import bind_terms
from potstill.workflows.data import DataSettings, load_parts
from potstill.workflows.sampling import sample
from potstill.workflows.training import train_from_config
from test_train import assert_same_weights, records_of, run_on_two_ranks, without_times


def surfaces(n: int) -> Structures:
    """Slabs of copper with a fixed bottom layer."""
    frames = []
    for seed in range(n):
        slab = fcc111("Cu", (2, 2, 3), vacuum=5.0, periodic=True)
        slab.set_constraint(FixAtoms(mask=slab.get_tags() == 3))
        slab.rattle(0.1, seed=seed)
        frames.append(slab)
    return Structures.from_ase(frames)


def hipnn(seed: int) -> HIPNN:
    torch.manual_seed(seed)
    shape = {"n_features": 5, "n_sensitivities": 6, "n_atom_layers": 1}
    radii = {"dist_soft_min": 1.5, "dist_soft_max": 3.5, "dist_hard_max": 4.0}
    return HIPNN(SpeciesTable.from_symbols(["Cu"]), **shape, **radii).double()


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- jitter --------------------------------------------------------------------------------------


def test_random_jitter_has_its_norm_and_leaves_fixed_atoms():
    structures = surfaces(3)
    for norm_of in ("structure", "atom"):
        moved = random_jitter(structures, 0.3, generator(), norm_of=norm_of)
        step = moved.positions - structures.positions
        assert bool((step[structures.fixed] == 0).all())
        per_atom = torch.linalg.vector_norm(step, dim=1)
        if norm_of == "atom":
            np.testing.assert_allclose(per_atom[~structures.fixed], 0.3)
        else:
            total = per_atom.square().reshape(3, -1).sum(1).sqrt()
            np.testing.assert_allclose(total, 0.3)
    first, again = (random_jitter(structures, 0.3, generator(4)).positions for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(ConfigError, match="must not be negative"):
        random_jitter(structures, -0.1, generator())


def apart(student, teacher, structures) -> torch.Tensor:
    """(S,) discrepancy with the default weights."""
    mine, its = (p.predict(structures).properties for p in (student, teacher))
    energy, forces = mine["energy"] - its["energy"], mine["forces"] - its["forces"]
    return discrepancy(energy, forces, structures, (1.0, 100.0))


class Direct(Potential):
    """Forces that no energy has: rotated ones."""

    kind = "direct"
    direct_forces = True

    def hyperparameters(self):
        return {}

    def forward(self, species, edges, r_ij, n_local, taps=()):
        weight = torch.exp(-r_ij.square().sum(1, keepdim=True) / 8.0)
        pull = r_ij.new_zeros(n_local, 3).index_add(0, edges.center, weight * r_ij)
        energy = r_ij.new_zeros(n_local).index_add(0, edges.center, weight[:, 0])
        return LocalOutput(0.1 * energy, {}, 0.3 * torch.roll(pull, 1, dims=1))


@pytest.mark.parametrize("kind", ["conservative", "direct"])
def test_the_gradient_of_the_discrepancy_is_that_of_finite_differences(kind):
    structures = surfaces(1)
    student = hipnn(0)
    teacher = hipnn(1) if kind == "conservative" else Direct(student.species_table, 4.0)
    found = discrepancy_gradient(student, teacher, structures)
    for atom, axis in ((5, 0), (0, 2)):
        ends = []
        for sign in (1.0, -1.0):
            positions = structures.positions.clone()
            positions[atom, axis] += sign * 1e-4
            ends.append(apart(student, teacher, replace(structures, positions=positions)).sum())
        slope = float(ends[0] - ends[1]) / 2e-4
        assert float(found[atom, axis]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_a_teacher_that_is_a_calculator_gives_the_same_gradient():
    structures = surfaces(2)
    student, teacher = hipnn(0), hipnn(1)
    exact = discrepancy_gradient(student, teacher, structures)
    found = discrepancy_gradient(student, PotstillCalculator(teacher), structures)
    error = torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact)
    assert float(error) < 3e-3


def test_ascent_goes_where_student_and_teacher_differ_more():
    structures = surfaces(2)
    student, teacher = hipnn(0), hipnn(1)
    uphill = discrepancy_gradient(student, teacher, structures)
    moved = random_jitter(structures, 0.1, generator(), direction=uphill)
    step = (moved.positions - structures.positions).reshape(2, -1)
    np.testing.assert_allclose(torch.linalg.vector_norm(step, dim=1), 0.1)
    assert bool((moved.positions == structures.positions)[structures.fixed].all())
    uphill = apart(student, teacher, moved) - apart(student, teacher, structures)
    assert bool((uphill > 0).all())
    for seed in range(3):
        sideways = random_jitter(structures, 0.1, generator(seed))
        gained = apart(student, teacher, sideways) - apart(student, teacher, structures)
        assert bool((gained < uphill).all())
    # Two equal models differ nowhere: the direction is then random, and its norm still fixed.
    flat = discrepancy_gradient(student, student, structures)
    nowhere = random_jitter(structures, 0.1, generator(), direction=flat)
    assert torch.linalg.vector_norm(nowhere.positions - structures.positions) > 0.1


# -- jobs ----------------------------------------------------------------------------------------


def test_jobs_make_frames_of_rising_norm(tmp_path):
    start = surfaces(1)
    save_potential(tmp_path / "student.pt", hipnn(0), {})
    jitter = JitterJob(n_frames=3, norm=(0.1, 0.3))
    ascent = AscentJob(n_frames=3, norm=(0.1, 0.3), student=str(tmp_path / "student.pt"))
    for job in (jitter, ascent):
        frames = job.run(start, EMT(), seed=1)
        step = frames.structures.positions.reshape(3, -1, 3) - start.positions
        np.testing.assert_allclose(torch.linalg.matrix_norm(step), [0.1, 0.2, 0.3])
        again = job.run(start, EMT(), seed=1)
        assert torch.equal(frames.structures.positions, again.structures.positions)
    # One direction of ascent, random directions of jitter.
    directions = step / torch.linalg.matrix_norm(step)[:, None, None]
    torch.testing.assert_close(directions[0], directions[2])
    with pytest.raises(ConfigError, match="give a range of norms"):
        AscentJob(n_frames=2, norm=0.1, student="s.pt")
    with pytest.raises(ConfigError, match="needs a calculator"):
        ascent.run(start, None, seed=1)
    with pytest.raises(ConfigError, match="0 < low <= high"):
        JitterJob(n_frames=1, norm=0.0)


def test_relaxations_go_downhill_and_frames_are_drawn_from_them():
    start = surfaces(1)
    job = RelaxJob(n_frames=4, displacement=0.1, max_steps=30)
    frames = job.run(start, EMT(), seed=3)
    assert len(frames) == 4
    assert torch.equal(frames.energy, frames.energy.sort(descending=True).values)
    steps = [int(text.rpartition(" ")[2]) for text in frames.structures.frame_id]
    assert steps == sorted(set(steps))
    for atoms, energy in zip(frames.structures.to_ase(), frames.energy, strict=True):
        atoms.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(float(energy))
    fixed = start.fixed.repeat(4)
    same = frames.structures.positions[fixed] == start.positions[start.fixed].repeat(4, 1)
    assert bool(same.all())
    assert torch.equal(frames.energy, job.run(start, EMT(), seed=3).energy)
    assert not torch.equal(frames.energy, job.run(start, EMT(), seed=3, number=1).energy)
    short = RelaxJob(n_frames=20, displacement=0.0, max_steps=100, fmax=0.5)
    crystal = Structures.from_ase(bulk("Cu", cubic=True))
    assert len(short.run(crystal, EMT(), seed=0)) == 1  # at its minimum already
    with pytest.raises(ConfigError, match="cannot be drawn from 3 steps"):
        RelaxJob(n_frames=5, max_steps=3)


def test_an_exploding_relaxation_is_reported():
    class Broken(EMT):
        def calculate(self, *args, **kwargs):
            super().calculate(*args, **kwargs)
            self.results["forces"] = self.results["forces"] * np.nan

    with pytest.raises(DivergenceError, match="diverged after 0 steps"):
        RelaxJob(n_frames=1).run(surfaces(1), Broken(), seed=0)


def test_the_command_writes_structures_that_can_be_labelled(tmp_path):
    start = surfaces(2)
    for atoms, frame in zip(start.to_ase(), ("a", "b"), strict=True):
        atoms.info["config_type"] = frame
        atoms.arrays["fixed"] = np.isin(np.arange(12), atoms.constraints[0].index).astype(int)
        atoms.set_constraint()
        columns = ["symbols", "positions", "fixed"]
        path = tmp_path / "start.extxyz"
        ase.io.write(path, atoms, append=frame == "b", format="extxyz", columns=columns)
    plain = {
        "start": str(tmp_path / "start.extxyz"),
        "jobs": [
            {"kind": "relax", "n_frames": 2, "max_steps": 6},
            {"kind": "jitter", "n_frames": 3, "system": 1},
        ],
        "teacher": {"spec": "ase.calculators.emt:EMT"},
        "out": str(tmp_path / "out"),
    }
    frames = sample(validate(plain, SampleConfig))
    assert len(frames) == 2 * 2 + 3
    written, _ = read(tmp_path / "out" / "structures.extxyz")
    torch.testing.assert_close(written.positions, frames.structures.positions, atol=1e-7, rtol=0)
    assert torch.equal(written.fixed, frames.structures.fixed)
    assert written.group == frames.structures.group
    with pytest.raises(ConfigError, match="no setting 'steps'; did you mean"):
        validate({**plain, "jobs": [{"kind": "relax", "n_frames": 1, "steps": 3}]}, SampleConfig)
    with pytest.raises(ConfigError, match="needs a calculator"):
        sample(validate({**plain, "teacher": None, "out": str(tmp_path / "b")}, SampleConfig))


# -- mixing --------------------------------------------------------------------------------------


def crystals(n: int) -> Structures:
    return Structures.from_ase(rattled_copper(n, 0.1))


def settings(**values) -> TrainSettings:
    return TrainSettings(**{"batch_size": 4, "seed": 3, **values})


def test_an_epoch_holds_the_share_that_was_asked_for():
    """20 reference and 10 synthetic: with alpha = 0.5 the sets go round 0.75 and 1.5 times."""
    structures = crystals(30)
    synthetic = torch.arange(30) >= 20
    mixed = settings(mixing={"alpha": 0.5})
    counts = torch.zeros(30, dtype=torch.int64)
    for epoch in range(1, 5):
        batches = mixed_batches(structures, synthetic, mixed, epoch)
        assert [len(b) for b in batches] == [4] * 7 + [2]
        drawn = torch.cat(batches)
        assert int(synthetic[drawn].sum()) == 15
        assert len(set(drawn[~synthetic[drawn]].tolist())) + 15 == 30 or epoch > 1
        counts += torch.bincount(drawn, minlength=30)
        again = mixed_batches(structures, synthetic, mixed, epoch)
        assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    # Four epochs: three passes of the one, six of the other; nobody more often than the next.
    assert counts.tolist() == [3] * 20 + [6] * 10
    other = mixed_batches(structures, synthetic, mixed.model_copy(update={"seed": 4}), 1)
    first = mixed_batches(structures, synthetic, mixed, 1)
    assert not torch.equal(torch.cat(first), torch.cat(other))


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0), (0.3, 9), (1.0, 30), (None, 10)])
def test_all_shares(alpha, expected):
    structures, synthetic = crystals(30), torch.arange(30) >= 20
    for size in ({}, {"batch_atoms": 20}):
        mixed = settings(mixing={"alpha": alpha}, **size)
        batches = mixed_batches(structures, synthetic, mixed, 2)
        drawn = torch.cat(batches)
        assert (len(drawn), int(synthetic[drawn].sum())) == (30, expected)
        if size:
            assert max(4 * len(b) for b in batches) <= 20


def test_weights_of_origins():
    """Eqs. 9 to 11, and Eq. 9's mean of one whatever the batch."""
    weights = origin_weights(torch.tensor([True, False, False, False]), 0.5)
    reference = 1.0 / (1.0 - 0.25 + 0.25 * 0.5)
    np.testing.assert_allclose(weights, [0.5 * reference, *[reference] * 3])
    for n_synthetic in range(7):
        weights = origin_weights(torch.arange(6) < n_synthetic, 7.0)
        assert float(weights.mean()) == pytest.approx(1.0)
    assert origin_weights(torch.ones(3, dtype=torch.bool), 9.0).tolist() == [1.0] * 3


def two_origins(n_reference: int, n_synthetic: int) -> TrainingSet:
    """Reference data by EMT, synthetic data with other labels."""
    frames = rattled_copper(n_reference + n_synthetic, 0.1)
    energy = torch.tensor([atoms.get_potential_energy() for atoms in frames])
    forces = torch.from_numpy(np.concatenate([atoms.get_forces() for atoms in frames]))
    structures = Structures.from_ase(frames)
    labels = Properties({"energy": energy.double(), "forces": forces})
    parts = []
    for systems in (torch.arange(n_reference), torch.arange(n_reference, len(frames))):
        own = labels.select(structures.rows(systems))
        parts.append(TrainingSet(structures.select(systems), {"reference": own}))
    parts[1] = replace(
        parts[1], labels={**parts[1].labels, "teacher": parts[1].labels["reference"]}
    )
    return parts[0].with_synthetic(parts[1])


def test_joined_sets_know_their_origins_and_labels():
    data = two_origins(3, 2)
    assert data.synthetic.tolist() == [False] * 3 + [True] * 2
    assert data.select(torch.tensor([4, 0])).synthetic.tolist() == [True, False]
    assert data.labels["reference"].presence("energy", 5).all()
    assert data.labels["teacher"].presence("energy", 5).tolist() == [False] * 3 + [True] * 2


def test_joined_sets_keep_stored_features():
    data = two_origins(3, 2)
    parts = [data.select(torch.arange(3)), data.select(torch.arange(3, 5))]
    values = torch.arange(parts[0].structures.n_atoms, dtype=torch.float64).unsqueeze(1)
    known = replace(parts[0], features={"teacher": {"last": Feature("node_scalar", values)}})
    for one, other in ((known, parts[1]), (parts[1], known)):
        feature = one.with_synthetic(other).features["teacher"]["last"]
        present = [True] * 3 + [False] * 2 if one is known else [False] * 2 + [True] * 3
        assert feature.presence(5).tolist() == present
        assert torch.equal(feature.values[feature.values.isfinite()], values.flatten())


def test_the_loss_weighs_samples_by_origin():
    """With r the loss of a batch is Eq. 9's weighted mean of the samples' own losses."""
    data = two_origins(3, 2).with_neighbors(4.0)
    network = hipnn(0)
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    run = settings(
        loss=(LossTerm(property="energy", error="mse"), LossTerm(property="forces", error="mse")),
        mixing={"r": 0.2},
        regularization={"l2": 0.0, "hierarchicality": 0.0},
    )
    weights = origin_weights(data.synthetic, 0.2)

    def loss(batch):
        values = network.predict(batch.structures, batch.neighbors).properties.values
        return BatchLoss(bind_terms(run, network), 1, batch, fabric)(values).parts

    every = torch.arange(5)
    found = loss(data.batch(every, weights))
    single = [loss(data.batch(torch.tensor([k]))) for k in range(5)]
    for name in ("energy:reference", "forces:reference"):
        pairs = zip(weights.tolist(), single, strict=True)
        expected = np.mean([weight * part[name] for weight, part in pairs])
        assert found[name] == pytest.approx(expected, rel=1e-9)
        assert loss(data.batch(every))[name] != pytest.approx(expected, rel=1e-3)


def test_mixed_training_resumes_bit_for_bit(tmp_path):
    data = two_origins(6, 3)
    run = settings(
        model={"kind": "hipnn", "hyperparameters": hipnn(0).hyperparameters()},
        mixing={"alpha": 0.5, "r": 0.3},
        epochs=2,
        precision="float64",
    )
    validation = data.select(torch.tensor([0, 1]))
    train(run, data, validation, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(record):
        raise Stop

    with pytest.raises(Stop):
        train(run, data, validation, tmp_path / "parts", on_epoch=stop)
    train(run, data, validation, tmp_path / "parts")
    whole = without_times(tmp_path / "whole")
    assert whole == without_times(tmp_path / "parts")
    assert math.isfinite(whole[-1]["score"])
    marked_otherwise = replace(data, synthetic=~data.synthetic)
    with pytest.raises(ConfigError, match="other training data"):
        train(run, marked_otherwise, validation, tmp_path / "parts")


def test_mixing_without_synthetic_data_is_refused(tmp_path):
    data = two_origins(4, 2)
    run = settings(mixing=MixingSettings(alpha=0.5))
    plain = replace(data, synthetic=None)
    with pytest.raises(ConfigError, match=r"name them in data\.synthetic"):
        train(run, plain, data, tmp_path / "a")
    reference = replace(data, synthetic=torch.zeros(6, dtype=torch.bool))
    with pytest.raises(ConfigError, match="asks for synthetic data"):
        train(run, reference, data, tmp_path / "b")
    with pytest.raises(ValueError, match="less than or equal to 1"):
        MixingSettings(alpha=1.5)


def test_configs_name_synthetic_data(tmp_path):
    ase.io.write(tmp_path / "dft.extxyz", rattled_copper(10, 0.1))
    ase.io.write(tmp_path / "made.extxyz", rattled_copper(4, 0.3))
    config = validate(
        {
            "out": str(tmp_path / "run"),
            "data": {
                "files": [{"path": str(tmp_path / "dft.extxyz")}],
                "synthetic": {"files": [{"path": str(tmp_path / "made.extxyz")}]},
            },
            "train": {"mixing": {"alpha": 0.25, "r": 2.0}},
        },
        TrainConfig,
    )
    parts, _ = load_parts(config.data)
    assert parts["train"].synthetic.tolist() == [False] * 8 + [True] * 4
    assert parts["validation"].synthetic is None
    with pytest.raises(ValueError, match="either 'store' or 'files'"):
        DataSettings(files=({"path": "a"},), synthetic={})


def test_synthetic_labels_of_a_store_count_as_reference(tmp_path):
    from potstill.store import LabeledStore

    frames = rattled_copper(3, 0.2)
    structures = Structures.from_ase(frames)
    energy = torch.tensor([a.get_potential_energy() for a in frames]).double()
    path: Path = tmp_path / "made.zarr"
    store = LabeledStore.create(path)
    store.append(structures, Properties({}))
    ase.io.write(tmp_path / "dft.extxyz", rattled_copper(10, 0.1))
    from potstill.label import label_store

    label_store(store, make_teacher("ase.calculators.emt:EMT", {}), ("energy", "forces"))
    (source,) = [name for name in store.sources if name != "reference"]
    data = DataSettings(
        files=({"path": str(tmp_path / "dft.extxyz")},),
        synthetic={"store": str(path), "source": source},
    )
    made = load_parts(data)[0]["train"]
    for name in ("reference", source):
        torch.testing.assert_close(made.labels[name]["energy"][-3:], energy)
    assert int(made.labels[source].presence("energy", len(made)).sum()) == 3


# -- displaced while training ----------------------------------------------------------------------


def big() -> PotentialTeacher:
    """A teacher with offsets of its own."""
    network = hipnn(3)
    return PotentialTeacher(
        SumPotential({"offsets": SpeciesOffsets(network.species_table, [-3.0]), "network": network})
    )


def labelled_surfaces(n: int, teacher: Teacher) -> TrainingSet:
    structures = surfaces(n)
    return TrainingSet(
        structures, {"reference": teacher.label(structures, ["energy", "forces"])[0]}
    )


def augmented(**values) -> TrainSettings:
    """Settings of a small run; `augment` is given by its own keys."""
    keys = {"norm", "norm_of", "kind", "fraction"}
    own = {k: values.pop(k) for k in keys & set(values)}
    defaults = {
        "model": {"kind": "hipnn", "hyperparameters": hipnn(0).hyperparameters()},
        "energy": {"zero": "least_squares", "prior": "zbl"},
        "augment": {"source": "big", **own},
        "regularization": {"l2": 0.0, "hierarchicality": 0.0},
        "precision": "float64",
        "epochs": 3,
        "batch_size": 2,
        "early_stopping": None,
    }
    return TrainSettings(**{**defaults, **values})


def student(seed: int = 0) -> SumPotential:
    network = hipnn(seed)
    table = network.species_table
    fixed = {"offsets": SpeciesOffsets(table, [-2.5]), "prior": ZBL.for_species(table)}
    return SumPotential({**fixed, "network": network})


def batch_of(data: TrainingSet, cutoff: float = 4.0, weights: torch.Tensor | None = None):
    return data.with_neighbors(cutoff).batch(torch.arange(len(data)), weights)


LABELS = (
    LossTerm(property="energy"),
    LossTerm(property="forces"),
    LossTerm(property="atomic_energies", source="big"),
)


@pytest.mark.parametrize("norm_of", ["structure", "atom"])
def test_displaced_structures_have_the_labels_of_the_teacher(norm_of):
    teacher, own = big(), student()
    data = labelled_surfaces(3, teacher)
    weights = torch.tensor([1.0, 0.5, 1.5], dtype=torch.float64)
    before = batch_of(data.minus(own.without("network")), weights=weights)
    run = augmented(norm=0.3, norm_of=norm_of, loss=LABELS)
    batch = Augmentation(run, own, {"big": teacher}, "cpu")(before, 1, 0, range(3))
    step = torch.linalg.vector_norm(batch.structures.positions - data.structures.positions, dim=1)
    fixed = data.structures.fixed
    assert bool((step[fixed] == 0).all())
    if norm_of == "atom":
        np.testing.assert_allclose(step[~fixed], 0.3)
    else:
        np.testing.assert_allclose(step.square().reshape(3, -1).sum(1).sqrt(), 0.3)
    names = ("energy", "forces", "atomic_energies")
    there = teacher.potential.predict(batch.structures, properties=names)
    rest = own.without("network").predict(batch.structures, properties=names)
    for source in ("reference", "big"):
        labels = batch.labels[source]
        for name in names:
            torch.testing.assert_close(labels[name], there[name] - rest[name])
            assert bool(labels.presence(name, 3).all())
            rows = labels.row_weights(name, batch.structures)
            assert torch.equal(
                rows, weights if len(rows) == 3 else weights[batch.structures.system_index]
            )
    expected = build_neighbor_list(batch.structures, 4.0)
    assert batch.neighbors.n_pairs == expected.n_pairs != before.neighbors.n_pairs
    assert torch.equal(batch.neighbors.neighbor, expected.neighbor)
    assert all(p.grad is None for p in teacher.potential.parameters())


def test_displacements_follow_from_seed_epoch_step_and_place():
    teacher, data = big(), labelled_surfaces(4, big())
    batch = batch_of(data)
    some = batch_of(data.select(torch.tensor([1, 3])))
    augmentation = Augmentation(augmented(), student(), {"big": teacher}, "cpu")
    whole = augmentation(batch, 2, 5, range(4))
    part = augmentation(some, 2, 5, [1, 3])  # as the second of two processes has them
    assert torch.equal(part.structures.positions, whole.structures.select([1, 3]).positions)
    torch.testing.assert_close(
        part.labels["reference"]["energy"], whole.labels["reference"]["energy"][[1, 3]]
    )
    for epoch, step, seed in ((3, 5, 0), (2, 4, 0), (2, 5, 1)):
        other = Augmentation(augmented(seed=seed), student(), {"big": teacher}, "cpu")
        found = other(batch, epoch, step, range(4)).structures.positions
        assert not torch.equal(found, whole.structures.positions)


def test_what_is_not_displaced_keeps_its_labels():
    teacher = big()
    data = labelled_surfaces(8, make_teacher("ase.calculators.emt:EMT", {}))
    batch = batch_of(data)
    run = augmented(fraction=0.5, loss=LABELS)
    augmentation = Augmentation(run, student(), {"big": teacher}, "cpu")
    found = augmentation(batch, 1, 0, range(8))
    step = (found.structures.positions - batch.structures.positions).abs().reshape(8, -1).sum(1)
    moved = step > 0
    assert 0 < int(moved.sum()) < 8
    own, new = (b.labels["reference"]["energy"] for b in (batch, found))
    assert torch.equal(own[~moved], new[~moved])
    assert bool((own[moved] - new[moved]).abs().min() > 1e-3)
    assert torch.equal(found.labels["big"].presence("atomic_energies", 8), moved)
    assert bool(found.labels["reference"].presence("energy", 8).all())
    none = Augmentation(augmented(fraction=1e-9), student(), {"big": teacher}, "cpu")
    same = none(batch, 1, 0, range(8))
    assert torch.equal(same.structures.positions, batch.structures.positions)
    assert torch.equal(same.labels["reference"]["energy"], own)
    assert not bool(same.labels["big"].presence("atomic_energies", 8).any())
    nobody = augmentation(batch_of(data.select(torch.tensor([], dtype=torch.int64))), 1, 0, [])
    assert nobody.labels["big"]["atomic_energies"].shape == (0,)


def test_ascent_displaces_to_where_student_and_teacher_differ_more():
    teacher, own = big(), student()
    batch = batch_of(labelled_surfaces(3, teacher))
    mean = {}
    for kind in ("random", "ascent"):
        augmentation = Augmentation(augmented(kind=kind), own, {"big": teacher}, "cpu")
        mean[kind] = apart(own, teacher.potential, augmentation(batch, 1, 0, range(3)).structures)
    assert bool((mean["ascent"] > mean["random"]).all())
    parameters = [*own.parameters(), *teacher.potential.parameters()]
    assert all(p.grad is None for p in parameters)


class Failing(PotentialTeacher):
    """Fails where the first atom lies to the right of where it was."""

    batch_atoms = 0

    def compute(self, structures, properties):
        if float(structures.positions[0, 0]) > 0.0:
            raise RuntimeError("to the right")
        return super().compute(structures, properties)


def test_structures_that_the_teacher_fails_on_have_no_part():
    structures = surfaces(6)
    offsets = structures.atom_offsets[:-1]
    start = structures.positions - structures.positions[offsets][structures.system_index]
    data = TrainingSet(replace(structures, positions=start, fixed=None), {})
    run = augmented(loss=LABELS)
    augmentation = Augmentation(run, student(), {"big": Failing(hipnn(3))}, "cpu")
    with pytest.warns(UserWarning, match="left out of the loss: to the right"):
        batch = augmentation(batch_of(data), 1, 0, range(6))
    right = batch.structures.positions[offsets, 0] > 0
    assert 0 < int(right.sum()) < 6
    for source in ("reference", "big"):
        assert torch.equal(batch.labels[source].presence("forces", 6), ~right)


# -- runs that do so


def test_training_learns_from_displaced_structures(tmp_path):
    teacher = big()
    before = {k: v.clone() for k, v in teacher.potential.state_dict().items()}
    data = labelled_surfaces(6, teacher)
    lines = [LABELS[0], LossTerm(property="forces", weight=30.0), LABELS[2]]
    lines += [{"distill": "n2n", "source": "big", "share": 0.2}]
    for kind in ("random", "ascent"):
        run = augmented(
            loss=lines,
            kind=kind,
            fraction=0.8,
            energy={"zero": "least_squares"},
            epochs=12,
            optimizer={"learning_rate": 1e-2},
        )
        result = train(run, data, data, tmp_path / kind, teachers={"big": teacher})
        # Of the displaced structures the errors need not fall: ascent looks for large ones.
        first, *_, last = (record["validation"] for record in records_of(tmp_path / kind))
        for name in ("forces_rmse", "n2n:big"):
            assert last[name] < 0.9 * first[name], name
        assert result.status == "finished"
    for key, value in teacher.potential.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in teacher.potential.parameters())


def test_displacements_of_no_length_are_those_of_the_control(tmp_path):
    """Offsets and prior are subtracted from the teacher's labels as from those of the data."""
    teacher = big()
    data = labelled_surfaces(4, teacher)
    held = {"big": teacher.label(data.structures, ["atomic_energies"])[0], **data.labels}
    control = replace(data, labels=held)
    lines = [*LABELS, {"distill": "n2n", "source": "big", "weight": 10.0}]
    for name, run in (("augmented", augmented(norm=1e-11)), ("control", augmented(augment=None))):
        run = run.model_copy(update={"loss": augmented(loss=lines).loss})
        part = control if name == "control" else data
        train(run, part, control, tmp_path / name, teachers={"big": teacher})
    found, expected = (records_of(tmp_path / name) for name in ("augmented", "control"))
    for one, other in zip(found, expected, strict=True):
        assert one["train"] == pytest.approx(other["train"], rel=1e-5)
        assert one["validation"] == pytest.approx(other["validation"], rel=1e-5)


def test_interrupted_runs_draw_the_same_displacements(tmp_path):
    """Stopped in the middle of an epoch, from within the teacher."""

    class Stopping(PotentialTeacher):
        calls = 0

        def compute(self, structures, properties):
            self.calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().compute(structures, properties)

    data = labelled_surfaces(6, big())
    run = augmented(loss=LABELS, fraction=0.9)
    whole = train(run, data, data, tmp_path / "whole", teachers={"big": big()})
    teachers = {"big": Stopping(big().potential)}
    first = train(run, data, data, tmp_path / "parts", teachers=teachers)
    assert first.status == "interrupted"
    assert first.epochs == 1
    again = train(run, data, data, tmp_path / "parts", teachers={"big": big()})
    assert again.status == "finished"
    assert_same_weights(whole.best, again.best)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


def train_for_ranks(folder: str | Path) -> None:
    """Three frames in batches of two: in the last step one of two processes has nothing."""
    data = labelled_surfaces(3, big())
    lines = [*LABELS, {"distill": "n2n", "source": "big", "share": 0.2}]
    for kind in ("random", "ascent"):
        run = augmented(loss=lines, kind=kind, fraction=0.7, epochs=1)
        train(run, data, data, Path(folder) / kind, teachers={"big": big()})


@pytest.mark.slow
def test_two_ranks_displace_as_one_rank_with_the_whole_batch(tmp_path):
    run_on_two_ranks("import test_augmentation as t\nt.train_for_ranks(sys.argv[2])\n", tmp_path)
    train_for_ranks(tmp_path / "one")
    for kind in ("random", "ascent"):
        one, two = (records_of(tmp_path / ranks / kind)[-1] for ranks in ("one", "two"))
        for part in ("train", "validation", "weights"):
            assert two[part] == pytest.approx(one[part], rel=1e-6)


def test_augmentation_that_cannot_work_is_told(tmp_path):
    data = labelled_surfaces(2, big())
    emt = make_teacher("ase.calculators.emt:EMT", {})
    with pytest.raises(ConfigError, match="there is no such teacher: name it under 'teachers'"):
        train(augmented(), data, data, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"'big' is not a potstill potential: use .*random"):
        train(augmented(kind="ascent"), data, data, tmp_path / "b", teachers={"big": emt})
    dipoles = augmented(loss=(*LABELS, {"learn": "dipole"}))
    with pytest.raises(TeacherError, match="does not give 'dipole'"):
        train(dipoles, data, data, tmp_path / "c", teachers={"big": big()})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="energy:other needs labels of 'other'"):
        augmented(loss=(*LABELS, LossTerm(property="energy", source="other")))
    with pytest.raises(ValueError, match="no reference labels: name a teacher"):
        augmented(augment={"source": "reference"})


def test_configs_name_the_teacher_of_displaced_structures(tmp_path):
    ase.io.write(tmp_path / "dft.extxyz", rattled_copper(10, 0.1))
    save_potential(tmp_path / "big.pt", big().potential, {"license": "that of big"})
    config = {
        "out": str(tmp_path / "run"),
        "data": {"files": [{"path": str(tmp_path / "dft.extxyz")}]},
        "train": augmented(epochs=1, norm=0.2).model_dump(mode="json"),
        "teachers": {"big": {"spec": str(tmp_path / "big.pt")}},
    }
    result = train_from_config(validate(config, TrainConfig))
    teacher = load_potential(result.best)[1]["teacher"]
    assert (teacher["name"], teacher["license"]) == ("big", "that of big")
    bare = {**config, "out": str(tmp_path / "bare"), "teachers": {}}
    with pytest.raises(ConfigError, match="no such teacher"):
        train_from_config(validate(bare, TrainConfig))
