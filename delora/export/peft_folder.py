"""Adapters in the format of PEFT (github.com/huggingface/peft): written from a trial, and read into delora's methods.

    adapter_config.json          the type, its options, and which modules it is for
    adapter_model.safetensors    the adapter's tensors, and those of modules that are trained whole, as the head

A ΔW that is a product of two thin matrices is a LoRA whose factor α/r is 1, whatever method it was trained by. PEFT's
own type is written where it computes the same: DORA, DELORA, IA3, MISS, OFT, VERA. PEFT itself is not needed for either
way. It is lenient with what it loads (tensors that it lacks stay as drawn, others are left out without a word); what is
read here is read whole or refused. Shapes as in `delora.methods.base`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from delora import encoders, pretrained, storage
from delora.cli import conf_folder
from delora.config import Fault, ModelConfig, TaskConfig, Trial
from delora.errors import UserError
from delora.layers import AdaptedLinear, Joined
from delora.methods.base import LinearMethod, LowRank
from delora.methods.delora import DeLoRA
from delora.methods.dora import DoRA
from delora.methods.ia3 import IA3
from delora.methods.miss import MiSS
from delora.methods.oft import OFT
from delora.methods.vera import VeRA
from delora.missing import missing_encoder
from delora.model import DTYPES, Fleet
from delora.tasks import Task

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FORMAT = "0.21.2"  # the version of PEFT whose format is written
PREFIX = "base_model.model."
MERGED = "merged into its encoder it can be saved: --format transformers"


# --- Written


def written(fleet: Fleet, trial: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of a trial hold.

    Raises:
        UserError: PEFT has no form of its method, or its encoder is in no checkpoint; with the way out.
    """
    if fleet.trials[trial].model.random:
        raise UserError(f"the encoder has random weights, which no checkpoint holds for PEFT to load; {MERGED}")
    parts = _parts(fleet)
    layers = _own_type(fleet, parts, trial) or {n: _as_lora(fleet, n, part, trial) for n, part in parts.items()}
    kinds = {kind for kind, *_ in layers.values()}
    options = [options for _, options, _ in layers.values()]
    whole = _whole_modules(fleet)
    every = [name for name, _ in _plain_modules(fleet)]
    config: dict[str, Any] = {
        "peft_type": kinds.pop(),
        "peft_version": FORMAT,
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": fleet.origin["source"] if fleet.origin else None,
        "revision": fleet.origin.get("revision") if fleet.origin else None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": _suffixes(layers, every),
        "modules_to_save": whole,
        **options[0],
    }
    if config["peft_type"] == "IA3":
        del config["bias"]
        on_input = [name for name, (_, _, tensors) in layers.items() if tensors["ia3_l"].shape[0] == 1]
        config["feedforward_modules"] = _suffixes(on_input, every)
        on_output = _suffixes(layers.keys() - {*on_input}, every)
        config["target_modules"] = sorted({*on_output, *config["feedforward_modules"]})
    if config["peft_type"] == "LORA":
        ranks = {name: options["r"] for name, (_, options, _) in layers.items()}
        config["r"] = config["lora_alpha"] = Counter(ranks.values()).most_common(1)[0][0]
        other = {name: rank for name, rank in ranks.items() if rank != config["r"]}
        config |= {"rank_pattern": other, "alpha_pattern": other} if other else {}
    tensors = {f"{PREFIX}{name}.{key}": t for name, (_, _, own) in layers.items() for key, t in own.items()}
    if config["peft_type"] == "VERA":
        tensors |= _projections(fleet)
    state = fleet.base.state_dict()
    tensors |= {f"{PREFIX}{n}": state[n][trial] for n in state if n.rpartition(".")[0] in fleet.head_names}
    return config, {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


Layer = tuple[str, dict[str, Any], dict[str, Tensor]]  # the type, its options, and the tensors of one linear layer


def _parts(fleet: Fleet) -> dict[str, list[Any]]:
    """The linear layers of transformers' model that are adapted, by name: the parts of a fused one, else one.

    Raises:
        UserError: the method is not one on linear layers.
    """
    method = fleet.trials[0].method.name
    found: dict[str, list[Any]] = {}
    for name, module in fleet.adapted():
        if not isinstance(module, AdaptedLinear):
            ways = MERGED if fleet.distances() else "nor is it a change of weights, that a model of transformers has"
            raise UserError(f"method={method} is no adapter of linear layers, which PEFT's are; {ways}")
        above = name.rpartition(".")[0]
        fused = fleet.base.get_submodule(above)
        found |= {above: [*fused.children()]} if isinstance(fused, Joined) else {name: [module]}
    return found


def _own_type(fleet: Fleet, parts: Mapping[str, Sequence[Any]], k: int) -> dict[str, Layer] | None:
    """The layers as PEFT's own type of a method that it computes as here; None where they have to be a LoRA."""
    options = fleet.trials[k].method.options()
    found: dict[str, Layer] = {}
    for name, modules in parts.items():
        method = modules[0].method if len(modules) == 1 else None
        match method:
            case DeLoRA(residual=False) if options["scaling"] == "column":
                tensors = {"A": method.A[k], "B": method.B[k], "lambda": method.lam[k], "w_norm": method.c_I}
                own = {"r": options["rank"], "delora_lambda": options["lambda_init"]}
                found[name] = "DELORA", own, {f"delora_{key}": tensor for key, tensor in tensors.items()}
            case MiSS():
                found[name] = "MISS", {"r": options["rank"], "init_weights": True}, {"miss_block": method.D[k]}
            case VeRA():
                own = {"r": options["projection_rank"], "projection_prng_key": options["projection_seed"]}
                own |= {"save_projection": True, "d_initial": options["d_initial"]}
                found[name] = "VERA", own, {"vera_lambda_b": method.b[k], "vera_lambda_d": method.d[k]}
            case OFT():
                terms = options["neumann_terms"]
                own = {"r": 0, "oft_block_size": options["block_size"], "use_cayley_neumann": terms is not None}
                own |= {"num_cayley_neumann_terms": terms} if terms else {}
                found[name] = "OFT", own, {"oft_R.weight": method.R[k]}
            case _ if any(isinstance(getattr(module, "method", None), IA3) for module in modules):
                found[name] = "IA3", {}, {"ia3_l": _ia3(modules, k)}
            case _:
                return None
    return found


def _ia3(modules: Sequence[Any], k: int) -> Tensor:
    """IA3's factors of a layer: (O, 1) of its outputs, or (1, I) of its inputs."""
    if getattr(getattr(modules[0], "method", None), "on_input", False):
        return modules[0].method.scale[k][None]
    ones = [m.weight.new_ones(len(m.weight)) if isinstance(m, nn.Linear) else m.method.scale[k] for m in modules]
    return torch.cat(ones)[:, None]


@torch.no_grad()
def _as_lora(fleet: Fleet, name: str, modules: Sequence[Any], k: int) -> Layer:
    """A layer as a LoRA with the factor 1: of a fused one, the parts' factors side by side, each for its outputs."""
    ups, downs, magnitudes = [], [], []
    for module in modules:
        weight_OI = module.weight.to(fleet.dtype)
        if isinstance(module, nn.Linear):
            ups.append(weight_OI.new_zeros(len(weight_OI), 0))
            magnitudes.append(weight_OI.norm(dim=1))
            continue
        method: LinearMethod = module.method
        if not isinstance(method, LowRank):
            of = fleet.trials[k].method.name
            raise UserError(f"PEFT's format has no form of method={of} for the layer {name}; {MERGED}")
        up_KOS, down_KSI = method.factors(weight_OI)
        ups.append(up_KOS[k])
        downs.append(down_KSI[k if len(down_KSI) > 1 else 0])
        if isinstance(method, DoRA):
            magnitudes.append(method.m[k])
    tensors = {"lora_A.weight": torch.cat(downs), "lora_B.weight": torch.block_diag(*ups)}
    rank = len(tensors["lora_A.weight"])
    is_dora = len(magnitudes) == len(modules)
    if is_dora:
        tensors["lora_magnitude_vector"] = torch.cat(magnitudes)
    return "LORA", {"r": rank, "lora_alpha": rank, **({"use_dora": True} if is_dora else {})}, tensors


def _projections(fleet: Fleet) -> dict[str, Tensor]:
    """VeRA's random matrices, of which each layer has the first columns and rows."""
    methods = [module.method for _, module in fleet.adapted()]
    A = max((method.A_RI for method in methods), key=lambda A_RI: A_RI.shape[1])
    B = max((method.B_OR for method in methods), key=len)
    return {"base_model.vera_A": A, "base_model.vera_B": B}


def _plain_modules(fleet: Fleet) -> Iterator[tuple[str, nn.Module]]:
    """The modules that transformers' model has too."""
    inside = tuple(
        f"{name}." for name, module in fleet.base.named_modules() if isinstance(module, AdaptedLinear | Joined)
    )
    return ((name, module) for name, module in fleet.base.named_modules() if not name.startswith(inside or "\0"))


def _whole_modules(fleet: Fleet) -> list[str]:
    """The largest modules of which the head's layers are all that has values: PEFT's `modules_to_save`."""

    def is_head(name: str) -> bool:
        owners = [n.rpartition(".")[0] for n, _ in fleet.base.get_submodule(name).named_parameters(prefix=name)]
        return bool(owners) and all(owner in fleet.head_names for owner in owners)

    found: list[str] = []
    for name, _ in _plain_modules(fleet):
        if name and not any(name.startswith(f"{above}.") for above in found) and is_head(name):
            found.append(name)
    return found


def _suffixes(wanted: Iterable[str], every: Sequence[str]) -> list[str]:
    """For each of the names the shortest end, from a dot on, that no other name has: PEFT finds modules by ends."""
    names, found = {*wanted}, set()
    for name in names:
        words = name.split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        found.add(next(end for end in ends if {n for n in every if n == end or n.endswith(f".{end}")} <= names))
    return sorted(found)


# --- Read

# What of each type changes the computation and is taken; whatever else a config holds has to be empty, or inert.
TAKEN = {
    "LORA": ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"),
    "DELORA": ("r", "rank_pattern", "delora_lambda", "lambda_pattern"),
    "IA3": ("feedforward_modules",),  # the tensors' shapes say which
    "MISS": ("r", "mini_r", "init_weights"),
    "VERA": ("r", "projection_prng_key", "save_projection", "d_initial"),
}
INERT = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "init_weights", "init_ia3_weights", "lora_dropout", "vera_dropout", "miss_dropout"),
    *("module_dropout", "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "fan_in_fan_out"),
}
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # other init_lora_weights change the frozen weights
NAMES = {
    "LORA": {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"},
    "DELORA": {"delora_A": "A", "delora_B": "B", "delora_lambda": "lam", "delora_w_norm": "c_I"},
    "IA3": {"ia3_l": "scale"},
    "MISS": {"miss_block": "D"},
    "VERA": {"vera_lambda_b": "b", "vera_lambda_d": "d"},
}
AXES = {"A": 2, "B": 2, "m": 1, "lam": 1, "c_I": 1, "scale": 2, "D": 2, "b": 1, "d": 1}  # of each tensor
FIXED = ("c_I", "A_RI", "B_OR")  # tensors that are no parameters
HEADS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")  # whose rows are labels

Rank = Annotated[int, Field(ge=1, le=100_000)]
Factor = Annotated[float, Field(allow_inf_nan=False)]


class _Config(BaseModel):
    """The keys of adapter_config.json that are read."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Rank | None = None
    lora_alpha: Factor = 8.0  # PEFT's default
    target_modules: list[str] | str | None = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Factor] | None = None
    projection_prng_key: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0


@dataclass(frozen=True)
class Adapter:
    """What a folder of PEFT's holds, as a method of delora.

    Attributes:
        sha256: of both files.
        labels: their names in the order of ids, where delora wrote it; PEFT tells none.
        method: the method by the name of its file in conf/method, with its options.
        uneven: whether ranks or factors differ between layers: the options are those of all of them, padded with zeros.
        layers: the tensors of each linear layer, by the layer's name and the method's names; `FIXED` ones too.
        whole: the tensors of the modules that were trained whole, by name.
    """

    folder: Path
    config: _Config
    sha256: str
    labels: tuple[str, ...] | None
    method: str
    options: Mapping[str, Any]
    uneven: bool
    layers: Mapping[str, Mapping[str, Tensor]]
    whole: Mapping[str, Tensor] = field(default_factory=dict)


def read(folder: Path) -> Adapter:
    """Reads an adapter, of types `TAKEN`.

    Raises:
        UserError: it is damaged, or holds what cannot be computed here, which is named; all faults together.
    """
    try:
        described = storage.content(folder / CONFIG)
        given = json.loads(described)
        config = _Config.model_validate(given)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        else:
            told = f"cannot be read ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})"
        raise UserError(f"{folder / CONFIG}: {told}") from None
    kind = config.peft_type
    if kind not in TAKEN:
        raise UserError(f"{folder}: an adapter of type {kind[:80]!r}, only {', '.join(TAKEN)} can be taken")
    if unknown := [*_unknown(kind, given)]:
        raise _refused(f"{folder / CONFIG}: what it asks for cannot be computed here", unknown)
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        raise UserError(f"{folder / PICKLE}: a pickle is never read; save the adapter anew, as safetensors")
    tensors, about = storage.read_tensors(folder / WEIGHTS, "pt")
    sha256 = hashlib.sha256(described + hashlib.sha256(storage.content(folder / WEIGHTS, 1 << 35)).digest()).hexdigest()
    layers, whole, faults = _sorted_out(kind, tensors)
    if wrong := faults or [*_incomplete(config, layers)]:
        raise _refused(f"{folder / WEIGHTS}: not the adapter that {CONFIG} describes", wrong)
    method, options, uneven, layers = _as_method(config, layers)
    return Adapter(folder, config, sha256, _labels(about), method, options, uneven, layers, whole)


def _labels(about: Mapping[str, str]) -> tuple[str, ...] | None:
    """The labels that `save` wrote into the file's metadata."""
    try:
        names = json.loads(about["labels"])
    except (KeyError, ValueError, RecursionError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names) and len({*names}) == len(names)
    return tuple(names) if is_list else None


def _refused(what: str, faults: Iterable[object]) -> UserError:
    return UserError("\n  ".join([what, *map(str, faults)]))


def _unknown(kind: str, given: Mapping[str, Any]) -> Iterator[Fault]:
    for key, value in given.items():
        if key == "init_lora_weights" and value not in HARMLESS_STARTS:
            yield Fault(
                key, value, "changes the frozen weights when PEFT loads it; convert the adapter to a plain LoRA"
            )
        elif key == "init_weights" and kind == "MISS" and value not in (True, False):
            yield Fault(key, value, "a form of MiSS that is not known here")
        elif key not in INERT and key not in TAKEN[kind] and value not in (None, False, [], {}, "none"):
            yield Fault(key, value, "is not known here")


def _sorted_out(kind: str, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor], list[str]]:
    """Tensors by layer and the method's name, those of whole modules, and names that are neither's."""
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    faults = []
    shared = {"base_model.vera_A": "A_RI", "base_model.vera_B": "B_OR"} if kind == "VERA" else {}
    for name, tensor in tensors.items():
        if tensor.dtype not in pretrained.DTYPES or not tensor.isfinite().all():
            faults.append(f"{name}: holds other than finite numbers")
        elif not tensor.dim():
            faults.append(f"{name}: a single number, no vector or matrix")
        elif name in shared:
            continue
        elif not name.startswith(PREFIX):
            faults.append(f"{name}: expected names that begin with {PREFIX}")
        elif end := next((e for e in NAMES[kind] if name.endswith((f".{e}", f".{e}.weight"))), None):
            layer = name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(f".{end.removesuffix('.weight')}")
            layers.setdefault(layer, {})[NAMES[kind][end]] = tensor
        elif re.search(r"\.(lora|delora|ia3|miss|vera)_|\.base_layer\.", name):
            faults.append(f"{name}: of no linear layer, or of another type than {kind}")
        else:
            whole[name.removeprefix(PREFIX)] = tensor
    for name, here in shared.items():
        for own in layers.values():
            own |= {here: tensors[name]} if name in tensors else {}
    return layers, whole, faults


def _incomplete(config: _Config, layers: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """What layers lack, or have in other shapes than the config says."""
    if not layers:
        yield f"it holds no {config.peft_type} of any layer"
    expected = {*NAMES[config.peft_type].values()} - (set() if config.use_dora else {"m"})
    for name, own in layers.items():
        odd = sorted(expected ^ (own.keys() - {"A_RI", "B_OR"}))
        yield from (f"{name}: {'lacks' if key in expected else 'has'} {key}" for key in odd)
        shaped = [key for key, tensor in own.items() if tensor.dim() != AXES.get(key, 2) or not tensor.numel()]
        yield from (f"{name}: {key} of shape {tuple(own[key].shape)}" for key in shaped)
        if odd or shaped:
            continue
        ranks = {key: own[key].shape[axis] for key, axis in (("A", 0), ("B", 1), ("D", 0), ("d", 0)) if key in own}
        told = int(_matching(config.rank_pattern, name, config.r)) if config.r else None
        if len({*ranks.values(), *([told] if ranks and told else [])}) > 1:
            yield f"{name}: ranks {ranks}, {told} by {CONFIG}"


def _matching(pattern: Mapping[str, float] | None, layer: str, default: float) -> float:
    """The value of the first pattern that the end of the layer's name matches, from a dot on, as PEFT takes it.

    Raises:
        UserError: a key of it is no regular expression.
    """
    try:
        return next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)
    except re.error as error:
        raise UserError(f"{CONFIG}: a pattern is no regular expression ({error})") from None


def _as_method(
    config: _Config, layers: Mapping[str, Mapping[str, Tensor]]
) -> tuple[str, dict[str, Any], bool, dict[str, dict[str, Tensor]]]:
    """The method, its options, whether they are those of no layer alone, and the tensors that go with them."""
    first = next(iter(layers.values()))
    match config.peft_type:
        case "IA3":
            return "ia3", {}, False, {name: dict(own) for name, own in layers.items()}
        case "MISS":
            return "miss", {"rank": len(first["D"])}, False, {name: dict(own) for name, own in layers.items()}
        case "VERA":
            options = {"projection_rank": len(first["d"]), "projection_seed": config.projection_prng_key}
            return "vera", options, False, {name: dict(own) for name, own in layers.items()}
    ranks = {name: len(own["A"]) for name, own in layers.items()}
    most = max(ranks.values())
    if config.peft_type == "DELORA":
        uneven = len({*ranks.values()}) > 1
        # Padded with zeros, λ/r of the larger r has to be what it was.
        made = {n: {**_padded(own, most), "lam": own["lam"] * (most / ranks[n])} for n, own in layers.items()}
        return "delora", {"rank": most, "init": "zero", "scaling": "column"}, uneven, made
    alphas = {name: _matching(config.alpha_pattern, name, config.lora_alpha) for name in layers}
    uneven = len({*ranks.values()}) > 1 or len({*alphas.values()}) > 1
    alpha = alphas[next(iter(layers))]
    name = "dora" if config.use_dora else "lora"
    if not uneven and alpha > 0 and not (config.use_dora and config.use_rslora):
        name = "rslora" if config.use_rslora else name
        return name, {"rank": most, "alpha": alpha}, False, {n: dict(own) for n, own in layers.items()}
    made = {}
    for layer, own in layers.items():
        factor = alphas[layer] / (ranks[layer] ** 0.5 if config.use_rslora else ranks[layer])
        made[layer] = {**_padded(own, most), "B": factor * _padded(own, most)["B"].double()}
    return name, {"rank": most, "alpha": float(most)}, True, made


def _padded(own: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A and B with rows and columns of zeros up to a rank."""
    more = rank - len(own["A"])
    pad = nn.functional.pad
    return {**own, "A": pad(own["A"], (0, 0, 0, more)), "B": pad(own["B"], (0, more))}


def load(folder: Path, base: str | Path | None = None, precision: str = "float32") -> Fleet:
    """The model of an adapter over its base, in evaluation mode.

    Labels have the names that `delora.export.saving.save` wrote, or those of the base's config where it has as many,
    else LABEL_0 and so on; a single one is a score.

    Args:
        base: a folder, an id on the hub, or an encoder of conf/model; by default what the adapter names.
        precision: as in conf/config.yaml.

    Raises:
        UserError: as `read`, the base is missing, or the adapter does not fit it.
    """
    adapter = read(folder)
    model = _base(adapter, base)
    if lack := missing_encoder(model):
        raise UserError(f"missing on this machine:\n{lack}")
    task = _task(adapter, model)
    loaded = pretrained.load(model, Task(task.name, task.labels))
    state = loaded.model.to(DTYPES[precision]).state_dict()  # type: ignore[arg-type]
    odd = [n for n, t in adapter.whole.items() if n not in state or state[n].shape != t.shape]
    if odd:
        raise UserError(f"{folder}: its base {model.name} has no place for {', '.join(odd[:4])}")
    if lacking := sorted(loaded.lacking - adapter.whole.keys()):
        raise UserError(f"{folder}: neither it nor its base {model.name} holds {', '.join(lacking[:4])}")
    if left := _left_out(adapter, loaded.model):
        raise UserError(f"{folder / WEIGHTS}: holds nothing for {', '.join(left[:4])}, which target_modules names")
    loaded.model.load_state_dict(adapter.whole, strict=False)
    family = encoders.of(loaded.model.config.to_dict()) or encoders.unknown
    layers = _unfused(adapter, family)
    try:
        trial = _trial(adapter, model, task, [*layers], precision)
        fleet = Fleet(loaded.model, [trial], torch.device("cpu"), loaded.lacking)
    except UserError as error:
        raise UserError(f"{folder}: does not fit its base {model.name}: {error}") from error
    fleet.tokenizer, fleet.origin = loaded.tokenizer, loaded.origin
    for name, module in fleet.adapted():
        own = layers[name]
        if adapter.method == "ia3":  # PEFT's config says what is scaled, here the layer's role does
            module.method.on_input = own["scale"].shape[0] == 1
            module.method.scale = nn.Parameter(own["scale"].flatten()[None].to(fleet.dtype))
        for key in FIXED:
            if key in own:
                setattr(module.method, key, _cut(own[key], getattr(module.method, key), name, folder))
    head = {n: t for n, t in state.items() if n.rpartition(".")[0] in fleet.head_names}
    fleet.load_trial_state(0, {**_state(layers), **head})
    return fleet.eval()


def _left_out(adapter: Adapter, model: nn.Module) -> list[str]:
    """The linear layers for which the adapter holds nothing, though its config names them; PEFT would draw them."""
    config, targets = adapter.config, adapter.config.target_modules
    if not targets or targets == "all-linear" or config.exclude_modules or config.layers_to_transform is not None:
        return []

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)

    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" not in adapter.whole]
    try:
        return [name for name in linears if name not in adapter.layers and is_target(name)]
    except re.error as error:
        raise UserError(f"{adapter.folder / CONFIG}: target_modules is no regular expression ({error})") from None


def _base(adapter: Adapter, base: str | Path | None) -> ModelConfig:
    named = base is None
    base = adapter.config.base_model_name_or_path if base is None else str(base)
    if not base:
        raise UserError(f"{adapter.folder}: names no base model; give it: delora.load(..., base=FOLDER_OR_MODEL)")
    path = conf_folder() / "model" / f"{base}.yaml"
    if re.fullmatch(r"\w+", base) and path.is_file():
        return ModelConfig.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    options = [OmegaConf.load(path) for path in (conf_folder() / "model").glob("*.yaml")]
    for option in options:  # what is written names packages as results do
        model = ModelConfig.model_validate(OmegaConf.to_container(option))
        if model.packages and ", ".join(model.packages) == base:
            return model
    return ModelConfig(source=base, revision=adapter.config.revision if named else None)  # type: ignore[call-arg]


def _task(adapter: Adapter, model: ModelConfig) -> TaskConfig:
    """The task of an adapter: its labels are all that is known of it."""
    known = (model.described or {}).get("id2label")
    names = [str(name) for name in known.values()] if isinstance(known, dict) else []
    names = list(adapter.labels or names)
    rows = next((len(adapter.whole[name]) for name in HEADS if name in adapter.whole), len(names) or 2)
    if rows == 1:
        return TaskConfig(name="score", kind="regression", labels=None, metric=("pearson_spearman",))
    labels = names if len({*names}) == rows else [f"LABEL_{i}" for i in range(rows)]
    return TaskConfig(name="labels", kind="classes", labels=tuple(labels), metric=("accuracy",))


def _trial(adapter: Adapter, model: ModelConfig, task: TaskConfig, targets: Sequence[str], precision: str) -> Trial:
    """The config of conf/ with the adapter's method: what it does not say of training stays as it is there."""
    config: Any = OmegaConf.load(conf_folder() / "config.yaml")
    for key in ("defaults", "hydra"):
        del config[key]
    chosen = {"task": "mrpc", "method": adapter.method, "data": "glue", "protocol": "paper", "logger": "wandb"}
    for group, option in chosen.items():
        own = OmegaConf.load(conf_folder() / group / f"{option}.yaml")
        config[group] = OmegaConf.merge(config.get(group) or {}, own)
    config.model = model.model_dump(exclude_unset=True)
    config.method = OmegaConf.merge(config.method, adapter.options, {"targets": list(targets)})
    config.precision = precision
    shape, described = model.known_shape, model.described or {}
    positions = shape.positions if shape else described.get("max_position_embeddings")
    config.max_length = min(config.max_length, positions or config.max_length)
    return Trial.from_config(config).model_copy(update={"task": task})


def _unfused(adapter: Adapter, family: encoders.Encoder) -> dict[str, dict[str, Tensor]]:
    """The tensors by the names that layers have here, where the parts of fused ones are layers of their own."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, own in adapter.layers.items():
        parts = next((parts for fused, parts in family.fused.items() if name.endswith(f".{fused}")), ())
        if not parts:
            found[name] = dict(own)
            continue
        if adapter.method in ("delora", "vera"):
            raise UserError(
                f"{adapter.folder}: {adapter.config.peft_type} on the fused layer {name} cannot be taken apart"
            )
        for i, part in enumerate(parts):
            found[f"{name}.{part}"] = {key: _part(key, tensor, i, len(parts)) for key, tensor in own.items()}
    return found


def _part(key: str, tensor: Tensor, i: int, parts: int) -> Tensor:
    """Of a fused layer's tensor what belongs to the outputs of a part of it."""
    if key == "A" or (key == "scale" and tensor.shape[0] == 1):  # of the inputs, which the parts have in common
        return tensor
    return tensor.chunk(parts, dim=1 if key == "D" else 0)[i]


def _state(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The adapter's part of what `Fleet.load_trial_state` takes."""
    return {
        f"{name}.method.{key}": tensor.flatten() if key == "scale" else tensor
        for name, own in layers.items()
        for key, tensor in own.items()
        if key not in FIXED
    }


def _cut(given: Tensor, ours: Tensor, layer: str, folder: Path) -> Tensor:
    """A fixed tensor of the folder in the shape of the method's: of VeRA's matrices a layer takes the first part.

    Raises:
        UserError: it is smaller, or as DeLoRA's norms of the frozen weights not what they are here.
    """
    if given.dim() != ours.dim() or any(a < b for a, b in zip(given.shape, ours.shape, strict=True)):
        raise UserError(
            f"{folder}: a tensor of shape {tuple(given.shape)} for {layer}, which takes {tuple(ours.shape)}"
        )
    cut = given[tuple(slice(size) for size in ours.shape)].to(ours)
    if ours.dim() == 1 and not torch.allclose(cut, ours, rtol=0.02, atol=0):
        raise UserError(f"{folder}: made over other weights: the norms of {layer} are not those of its delora_w_norm")
    return cut


# --- Training begins with it


def start_of(trial: Trial) -> Adapter:
    """The adapter that `method.start` names, if it is one of the trial's method with its options.

    Raises:
        UserError: as `read`, or it does not fit.
    """
    key = f"method.start={trial.method.start}"
    try:
        adapter = read(Path(str(trial.method.start)).expanduser())
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if trial.method.start_sha256 not in (None, adapter.sha256):
        raise UserError(f"{key}: its adapter is not the one that this trial began with (method.start_sha256)")
    theirs: Any = OmegaConf.load(conf_folder() / "method" / f"{adapter.method}.yaml")
    ours: dict[str, Any] = {"method._target_": trial.method.target}
    ours |= {f"method.{name}": trial.method.options().get(name) for name in adapter.options}
    wanted = {"method._target_": theirs["_target_"], **{f"method.{n}": v for n, v in adapter.options.items()}}
    lines = storage.differences(wanted, ours)
    if adapter.uneven:
        lines.append("  ranks or factors that differ between layers, or that no options of the method say")
    if lines:
        raise UserError("\n".join([f"{key}: its adapter does not fit, it has", *lines]))
    return adapter


def begin(fleet: Fleet, adapter: Adapter) -> storage.Origin:
    """Has all trials begin with an adapter, and with its head where that is of the same shape, and of the same labels
    where the folder tells them.

    Raises:
        UserError: it does not fit the encoder or the targets.
    """
    key = f"method.start={fleet.trials[0].method.start}"
    layers = _unfused(adapter, fleet.encoder)
    places = dict(fleet.adapted())
    if odd := sorted(places.keys() ^ layers.keys()):
        raise UserError(f"{key}: its adapter does not fit method.targets: {', '.join(odd[:4])} in one of both alone")
    if "alpha" in adapter.options and any(t.method.alpha != adapter.options["alpha"] for t in fleet.trials):
        raise UserError(f"{key}: its adapter has method.alpha={adapter.options['alpha']:g}, not all trials have")
    for name, own in layers.items():
        method = places[name].method
        if adapter.method == "ia3" and method.on_input != (own["scale"].shape[0] == 1):
            raise UserError(f"{key}: it scales the other side of {name}")
        for fixed in FIXED:
            if fixed in own:
                ours = getattr(method, fixed)
                if not torch.allclose(
                    _cut(own[fixed].to(ours), ours, name, adapter.folder), ours, rtol=0.02, atol=1e-6
                ):
                    raise UserError(f"{key}: its random matrices are others (method.projection_seed)")
    head = {n: t for n, t in fleet.base.state_dict().items() if n.rpartition(".")[0] in fleet.head_names}
    odd = sorted(adapter.whole.keys() - head.keys())
    if odd:
        raise UserError(f"{key}: it trains {', '.join(odd[:4])} too, which stay frozen here")
    ours = fleet.trials[0].task.facts.labels
    fits = adapter.labels in (None, ours) and all(
        n in adapter.whole and adapter.whole[n].shape == t.shape[1:] for n, t in head.items()
    )
    fleet.begin_with({**_state(layers), **(adapter.whole if fits else {})}, head=fits)
    return {"source": f"PEFT's adapter {adapter.folder.name}", "sha256": adapter.sha256}
