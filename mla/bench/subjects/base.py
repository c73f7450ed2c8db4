"""What the runner times: implementations of one layer behind one small interface.

All get the same host weights and inputs. A *pass* is `restore()` and then `step(0)`, `step(1)`, ...; only
`step` is timed, and it leaves its output in `outputs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from mla.bench.subjects.inputs import Inputs
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.verify.layer_check import Checker
from mla.verify.verdict import Check


class Implementation(ABC):
    """One way to run the layer."""

    name: str
    held_to_reference = False  # to twice its error, beside the absolute table
    plan_ms: float | None = None

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.outputs: torch.Tensor  # [inputs, T, d] on the device

    @abstractmethod
    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        """Make a cache with the scenario's history, and buffers for its outputs."""

    @abstractmethod
    def restore(self) -> None:
        """Put the cache back to the history. Never timed."""

    def before(self, index: int) -> None:  # noqa: B027  # most implementations need nothing here
        """Get ready for `step(index)`. Never timed."""

    @abstractmethod
    def step(self, index: int) -> None:
        """Run one forward; in decode, the cache grows."""

    def after(self, index: int) -> None:  # noqa: B027  # most implementations write where they should
        """Move the output of `step(index)` to `outputs`. Never timed."""

    def check(self, checker: Any) -> Check:
        """Judge what the last pass left: its outputs, and whatever else a subclass knows of."""
        judge: Checker = checker
        return judge.check(self.outputs, self.held_to_reference)

    def compared(self) -> torch.Tensor:
        """Return the outputs that are compared with those of other implementations."""
        return self.outputs

    @abstractmethod
    def cache_bytes(self) -> int:
        """Return the bytes the cache holds for the scenario."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Return the bytes of the weights."""

    def scratch_bytes(self) -> int:
        """Return the bytes of scratch memory kept between forwards."""
        return 0

    def ops(self) -> dict[str, str]:
        """Return role -> implementation name."""
        return {}

    def _prepare_buffers(self, inputs: Inputs) -> None:
        self._hidden = inputs.hidden.to(self.setting.device)
        self.outputs = torch.full_like(self._hidden, torch.nan)
