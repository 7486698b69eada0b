"""LoRA (Hu et al. 2022, arXiv 2106.09685), as in PEFT.

W′ = W + (α/r)·B·A, with A Kaiming-uniform and B zero. Dropout acts on the input of the BA branch alone.
"""

from torch import Tensor, nn

from delora.methods.base import LowRank, kaiming_uniform, per_trial, zeros
from delora.randomness import Draw


class LoRA(LowRank):
    """Low-rank adaptation. Shapes as in `delora.methods.base`."""

    def __init__(self, weight_OI: Tensor, draw: Draw, *, rank: int, alpha: Tensor):
        super().__init__()
        out_features, in_features = weight_OI.shape
        self.A = nn.Parameter(kaiming_uniform(draw, "A", (rank, in_features)))
        self.B = nn.Parameter(zeros(draw, (out_features, rank)))
        self.scale_K = alpha / rank

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        return per_trial(self.scale_K) * self.B, self.A
