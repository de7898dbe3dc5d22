"""Labelling stores with a cheap teacher: refusals, failures, progress, and kill -9."""

from pathlib import Path

import ase.build
import ase.io
import pytest
import torch

from kill_helper import run_and_kill
from label_worker import N_FRAMES, PartialLennardJones, argon, fill, run
from potstill.errors import ConfigError, StoreError, TeacherError
from potstill.label import label_store
from potstill.store import LabeledStore
from potstill.structures import Properties
from potstill.teachers.base import TeacherInfo
from potstill.workflows.base import Display
from potstill.workflows.labeling import LabelConfig, label

ALL = ("energy", "forces", "stress", "atomic_energies")
FAILING = [k for k in range(N_FRAMES) if k % 7 == 3]


@pytest.fixture
def store(tmp_path):
    return fill(str(tmp_path / "s"))


def test_labels_failures_and_progress(store):
    calls = []
    report = label_store(
        store,
        PartialLennardJones(),
        ALL,
        chunk=9,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (report.n_labeled, report.n_failed, report.n_new) == (34, 6, 40)
    assert calls == [(0, 40), (9, 40), (18, 40), (27, 40), (36, 40), (40, 40)]
    assert [failure["system"] for failure in report.failures] == FAILING
    assert report.failures[0] == {"system": 3, "frame_id": "argon:3", "reason": "did not converge"}
    labels, structures = store.labels("lj"), store.structures()
    absent = ~labels.presence("forces", N_FRAMES)
    assert absent.nonzero().flatten().tolist() == FAILING
    atomic = labels["atomic_energies"]
    total = torch.zeros(N_FRAMES, dtype=torch.float64).index_add(
        0, structures.system_index, atomic.nan_to_num()
    )
    assert torch.allclose(total[~absent], labels["energy"][~absent])
    direct, _ = PartialLennardJones().label(structures, ("forces",))
    assert torch.equal(direct["forces"].nan_to_num(), labels["forces"].nan_to_num())
    info = store.source_info("lj")
    assert info["fingerprint"] == "fingerprint-of-lj"
    assert info["versions"] == {"ase": "any"}
    assert info["units"]["stress"] == "eV/Å³"
    # Nothing is left to do.
    again = label_store(store, PartialLennardJones(), ALL)
    assert (again.n_labeled, again.n_failed, again.n_new) == (34, 6, 0)
    assert again.failures == report.failures


def test_the_reference_stays_beside_the_teacher(store):
    label_store(store, PartialLennardJones(), ("energy",))
    assert store.sources == ("reference", "lj")
    assert store.labels("reference")["energy"].tolist() == list(range(N_FRAMES))


def test_structures_that_come_later_are_labelled_later(tmp_path):
    structures, _ = argon()
    store = LabeledStore.create(tmp_path / "s")
    store.append(structures.select(range(10)))
    label_store(store, PartialLennardJones(), ALL)
    store.append(structures.select(range(10, N_FRAMES)))
    report = label_store(store, PartialLennardJones(), ALL)
    assert (report.n_new, report.n_labeled) == (30, 34)
    whole = LabeledStore.create(tmp_path / "whole")
    whole.append(structures)
    label_store(whole, PartialLennardJones(), ALL)
    assert store.fingerprint() == whole.fingerprint()


def test_what_the_teacher_cannot_give_is_refused_first(store):
    before = store.fingerprint()
    with pytest.raises(TeacherError, match="'lj' does not give 'charges'"):
        label_store(store, PartialLennardJones(), ("energy", "charges"))
    with pytest.raises(ConfigError, match="unknown property 'force'; did you mean 'forces'"):
        label_store(store, PartialLennardJones(), ("force",))
    with pytest.raises(TeacherError, match="at least one property"):
        label_store(store, PartialLennardJones(), ())
    with pytest.raises(TeacherError, match="at least one frame, not 0"):
        label_store(store, PartialLennardJones(), ALL, chunk=0)
    with pytest.raises(StoreError, match="opened for reading"):
        label_store(LabeledStore.open(store.path), PartialLennardJones(), ALL)
    assert store.fingerprint() == before
    assert store.sources == ("reference",)


def test_another_teacher_or_other_properties_under_the_name_are_refused(store):
    label_store(store, PartialLennardJones(), ("energy",))
    with pytest.raises(StoreError, match=r"started with the properties \['energy'\]"):
        label_store(store, PartialLennardJones(), ALL)
    other = PartialLennardJones()
    other.info = TeacherInfo("lj", "another-fingerprint")
    with pytest.raises(StoreError, match="of a different teacher"):
        label_store(store, other, ("energy",))


class Faulty(PartialLennardJones):
    """Spoils some of its answers, as a teacher with a bug would."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def compute(self, structures, properties):
        values = super().compute(structures, properties)
        self.spoil(values, structures)
        return values


def test_atomic_energies_that_do_not_sum_are_refused(store):
    def spoil(values, structures):
        values["energy"] += 2e-6 * structures.n_atoms_per_system

    with pytest.raises(TeacherError, match=r"do not sum to its energy in argon:0: .* 2e-06"):
        label_store(store, Faulty(spoil), ALL)
    assert store.n_labeled("lj") == 0

    def spoil_less(values, structures):
        values["energy"] += 2e-7 * structures.n_atoms_per_system

    assert label_store(store, Faulty(spoil_less), ALL).n_labeled == 34


def test_labels_that_are_not_finite_are_failures(store):
    def spoil(values, structures):
        for s, name in enumerate(structures.frame_id):
            if name == "argon:5":
                values["forces"][structures.system_index == s] = torch.inf

    report = label_store(store, Faulty(spoil), ALL)
    assert report.n_failed == 7
    assert {"system": 5, "frame_id": "argon:5", "reason": "forces not finite"} in report.failures
    assert not store.labels("lj").presence("energy", N_FRAMES)[5]


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def crystals(tmp_path):
    """A file with frames of four atoms, and of three, on which teachers misbehave."""
    frames = [ase.build.bulk("Cu", cubic=True, a=3.6 + 0.02 * k) for k in range(4)]
    del frames[2][0]
    ase.io.write(tmp_path / "frames.xyz", frames)
    return tmp_path / "frames.xyz"


def config_for(file, how, **settings):
    teacher = {"spec": "misbehaving:Misbehaving", "args": {"how": how}}
    store = file.with_name("labels.zarr")
    return LabelConfig(store=str(store), files=[{"path": str(file)}], teacher=teacher, **settings)


@pytest.mark.filterwarnings("ignore:Misbehaving. out of range")
def test_frames_that_failed_are_listed_in_a_file(crystals):
    said = []

    class Hearing(Display):
        def say(self, text):
            said.append(text)

    report = label(config_for(crystals, "segfault"), Hearing())
    assert (report.n_labeled, report.n_failed) == (3, 1)
    path = crystals.with_name("labels.zarr.Misbehaving.failed.tsv")
    head, row = path.read_text().splitlines()
    assert head == "system\tframe_id\treason"
    assert row.startswith("2\t")
    assert "SIGSEGV" in row
    assert any("failed on 1 of 4 structures" in text and str(path) in text for text in said)


@pytest.mark.filterwarnings("ignore:Misbehaving. out of range")
def test_a_teacher_that_fails_on_every_frame_is_an_error(crystals):
    frames = ase.io.read(crystals, ":")
    ase.io.write(crystals, [frames[2], frames[2].repeat(1)])
    with pytest.raises(TeacherError, match=r"failed on 2 of 2 structures, first on .*not conv"):
        label(config_for(crystals, "raise_"))
    with pytest.raises(TeacherError, match="failed on 2 of 2 structures"):
        label(config_for(crystals, "raise_"))


def test_stress_in_another_unit_is_refused_before_a_label_is_written(crystals):
    settings = {"store": str(crystals.with_name("s.zarr")), "files": [{"path": str(crystals)}]}
    teacher = {"spec": "misbehaving:InGPa"}
    with pytest.raises(TeacherError, match="it seems to be in GPa"):
        label(LabelConfig(**settings, teacher=teacher))
    store = LabeledStore.open(settings["store"])
    assert store.sources == ()
    report = label(LabelConfig(**settings, teacher=teacher | {"args": {"conservative": False}}))
    assert report.n_labeled == 4
    # Once in a store: what is labeled later is not checked again.
    ase.io.write(crystals, ase.build.bulk("Cu", cubic=True, a=3.9))
    assert label(LabelConfig(**settings, teacher=teacher | {"args": {"conservative": False}})).n_new


#: Of about 990 in all, the last 400 of which label: what a kill undoes is done again.
OPERATIONS = (301, 449, 80, 40, 29, 33, 15, 7, 31, 2)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_dash_nine(tmp_path, kills):
    """Filling and labelling, killed at file operations, ends as if nothing had happened."""
    killed, reached = tmp_path / "killed", []
    script = str(Path(__file__).with_name("label_worker.py"))
    for operation in OPERATIONS[:kills]:
        assert run_and_kill([script, str(killed)], killed, operation) == -9
        store = LabeledStore.open(killed)
        store.verify()
        done = store.n_labeled("lj") if "lj" in store.sources else 0
        reached.append((store.n_systems, done))
    assert reached == sorted(reached), "nothing that was committed is lost"
    assert any(0 < done < N_FRAMES for _, done in reached), "some kill met the labelling"
    run(str(killed))
    undisturbed = run(str(tmp_path / "undisturbed"))
    store = LabeledStore.open(killed)
    store.verify()
    assert store.fingerprint() == undisturbed.fingerprint()
    assert store.structures().fingerprints() == undisturbed.structures().fingerprints()
    assert store.structures().frame_id == undisturbed.structures().frame_id
    for source in ("reference", "lj"):
        found, expected = store.labels(source), undisturbed.labels(source)
        assert_equal(found, expected)
        assert store.failures(source) == undisturbed.failures(source)
        assert store.n_labeled(source) == N_FRAMES
    assert [failure["system"] for failure in store.failures("lj")] == FAILING


def assert_equal(found: Properties, expected: Properties) -> None:
    assert found.names == expected.names
    for name in found.names:
        assert torch.equal(found[name].nan_to_num(9), expected[name].nan_to_num(9))
        assert torch.equal(found.present[name], expected.present[name])
