"""Honest bugs that come and go: a race that spoils some rows of some forwards."""

from __future__ import annotations

import random
from typing import Any

from opponents.base import Call, Opponent


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
            self.gain()

    def _now(self) -> bool:
        if self.passes < 2 or self.forwards < self._after:
            return False
        if self._random is not None:
            return self._random.random() < 1 / self._every
        return self.forwards % self._every == self._every - 1
