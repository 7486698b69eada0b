"""OFT (Qiu et al., NeurIPS 2023, arXiv 2306.07280), as in PEFT: W under block-diagonal rotations of its input.

W′ = W·blockdiag(K₁, …, K_M)ᵀ, with Q skew-symmetric from the trained upper triangle R and
neumann_terms=null   K = (I − Q)·(I + Q)⁻¹, the Cayley transform
neumann_terms=5      K = I + 2Q + 2Q² + 2Q³ + Q⁴, so many terms of (I + Q)·(I − Q)⁻¹: PEFT's default. It turns the other
way, and is a rotation only while Q is small. R starts at 0. Dropout acts on the layer's whole input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import LinearMethod, zeros
from delora.randomness import Draw


class OFT(LinearMethod):
    """Orthogonal finetuning. Shapes as in `delora.methods.base`; R (K, M, D·(D − 1)/2), by rows of the triangle."""

    places_2P: Tensor

    def __init__(self, weight_OI: Tensor, draw: Draw, *, block_size: int, neumann_terms: int | None):
        super().__init__()
        in_features = weight_OI.shape[1]
        if in_features % block_size:
            raise ValueError(f"block_size={block_size} does not divide the layer's width {in_features}")
        self.block_size, self.terms = block_size, neumann_terms
        places_2P = torch.triu_indices(block_size, block_size, 1, device=weight_OI.device)
        self.register_buffer("places_2P", places_2P, persistent=False)
        self.R = nn.Parameter(zeros(draw, (in_features // block_size, places_2P.shape[1])))

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        # x·blockdiag(K) as x + x·blockdiag(K − I), each block by itself
        x_KMND = dropped_KNI.unflatten(2, (-1, self.block_size)).transpose(1, 2)
        moved_KNI = (x_KMND @ self._turn()).transpose(1, 2).flatten(2)
        return F.linear(dropped_KNI + moved_KNI, weight_OI, bias_O)

    def delta(self, weight_OI: Tensor) -> Tensor:
        weight_MOD = weight_OI.unflatten(1, (-1, self.block_size)).transpose(0, 1)
        return (weight_MOD @ self._turn().mT).transpose(1, 2).flatten(2)

    def _turn(self) -> Tensor:
        """K − I of each block, (K, M, D, D), which is exactly 0 at the start."""
        rows_P, columns_P = self.places_2P
        upper = self.R.new_zeros(*self.R.shape[:2], self.block_size, self.block_size)
        upper[:, :, rows_P, columns_P] = self.R
        Q = upper - upper.mT
        if self.terms is None:
            eye = torch.eye(self.block_size, dtype=Q.dtype, device=Q.device)
            return torch.linalg.solve_ex(eye + Q, -2 * Q, left=False)[0]
        power, total = Q, 2 * Q
        for _ in range(self.terms - 3):
            power = power @ Q
            total = total + 2 * power
        return total + power @ Q
