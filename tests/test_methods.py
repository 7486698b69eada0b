"""Every method against the published implementations' vectors (layers/*.safetensors of the shared golden files)."""

import json

import pytest
import torch
from safetensors import safe_open

from delora.config import ConfigError
from delora.methods.base import find
from delora.methods.delora import DeLoRA
from delora.methods.dora import DoRA
from delora.methods.ether import ETHER, ETHERPlus
from delora.methods.lora import LoRA
from delora.randomness import Draw

# Relative to the tensor's largest element; float64 is checked on all tensors with one bound.
FLOAT64, FLOAT32_OUTPUT, FLOAT32_GRADIENT = 1e-12, 5e-7, 4e-6
ADAPTER = ("A", "B", "lam", "A0", "B0", "m", "u", "v", "u2", "v2")
GOLDEN_FILES = 110


def build(file: dict, meta: dict, seeds: list[int], dtype: torch.dtype):
    """The method of a golden file as its yaml would build it."""
    options = json.loads(meta["options"])
    draw = Draw(seeds, "layer", dtype, torch.device("cpu"))
    trials = torch.ones(len(seeds), dtype=dtype)
    kind = meta["method"]
    if kind.startswith("delora"):
        init = "residual" if kind == "delora_official" else "zero"
        lam = trials * options["lambda_init"]
        return DeLoRA(file["W"], draw, rank=options["r"], lambda_init=lam, lambda_lr=lam, init=init, scaling="column")
    if kind in ("lora_peft", "dora_peft"):
        alpha = trials * options["scaling"] * options["r"]
        if kind == "lora_peft":
            return LoRA(file["W"], draw, rank=options["r"], alpha=alpha)
        return DoRA(file["W"], draw, rank=options["r"], alpha=alpha, train_magnitude=True)
    cls = ETHERPlus if kind.startswith("etherplus") else ETHER
    return cls(file["W"], draw, side=options["side"], blocks=options["nb"])


def load(path):
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118


def run(method, x, mask, weight, bias, g):
    """Output and gradients for inputs (K, N, I), upstream gradient (K, N, O)."""
    x = x.clone().requires_grad_()
    y = method(x, x if mask is None else x * mask, weight, bias)
    (y * g).sum().backward()
    return {"y": y.detach(), "grad_x": x.grad} | {f"grad_{n}": p.grad for n, p in method.named_parameters()}


def close(ours, golden, bound):
    scale = golden.abs().max()
    return (ours - golden).abs().max() <= bound * (scale if scale > 0 else 1)


def test_all_golden_files_are_here(shared):
    assert len(list((shared / "golden" / "layers").glob("*.safetensors"))) == GOLDEN_FILES


@pytest.mark.parametrize("trials", [1, 3])
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("kind", ["delora_official", "delora_peft", "lora_peft", "dora_peft", "ether_", "etherplus_"])
def test_golden_layers(shared, kind, dtype, trials):
    paths = sorted((shared / "golden" / "layers").glob(f"{kind}*_{dtype}.safetensors"))
    assert paths, kind
    for path in paths:
        file, meta = load(path)
        method = build(file, meta, list(range(trials)), file["x"].dtype)
        here = trials // 2  # the others keep their own drawn values, so the trials differ
        with torch.no_grad():
            for name in ADAPTER:
                if name in file:
                    getattr(method, name)[here] = file[name]
        x, g = file["x"].flatten(0, 1), file["g"].flatten(0, 1)
        mask = file["drop_mask"].flatten(0, 1) if "drop_mask" in file else None
        scale = torch.arange(1, trials + 1, dtype=x.dtype)[:, None, None] / (here + 1)
        ours = run(method, x * scale, mask, file["W"], file["b"], g * scale.flip(0) / scale.flip(0)[here])
        ours["delta_W"] = method.delta(file["W"]).detach()
        for name in [n for n in file if n.startswith("grad_") or n in ("y", "delta_W")]:
            mine = ours[name][here].reshape(file[name].shape)
            bound = FLOAT64 if dtype == "f64" else FLOAT32_GRADIENT if name.startswith("grad") else FLOAT32_OUTPUT
            if name == "delta_W":  # a difference: its rounding is relative to W
                assert close(mine + file["W"], file["W_eff"], bound), (path.name, name)
            else:
                assert close(mine, file[name], bound), (path.name, name, (mine - file[name]).abs().max())


@pytest.mark.parametrize(("rung", "scaling"), [("ladder2_bound", "none"), ("ladder3_delora", "frobenius")])
def test_scalings_of_the_papers_ladder(shared, rung, scaling):
    """Tables 1 and 2 of the DeLoRA paper, from its formulas (more_layers/ladder*.safetensors)."""
    file, meta = load(shared / "golden" / "more_layers" / f"{rung}_24x40_trained_f64.safetensors")
    rank, one = json.loads(meta["options"])["r"], torch.ones(1).double()
    draw = Draw([0], "layer", torch.float64, torch.device("cpu"))
    method = DeLoRA(file["W"], draw, rank=rank, lambda_init=one, lambda_lr=one, init="zero", scaling=scaling)
    with torch.no_grad():
        for name in ("A", "B", "lam"):
            getattr(method, name)[0] = file[name]
    ours = run(method, file["x"].flatten(0, 1)[None], None, file["W"], file["b"], file["g"].flatten(0, 1)[None])
    ours["delta_W"] = method.delta(file["W"]).detach()
    for name in ("y", "delta_W", "grad_A", "grad_B", "grad_lam", "grad_x"):
        assert close(ours[name].reshape(file[name].shape), file[name], FLOAT64), name


def test_an_unknown_scaling_is_refused():
    draw, one = Draw([0], "layer", torch.float64, torch.device("cpu")), torch.ones(1)
    with pytest.raises(ValueError, match="scaling='rows': expected column, frobenius or none"):
        DeLoRA(torch.ones(2, 3), draw, rank=1, lambda_init=one, lambda_lr=one, init="zero", scaling="rows")


@pytest.mark.parametrize("rank", [3, 8])
def test_any_rank_in_half_precision(rank):
    """Ranks that are no multiple of 8 are filled up there."""
    draw = Draw([1, 2], "layer", torch.float32, torch.device("cpu"))
    weight, x = draw.normal("W", (24, 16), 0.1)[0], draw.normal("x", (5, 16), 1.0)
    method = LoRA(weight, draw, rank=rank, alpha=torch.full((2,), 8.0))
    torch.nn.init.normal_(method.B, std=0.1)
    golden = x @ (weight + method.delta(weight)).mT
    with torch.autocast("cpu", torch.bfloat16):
        half = method(x.bfloat16(), x.bfloat16(), weight.bfloat16(), None)
    assert half.dtype == torch.bfloat16 and close(half.float(), golden, 2e-2)
    trained = [method.A, method.B]
    grown = torch.autograd.grad((half.float() * golden.detach()).sum(), trained)
    exact = torch.autograd.grad(golden.square().sum() / 2, trained)
    assert all(close(*pair, 3e-2) for pair in zip(grown, exact, strict=True))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lora.lora", "lora has no class lora; did you mean LoRA?"),
        ("lora.Tensr", "lora has no class Tensr"),  # not what the module imports
        ("lora.Tensor", "=delora.methods.lora.Tensor: expected a class derived from delora.methods.base.Method"),
        ("base.LowRank", ": an abstract class: it lacks factors"),
    ],
)
def test_what_is_no_method_is_told(name, told):
    with pytest.raises(ConfigError) as error:
        find(f"delora.methods.{name}")
    assert str(error.value).endswith(told)
