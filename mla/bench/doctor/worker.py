"""The questions `doctor` asks in child processes, because a vendor's library may abort or hang in them.

`python -m mla.bench.doctor.worker torch` or `backend NAME [KEY=VALUE ...]`; the last line of stdout is the
answer as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mla.text import dtype_name
from mla_backends.errors import BackendError, describe, plugin_code
from mla_backends.probe import USABLE

if TYPE_CHECKING:
    from mla.layer.ops import Ops
    from mla_backends.api import Backend, FusedOp

CONFIG = "deepseek-v2-lite"  # the runner's default


def examine_torch() -> dict[str, Any]:
    """Import torch as a user does; return its build, or why it does not import."""
    try:
        with plugin_code():
            import torch
    except Exception as error:  # noqa: BLE001  # vendor extensions run during this import
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return {"version": "", "build": {}, "problem": describe(error), "missing": missing}
    build = {
        name: str(value)
        for name, value in vars(torch.version).items()
        if isinstance(value, str) and not name.startswith("_") and name != "git_version"
    }
    return {"version": str(torch.__version__), "build": build, "problem": "", "missing": False}


def examine_backend(name: str, *options: str) -> dict[str, Any]:
    """Set up a backend with KEY=VALUE options, whose probe succeeded; list its ops for the default config."""
    try:
        import mla

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


def _facts(opened: Backend) -> dict[str, Any]:
    import torch

    from mla.command.console import note
    from mla.config import MLAConfig
    from mla.layer.ops import Ops

    assert opened.device is not None
    _ask_as_a_run_does(opened)
    native, info, offered = opened.dtypes(), opened.device_info(), opened.ops()
    dtype = torch.bfloat16 if torch.bfloat16 in native else native[0]
    chosen = Ops(MLAConfig.preset(CONFIG), offered, dtype, opened.device, say=note)
    ops = {role: chosen[role] for role in chosen.names()}
    return {
        "device": str(opened.device),
        "device_name": info.name,
        "memory_bytes": info.memory_bytes,
        "dtypes": [dtype_name(dtype) for dtype in native],
        "config": CONFIG,
        "dtype": dtype_name(dtype),
        "ops": {role: {"implementation": op.name, "reasons": list(op.reasons)} for role, op in ops.items()},
        "op_remarks": chosen.remarks(),
        "triton": _triton(offered),
        "idle_ops": _idle(chosen, offered),
    }


def _ask_as_a_run_does(opened: Backend) -> None:
    """Ask what every run asks before its first forward: what raises there must not be called usable here."""
    opened.remarks()
    opened.timer()
    opened.device_timer()
    opened.memory()
    opened.environment()


def _triton(offered: Mapping[str, FusedOp]) -> dict[str, Any] | None:
    """Return what Triton lacks here, for a backend that offers ops of ours in it; None for others."""
    from mla_backends.triton_ops.launcher import KernelOp, missing

    if not any(isinstance(op, KernelOp) for op in offered.values()):
        return None
    return {"missing": missing()}


def _idle(chosen: Ops, offered: Mapping[str, FusedOp]) -> dict[str, str]:
    """Return the ops whose kind this config never calls: they are not refused, but do not run."""
    called = {_kind(chosen[role].op) for role in chosen.names()}
    return {name: op.contract for name, op in offered.items() if _kind(op) not in called}


def _kind(op: FusedOp) -> str:
    return op.contract.partition("/")[0]


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": examine_torch,
    "backend": examine_backend,
}


def main(arguments: list[str]) -> None:
    """Answer one question and end the process immediately."""
    answer = QUESTIONS[arguments[0]](*arguments[1:])
    sys.stdout.write(f"\n{json.dumps(answer)}\n")  # on its own line, whatever was printed before
    sys.stdout.flush()
    # Vendor stacks have been seen to hang or crash during interpreter shutdown.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
