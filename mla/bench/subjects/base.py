"""The interface of everything that is timed: implementations of one layer.

All get the same host weights and inputs. A *pass* is `restore(number)`, then `before(i)`, `step(i)` and
`after(i)` for every forward, then `collect()`; only `step` is timed. Every forward has inputs and an output
buffer of its own: the number of the pass selects exact changes of the scenario's inputs whose outputs are
known (a sign per request, say), the same for all implementations, and output buffers hold NaN before. So no
result of another forward passes for this one's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mla.bench.results.schema import Spread
from mla.bench.subjects.inputs import Inputs
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.verify.verdict import Check


class Implementation(ABC):
    """One way to run the layer."""

    name: str
    held_to_reference = False  # at most twice its error, as well as the absolute bounds
    plan_ms: float | None = None
    rehearses = False  # `rehearse` does something
    computes = True  # the work that is counted: its time cannot be shorter than the device's limits allow

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        """Create a cache with the scenario's history, and buffers for its outputs."""

    @abstractmethod
    def restore(self, number: int = 0) -> None:
        """Restore the cache to the history, and select the inputs of pass `number`. Never timed."""

    def before(self, index: int) -> None:
        """Give `step(index)` inputs and an output buffer of its own. Never timed."""
        self.ready(index)
        self.show(index)

    def ready(self, index: int) -> None:  # noqa: B027  # most implementations need nothing here
        """Do all of `before` but writing the inputs."""

    def show(self, index: int) -> None:  # noqa: B027  # most implementations need nothing here
        """Write the inputs, as late as can be: nothing can work on them earlier."""

    @abstractmethod
    def step(self, index: int) -> None:
        """Run one forward; in decode, the cache grows."""

    def after(self, index: int) -> None:  # noqa: B027  # most implementations write in place
        """Keep the output of `step(index)`. Never timed."""

    def idle(self) -> AbstractContextManager[None]:
        """Return a context for a pass whose forwards are prepared, but not run."""
        return nullcontext()

    def slowest(self, samples: list[float]) -> list[float]:
        """Return the milliseconds of a pass's timed forwards on the slowest of all ranks.

        `samples` are those that this process measured. Called once after every pass, never timed.
        """
        return samples

    def rehearse(self, index: int) -> None:  # noqa: B027  # only a simulation needs it
        """Run what has to be there before `show(index)`, for a while that counts nowhere."""

    def reported(self, passes: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
        """Return the milliseconds to report for those of the result's passes, as this process timed them."""
        return passes

    def recorded(self) -> None:  # noqa: B027  # there is nothing to keep of one device
        """Keep what `slowest` was last told of other ranks: the pass is one of the result's."""

    def spread(self) -> Spread | None:
        """Return how the work was spread over ranks, after all passes; None for one device."""
        return None

    @abstractmethod
    def collect(self) -> None:
        """Copy the pass's outputs to the host, before anything else calls the backend. Never timed."""

    @abstractmethod
    def check(self, checker: Any) -> Check:
        """Check all outputs of the last pass that were collected, and whatever else a subclass covers."""

    def doubt(self, checker: Any, check: Check) -> str:
        """Return why outputs that are right cannot have been computed, or nothing."""
        return ""

    def lengths_bench(self) -> Any:
        """Return what runs forwards on new lengths (`mla.bench.doubts.new_lengths.Bench`); None: nothing."""
        return None

    @abstractmethod
    def compared(self) -> dict[int, torch.Tensor]:
        """Return the collected outputs, by forward, to compare with those of other implementations."""

    @abstractmethod
    def cache_bytes(self) -> int:
        """Return the bytes the cache holds for the scenario."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Return the bytes of the weights."""

    def scratch_bytes(self) -> int:
        """Return the bytes of scratch memory that persist between forwards."""
        return 0

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:  # noqa: B027  # others have none
        """Put `replace(role, op)` in place of every op of ours; called before `load`.

        Of several layers, "layer 3: " stands before the role.
        """

    def ops(self) -> dict[str, str]:
        """Return role -> implementation name."""
        return {}

    def remarks(self) -> dict[str, list[str]]:
        """Return implementation name -> what that op says of how it runs here, so far."""
        return {}


class TakesInputs(Implementation):
    """A layer whose forwards can be given inputs that nothing has seen."""

    scenario: Scenario

    @abstractmethod
    def fed(self, seed: int, count: int) -> AbstractContextManager[list[torch.Tensor]]:
        """Return a context in which forward i of a plain pass (number 0) has input i of those it yields.

        These are `count` hidden states [T, d] on the host, drawn from `seed` as the scenario's are.
        """

    @abstractmethod
    def keep_collected(self, indices: Collection[int]) -> None:
        """Leave only some of the collected forwards to be checked."""
