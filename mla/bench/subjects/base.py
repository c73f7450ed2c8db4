"""Everything that is timed: seven methods, and what implementations of the whole layer share.

All get the same host weights and inputs. A *pass* is `restore(number)`, then `before(i)`, `step(i)` and
`after(i)` for every forward, then `outputs()`; only `step` is timed. The number of the pass selects exact
changes of the scenario's inputs whose outputs are known, the same for all implementations. So no result of
another forward passes for this one's.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from mla.bench.results.schema import Spread
from mla.bench.subjects.inputs import Inputs, Turn, TurnedHidden, expected_outputs, expected_plain
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.config import MLAConfig
from mla.errors import UsageError
from mla.verify.layer_check import Checker, Forward
from mla.verify.layer_oracle import Held, State, oracle
from mla.verify.places import Places
from mla.verify.selected import Taken
from mla.verify.verdict import Check

T = TypeVar("T")
Outputs = dict[int, torch.Tensor]  # of the forwards of one pass, on the host


class Left(NamedTuple):
    """What a pass left to judge it by; outputs and `taken` are by forward."""

    number: int
    outputs: Outputs  # [T, d]
    taken: dict[int, Taken] = {}  # noqa: RUF012  # nothing changes it
    places: Callable[[int], Places] | None = None  # of a step's rows


# What a class needs to be an implementation.
METHODS = ("load", "restore", "before", "step", "after", "outputs", "facts")
# The most bytes of output buffers of one implementation.
SHELF_BYTES = 256 << 20
KEPT = 2  # forwards of a pass that are judged by what they left in memory, at random


@dataclass(frozen=True)
class Facts:
    """What a result says of an implementation beside its times."""

    cache_bytes: int = 0  # of the scenario, once it is loaded
    weight_bytes: int = 0
    scratch_bytes: int = 0  # that persist between forwards
    plan_ms: float | None = None  # milliseconds in which the batch of the last pass was planned
    ops: dict[str, str] = field(default_factory=dict)  # role -> name
    remarks: dict[str, list[str]] = field(default_factory=dict)  # name -> what the op says of how it runs


class Implementation(ABC):
    """One way to run the layer. Subclasses are made of a `Setting` and the layer's weights by HF names."""

    name: str
    held_to_reference = False  # at most twice its error, as well as the absolute bounds
    computes = True  # the work that is counted: its time cannot be shorter than the device's limits allow
    number = 0  # of the present pass

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        """Create a cache with the scenario's history, and buffers for its outputs.

        Called again with other inputs of the same scenario, whose tensors may be copied to where the first
        ones are.
        """

    @abstractmethod
    def restore(self, number: int = 0) -> None:
        """Restore the cache to the history, and select the inputs of pass `number`. Never timed."""

    @abstractmethod
    def before(self, index: int) -> None:
        """Give `step(index)` inputs and an output buffer of its own, the inputs last. Never timed."""

    @abstractmethod
    def step(self, index: int) -> None:
        """Run one forward; in decode, the cache grows."""

    @abstractmethod
    def after(self, index: int) -> None:
        """Keep the output of `step(index)`. Never timed."""

    @abstractmethod
    def outputs(self) -> Outputs:
        """Return the outputs [T, d] of the pass, on the host, by forward. Never timed."""

    @abstractmethod
    def facts(self) -> Facts:
        """Return what a result says of this implementation; also asked before `load`."""

    def left(self) -> Left:
        """Return what the last pass left to judge it by."""
        return Left(self.number, self.outputs())

    def check(self, checker: Any) -> Check:
        """Check all outputs of the last pass."""
        return checker.check_pass(self.left(), self.held_to_reference)

    # ------------------------------------------------------------------------------- a layer over ranks

    def meet(self) -> None:  # noqa: B027  # one device meets nobody
        """Wait for all ranks, right before the clock of a forward starts. Never timed."""

    def slowest(self, samples: list[float]) -> list[float]:
        """Return the milliseconds of a pass's timed forwards on the slowest of all ranks.

        `samples` are those that this process measured. Called once after every pass, never timed.
        """
        return samples

    def spread(self) -> Spread | None:
        """Return how the work was spread over ranks, after all passes; None for one device."""
        return None


class Foreign(Implementation):
    """An object from anywhere with the seven methods, driven and judged like one of ours.

    It has to return the outputs of every forward of a pass. Raises `UsageError` for a method that takes other
    arguments, and for facts that are none.
    """

    def __init__(self, setting: Setting, made: Any, name: str) -> None:
        super().__init__(setting)
        self.name, self._made = name, made
        self._ran: set[int] = set()  # forwards of the present pass
        self._shape: tuple[int, int] = (0, 0)  # of a forward's outputs

    def _call(self, method: str, *given: Any) -> Any:
        return called(self.name, getattr(self._made, method), *given)

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self._shape = (scenario.tokens, self.setting.config.hidden_size)
        self._call("load", scenario, inputs)

    def restore(self, number: int = 0) -> None:
        self.number, self._ran = number, set()
        self._call("restore", number)

    def before(self, index: int) -> None:
        self._call("before", index)

    def step(self, index: int) -> None:
        self._made.step(index)

    def after(self, index: int) -> None:
        self._call("after", index)
        self._ran.add(index)

    def outputs(self) -> Outputs:
        return self._call("outputs")

    def facts(self) -> Facts:
        facts = self._call("facts")
        if not isinstance(facts, Facts):
            given, due = type(facts).__name__, f"{Facts.__module__}.Facts"
            raise UsageError(f"--implementations: facts() of '{self.name}' returns '{given}', not `{due}`.")
        return facts

    def check(self, checker: Any) -> Check:
        """Check all outputs of the last pass, none of which may be missing."""
        outputs = self.outputs()
        if not isinstance(outputs, dict) or outputs.keys() != self._ran:
            wrong = f"is not a dict of the {len(self._ran)} forwards of the pass"
        else:
            odd = (at for at, x in outputs.items() if not torch.is_tensor(x) or x.shape != self._shape)
            wrong = next((f"has no tensor {list(self._shape)} for forward {index}" for index in odd), "")
        if wrong:
            return Check(status="wrong", reason=f"outputs() of '{self.name}' {wrong}")
        return super().check(checker)


def called(name: str, function: Callable[..., Any], *given: Any) -> Any:
    """Call what a user has written, of class `name`. Raises `UsageError` if it takes no such arguments."""
    try:
        return function(*given)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:  # raised inside it
            raise
        raise UsageError(f"--implementations: '{name}' cannot be called as here: {error}.") from error


def worst(checks: Sequence[Check]) -> int:
    """Return the place of the worst of several verdicts: a wrong one, and the one with the largest error."""
    badness = [
        (check.status != "ok", inf if check.error_ratio is None else check.error_ratio) for check in checks
    ]
    return badness.index(max(badness))


# ------------------------------------------------------------------------------------------------ outputs


def buffers(wanted: int, size: int) -> int:
    """Return the number of output buffers of `size` bytes for `wanted` forwards; at least three."""
    return min(wanted, max(3, SHELF_BYTES // max(1, size)))


class Shelf(Generic[T]):
    """Hands out a poisoned buffer per forward, and keeps filled ones, all or a uniform random choice.

    Which are kept follows from the seed of the pass alone: ranks keep the same forwards.
    """

    def __init__(self, items: Sequence[T], wanted: int, poison: Callable[[T], None]) -> None:
        self._items, self._poison = list(items), poison
        self._room = len(items) if len(items) >= wanted else len(items) - 1
        self.kept: dict[int, T] = {}  # index of the forward -> its buffer
        self.clear()

    def clear(self, seed: int = 0) -> None:
        """Poison all buffers, for a new pass."""
        self._random = random.Random(seed)
        for item in self._items:
            self._poison(item)
        self._free = list(reversed(self._items))
        self._done = 0
        self.kept = {}

    def next(self) -> T:
        """Return the buffer that the next forward writes."""
        return self._free[-1]

    def keep(self, index: int) -> None:
        """Keep the buffer that forward `index` wrote, or one of those kept so far instead."""
        self._done += 1
        self.kept[index] = self._free.pop()
        if len(self.kept) > self._room:
            place = min(self._random.randrange(self._done), self._room)  # the last one is this forward's
            given_up = self.kept.pop(list(self.kept)[place])
            self._poison(given_up)
            self._free.append(given_up)


def poison(buffer: torch.Tensor) -> None:
    """Fill an output buffer with NaN."""
    buffer.fill_(torch.nan)


# ------------------------------------------------------------------------------------ of the whole layer


class LayerChecker(Checker):
    """Judges the layer's outputs for any turn of `inputs`, by the float64 oracle of its weights.

    Only positions that are `held` are attended.
    """

    def __init__(
        self,
        config: MLAConfig,
        state: State,
        inputs: Inputs,
        dtype: torch.dtype,
        reference_outputs: Callable[[], torch.Tensor],
        held: Held | None = None,
    ) -> None:
        """Run the oracle, which may take minutes; `reference_outputs` as in `Checker`."""
        self._layer, self.inputs, self._held = (config, state), inputs, held
        self._turned = expected_outputs(config, state, inputs, held)
        super().__init__(self._turned.plain, dtype, reference_outputs)

    def of(self, inputs: Inputs, count: int) -> LayerChecker:
        """Return a checker of the first forwards of a plain pass of other inputs, within the same bounds."""
        checker, plain = copy(self), expected_plain(*self._layer, inputs, count, self._held)
        checker.inputs, checker._turned = inputs, replace(self._turned, plain=plain)
        return checker

    def on_lengths(self, query_lens: Sequence[int], kv_lens: Sequence[int], outputs: torch.Tensor) -> Check:
        """Judge the outputs [t, d] of the first rows of a plain pass, run as a batch of other lengths.

        The history of each request is cut to what its length leaves.
        """
        past = [length - new for length, new in zip(kv_lens, query_lens, strict=True)]
        history = [(kv[:n], pe[:n]) for n, (kv, pe) in zip(past, self.inputs.history, strict=True)]
        expected = oracle(*self._layer, self.inputs.hidden[0, : len(outputs)], query_lens, history)
        judge = Checker(expected[None], self.dtype, lambda: expected)
        return judge.check(outputs[None], held_to_reference=False)

    def forwards(self, left: Left) -> Iterator[tuple[int, Forward]]:
        """Yield the forwards of a pass by index, each with what it should be."""
        scenario = self.inputs.scenario
        for index, rows in sorted(left.outputs.items()):
            step, where = scenario.step(index), scenario.forward_name(index)
            expected = self._turned.rows(step, self.inputs.turn(left.number, index))
            yield index, Forward(step, rows, expected, where, partial(left.places or self._places, step))

    def _places(self, step: int) -> Places:
        """Return what the rows of a forward are."""
        return Places.new_tokens(self.inputs.scenario.query_lens, self.inputs.scenario.kv_lens(step))

    def check_pass(self, left: Left, held: bool) -> Check:
        """Judge the outputs of a pass; `held`: an op of a backend is held to the reference."""
        return self.check_forwards((forward for _, forward in self.forwards(left)), held)


class LayerImplementation(Implementation):
    """Takes turns with the scenario's inputs; a subclass runs `x` and writes `out`.

    What is left to it: `load`, which calls `prepare_buffers`; `step`; and `facts`.
    """

    buffers: int | None = None  # of outputs; None: as many as fit
    scenario: Scenario  # once it is loaded
    x: torch.Tensor  # [T, d]: the inputs of the forward that `before` prepared
    out: torch.Tensor  # [.., T, d]: the buffer for its output
    _hidden: TurnedHidden

    def prepare_buffers(self, scenario: Scenario, inputs: Inputs, *before: int) -> None:
        """Make buffers for inputs, and for outputs [.., T, d] with the dimensions `before`."""
        self._inputs = inputs
        if self.loaded(scenario):
            self._hidden.change(inputs)
            return
        self.scenario, device = scenario, self.setting.device
        self._hidden = TurnedHidden(scenario, inputs, device)
        shape = (*before, *inputs.hidden.shape[1:])
        size = torch.Size(shape).numel() * inputs.hidden.element_size()
        count = self.buffers or buffers(scenario.steps, size)
        made = torch.empty((count, *shape), dtype=inputs.hidden.dtype, device=device)
        self._shelf = Shelf(list(made.unbind()), scenario.steps, poison)
        self._held: Outputs = {}  # as they were when their clock had stopped

    def loaded(self, scenario: Scenario) -> bool:
        """Whether this scenario was loaded before: its buffers are there."""
        return getattr(self, "scenario", None) == scenario

    @property
    def hidden(self) -> torch.Tensor:
        """Inputs [inputs, T, d] on the device, always at the same address. `before` writes its forward's."""
        return self._hidden.rows

    def restore(self, number: int = 0) -> None:
        """Begin pass `number` with poisoned buffers, and take the turn of its first forward."""
        self.number, self._held = number, {}
        self._shelf.clear(number)
        self.take(self._inputs.turn(number, 0))

    def take(self, turn: Turn) -> None:
        """Take the inputs of a turn. A subclass that keeps history gives it the turn's signs, too."""
        self._hidden.take(turn)

    def before(self, index: int) -> None:
        self.ready(index)
        self._hidden.show(self.scenario.step(index))  # as late as can be: nothing can work on inputs earlier

    def ready(self, index: int) -> None:
        """Do all of `before` but writing the inputs."""
        if self._prefills:
            self.take(self._inputs.turn(self.number, index))
        self.x, self.out = self.hidden[self.scenario.step(index)], self._shelf.next()

    @property
    def _prefills(self) -> bool:
        return self.scenario.mode == "prefill"

    def after(self, index: int) -> None:
        if self.setting.device.type == "cpu":  # where reading waits for nobody: what is there now counts
            self._held[index] = _on_host(self.out)
        self._shelf.keep(index)
        self._held = {kept: self._held[kept] for kept in self._shelf.kept if kept in self._held}

    def outputs(self) -> Outputs:
        for index, buffer in self._shelf.kept.items():
            if index not in self._held:
                self._held[index] = _on_host(buffer)
        return dict(self._held)


def _on_host(buffer: torch.Tensor) -> torch.Tensor:
    return torch.empty(buffer.shape, dtype=buffer.dtype).copy_(buffer)
