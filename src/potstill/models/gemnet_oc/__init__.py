"""GemNet-OC and its small variant.

`settings` has the hyper-parameters, `graphs` finds pairs, triplets and quadruplets, `bases` expands
distances and angles, `interactions` passes messages, `model` puts them together, `published` reads
the weights of the Open Catalyst Project.
"""

from potstill.models.gemnet_oc.model import GemNetOC as GemNetOC
from potstill.models.gemnet_oc.model import fit_scale_factors as fit_scale_factors
from potstill.models.gemnet_oc.published import load_published_weights as load_published_weights
from potstill.models.gemnet_oc.settings import PRESETS as PRESETS
from potstill.models.gemnet_oc.settings import GemNetOCSettings as GemNetOCSettings
