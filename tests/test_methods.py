"""Every method against the published implementations' vectors (layers/*.safetensors of the shared golden files)."""

import json

import pytest
import torch
import transformers
from conftest import compose_trial
from safetensors import safe_open

from delora.config import ConfigError
from delora.methods.base import find
from delora.methods.delora import DeLoRA
from delora.methods.dora import DoRA
from delora.methods.ether import ETHER, ETHERPlus
from delora.methods.etherbound import BoundedETHER
from delora.methods.hra import HRA
from delora.methods.lora import LoRA
from delora.methods.loreft import LoReFT, reflect
from delora.methods.miss import MiSS
from delora.methods.oft import OFT
from delora.methods.pissa import PiSSA
from delora.methods.rslora import RsLoRA
from delora.methods.vera import VeRA
from delora.model import Fleet
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


# Of the second set: float32 bounds of its README; what a method calls otherwise or keeps transposed, by golden name.
MORE_FLOAT32 = {"y": 1.2e-6, "delta_W": 8e-7, "grad": 2e-6}
RENAMED = {"vera": {"lam_b": "b", "lam_d": "d"}, "ladder6_etherplus_bound": {"u": "U", "v": "V"}}
TURNED = {"ladder4_relaxed": ("B", "D"), "ladder5_highrank": ("U", "V")}
LADDER = {
    "ladder1_lora": "lora",
    "ladder2_bound": "delora_none",
    "ladder3_delora": "delora_frobenius",
    "ladder4_relaxed": "etherbound",
    "ladder5_highrank": "etherbound_symmetric",
    "ladder6_etherplus_bound": "etherbound_symmetric",
    "ladder7_etherplus_onesided": "etherplus",
}


def build_more(kind: str, file: dict, options: dict, trials: int):
    """The method of a file of the second set, as its yaml would build it."""
    W, dtype = file["W"], file["W"].dtype
    draw, one = Draw(list(range(trials)), "layer", dtype, torch.device("cpu")), torch.ones(trials, dtype=dtype)
    alpha, rank = one * options.get("lora_alpha", options.get("r", 1)), options.get("r")
    match kind.split("_"):
        case ["lora"]:
            return LoRA(W, draw, rank=rank, alpha=alpha)
        case ["delora", scaling]:
            return DeLoRA(W, draw, rank=rank, lambda_init=one, lambda_lr=one, init="zero", scaling=scaling)
        case ["etherbound", *symmetric]:
            rank = 2 if "u" in file else rank
            return BoundedETHER(W, draw, rank=rank, lambda_init=one, lambda_lr=one, symmetric=bool(symmetric))
        case ["etherplus"]:
            return ETHERPlus(W, draw, side="in", blocks=1)
        case ["rslora"]:
            return RsLoRA(W, draw, rank=rank, alpha=alpha)
        case ["pissa"]:
            return PiSSA(W, draw, rank=rank, alpha=alpha)
        case ["vera"]:
            widest = [W.shape, (48, 56)] if "note" in options else [W.shape]
            linears = [torch.nn.Linear(inputs, outputs, device="meta") for outputs, inputs in widest]
            start = {"projection_rank": rank, "projection_seed": 0, "d_initial": options["d_initial"]}
            return VeRA(W, draw, **start, **VeRA.share(linears, draw, **start))
        case ["miss"]:
            return MiSS(W, draw, rank=rank)
        case ["hra"]:
            return HRA(W, draw, rank=rank)
        case ["oft"]:
            terms = options.get("num_cayley_neumann_terms")
            return OFT(W, draw, block_size=options["oft_block_size"], neumann_terms=terms)
    raise ValueError(kind)


OF_PEFT = ("rslora", "pissa", "vera", "miss", "hra", "oft")


@pytest.mark.parametrize("trials", [1, 3])
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((k, d) for k in OF_PEFT for d in ("f64", "f32")), *((k, "f64") for k in LADDER)]
)
def test_more_golden_layers(shared, kind, dtype, trials):
    """Of PEFT's methods, and of the rungs of the DeLoRA paper's Tables 1 and 2 from its formulas."""
    paths = sorted((shared / "golden" / "more_layers").glob(f"{kind}_*_{dtype}.safetensors"))
    # Forms of MiSS and HRA that are not offered.
    paths = [path for path in paths if not any(form in path.name for form in ("_mini8_", "_bat_", "_gs_"))]
    assert paths
    renamed, turned = RENAMED.get(kind, {}), TURNED.get(kind, ())
    for path in paths:
        file, meta = load(path)
        method, here = build_more(LADDER.get(kind, kind), file, json.loads(meta["options"]), trials), trials // 2
        if kind == "vera" and trials == 1:  # what is drawn is PEFT's
            assert torch.equal(method.A_RI, file["A"][:, : file["W"].shape[1]])
            assert torch.equal(method.B_OR, file["B"][: file["W"].shape[0]])
        pissa_start = kind == "pissa" and meta["state"] == "init"
        if pissa_start:  # of its own making; each direction's sign is free
            assert close(method.B0[here] @ method.A0[here], file["B0"] @ file["A0"], 1e-12 if dtype == "f64" else 3e-6)
        given = {n: t for n, t in file.items() if n in meta["tensors_in"].split() and n not in ("W", "b", "x", "g")}
        with torch.no_grad():
            for name, tensor in given.items():
                if not (kind == "vera" and name in VeRA.given):
                    mine = getattr(method, renamed.get(name, name))[here]
                    mine.copy_((tensor.mT if name in turned else tensor).reshape(mine.shape))
        x, g = file["x"].flatten(0, 1), file["g"].flatten(0, 1)
        ours = run(method, x.expand(trials, -1, -1), None, file["W"], file["b"], g.expand(trials, -1, -1))
        ours["delta_W"] = method.delta(file["W"]).detach()
        for name in [n for n in file if n.startswith("grad_") or n in ("y", "delta_W")]:
            part = name.removeprefix("grad_")
            mine = ours[f"grad_{renamed[part]}" if part in renamed else name][here]
            mine = (mine.mT if part in turned else mine).reshape(file[name].shape)
            bound = 1e-12 if dtype == "f64" else MORE_FLOAT32[name.split("_")[0] if "grad" in name else name]
            if kind == "pissa" and dtype == "f32" and pissa_start and "grad" in name:
                bound = 1e-5
            if name == "delta_W":  # a difference: its rounding is relative to W
                assert close(mine + file["W"], file["W_eff"], bound), (path.name, name)
            else:
                assert close(mine, file[name], bound), (path.name, name, (mine - file[name]).abs().max())


# Of whole models: bounds of their README, relative to the largest element; and what the reference calls a parameter.
MODELS_FLOAT32 = {"logits": 2.5e-6, "loss": 1.5e-6, "grad": 1e-5}
KEY_BIAS_FLOAT32 = 3e-6  # its gradient is zero but for rounding
BOTTLENECK = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
OF_REFT = "comp_roberta_encoder_layer[{}]_output_unit_pos_nunit_1#0."
WHOLE = {
    "adapter": ["method.bottleneck=8"],
    "adapter_ffn": ["method.bottleneck=8"],
    "bitfit": ["method.targets=['*']"],
    "full": [],
    "ia3": [],
    "loreft_r1": [],
    "loreft_r2": ["method.rank=2"],
    "red": [],
}


def name_in_model(kind: str, place: str, own: str) -> str:
    """What the reference calls the parameter `own` of a method at a place."""
    match kind.split("_"):
        case ["ia3"]:
            return f"base_model.model.{place}.ia3_l.default"
        case ["red"]:
            kinds = {"scale": "scaling", "shift": "bias"}
            return f"base_model.{place.removeprefix('roberta.')}.delta_vector.activation_{kinds[own]}"
        case ["adapter", *_]:
            return f"{place.rpartition('.')[0].rpartition('.')[0]}.adapters.default.{BOTTLENECK[own]}"
        case ["loreft", _]:
            kinds = {"W": "learned_source.weight", "bias": "learned_source.bias"}
            kinds["X"] = "rotate_layer.parametrizations.weight.original"
            return OF_REFT.format(place.split(".")[3]) + kinds[own]
    return f"{place}.{own}"  # full, bitfit


@pytest.mark.parametrize("trials", [1, 3])
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("kind", WHOLE)
def test_golden_models(shared, kind, dtype, trials):
    """Whole RoBERTa classifiers: logits, loss and every gradient, and how many values are trained."""
    weights, meta = load(shared / "golden" / "models" / "base_h32.safetensors")
    batch = {name: weights.pop(name) for name in ("input_ids", "attention_mask", "labels")}
    base = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**json.loads(meta["config"])))
    base.load_state_dict(weights)
    words = [f"method={kind.partition('_r')[0]}", f"precision={'float64' if dtype == 'f64' else 'float32'}"]
    words += ["model=tiny", *WHOLE[kind]]
    fleet = Fleet(base, [compose_trial(*words, f"seed={seed}") for seed in range(trials)], torch.device("cpu")).eval()
    golden, about = load(shared / "golden" / "models" / f"{kind}_h32_{dtype}.safetensors")
    here, trained = trials // 2, fleet.trained()
    names = {n: f"grad.{n}" for n in trained if n.startswith("classifier.")}
    for place, module in fleet.adapted():
        own = [name for name, _ in module.method.named_parameters()]
        names |= {f"{place}.method.{n}": "grad." + name_in_model(kind, place, n) for n in own}
    reference = {n for n in golden if n.startswith("grad.") and not n.startswith("grad.R.")}
    assert names.keys() == trained.keys() and {*names.values()} == reference
    assert fleet.count()["adapter"] == int(about["trained_without_head"])
    sources = {**{name: tensor.to(fleet.dtype) for name, tensor in weights.items()}, **golden}
    with torch.no_grad():
        for parameter in trained.values():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10  # the others
        for name, parameter in trained.items():
            parameter[here] = sources[names[name][5:]].reshape(parameter[here].shape)
        if kind.startswith("loreft"):
            for place, module in fleet.adapted():
                rotate_as_there(module.method, golden, int(place.split(".")[3]), here)
    inputs = {name: tensor.repeat(trials, 1) for name, tensor in batch.items() if name != "labels"}
    logits_KBC = fleet(**inputs).logits.unflatten(0, (trials, -1))
    losses = torch.stack([torch.nn.functional.cross_entropy(logits_BC, batch["labels"]) for logits_BC in logits_KBC])
    losses.sum().backward()
    found = {"logits": logits_KBC[here], "loss": losses[here]}
    found |= {there: trained[name].grad[here] for name, there in names.items() if not name.endswith("method.X")}
    for name, ours in found.items():
        bound = 1e-12 if dtype == "f64" else MODELS_FLOAT32[name.split(".")[0]]
        if name.endswith("key.bias"):
            assert ours.abs().max() <= (1e-12 if dtype == "f64" else KEY_BIAS_FLOAT32), name
        else:
            assert close(ours.detach().reshape(golden[name].shape), golden[name], bound), name
    for place, module in fleet.adapted() if kind.startswith("loreft") else ():
        pulled = pulled_back(module.method, golden[f"grad.R.{place.split('.')[3]}"], here)
        assert close(module.method.X.grad[here].tril(-1), pulled, 1e-12 if dtype == "f64" else 1e-5), place


def rotate_as_there(method: LoReFT, golden: dict, layer: int, here: int) -> None:
    """Has the rotation begin as the reference's is; ours begins with reflections and not with a whole matrix."""
    there, R_RH = OF_REFT.format(layer) + "rotate_layer.parametrizations.weight.", golden[f"R.{layer}"]
    X_HR = golden[f"{there}original"]
    eye_HR = torch.eye(*X_HR.shape, dtype=X_HR.dtype)
    ours_HR = golden[f"{there}0.base"] @ -reflect(X_HR[None], eye_HR[None])[0]
    assert close(ours_HR, R_RH.mT, 1e-12 if R_RH.dtype == torch.float64 else 1e-6)  # the same map of X
    # Reflections that take the unit vectors to the columns of Rᵀ, as LAPACK's do but for signs, which v = x − e keeps.
    columns = R_RH.mT.clone()
    for j in range(columns.shape[1]):
        v = columns[:, j].clone()
        v[:j] = 0
        v[j] -= 1
        v = v / v[j]
        method.base[here, :, j] = v
        columns -= 2 * torch.outer(v, v @ columns) / v.square().sum()
    method.X[here] = 0
    assert close(method.rotation()[here], R_RH.mT, 1e-12 if R_RH.dtype == torch.float64 else 1e-6)


def pulled_back(method: LoReFT, gradient_RH: torch.Tensor, here: int) -> torch.Tensor:
    """The gradient of X by torch's own parametrization, given that of a free R."""
    eye_HH = torch.eye(method.X.shape[1], dtype=method.X.dtype)
    layer = torch.nn.Linear(*method.X.shape[1:][::-1], bias=False, dtype=method.X.dtype)
    torch.nn.init.orthogonal_(layer.weight)
    torch.nn.utils.parametrizations.orthogonal(layer)
    layer.parametrizations.weight[0].base = reflect(method.base, eye_HH.expand(len(method.base), -1, -1))[here].detach()
    (layer.weight * gradient_RH.mT).sum().backward()
    return layer.parametrizations.weight.original.grad.tril(-1)


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
        ("lora.Tensor", "derived from delora.methods.base.LinearMethod, CopyMethod or HiddenMethod"),
        ("base.Method", "derived from delora.methods.base.LinearMethod, CopyMethod or HiddenMethod"),
        ("base.LowRank", ": an abstract class: it lacks factors"),
        ("base.CopyMethod", ": an abstract class: it lacks copied"),
    ],
)
def test_what_is_no_method_is_told(name, told):
    with pytest.raises(ConfigError) as error:
        find(f"delora.methods.{name}")
    assert str(error.value).endswith(told)
