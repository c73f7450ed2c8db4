"""Building kernels in tests: cheap sources, processes, and a copy of the package without kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mla_backend_cpu
from mla_backend_cpu import cache, compilation
from mla_backend_cpu.compilation import Level

PORTABLE = compilation.levels("portable")[0]
#: Prints what is loaded of the portable level, as `built` returns it.
BUILD = "import native_builds; print(native_builds.built())"
PACKAGE = Path(mla_backend_cpu.__file__).parent


def built(level: Level = PORTABLE) -> Path:
    """Return the library that is in the cache, or is built now."""
    library = cache.find(level) or cache.make(level, since="a test asks for them")
    try:
        return Path(os.readlink(f"/proc/self/fd/{library.descriptor}"))
    finally:
        os.close(library.descriptor)


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start Python in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return the exit status, stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def small_sources(folder: Path) -> Path:
    """Return sources that compile at once, into one function."""
    folder.mkdir(exist_ok=True)
    visible = '__attribute__((visibility("default")))'
    (folder / "api.cpp").write_text(f'extern "C" {visible} int mla_dot_bf16() {{ return 0; }}\n')
    return folder


def copy_package(folder: Path) -> Path:
    """Copy the package without kernels, as if it had been installed where no compiler was."""
    leave_out = shutil.ignore_patterns("kernels", "__pycache__")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=leave_out)
    return folder
