"""Data sections of configs: files and stores, split into training, validation and test sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from potstill.distill import FeatureTerm
from potstill.errors import DataError, suggest
from potstill.features import Feature
from potstill.readers import (
    KeyMap,
    Units,
    read,
    split_by_blocks,
    split_by_group,
    split_by_seed,
    split_from_file,
)
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.train import TrainingSet
from potstill.workflows.base import Settings, one_of


class FileSource(Settings):
    """A file, and how it is read; its path alone is enough.

    Parameters
    ----------
    path : str
        Path of the file, relative to the working directory.
    format : str, optional
        File format, as in `potstill.readers.read`; detected by default.
    keys : dict
        Names of the labels in the file, as in `KeyMap`: `{energy: dft_energy}`.
    units : dict
        Units of the file, as in `Units`: `{energy: Hartree, length: Angstrom}`.
    index : str
        Frames to read: `:100`, `::10`.
    """

    path: str
    format: str | None = None
    keys: dict[str, str] = Field(default_factory=dict)
    units: dict[str, str] = Field(default_factory=dict)
    index: str = ":"

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("keys", "units")
    @classmethod
    def _known(cls, value: dict[str, str], info: Any) -> dict[str, str]:
        known = [f.name for f in fields(KeyMap if info.field_name == "keys" else Units)]
        for name in value:
            if name not in known:
                raise ValueError(f"there is no '{name}'{suggest(name, known)}")
        return value


class FileData(FileSource):
    """A file with structures and reference labels; its path alone is enough.

    Parameters
    ----------
    require : tuple of str
        Labels that every frame must have.
    allow_partial : bool
        Accept frames that lack labels others have.
    species : tuple of str, optional
        Elements that may occur, in the order of the species table.
    """

    require: tuple[str, ...] = ()
    allow_partial: bool = False
    species: tuple[str, ...] | None = None

    def read(self) -> tuple[Structures, Properties]:
        """Read the file."""
        return read(
            self.path,
            format=self.format,
            keys=KeyMap(**self.keys),
            units=Units(**self.units),  # type: ignore[arg-type]
            require=self.require,
            allow_partial=self.allow_partial,
            index=self.index,
            species=self.species,
        )


class SplitData(Settings):
    """How to split: by seed, in blocks of time, by group, or from a file.

    Parameters
    ----------
    seed : int
        Seed of a random split.
    fractions : dict of str to float
        Fraction of each part; parts other than train, validation and test are not used.
    blocks : int, optional
        Deal out so many consecutive blocks of frames, rather than frames: those of a trajectory
        are like their neighbors.
    of_every_group : bool
        Hold out the validation fraction of every group and train on the rest.
    groups : dict of str to tuple of str, optional
        Names or patterns of the groups in each part; all others are for training.
    file : str, optional
        Split file to read instead: a JSON object of lists of indices.
    """

    seed: int = 0
    fractions: dict[str, float] = Field(
        default_factory=lambda: {"train": 0.8, "validation": 0.1, "test": 0.1}
    )
    blocks: int | None = Field(default=None, ge=2)
    of_every_group: bool = False
    groups: dict[str, tuple[str, ...]] | None = None
    file: str | None = None

    def split(self, structures: Structures) -> dict[str, Tensor]:
        """Indices of the systems of each part."""
        if self.file is not None:
            return split_from_file(self.file, structures.n_systems)
        if self.groups is not None:
            return split_by_group(structures.group or (), self.groups)
        if self.of_every_group:
            held_out = share_of_groups(structures, self.fractions["validation"], self.seed)
            return {"train": (~held_out).nonzero()[:, 0], "validation": held_out.nonzero()[:, 0]}
        if self.blocks is not None:
            n = structures.n_systems
            return split_by_blocks(n, self.blocks, self.fractions, self.seed)
        return split_by_seed(structures.n_systems, self.fractions, self.seed)


class SyntheticData(Settings):
    """Structures generated with a model, added to the training set; see `train.mixing`.

    Parameters
    ----------
    store : str, optional
        Label store with the structures.
    files : tuple of FileData
        Labeled files, instead of a store.
    source : str
        Label set of the store to use.
    counts_as : str
        Source that these labels count as in the loss: with `reference` they join the reference
        labels, as in the paper. They keep their own name as well.
    """

    store: str | None = None
    files: tuple[FileData, ...] = ()
    source: str = "reference"
    counts_as: str = "reference"

    _one_origin = one_of("store", "files")

    def load(self) -> TrainingSet:
        """Read it, with the labels under both names."""
        structures, labels = read_labeled(self.store, self.files, self.source)
        return TrainingSet(structures, {self.source: labels, self.counts_as: labels})


class DataSettings(Settings):
    """Where structures and labels come from, and how they are split.

    Parameters
    ----------
    store : str, optional
        Label store, with reference labels and those of teachers.
    files : tuple of FileData
        Files with reference labels, instead of a store.
    validation_files, test_files : tuple of FileData
        Files for this part, which is then not split off.
    sources : tuple of str, optional
        Label sets of the store to read; all by default.
    split : SplitData
        How the store or the files are split.
    synthetic : SyntheticData, optional
        Synthetic structures, added to the training set only.
    """

    store: str | None = None
    files: tuple[FileData, ...] = ()
    validation_files: tuple[FileData, ...] = ()
    test_files: tuple[FileData, ...] = ()
    sources: tuple[str, ...] | None = None
    split: SplitData = Field(default_factory=SplitData)
    synthetic: SyntheticData | None = None

    _one_origin = one_of("store", "files")


def is_store(path: str) -> bool:
    """Whether a path is that of a label store, not of a file with structures."""
    return Path(path).is_dir() or Path(path).suffix == ".zarr"


def share_of_groups(structures: Structures, fraction: float, seed: int) -> Tensor:
    """(S,) bool: a seeded share of every group's systems, rounded to the nearest number."""
    generator = torch.Generator().manual_seed(seed)
    groups = structures.group or ("",) * structures.n_systems
    chosen = torch.zeros(structures.n_systems, dtype=torch.bool)
    for group in sorted(set(groups)):
        members = torch.tensor([k for k, g in enumerate(groups) if g == group])
        order = members[torch.randperm(len(members), generator=generator)]
        chosen[order[: round(fraction * len(members))]] = True
    return chosen


def read_labeled(
    store: str | None, files: Sequence[FileData] = (), source: str = "reference"
) -> tuple[Structures, Properties]:
    """Structures of a store with the labels of a source or, without a store, those of files."""
    if store is not None:
        data, _ = load_store(store, [source])
        return data.structures, data.labels[source]
    structures, labels = zip(*(file.read() for file in files), strict=True)
    return Structures.concatenate(structures), Properties.concatenate(labels, structures)


def load_store(
    path: str, sources: Sequence[str] | None = None, terms: Sequence[FeatureTerm] = ()
) -> tuple[TrainingSet, Mapping[str, Mapping[str, Any]]]:
    """All structures of a store with labels by source, and what is known of the sources.

    All sources are read unless some are named, and of the teachers of the `terms` of a loss the
    features that are stored.

    Raises
    ------
    DataError
        If the store lacks a source that is asked for, or has none.
    """
    store = LabeledStore.open(path)
    for name in sources or ():
        if name not in store.sources:
            raise DataError(
                f"{path} holds no labels of '{name}'{suggest(name, store.sources)}; label it with "
                "`potstill label`"
            )
    names = tuple(sources or store.sources)
    if not names:
        raise DataError(f"{path} holds no labels at all: label it with `potstill label`")
    labels = {name: store.labels(name) for name in names}
    infos = {name: store.source_info(name) for name in names}
    features = {term.source: _stored_features(store, term.source, terms) for term in terms}
    features = {source: taps for source, taps in features.items() if taps}
    infos = {source: store.feature_info(source) for source in features} | infos
    return TrainingSet(store.structures(), labels, features=features), infos


def _stored_features(
    store: LabeledStore, source: str, terms: Sequence[FeatureTerm]
) -> dict[str, Feature]:
    """Features of a source by tap, the teacher's default last; only those that terms may take."""
    own = [term.teacher_tap for term in terms if term.source == source]
    wanted = {tap for names in own if names for tap in names}
    known = {tap: entry for tap, entry in store.taps(source).items() if "kind" in entry}
    names = [tap for tap in known if tap in wanted or None in own]
    names.sort(key=lambda tap: known[tap]["default"])
    return {tap: store.features(source, tap) for tap in names}


def load_parts(
    settings: DataSettings,
    terms: Sequence[FeatureTerm] = (),
    *,
    complete: Callable[[TrainingSet], TrainingSet] = lambda data: data,
) -> tuple[dict[str, TrainingSet], dict[str, Any]]:
    """Read, add labels by `complete`, and split; terms are as of `load_store`.

    Returns the parts (`train`, `validation` and, where there is one, `test`), and what is known of
    each label set of a store.

    Raises
    ------
    DataError
        If there is nothing to train on or to validate with.
    """
    sources: Mapping[str, Any] = {}
    if settings.store is not None:
        data, sources = load_store(settings.store, settings.sources, terms)
    else:
        data = _joined(settings.files)
    data = complete(data)
    indices = dict(settings.split.split(data.structures))
    apart = {"validation": settings.validation_files, "test": settings.test_files}
    for name, files in apart.items():
        random = settings.split.file is None and settings.split.groups is None
        if files and random and name in indices:  # what a file of its own provides is given back
            freed = indices.pop(name)
            indices["train"] = torch.cat([indices["train"], freed]).sort().values
    parts = {name: data.select(index) for name, index in indices.items() if len(index)}
    parts |= {name: _joined(files) for name, files in apart.items() if files}
    if "test" in parts:
        parts["test"] = replace(parts["test"], features={})
    for name in ("train", "validation"):
        if name not in parts:
            raise DataError(f"the split leaves nothing for '{name}'")
    if settings.synthetic is not None:
        parts["train"] = parts["train"].with_synthetic(settings.synthetic.load())
    return parts, dict(sources)


def _joined(files: Sequence[FileData]) -> TrainingSet:
    structures, labels = read_labeled(None, files)
    return TrainingSet(structures, {"reference": labels})
