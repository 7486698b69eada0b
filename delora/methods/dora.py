"""DoRA (Liu et al. 2024, arXiv 2402.09353), as in PEFT.

W′ = diag(m/n)·V with V = W + (α/r)·B·A and n the row norms of V, recomputed at each forward without gradient
(Section 4.3 there). m starts at W's row norms. `train_magnitude: false` holds m fixed (DeLoRA paper, Fig. 5).
With dropout the base path keeps the undropped input and the correction m/n − 1 sees the dropped one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import per_trial
from delora.methods.lora import LoRA
from delora.randomness import Draw


class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation. Shapes as in `delora.methods.base`."""

    square_O: Tensor

    def __init__(self, weight_OI: Tensor, draw: Draw, *, rank: int, alpha: Tensor, train_magnitude: bool):
        super().__init__(weight_OI, draw, rank=rank, alpha=alpha)
        self.register_buffer("square_O", weight_OI.square().sum(1), persistent=False)
        magnitude = self.square_O.sqrt().repeat(len(draw.seeds), 1)
        self.m = nn.Parameter(magnitude, requires_grad=train_magnitude)

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ratio_K1O = (self.m / self._norm(weight_OI))[:, None]
        frozen = F.linear(x_KNI, weight_OI)
        if dropped_KNI is x_KNI:
            y = ratio_K1O * (frozen + self.branch(x_KNI, weight_OI))
        else:
            correction = (ratio_K1O - 1) * F.linear(dropped_KNI, weight_OI)
            y = frozen + correction + ratio_K1O * self.branch(dropped_KNI, weight_OI)
        return y if bias_O is None else y + bias_O

    @torch.no_grad()
    def _norm(self, weight_OI: Tensor) -> Tensor:
        """Row norms of V, (K, O), without forming V: ‖w + s·Aᵀb‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·b."""
        scaled_B = per_trial(self.scale_K) * self.B
        cross_KOR = (self.A @ weight_OI.mT).mT
        gram_KOR = scaled_B @ (self.A @ self.A.mT)
        return (self.square_O + (scaled_B * (2 * cross_KOR + gram_KOR)).sum(-1)).sqrt()

    def delta(self, weight_OI: Tensor) -> Tensor:
        ratio_KO1 = (self.m / self._norm(weight_OI))[:, :, None]
        return (ratio_KO1 - 1) * weight_OI + ratio_KO1 * super().delta(weight_OI)
