"""The rungs of the DeLoRA paper (ICLR 2025, arXiv 2503.18225, Tables 1 and 2) between ETHER+ and DeLoRA.

With N(A, B) = Σⱼ bⱼaⱼᵀ / (‖bⱼ‖‖aⱼ‖) over r/2 terms, on the input side of W:

symmetric=false   ΔW = −W·[(λ/r)·(N(A, B) − N(C, D))]ᵀ    ETHER+ with boundary, high rank, relaxed; C = A, D = B first
symmetric=true    ΔW = −W·(λ/r)·(N(Uᵀ, U) − N(Vᵀ, V))     ETHER+ with boundary, high rank; V = U at first

With rank=2 the latter is λ/2·(uuᵀ − vvᵀ), and at λ = 2 ETHER+ with side=in, blocks=1. The paper names no start of
these. ‖ΔW‖ is bounded by λ·‖W‖. λ has its own learning rate. Dropout acts on the layer's whole input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import Bounded, kaiming_uniform, per_trial
from delora.randomness import Draw


class BoundedETHER(Bounded):
    """Relaxed reflections of a learned strength. Shapes as in `delora.methods.base`.

    A, B, C, D and U, V are (K, r/2, I), a term a row.
    """

    drops_whole_input = True

    def __init__(
        self,
        weight_OI: Tensor,
        draw: Draw,
        *,
        rank: int,
        lambda_init: Tensor,
        lambda_lr: Tensor,
        symmetric: bool,
    ):
        super().__init__(lambda_init, lambda_lr)
        if rank % 2:
            raise ValueError(f"rank={rank} is odd: half of it is added, half taken away")
        self.rank, self.symmetric = rank, symmetric
        for name, twin in [("U", "V")] if symmetric else (("A", "C"), ("B", "D")):
            start = kaiming_uniform(draw, name, (rank // 2, weight_OI.shape[1]))
            self.register_parameter(name, nn.Parameter(start))
            self.register_parameter(twin, nn.Parameter(start.clone()))

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        gain = per_trial(-self.strength() / self.rank)
        names = ("U", "V", "U", "V") if self.symmetric else ("A", "C", "B", "D")
        a, c, b, d = (F.normalize(getattr(self, name), dim=2, eps=0) for name in names)
        # aᵀb − cᵀd = (a − c)ᵀb + cᵀ(b − d), which is exactly 0 at the start.
        return gain * (weight_OI @ torch.cat([a - c, c], 1).mT), torch.cat([b, b - d], 1)
