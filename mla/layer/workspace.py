"""`Workspace`: named scratch memory that grows to the largest step and is then never allocated again."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch

from mla.cache.ragged_batch import plain
from mla_backends.api import Backend

Views = TypeVar("Views")
# Most sets of views kept; prompts come in any length.
MOST_VIEWS = 256

Tokens = slice | torch.Tensor  # rows of a step: contiguous, or by index


_Lock: Any = type(threading.RLock())  # knows which thread holds it
_TURNS: WeakSet[Any] = WeakSet()


class Turn(_Lock):  # type: ignore[misc]
    """What a thread holds while it uses scratch memory, and ops, which may have some. A copy is another.

    `with` raises RuntimeError in a thread whose turn it is already: a signal handler, a finalizer or an op
    that calls a layer would overwrite what the call that it interrupts has in scratch memory.
    """

    def __init__(self) -> None:
        _TURNS.add(self)

    def __enter__(self) -> bool:
        if self._is_owned():
            raise RuntimeError(
                "this thread is already running a layer of this backend: a signal handler, a finalizer or an "
                "op cannot call another one. Give it a backend of its own, or let it run afterwards."
            )
        return bool(_Lock.__enter__(self))

    @classmethod
    def of(cls, backend: Backend | None) -> Turn:
        """Return the one of all that call the ops of a backend; another one without a backend."""
        return cls() if backend is None else cast("Turn", vars(backend).setdefault("_turn", cls()))

    @property
    def held(self) -> bool:
        """Whether it is this thread's turn."""
        return bool(self._is_owned())  # as threading.Condition asks

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()


def _after_fork() -> None:
    """Free the turns of threads that the child of a fork does not have."""
    for turn in list(_TURNS):
        if not turn.held:
            turn._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Workspace:
    """Scratch tensors of one layer. A name's memory is reused by every step, in `turn`."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, keeps: int | None = None, turn: Turn | None = None
    ) -> None:
        """Make no memory yet. `keeps`: the most bytes that `for_round` keeps; None is any."""
        self._dtype, self._device, self._keeps = dtype, device, keeps
        self.turn = turn or Turn()
        self._held: dict[str, torch.Tensor] = {}
        self._views: dict[Hashable, Any] = {}

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the layer's dtype."""
        return self._dtype.itemsize

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return uninitialised memory of this shape; what the name held before is lost."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
                held = plain(torch.empty(size, dtype=dtype or self._dtype, device=self._device))
            self._held[name] = held
            self._views.clear()  # they may view memory that is gone
        return held[:size].view(shape)

    def for_round(self, nbytes: int) -> Callable[..., torch.Tensor]:
        """Return `take` for a round of so many bytes, or what makes memory that is not kept after the round.

        Every layer of a model has a workspace: were the memory of an exceptionally long context kept, it
        would be needed once per layer. The device's allocator hands it from one layer to the next instead.
        """
        if self._keeps is None or nbytes <= self._keeps:
            return self.take
        return lambda name, *shape: torch.empty(shape, dtype=self._dtype, device=self._device)

    def views(self, key: Hashable, build: Callable[[], Views]) -> Views:
        """Return views of this memory, built once per key: making a dozen costs more than a small op.

        `build` may take memory, and must give the same views for the same key while no memory grows.
        """
        if key not in self._views:
            built = build()  # may grow memory, which forgets all views
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            self._views[key] = built
        return cast("Views", self._views[key])

    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(held.nbytes for held in self._held.values())

    def rows(self, name: str, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return a group's rows of x to read: a view when they are contiguous, else a copy."""
        if isinstance(tokens, slice):
            return x[tokens]
        return torch.index_select(x, 0, tokens, out=self.take(name, tokens.shape[0], *x.shape[1:]))

    def target(self, name: str, x: torch.Tensor, tokens: Tokens, count: int) -> torch.Tensor:
        """Return where to write a group's rows of x: in place when contiguous, else memory for `put`."""
        return x[tokens] if isinstance(tokens, slice) else self.take(name, count, *x.shape[1:])

    @staticmethod
    def put(x: torch.Tensor, tokens: Tokens, target: torch.Tensor) -> None:
        """Scatter what was written to `target` into x, unless it was written in place."""
        if not isinstance(tokens, slice):
            x.index_copy_(0, tokens, target)
