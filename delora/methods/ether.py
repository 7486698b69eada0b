"""ETHER and ETHER+ (Bini et al. 2024, arXiv 2405.20271), in the paper's block-diagonal form.

Each of M blocks is H = I − 2uuᵀ/uᵀu (ETHER, a reflection) or H = I − uuᵀ/uᵀu + vvᵀ/vᵀv (ETHER+, relaxed);
W′ = W·blockdiag(H) for side=in, blockdiag(H)·W for side=out, blockdiag(H2)·W·blockdiag(H) for side=both.
u is Kaiming-uniform and v = −u, so that ETHER+ starts at the identity; ETHER does not.
Dropout acts on the layer's whole input, the frozen path included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import LowRank, kaiming_uniform
from delora.randomness import Draw


class ETHER(LowRank):
    """Hyperplane reflections. Shapes as in `delora.methods.base`; u, u2 (K, M, D)."""

    relaxed, drops_whole_input = False, True

    def __init__(self, weight_OI: Tensor, draw: Draw, *, side: str, blocks: int):
        super().__init__()
        widths = {"in": {"": 1}, "out": {"": 0}, "both": {"": 1, "2": 0}}[side]
        self.on_input, self.on_output = side != "out", side != "in"
        self.output_suffix = "2" if side == "both" else ""
        for suffix, dimension in widths.items():
            width = weight_OI.shape[dimension]
            if width % blocks:
                raise ValueError(f"blocks={blocks} does not divide the layer's width {width}")
            u = kaiming_uniform(draw, f"u{suffix}", (blocks, width // blocks))
            self.register_parameter(f"u{suffix}", nn.Parameter(u))
            if self.relaxed:
                self.register_parameter(f"v{suffix}", nn.Parameter(-u))

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        # W′ = (I + C₂·R₂)·W·(I + C·R) = W + W·C·R + C₂·R₂·W·(I + C·R)
        ups, downs = [], []
        if self.on_input:
            columns, rows = self._turn("")
            ups.append(weight_OI @ columns)
            downs.append(rows)
        if self.on_output:
            columns, rows = self._turn(self.output_suffix)
            turned = rows @ weight_OI
            if self.on_input:
                turned = turned + (rows @ ups[0]) @ downs[0]
            ups.append(columns)
            downs.append(turned)
        return torch.cat(ups, 2), torch.cat(downs, 1)

    def _turn(self, suffix: str) -> tuple[Tensor, Tensor]:
        """Two matrices (K, M·D, S) and (K, S, M·D) whose product is blockdiag(H) − I; S is M, for ETHER+ 2·M."""
        u = F.normalize(getattr(self, f"u{suffix}"), dim=-1, eps=0)
        if not self.relaxed:
            rows = _block_rows(u)
            return -2 * rows.mT, rows
        # With unit vectors vvᵀ − uuᵀ = ((v − u)(v + u)ᵀ + (v + u)(v − u)ᵀ) / 2, which is exactly 0 at the start.
        v = F.normalize(getattr(self, f"v{suffix}"), dim=-1, eps=0)
        total, difference = _block_rows(v + u), _block_rows(v - u)
        return torch.cat([difference, total], 1).mT / 2, torch.cat([total, difference], 1)


class ETHERPlus(ETHER):
    """Relaxed hyperplane reflections; v, v2 (K, M, D)."""

    relaxed = True


def _block_rows(u_KMD: Tensor) -> Tensor:
    """Each block's vector in a row of its own, at the block's place: (K, M, M·D)."""
    blocks = torch.eye(u_KMD.shape[1], dtype=u_KMD.dtype, device=u_KMD.device)
    return (blocks[:, :, None] * u_KMD[:, :, None]).flatten(2)
