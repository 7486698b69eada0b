"""Rows of one's own: every kind of file gives the same rows, what they say is found out, and what is wrong is told."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from conftest import compose_trial
from small_hub import fresh, serve

import delora
from delora import metrics, storage
from delora.data import Rows, files, hash_of
from delora.errors import UserError
from delora.missing import identified
from delora.tasks import Task

ROWS = [
    (f'a "good" film,\nno. {i}' if i % 2 else f"ein schwacher Film {i} – naja", ("neg", "pos")[i % 2])
    for i in range(40)
]
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files._read.cache_clear()


def quoted(*fields: object, separator: str = ",") -> str:
    return separator.join('"' + str(field).replace('"', '""') + '"' for field in fields) + "\n"


def table(rows=ROWS, separator=",", header=("text", "label")) -> str:
    return "".join(quoted(*row, separator=separator) for row in (header, *rows))


def lines(rows=ROWS) -> str:
    return "".join(json.dumps({"label": label, "more": [1], "text": text}) + "\n" for text, label in rows)


def write(kind: str, folder: Path, rows=ROWS) -> Path:
    """The rows in a file, or a folder, of a kind."""
    path = folder / f"rows.{kind}"
    if kind.endswith("gz"):
        path.write_bytes(gzip.compress(table(rows).encode()))
    elif kind in ("csv", "tsv"):
        path.write_text(("\ufeff" if kind == "csv" else "") + table(rows, "," if kind == "csv" else "\t"), newline="")
    elif kind in ("jsonl", "ndjson"):
        path.write_text(lines(rows) + "\n")
    else:
        found = datasets.Dataset.from_dict({"text": [t for t, _ in rows], "label": [label for _, label in rows]})
        found.to_parquet(path) if kind == "parquet" else found.save_to_disk(path)
    return path


def read(train, **more):
    return files.read(name="own", train=str(train), **{"text": ["text"], "label": "label", **more})


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "jsonl", "ndjson", "parquet", "folder"])
def test_all_kinds_of_files_give_the_same_rows(kind, tmp_path):
    task, rows, _ = read(write(kind, tmp_path), validation=str(write("csv", tmp_path)))
    assert list(rows["train"].texts) == [(text,) for text, _ in ROWS]
    assert task.labels == ("neg", "pos") and rows["train"].labels.tolist() == [0, 1] * 20
    in_memory = {split: Rows([(text,) for text, _ in ROWS], np.arange(40) % 2) for split in ("train", "validation")}
    assert hash_of(task, rows) == hash_of(task, in_memory)


def test_rows_of_the_hub_and_of_its_cache(tmp_path):
    """With a configured split each; the second process has no network."""
    program = """
from delora.data import files
task, rows, cut = files.read(name="own", train="hub:me/films", test="hub:me/films", text=["text"], label="label")
print({name: len(split) for name, split in rows.items()}, rows["test"].texts[1], task.labels)
"""
    published = {
        f"{split}.csv": table(ROWS[:n]).encode() for split, n in (("train", 40), ("validation", 10), ("test", 6))
    }

    def run(endpoint: str) -> str:
        environment = fresh(tmp_path / "home", endpoint)
        return subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)

    with serve("datasets/me/films", published) as hub:
        found = run(hub.address)
    assert found == f"{ {'train': 40, 'validation': 10, 'test': 6} } {(ROWS[1][0],)!r} ('neg', 'pos')\n"
    assert run(hub.address) == found


@pytest.mark.parametrize("name", ["films.csv.parquet", "films.csv"])
def test_a_name_that_holds_another_kind_s_suffix_misleads_nobody(name, tmp_path):
    write("parquet" if name.endswith("parquet") else "folder", tmp_path).rename(tmp_path / name)
    _, rows, _ = read(tmp_path / name, validation=str(write("csv", tmp_path)))
    assert list(rows["train"].texts) == [(text,) for text, _ in ROWS]


def test_a_folder_s_own_splits_are_taken(tmp_path):
    rows = datasets.load_from_disk(str(write("folder", tmp_path)))
    datasets.DatasetDict({"train": rows, "dev": rows.select(range(8)), "test": rows.select(range(4))}).save_to_disk(
        tmp_path / "all"
    )
    assert {name: len(split) for name, split in read(tmp_path / "all")[1].items()} == {"train": 40, "validation": 8}
    assert len(read(tmp_path / "all", test=str(tmp_path / "all"))[1]["test"]) == 4


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        (["b", "a"], {}, ("a", "b")),
        ([True, False], {}, ("false", "true")),
        ([10, 2], {}, ("2", "10")),
        ([1.0, 0.0], {}, ("0", "1")),
        ([0.5, 1], {}, None),
        (list(range(21)), {}, None),
        (list(range(21)), {"kind": "classes"}, tuple(map(str, range(21)))),
        ([0, 1], {"kind": "regression"}, None),
        (["b", "a"], {"labels": ["b", "a"]}, ("b", "a")),
        (["1", "x"], {"kind": "classes"}, ("1", "x")),
    ],
)
def test_what_labels_mean_is_found_out(labels, given, expected, tmp_path):
    values = [labels[i % len(labels)] for i in range(42)]
    (tmp_path / "rows.jsonl").write_text(lines([(f"text {i}", value) for i, value in enumerate(values)]))
    task, rows, cut = read(tmp_path / "rows.jsonl", validation=str(tmp_path / "rows.jsonl"), **given)
    assert not cut and task.labels == expected
    assert ("regression" in files.describe(task, rows, "label", cut)) == (expected is None)
    found = rows["train"].labels.tolist()
    assert (
        found == pytest.approx([float(value) for value in values])
        if expected is None
        else (
            [expected[i] for i in found]
            == [str(int(v)).lower() if isinstance(v, float) else str(v).lower() for v in values]
        )
    )


def test_validation_is_cut_from_train_by_its_seed_and_of_each_label_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([(f"text {i}", "rare" if i % 10 == 0 else "often") for i in range(200)]))
    cuts = [read(path, seed=seed, share=0.25)[1] for seed in (0, 0, 1)]
    chosen = [list(cut["validation"].texts) for cut in cuts]
    assert chosen[0] == chosen[1] != chosen[2]
    for cut in cuts:
        assert np.bincount(cut["validation"].labels).tolist() == [45, 5]  # often, rare
        assert {*cut["train"].texts} | {*cut["validation"].texts} == {(f"text {i}",) for i in range(200)}
        assert len(cut["train"]) == 150


def changed(row: int, text: str = "fine", label: object = "pos") -> list:
    return [*ROWS[:row], (text, label), *ROWS[row:]]


FAULTS = {
    "rows.csv: no column txt (data.text); did you mean text?": (table(header=("text", "label")), {"text": ["txt"]}),
    "rows.csv: no column rating (data.label); rows.csv has the columns text, label": (table(), {"label": "rating"}),
    "data.text: which column holds the text? rows.csv has the columns text, label": (table(), {"text": None}),
    "data.label=text: it is a text column too": (table(), {"label": "text"}),
    "rows.csv: row 3, column text: an empty text": (table(changed(2, " ")), {}),
    "rows.csv: row 3, column label: no label": (table(changed(2, label="")), {}),
    "rows.csv: line 3: 3 fields, the header has 2: a text that holds the separator needs quotes": (
        "text,label\na,pos\nb, c,neg\n",
        {},
    ),
    "rows.csv: line 3: 1 fields, the header has 2": ("text,label\na,pos\nb\n", {}),
    "is a quote not closed?": ('text,label\na,pos\n"b,neg\n', {}),
    "rows.csv: line 3: not UTF-8": ("text,label\na,pos\nschön,neg\n".encode("latin1"), {}),
    "rows.csv: line 2: not a text file": ("text,label\na\0,pos\n", {}),
    "rows.csv: line 1: the column text is there twice": ("text,text,label\na,b,pos\n", {}),
    "rows.csv: the file is empty": ("", {}),
    "rows.csv: no rows": ("text,label\n", {}),
    "all 3 rows have the label x: there is nothing to learn": (table([("a", "x")] * 3), {}),
    "labels are texts and numbers: row 1 has 'neg', row 3 '7'": (table(changed(2, label="7")), {}),
    "rows.csv: row 1, column label: expected a number, found 'neg'": (table(), {"kind": "regression"}),
    "rows.csv: row 2, column label: label 'pos'; did you mean poss?": (table(), {"labels": ["neg", "poss"]}),
    "25 different labels in 25 rows": (table([(f"a{i}", f"b{i}") for i in range(25)]), {}),
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_is_wrong_is_told_with_file_row_and_column(told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, more = FAULTS[told]
    Path("rows.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read("rows.csv", **more)
    assert told in str(error.value)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_all_faults_of_all_files_are_told_together_and_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(table([("", "pos")] * 10))
    Path("b.jsonl").write_text('{oops\n{"text": 5, "label": "pos"}\n{"t": 1}\n[1]\n' + lines())
    with pytest.raises(UserError) as error:
        read("a.csv", validation="b.jsonl", test="c.csv")
    told = str(error.value).splitlines()
    assert told[:4] == [f"a.csv: row {i}, column text: an empty text" for i in (1, 2, 3)] + ["a.csv: 7 more such rows"]
    assert told[4].startswith("b.jsonl: line 1: not JSON") and "data.test=c.csv: no such file" in told[-1]
    Path("b.jsonl").write_text('{"text": 5, "label": "pos"}\n' + lines())
    with pytest.raises(UserError, match="row 1, column text: not a text: 5"):
        read("b.jsonl")


def test_labels_that_no_training_row_has_are_refused(tmp_path):
    path = write("csv", tmp_path)
    (tmp_path / "other.csv").write_text(table([("x", "neutral")]))
    with pytest.raises(UserError, match="row 1, column label: label 'neutral'; the labels are neg, pos"):
        read(path, validation=str(tmp_path / "other.csv"))
    with pytest.raises(UserError, match="validation rows have the label neutral, which no training row has"):
        read(path, validation=str(tmp_path / "other.csv"), labels=["neg", "pos", "neutral"])


def test_rows_that_are_in_train_too_are_counted(tmp_path):
    (tmp_path / "other.csv").write_text(table([*ROWS[:3], ("new", "pos")]))
    told = files.describe(*read(write("csv", tmp_path), validation=str(tmp_path / "other.csv"))[:2], "label", False)
    assert "3 of 4 validation rows are training rows too" in told and "neg 20, pos 20" in told


def own_trial(train: Path, *words: str):
    paths = [f"data.train='{train}'", "data.text=[text]", "data.label=label"]
    return compose_trial("task=own", "data=files", *paths, "model=tiny", "logger=none", "device=cpu", *words)


def test_rows_and_name_identify_a_trial_not_where_they_lie(tmp_path):
    (tmp_path / "moved").mkdir()
    first, moved, other = [tmp_path / name for name in ("rows.csv", "moved/rows.csv", "other.csv")]
    first.write_text(table())
    moved.write_text(table())
    other.write_text(table(changed(3)))
    ids = [identified([own_trial(path, "task.name=films")])[0].id for path in (first, moved, other)]
    assert ids[0] == ids[1] != ids[2] and ids[0].startswith("films-delora-")
    names = [own_trial(Path(path)).task.name for path in ("x/films.csv", "films/train.csv", "mrpc.csv", "hub:me/films")]
    assert names == ["films", "films", "mrpc-own", "films"]
    with pytest.raises(UserError, match=r"data\.sha256: the rows have"):
        identified([own_trial(first, f"data.sha256='{'0' * 64}'")])


# --- Metrics


def test_metrics_are_scikit_learn_s():
    random = np.random.RandomState(0)
    for classes, average in ((2, "binary"), (4, "macro")):
        labels, logits = random.randint(classes, size=200), random.randn(200, classes)
        predictions, chances = logits.argmax(1), scipy.special.softmax(logits, 1)
        prefix = "macro_" if classes > 2 else ""
        expected = {
            f"{prefix}f1": sklearn.metrics.f1_score(labels, predictions, average=average),
            f"{prefix}precision": sklearn.metrics.precision_score(labels, predictions, average=average),
            f"{prefix}recall": sklearn.metrics.recall_score(labels, predictions, average=average),
            "weighted_f1": sklearn.metrics.f1_score(labels, predictions, average="weighted"),
            "matthews": sklearn.metrics.matthews_corrcoef(labels, predictions),
            "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(labels, predictions),
            "kappa": sklearn.metrics.cohen_kappa_score(labels, predictions),
            "roc_auc": sklearn.metrics.roc_auc_score(
                labels, chances[:, 1] if classes == 2 else chances, multi_class="ovr"
            ),
        }
        task = Task("own", tuple("abcd"[:classes]), metrics=tuple(expected), headline=next(iter(expected)))
        metrics.require(task)
        assert metrics.score(task, predictions, labels, logits) == pytest.approx(expected, abs=1e-14)
    scores, found = random.randn(50), random.randn(50)
    task = Task("own", None, metrics=("r2", "mse", "mae", "rmse", "pearson"), headline="r2")
    metrics.require(task)
    mse = float(((scores - found) ** 2).mean())
    assert metrics.score(task, found, scores) == pytest.approx(
        {
            "r2": 1 - mse / float(scores.var()),
            "mse": mse,
            "mae": float(abs(scores - found).mean()),
            "rmse": math.sqrt(mse),
            "pearson": float(np.corrcoef(scores, found)[0, 1]),
        },
        abs=1e-13,
    )


SCRIPT = """
import datasets
import evaluate


class Errors(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        features = datasets.Features({"predictions": value, "references": value})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"right_of_hundred": 100 * sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def test_a_metric_of_evaluate_is_taken_by_name(tmp_path):
    folder = tmp_path / "errors"
    folder.mkdir()
    (folder / "errors.py").write_text(SCRIPT)
    task = Task("own", ("a", "b"), metrics=(str(folder), "accuracy"), headline=str(folder))
    metrics.require(task)
    found = metrics.score(task, np.array([0, 1, 1, 1]), np.array([0, 1, 0, 0]))
    assert found == {str(folder): 50.0, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("names", "labels", "told"),
    [
        (("f1",), 3, "of two labels, here are 3: macro_f1"),
        (("pearson",), 2, "not of classes"),
        (("accuracy",), 0, "not of a regression"),
        (("mse",), 0, "best when low"),
        (("acuracy",), 2, "did you mean accuracy"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(names, labels, told):
    with pytest.raises(UserError, match=told):
        metrics.require(Task("own", tuple("abc"[:labels]) or None, metrics=names, headline=names[0]))


# --- The whole way

TASK = """\
# @package _global_
# films, good or bad
defaults:
  - override /data: files

task:
  name: films
  labels: [neg, pos]
  metric: [macro_f1, accuracy]
data:
  train: rows.csv
  test: rows.csv
  text: [text]
  label: label
"""
METHOD = """\
from delora.methods.lora import LoRA


class Twice(LoRA):
    def delta(self, weight_OI):
        return super().delta(weight_OI)
"""


def test_task_method_and_encoder_of_one_s_own_live_in_folders_of_one_s_own(tmp_path):
    """With their names from the command line to the report; the package is left alone."""
    write("csv", tmp_path)
    lora, tiny = [(REPOSITORY / "conf" / path).read_text() for path in ("method/lora.yaml", "model/tiny.yaml")]
    twice = lora.replace("delora.methods.lora.LoRA", "my_methods.Twice").replace("name: lora", "name: twice")
    own = {"task/films": TASK, "method/twice": twice, "model/small": tiny.replace("name: tiny", "name: small")}
    for name, text in own.items():
        path = tmp_path / "my_conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "my_methods.py").write_text(METHOD)
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def run(module: str, *words: str) -> str:
        command = [sys.executable, "-m", module, *words]
        return subprocess.check_output(command, text=True, cwd=tmp_path, env=environment)

    small = ["model=small", "logger=none", "device=cpu", "epochs=1", "batch_size=8", "max_length=32"]
    run("delora.cli", "--config-dir", "my_conf", "-m", "task=films", "method=twice,lora", "name=mine", *small)
    found = {trial.result["config"]["method"]["name"]: trial for trial in storage.find(tmp_path / "outputs").trials}
    assert found.keys() == {"twice", "lora"}
    best = found["twice"].result["best"]
    predicted = delora.predictions(found["twice"].folder).query("split == 'test'")
    assert predicted["row"].tolist() == list(range(40)) and predicted["label"].tolist() == [label for _, label in ROWS]
    assert best["test"]["accuracy"] == (predicted["label"] == predicted["prediction"]).mean()
    assert set(best["test"]) == {"macro_f1", "accuracy"} and set(best["validation"]) >= {"macro_f1", "loss"}
    assert found["twice"].result["config"]["task"] == {
        "name": "films",
        "kind": "classes",
        "labels": ["neg", "pos"],
        "metric": ["macro_f1", "accuracy"],
    }
    sys.path.insert(0, str(tmp_path))
    try:
        from my_methods import Twice  # type: ignore[import-not-found]

        model = delora.load(found["twice"].folder, methods=[Twice])
        assert model.predict(["a film"]).names == ("neg", "pos")
        with pytest.raises(UserError, match="two texts, films takes one text a row"):
            model.predict([("a film", "another")])
    finally:
        sys.path.remove(str(tmp_path))
    told = run("delora.report.cli", str(tmp_path / "outputs" / "mine"), "--only", "table")
    assert "films" in told and "Split: the data's own test rows" in told and "macro_f1" in told
