"""Exit codes of the runner, and the one place that turns an exception into one."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable

import click

from mla.command import console, signals
from mla.command.error_origin import place
from mla.errors import MLAError
from mla_backends import BackendError, BackendOptionError
from mla_backends.errors import first_line


class Exit(enum.IntEnum):
    """How a run ended; documented in `--help`."""

    OK = 0
    REGRESSION = 1
    USAGE = 2
    BACKEND = 3
    WRONG = 4
    NOTHING_RAN = 5
    DOUBTFUL = 6
    INTERRUPTED = 130
    TERMINATED = 143


def interrupted() -> Exit:
    """Return the code of a run that ended early: by SIGTERM, else by Ctrl-C."""
    return Exit.TERMINATED if signals.terminated() else Exit.INTERRUPTED


def end_early() -> Exit:
    """Say that a run was interrupted and return its exit code."""
    by = " by SIGTERM" if signals.terminated() else ""
    console.note(f"interrupted{by}: the result holds what was measured until then")
    return interrupted()


def guarded(command: Callable[[], int | None]) -> int:
    """Run `command`, print one sentence for anything a user can cause, and return the exit code."""
    with signals.sigterm_interrupts():
        try:
            return _guarded(command)
        finally:
            console.flush()


def _guarded(command: Callable[[], int | None]) -> int:
    try:
        return int(command() or Exit.OK)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return Exit.USAGE
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted by SIGTERM" if signals.terminated() else "interrupted", interrupted())
    except BackendOptionError as error:
        return _say(str(error), Exit.USAGE)
    except BackendError as error:
        return _say(str(error), Exit.BACKEND)
    except MLAError as error:
        return _say(str(error), Exit(error.exit_code))
    except SystemExit:
        return Exit.OK  # click's answer to a closed pipe (`--help | head`)
    except Exception as error:  # what a backend raises is not the user's to debug
        if sys.flags.dev_mode:
            raise
        return _say(_unexpected(error), Exit.BACKEND)


def _unexpected(error: Exception) -> str:
    """Return the sentence for an unforeseen exception, or for a missing torch."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return (
            "torch is not installed: install the build of your device's vendor, or for a CPU run "
            "`pip install ./plugins/cpu` from a checkout of this project."
        )
    text = first_line(error)
    said = f"{type(error).__name__}: {text} ({place(error)})"
    return f"{said}; `python -X dev -m mla.bench ...` shows the traceback."


def _say(sentence: str, code: Exit) -> int:
    console.note(f"error: {sentence}")
    return code
