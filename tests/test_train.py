"""The loop: the published trajectory, each trial as if alone, divergence, frozen weights."""

import itertools
import json
import math
import time
from functools import cache

import numpy as np
import pytest
import torch
from conftest import METHODS, compose_trial, compose_trials
from safetensors.torch import load_file

from delora import pretrained, train
from delora.data import Rows, load
from delora.data.batches import Tokens, epoch_order
from delora.graphs import Recorded
from delora.model import Fleet
from delora.randomness import Dropout
from delora.tasks import TASKS
from delora.train import make_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOSS, MATRICES, STRENGTH = 2e-6, 2e-5, 5e-6


class Listener:
    """Keeps what the loop reports."""

    def __init__(self):
        self.losses, self.scores, self.ended = [], [], {}

    def step(self, step, epoch, loss_K, lr_K):
        self.losses.append([math.nan if loss is None else loss for loss in loss_K])

    def evaluation(self, trial, evaluation, best):
        self.scores.append((trial, evaluation["epoch"], evaluation["loss"]))

    def diverged(self, trial, step):
        self.ended[trial] = step


def make_fleet(configs, device=CPU) -> tuple[Fleet, pretrained.Pretrained]:
    loaded = pretrained.load(configs[0].model, TASKS["mrpc"])
    return Fleet(loaded.model, configs, device), loaded


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [CPU, pytest.param(CUDA, marks=needs_gpu)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("trials", "precision"), [(1, "float32"), (3, "float32"), (3, "float64")])
def test_published_trajectory(shared, monkeypatch, trials, precision, device):
    golden = load_file(shared / "golden" / "trajectory_delora.safetensors")
    here = trials // 2  # the other trials have their own start
    common = ["model=minilm", f"precision={precision}", "epochs=5", "batch_size=8", "log_every=1", "lr=1e-2"]
    fleet, loaded = make_fleet([compose_trial(*common, f"seed={seed}") for seed in range(trials)], device)
    if device == CUDA and trials == 1:
        fleet.compile_layers()
    for module in fleet.modules():
        if isinstance(module, Dropout):
            module.p = 0.0  # the published run has no dropout

    def name_there(name):
        return name.replace("bert.encoder.layer.", "layer").replace(".attention.self", "").replace(".method", "")

    with torch.no_grad():
        for name, parameter in fleet.trained().items():
            parameter[here] = golden[f"init.{name_there(name)}"]
        for _, module in fleet.adapted():
            module.method.A0[here], module.method.B0[here] = module.method.A[here], module.method.B[here]
    tokens = Tokens(
        Rows([("a", "b")] * 32, golden["labels"].flatten().numpy()), loaded.tokenizer, 32, device, fleet.dtype
    )
    ids = golden["input_ids"].flatten().int().to(device)
    tokens.inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    tokens.lengths_S[:], tokens._length_S[:], tokens.longest = 32, 32, 32
    tokens._first_S[:] = torch.arange(0, 32 * 32, 32)
    in_file_order = torch.arange(32).expand(trials, -1)
    monkeypatch.setattr(train, "epoch_order", lambda seeds, epoch, rows: in_file_order)
    # The fleet ends with its best values; the reference holds the last ones.
    monkeypatch.setattr(train, "_better", lambda new, best, headline: True)
    listener = Listener()
    train.train(fleet, train.Data(TASKS["mrpc"], tokens, tokens, in_file_order[:, :2]), listener)

    suffix, tighter = ("", 1) if precision == "float32" else ("_f64", 1e-6)
    losses = torch.tensor(listener.losses, dtype=torch.float64)[:, here]
    assert ((losses - golden[f"losses{suffix}"]).abs() / golden[f"losses{suffix}"].abs()).max() < LOSS * tighter
    for name, parameter in fleet.trained().items():
        reference = golden[f"final{suffix}.{name_there(name)}"]
        bound = (STRENGTH if name.endswith("lam") else MATRICES) * tighter
        assert (parameter[here].cpu() - reference).abs().max() <= bound * reference.abs().max(), name


def tiny_data(fleet, loaded, max_length=24) -> train.Data:
    dataset = load(TASKS["mrpc"], source="synthetic", rows={"train": 80, "validation": 24})
    tokens = {
        name: Tokens(part, loaded.tokenizer, max_length, fleet.device, fleet.dtype)
        for name, part in dataset.splits.items()
    }
    orders = [torch.randperm(24, generator=torch.Generator().manual_seed(t.seed)) for t in fleet.trials]
    order_KS = torch.stack(orders)
    return train.Data(TASKS["mrpc"], tokens["train"], tokens["validation"], order_KS[:, :12], order_KS[:, 12:])


def train_tiny(configs, listener=None, disturb=lambda fleet: None, device=CPU, max_length=24):
    fleet, loaded = make_fleet(configs, device)
    listener = listener or Listener()
    listener.fleet = fleet
    disturb(fleet)
    outcomes, _ = train.train(fleet, tiny_data(fleet, loaded, max_length), listener)
    return torch.tensor(listener.losses, dtype=torch.float64), outcomes, listener


VARIANTS = {method: [f"method={method}"] for method in METHODS}
VARIANTS["delora-zero"] = ["method=delora", "method.init=zero"]
VARIANTS["dora-fixed"] = ["method=dora", "method.train_magnitude=false"]
each_method = pytest.mark.parametrize("method", VARIANTS)


def eight_trials(method, precision, *more):
    """50 steps each; they differ in all that the trials of a fleet may differ in."""
    common = [*VARIANTS[method], "model=tiny", f"precision={precision}", "batch_size=8", "epochs=5", "max_length=24"]
    common += ["accumulation=2", "clip_norm=1", "log_every=1", *more]
    options, values = compose_trial(*VARIANTS[method]).method.options(), []
    for k in range(8):
        own = {"seed": 40 + k, "lr_factor": 2.0 ** (k - 4), "method.dropout": 0.1 * (k % 4)}
        own |= {"weight_decay": 0.05 * (k % 3), "warmup_ratio": 0.1 * (k % 2)}
        rates = {"lambda_init": 2 + k, "lambda_lr": 1e-3 * (k + 1), "alpha": 8 + k, "rate_ratio": 4 + k}
        values.append(own | {f"method.{name}": rate for name, rate in rates.items() if name in options})
    configs = compose_trials(common, values)
    assert len({config.company for config in configs}) == 1
    return configs


IN_FLOAT32 = ("delora", "delora-zero", "dora", "dora-fixed", "ether", "etherplus", "head", "lora")


@pytest.mark.parametrize(
    ("method", "precision"), [*((m, "float64") for m in VARIANTS), *((m, "float32") for m in IN_FLOAT32)]
)
def test_a_trial_in_a_fleet_is_the_trial_alone(method, precision):
    configs, parts = eight_trials(method, precision), ([1, 4, 7], [0], [6])
    if method not in IN_FLOAT32:  # what these have in common with the others is tried with those
        configs, parts = configs[:5], ([1, 4], [0])
    losses, outcomes, _ = train_tiny(configs)
    assert losses.shape == (50, len(configs))
    for some in parts:
        others, found, _ = train_tiny([configs[k] for k in some])
        relative = ((losses[:, some] - others).abs() / others).max()
        assert relative < (1e-9 if precision == "float64" else 1e-4)
        for k, outcome in zip(some, found, strict=True):
            assert outcome.best.epoch == outcomes[k].best.epoch
            assert outcome.best.test == outcomes[k].best.test
            assert math.isclose(outcome.best.validation["loss"], outcomes[k].best.validation["loss"], rel_tol=1e-4)


class Poison(Listener):
    """In step 10, puts what is not finite into one embedding of a trial's 4th example, or into its optimizer's state.

    `where` gives trial: (place, value).
    """

    def __init__(self, where):
        super().__init__()
        self.where, self.now = where, False

    def step(self, step, epoch, loss_K, lr_K):
        super().step(step, epoch, loss_K, lr_K)
        self.now = step == 10
        for trial, (place, value) in self.where.items():
            if self.now and place == "optimizer":
                self.optimizer.mean[trial, -1] = value

    def make_optimizer(self, fleet, total_steps):
        self.optimizer = make_optimizer(fleet, total_steps)
        return self.optimizer

    def watch(self, fleet):
        def poison(module, inputs, output):
            if not (self.now and module.training):
                return output
            output = output.clone()
            for trial, (place, value) in self.where.items():
                if place == "embedding":
                    output[trial, fleet.keys.layout.first_KB[trial, 3], 0] = value
            return output

        fleet.base.base_model.embeddings.word_embeddings.register_forward_hook(poison)


@cache
def undisturbed(method):
    return train_tiny(eight_trials(method, "float32", "epochs=2"))


def check_disturbed(monkeypatch, method, rates, where):
    configs = eight_trials(method, "float32", "epochs=2")
    for trial, lr in rates.items():
        configs[trial] = configs[trial].model_copy(update={"lr": lr})
    listener = Poison(where)
    monkeypatch.setattr(train, "make_optimizer", listener.make_optimizer)
    losses, after, _ = train_tiny(configs, listener, listener.watch)
    ended = {k: outcome.diverged_step for k, outcome in enumerate(after) if outcome.status == "diverged"}
    assert ended == listener.ended
    assert set(where) <= ended.keys() <= {*where, *rates}  # a normalised method may stay finite at any rate
    assert all(ended[k] in (10, 11) for k in where)
    losses_before, before, _ = undisturbed(method)
    others = [k for k in range(8) if k not in where and k not in rates]
    assert torch.equal(losses[:, others], losses_before[:, others])
    for k in others:
        assert after[k].best == before[k].best and after[k].last == before[k].last
        assert all(torch.equal(tensor, before[k].adapter[name]) for name, tensor in after[k].adapter.items())


CAUSES = [("embedding", math.nan), ("embedding", math.inf), ("optimizer", math.nan), ("optimizer", math.inf)]


@each_method
def test_trials_that_diverge_leave_the_others_unchanged_to_the_bit(method, monkeypatch):
    check_disturbed(monkeypatch, method, {0: 1e30, 5: 1e9}, dict(zip((1, 3, 4, 7), CAUSES, strict=True)))


@pytest.mark.parametrize("cause", [1e30, 1e9, *CAUSES])
def test_a_trial_that_diverges_leaves_the_other_seven_unchanged_to_the_bit(cause, monkeypatch):
    if isinstance(cause, tuple):
        check_disturbed(monkeypatch, "delora", {}, {5: cause})
    else:
        check_disturbed(monkeypatch, "delora", {5: cause}, {})


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@each_method
def test_recorded_steps_compute_what_single_kernels_do(method, precision, monkeypatch):
    """Also where a trial diverges, the last batch is smaller, and the batches have several widths."""
    recorded = []
    record = Recorded._record
    monkeypatch.setattr(Recorded, "_record", lambda self, *kind: recorded.append(kind) or record(self, *kind))
    configs = eight_trials(method, precision, "epochs=4", "batch_size=12", "accumulation=1")
    configs[2] = configs[2].model_copy(update={"lr": 1e30})
    losses, outcomes, _ = train_tiny(configs, device=CUDA, max_length=250)
    shapes = [shape for shape, _ in recorded]
    assert len(set(shapes)) == 2 and len(shapes) > 2
    one_by_one = lambda fleet: setattr(fleet, "recorded", False)  # noqa: E731
    others, found, _ = train_tiny(configs, disturb=one_by_one, device=CUDA, max_length=250)
    torch.testing.assert_close(losses, others, rtol=1e-5 if precision == "float32" else 1e-2, atol=0, equal_nan=True)
    assert [o.diverged_step for o in outcomes] == [o.diverged_step for o in found]


@needs_gpu
def test_a_rank_that_matrix_units_do_not_take_is_recorded_too(caplog, monkeypatch):
    """For such a rank torch's compiler compares the rows' widths, here 224 and 256, with that of the encoder."""
    monkeypatch.setattr(Tokens, "few_widths", lambda *_: [])
    shape = ["model.shape.width=256", "model.shape.heads=8"]
    configs = eight_trials("lora", "bfloat16", "method.rank=3", "batch_size=3", "accumulation=1", *shape)[:2]
    train_tiny(configs, disturb=lambda fleet: fleet.compile_layers(), device=CUDA, max_length=250)
    assert not [record for record in caplog.records if record.name.startswith("delora")]


def test_a_gpus_batches_differ_in_the_tokens_of_a_row_alone(monkeypatch):
    """A graph is recorded for each kind of batch; the longest example of each would make hundreds of kinds."""
    rows = load(TASKS["mrpc"], source="synthetic", rows={"train": 960, "validation": 24}).splits["train"]
    tokens = Tokens(rows, make_fleet(eight_trials("lora", "float32")[:1])[1].tokenizer, 128, CPU, torch.float32)
    orders = [epoch_order([0, 1, 2], epoch, len(tokens)) for epoch in range(4)]
    batches = [index_KB for order in orders for index_KB in order.split(32, dim=1)]
    on_cpu = {tokens.width(index_KB) for index_KB in batches}
    monkeypatch.setattr(Tokens, "on_cpu", False)
    widths = {tokens.width(index_KB) for index_KB in batches}
    assert len({span for _, span in widths}) == 1 and min(widths)[1] >= tokens.longest
    assert all(any(0 <= width - row < 32 for width, _ in widths) for row, _ in on_cpu)
    assert len(widths) <= (max(widths)[0] - min(widths)[0]) // 32 + 1 < len(on_cpu) / 4


class Kept:
    """A checkpoint, as JSON and tensors of its own, of the state at a step; training ends there."""

    class Stop(Exception):
        pass

    def __init__(self, step, scored):
        self.at, self.state = (step, scored), None

    def restore(self, state):
        if self.state:
            state.unpack(self.state[0], json.loads(self.state[1]))

    def offer(self, state):
        if self.state is None and (state.totals.steps, state.scored) == self.at:
            tensors, plain = state.pack()
            self.state = {name: tensor.clone() for name, tensor in tensors.items()}, json.dumps(plain)
            raise Kept.Stop


@pytest.mark.parametrize(("step", "scored"), [(4, 0), (10, 1), (13, 1)])
def test_training_that_goes_on_from_a_checkpoint_is_undisturbed_training_to_the_bit(step, scored):
    configs = eight_trials("delora", "float32", "epochs=2")
    configs = [configs[1], configs[5].model_copy(update={"lr": 1e30}), configs[6]]
    fleet, loaded = make_fleet(configs)
    data, listener, begun = tiny_data(fleet, loaded), Listener(), time.perf_counter()
    whole, totals = train.train(fleet, data, listener)
    assert [outcome.status for outcome in whole] == ["done", "diverged", "done"]
    assert totals.steps == 20 and totals.real_tokens == 3 * 2 * data.train.lengths_S.sum()
    assert totals.real_tokens <= totals.computed_tokens < 1.2 * totals.real_tokens
    assert totals.train_seconds > 0 and totals.evaluate_seconds > 0
    assert totals.train_seconds + totals.evaluate_seconds < time.perf_counter() - begun

    kept, first = Kept(step, scored), Listener()
    with pytest.raises(Kept.Stop):
        train.train(make_fleet(configs)[0], data, first, kept)
    second = Listener()
    after, found = train.train(make_fleet(configs)[0], data, second, kept)
    assert str(first.losses + second.losses) == str(listener.losses)  # among them NaNs, which differ from themselves
    assert first.scores + second.scores == listener.scores and first.ended | second.ended == listener.ended
    assert (found.steps, found.real_tokens, found.computed_tokens) == (20, totals.real_tokens, totals.computed_tokens)
    for one, other in zip(after, whole, strict=True):
        assert (one.status, one.best, one.last) == (other.status, other.best, other.last)
        assert one.diverged_step == other.diverged_step and one.adapter.keys() == other.adapter.keys()
        assert all(torch.equal(tensor, other.adapter[name]) for name, tensor in one.adapter.items())
        assert one.predictions.keys() == other.predictions.keys()
        assert all(torch.equal(logits, other.predictions[name]) for name, logits in one.predictions.items())


def test_accumulation_changes_no_result():
    config = eight_trials("delora", "float64")[1]
    whole, _, _ = train_tiny([config])
    parts, _, _ = train_tiny([config.model_copy(update={"accumulation": 3})])
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=0)


def test_a_frozen_weight_that_changes_ends_the_run(monkeypatch):
    fleet, loaded = make_fleet(eight_trials("lora", "float32")[:1])
    data = tiny_data(fleet, loaded)
    real = train._score_final

    def tamper(*arguments):
        with torch.no_grad():
            next(fleet.frozen())[1][3, 3] += 1e-6
        real(*arguments)

    monkeypatch.setattr(train, "_score_final", tamper)
    with pytest.raises(RuntimeError, match="frozen weight"):
        train.train(fleet, data, Listener())


def test_the_evaluation_before_training_is_never_the_best_one():
    """At a rate of zero all evaluations are equal: the first epoch's is the best."""
    config = eight_trials("delora", "float32")[0]
    still = config.model_copy(update={"lr": 0.0, "method": config.method.model_copy(update={"lambda_lr": 0.0})})
    _, [outcome], listener = train_tiny([still])
    assert [epoch for _, epoch, _ in listener.scores] == [0, 1, 2, 3, 4, 5]
    assert len({loss for *_, loss in listener.scores}) == 1
    assert (outcome.best.epoch, outcome.best.step, outcome.last.epoch, outcome.last.step) == (1, 10, 5, 50)


def test_the_first_of_equal_scores_stays_best():
    def scored(value):
        return train.Score(1, 1, {"accuracy": value})

    assert train._better(scored(0.5), None, "accuracy")
    assert not train._better(scored(0.5), scored(0.5), "accuracy")
    assert not train._better(scored(math.nan), scored(0.1), "accuracy")
    assert train._better(scored(-0.5), scored(math.nan), "accuracy")


def test_seconds_are_those_of_all_epochs_and_evaluations(monkeypatch):
    """By a clock that goes on by a second each time it is read."""
    trial = compose_trial("model=tiny", "method=lora", "epochs=3", "batch_size=4")
    fleet, loaded = make_fleet([trial])
    tokens = Tokens(Rows([("a", "b")] * 8, np.zeros(8, np.int64)), loaded.tokenizer, 8, CPU, fleet.dtype)
    ticks = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(ticks)))
    _, totals = train.train(fleet, train.Data(TASKS["mrpc"], tokens, tokens, torch.arange(8)[None]), Listener())
    assert (totals.steps, totals.train_seconds, totals.evaluate_seconds) == (6, 3.0, 4.0)
