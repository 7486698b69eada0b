"""Signals that end a command: what is trained is saved first. Imports nothing heavy."""

import signal
import threading
from typing import Any, Self


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came; what was trained is on disk. `status` is the exit status."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Stop:
    """Hears SIGINT, SIGTERM and SIGHUP. After the first the loop saves its state and ends; the second ends it at once.

    What is ignored when the command starts, as under nohup or in the background of a script, stays ignored.

    Args:
        at_once: the first one ends it at once too, where no loop waits for it.
    """

    SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

    def __init__(self, at_once: bool = False):
        self.at_once = at_once
        self.number: int | None = None

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python tells no other thread
            heard = [n for n in self.SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self._before = {n: signal.signal(n, self._hear) for n in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()

    def _hear(self, number: int, _: object) -> None:
        before, self.number = self.number, number
        if before is not None or self.at_once:
            raise Interrupted(number)

    def check(self) -> None:
        """Raises Interrupted where a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)
