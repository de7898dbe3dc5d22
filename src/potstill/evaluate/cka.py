"""How alike the features of two models are: linear CKA, its gain by distillation, linear probes.

Kornblith et al., arXiv:1905.00414, as used by Ekström Kelvinius et al. (appendix G). With features
X (n, p) and Y (n, q) of the same n atoms, their means over the atoms subtracted,

    CKA = ||Y' X||² / (||X' X|| ||Y' Y||),    all norms of Frobenius.

It is 1 for features that differ by a rotation, a uniform scale or a shift, and 0 for uncorrelated
ones. The n examples are all atoms of all structures: sums over batches are kept, never averages of
batches, so the value does not depend on how the structures are cut into batches. What a tap gives
is brought to atoms first: scalars (N, F) as they are, vectors (N, 3, F) as (N, 3F), features of
pairs summed over the pairs of each center (Eq. 5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from potstill.checkpoint import load_potential, read_payload
from potstill.distill.aggregate import edges_to_nodes
from potstill.distill.taps import CHOSEN_PAIRS, potential_features
from potstill.errors import ConfigError, DataError, ModelError, suggest
from potstill.evaluate.base import Result
from potstill.models import Potential, SumPotential
from potstill.ragged import draw
from potstill.report.panels import Drawing, Panel, Series
from potstill.structures import Properties, Structures

#: Atoms that a probe is fitted to at most, and structures.
_MOST_PROBE_ROWS = 20_000

#: Share of the structures that probes hold out; atoms per batch.
_HELD_OUT, _BATCH_ATOMS = 0.3, 1024

#: Strengths of the ridge, relative to the largest squared singular value.
_RIDGES = tuple(10.0**k for k in range(-10, 2))


# -- features of atoms ---------------------------------------------------------------------------


def compared_taps(potential: Potential, taps: Sequence[str] | None = None) -> tuple[str, ...]:
    """Taps that are compared: the given ones, or all that hold features.

    Raises
    ------
    ModelError
        If the model has no taps, or not those.
    """
    featured = tuple(tap for tap in potential.taps if tap != CHOSEN_PAIRS)
    if not featured:
        raise ModelError(f"{potential.kind} has no feature taps, so there is nothing to compare")
    for tap in taps or ():
        if tap == CHOSEN_PAIRS:
            raise ModelError(f"the tap '{tap}' numbers pairs and holds no features: leave it out")
        if tap not in featured:
            raise ModelError(f"{potential.kind} has no feature tap '{tap}'{suggest(tap, featured)}")
    return featured if taps is None else tuple(taps)


def node_features(
    potential: Potential, structures: Structures, taps: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Features of a batch with one row per atom, of the given taps or all that hold features.

    They are (N, F) float64, (N, 3F) of vectors. Features of pairs are summed over the pairs of each
    center, of a model that chooses among the pairs over those it has chosen.

    Raises
    ------
    ModelError
        If a tap is unknown, or the features of a tap belong neither to the atoms nor to pairs that
        are known.
    """
    batch = structures.to(potential.device)
    features = {}
    for tap, found in potential_features(potential, batch, compared_taps(potential, taps)).items():
        feature = replace(found, values=found.values.to(torch.float64))
        value = feature.values if feature.graph is None else edges_to_nodes(feature, batch)
        features[tap] = value.reshape(batch.n_atoms, -1)
    return features


# -- CKA -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CKAMatrix(Result):
    """CKA between taps of two models, or the gain of it.

    Parameters
    ----------
    first, second : tuple of str
        Taps of the rows and of the columns.
    values : ndarray
        (rows, columns); NaN where a feature does not vary.
    n_atoms : int
        Examples.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    values: np.ndarray
    n_atoms: int

    def __getitem__(self, taps: tuple[str, str]) -> float:
        return float(self.values[self.first.index(taps[0]), self.second.index(taps[1])])


class CKAAccumulator:
    """Sums over batches from which the CKA of every pair of taps of two models follows exactly."""

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self.first, self.second = tuple(first), tuple(second)
        self.n_atoms = 0
        self._origins: list[list[Tensor]] = []  # by model and tap, (F,)
        self._sums: list[list[Tensor]] = []  # by model and tap, (F,)
        self._own: list[list[Tensor]] = []  # by model and tap, (F, F)
        self._cross: list[list[Tensor]] = []  # by taps of both, (F, F')

    def update(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        """Add the features (N, F) of one batch by tap, the same atoms in the same order.

        Raises
        ------
        DataError
            If the numbers of atoms differ.
        """
        sides = [[first[t] for t in self.first], [second[t] for t in self.second]]
        sides = [[x.to("cpu", torch.float64) for x in side] for side in sides]
        if len({len(x) for side in sides for x in side}) > 1:
            raise DataError("features of different numbers of atoms cannot be compared")
        if not self._origins:
            # Means are taken off at the end; a nearby origin keeps the digits that are left then.
            self._origins = [[x.mean(dim=0) for x in side] for side in sides]
            self._sums = [[torch.zeros_like(x[0]) for x in side] for side in sides]
            self._own = [[x.new_zeros(x.shape[1], x.shape[1]) for x in side] for side in sides]
            self._cross = [
                [x.new_zeros(x.shape[1], y.shape[1]) for y in sides[1]] for x in sides[0]
            ]
        for k, side in enumerate(sides):
            for t, x in enumerate(side):
                x = x - self._origins[k][t]
                side[t] = x
                self._sums[k][t] += x.sum(dim=0)
                self._own[k][t].addmm_(x.T, x)
        for row, x in zip(self._cross, sides[0], strict=True):
            for product, y in zip(row, sides[1], strict=True):
                product.addmm_(x.T, y)
        self.n_atoms += len(sides[0][0])

    def matrix(self) -> CKAMatrix:
        """CKA of every tap of the first with every tap of the second.

        Raises
        ------
        DataError
            If there were no atoms.
        """
        if not self.n_atoms:
            raise DataError("there are no atoms to compare features of")
        own = [
            [self._norm(product, s, s) for product, s in zip(products, sums, strict=True)]
            for products, sums in zip(self._own, self._sums, strict=True)
        ]
        values = np.full((len(self.first), len(self.second)), math.nan)
        for (i, j), _ in np.ndenumerate(values):
            scale = own[0][i] * own[1][j]
            if scale > 0.0:
                cross = self._norm(self._cross[i][j], self._sums[0][i], self._sums[1][j])
                values[i, j] = cross**2 / scale
        return CKAMatrix(self.first, self.second, values, self.n_atoms)

    def _norm(self, product: Tensor, a: Tensor, b: Tensor) -> float:
        """Norm of a covariance; zero where only rounding is left of it."""
        covariance = product - torch.outer(a, b) / self.n_atoms
        norm = float(torch.linalg.matrix_norm(covariance))
        return norm if norm > 1e-28 * self.n_atoms else 0.0


def cka_matrix(
    first: Potential,
    second: Potential,
    structures: Structures,
    *,
    first_taps: Sequence[str] | None = None,
    second_taps: Sequence[str] | None = None,
    max_atoms: int = _BATCH_ATOMS,
) -> CKAMatrix:
    """CKA between taps (by default all that hold features) of two models on the same atoms.

    The result does not depend on `max_atoms`, the number of atoms per batch.

    Raises
    ------
    ModelError
        If a model has no taps, or not those.
    """
    rows, columns = compared_taps(first, first_taps), compared_taps(second, second_taps)
    metric = CKAAccumulator(rows, columns)
    for systems in structures.batches(max_atoms):
        batch = structures.select(systems)
        metric.update(node_features(first, batch, rows), node_features(second, batch, columns))
    return metric.matrix()


def similarity_gain(before: CKAMatrix, after: CKAMatrix) -> CKAMatrix:
    """How much more alike distillation has made two models: CKA after minus before.

    Raises
    ------
    DataError
        If the matrices are of other taps or atoms.
    """
    mine, its = ((m.first, m.second, m.n_atoms) for m in (before, after))
    if mine != its:
        raise DataError("a gain needs two matrices of the same taps on the same atoms")
    return CKAMatrix(after.first, after.second, after.values - before.values, after.n_atoms)


# -- during training -----------------------------------------------------------------------------


class CKATracker:
    """Writes the CKA with a teacher while a student is trained: `on_epoch` of `train`.

    It reads the run's snapshot, so that it needs nothing of the loop and of the network in it.
    Lines go to `cka.jsonl` in the run's folder: the epoch, the steps and the matrix. The first
    epoch is always compared, then one in `every`; `structures` are of species that both know.

    Raises
    ------
    ModelError
        If the teacher has no taps, or not those; the student is looked at first after an epoch.
    DataError
        If the teacher does not know a species.
    """

    FILE: ClassVar[str] = "cka.jsonl"

    def __init__(
        self,
        folder: str | Path,
        teacher: Potential,
        structures: Structures,
        *,
        every: int = 1,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"the interval of CKA must be at least one epoch, not {every}")
        self.folder, self.teacher, self.every = Path(folder), teacher, every
        self.structures = structures.with_species_table(teacher.species_table)
        self.taps = (student_taps, compared_taps(teacher, teacher_taps))

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Compare if this epoch is due."""
        epoch = int(record["epoch"])
        if (epoch - 1) % self.every or not (self.folder / "best.pt").is_file():
            return
        student = snapshot_potential(self.folder).to(self.teacher.device)
        own, its = self.taps
        matrix = cka_matrix(student, self.teacher, self.structures, first_taps=own, second_taps=its)
        line = {"epoch": epoch, "steps": record.get("steps"), "cka": matrix.to_json()}
        path = self.folder / self.FILE
        # A line that a killed run left unfinished stays a line of its own.
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" * torn + json.dumps(line) + "\n")


def read_cka_history(folder: str | Path) -> dict[int, CKAMatrix]:
    """CKA by epoch, as `CKATracker` has written it; an epoch that was done again counts once.

    Raises
    ------
    DataError
        If nothing was written.
    """
    path = Path(folder) / CKATracker.FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist: CKA was not recorded during that run")
    found = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the run was killed while it wrote this line
            continue
        found[int(record["epoch"])] = CKAMatrix.from_json(record["cka"])
    if not found:
        raise DataError(f"{path} holds no CKA")
    return dict(sorted(found.items()))


def cka_history_drawing(history: Mapping[int, CKAMatrix]) -> Drawing:
    """CKA of each tap of the student with the teacher's most alike tap (of the last epoch)."""
    epochs, last = list(history), history[max(history)]
    series = []
    for i, tap in enumerate(last.first):
        j = int(np.nan_to_num(last.values[i], nan=-1.0).argmax())
        values = [history[epoch].values[i, j] for epoch in epochs]
        series.append(Series(f"{tap} / {last.second[j]}", epochs, values, kind="line"))
    panels, caption = [Panel("Epoch", "CKA", series)], "Taps of student / teacher."
    return Drawing("cka_history", "Similarity during training", caption, panels)


def snapshot_potential(folder: str | Path) -> Potential:
    """The student as it is now in a run's folder: the architecture of `best.pt`, `last.pt`'s state.

    Raises
    ------
    ModelError
        If the folder holds no snapshot.
    """
    student, _ = load_potential(Path(folder) / "best.pt")
    assert isinstance(student, SumPotential)
    payload = read_payload(Path(folder) / "last.pt")
    student["network"].load_state_dict(payload["average"] or payload["state"])
    return student


# -- linear probes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeScore(Result):
    """How well energies and forces follow linearly from the features of a tap, on held-out data.

    Parameters
    ----------
    tap : str
    energy_r2 : float
        Of the energy per atom, less a least-squares energy per species, from the mean feature of a
        structure. 1 is perfect, 0 no better than the mean, below 0 worse.
    forces_r2 : float
        Of the forces of free atoms from vector features; of their lengths from scalars, which
        cannot tell directions.
    forces_target : str
        "vector" or "length".
    n_train, n_test : int
        Structures.
    """

    tap: str
    energy_r2: float
    forces_r2: float
    forces_target: str
    n_train: int
    n_test: int


def linear_probes(
    potential: Potential,
    structures: Structures,
    labels: Properties,
    *,
    taps: Sequence[str] | None = None,
    seed: int = 0,
) -> list[ProbeScore]:
    """Fit a ridge regression from the features of each tap to energies and forces.

    The strength of the ridge is chosen by leaving out one example of the training part at a time;
    scores are of structures that are in no fit. Frames of one trajectory are alike, and a random
    split then flatters: compare taps with one another, not with errors elsewhere.

    Parameters
    ----------
    structures, labels : Structures, Properties
        With energies and forces, all present.
    taps : sequence of str, optional
        Which; all that hold features by default.
    seed : int
        Of the split, and of the atoms where there are more than 20,000.

    Raises
    ------
    DataError
        If labels are absent or there are fewer than four structures.
    """
    n = structures.n_systems
    for name in ("energy", "forces"):
        if not bool(labels.presence(name, n).all()):
            raise DataError(f"linear probes need '{name}' of all structures")
    n_test = max(round(_HELD_OUT * n), 1)
    if n < 4 or n - n_test < 2:
        raise DataError(f"linear probes need at least four structures, not {n}")
    names = compared_taps(potential, taps)
    parts: dict[str, list[Tensor]] = {tap: [] for tap in names}
    for systems in structures.batches(_BATCH_ATOMS):
        for tap, value in node_features(potential, structures.select(systems), names).items():
            parts[tap].append(value.cpu())
    test = torch.zeros(n, dtype=torch.bool)
    test[draw(n, n_test, seed)] = True
    energy = _energy_target(structures, labels["energy"], ~test)
    rows = structures.free.nonzero().flatten()
    rows = rows[draw(len(rows), _MOST_PROBE_ROWS, seed)]
    held_out = test[structures.system_index[rows]]
    found = []
    for tap in names:
        feature = torch.cat(parts[tap])
        pooled = structures.sum_by_system(feature)
        pooled /= structures.n_atoms_per_system.clamp(min=1).unsqueeze(1)
        vector = potential.taps[tap].kind == "node_vector"
        forces_r2 = _forces_r2(feature[rows], labels["forces"][rows], held_out, vector)
        target = "vector" if vector else "length"
        energy_r2 = ridge_r2(pooled, energy, test)
        found.append(ProbeScore(tap, energy_r2, forces_r2, target, n - n_test, n_test))
    return found


def ridge_r2(x: Tensor, y: Tensor, test: Tensor, *, intercept: bool = True) -> float:
    """Held-out coefficient of determination of a ridge regression.

    Parameters
    ----------
    x, y : Tensor
        (n, p) features and (n,) targets, float64.
    test : Tensor
        (n,) bool, rows that are held out.
    intercept : bool
        Without one, both are taken to vanish together.

    Returns
    -------
    float
        1 - (sum of squared errors) / (sum of squared deviations from the training mean, or from
        zero without an intercept).
    """
    train = ~test
    center = x[train].mean(dim=0) if intercept else torch.zeros_like(x[0])
    middle = y[train].mean() if intercept else y.new_zeros(())
    scale = x[train].std(dim=0)
    x = (x - center) / torch.where(scale > 1e-12 * scale.max(), scale, torch.inf)
    y = y - middle
    left, values, right = torch.linalg.svd(x[train], full_matrices=False)
    projected = left.T @ y[train]
    best = (math.inf, torch.zeros_like(values))
    for ridge in _RIDGES:
        kept = values.square() / (values.square() + ridge * values[0].square().clamp(min=1e-300))
        leverage = left.square() @ kept + (1.0 / int(train.sum()) if intercept else 0.0)
        left_out = (y[train] - left @ (kept * projected)) / (1.0 - leverage).clamp(min=1e-12)
        best = min(best, (float(left_out.square().sum()), kept), key=lambda pair: pair[0])
    inverse = torch.where(values > 0, best[1] / torch.where(values > 0, values, 1.0), 0.0)
    predicted = x[test] @ (right.T @ (inverse * projected))
    total = float(y[test].square().sum())
    return 1.0 - float((y[test] - predicted).square().sum()) / total if total > 0 else math.nan


def _energy_target(structures: Structures, energy: Tensor, train: Tensor) -> Tensor:
    """(S,) energy per atom less what a fit to the composition of the training part gives."""
    composition = structures.composition()
    per_species = torch.linalg.lstsq(composition[train], energy[train], driver="gelsd").solution
    return (energy - composition @ per_species) / structures.n_atoms_per_system.clamp(min=1)


def _forces_r2(feature: Tensor, forces: Tensor, held_out: Tensor, vector: bool) -> float:
    """Score of (n, F) or (n, 3F) features for the (n, 3) forces on the same atoms."""
    if not vector:
        return ridge_r2(feature, torch.linalg.vector_norm(forces, dim=1), held_out)
    # One weight per channel for all three axes: what turns with the structure stays so.
    axes, held_out = feature.reshape(forces.numel(), -1), held_out.repeat_interleave(3)
    return ridge_r2(axes, forces.flatten(), held_out, intercept=False)
