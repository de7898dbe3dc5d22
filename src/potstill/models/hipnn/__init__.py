"""HIP-NN, in the form of hippynn and with smooth invariants."""

from potstill.models.hipnn.interactions import CUTOFF_FUNCTIONS as CUTOFF_FUNCTIONS
from potstill.models.hipnn.model import HIPNN as HIPNN
from potstill.models.hipnn.model import HIPNNHyperparameters as HIPNNHyperparameters
from potstill.models.hipnn.model import Residual as Residual
from potstill.models.hipnn.model import hierarchicality as hierarchicality
