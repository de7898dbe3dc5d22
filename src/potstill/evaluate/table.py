"""All evaluations: one line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

from potstill.errors import PotstillError, suggest
from potstill.evaluate.adf import Adf, CoordinationEvaluation
from potstill.evaluate.base import Bench, Candidate, Evaluation
from potstill.evaluate.cdf import Cdf
from potstill.evaluate.defects import DefectsEvaluation
from potstill.evaluate.diffusion import DensityEvaluation, DiffusionEvaluation
from potstill.evaluate.elastic import Elastic
from potstill.evaluate.eos import Eos
from potstill.evaluate.errors import S2EF, Errors
from potstill.evaluate.expansion import Expansion
from potstill.evaluate.headroom import Headroom
from potstill.evaluate.internal import FreeEnergy, Internal
from potstill.evaluate.melting import Melting
from potstill.evaluate.memory import Memory
from potstill.evaluate.nve import NVE
from potstill.evaluate.parity import Parity
from potstill.evaluate.phonons import PhononsEvaluation
from potstill.evaluate.pressure import PressureEvaluation
from potstill.evaluate.rdf import Rdf
from potstill.evaluate.speed import InferenceThroughput, Speed
from potstill.evaluate.stability import StabilityEvaluation
from potstill.evaluate.vibrations import VibrationsEvaluation

#: Evaluations by name, in the order in which they are done and shown.
EVALUATIONS: dict[str, type[Evaluation]] = {
    evaluation.name: evaluation
    for evaluation in (
        Errors,
        Parity,
        S2EF,
        InferenceThroughput,
        Eos,
        Elastic,
        VibrationsEvaluation,
        PhononsEvaluation,
        DefectsEvaluation,
        Expansion,
        Rdf,
        Adf,
        Cdf,
        CoordinationEvaluation,
        Internal,
        FreeEnergy,
        DiffusionEvaluation,
        DensityEvaluation,
        PressureEvaluation,
        Melting,
        Speed,
        Memory,
        NVE,
        StabilityEvaluation,
        Headroom,
    )
}


def evaluation_class(name: str) -> type[Evaluation]:
    """Look up an evaluation by name.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name not in EVALUATIONS:
        raise ValueError(f"there is no evaluation '{name}'{suggest(name, EVALUATIONS)}")
    return EVALUATIONS[name]


def make_evaluations(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Evaluation]:
    """Make evaluations, by name, with settings of theirs.

    Raises
    ------
    ValueError
        If there is none of a name, or a setting is wrong.
    """
    return {name: evaluation_class(name).model_validate(own) for name, own in options.items()}


def _checked(options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    make_evaluations(options)
    return options


#: Settings by evaluation, in configs.
Options = Annotated[dict[str, dict[str, Any]], AfterValidator(_checked)]


def attempt(evaluation: Evaluation, bench: Bench, candidate: Candidate) -> Any:
    """Plain JSON of a result, or `{"error": ...}`: a failure does not stop the others."""
    try:
        result = evaluation.run(bench, candidate)
    except PotstillError as error:
        return {"error": str(error)}
    return json.loads(json.dumps(result.to_json()))
