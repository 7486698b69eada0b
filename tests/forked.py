"""Commands in processes of their own that are forked from one which has imported what takes seconds to import."""

import importlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

HEAVY = ["torch", "transformers", "hydra", "delora.cli", "delora.run", "delora.sweep", "delora.report.cli"]


class Answer(NamedTuple):
    status: int | None
    output: str
    errors: str


def command(*words: str, cwd: Path, folder: Path, seconds: float = 60) -> Answer:
    """Runs `delora-run` or `delora-report`, the first word, as in a shell.

    Args:
        cwd: where it runs.
        folder: where what it writes to standard output and error is kept.
        seconds: after which it is killed; its status is then -9.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=_run, args=(words, cwd, folder))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    output, errors = ((folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return Answer(process.exitcode, output, errors)


def _run(words: list[str], cwd: Path, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = list(words)
    module = {"delora-run": "delora.cli", "delora-report": "delora.report.cli"}[words[0]]
    sys.exit(importlib.import_module(module).main())
