"""What every teacher is: a named, fingerprinted source of labels that survives bad frames."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import ase
import torch
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from potstill.errors import ModelError, OptionalDependencyError, TeacherError, suggest
from potstill.features import Feature
from potstill.isolation import FrameError
from potstill.models import TapSpec
from potstill.properties import ASE_NAMES, property_spec
from potstill.ragged import Rows
from potstill.structures import Properties, Structures, absent
from potstill.worker import reason_of

#: Atomic energies must add up to the energy within this, in eV/atom, or within the same fraction
#: of the energy per atom where that is larger than 1 eV.
SUM_TOLERANCE = 1e-6

_WORDS = ("license", "citation", "level_of_theory")


@dataclass(frozen=True)
class TeacherInfo:
    """Identity of a teacher, written beside its labels.

    Parameters
    ----------
    name : str
        Short name; the name of its label set.
    fingerprint : str
        Hash of all that decides its answers: weights and hyper-parameters, or method, settings and
        version.
    license, citation, level_of_theory : str
        In words; "unknown" if not given.
    versions : dict of str to str
        Packages that compute the labels.
    conservative : bool
        Whether forces are the negative gradient of the energy.
    """

    name: str
    fingerprint: str
    license: str = "unknown"
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
        """Internal features of a batch, by taps as of `compute_features`.

        `like` are earlier features, whose kind and width those have that no system of the batch
        has.

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
        sizes: list[Structures] = []
        answers: list[dict[str, Feature] | Failure] = []
        for _, part, result in self._batched(structures, self.compute_features, names):
            sizes.append(part)
            answers.append(result)
        failures = [answer for answer in answers if isinstance(answer, Failure)]
        example = next((answer for answer in answers if not isinstance(answer, Failure)), like)
        if not example:
            reason = failures[0].reason if failures else "there are none"
            raise TeacherError(f"{self.name} has features of none of the structures: {reason}")
        if not answers:
            return {name: example[name].absent(structures) for name in names}, failures
        features = {}
        for name in names:
            parts = [
                example[name].absent(part) if isinstance(answer, Failure) else answer[name]
                for part, answer in zip(sizes, answers, strict=True)
            ]
            features[name] = Feature.concatenate(parts, sizes)
        return features, failures

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
            If a property is not among those of this teacher, or its atomic energies do not sum to
            its energy.
        """
        names = tuple(dict.fromkeys(properties))
        self.require(names)
        if "atomic_energies" in names and "energy" not in names and "energy" in self.properties:
            labels, failures = self.label(structures, ("energy", *names))
            return labels.only(names), failures
        values = {name: absent(name, structures) for name in names}
        done = torch.zeros(structures.n_systems, dtype=torch.bool)
        failures = []

        def compute(part: Structures, names: Sequence[str]) -> Properties:
            return Properties(self.compute(part, names))  # refuses wrong shapes

        for rows, _, result in self._batched(structures, compute, names):
            if isinstance(result, Failure):
                failures.append(result)
                continue
            done[rows.systems] = True
            for name in names:
                place, value = rows.of(name), result[name]
                if len(value) != len(place):
                    raise TeacherError(
                        f"the teacher '{self.name}' gives {len(value)} rows of '{name}', and there "
                        f"are {len(place)} {property_spec(name).level}s"
                    )
                values[name][place] = value
        periodic = structures.pbc.all(dim=1)
        present = {n: done & periodic if n in ("stress", "stress_std") else done for n in names}
        system = torch.arange(len(done))
        broken: dict[int, list[str]] = {}
        for name, given in present.items():
            bad = (~values[name].isfinite()).nonzero()[:, 0]
            bad = structures.per_row(name, system)[bad]
            for s in bad[given[bad]].unique().tolist():
                broken.setdefault(s, []).append(name)
        failures += [Failure(s, f"{' and '.join(found)} not finite") for s, found in broken.items()]
        failures.sort(key=lambda failure: failure.system)
        done[list(broken)] = False
        for name in names:
            present[name] = present[name] & done
            values[name][~structures.per_row(name, present[name])] = torch.nan
        labels = Properties(values, present)
        self._check_sums(labels, structures)
        return labels, failures

    def ase_calculator(self) -> BaseCalculator:
        """Return an ASE calculator that answers as this teacher, for molecular dynamics."""
        return TeacherCalculator(self)

    def _batched(
        self,
        structures: Structures,
        compute: Callable[[Structures, Sequence[str]], Any],
        names: tuple[str, ...],
    ) -> Iterator[tuple[Rows, Structures, Any]]:
        """Yield (rows, systems, results) by batch, in order.

        A batch that fails is tried again one system at a time; what fails then is a `Failure`.
        """
        offsets, queue = structures.atom_offsets, structures.batches(self.batch_atoms)[::-1]
        while queue:
            rows = Rows.at(offsets, queue.pop())
            part, first = structures.select(rows), int(rows.systems[0])
            home = os.getcwd()
            try:
                result = compute(part, names)
            except FrameError as error:
                result = Failure(first, error.reason)
            except (TeacherError, ModelError, OptionalDependencyError, MemoryError):
                raise
            except (Exception, SystemExit) as error:
                # Foreign codes raise anything. One frame's failure is an answer, not an accident.
                result = Failure(first, reason_of(error))
            finally:
                with contextlib.suppress(OSError):
                    os.chdir(home)
            if isinstance(result, Failure) and len(part) > 1:
                queue.extend(rows.systems.flip(0).split(1))
            else:
                yield rows, part, result

    def _check_sums(self, labels: Properties, structures: Structures) -> None:
        """Refuse atomic energies that do not sum to the energy: training on both contradicts."""
        if "energy" not in labels or "atomic_energies" not in labels:
            return
        energy = labels["energy"]
        total = structures.sum_by_system(labels["atomic_energies"])
        per_atom = structures.n_atoms_per_system.clamp(min=1)
        gap = (total - energy).abs() / per_atom
        limit = SUM_TOLERANCE * (energy.abs() / per_atom).clamp(min=1.0)
        for system in (gap > limit).nonzero().flatten().tolist():
            raise TeacherError(
                f"the atomic energies of the teacher '{self.name}' do not sum to its energy in "
                f"{structures.name_of(system)}: they are off by {float(gap[system]):.3g} eV/atom"
            )


class TeacherCalculator(Calculator):
    """ASE calculator that asks a teacher; failures of a frame are `FrameError`."""

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
            raise FrameError(self.teacher.name, failures[0].reason)
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


def stated(about: Mapping[str, Any]) -> dict[str, str]:
    """License, citation and level of theory, as far as they are given."""
    if "licence" in about:  # its spelling in older files
        about = {**about, "license": about["licence"]}
    return {key: str(about[key]) for key in _WORDS if key in about}


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
