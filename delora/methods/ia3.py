"""IA3 (Liu et al. 2022, arXiv 2205.05638), as in PEFT: a factor for each output of a layer, or each input.

y = l ⊙ (W·x + b), and for layers of the role ffn_out y = W·(l ⊙ x) + b. l starts at 1. Dropout acts on the layer's
whole input.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import LinearMethod, zeros
from delora.randomness import Draw


class IA3(LinearMethod):
    """Infused adapter by inhibiting and amplifying inner activations. Shapes as in `delora.methods.base`."""

    given = ("role",)

    def __init__(self, weight_OI: Tensor, draw: Draw, *, role: str | None):
        super().__init__()
        self.on_input = role == "ffn_out"
        self.scale = nn.Parameter(zeros(draw, (weight_OI.shape[1 if self.on_input else 0],)) + 1)

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        if self.on_input:
            return F.linear(dropped_KNI * self.scale[:, None], weight_OI, bias_O)
        return F.linear(dropped_KNI, weight_OI, bias_O) * self.scale[:, None]

    def delta(self, weight_OI: Tensor) -> Tensor:
        change = self.scale - 1
        return (change[:, None] if self.on_input else change[:, :, None]) * weight_OI

    def bias_delta(self, bias_O: Tensor | None) -> Tensor | None:
        return None if self.on_input or bias_O is None else (self.scale - 1) * bias_O
