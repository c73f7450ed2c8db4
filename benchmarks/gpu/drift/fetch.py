"""Getting a library's sources: with pip from its index, or from a path or URL that the user gives."""

from __future__ import annotations

import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from benchmarks.gpu.drift.sources import Sources, read
from mla.errors import UsageError

SECONDS = 600
# Wheels are only read, so those of any Linux do, and for any Python.
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "manylinux_2_34_x86_64", "linux_x86_64", "any")


def wheel(requirement: str, folder: Path) -> Sources:
    """Download one wheel with pip ("name" or "name==1.0") and read it. Raises `UsageError`."""
    before = set(folder.glob("*.whl"))
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
        "--disable-pip-version-check", "--ignore-requires-python", "--dest", str(folder),
        *(word for name in _PLATFORMS for word in ("--platform", name)), requirement,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(f"pip download {requirement} took more than {SECONDS} s.") from None
    new = sorted(set(folder.glob("*.whl")) - before) or _named(folder, requirement)
    if done.returncode or not new:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = errors[-1].removeprefix("ERROR: ").rstrip(".") if errors else "it left no wheel"
        raise UsageError(
            f"pip download {requirement} failed: {said}. Without a network, download the wheel elsewhere and "
            f"give it with --source {_name(requirement)}=FILE."
        )
    return given(new[-1], _name(requirement))


def source(name: str, place: str, folder: Path) -> Sources:
    """Read a wheel, archive or folder at a path, or download it from a URL. Raises `UsageError`."""
    if "://" not in place:
        if not Path(place).exists():
            raise UsageError(f"--source {name}: there is no '{place}'.")
        return given(Path(place), name)
    parts = urllib.parse.urlsplit(place)
    if parts.scheme != "https":
        raise UsageError(f"--source {name} takes a path or an https URL, not '{place}'.")
    target = folder / (Path(parts.path).name or name)
    try:
        with urllib.request.urlopen(place, timeout=60) as answer:
            target.write_bytes(answer.read())
    except OSError as error:
        raise UsageError(f"cannot download '{place}': {error}.") from error
    return given(target, name)


def given(path: Path, name: str) -> Sources:
    """Read what is at a path; a wheel's name says its version."""
    version = path.name.split("-")[1] if path.suffix == ".whl" else f"at {path.name or path}"
    return read(path, f"{name} {version}")


def _name(requirement: str) -> str:
    return requirement.partition("==")[0]


def _named(folder: Path, requirement: str) -> list[Path]:
    """Return the wheels of a distribution that were there before."""
    return sorted(folder.glob(f"{_name(requirement).replace('-', '_')}-*.whl"))
