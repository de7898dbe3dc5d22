"""What every teacher is: a named, fingerprinted source of labels that survives bad frames."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator, CalculationFailed, Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from torch import Tensor

from potstill.errors import ModelError, OptionalDependencyError, TeacherError, suggest
from potstill.features import Feature
from potstill.models import TapSpec
from potstill.properties import ASE_NAMES, property_spec
from potstill.structures import Properties, Structures


@dataclass(frozen=True)
class TeacherInfo:
    """Who a teacher is; written beside its labels.

    Parameters
    ----------
    name : str
        Short name; the name of its label set.
    fingerprint : str
        Hash of all that decides its answers: weights and hyper-parameters, or method, settings and
        version.
    licence, citation, level_of_theory : str
        In words; "unknown" where nobody said.
    versions : dict of str to str
        Packages that compute the labels.
    conservative : bool
        Whether forces are the negative gradient of the energy.
    """

    name: str
    fingerprint: str
    licence: str = "unknown"
    citation: str = "unknown"
    level_of_theory: str = "unknown"
    versions: dict[str, str] = field(default_factory=dict)
    conservative: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain strings and dicts, for metadata."""
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """A system of the batch that a teacher could not label, and why."""

    system: int
    reason: str


class Teacher(ABC):
    """Abstract base of all teachers.

    Subclasses set `info`, `properties` and, where batches pay, `batch_atoms`, and implement
    `compute`. A frame that fails is skipped and reported, never the whole batch.
    """

    #: Who this is.
    info: TeacherInfo

    #: Names of the properties that it can give.
    properties: frozenset[str]

    #: Frames are computed together up to this many atoms; zero means one at a time.
    batch_atoms: int = 0

    @property
    def name(self) -> str:
        """Short name."""
        return self.info.name

    @abstractmethod
    def compute(self, structures: Structures, properties: Sequence[str]) -> dict[str, Tensor]:
        """Compute properties of a batch, raising whatever goes wrong.

        Parameters
        ----------
        structures : Structures
            The batch.
        properties : sequence of str
            Names among `self.properties`.

        Returns
        -------
        dict of str to Tensor
            Float64, (S, ...) or (N, ...); stress is NaN where a system is not fully periodic.
        """

    @property
    def taps(self) -> Mapping[str, TapSpec]:
        """Internal features that it names, from its input to its output; others may go by path."""
        return {}

    @property
    def default_tap(self) -> str | None:
        """The last feature before its output."""
        return None

    def compute_features(self, structures: Structures, taps: Sequence[str]) -> dict[str, Feature]:
        """Compute internal features of a batch, raising whatever goes wrong.

        Parameters
        ----------
        structures : Structures
            The batch.
        taps : sequence of str
            Names among `self.taps`, or paths of submodules where the teacher is a torch module.

        Returns
        -------
        dict of str to Feature
            On the CPU, without a graph, in the precision that the teacher computes in.
        """
        raise TeacherError(f"the teacher '{self.name}' has no internal features to distill")

    def features(
        self,
        structures: Structures,
        taps: Sequence[str],
        like: Mapping[str, Feature] | None = None,
    ) -> tuple[dict[str, Feature], list[Failure]]:
        """Internal features of a batch.

        Parameters
        ----------
        structures : Structures
            The batch, on the CPU.
        taps : sequence of str
            As of `compute_features`.
        like : mapping, optional
            Earlier features, whose kind and width those have that no system of the batch has.

        Returns
        -------
        features : dict of str to Feature
            Not present in failed systems.
        failures : list of Failure
            The systems that failed.

        Raises
        ------
        TeacherError
            If the teacher has no features, or there is neither a system that it did not fail on nor
            an earlier feature.
        """
        names = tuple(dict.fromkeys(taps))
        parts: list[tuple[Structures, dict[str, Feature] | None]] = []
        failures: list[Failure] = []
        for _, part, result in self._batched(structures, self.compute_features, names):
            if isinstance(result, Failure):
                failures.append(result)
            parts.append((part, None if isinstance(result, Failure) else result))
        example = next((found for _, found in parts if found is not None), like)
        if example is None:
            reason = failures[0].reason if failures else "there are none"
            raise TeacherError(f"{self.name} has features of none of the structures: {reason}")
        if not parts:
            return {name: example[name].absent(structures) for name in names}, failures
        sizes = [part for part, _ in parts]
        return {
            name: Feature.concatenate(
                [
                    example[name].absent(part) if found is None else found[name]
                    for part, found in parts
                ],
                sizes,
            )
            for name in names
        }, failures

    def to(self, device: torch.device | str) -> Teacher:
        """Compute on another device, where the teacher can choose; returns itself."""
        return self

    def require(self, properties: Iterable[str]) -> None:
        """Check that this teacher can give all of these properties.

        Raises
        ------
        TeacherError
            If it cannot.
        """
        for name in properties:
            property_spec(name)
            if name not in self.properties:
                raise TeacherError(
                    f"the teacher '{self.name}' does not give '{name}'"
                    f"{suggest(name, self.properties)}"
                )

    def label(
        self, structures: Structures, properties: Sequence[str]
    ) -> tuple[Properties, list[Failure]]:
        """Label a batch.

        Parameters
        ----------
        structures : Structures
            The batch.
        properties : sequence of str
            What to compute.

        Returns
        -------
        labels : Properties
            Float64; NaN and absent in failed systems. Stress is absent, too, in systems that are
            not periodic along all axes.
        failures : list of Failure
            The systems that failed.

        Raises
        ------
        TeacherError
            If a property is not among those of this teacher.
        """
        names = tuple(dict.fromkeys(properties))
        self.require(names)
        offsets = structures.atom_offsets.tolist()
        values = {name: _absent(name, structures) for name in names}
        present = {name: torch.zeros(structures.n_systems, dtype=torch.bool) for name in names}
        failures = []
        for s, row in self._rows(structures, names):
            if isinstance(row, Failure):
                failures.append(row)
                continue
            periodic = bool(structures.pbc[s].all())
            given = [n for n in names if periodic or n not in ("stress", "stress_std")]
            broken = [n for n in given if not bool(torch.isfinite(row[n]).all())]
            if broken:
                failures.append(Failure(s, f"{' and '.join(broken)} not finite"))
                continue
            for name in given:
                per_system = property_spec(name).level == "system"
                place = slice(s, s + 1) if per_system else slice(offsets[s], offsets[s + 1])
                values[name][place] = row[name]
                present[name][s] = True
        return Properties(values, present), failures

    def ase_calculator(self) -> BaseCalculator:
        """Return an ASE calculator that answers as this teacher, for molecular dynamics."""
        return TeacherCalculator(self)

    def _rows(
        self, structures: Structures, names: tuple[str, ...]
    ) -> Iterator[tuple[int, Properties | Failure]]:
        """Yield results system by system."""

        def compute(part: Structures, names: Sequence[str]) -> Properties:
            return Properties(self.compute(part, names))  # refuses wrong shapes

        for first, part, result in self._batched(structures, compute, names):
            if isinstance(result, Failure):
                yield first, result
                continue
            for k in range(part.n_systems):
                yield first + k, result.select([k], part)

    def _batched(
        self,
        structures: Structures,
        compute: Callable[[Structures, Sequence[str]], Any],
        names: tuple[str, ...],
    ) -> Iterator[tuple[int, Structures, Any]]:
        """Yield (first system, systems, results) by batch, in order.

        A batch that fails is tried again one system at a time; what fails then is a `Failure`.
        """
        queue = [b.tolist() for b in reversed(structures.batches(self.batch_atoms))]
        while queue:
            systems = queue.pop()
            part = structures.select(systems)
            try:
                result = compute(part, names)
            except (TeacherError, ModelError, OptionalDependencyError, MemoryError):
                raise
            except Exception as error:
                # Foreign codes raise anything. One frame's failure is an answer, not an accident.
                if len(systems) > 1:
                    queue.extend([s] for s in reversed(systems))
                    continue
                reason = " ".join(str(error).split()) or type(error).__name__
                yield systems[0], part, Failure(systems[0], reason[:300])
            else:
                yield systems[0], part, result


class TeacherCalculator(Calculator):
    """ASE calculator that asks a teacher; errors of a frame are ASE's `CalculationFailed`."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.conservative = teacher.info.conservative
        self.signals = {n: a for n, a in ASE_NAMES.items() if n in teacher.properties}
        self.implemented_properties = [*self.signals.values(), "free_energy"]

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute everything that the teacher gives besides spreads."""
        super().calculate(atoms, properties, system_changes)
        structures = Structures.from_ase(self.atoms)
        labels, failures = self.teacher.label(structures, list(self.signals))
        if failures:
            raise CalculationFailed(f"{self.teacher.name}: {failures[0].reason}")
        for name, ase_name in self.signals.items():
            if not bool(labels.presence(name, 1)[0]):
                continue
            value = labels[name].numpy()
            value = value[0] if property_spec(name).level == "system" else value
            self.results[ase_name] = value
        self.results["energy"] = float(self.results["energy"])
        self.results["free_energy"] = self.results["energy"]
        if "stress" in self.results:
            self.results["stress"] = full_3x3_to_voigt_6_stress(self.results["stress"])


def ask_ase_calculator(
    calculator: BaseCalculator,
    structures: Structures,
    properties: Sequence[str],
    *,
    force_consistent: bool = True,
    prepare: Callable[[ase.Atoms], None] | None = None,
) -> dict[str, Tensor]:
    """Compute properties of a batch with an ASE calculator, one system at a time.

    Parameters
    ----------
    calculator : ase calculator
        Its raw results are taken: constraints do not zero forces.
    structures : Structures
        The batch.
    properties : sequence of str
        Names among `ASE_NAMES`.
    force_consistent : bool
        Take ASE's `free_energy` for the energy where the calculator has one: the energy that
        forces derive from.
    prepare : callable, optional
        Called with each system before it is computed, to set charges for instance.

    Returns
    -------
    dict of str to Tensor
        As `Teacher.compute`.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in properties}
    has_free_energy = "free_energy" in calculator.implemented_properties
    for atoms in structures.to_ase():
        if prepare is not None:
            prepare(atoms)
        for name in properties:
            spec = property_spec(name)
            if name == "stress" and not atoms.pbc.all():
                columns[name].append(np.full((1, 3, 3), np.nan))
                continue
            key = ASE_NAMES[name]
            if name == "energy" and force_consistent and has_free_energy:
                key = "free_energy"
            value = np.asarray(calculator.get_property(key, atoms), dtype=np.float64)
            if name == "stress" and value.shape != (3, 3):
                value = voigt_6_to_full_3x3_stress(value)
            rows = 1 if spec.level == "system" else len(atoms)
            columns[name].append(value.reshape(rows, *spec.shape))
    return {
        name: torch.from_numpy(np.concatenate(column))
        if column
        else torch.zeros(0, *property_spec(name).shape, dtype=torch.float64)
        for name, column in columns.items()
    }


def fingerprint_of(*parts: Any) -> str:
    """Short stable hash of bytes, strings, numbers, lists and dicts."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True, default=str).encode()
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of the installed packages among those named."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _absent(name: str, structures: Structures) -> Tensor:
    spec = property_spec(name)
    rows = structures.n_systems if spec.level == "system" else structures.n_atoms
    return torch.full((rows, *spec.shape), torch.nan, dtype=torch.float64)
