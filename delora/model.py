"""The frozen encoder, with a method on its target layers and a head for each of K trials.

The encoder's own code is unchanged but for what its family's file in `delora.encoders` replaces. Its inputs are
(K·B, T), trial after trial, or where it can be (K, N): the examples of a trial one after the other, without padding.
Shapes as in `delora.methods.base`, `delora.data.batches`.
"""

import copy
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx.experimental import _config as symbols

from delora import attention, encoders, storage
from delora.config import PER_TRIAL, Trial
from delora.data.batches import Batch, Layout, Tokens
from delora.encoders.base import first_tokens
from delora.errors import UserError
from delora.layers import (
    COPIED,
    AdaptedHidden,
    AdaptedLinear,
    Copied,
    CopiedNorm,
    HeadLinear,
    HeadNorm,
    Joined,
    edit_then_forward,
    forward_then_edit,
)
from delora.methods.base import CopyMethod, HiddenMethod, LinearMethod, Method, find
from delora.predict import Predictions, predict
from delora.randomness import Draw, Dropout, TokenKeys

# Of what is trained and summed up, and of the frozen encoder and its activations.
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
ENCODER_DTYPES = {**DTYPES, "bfloat16": torch.bfloat16}


class Fleet(nn.Module):
    """K trials over one frozen encoder.

    Args:
        base: a transformers model for sequence classification; it is changed in place.
        trials: K configs that agree in everything but seed, rates and strengths.
        device: where it runs.
        lacking: parameters of `base` that its checkpoint does not have: outside the encoder's layers they are the
            head's, beside what its family says.

    Attributes:
        encoder: what is known of the family of `base`.
        packs: whether it takes batches whose examples are packed.
        recorded: whether its steps of training are recorded as CUDA graphs.
        alone: whether it is of one trial, whose steps can be neither recorded nor compiled.
        tokenizer, origin, stored: of a loaded one, the encoder's tokenizer, where its weights are from, and the trial.

    Raises:
        UserError: no layer matches the targets, an option does not fit a layer, or the model has no head to train.
    """

    def __init__(
        self,
        base: transformers.PreTrainedModel,
        trials: Sequence[Trial],
        device: torch.device,
        lacking: Collection[str] = (),
    ):
        super().__init__()
        self.trials, self.precision = trials, trials[0].precision
        self.tokenizer: transformers.PreTrainedTokenizerBase | None = None
        self.origin: storage.Origin | None = None
        self.stored: storage.StoredTrial | None = None
        self.dtype = dtype = DTYPES[self.precision]
        self.encoder = encoders.of(base.config.to_dict()) or encoders.unknown
        self.known = self.encoder is not encoders.unknown
        self.base = base.to(device=device, dtype=dtype).requires_grad_(False)  # type: ignore[call-arg]
        self._inputs = inspect.signature(base.forward).parameters.keys()
        seeds = [trial.seed for trial in trials]
        self.keys = TokenKeys(seeds, device)
        self._prepare()
        self._train_head(seeds, dtype, device, lacking)
        for name, module in list(base.named_modules(remove_duplicate=False)):
            if type(module) is nn.Dropout:
                _replace(base, name, Dropout(self.keys, name, [module.p] * len(seeds)))
        self._adapt(seeds, dtype, device)
        for _, parameter in self.frozen():
            parameter.data = parameter.to(ENCODER_DTYPES[self.precision])
        self.packs = self.encoder.packs
        # Whether of packed rows the last layer lets only first tokens through what follows its attention.
        self.prunes = self.packs and bool(self.encoder.after_attention) and not self.encoder.pools_mean(base.config)
        self.alone = find(trials[0].method.target).alone
        self.recorded = self.known and device.type == "cuda" and not self.alone
        if self.packs:
            self._read_examples()

    def _prepare(self) -> None:
        """Makes of transformers' model what the rest works with."""
        base, config = self.base, self.base.config
        config.return_dict, config.use_cache = True, False
        base.set_attn_implementation(attention.NAME if self.known else attention.OF_UNKNOWN)
        if self.known:  # masks are made by this name also where transformers takes no other attention
            config._attn_implementation = attention.NAME
        for module in base.modules():
            if hasattr(module, "chunk_size_feed_forward"):
                module.chunk_size_feed_forward = 0  # parts along tokens, which packed rows have not in common
        if not self.known:
            return
        for _, layer in self.encoder.find_layers(base):
            for name, parts in self.encoder.fused.items():
                _replace(layer, name, Joined(layer.get_submodule(name), parts))  # type: ignore[arg-type]
        self.encoder.prepare(base, self.keys)
        for module in base.modules():
            for name, function in self.encoder.replaced.items():
                of, _, method = name.partition(".")
                if type(module).__name__ == of:
                    setattr(module, method, types.MethodType(function, module))

    def _read_examples(self) -> None:
        """Of a packed batch, lets only first tokens through what follows the last attention, where the head reads these
        alone; and gives the head examples of one token."""
        encoder, last = self.encoder, self.encoder.find_layers(self.base)[-1][1]
        mean = encoder.pools_mean(self.base.config)
        if self.prunes:
            if encoder.cut:
                cut = last.get_submodule(encoder.cut)
                cut.register_forward_pre_hook(lambda _, args: tuple(first_tokens(x, self.keys) for x in args))
            after = [last.get_submodule(name) for name in encoder.after_attention]
            after += [last.get_submodule("adapter")] if hasattr(last, "adapter") else []
            for module in itertools.chain.from_iterable(part.modules() for part in after):
                if isinstance(module, Dropout):
                    module.of_first = True
                elif isinstance(module, AdaptedHidden):
                    module.pruned = True

        def as_examples(_: nn.Module, __: Any, output: Any) -> Any:
            layout = self.keys.layout
            if layout is None:
                return output
            x = output if isinstance(output, Tensor) else output.last_hidden_state
            x = means(x, layout) if mean else x if self.prunes else first_tokens(x, self.keys)
            x = x.flatten(0, 1)[:, None]
            if isinstance(output, Tensor):
                return x
            output.last_hidden_state = x
            return output

        self.base.base_model.get_submodule(encoder.output).register_forward_hook(as_examples)

    def _train_head(
        self, seeds: Sequence[int], dtype: torch.dtype, device: torch.device, lacking: Collection[str]
    ) -> None:
        names = [
            name
            for name, module in self.base.named_modules()
            if isinstance(module, nn.Linear | nn.LayerNorm)
            and (name.split(".")[0] in self.encoder.head or f"{name}.weight" in lacking)
        ]
        if not any(isinstance(self.base.get_submodule(name), nn.Linear) for name in names):
            raise UserError(
                f"{type(self.base).__name__} has no classification head: no linear layer under "
                f"{' or '.join(self.encoder.head)}"
            )
        std = getattr(self.base.config, "initializer_range", 0.02)
        for name in names:
            module = self.base.get_submodule(name)
            if isinstance(module, nn.Linear):
                _replace(self.base, name, HeadLinear(module, Draw(seeds, name, dtype, device), std))
            else:
                _replace(self.base, name, HeadNorm(module, len(seeds)))  # type: ignore[arg-type]
        self.head_names = names

    def _adapt(self, seeds: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        config = self.trials[0].method
        method, options = find(config.target), method_options(self.trials, dtype, device)
        if method.alone and len(self.trials) > 1:
            raise UserError(f"method={config.name} trains one trial at a time, not {len(self.trials)} together")
        places = self._places(method)
        targeted = self._targeted(places)
        linears = [m for name, m in places.items() if name in targeted and isinstance(m, nn.Linear)]
        options |= method.share(linears, Draw(seeds, "method", dtype, device), **options)
        rates = [trial.method.dropout for trial in self.trials]
        for name in filter(targeted.__contains__, places):
            module, draw = places[name], Draw(seeds, name, dtype, device)
            own = {"role": self.encoder.role_of(name)} if "role" in method.given else {}
            if issubclass(method, HiddenMethod):
                of: Any = self.base.config.hidden_size
            elif issubclass(method, CopyMethod):  # they begin as what is frozen, rounded as that is
                kept = {n: p for n in method.copied if (p := module._parameters.get(n)) is not None}
                of = {n: p.to(ENCODER_DTYPES[self.precision]) for n, p in kept.items()}
            else:
                of = module.weight
            try:
                adapter = method(of, draw, **options, **own).to(device)
            except (ValueError, TypeError) as error:  # an option that the method does not take, or not so
                raise UserError(f"method {config.name} on layer {name}: {error}") from error
            dropout = Dropout(self.keys, f"{name}.method", rates)
            if isinstance(adapter, HiddenMethod):
                self._edit(module, AdaptedHidden(adapter, dropout), name)
            elif isinstance(adapter, CopyMethod):
                _replace(self.base, name, COPIED[type(module)](module, adapter, dropout))
            elif isinstance(adapter, LinearMethod):
                _replace(self.base, name, AdaptedLinear(module, adapter, dropout))

    def _places(self, method: type[Method]) -> dict[str, Any]:
        """Where a method of this kind can sit: modules by the names that targets are compared with."""
        modules = {n: m for n, m in self.base.named_modules() if n not in self.head_names}
        if issubclass(method, HiddenMethod):
            found = self.encoder.hidden_places(name for name, _ in self.encoder.find_layers(self.base))
            return {name: modules[of] for name, of in found.items()}
        if issubclass(method, CopyMethod):
            return {
                name: module
                for name, module in modules.items()
                if type(module) in COPIED
                and any(module._parameters.get(n) is not None for n in method.copied)
                and not name.endswith(self.encoder.stays)
            }
        return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}

    def _targeted(self, places: Collection[str]) -> set[str]:
        """The places that the targets mean. Raises UserError where one of them means none."""
        targeted: set[str] = set()
        for target in self.trials[0].method.targets:
            found = self.encoder.matching(target, places)
            if not found:
                ends = {name.rpartition(".")[2] for name in places}
                roles = [role for role in self.encoder.roles if self.encoder.matching(role, places)]
                known = ", ".join(dict.fromkeys([*roles, *sorted(ends)])) or "none"
                raise UserError(
                    f"method.targets={target}: method={self.trials[0].method.name} can sit at no such place of the "
                    f"encoder (it has: {known})"
                )
            targeted |= {*found}
        return targeted

    def _edit(self, module: nn.Module, adapter: AdaptedHidden, name: str) -> None:
        if hasattr(module, "adapter"):
            raise UserError(f"method.targets: {name} is the same place of this encoder as another of them")
        module.add_module("adapter", adapter)
        before = isinstance(module, nn.LayerNorm)
        module.forward = types.MethodType(edit_then_forward if before else forward_then_edit, module)

    def compile_layers(self) -> None:
        """Has embeddings and layers compiled when they are first used, once for all that are alike and any K > 1.

        A last layer that lets only first tokens through is left as it is: it is unlike the others, and little of it is
        left.
        """
        config = torch._dynamo.config
        config.recompile_limit = 64  # methods in one process
        config.force_parameter_static_shapes = config.force_nn_module_property_static_shapes = False
        config.specialize_float = True  # scalings and epsilons are constants; as symbols they are traced twice
        symbols.use_duck_shape = False  # K may be the rank
        # With autocast in it a graph is compiled anew in each process, unless it is said that its arguments tell all.
        cacheable = torch._inductor.config.unsafe_marked_cacheable_functions
        cacheable.update({f"torch.amp.autocast_mode.{name}": "" for name in ("_enter_autocast", "_exit_autocast")})
        frozen = {parameter for _, parameter in self.frozen()}
        layers = [layer for _, layer in self.encoder.find_layers(self.base)]
        embeddings = self.base.base_model.get_submodule(self.encoder.embeddings)
        for module in [embeddings, *(layers[:-1] if self.prunes else layers)]:
            for tensor in [*module.parameters(), *module.buffers()]:
                first = 0 if tensor in frozen else 1
                torch._dynamo.mark_static(tensor, list(range(first, tensor.dim())))
            module.compile(dynamic=True)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def adapted(self) -> Iterator[tuple[str, Any]]:
        """The modules with a method, by name."""
        kinds = (AdaptedLinear, AdaptedHidden, *COPIED.values())
        return ((n, m) for n, m in self.base.named_modules() if isinstance(m, kinds))

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, each (K, ...)."""
        return {n: p for n, p in self.base.named_parameters() if p.requires_grad}

    def own_learning_rates(self) -> dict[str, Tensor]:
        """The learning rates (K,) that methods set themselves, by parameter name; one tensor where they are one."""
        rate_K = torch.tensor([trial.rate for trial in self.trials], dtype=self.dtype, device=self.device)
        multiple = functools.cache(lambda factor_K: rate_K * factor_K)
        found: dict[str, Tensor] = {}
        for layer, module in self.adapted():
            factors = module.method.rate_factors().items()
            own = {**module.method.learning_rates(), **{name: multiple(factor_K) for name, factor_K in factors}}
            found |= {f"{layer}.method.{name}": lr_K for name, lr_K in own.items()}
        return found

    def count(self) -> dict[str, int]:
        """Number of values: trained in one trial's adapters, in its head, and frozen in the encoder."""
        per_trial = {n: p[0].numel() for n, p in self.trained().items()}
        head = sum(c for n, c in per_trial.items() if n.rpartition(".")[0] in self.head_names)
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
        if len(self.trials) > 1 and self.known:  # transformers would take one row for all trials
            first = self.encoder.first_position(self.base.config.to_dict())
            place_T = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
            inputs = {"position_ids": place_T.expand_as(input_ids), **inputs}
        return self.base(input_ids=input_ids, attention_mask=attention_mask, **self._taken(inputs))

    def _taken(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a tokenizer's inputs that the model takes: not all have types of tokens."""
        return {name: tensor for name, tensor in inputs.items() if name in self._inputs}

    def logits(self, batch: Batch) -> Tensor:
        """Logits (K, B, labels) of a batch, packed where `packs`. For dropout its `keys` must be set."""
        if self.packs:
            self.keys.layout = batch.layout
            first = self.encoder.first_position(self.base.config.to_dict())
            logits = self.base(**self._taken(batch.inputs), position_ids=batch.layout.position_KN + first).logits
        else:
            logits = self(**batch.inputs).logits
        return logits.to(self.dtype).view(*batch.labels_KB.shape, self.base.config.num_labels)

    def predict(self, texts: Sequence[str] | Sequence[tuple[str, ...]], batch_size: int = 32) -> Predictions:
        """Labels and probabilities, or scores, of texts, or of pairs of them where the task has two; the mean of its
        trials'. Without dropout and gradients, short texts first; what is longer than `max_length` tokens is cut.

        Raises:
            UserError: `texts` are not texts, or not as many a row as the task's; it has no tokenizer, which those of
                `delora.load` have.
        """
        return predict(self, texts, batch_size)

    def undecayed(self) -> set[str]:
        """The trained parameters that weight decay spares, as everywhere: biases and LayerNorms."""
        norms = {n for n, m in self.base.named_modules() if isinstance(m, HeadNorm | CopiedNorm)}
        owners = {name: name.rpartition(".")[0].removesuffix(".method") for name in self.trained()}
        return {name for name, owner in owners.items() if owner in norms or name.endswith("bias")}

    @torch.no_grad()
    def distances(self) -> dict[str, Tensor]:
        """‖W′ − W‖_F of each trial (K,), by adapted layer; of copies, of all that is copied there. Empty for methods
        without ΔW."""
        found = {}
        for name, module in self.adapted():
            if isinstance(module, AdaptedLinear):
                found[name] = module.delta().flatten(1).norm(dim=1)
            elif isinstance(module, Copied):
                found[name] = torch.cat([change.flatten(1) for _, change in self._changes(module)], 1).norm(dim=1)
        return found

    def _changes(self, module: Copied) -> Iterator[tuple[str, Tensor]]:
        """What the copies of a module's parameters differ by from the frozen ones, (K, ...)."""
        for name in module.method.copied:
            frozen = getattr(module, name, None)
            change = None if frozen is None else module.method.change(name, frozen.to(self.dtype))
            if change is not None:
                yield name, change

    @torch.no_grad()
    def output_changes(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """‖h′ − h‖ / ‖h‖ of each trial (K,), over all tokens, by layer of the encoder, and turn where it has several.

        h are the hidden states that the frozen encoder gives behind the layer, h′ those with what was trained. The
        batches are padded.
        """
        sums: dict[str, Tensor] = {}
        for batch in batches:
            real_KN1 = batch.inputs["attention_mask"].view(len(self.trials), -1, 1)
            behind: list[dict[str, Tensor]] = []
            for off in (True, False):
                for _, module in self.adapted():
                    module.off = off
                behind.append(self._behind_layers(batch))
            for name, h in behind[0].items():
                kept = [x.view(len(self.trials), -1, x.shape[-1]).to(self.dtype) for x in (h, behind[1][name])]
                parts = [(x * real_KN1).square().sum((1, 2)) for x in (kept[1] - kept[0], kept[0])]
                sums[name] = sums.get(name, 0) + torch.stack(parts)
        return {name: (sum_2K[0] / sum_2K[1]).sqrt() for name, sum_2K in sums.items()}

    def _behind_layers(self, batch: Batch) -> dict[str, Tensor]:
        """The hidden states (K·B, T, H) that each layer gives, by its name and turn."""
        found: dict[str, list[Tensor]] = {name: [] for name, _ in self.encoder.find_layers(self.base)}

        def keep(name: str, output: Any) -> None:
            found[name].append(output[0] if isinstance(output, tuple) else output)

        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            for name, layer in self.encoder.find_layers(self.base)
        ]
        try:
            self(**batch.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            name if len(turns) == 1 else f"{name}.{turn}": h
            for name, turns in found.items()
            for turn, h in enumerate(turns)
        }

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

    @torch.no_grad()
    def begin_with(self, state: Mapping[str, Tensor], head: bool) -> None:
        """Has all trials begin with the adapter of a state as `trial_state` gives it, and with its head where that is
        asked for.

        Raises:
            UserError: the names or shapes are not those of this fleet.
        """
        own = self._trial_tensors()
        of_head = {name for name in own if name.rpartition(".")[0] in self.head_names}
        state = {n: t for n, t in state.items() if n.rpartition(".")[0] not in self.head_names or head}
        for trial in range(len(self.trials)):
            rest = {} if head else {name: own[name][trial] for name in of_head}
            self.load_trial_state(trial, {**rest, **state})

    def merge(self, trial: int = 0) -> transformers.PreTrainedModel:
        """A plain transformers model with one trial's adapters merged into the weights, for `save_pretrained`.

        Raises:
            UserError: the method has no ΔW, or changes the bias of a layer that has none.
        """
        kind = self.trials[trial].method.name
        state = {name: tensor for name, tensor in self.base.state_dict().items() if ".method." not in name}
        for name in state:
            if name.rpartition(".")[0] in self.head_names:
                state[name] = state[name][trial]
        for name, module in self.adapted():
            if isinstance(module, AdaptedHidden):
                raise UserError(f"method {kind} cannot be merged: it edits hidden states, and changes no weights")
            if isinstance(module, Copied):
                state |= {f"{name}.{n}": getattr(module, n) + change[trial] for n, change in self._changes(module)}
                continue
            state[f"{name}.weight"] = module.weight + module.delta()[trial]
            if (change_KO := module.bias_delta()) is None:
                continue
            if module.bias is None:
                raise UserError(f"method {kind} cannot be merged: {name} of {type(self.base).__name__} has no bias")
            state[f"{name}.bias"] = module.bias + change_KO[trial]
        for name, module in self.base.named_modules():
            if isinstance(module, Joined):
                for kind in ("weight", "bias"):
                    parts = [state.pop(f"{name}.{part}.{kind}", None) for part, _ in module.named_children()]
                    state |= {} if parts[0] is None else {f"{name}.{kind}": torch.cat(parts)}
        config = copy.deepcopy(self.base.config)
        config._attn_implementation = None
        with torch.random.fork_rng(devices=[]):
            plain = type(self.base)(config)
        plain.to(device=self.device, dtype=self.dtype).load_state_dict(state)  # type: ignore[call-arg]
        return plain.eval()

    def save(self, folder: str | Path, format: str = "transformers") -> Path:
        """Saves a loaded trial for those who have no delora, as `delora.export.saving.save`; returns the folder."""
        from delora.export.saving import save

        return save(self, Path(folder), format)


def check_unknown(
    load: Callable[[], tuple[transformers.PreTrainedModel, Collection[str]]], tokens: Tokens, trial: Trial
) -> None:
    """Whether an encoder of a family that is not known trains as if alone, found out with a batch of a fleet of two.

    Args:
        load: gives the model anew, and what its checkpoint lacks.
        tokens: a few examples of several lengths, on the CPU.

    Raises:
        UserError: it does not, or cannot be computed; the message names the cause.
    """
    trials = [trial.model_copy(update={"seed": seed, "precision": "float32"}) for seed in (0, 1)]
    every_B = torch.arange(len(tokens))

    def compute(some: Sequence[Trial]) -> list[list[Tensor]]:
        """Of each trial: logits with dropout, their gradients, and logits without dropout and of the merged model."""
        model, lacking = load()
        fleet = Fleet(model, some, torch.device("cpu"), lacking).train()
        batch = tokens.gather(every_B.expand(len(some), -1), packed=False)
        fleet.keys.set(batch.layout, torch.tensor(1), 0)
        logits = fleet.logits(batch)
        logits.square().sum().backward()
        fleet.eval()
        with torch.no_grad():
            plain = fleet.logits(batch)
            alone = tokens.gather(every_B[None], packed=False).inputs
            merged = [fleet.merge(k)(**fleet._taken(alone)).logits for k in range(len(some))]
        gradients = [p.grad for p in fleet.trained().values() if p.grad is not None]
        return [[logits[k], plain[k], merged[k], *(g[k] for g in gradients)] for k in range(len(some))]

    try:
        together, alone = compute(trials), [compute([one])[0] for one in trials]
        for ours, theirs in zip(together, alone, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                if (one - other).abs().max() > 1e-4 * other.abs().max():
                    raise ValueError("a trial in a fleet is not the trial alone")
            if (ours[1] - ours[2]).abs().max() > 1e-4 * ours[2].abs().max():
                raise ValueError("its logits are not those of transformers")
    except UserError:
        raise
    except Exception as error:
        known = ", ".join(kind for encoder in encoders.families().values() for kind in encoder.types)
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model={trial.model.name}: an encoder of another family than {known}, which cannot be trained padded "
            f"either: {cause}"
        ) from error


def means(x_KNH: Tensor, layout: Layout) -> Tensor:
    """The mean hidden state of each example of packed rows, (K, B, H)."""
    example_B1 = torch.arange(layout.first_KB.shape[1], device=x_KNH.device)[:, None]
    real_KN = torch.arange(x_KNH.shape[1], device=x_KNH.device) < layout.length_KB.sum(1, keepdim=True)
    mine_KBN = (layout.example_KN[:, None] == example_B1) & real_KN[:, None]
    return mine_KBN.to(x_KNH.dtype) @ x_KNH / layout.length_KB[..., None]


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
