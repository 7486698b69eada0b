"""What stands in the encoder's modules' places, for K trials: under a method, as copies, in the head.

Each takes and gives what the module in whose place it stands does, (K·B, ...) or (K, N, ...), trial after trial. Shapes
as in `delora.methods.base`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.methods.base import CopyMethod, HiddenMethod, LinearMethod
from delora.randomness import Draw, Dropout


class AdaptedLinear(nn.Module):
    """A frozen linear layer of the encoder under a method: (K·B, ..., I) to (K·B, ..., O)."""

    def __init__(self, linear: nn.Linear, method: LinearMethod, dropout: Dropout):
        super().__init__()
        self.weight, self.bias, self.method, self.dropout = linear.weight, linear.bias, method, dropout
        self.dtype: torch.dtype = linear.weight.dtype  # of what is trained; the frozen weight may get another
        self.off = False

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return F.linear(x, self.weight, self.bias)
        x_KNI = x.reshape(len(self.dropout.scale_K), -1, x.shape[-1])
        dropped = self.dropout(x)
        dropped_KNI = x_KNI if dropped is x else dropped.reshape(x_KNI.shape)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            y_KNO = self.method(x_KNI, dropped_KNI, self.weight, self.bias)
        return y_KNO.to(x.dtype).view(*x.shape[:-1], -1)

    def delta(self) -> Tensor:
        """ΔW of each trial, (K, O, I), in the dtype of what is trained."""
        return self.method.delta(self.weight.to(self.dtype))

    def bias_delta(self) -> Tensor | None:
        """b′ − b of each trial, (K, O), in the same dtype; None where the method leaves the bias as it is."""
        return self.method.bias_delta(None if self.bias is None else self.bias.to(self.dtype))


class CopiedLinear(nn.Module):
    """A linear layer of which each trial has copies of some parameters: (K·B, ..., I) to (K·B, ..., O)."""

    def __init__(self, linear: nn.Linear, method: CopyMethod, dropout: Dropout):
        super().__init__()
        self.weight, self.bias, self.method, self.dropout = linear.weight, linear.bias, method, dropout
        self.off = False

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return F.linear(x, self.weight, self.bias)
        dropped_KNI = self.dropout(x).reshape(len(self.dropout.scale_K), -1, x.shape[-1])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            y_KNO = linear(dropped_KNI, own(self, "weight"), own(self, "bias"))
        return y_KNO.to(x.dtype).view(*x.shape[:-1], -1)


class CopiedNorm(nn.Module):
    """A LayerNorm of which each trial has copies of some parameters: (K·B, ..., H) to the same."""

    def __init__(self, norm: nn.LayerNorm, method: CopyMethod, dropout: Dropout):
        super().__init__()
        self.weight, self.bias, self.method, self.eps = norm.weight, norm.bias, method, norm.eps
        self.trials, self.off = len(dropout.scale_K), False

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        x_KNH = x.reshape(self.trials, -1, x.shape[-1])
        return norm(x_KNH, own(self, "weight"), own(self, "bias"), self.eps).to(x.dtype).view(x.shape)


class CopiedEmbedding(nn.Module):
    """An embedding of which each trial has a copy: ids (K·B, T) or (K, N) to vectors of them."""

    def __init__(self, embedding: nn.Embedding, method: CopyMethod, dropout: Dropout):
        super().__init__()
        self.weight, self.method, self.padding_idx = embedding.weight, method, embedding.padding_idx
        self.off = False

    def forward(self, ids: Tensor) -> Tensor:
        if self.off:
            return F.embedding(ids, self.weight)
        table_KVH = own(self, "weight")
        ids_KN = ids.reshape(len(table_KVH), -1)
        first_K1 = torch.arange(len(table_KVH), device=ids.device)[:, None] * table_KVH.shape[1]
        y_KNH = F.embedding(ids_KN + first_K1, table_KVH.flatten(0, 1))
        if self.padding_idx is not None:  # its vector is not trained
            y_KNH = torch.where((ids_KN == self.padding_idx)[..., None], y_KNH.detach(), y_KNH)
        return y_KNH.to(self.weight.dtype).view(*ids.shape, -1)


Copied = CopiedLinear | CopiedNorm | CopiedEmbedding
COPIED = {nn.Linear: CopiedLinear, nn.LayerNorm: CopiedNorm, nn.Embedding: CopiedEmbedding}


class AdaptedHidden(nn.Module):
    """A method on hidden states of one place: (K·B, ..., H) to the same.

    Attributes:
        pruned: whether of packed rows it gets those of first tokens alone.
    """

    def __init__(self, method: HiddenMethod, dropout: Dropout):
        super().__init__()
        self.method, self.dropout, self.off, self.pruned = method, dropout, False, False
        dropout.of_first = method.of_first

    def forward(self, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        if self.off:
            return x
        trials, layout = len(self.dropout.scale_K), self.dropout.keys.layout
        h_KNH = x.reshape(trials, -1, x.shape[-1])
        if not self.method.of_first or (self.pruned and layout is not None):
            return self._edited(h_KNH, norm).view(x.shape)
        if layout is None:
            edited = self._edited(x[:, 0].view(trials, -1, x.shape[-1]), norm)
            return torch.cat([edited.view(-1, 1, x.shape[-1]), x[:, 1:]], 1)
        index_KBH = layout.first_KB[:, :, None].expand(-1, -1, x.shape[-1])
        return h_KNH.scatter(1, index_KBH, self._edited(h_KNH.gather(1, index_KBH), norm)).view(x.shape)

    def _edited(self, h_KNH: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(h_KNH.device.type, torch.bfloat16, enabled=h_KNH.dtype == torch.bfloat16):
            return self.method(h_KNH, self.dropout, norm).to(h_KNH.dtype)


def forward_then_edit(self: Any, *arguments: Any, **options: Any) -> Any:
    """In the place of a module's forward: what it makes is edited by its `adapter`."""
    output = type(self).forward(self, *arguments, **options)
    if isinstance(output, tuple):
        return self.adapter(output[0], lambda h: h), *output[1:]
    return self.adapter(output, lambda h: h)


def edit_then_forward(self: Any, x: Tensor) -> Tensor:
    """In the place of a LayerNorm's forward: what it takes is edited by its `adapter`."""
    norm = type(self).forward
    return norm(self, self.adapter(x, lambda h: norm(self, h)))


class HeadLinear(nn.Module):
    """A trained linear layer of the head, one a trial: (K·B, ..., I) to (K·B, ..., O)."""

    def __init__(self, layer: nn.Linear, draw: Draw, std: float):
        super().__init__()
        self.weight = nn.Parameter(draw.normal("weight", layer.weight.shape, std))
        if layer.bias is not None:
            self.bias = nn.Parameter(torch.zeros_like(self.weight[:, :, 0]))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x_KNI = x.reshape(len(self.weight), -1, x.shape[-1]).to(self.weight.dtype)
        return linear(x_KNI, self.weight, self.bias).view(*x.shape[:-1], -1)


class HeadNorm(nn.Module):
    """A trained LayerNorm of the head, one a trial: (K·B, ..., H) to the same."""

    def __init__(self, layer: nn.LayerNorm, trials: int):
        super().__init__()
        self.eps = layer.eps
        self.weight = nn.Parameter(torch.ones_like(layer.weight).repeat(trials, 1))
        if layer.bias is not None:
            self.bias = nn.Parameter(torch.zeros_like(self.weight))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x_KNH = x.reshape(len(self.weight), -1, x.shape[-1])
        return norm(x_KNH, self.weight, self.bias, self.eps).view(x.shape)


def own(module: Copied, name: str) -> Any:
    """A parameter of each trial (K, ...), or the frozen one that they share; None where there is none."""
    copies = module.method._parameters.get(name)
    return getattr(module, name) if copies is None else copies


def linear(x_KNI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b, (K, N, O), with a weight (O, I) or one a trial (K, O, I), and a bias (O,) or (K, O)."""
    y_KNO = x_KNI @ weight.mT if weight.dim() == 3 else F.linear(x_KNI, weight)
    return y_KNO if bias is None else y_KNO + (bias if bias.dim() == 1 else bias[:, None])


def norm(x_KNH: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, (K, N, H), in the larger of the dtypes, with parameters (H,) or one a trial (K, H)."""
    y_KNH = F.layer_norm(x_KNH.to(torch.promote_types(x_KNH.dtype, weight.dtype)), x_KNH.shape[-1:], eps=eps)
    y_KNH = y_KNH * (weight if weight.dim() == 1 else weight[:, None])
    return y_KNH if bias is None else y_KNH + (bias if bias.dim() == 1 else bias[:, None])


class Joined(nn.Module):
    """A fused linear layer as its parts, whose outputs stand one behind the other: (..., I) to (..., O)."""

    def __init__(self, linear: nn.Linear, names: Sequence[str]):
        super().__init__()
        weights = linear.weight.chunk(len(names))
        biases = [None] * len(names) if linear.bias is None else linear.bias.chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            self.add_module(name, _linear(weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], -1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer with these values."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear
