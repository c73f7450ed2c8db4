"""Capture our layer's forwards into device graphs and replay them.

prefill: one graph of the forward on the prepared batch. decode: one graph for all steps of a pass. Its batch
has fixed addresses and a block table as wide as the pass needs at most; planning is captured along with the
forward. A replayed step is `extend`, `update_` of that batch, and the replay.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from mla.bench.subjects.base import Implementation
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import Scenario
from mla.cache.ragged_batch import RaggedBatch
from mla_backends import BackendError
from mla_backends.api import Backend
from mla_backends.errors import describe


class NoGraph(Exception):
    """Raised with the reason why an implementation cannot be captured, as one clause."""


class CapturedForwards(ABC):
    """Forwards replayed from graphs, driven as an implementation is. `method` is for the result."""

    method: str

    def __init__(self, layer: MlaLayer) -> None:
        self._layer = layer
        self.out = torch.empty_like(layer.out)  # where graphs write

    def restore(self, number: int = 0) -> None:
        """Restore the cache to the history, and select the inputs of pass `number`. Never timed."""
        self._layer.restore(number)

    def before(self, index: int) -> None:
        """Write the inputs of a forward to where its graph reads them, and poison its output. Never timed."""
        self.out.fill_(math.nan)
        self._layer.before(index)

    def bookkeep(self) -> None:  # noqa: B027  # a prefill needs none
        """Do what the host does for every forward."""

    @abstractmethod
    def replay(self) -> None:
        """Run the forward."""

    def step(self, index: int) -> None:
        self.bookkeep()
        self.replay()

    def after(self, index: int) -> None:
        """Copy the output of a forward to a buffer of its own. Never timed."""
        self._layer.out.copy_(self.out)
        self._layer.after(index)


class ReplayAlone:
    """Captured forwards for the device's clock, which times the replay without the host's bookkeeping."""

    def __init__(self, captured: CapturedForwards) -> None:
        self._captured = captured
        self.method = f"{captured.method}; bookkeeping of the host outside the timed region"
        self.restore, self.after, self.out = captured.restore, captured.after, captured.out

    def before(self, index: int) -> None:
        self._captured.bookkeep()
        self._captured.before(index)

    def step(self, index: int) -> None:
        self._captured.replay()


class CapturedPrefill(CapturedForwards):
    """One forward of the prepared batch. Batch and plan are kept alive: the graph reads their memory."""

    method = "replay of one captured forward of the prepared batch"

    def __init__(self, layer: MlaLayer) -> None:
        super().__init__(layer)
        layer.restore()
        layer.before(0)
        self._batch = layer.batch
        self._plan = layer.layer.plan(self._batch)
        work = lambda: layer.forward(self._batch, layer.hidden[0], self.out)  # noqa: E731
        self._replay = capture(layer.setting.backend, work)

    def replay(self) -> None:
        self._replay()

    def restore(self, number: int = 0) -> None:
        super().restore(number)
        if not torch.equal(self._layer.batch.block_table_host, self._batch.block_table_host):
            raise RuntimeError("a restored cache handed out pages other than the captured ones.")


class CapturedDecode(CapturedForwards):
    """Decode steps. Raises `NoGraph` if a replay would not follow the growing lengths."""

    method = "replay of one captured graph, its block table as wide as the pass needs"

    def __init__(self, layer: MlaLayer, scenario: Scenario) -> None:
        super().__init__(layer)
        _check_scaling(layer, scenario)
        self._most_tokens = max(scenario.final_lens)
        self._hidden = torch.empty_like(layer.hidden[0])
        layer.layer.rotary.reserve(self._most_tokens)  # growing would move what the graph reads
        layer.restore()
        for _ in range(scenario.inputs):
            self._batch = self._extend()
            _check_plan(layer, self._batch)
        layer.before(scenario.inputs - 1)
        self._hidden.copy_(layer.x)
        self._replay = capture(layer.setting.backend, self._work)  # of the last step, which is the longest
        layer.restore()

    def _extend(self) -> RaggedBatch:
        return self._layer.extend(self._most_tokens)

    def _work(self) -> None:
        self._batch.update_(self._batch)  # drops the plan, so that planning is captured too
        self._layer.forward(self._batch, self._hidden, self.out)

    def before(self, index: int) -> None:
        super().before(index)
        self._hidden.copy_(self._layer.x)

    def bookkeep(self) -> None:
        self._batch.update_(self._extend())

    def replay(self) -> None:
        self._replay()


def captured(implementation: Implementation, scenario: Scenario) -> CapturedForwards:
    """Return an implementation's forwards as graph replays; it has run a whole pass. Raises `NoGraph`."""
    if not isinstance(implementation, MlaLayer):
        raise NoGraph(f"{implementation.name} is not captured")
    if scenario.mode == "prefill":
        return CapturedPrefill(implementation)
    return CapturedDecode(implementation, scenario)


def capture(backend: Backend, work: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of `work`. Raises `NoGraph`."""
    try:
        replay = backend.graph(work)
    except BackendError as error:
        raise NoGraph(str(error).rstrip(".")) from error
    except Exception as error:  # a stack raises anything when it cannot capture
        raise NoGraph(f"capturing it raised {describe(error)}") from error
    if replay is None:
        raise NoGraph("the backend offers no graphs")
    return replay


def _check_plan(layer: MlaLayer, batch: RaggedBatch) -> None:
    """Raise `NoGraph` for a plan whose host decisions change from step to step."""
    plan = layer.layer.plan(batch)
    if plan.expanded is not None:
        raise NoGraph("requests that take the expanded path keep the lengths of their plan")
    if plan.absorbed is not None and not getattr(plan.absorbed.state, "graph_safe", False):
        name = layer.layer.ops["latent_attention"].name
        raise NoGraph(
            f"op '{name}' (latent_attention) does not promise that a captured call follows growing lengths"
        )


def _check_scaling(layer: MlaLayer, scenario: Scenario) -> None:
    """Raise `NoGraph` if query scaling starts within a pass, which the host decides."""
    scaling = layer.setting.config.query_scaling
    first, last = max(scenario.kv_lens(0)), max(scenario.final_lens)
    if scaling is not None and first <= scaling.period < last:
        raise NoGraph(f"query scaling starts at {scaling.period} tokens, within the pass")
