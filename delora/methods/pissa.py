"""PiSSA (Meng et al. 2024, arXiv 2404.02948), as in PEFT: LoRA that starts at the frozen weight's largest directions.

With W = U·S·Vᵀ, A₀ = √(S_r·r/α)·V_rᵀ and B₀ = U_r·√(S_r·r/α): W′ = W + (α/r)·(B·A − B₀·A₀), A = A₀ and B = B₀ at
first. Dropout acts on the input of the branch alone, of which the start's product is a part here.
"""

import torch
from torch import Tensor, nn

from delora.methods.base import LowRank, per_trial
from delora.randomness import Draw


class PiSSA(LowRank):
    """LoRA from principal singular values and vectors. Shapes as in `delora.methods.base`."""

    A0: Tensor
    B0: Tensor

    def __init__(self, weight_OI: Tensor, draw: Draw, *, rank: int, alpha: Tensor):
        super().__init__()
        if rank > min(weight_OI.shape):
            raise ValueError(f"rank={rank} is more than the layer's smaller width {min(weight_OI.shape)}")
        # In double precision on the CPU: what decides is the weight, not where the fleet runs.
        U, S, Vt = torch.linalg.svd(weight_OI.detach().cpu().double(), full_matrices=False)
        A_RI, B_OR = S[:rank, None].sqrt() * Vt[:rank], U[:, :rank] * S[:rank].sqrt()
        self.scale_K = alpha / rank
        share_K11 = per_trial(self.scale_K.rsqrt())
        self.register_buffer("A0", share_K11 * A_RI.to(weight_OI))
        self.register_buffer("B0", share_K11 * B_OR.to(weight_OI))
        self.A, self.B = nn.Parameter(self.A0.clone()), nn.Parameter(self.B0.clone())

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        # B·A − B₀·A₀ = (B − B₀)·A + B₀·(A − A₀), which is exactly 0 at the start.
        up = torch.cat([self.B - self.B0, self.B0], 2)
        return per_trial(self.scale_K) * up, torch.cat([self.A, self.A - self.A0], 1)
