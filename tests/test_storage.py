import contextlib
import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from delora import storage
from delora.errors import UserError
from delora.storage import ResultsError, find, open_trial, read, read_tensors, without_hashes, writing
from delora.storage import made_by as made_by_room
from delora.storage.files import content

CONFIG = {
    "task": {"name": "mrpc"},
    "method": {"name": "delora", "rank": 8, "betas": [0.9, 0.999], "targets": ["query", "value"]},
    "lr": 1e-3,
    "weight_decay": 1e-5,
    "seed": 42,
    "clip_norm": None,
    "logger": {"mode": "auto"},
}


def a_result(config=CONFIG, **changes) -> dict:
    best = {"epoch": 2, "step": 20, "validation": {"loss": 0.4, "accuracy": 0.9}, "test": {"accuracy": 0.8}}
    made = {
        "schema": storage.SCHEMA,
        "id": "mrpc-delora",
        "sweep": None,
        "status": "done",
        "config": config,
        "headline": "accuracy",
        "best": best,
        "last": {**best, "epoch": 3, "step": 30, "test": None},
        "diverged_step": None,
        "epochs": 3,
        "steps": 30,
        "parameters": {"adapter": 100, "head": 10, "encoder": 1000},
        "seconds": {"total": 3, "train": 2.0, "evaluate": 0.5},
        "tokens": {"real": 1000, "computed": 1500},
        "fleet_size": 1,
        "made_by": made_by(),
    }
    return made | changes


def made_by() -> storage.MadeBy:
    return storage.provenance(
        device="cpu",
        precision="float32",
        determinism={"threads": 2},
        data={"source": "files", "sha256": "d" * 64},
        weights={"source": "random", "sha256": None},
    )


def in_process(code: str, *arguments: object, **options) -> subprocess.Popen:
    """Runs code in a Python process of its own; it prints a line when it is where the test wants it."""
    command = [
        sys.executable,
        "-c",
        "import sys\nfrom delora.errors import UserError\nfrom delora.storage import *\n" + code,
        *map(str, arguments),
    ]
    folder = Path(__file__).parents[1]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, **options)


HOLD = """
import json, time
folder = open_trial(sys.argv[1], json.loads(sys.argv[2]))
folder.record({"kind": "step", "step": 1})
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "trial"


@pytest.fixture
def small_disk(tmp_path: Path):
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# --- What is written is read


def test_a_trial_is_read_back(path):
    with open_trial(path, CONFIG) as folder:
        assert not folder.left_over and folder.finished is None
        folder.record({"kind": "evaluation", "step": 0, "epoch": 0, "loss": 0.7, "metrics": {"accuracy": 0.5}})
        folder.record({"kind": "step", "step": 10, "epoch": 1.0, "loss": 0.5, "lr": 1e-3, "seconds": 1.0})
        folder.finish(a_result())
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
    trial = read(path)
    assert trial.result == json.loads((path / "result.json").read_text())
    assert without_hashes(trial.result) == without_hashes(a_result())
    assert [(line["step"], line["metrics"]) for line in trial.evaluations()] == [(0, {"accuracy": 0.5})]
    assert [(line["step"], line["lr"]) for line in trial.steps()] == [(10, 1e-3)]


def test_what_is_not_finite_is_null_and_scalars_are_numbers(path):
    line = {
        "kind": "step",
        "step": np.int64(3),
        "loss": math.nan,
        "lr": torch.tensor(0.5),
        "seconds": np.float32(2),
    }
    undefined = {
        "epoch": 1,
        "step": 3,
        "validation": {"accuracy": np.float64("nan"), "loss": math.inf},
        "test": None,
    }
    with open_trial(path, CONFIG) as folder:
        folder.record(line)
        folder.finish(a_result(best=undefined, last=undefined))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    written = json.loads((path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert written == {"kind": "step", "step": 3, "loss": None, "lr": 0.5, "seconds": 2.0}
    assert json.loads((path / "result.json").read_text(), parse_constant=refuse)["best"]["validation"] == {
        "accuracy": None,
        "loss": None,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_are_read_back_to_the_bit(path, dtype):
    one_storage = torch.randn(40).to(dtype)
    tensors = {
        "a": one_storage[:10].view(2, 5),
        "b": one_storage[20:30].view(2, 5).T,
        "scalar": torch.tensor(3.0),
    }
    with open_trial(path, CONFIG) as folder:
        folder.save_tensors("adapter.safetensors", tensors, {"method": "delora"})
    stored, about = read_tensors(path / "adapter.safetensors", "pt")
    assert about == {"method": "delora"} and stored.keys() == tensors.keys()
    assert all(
        torch.equal(stored[name], tensors[name]) and stored[name].dtype == tensors[name].dtype for name in stored
    )


def test_half_a_tensor_file_is_refused(path):
    with open_trial(path, CONFIG) as folder:
        folder.save_tensors("adapter.safetensors", {"a": torch.randn(100)}, {})
    data = (path / "adapter.safetensors").read_bytes()
    (path / "adapter.safetensors").write_bytes(data[: len(data) // 2])
    for file in ("adapter.safetensors", "predictions.safetensors"):
        with pytest.raises(ResultsError, match=file):
            read_tensors(path / file, "numpy")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"status": "running"}, "status"),
        ({"best": None}, "no best or last"),
        ({"status": "diverged"}, "diverged_step is None"),
        ({"diverged_step": 7}, "diverged_step is 7"),
        ({"headline": "f1"}, "headline metric f1"),
        ({"epochs": 1.5}, "epochs"),
        ({"steps": None}, "steps"),
        ({"parameters": {"adapter": 1}}, "parameters.head"),
        ({"made_by": {}}, "made_by.cpu"),
        ({"config": {"lr": 1}}, "another config"),
    ],
)
def test_a_result_that_is_not_valid_is_never_written(path, changes, fault):
    with open_trial(path, CONFIG) as folder:
        with pytest.raises(ValueError, match=fault):
            folder.finish(a_result(**changes))
        assert not (path / "result.json").exists()


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_trial_may_end_before_it_was_scored(path, status):
    with open_trial(path, CONFIG) as folder:
        step = 5 if status == "diverged" else None
        folder.finish(a_result(status=status, best=None, last=None, diverged_step=step))
    assert read(path).result["status"] == status


# --- Whose folder it is


def test_a_finished_trial_is_given_back_and_not_touched(path):
    with open_trial(path, CONFIG) as folder:
        folder.finish(a_result())
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    with open_trial(path, {**CONFIG, "logger": {"mode": "offline"}}, ignore=["logger"]) as folder:
        assert without_hashes(folder.finished) == without_hashes(a_result()) and not folder.left_over
        for write in (folder.restart, lambda: folder.record({"step": 1}), lambda: folder.save("a", b"")):
            with pytest.raises(RuntimeError, match="finished"):
                write()
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()} == before


def test_another_config_is_refused_with_the_difference(path):
    open_trial(path, CONFIG).close()
    changed = {**CONFIG, "lr": 0.002, "method": {**CONFIG["method"], "rank": 4}, "epochs": 3}
    del changed["seed"]
    with pytest.raises(UserError) as error:
        open_trial(path, changed)
    lines = str(error.value).splitlines()
    assert set(lines[1:-1]) == {
        "  lr: 0.001 → 0.002",
        "  method.rank: 8 → 4",
        "  seed: 42 → (absent)",
        "  epochs: (absent) → 3",
    }
    assert "name=" in lines[-1] and "resume=force" in lines[-1]
    with pytest.raises(UserError, match=r"logger\.mode"):
        open_trial(path, {**CONFIG, "logger": {"mode": "offline"}}, ignore=["log"])  # a key, not a prefix of one
    open_trial(path, {**CONFIG, "logger": {"mode": "offline"}}, ignore=["logger"]).close()
    assert yaml.safe_load((path / "config.yaml").read_text())["logger"] == {"mode": "offline"}


def test_foreign_folders_are_refused_and_left_as_they_are(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "config.yaml").write_text("- a list\n")
    (tmp_path / "file").write_text("x")
    for name, reason in [
        ("thesis", "chapter.tex"),
        ("tool", "config.yaml"),
        ("file", "not a folder"),
        ("file/a", "file"),
    ]:
        with pytest.raises(UserError, match=reason):
            open_trial(tmp_path / name, CONFIG)
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"] and os.listdir(tmp_path / "tool") == ["config.yaml"]
    (tmp_path / "empty").mkdir()
    open_trial(tmp_path / "empty", CONFIG).close()


def test_of_many_differences_and_foreign_files_some_are_listed(tmp_path):
    folder = tmp_path / "outputs" / "within" / "another" / "trial"  # made with all that is above it
    open_trial(folder, {**CONFIG, **{f"key{i:02}": 1 for i in range(23)}}).close()
    with pytest.raises(UserError, match=r"key19: 1 → 2\n  and 3 more\n"):
        open_trial(folder, {**CONFIG, **{f"key{i:02}": 2 for i in range(23)}})
    for count, listed in ((3, "f0, f1, f2\\. "), (4, "f0, f1, f2, \\.\\.\\.")):
        foreign = tmp_path / f"foreign{count}"
        foreign.mkdir()
        for i in range(count):
            (foreign / f"f{i}").touch()
        with pytest.raises(UserError, match=listed):
            open_trial(foreign, CONFIG)


def test_one_process_at_a_time(path):
    with in_process(HOLD, path, json.dumps(CONFIG)) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on host"):
            open_trial(path, CONFIG)
        holder.kill()
    with open_trial(path, CONFIG) as folder:  # the system gave the lock back
        assert folder.left_over
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            open_trial(path, CONFIG)


def test_of_many_that_start_at_once_one_gets_the_folder(path):
    code = """
import json, time
time.sleep(max(0, float(sys.argv[3]) - time.time()))
try:
    open_trial(sys.argv[1], json.loads(sys.argv[2])); print("mine", flush=True); sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""
    start = time.time() + 1.5
    processes = [in_process(code, path, json.dumps(CONFIG), start, stdin=subprocess.PIPE) for _ in range(6)]
    said = [process.stdout.readline() for process in processes]
    for process in processes:
        process.communicate("")
    assert said.count("mine\n") == 1 and sum("is in use by" in line for line in said) == 5


def test_one_process_holds_many_trials(tmp_path):
    folders = [open_trial(tmp_path / str(i), {**CONFIG, "seed": i}) for i in range(40)]
    for step in range(3):
        for folder in folders:
            folder.record({"kind": "step", "step": step})
    for i, folder in enumerate(folders):
        folder.finish(a_result({**CONFIG, "seed": i}))
        folder.close()
    assert [trial.result["config"]["seed"] for trial in find(tmp_path).trials] == sorted(range(40), key=str)
    assert all(len(list(trial.steps())) == 3 for trial in find(tmp_path).trials)


# --- Trials that were interrupted


def interrupted(path: Path) -> list[storage.Extent]:
    """A trial killed in the middle of a line; how far it was after each of its lines."""
    extents = []
    with open_trial(path, CONFIG) as folder:
        for step in range(10):
            folder.record({"kind": "step", "step": step})
            extents.append(folder.sync())
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    (path / ".result.json.tmp").write_text('{"schema": 1,')
    return extents


def test_a_left_over_trial_starts_over(path):
    interrupted(path)
    (path / "notes.txt").write_text("mine")
    with open_trial(path, CONFIG) as folder:
        assert folder.left_over and not (path / ".result.json.tmp").exists()
        folder.log("first")
        folder.save("adapter.safetensors", b"x")
        folder.finish(a_result(status="failed", best=None, last=None))
        folder.restart()
        folder.record({"kind": "step", "step": 1})
    assert json.loads((path / "metrics.jsonl").read_text()) == {"kind": "step", "step": 1}
    left = {file.name for file in path.iterdir()}
    assert left == {"config.yaml", "metrics.jsonl", "log.txt", "notes.txt", ".lock"}
    assert "first" in (path / "log.txt").read_text()


@pytest.mark.parametrize("line", [0, 4, 9])
def test_a_left_over_trial_goes_on_from_a_checkpoint(path, line):
    extent = interrupted(path)[line]
    with open_trial(path, CONFIG) as folder:
        assert folder.holds(extent)
        kept = folder.rewind(extent)
        folder.record({"kind": "step", "step": 1000})
        folder.finish(a_result())
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == [*range(line + 1), 1000] and lines[:-1] == kept
    assert list(read(path).steps()) == lines  # and it is the file that the result vouches for


@pytest.mark.parametrize("damage", ["cut", "cut in a line", "empty", "flipped", "zeroed", "gone"])
def test_a_log_that_is_not_what_a_checkpoint_says_is_noticed(path, damage):
    extents, log = interrupted(path), path / "metrics.jsonl"
    data = bytearray(log.read_bytes())
    match damage:
        case "cut":
            data = data[: extents[8]["size"]]
        case "cut in a line":
            data = data[: extents[9]["size"] - 1]
        case "empty":
            data.clear()
        case "flipped":
            data[extents[3]["size"] - 3] ^= 1
        case "zeroed":
            data[extents[8]["size"] :] = bytes(len(data) - extents[8]["size"])
    log.unlink() if damage == "gone" else log.write_bytes(data)
    with open_trial(path, CONFIG) as folder:
        assert not folder.holds(extents[9]) and not folder.holds(None)
        assert folder.holds(extents[2]) == (damage in ("cut", "cut in a line", "flipped", "zeroed"))


def test_a_failed_trial_may_run_again(path):
    with open_trial(path, CONFIG) as folder:
        folder.finish(a_result(status="failed", best=None, last=None))
    with open_trial(path, CONFIG) as folder:
        assert folder.left_over and folder.finished is None
        folder.restart()
        folder.finish(a_result())
    assert read(path).result["status"] == "done"


def test_killed_at_any_moment_no_part_is_taken_for_whole(path):
    code = """
import json, os
config = json.loads(sys.argv[2])
result = json.loads(sys.argv[3])
folder = open_trial(sys.argv[1], config)
folder.restart()
print("open", flush=True)
for i in range(10**9):
    folder.record({"kind": "step", "step": i, "loss": list(range(500))})
    folder.save("adapter.safetensors", bytes([i % 256]) * 300_000)
    folder.save("result.json", json.dumps({**result, "steps": i, "id": "x" * 100_000}).encode())
"""
    draw, failed = random.Random(0), json.dumps(without_hashes(a_result(status="failed", best=None, last=None)))
    for _ in range(12):
        with in_process(code, path, json.dumps(CONFIG), failed) as process:
            assert process.stdout.readline() == "open\n"
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
        if (path / "result.json").exists():
            trial = read(path)
            assert [line["step"] for line in trial.steps()][-1] >= trial.result["steps"]  # what is read is on disk
        if (path / "adapter.safetensors").exists():
            data = (path / "adapter.safetensors").read_bytes()
            assert len(data) == 300_000 and len(set(data)) == 1
        with open_trial(path, CONFIG) as folder:  # nothing in the way of the next attempt
            assert folder.left_over
            folder.restart()


# --- Disks that fail


def test_a_full_disk_leaves_only_whole_files(small_disk):
    path = small_disk / "trial"
    with open_trial(path, CONFIG) as folder:
        folder.save("adapter.safetensors", b"a" * 10_000)
        with pytest.raises(ResultsError, match=r"trial/adapter.safetensors: No space left on device.*Free some space"):
            folder.save("adapter.safetensors", b"b" * 60_000)
        assert (path / "adapter.safetensors").read_bytes() == b"a" * 10_000
        line, written = {"kind": "step", "step": 0, "text": "x" * 1000}, 0
        with pytest.raises(ResultsError, match=r"trial/metrics.jsonl: No space left"):
            for written in range(100):  # noqa: B007
                folder.record(line)
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert len(lines) == written > 10 and {*map(json.dumps, map(json.loads, lines))} == {json.dumps(line)}
        with pytest.raises(ResultsError, match=r"result\.json"):
            folder.finish(a_result())
        assert folder.finished is None
        folder.log("a traceback " * 1000)
        assert not [file.name for file in path.iterdir() if file.name.endswith((".tmp", "result.json"))]
        (path / "adapter.safetensors").unlink()
        folder.finish(a_result())
    assert without_hashes(read(path).result) == without_hashes(a_result())
    with pytest.raises(ResultsError, match="No space left"):
        for i in range(100):
            open_trial(small_disk / str(i), {**CONFIG, "padding": "x" * 2000}).close()


def test_a_folder_removed_in_the_middle_is_named(path, tmp_path):
    with open_trial(path, CONFIG) as folder:
        folder.record({"kind": "step", "step": 1})
        path.rename(tmp_path / "moved")
        folder.record({"kind": "step", "step": 2})
        assert len((tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()) == 2
        subprocess.run(["rm", "-r", tmp_path / "moved"], check=True)
        with open_trial(path, CONFIG):  # someone else begins in the same place
            for write, name in [
                (lambda: folder.record({"step": 2}), "metrics.jsonl"),
                (lambda: folder.save("adapter.safetensors", b"x"), "adapter.safetensors"),
                (lambda: folder.finish(a_result()), "result.json"),
                (lambda: folder.restart(), "metrics.jsonl"),
            ]:
                with pytest.raises(ResultsError, match=f"{name}.*removed while the trial ran"):
                    write()
            folder.log("does not raise")
            assert {file.name for file in path.iterdir()} == {"config.yaml", "metrics.jsonl", ".lock"}
            assert (path / "metrics.jsonl").read_bytes() == b""


def test_a_file_system_without_locks_is_used_with_a_warning(path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(writing.fcntl, "flock", refuse)
    with open_trial(path, CONFIG) as folder:
        folder.finish(a_result())
    assert "cannot be locked" in caplog.text


# --- Reading what others left


def test_no_part_of_a_result_is_taken_for_one(path):
    with open_trial(path, CONFIG) as folder:
        folder.finish(a_result())
    whole = (path / "result.json").read_bytes()
    for size in range(0, len(whole) - 1, 5):
        (path / "result.json").write_bytes(whole[:size])
        with pytest.raises(ResultsError, match=r"result\.json"):
            read(path)


def test_finds_what_is_valid_and_names_the_rest(tmp_path):
    def trial(name: str, **changes) -> Path:
        with open_trial(tmp_path / name, {**CONFIG, "name": name}) as folder:
            folder.finish(a_result({**CONFIG, "name": name}, **changes))
        return tmp_path / name / "result.json"

    trial("sweep/b"), trial("sweep/a"), trial("single"), trial("single/below")
    trial("diverged", status="diverged", diverged_step=3), trial("failed", status="failed")
    open_trial(tmp_path / "unfinished", CONFIG).close()
    text = trial("half").read_text()
    damaged = {
        "half": text[: len(text) // 2].encode(),
        "empty": b"",
        "binary": os.urandom(1000),
        "deep": b"[" * 100_000,
        "number": b"9" * 10_000,
        "foreign": b'{"accuracy": 0.9}',
        "list": b"[]",
        "newer": text.replace('"schema": 2', '"schema": 7').encode(),
        "no status": text.replace('"status": "done"', '"status": ""').encode(),
        "no seconds": text.replace('"total"', '"Total"').encode(),
    }
    for name, data in damaged.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "result.json").write_bytes(data)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "result.json")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "result.json").symlink_to("nowhere")
    for other in ("folder/result.json", "single/wandb/run/files", ".hydra", "loop"):
        (tmp_path / other).mkdir(parents=True)
    (tmp_path / "single/wandb/run/files/result.json").write_bytes(b"")
    (tmp_path / "loop" / "back").symlink_to(tmp_path)
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "config.yaml").write_text("a: 1")

    found = find(tmp_path)
    names = [str(trial.folder.relative_to(tmp_path)) for trial in found.trials]
    assert names == ["diverged", "failed", "single", "single/below", "sweep/a", "sweep/b"]
    assert found.unfinished == [tmp_path / "unfinished"]
    problems = {str(file.relative_to(tmp_path).parent): reason for file, reason in found.problems}
    assert problems.keys() == {*damaged, "pipe", "link"} and all(problems.values())
    assert problems["newer"] == "schema 7, this version reads 2" and "seconds.total" in problems["no seconds"]
    assert find(tmp_path / "not there").problems == [(tmp_path / "not there", "No such file or directory")]


def test_of_a_result_without_hashes_a_torn_line_is_left_out_and_a_damaged_one_named(path):
    """As earlier versions wrote them."""
    interrupted(path)
    (path / "result.json").write_text(json.dumps(without_hashes(a_result())))
    trial = read(path)
    assert [line["step"] for line in trial.steps()] == list(range(10))
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join([*lines[:4], lines[4][:9] + b"\n", *lines[5:]]))
    with pytest.raises(ResultsError, match=r"metrics\.jsonl, line 5"):
        list(trial.steps())
    (path / "metrics.jsonl").unlink()
    with pytest.raises(ResultsError, match=r"metrics\.jsonl: No such file"):
        list(trial.evaluations())


# --- Disks that flip a bit


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "trial"
    with open_trial(folder, CONFIG) as trial:
        trial.record({"kind": "evaluation", "step": 0, "epoch": 0, "loss": 0.7, "metrics": {"accuracy": 0.5}})
        trial.record({"kind": "step", "step": 10, "epoch": 1.0, "loss": 0.5, "lr": 1e-3, "seconds": 1.0})
        for name in (storage.ADAPTER, storage.PREDICTIONS):
            trial.save_tensors(name, {"a": torch.arange(12.0), "b": torch.ones(2, 2)}, {"id": "x"})
        trial.finish(a_result())
    return folder


def read_all(folder: Path) -> object:
    trial = read(folder)
    tensors = [trial.tensors(name, "pt") for name in (storage.ADAPTER, storage.PREDICTIONS)]
    return trial.result, list(trial.steps()), list(trial.evaluations()), repr(tensors)


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "adapter.safetensors", "predictions.safetensors"])
def test_no_flipped_bit_is_read(whole, tmp_path, name):
    """One bit of every byte, of the long result of every fifth."""
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    data, wanted = (folder / name).read_bytes(), read_all(folder)
    draw = random.Random(name)
    for place in range(0, len(data), 5 if name == "result.json" else 1):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(flipped)
        try:
            assert read_all(folder) == wanted and name == "result.json"  # a space for another, say
        except ResultsError as error:
            assert name in str(error)
    (folder / name).write_bytes(data)
    assert read_all(folder) == wanted
    if name != "result.json":
        (folder / name).unlink()
        with pytest.raises(ResultsError, match=name):
            read_all(folder)


# --- Folders of strangers


FILES = ["config.yaml", "metrics.jsonl", "result.json", "log.txt", ".lock"]
FILES += ["adapter.safetensors", "predictions.safetensors"]


@pytest.mark.parametrize("name", [*FILES, ".config.yaml.tmp", ".result.json.tmp"])
def test_nothing_is_written_through_a_link(path, tmp_path, name):
    """A link out of the folder, whatever its name: the trial is refused, or the link replaced."""
    interrupted(path)
    secret = tmp_path / "secret"
    secret.write_bytes((path / name).read_bytes() if (path / name).exists() else b"mine")
    before = secret.read_bytes(), secret.stat().st_mtime_ns
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(secret)
    try:
        with open_trial(path, CONFIG) as folder:
            folder.restart()
            folder.record({"kind": "step", "step": 1})
            folder.log("text")
            for file in (storage.ADAPTER, storage.PREDICTIONS):
                folder.save_tensors(file, {"a": torch.ones(2)}, {})
            folder.finish(a_result())
    except UserError as error:
        assert name in str(error) and "link" in str(error)
    assert (secret.read_bytes(), secret.stat().st_mtime_ns) == before


def test_no_part_of_the_path_is_a_link(tmp_path):
    (tmp_path / "elsewhere" / "trial").mkdir(parents=True)
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")  # the user's own: what is named may be a link
    (tmp_path / "mine" / "sweep").symlink_to(tmp_path / "elsewhere")
    for root, below in ((tmp_path / "mine", "sweep/trial"), (tmp_path / "mine", "sweep"), (None, "sweep")):
        with pytest.raises(UserError, match="sweep is a link"):
            open_trial(tmp_path / "mine" / below, CONFIG, root=root)
    assert not list((tmp_path / "elsewhere" / "trial").iterdir())
    open_trial(tmp_path / "mine" / "trial", CONFIG, root=tmp_path / "mine").close()
    with pytest.raises(UserError, match="sweep is a link"):
        storage.replace(tmp_path / "mine" / "sweep" / "a", b"x")
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere" / "b")
    storage.replace(tmp_path / "b", b"x")
    assert not (tmp_path / "b").is_symlink() and not (tmp_path / "elsewhere" / "b").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "endless"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(path, kind, name):
    interrupted(path)
    for file in ("adapter.safetensors", "predictions.safetensors", "result.json"):
        (path / file).touch()
    (path / name).unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path / name)
        case "device":
            (path / name).symlink_to("/dev/zero")
        case "folder":
            (path / name).mkdir()
        case "endless":
            with (path / name).open("w") as file:
                file.truncate(1 << 41)  # a hole of 2 TiB
    start = time.monotonic()
    for use in (
        lambda: read(path),
        lambda: list(storage.StoredTrial(path, a_result(schema=1)).steps()),
        lambda: storage.StoredTrial(path, a_result(schema=1)).tensors(name, "pt"),
        lambda: open_trial(path, CONFIG).close(),
    ):
        with contextlib.suppress(UserError):
            use()
    assert storage.stored_config(path) == (None if name == "config.yaml" else CONFIG)
    find(path)
    assert time.monotonic() - start < 5


def test_a_config_that_multiplies_itself_is_none(path):
    """Nine aliases, each of nine of the one before: a billion values."""
    open_trial(path, CONFIG).close()
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi")]
    others = ("a: " + "[" * 100_000, "a: 2020-13-45", "1: {[2]: 3}", "a: 2020-01-01", "a: \x00", "- 1")
    for text in ("\n".join(lines), *others):
        (path / "config.yaml").write_text(text)
        assert storage.stored_config(path) is None
        with pytest.raises(UserError, match=r"config\.yaml: not a config of delora-run"):
            open_trial(path, CONFIG)


def test_a_trial_that_did_not_begin_leaves_no_folder(path):
    with open_trial(path, CONFIG) as folder:
        folder.withdraw()
    assert path.parent.exists() and not path.exists()
    path.mkdir()
    for happens in (lambda folder: None, lambda folder: folder.log("text")):  # it was there; something is in it
        with open_trial(path, CONFIG) as folder:
            happens(folder)
            folder.withdraw()
        assert path.exists()
        shutil.rmtree(path)
    with open_trial(path, CONFIG) as folder:
        folder.record({"kind": "step", "step": 1})
        folder.withdraw()
    assert path.exists()


def test_a_thousand_trials_are_read_quickly_and_without_torch(tmp_path):
    layers = {f"encoder.layer.{i}.attention.self.{part}": 0.1 for i in range(6) for part in ("query", "value")}
    for seed in range(1000):
        folder = tmp_path / f"lr{seed % 8}" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(without_hashes(a_result({**CONFIG, "seed": seed}))))
        lines = [{"kind": "step", "step": step, "loss": 0.1, "lr": 0.1} for step in range(0, 300, 10)]
        lines += [{"kind": "evaluation", "step": 30, "metrics": {}, "distance": layers, "lambda": layers}] * 10
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = """
import time
start = time.perf_counter()
trials = find(sys.argv[1]).trials
evaluations = sum(1 for trial in trials for _ in trial.evaluations())
print(len(trials), evaluations, time.perf_counter() - start, "torch" in sys.modules)
"""
    with in_process(code, tmp_path) as process:
        trials, evaluations, seconds, torch_is_there = process.stdout.read().split()
    assert (trials, evaluations, torch_is_there) == ("1000", "10000", "False")
    assert float(seconds) < 5


# --- What made a result


def test_provenance_tells_versions_and_nothing_of_the_person():
    made = made_by()
    packages = ("torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "hydra-core")
    assert all(made[package] == metadata.version(package) for package in packages)
    assert made["torch"] == torch.__version__
    assert made["python"] == sys.version.split()[0] and made["data"]["source"] == "files" and made["cpu"]
    text = json.dumps(made)
    assert not any(str(place) in text for place in (Path.home(), Path.cwd(), Path(storage.__file__).parents[1]))


def test_the_commit_is_the_checkouts_that_the_code_runs_from(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def git(*arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "GIT_DIR"}
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    def commit(folder: str) -> str | None:
        made_by_room._commit.cache_clear()
        return made_by_room._commit(tmp_path / folder)

    for folder in ("delora", "environment"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "made_by.py").write_text("x")
    assert commit("delora") is None
    git("init", "-q")
    assert commit("delora") is None
    git("add", "delora")
    git("commit", "-q", "-m", "m")
    git("tag", "v1", "-a", "-m", "m")
    assert commit("delora") == git("rev-parse", "HEAD").strip()
    (tmp_path / "delora" / "made_by.py").write_text("y")
    assert commit("delora") == git("rev-parse", "HEAD").strip() + "-dirty"
    assert commit("environment") is None  # installed, though below the checkout
    made_by_room._commit.cache_clear()


def test_interrupting_a_save_leaves_no_temporary_file(path):
    code = """
import json, signal
folder = open_trial(sys.argv[1], json.loads(sys.argv[2]))
folder.save("adapter.safetensors", b"a" * 1000)
print("open", flush=True)
while True:
    folder.save("adapter.safetensors", b"b" * 50_000_000)
"""
    with in_process(code, path, json.dumps(CONFIG), stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == "open\n"
        time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) != 0
    assert (path / "adapter.safetensors").stat().st_size in (1000, 50_000_000)
    assert not list(path.glob(".*.tmp"))


def test_a_file_that_tells_no_size_is_read_no_further_than_its_limit():
    with pytest.raises(OSError, match="larger than 0 MiB"):
        content(Path("/proc/self/maps"), limit=10)
