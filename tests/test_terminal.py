"""What reaches a terminal: no character of a value acts on it, and no encoding or closed pipe breaks the output."""

import os
import subprocess
import sys

import pytest

from delora.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("DeLoRA ‖W′ − W‖ λ 结果\n\tnext", "DeLoRA ‖W′ − W‖ λ 结果\n\tnext"),
        ("\x1b[2Jgone\x07\r", r"\x1b[2Jgone\x07\r"),
        ("\x9b31m", r"\x9b31m"),  # the one-byte form of ESC [
        ("a\ud800b\udcff", r"a\ud800b\udcff"),  # lone surrogates, as of a file's name that is not UTF-8
        ("abc\u202etxt.exe\u2028", r"abc\u202etxt.exe\u2028"),  # written from right to left, a line's end
    ],
)
def test_nothing_acts_on_the_terminal(text, shown):
    assert printable(text) == shown


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import os, sys; from delora import terminal; terminal.prepare(); {code}"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_an_encoding_without_the_characters_gets_escapes():
    ended = run("print('a − b'); print('λ', file=sys.stderr)", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "a \\u2212 b\n", "\\u03bb\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flush", ["", "sys.stdout.flush();"])
def test_a_closed_pipe_is_no_error(unbuffered, flush):
    close = "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w);"
    ended = run(f"{close} print('lost'); {flush} print('lost too'); sys.exit(3)", PYTHONUNBUFFERED=unbuffered)
    assert (ended.returncode, ended.stderr) == (3, "")
