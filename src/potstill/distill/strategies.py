"""The strategies of Ekström Kelvinius et al. by name, and their weights.

A line of the loss such as `{distill: n2n+v2v, source: painn, weight: 100}` stands for terms of the
loss; `expand` writes them out. There is no other machinery behind a name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Discriminator, SerializeAsAny, Tag

from potstill.distill.auxiliary import AuxiliaryTerm
from potstill.distill.feature_terms import KINDS, FeatureTerm
from potstill.distill.losses import LossTerm
from potstill.distill.schedules import Schedule
from potstill.distill.terms import CustomLine
from potstill.errors import suggest

#: Weights λ by pair of models and strategy, for OC20-2M and COLL: Tables 6 and 8 of the paper. They
#: belong to its losses, units and widths of features; elsewhere they are a place to start from.
#: Where the tables differ (e2n on OC20) the later one, Table 8, counts; the other is `oc20-table6`.
PRESETS: dict[str, dict[str, dict[str, float]]] = {
    "gemnet-oc-to-painn": {
        "vanilla1": {"oc20": 1.0, "coll": 0.2},
        "vanilla2": {"oc20": 500.0, "coll": 100.0},
        "n2n": {"oc20": 10000.0, "coll": 1000.0},
        "e2n": {"oc20": 1000.0, "coll": 10.0, "oc20-table6": 10.0},
        "v2v": {"oc20": 50000.0, "coll": 100.0},
    },
    "gemnet-oc-to-gemnet-oc-small": {
        "vanilla1": {"oc20": 0.2},
        "vanilla2": {"oc20": 10.0},
        "n2n": {"oc20": 1000.0},
        "e2e": {"oc20": 100000.0},
    },
    "painn-to-painn-small": {
        "vanilla1": {"oc20": 1.0, "coll": 1.0},
        "vanilla2": {"oc20": 200.0, "coll": 100.0},
        "n2n": {"oc20": 100.0, "coll": 100.0},
        "v2v": {"oc20": 1000.0, "coll": 10000.0},
    },
    "painn-to-schnet": {
        "vanilla1": {"oc20": 0.1, "coll": 1.0},
        "vanilla2": {"oc20": 0.1, "coll": 100.0},
        "n2n": {"oc20": 1000.0, "coll": 100.0},
    },
}

_PRESET = "preset:"

#: A line of a loss as settings hold it, of any kind.
AnyTerm = Annotated[
    Annotated[LossTerm, Tag("LossTerm")]
    | Annotated[FeatureTerm, Tag("FeatureTerm")]
    | Annotated[AuxiliaryTerm, Tag("AuxiliaryTerm")]
    | Annotated[SerializeAsAny[CustomLine], BeforeValidator(CustomLine.of), Tag("CustomLine")],
    Discriminator(lambda value: _kind_of(value)),
]


def expand(lines: Any) -> Any:
    """Write the named strategies of a loss out as its terms; all else is left as it is.

    Parameters
    ----------
    lines : sequence
        Terms, or mappings as configs hold them. A line with `distill` names a strategy of
        `STRATEGIES`, or several joined by `+`; then each option is one for all, or a mapping by
        strategy. A weight may be `preset:PAIR`, as of `preset`.

    Raises
    ------
    ValueError
        If a strategy, preset or option is unknown.
    """
    if not isinstance(lines, Sequence) or isinstance(lines, str):
        return lines
    strategies = [isinstance(x, Mapping) and isinstance(x.get("distill"), str) for x in lines]
    plain = [line for line, named in zip(lines, strategies, strict=True) if not named]
    terms: list[Any] = []
    for line, named in zip(lines, strategies, strict=True):
        if not named:
            terms.append(line)
            continue
        names = [name.strip() for name in line["distill"].split("+")]
        for name in names:
            if name not in STRATEGIES:
                raise ValueError(f"unknown strategy '{name}'{suggest(name, STRATEGIES)}")
            options = {k: _part(v, name, names) for k, v in line.items() if k != "distill"}
            if isinstance(options.get("weight"), str):
                options["weight"] = preset(options["weight"], name)
            if name in VANILLA:
                terms += VANILLA[name](options, plain)
            else:
                terms.append({"distill": name, **options})
    return terms


def preset(text: str, strategy: str) -> float:
    """λ of the paper from `preset:PAIR`, `preset:PAIR.STRATEGY` or `preset:PAIR.STRATEGY.DATA`.

    Such as `preset:painn-to-schnet.n2n.coll`; the strategy is that of the line and the data are
    `oc20` unless they are named. Raises ValueError if the tables have no such entry.
    """
    pair, *rest = text.removeprefix(_PRESET).split(".")
    if not text.startswith(_PRESET) or len(rest) > 2:
        raise ValueError(
            f"a weight is a number, a schedule or preset:PAIR[.STRATEGY[.DATA]], not '{text}'"
        )
    if pair not in PRESETS:
        raise ValueError(f"there is no preset '{pair}'{suggest(pair, PRESETS)}")
    table = PRESETS[pair]
    name = rest[0] if rest else strategy
    data = rest[1] if len(rest) > 1 else "oc20"
    if name not in table:
        raise ValueError(f"the preset '{pair}' has no '{name}'{suggest(name, table)}")
    if data not in table[name]:
        raise ValueError(
            f"the preset '{pair}.{name}' has no weight for '{data}'{suggest(data, table[name])}"
        )
    return table[name][data]


def _vanilla_1(options: Mapping[str, Any], plain: Sequence[Any]) -> list[dict[str, Any]]:
    """Eq. 7: the energy and force terms of the loss once more, with the teacher's values."""
    found = {name: _other(plain, name, options.get("source")) for name in ("energy", "forces")}
    if None in found.values():
        raise ValueError(
            "vanilla1 repeats the terms of energy and forces with the teacher's values, but the "
            "loss lacks one of them: add it, or write out the teacher's terms"
        )
    return [_again(term, options) for term in found.values() if term is not None]


def _vanilla_2(options: Mapping[str, Any], plain: Sequence[Any]) -> list[dict[str, Any]]:
    """Eq. 8: the teacher's atomic energies, with the error measure of the energy term."""
    energy = _other(plain, "energy", options.get("source"))
    base = {"error": energy["error"]} if energy and "error" in energy else {}
    return [{"property": "atomic_energies", **base, **options}]


def _other(plain: Sequence[Any], name: str, source: Any) -> dict[str, Any] | None:
    """The first term of a property that has another source, as a mapping."""
    for line in plain:
        term = line.model_dump() if isinstance(line, BaseModel) else line
        fits = isinstance(term, Mapping) and term.get("property") == name
        if fits and term.get("source", "reference") != source:
            return dict(term)
    return None


def _again(term: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A term with another source, its weight multiplied by that of the options."""
    factor, own = options.get("weight", 1.0), term.get("weight", 1.0)
    schedule = next((v for v in (factor, own) if not isinstance(v, int | float)), None)
    if schedule is None:
        weight: Any = factor * own
    else:
        number = own if schedule is factor else factor
        if not isinstance(number, int | float):
            raise ValueError("vanilla1 cannot multiply two schedules: write the terms out")
        plain = Schedule.model_validate(schedule)
        weight = plain.model_copy(update={"values": tuple(number * v for v in plain.values)})
    return {**term, **options, "weight": weight}


#: What strategies on labels stand for: (options of the line, the loss' other lines) to terms.
VANILLA = {"vanilla1": _vanilla_1, "vanilla2": _vanilla_2}

#: All names; those of `feature_terms.KINDS` stand for one term each.
STRATEGIES = (*VANILLA, *KINDS)


def _part(value: Any, name: str, names: Sequence[str]) -> Any:
    """An option of one of several strategies."""
    if isinstance(value, Mapping) and value and set(value) <= set(STRATEGIES):
        if name not in value:
            raise ValueError(f"an option given by strategy lacks '{name}' of {'+'.join(names)}")
        return value[name]
    return value


#: Keys that tell the kind of a line; without any it is taken for one on a label.
_KEYS = {"distill": "FeatureTerm", "learn": "AuxiliaryTerm", "term": "CustomLine"}


def _kind_of(value: Any) -> str:
    for key, kind in _KEYS.items():
        if key in value if isinstance(value, Mapping) else hasattr(value, key):
            return kind
    return "LossTerm"
