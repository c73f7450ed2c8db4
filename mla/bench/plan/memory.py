"""Work out the memory of a scenario before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal

import torch

from mla import cost
from mla.bench.subjects.base import SPARE_PAGES, Setting
from mla.bench.subjects.op import memory as op_memory
from mla.bench.workload.grid import Point
from mla.bench.workload.op_scenario import OpScenario
from mla.bench.workload.scenario import Scenario
from mla.errors import OutOfMemory
from mla.layer.plan import WORKSPACE_BYTES
from mla_backends import host

#: The reference's logits, rebuilt keys and values, and their fp32 copies, at most.
WORKSPACE = op_memory.WORKSPACE


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a scenario needs, and whether its implementations fit side by side."""

    per_implementation: int  # on the device
    host: int  # weights, inputs, and the oracle in float64
    implementations: int
    extra: int
    device_available: int | None
    host_available: int | None
    shared: bool  # the device is the host

    @property
    def side_by_side(self) -> bool:
        """Say whether all implementations fit at once, so that they can alternate."""
        return self._fits(self.implementations)

    def _fits(self, count: int) -> bool:
        device, on_host = self.device_bytes(count), self.host
        if self.shared:
            return _within(device + on_host, self.host_available)
        return _within(device, self.device_available) and _within(on_host, self.host_available)

    def device_bytes(self, count: int) -> int:
        """Return what `count` implementations need on the device."""
        return (count + self.extra) * self.per_implementation

    @property
    def fits(self) -> bool:
        """Say whether at least one implementation fits."""
        return self._fits(1)

    def require(self) -> None:
        """Raise `OutOfMemory` when not even one implementation fits."""
        if not self.fits:
            raise OutOfMemory(
                f"this run needs {self.shortage()}: use fewer requests, shorter histories or a smaller "
                "config."
            )

    def shortage(self) -> str:
        """Return what one implementation needs and what there is, as a clause."""
        device = self.device_bytes(1)
        need = f"{gib(device)} on the device and {gib(self.host)} on the host"
        available = f"{gib(self.device_available)} and {gib(self.host_available)}"
        if self.shared:
            need, available = f"{gib(device + self.host)}, which are {need}", gib(self.host_available)
        return f"about {need}; available are {available}"


def _within(need: int, available: int | None) -> bool:
    return available is None or need <= available


def gib(count: int | None) -> str:
    """Return bytes in GiB, or "an unknown amount"."""
    if count is None:
        return "an unknown amount"
    size = Decimal(count) / 2**30  # mistyped lengths overflow a float
    return f"{size:.2f} GiB" if size < 10**6 else f"{size:.1e} GiB"


def plan_memory(setting: Setting, scenario: Point, implementations: int, extra: int = 0) -> MemoryPlan:
    """Estimate a scenario's needs from lengths alone; `extra` layers live for a while beside."""
    own = scenario_setting(setting, scenario)
    return MemoryPlan(
        per_implementation=_device_bytes(own, scenario),
        host=_host_bytes(own, scenario),
        implementations=implementations,
        extra=extra,
        device_available=setting.backend.memory().free,
        host_available=host.memory_available(),
        shared=setting.device.type == "cpu",
    )


def scenario_setting(setting: Setting, scenario: Point) -> Setting:
    """Return the setting a scenario runs in: with its own heads, dtype and page size where it names them."""
    return replace(
        setting,
        config=setting.config.with_heads(scenario.heads) if scenario.heads else setting.config,
        dtype=getattr(torch, scenario.dtype) if scenario.dtype else setting.dtype,
        page_size=scenario.page_size or setting.page_size,
        layers=scenario.layers,
    )


def _device_bytes(setting: Setting, scenario: Point) -> int:
    if isinstance(scenario, OpScenario):
        return op_memory.device_bytes(setting, scenario)
    config, size = setting.config, setting.page_size
    slots = (sum(-(-length // size) for length in scenario.final_lens) + SPARE_PAGES) * size
    activations = scenario.tokens * 4 * config.num_attention_heads * config.latent_dim
    hidden = 2 * scenario.inputs * scenario.tokens * config.hidden_size
    weights = cost.parameters(config) + cost.kv_b_parameters(config)  # kv_b is packed for both its uses
    longest = 4 * max(scenario.final_lens) * config.latent_dim  # one request's keys, gathered and widened
    per_layer = weights + slots * config.latent_dim + activations + hidden
    scratch = WORKSPACE + (scenario.layers - 1) * _kept_bytes(setting, scenario)
    return (longest + scenario.layers * per_layer) * setting.dtype.itemsize + scratch


def _kept_bytes(setting: Setting, scenario: Scenario) -> int:
    """Return the rebuilt keys and values that each layer keeps memory for; absorbed attention has none."""
    if setting.attention == "absorbed" or (max(scenario.query_lens) == 1 and setting.attention == "auto"):
        return 0
    config = setting.config
    row = config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    size = sum(scenario.final_lens) * row * config.num_attention_heads * setting.dtype.itemsize
    return min(size, WORKSPACE_BYTES)


def _host_bytes(setting: Setting, scenario: Point) -> int:
    if isinstance(scenario, OpScenario):
        return op_memory.host_bytes(setting, scenario)
    config = setting.config
    copies = 1 if scenario.layers == 1 else 2  # of the layer that is being rolled
    weights = cost.parameters(config) * (copies * setting.dtype.itemsize + 8)
    rows = scenario.inputs * scenario.tokens
    oracle = 8 * rows * (3 * config.hidden_size + 4 * config.num_attention_heads * config.qk_head_dim)
    logits = (
        3
        * 8
        * max(
            new * scenario.inputs * final
            for new, final in zip(scenario.query_lens, scenario.final_lens, strict=True)
        )
    )
    history = sum(scenario.history) * config.latent_dim * (8 + setting.dtype.itemsize)
    return weights + oracle + logits + history
