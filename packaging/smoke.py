"""Install wheels as on a machine without a compiler, run on the CPU, and insist on the wheel's kernels.

    python packaging/smoke.py DIST

DIST is a folder that packaging/build_all.py and cibuildwheel have filled. Third parties come from an index,
our own packages from their files alone. The run sees no compiler, even where there is one, and no home.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from distributions import version

NEEDED = ("mla_bench", "mla_backends", "mla_backend_cpu")
TORCH = "https://download.pytorch.org/whl/cpu"
KERNELS = "from mla import load_backend; print(load_backend('cpu').environment()['kernels'])"


class SmokeFailed(Exception):
    """What a user would have met; says it."""


def wheels(dist: Path) -> list[Path]:
    """Return our wheels for this machine. Raises `SmokeFailed` if one is missing, or there are several."""
    machine = os.uname().machine
    problems = []
    for name in NEEDED:
        fitting = [
            path
            for path in dist.glob(f"{name}-{version()}-*.whl")
            if path.stem.endswith(("-any", f"_{machine}"))
        ]
        if len(fitting) != 1:
            there = ", ".join(path.name for path in fitting) or "none"
            raise SmokeFailed(f"{dist} must have one wheel of {name} {version()} for {machine}, has {there}.")
        problems += fitting
    return problems


def run(dist: Path, folder: Path, torch_index: str) -> None:
    """Install into an environment in `folder`, and run. Raises `SmokeFailed`."""
    ours = wheels(dist)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _call((*pip, "--index-url", torch_index, "torch"))
    _call((*pip, *map(str, ours)))

    bare = {"PATH": str(python.parent), "HOME": "/nonexistent"}
    kernels = _call((str(python), "-c", KERNELS), folder, bare).strip()
    print(f"kernels: {kernels}")
    if kernels.startswith(("none", "off")):
        raise SmokeFailed(f"the wheel brought no kernels that run here: {kernels}")
    _call((str(python), "-m", "mla.bench", "--backend", "cpu", "--preset", "smoke"), folder, bare, show=True)


def _call(
    command: Sequence[str],
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
    show: bool = False,
) -> str:
    """Return what a command prints, and let it be seen on the way if `show`. Raises `SmokeFailed`."""
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if show:
        print(done.stdout)
    # 6 is a doubtful time: a busy machine is no fault of the wheel.
    if done.returncode not in ((0, 6) if show else (0,)):
        raise SmokeFailed(f"{' '.join(command)} ended with exit code {done.returncode}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if the wheels do not work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, metavar="DIST", help="folder with the wheels")
    parser.add_argument(
        "--torch-index", default=TORCH, metavar="URL", help="where torch is from [%(default)s]"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(options.dist.resolve(), Path(folder), options.torch_index)
        except SmokeFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
