"""The bandwidth baseline: a multi-threaded read of as many bytes as a forward must move."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.peers.choice import fastest
from mla import cost
from mla.bench.subjects.base import Facts, Implementation, Outputs
from mla.bench.subjects.inputs import Inputs
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.verify.layer_check import Checker
from mla.verify.layer_oracle import State
from mla.verify.verdict import Check

# Ways to read memory with torch whose only result is a number.
READERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda data: data.sum(),
    "max": lambda data: data.amax(),
}


class MemoryRead(Implementation):
    """Only reads memory: its latency is the cost of moving the bytes, its tok/s the bandwidth's limit."""

    name = "read"
    computes = False

    def __init__(self, setting: Setting, state: State) -> None:
        super().__init__(setting)

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        lens = [scenario.kv_lens(step) for step in range(scenario.inputs)]
        size = self.setting.dtype.itemsize
        moved = [cost.step_work(self.setting.config, scenario.query_lens, kv, size).bytes for kv in lens]
        self._bytes = round(sum(moved) / len(moved))
        self._data = torch.rand(self._bytes // 4)
        self._reader = fastest({name: partial(reader, self._data) for name, reader in READERS.items()})
        self._read = READERS[self._reader]

    def restore(self, number: int = 0) -> None:
        """Keep the data: there is no cache."""

    def before(self, index: int) -> None:
        """Do nothing: there are no inputs."""

    def after(self, index: int) -> None:
        """Do nothing: there are no outputs."""

    def outputs(self) -> Outputs:
        return {}

    def step(self, index: int) -> None:
        self._read(self._data)

    def check(self, checker: Checker) -> Check:
        """Always pass, so that it is timed; `PeerRun` marks the case as unchecked."""
        return Check(status="ok")

    def facts(self) -> Facts:
        if not hasattr(self, "_data"):
            return Facts()
        ops = {"read": f"torch {self._reader} of {self._bytes / 2**20:.1f} MiB"}
        return Facts(weight_bytes=self._data.nbytes, ops=ops)
