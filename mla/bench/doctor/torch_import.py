"""Whether torch imports here, and if not, which extension of a vendor is to blame.

torch imports every distribution that declares an entry point in the group `torch.backends`, and one that
fails takes `import torch` down with it, for every device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

from mla.bench.doctor.worker import EXTENSIONS
from mla_backends.known import KNOWN
from mla_backends.status import NoAnswer, ask

SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
OFF = {SWITCH: "0"}
SECONDS = 60.0


@dataclass(frozen=True)
class Extension:
    """A distribution that torch imports by itself. `problem` says why that fails, where it does."""

    name: str
    value: str  # "package.module:function"
    distribution: str
    version: str
    problem: str = ""


@dataclass(frozen=True)
class TorchReport:
    """What importing torch comes to. `problem` is empty where it imports."""

    version: str = ""
    build: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    autoload: bool = True
    autoload_is_to_blame: bool = False  # it imports where it loads no extensions
    extensions: Sequence[Extension] = ()
    fixes: Sequence[str] = ()


def check_torch(names: Sequence[str]) -> TorchReport:
    """Import torch in a child process; where that fails, find out why. `names` are the backends examined."""
    found = _import({})
    report = TorchReport(
        version=found["version"],
        build=found["build"],
        problem=found["problem"],
        autoload=os.environ.get(SWITCH, "1") == "1",  # as torch reads it
        extensions=_extensions(),
    )
    if not report.problem:
        return report
    if found["missing"]:
        return replace(report, problem="torch is not installed", fixes=_sources(names))
    without = _import(OFF) if report.autoload and report.extensions else found
    if without["problem"]:
        return replace(report, fixes=["reinstall torch, in a build that fits this system", *_sources(names)])
    return _blame(replace(report, version=without["version"], build=without["build"]))


def _import(variables: Mapping[str, str]) -> dict[str, Any]:
    """Import torch in a child process; return its version and build, or the problem."""
    try:
        fields = ("version", "build", "problem", "missing")
        return ask(["-m", "mla.bench.doctor.worker", "torch"], fields, SECONDS, variables)
    except NoAnswer as none:
        return {
            "version": "",
            "build": {},
            "problem": f"a process that imports torch {none}",
            "missing": False,
        }


def _extensions() -> tuple[Extension, ...]:
    """Return what torch would import by itself, without importing it."""
    return tuple(
        Extension(
            point.name,
            point.value,
            point.dist.name if point.dist else "?",
            point.dist.version if point.dist else "?",
        )
        for point in metadata.entry_points(group=EXTENSIONS)
    )


def _sources(names: Sequence[str]) -> list[str]:
    """Return where to get torch: from the vendors of those backends, or from anybody's."""
    known = [KNOWN[name] for name in names if name in KNOWN]
    return [f"for backend '{one.name}', install torch from {one.torch_source}" for one in known] or [
        "install the torch build of your device's vendor"
    ]


def _blame(report: TorchReport) -> TorchReport:
    """Load the extensions one by one, each in a process of its own, and say how to go on."""
    with ThreadPoolExecutor(max_workers=len(report.extensions)) as pool:
        tried = tuple(pool.map(_tried, report.extensions))
    fixes = [fix for one in tried if one.problem for fix in _repairs(one, report.version)]
    switch = f"or run with {SWITCH}=0, so that torch loads no extension by itself; backends import their own"
    return replace(report, autoload_is_to_blame=True, extensions=tried, fixes=[*fixes, switch])


def _tried(one: Extension) -> Extension:
    command = ["-m", "mla.bench.doctor.worker", "extension", one.name, one.value]
    try:
        return replace(one, problem=ask(command, ("problem",), SECONDS, OFF)["problem"])
    except NoAnswer as none:
        return replace(one, problem=f"a process that loads it {none}")


def _repairs(one: Extension, torch_version: str) -> tuple[str, str]:
    return (
        f"install a {one.distribution} that fits torch {torch_version}",
        f"or remove it: `pip uninstall {one.distribution}`",
    )
