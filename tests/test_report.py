"""Reports from results on disk. Expected numbers are worked out by hand, or by NumPy and SciPy beside the code."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import fake_trials
import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgb

from delora import storage
from delora.errors import UserError
from delora.report import curves, statistics, tables, trials
from delora.report.cli import main
from delora.report.statistics import Panel
from delora.tasks import TASKS


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Four methods, five factors, three seeds, with its report; not to be changed."""
    root = tmp_path_factory.mktemp("outputs") / "robust"
    fake_trials.sweep(
        root, methods=("lora", "dora", "delora", "etherplus"), factors=(0.25, 1, 4, 16, 32), seeds=(42, 43, 44)
    )
    assert main([str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """1,000 trials; not to be changed."""
    return fake_trials.sweep(tmp_path_factory.mktemp("outputs") / "many", tasks=fake_trials.TASKS)


def panels(root: Path) -> list[Panel]:
    return statistics.panels(trials.read([root]).trials)


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table's CSV, below the comment."""
    comment, *lines = path.read_text(encoding="utf-8").splitlines()
    assert comment.startswith("# ")
    return list(csv.DictReader(lines))


def score_rows(root: Path, model: str = "minilm") -> dict[str, dict[str, str]]:
    assert main([str(root), "--only", "table"]) == 0
    return {row["method"]: row for row in rows(root / "report" / f"scores-{model}-paper-glue.csv")}


# --- Trials


def test_a_trial_without_a_score_counts_as_guessing(tmp_path):
    fake_trials.write(tmp_path / "a", 0.9, seed=1)
    fake_trials.write(tmp_path / "b", None, seed=2, status="diverged")
    fake_trials.write(tmp_path / "c", 0.0, seed=1, task="cola")
    fake_trials.write(tmp_path / "d", None, seed=2, task="cola")  # Matthews of constant predictions
    mrpc, cola = panels(tmp_path)
    assert mrpc.curves[0].score_FS.tolist() == [[0.9, 279 / 408]]
    assert cola.curves[0].score_FS.tolist() == [[0.0, 0.0]]
    assert mrpc.curves[0].scoreless_FS.tolist() == cola.curves[0].scoreless_FS.tolist() == [[False, True]]


def test_a_task_of_ones_own_is_reported(tmp_path, capsys):
    """It is in no table of tasks; a metric without a longer name stands as it is."""
    own = {"name": "reviews", "labels": ["bad", "fair", "good"], "metric": ["macro_f1"]}
    for seed, score in enumerate((0.5, 0.7, None)):
        folder = fake_trials.write(tmp_path / str(seed), score, seed=seed, status="done" if score else "diverged")
        path = folder / "result.json"
        path.write_text(path.read_text().replace('"accuracy"', '"macro_f1"'))
        path = folder / "metrics.jsonl"
        path.write_text(path.read_text().replace('"accuracy"', '"macro_f1"'))
        fake_trials.change(folder, config__task=own, made_by__data__guessing=0.2)
    assert main([str(tmp_path)]) == 0
    (row,) = rows(tmp_path / "report" / "scores-minilm-paper-glue.csv")
    assert float(row["reviews"]) == pytest.approx(100 * (0.5 + 0.7 + 0.2) / 3)
    assert "Metric, in percent: macro_f1;" in capsys.readouterr().out
    unknown = fake_trials.write(tmp_path / "unknown", 0.5)
    fake_trials.change(unknown, config__task={"name": "reviews"})
    assert (unknown, "task 'reviews' scored by 'accuracy' is not known") in trials.read([tmp_path]).left_out


def test_a_trial_that_diverged_at_once_counts(tmp_path):
    fake_trials.write(tmp_path / "a", 0.9, seed=1)
    fake_trials.write(tmp_path / "b", None, seed=2, status="diverged", evaluations=0)
    (panel,) = panels(tmp_path)
    assert panel.curves[0].score_FS.tolist() == [[0.9, 279 / 408]]
    _, score_ES = curves.over_training(panel.curves[0], 0, "score", panel.floor)
    assert score_ES[:, 1] == pytest.approx(100 * 279 / 408)
    assert main([str(tmp_path), "--only", "page"]) == 0


def test_training_the_head_alone_is_a_reference(tmp_path):
    fake_trials.write(tmp_path / "a", 0.9)
    for name, factor, score, epochs in (("b", 1, 0.7, 10), ("c", 2, 0.72, 10), ("d", 1, 0.75, 20)):
        validation = {0.7: 0.5}.get(score, 0.6)
        path = fake_trials.write(tmp_path / name, score, validation, factor=factor, epochs=epochs) / "result.json"
        result = json.loads(path.read_text())
        result["config"]["method"]["name"] = "head"
        result["parameters"]["adapter"] = 0
        path.write_text(json.dumps(result))
    found = trials.read([tmp_path])
    (panel,) = made = statistics.panels(found.trials)
    of_heads = {"head only (epochs 10)": 0.72, "head only (epochs 20)": 0.75}
    assert panel.references() == {"guessing": 279 / 408, **of_heads}
    assert panel.references("validation") == {"guessing": 279 / 408, **{name: 0.6 for name in of_heads}}
    assert len(panel.trials) == 4
    assert [shown.label for shown in panel.curves] == ["LoRA"]
    assert not [row for table in tables.all_tables(made) for row in table.rows if "head" in row[0].text + row[1].text]
    assert any(
        "the edge of its grid, try higher rates: head only (epochs 10) at 0.0012 (factor 2)" in note
        for note in tables.notes(found, made)
    )


def test_score_is_the_protocols(tmp_path):
    fake_trials.write(tmp_path / "a", 0.9, validation=0.7)
    fake_trials.write(tmp_path / "b", 0.9, validation=0.7, protocol="standard")
    assert [(t.protocol, t.score) for t in trials.read([tmp_path]).trials] == [("paper", 0.9), ("standard", 0.7)]


def test_factors_and_rates(tmp_path):
    given = [
        ({"factor": 4.0}, ("LoRA", 4.0, 2.4e-3)),  # lr itself varied
        ({"method": "delora", "lr_factor": 0.25, "lr_factor_on": "all"}, ("DeLoRA", 0.25, 1.5e-3)),
        ({"method": "delora", "lr_factor": 1.0, "lr_factor_on": "all"}, ("DeLoRA", 1.0, 6e-3)),
        (
            {"method": "delora", "lr_factor": 8.0, "lr_factor_on": "adapter"},
            ("DeLoRA (factor on BA)", 8.0, 4.8e-2),
        ),
        ({"method": "delora", "lr_factor": 8.0, "lr_factor_on": "lambda"}, ("DeLoRA (factor on λ)", 8.0, 8e-2)),
    ]
    for i, (settings, _) in enumerate(given):
        fake_trials.write(tmp_path / str(i), 0.8, **settings)
    found = trials.read([tmp_path]).trials
    assert [(t.label, t.factor, pytest.approx(t.rate)) for t in found] == [expected for _, expected in given]


def test_trials_of_another_base_rate_are_another_variant(tmp_path):
    for lr, factor in itertools.product((6e-3, 2.4e-2), (1.0, 4.0)):
        fake_trials.write(tmp_path / f"{lr}-{factor}", 0.8, method="delora", lr=lr, lr_factor=factor)
    found = {(t.label, t.factor): t.rate for t in trials.read([tmp_path]).trials}
    assert found == {
        ("DeLoRA (lr 0.006)", 1): 6e-3,
        ("DeLoRA (lr 0.006)", 4): 2.4e-2,
        ("DeLoRA (lr 0.024)", 4): 2.4e-2,
        ("DeLoRA (lr 0.024)", 16): 9.6e-2,
    }


def test_variants_are_told_apart(tmp_path):
    fixed = fake_trials.config(method="dora")["method"] | {"train_magnitude": False}
    fake_trials.write(tmp_path / "a", 0.8, method="dora")
    (path := fake_trials.write(tmp_path / "b", 0.8, method="dora") / "result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": fake_trials.config() | {"method": fixed}}))
    fake_trials.write(tmp_path / "c", 0.8, method="delora-zero")
    fake_trials.write(tmp_path / "d", 0.8, epochs=5)
    fake_trials.write(tmp_path / "e", 0.8, epochs=10)
    labels = [t.label for t in trials.read([tmp_path]).trials]
    assert labels == ["DoRA", "DoRA (fixed magnitude)", "DeLoRA (zero)", "LoRA (epochs 5)", "LoRA (epochs 10)"]


def test_what_is_damaged_or_foreign_is_named_and_left_out(tmp_path, capsys):
    for name in ("good", "repeated", "cut", "foreign", "unfinished", "other-config", "no-rate", "no-metrics"):
        fake_trials.write(tmp_path / name, 0.9, seed={"good": 1, "repeated": 1}.get(name, 2))
    fake_trials.write(tmp_path / "failed", None, status="failed")
    (tmp_path / "cut" / "result.json").write_text('{"schema": 1, "id"')
    (tmp_path / "foreign" / "result.json").write_text('{"accuracy": 1.0}')
    (tmp_path / "unfinished" / "result.json").unlink()
    path = tmp_path / "other-config" / "result.json"
    path.write_text(path.read_text().replace('"epochs": 10, "batch_size"', '"epochs": "ten", "batch_size"'))
    path = tmp_path / "no-rate" / "result.json"
    path.write_text(path.read_text().replace('"lr": 0.0006, "seed"', '"lr": Infinity, "seed"'))
    (tmp_path / "no-metrics" / "metrics.jsonl").unlink()
    assert main([str(tmp_path), "--only", "page"]) == 0
    assert main([str(tmp_path), "--only", "table"]) == 0
    output = capsys.readouterr()
    left_out = {line for line in output.err.splitlines() if "left out" in line}
    for name, reason in {
        "cut": "Expecting",
        "foreign": "not a result of delora-run",
        "unfinished": "not finished",
        "failed": "failed",
        "other-config": "config has epochs=ten",
        "no-rate": "inf is not a learning rate",
        "no-metrics": "No such file",
        "repeated": "the same trial is in",
    }.items():
        assert any(f"/{name}" in line and reason in line for line in left_out), (name, left_out)
    assert len(left_out) == 8
    assert "| LoRA   |     0.074M |   1 | 90.0 |" in output.out
    assert "not a result of delora-run" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize("link", ["report", "report/index.html", "report/.index.html.tmp", "report/tables.md"])
def test_a_report_writes_through_no_link(tmp_path, link, capsys):
    place, elsewhere = tmp_path / "s" / link, tmp_path / "elsewhere"
    fake_trials.write(tmp_path / "s" / "a", 0.9)
    place.parent.mkdir(exist_ok=True)
    elsewhere.mkdir() if link == "report" else elsewhere.write_text("mine")
    place.symlink_to(elsewhere)
    status = main([str(tmp_path / "s")])
    if link == "report":
        assert status == 2 and "report is a link" in capsys.readouterr().err and not list(elsewhere.iterdir())
    else:
        assert status == 0 and elsewhere.read_text() == "mine" and not place.is_symlink()
        assert (tmp_path / "s" / "report" / "index.html").stat().st_size > 1000
    named = tmp_path / "named"  # by the user
    named.symlink_to(tmp_path / "s" / "b")
    (tmp_path / "s" / "b").mkdir()
    assert main([str(tmp_path / "s"), "--output", str(named), "--only", "table"]) == 0
    assert (tmp_path / "s" / "b" / "tables.md").exists()


def test_a_damaged_file_is_named(tmp_path, capsys):
    result = json.loads((fake_trials.write(tmp_path / "s" / "a", 0.9) / "result.json").read_text())
    with storage.open_trial(tmp_path / "s" / "b", {**result["config"], "seed": 2}) as folder:
        for line in (tmp_path / "s" / "a" / "metrics.jsonl").read_text().splitlines():
            folder.record(json.loads(line))
        folder.finish({**result, "config": folder.config})
    assert len(trials.read([tmp_path / "s"]).trials) == 2
    log = tmp_path / "s" / "b" / "metrics.jsonl"
    log.write_text(log.read_text().replace("0.6", "0.7", 1))
    assert main([str(tmp_path / "s"), "--only", "table"]) == 0
    assert f"{log}: damaged" in capsys.readouterr().err


def test_a_deleted_trial_is_missed(tmp_path, sweep):
    shutil.copytree(sweep, tmp_path / "robust")
    before = score_rows(tmp_path / "robust")["DeLoRA"]
    best = float(before["MRPC factor"])
    shutil.rmtree(tmp_path / "robust" / f"mrpc-delora-{best:g}-43")
    scores = [
        json.loads((sweep / f"mrpc-delora-{best:g}-{seed}" / "result.json").read_text())["best"]["test"]["accuracy"]
        for seed in (42, 43, 44)
    ]
    assert float(before["MRPC"]) == pytest.approx(100 * np.mean(scores))
    assert float(before["MRPC std"]) == pytest.approx(100 * np.std(scores, ddof=1))
    assert before["n"] == "3"
    for factor in fake_trials.FACTORS:  # the rates with three seeds would win over the one with two
        if factor != best:
            shutil.rmtree(tmp_path / "robust" / f"mrpc-delora-{factor:g}-43", ignore_errors=True)
    after = score_rows(tmp_path / "robust")["DeLoRA"]
    assert after["n"] == "2"
    assert float(after["MRPC"]) == pytest.approx(100 * np.mean([scores[0], scores[2]]))


def test_encoders_of_one_name_are_told_apart_by_their_weights(tmp_path):
    """Never merged, averaged or dropped as the same trial; the label says which."""
    for i, (source, sha256, score) in enumerate(
        [("a/mine", "1" * 64, 0.7), ("b/other", "2" * 64, 0.8), ("moved/mine", "1" * 64, 0.7)]
    ):
        folder = fake_trials.write(tmp_path / "by-source" / str(i), score)
        fake_trials.change(folder, made_by__weights={"source": source, "sha256": sha256})
    found = trials.read([tmp_path / "by-source"])
    assert {(t.model, t.score) for t in found.trials} == {("minilm (mine)", 0.7), ("minilm (other)", 0.8)}
    assert [reason for _, reason in found.left_out] == [f"the same trial is in {tmp_path / 'by-source'}"]
    made = statistics.panels(found.trials)
    assert [panel.curves[0].score_FS.tolist() for panel in made] == [[[0.7]], [[0.8]]]
    names = {table.name: table.title for table in tables.all_tables(made) if table.name.startswith("scores")}
    assert names["scores-minilm-mine-paper-glue"] == "Scores: minilm (mine), paper protocol"
    for i, sha256 in enumerate(("1234567890", "abcdefabcd")):
        folder = fake_trials.write(tmp_path / "by-hash" / str(i), 0.8, seed=i)
        fake_trials.change(folder, made_by__weights={"source": "same", "sha256": sha256})
    assert {t.model for t in trials.read([tmp_path / "by-hash"]).trials} == {"minilm (12345678)", "minilm (abcdefab)"}
    for layers in (2, 4):
        model = {"name": "tiny", "random": True, "shape": {"layers": layers, "width": 32}}
        folder = fake_trials.write(tmp_path / "by-config" / str(layers), 0.8, model=model)
        fake_trials.change(folder, made_by__weights={"source": "random", "sha256": None})
    assert {t.model for t in trials.read([tmp_path / "by-config"]).trials} == {"tiny (layers 2)", "tiny (layers 4)"}


def test_the_same_weights_are_one_encoder_under_any_name(tmp_path):
    for i, name in enumerate(("minilm", "mine")):
        folder = fake_trials.write(tmp_path / str(i), 0.8, seed=i, model={"name": name})
        fake_trials.change(folder, made_by__weights__sha256="1" * 64)
    (panel,) = panels(tmp_path)
    assert panel.model == "minilm" and panel.curves[0].score_FS.shape == (1, 2)


def test_other_data_of_one_name_is_told_apart(tmp_path):
    for i, (task, sha256) in enumerate([("mrpc", "1" * 64), ("mrpc", "2" * 64), ("rte", "3" * 64)]):
        folder = fake_trials.write(tmp_path / str(i), 0.8, task=task)
        fake_trials.change(folder, made_by__data__sha256=sha256)
    found = trials.read([tmp_path])
    assert [(t.task, t.data) for t in found.trials] == [
        ("mrpc", "glue (11111111)"), ("mrpc", "glue (22222222)"), ("rte", "glue")]  # fmt: skip
    captions = [table.notes for table in tables.all_tables(statistics.panels(found.trials))]
    assert any("data GLUE (22222222)." in caption for caption in captions)


def test_overlapping_folders_count_once(sweep):
    assert len(trials.read([sweep, sweep / "mrpc-lora-1-42", sweep / "."]).trials) == 60


# --- Tables


def test_published_rows_are_the_papers(shared):
    text = (shared / "paper" / "delora.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head = next(line for line in lines if line[0] == "method")
    columns = [name.lower().replace("-", "") for name in head[2:-1]]
    paper = {}
    for line in lines[lines.index(head) + 2 : lines.index(head) + 11]:
        scores = {task: [float(x) for x in cell.split("±")] for task, cell in zip(columns, line[2:-1], strict=True)}
        paper[line[0]] = (line[1], scores, float(line[-1]))
    ours = {row["name"]: (row["parameters"], row["scores"], row["average"]) for row in statistics.published()["rows"]}
    assert ours == paper
    epochs = next(line for line in lines if line[0] == "epochs")
    [published] = [row["epochs"] for row in statistics.published()["rows"] if "epochs" in row]
    assert published == dict(zip(columns, map(int, epochs[1:]), strict=True))
    for row in tables._published_rows(columns):
        assert row[-1].values[""] == pytest.approx(paper[row[0].text][2], abs=0.051)


@pytest.mark.parametrize(("task", "column"), [("mrpc", "Quality"), ("rte", "label"), ("sst2", "label")])
def test_guessing_is_the_most_frequent_class(shared, tmp_path, task, column):
    path = shared / "glue" / TASKS[task].folder / "dev.tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        labels = [row[column] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    share = max(map(labels.count, set(labels))) / len(labels)
    fake_trials.write(tmp_path / "a", 0.8, task=task)
    assert statistics.guessing(trials.read([tmp_path]).trials) == share


def test_only_the_same_encoder_stands_beside_published_rows(tmp_path):
    roberta = {"name": "roberta_base", "source": "FacebookAI/roberta-base"}
    scores = {"lora": [0.89, 0.91], "delora": [0.9, 0.9]}
    for (method, values), seed in itertools.product(scores.items(), (0, 1)):
        fake_trials.write(tmp_path / f"{method}-{seed}", values[seed], method=method, seed=seed, model=roberta)
        fake_trials.write(tmp_path / f"minilm-{method}-{seed}", 0.85, method=method, seed=seed)
        data = {"name": "synthetic", "seed": 0}
        fake_trials.write(tmp_path / f"s-{method}-{seed}", 0.8, method=method, seed=seed, model=roberta, data=data)
    made = {table.name: table for table in tables.all_tables(panels(tmp_path))}
    beside = made["scores-roberta_base-paper-glue".replace("_", "-")]
    by_method = {row[0].text: row for row in beside.rows}
    assert by_method["LoRA − published"][3].values[""] == pytest.approx(90.0 - 88.7)
    assert by_method["DeLoRA − published"][3].text.startswith("+1.0 [")
    assert by_method["DeLoRA (published)"][3].text == "89.0 ± 0.96"
    assert "Known to differ here: the seeds, the epochs." in beside.notes
    for name in ("scores-minilm-paper-glue", "scores-roberta-base-paper-synthetic"):
        assert [row[0].text for row in made[name].rows] == ["LoRA", "DeLoRA"]
    assert "not comparable" in made["published"].notes and "minilm" in made["published"].notes
    assert "synthetic, not GLUE's" in made["scores-roberta-base-paper-synthetic"].notes


@pytest.mark.parametrize(
    ("source", "comparable"),
    [
        ("FacebookAI/roberta-base", True),
        ("roberta-base", True),  # the hub's older name
        ("klue/roberta-base", False),
        ("./roberta-base", False),
        ("encoders/FacebookAI/roberta-base", False),
        ("FacebookAI/roberta-large", False),
        (None, False),
    ],
)
def test_only_the_published_checkpoint_itself_is_comparable(tmp_path, source, comparable):
    fake_trials.write(tmp_path / "a", 0.9, model={"name": "roberta_base", "source": source})
    assert tables.is_comparable(panels(tmp_path)) is comparable


def test_a_rate_chosen_by_another_rule_is_said_beside_published_rows(tmp_path):
    roberta = {"name": "roberta_base", "source": "FacebookAI/roberta-base"}
    for factor in (1, 2):
        fake_trials.write(tmp_path / str(factor), 0.9, model=roberta, factor=factor)
    for select, differs in (("pooled", True), ("first-seed", False)):
        made = statistics.panels(trials.read([tmp_path]).trials, select=select)
        assert ("how the rate is chosen" in tables.all_tables(made)[0].notes) is differs


def test_other_options_are_not_the_published_method(tmp_path):
    roberta = {"name": "roberta_base", "source": "FacebookAI/roberta-base"}
    for name in ("lora", "delora-zero"):
        method = fake_trials.config(method=name)["method"] | {"rank": 16}
        path = fake_trials.write(tmp_path / name, 0.9, model=roberta) / "result.json"
        result = json.loads(path.read_text())
        result["config"]["method"] = method
        path.write_text(json.dumps(result))
    assert not [row for row in tables.all_tables(panels(tmp_path))[0].rows if "−" in row[0].text]


def test_the_best_cell_is_bold_and_one_task_has_no_average(tmp_path, capsys):
    for method, score in (("lora", 0.8), ("dora", 0.9), ("delora", 0.9001), ("etherplus", 0.7)):
        fake_trials.write(tmp_path / method, score, method=method)
    table = tables.all_tables(panels(tmp_path))[0]
    assert table.columns == ["method", "parameters", "n", "MRPC"]
    assert [row[3].text for row in table.rows if row[3].best] == ["90.0", "90.0"]  # as they are printed
    for form, bold in (("markdown", "| **90.0** |"), ("latex", r"& \textbf{90.0} \\"), ("csv", ",90,")):
        assert main([str(tmp_path), "--only", "table", "--format", form]) == 0
        assert bold in capsys.readouterr().out
    assert main([str(tmp_path), "--only", "page"]) == 0
    assert "<b>90.0</b></td>" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    fake_trials.write(tmp_path / "rte", 0.7, task="rte")
    assert tables.all_tables(panels(tmp_path))[0].columns[-2:] == ["RTE", "average"]


def test_published_numbers_that_do_not_compare_stand_behind_a_link(tmp_path, capsys):
    fake_trials.write(tmp_path / "a", 0.8)
    assert main([str(tmp_path)]) == 0 and main([str(tmp_path), "--only", "table"]) == 0
    assert "62.4" not in capsys.readouterr().out
    report = tmp_path / "report"
    text = (report / "tables.md").read_text(encoding="utf-8")
    assert "87.9 ± 0.91" not in text + (report / "tables.tex").read_text(encoding="utf-8")
    (link,) = re.findall(r"\[Published, roberta-base: another encoder or other data\]\((.*)\)", text)
    assert rows(report / link)[0]["MRPC"] == "87.9"
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "87.9 ± 0.91" in re.search("<details>.*</details>", page, re.DOTALL)[0]
    assert page.count("87.9 ± 0.91") == 1


def test_missing_cells_stay_visible(tmp_path):
    for task, method, seed in itertools.product(("mrpc", "rte"), ("lora", "delora"), (1, 2)):
        if (task, method) != ("rte", "delora") and (task, method, seed) != ("rte", "lora", 2):
            fake_trials.write(tmp_path / f"{task}-{method}-{seed}", 0.8, task=task, method=method, seed=seed)
    table = tables.all_tables(panels(tmp_path))[0]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["LoRA", "0.074M", "2", "80.0 ± 0.00", "80.0 (n=1)", "80.0"],
        ["DeLoRA", "0.074M", "2", "80.0 ± 0.00", "—", "—"],
    ]


def test_caption_states_the_protocol(sweep):
    caption = tables.all_tables(panels(sweep))[0].notes
    for fact in (
        "minilm",
        "test half",
        "accuracy",
        "Epochs 10",
        "length 256",
        "float32",
        "init residual",
        "42, 43, 44",
    ):
        assert fact in caption


def test_best_rate_on_the_edge_is_flagged(tmp_path, capsys):
    for factor, score in ((1, 0.8), (2, 0.85), (4, 0.9)):
        fake_trials.write(tmp_path / str(factor), score, factor=factor)
    assert main([str(tmp_path), "--only", "table"]) == 0
    output = capsys.readouterr()
    assert "the best rate is the edge of its grid, try higher rates: LoRA at 0.0024 (factor 4)\n" in output.err
    assert "4 (edge of the grid)" in output.out


def test_forms_hold_the_same_numbers(sweep, capsys):
    for form, pattern in {
        "markdown": r"\| DeLoRA +\|.*?\| +(?:\*\*)?([\d.]+) ± ([\d.]+)(?:\*\*)? \|",
        "latex": r"DeLoRA & [^&]+ & 3 & (?:\\textbf{)?([\d.]+) \$\\pm\$ ([\d.]+)}? \\",
        "csv": r"\nDeLoRA,73728,3,([\d.]+),([\d.]+),",
    }.items():
        assert main([str(sweep), "--only", "table", "--format", form]) == 0
        found = re.search(pattern, capsys.readouterr().out)
        assert found, form
        mean, std = map(float, found.groups())
        expected = score_rows(sweep)["DeLoRA"]
        capsys.readouterr()
        assert mean == pytest.approx(float(expected["MRPC"]), abs=0.05)
        assert std == pytest.approx(float(expected["MRPC std"]), abs=0.005)


def test_latex_is_escaped(sweep):
    text = (sweep / "report" / "tables.tex").read_text(encoding="utf-8")
    needs = "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n"
    assert text.count(needs) == text.count(r"\begin{table}")
    text = text.replace(needs, "")
    assert not re.search(r"(?<!\\)[&%#_](?![^\n]*\\\\)", text.replace("{%\n", "").replace("tab:", ""))
    assert text.count(r"\begin{tabular}") == text.count(r"\bottomrule") == text.count(r"\end{table}") > 3
    text.encode("ascii")  # the rest is LaTeX's own
    captions = re.findall(r"\\caption{(.*)}", text)
    assert captions[1] == "Scores: minilm, paper protocol." and all(c.count(".") == 1 for c in captions)


def test_a_long_table_is_cut_into_pages_of_latex():
    made = [[tables.Cell(f"task {i // 15}"), tables.Cell(f"row {i}")] for i in range(60)]
    table = tables.Table("long", "Long", "Said once.", ["task", "row"], made, rules=[15, 30, 45])
    parts = tables.latex(table).split(r"\begin{table}")[1:]
    rows = [re.findall(r"row \d+", part) for part in parts]
    assert [len(part) for part in rows] == [30, 30]
    assert [*itertools.chain(*rows)] == [row[1].text for row in made]
    assert [part.count("Said once.") + part.count(r"\label") for part in parts] == [2, 0]
    assert [part.count(r"\midrule") for part in parts] == [2, 2]  # below the head, and between two tasks


# --- Curves


def test_curves_show_every_trial_and_the_means(sweep):
    made = panels(sweep)
    axis = curves._by_rate(made, "factor", ("score", "drop")).axes[0]
    lines = {line.get_color(): line for line in axis.get_lines()}
    points = [collection for collection in axis.collections if isinstance(collection, PathCollection)]
    assert sum(len(collection.get_offsets()) for collection in points) == 60
    for shown in made[0].curves:
        line = lines[curves.known_styles()[shown.label].color]
        assert line.get_xdata().tolist() == [0.25, 1, 4, 16, 32]
        expected = []
        for factor in ("0.25", "1", "4", "16", "32"):
            scores = []
            for seed in (42, 43, 44):
                name = f"mrpc-{shown.label.lower().replace('+', 'plus')}-{factor}-{seed}"
                result = json.loads((sweep / name / "result.json").read_text())
                done = result["status"] == "done"
                scores.append(result["best"]["test"]["accuracy"] if done else 279 / 408)
            expected.append(100 * np.mean(scores))
        assert line.get_ydata() == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["", " (factor on BA)", " (zero, lambda init 4.0, epochs 100)"])
def test_the_legend_fits_the_picture(sweep, variant):
    made = panels(sweep)
    for shown in made[0].curves:
        shown.label += variant
    with matplotlib.rc_context(curves.RC):
        figure = curves._by_rate(made, "factor", ("score", "drop"))
        figure.draw_without_rendering()
        [legend] = figure.legends
        box = legend.get_window_extent()
        assert len(legend.get_texts()) == 5 and box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_distance_of_the_chosen_layers(tmp_path):
    fake_trials.write(tmp_path / "a", 0.8, factor=1, distance=2.0)
    fake_trials.write(tmp_path / "b", 0.8, factor=2, distance=3.0)
    n = len(fake_trials.LAYERS)
    for layer, scale in ((None, (n + 1) / 2), ("layer.1.attention.self.query", 3), ("query", (1 + n - 1) / 2)):
        (panel,) = statistics.panels(trials.read([tmp_path], layer).trials)
        assert curves.at_rates(panel.curves[0], "distance")[:, 0] == pytest.approx([2 * scale, 3 * scale])
    names = [name for name, _ in curves._pictures([panel], "layer.1.*.query", None)]
    assert names[2:4] == ["distance_by_factor-layer.1.x.query", "training-layer.1.x.query"]


def test_methods_without_a_distance_are_named(tmp_path):
    """Their hidden states change all the same."""
    for factor in (1, 2):
        fake_trials.write(tmp_path / f"a{factor}", 0.8, factor=factor, method="lora")
        folder = fake_trials.write(tmp_path / f"b{factor}", 0.8, factor=factor, method="dora")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line | {"distance": {}} if line["kind"] == "evaluation" else line for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = statistics.panels(trials.read([tmp_path]).trials)
    drawn = {
        name: " ".join(" ".join(text.get_text() for text in figure.texts).split())
        for name, figure in curves._pictures(panels, None, None)
    }
    assert "without a distance. At the end of training. Without W′: DoRA." in drawn["distance_by_factor"]
    assert "Without W′" not in drawn["change_by_factor"] and "h′: after training" in drawn["change_by_factor"]
    changes = [curves.at_rates(curve, "change") for curve in panels[0].curves]
    assert len(changes) == 2 and all((change > 0).all() for change in changes)


PICTURES = ("score_by_factor", "score_by_rate", "distance_by_factor", "change_by_factor", "training")


def test_pictures_are_whole(sweep):
    report = sweep / "report"
    for name in PICTURES:
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (report / f"{name}.pdf").read_bytes().rstrip().endswith(b"%%EOF")
        assert xml.etree.ElementTree.parse(report / f"{name}.svg").getroot().tag.endswith("svg")


def test_factors_on_the_axis():
    assert curves.labelled([0.25, 1, 4]) == [0.25, 1, 4]
    assert curves.labelled([2.0**i for i in range(-5, 7)]) == [2.0**i for i in range(-4, 7, 2)]  # with 1
    assert list(map(curves.factor_text, (1 / 16, 0.25, 0.3, 1, 32))) == ["1/16", "1/4", "0.3", "1", "32"]


def test_the_drop_from_the_best_stands_below_on_a_log_axis(tmp_path):
    """Failures do not set its axis: methods that a score's axis shows as one line are apart."""
    for method, dropped in (("lora", 0.81), ("delora", 0.895), ("etherplus", 0.899)):
        for factor, score in ((1, 0.9), (4, dropped), (16, 0.02)):
            name = f"{method}-{factor}"
            fake_trials.write(tmp_path / name, score, task="stsb", method=method, factor=factor)
    figure = curves._by_rate(panels(tmp_path), "factor", ("score", "drop"))
    score, drop = figure.axes
    assert score.get_yscale() == "linear" and drop.get_yscale() == "log"
    drawn = [line.get_ydata() for line in drop.get_lines() if len(line.get_xdata()) == 3]
    assert drawn == [pytest.approx([least, middle, 88]) for least, middle in ((0.1, 9), (0.1, 0.5), (0.1, 0.1))]
    figure.draw_without_rendering()
    assert "≤ 0.1" in [tick.get_text() for tick in drop.get_yticklabels()]


def test_two_seeds_are_drawn_without_a_band_and_n_is_said(tmp_path):
    for n, said, bands in (
        (2, "mean over 2 seeds, too few for an interval", 0),
        (3, "mean over 3 seeds, with its 95 %", 1),
    ):
        fake_trials.sweep(tmp_path / str(n), methods=("lora",), factors=(1, 4), seeds=range(n))
        figure = curves._by_rate(panels(tmp_path / str(n)), "factor", ("score",))
        text = " ".join(" ".join(text.get_text() for text in figure.texts).split())
        filled = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
        assert said in text and sum(path.vertices.size > 0 for c in filled for path in c.get_paths()) == bands


def test_titles_name_encoder_and_synthetic_data(tmp_path):
    data = {"name": "synthetic", "seed": 0}
    for task in ("mrpc", "rte"):
        fake_trials.write(tmp_path / task, 0.8, task=task, data=data)
    made = panels(tmp_path)
    assert curves.panel_titles(made) == ["MRPC, minilm, synthetic data", "RTE, minilm, synthetic data"]
    assert main([str(tmp_path), "--only", "page"]) == 0
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<h1>MRPC, RTE: minilm, synthetic data</h1>" in page
    shutil.rmtree(tmp_path / "rte")
    fake_trials.write(tmp_path / "glue", 0.8, task="rte")
    assert curves.panel_titles(panels(tmp_path)) == ["MRPC, minilm, synthetic data", "RTE, minilm, glue data"]


@pytest.fixture(scope="module")
def search(tmp_path_factory) -> Path:
    """A search: thirty configs that differ in many settings."""
    root = tmp_path_factory.mktemp("outputs") / "search"
    for i in range(30):
        own = {"epochs": 5 + i % 3, "batch_size": 8 + i, "warmup_ratio": i / 100, "max_length": 100 + i}
        for factor in (1, 2):
            fake_trials.write(root / f"{i}-{factor}", 0.7 + i / 200, factor=factor, **own)
        fake_trials.write(root / f"failed-{i}", None, status="failed")
        fake_trials.write(root / f"again-{i}", 0.7, factor=1, **own)
    return root


def test_notes_on_a_search_are_short(search):
    found = trials.read([search])
    made = tables.notes(found, statistics.panels(found.trials))
    assert len("\n".join(made)) < 4000 and max(map(len, made)) < 700, made
    assert any(note.startswith("left out: ") and note.endswith(" and 26 more: failed") for note in made)
    assert any(re.search(r"and 26 more: the same trial is in .*/search$", note) for note in made)
    assert any("methods differ in epochs: 7 (10 methods), 5 (10 methods), 6 (10 methods)" in note for note in made)
    assert any(note.endswith("methods differ in batch_size: 30 values") for note in made)


def test_a_picture_of_a_search_draws_the_best_beside_its_legend(search):
    with matplotlib.rc_context(curves.RC):
        name, figure = next(curves._pictures(panels(search), None, None))
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        heights = [axis.get_window_extent().height for axis in figure.axes]
    names = {text.get_text() for text in legend.get_texts()}
    assert name == "score_by_factor" and len(names) == curves.DRAWN + 1
    assert {f"batch size {8 + i}" for i in range(10, 30)} == {
        re.search(r"batch size \d+", n)[0] for n in names - {"guessing"}
    }
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and min(heights) > 0.2 * figure.bbox.height * 0.5
    assert all(axis.get_window_extent().y1 <= box.y0 for axis in figure.axes)
    text = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "Drawn are the 20 of 30 methods that are best on validation; the tables hold all." in text


def lightness(color: str) -> float:
    """CIE L* of a colour, 0 to 100: what a grey print keeps of it."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)])
    return float(116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16)


def test_lora_dora_and_delora_differ_in_grey():
    known = curves.known_styles()
    shades = sorted(lightness(known[label].color) for label in ("LoRA", "DoRA", "DeLoRA", "DeLoRA (zero)"))
    assert min(np.diff(shades)) > 15


def test_methods_differ_without_colour():
    look = curves.styles([*curves.known_styles(), *(f"new {i}" for i in range(12))])
    assert len({(style.marker, style.dash) for style in look.values()}) == 18
    assert len({style.marker for label, style in look.items() if label in curves.known_styles()}) == 6


def test_scores_over_training_are_drawn_at_one_factor(sweep, capsys):
    (panel,) = panels(sweep)
    lora = panel.curves[0]
    shown = curves.shown_factor(lora, 4.0)
    assert lora.factors_F[shown] == 4
    steps_E, score_ES = curves.over_training(lora, shown, "score", panel.floor)
    assert steps_E.tolist() == [115 * i for i in range(len(steps_E))]
    lines = (sweep / "mrpc-lora-4-42" / "metrics.jsonl").read_text().splitlines()
    evaluations = [json.loads(line) for line in lines if '"evaluation"' in line]
    assert score_ES[: len(evaluations), 0] == pytest.approx([100 * e["metrics"]["accuracy"] for e in evaluations])
    assert main([str(sweep), "--factor", "3"]) == 2
    assert "The factors are 0.25, 1, 4, 16, 32" in capsys.readouterr().err


# --- The command


def test_mistakes_are_explained(tmp_path, sweep, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(tmp_path / "empty")], "no finished trial"),
        ([str(sweep), "--range", "4", "1"], "the lower one first"),
        ([str(sweep), "--range", "1", "inf"], "two factors above 0"),
        ([str(sweep), "--range", "nan", "1"], "two factors above 0"),
        ([str(sweep), "--range", "-1", "1"], "two factors above 0"),
        ([str(sweep), "--range", "0", "1"], "two factors above 0"),
        ([str(sweep), "--factor", "0"], "--factor 0: no trial has it"),
        ([str(sweep), "--factor", "nan"], "--factor nan: no trial has it"),
        ([str(sweep), "--factor", "-1"], "--factor -1: no trial has it"),
        ([str(sweep), "--layer", "qurey"], "no layer is named so. The layers: encoder.layer.0"),
        ([str(sweep), "--output", str(tmp_path / "file" / "report")], "file is a file, not a folder"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("delora-report: error: ") or "no finished" in error
        assert message in error and "Traceback" not in error
    with pytest.raises(UserError):
        trials.read([tmp_path / "empty"])
    with pytest.raises(SystemExit) as stop:
        main([str(sweep), "--only", "picture"])
    assert stop.value.code == 2


def test_several_folders_share_a_report(tmp_path, capsys):
    fake_trials.write(tmp_path / "a" / "1", 0.8, seed=1)
    fake_trials.write(tmp_path / "b" / "2", 0.9, seed=2)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--only", "table"]) == 0
    assert str(tmp_path / "a" / "report" / "tables.md") in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert rows(tmp_path / "a" / "report" / "scores-minilm-paper-glue.csv")[0]["MRPC"] == "85"


def test_reports_import_no_torch_and_are_the_same_each_time(sweep, tmp_path):
    code = (
        "import sys; from delora.report.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or ', '.join({'torch', 'transformers', 'datasets'} & sys.modules.keys()) or 0)"
    )
    command = [sys.executable, "-c", code, str(sweep), "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in (*(f"{name}.svg" for name in PICTURES), "tables.md", "tables.tex"):
        assert (tmp_path / name).read_bytes() == (sweep / "report" / name).read_bytes()


def test_a_thousand_trials_are_read_in_seconds(many):
    start = time.perf_counter()
    found = trials.read([many])
    assert time.perf_counter() - start < 5
    assert len(found.trials) == 1000


HOSTILE = "a\x1b[2J\x07$x^$"
SHOWN = r"a\x1b[2J\x07$x^$"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Trials with escape codes, a formula, an infinite number; folders' names with some; half a character in one."""
    root = tmp_path_factory.mktemp("outputs")
    for i, factor in enumerate((1, 2)):
        folder = fake_trials.write(root / f"\x1b[2J\udcff{i}", 0.8 + i / 10, factor=factor)
        fake_trials.change(folder, config__model__name=HOSTILE, config__method__name=HOSTILE, made_by__cpu=HOSTILE,
                           made_by__weights__source=HOSTILE, seconds__total=math.inf, id=str(i))  # fmt: skip
        fake_trials.change(folder, config__precision=HOSTILE)
    fake_trials.write(root / "\x1b[31mred", None, status="failed")
    fake_trials.change(fake_trials.write(root / "\x1b[2Jhalf", 0.8), config__model__name="a\ud800b")
    return root


def report_on(hostile: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "delora.report.cli", str(hostile), *arguments]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert b"\x1b" not in run.stdout + run.stderr and SHOWN.encode() in run.stdout
    assert rb"\x1b[31mred: failed" in run.stderr
    assert rb"\x1b[2Jhalf/result.json: not a result of delora-run" in run.stderr
    return run


def test_nothing_raw_is_printed_or_written(hostile, tmp_path):
    report_on(hostile, "--output", str(tmp_path / "report"))
    for path in (tmp_path / "report").iterdir():
        if path.suffix in (".md", ".tex", ".csv", ".html", ".svg"):
            text = path.read_text(encoding="utf-8")
            assert "\x1b" not in text and "\x07" not in text, path
            if path.suffix == ".svg":
                xml.etree.ElementTree.fromstring(text)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    data = json.loads(re.search('id="data">(.*?)</script>', page)[1], parse_constant=pytest.fail)  # NaN, Infinity
    assert data["shared"]["made_by.cpu"] == SHOWN and "%1B%5B2J%FF0" in page


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_report_needs_no_encoding(hostile, tmp_path, environment):
    run = report_on(hostile, "--only", "table", "--output", str(tmp_path), **environment)
    assert rb"Tolerated: decades of learning rate around it within 1 point of its score; \u2265" in run.stdout


def test_help_and_mistakes_need_no_encoding(sweep):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for arguments, status, said in (
        (["--help"], 0, "LOW HIGH"),
        ([str(sweep / "\x1b[2J‖")], 2, r"\x1b[2J\u2016: no such folder"),
        ([str(sweep), "--layer", "λ"], 2, r"--layer \u03bb: no layer is named so"),
    ):
        command = [sys.executable, "-m", "delora.report.cli", *arguments]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (run.returncode, "Traceback" in run.stderr, "\x1b" in run.stderr) == (status, False, False)
        assert said in run.stdout + run.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_is_no_error(sweep, unbuffered):
    for arguments in (["--help"], [str(sweep), "--only", "table"]):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "delora.report.cli", *arguments]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        run = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert (run.returncode, run.stderr.count("Error")) == (0, 0)


# --- The page


def browse(page: Path, script: str, folder: Path, *more: str) -> dict:
    """Opens a page in a headless browser, runs a script that fills `out`, and returns `out`; fails on an error."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium or Chrome is installed: the page cannot be looked at")
    test_page = page.with_name(f"{page.stem}-tested.html")
    before = "<script>const out = {errors: []}; onerror = message => { out.errors.push(message); };</script>"
    after = f"<script>{script}\ndocument.body.replaceChildren(JSON.stringify(out));</script>"
    test_page.write_text(before + page.read_text(encoding="utf-8") + after, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [
        browser,
        *flags,
        *more,
        f"--user-data-dir={folder}",
        "--enable-logging=stderr",
        "--dump-dom",
        test_page.as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    test_page.unlink()
    assert "CONSOLE" not in run.stderr, run.stderr
    body = re.search(r"<body[^>]*>(.*)</body>", run.stdout, re.DOTALL)
    assert body, run.stdout[-500:] + run.stderr[-2000:]
    found = json.loads(body[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["errors"] == []
    return found


LOOK = """
const sections = [...document.querySelectorAll("section")];
out.ready = +document.documentElement.dataset.ready;
out.views = [...document.querySelectorAll("#views button")].map(button => button.textContent);
out.curves = {};
for (const button of document.querySelectorAll("#views button")) {
  button.click();
  const paths = [...document.querySelectorAll("#charts path")];
  out.curves[button.textContent] = {
    lines: document.querySelectorAll("#charts path.mean").length,
    trials: document.querySelectorAll("#charts [data-t]").length,
    broken: paths.filter(path => /NaN|Infinity|undefined/.test(path.getAttribute("d"))).length,
  };
}
document.querySelector("#views button").click();
const point = document.querySelector("#charts [data-t]");
point.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, clientX: 100, clientY: 100 }));
out.hint = document.getElementById("hint").hidden ? "" : document.getElementById("hint").textContent;
document.querySelector("#legend input").click();
out.withoutOne = document.querySelectorAll("#charts path.mean").length;
const table = sections.find(section => section.firstChild.textContent === "Trials");
const heads = [...table.querySelectorAll("th")];
const column = name => {
  const place = heads.findIndex(th => th.textContent === name);
  heads[place].firstChild.click();
  return [...table.querySelectorAll("tbody tr")].map(row => row.cells[place].textContent);
};
out.ascending = column("score");
out.descending = column("score");
out.methods = column("method");
const row = table.querySelector("tbody tr");
out.row = row.cells[2].textContent + " " + row.cells[5].textContent;
row.click();
const dialog = document.getElementById("trial");
out.open = dialog.open;
out.facts = Object.fromEntries([...dialog.querySelectorAll("tr")].map(tr => [...tr.cells].map(td => td.textContent)));
out.links = [...dialog.querySelectorAll("a")].map(a => a.getAttribute("href"));
"""


def test_page_works_in_a_browser(sweep, tmp_path):
    page = sweep / "report" / "index.html"
    found = browse(page, LOOK, tmp_path)
    assert found["views"] == ["score by factor", "score by rate", "drop by factor", "drop by rate",
                              "distance by factor", "distance by rate",
                              "change by factor", "change by rate",
                              "score over training", "distance over training", "change over training",
                              "λ over training",
                              "budget: validation by trials", "budget: validation by hours",
                              "budget: validation by epochs", "budget: test by trials", "budget: test by hours",
                              "budget: test by epochs"]  # fmt: skip
    assert found["curves"]["score by factor"] == {"lines": 4, "trials": 60, "broken": 0}
    lost = sum(trial.diverged for trial in trials.read([sweep]).trials)
    assert lost and found["curves"]["distance by factor"] == {"lines": 4, "trials": 60, "broken": 0}
    assert found["curves"]["score over training"] == {"lines": 4, "trials": 12, "broken": 0}
    assert found["curves"]["λ over training"]["lines"] == 1
    assert not any(view["broken"] for view in found["curves"].values())
    assert re.match(r"LoRA, seed 42\nlr 1.5e-4, done\nvalidation accuracy [\d.]+ %\ntest accuracy", found["hint"])
    assert found["withoutOne"] == 3
    scores = [float(text) for text in found["ascending"] if text != "—"]
    assert scores == sorted(scores) and len(found["ascending"]) == 60
    assert [float(text) for text in found["descending"] if text != "—"] == scores[::-1]
    lost = len(found["ascending"]) - len(scores)
    assert lost and found["descending"][-lost:] == ["—"] * lost
    assert found["methods"] == sorted(found["methods"])
    assert found["open"] and found["row"].startswith("DeLoRA")
    assert found["facts"]["config.method.lambda_init"] == "4" and found["facts"]["made_by.commit"] == "f" * 40
    assert found["facts"]["id"].startswith("mrpc-delora-")
    for link in found["links"]:
        assert (page.parent / link).exists(), link


NARROW = """
out.width = innerWidth;
out.page = document.documentElement.scrollWidth;
out.charts = Math.max(...[...document.querySelectorAll("#charts svg")].map(svg => svg.getBoundingClientRect().right));
document.querySelector("tr[data-t]").click();
const box = document.getElementById("trial").getBoundingClientRect();
out.dialog = [box.left, box.right];
"""


def test_the_page_fits_a_narrow_window(sweep, tmp_path):
    found = browse(sweep / "report" / "index.html", NARROW, tmp_path, "--window-size=400,800")
    assert found["width"] <= 500
    assert max(found["page"], found["charts"], found["dialog"][1]) <= found["width"] and found["dialog"][0] >= 0


def test_page_of_a_thousand_trials_is_fluid(many, tmp_path):
    assert main([str(many), "--only", "page"]) == 0
    page = many / "report" / "index.html"
    assert page.stat().st_size < 3e6
    found = browse(page, LOOK, tmp_path)
    assert found["ready"] < 2000
    assert found["curves"]["score by factor"]["trials"] == 1000


def test_page_needs_nothing_else(sweep):
    text = (sweep / "report" / "index.html").read_text(encoding="utf-8")
    assert "<!--FILL" not in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(|fetch\(|XMLHttpRequest""", text)


def test_names_cannot_break_the_page(tmp_path):
    model = {"name": "</script><b>&\"'", "source": "<!--FILL DATA-->"}
    fake_trials.write(tmp_path / "a #1%", 0.8, model=model)
    assert main([str(tmp_path), "--only", "page"]) == 0
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<b>" not in text
    assert 'href="../a%20%231%25/"' in text


@pytest.mark.parametrize(("published", "said"), [(None, True), (True, False), (False, False)])
def test_rows_whose_published_hash_is_not_known_are_noted(tmp_path, published, said):
    fake_trials.write(tmp_path / "one", 0.8)
    path = next(tmp_path.rglob("result.json"))
    result = json.loads(path.read_text())
    result["made_by"]["data"]["published"] = published
    path.write_text(json.dumps(result))
    found = trials.read([tmp_path])
    notes = tables.notes(found, statistics.panels(found.trials))
    assert any("the hash of the published ones is not known" in note for note in notes) is said
