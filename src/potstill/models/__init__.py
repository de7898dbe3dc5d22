"""Models: potentials as functions of species and pair vectors.

`MODELS` is the explicit table of kinds; a new architecture is one file and one line here. Those of
other packages are given as `module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Mapping
from typing import Any

from potstill.errors import ModelError, suggest
from potstill.models.ani import ANI as ANI
from potstill.models.base import Edges as Edges
from potstill.models.base import LocalOutput as LocalOutput
from potstill.models.base import Potential as Potential
from potstill.models.base import Prediction as Prediction
from potstill.models.base import StartingData as StartingData
from potstill.models.base import TapSpec as TapSpec
from potstill.models.bonded import Bonds as Bonds
from potstill.models.gemnet_oc import GemNetOC as GemNetOC
from potstill.models.hipnn import HIPNN as HIPNN
from potstill.models.hyper import Hyperparameters as Hyperparameters
from potstill.models.linear import SNAP as SNAP
from potstill.models.painn import PaiNN as PaiNN
from potstill.models.pair import PairPotential as PairPotential
from potstill.models.prior import ZBL as ZBL
from potstill.models.prior import PairRepulsion as PairRepulsion
from potstill.models.schnet import SchNet as SchNet
from potstill.models.sums import MeanPotential as MeanPotential
from potstill.models.sums import SpeciesOffsets as SpeciesOffsets
from potstill.models.sums import SumPotential as SumPotential
from potstill.models.sums import summands as summands
from potstill.species import SpeciesTable

MODELS: dict[str, type[Potential]] = {
    "hipnn": HIPNN,
    "ani": ANI,
    "gemnet_oc": GemNetOC,
    "snap": SNAP,
    "pair": PairPotential,
    "schnet": SchNet,
    "painn": PaiNN,
    "zbl": ZBL,
    "repulsion": PairRepulsion,
    "bonds": Bonds,
    "offsets": SpeciesOffsets,
}


def model_class(spec: str) -> type[Potential]:
    """Find the class of a model.

    Parameters
    ----------
    spec : str
        A kind in `MODELS`, or `module:Class` for a subclass of `Potential` that can be imported.

    Raises
    ------
    ModelError
        If there is none.
    """
    module, colon, name = spec.partition(":")
    if not colon:
        if spec not in MODELS:
            also = "; or give module:Class for one of your own"
            raise ModelError(f"unknown kind of model '{spec}'{suggest(spec, MODELS)}{also}")
        return MODELS[spec]
    try:
        found = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ModelError(f"the model '{spec}' cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Potential)):
        raise ModelError(f"'{spec}' is not a subclass of potstill.models.Potential")
    return found


def check_hyperparameters(spec: str, hyperparameters: Mapping[str, Any]) -> None:
    """Check hyper-parameters before there is a species table to build the model with.

    Raises
    ------
    ModelError
        If the model is unknown, or a hyper-parameter is unknown, missing or out of range.
    """
    model = model_class(spec)
    try:
        if model.hyper_class is not None:
            model.hyper_class.of(**hyperparameters)
        else:
            inspect.signature(model).bind(None, **hyperparameters)
    except (ModelError, TypeError) as error:
        raise ModelError(f"model '{spec}': {error}") from error


def build_model(
    spec: str, species_table: SpeciesTable, hyperparameters: Mapping[str, Any]
) -> Potential:
    """Build a model of a kind in `MODELS` or given as `module:Class`; sums and means from their parts.

    Raises
    ------
    ModelError
        If the kind is unknown or the hyper-parameters do not fit it.
    """
    if spec in ("sum", "mean"):
        parts = {
            name: build_model(part["kind"], species_table, part["hyperparameters"])
            for name, part in hyperparameters["components"].items()
        }
        return SumPotential(parts) if spec == "sum" else MeanPotential(parts)
    check_hyperparameters(spec, hyperparameters)
    return model_class(spec)(species_table, **hyperparameters)
