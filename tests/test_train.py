"""The loop: the published trajectory, each trial as if alone, divergence, frozen weights."""

import math

import pytest
import torch
from conftest import compose_trial
from safetensors.torch import load_file

from delora import pretrained, train
from delora.data import Rows, load
from delora.data.batches import Tokens
from delora.model import ATTENTION, Fleet
from delora.tasks import TASKS

CPU = torch.device("cpu")
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


def make_fleet(configs) -> tuple[Fleet, pretrained.Pretrained]:
    loaded = pretrained.load(configs[0].model, TASKS["mrpc"])
    loaded.model.set_attn_implementation(ATTENTION)
    return Fleet(loaded.model, configs, CPU), loaded


@pytest.mark.parametrize(("trials", "precision"), [(1, "float32"), (3, "float32"), (3, "float64")])
def test_published_trajectory(shared, monkeypatch, trials, precision):
    golden = load_file(shared / "golden" / "trajectory_delora.safetensors")
    here = trials // 2  # the other trials have their own start
    common = ["model=minilm", f"precision={precision}", "epochs=5", "batch_size=8", "log_every=1", "lr=1e-2"]
    fleet, loaded = make_fleet([compose_trial(*common, f"seed={seed}") for seed in range(trials)])
    for module in fleet.modules():
        if hasattr(module, "rates"):
            module.rates = (0.0,) * trials  # the published run has no dropout

    def name_there(name):
        return name.replace("bert.encoder.layer.", "layer").replace(".attention.self", "").replace(".method", "")

    with torch.no_grad():
        for name, parameter in fleet.trained().items():
            parameter[here] = golden[f"init.{name_there(name)}"]
        for _, module in fleet.adapted():
            module.method.A0[here], module.method.B0[here] = module.method.A[here], module.method.B[here]
    tokens = Tokens(Rows([("a", "b")] * 32, golden["labels"].flatten().numpy()), loaded.tokenizer, 32, CPU, fleet.dtype)
    ids = golden["input_ids"].flatten(0, 1).int()
    tokens.inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    tokens.lengths_S[:], tokens._length_S[:] = 32, 32
    in_file_order = torch.arange(32).expand(trials, -1)
    monkeypatch.setattr(train, "epoch_order", lambda seeds, epoch, rows: in_file_order)
    # The fleet ends with its best values; the reference holds the last ones.
    monkeypatch.setattr(train, "_better", lambda new, best, headline: True)
    listener = Listener()
    train.train(fleet, train.Data(TASKS["mrpc"], tokens, tokens, in_file_order), listener)

    suffix, tighter = ("", 1) if precision == "float32" else ("_f64", 1e-6)
    losses = torch.tensor(listener.losses, dtype=torch.float64)[:, here]
    assert ((losses - golden[f"losses{suffix}"]).abs() / golden[f"losses{suffix}"].abs()).max() < LOSS * tighter
    for name, parameter in fleet.trained().items():
        reference = golden[f"final{suffix}.{name_there(name)}"]
        bound = (STRENGTH if name.endswith("lam") else MATRICES) * tighter
        assert (parameter[here] - reference).abs().max() <= bound * reference.abs().max(), name


def tiny_data(fleet, loaded, rows=96) -> train.Data:
    dataset = load(TASKS["mrpc"], source="synthetic", rows={"train": rows, "validation": 24})
    tokens = {name: Tokens(part, loaded.tokenizer, 48, CPU, fleet.dtype) for name, part in dataset.splits.items()}
    orders = [torch.randperm(24, generator=torch.Generator().manual_seed(t.seed)) for t in fleet.trials]
    order_KS = torch.stack(orders)
    return train.Data(TASKS["mrpc"], tokens["train"], tokens["validation"], order_KS[:, :12], order_KS[:, 12:])


def train_tiny(configs):
    fleet, loaded = make_fleet(configs)
    listener = Listener()
    outcomes, _ = train.train(fleet, tiny_data(fleet, loaded), listener)
    return torch.tensor(listener.losses, dtype=torch.float64), outcomes, listener


def three_trials(method, precision):
    common = [f"method={method.split('-')[0]}", "model=tiny", f"precision={precision}", "batch_size=8", "epochs=3"]
    common += ["max_length=48", "log_every=1", *(["method.init=zero"] if method == "delora-zero" else [])]
    own = [["lr=1e-2", "method.dropout=0.1"], ["lr=3e-3", "method.dropout=0.3"], ["lr=1e-3", "weight_decay=0.1"]]
    if method.startswith("delora"):
        own = [[*options, f"method.lambda_init={2 + k}"] for k, options in enumerate(own)]
    return [compose_trial(*common, *options, f"seed={40 + k}") for k, options in enumerate(own)]


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("method", ["delora", "delora-zero", "lora", "dora", "ether", "etherplus"])
def test_a_trial_in_a_fleet_is_the_trial_alone(method, precision):
    configs = three_trials(method, precision)
    together, outcomes, _ = train_tiny(configs)
    assert together.shape == (36, 3)
    for k, config in enumerate(configs):
        alone, [outcome], _ = train_tiny([config])
        relative = ((together[:, k] - alone[:, 0]).abs() / alone[:, 0]).max()
        assert relative < (1e-9 if precision == "float64" else 1e-4)
        assert outcome.best.epoch == outcomes[k].best.epoch
        assert outcome.best.test == outcomes[k].best.test


def test_accumulation_changes_no_result():
    config = three_trials("delora", "float64")[0]
    whole, _, _ = train_tiny([config])
    parts, _, _ = train_tiny([config.model_copy(update={"accumulation": 3})])
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=0)


def test_a_trial_that_diverges_leaves_the_others_unchanged_to_the_bit():
    configs = three_trials("lora", "float32")
    undisturbed, before, _ = train_tiny(configs)
    disturbed, after, listener = train_tiny([configs[0], configs[1].model_copy(update={"lr": 1e30}), configs[2]])
    assert [outcome.status for outcome in after] == ["done", "diverged", "done"]
    assert after[1].diverged_step == listener.ended[1] > 0
    for k in (0, 2):
        assert torch.equal(disturbed[:, k], undisturbed[:, k])
        assert after[k].best == before[k].best


def test_a_frozen_weight_that_changes_ends_the_run(monkeypatch):
    fleet, loaded = make_fleet(three_trials("lora", "float32")[:1])
    data = tiny_data(fleet, loaded)
    real = train._score_final

    def tamper(*arguments):
        with torch.no_grad():
            next(fleet.frozen())[1][3, 3] += 1e-6
        real(*arguments)

    monkeypatch.setattr(train, "_score_final", tamper)
    with pytest.raises(RuntimeError, match="frozen weight"):
        train.train(fleet, data, Listener())


def test_the_first_of_equal_scores_stays_best():
    def scored(value):
        return train.Score(1, 1, {"accuracy": value})

    assert train._better(scored(0.5), None, "accuracy")
    assert not train._better(scored(0.5), scored(0.5), "accuracy")
    assert not train._better(scored(math.nan), scored(0.1), "accuracy")
    assert train._better(scored(-0.5), scored(math.nan), "accuracy")
