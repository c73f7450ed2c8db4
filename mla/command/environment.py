"""What a number depended on: versions, host, build, commit. Probes are guarded; unknown facts are omitted."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mla
import mla_backends
from mla.command import launcher
from mla_backends import host
from mla_backends.api import Backend

# Variables that say how many threads there are, where they run, and how they wait; and what glibc does with
# freed memory: mapping large tensors anew in every call costs as much as small ops.
_VARIABLES = ("OMP_NUM_THREADS", "KMP_AFFINITY", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GLIBC_TUNABLES")
# CPUs that others may use before a run is said to have shared its own.
_TOLERATED = 0.25
# What can change a number: sources, and libraries that were built from them. Not those in a folder `kernels`:
# a plugin may find them elsewhere, and says in its environment which it uses.
_SUFFIXES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".mu", ".so", ".pyd"}


def environment(backend: Backend) -> dict[str, str]:
    """Return facts about host, torch and backend, the backend's own last."""
    import torch

    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": host.processor_name(),
        "cpus": str(host.cpu_limit()),
        "mla": mla.__version__,
        "torch": str(torch.__version__),
        "torch_threads": str(torch.get_num_threads()),
    }
    facts |= {name: value for name in ("transformers", "numpy") if (value := distribution_version(name))}
    facts |= {key: value for key in _VARIABLES if (value := os.environ.get(key))}
    facts |= launcher.facts()
    return facts | {f"backend.{key}": str(value) for key, value in backend.environment().items()}


def now() -> str:
    """Return the time, as results say it: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class OtherLoad:
    """How many of this process's CPUs others use, from its making on. Linux alone tells."""

    def __init__(self) -> None:
        self._start, self._others = time.monotonic(), _seconds_of_others()

    def remark(self, threads: int) -> str:
        """Return "1.6 of 2" where others left fewer CPUs than `threads` need; "" where they did not.

        What a hypervisor takes counts as theirs.
        """
        now, before = _seconds_of_others(), self._others
        if now is None or before is None:
            return ""
        cpus = len(os.sched_getaffinity(0))
        used = max(0.0, (now - before) / max(time.monotonic() - self._start, 1e-9))
        return f"{min(used, cpus):.1f} of {cpus}" if used + threads > cpus + _TOLERATED else ""


def _seconds_of_others() -> float | None:
    """Return the seconds that this process's CPUs were busy with anything else; None if nobody tells."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = [list(map(int, line.split()[1:9])) for line in lines if line.split(" ", 1)[0] in ours]
        busy = sum(sum(cpu) - cpu[3] - cpu[4] for cpu in ticks)  # without idle and waiting for a disk
        return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])
    except (AttributeError, OSError, ValueError, IndexError):
        return None


def distribution_version(name: str) -> str | None:
    """Return the installed version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, "-dirty" if changed; None outside one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(mla.__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # or it merely lies inside some work tree
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None


def build_digest(backend: object) -> str | None:
    """Return a digest of the sources of `mla`, `mla_backends` and a backend; None if they are in no file.

    A version or a commit does not tell two states of a work tree apart, nor plugins that are edited in place.
    """
    names = {mla.__name__, mla_backends.__name__, type(backend).__module__.partition(".")[0]}
    digest = hashlib.sha256()
    try:
        for name in sorted(names):
            for path, shown in _files(sys.modules[name]):
                digest.update(f"{name}/{shown}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    except (OSError, KeyError, TypeError):
        return None
    return digest.hexdigest()[:16]


def _files(module: Any) -> Iterator[tuple[Path, str]]:
    """Yield the files of a package that count, or the one of a module, with their names in it."""
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    if not folders:
        file = Path(getattr(module, "__file__", None))  # type: ignore[arg-type]  # TypeError without one
        yield file, file.name
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            shown = path.relative_to(folder)
            built = path.suffix == ".so" and "kernels" in shown.parts
            if path.suffix in _SUFFIXES and not built and path.is_file():
                yield path, shown.as_posix()
