"""Predicting with trials: in Python, by delora-predict, for GLUE's leaderboard; and what trials keep of their own."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import transformers
from conftest import FEW, METHODS, OFFLINE, SMALL, compose_trial

import delora
from delora import data, pretrained, storage
from delora.errors import UserError
from delora.model import Fleet
from delora.predict import Predictions, cli, mean, text_sha256
from delora.predict.submission import TESTS
from delora.sweep import run
from delora.tasks import TASKS

PAIRS = [("a long first text " * 3, "and a second"), ("short", "too"), ("x, y\nz", 'it "is"'), ("", "empty")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A sweep of tiny trials: MRPC with two seeds, MNLI, STS-B and CoLA with one; rates at which logits differ."""
    root = tmp_path_factory.mktemp("trained")
    words = [*SMALL, *FEW, "method=lora", "epochs=1", "lr_factor=30", f"output_dir={root}", "sweep=s"]
    tasks = {"mrpc1": ("mrpc", 1), "mrpc2": ("mrpc", 2), "mnli": ("mnli", 1), "stsb": ("stsb", 1), "cola": ("cola", 1)}
    run([compose_trial(*words, f"task={task}", f"seed={seed}", f"name={n}") for n, (task, seed) in tasks.items()])
    return root / "s"


def test_predictions_are_those_of_transformers_in_the_order_of_the_texts(trained, tmp_path):
    model = delora.load(trained / "mrpc1")
    made = model.predict(PAIRS, batch_size=3)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    model.merge().save_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for row, pair in enumerate(PAIRS):
        tokens = model.tokenizer(*pair, return_tensors="pt", truncation=True, max_length=64)
        with torch.inference_mode():
            logits = plain(**tokens).logits[0].double()
        np.testing.assert_allclose(made.logits[row], logits, rtol=0, atol=2e-6)
        np.testing.assert_allclose(made.probabilities[row], logits.softmax(0), rtol=0, atol=1e-6)
        assert made.labels[row] == plain.config.id2label[int(logits.argmax())]
    assert made.scores is None and len(made) == 4 and len({*made.logits[:, 0].round(6)}) == 4
    scores = delora.load(trained / "stsb").predict(PAIRS)
    assert scores.labels is None and scores.probabilities is None and scores.scores.shape == (4,)
    assert len(delora.load(trained / "cola").predict([])) == 0


def test_texts_that_do_not_fit_are_refused_and_cut_ones_told(trained, caplog):
    model = delora.load(trained / "mrpc1")
    for texts, told in (
        ("a text", "expected a list of texts"),
        ([("a", "b"), "c"], "row 1: one text, mrpc takes two texts a row"),
        ([("a", None)], r"row 0: expected a text or a pair of texts, not \('a', None\)"),
        ([("a", "b", "c")], "row 0: expected a text or a pair"),
    ):
        with pytest.raises(UserError, match=told):
            model.predict(texts)
    with pytest.raises(UserError, match="row 0: two texts, cola takes one text a row"):
        delora.load(trained / "cola").predict([("a", "b")])
    model.predict([("word " * 50, "b"), ("a", "b")])
    assert "1 of 2 texts are longer than max_length=64 tokens and were cut" in caplog.text


def test_the_mean_is_of_probabilities_and_of_scores():
    several = [Predictions(("a", "b"), np.log([[p, 1 - p]]) + 3) for p in (0.9, 0.2, 0.4)]
    np.testing.assert_allclose(mean(several).probabilities, [[0.5, 0.5]], rtol=1e-12)
    scores = [Predictions(None, np.array([[s]])) for s in (1.0, 4.0)]
    assert mean(scores).scores.tolist() == [2.5]


def test_predictions_are_those_of_a_pipeline_on_real_texts(shared):
    """MiniLM's, whose tokens have types, on pairs of RTE."""
    trial = compose_trial("model=minilm", "method=delora", "task=rte", f"data.dir={shared / 'glue'}", "device=cpu")
    encoder = pretrained.load(trial.model, trial.task.facts)
    model = Fleet(encoder.model, [trial], torch.device("cpu"), encoder.lacking).eval()
    model.tokenizer = encoder.tokenizer
    pairs = data.load(trial.task.facts, **trial.data.options()).splits["validation"].texts[:12]
    made = model.predict(pairs, batch_size=5)
    pipe = transformers.pipeline("text-classification", model.merge(), tokenizer=encoder.tokenizer, device="cpu")
    inputs = [dict(zip(("text", "text_pair"), pair, strict=True)) for pair in pairs]
    for row, theirs in enumerate(pipe(inputs, top_k=None, batch_size=4)):
        by_name = {one["label"]: one["score"] for one in theirs}
        expected = [by_name[name] for name in ("entailment", "not_entailment")]
        np.testing.assert_allclose(made.probabilities[row], expected, rtol=0, atol=1e-5)
        assert made.labels[row] == theirs[0]["label"]


@pytest.mark.parametrize("method", METHODS)
def test_all_of_a_model_goes_to_another_device(method):
    trial = compose_trial(*SMALL, f"method={method}")
    encoder = pretrained.load(trial.model, trial.task.facts)
    model = Fleet(encoder.model, [trial], torch.device("cpu"), encoder.lacking).to("meta")
    held = [vars(module) for module in model.modules()]
    held += [values[kind] for values in held for kind in ("_parameters", "_buffers")]
    left = [name for values in held for name, t in values.items() if isinstance(t, torch.Tensor) and not t.is_meta]
    assert not left and model.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree(trained):
    here = delora.load(trained / "mrpc1").predict(PAIRS).logits
    for there in (delora.load(trained / "mrpc1", device="cuda"), delora.load(trained / "mrpc1").to("cuda")):
        assert there.device.type == "cuda"
        np.testing.assert_allclose(there.predict(PAIRS).logits, here, rtol=0, atol=1e-4)


def test_a_trial_keeps_its_predictions_with_rows_texts_and_labels(trained):
    for name, splits in (("mrpc1", ("validation", "test")), ("mnli", ("validation", "test", "mismatched"))):
        task, table = TASKS[name[:4]], delora.predictions(trained / name)
        assert list(table) == ["split", "row", "text_sha256", "label", "prediction", "probability"]
        assert tuple(table.split.unique()) == splits
        dataset = data.load(task, source="synthetic", rows={"train": 16, "validation": 16}, seed=0)
        again = delora.load(trained / name)
        for split, part in table.groupby("split"):
            rows = dataset.splits["validation_mismatched" if split == "mismatched" else "validation"]
            texts = [rows.texts[row] for row in part.row]
            assert part.label.tolist() == [task.labels[rows.labels[row]] for row in part.row]
            assert part.text_sha256.tolist() == [text_sha256(pair) for pair in texts]
            made = again.predict(texts)
            assert part.prediction.tolist() == made.labels
            np.testing.assert_allclose(part.probability, made.probabilities.max(1), rtol=0, atol=1e-6)
        in_two = table[table.split != "mismatched"].row
        assert sorted(in_two) == list(range(16))  # the paper's two halves
        right = (table.label == table.prediction)[table.split == "test"].mean()
        assert right == pytest.approx(storage.read(trained / name).result["best"]["test"]["accuracy"])
    scores = delora.predictions(trained / "stsb")
    assert scores.probability.isna().all() and scores.label.between(0, 5).all()
    assert text_sha256(["test1"]) == "1b4f0e9851971998"


def test_predictions_without_rows_are_read(trained, tmp_path):
    """Of trials of earlier versions."""
    stored = storage.read(trained / "mrpc1")
    tensors = {name: t for name, t in stored.tensors(storage.PREDICTIONS, "pt").items() if "." not in name}
    (tmp_path / "result.json").write_text(json.dumps(storage.without_hashes(stored.result)))
    import safetensors.torch

    safetensors.torch.save_file(tensors, tmp_path / storage.PREDICTIONS)
    old, new = delora.predictions(tmp_path), delora.predictions(trained / "mrpc1")
    assert old.row.isna().all() and old.label.isna().all() and old.text_sha256.isna().all()
    pandas.testing.assert_frame_equal(old[["split", "prediction", "probability"]], new[[*old.columns[[0, 4, 5]]]])


# --- delora-predict


def write_inputs(folder: Path) -> list[str]:
    """The pairs in each kind of file, by their names; TSV cannot hold all of them."""
    rows = [{"id": str(i), "a": a, "b": b} for i, (a, b) in enumerate(PAIRS)]
    table = pandas.DataFrame(rows)
    table.to_csv(folder / "x.csv", index=False)
    table.to_parquet(folder / "x.parquet")
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["x.csv", "x.parquet", "x.jsonl"]


def test_every_kind_of_file_gives_the_same_lines(trained, tmp_path, capsysbinary):
    names = write_inputs(tmp_path)
    outputs = []
    for name in names:
        arguments = [str(trained / "mrpc1"), str(trained / "mrpc2"), str(tmp_path / name), "--text", "a", "b"]
        assert cli.main([*arguments, "-o", str(tmp_path / "o.csv")]) == 0
        outputs.append((tmp_path / "o.csv").read_text())
    assert len({*outputs}) == 1
    assert cli.main([*arguments, "-o", str(tmp_path / "o.jsonl")]) == 0
    capsysbinary.readouterr()
    assert cli.main([str(trained), *arguments[2:], "--task", "mrpc"]) == 0  # the seeds of the sweep's best config
    output = capsysbinary.readouterr()
    assert output.out.decode() == outputs[0] and b"the mean of the probabilities of 2 trials" in output.err
    expected = np.mean([delora.load(trained / n).predict(PAIRS).probabilities for n in ("mrpc1", "mrpc2")], axis=0)
    labels = TASKS["mrpc"].labels
    found = list(csv.DictReader(io.StringIO(outputs[0])))
    assert [row["row"] for row in found] == ["0", "1", "2", "3"]
    for row, line, probabilities in zip(found, (tmp_path / "o.jsonl").read_text().splitlines(), expected, strict=True):
        shares = [float(row[f"p({label})"]) for label in labels]
        np.testing.assert_allclose(shares, probabilities, rtol=0, atol=1e-6)
        assert row["label"] == labels[probabilities.argmax()]
        assert json.loads(line) == {
            "row": int(row["row"]),
            "label": row["label"],
            "probabilities": dict(zip(labels, shares, strict=True)),
        }


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", "one\n\nthree 'quoted\"\r\n", []),
        ("x.tsv", "n\ttext\n1\tone\n2\t\n3\tthree 'quoted\"\n", ["--text", "text"]),
        ("-", 'text,n\none,1\n"",2\n"three \'quoted""",3\n', ["--text", "text"]),
        ("-", '{"text": "one"}\n{"text": ""}\n{"text": "three \'quoted\\""}\n', ["--text", "text"]),
        ("-", "one\n\nthree 'quoted\"\n", []),
    ],
    ids=["txt", "tsv", "stdin-csv", "stdin-jsonl", "stdin-txt"],
)
def test_single_texts_from_files_and_standard_input(trained, tmp_path, monkeypatch, capsysbinary, name, content, words):
    if name == "-":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    else:
        (tmp_path / name).write_bytes(content.encode())
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(trained / "cola"), name, *words]) == 0
    lines = capsysbinary.readouterr().out.decode().splitlines()
    made = delora.load(trained / "cola").predict(["one", "", "three 'quoted\""])
    shares = [",".join(map(str, row)) for row in made.probabilities.round(6).tolist()]
    assert lines == [
        "row,label,p(unacceptable),p(acceptable)",
        *(f"{i},{label},{share}" for i, (label, share) in enumerate(zip(made.labels, shares, strict=True))),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words", "told"),
    [
        (
            "x.csv",
            b"id,text\n1,a\n",
            ["--text", "txet"],
            "x.csv, line 1: no column txet; did you mean text? (columns: id",
        ),
        ("x.csv", b"id,text\n1,a\n2\n", ["--text", "text"], "x.csv: line 3: 1 fields, the header has 2"),
        ("x.csv", b'id,text\n1,"a\nb"\n1,a,b\n', ["--text", "text"], "x.csv: line 4: 3 fields, the header has 2"),
        (
            "x.csv",
            b'id,text\n1,"a\n2,b\n',
            ["--text", "text"],
            "x.csv: line 3: unexpected end of data: is a quote",
        ),
        ("x.csv", b"id,text\n1,a\n2,caf\xe9\n", ["--text", "text"], "x.csv: line 3: not UTF-8"),
        ("x.csv", "text\na\n".encode("utf-16"), ["--text", "text"], "x.csv: line 1: not UTF-8"),
        ("x.csv", b"text,text\na,b\n", ["--text", "text"], "the column text is there twice"),
        ("x.csv", b"", ["--text", "text"], "x.csv: the file is empty"),
        ("x.csv", b"id,text\n", ["--text", "text"], "x.csv: holds no row"),
        ("x.csv", b"id,text\n1,a\n", [], "x.csv: --text COLUMN says which column"),
        ("x.csv", b"id,text\n1,a\n", ["--text", "id", "text"], "row 0: two texts, cola takes one text"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": null}\n',
            ["--text", "text"],
            "x.jsonl, row 2, column text: expected text",
        ),
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', ["--text", "text"], "x.jsonl: line 2: not JSON"),
        ("x.parquet", b"PAR0", ["--text", "text"], "x.parquet: cannot be read"),
        ("x.txt", b"a\n", ["--text", "text"], "--text is for .csv"),
        ("x.txt", b"a\n", ["-o", "o.xls"], "-o o.xls: expected a file that ends in .csv or .jsonl"),
        ("x.txt", b"a\n", ["-o", "no/o.csv"], "-o no/o.csv: there is no folder no"),
        ("x.txt", b"a\n", ["--device", "cuda:77"], "device=cuda:77 cannot be used here"),
        ("x.txt", None, [], "x.txt: cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_an_earlier_output(
    trained, tmp_path, monkeypatch, capsys, name, content, words, told
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    Path("o.csv").write_text("earlier")
    before = sorted(os.listdir())
    words = words if "-o" in words else [*words, "-o", "o.csv"]
    assert cli.main([str(trained / "cola"), name, *words]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("delora-predict: error: ") and told in line
    assert sorted(os.listdir()) == before and Path("o.csv").read_text() == "earlier"


def test_trials_of_different_labels_or_encoders_are_refused(trained, tmp_path, capsys):
    write_inputs(tmp_path)
    stored = storage.without_hashes(storage.read(trained / "mrpc2").result)
    stored["config"]["model"]["shape"]["layers"] = 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text(json.dumps(stored))
    for folder, told in ((trained / "mnli", "have different labels"), (tmp_path / "other", "have different encoders")):
        arguments = [str(trained / "mrpc1"), str(folder), str(tmp_path / "x.csv"), "--text", "a", "b"]
        assert cli.main(arguments) == 2
        assert told in capsys.readouterr().err
    assert cli.main([str(trained), str(tmp_path / "x.csv"), "--text", "a", "b"]) == 2
    assert "several tasks, say which task: cola, mnli, mrpc, stsb" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(trained, tmp_path):
    (tmp_path / "x.txt").write_text("text\n" * 5000)  # more than a pipe holds
    line = f"{sys.executable} -m delora.predict.cli {trained / 'cola'} {tmp_path / 'x.txt'} | head -n 2"
    line = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    answer = subprocess.run(line, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and "error" not in answer.stderr.lower(), answer.stderr
    assert answer.stdout.startswith("row,label,p(unacceptable),p(acceptable)\n0,")


def test_ctrl_c_writes_nothing_and_ends_with_130(trained, tmp_path):
    line = [sys.executable, "-m", "delora.predict.cli", str(trained / "cola"), "-", "-o", str(tmp_path / "o.csv")]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stderr=pipe, text=True, env=os.environ | OFFLINE) as process:
        told = process.stderr.readline()  # which trial it takes; then it waits for texts
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "cola, lora, seed 1" in told and process.returncode == 130
    assert errors == "delora-predict: interrupted; nothing was written\n" and not list(tmp_path.iterdir())


# --- GLUE's leaderboard

HEADERS = {  # of the files of the GLUE distribution
    "CoLA/test.tsv": "index\tsentence",
    "MRPC/test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B/test.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
    "MNLI/test_matched.tsv": "index\tpromptID\tpairID\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
    "\tsentence2_parse\tsentence1\tsentence2\tgenre",
    "diagnostic/diagnostic.tsv": "index\tsentence1\tsentence2",
}
HEADERS["MNLI/test_mismatched.tsv"] = HEADERS["MNLI/test_matched.tsv"]


def write_glue(root: Path) -> dict[str, list[tuple[str, ...]]]:
    """Test files of three rows in the official layout; the texts of each."""
    texts = {}
    for file, header in HEADERS.items():
        columns = header.split("\t")
        single = columns[-1] == "sentence"
        some = [(f'He "said {file} {i}',) if single else (f"first {i} of {file}", f'a "second {i}') for i in range(3)]
        places = [i for i, name in enumerate(columns) if re.fullmatch(r"sentence[12]?|#\d String", name)]
        lines = [header]
        for i, row in enumerate(some):
            fields = [str(i), *["?"] * (len(columns) - 1)]
            for place, text in zip(places, row, strict=True):
                fields[place] = text
            lines.append("\t".join(fields))
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("\n".join(lines) + "\n")
        texts[file] = some
    return texts


def test_a_submission_holds_each_task_s_file_as_the_leaderboard_wants_it(trained, tmp_path, capsys):
    texts = write_glue(tmp_path / "glue")
    arguments = [str(trained), "--glue", str(tmp_path / "glue"), "-o", str(tmp_path / "s.zip")]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().err
    assert (
        "no trial of sst2, qqp, qnli, rte, wnli is done: without SST-2.tsv, QQP.tsv, QNLI.tsv, RTE.tsv, WNLI.tsv"
        in told
    )
    assert "mrpc: lora in " in told and "2 seeds, trained on synthetic data" in told
    assert "MRPC/test.tsv: 3 rows, GLUE's 1,725" in told
    with zipfile.ZipFile(tmp_path / "s.zip") as packed:
        found = {name: packed.read(name).decode().splitlines() for name in packed.namelist()}
    assert {*found} == {"AX.tsv", "CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "MRPC.tsv", "STS-B.tsv"}
    trials = {"cola": ["cola"], "mrpc": ["mrpc1", "mrpc2"], "mnli": ["mnli"], "stsb": ["stsb"]}
    for test in TESTS:
        if test.name not in found:
            continue
        made = mean(delora.load(trained / name).predict(texts[test.file]) for name in trials[test.task])
        if made.scores is not None:
            values = [f"{min(max(score, 0), 5):.3f}" for score in made.scores]
        else:
            values = made.labels if test.task == "mnli" else [str(i) for i in made.logits.argmax(1)]
        assert found[test.name] == ["index\tprediction", *(f"{i}\t{value}" for i, value in enumerate(values))]
    before = (tmp_path / "s.zip").read_bytes()
    assert cli.main(arguments) == 0 and (tmp_path / "s.zip").read_bytes() == before


def test_faults_of_test_files_come_together_and_nothing_is_written(trained, tmp_path, capsys):
    write_glue(tmp_path / "glue")
    (tmp_path / "glue" / "MRPC" / "test.tsv").unlink()
    (tmp_path / "glue" / "CoLA" / "test.tsv").write_text("index\tsentence\n0\ta\nb\tc\n")
    (tmp_path / "glue" / "STS-B" / "test.tsv").write_text(HEADERS["STS-B/test.tsv"] + "\n0\tx\n")
    assert cli.main([str(trained), "--glue", str(tmp_path / "glue"), "-o", str(tmp_path / "s.zip")]) == 2
    told = capsys.readouterr().err
    assert "MRPC/test.tsv: cannot be read: No such file" in told
    assert "CoLA/test.tsv, line 3: index 'b', expected a whole number" in told
    assert "STS-B/test.tsv, line 2: 2 fields, none is sentence1 or sentence2, the header has 9" in told
    assert not (tmp_path / "s.zip").exists()
    for words, expected in (
        (["-o", "s.csv"], "--glue makes a .zip file"),
        (["--text", "a", "-o", "s.zip"], "neither --text nor --task"),
    ):
        assert cli.main([str(trained), "--glue", str(tmp_path / "glue"), *words]) == 2
        assert expected in capsys.readouterr().err
    assert cli.main([str(tmp_path), "--glue", str(tmp_path / "glue"), "-o", str(tmp_path / "s.zip")]) == 2
    assert "no trial of a task of GLUE is done" in capsys.readouterr().err
