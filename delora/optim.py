"""AdamW for K trials in one step, each with its own learning rates, weight decay, warmup and clipping.

All trainable values of a fleet live in one buffer (K, P), a row a trial; the modules' parameters are views of it.
A trial's whole state is one row of each of the buffers.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Group:
    """Columns `start:end` of the buffers, which share the learning rates (K,) and weight decays (K,)."""

    start: int
    end: int
    lr_K: Tensor
    weight_decay_K: Tensor


class FleetAdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101), as torch.optim.AdamW, for K trials.

    Args:
        parameters: by name, each (K, ...); their storage moves into `values`.
        lr_K: the trials' learning rates.
        weight_decay_K: the trials' weight decay.
        undecayed: the names of the parameters that it spares.
        own_lr: learning rates (K,) of the parameters that do not follow `lr_K`, by name.
        warmup_ratio_K: the share of `total_steps` over which the rate rises from 0; a float, not rounded to steps.
        total_steps: the step at which the linear schedule reaches 0.
        betas: decay rates of the two moments.
        clip_norm: the largest norm of a trial's gradient, or None.
    """

    eps = 1e-8
    at_once = 1 << 27  # values in the update, which takes memory for some more of each

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr_K: Tensor,
        weight_decay_K: Tensor,
        undecayed: Collection[str],
        own_lr: Mapping[str, Tensor],
        warmup_ratio_K: Tensor,
        total_steps: int,
        betas: Sequence[float],
        clip_norm: float | None = None,
    ):
        def kind(name: str) -> tuple[bool, bool]:
            return name in own_lr, name in undecayed

        self.lr_K = lr_K
        self.warmup_K, self.total_steps = warmup_ratio_K * total_steps, total_steps
        self.betas, self.clip_norm = betas, clip_norm
        self._log_betas = [math.log(beta) if beta else -math.inf for beta in betas]
        self.names = sorted(parameters, key=kind)
        self.groups: list[Group] = []
        columns, previous = 0, None
        for name in self.names:
            lr, decay = own_lr.get(name, lr_K), weight_decay_K * (name not in undecayed)
            end = columns + parameters[name][0].numel()
            if kind(name) != previous or lr is not self.groups[-1].lr_K:
                self.groups.append(Group(columns, end, lr, decay))
            self.groups[-1].end = end
            columns, previous = end, kind(name)
        first = next(iter(parameters.values()))
        self.values = first.new_empty(len(lr_K), columns)
        self.gradients, self.mean, self.square = (torch.zeros_like(self.values) for _ in range(3))
        self.alive_K = torch.ones(len(lr_K), dtype=torch.bool, device=first.device)
        self._bind(parameters)

    def _bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters, self._gradient_views = [], []
        start = 0
        for name in self.names:
            parameter = parameters[name]
            end = start + parameter[0].numel()
            self.values[:, start:end] = parameter.detach().flatten(1)
            parameter.data = self.values[:, start:end].view(parameter.shape)
            self._parameters.append(parameter)
            self._gradient_views.append(self.gradients[:, start:end].view(parameter.shape))
            start = end

    def schedule(self, step: int | Tensor) -> Tensor:
        """The factor (K,) on the learning rates in `step`: linear up from 0 over the warmup, linear down to 0."""
        rising = step / self.warmup_K.clamp(min=1)
        falling = (self.total_steps - step) / (self.total_steps - self.warmup_K).clamp(min=1)
        return torch.where(step < self.warmup_K, rising, falling.clamp(min=0))

    def rates(self, step: int) -> Tensor:
        """The trials' learning rates (K,) in `step`."""
        return self.lr_K * self.schedule(step)

    def clear(self) -> None:
        """Forgets the parameters' gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, step: Tensor) -> None:
        """Updates the trials that are alive from the parameters' gradients, then clears these.

        `step` (int64) counts from 0. It is read on its device, so that a recorded update serves for every step.
        """
        used = [(v, p.grad) for v, p in zip(self._gradient_views, self._parameters, strict=True) if p.grad is not None]
        torch._foreach_copy_([view for view, _ in used], [gradient for _, gradient in used])
        self.clear()
        if self.clip_norm is not None:
            norm_K = self.gradients.norm(dim=1)
            self.gradients *= (self.clip_norm / (norm_K + 1e-6)).clamp(max=1)[:, None]
        beta1, beta2 = self.betas
        factor_K = self.schedule(step)
        # 1 - beta^(step + 1), which must not be a difference: 1 - 0.999 has lost half of float32's digits.
        count = (step + 1).to(self.values.dtype)
        unbiased1, unbiased2 = (-torch.expm1(count * log_beta) for log_beta in self._log_betas)
        columns = max(1, self.at_once // len(self.values))
        parts = ((g, slice(a, min(a + columns, g.end))) for g in self.groups for a in range(g.start, g.end, columns))
        for group, at in parts:
            lr_K1 = (group.lr_K * factor_K)[:, None]
            gradient, mean, square = self.gradients[:, at], self.mean[:, at], self.square[:, at]
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (square.sqrt() / unbiased2.sqrt()).add_(self.eps)
            decayed = self.values[:, at] * (1 - lr_K1 * group.weight_decay_K[:, None])
            updated = decayed - lr_K1 / unbiased1 * (mean / root)
            self.values[:, at] = torch.where(self.alive_K[:, None], updated, self.values[:, at])
