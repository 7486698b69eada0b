"""Attention over packed rows: what padding would give, plain and as a Triton kernel, with the same dropout."""

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
