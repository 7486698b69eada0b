"""What is drawn: initial values and dropout's masks, each this function of seed, step and place."""

import hashlib

import pytest
import torch
from test_attention import LENGTHS, make_dropout, make_layout
from test_train import CPU

from delora.randomness import Draw, Dropout


def hash64(*parts: object) -> int:
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def test_initial_values_are_this_function_of_seed_place_and_name():
    draw = Draw([3, 4], "layer", torch.float64, CPU)
    uniform, normal = draw.uniform("A", (50, 40), 0.25), draw.normal("weight", (50, 40), 0.02)
    assert uniform.dtype == normal.dtype == torch.float64
    for k, seed in enumerate((3, 4)):
        generators = [
            torch.Generator().manual_seed(hash64("init", seed, "layer", name) >> 1) for name in ("A", "weight")
        ]
        assert torch.equal(uniform[k], (torch.rand(50, 40, generator=generators[0]).double() - 0.5) / 2)
        expected = torch.randn(50, 40, generator=generators[1]) * 0.02
        torch.testing.assert_close(normal[k], expected.double(), rtol=1e-6, atol=0)
    assert uniform.min() >= -0.25 and uniform.max() < 0.25 and abs(uniform.mean()) < 0.01
    assert normal.std().item() == pytest.approx(0.02, rel=0.05)


def mix(x: int) -> int:
    """32 bits scrambled: xor-shift, multiply, xor-shift, multiply."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x &= 0xFFFFFFFF
        x = (x ^ x >> shift) * factor
    return x & 0xFFFFFFFF


def is_dropped(rate, seed, step, place, example, position, element, head=None) -> bool:
    """The hash of a mask in plain integers; two elements share one, of 16 bits each."""
    key = mix(hash64("dropout", seed) + step * 0x9E3779B9)
    key = mix(mix(mix(key + example) + position) ^ hash64("place", place))
    column = mix(element // 2 + hash64("place", place))
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


def test_a_compiled_mask_is_the_plain_one():
    layout = make_layout(LENGTHS, CPU)
    dropout = make_dropout(layout, CPU)
    for width in (7, 8):
        x = torch.ones(2, layout.example_KN.shape[1], width)
        assert torch.equal(torch.compile(dropout, backend="eager", dynamic=True)(x), dropout(x))
