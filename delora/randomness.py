"""Randomness as a function, not a state.

Initial values, data order and dropout of a trial are functions of (its seed, step, place). A trial therefore
draws the same numbers alone, in any fleet, after a restart and on every device, and nothing has to be saved.

Shapes: K trials, B examples a trial, T tokens.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def hash64(*parts: object) -> int:
    """A 64-bit hash of `parts` that is the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(*parts: object) -> torch.Generator:
    """A CPU generator whose stream is a function of `parts`."""
    return torch.Generator().manual_seed(hash64(*parts) >> 1)


def permutation(n: int, *parts: object) -> Tensor:
    """A permutation of range(n), int64, that is a function of `parts`."""
    return torch.randperm(n, generator=generator("permutation", *parts))


class Draw:
    """Draws initial values of shape (K, *shape): trial k's slice is a function of its seed and the name alone."""

    def __init__(self, seeds: Sequence[int], place: str, dtype: torch.dtype, device: torch.device):
        self.seeds, self.place, self.dtype, self.device = seeds, place, dtype, device

    def uniform(self, name: str, shape: Sequence[int], bound: float) -> Tensor:
        """Uniform in [-bound, bound)."""
        return self._stack(lambda g: (torch.rand(tuple(shape), generator=g) * 2 - 1) * bound, name)

    def normal(self, name: str, shape: Sequence[int], std: float) -> Tensor:
        """Normal with mean 0 and standard deviation `std`."""
        return self._stack(lambda g: torch.randn(tuple(shape), generator=g) * std, name)

    def _stack(self, draw, name: str) -> Tensor:
        slices = [draw(generator("init", seed, self.place, name)) for seed in self.seeds]
        return torch.stack(slices).to(self.device, self.dtype)


def _signed32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix(x: Tensor) -> Tensor:
    """Scrambles int32 in place, one to one: xor-shift, multiply, xor-shift, multiply."""
    for shift, factor in ((16, 0x7FEB352D), (15, _signed32(0x846CA68B))):
        high = x >> shift
        high &= (1 << 32 - shift) - 1  # the shift of a signed number copies its sign
        x ^= high
        x *= factor
    return x


class TokenKeys:
    """What the dropout layers of one fleet share: a 32-bit key for each (trial, step, example, position).

    The key does not depend on padding, on the other trials or on how a batch is cut into micro-batches.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._seed_K = torch.tensor([_signed32(hash64("dropout", s)) for s in seeds], dtype=torch.int32, device=device)
        self.key_KBT = torch.zeros(len(seeds), 1, 1, dtype=torch.int32, device=device)

    def set(self, step: int, first: int, examples: int, tokens: int) -> None:
        """Sets the keys for examples `first` .. `first + examples - 1` of the batch of `step`."""
        device = self._seed_K.device
        row_B = torch.arange(first, first + examples, dtype=torch.int32, device=device)
        position_T = torch.arange(tokens, dtype=torch.int32, device=device)
        key_K = _mix(self._seed_K + _signed32(step * 0x9E3779B9))
        key_KB = _mix(key_K[:, None] + row_B)
        self.key_KBT = _mix(key_KB[:, :, None] + position_T)


class Dropout(nn.Module):
    """Inverted dropout whose mask is hashed from (seed, step, place, example, position, element).

    Takes (K·B, H), (K·B, T, H) or attention weights (K·B, heads, T, T); the rate may differ between trials.
    """

    def __init__(self, keys: TokenKeys, place: str, rates: Sequence[float]):
        super().__init__()
        self.keys, self.place = keys, _signed32(hash64("place", place))
        self.rates = tuple(rates)
        # An int32 hash below the threshold drops its element.
        device = keys.key_KBT.device
        drop_K = [min(round(p * (1 << 32)), (1 << 32) - 1) for p in rates]
        self.threshold_K = torch.tensor([d - (1 << 31) for d in drop_K], dtype=torch.int32, device=device)
        self.scale_K = torch.tensor([1 / (1 - d / (1 << 32)) for d in drop_K], dtype=torch.float64, device=device)

    @property
    def p(self) -> float:
        """The largest rate; what transformers' attention code asks for."""
        return max(self.rates)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        trials = len(self.rates)
        x_KB = x.view(trials, -1, *x.shape[1:])
        drop = self._bits(x_KB) < self.threshold_K.view(-1, *[1] * (x_KB.dim() - 1))
        scale = self.scale_K.to(x.dtype).view(-1, *[1] * (x_KB.dim() - 1))
        return (x_KB.masked_fill(drop, 0) * scale).view(x.shape)

    def _bits(self, x_KB: Tensor) -> Tensor:
        """Uniform int32 of the shape of x_KB: (K, B, H), (K, B, T, H) or (K, B, heads, T, T)."""
        key = _mix(self.keys.key_KBT ^ self.place)
        column = _mix(torch.arange(x_KB.shape[-1], dtype=torch.int32, device=x_KB.device) + self.place)
        if x_KB.dim() == 3:
            key = key[:, :, :1]
        elif x_KB.dim() == 4:
            key = key[..., None]
        else:  # an attention weight belongs to its query's token; within it, to (head, key's token)
            head = torch.arange(x_KB.shape[2], dtype=torch.int32, device=x_KB.device)
            column = _mix(column + _mix(head + 1)[:, None, None])
            key = key[:, :, None, :, None]
        return _mix(key ^ column)
