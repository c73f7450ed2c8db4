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
from mla.command.environment import distribution_version
from mla.text import size
from mla_backends.discovery import locate
from mla_backends.errors import BackendNotInstalled, DuplicateBackend
from mla_backends.known import GENERAL, KNOWN
from mla_backends.probe import NO_ANSWER, USABLE, NoAnswer, ask, names, status

EXTENSIONS = "torch.backends"  # the group of entry points that torch loads by itself
SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
OFF = {SWITCH: "0"}
PROBE_S = 60.0
# Setting up a device may compile kernels, and several ops may compile theirs, for a minute or two each.
SETUP_S = 600.0


@dataclass(frozen=True)
class TorchReport:
    """The outcome of importing torch. `problem` is empty if it imports."""

    version: str
    build: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    autoload: bool = True
    extensions: Sequence[str] = ()  # that torch imports by itself, such as "torch_x of torch-x 2.5"
    fixes: Sequence[str] = ()


def check_torch(names: Sequence[str]) -> TorchReport:
    """Import torch in a child process; if that fails, find out why. `names` are the diagnosed backends."""
    imported, autoload = _import({}), os.environ.get(SWITCH, "1") == "1"  # as torch reads it
    points = [(point.name, point.dist) for point in metadata.entry_points(group=EXTENSIONS)]
    extensions = [f"{name} of {dist.name} {dist.version}" if dist else name for name, dist in points]
    problem, missing = imported["problem"], imported.pop("missing")
    report = TorchReport(**imported, autoload=autoload, extensions=extensions)
    if not problem:
        return report
    if missing:
        return replace(report, problem="torch is not installed", fixes=_sources(names))
    if autoload and extensions and not (without := _import(OFF))["problem"]:
        fixes = [
            f"install a version of the extension that fits torch {without['version']}, or remove it",
            f"or run with {SWITCH}=0, so that torch autoloads no extensions; backends import their own",
        ]
        return replace(report, version=without["version"], build=without["build"], fixes=fixes)
    return replace(report, fixes=["reinstall torch in a build that fits this system", *_sources(names)])


def _import(variables: Mapping[str, str]) -> dict[str, Any]:
    """Import torch in a child process; return its version and build, or the problem."""
    nothing = {"version": "", "build": {}, "problem": "", "missing": False}
    try:
        return ask(["-m", "mla.bench.doctor.worker", "torch"], (*nothing,), PROBE_S, variables)
    except NoAnswer as none:
        return {**nothing, "problem": f"a process that imports torch {none}"}


def _sources(names: Sequence[str]) -> list[str]:
    """Return where to get torch: from the vendors of the named backends if known."""
    known = [KNOWN[name] for name in names if name in KNOWN]
    return [f"for backend '{entry.name}', install torch from {entry.torch_source}" for entry in known] or [
        "install the torch build of your device's vendor"
    ]


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
    facts: Mapping[str, Any]  # device, dtypes, ops; empty unless usable


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
        backends = list(pool.map(lambda backend: _diagnose(backend, options or {}), chosen))
        if name is None and not any(backend.state == USABLE for backend in backends):
            backends.append(_diagnose(GENERAL, {}))
    return DoctorReport(_host(), torch.result(), backends)


def _host() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "mla": mla.__version__,
        "mla-backends": distribution_version("mla-backends") or "not installed as a distribution",
    }


def _diagnose(name: str, options: Mapping[str, str]) -> Diagnosis:
    """Probe a backend, and set it up if the probe succeeds."""
    probed = status(name, PROBE_S, options=options)
    answer: dict[str, Any] = {
        "state": probed.state,
        "reason": probed.reason,
        "hint": probed.hint,
        "facts": {},
    }
    if probed.state == USABLE:
        words = [f"{key}={value}" for key, value in options.items()]
        command = ["-m", "mla.bench.doctor.worker", "backend", name, *words]
        try:
            answer = ask(command, (*answer,), SETUP_S)
        except NoAnswer as none:
            answer["state"] = NO_ANSWER
            answer["reason"] = f"the probe succeeds, but a process that sets up the device {none}"
            answer["hint"] = f"`python -X faulthandler {' '.join(command)}` shows where it stops"
    return Diagnosis(
        name,
        answer["state"],
        probed.distribution,
        probed.version,
        answer["reason"],
        probed.evidence,
        [answer["hint"]] if answer["hint"] else [],
        answer["facts"],
    )


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
    yield from (("extension", extension) for extension in torch.extensions)
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
