"""Wrappers that take turns: each holds one plan, and its pinned memory may still be on its way.

Planning writes tables into pinned memory that the device reads later, so a wrapper is planned again only when
its last plan has arrived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mla_backends.errors import describe, one_line
from mla_backends.kernels.flashinfer.release import Release
from mla_backends.kernels.vendor import KernelRefused

if TYPE_CHECKING:
    import torch

    from mla_backends.kernels.flashinfer.op import FlashInferState

WORKSPACE_BYTES = 128 << 20  # what the library's documentation recommends for split contexts
TURNS = 4  # how many batches may be planned ahead of the device


class Turn:
    """A wrapper, and what it is planned for."""

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        import torch

        self.wrapper = wrapper
        self.planned_for: tuple[FlashInferState, bool] | None = None
        event = getattr(getattr(torch, device.type, None), "Event", None)
        self._arrived = event() if event is not None and device.type != "cpu" else None

    def plan(self, state: FlashInferState, lse: bool, arguments: dict[str, Any]) -> None:
        """Plan, once the device has read what the last plan left in pinned memory.

        Raises `KernelRefused` for what the library says it does not support. Whatever else it raises is a
        failure and stays as it is: a run names the op that raised.
        """
        self.planned_for = None
        if self._arrived is not None:
            self._arrived.synchronize()
        try:
            self.wrapper.plan(**arguments)
        except ValueError as error:  # the library's own refusals are of this kind
            raise KernelRefused(f"flashinfer refuses this batch ({one_line(describe(error))}).") from error
        self.planned_for = (state, lse)
        if self._arrived is not None:
            self._arrived.record()


class Wrappers:
    """The wrappers of one device, which share the workspace of split contexts."""

    def __init__(self, release: Release, backend: str, device: torch.device) -> None:
        import torch

        self._release, self._backend, self._device = release, backend, device
        with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.turns: list[Turn] = []

    def planned(self, state: FlashInferState, lse: bool) -> Any:
        """Return a wrapper that is planned for exactly this state: one that still is, else the oldest.

        `lse`: the next run returns the log-sum-exp.
        """
        lse = lse and self._release.declares_lse
        for turn in self.turns:
            if turn.planned_for is not None and turn.planned_for[0] is state and turn.planned_for[1] is lse:
                return turn.wrapper
        turn = self._next()
        self.turns.append(turn)
        turn.plan(state, lse, self._release.plan_arguments(state.plan, lse))
        return turn.wrapper

    def _next(self) -> Turn:
        if len(self.turns) >= TURNS:
            return self.turns.pop(0)
        import torch

        with torch.inference_mode(False):  # it makes memory of its own
            wrapper = self._release.wrapper(self._workspace, backend=self._backend)
        return Turn(wrapper, self._device)
