"""`load_backend`: from a backend's name to a device that is ready."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from mla_backends.api import Backend
from mla_backends.errors import BackendError
from mla_backends.registry import open_backend


def load_backend(
    name: str,
    index: int | Callable[[int | None], int | None] | None = None,
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Backend:
    """Find, probe and set up a backend; `backend.device` is its device afterwards.

    `index` chooses among several devices: a number, or a function that takes the number of visible devices
    (None: the backend cannot count them) and returns one; None leaves it to the stack.
    `threads` is how many host threads torch may use; a backend that sets another number is refused. Raises a
    subclass of `mla_backends.BackendError` whose text names the cause and the fix; there is no fallback.
    """
    if not isinstance(name, str):
        raise TypeError(f"load_backend() takes the name of a backend, such as 'cpu', got {name!r:.80}.")
    if isinstance(index, Mapping):
        raise TypeError(f"load_backend('{name}', options={dict(index)}): options go by name.")
    chosen = dict(options or {})
    if threads is not None:
        chosen["threads"] = str(threads)
        with contextlib.suppress(Exception):  # if torch does not import, what needs it says so, with the cure
            import torch

            torch.set_num_threads(threads)  # beforehand: a backend may do nothing with the option
    backend = open_backend(name, index, chosen)
    if threads is not None:
        _check_threads(name, threads)
    from mla.opened import check_opened  # which needs torch

    check_opened(name, backend)
    return backend


def _check_threads(name: str, threads: int) -> None:
    """Raise `BackendError` if a backend has set another number than the one that was asked for."""
    import torch

    used = torch.get_num_threads()
    if used != threads:
        asked = f"{threads} {'was' if threads == 1 else 'were'} asked for"
        raise BackendError(
            f"backend '{name}' ignores the option threads: {asked}, and after its setup() torch uses {used}; "
            "leave the option out to run on the backend's own number."
        )
