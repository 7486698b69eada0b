"""RED (Wu et al., ACL 2024, arXiv 2402.15179): a factor and a shift for each output of a layer.

y = s ⊙ (W·x + b) + t. The published code places it after each feed-forward block, before dropout, residual and
LayerNorm. s starts at 1, t at 0. Dropout acts on the layer's whole input.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import LinearMethod, zeros
from delora.randomness import Draw


class RED(LinearMethod):
    """Representation editing. Shapes as in `delora.methods.base`; scale and shift (K, O)."""

    def __init__(self, weight_OI: Tensor, draw: Draw):
        super().__init__()
        self.scale = nn.Parameter(zeros(draw, weight_OI.shape[:1]) + 1)
        self.shift = nn.Parameter(zeros(draw, weight_OI.shape[:1]))

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return F.linear(dropped_KNI, weight_OI, bias_O) * self.scale[:, None] + self.shift[:, None]

    def delta(self, weight_OI: Tensor) -> Tensor:
        return (self.scale - 1)[:, :, None] * weight_OI

    def bias_delta(self, bias_O: Tensor | None) -> Tensor:
        return self.shift if bias_O is None else (self.scale - 1) * bias_O + self.shift
