"""Transformations of features to a common space; trained with the student, never exported.

Ekström Kelvinius et al., Eq. 3: L_KD = L_feat(M_s(H_s), M_t(H_t)). The paper takes a linear M_s and
the identity for M_t. A trained M_t beside MSE or MAE lets both sides shrink together.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from potstill.errors import ConfigError

Transform = Literal["identity", "linear", "mlp"]


class MLP(nn.Module):
    """Linear, SiLU, linear: one hidden layer as wide as the wider of input and output."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        hidden = max(n_in, n_out)
        self.layers = nn.Sequential(nn.Linear(n_in, hidden), nn.SiLU(), nn.Linear(hidden, n_out))

    def forward(self, features: Tensor) -> Tensor:
        """(..., n_out) from (..., n_in)."""
        return self.layers(features)


def make_transform(kind: Transform, n_in: int, n_out: int, *, vector: bool) -> nn.Module:
    """Make a transformation of channels.

    The identity leaves `n_in`. A linear map of vectors has no bias, so that it turns with them; an
    MLP of vectors is refused.
    """
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(n_in, n_out, bias=not vector)
    if vector:
        raise ConfigError(
            "an mlp of vectors would break equivariance: use linear or identity with v2v"
        )
    return MLP(n_in, n_out)
