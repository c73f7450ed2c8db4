"""Repeated forwards: a backend may make all calls of one on the same memory in a single call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mla.layer.ops import Ops
from mla_backends.api import Backend, OpCall


class Recording:
    """Stands in for an op, and records its calls instead of computing."""

    def __init__(self, op: Any, calls: list[OpCall]) -> None:
        self._op, self._calls = op, calls

    def __call__(self, *arguments: Any, **tensors: Any) -> None:
        self._calls.append(OpCall(self._op, arguments, tensors))


def recording(ops: Ops, calls: list[OpCall]) -> Ops:
    """Return `ops` as ones that only append their calls to `calls`."""
    return ops.replaced(lambda role, op: Recording(op, calls))


class Repeated:
    """The last forward of a layer, as one call once it is repeated."""

    def __init__(self, backend: Backend | None) -> None:
        self._sequence = None if backend is None else backend.sequence
        if getattr(self._sequence, "__func__", None) is Backend.sequence:  # it always declines
            self._sequence = None
        self.forget()

    @property
    def offered(self) -> bool:
        """Whether there is a backend that may make sequences."""
        return self._sequence is not None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the backend and its addresses: a copy calls its ops one by one."""
        return Repeated, (None,)

    def forget(self) -> None:
        """Release the recording."""
        self._owners: tuple[object, ...] = ()
        self._layout: tuple[object, ...] = ()
        self._asked = False  # whether the backend has been asked for the call
        self._call: Callable[..., None] | None = None

    def find(
        self,
        owners: tuple[object, ...],
        layout: tuple[object, ...],
        record: Callable[[], list[OpCall]],
        moving: Sequence[torch.Tensor],
    ) -> Callable[..., None] | None:
        """Return a function that runs this forward in one call; None the first time, and where there is none.

        The addresses in a recording depend on `owners`, by identity, and on `layout`, by value; and on the
        weights, so callers that replace weights must call `forget`. The number of owners never changes.
        """
        if self._sequence is None:
            return None
        if layout != self._layout or any(a is not b for a, b in zip(owners, self._owners, strict=True)):
            self.forget()
            self._owners, self._layout = owners, layout
            return None
        if not self._asked:
            self._asked, self._call = True, self._sequence(record(), moving)
        return self._call
