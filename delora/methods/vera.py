"""VeRA (Kopiczko et al., ICLR 2024, arXiv 2310.11454), as in PEFT.

W′ = W + diag(b)·B·diag(d)·A. A and B are random, frozen, and the same in all layers, which take as many of A's columns
and B's rows as they are wide. They follow from `projection_seed` alone, not from the trial's seed. d starts at
`d_initial`, b at 0. Dropout acts on the input of the branch alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from delora.methods.base import LowRank, zeros
from delora.randomness import Draw


class VeRA(LowRank):
    """Vectors around shared random matrices. Shapes as in `delora.methods.base`; A (R, widest I), B (widest O, R)."""

    given = ("A", "B")
    A_RI: Tensor
    B_OR: Tensor

    def __init__(
        self,
        weight_OI: Tensor,
        draw: Draw,
        *,
        projection_rank: int,
        projection_seed: int,
        d_initial: float,
        A: Tensor,
        B: Tensor,
    ):
        super().__init__()
        out_features, in_features = weight_OI.shape
        self.register_buffer("A_RI", A[:, :in_features], persistent=False)
        self.register_buffer("B_OR", B[:out_features], persistent=False)
        self.d = nn.Parameter(zeros(draw, (projection_rank,)) + d_initial)
        self.b = nn.Parameter(zeros(draw, (out_features,)))

    @classmethod
    def share(cls, linears: Sequence[nn.Linear], draw: Draw, **options: Any) -> Mapping[str, Tensor]:
        rank = options["projection_rank"]
        widest_out = max(linear.out_features for linear in linears)
        widest_in = max(linear.in_features for linear in linears)
        generator = torch.Generator().manual_seed(options["projection_seed"])

        def uniform(shape: tuple[int, int]) -> Tensor:
            bound = (6 / shape[1]) ** 0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(draw.device, draw.dtype)

        return {"A": uniform((rank, widest_in)), "B": uniform((widest_out, rank))}

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        return self.b[:, :, None] * self.B_OR, self.d[:, :, None] * self.A_RI
