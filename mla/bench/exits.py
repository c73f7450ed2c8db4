"""Exit codes of the runner, and the one place that turns an exception into one."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable

import click

from mla.errors import MLAError
from mla_backends import BackendError


class Exit(enum.IntEnum):
    """How a run ended; documented in `--help`."""

    OK = 0
    REGRESSION = 1
    USAGE = 2
    BACKEND = 3
    WRONG = 4
    NOTHING_RAN = 5
    INTERRUPTED = 130


def guarded(command: Callable[[], int | None]) -> int:
    """Run `command`, print one sentence for anything a user can cause, and return the exit code."""
    try:
        return int(command() or Exit.OK)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return Exit.USAGE
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted", Exit.INTERRUPTED)
    except BackendError as error:
        return _say(str(error), Exit.BACKEND)
    except MLAError as error:
        return _say(str(error), Exit(error.exit_code))
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _say(
            "torch is not installed: install the build of your device's vendor, or for a CPU run "
            "`pip install ./plugins/cpu` from a checkout of this project.",
            Exit.BACKEND,
        )


def _say(sentence: str, code: Exit) -> int:
    print(f"error: {sentence}", file=sys.stderr)  # noqa: T201
    return code
