"""A process that dies in a plugin's code ends with a sentence and an exit code of ours."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FORWARD = """
import os, signal
from mla_backends import FusedOp
from mla_backends.testing import HostBackend

class Op(FusedOp):
    contract = "linear/1"
    def __call__(self, *args, **tensors):
        END

class Dying(HostBackend):
    name = "dying"
    def __init__(self, options=None):
        super().__init__(options, ops={"op": Op()})
"""
ONE_OP = ("--op", "o_proj", "--implementations", "mla", "--dtype", "float32", "--batch", "1")
WAYS = {
    "os.abort()": "aborted by SIGABRT",
    "os._exit(0)": "something in it called exit with status 0",
    "os.kill(os.getpid(), signal.SIGKILL)": "killed by SIGKILL, perhaps for lack of memory",
}


def run(folder: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mla.bench", *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("code", ["os.abort()", "os._exit(0)"])
def test_a_backend_that_ends_the_process_is_named(tmp_path: Path, code: str) -> None:
    (tmp_path / "abrupt.py").write_text(f"import os\n{code}\n")
    ended, out, err = run(tmp_path, "--backend", "abrupt:it", "--list-ops")
    assert (ended, out) == (3, "")
    assert err == (
        f"error: the process ended while backend 'abrupt:it' was loaded and set up: {WAYS[code]}; "
        "`mla-bench doctor abrupt:it` finds out where\n"
    )


@pytest.mark.parametrize("code", WAYS)
def test_a_backend_that_ends_the_process_in_a_forward_is_named(tmp_path: Path, code: str) -> None:
    (tmp_path / "dying.py").write_text(FORWARD.replace("END", code))
    ended, out, err = run(tmp_path, "--backend", "dying:Dying", *ONE_OP)
    assert (ended, out) == (3, "")
    assert err.endswith(
        f"error: the process ended while backend 'dying' ran: {WAYS[code]}; "
        "`python -X faulthandler -m mla.bench ...` shows where\n"
    )


def test_without_a_supervisor_the_process_dies_as_it_does(tmp_path: Path) -> None:
    (tmp_path / "abrupt.py").write_text("import os\nos._exit(7)\n")
    assert run(tmp_path, "--backend", "abrupt:it", "--list-ops", MLA_SUPERVISE="0") == (7, "", "")


CHILD = """
import os, sys
from mla.command import last_words
last_words.LOADING_S = 0.5
if (code := last_words.supervise()) is not None:
    sys.exit(code)
"""


def supervised(body: str, redirections: str = "") -> subprocess.CompletedProcess[str]:
    command = f"exec {shlex.join([sys.executable, '-c', CHILD + body])} {redirections}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)


def test_a_backend_that_takes_long_is_named_while_it_does() -> None:
    body = "import time\nwith last_words.while_loading('slow'):\n    time.sleep(2)\n"
    done = supervised(body + "last_words.dismiss()")
    assert done.returncode == 0
    assert done.stderr.startswith("backend 'slow' has not been loaded and set up within 0.5 s; ")
    assert len(done.stderr.splitlines()) == 1


def test_a_backend_that_loads_or_raises_leaves_no_word() -> None:
    body = "try:\n    with last_words.while_loading('wrong'):\n        raise ValueError('why')\n"
    done = supervised(body + "except ValueError:\n    last_words.dismiss(4)\nsys.exit(4)")
    assert (done.returncode, done.stderr) == (4, "")


@pytest.mark.parametrize("end", ["os._exit(5)", "os.abort()"])
def test_what_happens_after_the_last_word_changes_no_exit_code(end: str) -> None:
    """A run that ends on purpose, and libraries that crash while the interpreter shuts down."""
    done = supervised(f"with last_words.while_running('x'):\n    last_words.dismiss(5)\n    {end}")
    assert (done.returncode, done.stderr) == (5, "")


def test_what_nobody_can_read_says_nothing_of_where() -> None:
    done = supervised("os.pwrite(last_words._record, b'\\xff\\n', 0)\nos._exit(6)")
    said = "error: the process ended: something in it called exit with status 6\n"
    assert (done.returncode, done.stderr) == (3, said)


def test_the_child_has_what_the_shell_opened_for_the_command() -> None:
    """`--baseline <(...)`."""
    done = supervised("print(open(sys.argv[1]).read())\nlast_words.dismiss()", "<(echo one)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\n\n", "")


@pytest.mark.parametrize("closed", ["<&- >&-", "<&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_stay_closed(closed: str) -> None:
    body = "missing = [n for n in (0, 1) if not os.path.exists(f'/proc/self/fd/{n}')]\n"
    count = closed.replace("2>&-", "").count("&-")
    done = supervised(f"{body}last_words.dismiss(len(missing))\nos._exit(len(missing))", closed)
    assert (done.returncode, done.stdout, done.stderr) == (count, "", "")


def test_an_error_never_goes_to_stdout() -> None:
    done = supervised("os.abort()", "2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_a_signal_is_passed_on_whichever_thread_the_kernel_picks() -> None:
    """A terminal that closes sends SIGHUP and SIGCONT at once, and either may wake any thread."""
    body = (
        "import signal, time\n"
        "signal.signal(signal.SIGHUP, lambda *_: (last_words.dismiss(129), os._exit(129)))\n"
        "print(os.getpid(), flush=True)\n"
        "while True:\n    time.sleep(0.02)"  # Python runs no handler where a signal comes just before a sleep
    )
    command = [sys.executable, "-c", CHILD + body]
    parents = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(20)]
    try:
        for parent in parents:
            assert parent.stdout is not None
            assert parent.stdout.readline()
            parent.send_signal(signal.SIGHUP)
            parent.send_signal(signal.SIGCONT)
        assert [parent.wait(30) for parent in parents] == [129] * len(parents)
    finally:
        for parent in parents:
            parent.kill()
            parent.communicate()


@pytest.mark.parametrize("module", ["cProfile", "pdb -c continue"])
def test_debuggers_and_profilers_see_the_process_itself(tmp_path: Path, module: str) -> None:
    (tmp_path / "body.py").write_text(CHILD + "print(os.getppid())")
    words = [sys.executable, "-m", *module.split(), "body.py"]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    assert str(os.getpid()) in done.stdout.split()


def test_nothing_outlives_a_supervisor_that_is_killed() -> None:
    body = "import time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", CHILD + body], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        for _ in range(200):
            if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
                return
            time.sleep(0.05)
    raise AssertionError("the child is still there")
