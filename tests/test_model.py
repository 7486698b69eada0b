"""What must hold for every method in conf/method, found by globbing."""

import functools

import pytest
import torch
import transformers
from conftest import METHODS, compose_trial
from torch import nn

from delora import pretrained
from delora.data import load
from delora.data.batches import Tokens
from delora.errors import UserError
from delora.layers import (
    AdaptedHidden,
    AdaptedLinear,
    CopiedEmbedding,
    CopiedLinear,
    CopiedNorm,
    HeadNorm,
    Joined,
)
from delora.model import Fleet
from delora.randomness import Dropout
from delora.tasks import TASKS

ON_HIDDEN = ("adapter", "adapter_ffn", "loreft")  # methods without ΔW
NOT_THE_IDENTITY_AT_FIRST = ("ether", *ON_HIDDEN)  # a reflection never is, random bottlenecks are close
CPU = torch.device("cpu")


def make(*overrides: str, trials: int = 1) -> tuple[Fleet, torch.nn.Module]:
    """A fleet of tiny encoders in float64, and the encoder without adapters."""
    base = ["model=tiny", "precision=float64", *overrides]
    configs = [compose_trial(*base, f"seed={seed}") for seed in range(trials)]
    models = [pretrained.load(configs[0].model, TASKS["mrpc"]).model for _ in range(2)]
    for model in models:
        model.set_attn_implementation("sdpa")
    return Fleet(models[0], configs, CPU).eval(), models[1].double().eval()


def inputs(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 250, (rows, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


@torch.no_grad()
def shake(fleet: Fleet) -> None:
    """Moves the adapters away from their start, each trial elsewhere."""
    generator = torch.Generator().manual_seed(1)
    for parameter in fleet.trained().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_merged_weight_is_what_forward_does(method):
    fleet, _ = make(f"method={method}", trials=2)
    shake(fleet)
    x = inputs(3)
    if method in ON_HIDDEN:
        with pytest.raises(UserError, match=f"method {method} cannot be merged: it edits hidden states"):
            fleet.merge()
        return
    both = fleet(**{name: tensor.repeat(2, 1) for name, tensor in x.items()}).logits.view(2, 3, -1)
    for trial in range(2):
        merged = fleet.merge(trial)(**x).logits
        torch.testing.assert_close(merged, both[trial], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(both[0], both[1])


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_leaves_the_logits_unchanged(method):
    fleet, plain = make(f"method={method}")
    head = {name: tensor[0] for name, tensor in fleet.base.state_dict().items() if name.startswith("classifier")}
    plain.load_state_dict(head, strict=False)
    x = inputs(3)
    same = torch.allclose(fleet(**x).logits, plain(**x).logits, rtol=1e-12, atol=1e-12)
    assert same == (method not in NOT_THE_IDENTITY_AT_FIRST)
    assert all((d == 0).all() == (method != "ether") for d in fleet.distances().values())
    assert (not fleet.distances()) == (method in ON_HIDDEN)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_can_be_left_out_for_a_comparison(method):
    """As the change of hidden states needs it: without adapters and copies, the frozen encoder's logits."""
    fleet, plain = make(f"method={method}", trials=2)
    shake(fleet)
    for _, module in fleet.adapted():
        module.off = True
    x = inputs(3)
    both = fleet(**{name: tensor.repeat(2, 1) for name, tensor in x.items()}).logits.view(2, 3, -1)
    state = fleet.base.state_dict()
    for trial in range(2):
        plain.load_state_dict({n: state[n][trial] for n in state if n.startswith("classifier")}, strict=False)
        torch.testing.assert_close(both[trial], plain(**x).logits, rtol=1e-11, atol=1e-12)


# Of RoBERTa-base's twelve layers, by the DeLoRA paper's Table 4 and the papers that it quotes; of the adapters to 0.1M.
PUBLISHED = {"bitfit": 101_376, "ia3": 55_296, "loreft": 18_444, "red": 18_432, "adapter": 0.4e6, "adapter_ffn": 0.3e6}


@pytest.mark.parametrize("method", PUBLISHED)
def test_as_many_values_are_trained_as_was_published(method):
    sizes = ["width=768", "ffn=3072", "heads=12", "layers=1"]
    fleet, _ = make(f"method={method}", "precision=float32", *(f"model.shape.{size}" for size in sizes))
    count = 12 * fleet.count()["adapter"]
    assert count == PUBLISHED[method] or (
        method.startswith("adapter") and round(count / 1e5) == PUBLISHED[method] / 1e5
    )


def test_full_finetuning_trains_every_weight_of_the_encoder():
    fleet, plain = make("method=full")
    encoder = sum(parameter.numel() for parameter in plain.roberta.parameters())
    assert fleet.count()["adapter"] == fleet.count()["encoder"] == encoder
    norms = {n for n in fleet.trained() if "LayerNorm" in n}
    assert norms and fleet.undecayed() == norms | {n for n in fleet.trained() if n.endswith("bias")}


def test_a_rate_may_be_a_multiple_of_the_trials():
    """LoRA+'s, of B alone; one tensor for all layers, so that the optimizer has one group of them."""
    fleet, _ = make("method=loraplus", "lr=1e-3", "lr_factor=2", "method.rate_ratio=4", trials=2)
    rates = fleet.own_learning_rates()
    assert rates.keys() == {name for name in fleet.trained() if name.endswith(".B")} and len(rates) == 4
    assert len({id(lr_K) for lr_K in rates.values()}) == 1
    torch.testing.assert_close(next(iter(rates.values())), torch.full((2,), 8e-3, dtype=torch.float64))


def test_the_head_is_drawn_afresh_for_each_seed():
    fleet, _ = make("method=lora", trials=3)
    again, _ = make("method=lora", trials=2)
    weight = fleet.get_submodule("base.classifier.dense").weight
    assert not torch.equal(weight[0], weight[1])
    assert torch.equal(weight[:2], again.get_submodule("base.classifier.dense").weight)


def test_the_heads_start_has_the_encoders_own_spread():
    config = transformers.RobertaConfig(
        vocab_size=261, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.initializer_range = 0.5
    base = transformers.RobertaForSequenceClassification(config)
    fleet = Fleet(base, [compose_trial("model=tiny", "method=lora", f"seed={seed}") for seed in range(2)], CPU)
    dense = fleet.get_submodule("base.classifier.dense")
    assert dense.weight.std().item() == pytest.approx(0.5, rel=0.05) and (dense.bias == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_trials_state_is_a_copy_of_what_training_changes_or_drew(method):
    fleet, _ = make(f"method={method}", trials=2)
    shake(fleet)
    state = fleet.trial_state(1)
    drawn = {name for name, _ in fleet.base.named_buffers() if name.endswith((".A0", ".B0", ".base"))}
    assert state.keys() == fleet.trained().keys() | drawn and bool(drawn) == (method in ("delora", "loreft", "pissa"))
    assert all(torch.equal(state[name], parameter[1]) for name, parameter in fleet.trained().items())
    before = {name: tensor.clone() for name, tensor in state.items()}
    shake(fleet)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())

    other, _ = make(f"method={method}", trials=3)
    kept = other.trial_state(1)
    other.load_trial_state(2, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.trial_state(2).items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in other.trial_state(1).items())


def test_a_state_of_another_shape_or_method_is_refused():
    fleet, _ = make("method=lora", "model.shape.layers=1")
    state = fleet.trial_state(0)
    wider = {name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1) for name, tensor in state.items()}
    for odd in (wider, {name: tensor for name, tensor in state.items() if not name.endswith(".A")}):
        with pytest.raises(UserError, match=r"does not fit this model and method: .*\.method\.A"):
            fleet.load_trial_state(0, odd)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fleet.trial_state(0).items())


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_dropout_reaches_the_method(method):
    """Another input after dropout is another output, as the method itself has it; not where nothing is adapted."""
    fleet, _ = make(f"method={method}", "method.dropout=0.5", trials=2)
    shake(fleet)
    layer = next(m for _, m in fleet.adapted() if not isinstance(m, CopiedEmbedding | CopiedNorm))
    fleet.keys.key_KN = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    fleet.keys.first_KB = fleet.keys.key_KN[:, :1]
    width = 32 if isinstance(layer, AdaptedHidden) else layer.weight.shape[1]
    x = torch.randn(2, 3, width, dtype=torch.float64)
    arguments = (lambda h: h,) if isinstance(layer, AdaptedHidden) else ()
    layer.train()
    dropped = layer.dropout(x) if method != "loreft" else None
    assert dropped is None or not torch.equal(dropped, x)
    y = layer(x, *arguments)
    if isinstance(layer, AdaptedLinear):
        assert torch.equal(y, layer.method(x, dropped, layer.weight, layer.bias))
    elif isinstance(layer, CopiedLinear):
        assert torch.equal(y, layer.eval()(dropped))
    elif method == "loreft":
        assert torch.equal(y[:, 1:], x[:, 1:]) and ((y[:, 0] == 0).sum() - width).abs() < 16
    else:
        added = layer.eval()(x, *arguments) - x
        torch.testing.assert_close(y - x, layer.train().dropout(added), rtol=1e-12, atol=1e-12)
    assert torch.equal(y, layer.eval()(x, *arguments)) == (method == "head")


def test_a_trained_norm_is_transformers_own():
    norm = HeadNorm(nn.LayerNorm(6, eps=1e-3), 2).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(8, 5, 6, dtype=torch.float64)
    for k, own in enumerate(x.chunk(2)):
        plain = torch.nn.functional.layer_norm(own, (6,), norm.weight[k], norm.bias[k], 1e-3)
        torch.testing.assert_close(norm(x)[4 * k : 4 * k + 4], plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_layer_taken_apart_is_the_whole_one(bias):
    fused, x = nn.Linear(5, 12, bias=bias), torch.randn(4, 5)
    torch.testing.assert_close(Joined(fused, ["query", "key", "value"])(x), fused(x))


def test_a_model_without_a_head_is_refused():
    trial = compose_trial("model=tiny", "method=lora")
    base = pretrained.load(trial.model, TASKS["mrpc"]).model
    base.classifier = nn.Identity()
    with pytest.raises(UserError, match=r"has no classification head: no linear layer under classifier$"):
        Fleet(base, [trial], CPU)


def test_targets_that_no_layer_has_are_named():
    trial = compose_trial("model=tiny", "method=lora")
    other = trial.model_copy(update={"method": trial.method.model_copy(update={"targets": ["quer"]})})
    base = pretrained.load(trial.model, TASKS["mrpc"]).model
    with pytest.raises(UserError, match=r"method\.targets.*it has: query, key, value, attention_output, .*dense"):
        Fleet(base, [other], CPU)
    with pytest.raises(UserError, match=r"method\.targets"):
        make("method=lora", "method.targets=[attention.quer]", "model.shape.layers=1")


def test_weights_with_another_hash_are_refused():
    trial = compose_trial("model=minilm", f"model.sha256={'0' * 64}")
    with pytest.raises(UserError, match=r"have sha256 53aa51172d14.*, expected 0000"):
        pretrained.load(trial.model, TASKS["mrpc"])


@pytest.mark.parametrize("method", ["delora", "full", "loreft", "adapter_ffn"])  # one of each kind of place
def test_compiled_layers_compute_what_plain_ones_do(method, monkeypatch):
    """The last of three layers lets only first tokens through: it must not run what was compiled for another."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    words = ["model=tiny", "model.shape.layers=4", f"method={method}"]
    configs = [compose_trial(*words, f"seed={seed}") for seed in range(2)]
    found = []
    for compiled in (False, True):
        loaded = pretrained.load(configs[0].model, TASKS["mrpc"])
        fleet = Fleet(loaded.model, configs, CPU).train()
        for module in fleet.modules():
            if isinstance(module, Dropout):
                module.p = 0.0
        if compiled:
            fleet.compile_layers()
        rows = load(TASKS["mrpc"], source="synthetic", rows={"train": 8, "validation": 8}).splits["train"]
        tokens = Tokens(rows, loaded.tokenizer, 48, CPU, fleet.dtype)
        batch = tokens.gather(torch.arange(8).expand(2, -1))
        fleet.keys.set(batch.layout, torch.tensor(3), 0)
        logits = fleet.logits(batch)
        logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad for parameter in fleet.trained().values())])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)
    counted = torch._dynamo.utils.counters  # nothing is left to Python, and layers that are alike are compiled once
    assert not counted["graph_break"] and counted["stats"]["unique_graphs"] <= 3
