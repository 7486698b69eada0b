"""Attention within the examples of packed rows, its dropout hashed: plain, or as a Triton kernel.

Shapes: K trials, B examples a trial, N tokens of a trial's row, T tokens of the longest example, H heads, D their
width. Where the examples lie in the rows says `delora.data.batches.Layout`.
"""

from typing import Any

import torch
from torch import Tensor

from delora.data.batches import Layout
from delora.randomness import Dropout

try:
    from delora import kernels
except ImportError:  # no Triton here, or nothing to compile with
    kernels = None  # type: ignore[assignment]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, dropout: Dropout | None
) -> Tensor:
    """softmax(q·kᵀ·scaling)·v within each example, (K, N, H, D) for q, k and v of that shape.

    `dropout` is None where nothing is dropped. What fills a row after its examples gets a finite value.
    """
    attend = kernels.attention if kernels is not None and kernels.can_attend(q, layout) else padded_attention
    return attend(q, k, v, layout, scaling, dropout)


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, dropout: Dropout | None
) -> Tensor:
    """Pads the examples to the layout's span, attends, and takes the padding out again. As `packed_attention`."""
    trials, tokens, heads, width = q.shape
    trial_K1 = torch.arange(trials, device=q.device)[:, None]
    here_KBT = layout.place_T < layout.length_KB[..., None]
    # Padding is a copy of the example's own first token: what happens in a trial stays there.
    to_pad_KBT = (layout.first_KB + trial_K1 * tokens)[..., None] + layout.place_T * here_KBT
    example_KN = layout.example_KN + trial_K1 * layout.first_KB.shape[1]
    to_pack_KN = example_KN * layout.span + layout.position_KN
    real_KN = torch.arange(tokens, device=q.device) < layout.length_KB.sum(1, keepdim=True)

    def pad(x: Tensor) -> Tensor:
        x = _Rearrange.apply(x.reshape(-1, heads * width), to_pad_KBT, to_pack_KN, real_KN)
        return x.view(-1, layout.span, heads, width).transpose(1, 2)

    weights = pad(q) @ pad(k).mT * scaling
    weights = weights.masked_fill(~here_KBT.flatten(0, 1)[:, None, None], -torch.inf).softmax(-1)
    if dropout is not None:
        weights = dropout.of_weights(weights, dropout.keys.key_KN.take(to_pad_KBT))
    y = (weights @ pad(v)).transpose(1, 2).reshape(-1, heads * width)
    return _Rearrange.apply(y, to_pack_KN, to_pad_KBT, here_KBT).view(q.shape)


class _Rearrange(torch.autograd.Function):
    """Takes rows of x by `index`. The gradient takes them back by `inverse`, where `real` says that there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, real)
        return x.index_select(0, index.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inverse, real = ctx.saved_tensors
        taken = gradients[0].index_select(0, inverse.flatten())
        return taken.masked_fill_(~real.flatten()[:, None], 0), None, None, None
