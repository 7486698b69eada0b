"""Attention over packed rows: what padding would give, plain and as a Triton kernel, with the same dropout."""

import pytest
import torch
from test_train import CPU, CUDA

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


def results(attend, layout, inputs, dropout):
    """The result and the gradients, of real tokens."""
    q, k, v, g = inputs
    real = torch.arange(q.shape[1], device=q.device) < layout.length_KB.sum(1, keepdim=True)
    y = attend(q, k, v, layout, 0.25, dropout)
    gradients = torch.autograd.grad((y * g)[real].sum(), (q, k, v))
    assert y.isfinite().all()
    assert all((gradient[~real] == 0).all() for gradient in gradients)
    return [x[real] for x in (y, *gradients)]


def one_by_one(q, k, v, layout, scaling, dropout):
    """Each example alone, as torch has it; the dropout is drawn for the padded example."""
    y = torch.zeros_like(q)
    for trial, (firsts, lengths) in enumerate(zip(layout.first_KB, layout.length_KB, strict=True)):
        for first, length in zip(firsts.tolist(), lengths.tolist(), strict=True):
            at = slice(first, first + length)
            a, b, c = (x[trial, at].transpose(0, 1) for x in (q, k, v))
            weights = (a @ b.mT * scaling).softmax(-1)
            if dropout is not None:
                every_trial = weights.expand(2, *weights.shape).flatten(0, 1).view(2, *weights.shape)
                keys = dropout.keys.key_KN[:, None, at][[trial, trial]]
                keys[1 - trial] = 0
                weights = dropout.of_weights(every_trial, keys)[trial]
            y[trial, at] = (weights @ c).transpose(0, 1)
    return y


@pytest.mark.parametrize("dropped", [False, True])
def test_packed_attention_is_each_example_alone(dropped):
    layout = make_layout(LENGTHS, CPU)
    inputs, dropout = make_inputs(layout, torch.float64, CPU), make_dropout(layout, CPU) if dropped else None
    found = results(attention.padded_attention, layout, inputs, dropout)
    for one, other in zip(found, results(one_by_one, layout, inputs, dropout), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


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
@pytest.mark.parametrize("dropped", [False, True])
def test_the_kernel_is_the_plain_attention(lengths, dropped):
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
    found = results(kernels.attention, layout, inputs, dropout)
    for one, other in zip(found, results(attention.padded_attention, layout, exact, dropout), strict=True):
        assert (one - other).norm() / other.norm() < bound
