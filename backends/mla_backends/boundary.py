"""Where the program calls a plugin: whatever its code raises, the program goes on and says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mla_backends.errors import BackendError, Ended


@contextmanager
def plugin_code() -> Iterator[None]:
    """Turn what is meant to end a process into `Ended`, an Exception like any other.

    A plugin, or a vendor's library below it, may call `sys.exit` or raise GeneratorExit. A process that ends
    with code 0 but without a result looks like a success. KeyboardInterrupt is the user's, and passes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Ended(error) from error


@contextmanager
def refused(report: Callable[[Exception], BackendError]) -> Iterator[None]:
    """Raise what `report` makes of anything that a plugin's code raises, except its own `BackendError`."""
    try:
        with plugin_code():
            yield
    except BackendError:
        raise
    except Exception as error:
        raise report(error) from error
