"""Where encoders come from: RoBERTa as the hub has it, from a small hub that runs here, then from the cache."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from conftest import RUN, SMALL
from safetensors.torch import load_file
from small_hub import COMMIT, fresh, serve

import delora
from delora.pretrained import byte_tokenizer


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """A small RoBERTa saved as the hub's roberta-base is: with the head of its pretraining, without a classifier."""
    folder = tmp_path_factory.mktemp("roberta")
    config = transformers.RobertaConfig(
        vocab_size=261,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_an_encoder_is_fetched_from_the_hub_once_and_then_taken_from_the_cache(roberta, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in roberta.iterdir()}
    others = {"pytorch_model.bin": b"the same weights", "flax_model.msgpack": b"again"}
    words = [*RUN, *SMALL, "model=roberta_base", "model.shape=null", "method=lora", "epochs=1"]

    def run(name: str, **environment: str) -> dict:
        env = fresh(tmp_path / "home", hub.address) | environment
        ended = subprocess.run([*words, f"name={name}"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return json.loads((tmp_path / "outputs" / name / "result.json").read_text())

    with serve("models/FacebookAI/roberta-base", files | others) as hub:
        first = run("first")
        assert hub.fetched == files.keys()  # the weights once, not in every format
        hub.fetched.clear()
        second = run("second", HF_HUB_OFFLINE="1")
        assert not hub.fetched
    assert first["best"] == second["best"] and first["made_by"]["weights"] == second["made_by"]["weights"]
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert first["made_by"]["weights"] == {"source": "FacebookAI/roberta-base", "sha256": sha256}

    snapshot = tmp_path / "home/hub/models--FacebookAI--roberta-base/snapshots" / COMMIT
    monkeypatch.setattr("delora.pretrained.checkpoint", lambda config: snapshot)
    monkeypatch.setattr("delora.run.missing_encoder", lambda config: None)
    model = delora.load(tmp_path / "outputs" / "second")
    theirs = load_file(roberta / "model.safetensors")
    ours = {name.removesuffix(".weight"): parameter for name, parameter in model.frozen()}
    encoder = {name.removesuffix(".weight"): tensor for name, tensor in theirs.items() if "lm_head" not in name}
    assert len(encoder) > 30 and encoder.keys() <= ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in encoder.items())
    assert not model.get_submodule("base.classifier.dense").weight.eq(0).all()
