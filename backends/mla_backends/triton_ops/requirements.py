"""What Triton needs at run time and lacks here, found without importing it.

Triton compiles kernels itself, but builds a small launcher in C for them at the first use: with `$CC`, gcc or
clang and the headers of Python, into a cache folder. So do all releases from 3.1 to 3.9.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

# Packages that wheels of torch take Triton from.
PACKAGES = (
    "triton",
    "triton-rocm",
    "triton-xpu",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "pytorch-triton-xpu",
)
# Change where Triton's kernels come from, what they compute or how fast they are.
VARIABLES = (
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
    "TRITON_CACHE_MANAGER",
    "TRITON_OVERRIDE_DIR",
    "TRITON_KERNEL_OVERRIDE",
    "TRITON_ALWAYS_COMPILE",
    "TRITON_DEFAULT_BACKEND",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_F32_DEFAULT",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_PTXAS_PATH",
    "TRITON_LIBCUDA_PATH",
    "DISABLE_PTXAS_OPT",
    "TRITON_DEBUG",
    "CC",
)


def absent() -> list[str]:
    """Return that Triton is not installed, and how to get it (empty if it is)."""
    found = find_spec("triton")
    if found is None or found.origin is None:  # a folder of that name, of anything
        return [f"triton is not installed: {_source()}"]
    return []


def missing() -> list[str]:
    """Return what Triton lacks, one clause with its cure for each (empty if it has all).

    A launcher that is in the cache already needs no compiler: that kernels do not run is for a trial to say.
    """
    if found := absent():
        return found
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return []  # nothing is compiled
    return [lack for lack in (_compiler(), _headers(), _cache()) if lack]


def _source() -> str:
    """Return how to get the Triton that belongs to the installed torch."""
    try:
        required = metadata.requires("torch") or ()
    except metadata.PackageNotFoundError:
        required = ()
    for line in required:
        wanted = line.partition(";")[0].replace(" ", "")
        if wanted.startswith(PACKAGES):
            return f"this torch asks for it: pip install {wanted}"
    return (
        "it comes with torch's wheels for CUDA and with vendors' builds of torch, and this torch names none"
    )


def _compiler() -> str:
    """Return why no launcher can be compiled; "" if a compiler is there."""
    chosen = os.environ.get("CC")
    if chosen is not None:
        if shutil.which(chosen):
            return ""
        return f"Triton compiles with CC, and {chosen!r} is no program here: unset it, or name gcc or clang"
    if shutil.which("gcc") or shutil.which("clang"):
        return ""
    return "Triton finds no C compiler: install gcc or clang, or name one in CC"


def _headers() -> str:
    """Return that the headers of Python are missing; "" if they are there."""
    # The scheme that Debian adds is not where its headers are; Triton does the same.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    folder = sysconfig.get_paths(scheme=scheme)["include"]
    if any(Path(one, "Python.h").is_file() for one in (folder, *_searched())):
        return ""
    return (
        f"Triton compiles against Python, and {folder} has no Python.h: install the headers of this Python "
        "(python3-dev on Debian and Ubuntu, python3-devel on Fedora and openEuler)"
    )


def _searched() -> Iterator[str]:
    """Yield the folders that compilers search by themselves."""
    for name in ("CPATH", "C_INCLUDE_PATH"):
        yield from filter(None, os.environ.get(name, "").split(os.pathsep))


def _cache() -> str:
    """Return that the cache cannot be written; "" if it can, or if Triton is told to keep it elsewhere."""
    if os.environ.get("TRITON_CACHE_MANAGER"):
        return ""
    folder = cache_folder()
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return ""
    return f"Triton cannot write its cache to {folder}: set TRITON_CACHE_DIR to a folder that can be written"


def cache_folder() -> Path:
    """Return where Triton keeps what it has compiled."""
    chosen = os.environ.get("TRITON_CACHE_DIR", "").strip()
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return Path(os.path.abspath(chosen or os.path.join(home, ".triton", "cache")))
