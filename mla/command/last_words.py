"""A command that dies is never silent: a process beside it says so, and ends with an exit code of ours.

A plugin's code may abort, call `os._exit`, or take so much memory that the system kills the process, and
nothing is left in it to say why. So `python -m mla.bench` starts itself once more: the child does the work,
and this process waits for it, passes signals on and knows what it did last. Under a debugger or profiler of
Python there is no second process; others that look at a single process leave it out with `MLA_SUPERVISE=0`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

LOADING_S = 60.0  # seconds from the start after which loading a backend is said to take long
TURN_S = 1.0  # of a wait: a signal that comes right before one does not end it, and its handler has to run
SWITCH = "MLA_SUPERVISE"
RECORD = "MLA_SUPERVISED_BY"  # the descriptor of the record, and the supervisor's process
DIED = 3  # `mla.command.exit_codes.Exit.BACKEND`, which takes longer to import than all else here
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STANDARD = 3  # descriptors below it are stdin, stdout and stderr, also where they are closed
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_record: int | None = None  # a file that the supervisor reads; None: there is none
_now: dict[str, str] = {}  # what it would say


# ---------------------------------------------------------------------------------------- the supervisor


def supervise() -> int | None:
    """Run this command in a child process and return its exit code; None in the child, which is to run it."""
    _take_record()
    if _record is not None or os.environ.get(SWITCH) == "0" or not sys.executable or _traced():
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, the status of a child is lost
    try:
        with tempfile.TemporaryFile() as file:
            record = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, _STANDARD)
        child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, RECORD: f"{record}:{os.getpid()}"},
            close_fds=False,  # a shell opened some for the command: `--baseline <(...)`
        )
    except OSError:  # no room for a file or another process: then without words
        return None
    return _wait(child, record)


def _wait(child: subprocess.Popen[bytes], record: int) -> int:
    """Return the exit code of the child, or our own after a sentence about its end."""
    received, turns = 0, 0

    def turn(number: int, frame: object) -> None:
        nonlocal turns
        turns += 1
        if turns == max(1, LOADING_S // TURN_S):
            _say(_read(record).get("late", ""))

    def pass_on(number: int, frame: object) -> None:
        nonlocal received
        received = number
        child.send_signal(number)

    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup, where the child ignores it too
            signal.signal(number, pass_on)
    signal.signal(signal.SIGALRM, turn)
    signal.setitimer(signal.ITIMER_REAL, TURN_S, TURN_S)
    code, said = child.wait(), _read(record)
    signal.setitimer(signal.ITIMER_REAL, 0)  # or it would end this process on its way out
    if "code" in said:
        return code if code >= 0 else int(said["code"])  # its libraries may crash as they end
    if received and code == -received:  # before it could say so
        return 128 + received
    _say(f"error: the process ended{said.get('while', '')}: {_end(code)}{said.get('hint', '')}")
    return DIED


def _read(record: int) -> dict[str, Any]:
    """Return what the child has said last."""
    try:
        return dict(json.loads(os.pread(record, 1 << 16, 0).partition(b"\n")[0]))
    except (ValueError, TypeError):  # nothing yet, or whatever a plugin wrote there
        return {}


def _traced() -> bool:
    """Return whether a debugger or profiler of Python watches this process, such as pdb or cProfile."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = monitoring is not None and any(map(monitoring.get_tool, range(6)))
    debugged = "bdb" in sys.modules  # pdb looks at nothing between its breakpoints
    return tools or debugged or sys.gettrace() is not None or sys.getprofile() is not None


def _end(code: int) -> str:
    """Return how a process with this status ended."""
    if code >= 0:
        return f"something in it called exit with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # real-time signals have numbers only
        name = f"signal {-code}"
    return (
        f"killed by {name}, perhaps for lack of memory" if code == -signal.SIGKILL else f"aborted by {name}"
    )


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads
        if sentence and sys.stderr is not None:  # `print` would take stdout instead of a closed stderr
            print(sentence.encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True)  # noqa: T201


# --------------------------------------------------------------------------------------------- the child


def while_loading(name: str) -> AbstractContextManager[None]:
    """Have the supervisor say that backend `name` takes long to load, or has ended this process."""
    why = f"`mla-bench doctor {name}` finds out where"
    late = f"backend '{name}' has not been loaded and set up within {LOADING_S:g} s; {why}"
    return _doing(
        {"while": f" while backend '{name}' was loaded and set up", "hint": f"; {why}", "late": late}
    )


def while_running(name: str) -> AbstractContextManager[None]:
    """Have the supervisor say that this process has ended while backend `name` ran."""
    hint = "; `python -X faulthandler -m mla.bench ...` shows where"
    return _doing({"while": f" while backend '{name}' ran", "hint": hint})


def dismiss(code: int = 0) -> None:
    """Let this process end on purpose, without a word: before `os._exit`, or as its last act."""
    _tell({"code": code})


@contextlib.contextmanager
def _doing(what: dict[str, str]) -> Iterator[None]:
    global _now
    before, _now = _now, what
    _tell(what)
    try:
        yield
    finally:
        _now = before
        _tell(before)


def _tell(what: dict[str, Any]) -> None:
    if _record is not None:
        with contextlib.suppress(OSError):
            os.pwrite(_record, json.dumps(what).encode() + b"\n", 0)


def _take_record() -> None:
    """Find what the supervisor reads, if there is one, and die with it: nothing else would end us then."""
    global _record
    number, _, parent = os.environ.pop(RECORD, "").partition(":")
    if not number:
        return
    _record = int(number)
    os.set_inheritable(_record, False)
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(parent):  # it is gone already
        os.kill(os.getpid(), signal.SIGKILL)


def loads_plugins(words: Sequence[str], harmless: Sequence[str] = ()) -> bool:
    """Return whether a command may load a plugin into this process: it is not `harmless`, nor for help."""
    asks = {"--help", "--help-all"} & {*words}
    return bool(words) and words[0] not in {*harmless, "--version"} and not asks
