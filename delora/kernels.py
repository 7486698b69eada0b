"""Triton kernels: what `delora.attention.padded_attention` computes, without padding. Shapes as there.

Forward, a program has a block of an example's queries and takes the keys block by block (Dao et al. 2022, arXiv
2205.14135). Backward, it has all keys, so that no gradient is summed across programs and results do not depend on the
order in which these run: a kernel is started for each power of two up to the span, and takes the examples that it holds
best. Few examples are as long as the longest, so what a program holds is sized by its registers: 32 values of a matrix
in each thread. The dropout is that of `delora.randomness.Dropout`.
"""

import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora.data.batches import Layout
from delora.randomness import Dropout

if TYPE_CHECKING:
    from delora.attention import Relative

if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
    raise ImportError("Triton needs a C compiler")

SMALLEST, LARGEST = 32, 512  # keys that a program can hold
MOST = 64 * LARGEST  # values of an example's keys, which shared memory holds with what else is there
SIZES = ("examples", "tokens", "distances")  # arguments for whose values nothing is compiled anew
BLOCK = 64  # queries and keys of a forward program, where the example is longer than the smallest


def can_attend(q: Tensor, layout: Layout) -> bool:
    """Whether the kernel takes these inputs; it multiplies half-precision numbers only."""
    width = q.shape[-1]
    fits = width in (16, 32, 64, 128) and layout.span <= LARGEST and width * layout.span <= MOST
    return q.is_cuda and q.dtype == torch.bfloat16 and fits


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scaling: float,
    dropout: Dropout | None,
    relative: "Relative | None" = None,
) -> Tensor:
    """As `delora.attention.packed_attention`."""
    here = (layout.first_KB, layout.length_KB)
    if dropout is None:
        hashed: tuple[Tensor | None, ...] = (None, None, None, None)
    else:
        hashed = (dropout.keys.key_KN, dropout.place, dropout.threshold_K, dropout.scale_K)
    bias = None if relative is None or relative.bias_HR is None else relative.bias_HR.contiguous()
    window = -1 if relative is None or relative.window is None else relative.window
    return _attend(q, k, v, *here, *hashed, bias, window, layout.span, scaling)[0]


@torch.library.custom_op("delora::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_KB: Tensor,
    length_KB: Tensor,
    key_KN: Tensor | None,
    place: Tensor | None,
    threshold_K: Tensor | None,
    scale_K: Tensor | None,
    bias: Tensor | None,
    window: int,
    span: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The result (K, N, H, D), and the logarithm of the softmax's sum (K, N, H)."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    trials, tokens, heads, width = q.shape
    y = torch.empty_like(q)
    total = torch.empty(trials, tokens, heads, dtype=torch.float32, device=q.device)
    examples = first_KB.shape[1]
    for block in (SMALLEST, BLOCK) if span > SMALLEST else (SMALLEST,):
        _attend_kernel[(trials * examples, heads, 1 if block == SMALLEST else triton.cdiv(span, block))](
            *(q, k, v, y, total, first_KB, length_KB, key_KN, place, threshold_K, scale_K, bias, window, scaling),
            *(examples, tokens, 0 if bias is None else bias.shape[1]),
            *(heads, width, block, block, block == SMALLEST, key_KN is not None, bias is not None, window >= 0),
            num_warps=block // 16,
            num_stages=2,
        )
    return y, total


def _sizes(span: int) -> list[int]:
    return [SMALLEST << i for i in range(5) if SMALLEST << i < 2 * max(span, SMALLEST)]


@_attend.register_fake
def _(q, k, v, first_KB, length_KB, key_KN, place, threshold_K, scale_K, bias, window, span, scaling):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("delora::attend_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    total: Tensor,
    first_KB: Tensor,
    length_KB: Tensor,
    key_KN: Tensor | None,
    place: Tensor | None,
    threshold_K: Tensor | None,
    scale_K: Tensor | None,
    bias: Tensor | None,
    window: int,
    span: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, q, k, v = gradient.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    trials, tokens, heads, width = q.shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    examples = first_KB.shape[1]
    for keys in _sizes(span):
        queries, warps = _backward_sizes(keys, max(width, 32))
        _backward_kernel[(trials * examples, heads)](
            *(gradient, q, k, v, y, total, dq, dk, dv),
            *(first_KB, length_KB, key_KN, place, threshold_K, scale_K, bias, window, scaling),
            *(examples, tokens, 0 if bias is None else bias.shape[1]),
            *(heads, width, queries, keys, keys == SMALLEST, key_KN is not None, bias is not None, window >= 0),
            num_warps=warps,
            num_stages=1,
        )
    return dq, dk, dv


def _backward_sizes(keys: int, width: int) -> tuple[int, int]:
    """Queries at a time and warps of a backward program: the fastest of those that were measured on an H200."""
    queries = 16 if keys * width >= MOST or (width == 32 and keys >= 128) else 32
    if keys == SMALLEST:
        return queries, 2
    return queries, 4 if keys * width <= MOST // 4 else 8 if keys * width < MOST else 16


@_attend_backward.register_fake
def _(
    gradient, q, k, v, y, total, first_KB, length_KB, key_KN, place, threshold_K, scale_K, bias, window, span, scaling
):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.span, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(gradient, *ctx.saved_tensors, ctx.window, ctx.span, ctx.scaling), *[None] * 10


_attend.register_autograd(_gradients, setup_context=_keep)


@triton.jit
def _mix(x):
    """`delora.randomness._mix` of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x


@triton.jit
def _dropped(key, t, place, threshold, head):
    """Which attention weights are dropped, of keys t for queries whose tokens have these keys of dropout: one of both
    along the rows, the other along the columns."""
    place = place.to(tl.uint32, bitcast=True)
    column = _mix((t >> 1).to(tl.uint32) + place)
    column = _mix(column + _mix((tl.zeros([1, 1], tl.uint32) + head.to(tl.uint32)) + 1))
    bits = _mix(_mix(key.to(tl.uint32, bitcast=True) ^ place) ^ column)
    shift = (16 - 16 * (t & 1)).to(tl.uint32)  # its half of the hash, moved up so that its sign is the number's
    return ((bits << shift).to(tl.int32, bitcast=True) >> 16) < threshold


@triton.jit
def _is_mine(length, KEYS: tl.constexpr, FIRST_SIZE: tl.constexpr):
    """Whether an example is for the kernel of this size: it fits, and not into the one before."""
    return (length <= KEYS) & (FIRST_SIZE | (length > KEYS // 2))


@triton.jit
def _bias(BIAS, m, t, head, length, distances):
    """The bias of keys t for queries m: of distance −R + 1 first, where there are 2·R − 1 distances."""
    at = t - m + distances // 2
    inside = (m < length) & (t < length)
    return tl.load(BIAS + head * distances + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _is_seen(m, t, length, window, WINDOWED: tl.constexpr):
    """Which keys t queries m see; a query behind the example's end sees what its first would."""
    seen = t < length
    if WINDOWED:
        seen = seen & ((tl.abs(t - m) <= window) | (m >= length))
    return seen


@triton.jit
def _fill(X, first, end, head, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros in what fills a row after its last example."""
    for token in range(first, end, 32):
        row, zeros = token + tl.arange(0, 32), tl.zeros([32, WIDTH], X.dtype.element_ty)
        at = (row * HEADS + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(X + at, zeros, mask=(row < end)[:, None])


@triton.jit(do_not_specialize=SIZES)
def _attend_kernel(
    Q, K, V, Y, TOTAL, FIRST, LENGTH, KEY, PLACE, THRESHOLD, SCALE, BIAS, window, scaling, examples, tokens, distances,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FIRST_SIZE: tl.constexpr,
    DROPS: tl.constexpr, BIASED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one example."""
    example, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(LENGTH + example)
    mine = length <= KEYS if FIRST_SIZE else length > KEYS // 2
    if (block * QUERIES < length) & mine:
        trial = example // examples
        start = trial.to(tl.int64) * tokens + tl.load(FIRST + example)
        if (block == 0) & (example % examples == examples - 1):
            _fill(Y, start + length, (trial.to(tl.int64) + 1) * tokens, head, HEADS, WIDTH)
        m, d = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
        at_m = (start + m)[:, None] * (HEADS * WIDTH) + head * WIDTH + d[None, :]
        in_m = (m < length)[:, None]
        q = tl.load(Q + at_m, mask=in_m, other=0)
        # Lower than any score, and finite: a window may hide a whole block, which the next one then outweighs.
        top, total = tl.full([QUERIES], -1e30, tl.float32), tl.zeros([QUERIES], tl.float32)
        y, scale = tl.zeros([QUERIES, WIDTH], tl.float32), 1.0
        if DROPS:
            key = tl.load(KEY + start + m, mask=m < length, other=0)
            place, threshold = tl.load(PLACE), tl.load(THRESHOLD + trial)
            scale = tl.load(SCALE + trial).to(tl.float32)
        for first in range(0, length, KEYS):
            t = first + tl.arange(0, KEYS)
            at_t = (start + t)[:, None] * (HEADS * WIDTH) + head * WIDTH + d[None, :]
            in_t = (t < length)[:, None]
            k, v = tl.load(K + at_t, mask=in_t, other=0), tl.load(V + at_t, mask=in_t, other=0)
            scores = tl.dot(q, tl.trans(k)) * scaling
            if BIASED:
                scores += _bias(BIAS, m[:, None], t[None, :], head, length, distances)
            scores = tl.where(_is_seen(m[:, None], t[None, :], length, window, WINDOWED), scores, -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            weights, fall = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
            top, total = higher, total * fall + tl.sum(weights, 1)
            if DROPS:
                drop = _dropped(key[:, None], t[None, :], place, threshold, head)
                weights = tl.where(drop, 0.0, weights)
            y = tl.dot(weights.to(v.dtype), v, y * fall[:, None])
        tl.store(TOTAL + (start + m) * HEADS + head, top + tl.log(total), mask=m < length)
        tl.store(Y + at_m, (y * (scale / total)[:, None]).to(Y.dtype.element_ty), mask=in_m)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    G, Q, K, V, Y, TOTAL, DQ, DK, DV, FIRST, LENGTH, KEY, PLACE, THRESHOLD, SCALE, BIAS, window, scaling, examples,
    tokens, distances,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FIRST_SIZE: tl.constexpr,
    DROPS: tl.constexpr, BIASED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of one example.

    Its matrices have keys along the rows, as have the sums dK and dV: what these add up stays in the registers of the
    threads that computed it. Factors that all share come last.
    """
    example, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(LENGTH + example)
    if _is_mine(length, KEYS, FIRST_SIZE):
        trial = example // examples
        start = trial.to(tl.int64) * tokens + tl.load(FIRST + example)
        if example % examples == examples - 1:
            end = (trial.to(tl.int64) + 1) * tokens
            _fill(DQ, start + length, end, head, HEADS, WIDTH)
            _fill(DK, start + length, end, head, HEADS, WIDTH)
            _fill(DV, start + length, end, head, HEADS, WIDTH)
        t, d = tl.arange(0, KEYS), tl.arange(0, WIDTH)
        at_t = (start + t)[:, None] * (HEADS * WIDTH) + head * WIDTH + d[None, :]
        in_t = (t < length)[:, None]
        k, v = tl.load(K + at_t, mask=in_t, other=0), tl.load(V + at_t, mask=in_t, other=0)
        dk, dv = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
        scale = 1.0
        if DROPS:
            place, threshold = tl.load(PLACE), tl.load(THRESHOLD + trial)
            scale = tl.load(SCALE + trial).to(tl.float32)
        for first in range(0, length, QUERIES):
            m = first + tl.arange(0, QUERIES)
            at_m = (start + m)[:, None] * (HEADS * WIDTH) + head * WIDTH + d[None, :]
            in_m = (m < length)[:, None]
            q, g = tl.load(Q + at_m, mask=in_m, other=0), tl.load(G + at_m, mask=in_m, other=0)
            y = tl.load(Y + at_m, mask=in_m, other=0)
            total = tl.load(TOTAL + (start + m) * HEADS + head, mask=m < length, other=0)
            mean = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1) / scale
            weights = tl.dot(k, tl.trans(q)) * scaling
            if BIASED:
                weights += _bias(BIAS, m[None, :], t[:, None], head, length, distances)
            seen = _is_seen(m[None, :], t[:, None], length, window, WINDOWED)
            weights = tl.where(seen, tl.exp(weights - total[None, :]), 0.0)
            dropped, dweights = weights, tl.dot(v, tl.trans(g))
            if DROPS:
                key = tl.load(KEY + start + m, mask=m < length, other=0)
                drop = _dropped(key[None, :], t[:, None], place, threshold, head)
                dropped, dweights = tl.where(drop, 0.0, weights), tl.where(drop, 0.0, dweights)
            dscores = (weights * (dweights - mean[None, :])).to(q.dtype)
            dv = tl.dot(dropped.to(q.dtype), g, dv)
            dk = tl.dot(dscores, q, dk)
            dq = tl.dot(tl.trans(dscores), k) * (scale * scaling)
            tl.store(DQ + at_m, dq.to(q.dtype), mask=in_m)
        tl.store(DK + at_t, (dk * (scale * scaling)).to(k.dtype), mask=in_t)
        tl.store(DV + at_t, (dv * scale).to(k.dtype), mask=in_t)
