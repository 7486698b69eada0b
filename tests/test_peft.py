"""method=peft: the methods of the installed PEFT library, each by its type."""

import sys

import pytest
import torch
from conftest import FEW, SMALL, command, compose_trial
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open

import delora
from delora import pretrained, storage
from delora.config import ConfigError
from delora.errors import UserError
from delora.methods.base import check
from delora.methods.peft import PEFT
from delora.model import Fleet
from delora.randomness import Draw
from delora.sweep import run
from delora.tasks import TASKS

TYPES = sorted(kind.name for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
# Options with which a type fits layers of width 32.
OPTIONS = {
    "C3A": {"block_size": 8},
    "MISS": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 64},
}
REFUSED = {
    **dict.fromkeys(
        (
            "ADAPTION_PROMPT",
            "CARTRIDGE",
            "CPT",
            "MULTITASK_PROMPT_TUNING",
            "PREFIX_TUNING",
            "PROMPT_TUNING",
            "P_TUNING",
        ),
        "adapts no layers, but the model's input",
    ),
    **dict.fromkeys(("ADALORA", "ADAMSS", "POLY", "SHADOW", "XLORA"), "does more in training than its layers do"),
}


def fleet_of(kind: str, *words: str) -> Fleet:
    options = [f"+method.config.{name}={value}" for name, value in OPTIONS.get(kind, {}).items()]
    trial = compose_trial("model=tiny", "method=peft", f"method.type={kind}", *options, *words)
    check([trial.method])
    return Fleet(pretrained.load(trial.model, TASKS["mrpc"]).model, [trial], torch.device("cpu")).eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_trained_or_refused_in_one_line(kind):
    """Where it is trained, gradients reach what PEFT trains, and state and merged weights are what forward does."""
    if kind in REFUSED:
        with pytest.raises(ConfigError, match=f"method.type={kind}: {REFUSED[kind]}"):
            fleet_of(kind)
        return
    try:
        fleet = fleet_of(kind)
    except UserError as error:
        assert str(error).startswith(f"method.type={kind}: ") and "\n" not in str(error)
        assert kind in ("LILY", "OSF", "PVERA", "TRAINABLE_TOKENS"), error
        return
    trained = {n: p for n, p in fleet.trained().items() if ".method." in n}
    assert trained and all(len(parameter) == 1 for parameter in trained.values())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fleet.trained().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    logits = fleet(**inputs()).logits
    logits.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    again = fleet_of(kind)
    again.load_trial_state(0, fleet.trial_state(0))
    assert torch.equal(again(**inputs()).logits, logits)
    assert all((distance[0] > 0) == (kind != "BEFT") for distance in fleet.distances().values())  # a bias alone
    torch.testing.assert_close(fleet.merge()(**inputs()).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["f64", "f32"])
def test_a_layer_of_pefts_is_its_golden_one(shared, dtype):
    path = shared / "golden" / "more_layers" / f"loha_peft_24x40_r4_trained_{dtype}.safetensors"
    with safe_open(path, "pt") as stored:
        file = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    linear = torch.nn.Linear(24, 40, dtype=file["W"].dtype)
    linear.weight, linear.bias = torch.nn.Parameter(file["W"]), torch.nn.Parameter(file["b"])
    options = {"type": "LOHA", "config": {"r": 4, "alpha": 8}}
    draw = Draw([0], "layer", file["W"].dtype, torch.device("cpu"))
    method = PEFT(linear.weight, draw, **options, **PEFT.share([linear], draw, **options))
    names = {"w1a": "hada_w1_a", "w1b": "hada_w1_b", "w2a": "hada_w2_a", "w2b": "hada_w2_b"}
    with torch.no_grad():
        for there, here in names.items():
            getattr(method, here).copy_(file[there][None])
    x = file["x"].flatten(0, 1)[None].requires_grad_()
    y = method(x, x, linear.weight, linear.bias)
    (y * file["g"].flatten(0, 1)).sum().backward()
    found = {"y": y, "grad_x": x.grad, "W_eff": method.delta(file["W"]) + file["W"]}
    found |= {f"grad_{there}": getattr(method, here).grad for there, here in names.items()}
    for name, ours in found.items():
        bound = 1e-12 if dtype == "f64" else 2e-6
        difference = (ours.detach().reshape(file[name].shape) - file[name]).abs().max()
        assert difference <= bound * file[name].abs().max(), name


def test_what_a_config_of_pefts_does_not_take_is_told(tmp_path):
    words = [*SMALL, *FEW, "method=peft", f"output_dir={tmp_path}/x"]
    for more, told in {
        ("method.type=LOHO",): "method.type=LOHO: expected one of ",
        ("method.config.rr=4",): "method.config.rr=4: LoHaConfig of PEFT has no such option; did you mean r?",
        ("method.config.module_dropout=0.1",): "takes PEFT's own random numbers; use method.dropout",
        ("method.config.target_modules=[query]",): "is set by delora: method.targets chooses the layers",
        ("method.type=LORA", "method.config.lora_bias=true", "method.config.init_lora_weights=eva"): "method.config: ",
        ("method.type=C3A", "method.config.block_size=7"): "method.type=C3A: ",
    }.items():
        answer = command(*words, *more, cwd=tmp_path)
        assert answer.returncode == 2 and told in answer.stderr and "Traceback" not in answer.stderr, answer.stderr
    assert not list(tmp_path.iterdir())


def test_trials_of_pefts_are_trained_one_by_one_and_loaded(tmp_path):
    answer = command(
        *[*SMALL, *FEW, "method=peft", "method.type=LOHA,VERA", "method.config.r=2", "seed=1,2", "name=s", "-m"],
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr
    found = storage.find(tmp_path / "outputs" / "s").trials
    assert len(found) == 4 and all(trial.result["fleet_size"] == 1 for trial in found)
    for trial in found:
        model = delora.load(trial.folder)
        stored = trial.tensors(storage.ADAPTER, "pt")
        assert all(torch.equal(tensor, model.trial_state(0)[name]) for name, tensor in stored.items())
        assert trial.result["parameters"]["adapter"] == sum(t.numel() for n, t in stored.items() if ".method." in n)


def test_without_the_library_that_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(UserError, match=r"method=peft needs PEFT: pip install 'delora\[peft\]'"):
        check([compose_trial("method=peft").method])


def test_several_trials_of_pefts_at_once_are_refused():
    trials = [compose_trial("model=tiny", "method=peft", f"seed={seed}") for seed in (1, 2)]
    with pytest.raises(UserError, match="method=peft trains one trial at a time, not 2 together"):
        Fleet(pretrained.load(trials[0].model, TASKS["mrpc"]).model, trials, torch.device("cpu"))


def test_dropout_and_interruption_leave_the_bits_as_they_are(tmp_path):
    """Trained twice, with dropout in the encoder and before the layer."""
    words = [*SMALL, *FEW, "method=peft", "method.dropout=0.2"]
    first, second = (compose_trial(*words, f"output_dir={tmp_path}", f"name={name}") for name in "ab")
    run([first])
    run([second])
    states = [storage.read(tmp_path / name).tensors(storage.ADAPTER, "pt") for name in "ab"]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
