"""A run from the command line to its folder, in real processes, on generated data and small encoders."""

import pytest
import torch
import transformers
from conftest import SMALL, command, compose_trial

import delora
from delora import results
from delora.data import load
from delora.data.batches import Tokens
from delora.sweep import run
from delora.tasks import TASKS
from delora.train import predict


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

    model.merge().save_pretrained(tmp_path / "merged")  # for those who have no delora
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.inference_mode():
        logits = plain(**tokens.gather(torch.as_tensor(index)[None], packed=False).inputs).logits
    torch.testing.assert_close(logits, stored["test"], rtol=0, atol=1e-6)


def test_standard_protocol_reports_best_and_last_on_all_rows_of_mnli(tmp_path):
    overrides = [*SMALL, "task=mnli", "protocol=standard", f"output_dir={tmp_path}", "name=m"]
    [result] = run([compose_trial(*overrides)])
    for which in ("best", "last"):
        assert {"accuracy", "accuracy_mm", "loss"} <= set(result[which]["validation"])
    assert result["best"]["test"] is None


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    answer = command(*SMALL, "batch_size=65", cwd=tmp_path)
    assert answer.returncode == 2 and "only 64 training rows" in answer.stderr and "Traceback" not in answer.stderr
