"""How a wrong small op is made from the right one, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla.reference import REFERENCE

Tensor = torch.Tensor
Body = Callable[..., None]
SMALL_OPS = ("linear", "batched_linear", "rms_norm", "rotate_query", "write_latent")


def mutant(kind: str, body: Body) -> Any:
    """Return an op whose call is `body(right, *packed, **tensors)`; `right` is the right call."""
    base = type(REFERENCE[kind])

    def call(self: Any, *state: Any, **tensors: Any) -> None:
        body(super(changed, self).__call__, *state, **tensors)

    changed = type("Mutant", (base,), {"__call__": call})
    return changed()


def changing(kind: str, name: str, change: Callable[[Tensor], Any]) -> Any:
    """Return an op that is given another tensor than it should be."""
    return mutant(kind, lambda right, *state, **given: right(*state, **{**given, name: change(given[name])}))


def spoiling(kind: str, spoil: Callable[[Tensor], object], name: str = "out") -> Any:
    """Return an op that is right and then changes one of its tensors."""
    return after(kind, lambda given: spoil(given[name]))


def rows_of(given: dict[str, Any]) -> int:
    return len(given["slots" if "slots" in given else "x"])


def written(given: dict[str, Any], first: int = 0, last: int | None = None) -> Tensor:
    """Return a copy of the rows that were written, from `first` to `last`."""
    if "cache" in given:
        return given["cache"].flatten(0, 1)[given["slots"][first:last]]
    return given["out"][first:last].clone()


def overwrite(given: dict[str, Any], rows: Any, first: int = 0, last: int | None = None) -> None:
    """Write other rows to where the op wrote."""
    if "cache" in given:
        given["cache"].flatten(0, 1)[given["slots"][first:last]] = rows
    else:
        given["out"][first:last] = rows


def after(kind: str, spoil: Callable[[dict[str, Any]], object]) -> Any:
    """Return an op that is right and then does something to what it was given."""

    def body(right: Any, *state: Any, **given: Any) -> None:
        right(*state, **given)
        spoil(given)

    return mutant(kind, body)


def as_contiguous(x: Tensor) -> Tensor:
    """Read memory as a kernel does that takes its input to be contiguous."""
    return x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())
