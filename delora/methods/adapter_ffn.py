"""Adapter-FFN (Pfeiffer et al. 2021, arXiv 2005.00247), as in the adapters library.

o ← o + W_up·relu(W_down·LN(o + x) + b_down) + b_up for the output o of a layer's feed-forward block and its residual
x; LN is the layer's own, which the sum enters next: s = o + x becomes s + A(LN(s)). W ~ N(0, 0.02²), biases 0. Dropout
acts on the output of the bottleneck.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from delora.methods.adapter import Adapter


class AdapterFFN(Adapter):
    """A bottleneck with a residual, behind the LayerNorm. Shapes as in `delora.methods.base`."""

    activation = staticmethod(F.relu)

    def forward(self, h_KNH: Tensor, dropout: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
        return h_KNH + dropout(self.bottleneck(norm(h_KNH)))
