"""`load_backend`: from a backend's name to a device that is ready."""

from __future__ import annotations

from collections.abc import Mapping

from mla_backends.api import Backend
from mla_backends.registry import open_backend


def load_backend(
    name: str,
    index: int | None = None,
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Backend:
    """Find, probe and set up a backend; `backend.device` is its device afterwards.

    `threads` is how many host threads torch may use; the backend applies it. Raises a subclass of
    `mla_backends.BackendError` whose text names the cause and the fix; there is no fallback.
    """
    chosen = dict(options or {})
    if threads is not None:
        chosen["threads"] = str(threads)
    return open_backend(name, index, chosen)
