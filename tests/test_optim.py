"""The fleet's AdamW against torch's with transformers' linear schedule."""

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from delora.optim import FleetAdamW


def test_a_parameter_without_a_gradient_is_decayed_alone():
    one = torch.ones(1, dtype=torch.float64)
    fleet = {name: torch.nn.Parameter(torch.ones(1, 2, dtype=torch.float64)) for name in ("used", "unused")}
    optimizer = FleetAdamW(fleet, one, 0.1 * one, set(), {}, 0 * one, 2, (0.9, 0.99))
    fleet["used"].grad = torch.ones(1, 2, dtype=torch.float64)
    optimizer.step(torch.tensor(0))
    assert torch.equal(fleet["unused"], torch.full((1, 2), 0.9, dtype=torch.float64))
    torch.testing.assert_close(fleet["used"].detach(), torch.full((1, 2), -0.1, dtype=torch.float64))


@pytest.mark.parametrize("at_once", [1 << 27, 20])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_each_trial_is_torchs_adamw(clip_norm, at_once, monkeypatch):
    monkeypatch.setattr(FleetAdamW, "at_once", at_once)
    torch.manual_seed(0)
    steps, lrs, decays, warmups = 12, [1e-1, 1e-2, 3e-3], [0.1, 0.0, 0.01], [0.06, 0.5, 0.0]
    start = {"a.weight": torch.randn(3, 4, 5).double(), "a.bias": torch.randn(3, 4).double()}
    start["lam"] = torch.randn(3, 1).double()
    own = torch.tensor([0.3, 0.2, 0.1]).double()
    gradients = [{name: torch.randn_like(value) for name, value in start.items()} for _ in range(steps)]

    fleet = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}

    def vector(values):
        return torch.tensor(values, dtype=torch.float64)

    optimizer = FleetAdamW(
        fleet, vector(lrs), vector(decays), {"a.bias"}, {"lam": own}, vector(warmups), steps, (0.9, 0.99), clip_norm
    )
    for step in range(steps):
        for name, parameter in fleet.items():
            parameter.grad = gradients[step][name].clone()
        optimizer.step(torch.tensor(step))

    for k in range(3):
        alone = {name: torch.nn.Parameter(value[k].clone()) for name, value in start.items()}
        groups = [
            {"params": [alone["a.weight"]], "lr": lrs[k], "weight_decay": decays[k]},
            {"params": [alone["a.bias"]], "lr": lrs[k], "weight_decay": 0.0},
            {"params": [alone["lam"]], "lr": own[k].item(), "weight_decay": decays[k]},
        ]
        reference = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        schedule = get_linear_schedule_with_warmup(reference, warmups[k] * steps, steps)
        for step in range(steps):
            for name, parameter in alone.items():
                parameter.grad = gradients[step][name][k].clone()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(alone.values(), clip_norm)
            assert optimizer.rates(step)[k].item() == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
            reference.step()
            schedule.step()
        for name, parameter in alone.items():
            torch.testing.assert_close(fleet[name][k], parameter.detach(), rtol=1e-12, atol=1e-14)
