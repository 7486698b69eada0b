"""Input that cannot be used, and disks that fail: a clear message, a status that is not 0, nothing half-written.

Single faults of TSV files are in test_data_glue.py, of values in test_config.py, of writes in test_results.py.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import compose_trial
from safetensors.torch import load_file, save_file

from delora import pretrained, results
from delora.data import Rows, load
from delora.data.batches import Tokens
from delora.errors import UserError
from delora.missing import missing_encoder
from delora.model import Fleet
from delora.pretrained import byte_tokenizer
from delora.tasks import TASKS

CPU = torch.device("cpu")
TINY = ["model=tiny", "logger=none", "device=cpu", "batch_size=16", "name=x"]
SMALL = [*TINY, "data=synthetic", "data.rows.train=64", "data.rows.validation=40", "max_length=64"]


def line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "delora.cli", *map(str, arguments)]


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(line(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


# --- Data


@pytest.fixture
def glue(tmp_path) -> Path:
    """RTE's files in full size, with generated sentences."""
    folder, dataset = tmp_path / "glue" / "RTE", load(TASKS["rte"], source="synthetic")
    folder.mkdir(parents=True)
    for split, name in (("train", "train.tsv"), ("validation", "dev.tsv")):
        rows = dataset.splits[split]
        fields = zip(rows.texts, rows.labels, strict=True)
        lines = [f"{i}\t{a}\t{b}\t{dataset.task.labels[y]}\n" for i, ((a, b), y) in enumerate(fields)]
        (folder / name).write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(lines))
    return folder.parent


def test_damaged_files_are_reported_together_and_leave_no_result(glue, tmp_path):
    train, dev = glue / "RTE" / "train.tsv", glue / "RTE" / "dev.tsv"
    lines = train.read_text().splitlines(keepends=True)
    lines[6] = "5\t\tAn empty sentence before this one .\tentailment\n"
    lines[7] = "6\tA label\tof another task .\tneutral\n"
    train.write_text("".join(lines))
    dev.write_bytes(dev.read_bytes()[:-20_000])
    answer = command(*TINY, "task=rte", f"data.dir={glue}", cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == "" and "Traceback" not in answer.stderr
    assert f"{train}: line 7: an empty text, expected a sentence" in answer.stderr
    assert f"{train}: line 8: label 'neutral', expected entailment or not_entailment" in answer.stderr
    assert f"{dev}: " in answer.stderr and "expected 277 (rte validation)" in answer.stderr
    assert not list(tmp_path.rglob("result.json"))


def test_an_example_that_just_fits_is_not_cut():
    rows = Rows([("a" * 6,), ("a" * 7,), ("",)], np.zeros(3, np.int64))
    tokens = Tokens(rows, byte_tokenizer(), 8, CPU, torch.float32)
    assert tokens.lengths_S.tolist() == [8, 8, 2] and tokens.cut == 1


def test_an_empty_sentence_is_scored_like_any_other():
    trial = compose_trial("model=tiny", "method=delora")
    encoder = pretrained.load(trial.model, TASKS["qqp"])
    rows = Rows([("", "Why ?"), ("", ""), ("Why ?", "")], np.zeros(3, np.int64))
    tokens = Tokens(rows, encoder.tokenizer, 64, CPU, torch.float32)
    fleet = Fleet(encoder.model, [trial], CPU).eval()
    batch = tokens.gather(torch.arange(3)[None])
    assert fleet(**batch.inputs).logits.isfinite().all()


# --- Encoders


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small BERT in a local folder, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.BertConfig(
        vocab_size=261,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load_from(folder: Path, *overrides: str) -> pretrained.Pretrained:
    trial = compose_trial("model=roberta_base", f"model.source={folder}", "model.shape=null", *overrides)
    if lack := missing_encoder(trial.model):
        raise UserError(lack)
    return pretrained.load(trial.model, TASKS["mrpc"])


def test_a_local_checkpoint_is_used_and_its_hash_checked(checkpoint):
    encoder = load_from(checkpoint)
    assert load_from(checkpoint, f"model.sha256={encoder.sha256}").sha256 == encoder.sha256
    with pytest.raises(
        UserError, match=rf"model.safetensors is not the expected file[\s\S]*found    sha256 {encoder.sha256}"
    ):
        load_from(checkpoint, f"model.sha256={'a' * 64}")


@pytest.mark.parametrize(
    "damage",
    [
        *("half the weights", "no weights", "empty weights", "a layer is not there", "a layer of another width"),
        *("config is no JSON", "no tokenizer", "no folder"),
    ],
)
def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path, damage, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    match damage:
        case "half the weights":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "empty weights":
            weights.write_bytes(b"")
        case "no weights":
            weights.unlink()
        case "a layer is not there":
            tensors = load_file(weights)
            save_file({n: t for n, t in tensors.items() if "query" not in n}, weights, {"format": "pt"})
        case "a layer of another width":
            tensors = load_file(weights)
            save_file({n: t[:8] if "query" in n else t for n, t in tensors.items()}, weights, {"format": "pt"})
        case "no tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        case "config is no JSON":
            (folder / "config.json").write_text("{")
        case "no folder":
            shutil.rmtree(folder)
    with pytest.raises(UserError, match=str(folder)) as caught:
        load_from(folder)
    assert "hf download" not in str(caught.value) and "above report" not in str(caught.value)


def test_a_checkpoint_with_a_head_for_other_labels_is_used(checkpoint, tmp_path):
    config = transformers.AutoConfig.from_pretrained(checkpoint, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_from(tmp_path).model.config.num_labels == 2


def test_a_model_without_a_classification_head_is_refused():
    trial = compose_trial("model.source=folder", "model.shape=null", "method.targets=[q]")
    config = transformers.T5Config(vocab_size=261, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_labels=2)
    with pytest.raises(UserError, match="no classification head: no linear layer under classifier or score"):
        Fleet(transformers.T5ForSequenceClassification(config), [trial], CPU)


# --- Disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_a_run_and_with_more_space_the_same_command_finishes(small_disk, tmp_path):
    words = [*SMALL, "epochs=8", "log_every=1", f"output_dir={small_disk}"]
    (small_disk / "filler").write_bytes(b"x" * 44_000)
    full = command(*words, cwd=tmp_path)
    assert full.returncode == 1 and full.stdout == "" and "Traceback" not in full.stderr
    assert "No space left on device" in full.stderr.splitlines()[-1]
    assert "run the same command again" in full.stderr.splitlines()[-1]
    assert not list(small_disk.rglob("result.json")) and not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    again = command(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    stored = results.read(small_disk / "x")
    assert stored.result["status"] == "done" and len(list(stored.steps())) == 32


def test_an_output_folder_removed_during_a_run_ends_it(tmp_path):
    folder, pipe = tmp_path / "outputs" / "x", subprocess.PIPE
    words = line(*SMALL, "epochs=3000", "log_every=1")
    with subprocess.Popen(words, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        while not ((metrics := folder / "metrics.jsonl").exists() and metrics.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
        folder.rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == "" and "Traceback" not in errors
    assert "removed while the trial ran" in errors.splitlines()[-1]
    assert not folder.exists()


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    answer = command(*SMALL, "output_dir=file/deeper", cwd=tmp_path)
    assert answer.returncode in (1, 2) and "file/deeper" in answer.stderr and "Traceback" not in answer.stderr
