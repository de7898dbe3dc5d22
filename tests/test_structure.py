"""Structure of liquids and crystals by kinds: distances, angles, neighbors and differences."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from scipy.integrate import trapezoid

from potstill.errors import ConfigError, DataError
from potstill.evaluate.adf import (
    AngularDistributions,
    Coordination,
    angular_distributions,
    coordination,
)
from potstill.evaluate.cdf import CombinedDistributions, combined_distributions
from potstill.evaluate.distributions import bins_of, compare_distributions
from potstill.evaluate.rdf import (
    RadialDistribution,
    RadialDistributions,
    neighbor_cutoffs,
    radial_distribution,
    radial_distributions,
)
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.workflows.evaluation import EvaluateConfig, evaluate
from potstill.workflows.report import verdicts

BEADS = SpeciesTable((Species("A", 10.0), Species("B", 20.0)))
LENGTH = 12.0


def gas(n_frames, seed, numbers=(60, 30), length=LENGTH, table=BEADS):
    """Frames of an ideal gas of beads in a cubic cell."""
    n = sum(numbers)
    positions = length * np.random.default_rng(seed).random((n_frames * n, 3))
    species = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers))
    return Structures(
        positions=torch.from_numpy(positions),
        species=species.repeat(n_frames),
        system_index=torch.arange(n_frames).repeat_interleave(n),
        cell=(length * torch.eye(3, dtype=torch.float64)).repeat(n_frames, 1, 1),
        pbc=torch.ones(n_frames, 3, dtype=torch.bool),
        species_table=table,
    )


def rock_salt():
    return Structures.from_ase(bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 2, 2))


# -- ideal gas and perfect crystals --------------------------------------------------------------


def test_an_ideal_gas_of_two_kinds_has_no_structure():
    frames = gas(60, 0)
    found = radial_distributions(frames, r_max=6.0, n_bins=12, n_blocks=10)
    assert list(found) == ["A-A", "A-B", "B-B"]
    for pair, n in (("A-A", 60), ("A-B", math.inf), ("B-B", 30)):
        g = found[pair]
        assert g.g[4:] == pytest.approx(1.0 - 1.0 / n, abs=0.08)
        pull = (g.g - (1.0 - 1.0 / n))[3:] / g.error[3:]
        assert np.sqrt(np.mean(pull**2)) < 2.0


def test_angles_of_an_ideal_gas_are_those_of_random_directions():
    found = angular_distributions(gas(60, 1), cutoffs=5.0, n_bins=18, n_blocks=10)
    assert len(found) == 6
    edges = np.radians(np.linspace(0.0, 180.0, 19))
    expected = 0.5 * -np.diff(np.cos(edges)) / 10.0
    for part in found.values():
        assert part.density.sum() * 10.0 == pytest.approx(1.0)
        pull = (part.density - expected) / part.error
        assert np.sqrt(np.mean(pull**2)) < 2.0
    # 90 beads at random have on average (n - 1) V(5 Å)/V neighbors, whatever their kinds
    numbers = coordination(gas(60, 1), cutoffs=5.0, n_blocks=10)
    sphere = 4.0 / 3.0 * math.pi * 125.0 / LENGTH**3
    for pair, n in (("A-A", 59), ("A-B", 30), ("B-A", 60), ("B-B", 29)):
        part = numbers[pair]
        assert abs(part.mean - n * sphere) < 4.0 * part.mean_error
        # Numbers of neighbors of an ideal gas are binomial.
        binomial = [math.comb(n, k) * sphere**k * (1 - sphere) ** (n - k) for k in range(n + 1)]
        assert part.probability[: n + 1] == pytest.approx(binomial, abs=0.02)


def test_rock_salt_has_six_unlike_and_twelve_like_neighbors_at_right_angles():
    crystal = rock_salt()
    found = radial_distributions(crystal, r_max=5.0, n_bins=100)
    for pair, shell, n in (("Na-Cl", 5.64 / 2, 6), ("Na-Na", 5.64 / math.sqrt(2), 12)):
        g = found[pair]
        assert g.r[g.g > 0][0] == pytest.approx(shell, abs=0.05)
        assert g.coordination[np.searchsorted(g.r, shell + 0.2)] == pytest.approx(n)
    cutoffs = {"Na-Cl": 3.2, "Na-Na": 4.3, "Cl-Cl": 4.3}
    numbers = coordination(crystal, cutoffs=cutoffs)
    for pair, n in (("Na-Cl", 6), ("Cl-Na", 6), ("Na-Na", 12), ("Cl-Cl", 12)):
        assert numbers[pair].mean == n
        assert numbers[pair].probability[n] == 1.0
    angles = angular_distributions(crystal, cutoffs=cutoffs, n_bins=36)
    octahedron = angles["Cl-Na-Cl"]  # 12 right angles and 3 straight ones among 6 neighbors
    weights = octahedron.density * 5.0
    assert weights[(octahedron.angle > 85) & (octahedron.angle < 95)].sum() == pytest.approx(0.8)
    assert weights[octahedron.angle > 175] == pytest.approx(0.2)
    assert octahedron.n_angles == 32 * 15
    mixed = angles["Na-Na-Cl"]  # 12 edges against 6 axes: 45°, 90° and 135°
    weights = mixed.density * 5.0
    at = [weights[abs(mixed.angle - x) < 3.0].sum() for x in (45, 90, 135)]
    assert at == pytest.approx([1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize(("lattice", "n"), [("fcc", 12), ("bcc", 8)])
def test_the_first_shells_of_metals_are_found_by_their_minimum(lattice, n):
    crystal = Structures.from_ase(bulk("Fe", lattice, a=3.6, cubic=True) * (3, 3, 3))
    jitter = 0.03 * np.random.default_rng(4).standard_normal(crystal.positions.shape)
    crystal = crystal.with_fields(positions=crystal.positions + torch.from_numpy(jitter))
    cutoff = neighbor_cutoffs(crystal, r_max=4.5)["all"]
    assert coordination(crystal, cutoffs=cutoff)["all"].mean == pytest.approx(n, abs=1e-9)


def test_partial_distributions_add_up_to_the_total():
    frames = gas(5, 3)
    total = radial_distribution(frames, r_max=6.0, n_bins=20)
    parts = radial_distributions(frames, r_max=6.0, n_bins=20)
    shares = {"A-A": 4 / 9, "A-B": 4 / 9, "B-B": 1 / 9}
    np.testing.assert_allclose(sum(shares[k] * parts[k].g for k in shares), total.g, rtol=1e-12)
    first, swapped = (radial_distribution(frames, pair=pair) for pair in (("A", "B"), ("B", "A")))
    np.testing.assert_allclose(first.g, swapped.g, rtol=1e-12)
    assert first.coordination[-1] == pytest.approx(0.5 * swapped.coordination[-1])
    alike = angular_distributions(frames, cutoffs=5.0, alike=True)["all"]
    triples = angular_distributions(frames, cutoffs=5.0)
    n = sum(part.n_angles for part in triples.values())
    assert n == pytest.approx(alike.n_angles)
    mixed = sum(part.n_angles / n * part.density for part in triples.values())
    np.testing.assert_allclose(mixed, alike.density, rtol=1e-12)


def test_bins_are_those_of_numpy():
    rng = np.random.default_rng(0)
    edges = np.linspace(0.0, 7.3, 41)
    values = np.concatenate([7.3 * rng.random(1000), edges, np.nextafter(edges[1:], 0.0)])
    counts = np.bincount(bins_of(values, edges), minlength=40)
    np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])


# -- distance and angle together -----------------------------------------------------------------


def test_the_combined_distribution_of_an_ideal_gas_is_one_everywhere():
    found = combined_distributions(
        gas(120, 11), cutoffs={"A-A": 4.0, "A-B": 5.0, "B-B": 4.5}, n_r=6, r_max=6.0, n_angles=6,
        n_blocks=10,
    )  # fmt: skip
    assert len(found) == 8
    counts = {"A": 60, "B": 30}
    for triple, part in found.items():
        a, b, c = triple.split("-")
        # Two, or all three, of one kind: not every atom is a choice again.
        choices = counts[a] - (a == b), counts[c] - (c == b) - (c == a)
        expected = choices[0] * choices[1] / (counts[a] * counts[c])
        pull = (part.g - expected)[1:] / part.error[1:]
        assert np.sqrt(np.mean(pull**2)) < 2.0
        mean = (part.g * part.counted).sum() / part.counted.sum()
        assert mean == pytest.approx(expected, rel=0.05)


def test_combined_distributions_are_counted_as_they_are_defined():
    frames, cutoffs = gas(2, 12, (14, 10)), {"A-A": 5.0, "A-B": 6.0, "B-B": 5.5}
    found = combined_distributions(frames, cutoffs=cutoffs, n_r=5, r_max=6.0, n_angles=4)
    kind, n = frames.species[:24].numpy(), 24
    counts = {triple: np.zeros((5, 4)) for triple in found}
    for system in range(2):
        x = frames[system].positions.numpy()
        vectors = x[None] - x[:, None]
        vectors -= LENGTH * np.rint(vectors / LENGTH)  # 6 Å is half the cell: one image each
        for i, j, k in np.ndindex(n, n, n):
            r, s = np.linalg.norm(vectors[i, j]), np.linalg.norm(vectors[i, k])
            a, b, c = ("AB"[kind[m]] for m in (j, i, k))
            if len({i, j, k}) == 3 and r < 6.0 and s <= cutoffs["-".join(sorted((b, c)))]:
                cosine = vectors[i, j] @ vectors[i, k] / (r * s)
                angle = np.degrees(np.arccos(cosine))
                counts[f"{a}-{b}-{c}"][int(r / 1.2), int(angle / 45.0)] += 0.5
    for triple, part in found.items():
        number = {"A": 14, "B": 10}
        a, b, c = triple.split("-")
        sphere = 4.0 / 3.0 * math.pi * part.cutoff**3
        ideal = number[a] * number[b] * number[c] * sphere * part.counted / LENGTH**6
        np.testing.assert_allclose(part.g * ideal, counts[triple], atol=1e-3)


def test_combined_distributions_of_rock_salt():
    """Chlorine beside sodium: the angles between its six neighbors, at their one distance."""
    found = combined_distributions(
        rock_salt(), cutoffs=3.2, r_max=6.0, n_r=24, n_angles=36, triples=["Cl-Na-Cl"]
    )
    (part,) = found.values()
    at, angles = np.nonzero(part.g)
    neighbors = part.r[at] < 3.0
    assert set(part.r[at[neighbors]]) == {2.875}
    straight = {x for x in part.angle[angles[neighbors]] if not 85 < x < 95}
    assert straight == {177.5}
    # Over all directions it is g(r) times the six neighbors, of which one is j itself if near.
    g = radial_distribution(rock_salt(), r_max=6.0, n_bins=24, pair=("Na", "Cl"))
    share = part.measure / part.measure.sum(axis=1, keepdims=True)
    ideal = 4.0 / 3.0 * math.pi * part.cutoff**3 * g.density
    np.testing.assert_allclose(
        (part.g * share).sum(axis=1) * ideal, g.g * np.where(part.r < 3.2, 5, 6), atol=1e-3
    )
    with pytest.raises(ConfigError, match="no triple Cl-Na-F"):
        combined_distributions(rock_salt(), cutoffs=3.2, triples=["Cl-Na-F"])


# -- other programs --------------------------------------------------------------------------------


def reline():
    """Centers of mass of some frames of reline, with MDAnalysis' universe."""
    mda = pytest.importorskip("MDAnalysis")
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "reline"
    if not (folder / "reline_425K.trr").is_file():
        pytest.skip(f"the trajectory of reline is not in {folder}")
    universe = mda.Universe(folder / "reline_425K.tpr", folder / "reline_425K.trr")
    names = sorted({name.upper() for name in universe.residues.resnames})
    table = SpeciesTable(tuple(Species(name, 1.0) for name in names))
    species = torch.tensor([names.index(name.upper()) for name in universe.residues.resnames])
    positions, cells = [], []
    for step in universe.trajectory[100:400:100]:
        center = universe.atoms.center_of_mass(compound="residues", unwrap=True)
        positions.append(torch.from_numpy(center.astype(float)))
        cells.append(torch.diag(torch.tensor(step.dimensions[:3], dtype=torch.float64)))
    n = len(positions)
    return Structures(
        positions=torch.cat(positions),
        species=species.repeat(n),
        system_index=torch.arange(n).repeat_interleave(len(species)),
        cell=torch.stack(cells),
        pbc=torch.ones(n, 3, dtype=torch.bool),
        species_table=table,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: gas(4, 5, (200, 100), 20.0), reline])
def test_distances_agree_with_mdanalysis_and_freud(make):
    mda = pytest.importorskip("MDAnalysis")
    freud = pytest.importorskip("freud")
    from MDAnalysis.analysis.rdf import InterRDF

    frames = make()
    n, names = frames.n_atoms // frames.n_systems, frames.species_table.names
    length = float(frames.cell[0, 0, 0])
    kind = frames.species[:n].numpy()
    universe = mda.Universe.empty(n, trajectory=True)
    universe.load_new(
        frames.positions.view(-1, n, 3).numpy().astype(np.float32),
        dimensions=np.array([[length] * 3 + [90.0] * 3] * frames.n_systems, dtype=np.float32),
    )
    found = radial_distributions(frames, r_max=9.0, n_bins=45)
    box = freud.box.Box.cube(length)
    for a, b in ((0, 0), (0, 1), (len(names) - 1, 0)):
        pair = "-".join(names[k] for k in sorted((a, b)))
        of_a, of_b = (universe.atoms[np.flatnonzero(kind == k)] for k in (a, b))
        exclusion = (1, 1) if a == b else None
        theirs = InterRDF(of_a, of_b, nbins=45, range=(0.0, 9.0), exclusion_block=exclusion)
        # Positions are float32 there: few distances fall into the next bin. A kind's own pairs are
        # normalized by N (N - 1) there, by N² here.
        scale = 1.0 - 1.0 / (kind == a).sum() if a == b else 1.0
        ours = found[pair].g / scale
        assert np.abs(theirs.run().results.rdf - ours).sum() * 0.2 < 0.01
        rdf = freud.density.RDF(bins=45, r_max=9.0)
        for system in range(frames.n_systems):
            here = frames[system].positions.numpy() - 0.5 * length
            rdf.compute(
                (box, here[kind == a]), query_points=here[kind == b], reset=False,
                neighbors={"r_max": 9.0, "exclude_ii": a == b},
            )  # fmt: skip
        theirs = np.asarray(rdf.rdf)
        ratio = theirs[ours > 0] / found[pair].g[ours > 0]
        # The same up to the convention of N or N - 1, and float32.
        assert np.ptp(np.delete(ratio, np.argsort(found[pair].g[ours > 0])[:5])) < 0.02
        assert np.median(ratio) == pytest.approx(1.0, abs=1.1 / (kind == a).sum())


def test_coordination_agrees_with_freuds_neighbors():
    freud = pytest.importorskip("freud")
    frames = gas(1, 6)
    query = freud.locality.AABBQuery(freud.box.Box.cube(LENGTH), frames.positions.numpy() - 6.0)
    pairs = query.query(query.points, {"r_max": 4.0, "exclude_ii": True}).toNeighborList()
    kind = frames.species.numpy()
    between = (kind[pairs.query_point_indices] == 0) & (kind[pairs.point_indices] == 1)
    found = coordination(frames, cutoffs=4.0)
    assert found["A-B"].mean == pytest.approx(between.sum() / 60)


# -- differences -----------------------------------------------------------------------------------


def distribution(r, g, blocks=None):
    error = np.zeros_like(g)
    return RadialDistribution(r, g, error, np.cumsum(g), "A-B", 0.01, 100, 5, blocks)


def test_equal_distributions_do_not_differ_and_a_shift_is_found():
    r = np.linspace(0.05, 9.95, 100)

    def peak(center):
        return distribution(r, np.exp(-0.5 * ((r - center) / 0.5) ** 2))

    same = compare_distributions(peak(4.0), peak(4.0))
    assert same.integrated_absolute_error == same.divergence == same.largest == 0.0
    assert not same.clear
    shifted = compare_distributions(peak(4.0), peak(4.3))
    fine = np.linspace(0.0, 10.0, 20001)
    a, b = (np.exp(-0.5 * ((fine - center) / 0.5) ** 2) for center in (4.0, 4.3))
    area = trapezoid(np.abs(a - b), fine)
    assert shifted.integrated_absolute_error == pytest.approx(area, rel=5e-3)
    assert shifted.relative_error == pytest.approx(area / trapezoid(b, fine), rel=5e-3)
    p, q = (fine**2 * x / trapezoid(fine**2 * x, fine) for x in (a, b))
    middle = np.maximum(0.5 * (p + q), 1e-300)
    p, q = np.maximum(p, 1e-300), np.maximum(q, 1e-300)
    divergence = 0.5 * trapezoid(p * np.log2(p / middle) + q * np.log2(q / middle), fine)
    assert shifted.divergence == pytest.approx(divergence, rel=5e-3)
    assert shifted.clear
    apart = compare_distributions(peak(2.0), peak(8.0))
    assert apart.divergence == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(DataError, match="cannot be compared"):
        compare_distributions(peak(4.0), distribution(r + 0.1, r))


def test_errors_of_independent_frames_fall_with_the_square_root_of_their_number():
    few, many = (
        [radial_distribution(gas(n, seed), r_max=6.0, n_bins=10, n_blocks=10) for seed in range(8)]
        for n in (20, 80)
    )
    ratio = np.mean([g.error[3:] for g in few]) / np.mean([g.error[3:] for g in many])
    assert ratio == pytest.approx(2.0, rel=0.15)
    scatter = np.std([g.g[3:] for g in many], axis=0, ddof=1).mean()
    assert np.mean([g.error[3:] for g in many]) == pytest.approx(scatter, rel=0.25)


def test_noise_is_called_unclear_and_stated_as_large_as_it_is():
    differences = []
    for seed in range(15):
        pair = (
            radial_distributions(gas(40, 2 * seed + k, (30, 30)), r_max=8.0, n_bins=40, n_blocks=10)
            for k in (0, 1)
        )
        first, second = pair
        differences += [compare_distributions(first[k], second[k]) for k in first]
    assert np.mean([d.clear for d in differences]) < 0.1
    ratio = [d.integrated_absolute_error / d.expected_from_noise for d in differences]
    assert np.mean(ratio) == pytest.approx(1.0, abs=0.1)
    ratio = [d.divergence / d.divergence_noise for d in differences]
    assert np.mean(ratio) == pytest.approx(1.0, abs=0.15)
    assert "unclear" in str(min(differences, key=lambda d: d.integrated_absolute_error))


def test_results_survive_json_and_older_files_are_read():
    frames = gas(4, 8)
    for kind, parts in (
        (RadialDistributions, radial_distributions(frames, n_bins=10)),
        (AngularDistributions, angular_distributions(frames, cutoffs=4.0)),
        (Coordination, coordination(frames, cutoffs=4.0)),
        (CombinedDistributions, combined_distributions(frames, cutoffs=4.0)),
    ):
        result = kind(parts)
        copy = kind.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
        ours, theirs = copy.beside(result)
        assert len(ours) == len(parts)
        assert compare_distributions(ours, theirs).integrated_absolute_error == 0.0
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.blocks, b.blocks, rtol=1e-3, atol=1e-6)
    alone = radial_distribution(frames, n_bins=10).to_json()
    del alone["blocks"]
    assert list(RadialDistributions.from_json(alone).parts) == ["all"]


# -- the command -----------------------------------------------------------------------------------


def test_trajectories_of_beads_are_judged_beside_the_reference(tmp_path):
    for name, seed in (("reference", 0), ("student", 1)):
        LabeledStore.create(tmp_path / f"{name}.zarr").append(gas(40, seed))
    crowded = gas(40, 2)
    positions = crowded.positions.view(40, -1, 3).clone()
    positions[:, 1::2] = positions[:, ::2] + 0.8  # dumbbells
    crowded = crowded.with_fields(positions=positions.view(-1, 3))
    LabeledStore.create(tmp_path / "control.zarr").append(crowded)
    out = tmp_path / "out"
    near = {"cutoff": 4.0}
    config = EvaluateConfig(
        trajectories={n: f"{tmp_path / n}.zarr" for n in ("student", "control", "reference")},
        tests={"rdf": {"n_bins": 20}, **dict.fromkeys(("adf", "cdf", "coordination"), near)},
        out=str(out),
    )
    found = evaluate(config)
    rows = {row[:2]: row for row in _csv(out / "rdf_differences.csv")}
    assert rows[("control", "A-A")][-1] == "clear"
    assert rows[("student", "mean")][-1] == "unclear"
    for name in ("rdf", "adf", "cdf", "coordination"):
        assert (out / f"{name}.png").is_file()
        assert (out / f"{name}_differences.csv").is_file()
    drawn = _csv(out / "cdf.csv")
    assert drawn[0][-1] == "value"
    assert {row[1].split(", ")[1] for row in drawn[1:]} == {"reference", "student", "difference"}
    own, beside = (line for line in verdicts(found) if "g(r)" in line)
    assert "unclear" in own
    assert "closer to the reference's than that of control." in beside


def _csv(path):
    with path.open() as file:
        return [tuple(row) for row in csv.reader(file)]


def test_cutoffs_are_by_pair_and_typing_errors_are_found():
    frames = gas(2, 9)
    with pytest.raises(ConfigError, match="no cutoff for B-B"):
        angular_distributions(frames, cutoffs={"A-A": 4.0, "B-A": 4.0})
    with pytest.raises(ConfigError, match="a cutoff for A-C"):
        coordination(frames, cutoffs={"A-A": 4.0, "A-C": 4.0})
