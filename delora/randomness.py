"""Randomness as a function, not a state.

Initial values, data order and dropout of a trial are functions of (its seed, step, place). A trial therefore
draws the same numbers alone, in any fleet, after a restart and on every device, and nothing has to be saved.

Shapes: K trials, B examples a trial, T tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from delora.data.batches import Layout


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
    """What the dropout layers of one fleet share: a 32-bit key for each token of each trial.

    A key is a function of (seed, step, example, position in it) alone: not of where the token lies, of padding, of the
    other trials, or of how a batch is cut into parts.

    Attributes:
        layout: of the batch that is computed; None where its examples are not packed.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._seed_K = torch.tensor([_signed32(hash64("dropout", s)) for s in seeds], dtype=torch.int32, device=device)
        self.key_KN = self.first_KB = torch.zeros(len(seeds), 1, dtype=torch.int32, device=device)
        self._key_K, self._set = self._seed_K, (self.key_KN, self.first_KB)
        self.layout: Layout | None = None

    def set(self, layout: "Layout", step: Tensor, earlier: int) -> None:
        """Sets the keys of a batch of `step` (int64), of which `earlier` examples are in other parts."""
        self._key_K = _mix(self._seed_K + (step * 0x9E3779B9).int())
        self.key_KN = _mix(_mix(self._key_K[:, None] + (layout.example_KN + earlier)) + layout.position_KN)
        self.first_KB = self.key_KN.gather(1, layout.first_KB)
        self._set = self.key_KN, self.first_KB

    def turn(self, number: int) -> None:
        """Makes the keys those of a layer's `number`-th turn, for a layer that a batch passes several times."""
        self.key_KN, self.first_KB = (_mix(key + number) if number else key for key in self._set)

    def of_padded(self, tokens: int) -> Tensor:
        """The keys of padded examples of so many tokens, (K, B, T)."""
        return self.key_KN.view(len(self.key_KN), -1, tokens)

    def of_shared(self, rows: int, first: int) -> Tensor:
        """Keys (K, rows) of vectors that all examples of a batch share, by their numbers from `first` on."""
        number = torch.arange(first, first + rows, dtype=torch.int32, device=self._key_K.device)
        return _mix(_mix(self._key_K[:, None] - 1) + number)


class Dropout(nn.Module):
    """Inverted dropout whose mask is hashed from (seed, step, place, example, position, element).

    Takes hidden states (..., H): K·N vectors of tokens, or K·B of first tokens, as (K·B, H) or where `of_first` is set;
    or attention weights (K·B, heads, T, T) of padded examples.
    The rate may differ between trials; it is rounded to a multiple of 2^-16, since a hash serves two elements.

    Attributes:
        p: the largest rate; where it is 0 nothing is dropped.
    """

    place: Tensor
    threshold_K: Tensor
    scale_K: Tensor

    def __init__(self, keys: TokenKeys, place: str, rates: Sequence[float]):
        super().__init__()
        self.keys, self.of_first = keys, False
        self.p = max(rates)
        # An int16 below the threshold drops its element. Buffers, so that equal layers are compiled once.
        drop_K = [min(round(p * (1 << 16)), (1 << 16) - 1) for p in rates]
        buffers = {
            "place": torch.tensor(_signed32(hash64("place", place)), dtype=torch.int32),
            "threshold_K": torch.tensor([d - (1 << 15) for d in drop_K], dtype=torch.int16),
            "scale_K": torch.tensor([1 / (1 - d / (1 << 16)) for d in drop_K], dtype=torch.float64),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(keys.key_KN.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.dim() == 4:
            return self.of_weights(x, self.keys.of_padded(x.shape[2]))
        x_KNH = x.view(len(self.scale_K), -1, x.shape[-1])
        key_KN = self.keys.first_KB if self.of_first or x.dim() == 2 else self.keys.key_KN
        return self._drop(x_KNH, _mix(key_KN ^ self.place)[..., None]).view(x.shape)

    def of_weights(self, weights: Tensor, key_KBT: Tensor) -> Tensor:
        """Drops attention weights (K·B, heads, T, S): one belongs to its query's token; within it, to (head, s)."""
        x = weights.view(*key_KBT.shape[:2], *weights.shape[1:])
        head = _mix(torch.arange(1, x.shape[2] + 1, dtype=torch.int32, device=x.device))[:, None, None]
        return self._drop(x, _mix(key_KBT ^ self.place)[:, :, None, :, None], head).view(weights.shape)

    def _drop(self, x: Tensor, key: Tensor, head: Tensor | None = None) -> Tensor:
        """Drops elements of x (K, ..., H) by the hash of key (K, ..., 1), head and element; the first two broadcast."""
        element = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        compiled = torch.compiler.is_compiling()
        pair = element >> 1 if compiled else element[: (len(element) + 1) // 2]
        column = _mix(pair + self.place)
        bits = _mix(key ^ (column if head is None else _mix(column + head)))
        if compiled:  # nothing is stored, so hashing twice costs less than another view of what was
            half = torch.where(element & 1 == 0, bits << 16, bits) >> 16
        else:
            half = bits.view(torch.int16)[..., : len(element)]
        each = (-1, *[1] * (x.dim() - 1))
        scale = self.scale_K.to(x.dtype).view(each)
        return x * torch.where(half < self.threshold_K.view(each), torch.zeros_like(scale[0]), scale)
