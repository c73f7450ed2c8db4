"""A reader that goes away does not change the exit code, whatever is left in a stream."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

LEFT = "sys.{stream}.write('text of some library, and no line end')"
SAID = "console.note('a remark'); console.out('a result')"
CODE = """
import sys
from mla.command import console
from mla.command.exit_codes import guarded

def command():
    {body}
    return 5

sys.exit(guarded(command))
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("body", [LEFT, SAID, f"{SAID}; {LEFT}", f"{LEFT}; {SAID}"])
def test_a_closed_stream_does_not_change_the_exit_code(stream: str, body: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writer}
    code = CODE.format(body=body.format(stream=stream))
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    child = subprocess.Popen([sys.executable, "-c", code], env=buffered, **pipes)
    os.close(writer)
    assert child.wait(timeout=60) == 5


CTRL_C_AT_THE_END = """
import atexit, os, signal
from mla.command import console
atexit.register(os.kill, os.getpid(), signal.SIGINT)
console.close()
"""


def test_ctrl_c_while_python_ends_shows_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C_AT_THE_END],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        check=False,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
