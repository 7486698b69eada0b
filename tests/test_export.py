"""Trials saved for others, read by their own code: transformers' pipeline and PEFT; and what PEFT saved, read here."""

import contextlib
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from conftest import FEW, METHODS, SMALL, compose_trial
from safetensors.torch import load_file, save_file
from test_encoders import KINDS, checkpoints, fleet_of, padded, tokens_of  # noqa: F401
from tokenizers import Tokenizer, models

import delora
from delora import storage
from delora.errors import UserError
from delora.export import peft_folder
from delora.export.cli import main
from delora.missing import identified
from delora.sweep import run

# Methods that are no adapter of linear layers, or whose change is no product of thin matrices.
NO_PEFT = {"adapter", "adapter_ffn", "bitfit", "full", "head", "loreft", "red"}
OWN_TYPES = {"ia3": "IA3", "miss": "MISS", "oft": "OFT", "vera": "VERA"}
FORMS = [(method, ()) for method in METHODS] + [("delora", ("method.init=zero",)), ("ether", ("method.side=both",))]

EACH_TYPE = [("lora", ()), ("dora", ()), ("delora", ("method.init=zero",)), *((method, ()) for method in OWN_TYPES)]


def moved(folder: Path, *words: str):
    """A fleet over a checkpoint whose trained values are away from where they start, as if it were loaded."""
    common = ["model=roberta_base", f"model.source={folder}", "model.shape=null", "precision=float64", "max_length=40"]
    fleet, loaded = fleet_of([compose_trial(*common, *words)])
    draw = torch.Generator().manual_seed(1)
    for parameter in fleet.trained().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    fleet.tokenizer, fleet.origin = loaded.tokenizer, loaded.origin
    return fleet.eval(), padded(tokens_of(fleet, loaded)["validation"])


def stock(folder: Path, base: Path, labels: int = 2, dtype=torch.float64) -> torch.nn.Module:
    """PEFT's own model over transformers' own, with a head drawn anew."""
    with contextlib.redirect_stderr(None):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def each_alone(model, inputs):
    """Logits of each example without padding, where transformers' windows can leave nothing to see."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"].sum(1).tolist(), strict=True)
    return torch.cat([model(input_ids=ids[None, :length]).logits for ids, length in rows])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same_logits(kind, checkpoints, tmp_path):  # noqa: F811
    """In PEFT's own code, or refused with the way out: every method, with fused layers too, and every family."""
    for number, (method, more) in enumerate(FORMS if kind in ("roberta", "modernbert") else EACH_TYPE):
        words = [f"method={method}", *more]
        words += [] if method in NO_PEFT - {"red"} else ["method.targets=[query,value,ffn_out]"]
        words += ["method.block_size=16"] if method == "oft" else []
        if method == "bitfit" and kind == "modernbert":  # which has no biases
            continue
        fleet, inputs = moved(checkpoints(kind), *words)
        folder = tmp_path / str(number)
        if method in NO_PEFT or (
            method == "oft" and kind == "modernbert"
        ):  # rotations of parts are not one of the whole
            with pytest.raises(UserError, match=r"--format transformers|nor is it a change of weights") as refused:
                fleet.save(folder, "peft")
            assert "\n" not in str(refused.value) and not folder.exists()
            continue
        fleet.save(folder, "peft")
        described = json.loads((folder / "adapter_config.json").read_text())
        own = "DELORA" if more == ("method.init=zero",) else OWN_TYPES.get(method, "LORA")
        fused = kind == "modernbert" and own != "IA3"
        assert described["peft_type"] == ("LORA" if fused else own) and set(described["modules_to_save"])
        found, wanted = each_alone(stock(folder, checkpoints(kind)), inputs), fleet(**inputs).logits
        assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max(), (method, more)
    fleet.save(tmp_path / "merged")
    classify = transformers.pipeline("text-classification", str(tmp_path / "merged"))
    ids = fleet.tokenizer("abc", "a bc", return_tensors="pt")
    taken = {name: ids[name] for name in ("input_ids", "attention_mask")}
    likeliest = fleet(**taken).logits.softmax(1)[0].max().item()
    assert classify({"text": "abc", "text_pair": "a bc"})["score"] == pytest.approx(likeliest, abs=1e-6)


# --- As a model of transformers


def word_tokenizer(folder: Path) -> None:
    """Saves a tokenizer of 64 words."""
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(60))])}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), pad_token="<pad>", unk_token="<unk>"
    )
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """Trials over MiniLM that trained for a moment, by task."""
    folder = tmp_path_factory.mktemp("minilm")
    words = [
        "model=minilm",
        *SMALL[1:],
        *FEW,
        "epochs=1",
        "warmup_ratio=0",
        "method=delora",
        "method.init=zero",
        "lr_factor=5",
    ]
    for task in ("mrpc", "stsb"):
        run([compose_trial(*words, f"task={task}", f"output_dir={folder}", f"name={task}")])
    return folder


PAIRS = [
    ("The naïve café owner, Zoë, paid $3.50!", "Zoe paid three dollars and fifty cents."),
    ("A man is playing a guitar.", "A man plays the guitar " * 40),  # cut at 64 tokens
]


@torch.no_grad()
@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_a_pipeline_gives_the_same_labels_and_probabilities(task, minilm, tmp_path):
    model = delora.load(minilm / task)
    model.save(tmp_path / "saved")
    classify = transformers.pipeline("text-classification", str(tmp_path / "saved"))
    for first, second in PAIRS:
        inputs = model.tokenizer(first, second, truncation=True, max_length=64, return_tensors="pt")
        assert inputs["input_ids"].shape[1] <= 64 and model.tokenizer.unk_token_id not in inputs["input_ids"]
        logits = model(**inputs).logits[0]
        given = {"text": first, "text_pair": second}
        found = classify(given, truncation=True, top_k=None)
        if task == "stsb":
            assert [one["label"] for one in found] == ["score"]
            assert abs(found[0]["score"] - logits.item()) < 1e-6 * max(1, abs(logits.item()))
        else:
            wanted = dict(zip(("not_equivalent", "equivalent"), logits.softmax(0).tolist(), strict=True))
            assert {one["label"]: one["score"] for one in found} == pytest.approx(wanted, rel=0, abs=1e-6)
            assert classify(given, truncation=True)["label"] == max(wanted, key=wanted.get)
    described = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert described["problem_type"] == ("regression" if task == "stsb" else "single_label_classification")


@torch.no_grad()
def test_peft_over_minilm_gives_the_same_logits(minilm, tmp_path, capsys):
    """A trained trial, from the command; the head that PEFT drew is replaced, and the card's code runs."""
    assert main([str(minilm / "mrpc"), "-o", str(tmp_path / "adapter"), "--format", "peft"]) == 0
    assert f"saved in {tmp_path / 'adapter'}" in capsys.readouterr().out
    assert main([str(minilm / "mrpc"), "-o", str(tmp_path / "adapter")]) == 2
    assert capsys.readouterr().err.startswith("delora-export: error: ")
    model = delora.load(minilm / "mrpc")
    card = (tmp_path / "adapter" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"adapter"', repr(str(tmp_path / "adapter")))
    made: dict = {}
    exec(code, made)
    for first, second in PAIRS:
        inputs = made["tokenizer"](first, second, truncation=True, return_tensors="pt")
        wanted = model(**model.tokenizer(first, second, truncation=True, max_length=64, return_tensors="pt")).logits
        torch.testing.assert_close(made["model"](**inputs).logits, wanted, rtol=0, atol=1e-6)
    assert made["model"].config.id2label == {0: "not_equivalent", 1: "equivalent"}
    again = delora.load(tmp_path / "adapter")  # the base is the package that it names
    assert again.trials[0].task.facts.labels == ("not_equivalent", "equivalent")
    assert torch.allclose(again(**inputs).logits, wanted, rtol=0, atol=1e-6)


def test_the_card_tells_what_the_result_does(minilm, tmp_path):
    delora.load(minilm / "mrpc").save(tmp_path / "saved")
    result = storage.read(minilm / "mrpc").result
    _, front, text = (tmp_path / "saved" / "README.md").read_text().split("---\n", 2)
    described = yaml.safe_load(front)
    assert described["library_name"] == "transformers" and described["pipeline_tag"] == "text-classification"
    assert "datasets" not in described and "generated sentences" in text  # they are not GLUE's
    [entry] = described["model-index"]
    told = {metric["name"]: metric["value"] for one in entry["results"] for metric in one["metrics"]}
    assert told == {name: value for name, value in result["best"]["test"].items() if name != "loss"}
    for value in (result["id"], result["made_by"]["weights"]["sha256"], f"{result['best']['test']['accuracy']:.4f}"):
        assert value in text
    assert "0 not_equivalent, 1 equivalent" in text and "Protocol paper" in text


def test_what_cannot_be_saved_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    run([compose_trial(*SMALL, *FEW, "method=lora", "epochs=1", f"output_dir={tmp_path}", "name=tiny")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    tiny = delora.load(tmp_path / "tiny")
    for name, format, told in (
        ("new", "peft", "random weights, which no checkpoint holds"),
        ("new", "pfet", "format=pfet: expected one of transformers, peft; did you mean peft?"),
        ("full", "transformers", "full: holds something already"),
        ("file", "transformers", "file: holds something already"),
        ("file/new", "transformers", "file/new: cannot be written"),
    ):
        with pytest.raises(UserError, match=told):
            tiny.save(tmp_path / name, format)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "full", "file"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    words = tmp_path / "full" / "words"
    word_tokenizer(words)
    monkeypatch.setattr(
        type(tiny.tokenizer), "save_pretrained", lambda _, to: shutil.copytree(words, to, dirs_exist_ok=True)
    )
    with pytest.raises(
        UserError, match=r"tokenizer .* is another one when transformers reads it back; nothing is saved"
    ):
        tiny.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    tiny.save(tmp_path / "new")
    transformers.pipeline("text-classification", str(tmp_path / "new"))("a text")


# --- Read from PEFT's folders


@pytest.fixture(scope="module")
def golden(shared, tmp_path_factory):
    """The base of the golden adapters, with a tokenizer."""
    folder = tmp_path_factory.mktemp("golden") / "base"
    shutil.copytree(shared / "golden" / "peft" / "base", folder)
    word_tokenizer(folder)
    return folder


ADAPTERS = ["delora", "dora", "ia3", "lora_modules_to_save", "lora_r4", "miss", "rslora", "vera"]


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("precision", "bound"), [("float32", 3.5e-6), ("float64", 1e-12)])
def test_adapters_that_peft_saved_give_its_logits(name, precision, bound, shared, golden):
    folder = shared / "golden" / "peft" / name
    expected = load_file(folder / "expected.safetensors")
    model = peft_folder.load(folder, golden, precision)
    found = model(input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]).logits
    wanted = expected["logits_f64" if precision == "float64" else "logits_f32"]
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()


LAYER = "roberta.encoder.layer"
CONFIGS = {
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["query", "value", "output.dense"],
        rank_pattern={"layer.0.attention.self.query": 2, "output.dense": 3},
        alpha_pattern={r"layer\.1\..*": 5},
    ),
    "dora, patterns": peft.LoraConfig(use_dora=True, r=4, target_modules=["query"], rank_pattern={"0.*query": 2}),
    "rslora, patterns": peft.LoraConfig(use_rslora=True, r=4, target_modules=["query"], alpha_pattern={"0.*query": 3}),
    "rslora and dora": peft.LoraConfig(use_rslora=True, use_dora=True, r=4, target_modules=["key"]),
    "delora, patterns": peft.DeloraConfig(
        r=4, target_modules=["query", "key"], rank_pattern={"query": 2}, lambda_pattern={"key": 9}
    ),
    "ia3, PEFT's own layers": peft.IA3Config(),
    "vera without matrices": peft.VeraConfig(
        r=4, target_modules=["query"], save_projection=False, projection_prng_key=3
    ),
    "whole modules": peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier", "LayerNorm"]),
    "no head": peft.LoraConfig(r=2, target_modules=["query"]),
}


def saved_by_peft(folder: Path, base: Path, config: peft.PeftConfig, task_type: str | None) -> torch.nn.Module:
    """PEFT's model with every trained value away from its start, and saved."""
    config.task_type = task_type
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float64)
    model = peft.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_can_vary_from_layer_to_layer_is_read(name, golden, tmp_path):
    headless = name in ("no head", "whole modules")
    theirs = saved_by_peft(tmp_path, golden, CONFIGS[name], None if headless else "SEQ_CLS")
    ids = torch.arange(4, 24).view(2, 10)
    found, wanted = peft_folder.load(tmp_path, golden, "float64")(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [peft.LoraConfig(use_dora=True), peft.MissConfig(r=4), peft.IA3Config(feedforward_modules=[])]
)
def test_adapters_of_fused_layers_are_taken_apart(config, checkpoints, tmp_path):  # noqa: F811
    config.target_modules = {"Wqkv"}
    config.modules_to_save = ["classifier", "head"]
    theirs = saved_by_peft(tmp_path, checkpoints("modernbert"), config, "SEQ_CLS")
    ids = torch.arange(5, 25).view(2, 10)
    model = peft_folder.load(tmp_path, checkpoints("modernbert"), "float64")
    wanted = theirs(input_ids=ids).logits
    assert (model(input_ids=ids).logits - wanted).abs().max() <= 1e-11 * wanted.abs().max()
    model.save(tmp_path / "again", "peft")  # and joined again
    joined = stock(tmp_path / "again", checkpoints("modernbert"), 3)(input_ids=ids).logits
    assert (joined - wanted).abs().max() <= 1e-11 * wanted.abs().max()


def altered(source: Path, folder: Path, config=None, tensors=None) -> Path:
    """A copy of an adapter with other keys in its config, and other tensors; None takes one away."""
    folder.mkdir()
    described = json.loads((source / "adapter_config.json").read_text()) | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(described))
    held = load_file(source / "adapter_model.safetensors") | (tensors or {})
    save_file({name: t for name, t in held.items() if t is not None}, folder / "adapter_model.safetensors")
    return folder


QUERY = f"base_model.model.{LAYER}.0.attention.self.query"


@pytest.mark.parametrize(
    ("config", "tensors", "told"),
    [
        ({"use_qalora": True, "lora_bias": True}, {}, "lora_bias=true: is not known here\n +use_qalora=true: is not"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights=pissa: changes the frozen weights"),
        ({"trainable_token_indices": [1]}, {}, r"trainable_token_indices=\[1\]: is not known here"),
        ({"bias": "all"}, {}, "bias=all: is not known here"),
        ({"peft_type": "LOHA"}, {}, "an adapter of type 'LOHA', only LORA, DELORA"),
        ({"r": "four"}, {}, "r: Input should be a valid integer"),
        ({"r": 8}, {}, r"ranks \{'A': 4, 'B': 4\}, 8 by adapter_config.json"),
        ({"rank_pattern": {"(": 4}}, {}, "a pattern is no regular expression"),
        ({"use_dora": True}, {}, "query: lacks m"),
        ({}, {f"{QUERY}.lora_A.weight": None}, "query: lacks A"),
        ({}, {f"{QUERY}.lora_{key}.weight": None for key in "AB"}, r"holds nothing for .*0\.attention\.self\.query"),
        ({}, {f"{QUERY}.lora_A.weight": torch.ones(())}, "query.lora_A.weight: a single number"),
        ({}, {f"{QUERY}.lora_A.weight": torch.full((4, 32), torch.nan)}, "holds other than finite numbers"),
        ({}, {f"{QUERY}.lora_A.weight": torch.ones(4, 31)}, "does not fit"),
        ({}, {f"{QUERY}.lora_A.weight": torch.ones(1, 4, 32)}, r"query: A of shape \(1, 4, 32\)"),
        ({}, {f"{QUERY}.lora_embedding_A": torch.ones(4, 32)}, "lora_embedding_A: of no linear layer"),
        ({}, {"base_model.model.other.weight": torch.ones(2)}, "has no place for other.weight"),
        ({}, {"base_model.model.classifier.dense.weight": torch.ones(2)}, "has no place for classifier.dense.weight"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(config, tensors, told, shared, golden, tmp_path):
    folder = altered(shared / "golden" / "peft" / "lora_r4", tmp_path / "x", config, tensors)
    with pytest.raises(UserError, match=told):
        delora.load(folder, base=golden)


def test_other_files_than_safetensors_and_other_bases_are_refused(shared, golden, tmp_path, checkpoints):  # noqa: F811
    pickle = altered(shared / "golden" / "peft" / "lora_r4", tmp_path / "pickle")
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin: a pickle is never read"):
        delora.load(pickle, base=golden)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        delora.load(shared / "golden" / "peft" / "lora_r4", base=tmp_path / "nowhere")
    with pytest.raises(UserError, match="made over other weights: the norms of"):
        delora.load(shared / "golden" / "peft" / "delora", base=checkpoints("roberta"))
    with pytest.raises(UserError, match=r"its base bert.* has no place for classifier.dense.bias"):
        delora.load(shared / "golden" / "peft" / "lora_r4", base=checkpoints("bert"))
    with pytest.raises(UserError, match=r"does not fit its base base: .*layer.7"):
        elsewhere = {f"base_model.model.{LAYER}.7.output.dense.lora_{key}.weight": torch.ones(4, 4) for key in "AB"}
        delora.load(altered(shared / "golden" / "peft" / "lora_r4", tmp_path / "elsewhere", {}, elsewhere), base=golden)
    headless = altered(shared / "golden" / "peft" / "lora_r4", tmp_path / "headless")
    held = load_file(headless / "adapter_model.safetensors")
    save_file({n: t for n, t in held.items() if "classifier" not in n}, headless / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"neither it nor its base .* holds classifier"):
        delora.load(headless, base=checkpoints("roberta"))


@pytest.mark.parametrize("method", ["lora", "delora", "vera", "ia3"])
def test_training_begins_with_an_adapter_of_pefts(method, checkpoints, tmp_path):  # noqa: F811
    """Its distances from the frozen weights are the first ones, its head scores before training."""
    words = ["model=roberta_base", f"model.source={checkpoints('roberta')}", "model.shape=null", *SMALL[1:], *FEW]
    words += [f"method={method}", f"output_dir={tmp_path}", "epochs=1", "warmup_ratio=0"]
    words += ["method.init=zero"] if method == "delora" else []
    [_] = run([compose_trial(*words, "name=first", "lr_factor=5", "protocol=standard")])
    delora.load(tmp_path / "first").save(tmp_path / "adapter", "peft")
    start = f"method.start={tmp_path}/adapter"
    [trial] = identified([compose_trial(*words, start, "name=again", "protocol=standard", "seed=7")])
    [result] = run([trial])
    assert result["made_by"]["start"]["sha256"] == trial.method.start_sha256
    before, after = (
        next(storage.read(tmp_path / "again").evaluations()),
        [*storage.read(tmp_path / "first").evaluations()][-1],
    )
    assert before["distance"] == pytest.approx(after["distance"], rel=1e-5) and min(before["distance"].values()) > 0
    assert before["loss"] == pytest.approx(after["loss"], rel=1e-4)


def test_the_head_is_a_start_where_labels_agree(checkpoints, tmp_path):  # noqa: F811
    fleet, _ = moved(checkpoints("roberta"), "method=lora", "task=cola")
    fleet.save(tmp_path / "adapter", "peft")
    adapter = peft_folder.read(tmp_path / "adapter")
    for task in ("cola", "mrpc"):
        begun, _ = moved(checkpoints("roberta"), "method=lora", f"task={task}", "seed=7")
        peft_folder.begin(begun, adapter)
        state, wanted = begun.trial_state(0), fleet.trial_state(0)
        name = "classifier.out_proj.weight"
        assert torch.equal(state[name], wanted[name]) == (task == "cola")
        assert all(torch.equal(state[name], wanted[name]) for name in wanted if ".method." in name)


def test_an_adapter_of_pefts_that_is_no_start_is_refused(minilm, tmp_path):
    delora.load(minilm / "mrpc").save(tmp_path / "adapter", "peft")
    words = ["model=minilm", *SMALL[1:], *FEW, f"method.start={tmp_path}/adapter", f"output_dir={tmp_path}/runs"]
    for more, told in (
        (["method=lora"], "method._target_: delora.methods.delora.DeLoRA → delora.methods.lora.LoRA"),
        (["method=delora"], "method.init: zero → residual"),
        (["method=delora", "method.init=zero", "method.rank=4"], "method.rank: 8 → 4"),
    ):
        with pytest.raises(UserError, match=told):
            identified([compose_trial(*words, *more)])
    trial = compose_trial(*words, "method=delora", "method.init=zero", "method.targets=[key]")
    with pytest.raises(UserError, match=r"its adapter does not fit method\.targets: "):
        run([trial])
    assert not (tmp_path / "runs").exists()
