"""DeLoRA (Bini et al., ICLR 2025, arXiv 2503.18225).

With N(A, B) = Σⱼ bⱼaⱼᵀ / (‖bⱼ‖‖aⱼ‖) and c a scaling by the frozen weight's norms:

init=residual   ΔW = (λ/r)·(N(A, B) − N(A₀, B₀))·diag(c)   the authors' code; A₀, B₀ are frozen copies of the start
init=zero       ΔW = (λ/r)·N(A, B)·diag(c), B = 0 at first, each norm at least 1e-4   PEFT's start
scaling=column     c = the column norms of W   both codes
scaling=frobenius  c = ‖W‖_F   the paper's Eq. 8
scaling=none       c = 1   the paper's Table 1, (λ/r)·B·Ξ·A

The current λ scales both terms, where Eq. 9 of the paper folds the initial one into W; ‖ΔW‖ is bounded by 2λ·max c,
and ∂L/∂λ is exactly 0 at the start. Dropout acts on the input of the ΔW branch alone. λ has its own learning rate.
"""

import torch
from torch import Tensor, nn

from delora.methods.base import Bounded, kaiming_uniform, per_trial, zeros
from delora.randomness import Draw

PEFT_SMALLEST_NORM = 1e-4


class DeLoRA(Bounded):
    """Decoupled low-rank adaptation. Shapes as in `delora.methods.base`."""

    A0: Tensor
    B0: Tensor
    c_I: Tensor

    def __init__(
        self,
        weight_OI: Tensor,
        draw: Draw,
        *,
        rank: int,
        lambda_init: Tensor,
        lambda_lr: Tensor,
        init: str,
        scaling: str,
    ):
        super().__init__(lambda_init, lambda_lr)
        out_features, in_features = weight_OI.shape
        self.rank, self.residual = rank, init == "residual"
        self.A = nn.Parameter(kaiming_uniform(draw, "A", (rank, in_features)))
        start_B = (
            kaiming_uniform(draw, "B", (out_features, rank)) if self.residual else zeros(draw, (out_features, rank))
        )
        self.B = nn.Parameter(start_B)
        if self.residual:
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())
        self.register_buffer("c_I", _column_scale(weight_OI, scaling), persistent=False)

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        gain, rows = per_trial(self.strength() / self.rank), self._normalised(self.A, self.B)
        if not self.residual:
            return gain * self.B, rows
        # B·N − B₀·N₀ = (B − B₀)·N + B₀·(N − N₀): differences of small matrices, which are exactly 0 at the start.
        first_rows = self._normalised(self.A0, self.B0)
        up = torch.cat([self.B - self.B0, self.B0], 2)
        return gain * up, torch.cat([rows, rows - first_rows], 1)

    def _normalised(self, A: Tensor, B: Tensor) -> Tensor:
        """The rows of A·diag(c), divided by ‖aⱼ‖‖bⱼ‖, (K, R, I)."""
        norm_a, norm_b = A.norm(dim=2), B.norm(dim=1)
        if not self.residual:
            norm_a, norm_b = norm_a.clamp(min=PEFT_SMALLEST_NORM), norm_b.clamp(min=PEFT_SMALLEST_NORM)
        return A * self.c_I / (norm_a * norm_b)[:, :, None]


def _column_scale(weight_OI: Tensor, scaling: str) -> Tensor:
    match scaling:
        case "column":
            return weight_OI.norm(dim=0)
        case "frobenius":
            return weight_OI.norm().expand(weight_OI.shape[1]).clone()
        case "none":
            return weight_OI.new_ones(weight_OI.shape[1])
    raise ValueError(f"scaling={scaling!r}: expected column, frobenius or none")
