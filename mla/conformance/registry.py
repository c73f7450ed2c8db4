"""The checks there are. Each is one small function with an id, a sentence, and the bug it is there for."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla.conformance.trial import Trial

#: What a check is run for, once each: the device, every dtype, every op in every dtype, every layer.
DEVICE, DTYPE, OP, LAYER = "device", "dtype", "op", "layer"

_MODULES = (
    "device",
    "clock",
    "graph",
    "contract",
    "linear",
    "pointwise",
    "write_latent",
    "latent_attention",
    "expanded_attention",
    "layer",
    "replay",
)


@dataclass(frozen=True)
class Check:
    """One property that a backend must have."""

    id: str
    scope: str
    kind: str  # of op, with scope OP
    description: str  # the property, one sentence
    catches: str  # the bug that breaks it, one clause
    run: Callable[[Trial], None]


_CHECKS: dict[str, Check] = {}


def check(
    name: str, *, catches: str, scope: str = DEVICE, kind: str = ""
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a function as check `name`; the first line of its docstring describes it."""

    def register(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        if name in _CHECKS:
            raise ValueError(f"there are two checks '{name}'.")
        description = (function.__doc__ or "").strip().partition("\n")[0]
        _CHECKS[name] = Check(name, scope, kind, description, catches, function)
        return function

    return register


def all_checks() -> tuple[Check, ...]:
    """Return every check, in the order they run."""
    for module in _MODULES:
        importlib.import_module(f"mla.conformance.checks.{module}")
    return tuple(_CHECKS.values())


def matches(pattern: str, check_id: str, subject: str = "") -> bool:
    """Say whether `pattern` means this check, or this check of this subject.

    A pattern is a check ("latent.decode"), a group ("latent"), a check of one subject
    ("latent.decode[mine-bfloat16]"), or one of these with wildcards ("*.decode[*-float16]").
    """
    literal = pattern.replace("[", "[[]")  # a bracket names the subject and is no character class
    names = (check_id, f"{check_id}[{subject}]", check_id.partition(".")[0])
    return any(fnmatch.fnmatchcase(name, literal) for name in names)
