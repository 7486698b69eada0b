"""LoRA (Hu et al. 2022, arXiv 2106.09685), as in PEFT.

W′ = W + (α/r)·B·A, with A Kaiming-uniform and B zero. Dropout acts on the input of the BA branch alone.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import Method, kaiming_uniform, per_trial, zeros
from delora.randomness import Draw


class LoRA(Method):
    """Low-rank adaptation. Shapes as in `delora.methods.base`."""

    def __init__(self, weight_OI: Tensor, draw: Draw, *, rank: int, alpha: Tensor):
        super().__init__()
        out_features, in_features = weight_OI.shape
        self.A = nn.Parameter(kaiming_uniform(draw, "A", (rank, in_features)))
        self.B = nn.Parameter(zeros(draw, (out_features, rank)))
        self.scale_K = alpha / rank

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return F.linear(x_KNI, weight_OI, bias_O) + self.branch(dropped_KNI)

    def branch(self, x_KNI: Tensor) -> Tensor:
        """(α/r)·B·A·x, (K, N, O)."""
        return (x_KNI @ self.A.mT * per_trial(self.scale_K)) @ self.B.mT

    def delta(self, weight_OI: Tensor) -> Tensor:
        return per_trial(self.scale_K) * (self.B @ self.A)
