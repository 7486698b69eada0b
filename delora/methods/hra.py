"""HRA (Yuan et al., NeurIPS 2024, arXiv 2405.17484), as in PEFT: W under a chain of reflections.

W′ = W·H₁·H₂·…·H_r with Hⱼ = I − 2uⱼuⱼᵀ/uⱼᵀuⱼ. The columns of U are Kaiming-uniform in equal pairs, whose reflections
cancel, so that it starts at the identity. Dropout acts on the layer's whole input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import LowRank, kaiming_uniform
from delora.randomness import Draw


class HRA(LowRank):
    """Householder reflection adaptation. Shapes as in `delora.methods.base`; U (K, I, R)."""

    drops_whole_input = True

    def __init__(self, weight_OI: Tensor, draw: Draw, *, rank: int):
        super().__init__()
        if rank % 2:
            raise ValueError(f"rank={rank} is odd: reflections start in pairs that cancel")
        halves = kaiming_uniform(draw, "U", (weight_OI.shape[1], rank // 2))
        self.U = nn.Parameter(halves.repeat_interleave(2, 2))

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        columns, rows = self._turn()
        return weight_OI @ columns, rows

    def _turn(self) -> tuple[Tensor, Tensor]:
        """Two matrices (K, I, R) and (K, R, I) whose product is H₁·…·H_r − I."""
        u = F.normalize(self.U, dim=1, eps=0)
        first, second = u[:, :, ::2], u[:, :, 1::2]
        between = first - second
        # Of a pair with d = u − v: H_u·H_v − I = −2u(d + ‖d‖²v)ᵀ + 2dvᵀ, which is exactly 0 where u = v.
        downs = -2 * (between + between.square().sum(1, keepdim=True) * second)
        columns, rows = first.new_empty(0), first.new_empty(0)
        for j in range(first.shape[2]):
            pair = torch.stack([first[:, :, j], between[:, :, j]], 2)
            its_rows = torch.stack([downs[:, :, j], 2 * second[:, :, j]], 1)
            if j == 0:
                columns, rows = pair, its_rows
                continue
            # (I + C·R)·(I + c·r) = I + [C, c + C·R·c]·[R; r]
            columns = torch.cat([columns, pair + columns @ (rows @ pair)], 2)
            rows = torch.cat([rows, its_rows], 1)
        return columns, rows
