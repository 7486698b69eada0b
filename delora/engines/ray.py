"""Workers as tasks of a Ray cluster."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from delora.config import EngineConfig, Trial
from delora.engines.base import ENDED, RUNNING, Engine, WorkerState
from delora.engines.local import on_all_devices
from delora.errors import UserError
from delora.terminal import counted

try:
    import ray
except ImportError:
    raise UserError("engine=ray needs Ray: pip install 'delora[ray]'") from None


class Ray(Engine):
    """Starts tasks, spread over the nodes. One whose node is lost is started again by Ray elsewhere."""

    def __init__(self, options: EngineConfig):
        super().__init__(options)
        self.tasks: list[ray.ObjectRef] = []

    def workers(self, trials: Sequence[Trial]) -> int:
        return min(self.options.workers or 1, len(trials))

    def start(self, folder: Path, workers: int, detached: bool = False) -> None:
        if detached:
            raise UserError("detach=true: Ray ends tasks with their command; ray job submit runs commands detached")
        own = self.options.own()
        if not ray.is_initialized():
            try:
                ray.init(address=own["address"], log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                told = str(error).strip().splitlines()[0]
                raise UserError(f"engine.address={own['address']}: {told}") from None
        needed = {"CPU": own["cpus"], "GPU": own["gpus"] * self.share}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(kind, 0) >= many for kind, many in needed.items()) for node in nodes):
            wanted = f"engine.cpus={own['cpus']} engine.gpus={own['gpus']}"
            raise UserError(f"{wanted}: no node of the cluster has as many; engine.gpus=0 trains on CPUs")
        remote = ray.remote(
            num_cpus=needed["CPU"],
            num_gpus=needed["GPU"],
            max_retries=own["retries"],
            scheduling_strategy="SPREAD",
        )(run_worker)
        self.tasks += [remote.remote(str(folder.absolute()), self.options, os.getcwd()) for _ in range(workers)]

    def look(self) -> list[WorkerState]:
        ended, _ = ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)
        found = []
        for number, task in enumerate(self.tasks, start=1):
            name = f"task {number}"
            if task not in ended:
                found.append(WorkerState(name, RUNNING))
                continue
            try:
                found.append(WorkerState(name, ENDED, *ray.get(task)))
            except (ray.exceptions.RayError, KeyboardInterrupt) as error:
                found.append(WorkerState(name, ENDED, 1, str(error).strip().splitlines()[0]))
        return found

    def stop(self) -> None:
        for task in self.tasks:
            with suppress(Exception):  # it has ended
                ray.cancel(task)
        with suppress(Exception):
            ray.wait(self.tasks, num_returns=len(self.tasks), timeout=60)

    def describe(self, workers: int) -> str:
        return f"{counted(workers, 'task')} of Ray"


def run_worker(folder: str, options: EngineConfig, here: str) -> tuple[int, str]:
    """What a task does: a worker on each GPU that it is given, which save and end where the task is cancelled.

    Returns:
        Their exit status, and what one that failed said.
    """
    with suppress(OSError):
        os.chdir(here)
    try:
        local = on_all_devices(Path(folder), options, per_gpu=1)  # those that share a GPU are tasks of their own
    except UserError as error:
        return error.status, str(error)
    try:
        return local.wait()
    except KeyboardInterrupt:
        local.stop()
        return local.wait()
