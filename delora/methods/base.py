"""The contract of a method: two small maps around a frozen linear layer, for K trials at once.

Shapes are in the names: K trials, N = examples · tokens of one trial, I input width, O output width, R rank,
M blocks, D width of a block. Every trainable tensor has the leading axis K, and trial k touches slice k alone.

A new method is one file with a subclass of `Method` and one file conf/method/<name>.yaml whose `_target_` names it.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.randomness import Draw


class Method(nn.Module):
    """One adapted linear layer of K trials. Subclasses take (weight_OI, draw, **options of their yaml).

    Options that may differ between the trials (`delora.config.PER_TRIAL`) come as (K,) tensors.
    """

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The adapted layer's output (K, N, O).

        `dropped_KNI` is `x_KNI` after dropout, and the same object where there is none.
        """
        raise NotImplementedError

    def delta(self, weight_OI: Tensor) -> Tensor:
        """ΔW = W′ − W of each trial, (K, O, I): what merging adds to the frozen weight."""
        raise NotImplementedError

    def learning_rates(self) -> Mapping[str, Tensor]:
        """Parameters that have a learning rate (K,) of their own, by name; all others use the trial's."""
        return {}

    def strength(self) -> Tensor | None:
        """λ of each trial (K,), for methods that have one."""
        return None


class LowRank(Method):
    """A method whose ΔW is a product of two thin matrices: subclasses say which. S is the product's rank."""

    drops_whole_input = False  # else the input of ΔW alone

    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices of each trial, (K, O, S) and (K, S, I), whose product is ΔW."""
        raise NotImplementedError

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        frozen_KNO = F.linear(dropped_KNI if self.drops_whole_input else x_KNI, weight_OI, bias_O)
        return frozen_KNO + self.branch(dropped_KNI, weight_OI)

    def branch(self, x_KNI: Tensor, weight_OI: Tensor) -> Tensor:
        """ΔW·x, (K, N, O)."""
        up_KOS, down_KSI = self.factors(weight_OI)
        # Matrix units take rows of 16 bytes; with others torch's compiler would ask for each width of x what is faster.
        if x_KNI.dtype == torch.bfloat16 and (lacking := -up_KOS.shape[2] % 8):
            up_KOS, down_KSI = F.pad(up_KOS, (0, lacking)), F.pad(down_KSI, (0, 0, 0, lacking))
        return (x_KNI @ down_KSI.mT) @ up_KOS.mT

    def delta(self, weight_OI: Tensor) -> Tensor:
        up_KOS, down_KSI = self.factors(weight_OI)
        return up_KOS @ down_KSI


def kaiming_uniform(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """U(−1/√n, 1/√n) with n the last dimension: Kaiming-uniform with a = √5, PEFT's start for A. (K, *shape)."""
    return draw.uniform(name, shape, shape[-1] ** -0.5)


def per_trial(values: Tensor) -> Tensor:
    """(K,) as (K, 1, 1), to multiply (K, N, O)."""
    return values[:, None, None]


def zeros(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """A zero start, (K, *shape)."""
    return torch.zeros(len(draw.seeds), *shape, dtype=draw.dtype, device=draw.device)
