"""Exit codes of the runner, the one place that turns an exception into one, and signals that end a run.

What asks a run to end interrupts it like Ctrl-C, so that what was measured is kept: Slurm sends SIGTERM some
time before it kills; SIGHUP comes when the terminal or the connection is gone.
"""

from __future__ import annotations

import enum
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar, cast

import click

from mla.command import console, files
from mla.errors import MLAError
from mla_backends import BackendError, BackendOptionError
from mla_backends.api import Backend, FusedOp
from mla_backends.errors import describe, original, plugin_code

Command = TypeVar("Command", bound=Callable[..., Any])


class Exit(enum.IntEnum):
    """How a run ended; documented in `--help`."""

    OK = 0
    REGRESSION = 1
    USAGE = 2
    BACKEND = 3
    WRONG = 4
    NOTHING_RAN = 5
    DOUBTFUL = 6
    INCOMPLETE = 7
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


# What is wrong with a run comes before how it compares with another, the gravest first.
_GRAVEST = (Exit.WRONG, Exit.DOUBTFUL, Exit.REGRESSION, Exit.NOTHING_RAN, Exit.OK)


def graver(code: Exit, other: Exit) -> Exit:
    """Return the code of a run that has two: wrong before doubtful, and that before a regression."""
    return min(code, other, key=_GRAVEST.index)


def interrupted() -> Exit:
    """Return the code of a run that ended early: by SIGTERM, SIGHUP or Ctrl-C."""
    return Exit(128 + (_received or signal.SIGINT))


def end_early() -> Exit:
    """Say that a run was interrupted and return its exit code."""
    console.note(f"{_interruption()}: the result holds what was measured until then")
    return interrupted()


def _interruption() -> str:
    return f"interrupted by {_received.name}" if _received not in (None, signal.SIGINT) else "interrupted"


def guarded(command: Callable[[], int | None]) -> int:
    """Run `command`, print one sentence for anything a user can cause, and return the exit code."""
    console.own_streams()

    def flushed() -> int:
        try:
            code = _guarded(command)
        finally:
            console.flush()
        if not (reason := console.unshown()):
            return code
        kept = ", ".join(f"'{path}'" for path in dict.fromkeys(files.written))
        said = f"cannot write the result to stdout: {reason}{f'; written: {kept}' if kept else ''}."
        return _say(said, Exit(code or Exit.USAGE))  # what is worse keeps its code

    with interrupting():
        return _guarded(flushed)  # Ctrl-C may come while a slow reader is waited for


def carried_out(command: Command) -> Command:
    """Return a click command whose body always ends with an exit code, and prints its result alone on stdout.

    Nothing that a plugin raises gets as far as click, which answers some errors itself.
    """

    @functools.wraps(command)
    def carried(*arguments: Any, **values: Any) -> int:
        def body() -> int | None:
            with plugin_code():
                return cast("int | None", command(*arguments, **values))

        with console.results_apart():
            return _guarded(body)

    return cast("Command", carried)


def _guarded(command: Callable[[], int | None]) -> int:
    try:
        return int(command() or Exit.OK)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:  # click says what is wrong with the words, which ranks share
        vars(error).update(message=console.fit(error.message))  # which type checkers take for final
        console.complain(error.format_message(), common=True, show=error.show)
        return Exit.USAGE
    except (KeyboardInterrupt, click.Abort):
        # Python remembers a KeyboardInterrupt that has left an `exec` of text, as during imports, and would
        # end the process as Ctrl-C does, whatever its exit code. Running another text makes it forget.
        exec("")
        return _say(_interruption(), interrupted())
    except BackendError as error:
        _show_traceback(error.__cause__)
        return _say(str(error), Exit.USAGE if isinstance(error, BackendOptionError) else Exit.BACKEND)
    except MLAError as error:
        return _say(str(error), Exit(error.exit_code), error.common)
    except Exception as error:  # noqa: BLE001  # what a backend raises is not the user's to debug
        _show_traceback(error)
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            return _say(_NO_TORCH, Exit.BACKEND)
        said = f"{describe(error)} ({place(error)}); `python -X dev -m mla.bench ...` shows the traceback."
        return _say(said, Exit.BACKEND)


_NO_TORCH = (
    "torch is not installed: install the build of your device's vendor, or for a CPU run "
    "`pip install . ./backends ./plugins/cpu` in a checkout (once released, `pip install mla-backend-cpu`)."
)


def _show_traceback(error: BaseException | None) -> None:
    """Print the traceback in Python's development mode."""
    if error is not None and sys.flags.dev_mode:
        traceback.print_exception(original(error))


# What every rank of a run is given alike.
_COMMON = (Exit.USAGE, Exit.HUNG_UP, Exit.INTERRUPTED, Exit.TERMINATED)


def _say(sentence: str, code: Exit, common: bool = False) -> int:
    console.complain(sentence, common or code in _COMMON)
    return code


# --------------------------------------------------------------------------------------------------- signals

# Seconds in which a second signal is taken for a copy of the first: srun and torchrun pass on what their
# tasks have got already, and nobody presses Ctrl-C only once. It must not stop the writing of the result.
SAME_SIGNAL_S = 10.0

_HANDLERS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
_received: signal.Signals | None = None
_last = 0.0  # when that was


@contextmanager
def interrupting() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the block; `interrupted` tells them apart.

    A signal that is ignored, as SIGHUP under nohup, or has a handler is left alone. Does nothing outside the
    main thread.
    """
    global _received
    _received = None
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in _HANDLERS.items() if main and signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _HANDLERS[number])


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received, _last
    now = time.monotonic()
    if _received is None or now - _last > SAME_SIGNAL_S:
        _received, _last = signal.Signals(number), now
        raise KeyboardInterrupt


# --------------------------------------------------------------------------------- where an error was raised

_Frames = list[tuple[FrameType, int]]  # of a traceback, each with its current line


def place(error: BaseException) -> str:
    """Return "file.py:12 in function", and the op or the backend's method that was running, if any.

    It is the line of the op itself rather than the innermost line of torch below it.
    """
    frames, at = _frames(error)
    if at is None:
        inside = [frame for frame in frames if _package(frame[0]) != "torch"]
        backends = [(frame, held) for frame, _ in frames if isinstance(held := _self(frame), Backend)]
        named = next((f"{frame.f_code.co_name}() of backend '{held.name}'" for frame, held in backends), "")
    else:
        package = type(_self(frames[at][0])).__module__.partition(".")[0]
        inside = [frame for frame in frames[at:] if _package(frame[0]) == package]
        named = _name(frames, at)
    frame, line = (inside or frames)[-1]
    said = f"{os.path.basename(frame.f_code.co_filename)}:{line} in {frame.f_code.co_name}"
    return f"{said}, {named}" if named else said


def op_name(error: BaseException) -> str | None:
    """Return "op 'name' of role" for an error that an op raised, as far as known; None for any other."""
    frames, at = _frames(error)
    return None if at is None else _name(frames, at)


def _frames(error: BaseException) -> tuple[_Frames, int | None]:
    """Return the frames of a traceback, and the place of the outermost one of an op; None without any."""
    frames = list(traceback.walk_tb(original(error).__traceback__))
    ops = (at for at, (frame, _) in enumerate(frames) if isinstance(_self(frame), FusedOp))
    return frames, next(ops, None)


def _name(frames: _Frames, at: int) -> str:
    """Return "op 'name' of role" for the op of frame `at`, from what its callers hold; else ""."""
    from mla.layer.ops import Choice, Ops

    op, alone = _self(frames[at][0]), ""  # `alone`: without a role, which a caller farther out may know
    for known in (frame.f_locals for frame, _ in reversed(frames[:at])):
        for held in (*known.values(), *getattr(known.get("self"), "__dict__", {}).values()):
            if isinstance(held, Choice) and held.op is op:
                alone = alone or f"op '{held.name}'"
            if isinstance(held, Ops) and (roles := [role for role in held.names() if held[role].op is op]):
                named = known.get("role")  # one op may serve several weights
                said = named if named in roles else " or ".join(roles)
                return f"op '{held[roles[0]].name}' of {said}"
        if known.get("op") is op and isinstance(name := known.get("name"), str):
            return f"op '{name}'"  # it was being chosen
    return alone


def _self(frame: FrameType) -> object:
    return frame.f_locals.get("self")


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
