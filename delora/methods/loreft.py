"""LoReFT (Wu et al., NeurIPS 2024, arXiv 2404.03592), as in pyreft.

h ← h + Rᵀ(W·h + b − R·h) with orthonormal rows of R, for the first token's output of each layer. R is random at first,
W and b are those of a fresh linear layer: not the identity. Dropout acts on the edited hidden state.

pyreft has R = Q(X)ᵀ·baseᵀ (torch.nn.utils.parametrizations.orthogonal): Q(X) is a product of Householder reflections,
X = 0 below its diagonal at first, and base a random orthogonal matrix (H, H) that begins with R's start. Here base is
the product of the start's own reflections, 2·H·R numbers in the place of H².
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from delora.methods.base import HiddenMethod, kaiming_uniform
from delora.randomness import Draw


class LoReFT(HiddenMethod):
    """Low-rank linear subspace finetuning of representations. Shapes as in `delora.methods.base`."""

    of_first = True
    base: Tensor

    def __init__(self, width: int, draw: Draw, *, rank: int):
        super().__init__()
        start_KHR = torch.geqrf(draw.normal("R", (width, rank), 1.0).cpu())[0].to(draw.device)
        self.register_buffer("base", start_KHR)
        self.X = nn.Parameter(torch.zeros_like(start_KHR))
        self.W = nn.Parameter(kaiming_uniform(draw, "W", (rank, width)))
        self.bias = nn.Parameter(draw.uniform("bias", (rank,), width**-0.5))

    def rotation(self) -> Tensor:
        """Rᵀ, (K, H, R)."""
        with torch.autocast(self.X.device.type, enabled=False):  # half precision is not orthonormal
            eye_HR = torch.eye(*self.X.shape[1:], dtype=self.X.dtype, device=self.X.device)
            return reflect(self.base, -reflect(self.X, eye_HR.expand_as(self.X)))

    def forward(self, h_KNH: Tensor, dropout: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
        R_KHR = self.rotation()
        change_KNR = h_KNH @ (self.W.mT - R_KHR) + self.bias[:, None]
        return dropout(h_KNH + change_KNR @ R_KHR.mT)


def reflect(vectors: Tensor, x: Tensor) -> Tensor:
    """H₁·…·H_R·x, (K, H, R): H_j = I − 2vvᵀ/‖v‖² with v from column j below the diagonal, 1 on it and 0 above."""
    below, place_H = vectors.tril(-1), torch.arange(vectors.shape[1], device=x.device)
    for j in reversed(range(vectors.shape[2])):
        v_KH = below[:, :, j] + (place_H == j)
        gain_K = 2 / v_KH.square().sum(1)
        x = x - (gain_K[:, None] * v_KH)[:, :, None] * (v_KH[:, None] @ x)
    return x
