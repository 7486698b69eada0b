"""The contract of a method: what K trials at once compute at places of a frozen encoder.

A method sits on linear layers (`LinearMethod`), has copies of frozen parameters (`CopyMethod`), or edits hidden states
(`HiddenMethod`). Which ones, a config's targets say, by names that `delora.encoders` gives them.

Shapes are in the names: K trials, N = examples · tokens of one trial, I input width, O output width, H hidden width,
R rank, M blocks, D width of a block, V size of a vocabulary. Every trainable tensor has the leading axis K, and trial k
touches slice k alone.

A new method is one file with a subclass of one of these and one file conf/method/<name>.yaml whose `_target_` names it.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delora.config import MISSING, ConfigError, Fault, MethodConfig, did_you_mean
from delora.randomness import Draw


class Method(nn.Module, ABC):
    """What K trials train at one place. Subclasses of its kinds take the options of their yaml as keywords.

    Options that may differ between the trials (`delora.config.PER_TRIAL`) come as (K,) tensors.

    Attributes:
        given: the names of what a place is given beside its options: the tensors of `share`, and its "role" in the
            encoder (None where it has none).
        alone: whether it takes one trial at a time, whose steps are neither compiled nor recorded.
    """

    given: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[bool] = False

    @classmethod
    def share(cls, linears: Sequence[nn.Linear], draw: Draw, **options: Any) -> Mapping[str, Any]:
        """What all places have in common, given those that are linear layers, and the method's options."""
        return {}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> Iterable[Fault]:
        """What is wrong with options beyond their names and the bounds of `delora.config`."""
        return ()

    def learning_rates(self) -> Mapping[str, Tensor]:
        """Parameters that have a learning rate (K,) of their own, by name; all others use the trial's."""
        return {}

    def rate_factors(self) -> Mapping[str, Tensor]:
        """Parameters whose rate is a multiple (K,) of the trial's, by name."""
        return {}

    def strength(self) -> Tensor | None:
        """λ of each trial (K,), for methods that have one."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Options that differ between trials are tensors and no buffers: they go along to another device."""
        super()._apply(fn, recurse)
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, fn(value))
        return self


class LinearMethod(Method):
    """A map around a frozen linear layer. Subclasses take (weight_OI, draw, **options)."""

    @abstractmethod
    def forward(self, x_KNI: Tensor, dropped_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The adapted layer's output (K, N, O).

        `dropped_KNI` is `x_KNI` after dropout, and the same object where there is none.
        """

    @abstractmethod
    def delta(self, weight_OI: Tensor) -> Tensor:
        """ΔW = W′ − W of each trial, (K, O, I): what merging adds to the frozen weight."""

    def bias_delta(self, bias_O: Tensor | None) -> Tensor | None:
        """b′ − b of each trial, (K, O), for methods that change the bias too."""
        return None


class CopyMethod(Method):
    """Copies, one a trial, of parameters of frozen linear layers, LayerNorms and embeddings. Subclasses say which.

    They begin as the frozen ones. Dropout acts on the whole input of linear layers.

    Attributes:
        copied: the names of the parameters. A module that has none of them is no place for the method.
    """

    copied: ClassVar[tuple[str, ...]]

    def __init__(self, frozen: Mapping[str, Tensor], draw: Draw):
        super().__init__()
        for name, tensor in frozen.items():
            copies = tensor.detach().to(draw.device, draw.dtype).repeat(len(draw.seeds), *[1] * tensor.dim())
            self.register_parameter(name, nn.Parameter(copies))

    def change(self, name: str, frozen: Tensor) -> Tensor | None:
        """What merging adds to the frozen parameter, (K, *shape); None where the method has no copy of it."""
        copies = self._parameters.get(name)
        return None if copies is None else copies - frozen


class HiddenMethod(Method):
    """An edit of hidden states. Subclasses take (width, draw, **options).

    Attributes:
        of_first: whether it edits those of the examples' first tokens alone.
    """

    of_first: ClassVar[bool] = False

    @abstractmethod
    def forward(self, h_KNH: Tensor, dropout: Callable[[Tensor], Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
        """The edited hidden states (K, N, H).

        `norm` is the frozen LayerNorm that they enter next, where the encoder names the place by it; else the identity.
        """


class LowRank(LinearMethod):
    """A method whose ΔW is a product of two thin matrices: subclasses say which. S is the product's rank."""

    drops_whole_input = False  # else the input of ΔW alone

    @abstractmethod
    def factors(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices of each trial, (K, O, S) and (K, S, I), whose product is ΔW."""

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


class Bounded(LowRank):
    """A method whose ΔW has a learned strength λ apart from its direction, with a learning rate of its own (K,)."""

    def __init__(self, lambda_init: Tensor, lambda_lr: Tensor):
        super().__init__()
        self.lam, self.lambda_lr = nn.Parameter(lambda_init[:, None].clone()), lambda_lr

    def learning_rates(self) -> Mapping[str, Tensor]:
        return {"lam": self.lambda_lr}

    def strength(self) -> Tensor:
        return self.lam[:, 0]


def find(target: str) -> type[Method]:
    """The class that a config's `_target_` names.

    Raises:
        ConfigError: there is no such class, or it is no method.
    """

    def refused(why: str) -> ConfigError:
        return ConfigError([Fault("method._target_", target, why)])

    path, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(path)
    except (Exception, SystemExit) as error:  # whatever a module raises while it is imported
        raise refused(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        known = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == path]
        raise refused(f"{path} has no class {name}{did_you_mean(name, known)}")
    if not issubclass(found, LinearMethod | CopyMethod | HiddenMethod):
        raise refused("expected a class derived from delora.methods.base.LinearMethod, CopyMethod or HiddenMethod")
    lacking = sorted(found.__abstractmethods__)
    if issubclass(found, CopyMethod) and not hasattr(found, "copied"):
        lacking.append("copied")
    if lacking:
        raise refused(f"an abstract class: it lacks {' and '.join(lacking)}")
    return found


def check(configs: Iterable[MethodConfig]) -> None:
    """Finds out whether the methods can be built, as far as their classes tell.

    Raises:
        ConfigError: there is no such class, or it has other options; with all faults together.
    """
    faults: list[object] = []
    for config in configs:
        try:
            faults += _misfits(find(config.target), config.options())
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)


def _misfits(method: type[Method], options: Mapping[str, object]) -> Iterator[Fault]:
    """Options that a class does not take, or needs and has not got."""
    _, _, *parameters = inspect.signature(method).parameters.values()  # after those of its kind
    parameters = [parameter for parameter in parameters if parameter.name not in method.given]
    taken = {parameter.name: parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    for name, value in options.items():
        if name not in taken and len(taken) == len(parameters):
            yield Fault(f"method.{name}", value, f"{method.__name__} has no such option{did_you_mean(name, taken)}")
        elif value is None and name in taken and not _may_be_none(taken[name]):
            yield Fault(f"method.{name}", value, f"expected a value; {method.__name__} cannot do without")
    for name, parameter in taken.items():
        if name not in options and parameter.default is parameter.empty:
            yield Fault(f"method.{name}", MISSING, f"is missing; {method.__name__} cannot do without")
    yield from method.check_options(options)


def _may_be_none(parameter: inspect.Parameter) -> bool:
    return parameter.default is None or parameter.annotation is parameter.empty or "None" in str(parameter.annotation)


def kaiming_uniform(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """U(−1/√n, 1/√n) with n the last dimension: Kaiming-uniform with a = √5, PEFT's start for A. (K, *shape)."""
    return draw.uniform(name, shape, shape[-1] ** -0.5)


def per_trial(values: Tensor) -> Tensor:
    """(K,) as (K, 1, 1), to multiply (K, N, O)."""
    return values[:, None, None]


def zeros(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """A zero start, (K, *shape)."""
    return torch.zeros(len(draw.seeds), *shape, dtype=draw.dtype, device=draw.device)
