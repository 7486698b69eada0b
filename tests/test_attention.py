"""Attention over packed rows: what padding would give, plain and as a Triton kernel, with the same dropout."""

import hashlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import CPU, CUDA
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from delora import attention
from delora.data.batches import Layout
from delora.randomness import Dropout, TokenKeys

LENGTHS = [[5, 17, 1, 40], [33, 2, 60, 9]]  # of two trials' examples


def make_layout(lengths: list[list[int]], device: torch.device) -> Layout:
    length_KB = torch.tensor(lengths)
    tokens = int(length_KB.sum(1).max())
    first_KB = length_KB.cumsum(1) - length_KB
    example_KN, position_KN = torch.full((len(lengths), tokens), len(lengths[0]) - 1), torch.zeros(2, tokens)
    for k, row in enumerate(lengths):
        example_KN[k, : sum(row)] = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row))
        position_KN[k, : sum(row)] = torch.cat([torch.arange(n) for n in row])
    parts = (example_KN.int(), position_KN.int(), first_KB, length_KB.int())
    place_T = torch.arange(64 if length_KB.max() <= 64 else 512, dtype=torch.int32)
    return Layout(*(part.to(device) for part in (*parts, place_T)))


def make_inputs(layout: Layout, dtype: torch.dtype, device: torch.device, heads: int = 3, width: int = 16):
    generator = torch.Generator().manual_seed(0)
    shape = (*layout.example_KN.shape, heads, width)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(4)]


def make_dropout(layout: Layout, device: torch.device) -> Dropout:
    keys = TokenKeys([3, 4], device)
    keys.set(layout, torch.tensor(7), earlier=2)
    return Dropout(keys, "here", [0.1, 0.4]).train()


def make_relative(layout: Layout, heads: int, kind: str | None) -> attention.Relative | None:
    """A bias for each head and distance, or a window."""
    if kind is None:
        return None
    table = torch.randn(heads, 2 * layout.span - 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return attention.Relative(table.to(layout.first_KB.device)) if kind == "bias" else attention.Relative(window=6)


def results(attend, layout, inputs, dropout, relative=None):
    """The result and the gradients, of real tokens."""
    q, k, v, g = inputs
    real = torch.arange(q.shape[1], device=q.device) < layout.length_KB.sum(1, keepdim=True)
    if relative is not None and relative.bias_HR is not None:
        relative = relative._replace(bias_HR=relative.bias_HR.to(q.dtype))
    y = attend(q, k, v, layout, 0.25, dropout, relative)
    gradients = torch.autograd.grad((y * g)[real].sum(), (q, k, v))
    assert y.isfinite().all()
    assert all((gradient[~real] == 0).all() for gradient in gradients)
    return [x[real] for x in (y, *gradients)]


def one_by_one(q, k, v, layout, scaling, dropout, relative=None):
    """Each example alone, as torch has it; the dropout is drawn for the padded example."""
    y = torch.zeros_like(q)
    for trial, (firsts, lengths) in enumerate(zip(layout.first_KB, layout.length_KB, strict=True)):
        for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
            at = slice(first, first + length)
            a, b, c = (x[trial, at].transpose(0, 1) for x in (q, k, v))
            scores = a @ b.mT * scaling
            for i, j in itertools.product(range(length), repeat=2) if relative is not None else ():
                if relative.bias_HR is not None:
                    scores[:, i, j] += relative.bias_HR[:, j - i + layout.span - 1]
                elif abs(i - j) > relative.window:
                    scores[:, i, j] = -torch.inf
            weights = scores.softmax(-1)
            if dropout is not None:
                every_trial = weights.expand(2, *weights.shape).flatten(0, 1).view(2, *weights.shape)
                keys = dropout.keys.key_KN[:, None, at][[trial, trial]]
                keys[1 - trial] = 0
                weights = dropout.of_weights(every_trial, keys)[trial]
            y[trial, at] = (weights @ c).transpose(0, 1)
    return y


def pad(x, layout):
    """Packed rows (K, N, H, D) as transformers pads and passes them, (K·B, H, T, D)."""
    padded = x.new_zeros(*layout.length_KB.shape, int(layout.length_KB.max()), *x.shape[2:])
    for k, b in np.ndindex(*layout.length_KB.shape):
        first, length = int(layout.first_KB[k, b]), int(layout.length_KB[k, b])
        padded[k, b, :length] = x[k, first : first + length]
    return padded.flatten(0, 1).transpose(1, 2)


@pytest.mark.parametrize("dropped", [False, True])
def test_padded_batches_are_attended_as_packed_ones(dropped):
    """What every encoder trains with whose examples are not packed, dropped where the same token is in a packed row."""
    layout = make_layout(LENGTHS, CPU)
    q, k, v, g = make_inputs(layout, torch.float64, CPU)
    dropout = make_dropout(layout, CPU)
    expected = results(attention.padded_attention, layout, (q, k, v, g), dropout if dropped else None)

    length_KB, longest = layout.length_KB, int(layout.length_KB.max())
    mask_BT = torch.arange(longest) < length_KB.flatten()[:, None]
    place_KN = torch.arange(length_KB.shape[1] * longest, dtype=torch.int32).expand(len(length_KB), -1)
    parts = (place_KN // longest, place_KN % longest, place_KN[:, ::longest].long(), length_KB, place_KN[0, :longest])
    dropout.keys.set(Layout(*parts), torch.tensor(7), earlier=2)
    dropout.keys.layout = None
    attend = ALL_ATTENTION_FUNCTIONS["delora"]
    module = SimpleNamespace(dropout=dropout, training=True)
    y, _ = attend(
        module, *(pad(x, layout) for x in (q, k, v)), mask_BT[:, None, None], scaling=0.25, dropout=0.4 * dropped
    )
    (y * pad(g, layout).transpose(1, 2))[mask_BT].sum().backward()
    packed = torch.arange(q.shape[1]) < length_KB.sum(1, keepdim=True)
    found = (y[mask_BT], *(x.grad[packed] for x in (q, k, v)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [None, "bias", "window"])
@pytest.mark.parametrize("dropped", [False, True])
def test_packed_attention_is_each_example_alone(dropped, kind):
    layout = make_layout(LENGTHS, CPU)
    inputs, dropout = make_inputs(layout, torch.float64, CPU), make_dropout(layout, CPU) if dropped else None
    relative = make_relative(layout, 3, kind)
    found = results(attention.padded_attention, layout, inputs, dropout, relative)
    for one, other in zip(found, results(one_by_one, layout, inputs, dropout, relative), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def mix(x: int) -> int:
    """32 bits scrambled: xor-shift, multiply, xor-shift, multiply."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x &= 0xFFFFFFFF
        x = (x ^ x >> shift) * factor
    return x & 0xFFFFFFFF


def hash32(*parts: object) -> int:
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & 0xFFFFFFFF


def is_dropped(rate, seed, step, place, example, position, element, head=None) -> bool:
    """The hash of a mask in plain integers; two elements share one, of 16 bits each."""
    key = mix(hash32("dropout", seed) + step * 0x9E3779B9)
    key = mix(mix(mix(key + example) + position) ^ hash32("place", place))
    column = mix(element // 2 + hash32("place", place))
    bits = mix(key ^ (column if head is None else mix(column + mix(head + 1))))
    half = (bits >> 16 if element % 2 else bits) & 0xFFFF
    signed = half - (1 << 16 if half >= 1 << 15 else 0)
    return signed < round(rate * (1 << 16)) - (1 << 15)


def test_a_mask_is_this_function_of_seed_step_place_and_position():
    """Results are repeated by other versions, devices and Triton's kernel only while it stays this one."""
    layout, width = make_layout(LENGTHS, CPU), 7
    dropout, rates, seeds = make_dropout(layout, CPU), (0.1, 0.4), (3, 4)
    token = dropout(torch.ones(2, layout.example_KN.shape[1], width)) == 0
    of_first = Dropout(dropout.keys, "here", rates).train()
    of_first.of_first = True
    first = of_first(torch.ones(2, 4, width)) == 0
    two_axes = Dropout(dropout.keys, "here", rates).train()(torch.ones(8, width)).view(2, 4, width) == 0
    heads, at = 3, layout.first_KB[:, :, None] + torch.arange(1)
    keys = dropout.keys.key_KN.gather(1, at.flatten(1))[:, :, None]
    weight = dropout.of_weights(torch.ones(8, heads, 1, width), keys).view(2, 4, heads, width) == 0
    for k, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        for b, length in enumerate(LENGTHS[k]):
            for e in range(width):
                for position in range(length):
                    expected = is_dropped(rate, seed, 7, "here", 2 + b, position, e)
                    assert token[k, layout.first_KB[k, b] + position, e] == expected
                expected = is_dropped(rate, seed, 7, "here", 2 + b, 0, e)
                assert first[k, b, e] == two_axes[k, b, e] == expected
                for head in range(heads):
                    assert weight[k, b, head, e] == is_dropped(rate, seed, 7, "here", 2 + b, 0, e, head)


def test_dropped_shares_are_the_rates_and_masks_differ():
    layout = make_layout([[100, 400], [300, 200]], CPU)
    dropout = make_dropout(layout, CPU)
    ones = torch.ones(2, 500, 64, dtype=torch.float64)
    dropped = dropout(ones)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.9, 1 / 0.6], abs=1e-4)
    shares = (dropped == 0).double().mean((1, 2)).tolist()
    assert shares == pytest.approx([0.1, 0.4], abs=0.01)  # five standard deviations
    elsewhere = Dropout(dropout.keys, "there", [0.1, 0.4]).train()(ones)
    together = ((dropped == 0) & (elsewhere == 0)).double().mean((1, 2)).tolist()
    assert together == pytest.approx([0.01, 0.16], abs=0.01)
    neighbours = ((dropped[:, :, 1:] == 0) & (dropped[:, :, :-1] == 0)).double().mean((1, 2)).tolist()
    assert neighbours == pytest.approx([0.01, 0.16], abs=0.01)


@pytest.mark.parametrize("lengths", [LENGTHS, [[100, 20], [7, 130]], [[64, 3, 129], [65, 300, 2]]])
@pytest.mark.parametrize("kind", [None, "bias", "window"])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_kernel_is_the_plain_attention(lengths, dropped, kind):
    """On a GPU; or on the CPU where Triton is installed and TRITON_INTERPRET=1."""
    kernels = pytest.importorskip("delora.kernels", reason="needs Triton", exc_type=ImportError)
    device = CUDA if torch.cuda.is_available() else CPU
    if device == CPU and not kernels.triton.knobs.runtime.interpret:
        pytest.skip("needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)")
    layout = make_layout(lengths, device)
    dtype, bound = (torch.bfloat16, 0.01) if device == CUDA else (torch.float32, 1e-6)
    inputs = make_inputs(layout, dtype, device, heads=2, width=32)
    dropout = make_dropout(layout, device) if dropped else None
    exact = [x.detach().double().requires_grad_() for x in inputs]
    relative = make_relative(layout, 2, kind)
    found = results(kernels.attention, layout, inputs, dropout, relative)
    plain = results(attention.padded_attention, layout, exact, dropout, relative)
    for one, other in zip(found, plain, strict=True):
        assert (one - other).norm() / other.norm() < bound
