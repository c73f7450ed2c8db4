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
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LOADING_S = 60.0  # seconds after which loading a backend is said to take long
SWITCH, LINE = "MLA_SUPERVISE", "MLA_SUPERVISED_BY"  # the latter: descriptor and process of the supervisor
DIED = 3  # `mla.command.exit_codes.Exit.BACKEND`, which takes longer to import than all else here
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STANDARD = 3  # descriptors below it are stdin, stdout and stderr, also where they are closed
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_line: int | None = None  # to the supervisor; None: there is none
_doing: dict[str, str] = {}  # what it would say now


# ---------------------------------------------------------------------------------------- the supervisor


def supervise() -> int | None:
    """Run this command in a child process and return its exit code; None in the child, which is to run it."""
    _take_line()
    if _line is not None or os.environ.get(SWITCH) == "0" or not sys.executable or _traced():
        return None
    reader, writer = (_beyond_standard(number) for number in os.pipe())
    os.set_inheritable(writer, True)
    try:
        child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, LINE: f"{writer}:{os.getpid()}"},
            close_fds=False,  # a shell opened some for the command: `--baseline <(...)`
        )
    except OSError:  # no room for another process: then without words
        os.close(reader)
        return None
    finally:
        os.close(writer)
    return _Supervisor(child, reader).wait()


def _traced() -> bool:
    """Return whether a debugger or profiler of Python watches this process, such as pdb or cProfile."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = monitoring is not None and any(map(monitoring.get_tool, range(6)))
    debugged = "bdb" in sys.modules  # pdb looks at nothing between its breakpoints
    return tools or debugged or sys.gettrace() is not None or sys.getprofile() is not None


def _beyond_standard(number: int) -> int:
    """Move a descriptor away from those of stdin, stdout and stderr; child processes do not inherit it."""
    moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _STANDARD)
    os.close(number)
    return moved


class _Supervisor:
    """Waits for a child, passes signals on, and hears what it is doing."""

    def __init__(self, child: subprocess.Popen[bytes], line: int) -> None:
        self._child, self._line, self._open, self._signal = child, line, True, 0
        self._text, self._heard = b"", dict[str, Any]()
        self._late = math.inf  # when to say that what the child does takes long

    def wait(self) -> int:
        """Return the exit code of the child, or our own after a sentence about its end."""
        woken, wake = map(_beyond_standard, os.pipe())
        for number in (woken, wake, self._line):
            os.set_blocking(number, False)
        signal.set_wakeup_fd(wake)  # gets the number of every signal, also of one that comes before the wait
        for signum in (*_SIGNALS, signal.SIGCHLD):
            if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup, where the child ignores it too
                signal.signal(signum, lambda *_: None)
        while (code := self._child.poll()) is None:
            late = None if self._late == math.inf else max(0.0, self._late - time.monotonic())
            ready, _, _ = select.select([woken, *[self._line] * self._open], [], [], late)
            if woken in ready:
                self._pass_on(os.read(woken, 64))
            self._hear()
            if time.monotonic() >= self._late:
                _say(self._heard["late"])
                self._late = math.inf
        self._hear()
        if "code" in self._heard:
            return code if code >= 0 else int(self._heard["code"])  # its libraries may crash as they end
        if self._signal and code == -self._signal:  # before it could say so
            return 128 + self._signal
        where, hint = self._heard.get("while", ""), self._heard.get("hint", "")
        _say(f"error: the process ended{where}: {_end(code)}{hint}")
        return DIED

    def _pass_on(self, numbers: bytes) -> None:
        for number in (number for number in numbers if number in _SIGNALS):
            self._signal = number
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)

    def _hear(self) -> None:
        """Read what the child has said by now; the last sentence counts."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._line, 1 << 16):
                self._text += data
            self._open = False  # the child has closed it
        *lines, self._text = self._text.split(b"\n")
        for text in lines:
            with contextlib.suppress(ValueError):  # whatever a plugin wrote there
                heard = json.loads(text)
                if isinstance(heard, dict):
                    self._heard = heard
                    self._late = time.monotonic() + (heard.get("patience") or math.inf)


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


@contextlib.contextmanager
def while_loading(name: str, patience: float = LOADING_S) -> Iterator[None]:
    """Have the supervisor say that backend `name` takes long to load, or has ended this process."""
    why = f"`mla-bench doctor {name}` finds out where"
    late = f"backend '{name}' has not been loaded and set up within {patience:g} s; {why}"
    doing = {"while": f" while backend '{name}' was loaded and set up", "hint": f"; {why}"}
    with _doing_now(doing, late, patience):
        yield


@contextlib.contextmanager
def while_running(name: str) -> Iterator[None]:
    """Have the supervisor say that this process has ended while backend `name` ran."""
    hint = "; `python -X faulthandler -m mla.bench ...` shows where"
    with _doing_now({"while": f" while backend '{name}' ran", "hint": hint}):
        yield


def dismiss(code: int = 0) -> None:
    """Let this process end on purpose, without a word: before `os._exit`, or as its last act."""
    _tell({"code": code})


@contextlib.contextmanager
def _doing_now(doing: dict[str, str], late: str = "", patience: float | None = None) -> Iterator[None]:
    global _doing
    before, _doing = _doing, doing
    _tell({**doing, "late": late, "patience": patience})
    try:
        yield
    finally:
        _doing = before
        _tell(before)


def _tell(what: dict[str, Any]) -> None:
    if _line is not None:
        with contextlib.suppress(OSError):
            os.write(_line, json.dumps(what).encode() + b"\n")


def _take_line() -> None:
    """Find the line to the supervisor, if there is one, and die with it: nothing else would end us then."""
    global _line
    number, _, parent = os.environ.pop(LINE, "").partition(":")
    if not number:
        return
    _line = int(number)
    os.set_inheritable(_line, False)
    sys.excepthook = _dismissing(sys.excepthook)
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(parent):  # it is gone already
        os.kill(os.getpid(), signal.SIGKILL)


def _dismissing(show: Callable[..., Any]) -> Callable[..., None]:
    """Return a hook for an exception that ends this process: its traceback says all there is to say."""

    def hook(kind: type[BaseException], *rest: Any) -> None:
        dismiss(128 + signal.SIGINT if issubclass(kind, KeyboardInterrupt) else 1)
        show(kind, *rest)

    return hook


def loads_plugins(words: Sequence[str], harmless: Sequence[str] = ()) -> bool:
    """Return whether a command may load a plugin into this process: it is not `harmless`, nor for help."""
    asks = {"--help", "--help-all"} & {*words}
    return bool(words) and words[0] not in {*harmless, "--version"} and not asks
