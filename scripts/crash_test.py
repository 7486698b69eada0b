"""Kills a sweep again and again; the results must be those of an undisturbed one, to the bit."""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delora import cli, storage
from delora.config import NOT_THE_TRIAL

DESCRIPTION = """Kills a sweep of eight trials with SIGKILL, at random moments and before chosen file operations, starts
it again until it has ended, and compares all that it found with what an undisturbed sweep finds. After half of the
kills the disk is left as a loss of power might: what was not synced is cut, undone or zeroed. Most processes are forked
from one that has imported torch; the others are whole new ones, with wandb. The same command goes on where it was."""
EXAMPLES = """examples:
  scripts/crash_test                                              30 kills, a minute or two
  scripts/crash_test --kills 1000                                 about an hour on one core
  scripts/crash_test model=minilm epochs=2 data.rows.train=16     a loaded encoder with dropout
"""
SWEEP = ["model=tiny", "data=synthetic", "data.rows.train=64", "data.rows.validation=40", "epochs=4", "batch_size=16"]
SWEEP += ["max_length=64", "device=cpu", "log_every=1", "fleet.checkpoint_seconds=0", "method.dropout=0.1", "name=s"]
SWEEP += ["method=delora,lora", "lr_factor=0.5,2", "seed=1,2"]
WITHOUT, WITH_WANDB = ["logger=none"], ["logger=wandb", "logger.mode=offline"]
TRIALS = 8
OPERATIONS = ("open", "write", "fsync", "ftruncate", "replace", "unlink", "mkdir", "rmdir")
STARTING, TRAINING, AFTER = "while starting", "while training", "after the last result"
FRESH, FORKED, TORN = "of new processes", "of forked ones", "then without power"
JOURNAL = "journal"
SECONDS_OF_WANDB = 30  # in which the wandb process of one that was killed has ended


def main() -> int:
    parser = argparse.ArgumentParser(
        "crash_test", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("outputs/crash"), help="keeps count and place")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="changes the sweep")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return Crashes(options.output.absolute(), options.words).go_on(options.kills)


class Crashes:
    """A series of sweeps that are killed; its count and place are in `progress.json`."""

    def __init__(self, folder: Path, words: list[str]):
        import delora.cost
        import delora.run
        import delora.sweep  # noqa: F401 - what is forked has imported torch

        self.folder, self.words = folder, ["-m", *SWEEP, *words]
        folder.mkdir(parents=True, exist_ok=True)
        self.progress: dict[str, Any] = {
            "words": words,
            "kills": 0,
            "processes": 0,
            "counts": {},
            "sweeps": 0,
            "mismatches": [],
        }
        if (folder / "progress.json").exists():
            self.progress = json.loads((folder / "progress.json").read_text())
            if self.progress["words"] != words:
                raise SystemExit(
                    f"crash_test: error: {folder} holds the kills of another sweep: choose another --output"
                )
        self.counts = Counter(self.progress["counts"])

    def go_on(self, wanted: int) -> int:
        start, before = time.monotonic(), self.progress["kills"]
        whole, operations, seconds = self._undisturbed()
        while self.progress["kills"] < wanted:
            place = self.folder / f"sweep-{self.progress['sweeps']}"
            self._one_sweep(place, wanted, operations, seconds)
            for fault in faults(place / "outputs" / "s", whole):
                self._tell(f"{place.name}: {fault}")
            if not any(text.startswith(f"{place.name}:") for text in self.progress["mismatches"]):
                shutil.rmtree(place)
            self.progress["sweeps"] += 1
            self._keep()
            print(self._told(), flush=True)
        minutes = (time.monotonic() - start) / 60
        print(f"{self._told()} ({self.progress['kills'] - before} kills in {minutes:.0f} minutes)")
        return 1 if self.progress["mismatches"] else 0

    def _tell(self, mismatch: str) -> None:
        self.progress["mismatches"].append(mismatch)
        print(mismatch, flush=True)

    def _told(self) -> str:
        told = ", ".join(f"{self.counts[key]} {key}" for key in (STARTING, TRAINING, AFTER, FRESH, FORKED, TORN))
        mismatches = len(self.progress["mismatches"])
        return f"{self.progress['kills']} kills in {self.progress['sweeps']} sweeps: {told}; {mismatches} mismatches"

    def _keep(self) -> None:
        self.progress["counts"] = dict(self.counts)
        storage.replace(self.folder / "progress.json", json.dumps(self.progress, indent=1).encode())

    def _undisturbed(self) -> tuple[dict[str, Any], int, float]:
        """What a sweep finds that nothing disturbs, its number of file operations, and seconds until it trains."""
        place = self.folder / "undisturbed"
        if "operations" not in self.progress:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            start, seconds = time.monotonic(), 0.0
            process = Forked(self.words, place, kill_at=None)
            while process.runs():
                time.sleep(0.005)
                seconds = seconds or (bool(written(place / "outputs" / "s")) and time.monotonic() - start)
            if process.status:
                raise SystemExit(f"crash_test: error: the undisturbed sweep fails:\n{process.output()}")
            self.progress |= {"operations": Journal(place).operations(), "seconds": seconds}
            self._keep()
        found = everything(place / "outputs" / "s")
        assert len(found) == TRIALS
        return found, self.progress["operations"], self.progress["seconds"]

    def _one_sweep(self, place: Path, wanted: int, operations: int, seconds: float) -> None:
        """Kills a sweep, starts it again, and so on until it has ended; then once undisturbed."""
        place.mkdir(exist_ok=True)
        root, journal = place / "outputs" / "s", Journal(place)
        ended = times(root)
        while len(ended) < TRIALS and self.progress["kills"] < wanted:
            draw = random.Random(f"{self.progress['processes']} {self.words}")
            self.progress["processes"] += 1
            before, fresh, at_operation = written(root), draw.random() < 0.05, draw.random() < 0.5
            if fresh:
                process: Fresh | Forked = Fresh(self.words, place)
            else:
                process = Forked(self.words, place, int(operations * draw.random() ** 2) if at_operation else None)
            if fresh or not at_operation:
                wait(process, root, draw, seconds * (6 if fresh else 1))
            else:
                while process.runs():
                    time.sleep(0.01)
            killed = process.kill()
            if {name: at for name, at in times(root).items() if name in ended} != ended:
                self._tell(f"{place.name}: a result was touched")
            ended = times(root)
            if killed:
                moment = AFTER if len(ended) == TRIALS else STARTING if written(root) == before else TRAINING
                self.counts.update([moment, FRESH if fresh else FORKED])
                self.progress["kills"] += 1
            elif process.status:
                raise SystemExit(f"crash_test: error: {place}:\n{process.output()}")
            if fresh:
                journal.settle()  # what it synced is not recorded
            elif killed and draw.random() < 0.5:
                journal.tear(draw)
                self.counts[TORN] += 1
                ended = times(root)
            self._keep()
        process = Forked(self.words, place, kill_at=None)
        while process.runs():
            time.sleep(0.01)
        if process.status:
            raise SystemExit(f"crash_test: error: {place}:\n{process.output()}")


def wait(process: "Fresh | Forked", root: Path, draw: random.Random, seconds: float) -> None:
    """Until a random moment: while it starts, after so many writes seen from outside, or at its end."""
    kind, last = draw.random(), written(root)
    if kind < 0.3:
        time.sleep(draw.uniform(0, seconds))
        return
    writes = draw.randrange(1, 60)
    while process.runs() and (kind > 0.8 or writes) and len(times(root)) < TRIALS:
        time.sleep(0.005)
        now = written(root)
        writes, last = writes - (now != last), now
    time.sleep(draw.uniform(0, 0.1))


# --- Processes


class Fresh:
    """A new process, tracked by wandb."""

    def __init__(self, words: list[str], place: Path):
        self.log = place / "output.txt"
        with self.log.open("w") as output:
            command = [sys.executable, "-m", "delora.cli", *words, *WITH_WANDB]
            self.process = subprocess.Popen(command, cwd=place, stdout=output, stderr=output)

    @property
    def status(self) -> int | None:
        return self.process.returncode

    def runs(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> bool:
        """Whether it was killed, and had not ended by itself."""
        self.process.kill()
        self.process.wait()
        return self.status == -signal.SIGKILL

    def output(self) -> str:
        return self.log.read_text()


class Forked(Fresh):
    """A process forked from this one, whose file operations are recorded.

    Args:
        kill_at: the file operation before which it kills itself.
    """

    def __init__(self, words: list[str], place: Path, kill_at: int | None):
        self.log, self._status = place / "output.txt", None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.chdir(place)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(output, 1), os.dup2(output, 2)
            Recorder(place, kill_at).watch()
            sys.argv = ["delora-run", *words, *WITHOUT]
            status = cli.main()
        except BaseException:
            traceback.print_exc()
            status = os.EX_SOFTWARE
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

    @property
    def status(self) -> int | None:
        return self._status

    def runs(self) -> bool:
        if self._status is None:
            pid, ended = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(ended) if pid else None
        return self._status is None

    def kill(self) -> bool:
        if self.runs():
            os.kill(self.pid, signal.SIGKILL)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status == -signal.SIGKILL


# --- Disks without power


class Recorder:
    """Writes down what a process does to the files below `place`/outputs, with what it undoes, in a journal."""

    def __init__(self, place: Path, kill_at: int | None):
        self.below, self.journal, self.kill_at = str(place / "outputs"), place / JOURNAL, kill_at
        self.journal.mkdir(exist_ok=True)
        self.lines = os.open(self.journal / "lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.plain = {name: getattr(os, name) for name in OPERATIONS}
        self.count = 0

    def watch(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._watched(name))

    def _watched(self, name: str) -> Any:
        plain = self.plain[name]

        def operation(*arguments: Any, **named: Any) -> Any:
            path = self._path(name, arguments, named)
            if not path.startswith(self.below):
                return plain(*arguments, **named)
            entry = {"do": name, "path": path}
            if name == "open":
                if not arguments[1] & os.O_CREAT or os.path.lexists(path):
                    return plain(*arguments, **named)
            elif name == "write":
                entry = {}
            self.count += 1
            if self.count - 1 == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if name in ("unlink", "replace"):
                entry["old"] = self._saved(path)
            done = plain(*arguments, **named)
            if name == "fsync" and path.endswith(storage.METRICS):
                entry["copy"] = self._saved(path, copy=True)
            self.plain["write"](self.lines, (json.dumps(entry) + "\n").encode())
            return done

        return operation

    def _path(self, name: str, arguments: tuple, named: dict[str, Any]) -> str:
        if name in ("write", "fsync", "ftruncate"):
            return os.readlink(f"/proc/self/fd/{arguments[0]}")
        place = arguments[1] if name == "replace" else arguments[0]
        descriptor = named.get("dst_dir_fd" if name == "replace" else "dir_fd")
        folder = os.getcwd() if descriptor is None else os.readlink(f"/proc/self/fd/{descriptor}")
        return os.path.join(folder, os.fsdecode(place))

    def _saved(self, path: str, copy: bool = False) -> str | None:
        """Keeps a file that goes, by a link, or as it is at this moment, by a copy."""
        name = f"{os.getpid()}-{self.count}"
        if not os.path.isfile(path):
            return None
        if copy:
            shutil.copyfile(path, self.journal / name)
        else:
            os.link(path, self.journal / name)
        return name


class Journal:
    """What processes did to the files of a sweep since power was lost, if it ever was."""

    def __init__(self, place: Path):
        self.place, self.folder = place, place / JOURNAL

    def entries(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.folder / "lines").read_text().splitlines()]
        return []

    def operations(self) -> int:
        return len(self.entries())

    def tear(self, draw: random.Random) -> None:
        """Leaves the files as a loss of power might: names that no sync of their folder kept, bytes that none kept."""
        entries = self.entries()
        kept = {entry["path"]: place for place, entry in enumerate(entries) if entry.get("do") == "fsync"}
        for place, entry in reversed(list(enumerate(entries))):
            path = Path(entry.get("path", "/"))
            if place < kept.get(str(path.parent), -1) or draw.random() < 0.5:
                continue
            match entry.get("do"):
                case "open" | "replace" if path.is_file():
                    path.unlink()
                    self._restore(entry, path)
                case "unlink":
                    self._restore(entry, path)
                case "mkdir":
                    shutil.rmtree(path, ignore_errors=True)
        copies = {e["path"]: (self.folder / e["copy"]).read_bytes() for e in entries if e.get("copy")}
        for path in sorted(self.place.glob(f"outputs/s/*/{storage.METRICS}")):
            there, safe = path.read_bytes(), copies.get(str(path), self._durable(path))
            path.write_bytes(torn(there, safe, draw))
        self.settle()

    def settle(self) -> None:
        """Takes all that is there for synced."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.place.glob(f"outputs/s/*/{storage.METRICS}"):
            self._durable_copy(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self._durable_copy(path))

    def _restore(self, entry: dict[str, Any], path: Path) -> None:
        if entry.get("old") and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / entry["old"], path)

    def _durable_copy(self, path: Path) -> Path:
        return self.folder / "durable" / path.parent.name

    def _durable(self, path: Path) -> bytes:
        copy = self._durable_copy(path)
        return copy.read_bytes() if copy.exists() else b""


def torn(there: bytes, safe: bytes, draw: random.Random) -> bytes:
    """A file of which `safe` was synced and `there` was written."""
    if not there.startswith(safe):  # it was cut since
        return draw.choice([there, safe])
    cut = draw.randint(len(safe), len(there))
    return there[:cut] + bytes(len(there) - cut if draw.random() < 0.3 else 0)


# --- What a sweep found


def written(root: Path) -> dict[str, int]:
    """When each file that training writes was written last."""
    names = ("*/metrics.jsonl", ".fleets/*/state.safetensors", "*/result.json")
    found = {}
    for path in (path for name in names for path in root.glob(name)):
        with contextlib.suppress(FileNotFoundError):
            found[str(path)] = path.stat().st_mtime_ns
    return found


def times(root: Path) -> dict[str, int]:
    """When each result was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob(f"*/{storage.RESULT}")}


def everything(root: Path) -> dict[str, Any]:
    """All that a sweep found, less times, by trial; tensors as their bytes. Every file is the one its result means."""
    kept = {}
    for trial in storage.find(root).trials:
        result = {k: v for k, v in storage.without_hashes(trial.result).items() if k not in ("seconds", "made_by")}
        result["config"] = {k: v for k, v in result["config"].items() if k not in NOT_THE_TRIAL}
        steps = [{k: v for k, v in step.items() if k != "seconds"} for step in trial.steps()]
        tensors = {
            name: {key: tensor.numpy().tobytes() for key, tensor in trial.tensors(name, "pt").items()}
            for name in (storage.ADAPTER, storage.PREDICTIONS)
        }
        kept[trial.folder.name] = (result, steps, list(trial.evaluations()), tensors)
    return kept


def faults(root: Path, whole: dict[str, Any]) -> Iterator[str]:
    """What differs from an undisturbed sweep, or was left behind."""
    try:
        found = everything(root)
    except storage.ResultsError as error:
        yield str(error)
        return
    yield from (f"{name} is lost" for name in whole.keys() - found.keys())
    for name in found.keys() & whole.keys():
        parts = zip(("result", "steps", "evaluations", "tensors"), found[name], whole[name], strict=True)
        yield from (f"{name}: other {part}" for part, ours, theirs in parts if ours != theirs)
    stored = storage.find(root)
    yield from (f"{path}: {why}" for path, why in stored.problems)
    yield from (f"{path} is not finished" for path in stored.unfinished)
    yield from (f"{path.name} is left" for path in root.glob(".fleets"))
    yield from (f"{path} is left" for path in root.glob("*/.*.tmp"))
    patience = time.monotonic() + SECONDS_OF_WANDB
    while (several := with_several_runs(root)) and time.monotonic() < patience:
        time.sleep(0.1)
    yield from (f"{path}: several wandb runs" for path in several)


def with_several_runs(root: Path) -> list[Path]:
    return [path for path in root.glob("*-seed*") if len(list(path.glob("wandb/offline-run-*"))) > 1]


if __name__ == "__main__":
    sys.exit(main())
