"""MiSS (Kang & Yin 2024, arXiv 2409.15371), as in PEFT: one small matrix, repeated over the input.

ΔW[o, i] = D[i mod r, o]: the inputs whose places differ by a multiple of r share their weights. D starts at 0.
Dropout acts on the input of ΔW alone.
"""

import torch
from torch import Tensor, nn

from delora.methods.base import LowRank, zeros
from delora.randomness import Draw


class MiSS(LowRank):
    """Matrix shard sharing. Shapes as in `delora.methods.base`; D (K, R, O)."""

    fold_RI: Tensor

    def __init__(self, weight_OI: Tensor, draw: Draw, *, rank: int):
        super().__init__()
        out_features, in_features = weight_OI.shape
        self.D = nn.Parameter(zeros(draw, (rank, out_features)))
        shard_R1 = torch.arange(rank, device=weight_OI.device)[:, None]
        fold_RI = torch.arange(in_features, device=weight_OI.device) % rank == shard_R1
        self.register_buffer("fold_RI", fold_RI.to(weight_OI.dtype), persistent=False)

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        return self.D.mT, self.fold_RI.expand(len(self.D), -1, -1)
