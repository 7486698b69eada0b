"""Workers as jobs of a SLURM cluster, an array of them, through submitit."""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from delora.config import EngineConfig, Trial
from delora.engines.base import ENDED, QUEUED, RUNNING, Engine, WorkerState
from delora.engines.local import Local, last_words, on_all_devices
from delora.errors import UserError
from delora.fleets import FLEETS, LOGS
from delora.terminal import counted

try:
    import submitit
except ImportError:
    raise UserError("engine=slurm needs submitit: pip install 'delora[slurm]'") from None

SECONDS_BETWEEN_QUESTIONS = 10.0  # at the controller, whom all of a cluster's users ask
SECONDS_TO_BE_KILLED = 600.0
TERMINATED = 128 + 15
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "CONFIGURING", "PREEMPTED", "SPECIAL_EXIT")
GOING = ("RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")


class Slurm(Engine):
    """Queues jobs. Each starts a worker on each GPU that it is given; one without, one."""

    def __init__(self, options: EngineConfig):
        super().__init__(options)
        self.jobs: list[submitit.Job[Any]] = []
        self._states: dict[str, str] = {}
        self._asked: float | None = None

    def workers(self, trials: Sequence[Trial]) -> int:
        return min(self.options.workers or 1, len(trials))

    def start(self, folder: Path, workers: int, detached: bool = False) -> None:
        logs = folder / FLEETS / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        own = self.options.own()
        wanted = {
            "job_name": f"delora-{folder.name}",
            "time": own["minutes"],
            "signal_delay_s": own["notice"],
            **{key: own[key] for key in ("partition", "gres", "account", "qos", "constraint", "mem")},
            "cpus_per_task": own["cpus"],
            "setup": own["setup"],
            "additional_parameters": own["sbatch"],
            "stderr_to_stdout": True,
        }
        try:
            executor = submitit.SlurmExecutor(folder=logs.absolute(), max_num_timeout=own["timeouts"])
            executor.update_parameters(**{key: value for key, value in wanted.items() if value})
            with executor.batch():
                jobs = [executor.submit(Job(folder.absolute(), self.options)) for _ in range(workers)]
        except (OSError, RuntimeError) as error:  # no srun, no sbatch
            raise UserError(f"engine=slurm: {error}: this is no machine that queues jobs") from None
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"engine=slurm: {_words(str(error))}") from None
        self.jobs += jobs
        self._asked = None
        print(f"queued: SLURM job {jobs[0].job_id.partition('_')[0]}, {counted(workers, 'worker')}", file=sys.stderr)

    def look(self) -> list[WorkerState]:
        if self._asked is None or time.monotonic() - self._asked > SECONDS_BETWEEN_QUESTIONS:
            self._ask()
        found = []
        for job in self.jobs:
            state, log = self._states.get(job.job_id, ENDED), Path(job.paths.stdout)
            status, told = None, ""
            if state == ENDED:
                with suppress(Exception):  # a pickle, which may be torn or not there
                    outcome, result = job._get_outcome_and_result()
                    status, told = result if outcome == "success" else (1, last_words(log))
            found.append(WorkerState(f"job {job.job_id}", state, status, told, log))
        return found

    def _ask(self) -> None:
        """Asks which jobs there are. One that has been queued and is unknown has ended."""
        arrays = ",".join(dict.fromkeys(job.job_id.partition("_")[0] for job in self.jobs))
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={arrays}"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError):
            return
        self._asked = time.monotonic()
        if answer.returncode and "Invalid job id" not in answer.stderr:
            return  # the controller does not answer just now
        self._states = {}
        for line in answer.stdout.splitlines():
            job, _, state = line.strip().partition(" ")
            self._states[job] = QUEUED if state in WAITING else RUNNING if state in GOING else ENDED

    def stop(self) -> None:
        left = [job.job_id for job in self.jobs if self._states.get(job.job_id, QUEUED) != ENDED]
        if left:
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["scancel", *left], capture_output=True, timeout=60, check=False)

    def describe(self, workers: int) -> str:
        return f"{counted(workers, 'job')} of at most {self.options.own()['minutes']} min"


class Job:
    """What a job runs: workers on the GPUs that it is given; submitit pickles it.

    Before its time limit, and at a preemption that tells of itself by the same signal, submitit calls `checkpoint` and
    queues the job again.
    """

    def __init__(self, folder: Path, options: EngineConfig):
        self.folder, self.options = folder, options
        self.local: Local | None = None

    def __call__(self) -> tuple[int, str]:
        """Works until there is nothing left; exit status of the workers, and what one that failed said."""
        try:
            self.local = on_all_devices(self.folder, self.options, self.options.per_gpu)
        except UserError as error:
            print(f"delora-run: error: {error}", file=sys.stderr, flush=True)
            return error.status, str(error)
        status, told = self.local.wait()
        if status == TERMINATED:
            # SLURM has sent SIGTERM to all processes of the job: it is cancelled, or preempted. A job that ends before
            # it is killed would not be queued again.
            time.sleep(SECONDS_TO_BE_KILLED)
        return status, told

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        if self.local:
            self.local.stop()
        return submitit.helpers.DelayedSubmission(Job(self.folder, self.options))


def _words(text: str) -> str:
    """sbatch's own words out of submitit's message."""
    found = [line.removeprefix("sbatch: error: ") for line in text.splitlines() if line.startswith("sbatch: error:")]
    return "; ".join(found) or text.strip().splitlines()[-1]
