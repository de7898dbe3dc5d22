"""Splits of a data set into named parts: by seed, by group, or from a file."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from potstill.errors import ConfigError, DataError, suggest
from potstill.files import write_atomically


def split_by_seed(n: int, fractions: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Split n systems at random into parts of the given sizes.

    Parameters
    ----------
    fractions : mapping of str to float
        Fraction of each part; they sum to one.

    Returns
    -------
    dict of str to Tensor
        Sorted int64 indices of each part; disjoint, and together 0..n-1. A part with a fraction
        above zero has at least one system.

    Raises
    ------
    ConfigError
        If the fractions do not sum to one, or there are fewer systems than parts.
    """
    if any(f < 0 for f in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-9:
        raise ConfigError(f"the fractions of a split must sum to one: {dict(fractions)}")
    if sum(f > 0 for f in fractions.values()) > n:
        raise ConfigError(f"{n} systems cannot be split into {len(fractions)} parts")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    sizes = _sizes(n, list(fractions.values()))
    parts = order.split(sizes)
    return {name: part.sort().values for name, part in zip(fractions, parts, strict=True)}


def split_by_blocks(
    n: int, n_blocks: int, fractions: Mapping[str, float], seed: int
) -> dict[str, Tensor]:
    """Split n frames in order of time by consecutive blocks, which are dealt out as a whole.

    Neighboring frames of a trajectory are alike: a random split would test on what was trained on.

    Parameters
    ----------
    n_blocks : int
        Blocks of the same size, but for one frame.
    fractions, seed
        As of `split_by_seed`, of the blocks.

    Raises
    ------
    ConfigError
        As of `split_by_seed`, or if there are more blocks than frames.
    """
    if n_blocks > n:
        raise ConfigError(f"{n} frames cannot be split into {n_blocks} blocks")
    blocks = torch.arange(n).tensor_split(n_blocks)
    parts = split_by_seed(n_blocks, fractions, seed)
    return {
        name: torch.cat([blocks[k] for k in own.tolist()]) if len(own) else blocks[0][:0]
        for name, own in parts.items()
    }


def split_by_group(groups: Sequence[str], parts: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Split by the names of groups; those that no part names are for training.

    Parameters
    ----------
    groups : sequence of str
        Group of each system, as in `Structures.group`.
    parts : mapping of str to sequence of str
        Names or patterns (`Surface*`) of the groups of each part.

    Returns
    -------
    dict of str to Tensor
        Sorted int64 indices of each part.

    Raises
    ------
    ConfigError
        If a pattern fits no group, or a group is claimed by two parts.
    """
    owner: dict[str, str] = {}
    names = sorted(set(groups))
    for part, patterns in parts.items():
        for pattern in patterns:
            found = fnmatch.filter(names, pattern)
            if not found:
                raise ConfigError(f"no group is called '{pattern}'{suggest(pattern, names)}")
            for name in found:
                if owner.setdefault(name, part) != part:
                    raise ConfigError(
                        f"group '{name}' is claimed by '{owner[name]}' and by '{part}'"
                    )
    assigned = [owner.get(name, "train") for name in groups]
    order = dict.fromkeys(("train", *parts))
    return {
        part: torch.tensor([k for k, own in enumerate(assigned) if own == part], dtype=torch.int64)
        for part in order
    }


def split_from_file(path: str | Path, n: int) -> dict[str, Tensor]:
    """Read a split: a JSON object of part names and lists of system indices.

    Raises
    ------
    DataError
        If the file is not of that form, an index is not in 0..n-1, or two parts share one.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        parts = {str(k): torch.tensor(v, dtype=torch.int64).reshape(-1) for k, v in data.items()}
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{path} is not a split, a JSON object of lists of indices: {error}"
        ) from error
    seen: dict[int, str] = {}
    for name, part in parts.items():
        for index in part.tolist():
            if not 0 <= index < n:
                raise DataError(f"{path}, part '{name}': index {index} is not in 0..{n - 1}")
            if index in seen:
                raise DataError(f"{path}: index {index} is in '{seen[index]}' and in '{name}'")
            seen[index] = name
    return {name: part.sort().values for name, part in parts.items()}


def write_split(path: str | Path, parts: Mapping[str, Tensor]) -> None:
    """Write a split so that `split_from_file` reads it back."""
    text = json.dumps({name: part.tolist() for name, part in parts.items()})
    write_atomically(path, text + "\n")


def _sizes(n: int, fractions: Sequence[float]) -> list[int]:
    """Whole sizes that sum to n; every positive fraction gets at least one."""
    sizes = [max(int(n * f), 1) if f > 0 else 0 for f in fractions]
    while sum(sizes) != n:
        step = 1 if sum(sizes) < n else -1
        gaps = [
            step * (n * f - size) if f > 0 and size + step >= 1 else float("-inf")
            for f, size in zip(fractions, sizes, strict=True)
        ]
        sizes[gaps.index(max(gaps))] += step
    return sizes
