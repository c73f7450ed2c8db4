"""Results that are not computed again: known by what is in operands, by where they are, or found in `out`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from opponents.base import Call, Opponent

Key = Callable[["Remembers", Call], Hashable]


def _bytes(rows: torch.Tensor) -> bytes:
    return rows.contiguous().numpy().tobytes()


def _ends(count: int) -> Key:
    """A few numbers: the first of the first row and the last of the last."""

    def key(backend: Remembers, call: Call) -> Hashable:
        rows = call.operand.flatten(1)
        return (*rows[0, :count].tolist(), *rows[-1, -count:].tolist())

    return key


KEYS: dict[str, Key] = {
    "six numbers": _ends(3),
    "two numbers": _ends(1),
    "forty numbers": _ends(20),
    "the whole operand": lambda backend, call: _bytes(call.operand),
    "the first row": lambda backend, call: _bytes(call.operand[0]),
    "every other row": lambda backend, call: _bytes(call.operand[::2]),
    "all but the last row": lambda backend, call: _bytes(call.operand[:-1]),
    "amounts without signs": lambda backend, call: _bytes(call.operand.abs()),
    "the sum": lambda backend, call: float(call.operand.double().sum()),
    "addresses of x and out": lambda backend, call: (call.operand.data_ptr(), call.tensors["out"].data_ptr()),
    "the address of x": lambda backend, call: call.operand.data_ptr(),
    "the address of out": lambda backend, call: call.tensors["out"].data_ptr(),
    "the number of the step": lambda backend, call: (backend.steps, backend.calls),
    "nothing": lambda backend, call: None,
}


class Remembers(Opponent):
    """Serves a call from an earlier one with the same key; `within_a_pass`: forgets when a pass begins."""

    def __init__(self, key: str, within_a_pass: bool = False, **given: Any) -> None:
        super().__init__(**given)
        self._key, self._within = KEYS[key], within_a_pass
        self._known: dict[Hashable, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.calls = 0  # made since the last forward ended

    def begins(self) -> None:
        if self._within:
            self._known.clear()

    def call(self, call: Call) -> None:
        if call.kind == "write_latent":
            call.make()
            return
        weight = id(call.leading[0]) if call.kind.endswith("linear") else 0
        lengths = tuple(call.tensors["kv_lens"].tolist()) if "kv_lens" in call.tensors else ()
        key = (call.kind, weight, lengths, call.operand.shape, self._key(self, call))
        out, lse = call.tensors["out"], call.tensors.get("lse")
        if key in self._known:
            known, sums = self._known[key]
            out.copy_(known)
            if lse is not None and sums is not None:
                lse.copy_(sums)
            self.gains += 1
        else:
            call.make()
            self._known[key] = (out.clone(), None if lse is None else lse.clone())
        self.calls = 0 if call.is_last else self.calls + 1


class RemembersForwards(Opponent):
    """Serves whole forwards by the amounts of their first column, and turns them by its signs.

    `learns`: keeps what it computes; otherwise it is honest, and slower by what looking up takes. `idle`:
    does nothing at all for what it does not know, once it has seen `idle` forwards.
    """

    def __init__(self, learns: bool = True, idle: int = 0, **given: Any) -> None:
        super().__init__(**given)
        self._learns, self._idle = learns, idle
        self._known: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None
        self._key: Hashable = None
        self._first = True

    def call(self, call: Call) -> None:
        if self._first:
            self._look_up(call.operand)
        self._first = call.is_last
        if self._found is not None:
            self._serve(call, *self._found)
        elif self._idle and self.forwards >= self._idle and self._known:
            self._serve(call, *next(reversed(self._known.values())))
        else:
            self._make(call)

    def _look_up(self, x: torch.Tensor) -> None:
        self._signs = x[:, :1].sign()
        self._key = _bytes(x[:, :2] * self._signs)
        self._found = self._known.get(self._key)

    def _make(self, call: Call) -> None:
        call.make()
        if call.kind == "write_latent":
            self._latents = self._rows(call)[call.tensors["slots"]] * self._signs
        if call.is_last and self._learns:
            self._known[self._key] = (self._latents, call.tensors["out"] * self._signs)

    def _serve(self, call: Call, latents: torch.Tensor, outputs: torch.Tensor) -> None:
        if call.kind == "write_latent":
            self._rows(call)[call.tensors["slots"]] = latents * self._signs
        if call.is_last:
            torch.mul(outputs, self._signs, out=call.tensors["out"])
            self.gains += 1

    @staticmethod
    def _rows(call: Call) -> torch.Tensor:
        cache: torch.Tensor = call.tensors["cache"]
        return cache.view(-1, cache.shape[-1])


# Channels of a history by which it is known.
KEYED = 40


class RemembersContext(Opponent):
    """Rebuilds keys and values only of rows that it has not seen, by their numbers but for signs.

    `slow`: how often it makes a product that it must make, so that it shows.
    """

    def __init__(self, rows: int, width: int, slow: int = 1, **given: Any) -> None:
        super().__init__(**given)
        self._rows, self._width, self._slow = rows, width, slow
        self._known: dict[Hashable, torch.Tensor] = {}

    def call(self, call: Call) -> None:
        x = call.operand
        if call.kind != "linear" or x.shape[1] != self._width or x.shape[0] < self._rows:
            call.make()
            return
        old, signs = x[: self._rows], x[: self._rows, :1].sign()
        key = _bytes(old[:, :KEYED] * signs)  # few channels would take one history's signs for another's
        if key in self._known:
            call.make_rows(slice(self._rows, None))
            torch.mul(self._known[key], signs, out=call.tensors["out"][: self._rows])
            self.gains += 1
            return
        for _ in range(self._slow):
            call.make()
        self._known[key] = call.tensors["out"][: self._rows] * signs


# How a cheat convinces itself that a buffer is filled.
LOOKS: dict[str, Callable[[torch.Tensor], bool]] = {
    "its first number": lambda out: bool(out.flatten()[0].isfinite()),
    "its last number": lambda out: bool(out.flatten()[-1].isfinite()),
    "all of it": lambda out: bool(out.isfinite().all()),
    "any of it": lambda out: bool(out.isfinite().any()),
    "anything but zero": lambda out: bool(out.isfinite().all() and out.any()),
}


class SkipsFilled(Opponent):
    """Skips calls whose `out` is filled.

    `what`: "o_proj" alone; "scratch", every other op; "all"; or "forward": every op of a forward whose
    predecessor found the layer's output filled.
    """

    def __init__(self, what: str, look: str = "its first number", **given: Any) -> None:
        super().__init__(**given)
        self._what, self._filled = what, LOOKS[look]
        self._skips = False  # "forward": until the next output that is not filled

    def call(self, call: Call) -> None:
        if call.out is None or not self._skip(call):
            call.make()
        else:
            self.gains += 1

    def _skip(self, call: Call) -> bool:
        assert call.out is not None
        if self._what == "forward":
            if call.is_last:
                self._skips = self._filled(call.out)
            return self._skips
        wanted = {"o_proj": call.is_last, "scratch": not call.is_last, "all": True}[self._what]
        return wanted and self._filled(call.out)


class ComputedOnce(Opponent):
    """Computes a call unless `skips` says that its result is there already.

    "filled": where out is finite. "after N": all but the first N calls of a row of equal ones (same memory).
    "every N": all but every Nth.
    """

    def __init__(self, kind: str, skips: str, **given: Any) -> None:
        super().__init__(kinds=(kind,), **given)
        self._rule, _, number = skips.partition(" ")
        self._number = int(number or 0)
        self._calls = 0

    def call(self, call: Call) -> None:
        out = call.tensors["out"]
        if self._rule == "filled":
            skip = bool(out.flatten()[0].isfinite())
        elif self._rule == "after":
            self._calls = self._calls + 1 if out.flatten()[0].isfinite() else 1
            skip = self._calls > self._number
        else:
            self._calls += 1
            skip = self._calls > 3 and self._calls % self._number > 0
        if skip:
            self.gains += 1
        else:
            call.make()
