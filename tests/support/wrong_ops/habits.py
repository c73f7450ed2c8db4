"""Small ops that keep something from call to call."""

from __future__ import annotations

from typing import Any

import torch

from mla.reference import REFERENCE
from mla_backends.api import FusedOp, Packed
from wrong_ops.base import Tensor, after, mutant, overwrite, written


def late_writer(kind: str, later: int) -> FusedOp:
    """Writes what it computed to the caller's memory once more, and wrong, some calls later."""
    kept: list[dict[str, Any]] = []

    def body(right: Any, *state: Any, **given: Any) -> None:
        right(*state, **given)
        kept.append(given)
        if len(kept) > later:
            overwrite(kept.pop(0), 7)

    return mutant(kind, body)


def remembers(kind: str, *names: str, shape: bool = False) -> FusedOp:
    """Takes tensors at an address, or of a shape, to be those that it saw there first."""
    kept: dict[Any, Tensor] = {}

    def body(right: Any, *state: Any, **given: Any) -> None:
        for name in names:
            if given.get(name) is not None:
                key = (name, given[name].shape, 0 if shape else given[name].data_ptr())
                given[name] = kept.setdefault(key, given[name].clone())
        right(*state, **given)

    return mutant(kind, body)


def remembers_result(kind: str) -> FusedOp:
    """Returns the result that it had for tensors at the same addresses."""
    kept: dict[Any, Tensor] = {}

    def body(right: Any, *state: Any, **given: Any) -> None:
        tensors = [operand for operand in given.values() if torch.is_tensor(operand)]
        key = tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors)
        if key in kept:
            overwrite(given, kept[key])
        else:
            right(*state, **given)
            kept[key] = written(given)

    return mutant(kind, body)


def skips_finite(kind: str) -> FusedOp:
    """Computes only what is still NaN."""

    def body(right: Any, *state: Any, **given: Any) -> None:
        if not given["out"].isfinite().all() or not len(given["out"]):
            right(*state, **given)

    return mutant(kind, body)


def adds_previous(kind: str, share: float) -> FusedOp:
    """Adds a little of the last result of as many rows: scratch memory that is not cleared."""
    kept: dict[Any, Tensor] = {}

    def spoil(given: dict[str, Any]) -> None:
        rows = written(given)
        if rows.shape in kept:
            overwrite(given, rows + share * kept[rows.shape])
        kept[rows.shape] = rows

    return after(kind, spoil)


def packs_once(kind: str, key: str) -> Any:
    """Packs a weight once per shape or address, and finds it again by that."""
    base, kept = type(REFERENCE[kind]), {}

    class PacksOnce(base):  # type: ignore[misc, valid-type]
        def pack(self, weight: Tensor) -> Packed:
            known = (tuple(weight.shape), 0 if key == "shape" else weight.data_ptr())
            return kept.setdefault((*known, weight.dtype), super().pack(weight.clone()))

    return PacksOnce()


def first_weight(kind: str, key: str) -> Any:
    """Copies a packed weight at its first call, and finds it again by shape or by the object's identity."""
    kept: dict[Any, Packed] = {}

    def body(right: Any, packed: Packed, **given: Any) -> None:
        known = tuple(packed.data.shape) if key == "shape" else id(packed)
        right(kept.setdefault(known, Packed(packed.data.clone(), packed.nbytes)), **given)

    return mutant(kind, body)
