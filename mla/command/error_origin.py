"""Where an error was raised: the line of the op itself rather than the innermost one of torch below it."""

from __future__ import annotations

import os
import traceback
from types import FrameType

from mla_backends.api import Backend, FusedOp
from mla_backends.errors import original

_Place = tuple[FrameType, int]  # a frame and its current line


def place(error: BaseException) -> str:
    """Return "file.py:12 in function", and the op or the backend's method that was running, if any."""
    frames = list(traceback.walk_tb(original(error).__traceback__))
    for at, (frame, _) in enumerate(frames):
        op = _self(frame)
        if isinstance(op, FusedOp):
            package = type(op).__module__.partition(".")[0]
            own = [one for one in frames[at:] if _package(one[0]) == package]
            return _text((own or frames)[-1]) + _name(frames[:at], op)
    own = [one for one in frames if _package(one[0]) != "torch"]
    return _text((own or frames)[-1]) + _method(frames)


def in_op(error: BaseException) -> bool:
    """Return whether an op raised the error, or what it called."""
    return any(isinstance(_self(frame), FusedOp) for frame, _ in traceback.walk_tb(error.__traceback__))


def op_name(error: BaseException) -> str:
    """Return "op 'name' of role" for an error that an op raised, as far as both are known; else ""."""
    frames = list(traceback.walk_tb(original(error).__traceback__))
    for at, (frame, _) in enumerate(frames):
        op = _self(frame)
        if isinstance(op, FusedOp):
            return _name(frames[:at], op).removeprefix(", ")
    return ""


def _method(frames: list[_Place]) -> str:
    """Return ", ops() of backend 'name'" if a method of a backend was running; "" otherwise."""
    for frame, _ in frames:
        backend = _self(frame)
        if isinstance(backend, Backend):
            return f", {frame.f_code.co_name}() of backend '{getattr(backend, 'name', '?')}'"
    return ""


def _name(callers: list[_Place], op: FusedOp) -> str:
    """Return ", op 'name' of role": the step that called the op knows both."""
    from mla.layer.ops import Choice, Ops

    for frame, _ in reversed(callers):
        own = _self(frame)
        known = (
            frame.f_locals.get("ops"),
            *(getattr(own, name, None) for name in ("ops", "_ops", "_choice")),
        )
        ops = next((one for one in known if isinstance(one, (Ops, Choice))), None)
        if isinstance(ops, Choice) and ops.op is op:
            return f", op '{ops.name}'"
        if isinstance(ops, Ops):
            roles = [role for role in ops.names() if ops[role].op is op]
            named = frame.f_locals.get("role")  # one op may serve several weights
            roles = [named] if named in roles else roles
            return f", op '{ops[roles[0]].name}' of {' or '.join(roles)}" if roles else ""
        if frame.f_locals.get("op") is op and isinstance(name := frame.f_locals.get("name"), str):
            return f", op '{name}'"  # it was being chosen
    return ""


def _self(frame: FrameType) -> object:
    return frame.f_locals.get("self")


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _text(one: _Place) -> str:
    frame, line = one
    return f"{os.path.basename(frame.f_code.co_filename)}:{line} in {frame.f_code.co_name}"
