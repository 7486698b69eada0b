"""Any method of the PEFT library (github.com/huggingface/peft) that adapts linear layers, one trial at a time.

PEFT makes its layers around copies of the frozen ones, all at once, as some methods share what they train; here they
are computed with parameters that have the trial's axis, of length 1. Dropout acts on a layer's whole input.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from delora.config import MISSING, Fault, did_you_mean, expected
from delora.errors import UserError
from delora.methods.base import LinearMethod
from delora.randomness import Draw, generator

ADAPTER = "default"
SET_HERE = ("target_modules", "peft_type", "task_type", "modules_to_save", "inference_mode", "base_model_name_or_path")


class PEFT(LinearMethod):
    """A layer of PEFT's. Shapes as in `delora.methods.base`; parameters (1, ...) by PEFT's names."""

    given = ("tuners",)
    alone = True

    def __init__(self, weight_OI: Tensor, draw: Draw, *, type: str, config: Mapping[str, Any], tuners: Any):
        super().__init__()
        layer, own = tuners[weight_OI]
        self._layer = (layer,)  # not a part of this module, whose tensors all have the trial's axis
        self._names = {}
        for name, parameter in layer.named_parameters():
            if parameter in own:
                self._names[name] = name.replace(f".{ADAPTER}", "").replace(".", "_")
                self.register_parameter(self._names[name], own[parameter])

    @classmethod
    def share(cls, linears: Sequence[nn.Linear], draw: Draw, **options: Any) -> Mapping[str, Any]:
        layers = _layers(linears, options["type"], options["config"], draw)
        trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        own = {parameter: nn.Parameter(parameter.detach()[None].clone()) for parameter in trained}
        return {"tuners": {linear.weight: (layer, own) for linear, layer in zip(linears, layers, strict=True)}}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> Iterator[Fault]:
        yield from _faults(options.get("type"), options.get("config") or {})

    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return functional_call(self._layer[0], self._own(), (dropped_KNI,))

    def delta(self, weight_OI: Tensor) -> Tensor:
        return (self._merged().weight - weight_OI)[None]

    def bias_delta(self, bias_O: Tensor | None) -> Tensor | None:
        merged = self._merged().bias
        return None if merged is None or bias_O is None else (merged - bias_O)[None]

    def _own(self) -> dict[str, Tensor]:
        return {there: getattr(self, here)[0] for there, here in self._names.items()}

    def _merged(self) -> Any:
        """The linear layer that PEFT merges into."""
        with torch.inference_mode(False), torch.no_grad():
            layer = copy.deepcopy(self._layer[0])
            parameters = dict(layer.named_parameters())
            for name, tensor in self._own().items():
                parameters[name].copy_(tensor)
            layer.merge()
            return layer.get_base_layer()


def _types() -> tuple[Mapping[str, type], Mapping[str, type]]:
    """PEFT's classes of configs and of tuners, by type. Raises UserError where the library is not installed."""
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError:
        raise UserError("method=peft needs PEFT: pip install 'delora[peft]'") from None
    return (
        {str(kind.name): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()},
        {str(kind.name): tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()},
    )


def _faults(kind: Any, config: Mapping[str, Any]) -> Iterable[Fault]:
    configs, tuners = _types()
    if kind not in configs:
        return [Fault("method.type", kind, expected(kind, configs))]
    from peft.tuners.tuners_utils import BaseTuner

    tuner = tuners[kind]
    if not issubclass(tuner, BaseTuner):
        return [Fault("method.type", kind, "adapts no layers, but the model's input, which packed rows do not allow")]
    if tuner.forward is not BaseTuner.forward or hasattr(tuner, "update_and_allocate"):
        return [Fault("method.type", kind, "does more in training than its layers do, which this loop does not")]
    known = configs[kind].__dataclass_fields__  # type: ignore[attr-defined]
    faults = []
    for name, value in config.items():
        if name in SET_HERE:
            faults.append(Fault(f"method.config.{name}", value, "is set by delora: method.targets chooses the layers"))
        elif name not in known:
            told = f"{configs[kind].__name__} of PEFT has no such option{did_you_mean(name, known)}"
            faults.append(Fault(f"method.config.{name}", value, told))
        elif "dropout" in name:
            faults.append(Fault(f"method.config.{name}", value, "takes PEFT's own random numbers; use method.dropout"))
    if not faults:
        try:
            _config(kind, config, ["layer"])
        except Exception as error:  # whatever PEFT's config raises
            faults.append(Fault("method.config", MISSING, _first_line(error)))
    return faults


def _config(kind: str, config: Mapping[str, Any], names: list[str]) -> Any:
    made = _types()[0][kind]
    options = dict(config)
    if "feedforward_modules" in made.__dataclass_fields__:  # type: ignore[attr-defined]
        options.setdefault("feedforward_modules", [])
    return made(target_modules=names, **options)


def _layers(linears: Sequence[nn.Linear], kind: str, config: Mapping[str, Any], draw: Draw) -> list[Any]:
    """PEFT's layers around copies of linear layers, made on the CPU.

    Raises:
        UserError: PEFT does not take them so, or what it makes cannot be trained here; in one line.
    """
    key = f"method.type={kind}"
    copies = [copy.deepcopy(linear).cpu().requires_grad_(False) for linear in linears]
    holder = nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(copies)})
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            torch.manual_seed(generator("peft", draw.seeds[0]).initial_seed())
            _types()[1][kind](holder, {ADAPTER: _config(kind, config, list(holder))}, ADAPTER)
            layers: list[Any] = [layer.to(draw.device, draw.dtype) for layer in holder.values()]
            problem = next(filter(None, map(_problem, layers)), None)
    except Exception as error:  # whatever PEFT raises
        raise UserError(f"{key}: {_first_line(error)}") from error
    if problem:
        raise UserError(f"{key}: {problem}")
    return layers


@torch.no_grad()
def _problem(layer: Any) -> str | None:
    """Why a layer of PEFT's cannot be trained here."""
    if not hasattr(layer, "get_base_layer"):
        return "adapts no linear layers"
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    if not trained:
        return "trains nothing in a linear layer"
    if any(parameter._backward_hooks for parameter in trained):
        return "changes gradients by hooks of its own"
    moved, draw = copy.deepcopy(layer), generator("peft")  # away from the start, where much is 0
    for parameter in (p for p in moved.parameters() if p.requires_grad):
        parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter)
    layer, width = moved, layer.get_base_layer().weight.shape[1]
    x = torch.randn(1, 4, width, generator=draw).to(trained[0])
    whole, again = layer(x), layer(x)
    if not torch.equal(whole, again):
        return "draws random numbers of its own in training"
    parts = torch.cat([layer(x[:, :1]), layer(x[:, 1:])], 1)
    if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
        return "a token's output depends on others, which packed rows do not allow"
    layer.merge()  # as every evaluation does; PEFT raises where there is no merged weight
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
