"""Graphs: recorded honestly, and replayed honestly or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opponents.base import Call, Opponent


class _State:
    """A prepared state that promises to follow its batch in a graph: it is planned anew in every replay."""

    graph_safe = True

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Graphs(Opponent):
    """Offers graphs. A replay plans and calls anew; `recorded`: it makes the calls of the capture again."""

    def __init__(self, recorded: bool = False, **given: Any) -> None:
        super().__init__(**given)
        self._recorded = recorded
        self._capture: list[Call] | None = None
        self.replaying, self.replays = False, 0

    def planned(self, state: Any, batch: Any) -> Any:
        return _State(super().planned(state, batch))

    def call(self, call: Call) -> None:
        if call.kind == "latent_attention":
            call.leading = (call.leading[0].inner,)
        if self._capture is not None:
            self._capture.append(call)
        self.compute(call)

    def compute(self, call: Call) -> None:
        """Make the call."""
        call.make()

    def graph(self, fn: Callable[[], None]) -> Callable[[], None]:
        self._capture = calls = []
        fn()
        self._capture = None

        def again() -> None:
            for call in calls:
                self.compute(call)

        def replay() -> None:
            self.replaying, self.replays = True, self.replays + 1
            self.replay(again if self._recorded else fn)
            self.replaying = False

        return replay

    def replay(self, work: Callable[[], None]) -> None:
        """Do what was captured."""
        work()


class EmptyReplays(Graphs):
    """Replays only some of the time: each `every`th; `honest`: all of the first so many."""

    def __init__(self, every: int, honest: int = 0, **given: Any) -> None:
        super().__init__(**given)
        self._every, self._honest = every, honest

    def replay(self, work: Callable[[], None]) -> None:
        if self.replays <= self._honest or self.replays % self._every == 0:
            work()
        else:
            self.gains += 1


class FlakyReplays(Graphs):
    """Right when called, and spoilt in each `every`th replay."""

    def __init__(self, every: int, **given: Any) -> None:
        super().__init__(**given)
        self._every = every

    def compute(self, call: Call) -> None:
        call.make()
        if self.replaying and call.kind == "latent_attention" and self.replays % self._every == 0:
            call.tensors["out"][0] *= 2
            self.gains += 1
