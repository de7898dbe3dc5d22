"""Features of potentials and of any torch module, by name: what feature distillation looks at.

A potential names its taps. Of any other module, and of a potential besides its own taps, the output
of each submodule is a tap under the submodule's path, such as `atom_conv_layers.2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, PlainSerializer
from torch import Tensor, nn

from potstill.errors import ConfigError, ModelError, suggest
from potstill.features import Feature, FeatureKind, pairs_at
from potstill.models import Potential, TapSpec
from potstill.neighbors import build_neighbor_list
from potstill.structures import Structures

#: Models that choose among the pairs of their list say with this tap, (M, 1), which of them their
#: features of pairs belong to.
CHOSEN_PAIRS = "edges"


def _tap_names(value: Any) -> Any:
    """Names of taps from a list of them, or from names joined by `+`."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split("+")]
    return value


#: Taps whose channels are put side by side; configs may write `message_6+update_6`.
TapNames = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(_tap_names),
    PlainSerializer("+".join, return_type=str),
]


@dataclass(frozen=True)
class TapPair:
    """Which taps of a student learn from which of a teacher; none where labels teach them."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]

    def __str__(self) -> str:
        sides = ["+".join(side) for side in (self.student, self.teacher) if side]
        return " <- ".join(sides)

    def to_json(self) -> dict[str, list[str]]:
        """Plain lists."""
        return {"student": list(self.student), "teacher": list(self.teacher)}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[str]] | str) -> TapPair:
        """Inverse of `to_json`; earlier runs hold `a+b <- c`."""
        if isinstance(data, str):
            student, _, teacher = data.partition(" <- ")
            data = {"student": _tap_names(student), "teacher": _tap_names(teacher or [])}
        return cls(tuple(data["student"]), tuple(data["teacher"]))


@contextmanager
def captured(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record what submodules, by their paths in `named_modules`, return while the context lasts.

    Yields
    ------
    dict of str to Tensor
        Fills with the outputs by path; of a submodule that is called several times, the last.

    Raises
    ------
    ModelError
        If there is no such submodule, or it returns no tensor.
    """
    known = dict(module.named_modules())
    found: dict[str, Tensor] = {}
    handles = []
    for path in paths:
        if path not in known or not path:
            raise ModelError(
                f"{type(module).__name__} has no feature tap or submodule '{path}'"
                f"{suggest(path, [*getattr(module, 'taps', ()), *filter(None, known)])}"
            )

        def record(_module: nn.Module, _inputs: Any, output: Any, path: str = path) -> None:
            if not isinstance(output, Tensor):
                raise ModelError(f"the submodule '{path}' returns no tensor: tap another one")
            found[path] = output

        handles.append(known[path].register_forward_hook(record))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def potential_features(
    potential: Potential, structures: Structures, taps: Sequence[str]
) -> dict[str, Feature]:
    """Features of a batch on the potential's device, without a graph of derivatives.

    Taps are names among `potential.taps`, or paths of submodules that return one row per atom.

    Raises
    ------
    ModelError
        If a tap is unknown, a submodule's output does not belong to the atoms, or the rows of a tap
        of pairs to no pairs that are known.
    """
    neighbors = build_neighbor_list(structures, potential.cutoff)
    named = [tap for tap in taps if tap in potential.taps]
    paths = [tap for tap in taps if tap not in potential.taps]
    chooses = CHOSEN_PAIRS in potential.taps and any(
        potential.taps[tap].kind == "edge_scalar" for tap in named
    )
    asked = [*named, CHOSEN_PAIRS] if chooses else named
    with captured(potential, paths) as outputs, torch.no_grad():
        # The torch twin: native kernels keep their features to themselves.
        found = potential.predict(structures, neighbors, ["atomic_energies"], taps=asked)
    pairs, recipe = neighbors, f"all pairs within {potential.cutoff:g} Å"
    if chooses:
        pairs = pairs_at(structures, neighbors, found.features[CHOSEN_PAIRS][:, 0].long())
        recipe = f"the choice of {potential.kind} among the pairs within {potential.cutoff:g} Å"
    features = {}
    for tap in taps:
        if tap in found.features:
            spec, values = potential.taps[tap], found.features[tap]
            graph = (pairs, recipe) if spec.kind == "edge_scalar" else ()
            if graph and len(values) != pairs.n_pairs:
                raise ModelError(
                    f"the tap '{tap}' of {potential.kind} has {len(values)} pairs of "
                    f"{pairs.n_pairs}, and no tap '{CHOSEN_PAIRS}' says which: leave it out"
                )
            features[tap] = Feature(spec.kind, values.detach(), *graph)
        else:
            features[tap] = atom_feature(outputs.get(tap), structures.n_atoms, tap)
    return features


def atom_feature(output: Tensor | None, n_atoms: int, tap: str) -> Feature:
    """The output of a submodule as a feature of atoms: (N, F), or (N, 3, F) for vectors.

    Raises
    ------
    ModelError
        If it has another shape.
    """
    if output is None:
        raise ModelError(f"the submodule '{tap}' was not called: tap another one")
    vector = output.ndim == 3 and output.shape[1] == 3
    if output.shape[0] != n_atoms or not (output.ndim == 2 or vector):
        raise ModelError(
            f"the submodule '{tap}' returns {tuple(output.shape)}, not one row for each of "
            f"{n_atoms} atoms: tap another one"
        )
    return Feature("node_vector" if vector else "node_scalar", output.detach())


def resolve_taps(
    named: Sequence[str] | None,
    taps: Mapping[str, TapSpec],
    preferred: str | None,
    kinds: tuple[FeatureKind, ...],
    *,
    owner: str,
    term: str,
) -> tuple[tuple[str, ...], TapSpec]:
    """Find the taps that a term names, or the default, and check that they fit.

    Without names it is the `preferred` tap of the owner, or the last one, of the best of the kinds
    that fit, which stand first. `owner` and `term` are for messages.

    Returns
    -------
    names : tuple of str
        The taps.
    spec : TapSpec
        Of all of them side by side.

    Raises
    ------
    ConfigError
        If a tap is unknown or of the wrong kind.
    """
    names = tuple(named or ())
    for kind in kinds:
        fitting = [n for n, spec in taps.items() if spec.kind == kind and n != CHOSEN_PAIRS]
        if not names and fitting:
            names = (preferred if preferred in fitting else fitting[-1],)
    if not names:
        there = ", ".join(f"{name} ({spec.kind})" for name, spec in taps.items()) or "none"
        raise ConfigError(
            f"{term}: {owner} has no tap of the kind {' or '.join(kinds)}: its taps are {there}"
        )
    for part in names:
        if part not in taps:
            raise ConfigError(f"{term}: {owner} has no feature tap '{part}'{suggest(part, taps)}")
    found = list(dict.fromkeys(taps[part].kind for part in names))
    if len(found) > 1 or found[0] not in kinds:
        raise ConfigError(
            f"{term} needs a tap of {owner} of the kind {' or '.join(kinds)}, but "
            f"'{'+'.join(names)}' is of the kind {' and '.join(found)}: choose another tap or "
            "strategy"
        )
    return names, TapSpec(found[0], sum(taps[part].width for part in names))
