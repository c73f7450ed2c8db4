"""Streams that cannot be written to: what they cost, and what they do not. Signals that come too often."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


# As in a user's shell: an unbuffered stream leaves nothing for the end of the process.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def ended(body: str, redirection: str) -> tuple[int, str, str]:
    """Run a command with its streams redirected by a shell; return its code and what it printed."""
    words = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, CODE.format(body=body)]
    done = subprocess.run(words, env=BUFFERED, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("body", [LEFT, SAID, f"{SAID}; {LEFT}", f"{LEFT}; {SAID}"])
def test_a_reader_that_goes_away_does_not_change_the_exit_code(stream: str, body: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writer}
    code = CODE.format(body=body.format(stream=stream))
    child = subprocess.Popen([sys.executable, "-c", code], env=BUFFERED, **pipes)
    os.close(writer)
    assert child.wait(timeout=60) == 5


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_without_stderr_remarks_are_lost_and_nothing_else(redirection: str) -> None:
    """A library's are lost as well, and raise nothing."""
    body = f"{LEFT.format(stream='stderr')}; {SAID}; print('its own', file=sys.stderr, flush=True)"
    assert ended(body, redirection) == (5, "a result", "")


@pytest.mark.parametrize(
    ("redirection", "why"),
    [(">&-", "it is closed (`> /dev/null` discards it)"), (">/dev/full", "No space left on device")],
)
def test_a_result_that_cannot_be_printed_is_told_and_changes_a_zero_alone(redirection: str, why: str) -> None:
    sentence = f"a remark\nerror: cannot write the result to stdout: {why}.\n"
    assert ended(SAID, redirection) == (5, "", sentence)
    assert ended(f"{SAID}; return 0", redirection) == (2, "", sentence)
    assert ended("console.note('a remark'); return 0", redirection) == (0, "", "a remark\n")
    helped = "from mla.bench.cli.main import cli; return cli.main(['--help'], standalone_mode=False)"
    assert ended(helped, redirection) == (2, "", sentence.partition("\n")[2])


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What libraries and child processes print below Python would otherwise end up in it."""
    below = "os.system('echo text; echo text >&2; echo text >&0')"
    body = f"import os; file = open('result', 'w'); {below}; file.write('ours'); file.close(); {SAID}"
    code, *shown = ended(f"import os; os.chdir({str(tmp_path)!r}); {body}", "<&- >&- 2>&-")
    assert (code, shown) == (5, ["", ""])
    assert (tmp_path / "result").read_text() == "ours"


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything() -> None:
    """A shell's other programs may have left the pipe, or the terminal, like that."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = CODE.format(body="console.out('x' * 300_000)")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=writer)
    os.close(writer)
    with open(reader) as stream:
        assert len(stream.read()) == 300_000
    assert child.wait(timeout=60) == 5


KILLED = "import os, signal; os.kill(os.getpid(), signal.{number}); console.note('went on')"


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_is_named_and_has_its_exit_code(number: str, code: int) -> None:
    by = "" if number == "SIGINT" else f" by {number}"
    assert ended(KILLED.format(number=number), "") == (code, "", f"error: interrupted{by}\n")


def test_under_nohup_a_hangup_changes_nothing() -> None:
    words = ["nohup", sys.executable, "-c", CODE.format(body=KILLED.format(number="SIGHUP"))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (5, "went on\n")


def test_ctrl_c_while_a_full_pipe_is_waited_for_at_the_end_shows_no_traceback() -> None:
    body = """import os; number = sys.stdout.fileno(); os.set_blocking(number, False)
    try:
        while os.write(number, b'x' * 4096): pass
    except BlockingIOError: os.set_blocking(number, True)
    sys.stdout.write('the rest'); console.note('waiting')"""
    words = [sys.executable, "-c", CODE.format(body=body)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=BUFFERED, text=True, stdout=pipe, stderr=pipe) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "waiting\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        assert child.stderr.readline() == "error: interrupted\n"
        assert child.communicate()[1] == ""
    assert child.returncode == 130


def test_a_result_for_a_closed_stdout_is_refused_before_it_is_made() -> None:
    body = "from mla.command import files; files.check_writable(files.Path('/dev/stdout'))"
    why = "error: cannot write '/dev/stdout': it is closed, or open for reading.\n"
    assert ended(f"{body}; console.note('went on')", ">&-") == (2, "", why)


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
