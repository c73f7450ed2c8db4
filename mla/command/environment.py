"""What a number depended on: versions, host, build, commit. Probes are guarded; unknown facts are omitted."""

from __future__ import annotations

import filecmp
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import mla
from mla.command import launcher
from mla_backends import host
from mla_backends.api import Backend

# Variables that say how many threads there are, where they run, and how they wait.
THREADS = ("OMP_NUM_THREADS", "KMP_AFFINITY", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


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
    facts |= {key: value for key in THREADS if (value := os.environ.get(key))}
    facts |= launcher.facts()
    return facts | {f"backend.{key}": str(value) for key, value in backend.environment().items()}


def distribution_version(name: str) -> str | None:
    """Return the installed version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, "-dirty" if changed; None outside one."""
    folder = Path(mla.__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed into an environment that merely lies inside some work tree
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def mixed_installation() -> str | None:
    """Return a note when `mla` runs from a checkout whose `mla_backends` is not the one imported.

    `python -m mla.bench` in a checkout takes `mla` from it and everything else from site-packages. That is
    fine while both hold the same code, and confusing after an edit.
    """
    import mla_backends

    used = Path(str(mla_backends.__file__)).parent
    beside = Path(str(mla.__file__)).parents[1] / "backends" / "mla_backends"
    if not beside.is_dir() or beside.resolve() == used.resolve():
        return None
    names = [str(path.relative_to(beside)) for path in beside.rglob("*.py")]
    _, different, missing = filecmp.cmpfiles(beside, used, names, shallow=False)
    if not different and not missing:
        return None
    return (
        f"note: mla runs from the checkout '{beside.parents[1]}' but the installed mla_backends is older or "
        f"newer than its './backends': install again to run one state."
    )
