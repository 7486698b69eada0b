"""ETHER and ETHER+ (Bini et al. 2024, arXiv 2405.20271), in the paper's block-diagonal form.

Each of M blocks is H = I − 2uuᵀ/uᵀu (ETHER, a reflection) or H = I − uuᵀ/uᵀu + vvᵀ/vᵀv (ETHER+, relaxed);
W′ = W·blockdiag(H) for side=in, blockdiag(H)·W for side=out, blockdiag(H2)·W·blockdiag(H) for side=both.
u is Kaiming-uniform and v = −u, so that ETHER+ starts at the identity; ETHER does not.
Dropout acts on the layer's whole input, the frozen path included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import Method, kaiming_uniform
from delora.randomness import Draw


class ETHER(Method):
    """Hyperplane reflections. Shapes as in `delora.methods.base`; u, u2 (K, M, D)."""

    relaxed = False

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

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        x = dropped_KNI + self._turn(dropped_KNI, "") if self.on_input else dropped_KNI
        if not self.on_output:
            return F.linear(x, weight_OI, bias_O)
        y = F.linear(x, weight_OI)
        y = y + self._turn(y, self.output_suffix)
        return y if bias_O is None else y + bias_O

    def delta(self, weight_OI: Tensor) -> Tensor:
        # H is symmetric: W·H turns the rows of W, H·W those of its transpose.
        turned = weight_OI.expand(self._trials(), -1, -1)
        delta = torch.zeros_like(turned)
        if self.on_input:
            delta = self._turn(turned, "")
            turned = turned + delta
        if self.on_output:
            delta = delta + self._turn(turned.mT, self.output_suffix).mT
        return delta

    def _trials(self) -> int:
        return next(self.parameters()).shape[0]

    def _turn(self, x_KND: Tensor, suffix: str) -> Tensor:
        """(H − I)·x along the last dimension, blockwise."""
        u, v = getattr(self, f"u{suffix}"), getattr(self, f"v{suffix}", None)
        x_KNMD = x_KND.unflatten(-1, u.shape[1:])
        turned = -2 * _project(x_KNMD, u) if v is None else _project(x_KNMD, v) - _project(x_KNMD, u)
        return turned.flatten(-2)


class ETHERPlus(ETHER):
    """Relaxed hyperplane reflections; v, v2 (K, M, D)."""

    relaxed = True


def _project(x_KNMD: Tensor, u_KMD: Tensor) -> Tensor:
    """uuᵀ/uᵀu · x for each block, (K, N, M, D)."""
    inner = torch.einsum("knmd,kmd->knm", x_KNMD, u_KMD) / u_KMD.square().sum(-1)[:, None]
    return inner[..., None] * u_KMD[:, None]
