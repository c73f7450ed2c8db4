"""Whether torch imports here, and if not, which vendor's extension breaks it.

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
from mla_backends.probe import NoAnswer, ask

SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
OFF = {SWITCH: "0"}
SECONDS = 60.0


@dataclass(frozen=True)
class Extension:
    """A distribution that torch imports automatically. `problem` says why that fails, or is empty."""

    name: str
    value: str  # "package.module:function"
    distribution: str
    version: str
    problem: str = ""


@dataclass(frozen=True)
class TorchReport:
    """The outcome of importing torch. `problem` is empty if it imports."""

    version: str = ""
    build: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    autoload: bool = True
    autoload_is_to_blame: bool = False  # it imports with autoloading off
    extensions: Sequence[Extension] = ()
    fixes: Sequence[str] = ()


def check_torch(names: Sequence[str]) -> TorchReport:
    """Import torch in a child process; if that fails, find out why. `names` are the diagnosed backends."""
    imported = _import({})
    report = TorchReport(
        version=imported["version"],
        build=imported["build"],
        problem=imported["problem"],
        autoload=os.environ.get(SWITCH, "1") == "1",  # as torch reads it
        extensions=_extensions(),
    )
    if not report.problem:
        return report
    if imported["missing"]:
        return replace(report, problem="torch is not installed", fixes=_sources(names))
    without = _import(OFF) if report.autoload and report.extensions else imported
    if without["problem"]:
        return replace(report, fixes=["reinstall torch in a build that fits this system", *_sources(names)])
    return _with_culprits(replace(report, version=without["version"], build=without["build"]))


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
    """Return what torch would import automatically, without importing it."""
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
    """Return where to get torch: from the vendors of the named backends if known."""
    known = [KNOWN[name] for name in names if name in KNOWN]
    return [f"for backend '{entry.name}', install torch from {entry.torch_source}" for entry in known] or [
        "install the torch build of your device's vendor"
    ]


def _with_culprits(report: TorchReport) -> TorchReport:
    """Load each extension in its own process, and add how to fix those that fail."""
    with ThreadPoolExecutor(max_workers=len(report.extensions)) as pool:
        tried = tuple(pool.map(_tried, report.extensions))
    fixes = [fix for extension in tried if extension.problem for fix in _repairs(extension, report.version)]
    switch = f"or run with {SWITCH}=0, so that torch autoloads no extensions; backends import their own"
    return replace(report, autoload_is_to_blame=True, extensions=tried, fixes=[*fixes, switch])


def _tried(extension: Extension) -> Extension:
    command = ["-m", "mla.bench.doctor.worker", "extension", extension.name, extension.value]
    try:
        return replace(extension, problem=ask(command, ("problem",), SECONDS, OFF)["problem"])
    except NoAnswer as none:
        return replace(extension, problem=f"a process that loads it {none}")


def _repairs(extension: Extension, torch_version: str) -> tuple[str, str]:
    return (
        f"install a version of {extension.distribution} that fits torch {torch_version}",
        f"or remove it: `pip uninstall {extension.distribution}`",
    )
