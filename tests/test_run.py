"""A run from the command line to its folder, in real processes, on generated data and small encoders."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SMALL, command, compose_trial

import delora
from delora import results
from delora.data import load
from delora.data.batches import Tokens
from delora.sweep import run
from delora.tasks import TASKS
from delora.train import predict


def test_a_run_leaves_a_whole_result_and_is_not_run_twice(tmp_path):
    first = command(*SMALL, "name=a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "synthetic" in first.stdout and "outputs/a" in first.stdout
    stored = results.read(tmp_path / "outputs" / "a")
    assert stored.result["status"] == "done" and stored.result["best"]["test"]["accuracy"] >= 0
    evaluations = list(stored.evaluations())
    assert [line["epoch"] for line in evaluations] == [0, 1, 2]
    assert set(evaluations[0]["distance"].values()) == {0.0} and min(evaluations[2]["distance"].values()) > 0
    assert set(evaluations[0]["lambda"].values()) == {4.0}

    written = (tmp_path / "outputs" / "a" / "result.json").stat().st_mtime_ns
    assert command(*SMALL, "name=a", cwd=tmp_path).returncode == 0
    assert (tmp_path / "outputs" / "a" / "result.json").stat().st_mtime_ns == written
    changed = command(*SMALL, "name=a", "lr=1e-4", cwd=tmp_path)
    assert changed.returncode == 2 and "lr: 0.006 → 0.0001" in changed.stderr and "Traceback" not in changed.stderr


def test_all_that_is_missing_is_said_in_one_error_within_ten_seconds(tmp_path):
    start = time.monotonic()
    answer = command("task=mrpc", "method=delora", "lr=1e-3", cwd=tmp_path)
    assert time.monotonic() - start < 10
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert "hf download FacebookAI/roberta-base" in answer.stderr and "nyu-mll/glue" in answer.stderr
    assert not list((tmp_path / "outputs").glob("*/result.json"))


def test_faults_are_told_together_without_heavy_imports(tmp_path):
    script = (
        "import sys; sys.argv = ['delora-run', 'lrr=1', 'task=mprc', 'method.rank=0', 'lr=nan'];"
        "from delora.cli import main; status = main();"
        "print(status, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "2 []"
    for words in ("did you mean lr?", "did you mean mrpc?", "method.rank=0", "lr=nan"):
        assert words in answer.stderr


def test_a_diverged_trial_ends_with_status_3(tmp_path):
    answer = command(*SMALL, "method=lora", "lr=1e30", "name=d", cwd=tmp_path)
    assert answer.returncode == 3, answer.stderr
    result = json.loads((tmp_path / "outputs" / "d" / "result.json").read_text())
    assert result["status"] == "diverged" and result["diverged_step"] >= 1


def test_ctrl_c_leaves_no_result(tmp_path):
    line = [sys.executable, "-m", "delora.cli", *SMALL, "epochs=500", "name=c"]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "outputs" / "c" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert not (metrics.parent / "result.json").exists()


@pytest.mark.parametrize("method", ["delora", "dora", "etherplus"])
def test_a_loaded_model_gives_the_scored_logits_exactly(tmp_path, method):
    trial = compose_trial(*SMALL, f"method={method}", f"output_dir={tmp_path}", "name=x")
    run([trial])
    model = delora.load(tmp_path / "x")
    stored, _ = results.read_tensors(tmp_path / "x" / results.PREDICTIONS, "pt")
    dataset = load(TASKS["mrpc"], **trial.data.options())
    tokens = Tokens(dataset.splits["validation"], model.tokenizer, 64, model.device, model.dtype)
    from delora.data.splits import paper_split

    for part, index in zip(("validation", "test"), paper_split(TASKS["mrpc"], 42, 40), strict=True):
        logits = predict(model, tokens, torch.as_tensor(index)[None], trial.batch_size)[0]
        assert torch.equal(logits, stored[part])


def test_standard_protocol_reports_best_and_last_on_all_rows_of_mnli(tmp_path):
    overrides = [*SMALL, "task=mnli", "protocol=standard", f"output_dir={tmp_path}", "name=m"]
    [result] = run([compose_trial(*overrides)])
    for which in ("best", "last"):
        assert {"accuracy", "accuracy_mm", "loss"} <= set(result[which]["validation"])
    assert result["best"]["test"] is None


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    answer = command(*SMALL, "batch_size=65", cwd=tmp_path)
    assert answer.returncode == 2 and "only 64 training rows" in answer.stderr and "Traceback" not in answer.stderr
