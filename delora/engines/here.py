"""The command's own process; with several GPUs here, a worker on each."""

from collections.abc import Sequence

from delora.config import Trial
from delora.engines.local import Local, visible_gpus


class Here(Local):
    """Trains in the command's own process where that has one device, or one trial; else as `Local`."""

    def workers(self, trials: Sequence[Trial]) -> int:
        gpus = len(visible_gpus()) if len(trials) > 1 and trials[0].device in ("auto", "cuda") else 0
        return min(gpus, len(trials)) if gpus > 1 else 0
