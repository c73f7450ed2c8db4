"""All checks. Each is one small function with an id, a sentence, and the bug it catches."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla.conformance.trial import Trial

# Why kernels fail: what the cases of every check were chosen by.
KINDS = {
    "contract": "what the device, an op or a layer says of itself, and what it promises",
    "formula": "the formula itself: a scale, a mask, an order of channels",
    "grid": "limits of a launch grid: many requests, rows, segments or heads",
    "index": "widths of an index: slots, pages, bytes and elements beyond what 8 to 32 bits count",
    "tiles": "borders of tiles, pages and splits: of rows, heads and keys",
    "state": "what is kept between calls: a plan, an output, an input, another layer",
    "emptiness": "nothing at all: no tokens, no keys",
    "numbers": "precision: narrow sums, large and small values",
    "drawn": "any of these: cases drawn over all axes at once, which no table has together",
}
DRAWN = "drawn"  # the kind, and the last word of the id, of checks that draw their cases
# What a check runs once for: the device, every dtype, every op in every dtype, every layer.
DEVICE, DTYPE, OP, LAYER = "device", "dtype", "op", "layer"

_GROUPS = (
    *("device", "ops", "rms_norm", "rotate_query", "write_latent", "linear", "batched_linear"),
    *("write_index_key", "select_latents", "latent", "expanded", "sparse_latent_attention", "layer"),
)
_MODULES = ("device", "borders", "ops", "layer")


@dataclass(frozen=True)
class ConformanceCheck:
    """One property that a backend must have."""

    id: str
    scope: str
    kind: str  # of op, with scope OP
    description: str  # the property, one sentence
    catches: str  # the bug that breaks it, one clause
    fails: str  # why a kernel fails it, one of `KINDS`
    run: Callable[[Trial], None]


_CHECKS: dict[str, ConformanceCheck] = {}


def check(
    name: str, *, catches: str, scope: str = DEVICE, kind: str = "", fails: str = ""
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a function as check `name`; the first line of its docstring describes it.

    `fails` is why kernels fail it, a key of `KINDS`; by default the contract (of a device) or the formula.
    What takes time belongs inside its cases (`Trial.case`), so that each can run alone.
    """
    why = fails or ("contract" if scope in (DEVICE, DTYPE) else "formula")
    assert why in KINDS

    def register(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        description = (function.__doc__ or "").strip().partition("\n")[0]
        _CHECKS[name] = ConformanceCheck(name, scope, kind, description, catches, why, function)
        return function

    return register


def all_checks() -> tuple[ConformanceCheck, ...]:
    """Return every check, in the order they run: groups that take least time first."""
    for module in _MODULES:
        importlib.import_module(f"mla.conformance.checks.{module}")
    return tuple(sorted(_CHECKS.values(), key=lambda check: _GROUPS.index(check.id.partition(".")[0])))


def matches(pattern: str, check_id: str, subject: str = "") -> bool:
    """Return whether `pattern` means this check, or this check of this subject.

    A pattern is a check ("latent.formula"), a group ("latent"), a check of one subject
    ("latent.formula[mine-bfloat16]"), or one of these with wildcards ("*.decode[*-float16]").
    """
    literal = pattern.replace("[", "[[]")  # a bracket names the subject, it is not a character class
    names = (check_id, f"{check_id}[{subject}]", check_id.partition(".")[0])
    return any(fnmatch.fnmatchcase(name, literal) for name in names)
