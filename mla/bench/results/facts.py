"""What a result says of the backend that ran, and of the program that measured.

A version or a commit does not tell two states of a work tree apart, nor plugins that are edited in place: so
a digest of the sources of `mla`, of `mla_backends` and of the backend does.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import mla
import mla_backends
from mla.bench.results.schema import BackendFacts

if TYPE_CHECKING:
    from mla_backends.api import Backend

# What can change a number: sources, and libraries that were built from them. Not those in a folder `kernels`:
# a plugin may find them elsewhere, and says in its environment which it uses.
_SUFFIXES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".mu", ".so", ".pyd"}


def backend_facts(backend: Backend, version: str | None) -> BackendFacts:
    """Return what ran; `version` is that of the backend's distribution."""
    info = backend.device_info()
    return BackendFacts(
        name=backend.name,
        version=version,
        device=info.name,
        memory_bytes=info.memory_bytes,
        cache_bytes=info.cache_bytes,
        build=build_digest(backend),
    )


def build_digest(backend: object) -> str | None:
    """Return the digest for the backend's class; None if its source is in no file."""
    module = type(backend).__module__
    names = {mla.__name__, mla_backends.__name__, module.partition(".")[0]}
    digest = hashlib.sha256()
    try:
        for name in sorted(names):
            for path, shown in _files(name):
                digest.update(f"{name}/{shown}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    except (OSError, KeyError, ValueError):
        return None
    return digest.hexdigest()[:16]


def _files(name: str) -> Iterator[tuple[Path, str]]:
    """Yield the files of a package that count, or the one of a module, with their names in it."""
    module = sys.modules[name]
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    if not folders:
        file = getattr(module, "__file__", None)
        if not file:
            raise ValueError(f"{name} has no file")
        yield Path(file), Path(file).name
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            shown = path.relative_to(folder)
            built = path.suffix == ".so" and "kernels" in shown.parts
            if path.suffix in _SUFFIXES and not built and path.is_file():
                yield path, shown.as_posix()
