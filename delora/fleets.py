"""Fleets as files: which trials train together, how far they are, and who trains them. Imports no torch.

    <sweep>/.fleets/<fleet>/trials.json        the folders of its trials
                            configs.json       their configs, for workers that know no command line
                            state.safetensors  how far training is
                            paused             it is at the rung that it was to train to, see delora/halving.py
                            .claim-0001        who trains it, or did; rewritten as long as it is trained
                            .failed            it failed on two workers, and is not tried again by this command
    <sweep>/.fleets/failed/<trial>.json        why a trial failed on workers
    <sweep>/.fleets/logs/                      what workers say
    <sweep>/.fleets/summary                    wandb has not got the sweep's summary yet

The folder of a sweep, on a file system that all workers see, is all that they share. A fleet belongs to the process
that made its claim with the highest number; that takes an exclusive creation and no lock, which network file systems
may lack. A claim counts as long as it changes, and on its own machine as long as its process lives.
"""

import functools
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from delora import storage
from delora.config import Trial
from delora.errors import UserError
from delora.storage import ResultsError

FLEETS, TRIALS, CONFIGS, STATE, CLAIM = ".fleets", "trials.json", "configs.json", "state.safetensors", ".claim-"
FAILED, LOGS, OVER, SUMMARY, PAUSED = "failed", "logs", ".failed", "summary", "paused"
NAME, GONE = "[0-9a-f]" * 16, ".gone-"
SECONDS_BETWEEN_SIGNS = 10.0  # of life, of a process that trains a fleet
SECONDS_TO_LOSS = 90.0  # without such a sign: file systems may show a change after a minute

# --- Which trials train together


@dataclass(frozen=True)
class Group:
    """Trials that train together.

    Attributes:
        until: the epoch after which they pause, their rung of a halving; None: they train to their end.
        stop: they end there.
    """

    trials: tuple[Trial, ...]
    until: int | None = None
    stop: bool = False

    @property
    def folder(self) -> Path:
        return self.trials[0].folder.parent / FLEETS / fleet_name([trial.folder.name for trial in self.trials])

    @property
    def state(self) -> Path:
        return self.folder / STATE

    def keep(self, of: str | None = None, configs: bool = False) -> None:
        """Writes down which trials train together, from where they have paused on.

        Args:
            of: the fleet that a command knows of which this one is a part.
            configs: their configs too, for workers.
        """
        names = [trial.folder.name for trial in self.trials]
        for attempt in range(5):
            try:
                if configs:
                    data = {"of": of, "until": self.until, "stop": self.stop, "trials": packed(self.trials)}
                    storage.replace(self.folder / CONFIGS, json.dumps(data).encode(), self.trials[0].root)
                storage.replace(self.folder / TRIALS, json.dumps(names).encode(), self.trials[0].root)
                (self.folder / PAUSED).unlink(missing_ok=True)
                return
            except ResultsError:  # another process may remove the folder just then, as its last fleet ended
                if attempt == 4:
                    raise

    def pause(self) -> None:
        """Tells that the state is that of `until`."""
        storage.replace(self.folder / PAUSED, b"", self.trials[0].root)

    def forget(self) -> None:
        forget(self.folder)

    def drop(self) -> None:
        """Forgets the group unless it has begun to train."""
        if not self.state.exists():
            self.forget()

    def halves(self) -> "tuple[Group, Group]":
        """The group in two, each with its part of the state."""
        from delora.run import read_state, write_state

        middle = (len(self.trials) + 1) // 2
        first, second = replace(self, trials=self.trials[:middle]), replace(self, trials=self.trials[middle:])
        stored, of = read_state(self.state), self.known_as
        for half, rows in ((first, slice(None, middle)), (second, slice(middle, None))):
            half.keep(of, configs=of is not None)
            if stored:
                tensors, plain = stored
                lists = {key: value[rows] for key, value in plain.items() if isinstance(value, list)}
                part = {name: tensor[rows] for name, tensor in tensors.items()}
                write_state(half.state, self.trials[0].root, part, {**plain, **lists})
        self.forget()
        return first, second

    @property
    def known_as(self) -> str | None:
        """The fleet of a command's plan that it is, or is a part of; None where no workers are meant to take it."""
        return origin(self.folder)


def fleet_name(names: Sequence[str]) -> str:
    """The name of the fleet of trials in these folders: it tells whether a fleet's trials are damaged."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def kept(fleet: Path) -> list[str]:
    """The folders of a fleet's trials, as `Group.keep` wrote them down.

    Raises:
        FileNotFoundError: another process has just forgotten them.
        ValueError: they are damaged.
    """
    try:
        names = json.loads(storage.content(fleet / TRIALS))
        if isinstance(names, list) and "/" not in "".join(names) and fleet_name(names) == fleet.name:
            return names
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    raise ValueError("damaged, not the trials of this fleet")


def of_workers(fleet: Path) -> Group | None:
    """The fleet in that folder with its trials as they were written down for workers; None where it is gone.

    Raises:
        UserError: its configs are damaged.
    """
    try:
        names = kept(fleet)
        about = json.loads(storage.content(fleet / CONFIGS))
        trials = unpacked(about["trials"], fleet.parent.parent)
        if [trial.folder.name for trial in trials] == names:
            return Group(tuple(trials), about["until"], about["stop"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        pass
    raise UserError(f"{fleet}: {TRIALS} and {CONFIGS} are damaged; the command that began the sweep writes them anew")


def origin(fleet: Path) -> str | None:
    """The name of the fleet, known to a command, that this one is or is a part of; None where it is not for workers."""
    try:
        return json.loads(storage.content(fleet / CONFIGS))["of"] or fleet.name
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def packed(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Trials as plain data: of each company the first one's config, and in which keys the others differ."""
    companies: dict[str, dict[str, Any]] = {}
    for place, trial in enumerate(trials):
        config = trial.resolved()
        first = companies.setdefault(trial.company, {"first": config, "others": []})
        mine, its = storage.flatten(config), storage.flatten(first["first"])
        changes = {key: mine.get(key) for key in {**its, **mine} if mine.get(key) != its.get(key)}
        first["others"].append([place, changes])
    return list(companies.values())


def unpacked(companies: Iterable[Mapping[str, Any]], folder: Path) -> list[Trial]:
    """The trials of `packed`, in their order, with their results in that folder."""
    found: dict[int, Trial] = {}
    for company in companies:
        first = Trial.from_config(company["first"])
        first = first.model_copy(update={"output_dir": _output_dir(first, folder)})
        for place, changes in company["others"]:
            found[place] = first.changed({k: v for k, v in changes.items() if k != "output_dir"})
    return [found[place] for place in range(len(found))]


def _output_dir(trial: Trial, folder: Path) -> str:
    """The `output_dir` by which a trial's results are in that folder, as the trial says it where that leads there."""
    root = folder.parent if trial.sweep else folder
    same = trial.root.exists() and root.exists() and trial.root.samefile(root)
    return trial.output_dir if same else str(root)


def forget(fleet: Path) -> None:
    """Removes a fleet, at once for all who look: in one that is half removed another worker might make its claim."""
    gone = fleet.with_name(f"{GONE}{fleet.name}-{os.getpid()}")
    with suppress(OSError):
        fleet.rename(gone)
    with suppress(OSError):  # first: a state without its trials would stay for good
        (gone / STATE).unlink()
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # others are in it
        fleet.parent.rmdir()


# --- Who trains them


class Lost(UserError):
    """Another process goes on with the fleet, as this one gave no sign of life."""

    status = 1


@dataclass(frozen=True)
class Holder:
    """A claim on a fleet as another process sees it.

    Attributes:
        about: host, machine, pid and start of its process; `state`, how far the fleet was when it was taken; why it
            is over ("failed"); and what the process tells: "doing", "device", "step", "steps", "best" by trial.
    """

    path: Path
    about: Mapping[str, Any]
    raw: bytes

    @property
    def number(self) -> int:
        return int(self.path.name.removeprefix(CLAIM))

    @property
    def worker(self) -> tuple[Any, ...]:
        return tuple(self.about.get(key) for key in ("machine", "pid", "start"))

    def __str__(self) -> str:
        return f"process {self.about.get('pid', '?')} on host {self.about.get('host', '?')}"

    def holds(self) -> bool:
        """Whether the process that made it still trains the fleet."""
        if "failed" in self.about:
            return False
        if self.about.get("machine") == machine():
            return not has_ended(self.about)
        raw, since = _signs.get(self.path, (b"", 0.0))
        if raw != self.raw:
            _signs[self.path] = self.raw, time.monotonic()
            return True
        return time.monotonic() - since < SECONDS_TO_LOSS


_signs: dict[Path, tuple[bytes, float]] = {}  # the last change of each claim from elsewhere, by the own clock


def holders(fleet: Path) -> list[Holder]:
    """The claims on a fleet, first to last."""
    found = []
    with suppress(OSError):
        for name in sorted(os.listdir(fleet)):
            if name.startswith(CLAIM) and name.removeprefix(CLAIM).isdigit():
                raw = b""
                with suppress(OSError):
                    raw = storage.content(fleet / name)
                try:
                    about = json.loads(raw)
                except (ValueError, RecursionError):
                    about = {}  # it is just being written
                found.append(Holder(fleet / name, about if isinstance(about, dict) else {}, raw))
    return found


def holder(fleet: Path) -> Holder | None:
    """Who trains a fleet, if anybody does."""
    last = holders(fleet)[-1:]
    return last[0] if last and last[0].holds() else None


def failures(fleet: Path) -> list[Holder]:
    """The claims of different processes that failed, or were lost, since the fleet has last made progress."""
    now, found = _progress(fleet), dict[tuple[Any, ...], Holder]()
    for one in holders(fleet):
        if one.about.get("state") == now and not one.holds():
            found.setdefault(one.worker, one)
    return list(found.values())


def is_over(fleet: Path) -> bool:
    """Whether a fleet has paused, or has failed, and is not tried again."""
    return os.path.lexists(fleet / PAUSED) or os.path.lexists(fleet / OVER)


def give_up(fleet: Path, failed: Sequence[Holder], root: Path) -> None:
    """Writes down that a fleet has failed on several workers, for each of its trials."""
    told = "; ".join(f"{one}: {one.about.get('failed', 'it was lost')}{_log_of(one)}" for one in failed)
    with suppress(FileNotFoundError, ValueError):
        for name in kept(fleet):
            write_failure(fleet.parent, name, f"failed on {len(failed)} workers: {told}", root)
        storage.replace(fleet / OVER, b"", root)


def _log_of(one: Holder) -> str:
    return f" (log in {one.about['log']})" if one.about.get("log") else ""


def write_failure(folder: Path, trial: str, told: str, root: Path) -> None:
    """Writes down why a trial, by its folder's name, failed on a worker, in the folder of fleets."""
    storage.replace(folder / FAILED / f"{trial}.json", json.dumps(told).encode(), root)


def failure(folder: Path, trial: str) -> str | None:
    """Why a trial failed on a worker, if it did."""
    try:
        return str(json.loads(storage.content(folder / FAILED / f"{trial}.json")))
    except (OSError, ValueError):
        return None


def forget_failures(folder: Path) -> None:
    """Forgets why trials failed: a command tries them again."""
    shutil.rmtree(folder / FAILED, ignore_errors=True)


def forget_gone(folder: Path) -> None:
    """Removes what a kill left of fleets that were being forgotten, in the folder of fleets."""
    for path in folder.glob(f"{GONE}*"):
        shutil.rmtree(path, ignore_errors=True)


def forget_logs(folder: Path) -> None:
    """Forgets what workers said, and why trials failed, in the folder of fleets; removes that where it is empty."""
    for name in (LOGS, FAILED):
        shutil.rmtree(folder / name, ignore_errors=True)
    with suppress(OSError):  # others are in it
        folder.rmdir()


def tidy(fleet: Path) -> None:
    """Forgets who trained a fleet and no longer does, so that it may be tried again."""
    known = holders(fleet)
    if not (known and known[-1].holds()):
        for path in (*(one.path for one in known), fleet / OVER):
            with suppress(OSError):
                path.unlink()


class Claim:
    """A fleet that this process trains, until `release`.

    A thread rewrites the claim with what `tell` gives, by which others see that the process lives and how far it is.
    """

    def __init__(self, fleet: Path, number: int, tell: Callable[[], Mapping[str, Any]] | None = None):
        self.path = fleet / f"{CLAIM}{number:04}"
        self.number, self.tell = number, tell or dict
        self.about = {**process(), "state": _progress(fleet)}
        self._signs, self._lost, self._over = 0, False, threading.Event()
        self._last = time.monotonic()
        self._writing = threading.Lock()

    @classmethod
    def take(cls, fleet: Path, root: Path, tell: Callable[[], Mapping[str, Any]] | None = None) -> Self | None:
        """Takes a fleet that nobody trains; None where somebody does, or where it is gone.

        Args:
            root: of `storage.Folder`.

        Raises:
            ResultsError: the claim cannot be written.
            UserError: a part of the path is a link.
        """
        known = holders(fleet)
        if known and known[-1].holds():
            return None
        claim = cls(fleet, known[-1].number + 1 if known else 1, tell)
        try:
            with storage.Folder(fleet, root, make=False) as folder:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
                with folder.opened(claim.path.name, flags) as file:
                    os.write(file, claim._content())
        except (FileExistsError, FileNotFoundError):
            return None
        except OSError as error:
            raise ResultsError(f"cannot write {claim.path}: {error.strerror}") from error
        threading.Thread(target=claim._give_signs, daemon=True).start()
        return claim

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self, failed: str | None = None) -> None:
        """Gives the fleet free; with why where it failed, for others to count."""
        if self._over.is_set():
            return
        self._over.set()
        with self._writing, suppress(OSError):
            if failed is None:
                self.path.unlink()
            else:
                self.about["failed"] = failed
                self._write()

    def check(self) -> None:
        """Raises Lost where another process may go on with the fleet: nothing of it is to be written any more."""
        if time.monotonic() - self._last > SECONDS_TO_LOSS / 2:  # this process was stopped, or the file system was away
            self._sign()
        if self._lost:
            raise Lost(f"{self.path.parent}: another process goes on with this fleet")

    def _give_signs(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_SIGNS):
            self._sign()

    def _sign(self) -> None:
        with self._writing:
            if self._over.is_set():
                return
            try:
                names = os.listdir(self.path.parent)
                if self.path.name not in names or self.path.name != max(n for n in names if _is_claim(n)):
                    self._lost = True
                    return
                self._write()
                self._last = time.monotonic()
            except FileNotFoundError:
                self._lost = True
            except OSError:
                pass  # the file system may be back soon

    def _write(self) -> None:
        self._signs += 1
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_bytes(self._content())
        os.replace(temporary, self.path)

    def _content(self) -> bytes:
        return json.dumps({**self.about, **self.tell(), "signs": self._signs}).encode()


def _is_claim(name: str) -> bool:
    return name.startswith(CLAIM) and name.removeprefix(CLAIM).isdigit()


def _progress(fleet: Path) -> list[int]:
    """What changes when a fleet's state does."""
    with suppress(OSError):
        found = (fleet / STATE).stat()
        return [found.st_mtime_ns, found.st_size]
    return []


def process() -> dict[str, Any]:
    """What others know this process by."""
    about = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
    log = os.environ.get("DELORA_LOG")  # where an engine has what this process says
    return {**about, "start": _process_start(os.getpid()), **({"log": log} if log else {})}


def has_ended(about: Mapping[str, Any]) -> bool:
    """Whether a process of this machine, as `process` tells of it, has ended; of another machine's it is not known."""
    return about.get("machine") == machine() and _process_start(about["pid"]) != about["start"]


@functools.cache
def machine() -> str:
    """What processes have in common that see each other: host, boot and name space."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """When a process started, in the system's own words; None where there is none, or one that has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return None
    try:  # another system than Linux
        os.kill(pid, 0)
        return ""
    except PermissionError:
        return ""
    except OSError:
        return None
