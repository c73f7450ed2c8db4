"""One op of the contract alone, as an implementation that can be timed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from math import prod
from time import perf_counter_ns as now_ns
from typing import Any

import torch

from mla.bench.subjects import base
from mla.bench.subjects.base import Facts, Implementation, Outputs
from mla.bench.subjects.setting import SPARE_PAGES, Setting, make_ops
from mla.bench.workload.grid import Point
from mla.bench.workload.scenario import Scenario
from mla.cases.case import OpCase
from mla.cases.memory import Gaps, Layout, Tensors, on_host, poison_all
from mla.cases.varied import Call, Change, Pool
from mla.config import MLAConfig
from mla.layer.forward import INDEX_EPS
from mla.layer.ops import Choice, layer_roles
from mla.verify.verdict import Check

# Changes of so many rows are made and uploaded before a pass begins, which keeps its calls close together.
EARLY_ROWS = 1 << 20
# So many numbers are kept of a pass, which bounds the time that judging them takes; but at least so many
# calls. Of 6 passes these are 48: if one call in ten goes wrong, one of them does in 99 of 100 runs.
KEPT_NUMBERS, KEPT_CALLS = 1 << 21, 8
INDEXER = ("write_index_key", "rotate_index_query")  # roles that rotate what scores are made of
# So many wrong calls are named.
NAMED = 3


def op_problem(setting: Setting, point: Point) -> Pool:
    """Return the calls of a scenario in its setting, as the layer makes them; not yet drawn."""
    assert point.op is not None
    role, config = point.op, setting.config
    formats = setting.cache_format, setting.index_format
    roles = layer_roles(config, setting.dtype, setting.device, 1, *formats)
    kind, spec = roles[role]
    case = OpCase(
        kind,
        spec,
        point.kv_lens(0) if role == "kv_b_proj" else point.query_lens,  # which has a row for every key
        point.kv_lens(0),
        name=point.name,
        seed=setting.seed,
        biased=config.attention_bias and role in ("qkv_a_proj", "o_proj"),
        interleaved=config.indexer_rope_interleave if role in INDEXER else config.rope_interleave,
        eps=INDEX_EPS if role in INDEXER else config.rms_norm_eps,
        rope=config,
        selection=point.selection or "random",
        layout=Layout(
            setting.page_size,
            spare=SPARE_PAGES,
            columns=0,
            shuffle=setting.seed,
            unowned=torch.nan,
            gaps=gaps(role, config),
        ),
    )
    return case.entry.pool(case, point.steps)


def gaps(role: str, config: MLAConfig) -> dict[str, Gaps]:
    """Return operand -> the gaps in it that belong to others in a layer: see `Layout.gaps`."""
    n, r = config.qk_nope_head_dim, config.qk_rope_head_dim
    first = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
    return {
        "kv_b_proj": {"x": (0, r, 0)},
        "w_uk": {"x": (0, 0, r), "out": (0, 0, r)},
        "q_a_layernorm": {"x": (0, config.latent_dim, 0)},
        "rotate_query": {"x": (n, 0, n), "out": (config.kv_lora_rank, 0, config.kv_lora_rank)},
        "rotate_index_query": dict.fromkeys(("x", "out"), (0, 0, config.index_head_dim - r)),
        "write_latent": {"kv_a": (first, first, 0)},
        "expanded_attention": {"v": (n, 0, n)},
    }.get(role, {})


def check_lengths(choice: Choice, case: OpCase) -> None:
    """Raise `UnsupportedBatch` if the op refuses the case's lengths."""
    if case.entry.prepares:
        page_size = case.layout.page_size if case.entry.cached else None
        choice.check_batch(case.query_lens, case.kv_lens, page_size)


class OpImplementation(Implementation):
    """The op that a layer of this setting would choose for a role."""

    def __init__(self, setting: Setting, pool: Pool, role: str, name: str) -> None:
        super().__init__(setting)
        self.name, self._pool, self._role = name, pool, role
        self._ops = make_ops(setting, role)
        self._choice = self._ops[role]
        self._plan_ms: float | None = None

    def load(self, scenario: Scenario, inputs: Any) -> None:
        """Lay the operands out on the device. Raises `UnsupportedBatch` if the op refuses the shape."""
        check_lengths(self._choice, self._pool.case)
        self._call = Call(self._pool, self._choice.op, self._choice.spec)
        stack = self._call.buffers(buffers(self._pool))
        self._shelf = base.Shelf(stack, self._pool.calls, poison_all)
        self.restore()

    def restore(self, number: int = 0) -> None:
        """Plan the batch again, and begin pass `number`."""
        start = now_ns()
        if self._call.prepare():
            self._plan_ms = (now_ns() - start) / 1e6
        self._call.begin(number)
        self._shelf.clear(number)
        self.number = number
        self._kept: dict[int, Tensors] | None = None  # index of a call -> its results on the host
        early = range(self._pool.calls) if self._pool.calls * self._pool.size[1] <= EARLY_ROWS else ()
        self._early = {index: self._call.upload(self.truth_of(index)) for index in early}

    def before(self, index: int) -> None:
        change = self._early.get(index) or self._call.upload(self.truth_of(index))
        self._call.take(change, self._shelf.next())

    def step(self, index: int) -> None:
        self._call.run()

    def after(self, index: int) -> None:
        self._call.fetch(self._shelf.next())
        self._shelf.keep(index)

    @property
    def out(self) -> torch.Tensor:
        """What the call that `before` prepared writes first."""
        return self._shelf.next()[self._call.written[0]]

    def _results(self) -> dict[int, Tensors]:
        if self._kept is None:
            kept, names = sorted(self._shelf.kept.items()), self._call.written
            self._kept = {call: on_host({name: results[name] for name in names}) for call, results in kept}
        return self._kept

    def outputs(self) -> Outputs:
        """Return the results [T, ..] without log-sum-exps, by call."""
        rows = [name for name in self._call.written if name != "lse"]
        kept = self._results().items()
        return {call: torch.cat([results[name] for name in rows], dim=-1) for call, results in kept}

    def check(self, checker: Pool) -> Check:
        """Check everything that the kept calls wrote, including log-sum-exps and the cache."""
        places, kept = self._call.places(), self._results().items()
        checks = {call: checker.check(results, self.truth_of(call), places) for call, results in kept}
        return summary(checks, self._call.damage())

    def truth_of(self, index: int) -> Change:
        """Return the change of call `index` of the last pass, which knows what that must write."""
        return self._pool.change(self.number, index)

    def facts(self) -> Facts:
        call = getattr(self, "_call", None)  # the op may have refused to pack
        return Facts(
            **(call.held_bytes() if call else {}),
            plan_ms=self._plan_ms,
            ops={self._role: self._choice.name},
            remarks=self._ops.remarks(),
        )

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        """Put `replace(role, op)` in place of the op; called before `load`."""
        self._choice = dataclasses.replace(self._choice, op=replace(self._role, self._choice.op))


def summary(checks: Mapping[int, Check], damage: str = "") -> Check:
    """Return the verdict on a pass, given those on its calls by index. `damage`: a fault of the pass.

    The reason is that of the first wrong call.
    """
    wrong, count = [index for index, check in checks.items() if check.status != "ok"], len(checks)
    reasons = [damage] * bool(damage) or ["there are no results to judge"] * (not checks)
    if wrong:
        numbers = ", ".join(str(index + 1) for index in wrong[:NAMED])  # the first call is 1
        calls = f"call{'s' * (len(wrong) > 1)} {numbers}{', ..' * (len(wrong) > NAMED)} of the pass"
        reasons.append(f"{checks[wrong[0]].reason} ({calls}; {len(wrong)} of {count} checked)")
    ratios = [check.error_ratio for check in checks.values() if check.error_ratio is not None]
    squares = [check.relative_error**2 for check in checks.values() if check.relative_error is not None]
    return Check(
        status="wrong" if reasons else "ok",
        error_ratio=max(ratios) if ratios and len(ratios) == count else None,
        relative_error=statistics.fmean(squares) ** 0.5 if squares and len(squares) == count else None,
        reason="; ".join(reasons),
    )


# ------------------------------------------------------------------------------------------------- memory


def numbers(pool: Pool) -> int:
    """Return how many numbers one call writes."""
    return sum(map(prod, pool.case.results.values()))


def buffers(pool: Pool) -> int:
    """Return how many buffers for results a pass gets."""
    written = numbers(pool)
    kept = max(KEPT_CALLS, KEPT_NUMBERS // written)
    return min(kept + 1, base.buffers(pool.calls, written * pool.case.spec.dtype.itemsize))


def output_bytes(pool: Pool) -> int:
    """Return what the results of a pass take, in all their buffers."""
    return buffers(pool) * numbers(pool) * pool.case.spec.dtype.itemsize
