"""delora-run with a clock, which scripts/benchmark starts in a process of its own: BEGUN (Unix time), a file, words.

Imports nothing that delora-run does not. Of each fleet the first step is waited for, and no other.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    begun, path = float(sys.argv[1]), Path(sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    from delora import cli, sweep

    fleets: list[dict[str, Any]] = []
    import_torch = sweep._import_torch

    def now() -> float:
        return time.time() - begun

    def watch() -> None:
        import_torch()
        import torch

        from delora import run, train

        run_fleet, step = run.run_fleet, train.Step.__call__

        def run_fleet_watched(trials, *arguments):
            name, task = trials[0].method.name, trials[0].task.name
            fleets.append({"method": name, "task": task, "trials": len(trials), "begun": now(), "steps": []})
            outcome = run_fleet(trials, *arguments)
            fleets[-1]["ended"] = now()
            return outcome

        def step_watched(self, index_KB):
            loss_K = step(self, index_KB)
            if not fleets[-1]["steps"] and self.fleet.device.type == "cuda":
                torch.cuda.synchronize()
            fleets[-1]["steps"].append(now())
            return loss_K

        run.run_fleet, train.Step.__call__ = run_fleet_watched, step_watched
        fleets.clear()

    sweep._import_torch = watch
    status = cli.main()
    path.write_text(json.dumps({"status": status, "seconds": now(), "fleets": fleets}))
    return status


if __name__ == "__main__":
    sys.exit(main())
