"""What must hold for every family in delora/encoders, found by globbing, over small checkpoints saved and loaded."""

import functools
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import METHODS, compose_trials
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from delora import encoders, pretrained, run, train
from delora.attention import NAME
from delora.data import Rows
from delora.data.batches import Tokens
from delora.errors import UserError
from delora.methods.base import HiddenMethod
from delora.model import Fleet
from delora.pretrained import byte_tokenizer
from delora.randomness import Dropout
from delora.tasks import TASKS

CPU = torch.device("cpu")
KINDS = [encoder.types[0] for encoder in encoders.families().values()]
TINY_DATA = ["data=synthetic", "data.rows.train=40", "data.rows.validation=8", "max_length=48", "device=cpu"]
SIZES = {"layers": 2, "width": 32, "ffn": 48, "heads": 4, "positions": 130}
# What makes a small checkpoint of a family have all that the family is known for.
OWN = {
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def small_config(kind: str, **changes: object) -> transformers.PreTrainedConfig:
    """A small config of this model type, every dropout above 0."""
    keys = encoders.of({"model_type": kind}).keys
    sizes = {keys[name]: size for name, size in SIZES.items()}
    own = {"vocab_size": 261, "pad_token_id": 1, **sizes, **OWN.get(kind, {}), **changes}
    config = transformers.AutoConfig.for_model(kind, **own)
    for name in list(vars(config)):
        if "dropout" in name and isinstance(getattr(config, name), float | int):
            setattr(config, name, 0.1)
    return config


def save(folder: Path, config: transformers.PreTrainedConfig, of=transformers.AutoModel) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = of.from_config(config)
        for parameter in model.parameters():  # transformers starts biases at 0 and relative biases near it
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A small checkpoint of each model type, without a classification head."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save(tmp_path_factory.mktemp(kind), small_config(kind))
        return made[kind]

    return get


def trials_of(folder: Path, seeds, *words: str):
    common = ["model=roberta_base", f"model.source={folder}", "model.shape=null", "precision=float64", "max_length=40"]
    common += ["batch_size=8", "epochs=6", "log_every=1", "lr=5e-3", *words]
    values = [{"seed": seed, "lr_factor": 1.0 + seed % 3} for seed in seeds]
    return compose_trials(common, values)


def fleet_of(trials) -> tuple[Fleet, pretrained.Pretrained]:
    loaded = pretrained.load(trials[0].model, TASKS["mrpc"])
    return Fleet(loaded.model, trials, CPU, loaded.lacking), loaded


@functools.cache
def rows_of(count: int) -> Rows:
    """Pairs of words of many lengths, of a token a letter; a few are cut."""
    draw = random.Random(count)
    words = [tuple("".join(draw.choices("abcdef", k=draw.randint(1, 20))) for _ in range(2)) for _ in range(count)]
    return Rows(words, np.array([draw.randrange(2) for _ in words]))


def tokens_of(fleet: Fleet, loaded) -> dict[str, Tokens]:
    splits = {"train": rows_of(40), "validation": rows_of(8)}
    return {name: Tokens(rows, loaded.tokenizer, 40, CPU, fleet.dtype) for name, rows in splits.items()}


def own_model(folder: Path, fleet: Fleet, trial: int = 0) -> transformers.PreTrainedModel:
    """Transformers' own model with the head of a trial."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float64)
    state = fleet.base.state_dict()
    head = {n: t[trial] for n, t in state.items() if n.rpartition(".")[0] in fleet.head_names}
    assert not model.load_state_dict(head, strict=False).unexpected_keys
    return model.eval()


def alone(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of each example without padding, where transformers' windows can leave nothing to see, and NaN."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    pairs = zip(inputs["input_ids"], lengths, strict=True)
    return torch.cat([model(input_ids=ids[None, :length]).logits for ids, length in pairs])


def padded(tokens: Tokens, rows: int = 8) -> dict[str, torch.Tensor]:
    inputs = tokens.gather(torch.arange(rows)[None], packed=False).inputs
    return {name: tensor.long() for name, tensor in inputs.items()}


def test_what_is_known_of_each_family():
    """Targets are the same words in all; what packs and prunes is fast, and would be missed by no other test."""
    found = encoders.families()
    kinds = {kind for encoder in found.values() for kind in encoder.types}
    assert kinds == {
        *("albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta"),
        "xlm-roberta",
    }
    roles = {"query", "key", "value", "attention_output", "ffn_in", "ffn_out"}
    assert all(encoder.roles.keys() == roles for encoder in found.values())
    assert [name for name, encoder in found.items() if not encoder.packs] == ["deberta"]
    assert {name for name, e in found.items() if e.after_attention} == {"bert", "electra", "mpnet", "roberta"}
    assert encoders.of({"model_type": "camembert"}) is found["roberta"]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "mpnet", "roberta"])
def test_a_head_is_drawn_anew_where_the_checkpoint_has_one(kind, tmp_path):
    folder = save(tmp_path, small_config(kind), transformers.AutoModelForSequenceClassification)
    fleet, _ = fleet_of(trials_of(folder, [1, 2]))
    assert fleet.packs and fleet.prunes == (kind != "distilbert")
    stored = load_file(folder / "model.safetensors")
    outside = {n.rpartition(".")[0] for n in stored if not n.startswith(f"{fleet.encoder.prefix}.")}
    assert outside and outside <= set(fleet.head_names)
    weights = {name: fleet.base.get_submodule(name).weight for name in outside}
    assert not any(torch.equal(w[0].float(), stored[f"{name}.weight"]) for name, w in weights.items())
    assert not any(torch.equal(w[0], w[1]) for w in weights.values())


def test_deberta_without_relative_attention(tmp_path):
    changes = {"relative_attention": False, "position_biased_input": True}
    folder = save(tmp_path, small_config("deberta-v2", **changes))
    fleet, loaded = fleet_of(trials_of(folder, [1]))
    inputs = padded(tokens_of(fleet, loaded)["train"])
    with torch.no_grad():
        theirs = own_model(folder, fleet)(**inputs).logits
        torch.testing.assert_close(fleet.eval()(**inputs).logits, theirs, rtol=1e-9, atol=1e-9)


class NoNumberFromTheHost(TorchDispatchMode):
    """Refuses what makes a tensor of a number: on a GPU that is a copy from the host, which no recording takes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


@each_kind
def test_a_step_can_be_recorded(kind, checkpoints):
    """Once a batch of its length was computed."""
    fleet, loaded = fleet_of(trials_of(checkpoints(kind), [1, 2]))
    batch = tokens_of(fleet, loaded)["train"].gather(torch.arange(8).view(2, 4), fleet.packs)
    step = torch.tensor(3)
    fleet.train().keys.set(batch.layout, step, 0)
    first = fleet.logits(batch)
    with NoNumberFromTheHost():
        fleet.keys.set(batch.layout, step, 0)
        again = fleet.logits(batch)
        again.sum().backward()
    assert torch.equal(again, first)
    # By this name masks are made, in a recording too; under others some transformers make them of numbers then.
    assert fleet.base.config._attn_implementation == NAME


@each_kind
def test_the_shape_of_a_config_names_the_layers_of_the_model(kind):
    config = small_config(kind)
    encoder = encoders.of(config.to_dict())
    shape = encoder.shape(config.to_dict())
    assert shape.model_dump() == {**SIZES, "family": encoder.family, "positions": shape.positions}
    assert shape.positions == SIZES["positions"] - encoder.first_position(config.to_dict())
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    found = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = [name for name, _ in encoder.find_layers(model)]
    assert layers == encoder.layer_names(shape)
    inside = {name: widths for name, widths in encoder.linears(shape).items() if name.startswith(tuple(layers))}
    for layer, (name, parts) in itertools.product(layers, encoder.fused.items()):
        whole = found.pop(f"{layer}.{name}")
        found |= {f"{layer}.{name}.{part}": (whole[0], whole[1] // len(parts)) for part in parts}
    assert inside == {name: widths for name, widths in found.items() if name in inside}
    others = found.keys() - encoder.linears(shape).keys()
    assert not any(name.endswith(tuple(encoder.roles.values())) for name in others)
    turns = shape.layers / len(layers)
    assert encoder.multiplications(shape) >= sum(i * o for i, o in inside.values()) * turns
    assert {role: len(encoder.matching(role, found)) for role in encoder.roles} == dict.fromkeys(
        encoder.roles, len(layers)
    )


@torch.no_grad()
@each_kind
def test_a_fresh_adapter_gives_the_logits_of_transformers(kind, checkpoints):
    folder = checkpoints(kind)
    fleet, loaded = fleet_of(trials_of(folder, [7], "method=lora"))
    tokens, model = tokens_of(fleet.eval(), loaded)["validation"], own_model(folder, fleet)
    inputs = padded(tokens)
    assert inputs["attention_mask"].min() == 0
    wanted = alone(model, inputs)
    torch.testing.assert_close(fleet(**inputs).logits, wanted, rtol=1e-10, atol=1e-11)
    batch = tokens.gather(torch.arange(8)[None], packed=fleet.packs)
    torch.testing.assert_close(fleet.logits(batch)[0], wanted, rtol=1e-10, atol=1e-11)


class Listener:
    def __init__(self):
        self.losses = []

    def step(self, step, epoch, loss_K, lr_K):
        self.losses.append(loss_K)

    def evaluation(self, trial, evaluation, best): ...

    def diverged(self, trial, step):
        raise AssertionError(f"trial {trial} diverged in step {step}")


def trained(trials, checkpoints=None, fleet=None, loaded=None):
    if fleet is None:
        fleet, loaded = fleet_of(trials)
    tokens = tokens_of(fleet, loaded)
    every_KS = torch.arange(8).expand(len(trials), -1)
    listener = Listener()
    data = train.Data(TASKS["mrpc"], tokens["train"], tokens["validation"], every_KS)
    outcomes, _ = train.train(fleet, data, listener, checkpoints)
    return torch.tensor(listener.losses, dtype=torch.float64), outcomes, fleet


@each_kind
def test_a_trial_in_a_fleet_is_the_trial_alone(kind, checkpoints):
    """30 steps with dropout everywhere."""
    trials = trials_of(checkpoints(kind), range(3), "method=delora", "method.dropout=0.1", "method.targets=[query,key]")
    losses, outcomes, fleet = trained(trials)
    assert losses.shape == (30, 3) and min(m.p for m in fleet.modules() if isinstance(m, Dropout)) > 0
    lone, found, _ = trained([trials[1]])
    torch.testing.assert_close(losses[:, 1:2], lone, rtol=1e-9, atol=0)
    assert outcomes[1].best.epoch == found[0].best.epoch
    for name, tensor in outcomes[1].adapter.items():
        torch.testing.assert_close(tensor, found[0].adapter[name], rtol=1e-7, atol=1e-10)


class Stopped(Exception):
    pass


class StopAt:
    """Checkpoints that end training in one step, and let it go on from there."""

    def __init__(self, step: int):
        self.at, self.stored = step, None

    def restore(self, state):
        if self.stored:
            tensors, plain = self.stored
            state.unpack(tensors, plain)

    def offer(self, state):
        if not self.stored and state.totals.steps == self.at:
            tensors, plain = state.pack()
            self.stored = {name: tensor.clone() for name, tensor in tensors.items()}, plain
            raise Stopped


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "lora") for kind in KINDS), *(("roberta", m) for m in METHODS if m != "lora")]
)
def test_stopped_within_an_epoch_it_goes_on_to_the_bit(kind, method, checkpoints):
    """Every family, and every method, with dropout everywhere."""
    trials = trials_of(checkpoints(kind), range(2), f"method={method}", "method.dropout=0.1", "epochs=2")
    losses, outcomes, _ = trained(trials)
    stop = StopAt(4)
    with pytest.raises(Stopped):
        trained(trials, stop)
    later, found, _ = trained(trials, stop)
    assert torch.equal(later, losses[4:])
    for one, other in zip(outcomes, found, strict=True):
        assert one.best == other.best and one.last == other.last
        assert all(torch.equal(tensor, other.adapter[name]) for name, tensor in one.adapter.items())


@each_kind
@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_what_is_saved_and_transformers_reads(kind, method, checkpoints, tmp_path):
    own = method in ("adapter", "adapter_ffn", "bitfit", "full", "loreft")
    words = [f"method={method}", *([] if own else ["method.targets=[query,value,ffn_out]"]), "epochs=1"]
    words += ["method.block_size=16"] if method == "oft" else []  # divides the width of these encoders
    trials = trials_of(checkpoints(kind), [3, 4], *words)
    if method == "bitfit" and kind == "modernbert":  # which has none
        with pytest.raises(UserError, match=r"targets=layers: method=bitfit can sit at no such place .*it has: none"):
            fleet_of(trials)
        return
    fleet, loaded = fleet_of(trials)
    start = fleet.trial_state(1)
    _, outcomes, _ = trained(trials, fleet=fleet, loaded=loaded)
    if method != "head":
        moved = [
            not torch.equal(tensor, start[name]) for name, tensor in outcomes[1].adapter.items() if ".method." in name
        ]
        assert any(moved) and all(distance[1] > 0 for distance in fleet.distances().values())
    tokens = tokens_of(fleet.eval(), loaded)["validation"]
    inputs = padded(tokens)
    with torch.no_grad():
        ours = fleet(**{name: x.repeat(2, 1) for name, x in inputs.items()}).logits
        batch = tokens.gather(torch.arange(8).expand(2, -1), fleet.packs)
        torch.testing.assert_close(fleet.logits(batch).flatten(0, 1), ours, rtol=1e-9, atol=1e-11)
        again, _ = fleet_of(trials[1:])
        again.eval().load_trial_state(0, outcomes[1].adapter)
        torch.testing.assert_close(again(**inputs).logits, ours[8:], rtol=1e-10, atol=1e-11)
    if not fleet.distances():
        return
    if method == "red" and kind == "modernbert":  # whose layers have no bias to merge a shift into
        with pytest.raises(UserError, match=r"method red cannot be merged: .*\.query of ModernBert.* has no bias"):
            fleet.eval().merge(1)
        return
    fleet.eval().merge(1).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(theirs, inputs), ours[8:], rtol=1e-10, atol=1e-11)


def behind_layers(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What transformers' own layers give, turn after turn, for each example alone."""
    found, layers = [], [m for _, m in encoders.of(model.config.to_dict()).find_layers(model)]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, h: found.append(h[0] if isinstance(h, tuple) else h))
    alone(model, inputs)
    turns = len(found) // len(inputs["input_ids"])
    return [torch.cat(found[turn::turns], 1) for turn in range(turns)]


@torch.no_grad()
@each_kind
def test_how_much_outputs_change_is_what_merged_layers_give(kind, checkpoints):
    fleet, loaded = fleet_of(trials_of(checkpoints(kind), [1, 2], "method=lora", "method.targets=[value,ffn_in]"))
    tokens = tokens_of(fleet.eval(), loaded)["validation"]
    every_KS = torch.arange(8).expand(2, -1)

    def changes() -> torch.Tensor:
        data = train.Data(TASKS["mrpc"], tokens, tokens, every_KS)
        return torch.stack(list(train.output_changes(fleet, data).values()))

    assert torch.equal(changes(), torch.zeros(2, 2, dtype=torch.float64))
    for name, parameter in fleet.trained().items():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * (".B" in name)
    found, inputs = changes(), padded(tokens)
    logits = fleet.eval().logits(tokens.gather(every_KS, fleet.packs))
    frozen = behind_layers(own_model(checkpoints(kind), fleet), inputs)
    for k in range(2):
        merged = fleet.eval().merge(k)
        wanted = [(a - b).norm() / b.norm() for a, b in zip(behind_layers(merged, inputs), frozen, strict=True)]
        torch.testing.assert_close(found[:, k], torch.stack(wanted), rtol=1e-9, atol=0)
    assert torch.equal(fleet.logits(tokens.gather(every_KS, fleet.packs)), logits)  # nothing stays off


class Scaled(HiddenMethod):
    """Multiplies hidden states, and shifts them."""

    def __init__(self, width, draw, *, factor: float, shift: float):
        super().__init__()
        self.factor, self.shift = factor, shift
        self.unused = torch.nn.Parameter(draw.normal("unused", (1,), 1.0))

    def forward(self, h_KNH, dropout, norm):
        return h_KNH * self.factor + self.shift


@torch.no_grad()
@each_kind
def test_places_of_hidden_states_are_where_their_names_say(kind, checkpoints):
    def logits(places: str, factor: float = 0.0, shift: float = 0.0, changed: tuple[str, ...] = ()) -> torch.Tensor:
        """Of an encoder whose hidden states are scaled at all these places, and some of its linear layers changed."""
        words = [f"method.targets=[{places}]", f"+method.factor={factor}", f"+method.shift={shift}"]
        words += ["~method.rank", "~method.alpha", "method._target_=test_encoders.Scaled", "method=lora"]
        fleet, loaded = fleet_of(trials_of(checkpoints(kind), [5, 5], *words))
        for role in changed:
            for layer, _ in fleet.encoder.find_layers(fleet.base):
                fleet.base.get_submodule(f"{layer}.{fleet.encoder.roles[role]}").weight.mul_(-1.5)
        tokens = tokens_of(fleet.eval(), loaded)["validation"]
        return fleet.logits(tokens.gather(torch.arange(8).expand(2, -1), fleet.packs))[1]

    blocks = {"attention_sublayer": ("value", "attention_output"), "ffn_sublayer": ("ffn_in", "ffn_out")}
    for place, inside in blocks.items():  # without its output, a block may be any, and the other one may not
        other = next(roles for name, roles in blocks.items() if name != place)
        assert torch.equal(logits(place, changed=inside), logits(place))
        assert not torch.allclose(logits(place, changed=other), logits(place), rtol=1e-3)
    for place in ("ffn_residual", "layer_output"):  # without which nothing of the text is left
        nothing = logits(place)
        torch.testing.assert_close(nothing, nothing[:1].expand_as(nothing), rtol=1e-9, atol=1e-12)
    # A LayerNorm takes a shift of all features away: before it the sum is, and not behind it.
    plain, shifted = logits("ffn_residual", 1.0), logits("ffn_residual", 1.0, 0.5)
    assert torch.allclose(shifted, plain, rtol=1e-6, atol=1e-9)
    assert torch.allclose(logits("layer_output", 1.0, 0.5), plain, rtol=1e-3) == (kind == "modernbert")


# --- Families that are not known


def unknown(folder: Path, kind: str, **own: object) -> list[str]:
    """The words of a small checkpoint of a type without a file in delora/encoders."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=261, pad_token_id=1, **own)
    save(folder, config, transformers.AutoModelForSequenceClassification)
    return ["model=roberta_base", f"model.source={folder}", "model.shape=null", "method=lora"]


@pytest.mark.parametrize("kind", ["ernie", "roformer", "megatron-bert"])
def test_an_unknown_family_that_trains_as_if_alone_is_taken(kind, tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    words = unknown(tmp_path, kind, **sizes, embedding_size=32, max_position_embeddings=64)
    [trial] = compose_trials([*words, *TINY_DATA, "precision=bfloat16"], [{}])  # it is tried out in float32
    run.prepare(trial)
    assert not fleet_of([trial])[0].known


def test_an_unknown_family_that_does_not_is_refused_in_one_line(tmp_path):
    words = unknown(tmp_path, "funnel", block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48)
    [trial] = compose_trials([*words, "method.targets=[q_head]", *TINY_DATA], [{}])
    with pytest.raises(
        UserError, match=r"another family than albert, .*cannot be trained padded either: .+"
    ) as refused:
        run.prepare(trial)
    assert "\n" not in str(refused.value)
