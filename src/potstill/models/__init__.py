"""Models: potentials as functions of species and pair vectors.

`MODELS` is the explicit table of kinds; a new architecture is one file and one line here.
"""

from __future__ import annotations

from typing import Any

from potstill.errors import ModelError, suggest
from potstill.models.ani import ANI as ANI
from potstill.models.base import Edges as Edges
from potstill.models.base import LocalOutput as LocalOutput
from potstill.models.base import Potential as Potential
from potstill.models.base import Prediction as Prediction
from potstill.models.base import StartingData as StartingData
from potstill.models.base import TapSpec as TapSpec
from potstill.models.gemnet_oc import GemNetOC as GemNetOC
from potstill.models.hipnn import HIPNN as HIPNN
from potstill.models.linear import SNAP as SNAP
from potstill.models.painn import PaiNN as PaiNN
from potstill.models.prior import ZBL as ZBL
from potstill.models.schnet import SchNet as SchNet
from potstill.models.sums import SpeciesOffsets as SpeciesOffsets
from potstill.models.sums import SumPotential as SumPotential
from potstill.species import SpeciesTable

MODELS: dict[str, type[Potential]] = {
    "hipnn": HIPNN,
    "ani": ANI,
    "gemnet_oc": GemNetOC,
    "snap": SNAP,
    "schnet": SchNet,
    "painn": PaiNN,
    "zbl": ZBL,
    "offsets": SpeciesOffsets,
}


def build_model(
    kind: str, species_table: SpeciesTable, hyperparameters: dict[str, Any]
) -> Potential:
    """Build a model by kind; sums are built from their components.

    Raises
    ------
    ModelError
        If the kind is unknown or the hyper-parameters do not fit it.
    """
    if kind == "sum":
        return SumPotential(
            {
                name: build_model(part["kind"], species_table, part["hyperparameters"])
                for name, part in hyperparameters["components"].items()
            }
        )
    if kind not in MODELS:
        raise ModelError(f"unknown kind of model '{kind}'{suggest(kind, MODELS)}")
    try:
        return MODELS[kind](species_table, **hyperparameters)
    except TypeError as error:
        raise ModelError(f"model '{kind}': {error}") from error
