"""Choosing and splitting frames so that held-out ones are not next to training ones in time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from potstill.errors import ConfigError
from potstill.sample.base import SampledFrames, make_generator


def split_in_blocks(
    frames: SampledFrames,
    fractions: Mapping[str, float],
    *,
    seed: int,
    block: int = 8,
    gap: int = 1,
) -> dict[str, Tensor]:
    """Split frames; those of one MD run stay together in blocks that follow one another in time.

    Each job is cut into blocks, and each block goes to the split that lacks most, so that every
    split sees every temperature if the jobs are long enough. Frames of a held-out split within
    `gap` frames of a block of another split are left out altogether. Independent frames (rattled,
    strained) are blocks of one and lose nothing.

    Parameters
    ----------
    frames : SampledFrames
        S frames; those of a job in order of time.
    fractions : mapping of str to float
        Share of each split, for example `{"train": 0.8, "validation": 0.1, "test": 0.1}`; the
        first is the one that keeps all its frames. They must sum to one.
    seed : int
        Shuffles the blocks.
    block : int
        Frames per block, roughly: the blocks of a run are of about one size.
    gap : int
        Frames between blocks of different splits; zero keeps all frames.

    Returns
    -------
    dict of str to Tensor
        int64 indices of the frames of each split, increasing.

    Raises
    ------
    ConfigError
        If the fractions do not sum to one.
    """
    if abs(sum(fractions.values()) - 1.0) > 1e-6 or min(fractions.values(), default=0.0) < 0.0:
        raise ConfigError(f"the fractions of a split must sum to one: {dict(fractions)}")
    names = list(fractions)
    share = torch.tensor([fractions[name] for name in names], dtype=torch.float64)
    counts = torch.zeros(len(names), dtype=torch.float64)
    split = torch.full((len(frames),), -1, dtype=torch.int64)
    generator = make_generator(seed)
    for blocks in _blocks_by_job(frames, block):
        for k in generator.permutation(len(blocks)):
            members = blocks[int(k)]
            lacking = share * (counts.sum() + len(members)) - counts
            lacking[share == 0.0] = -torch.inf
            choice = int(lacking.argmax())
            split[members] = choice
            counts[choice] += len(members)
    split = _leave_gaps(frames, split, gap)
    return {name: (split == k).nonzero()[:, 0] for k, name in enumerate(names)}


def even_in_temperature(frames: SampledFrames, n: int, *, n_bins: int = 8, seed: int = 0) -> Tensor:
    """Choose frames so that all temperatures are met about equally often.

    Parameters
    ----------
    frames : SampledFrames
        S frames; those without a temperature form a bin of their own.
    n_bins : int
        Bins of equal width between the lowest and the highest temperature.
    seed : int
        Chooses within bins.

    Returns
    -------
    Tensor
        (n,) int64, increasing.
    """
    if not 0 <= n <= len(frames):
        raise ConfigError(f"cannot choose {n} frames of {len(frames)}")
    known = ~torch.isnan(frames.temperature)
    bins = torch.full((len(frames),), n_bins, dtype=torch.int64)
    if bool(known.any()):
        t = frames.temperature[known]
        width = (t.max() - t.min()).clamp(min=1e-9)
        bins[known] = ((t - t.min()) / width * n_bins).long().clamp(max=n_bins - 1)
    # Rank within the bin, in random order: the n smallest ranks are even over the bins.
    order = torch.from_numpy(make_generator(seed).permutation(len(frames)))
    rank = torch.empty(len(frames), dtype=torch.int64)
    seen = [0] * (n_bins + 1)
    for frame in order.tolist():
        rank[frame] = seen[int(bins[frame])]
        seen[int(bins[frame])] += 1
    shuffled = order[torch.argsort(rank[order], stable=True)]
    return shuffled[:n].sort().values


def _blocks_by_job(frames: SampledFrames, block: int) -> list[list[Tensor]]:
    """Cut each job's frames into blocks of about one size; independent frames are blocks of one.

    A small rest would be lost to the gaps around it.
    """
    jobs = []
    for job in torch.unique(frames.job):
        members = (frames.job == job).nonzero()[:, 0]
        independent = bool(torch.isnan(frames.time[members]).all())
        size = 1 if independent else block
        jobs.append(list(members.tensor_split(max(1, round(len(members) / size)))))
    return jobs


def _leave_gaps(frames: SampledFrames, split: Tensor, gap: int) -> Tensor:
    """Set to -1 what is held out and within `gap` frames of another split in the same run."""
    result = split.clone()
    moving = ~torch.isnan(frames.time)
    for distance in range(1, gap + 1):
        here, there = slice(None, -distance), slice(distance, None)
        clash = (frames.job[here] == frames.job[there]) & (split[here] != split[there])
        clash &= moving[here] & moving[there]
        for side in (here, there):
            view = result[side]
            view[clash & (split[side] > 0)] = -1
    return result
