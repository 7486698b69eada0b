"""The head alone, a linear probe: W′ = W on every layer. What any method has to beat."""

import torch.nn.functional as F
from torch import Tensor

from delora.methods.base import LinearMethod
from delora.randomness import Draw


class Head(LinearMethod):
    """The frozen layer itself, without a trained value. Shapes as in `delora.methods.base`."""

    def __init__(self, weight_OI: Tensor, draw: Draw):
        super().__init__()
        self.trials = len(draw.seeds)

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return F.linear(x_KNI, weight_OI, bias_O)

    def delta(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.new_zeros(self.trials, *weight_OI.shape)
