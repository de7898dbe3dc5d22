"""All evaluations: one line each."""

from __future__ import annotations

from potstill.evaluate.base import Evaluation
from potstill.evaluate.elastic import Elastic
from potstill.evaluate.eos import Eos
from potstill.evaluate.errors import S2EF, Errors
from potstill.evaluate.memory import Memory
from potstill.evaluate.nve import NVE
from potstill.evaluate.parity import Parity
from potstill.evaluate.rdf import Rdf
from potstill.evaluate.speed import InferenceThroughput, Speed
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
        Rdf,
        Speed,
        Memory,
        NVE,
    )
}
