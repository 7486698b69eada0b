"""The frozen encoder, with a method on its target layers and a head for each of K trials.

The encoder's own code is unchanged. Its inputs are (K·B, T), trial after trial, or where it can be (K, N): the
examples of a trial one after the other, without padding. Shapes as in `delora.methods.base`, `delora.data.batches`.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from hydra.utils import get_class
from torch import Tensor, nn
from torch.fx.experimental import _config as symbols
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from delora.attention import packed_attention
from delora.config import PER_TRIAL, Trial, matches
from delora.data.batches import Batch
from delora.errors import UserError
from delora.methods.base import Method
from delora.randomness import Draw, Dropout, TokenKeys

# Of what is trained and summed up, and of the frozen encoder and its activations.
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
ENCODER_DTYPES = {**DTYPES, "bfloat16": torch.bfloat16}
PACKED = ("bert", "roberta", "xlm-roberta", "camembert")  # encoders whose only tie between tokens is the attention
HEADS = ("classifier", "score")  # what transformers names a sequence classification head
ATTENTION = "delora"


class AdaptedLinear(nn.Module):
    """A frozen linear layer of the encoder under a method: (K·B, ..., I) to (K·B, ..., O)."""

    def __init__(self, linear: nn.Linear, method: Method, dropout: Dropout):
        super().__init__()
        self.weight, self.bias, self.method, self.dropout = linear.weight, linear.bias, method, dropout
        self.dtype: torch.dtype = linear.weight.dtype  # of what is trained; the frozen weight may get another

    def forward(self, x: Tensor) -> Tensor:
        x_KNI = x.reshape(len(self.dropout.scale_K), -1, x.shape[-1])
        dropped = self.dropout(x)
        dropped_KNI = x_KNI if dropped is x else dropped.reshape(x_KNI.shape)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            y_KNO = self.method(x_KNI, dropped_KNI, self.weight, self.bias)
        return y_KNO.to(x.dtype).view(*x.shape[:-1], -1)

    def delta(self) -> Tensor:
        """ΔW of each trial, (K, O, I), in the dtype of what is trained."""
        return self.method.delta(self.weight.to(self.dtype))


class HeadLinear(nn.Module):
    """A trained linear layer of the head, one a trial: (K·B, ..., I) to (K·B, ..., O)."""

    def __init__(self, linear: nn.Linear, draw: Draw, std: float):
        super().__init__()
        self.weight = nn.Parameter(draw.normal("weight", linear.weight.shape, std))
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.zeros_like(self.weight[:, :, 0]))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x_KNI = x.reshape(len(self.weight), -1, x.shape[-1]).to(self.weight.dtype)
        y_KNO = x_KNI @ self.weight.mT
        if self.bias is not None:
            y_KNO = y_KNO + self.bias[:, None]
        return y_KNO.view(*x.shape[:-1], -1)


class Fleet(nn.Module):
    """K trials over one frozen encoder.

    Args:
        base: a transformers model for sequence classification; it is changed in place.
        trials: K configs that agree in everything but seed, rates and strengths.
        device: where it runs.

    Attributes:
        packs: whether it takes batches whose examples are packed.
        recorded: whether its steps of training are recorded as CUDA graphs.

    Raises:
        UserError: no layer matches the targets, an option does not fit a layer, or the model has no head to train.
    """

    def __init__(self, base: transformers.PreTrainedModel, trials: Sequence[Trial], device: torch.device):
        super().__init__()
        self.trials, self.precision = trials, trials[0].precision
        self.tokenizer: transformers.PreTrainedTokenizerBase | None = None
        self.dtype = dtype = DTYPES[self.precision]
        self.base = base.to(device=device, dtype=dtype).requires_grad_(False)  # type: ignore[call-arg]
        base.set_attn_implementation(ATTENTION)
        seeds = [trial.seed for trial in trials]
        self.keys = TokenKeys(seeds, device)
        self._train_head(seeds, dtype, device)
        self._adapt(seeds, dtype, device)
        for name, module in list(base.named_modules()):
            if type(module) is nn.Dropout:
                _replace(base, name, Dropout(self.keys, name, [module.p] * len(seeds)))
        for _, parameter in self.frozen():
            parameter.data = parameter.to(ENCODER_DTYPES[self.precision])
        self.packs: bool = base.config.model_type in PACKED
        self.recorded = self.packs and device.type == "cuda"
        if self.packs:
            self._prune()

    def _prune(self) -> None:
        """Of a packed batch, lets only first tokens through what follows the last attention: the head reads these."""
        last: Any = self._layers()[-1]
        last.attention.output.register_forward_pre_hook(lambda _, args: tuple(map(self._first, args)))
        for module in [*last.attention.output.modules(), *last.output.modules()]:
            if isinstance(module, Dropout):
                module.of_first = True
        reader = self.base.base_model.pooler or self.base.get_submodule(self.head_names[0].split(".")[0])
        reader.register_forward_pre_hook(lambda _, args: (self._as_examples(args[0]), *args[1:]))

    def _train_head(self, seeds: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        linears = [n for n, m in self.base.named_modules() if isinstance(m, nn.Linear) and n.split(".")[0] in HEADS]
        if not linears:
            names = " or ".join(HEADS)
            raise UserError(f"{type(self.base).__name__} has no classification head: no linear layer under {names}")
        std = getattr(self.base.config, "initializer_range", 0.02)
        for name in linears:
            linear = self.base.get_submodule(name)
            _replace(self.base, name, HeadLinear(linear, Draw(seeds, name, dtype, device), std))
        self.head_names = linears

    def _adapt(self, seeds: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        config = self.trials[0].method
        linears = {n: m for n, m in self.base.named_modules() if isinstance(m, nn.Linear)}
        names = [n for n in linears if any(matches(pattern, n) for pattern in config.targets)]
        if not names:
            known = ", ".join(sorted({n.split(".")[-1] for n in linears}))
            raise UserError(
                f"method.targets={config.targets}: no linear layer of the encoder matches (it has: {known})"
            )
        method, options = get_class(config.target), method_options(self.trials, dtype, device)
        rates = [trial.method.dropout for trial in self.trials]
        for name in names:
            linear = linears[name]
            try:
                adapter = method(linear.weight, Draw(seeds, name, dtype, device), **options)
            except ValueError as error:
                raise UserError(f"method {config.name} on layer {name}: {error}") from None
            dropout = Dropout(self.keys, f"{name}.method", rates)
            _replace(self.base, name, AdaptedLinear(linear, adapter.to(device), dropout))

    def compile_layers(self) -> None:
        """Has embeddings and layers compiled when they are first used, once for all that are alike and any K > 1.

        The last layer is left as it is: `_prune` makes it unlike the others, and little of it is left.
        """
        config = torch._dynamo.config
        config.recompile_limit = 64  # methods in one process
        config.force_parameter_static_shapes = config.force_nn_module_property_static_shapes = False
        symbols.use_duck_shape = False  # K may be the rank
        frozen = {parameter for _, parameter in self.frozen()}
        for module in [self.base.base_model.embeddings, *self._layers()[:-1]]:
            for tensor in [*module.parameters(), *module.buffers()]:
                first = 0 if tensor in frozen else 1
                torch._dynamo.mark_static(tensor, list(range(first, tensor.dim())))
            module.compile(dynamic=True)

    def _layers(self) -> nn.ModuleList:
        return self.base.get_submodule(f"{self.base.base_model_prefix}.encoder.layer")  # type: ignore[return-value]

    def _first(self, x: Tensor) -> Tensor:
        """Of hidden states (K, N, H) those of the first tokens, (K, B, H)."""
        layout = self.keys.layout
        if layout is None:
            return x
        place_KB = layout.first_KB + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        return x.flatten(0, 1).index_select(0, place_KB.flatten()).view(*place_KB.shape, -1)

    def _as_examples(self, x: Tensor) -> Tensor:
        """First tokens (K, B, H) as examples of one token, (K·B, 1, H)."""
        return x if self.keys.layout is None else x.flatten(0, 1)[:, None]

    @property
    def device(self) -> torch.device:
        return self.base.device

    def adapted(self) -> Iterator[tuple[str, AdaptedLinear]]:
        """The adapted layers by name."""
        return ((n, m) for n, m in self.base.named_modules() if isinstance(m, AdaptedLinear))

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, each (K, ...)."""
        return {n: p for n, p in self.base.named_parameters() if p.requires_grad}

    def own_learning_rates(self) -> dict[str, Tensor]:
        """The learning rates (K,) that methods set themselves, by parameter name."""
        return {
            f"{layer}.method.{name}": lr
            for layer, module in self.adapted()
            for name, lr in module.method.learning_rates().items()
        }

    def count(self) -> dict[str, int]:
        """Number of values: trained in one trial's adapters, in its head, and frozen in the encoder."""
        per_trial = {n: p[0].numel() for n, p in self.trained().items()}
        head = sum(c for n, c in per_trial.items() if n.split(".")[0] in HEADS)
        encoder = sum(p.numel() for n, p in self.frozen())
        return {"adapter": sum(per_trial.values()) - head, "head": head, "encoder": encoder}

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The encoder's own parameters by name."""
        return ((n, p) for n, p in self.base.named_parameters() if not p.requires_grad and ".method." not in n)

    def checksum(self) -> Tensor:
        """A checksum of the frozen weights' bits, int64, left on the device."""
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        return torch.stack([p.view(integers[p.element_size()]).sum() for _, p in self.frozen()]).sum()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor):
        """Transformers' output for inputs (K·B, T); its `logits` are (K·B, labels)."""
        self.keys.layout = None
        return self.base(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    def logits(self, batch: Batch) -> Tensor:
        """Logits (K, B, labels) of a batch, packed where `packs`. For dropout its `keys` must be set."""
        if self.packs:
            self.keys.layout = batch.layout
            position_KN = batch.layout.position_KN + getattr(self.base.base_model.embeddings, "padding_idx", -1) + 1
            logits = self.base(**batch.inputs, position_ids=position_KN).logits
        else:
            logits = self(**batch.inputs).logits
        return logits.to(self.dtype).view(*batch.labels_KB.shape, self.base.config.num_labels)

    @torch.no_grad()
    def distances(self) -> dict[str, Tensor]:
        """‖W′ − W‖_F of each trial (K,), by adapted layer."""
        return {name: module.delta().flatten(1).norm(dim=1) for name, module in self.adapted()}

    @torch.no_grad()
    def strengths(self) -> dict[str, Tensor]:
        """λ of each trial (K,), by adapted layer; empty for methods without one."""
        pairs = ((name, module.method.strength()) for name, module in self.adapted())
        return {name: value for name, value in pairs if value is not None}

    def _trial_tensors(self) -> dict[str, Tensor]:
        keep = [*self.head_names, *(f"{name}.method" for name, _ in self.adapted())]
        state = self.base.state_dict()
        return {n: t for n, t in state.items() if any(n.startswith(f"{k}.") for k in keep)}

    def trial_state(self, trial: int) -> dict[str, Tensor]:
        """Adapters and head of one trial, by name, on the CPU."""
        return {n: t[trial].detach().to("cpu", copy=True) for n, t in self._trial_tensors().items()}

    @torch.no_grad()
    def load_trial_state(self, trial: int, state: Mapping[str, Tensor]) -> None:
        """Puts back what `trial_state` gave.

        Raises:
            UserError: the names or shapes are not those of this fleet.
        """
        own = self._trial_tensors()
        if own.keys() != state.keys() or any(own[n][trial].shape != t.shape for n, t in state.items()):
            odd = sorted(own.keys() ^ state.keys()) or [n for n, t in state.items() if own[n][trial].shape != t.shape]
            raise UserError(f"the adapter does not fit this model and method: {', '.join(odd[:4])}")
        for name, tensor in state.items():
            own[name][trial] = tensor

    def merge(self, trial: int = 0) -> transformers.PreTrainedModel:
        """A plain transformers model with one trial's adapters merged into the weights, for `save_pretrained`."""
        base = copy.deepcopy(self.base).to(self.dtype)  # type: ignore[call-arg]
        for name, module in list(base.named_modules()):
            if isinstance(module, AdaptedLinear):
                weight: Tensor = module.weight + module.delta()[trial]
                bias: Tensor | None = module.bias
            elif isinstance(module, HeadLinear):
                weight, bias = module.weight[trial], None if module.bias is None else module.bias[trial]
            elif isinstance(module, Dropout):
                if not name.endswith(".dropout") or not isinstance(base.get_submodule(name[:-8]), AdaptedLinear):
                    _replace(base, name, nn.Dropout(module.p))
                continue
            else:
                continue
            _replace(base, name, _plain_linear(weight, bias))
        base.set_attn_implementation("sdpa")
        return base.eval()


def method_options(trials: Sequence[Trial], dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """The options of a fleet's method; those that may differ between trials as tensors (K,)."""
    options = [trial.method.options() for trial in trials]
    for trial, own in zip(trials, options, strict=True):
        if "lambda_lr" in own:
            own["lambda_lr"] = trial.lambda_rate
    return {
        name: torch.tensor([own[name] for own in options], dtype=dtype, device=device)
        if f"method.{name}" in PER_TRIAL
        else value
        for name, value in options[0].items()
    }


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def _plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Scaled dot-product attention over (K·B, heads, T, D) whose dropout is hashed, for transformers' interface.

    Of packed batches (K, heads, N, D), within each example.
    """
    keys, scaling = module.dropout.keys, query.shape[-1] ** -0.5 if scaling is None else scaling
    if keys.layout is not None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return packed_attention(q, k, v, keys.layout, scaling, module.dropout if dropout else None), None
    if dropout == 0:
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return y.transpose(1, 2), None
    weights = query @ key.mT * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    key_KBT = keys.key_KN.view(len(keys.key_KN), -1, query.shape[2])
    weights = module.dropout.of_weights(weights.softmax(-1), key_KBT)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
