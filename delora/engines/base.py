"""The contract of engines: who runs the workers that train a sweep's fleets.

An engine starts workers and says what became of them. A worker is `delora-run --worker FOLDER` everywhere, with the
sweep's folder as all that it knows; what is left to train, and how far it is, the folder says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from delora.config import EngineConfig, Trial

QUEUED, RUNNING, ENDED = "queued", "running", "ended"


@dataclass(frozen=True)
class WorkerState:
    """What became of a worker, or of a job with several.

    Attributes:
        name: as the engine calls it.
        state: QUEUED, RUNNING or ENDED.
        status: its exit status where it has ended, None where that is not known.
        told: the last of what it said.
        log: where all of it is.
    """

    name: str
    state: str
    status: int | None = None
    told: str = ""
    log: Path | None = None


class Engine:
    """Who runs workers, by the options of conf/engine/<name>.yaml.

    Attributes:
        memory: bytes of a worker's device, where they are given.
        share: of that memory, which each worker may take.
        measures_here: whether what is measured on this machine holds for the workers.
    """

    measures_here = False

    def __init__(self, options: EngineConfig):
        self.options = options
        self.memory = options.gpu_memory and options.gpu_memory * 1e9
        self.share = 1 / options.per_gpu

    def workers(self, trials: Sequence[Trial]) -> int:
        """How many workers for these trials; 0: the command's own process trains them.

        Raises:
            UserError: the options do not fit what is here.
        """
        raise NotImplementedError

    def start(self, folder: Path, workers: int, detached: bool = False) -> None:
        """Starts so many workers on that sweep's folder.

        Args:
            detached: they go on when this process ends.

        Raises:
            UserError: why that cannot be.
        """
        raise NotImplementedError

    def look(self) -> list[WorkerState]:
        """What became of all that were started."""
        raise NotImplementedError

    def stop(self) -> None:
        """Asks all workers to save and end, and waits until they have, as far as that is seen from here."""
        raise NotImplementedError

    def describe(self, workers: int) -> str:
        """The workers in a few words, for plans."""
        return f"{workers} workers"
