"""GLUE's rows: from real TSV files and from ones with each fault, from real cache folders, and from a small hub
that runs here and speaks the hub's protocol."""

import csv
import http.server
import io
import shlex
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from small_hub import fresh, serve

from delora.data import Rows, glue, hash_of, hub, load, missing
from delora.errors import UserError
from delora.tasks import TASKS, Task

# The headers of the distribution's files (CoLA has none) and one row each, as it is written there.
FILES = {
    "cola": (None, "gj04\t0\t*\tHe it saw."),
    "sst2": ("sentence\tlabel", "a fine journey . \t1"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '0\t1\t2\t" One " said\tTwo said "'),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2012\t1\tnone\tnone\tOne.\tTwo.\t3.8",
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t8\t9\tWhy?\tHow?\t1"),
    "mnli": (
        "\t".join(
            ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"]  # noqa: RUF005
            + ["sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"]
        ),
        "0\t1\t1n\tg\t( A )\t( B )\t(S A)\t(S B)\tA.\tB.\tcontradiction\tneutral",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWho?\tHe.\tnot_entailment"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tentailment"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1"),
}
ROWS = {
    "cola": (("He it saw.",), 0),
    "sst2": (("a fine journey . ",), 1),
    "mrpc": (('" One " said', 'Two said "'), 0),
    "stsb": (("One.", "Two."), float(np.float32(3.8))),
    "qqp": (("Why?", "How?"), 1),
    "mnli": (("A.", "B."), 1),
    "qnli": (("Who?", "He."), 1),
    "rte": (("A.", "B."), 0),
    "wnli": (("A.", "B."), 1),
}


def small(name: str, rows: int = 4) -> Task:
    return replace(TASKS[name], rows=dict.fromkeys(TASKS[name].rows, rows), sha256={})


def lines(name: str, rows: int = 4) -> list[str]:
    header, row = FILES[name]
    return ([header] if header else []) + [row] * rows


def write(root: Path, task: Task, content: dict[str, bytes] | None = None) -> Path:
    """Writes good files, but `content` in place of those it names."""
    (root / task.folder).mkdir(parents=True, exist_ok=True)
    for split, rows in task.rows.items():
        good = "\n".join([*lines(task.name, rows), ""]).encode()
        (root / task.folder / task.file(split)).write_bytes((content or {}).get(task.file(split), good))
    return root


def as_hub(path: Path, task: Task) -> list[tuple[tuple[str, ...], float]]:
    """The rows of a TSV file by the rules of the script that made `nyu-mll/glue`, through Python's csv module."""
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        if task.name == "cola":
            records = [{"sentence": row[3], "label": row[1]} for row in csv.reader(file, "excel-tab", quoting=3)]
            text, label = ("sentence",), "label"
        else:
            records = list(csv.DictReader(file, dialect="excel-tab", quoting=csv.QUOTE_NONE))
            text, label = task.tsv_text, task.tsv_label
        for record in records:
            value = record[label]
            if task.labels is None:
                value = float(np.float32(value))
            elif value in task.labels:
                value = task.labels.index(value)
            else:
                value = int(value) if value else None
            if value is not None and all(record[name] is not None for name in text):
                rows.append((tuple(record[name] for name in text), value))
    return rows


def pairs(rows: Rows) -> list[tuple[tuple[str, ...], float]]:
    return list(zip(rows.texts, rows.labels.tolist(), strict=True))


def fault(task: Task, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(task, dir=str(root))
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- TSV files


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "rte"])
def test_real_files_give_the_hubs_rows(shared, name):
    task = TASKS[name]
    dataset = load(task, dir=str(shared / "glue"))
    assert dataset.source == "files" and dataset.published is True
    for split in task.rows:
        assert pairs(dataset.splits[split]) == as_hub(shared / "glue" / task.folder / task.file(split), task)
        assert dataset.splits[split].labels.dtype == (np.int64 if task.labels else np.float64)


@pytest.mark.parametrize("name", TASKS)
def test_every_tasks_layout(tmp_path, name):
    task = small(name)
    splits = load(task, dir=str(write(tmp_path, task))).splits
    mnli = ["train", "validation", "validation_mismatched"]
    assert list(splits) == (mnli if name == "mnli" else ["train", "validation"])
    assert all(pairs(rows) == [ROWS[name]] * 4 for rows in splits.values())


@pytest.mark.parametrize("name", ["cola", "mrpc"])
def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, name):
    task = small(name)
    plain = load(task, dir=str(write(tmp_path / "plain", task)))
    content = b"\xef\xbb\xbf" + "\r\n".join([*lines(name), ""]).encode()
    dressed = load(task, dir=str(write(tmp_path / "dressed", task, {"train.tsv": content, "dev.tsv": content})))
    assert dressed.sha256 == plain.sha256


def test_traps_of_qqp_are_read_as_the_hub_reads_them(tmp_path):
    content = [
        FILES["qqp"][0],
        '1\t2\t3\t"Is it?\tIs "it?\t1',
        "2\t3\t4\tbroken by a",  # a question that holds a line break, with its end on the next line
        'line break?"\tother\t0',
        "3\t4\t5\tDevelop?\t\t0",  # an empty question, as two of the published rows have
        "",
        "4\t5\t6\tNo label?\tNone?\t",
        "5\t6\t7\t\u00a0 blank \t two\u2028lines\t0",
        "6\t7\t8\tMore?\tFields?\t1\tthan\tnamed",
    ]
    task = small("qqp")
    path = write(tmp_path, task, {"train.tsv": "\n".join(content).encode()}) / "QQP" / "train.tsv"
    found = load(task, dir=str(tmp_path)).splits["train"]
    assert pairs(found) == as_hub(path, task)
    assert found.texts[1] == ("Develop?", "")


def damaged(name: str, line: int, new: str) -> bytes:
    """The file with one line (from 1) replaced."""
    good = lines(name)
    good[line - 1] = new
    return "\n".join([*good, ""]).encode()


FAULTS = {
    "empty file": ("mrpc", b"", "train.tsv: the file is empty"),
    "header alone": ("mrpc", FILES["mrpc"][0].encode(), "train.tsv: 0 full rows to line 1, expected 4"),
    "cut in a row": (
        "rte",
        b"\n".join([b"index\tsentence1\tsentence2\tlabel", b"0\tA.\tB.\tentailment", b"1\tA."]),
        "train.tsv: 1 full rows to line 3, expected 4 (rte train)\n{path}: line 3: 2 of 4 fields",
    ),
    "cut in the last text": (
        "mrpc",
        "\n".join(lines("mrpc")).encode()[:-4],
        "train.tsv: line 5: the file ends inside this line",
    ),
    "too many rows": ("wnli", "\n".join(lines("wnli", 5)).encode(), "5 full rows to line 6, expected 4"),
    "column missing": (
        "mrpc",
        b"#1 ID\t#2 ID\t#1 String\n",
        "line 1: no column #2 String and no Quality, expected a header with #1 String, #2 String, Quality, found '#1 ID",  # noqa: E501
    ),
    "a test file": ("qnli", b"index\tquestion\tsentence\n0\ta\tb\n", "line 1: no column label, expected"),
    "another task's file": ("sst2", "\n".join(lines("rte")).encode(), "line 1: no column sentence, expected"),
    "CoLA with a header": (
        "cola",
        damaged("cola", 1, "source\tlabel\tmark\tsentence"),
        "line 1: label 'label'",
    ),
    "label out of range": (
        "mrpc",
        damaged("mrpc", 3, "2\t1\t2\ta\tb"),
        "line 3: label '2', expected a whole number",
    ),
    "negative label": (
        "sst2",
        damaged("sst2", 2, "fine\t-1"),
        "line 2: label '-1', expected a whole number from 0 to 1",
    ),
    "label of another task": (
        "rte",
        damaged("rte", 4, "0\ta\tb\tneutral"),
        "line 4: label 'neutral', expected entailment or not_entailment",
    ),
    "score out of range": (
        "stsb",
        damaged("stsb", 2, FILES["stsb"][1][:-3] + "5.2"),
        "line 2: label '5.2', expected a",
    ),
    "score not a number": (
        "stsb",
        damaged("stsb", 2, FILES["stsb"][1][:-3] + "nan"),
        "line 2: label 'nan', expected",
    ),
    "no label": (
        "qnli",
        damaged("qnli", 5, "0\ta\tb\t"),
        "3 full rows to line 5, expected 4 (qnli train)\n{path}: line 5: no label",
    ),
    "empty sentence": (
        "mrpc",
        damaged("mrpc", 5, "1\t1\t2\t \tb"),
        "line 5: an empty text, expected a sentence",
    ),
    "binary": ("mrpc", b"\x1f\x8b\x08\x00" * 50, "line 1: not a text file"),
    "a binary line": ("rte", damaged("rte", 3, "0\ta\0\tb\tentailment"), "line 3: not a text file"),
    "not UTF-8": (
        "rte",
        damaged("rte", 4, "0\tä\tb\tentailment").decode().encode("latin-1"),
        "line 4: not a text file",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_named_with_file_line_and_expectation(tmp_path, what):
    name, content, expected = FAULTS[what]
    task = small(name)
    path = write(tmp_path, task, {"train.tsv": content}) / task.folder / "train.tsv"
    message = fault(task, tmp_path)
    assert expected.format(path=path) in message
    assert str(path) in message and "dev.tsv" not in message


def test_a_real_file_cut_in_half(shared, tmp_path):
    (tmp_path / "RTE").mkdir()
    data = (shared / "glue" / "RTE" / "train.tsv").read_bytes()
    (tmp_path / "RTE" / "train.tsv").write_bytes(data[: len(data) // 2])
    (tmp_path / "RTE" / "dev.tsv").write_bytes((shared / "glue" / "RTE" / "dev.tsv").read_bytes())
    assert "train.tsv: 1,2" in fault(TASKS["rte"], tmp_path) and "expected 2,490" in fault(TASKS["rte"], tmp_path)


def test_faults_of_several_files_and_lines_come_together(tmp_path):
    task = small("mnli", 9)
    bad = "\n".join([FILES["mnli"][0], *[FILES["mnli"][1] + "x"] * 9, ""]).encode()
    message = fault(task, write(tmp_path, task, {"train.tsv": bad, "dev_mismatched.tsv": b""}))
    assert "train.tsv: line 4: label 'neutralx', expected entailment or neutral or contradiction" in message
    assert "train.tsv: 6 more such lines" in message
    assert "dev_mismatched.tsv: the file is empty" in message


def test_a_folder_that_lacks_the_files(tmp_path):
    task = small("mrpc")
    root = write(tmp_path / "glue", task)
    assert missing(task, dir=str(root)) is None
    assert "there is no folder" in fault(task, tmp_path / "nowhere")
    assert "is not a folder" in fault(task, root / "MRPC" / "dev.tsv")
    assert f"give the folder above {root / 'MRPC'}" in fault(task, root / "MRPC")
    assert "holds no folder RTE (found MRPC)" in fault(small("rte"), root)
    (root / "MRPC").rename(root / "mrpc")
    (root / "RTE").mkdir()
    if not (root / "MRPC").exists():  # a file system that tells them apart
        assert "holds no folder MRPC (found mrpc)" in fault(task, root)
    (root / "RTE" / "train.txt").touch()
    assert "there is no train.tsv and no dev.tsv (found train.txt)" in fault(small("rte"), root)


def test_a_folder_in_place_of_a_file(tmp_path):
    task = small("rte")
    path = write(tmp_path, task) / "RTE" / "dev.tsv"
    path.unlink()
    path.mkdir()
    assert f"{path}: cannot be read" in fault(task, tmp_path)


def test_environment_names_the_folder(tmp_path, monkeypatch):
    task = small("rte")
    monkeypatch.setenv("DELORA_DATA", str(write(tmp_path, task)))
    assert load(task).source == "files" and missing(task) is None
    monkeypatch.setenv("DELORA_DATA", str(tmp_path / "nowhere"))
    assert "there is no folder" in (missing(task) or "")
    assert load(task, dir=str(tmp_path)).source == "files"


def test_synthetic_rows_are_named_as_such():
    dataset = load(TASKS["mnli"], source="synthetic", rows={"train": 6, "validation": 4}, seed=1)
    sizes = {split: len(rows) for split, rows in dataset.splits.items()}
    assert sizes == {"train": 6, "validation": 4, "validation_mismatched": 4}
    assert dataset.source == "synthetic" and missing(TASKS["mnli"], source="synthetic") is None


def test_the_hash_tells_rows_apart():
    def digest(texts, labels=(0, 1)):
        return hash_of(TASKS["rte"], {"train": Rows(texts, np.array(labels))})

    rows = [("ab", "c"), ("d", "e")]
    others = [[("a", "bc"), ("d", "e")], [("ab", "c"), ("d", "f")], rows[::-1]]
    assert digest(rows) == digest(list(rows))
    assert len({digest(rows), digest(rows, (1, 0)), *map(digest, others)}) == 5


@pytest.mark.parametrize("what", ["CSV quoting", "another order", "one label", "one letter of dev"])
def test_rows_that_are_as_many_as_glues_but_others_are_refused(shared, tmp_path, what):
    task = TASKS["rte"]
    (tmp_path / "RTE").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        header, *rows = (line.split("\t") for line in (shared / "glue" / "RTE" / name).read_text().splitlines())
        if what == "CSV quoting":
            rows = [[f'"{f.replace(chr(34), 2 * chr(34))}"' if '"' in f else f for f in row] for row in rows]
        if what == "another order" and name == "train.tsv":
            rows = rows[::-1]
        if what == "one label" and name == "train.tsv":
            rows[7][3] = next(label for label in task.labels if label != rows[7][3])
        if what == "one letter of dev" and name == "dev.tsv":
            rows[3][1] = rows[3][1][:-1]
        (tmp_path / "RTE" / name).write_text("".join("\t".join(row) + "\n" for row in (header, *rows)))
    message = fault(task, tmp_path)
    changed = "texts or labels were changed, or stand in another order"
    assert ("rewritten with CSV quoting" if what == "CSV quoting" else changed) in message
    assert ("rte train: " in message) == (what != "one letter of dev")
    assert ("rte validation: " in message) == (what not in ("another order", "one label"))


def test_where_the_published_rows_are_not_known_that_is_said(tmp_path):
    assert {name for name, task in TASKS.items() if not task.sha256} == {"qqp", "mnli", "qnli", "wnli"}
    assert load(TASKS["wnli"], dir=str(write(tmp_path, TASKS["wnli"]))).published is None
    assert load(TASKS["rte"], source="synthetic", rows={"train": 4, "validation": 4}).published is False


# ------------------------------------------------------------------------------------------------ cache and hub


def columns(name: str, rows: int, names: list[str] | None = None) -> datasets.Dataset:
    """A split as `nyu-mll/glue` has it."""
    task = TASKS[name]
    texts, label = ROWS[name]
    kind = datasets.ClassLabel(names=names or list(task.labels)) if task.labels else datasets.Value("float32")
    features = {
        **dict.fromkeys(task.text, datasets.Value("string")),
        "label": kind,
        "idx": datasets.Value("int32"),
    }
    data = {column: [text] * rows for column, text in zip(task.text, texts, strict=True)}
    data |= {"label": [label] * rows, "idx": list(range(rows))}
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def parquet(dataset: datasets.Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Empty Hugging Face caches, and a hub that is not asked."""
    monkeypatch.delenv("DELORA_DATA", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def put_parquet(cache: Path, name: str, split: str, data: bytes) -> None:
    folder = cache / "hub" / "datasets--nyu-mll--glue" / "snapshots" / ("a" * 40) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}-00000-of-00001.parquet").write_bytes(data)


@pytest.mark.parametrize("name", ["cola", "stsb", "mnli"])
def test_cached_parquet_gives_the_rows_of_the_files(cache, tmp_path, name):
    task = small(name)
    for split in task.rows:
        assert "HF_DATASETS_OFFLINE is set" in (missing(task) or "")
        put_parquet(cache, name, split, parquet(columns(name, 4)))
    assert missing(task) is None
    found = load(task)
    assert found.source == "cache"
    assert found.sha256 == load(task, dir=str(write(tmp_path, task))).sha256


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"not parquet", "cannot use"),
        (parquet(columns("rte", 3)), "3 rows, expected 4 (rte train)"),
        (
            parquet(columns("rte", 4, ["not_entailment", "entailment"])),
            "labels ['not_entailment', 'entailment']",
        ),
        (parquet(columns("sst2", 4)), "no column sentence1 and no sentence2"),
    ],
)
def test_a_cache_with_other_rows_is_refused(cache, data, expected):
    task = small("rte")
    put_parquet(cache, "rte", "train", data)
    put_parquet(cache, "rte", "validation", parquet(columns("rte", 4)))
    with pytest.raises(UserError) as caught:
        load(task)
    assert expected in str(caught.value) and "train-00000-of-00001.parquet" in str(caught.value)


@pytest.fixture(scope="module")
def wnli_hub():
    """A hub with WNLI in its full size."""
    splits = {split: parquet(columns("wnli", rows)) for split, rows in TASKS["wnli"].rows.items()}
    patterns = "".join(f"  - split: {split}\n    path: wnli/{split}-*\n" for split in splits)
    files = {f"wnli/{split}-00000-of-00001.parquet": data for split, data in splits.items()}
    files["README.md"] = f"---\nconfigs:\n- config_name: wnli\n  data_files:\n{patterns}---\n".encode()
    with serve("datasets/nyu-mll/glue", files) as hub:
        yield hub


LOAD = """
from delora.data import load
from delora.errors import UserError
from delora.tasks import TASKS
try:
    dataset = load(TASKS["wnli"])
    print(dataset.source, dataset.sha256)
except UserError as error:
    print(error)
"""


def load_apart(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", LOAD]
    return subprocess.check_output(command, env=environment, text=True, stderr=subprocess.PIPE, timeout=60)


def test_rows_come_from_the_hub_once_and_then_from_what_datasets_kept(wnli_hub, tmp_path):
    expected = load(TASKS["wnli"], dir=str(write(tmp_path, TASKS["wnli"]))).sha256
    environment = fresh(tmp_path / "home", wnli_hub.address)
    assert load_apart(environment).split() == ["hub", expected]
    (tmp_path / "home" / "hub").rename(tmp_path / "away")  # leaves the tables that `datasets` made
    environment["HF_HUB_OFFLINE"] = "1"
    assert load_apart(environment).split() == ["cache", expected]


def test_the_command_that_the_error_names_works(wnli_hub, tmp_path):
    environment = fresh(tmp_path / "home", wnli_hub.address)
    message = load_apart({**environment, "HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE is set" in message
    command = next(line for line in message.splitlines() if "hf download" in line).split("   once")[0]
    hf = Path(sys.executable).with_name("hf")
    subprocess.run([str(hf), *shlex.split(command)[1:]], env=environment, check=True, capture_output=True, timeout=60)
    assert load_apart({**environment, "HF_HUB_OFFLINE": "1"}).startswith("cache ")


def test_a_hub_without_the_rows_is_reported(tmp_path):
    with serve("datasets/nyu-mll/glue", {"README.md": b""}) as hub:
        message = load_apart(fresh(tmp_path / "home", hub.address))
    assert "cannot use nyu-mll/glue from the hub" in message and "data=synthetic" in message


def test_a_silent_network_ends_the_process_within_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never answers
        start = time.monotonic()
        message = load_apart(fresh(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert "no answer" in message or "timed out" in message
    assert time.monotonic() - start < 8


@pytest.mark.parametrize("how", ["refused", "unknown name", "name look-up hangs", "server error"])
def test_an_unusable_hub_is_known_within_seconds(monkeypatch, how):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1" if how == "refused" else "http://hub.invalid")
    if how == "name look-up hangs":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(20))
    if how == "server error":
        server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    start = time.monotonic()
    reason = hub.why_unreachable.__wrapped__()
    assert constants.ENDPOINT in reason
    assert ("501" in reason) == (how == "server error")
    assert time.monotonic() - start < 4


def test_ways_out_are_commands_of_this_task(cache):
    message = missing(TASKS["qqp"])
    assert "hf download --repo-type dataset nyu-mll/glue --include 'qqp/*'" in message
    assert "delora-run task=qqp data.dir=FOLDER" in message and "FOLDER/QQP/train.tsv" in message
    assert glue.read_cache(TASKS["qqp"]) is None
