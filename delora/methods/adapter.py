"""Adapter (Houlsby et al. 2019, arXiv 1902.00751), as in the adapters library.

o ← o + W_up·silu(W_down·o + b_down) + b_up for the output o of both of a layer's blocks, after their dropout and
before residual and LayerNorm. W ~ N(0, 0.02²), biases 0. Dropout acts on the output of the bottleneck.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import HiddenMethod, zeros
from delora.randomness import Draw

STD = 0.02


class Adapter(HiddenMethod):
    """A bottleneck with a residual. Shapes as in `delora.methods.base`; D width of the bottleneck."""

    activation = staticmethod(F.silu)

    def __init__(self, width: int, draw: Draw, *, bottleneck: int):
        super().__init__()
        self.down = nn.Parameter(draw.normal("down", (bottleneck, width), STD))
        self.down_bias = nn.Parameter(zeros(draw, (bottleneck,)))
        self.up = nn.Parameter(draw.normal("up", (width, bottleneck), STD))
        self.up_bias = nn.Parameter(zeros(draw, (width,)))

    def forward(self, h_KNH: Tensor, dropout: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
        return h_KNH + dropout(self.bottleneck(h_KNH))

    def bottleneck(self, h_KNH: Tensor) -> Tensor:
        """W_up·f(W_down·h + b_down) + b_up, (K, N, H)."""
        inner_KND = self.activation(h_KNH @ self.down.mT + self.down_bias[:, None])
        return inner_KND @ self.up.mT + self.up_bias[:, None]
