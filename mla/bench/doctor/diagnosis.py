"""`doctor`: why a backend is or is not usable, and what to do about it.

Everything that imports torch or a plugin happens in child processes: a vendor's library may abort or hang.
torch itself imports every distribution with an entry point in the group `torch.backends`, and one that fails
takes `import torch` down with it, for every device.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import mla
from mla.bench.doctor.worker import EXTENSIONS
from mla.command.environment import distribution_version
from mla.text import size
from mla_backends.discovery import locate
from mla_backends.errors import BackendNotInstalled, DuplicateBackend
from mla_backends.known import GENERAL, KNOWN
from mla_backends.probe import NO_ANSWER, USABLE, NoAnswer, Status, ask, names, status

SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
OFF = {SWITCH: "0"}
PROBE_S = 60.0
# Setting up a device may compile kernels, and several ops may compile theirs, for a minute or two each.
SETUP_S = 600.0


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
    nothing = {"version": "", "build": {}, "problem": "", "missing": False}
    try:
        return ask(["-m", "mla.bench.doctor.worker", "torch"], (*nothing,), PROBE_S, variables)
    except NoAnswer as none:
        return {**nothing, "problem": f"a process that imports torch {none}"}


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
    fixes = []
    for extension in (extension for extension in tried if extension.problem):
        fixes.append(f"install a version of {extension.distribution} that fits torch {report.version}")
        fixes.append(f"or remove it: `pip uninstall {extension.distribution}`")
    switch = f"or run with {SWITCH}=0, so that torch autoloads no extensions; backends import their own"
    return replace(report, autoload_is_to_blame=True, extensions=tried, fixes=[*fixes, switch])


def _tried(extension: Extension) -> Extension:
    command = ["-m", "mla.bench.doctor.worker", "extension", extension.name, extension.value]
    try:
        return replace(extension, problem=ask(command, ("problem",), PROBE_S, OFF)["problem"])
    except NoAnswer as none:
        return replace(extension, problem=f"a process that loads it {none}")


@dataclass(frozen=True)
class Diagnosis:
    """The state of one backend beyond its probe: whether the device starts, and what runs on it."""

    name: str
    state: str  # as `probe.Status` has it
    distribution: str | None
    version: str | None
    reason: str
    evidence: Mapping[str, str]
    fixes: Sequence[str]
    facts: Mapping[str, Any] = field(default_factory=dict)  # device, dtypes, ops; empty unless usable


@dataclass(frozen=True)
class DoctorReport:
    """Everything `doctor` finds out."""

    host: Mapping[str, str]
    torch: TorchReport
    backends: Sequence[Diagnosis]

    @property
    def usable(self) -> list[str]:
        """Names of the usable backends among those diagnosed."""
        return [backend.name for backend in self.backends if backend.state == USABLE]


def diagnose(name: str | None = None, options: Mapping[str, str] | None = None) -> DoctorReport:
    """Diagnose one backend, with `options` of its own, or all. Raises `UnknownBackend` for other names.

    All are those that are installed or known, and `GENERAL` where none of them is usable.
    """
    if name is not None:
        with suppress(BackendNotInstalled, DuplicateBackend):  # these are reported as a state
            locate(name)
    chosen = names() if name is None else [name]
    with ThreadPoolExecutor(max_workers=len(chosen) + 1) as pool:
        torch = pool.submit(check_torch, chosen)
        backends = list(pool.map(lambda backend: _diagnose(backend, options=options), chosen))
        if name is None and not any(backend.state == USABLE for backend in backends):
            backends.append(_diagnose(GENERAL))
        if torch.result().autoload_is_to_blame:
            backends = list(pool.map(lambda backend: _retried(backend, options), backends))
    return DoctorReport(_host(), torch.result(), backends)


def _host() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "mla": mla.__version__,
        "mla-backends": distribution_version("mla-backends") or "not installed as a distribution",
    }


def _diagnose(
    name: str, variables: Mapping[str, str] | None = None, options: Mapping[str, str] | None = None
) -> Diagnosis:
    """Probe a backend, and set it up if the probe succeeds."""
    probed = status(name, PROBE_S, variables, options)
    if probed.state != USABLE:
        return _diagnosis(probed, probed.state, probed.reason, probed.hint)
    words = [f"{key}={value}" for key, value in (options or {}).items()]
    command = ["-m", "mla.bench.doctor.worker", "backend", name, *words]
    try:
        fields = ("state", "reason", "hint", "facts")
        return _diagnosis(probed, **ask(command, fields, SETUP_S, variables))
    except NoAnswer as none:
        reason = f"the probe succeeds, but a process that sets up the device {none}"
        hint = f"`python -X faulthandler {' '.join(command)}` shows where it stops"
        return _diagnosis(probed, NO_ANSWER, reason, hint)


def _diagnosis(
    probed: Status, state: str, reason: str, hint: str, facts: Mapping[str, Any] | None = None
) -> Diagnosis:
    return Diagnosis(
        name=probed.name,
        state=state,
        distribution=probed.distribution,
        version=probed.version,
        reason=reason,
        evidence=probed.evidence,
        fixes=[hint] if hint else [],
        facts=facts or {},
    )


def _retried(failed: Diagnosis, options: Mapping[str, str] | None) -> Diagnosis:
    """Retry a backend with torch's autoloading off, which may be all it needs."""
    if failed.state in (USABLE, BackendNotInstalled.state, DuplicateBackend.state):
        return failed
    if _diagnose(failed.name, OFF, options).state != USABLE:
        return failed
    return replace(failed, fixes=[f"run with {SWITCH}=0: just tried, and it makes '{failed.name}' usable"])


def as_text(report: DoctorReport) -> str:
    """Return the report as text: a block for the host, torch and each backend, one fix per line."""
    torch = f"torch {report.torch.version}".strip()
    torch += ": does not import" if report.torch.problem else ": imports"
    blocks = [_block("host", report.host.items()), _block(torch, _torch_lines(report.torch))]
    blocks += map(_backend, report.backends)
    return "\n".join([*blocks, f"usable: {', '.join(report.usable) or 'none'}\n"])


def _block(title: str, lines: Iterable[tuple[str, str]]) -> str:
    return f"{title}\n" + "".join(f"  {key:<12}  {value}\n" for key, value in lines)


def _torch_lines(torch: TorchReport) -> Iterator[tuple[str, str]]:
    yield from torch.build.items()
    if torch.problem:
        yield "reason", torch.problem
    yield "autoload", "on" if torch.autoload else f"off ({SWITCH})"
    for extension in torch.extensions:
        problem = f" fails: {extension.problem}" if extension.problem else ""
        yield "extension", f"{extension.name} of {extension.distribution} {extension.version}{problem}"
    yield from (("fix", fix) for fix in torch.fixes)


def _backend(backend: Diagnosis) -> str:
    origin = f" ({backend.distribution} {backend.version})" if backend.distribution else ""
    return _block(f"{backend.name}: {backend.state}{origin}", _backend_lines(backend))


def _backend_lines(backend: Diagnosis) -> Iterator[tuple[str, str]]:
    if backend.reason:
        yield "reason", backend.reason
    yield from (("evidence", f"{marker}: {seen}") for marker, seen in backend.evidence.items())
    if backend.facts:
        yield from _fact_lines(backend.facts)
    yield from (("fix", fix) for fix in backend.fixes)


def _fact_lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "device", f"{facts['device_name']} ({facts['device']})"
    yield "memory", size(facts["memory_bytes"] or None, unknown="unknown", GiB=".1f")
    yield "dtypes", ", ".join(facts["dtypes"])
    yield "ops", f"for {facts['config']} in {facts['dtype']}:"
    for role, choice in facts["ops"].items():
        yield "", f"{role}: {choice['implementation']}"
        yield from (("", f"  {reason}") for reason in choice["reasons"])
    for name, remarks in facts["op_remarks"].items():
        yield from (("", f"{name}: {remark}") for remark in remarks)
    for name, contract in facts["idle_ops"].items():
        yield "", f"{name}: offered for {contract}, not called by this config"
    if facts["triton"]:
        yield from (("triton", gap) for gap in facts["triton"]["missing"] or ["lacks nothing here"])
