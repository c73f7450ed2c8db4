"""Build every distribution of this repository as sdist and wheel, and check what was built.

    python packaging/build_all.py DIST

Needs the packages `build` and `twine` (the extra `test` brings both). Tests, continuous integration and a
release call this same script. Every wheel is built from its sdist, so what an sdist lacks is missed here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from distributions import ROOT, Distribution, distributions, version


class BuildFailed(Exception):
    """A distribution could not be built, or is not what an index accepts; says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build as the command line says, and return the exit code: 1 for a failure, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    target: Path = options.dist.resolve()
    try:
        target.mkdir(parents=True, exist_ok=True)
        filled = any(target.iterdir())
    except OSError as error:
        print(f"error: {options.dist} cannot be made a folder: {error.strerror}.", file=sys.stderr)
        return 2
    if filled:
        sentence = f"{options.dist} is not empty, and old files could be released: name a new folder."
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    try:
        _build_all(target, options)
        check(target)
    except BuildFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dist", type=Path, metavar="DIST", help="folder for the files; made if it is not there"
    )
    parser.add_argument("--jobs", type=_jobs, default=2, metavar="N", help="how many to build at a time [2]")
    parser.add_argument(
        "--no-isolation",
        action="store_true",
        help="build with the hatchling of this environment instead of a fresh one from the index",
    )
    parser.add_argument(
        "--sdist-only",
        action="append",
        default=[],
        metavar="NAME",
        choices=[distribution.name for distribution in distributions()],
        help="make no wheel of this one (a release takes those with kernels from cibuildwheel)",
    )
    return parser


def _jobs(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 to 99")
    return int(text)


def _build_all(target: Path, options: argparse.Namespace) -> None:
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(_build, distribution, target, options) for distribution in distributions()]
        try:
            for job in as_completed(jobs):
                for path in job.result():
                    print(f"{path.name}  {path.stat().st_size / 1024:.0f} KiB", flush=True)
        except BuildFailed:
            pool.shutdown(cancel_futures=True)
            raise


def _build(distribution: Distribution, target: Path, options: argparse.Namespace) -> list[Path]:
    """Build one distribution and return its files."""
    flags = ["--no-isolation"] if options.no_isolation else []
    flags += ["--sdist"] if distribution.name in options.sdist_only else []
    command = [sys.executable, "-m", "build", *flags, "--outdir", str(target), str(distribution.folder)]
    # Not in a folder of ours: Python would look for modules there first.
    done = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildFailed(f"{distribution.name} could not be built:\n{(done.stdout + done.stderr).strip()}")
    made = [
        *target.glob(f"{distribution.stem}-{version()}.tar.gz"),
        *target.glob(f"{distribution.stem}-{version()}-*.whl"),
    ]
    wanted = 1 if distribution.name in options.sdist_only else 2
    if len(made) != wanted:
        raise BuildFailed(f"{distribution.name} {version()}: expected {wanted} files, got {_names(made)}.")
    return made


def check(target: Path) -> None:
    """Raise `BuildFailed` unless `target` holds nothing but what an index accepts."""
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(target.iterdir()))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildFailed(f"twine objects:\n{(done.stdout + done.stderr).strip()}")


def _names(paths: Collection[Path]) -> str:
    return ", ".join(sorted(path.name for path in paths)) or "none"


if __name__ == "__main__":
    sys.exit(main())
