"""Exit codes of the runner, and the one place that turns an exception into one."""

from __future__ import annotations

import enum
import functools
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

from mla.command import console, files, signals
from mla.command.error_origin import place
from mla.errors import MLAError
from mla_backends import BackendError, BackendOptionError
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


def graver(one: Exit, other: Exit) -> Exit:
    """Return the code of a run that has two: wrong before doubtful, and that before a regression."""
    return min(one, other, key=_GRAVEST.index)


def interrupted() -> Exit:
    """Return the code of a run that ended early: by SIGTERM, SIGHUP or Ctrl-C."""
    return Exit(128 + (signals.received() or signal.SIGINT))


def end_early() -> Exit:
    """Say that a run was interrupted and return its exit code."""
    console.note(f"{_interruption()}: the result holds what was measured until then")
    return interrupted()


def _interruption() -> str:
    by = signals.received() or signal.SIGINT
    return "interrupted" if by == signal.SIGINT else f"interrupted by {by.name}"


def guarded(command: Callable[[], int | None]) -> int:
    """Run `command`, print one sentence for anything a user can cause, and return the exit code."""
    console.own_streams()

    def flushed() -> int:
        try:
            code = _guarded(command)
        finally:
            console.flush()
        return _unshown(code, reason) if (reason := console.unshown()) else code

    with signals.interrupting():
        return _guarded(flushed)  # Ctrl-C may come while a slow reader is waited for


def _unshown(code: int, reason: str) -> int:
    """Say that the result could not be printed, and where it is; what is worse keeps its code."""
    written = ", ".join(f"'{path}'" for path in dict.fromkeys(files.written))
    kept = f"; written: {written}" if written else ""
    return _say(f"cannot write the result to stdout: {reason}{kept}.", Exit(code or Exit.USAGE))


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
    except click.ClickException as error:
        return _refuse(error)
    except (KeyboardInterrupt, click.Abort):
        _forget_interrupt()
        return _say(_interruption(), interrupted())
    except BackendOptionError as error:
        return _say(str(error), Exit.USAGE)
    except BackendError as error:
        _show_traceback(error.__cause__)
        return _say(str(error), Exit.BACKEND)
    except MLAError as error:
        return _say(str(error), Exit(error.exit_code), error.common)
    except Exception as error:  # noqa: BLE001  # what a backend raises is not the user's to debug
        _show_traceback(error)
        return _say(_unexpected(error), Exit.BACKEND)


def _show_traceback(error: BaseException | None) -> None:
    """Print the traceback in Python's development mode."""
    if error is not None and sys.flags.dev_mode:
        traceback.print_exception(original(error))


def _forget_interrupt() -> None:
    """Let the exit code be the one that is returned.

    Python remembers a KeyboardInterrupt that has left an `exec` of text, as during imports, and then ends the
    process as Ctrl-C would, whatever its exit code. Running another text makes it forget.
    """
    exec("")


def _unexpected(error: Exception) -> str:
    """Return the sentence for an unforeseen exception, or for a missing torch."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return (
            "torch is not installed: install the build of your device's vendor, or for a CPU run "
            "`pip install ./plugins/cpu` in a checkout (once released, `pip install mla-backend-cpu`)."
        )
    return f"{describe(error)} ({place(error)}); `python -X dev -m mla.bench ...` shows the traceback."


# What every rank of a run is given alike.
_COMMON = (Exit.USAGE, Exit.HUNG_UP, Exit.INTERRUPTED, Exit.TERMINATED)


def _say(sentence: str, code: Exit, common: bool = False) -> int:
    console.complain(sentence, common or code in _COMMON)
    return code


def _refuse(error: click.ClickException) -> int:
    """Let click say what is wrong with the words, which ranks of a run share."""
    vars(error).update(message=console.fit(error.message))  # which type checkers take for final
    console.complain(error.format_message(), common=True, show=error.show)
    return Exit.USAGE
