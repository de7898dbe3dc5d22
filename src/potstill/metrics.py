"""Exact streaming metrics: errors of predictions against labels, gathered batch by batch.

Everything is kept as float64 sums, never as averages of batches, so that the result does not
depend on how a set was cut into batches or spread over processes.

| key of `compute()` | meaning | unit |
|---|---|---|
| `energy_mae`, `energy_rmse` | total energy, per configuration | eV |
| `energy_per_atom_mae`, `_rmse` | total energy over the number of atoms | eV |
| `forces_mae`, `forces_rmse` | per Cartesian component, all atoms | eV/Å |
| `forces_cosine` | mean over atoms of the cosine between predicted and labeled force | 1 |
| `free_forces_...` | all of `forces_...` over the atoms that are not fixed, where some are | |
| `forces_relative_rmse` | `forces_rmse` over the standard deviation of the labels' components | 1 |
| `stress_mae`, `stress_rmse` | per component of the nine | eV/Å³ |
| `atomic_energies_mae`, `_rmse` | per atom | eV |
| `efwt` | frames with abs(dE) < 0.02 eV and max abs(dF) < 0.03 eV/Å over free atoms | % |
| `<name>_n`, `efwt_n` | numbers compared: configurations, components, atoms | 1 |

`S2EFAccumulator` has OC20's four metrics, over free atoms, with standard errors.

Charges and dipoles are treated like atomic energies and stresses. What was never present is left
out of the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from potstill.errors import DataError
from potstill.properties import property_spec
from potstill.structures import Properties, Structures
from potstill.units import GPA

#: Thresholds of EFwT, "energy and forces within threshold" (Chanussot et al., OC20): eV, eV/Å.
EFWT_ENERGY = 0.02
EFWT_FORCE = 0.03

# -- vocabulary ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """How one metric is shown.

    Parameters
    ----------
    key : str
        Its key in the numbers.
    name : str
        In words, as the start of a label.
    unit : str
        Unit that is shown; "" for pure numbers.
    scale : float
        The number shown per number stored.
    lower_is_better : bool
        False for cosines and EFwT.
    """

    key: str
    name: str
    unit: str = ""
    scale: float = 1.0
    lower_is_better: bool = True

    @property
    def label(self) -> str:
        """Name and unit, for axes and columns."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def _vocabulary() -> tuple[Metric, ...]:
    """All metrics; the three kinds of force error are named once, over all and over free atoms."""
    forces = [
        row
        for prefix, whose in (("forces", ""), ("free_forces", " (free atoms)"))
        for row in (
            Metric(f"{prefix}_rmse", f"Force RMSE{whose}", "eV/Å"),
            Metric(f"{prefix}_mae", f"Force MAE{whose}", "eV/Å"),
            Metric(f"{prefix}_relative_rmse", f"Rel. force RMSE{whose}", "%", 100.0),
            Metric(f"{prefix}_cosine", f"Force cosine{whose}", lower_is_better=False),
        )
    ]
    return (
        *forces,
        Metric("energy_per_atom_rmse", "Energy RMSE", "meV/atom", 1e3),
        Metric("energy_per_atom_mae", "Energy MAE", "meV/atom", 1e3),
        Metric("energy_rmse", "Total energy RMSE", "eV"),
        Metric("energy_mae", "Total energy MAE", "eV"),
        Metric("atomic_energies_rmse", "Atomic energy RMSE", "meV", 1e3),
        Metric("atomic_energies_mae", "Atomic energy MAE", "meV", 1e3),
        Metric("stress_rmse", "Stress RMSE", "GPa", 1.0 / GPA),
        Metric("stress_mae", "Stress MAE", "GPa", 1.0 / GPA),
        Metric("efwt", "EFwT", "%", lower_is_better=False),
        Metric("rdf_error", "RDF error", "Å"),
        Metric("rdf_noise", "RDF error within noise", "Å"),
        Metric("rdf_divergence", "RDF divergence", "bits"),
        Metric("adf_error", "ADF error"),
        Metric("adf_noise", "ADF error within noise"),
        Metric("adf_divergence", "ADF divergence", "bits"),
        Metric("cdf_error", "CDF error", "Å"),
        Metric("cdf_noise", "CDF error within noise", "Å"),
        Metric("cdf_divergence", "CDF divergence", "bits"),
        Metric("coordination_error", "Coordination error"),
        Metric("coordination_noise", "Coordination error within noise"),
        Metric("coordination_divergence", "Coordination divergence", "bits"),
        Metric("internal_error", "Internal coordinate error"),
        Metric("internal_noise", "Internal coordinate error within noise"),
        Metric("internal_divergence", "Internal coordinate divergence", "bits"),
        Metric("free_energy_error", "Dihedral map error"),
        Metric("free_energy_noise", "Dihedral map error within noise"),
        Metric("free_energy_divergence", "Dihedral map divergence", "bits"),
        Metric("rdf_error_reference", "RDF error to the reference", "Å"),
        Metric("time_per_step_atom_us", "Time per step and atom", "µs"),
        Metric("memory_per_atom_kib", "Memory per atom", "KiB"),
        Metric("samples_per_second", "Structures per second", "1/s", lower_is_better=False),
        Metric("lattice_constant", "Lattice constant a", "Å"),
        Metric("volume_per_atom", "Volume per atom", "Å³"),
        Metric("bulk_modulus", "Bulk modulus, E(V)", "GPa"),
        Metric("bulk_modulus_derivative", "dB/dp"),
        Metric("c11", "C11", "GPa"),
        Metric("c12", "C12", "GPa"),
        Metric("c44", "C44", "GPa"),
        Metric("elastic_bulk_modulus", "Bulk modulus, elastic", "GPa"),
        Metric(
            "elastic_change_with_strain",
            "Elastic change with strain",
            "%",
            100.0,
        ),
        Metric("elastic_deviation", "Elastic deviation, largest", "%", 100.0),
        Metric("lowest_frequency", "Lowest vibration", "1/cm"),
        Metric("highest_frequency", "Highest vibration", "1/cm"),
        Metric("vibrations_rmse", "RMS deviation of vibrations from the teacher's", "1/cm"),
        Metric("phonon_lowest", "Lowest phonon", "THz"),
        Metric("phonon_highest", "Highest phonon", "THz"),
        Metric("phonon_rmse", "Phonon RMSE", "THz"),
        Metric("phonon_largest_deviation", "Phonon deviation, largest", "THz"),
        Metric("vacancy_formation", "Vacancy formation energy", "eV"),
        Metric("defects_deviation", "Deviation of vacancy and surfaces, largest", "%", 100.0),
        Metric("zero_point_lattice_constant", "Lattice constant a with zero point", "Å"),
        Metric("thermal_lattice_constant", "Lattice constant a, quasi-harmonic", "Å"),
        Metric("thermal_lattice_deviation", "Deviation of a, quasi-harmonic", "%", 100.0),
        Metric("thermal_expansion", "Linear thermal expansion", "10⁻⁶/K", 1e6),
        Metric("thermal_expansion_deviation", "Deviation of thermal expansion", "10⁻⁶/K", 1e6),
        Metric("heat_capacity", "Heat capacity C_p", "J/(mol K)"),
        Metric("diffusion_coefficient", "Diffusion coefficient", "10⁻⁹ m²/s"),
        Metric("diffusion_coefficient_error", "Standard error of diffusion", "10⁻⁹ m²/s"),
        Metric("diffusion_speedup", "Diffusion, times the reference's", lower_is_better=False),
        Metric("diffusion_speedup_error", "Standard error of the times"),
        Metric("density", "Density", "g/cm³"),
        Metric("density_error", "Standard error of the density", "g/cm³"),
        Metric("pressure", "Pressure", "bar"),
        Metric("pressure_error", "Standard error of the pressure", "bar"),
        Metric("melting_point", "Melting point", "K"),
        Metric("melting_point_error", "Standard error of the melting point", "K"),
        Metric("nve_drift", "NVE drift", "meV/atom"),
        Metric("nve_slope", "NVE slope", "meV/atom/ps"),
        Metric("nve_fluctuation", "NVE fluctuation", "meV/atom"),
        Metric("nve_duration", "NVE duration", "ps"),
        Metric("failed_runs", "Runs that failed"),
        Metric("mean_force_rmse", "Mean-force RMSE", "eV/Å"),
    )


#: The vocabulary: what every number of a result, a report and a study is called and shown as.
METRICS: dict[str, Metric] = {metric.key: metric for metric in _vocabulary()}
#: Metrics of which there are several, by what their keys start with: `surface_111`.
FAMILIES: dict[str, Metric] = {"surface": Metric("surface", "Surface energy", "J/m²")}


def metric_of(key: str) -> Metric:
    """The metric of a key; one without a row here is shown by its key in words."""
    start, _, which = key.partition("_")
    if start in FAMILIES:
        return replace(FAMILIES[start], key=key, name=f"{FAMILIES[start].name} ({which})")
    return METRICS.get(key) or Metric(key, key.replace("_", " ").capitalize())


def force_key(metrics: Mapping[str, float], kind: str = "rmse") -> str:
    """Key of the force error to quote: over free atoms where atoms are fixed, else over all."""
    free = f"free_forces_{kind}"
    return free if free in metrics else f"forces_{kind}"


# -- errors of predictions -------------------------------------------------------------------------

# The state is one row of sums per channel; cosines and EFwT use two columns only.
_CHANNELS = (
    "energy",
    "energy_per_atom",
    "forces",
    "stress",
    "atomic_energies",
    "charges",
    "dipole",
    "free_forces",
    "forces_cosine",
    "free_forces_cosine",
    "efwt",
)
_COUNT, _ABSOLUTE, _SQUARE, _LABEL, _LABEL_SQUARE = range(5)
_N_COLUMNS = 5


class _Sums:
    """Float64 sums, one row per metric, whose states add up over batches and over processes."""

    _sums: Tensor

    def state(self) -> Tensor:
        """Return a copy of all sums as one flat float64 tensor; states add."""
        return self._sums.flatten().clone()

    def load_state(self, state: Tensor) -> None:
        """Replace all sums by those of a state (or of a sum of states).

        Raises
        ------
        DataError
            If the state has the wrong length.
        """
        if state.numel() != self._sums.numel():
            raise DataError(
                f"a state of metrics has {self._sums.numel()} numbers, not {state.numel()}"
            )
        self._sums = state.to(self._sums).reshape(self._sums.shape).clone()


class ErrorAccumulator(_Sums):
    """Sums of errors over any number of batches, on the device of the batches.

    Weights are not used: a metric counts every present value once. States of several accumulators
    add up, so ranks may all-reduce `state()` by summation and `load_state()` the result.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(len(_CHANNELS), _N_COLUMNS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, prediction: Properties, label: Properties, structures: Structures) -> None:
        """Add one batch.

        Only properties in both `prediction` and `label` are compared, and of these only systems
        where both are present and no number of the label is NaN. A predicted NaN does count, and
        makes the metric NaN: a model that blows up must not look good.

        Raises
        ------
        DataError
            If the numbers of rows of prediction, label and batch differ.
        """
        compared: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name in _CHANNELS:
            if name in prediction and name in label:
                compared[name] = _aligned(name, prediction, label, structures)
                self._add_errors(name, *compared[name])
        if "energy" in compared:
            n_atoms = structures.n_atoms_per_system.clamp(min=1).unsqueeze(1)
            predicted, labeled, present = compared["energy"]
            self._add_errors("energy_per_atom", predicted / n_atoms, labeled / n_atoms, present)
        if "forces" in compared:
            self._add_cosine("forces_cosine", *compared["forces"])
            if structures.fixed is not None:
                predicted, labeled, present = compared["forces"]
                present = present & ~structures.fixed
                self._add_errors("free_forces", predicted, labeled, present)
                self._add_cosine("free_forces_cosine", predicted, labeled, present)
        if "energy" in compared and "forces" in compared:
            within, present = _within_thresholds(compared["energy"], compared["forces"], structures)
            self._add("efwt", _COUNT, present.sum())
            self._add("efwt", _ABSOLUTE, within.sum())

    def compute(self) -> dict[str, float]:
        """Return all metrics of what has been seen, by the keys of this module's table."""
        result: dict[str, float] = {}
        rows = dict(zip(_CHANNELS, self._sums.tolist(), strict=True))
        cosines = {name: rows.pop(name) for name in ("forces_cosine", "free_forces_cosine")}
        efwt = rows.pop("efwt")
        for name, row in rows.items():
            count = row[_COUNT]
            if not count:
                continue
            result[f"{name}_mae"] = row[_ABSOLUTE] / count
            result[f"{name}_rmse"] = math.sqrt(row[_SQUARE] / count)
            result[f"{name}_n"] = count
        for name in ("forces", "free_forces"):
            if rows[name][_COUNT]:
                spread, rmse = _standard_deviation(rows[name]), result[f"{name}_rmse"]
                result[f"{name}_relative_rmse"] = rmse / spread if spread > 0 else math.nan
        for name, row in cosines.items():
            if row[_COUNT]:
                result[name] = row[_ABSOLUTE] / row[_COUNT]
        if efwt[_COUNT]:
            result["efwt"] = 100.0 * efwt[_ABSOLUTE] / efwt[_COUNT]
            result["efwt_n"] = efwt[_COUNT]
        return result

    def _add(self, channel: str, column: int, value: Tensor) -> None:
        self._sums[_CHANNELS.index(channel), column] += value.to(self._sums)

    def _add_errors(
        self, channel: str, predicted: Tensor, labeled: Tensor, present: Tensor
    ) -> None:
        """Add (rows, n) predictions and labels where the (rows,) mask says so."""
        mask = present.unsqueeze(1)
        # where(), not boolean indexing: no synchronization with a GPU and no NaN from absent rows
        error = torch.where(mask, predicted - labeled, 0.0)
        known = torch.where(mask, labeled, 0.0)
        self._add(channel, _COUNT, present.sum() * predicted.shape[1])
        self._add(channel, _ABSOLUTE, error.abs().sum())
        self._add(channel, _SQUARE, error.square().sum())
        self._add(channel, _LABEL, known.sum())
        self._add(channel, _LABEL_SQUARE, known.square().sum())

    def _add_cosine(
        self, channel: str, predicted: Tensor, labeled: Tensor, present: Tensor
    ) -> None:
        """Add cosines of atoms whose labeled force is not zero; a predicted zero counts as 0."""
        length = torch.linalg.vector_norm(labeled, dim=1)
        counted = present & (length > 0)
        product = length * torch.linalg.vector_norm(predicted, dim=1)
        dot = (predicted * labeled).sum(1)
        cosine = torch.where(product == 0, 0.0, dot / torch.where(product == 0, 1.0, product))
        self._add(channel, _COUNT, counted.sum())
        self._add(channel, _ABSOLUTE, torch.where(counted, cosine, 0.0).sum())


# -- OC20's task ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over a sample of frames.

    Parameters
    ----------
    value : float
        The mean.
    standard_error : float
        Of the mean, as if the frames were independent of one another; NaN for a single frame.
        Frames of one relaxation are not: it is then too small.
    n : int
        Frames.
    """

    value: float
    standard_error: float
    n: int


#: Metrics of OC20's S2EF task and their units.
S2EF_METRICS = {
    "energy_mae": "eV",
    "free_forces_mae": "eV/Å",
    "free_forces_cosine": "1",
    "efwt": "%",
}


class S2EFAccumulator(_Sums):
    """The metrics of OC20's task "structure to energy and forces", over free atoms.

    As in the evaluator of the Open Catalyst Project: `energy_mae` of total energies per frame;
    `free_forces_mae` over the components of all free atoms of all frames; `free_forces_cosine`, the
    mean over the same atoms of the cosine between predicted and labeled force, zero where either
    vanishes; `efwt`, the percentage of frames with an energy error below 0.02 eV and all force
    components within 0.03 eV/Å.

    Each is a ratio of two sums over frames, so five sums more give its standard error to first
    order, and states of several accumulators add up, over batches and over ranks.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(len(S2EF_METRICS), 6, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, prediction: Properties, label: Properties, structures: Structures) -> None:
        """Add one batch; frames without labels of energy and forces are left out.

        Raises
        ------
        DataError
            If the numbers of rows of prediction, label and batch differ.
        """
        energy = _aligned("energy", prediction, label, structures)
        forces = _aligned("forces", prediction, label, structures)
        within, present = _within_thresholds(energy, forces, structures)
        free = structures.free
        difference = (forces[0] - forces[1]).abs().sum(dim=1)
        cosine = cosine_similarity(forces[0], forces[1], dim=1)
        n_free = structures.sum_by_system(free.to(torch.float64))
        rows = {
            "energy_mae": ((energy[0] - energy[1]).abs().flatten(), torch.ones_like(n_free)),
            "free_forces_mae": (
                structures.sum_by_system(torch.where(free, difference, 0.0)),
                3 * n_free,
            ),
            "free_forces_cosine": (
                structures.sum_by_system(torch.where(free, cosine, 0.0)),
                n_free,
            ),
            "efwt": (100.0 * within, torch.ones_like(n_free)),
        }
        for k, name in enumerate(S2EF_METRICS):
            a, b = (torch.where(present, value.to(torch.float64), 0.0) for value in rows[name])
            sums = [present.sum(), a.sum(), b.sum(), a @ a, a @ b, b @ b]
            self._sums[k] += torch.stack([x.to(self._sums) for x in sums])

    def compute(self) -> dict[str, Estimate]:
        """Return the four metrics of what has been seen; empty if there were no frames."""
        found = {}
        for name, row in zip(S2EF_METRICS, self._sums.tolist(), strict=True):
            n, a, b, aa, ab, bb = row
            if n and b:
                ratio = a / b
                scatter = max(aa - 2.0 * ratio * ab + ratio**2 * bb, 0.0)
                error = math.sqrt(n / (n - 1.0) * scatter) / b if n > 1 else math.nan
                found[name] = Estimate(ratio, error, int(n))
        return found


def _within_thresholds(
    energy: tuple[Tensor, Tensor, Tensor],
    forces: tuple[Tensor, Tensor, Tensor],
    structures: Structures,
) -> tuple[Tensor, Tensor]:
    """(S,) whether energy and free atoms' forces are within EFwT's thresholds; (S,) if known."""
    energy_error = (energy[0] - energy[1]).abs().flatten()
    force_error = (forces[0] - forces[1]).abs().amax(dim=1)
    if structures.fixed is not None:
        force_error = torch.where(structures.fixed, 0.0, force_error)
    # "not within" also catches NaN, which "within" and amax would treat differently by device
    n_beyond = structures.sum_by_system((~(force_error < EFWT_FORCE)).to(energy_error))
    n_present = structures.sum_by_system(forces[2].to(energy_error))
    n_atoms = structures.n_atoms_per_system
    present = energy[2] & (n_present == n_atoms) & (n_atoms > 0)
    return present & (energy_error < EFWT_ENERGY) & (n_beyond == 0), present


def _aligned(
    name: str, prediction: Properties, label: Properties, structures: Structures
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, n) prediction and label in float64, and the (rows,) mask of what is compared."""
    spec = property_spec(name)
    level, width, rows = spec.level, math.prod(spec.shape), structures.n_rows(name)
    predicted, labeled = prediction[name], label[name]
    for what, value in (("prediction", predicted), ("label", labeled)):
        if value.shape[0] != rows:
            raise DataError(
                f"the {what} of {name} has {value.shape[0]} rows, but the batch has {rows} {level}s"
            )
    predicted = predicted.detach().to(torch.float64).reshape(rows, width)
    labeled = labeled.detach().to(torch.float64).reshape(rows, width)
    n_systems = structures.n_systems
    present = prediction.presence(name, n_systems) & label.presence(name, n_systems)
    known = ~labeled.isnan().any(dim=1)
    if level == "system":
        return predicted, labeled, present & known
    unknown = structures.sum_by_system((~known).to(torch.int64))
    return predicted, labeled, (present & (unknown == 0))[structures.system_index]


def _standard_deviation(row: list[float]) -> float:
    mean = row[_LABEL] / row[_COUNT]
    return math.sqrt(max(row[_LABEL_SQUARE] / row[_COUNT] - mean**2, 0.0))
