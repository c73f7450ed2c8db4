"""The memory of a case, before anything is allocated: weights, caches, outputs, and room for a forward.

What a forward takes is measured while it runs. Where memory runs out after all, that costs its case alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from mla import cost
from mla.bench.measure.passes import sweep
from mla.bench.subjects import op as one_op
from mla.bench.subjects.base import buffers
from mla.bench.subjects.fixture import Fixture, OpFixture
from mla.bench.subjects.inputs import Requests, choices, is_signed, oracle_runs
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.grid import Point
from mla.cases.varied import Pool
from mla.layer.plan import WORKSPACE_BYTES, rebuilt_bytes
from mla.layer.rope import RotaryTable
from mla.parallel.layer import scratch_per_token
from mla.parallel.layout import Layout
from mla.text import size
from mla.verify.layer_oracle import LOGITS_BYTES, Run, oracle_bytes
from mla_backends import host
from mla_backends.api import Backend

# Logits, gathered keys, masks, and what is rebuilt of a context, at most.
WORKSPACE = 1 << 30


class Available(NamedTuple):
    """Free memory in bytes; None where it is unknown."""

    device: int | None
    host: int | None


def available_memory(backend: Backend) -> Available:
    """Return the memory that is free now."""
    return Available(backend.memory().free, host.memory_available())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a scenario needs, and whether its implementations fit side by side."""

    per_implementation: int  # on the device
    host: int  # weights, inputs, and the oracle in float64, once for all implementations
    outputs: int  # of a pass of one implementation, on the host
    implementations: int
    available: Available
    shared: bool  # device memory is host memory
    per_reference: int = 0  # of the copy that judges fused ops on the device; 0: there is none
    sweep: int = 0  # the buffer that is read and written before a cold forward
    gathered: int = 1  # copies of the outputs that are being checked
    others: int = 0  # further ranks on this host
    per_other: int = 0  # what each holds there, apart from what is on its device

    @property
    def side_by_side(self) -> bool:
        """Whether all implementations fit at once, so that they can alternate."""
        return self._fits(self.implementations)

    @property
    def fits(self) -> bool:
        """Whether at least one implementation fits."""
        return self._fits(1)

    def _fits(self, count: int) -> bool:
        needs = self.device_bytes(count), self.host_bytes(count)
        if self.shared:
            needs = 0, sum(needs)
        return all(free is None or need <= free for need, free in zip(needs, self.available, strict=True))

    def device_bytes(self, count: int) -> int:
        """Return the most that `count` implementations need on the device: they may share weights."""
        return count * self.per_implementation + self.per_reference + self.sweep

    def host_bytes(self, count: int) -> int:
        """Return what the host needs while `count` implementations are measured, for all ranks that it has.

        The outputs of the checked pass stay until all implementations are compared; those of the last pass
        are there as well.
        """
        outputs = (self.implementations + count * self.gathered) * self.outputs
        other = self.per_other + (count * self.per_implementation if self.shared else 0)
        return self.host + outputs + self.others * other

    def shortage(self) -> str:
        """Return what one implementation needs and what there is, as a clause."""
        device, on_host = self.device_bytes(1), self.host_bytes(1)
        need = f"{gib(device)} on the device and {gib(on_host)} on the host"
        if self.shared:
            need = f"{gib(device + on_host)}, which are {need}"
            return f"about {need}; available are {gib(self.available.host)}"
        return f"about {need}; available are {gib(self.available.device)} and {gib(self.available.host)}"


def gib(count: int | None) -> str:
    """Return bytes in GiB, or "an unknown amount"."""
    exact = None if count is None else Decimal(count)  # mistyped lengths overflow a float
    return size(exact, "an unknown amount", "GiB", ".2f" if (count or 0) < 10**6 << 30 else ".1e")


def plan_memory(
    fixture: Fixture, names: Sequence[str], fused: bool, lazy: bool, available: Available, cold: bool
) -> MemoryPlan:
    """Return a scenario's needs next to the memory that is available.

    On the device these are those of the rank that holds most, or of all that are simulated there.
    `fused`: an op is not the reference. `lazy`: weights are those of a checkpoint. `cold`: forwards are also
    timed after the caches were flushed.
    """
    setting, point, ranks = fixture.setting, fixture.point, fixture.setting.ranks
    of_all: dict[str, Any] = {
        "implementations": len(names),
        "available": available,
        "shared": setting.device.type == "cpu",
        "sweep": sweep(setting.backend)[0] if cold else 0,
    }
    if isinstance(fixture, OpFixture):
        pool, on_device = fixture.pool, op_bytes(fixture.pool)
        return MemoryPlan(on_device, _op_host_bytes(pool, on_device), one_op.output_bytes(pool), **of_all)
    each, layout = _by_part(setting, point), Layout() if ranks is None else ranks.layout
    timed = [] if ranks is None else [layout.place(rank).dp for rank in ranks.timed(point)]
    again = max(0, len(timed) - 1)  # ranks that are simulated beside the first, and attend one by one
    room, width = WORKSPACE + _longest_bytes(setting, point, layout.dcp), 8 * setting.config.hidden_size
    expected = width * sum(run.rows for run in oracle_runs(setting.config, point))
    alone = replace(setting, ranks=None, layers=1), msgspec.structs.replace(point, layers=1)
    reference = max(each if timed else _by_part(*alone)) if fused else 0
    gathered = layout.dcp if timed else 2 * layout.head_parts  # twice while they come
    return MemoryPlan(
        per_implementation=sum(each[part] for part in timed) - again * room if timed else max(each),
        host=_host_bytes(setting, point) + again * expected,
        outputs=_output_bytes(setting, point, point),
        per_reference=reference,
        gathered=1 if ranks is None else gathered,
        others=0 if ranks is None else ranks.beside,
        per_other=_other_bytes(setting, point, lazy),
        **of_all,
    )


# ---------------------------------------------------------------------------------------------- layer


def _by_part(setting: Setting, point: Point) -> list[int]:
    """Return what a rank of each part of `dp` holds on its device."""
    layout = Layout() if setting.ranks is None else setting.ranks.layout
    heads = setting.config.num_attention_heads // layout.head_parts
    rank = replace(setting, config=setting.config.with_heads(heads), ranks=None)
    parts = [Requests.of(point, part, layout.dp).scenario(point) for part in range(layout.dp)]
    return [
        _held_bytes(rank, part, layout.dcp)
        + _forward_bytes(rank, part, layout.dcp)
        + _output_bytes(rank, part, point)
        for part in parts
    ]


def _held_bytes(setting: Setting, point: Point, share: int) -> int:
    """Return the weights and the cache of a rank, one of `share` that a request's tokens are spread over.

    kv_b is packed for both its uses.
    """
    config, page, count = setting.config, setting.page_size, point.layers
    lengths = [math.ceil(length / share) for length in point.final_lens]  # on the rank that has most
    pages = sum(math.ceil(length / page) for length in lengths) + SPARE_PAGES
    weights = sum(cost.parameters(config.of_layer(layer)) for layer in range(count))
    weights += count * cost.parameters(config, cost.KV_B)
    token_bytes = count * setting.token_bytes + len(config.index_layers(count)) * setting.index_bytes
    rotary = count * RotaryTable.bytes_for(config, max(point.final_lens))
    return weights * setting.dtype.itemsize + pages * page * token_bytes + rotary


def _forward_bytes(setting: Setting, point: Point, share: int) -> int:
    """Return the inputs of a pass, and the most that a forward takes; `share` as in `_held_bytes`."""
    config, itemsize = setting.config, setting.dtype.itemsize
    numbers = point.layers * point.tokens * 4 * config.num_attention_heads * config.latent_dim
    numbers += _input_numbers(setting, point)
    if heads := config.index_n_heads:  # queries and keys of new tokens, and in four bytes the rest
        wide = config.hidden_size + heads + config.index_topk
        numbers += point.tokens * ((heads + 1) * config.index_head_dim + 2 * wide)
    room = WORKSPACE + _longest_bytes(setting, point, share)
    if share > 1:  # queries and results of all that share a context
        room += min(point.tokens * scratch_per_token(config, share, itemsize), WORKSPACE_BYTES)
    if setting.attention == cost.EXPANDED or (setting.attention == "auto" and max(point.query_lens) > 1):
        rebuilt = rebuilt_bytes(config, itemsize, sum(point.final_lens))
        room += (point.layers - 1) * min(rebuilt, WORKSPACE_BYTES)  # that of one layer is in `WORKSPACE`
    return numbers * itemsize + room


def _longest_bytes(setting: Setting, point: Point, share: int) -> int:
    """Return what one request's keys take, gathered and widened."""
    keys = math.ceil(max(point.final_lens) / share)
    return 4 * keys * setting.config.latent_dim * setting.dtype.itemsize


def _output_bytes(setting: Setting, point: Point, of: Point) -> int:
    """Return the outputs of a pass, in as many buffers as there are for those of all requests, `of`."""
    each = point.layers * setting.config.hidden_size * setting.dtype.itemsize
    return buffers(of.steps, of.tokens * each) * point.tokens * each


def _input_numbers(setting: Setting, point: Point) -> int:
    """Return the hidden states' numbers: those of the present turn, the plain ones and all others."""
    count = choices(point, is_signed(setting.config, point)) - 1
    rows = point.inputs * point.tokens
    rows_of_others = len(point.query_lens) if point.mode == "prefill" else rows
    return (2 * rows + count * rows_of_others) * setting.config.hidden_size


def _host_bytes(setting: Setting, point: Point) -> int:
    """Return what the host holds for all implementations together; outputs of a pass are not among it.

    These are weights, inputs, the oracle in float64, rows of the evidence and those of a judged forward.
    """
    config, itemsize = setting.config, setting.dtype.itemsize
    copies = 1 if point.layers == 1 else 2  # of the layer that is being rolled
    weights = cost.parameters(config) * (copies * itemsize + 8)
    numbers = config.latent_dim + config.index_head_dim * (config.index_n_heads > 0)
    history = 2 * sum(point.history) * numbers * itemsize
    rows = point.tokens * config.hidden_size * (point.inputs * (itemsize + 8) + itemsize + 4 * 8)
    if setting.is_judged_after:  # from all new tokens of its pass
        runs = [Run(1, point.inputs * max(point.query_lens), 0)]
        rows += 4 * 8 * max(point.final_lens) * config.index_head_dim  # of scores and keys of a request
    else:
        runs = oracle_runs(config, point)
    return weights + history + rows + oracle_bytes(config, runs, itemsize)


def _other_bytes(setting: Setting, point: Point, lazy: bool) -> int:
    """Return what a rank without an oracle holds on its host, apart from what is on its device.

    `lazy`: it reads its own weights from a checkpoint; random ones are drawn whole, from the seed.
    """
    weights = 0 if lazy else cost.parameters(setting.config)
    history = sum(point.history) * setting.config.latent_dim
    numbers = weights + history + _input_numbers(setting, point)
    return numbers * setting.dtype.itemsize + 2 * _output_bytes(setting, point, point)


# --------------------------------------------------------------------------------------------- one op


def op_bytes(pool: Pool) -> int:
    """Return what one implementation of an op holds on the device.

    These are operands, twice for packing or wider rows, the pool that they are taken from, the buffers of a
    pass's results and a workspace.
    """
    case, cache = pool.case, 0
    if case.entry.cached:
        pages = sum(-(-length // case.layout.page_size) for length in case.kv_lens) + case.layout.spare
        plain = case.shape(case.entry.cached)[0] * case.spec.dtype.itemsize
        cache = pages * case.layout.page_size * (getattr(case.spec, "token_bytes", 0) or plain)
    return 2 * case.work.bytes + cache + _pool_bytes(pool) + one_op.output_bytes(pool) + WORKSPACE


def _op_host_bytes(pool: Pool, on_device: int) -> int:
    """Return what the host holds for all implementations together; results of a pass are not among it.

    These are operands and results, those again in float64, the reference's, and what one call must write.
    """
    operands = pool.case.work.bytes + _pool_bytes(pool)
    wide = operands * 8 // pool.case.spec.dtype.itemsize
    case, (held, taken) = pool.case, pool.size
    true = sum(math.prod(case.shape(words)) for words in case.entry.truths.values())
    judged = 8 * max(4 * one_op.numbers(pool), 2 * true * held // taken)  # of a selection, all scores
    return operands + wide + on_device + judged + 3 * LOGITS_BYTES


def _pool_bytes(pool: Pool) -> int:
    """Return what the pool takes, and the rows that a call takes from it before they are in place."""
    return sum(pool.size) * pool.width * pool.case.spec.dtype.itemsize
