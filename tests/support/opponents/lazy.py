"""Work that is done only where it seems to count, or right only now and then: in some passes or forwards."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from opponents.base import Call, Opponent, Sequences

Works = Callable[["Lazy"], bool]


# Counted through, the six timed passes have every remainder by five, wherever the first one is.
PASSES = 5


def _in_pass(number: int) -> Works:
    return lambda lazy: lazy.passes % PASSES == number


# Whether a forward is really computed, once the first pass is over.
WHEN: dict[str, Works] = {
    **{f"pass {number} of 5": _in_pass(number) for number in range(PASSES)},
    "4 of 5 passes": lambda lazy: lazy.passes % PASSES != 3,
    "every 2nd forward": lambda lazy: lazy.forwards % 2 == 0,
    "every 3rd step": lambda lazy: lazy.steps % 3 == 0,
    "all steps but one": lambda lazy: lazy.steps != 5,
    # Two in a row: one of them is timed.
    "all forwards but two of 40": lambda lazy: lazy.forwards % 40 < 38,
    "first step of a pass": lambda lazy: lazy.steps == 0,
    "all steps but the first": lambda lazy: lazy.steps != 0,
    "40 forwards": lambda lazy: lazy.forwards < 40,
    "collector on": lambda lazy: gc.isenabled(),
    "collector off": lambda lazy: not gc.isenabled(),
    "not while the runner times": lambda lazy: not lazy.being_timed,
}


def _skips(call: Call) -> None:
    """Leave everything as it is."""


def _forgets(call: Call) -> None:
    """Leave attention out."""
    if call.kind != "latent_attention":
        call.make()


def _off(call: Call) -> None:
    """Attend, not quite."""
    call.make()
    if call.kind == "latent_attention":
        call.tensors["out"].mul_(0.99)


def _rounds(dtype: torch.dtype) -> Callable[[Call], None]:
    """Attend on queries rounded to a narrower type."""

    def rounded(call: Call) -> None:
        q = {"q": call.operand.to(dtype).to(call.operand.dtype)} if call.kind == "latent_attention" else {}
        call.make(**q)

    return rounded


# What is done instead.
INSTEAD: dict[str, Callable[[Call], None]] = {
    "nothing": _skips,
    "no attention": _forgets,
    "attention 1 % off": _off,
    "attention in bfloat16": _rounds(torch.bfloat16),
    "attention in float16": _rounds(torch.float16),
}


class Lazy(Opponent):
    """Computes `when` it thinks that it must, and does `instead` otherwise; the first pass is honest."""

    def __init__(self, when: str, instead: str = "nothing", **given: Any) -> None:
        super().__init__(**given)
        self._works, self._instead = WHEN[when], INSTEAD[instead]
        self._wraps = when == "not while the runner times"
        self.being_timed = 0
        self._new, self._real = True, True  # the next call begins a forward; this one is computed

    def arrives(self) -> None:
        if self._wraps:
            self._wrap_runner()

    def call(self, call: Call) -> None:
        if self._new:
            works = self._works(self)
            self._real = works or self.passes <= 1
        self._new = call.is_last
        if self._real or call.kind == "write_latent":
            call.make()
        else:
            self.gains += 1
            self._instead(call)

    def _wrap_runner(self) -> None:
        """Wrap every method of the runner's rooms that has to do with time, to know when it is running."""
        for module in [
            module_here for name, module_here in sys.modules.items() if name.startswith("mla.bench.measure.")
        ]:
            for kind in [member for member in vars(module).values() if isinstance(member, type)]:
                for name, method in list(vars(kind).items()):
                    if "time" in name and callable(method) and kind.__module__ == module.__name__:
                        self.patches.enter_context(patch.object(kind, name, self._timing(method)))

    def _timing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.being_timed += 1
            try:
                return method(*args, **kwargs)
            finally:
                self.being_timed -= 1

        return timed


class LazySequence(Sequences):
    """Computes only every `every`th of the forwards that it makes in one call."""

    def __init__(self, every: int, **given: Any) -> None:
        super().__init__(**given)
        self._every, self._times = every, 0

    def skips(self) -> bool:
        self._times += 1
        return self._times % self._every > 0


class Flaky(Opponent):
    """Spoils rows of attention's output.

    `every`: each so many forwards; `by_chance`: at random instead. `row`: which (None: all). `factor`: by how
    much. `after`: not in the first so many forwards.
    """

    def __init__(
        self,
        every: int,
        by_chance: bool = False,
        row: int | None = None,
        factor: float = 1000.0,
        after: int = 0,
        **given: Any,
    ) -> None:
        super().__init__(**given)
        self._every, self._row, self._factor, self._after = every, row, factor, after
        self._random = random.Random(2) if by_chance else None

    def call(self, call: Call) -> None:
        call.make()
        if call.kind == "latent_attention" and self._now():
            rows = slice(None) if self._row is None else slice(self._row, self._row + 1)
            call.tensors["out"][rows] *= self._factor
            self.gains += 1

    def _now(self) -> bool:
        if self.passes < 2 or self.forwards < self._after:
            return False
        if self._random is not None:
            return self._random.random() < 1 / self._every
        return self.forwards % self._every == self._every - 1
