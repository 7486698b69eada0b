"""Workers on this machine: processes that each see one GPU, or share one."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from delora.config import EngineConfig, Trial
from delora.engines.base import ENDED, RUNNING, Engine, WorkerState
from delora.errors import UserError
from delora.fleets import FLEETS, LOGS
from delora.terminal import counted

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS_TO_SAVE = 60.0  # that a worker takes at most to save a fleet and end


@dataclass
class Started:
    """A worker's process, its GPU and its log."""

    process: "subprocess.Popen[bytes]"
    gpu: str | None
    log: Path


class Local(Engine):
    """Starts processes. CUDA_VISIBLE_DEVICES says before Python starts which GPU one sees."""

    measures_here = True

    def __init__(self, options: EngineConfig):
        super().__init__(options)
        self.started: list[Started] = []
        self.sharing: Sharing | None = None

    def workers(self, trials: Sequence[Trial]) -> int:
        device = trials[0].device
        if ":" in device:
            raise UserError(f"device={device}: a worker is given its GPU; device=auto, or engine=here for that one")
        gpus = len(visible_gpus()) if device in ("auto", "cuda") else 0
        wanted, room = self.options.workers, gpus * self.options.per_gpu
        if gpus and wanted and wanted > room:
            what = f"{counted(gpus, 'GPU')} here, at engine.per_gpu={self.options.per_gpu}"
            raise UserError(f"engine.workers={wanted}: there is room for {counted(room, 'worker')} ({what})")
        return min(wanted or room or 1, len(trials))

    def start(self, folder: Path, workers: int, detached: bool = False) -> None:
        gpus = visible_gpus()
        if self.options.per_gpu > 1 and gpus and not detached and self.sharing is None:
            self.sharing = Sharing()
        (folder / FLEETS / LOGS).mkdir(parents=True, exist_ok=True)
        taken = [one.gpu for one in self.started if one.process.poll() is None]
        for _ in range(workers):
            taken.append(min(gpus, key=taken.count, default=None))
            self.started.append(self._start_one(folder, taken[-1], workers, detached))

    def _start_one(self, folder: Path, gpu: str | None, workers: int, detached: bool) -> Started:
        log = folder / FLEETS / LOGS / f"{socket.gethostname()}-{os.getpid()}-{len(self.started) + 1}.log"
        words = [sys.executable, "-m", "delora.cli", "--worker", str(folder.absolute()), "--share", str(self.share)]
        words += [] if detached else ["--parent", str(os.getpid())]
        words += ["--memory", str(self.options.gpu_memory)] if self.options.gpu_memory else []
        environment = {**os.environ, "DELORA_LOG": str(log), **(self.sharing.environment if self.sharing else {})}
        if gpu is not None:
            environment[VISIBLE] = gpu
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
        with log.open("wb") as file:
            process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the command alone, which then asks them
            )
        return Started(process, gpu, log)

    def look(self) -> list[WorkerState]:
        found = []
        for one in self.started:
            status = one.process.poll()
            told = last_words(one.log) if status else ""
            state = RUNNING if status is None else ENDED
            found.append(WorkerState(f"process {one.process.pid}", state, status, told, one.log))
        return found

    def stop(self) -> None:
        alive = [one.process for one in self.started if one.process.poll() is None]
        for process in alive:
            process.terminate()
        end = time.monotonic() + SECONDS_TO_SAVE
        for process in alive:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        if self.sharing:
            self.sharing.end()
            self.sharing = None

    def wait(self) -> tuple[int, str]:
        """Waits for all workers; the exit status of the one that went worst, and what it said."""
        while any(state.state == RUNNING for state in self.look()):
            time.sleep(0.2)
        self.stop()
        worst = max(self.look(), key=lambda state: abs(state.status or 0))
        return worst.status or 0, worst.told

    def describe(self, workers: int) -> str:
        gpus = len(visible_gpus())
        return f"{counted(workers, 'worker')} on {counted(gpus, 'GPU') if gpus else 'the CPU'}"


def on_all_devices(folder: Path, options: EngineConfig, per_gpu: int) -> Local:
    """Starts so many workers on each GPU that a job of another engine is given, or one where it has none.

    Raises:
        UserError: the sweep's folder is not seen here.
    """
    if not (folder / FLEETS).is_dir():
        host = socket.gethostname()
        raise UserError(f"{folder} is not seen on {host}, or nothing waits for workers there: is that folder shared?")
    local = Local(options)
    local.start(folder, max(1, len(visible_gpus()) * per_gpu))
    return local


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; starts no CUDA."""
    if (named := os.environ.get(VISIBLE)) is not None:
        return [gpu for gpu in named.split(",") if gpu.strip()]
    if sys.platform == "linux" and not list(Path("/dev").glob("nvidia[0-9]*")):
        return []
    try:
        import torch
    except ImportError:
        return []
    return [str(number) for number in range(torch.cuda.device_count())]


def last_words(log: Path) -> str:
    """What a worker said last: its error, without what comes before."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    errors = [place for place, line in enumerate(lines) if line.startswith("delora-run: error:")]
    return "\n".join(lines[errors[-1] :] if errors else lines[-1:]).removeprefix("delora-run: error: ")


class Sharing:
    """CUDA's Multi-Process Service: kernels of several processes run on a GPU at the same time, not in turns.

    Says on standard error whether it could be started; without it the workers run all the same.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="delora-mps-"))
        own = {"CUDA_MPS_PIPE_DIRECTORY": str(self.folder), "CUDA_MPS_LOG_DIRECTORY": str(self.folder)}
        self.environment: dict[str, str] = {}
        told = "nvidia-cuda-mps-control is not installed"
        if shutil.which("nvidia-cuda-mps-control"):
            self.environment = own
            status, told = self._control("-d")
            if status:
                self.environment = {}
        how = "through CUDA's MPS" if self.environment else f"in turns, MPS could not be started: {told}"
        print(f"workers share a GPU {how}", file=sys.stderr)

    def end(self) -> None:
        if self.environment:
            self._control(words="quit")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _control(self, *options: str, words: str = "") -> tuple[int, str]:
        try:
            run = subprocess.run(
                ["nvidia-cuda-mps-control", *options],
                input=words,
                env={**os.environ, **self.environment},
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return 1, str(error)
        return run.returncode, (run.stderr or run.stdout).strip().partition("\n")[0]
