"""`load_backend`: from a backend's name to a device that is ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mla_backends.api import Backend
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
    `threads` is how many host threads torch may use; the backend applies it. Raises a subclass of
    `mla_backends.BackendError` whose text names the cause and the fix; there is no fallback.
    """
    if isinstance(index, Mapping):
        raise TypeError(f"load_backend('{name}', options={dict(index)}): options go by name.")
    chosen = dict(options or {})
    if threads is not None:
        chosen["threads"] = str(threads)
    return open_backend(name, index, chosen)
