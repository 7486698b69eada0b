"""A sweep of 10,000 trials over 64 workers that only pretend to train: what handing out, watching and writing take."""

import argparse
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delora import storage, worker
from delora.config import Trial
from delora.engines.local import Local, Started
from delora.fleets import FLEETS, LOGS, Claim, Group

DESCRIPTION = """Runs delora-run with an engine whose workers sleep a second a trial in place of training, and write
results as training does. Tells how long planning took, the memory of the command, how many files were opened, listed,
renamed and removed for each trial, and for how much of the time workers had nothing to do."""
WORDS = ["model=tiny", "data=synthetic", "data.rows.train=64", "data.rows.validation=40", "logger=none", "device=cpu"]
WORDS += ["method=lora,delora", "lr_factor=0.25,0.5,1,2,4,8,16,32", "name=s", "engine=local"]
COUNTED = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


class Sleepers(Local):
    """Workers that sleep."""

    def workers(self, trials: Sequence[Trial]) -> int:
        return min(self.options.workers or 1, len(trials))

    def start(self, folder: Path, workers: int, detached: bool = False) -> None:
        logs = folder / FLEETS / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        for number in range(workers):
            log = logs / f"{number}.log"
            with log.open("wb") as file:
                words = [sys.executable, __file__, "--worker", str(folder.absolute())]
                process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
            self.started.append(Started(process, None, log))


def main() -> int:
    parser = argparse.ArgumentParser("scale", description=DESCRIPTION)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return sleep_as_worker(options.worker)
    with tempfile.TemporaryDirectory(prefix="delora-scale-") as place:
        folder = Path(place)
        (folder / "counts").mkdir()
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        os.environ |= {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "SCALE": str(folder)}
        seeds = options.trials // 16
        words = [*WORDS, f"seed=range({seeds})", "engine._target_=scale.Sleepers", f"engine.workers={options.workers}"]
        begin = time.time()
        script = "import scale, sys; scale.count('command'); from delora import cli; sys.exit(cli.main())"
        with (folder / "log.txt").open("w") as log:
            command = subprocess.Popen([sys.executable, "-c", script, "-m", *words], cwd=folder, stdout=log, stderr=log)
            _, status, usage = os.wait4(command.pid, 0)
        if status:
            print((folder / "log.txt").read_text()[-3000:])
            return 1
        tell(folder, begin, seeds * 16, usage.ru_maxrss / 1024)
    return 0


def tell(folder: Path, begin: float, trials: int, megabytes: float) -> None:
    done = len(list((folder / "outputs" / "s").glob(f"*/{storage.RESULT}")))
    counts: collections.Counter[str] = collections.Counter()
    fleets: list[list[float]] = []
    by_command: collections.Counter[str] = collections.Counter()
    for path in (folder / "counts").glob("*.json"):
        told = json.loads(path.read_text())
        (by_command if path.stem.startswith("command") else counts).update(told["counts"])
        fleets += [told["fleets"]] if told["fleets"] else []
    first, last = min(f[0][0] for f in fleets), max(f[-1][1] for f in fleets)
    idle = [1 - sum(end - start for start, end in f) / (last - first) for f in fleets]
    print(f"{done} of {trials} trials, {sum(map(len, fleets))} fleets, {len(fleets)} workers")
    print(f"planned {first - begin:.1f} s after the command began; all done after {last - begin:.0f} s")
    print(f"memory of the command: {megabytes:.0f} MB")
    for name, kept in (("by workers", counts), ("by the command", by_command)):
        each = ", ".join(f"{what.removeprefix('os.')} {many / trials:.2f}" for what, many in kept.most_common())
        print(f"for each trial {name}: {each}")
    waited = [(last - f[-1][1]) / (last - first) for f in fleets]
    mean = sum(idle) / len(idle)
    print(f"without a fleet: {mean:.1%} of the workers' time; the first to end waits for {max(waited):.1%} of it")


def count(name: str, fleets: list[tuple[float, float]] | None = None) -> None:
    """Counts what this process does in the sweep's folder, and writes it down in the end."""
    import atexit

    counts: collections.Counter[str] = collections.Counter()
    place = os.environ["SCALE"]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in COUNTED and arguments and (isinstance(arguments[0], int) or _is_in(arguments[0], place)):
            counts[event] += 1

    def write() -> None:
        told = {"counts": dict(counts), "fleets": fleets or []}
        Path(place, "counts", f"{name}-{os.getpid()}.json").write_text(json.dumps(told))

    sys.addaudithook(hear)
    atexit.register(write)


def _is_in(path: object, place: str) -> bool:
    """Whether a path is relative, and so to a folder of the sweep or to the command's own, or in its folder."""
    with contextlib.suppress(TypeError):
        text = os.fsdecode(path)  # type: ignore[arg-type]
        return not text.startswith("/") or text.startswith(place)
    return False


def sleep_as_worker(folder: Path) -> int:
    """A worker without torch, in whose fleets a trial takes a second."""
    fleets: list[tuple[float, float]] = []
    count("worker", fleets)
    for name, values in STUBS.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module

    def train(self: worker.Worker, group: Group, claim: Claim) -> Sequence[Group]:
        start = time.time()
        with contextlib.ExitStack() as opened:
            folders = [opened.enter_context(worker.open_folder(trial)) for trial in group.trials]
            end = start + len(group.trials)
            while time.time() < end:
                time.sleep(min(10, max(0, end - time.time())))
                for one in folders:  # a line each, as logged
                    one.record({"kind": "step", "step": 10, "epoch": 1.0, "loss": 0.5, "lr": 1e-3, "seconds": 1.0})
            for trial, one in zip(group.trials, folders, strict=True):
                one.finish(result_of(trial))
        group.forget()
        fleets.append((start, time.time()))
        return ()

    worker.Worker.train_held = train  # type: ignore[method-assign]
    worker.get_ready = lambda _: None
    worker.device_name = lambda _: "none"
    worker._require_device = lambda: None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return worker.work([str(folder)])


def result_of(trial: Trial) -> Any:
    score = {"epoch": 1, "step": 40, "validation": {"loss": 0.5, "accuracy": 0.5, "f1": 0.5}, "test": None}
    made_by = {**storage.versions(), "device": "none", "cpu": "none", "precision": "float32"}
    origins = {name: {"source": "none", "sha256": "0" * 64} for name in ("data", "weights")}
    return {
        "schema": storage.SCHEMA,
        "id": trial.id,
        "sweep": trial.sweep,
        "status": "done",
        "config": trial.resolved(),
        "headline": "accuracy",
        "best": score,
        "last": score,
        "diverged_step": None,
        "epochs": 1,
        "steps": 40,
        "parameters": {"adapter": 1, "head": 1, "encoder": 1},
        "seconds": {"total": 1.0, "train": 1.0, "evaluate": 0.0},
        "tokens": {"real": 1, "computed": 1},
        "fleet_size": 64,
        "made_by": {**made_by, **origins},
    }


NOTHING = types.SimpleNamespace(sha256="0" * 64, alone=False, type="cpu")
STUBS: dict[str, dict[str, Any]] = {
    "torch": {"device": str},
    "delora.run": {"prepare": lambda trial: (NOTHING, {}, NOTHING), "choose_device": lambda name: NOTHING},
    "delora.cost": {"largest_fleet": lambda *_: 64, "seconds": lambda *_: 1.0},
    "delora.methods.base": {"find": lambda _: NOTHING, "check": lambda _: None},
}

if __name__ == "__main__":
    sys.exit(main())
