"""With wandb itself and its real service process; only the server, where there is one, is the tests' own."""

import functools
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEW, SMALL, command

from delora import tracking
from delora.tracking import Tracking, run_id

CONFIG = {"lr": 1e-3, "method": {"name": "delora", "betas": [0.9, 0.999]}}
WANDB = ["logger=wandb", "logger.mode=offline"]
ROOT = Path(tracking.__file__).parents[1]


@pytest.fixture(autouse=True)
def without_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def started(caplog: pytest.LogCaptureFixture) -> Callable[[int], None]:
    """Waits until a number of runs has started."""

    def wait(runs: int) -> None:
        wait_for(lambda: sum(" run " in line and "finished" not in line for line in caplog.messages) >= runs)

    return wait


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="delora.tracking")
    return lambda: [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]


class Run:
    """What an offline run's file holds: a log in LevelDB's format, in blocks of 32 KiB after a header."""

    def __init__(self, folder: Path, name: str = "*"):
        from wandb.proto.wandb_internal_pb2 import Record

        (self.file,) = folder.glob(f"wandb/offline-run-*/{name}.wandb")
        data, place, part = self.file.read_bytes(), 7, b""
        self.config, self.history, self.summary, self.exit_code = {}, [], {}, None
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
            _, size, kind = struct.unpack_from("<IHB", data, place)
            part = (part if kind in (3, 4) else b"") + data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # whole, or its last part
                record = Record.FromString(part)
                self._take(record)

    def _take(self, record) -> None:
        def values(items) -> dict:
            return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

        if record.HasField("run"):
            self.id, self.name, self.group = record.run.run_id, record.run.display_name, record.run.run_group
            self.tags, self.job_type = set(record.run.tags), record.run.job_type
            self.config |= values(record.run.config.update)
        elif record.HasField("history"):
            self.history.append(values(record.history.item))
        elif record.HasField("summary"):
            self.summary |= values(record.summary.update)
        elif record.HasField("exit"):
            self.exit_code = record.exit.exit_code

    def curve(self, key: str) -> list[tuple[int, float]]:
        return [(row["_step"], row[key]) for row in self.history if key in row]


@contextmanager
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server that takes runs, for which an account is configured.

    Its `mode`: "answers", "hangs", or "junk", which answers nonsense. Its `history` has the rows it was sent.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if here.mode == "hangs":
                released.wait(60)
                return
            data = {}
            if "file_stream" in self.path:
                content = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                here.history += [json.loads(row) for row in content]
            elif b"mutation UpsertBucket" in body and here.mode == "answers":
                project = {"name": "p", "entity": {"name": "e"}}
                bucket = {"id": "b", "name": json.loads(body)["variables"]["name"], "project": project}
                data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            elif b"mutation CreateRunFiles" in body and here.mode == "answers":
                data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
            answer = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    here, released = ThreadingHTTPServer(("127.0.0.1", 0), Handler), threading.Event()
    here.mode, here.history = "answers", []
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{here.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    threading.Thread(target=here.serve_forever, daemon=True).start()
    try:
        yield here
    finally:
        released.set()
        here.shutdown()
        here.server_close()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def service(tracking: Tracking) -> int:
    """The process id of wandb's own service."""
    (child,) = children(tracking._process.pid)
    return child


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def log_steps(trackers, steps: range) -> None:
    for step in steps:
        for offset, tracker in enumerate(trackers):
            tracker.log({"train": {"loss": offset + 1 / (step + 1)}}, step)


def curve(offset: int, steps: int) -> list[tuple[int, float]]:
    return [(step, offset + 1 / (step + 1)) for step in range(steps)]


# --- What wandb gets


def test_trials_side_by_side_hold_their_curves_offline(tmp_path, warnings):
    evaluation = {
        "accuracy": np.float32(0.5),
        "none": None,
        "distance": {"layer.0.query": 1.5, "layer.1.query": float("nan")},
    }
    start = time.monotonic()
    with Tracking("auto", "p") as wandb:
        trackers = [wandb.start(f"sweep/t{i}", {**CONFIG, "seed": i}, tmp_path / f"t{i}", "sweep") for i in range(3)]
        log_steps(trackers, range(600))
        trackers[0].log(evaluation, 600)
        began = time.monotonic()
        for tracker, status in zip(trackers, ["done", "diverged", "failed"], strict=True):
            tracker.finish(status, {"best": {"accuracy": 0.9}})
        assert began - start < 1  # it waits for nothing
    for i, (status, exit_code) in enumerate([("done", 0), ("diverged", 0), ("failed", 1)]):
        run = Run(tmp_path / f"t{i}")
        assert (run.id, run.name, run.group) == (trackers[i].id, f"sweep/t{i}", "sweep")
        assert run.config.items() >= {**CONFIG, "seed": i}.items()
        assert run.curve("train/loss") == curve(i, 600)
        assert run.summary["status"] == status and run.summary["best/accuracy"] == 0.9 and run.exit_code == exit_code
    last = Run(tmp_path / "t0").history[-1]
    assert last["accuracy"] == 0.5 and last["distance/layer.0.query"] == 1.5 and last["distance/layer.1.query"] != 0
    assert "none" not in last and not warnings()


def test_a_configured_account_is_used(tmp_path, monkeypatch, warnings):
    with server(monkeypatch) as there, Tracking("auto", "p") as wandb:
        tracker = wandb.start("t", CONFIG, tmp_path)
        log_steps([tracker], range(50))
        tracker.finish("done", {})
        wandb.close()
        assert [(row["_step"], row["train/loss"]) for row in there.history] == curve(0, 50)
    assert not list(tmp_path.glob("wandb/offline-run-*")) and not warnings()


def test_a_trial_that_begins_again_is_one_run_where_wandbs_settings_want_it(tmp_path, monkeypatch, warnings):
    (tmp_path / "elsewhere").mkdir()
    with server(monkeypatch) as there:
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
        for steps in (3, 5):
            with Tracking("auto", "p") as wandb:
                tracker = wandb.start("t", CONFIG, tmp_path / "t")
                log_steps([tracker], range(steps - 1))
                tracker.finish("failed", {})
                tracker = wandb.start("t", CONFIG, tmp_path / "t")  # again in the same process
                log_steps([tracker], range(steps))
                tracker.finish("done", {})
            run = Run(tmp_path / "elsewhere")
            assert run.curve("train/loss") == curve(0, steps) and run.exit_code == 0
            assert run.id == run_id("t", CONFIG)
        assert not there.history
    assert not (tmp_path / "t").exists() and not warnings()


def test_the_run_id_is_stable_and_one_that_wandb_takes():
    assert run_id("a/b", CONFIG) == run_id("a/b", dict(reversed(CONFIG.items()))) == "a-b-3c26ced8"
    assert run_id("a", {**CONFIG, "log": {"mode": 1}, "x": 2}, ["log", "x"]) == run_id("a", CONFIG)
    assert run_id("a", {**CONFIG, "logger": {"mode": 1}}, ["log"]) != run_id("a", CONFIG)
    assert run_id("a", CONFIG, ["method.name"]) != run_id("a", CONFIG, ["method"])
    ids = {
        run_id(name, config) for name in ("a/b", "a-b", "a b", "x" * 300) for config in (CONFIG, {**CONFIG, "lr": 1})
    }
    assert len(ids) == 8 and all(len(id) <= 128 and not set(id) & set(":;,#?/'\\%") for id in ids)


@pytest.mark.parametrize(("mode", "environment"), [("disabled", "online"), ("auto", "disabled")])
def test_disabled_means_no_process_and_no_file(tmp_path, monkeypatch, mode, environment):
    monkeypatch.setenv("WANDB_MODE", environment)
    before = children(os.getpid())
    with Tracking(mode, "p") as wandb:
        tracker = wandb.start("t", CONFIG, tmp_path)
        tracker.log({"loss": 1.0}, 0)
        assert children(os.getpid()) == before
        tracker.finish("done", {})
    assert not list(tmp_path.iterdir())


# --- Broken at the start


def test_a_folder_that_cannot_be_written_breaks_only_its_run(tmp_path, warnings):
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "wandb").write_text("a file")
    with Tracking("offline", "p") as wandb:
        trackers = [wandb.start(name, CONFIG, tmp_path / name) for name in ("bad", "good")]
        log_steps(trackers, range(5))
        for tracker in trackers:
            tracker.finish("done", {})
    assert Run(tmp_path / "good").curve("train/loss") == curve(1, 5)
    (warning,) = warnings()
    assert "could not start" in warning and "bad/wandb" in warning


def test_nothing_goes_through_a_link_of_a_received_folder(tmp_path, warnings):
    (tmp_path / "elsewhere").mkdir()
    for name, link in (("bad", "wandb"), ("dotted", ".wandb"), ("good", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / link).symlink_to(tmp_path / "elsewhere")
    with Tracking("offline", "p") as wandb:
        trackers = [wandb.start(name, CONFIG, tmp_path / name) for name in ("bad", "dotted", "good")]
        log_steps(trackers, range(5))
        for tracker in trackers:
            tracker.finish("done", {})
    assert not list((tmp_path / "elsewhere").iterdir())
    assert Run(tmp_path / "good").curve("train/loss") == curve(2, 5)
    assert [warning.partition(" is not tracked")[0] for warning in warnings()] == ["bad", "dotted"]


def test_a_broken_installation(tmp_path, monkeypatch, warnings):
    (tmp_path / "wandb.py").write_text("raise ImportError('libwandb.so: wrong ELF class')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Tracking("auto", "p") as wandb:
        tracker = wandb.start("t", CONFIG, tmp_path / "t")
        wait_for(lambda: not wandb.enabled)
        log_steps([tracker], range(5))
        tracker.finish("done", {})
    (warning,) = warnings()
    assert "ended with status 1" in warning and "wrong ELF class" in warning


def test_a_python_that_cannot_be_started(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Tracking("auto", "p") as wandb:
        log_steps([wandb.start("t", CONFIG, tmp_path)], range(5))
    (warning,) = warnings()
    assert "could not be started" in warning


def test_a_server_that_hangs_at_the_start_means_offline(tmp_path, monkeypatch, warnings):
    with server(monkeypatch) as there:
        there.mode = "hangs"
        start = time.monotonic()
        with Tracking("online", "p", start_timeout=2) as wandb:
            trackers = [wandb.start(name, CONFIG, tmp_path / name) for name in ("a", "b")]
            log_steps(trackers, range(5))
            assert time.monotonic() - start < 1
        assert time.monotonic() - start < 15
    for i, name in enumerate(("a", "b")):
        run = Run(tmp_path / name)
        assert run.curve("train/loss") == curve(i, 5) and run.id == run_id(name, CONFIG)
        assert run.exit_code == 1  # it was not finished
    (warning,) = warnings()
    assert "could not start online" in warning


# --- Broken midway


def test_wandbs_service_is_killed_midway(tmp_path, started, warnings):
    with Tracking("offline", "p") as wandb:
        trackers = [wandb.start(str(i), CONFIG, tmp_path / str(i)) for i in range(2)]
        started(2)
        os.kill(service(wandb), signal.SIGKILL)
        time.sleep(0.3)
        log_steps(trackers, range(5))
        for tracker in trackers:
            tracker.finish("done", {})
        later = wandb.start("later", CONFIG, tmp_path / "later")
        log_steps([later], range(5))
        later.finish("done", {})
    assert Run(tmp_path / "later").curve("train/loss") == curve(0, 5)
    failed, not_started = warnings()  # one for both runs, one for the later one's first attempt
    assert "no longer tracked" in failed and "could not start" in not_started


def test_wandbs_process_is_killed_midway(tmp_path, started, warnings):
    with Tracking("offline", "p") as wandb:
        tracker = wandb.start("t", CONFIG, tmp_path)
        started(1)
        core = service(wandb)
        wandb._process.kill()
        wait_for(lambda: not wandb.enabled)
        log_steps([tracker, wandb.start("u", CONFIG, tmp_path)], range(5))
        tracker.finish("done", {})
        wait_for(lambda: not Path(f"/proc/{core}").exists())
    (warning,) = warnings()
    assert "ended with status -9" in warning


def test_a_hanging_wandb_does_not_hold_up_training(tmp_path, monkeypatch, started, warnings):
    monkeypatch.setattr(tracking, "QUEUE_LINES", 1000)
    with Tracking("offline", "p", patience=1) as wandb:
        tracker = wandb.start("t", CONFIG, tmp_path)
        started(1)
        child = wandb._process
        child.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        for step in range(10_000):
            tracker.log({"loss": 1.0}, step)
        tracker.finish("done", {})
        assert time.monotonic() - start < 2
    assert time.monotonic() - start < 5 and child.poll() is not None
    assert any("does not keep up" in warning for warning in warnings())


# --- Broken at the end


def test_a_hanging_wandb_at_the_end(tmp_path, started, warnings):
    with Tracking("offline", "p", patience=1) as wandb:
        tracker = wandb.start("t", CONFIG, tmp_path)
        started(1)
        wandb._process.send_signal(signal.SIGSTOP)
        tracker.log({"loss": torch.ones(2)}, 0)
        tracker.finish("done", {})
        start = time.monotonic()
    assert time.monotonic() - start < 4
    no_number, no_answer = warnings()
    assert "not sent to wandb" in no_number and "does not answer" in no_answer


@pytest.mark.parametrize(("mode", "reason"), [("hangs", "does not answer"), ("junk", "could not finish")])
def test_a_server_that_fails_at_the_end(tmp_path, monkeypatch, started, warnings, mode, reason):
    with server(monkeypatch) as there:
        with Tracking("auto", "p", start_timeout=2) as wandb:
            trackers = [wandb.start(str(i), CONFIG, tmp_path / str(i)) for i in range(4)]
            started(4)
            log_steps(trackers, range(5))
            there.mode = mode
            for tracker in trackers:
                tracker.finish("done", {})
            start = time.monotonic()
        assert time.monotonic() - start < 10
    assert any(reason in warning for warning in warnings()) and len(warnings()) <= 2


# --- Whole processes

TRAINER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from delora.tracking import Tracking
with Tracking("offline", "p", patience=2) as wandb:
    trackers = [wandb.start(str(i), {{}}, sys.argv[1] + f"/{{i}}") for i in range(2)]
    for step in range(20):
        for tracker in trackers:
            tracker.log({{"loss": 1.0}}, step)
    print(wandb._process.pid, flush=True)
    command = sys.stdin.readline().strip()
    for tracker in trackers:
        tracker.finish("done", {{}})
    assert "wandb" not in sys.modules
    if command == "exception":
        raise ValueError("of training")
sys.exit(0 if command == "well" else 4)
"""


@pytest.mark.parametrize(
    ("command", "broken", "status"),
    [
        ("well", "service", 0),
        ("exception", "process", 1),
    ],
)
def test_the_exit_status_is_trainings_own(tmp_path, command, broken, status):
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child = int(trainer.stdout.readline())
    wait_for(lambda: list(tmp_path.glob("1/wandb/*/*.wandb")))
    os.kill(child if broken == "process" else children(child)[0], signal.SIGKILL)
    out, err = trainer.communicate(command + "\n", timeout=30)
    assert trainer.returncode == status and not out
    assert ("Traceback" in err) == (command == "exception")
    wait_for(lambda: not Path(f"/proc/{child}").exists())


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_trainer_leaves_failed_runs_and_no_process(tmp_path, kind):
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    child = int(trainer.stdout.readline())
    wait_for(lambda: list(tmp_path.glob("1/wandb/*/*.wandb")))
    (core,) = children(child)
    os.killpg(trainer.pid, kind)  # as a terminal does on Ctrl-C
    assert trainer.wait(timeout=20) == -kind
    wait_for(lambda: not Path(f"/proc/{child}").exists() and not Path(f"/proc/{core}").exists())
    run = Run(tmp_path / "0")
    assert run.exit_code == 1 and run.curve("loss") == [(step, 1.0) for step in range(20)]


def test_a_sweeps_summary_run_shows_the_curves_of_the_results_on_disk(tmp_path):
    words = [*SMALL, *FEW, *WANDB, "method=lora,head", "lr_factor=1,4", "seed=42,43", "name=s"]
    assert command("-m", *words, cwd=tmp_path).returncode == 0
    sweep = tmp_path / "outputs" / "s"
    run = Run(sweep, "*summary*")
    assert run.group == "s" and run.exit_code == 0 and run.summary["status"] == "done"
    assert run.job_type == "report"
    (shown,) = run.history

    def table(key: str) -> dict:
        return json.loads((run.file.parent / "files" / shown[f"{key}/path"]).read_text())

    results = [json.loads(path.read_text()) for path in sweep.glob("*/result.json")]
    assert len(results) == 8
    for result in results:  # each has a run, also those that are the same training as another
        of_trial = Run(sweep / result["id"])
        assert (of_trial.tags, of_trial.job_type) == ({"mrpc", result["config"]["method"]["name"], "tiny"}, "train")
        told = [f"{part}/{key}" for part in ("parameters", "seconds") for key in result[part]]
        assert [of_trial.summary[key] for key in told] == [
            functools.reduce(dict.get, key.split("/"), result) for key in told
        ]
        versions = ("delora", "torch", "transformers", "python")
        assert all(of_trial.summary[f"made_by/{name}"] == result["made_by"][name] for name in versions)
    scores: dict[tuple, list[float]] = {}
    for result in results:
        rate = result["config"]["lr_factor"] if result["config"]["method"]["name"] == "lora" else None
        scores.setdefault((result["config"]["method"]["name"], rate), []).append(
            100 * result["best"]["test"]["accuracy"]
        )
    lines = table("curves/score by factor, MRPC, tiny, synthetic data_table")
    assert lines["columns"] == ["step", "lineKey", "lineVal"]
    drawn = {(name, step): value for step, name, value in lines["data"]}
    for factor in (1, 4):  # its logarithm to base 2 is drawn
        assert drawn["LoRA", {1: 0, 4: 2}[factor]] == pytest.approx(np.mean(scores["lora", factor]))
    assert {name for name, _ in drawn} == {"LoRA", "guessing", "head only"}
    for name in ("score_by_factor", "distance_by_factor"):
        picture = run.file.parent / "files" / shown[f"pictures/{name}/path"]
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert any(row[0] == "LoRA" for row in table("tables/Scores: tiny, paper protocol, synthetic data")["data"])


def test_no_summary_changes_nothing(tmp_path):
    """A broken Matplotlib, as an example of what may go wrong there."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('broken')")
    words = [*SMALL, *FEW, *WANDB, "method=lora", "lr_factor=1,4", "name=s"]
    ended = command("-m", *words, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    assert "no summary of" in ended.stderr and "results are not affected" in ended.stderr
    assert len(list((tmp_path / "outputs" / "s").glob("*/result.json"))) == 2
