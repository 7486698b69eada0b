"""Text for terminals and pipes, whatever they can show: for both commands. Imports nothing heavy."""

import io
import os
import sys


def prepare() -> None:
    """Makes standard output and error streams that no character and no closed pipe can break.

    What their encoding lacks is written as an escape, \\u2212. Where nobody reads any more, as behind `| head`, the
    rest is dropped without a word: the work behind the output goes on.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not one that a test or a notebook put there
            setattr(sys, name, _Stream(stream))


class _Stream(io.TextIOWrapper):
    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._kept = stream  # it would close the buffer with itself

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def counted(number: int, what: str) -> str:
    """The number with a noun: 1 trial, 2 trials."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def printable(text: str) -> str:
    """The text with everything that could act on a terminal, or that no encoding holds, as an escape: \\x1b, \\ud800.

    For whatever comes from a file, a name or a command line. Newlines and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
