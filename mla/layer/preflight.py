"""Ask an op once per process whether its kernel really runs here, before the op is chosen.

A kernel that is compiled or loaded at its first use may fail there for reasons that no look at its package
shows: no compiler, no write access, binaries for other devices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from mla_backends.api import FusedOp
from mla_backends.errors import describe, one_line, out_of_memory, plugin_code

Say = Callable[[str], object]  # is told in one line what is about to take a while

# Identity of an op -> the op, and what it answered per spec. An op may be neither hashable nor kept.
_ANSWERS: dict[int, tuple[weakref.ref[FusedOp], dict[Hashable, tuple[str, ...]]]] = {}


def preflight_reasons(name: str, op: FusedOp, spec: Any, say: Say | None = None) -> list[str]:
    """Return why `op`, offered as `name`, does not run here although it supports `spec`.

    Asked once per op and spec in a process, but again where memory was short. Whatever `op.preflight` raises
    is a reason.
    """
    if type(op).preflight is FusedOp.preflight:
        return []
    answers = _answers(op)
    if spec in answers:
        return list(answers[spec])
    if say is not None and op.compiles:
        say(f"preparing {name}: {op.compiles}")
    found = _ask(op, spec)
    if not any(map(out_of_memory, found)):
        answers[spec] = tuple(found)
    return found


def _answers(op: FusedOp) -> dict[Hashable, tuple[str, ...]]:
    known = _ANSWERS.get(id(op))
    if known is None or known[0]() is not op:  # the identity is that of an op which is gone
        known = _ANSWERS[id(op)] = (weakref.ref(op), {})
    return known[1]


def _ask(op: FusedOp, spec: Any) -> list[str]:
    try:
        with plugin_code():
            return [one_line(reason) for reason in op.preflight(spec)]
    except Exception as error:  # noqa: BLE001  # compilers and loaders raise anything
        return [f"its preflight raised {one_line(describe(error))}"]
