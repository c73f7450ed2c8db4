"""What implementations of the whole layer share: turned inputs, output buffers and their check."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mla.bench.subjects.base import TakesInputs
from mla.bench.subjects.inputs import Expected, Inputs
from mla.bench.subjects.shelf import Shelf, buffers
from mla.bench.subjects.turned import TurnedHidden
from mla.bench.subjects.turns import Turn, forward_number
from mla.bench.workload.scenario import Scenario
from mla.verify.layer_check import Checker, Forward
from mla.verify.places import Places
from mla.verify.tolerances import relative_error
from mla.verify.verdict import Check

# Bound before any plugin loads, which may replace parts of torch.
_copy = torch.Tensor.copy_
_fill = torch.Tensor.fill_
_randn = torch.randn

# An error below this multiple of rounding once, which a copy of the oracle's outputs has. A layer rounds
# three rows one after another (see `mla.verify.bounds`): sqrt(3) times, if everything else is exact.
TOO_EXACT = 1.25


@dataclass
class LayerChecker(Checker):
    """Judges the layer's outputs for any turn.

    `oracle` returns the outputs [n, T, d] in float64 of any hidden states [n, T, d] with plain signs: those
    of consecutive steps, from the scenario's history on.
    """

    turned: Expected | None = None
    _rounding: float | None = None
    oracle: Callable[[torch.Tensor], torch.Tensor] | None = None

    def rounding(self) -> float:
        """Return the relative error of the oracle's own outputs, rounded to the dtype."""
        if self._rounding is None:
            self._rounding = relative_error((self.expected.to(self.dtype), self.expected))
        return self._rounding

    def expected_rows(self, step: int, turn: Turn) -> torch.Tensor:
        """Return what the outputs [T, d] of one forward should be."""
        assert self.turned is not None
        return self.turned.rows(step, turn)

    def of(self, hidden: torch.Tensor) -> LayerChecker:
        """Return a checker of plain turns whose inputs were `hidden` [n, T, d], within the same bounds."""
        assert self.turned is not None
        assert self.oracle is not None
        return replace(self, turned=replace(self.turned, plain=self.oracle(hidden)))


class LayerImplementation(TakesInputs):
    """Takes turns with the scenario's inputs; a subclass runs `x` and writes `out`."""

    buffers: int | None = None  # of outputs; None: as many as fit
    _instead: Sequence[torch.Tensor] | None = None

    def prepare_buffers(self, scenario: Scenario, inputs: Inputs, *before: int) -> None:
        """Make buffers for inputs, and for outputs [.., T, d] with the dimensions `before`."""
        self.scenario, device = scenario, self.setting.device
        self._hidden, self._turns = TurnedHidden(scenario, inputs, device), inputs.turns
        shape = (*before, *inputs.hidden.shape[1:])
        size = torch.Size(shape).numel() * inputs.hidden.element_size()
        count = self.buffers or buffers(scenario.steps, size)
        made = torch.empty((count, *shape), dtype=inputs.hidden.dtype, device=device)
        self._shelf = Shelf(list(made.unbind()), scenario.steps, poison)
        self._collected: dict[int, tuple[Turn, torch.Tensor]] = {}
        self._number, self._taken = 0, -1
        self._kept_turns: dict[int, Turn] = {}
        self._held: dict[int, torch.Tensor] = {}  # outputs as they were when their clock had stopped

    @property
    def hidden(self) -> torch.Tensor:
        """Inputs [inputs, T, d] on the device, always at the same address. `before` writes its forward's."""
        return self._hidden.rows

    @property
    def x(self) -> torch.Tensor:
        """The inputs [T, d] of the forward that `before` prepared."""
        return self._x

    @property
    def out(self) -> torch.Tensor:
        """The buffer [.., T, d] for the output of the forward that `before` prepared."""
        return self._out

    def begin(self, number: int) -> Turn:
        """Start pass `number` with poisoned buffers, and return the turn of its first forward."""
        self._number = number
        self._shelf.clear()
        self._kept_turns, self._held, self._collected = {}, {}, {}
        return self._turn(0)

    def _turn(self, index: int) -> Turn:
        return self._turns.turn(forward_number(self.scenario, self._number, index))

    @contextmanager
    def fed(self, seed: int, count: int) -> Iterator[list[torch.Tensor]]:
        try:
            yield self.feed(seed, count)
        finally:
            self.feed(None)

    def feed(self, seed: int | None, count: int = 0) -> list[torch.Tensor]:
        """Give the forwards of a plain pass new inputs, and return those; None: the scenario's again."""
        self._instead = None
        if seed is None:
            return []
        generator = torch.Generator().manual_seed(seed)
        shape, dtype = self._whole_shape(), self.hidden.dtype
        drawn = [_randn(shape, generator=generator).to(dtype) for _ in range(count)]
        self._instead = [self._own_rows(hidden) for hidden in drawn]
        return drawn

    def _whole_shape(self) -> torch.Size:
        """Return the shape [T, d] of the scenario's hidden states."""
        return self.hidden.shape[1:]

    def _own_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what this implementation runs of hidden states [T, d]."""
        return hidden

    def keep_collected(self, indices: Collection[int]) -> None:
        self._collected = {index: self._collected[index] for index in indices}

    def take(self, turn: Turn) -> None:
        """Take the inputs of a turn. A subclass that keeps history gives it the turn's signs, too."""
        self._hidden.take(turn)

    def ready(self, index: int) -> None:
        turn = self._turn(index)
        if self.scenario.mode == "prefill":
            self.take(turn)
        self._present = turn
        self._x = self.hidden[self._step(index)]
        self._out = self._shelf.next()

    def show(self, index: int) -> None:
        self._hidden.show(self._step(index), None if self._instead is None else self._instead[index])

    def _step(self, index: int) -> int:
        return index if self.scenario.mode == "decode" else 0

    def after(self, index: int) -> None:
        self._kept_turns[index] = self._present
        if self.setting.device.type == "cpu":  # where reading waits for nobody: what is there now counts
            self._held[index] = _on_host(self._out)
        self._shelf.keep(index)
        self._held = {kept: self._held[kept] for kept in self._shelf.kept if kept in self._held}

    def collect(self) -> None:
        self._collected = {}
        for index, buffer in self._shelf.kept.items():
            found = self._held.get(index)
            found = _on_host(buffer) if found is None else found
            self._collected[index] = (self._kept_turns[index], found)

    def check(self, checker: LayerChecker) -> Check:
        return checker.check_forwards(self._forwards(checker), self.held_to_reference)

    def doubt(self, checker: LayerChecker, check: Check) -> str:
        once, error = checker.rounding(), check.relative_error or 0.0
        if not once or error > TOO_EXACT * once:
            return ""
        return (
            f"its relative error of {error:.1e} is that of the oracle's own outputs, rounded: a layer rounds "
            "several times"
        )

    def _forwards(self, checker: LayerChecker, part: Any = ...) -> Iterator[Forward]:
        """Yield what was collected, or a `part` of every output, as the checker wants it."""
        word = "step" if self.scenario.mode == "decode" else "forward"
        for index, (turn, found) in sorted(self._collected.items()):
            step = self._step(index)
            expected, places = checker.expected_rows(step, turn), partial(self.places, step)
            yield Forward(step, found[part], expected, f"{word} {index}", places)

    def places(self, step: int) -> Places:
        """Return what the rows of a forward are."""
        return Places.new_tokens(self.scenario.query_lens, self.scenario.kv_lens(step))

    def forwards(self, checker: LayerChecker) -> Iterator[tuple[int, Forward]]:
        """Yield what was collected, by forward, with what it should be."""
        return zip(sorted(self._collected), self._forwards(checker), strict=True)

    def compared(self) -> dict[int, torch.Tensor]:
        return {index: found for index, (_, found) in self._collected.items()}


def _on_host(buffer: torch.Tensor) -> torch.Tensor:
    return _copy(torch.empty(buffer.shape, dtype=buffer.dtype), buffer)


def poison(buffer: torch.Tensor) -> None:
    """Fill an output buffer with NaN."""
    _fill(buffer, torch.nan)
