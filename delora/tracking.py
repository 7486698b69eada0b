"""wandb, a run for each trial and one for their sweep, from a process of its own.

wandb works in a child process (this file, run as a script) that reads messages from a pipe.
Whatever happens there, an error, a hang, a crash, cannot stop or slow training, and nothing of
wandb is imported where training runs: `Tracker.log` puts a line in a queue and returns. The child
notices by the closed pipe when the trainer is gone, however it ended, and marks the runs that were
still open as failed.
"""

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

QUEUE_LINES = 100_000
ID_CHARACTERS = 96  # wandb allows 128
TAG_CHARACTERS = 64  # as many as wandb allows

logger = logging.getLogger(__name__)


# --- In the process that trains


class Tracking:
    """wandb for the trials of this process. Nothing here raises; trouble is logged, a warning for each cause.

    Args:
        mode: "online", "offline", "disabled", or "auto": as wandb's own settings say (WANDB_MODE among them),
            and offline where no account is configured. Where the server is out of reach, the rest is offline.
        project: wandb's project.
        start_timeout: seconds to wait for the server at the start of a run.
        patience: seconds without any progress after which `close` gives up.
    """

    def __init__(self, mode: str, project: str, *, start_timeout: float = 20, patience: float = 30):
        if mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            mode = "disabled"
        self.enabled = mode != "disabled"
        self._settings = {"mode": mode, "project": project, "start_timeout": start_timeout}
        self._patience = patience
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUE_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._threads: list[threading.Thread] = []
        self._stderr: IO[str] | None = None
        self._progress = time.monotonic()
        self._closing = False
        self._gave_up = False
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        trial_id: str,
        config: Mapping[str, Any],
        folder: Path | str,
        group: str | None = None,
        ignore: Collection[str] = (),
        job_type: str = "train",
        tags: Collection[str] = (),
    ) -> "Tracker":
        """Begins a trial's run; its files go below `folder`, or below WANDB_DIR where that is set.

        A trial begun again continues its run, by `run_id`, and must log its whole history again: wandb skips
        what it has, and an earlier offline copy, which this one replaces, is deleted.
        """
        tracker = Tracker(self, run_id(trial_id, config, ignore))
        own = os.environ.get("WANDB_DIR")
        if not own and (links := [path for name in ("wandb", ".wandb") if (path := Path(folder, name)).is_symlink()]):
            self._warn(f"{trial_id} is not tracked: {links[0]} is a link, and nothing is written through it")
            return tracker
        if self.enabled and self._process is None:
            self._launch()
        self._send(
            {
                "do": "start",
                "run": tracker.id,
                "name": trial_id,
                "group": group,
                "config": config,
                "job_type": job_type,
                "tags": [tag[:TAG_CHARACTERS] for tag in dict.fromkeys(tags)],
                "dir": own or str(Path(folder).absolute()),
            }
        )
        return tracker

    def close(self) -> None:
        """Waits until wandb has the rest of what was logged. Runs not finished are marked as failed."""
        if self._process is None:
            return
        self._closing = True
        self._progress = time.monotonic()
        try:
            self._lines.put(None, timeout=self._patience if self.enabled else 0)
            while self._process.poll() is None and time.monotonic() - self._progress < self._patience:
                self._threads[-1].join(timeout=0.05)
        except queue.Full:
            pass
        finally:
            if self._process.poll() is None:
                self._gave_up = True
                self._process.kill()
                self._warn("wandb does not answer; `wandb sync` uploads what it has on disk")
            for thread in self._threads:
                thread.join(timeout=5)
            self._process = None
            self.enabled = False

    def _launch(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        environment.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means no network
        command = [sys.executable, "-P", __file__, json.dumps(self._settings), str(os.getpid()), *sys.argv]
        try:
            self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches the trainer alone
            )
        except OSError as error:
            self._fail(f"wandb could not be started: {error}")
            return
        self._threads = [
            threading.Thread(target=self._write, args=(self._process.stdin,), daemon=True),
            threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, message: Mapping[str, Any]) -> None:
        if not self.enabled or self._closing:
            return
        try:
            self._lines.put_nowait(json.dumps(message, default=_number) + "\n")
        except queue.Full:
            self._fail("wandb does not keep up")
        except (TypeError, ValueError, RuntimeError) as error:  # no number, of numpy, of torch
            self._warn(f"not sent to wandb: {error}")

    def _write(self, pipe: IO[str]) -> None:
        try:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                if self._lines.empty():
                    pipe.flush()
                self._progress = time.monotonic()
            pipe.close()
        except (OSError, ValueError):
            pass  # the child is gone, which `_listen` notices

    def _listen(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._progress = time.monotonic()
            event = json.loads(line)
            if "warning" in event:
                self._warn(event["warning"])
            else:
                logger.info("wandb %s", event["info"])
        assert self._process is not None and self._stderr is not None
        status = self._process.wait()
        if not self._gave_up and (status or not self._closing):
            self._stderr.seek(0)
            last = self._stderr.read().strip().rpartition("\n")[2]
            self._fail(f"wandb's process ended with status {status}. {last}".strip())

    def _fail(self, message: str) -> None:
        self.enabled = False
        self._warn(f"{message}; the rest of the run is not tracked")

    def _warn(self, message: str) -> None:
        known = message in self._warned
        self._warned.add(message)
        logger.log(logging.INFO if known else logging.WARNING, "%s (results are not affected)", message)


class Tracker:
    """The wandb run of one trial; made by `Tracking.start`."""

    def __init__(self, tracking: Tracking, id: str):
        self.id = id
        self._tracking = tracking

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Logs numbers, {"distance": {"layer": 1.0}} as "distance/layer", None not at all."""
        self._tracking._send({"do": "log", "run": self.id, "values": _flat(values), "step": step})

    def show(self, content: Mapping[str, Any]) -> None:
        """Shows what `delora.report.summary` makes; shown again, in a later process, the newer stands for the run."""
        self._tracking._send({"do": "show", "run": self.id, **content})

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """Ends the run: done, diverged or failed; wandb shows the last as failed. Does not wait for wandb."""
        summary = {"status": status, **_flat(summary)}
        self._tracking._send({"do": "finish", "run": self.id, "failed": status == "failed", "summary": summary})


def run_id(trial_id: str, config: Mapping[str, Any], ignore: Collection[str] = ()) -> str:
    """The id of a trial's wandb run: the same for the same trial with the same config, on any day.

    Args:
        ignore: dotted keys or groups ("logger") of the config that do not make another run.
    """
    ignored = tuple(f"{key.replace('.', '/')}/" for key in ignore)
    told = {key: value for key, value in _flat(config).items() if not f"{key}/".startswith(ignored)}
    text = json.dumps([trial_id, told], sort_keys=True, default=str)
    readable = re.sub(r"[^A-Za-z0-9._=-]+", "-", trial_id)[:ID_CHARACTERS]
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _number(value: Any) -> Any:
    """A scalar of numpy or torch as a number."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is no number")


# --- In wandb's process


class Worker:
    """Does what the messages say: one wandb run for each trial, all open at once."""

    def __init__(self, events: IO[str], settings: Mapping[str, Any], trainer: int):
        import wandb

        self.wandb = wandb
        self.events = events
        self.mode: str | None = None if settings["mode"] == "auto" else settings["mode"]
        self.project: str = settings["project"]
        self.timeout: float = settings["start_timeout"]
        self.trainer = trainer
        self.runs: dict[str, Any] = {}
        self.unreachable = False

    def start(self, run: str, dir: str, **about: Any) -> None:
        name = about["name"]
        self.finish(run, failed=True, summary={})  # of an earlier attempt at the same trial
        earlier = list(Path(dir, "wandb").glob(f"offline-run-*-{run}*"))
        started = self._try(run, self.mode, dir=dir, **about)
        if started is None:
            self.mode = "offline"
            # wandb's service never lets go of the id of a run that failed to start; a new service can use it
            if not self.runs:
                self._teardown()
            id = f"{run}-offline" if self.runs else run
            started = self._try(id, "offline", dir=dir, **about)
        if started is None:
            return
        self.runs[run] = started
        for folder in earlier if not started.disabled else ():
            shutil.rmtree(folder, ignore_errors=True)
        self.tell(info=f"{started.settings.mode} run {name}: {started.url or started.settings.sync_dir}")

    def log(self, run: str, values: dict[str, Any], step: int) -> None:
        if run in self.runs:
            with self._caught("wandb failed, trials are no longer tracked"):
                self.runs[run].log(values, step=step)
                return
            del self.runs[run]

    def show(self, run: str, charts: list[dict[str, Any]], tables: dict[str, Any], pictures: dict[str, str]) -> None:
        if run not in self.runs:
            return
        with self._caught("wandb could not show the sweep's curves"):
            shown: dict[str, Any] = {}
            for chart in charts:
                xs, ys = zip(*chart["lines"].values(), strict=True)
                titles = {"title": chart["title"], "xname": chart["x"]}
                shown[f"curves/{chart['name']}"] = self.wandb.plot.line_series(xs, ys, list(chart["lines"]), **titles)
            for title, (columns, *rows) in tables.items():
                shown[f"tables/{title}"] = self.wandb.Table(columns=columns, data=rows)
            for name, path in pictures.items():
                shown[f"pictures/{name}"] = self.wandb.Image(path)
            self.runs[run].log(shown)

    def finish(self, run: str, failed: bool, summary: dict[str, Any]) -> None:
        open_run = self.runs.pop(run, None)
        if open_run is None or (self.unreachable and not open_run.offline):
            return
        with self._caught("wandb could not finish a run"):
            try:
                open_run.summary.update(summary)
                open_run.finish(exit_code=int(failed))
                self.tell(info=f"run {open_run.name} is finished")
            except TimeoutError:
                self.unreachable, self.mode = True, "offline"
                self.tell(warning="wandb's server does not answer; `wandb sync` uploads what is on disk")

    def close(self) -> None:
        for run in list(self.runs):
            self.finish(run, failed=True, summary={})
        if not self.unreachable:
            self._teardown()

    def tell(self, **event: str) -> None:
        with contextlib.suppress(OSError):  # the trainer may be gone
            self.events.write(json.dumps(event) + "\n")
            self.events.flush()

    def _try(self, id: str, mode: Any, **arguments: Any) -> Any:
        settings = self.wandb.Settings(
            silent=True,
            console="off",
            symlink=False,
            disable_git=True,  # it would describe the current folder, not delora
            disable_code=True,
            init_timeout=self.timeout,
            finish_timeout=self.timeout,
            finish_timeout_raises=True,
            x_stats_pid=self.trainer,
        )
        arguments |= {"id": id, "mode": mode, "project": self.project, "settings": settings}
        with self._caught(f"wandb could not start {mode or 'online'}"):
            try:
                return self.wandb.init(resume="allow", reinit="create_new", **arguments)
            except self.wandb.errors.UsageError as error:
                if mode is not None or "API key" not in str(error):
                    raise
                self.tell(info="has no account configured (`wandb login`): runs are kept offline")
        return None

    def _teardown(self) -> None:
        with contextlib.suppress(Exception, SystemExit):
            self.wandb.teardown()

    @contextlib.contextmanager
    def _caught(self, what: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split())[:300]
            self.tell(warning=f"{what}: {type(error).__name__}: {reason}")


def main() -> None:
    """Reads messages from standard input until it is closed."""
    settings, trainer, *sys.argv = sys.argv[1:]  # the rest is the trainer's command, which wandb records
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # wandb's stop button interrupts this process
    messages, events = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # neither pipe is for wandb's own processes
    os.dup2(2, 1)
    worker = Worker(events, json.loads(settings), int(trainer))
    for line in messages:
        if not line.endswith("\n"):
            break  # torn by the end of the trainer
        message = json.loads(line)
        getattr(worker, message.pop("do"))(**message)
    worker.close()
    os._exit(0)  # wandb's own exit may wait for a server without end


if __name__ == "__main__":
    main()
