"""Attention of the fleet's encoders: within the examples of packed rows, or of padded ones; its dropout is hashed.

Shapes: K trials, B examples a trial, N tokens of a trial's row, T tokens of the longest example, H heads, D their
width. Where the examples lie in the rows says `delora.data.batches.Layout`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from delora.data.batches import Layout
from delora.randomness import Dropout

try:
    from delora import kernels
except ImportError:  # no Triton here, or nothing to compile with
    kernels = None  # type: ignore[assignment]

# In transformers' registry of attention functions: for known families of encoders, and for others.
NAME, OF_UNKNOWN = "delora", "delora-unknown"


class Relative(NamedTuple):
    """What depends on the distance between two tokens of an example.

    Attributes:
        bias_HR: added to the scaled products, (heads, 2·R − 1), by key − query + R − 1 for distances below R; no
            gradient flows into it.
        window: tokens further apart than this do not see each other.
    """

    bias_HR: Tensor | None = None
    window: int | None = None

    def scores(self, size: int, scores: Tensor) -> Tensor:
        """Scores (..., H, size, size) with the bias, and the lowest number where the window ends."""
        place = torch.arange(size, device=scores.device)
        distance = place - place[:, None]
        if self.bias_HR is not None:
            scores = scores + self.bias_HR[:, distance + self.bias_HR.shape[1] // 2]
        if self.window is not None:
            scores = scores.masked_fill(distance.abs() > self.window, torch.finfo(scores.dtype).min)
        return scores


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scaling: float,
    dropout: Dropout | None,
    relative: Relative | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scaling + relative)·v within each example, (K, N, H, D) for q, k and v of that shape.

    `dropout` is None where nothing is dropped. What fills a row after its examples gets a finite value.
    """
    attend = kernels.attention if kernels is not None and kernels.can_attend(q, layout) else padded_attention
    return attend(q, k, v, layout, scaling, dropout, relative)


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scaling: float,
    dropout: Dropout | None,
    relative: Relative | None = None,
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

    scores = pad(q) @ pad(k).mT * scaling
    if relative is not None:
        scores = relative.scores(layout.span, scores)
    weights = scores.masked_fill(~here_KBT.flatten(0, 1)[:, None, None], -torch.inf).softmax(-1)
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


# --- What encoders call


def encoder_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    bias_HR: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' interface: (K·B, heads, T, D), of packed batches (K, heads, N, D); its dropout is
    `module.dropout`, or else the first that the module has.

    Args:
        attention_mask: True where a token may be seen, or numbers to add; None where nothing is padded.
        sliding_window: as transformers counts it: tokens so far apart do not see each other.
        bias_HR: as in `Relative`.

    Returns:
        What was attended to, heads behind tokens, and no weights.

    Raises:
        RuntimeError: weights are to be dropped by a module whose dropout is not the fleet's.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None else sliding_window - 1
    relative = None if window is None and bias_HR is None else Relative(bias_HR, window)
    hashed = getattr(module, "dropout", None)
    if not isinstance(hashed, Dropout):
        hashed = next((child for child in module.children() if isinstance(child, Dropout)), None)
        if dropout and hashed is None:
            raise RuntimeError(f"{type(module).__name__} drops attention weights in a way of its own")
    if hashed is not None and hashed.keys.layout is not None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return packed_attention(q, k, v, hashed.keys.layout, scaling, hashed if dropout else None, relative), None
    if not dropout and relative is None:
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return y.transpose(1, 2), None
    scores = query @ key.mT * scaling
    if relative is not None:
        scores = relative.scores(query.shape[2], scores)
    if attention_mask is not None:
        lowest = torch.finfo(scores.dtype).min
        seen = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, lowest) if seen else scores + attention_mask
    weights = scores.softmax(-1)
    if dropout and hashed is not None:
        weights = hashed.of_weights(weights, hashed.keys.of_padded(query.shape[2]))
    return (weights @ value).transpose(1, 2), None


def padding_mask(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Which tokens may be seen, (K·B, 1, 1, T), for transformers' interface: of encoders in which `encoder_attention`
    knows by itself what else decides."""
    return None if attention_mask is None else attention_mask.bool()[:, None, None]


def whole_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """Which tokens may be seen, (K·B, 1, T, T), in a model of which nothing is known: it may be causal."""
    return sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False})


for name, mask in ((NAME, padding_mask), (OF_UNKNOWN, whole_mask)):
    AttentionInterface.register(name, encoder_attention)
    AttentionMaskInterface.register(name, mask)
