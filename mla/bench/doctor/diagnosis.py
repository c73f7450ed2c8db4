"""`doctor`: why a backend is or is not usable, and what to do about it.

What imports torch or a plugin does so in a child process, because a vendor's library may abort or hang:
`python -m mla.bench.doctor.diagnosis torch`, or `backend NAME [KEY=VALUE ...]`, prints its answer as JSON, in
the last line of stdout. torch itself imports every distribution with an entry point in the group
`torch.backends`, and one that fails takes `import torch` down with it, for every device.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import mla
from mla.command.environment import distribution_version
from mla.text import dtype_name, size
from mla_backends.errors import BackendError, BackendNotInstalled, DuplicateBackend, describe, plugin_code
from mla_backends.known import GENERAL, KNOWN
from mla_backends.probe import NO_ANSWER, USABLE, NoAnswer, ask, names, status
from mla_backends.registry import locate

if TYPE_CHECKING:
    from mla_backends.api import Backend, FusedOp

Facts = dict[str, Any]  # as `doctor --json` prints them

MODULE = "mla.bench.doctor.diagnosis"
CONFIG = "deepseek-v2-lite"  # the runner's default
EXTENSIONS = "torch.backends"  # the group of entry points that torch loads by itself
SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
PROBE_S = 60.0
# Setting up a device may compile kernels, and several ops may compile theirs, for a minute or two each.
SETUP_S = 600.0


def diagnose(name: str | None, options: Mapping[str, str]) -> Facts:
    """Diagnose one backend, with `options` of its own, or all. Raises `UnknownBackend` for other names.

    All are those that are installed or known, and `GENERAL` where none of them is usable.
    """
    if name is not None:
        with suppress(BackendNotInstalled, DuplicateBackend):  # these are reported as a state
            locate(name)
    chosen = names() if name is None else [name]
    with ThreadPoolExecutor(max_workers=len(chosen) + 1) as pool:
        torch = pool.submit(_torch, chosen)
        backends = list(pool.map(lambda backend: _backend(backend, options), chosen))
        if name is None and not _usable(backends):
            backends.append(_backend(GENERAL, {}))
    host = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "mla": mla.__version__,
        "mla-backends": distribution_version("mla-backends") or "not installed as a distribution",
    }
    return {"host": host, "torch": torch.result(), "backends": backends, "usable": _usable(backends)}


def _usable(backends: Iterable[Facts]) -> list[str]:
    return [backend["name"] for backend in backends if backend["state"] == USABLE]


def _torch(backends: Sequence[str]) -> Facts:
    """Return whether torch imports; if not, the reason, and fixes for those who want these backends."""
    answer, autoload = _imported({}), os.environ.get(SWITCH, "1") == "1"  # as torch reads it
    points = [(point.name, point.dist) for point in metadata.entry_points(group=EXTENSIONS)]
    extensions = [f"{name} of {dist.name} {dist.version}" if dist else name for name, dist in points]
    known = [KNOWN[name] for name in backends if name in KNOWN]
    fixes = [f"for backend '{entry.name}', install torch from {entry.torch_source}" for entry in known]
    fixes = fixes or ["install the torch build of your device's vendor"]
    if not answer["problem"]:
        fixes = []
    elif autoload and extensions and not (without := _imported({SWITCH: "0"}))["problem"]:
        answer = {**without, "problem": answer["problem"]}
        fixes = [
            f"install a version of the extension that fits torch {answer['version']}, or remove it",
            f"or run with {SWITCH}=0, so that torch autoloads no extensions; backends import their own",
        ]
    elif answer["problem"] != NOT_INSTALLED:
        fixes.insert(0, "reinstall torch in a build that fits this system")
    return {**answer, "autoload": autoload, "extensions": extensions, "fixes": fixes}


def _imported(variables: Mapping[str, str]) -> Facts:
    """Import torch in a child process; return its version and build, or the problem."""
    nothing = {"version": "", "build": {}, "problem": ""}
    try:
        return ask(["-m", MODULE, "torch"], (*nothing,), PROBE_S, variables)
    except NoAnswer as none:
        return {**nothing, "problem": f"a process that imports torch {none}"}


def _backend(name: str, options: Mapping[str, str]) -> Facts:
    """Probe a backend, and set it up if the probe succeeds: then its facts are device, dtypes and ops."""
    probed = asdict(status(name, PROBE_S, options=options)) | {"facts": {}}
    if probed["state"] == USABLE:
        command = ["-m", MODULE, "backend", name, *(f"{key}={value}" for key, value in options.items())]
        try:
            probed |= ask(command, ("state", "reason", "hint", "facts"), SETUP_S)
        except NoAnswer as none:
            reason = f"the probe succeeds, but a process that sets up the device {none}"
            hint = f"`python -X faulthandler {' '.join(command)}` shows where it stops"
            probed |= {"state": NO_ANSWER, "reason": reason, "hint": hint}
    hint = probed.pop("hint")
    return {**probed, "fixes": [hint] if hint else []}


# -------------------------------------------------------------------------------------- in the child process

NOT_INSTALLED = "torch is not installed"


def examine_torch() -> Facts:
    """Import torch as a user does; return its build, or why it does not import."""
    try:
        with plugin_code():
            import torch
    except Exception as error:  # noqa: BLE001  # vendor extensions run during this import
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return {"version": "", "build": {}, "problem": NOT_INSTALLED if missing else describe(error)}
    build = {
        name: str(value)
        for name, value in vars(torch.version).items()
        if isinstance(value, str) and not name.startswith("_") and name != "git_version"
    }
    return {"version": str(torch.__version__), "build": build, "problem": ""}


def examine_backend(name: str, *options: str) -> Facts:
    """Set up a backend with KEY=VALUE options, whose probe succeeded; list its ops for the default config."""
    try:
        with plugin_code():
            opened = mla.load_backend(name, options=dict(word.partition("=")[::2] for word in options))
            return {"state": USABLE, "reason": "", "hint": "", "facts": _facts(opened)}
    except BackendError as error:
        return {"state": error.state, "reason": error.reason, "hint": error.hint, "facts": {}}
    except Exception as error:  # noqa: BLE001  # whatever a backend raises is reported
        reason = f"the device starts, but querying the backend raised {describe(error)}"
        command = f"`python -X dev -m mla.bench --backend {name} --list-ops`"
        hint = f"report it to the backend's authors with the output of {command}"
        return {"state": BackendError.state, "reason": reason, "hint": hint, "facts": {}}


def _facts(opened: Backend) -> Facts:
    import torch

    from mla.command.console import note
    from mla.config import MLAConfig
    from mla.layer.ops import Ops

    assert opened.device is not None
    # What every run asks before its first forward: what raises there must not be called usable here.
    for asked in (opened.remarks, opened.timer, opened.device_timer, opened.memory, opened.environment):
        asked()
    native, info, offered = opened.dtypes(), opened.device_info(), opened.ops()
    dtype = torch.bfloat16 if torch.bfloat16 in native else native[0]
    chosen = Ops(MLAConfig.preset(CONFIG), offered, dtype, opened.device, say=note)
    ops = {role: chosen[role] for role in chosen.names()}
    called = {_kind(choice.op) for choice in ops.values()}
    return {
        "device": str(opened.device),
        "device_name": info.name,
        "memory_bytes": info.memory_bytes,
        "dtypes": [dtype_name(dtype) for dtype in native],
        "config": CONFIG,
        "dtype": dtype_name(dtype),
        "ops": {role: {"implementation": op.name, "reasons": list(op.reasons)} for role, op in ops.items()},
        "op_remarks": chosen.remarks(),
        # Of a kind that this config never calls: they are not refused, but do not run.
        "idle_ops": {name: op.contract for name, op in offered.items() if _kind(op) not in called},
    }


def _kind(op: FusedOp) -> str:
    return op.contract.partition("/")[0]


# -------------------------------------------------------------------------------------------------- as text


def as_text(report: Facts) -> str:
    """Return the report as text: a block for the host, torch and each backend, one fix per line."""
    torch = report["torch"]
    title = f"torch {torch['version']}".strip() + (": does not import" if torch["problem"] else ": imports")
    blocks = [
        _block("host", report["host"].items()),
        _block(title, _torch_lines(torch)),
        *(_block(_title(backend), _lines(backend)) for backend in report["backends"]),
    ]
    return "\n".join([*blocks, f"usable: {', '.join(report['usable']) or 'none'}\n"])


def _block(title: str, lines: Iterable[tuple[str, str]]) -> str:
    return f"{title}\n" + "".join(f"  {key:<12}  {value}\n" for key, value in lines)


def _torch_lines(torch: Facts) -> Iterator[tuple[str, str]]:
    yield from torch["build"].items()
    if torch["problem"]:
        yield "reason", torch["problem"]
    yield "autoload", "on" if torch["autoload"] else f"off ({SWITCH})"
    yield from (("extension", extension) for extension in torch["extensions"])
    yield from (("fix", fix) for fix in torch["fixes"])


def _title(backend: Facts) -> str:
    origin = f" ({backend['distribution']} {backend['version']})" if backend["distribution"] else ""
    return f"{backend['name']}: {backend['state']}{origin}"


def _lines(backend: Facts) -> Iterator[tuple[str, str]]:
    if backend["reason"]:
        yield "reason", backend["reason"]
    yield from (("evidence", f"{marker}: {seen}") for marker, seen in backend["evidence"].items())
    if facts := backend["facts"]:
        yield "device", f"{facts['device_name']} ({facts['device']})"
        yield "memory", size(facts["memory_bytes"] or None, "unknown", "GiB", ".1f")
        yield "dtypes", ", ".join(facts["dtypes"])
        yield "ops", f"for {facts['config']} in {facts['dtype']}:"
        for role, choice in facts["ops"].items():
            yield "", f"{role}: {choice['implementation']}"
            yield from (("", f"  {reason}") for reason in choice["reasons"])
        for name, remarks in facts["op_remarks"].items():
            yield from (("", f"{name}: {remark}") for remark in remarks)
        for name, contract in facts["idle_ops"].items():
            yield "", f"{name}: offered for {contract}, not called by this config"
    yield from (("fix", fix) for fix in backend["fixes"])


def main(what: str, *words: str) -> None:
    """Answer one question and end the process immediately."""
    answer = examine_torch() if what == "torch" else examine_backend(*words)
    sys.stdout.write(f"\n{json.dumps(answer)}\n")  # on its own line, whatever was printed before
    sys.stdout.flush()
    os._exit(0)  # vendor stacks have been seen to hang or crash during interpreter shutdown


if __name__ == "__main__":
    main(*sys.argv[1:])
