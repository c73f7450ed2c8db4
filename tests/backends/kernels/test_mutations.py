"""Deliberately wrong adapters: each must fail the check that the right one passes, on the same fake."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import judged_op
from kernel_adapters import MATE

from mla_backend_moore.kernels import MATE_SPARSE
from mla_backends import FusedOp
from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashInferMla,
    FlashInferSparse,
    FlashMla,
    FlashMlaSparse,
    IxformerMla,
    LatentLimits,
    PagedLatentOp,
    latent,
    sparse,
)
from mla_backends.kernels.paged import Launch

WRONG = r"worst (row|lse) error|NaN or infinity"
FAILS = (AssertionError, RuntimeError)


class Altered:
    """A vendor's module, one of whose functions is called with other keywords, or with positions."""

    def __init__(
        self, vendor: Any, name: str, alter: Callable[[Callable[..., Any], dict[str, Any]], Any]
    ) -> None:
        self._vendor, self._name, self._alter = vendor, name, alter

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._vendor, name)
        if name != self._name:
            return function

        @functools.wraps(function)
        def call(**keywords: Any) -> Any:
            return self._alter(function, keywords)

        return call

    def reasons(self) -> list[str]:
        return []


def altered(op: Any, name: str, alter: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> Any:
    op._vendor = Altered(op._vendor, name, alter)
    op.interface_reasons = list
    return op


def without(*names: str) -> Callable[[Callable[..., Any], dict[str, Any]], Any]:
    return lambda function, keywords: function(**{k: v for k, v in keywords.items() if k not in names})


def positional(function: Callable[..., Any], keywords: dict[str, Any]) -> Any:
    """Call as the stale README does: the mask where the scale now is."""
    return function(*list(keywords.values())[:7], keywords["causal"])


def one_key_less(function: Callable[..., Any], keywords: dict[str, Any]) -> Any:
    table = keywords["block_table"].roll(1, dims=0)  # the neighbour's pages
    return function(**{**keywords, "block_table": table})


class KeptPlan(FlashMla):
    """The plan is made once per shape, for all steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._plans: dict[Any, Any] = {}

    def plan(self, kv_lens: torch.Tensor, query_rows: int) -> Any:
        key = (kv_lens.shape, query_rows)
        return self._plans.setdefault(key, super().plan(kv_lens, query_rows))


class WrongHeads(FlashMla):
    """The padding heads are kept and the last real ones cut."""

    def _write(self, group: Any, call: Launch, result: Any, out: Any, lse: Any) -> None:
        value, sums = result
        super()._write(group, call, (value.roll(1, dims=2), sums), out, lse)


class RawEmptyRows(FlashMla):
    """What the vendor gives for rows without keys is passed on."""

    def _write(self, group: Any, *rest: Any) -> None:
        super()._write(replace(group, has_empty=False), *rest)


class PlainMean(FlashMla):
    """The plan counts heads only, as if every row had one query."""

    def plan(self, kv_lens: torch.Tensor, query_rows: int) -> Any:
        return super().plan(kv_lens, 16)


FLASH_MUTANTS: dict[str, tuple[str, Callable[[], FusedOp]]] = {
    "no scale": (
        "nvidia_c",
        lambda: altered(FlashMla(), "flash_mla_with_kvcache", without("softmax_scale")),
    ),
    "no mask": ("nvidia_c", lambda: altered(FlashMla(), "flash_mla_with_kvcache", without("causal"))),
    "positions": ("nvidia_b", lambda: altered(FlashMla(), "flash_mla_with_kvcache", positional)),
    "neighbour": ("nvidia_b", lambda: altered(FlashMla(), "flash_mla_with_kvcache", one_key_less)),
    "lse transposed": ("nvidia_c", lambda: FlashMla(LatentLimits(lse_layout="tokens_first"))),
    "lse not transposed": ("moore_mate", lambda: FlashMla(replace(MATE, lse_layout="heads_first"))),
    "lse base": ("metax", lambda: FlashMla(LatentLimits(lse_base="2"))),
    "plan kept, tensors": ("nvidia_b", KeptPlan),
    "plan kept, object": ("nvidia_c", KeptPlan),
    "plan kept, fork": ("nvidia_sgl", KeptPlan),
    "plan kept, wrapper": ("moore_mate", lambda: KeptPlan(MATE)),
    "plan of one query": ("nvidia_b", PlainMean),
    "empty rows raw": ("nvidia_c", RawEmptyRows),
    "empty rows launched": ("moore_mate", lambda: FlashMla(replace(MATE, empty_rows=True))),
    "heads unpadded": ("moore_mate", lambda: FlashMla(replace(MATE, heads=None))),
    "heads shifted": ("moore_mate", lambda: WrongHeads(MATE)),
}


@pytest.mark.parametrize("mutant", FLASH_MUTANTS)
def test_the_check_fails_a_wrong_flash_mla(installed: Any, check_latent: Any, mutant: str) -> None:
    folder, make = FLASH_MUTANTS[mutant]
    limits = MATE if folder == "moore_mate" else LatentLimits()
    heads = (4, 16)
    with installed(folder):
        check_latent(FlashMla(limits), heads=heads)
        with pytest.raises(FAILS, match=rf"{WRONG}|planned for|consistent|nobody knows|not covered"):
            check_latent(make(), heads=heads)


# ------------------------------------------------------------------------------------------ selected latents


class LogicalPositions(FlashMlaSparse):
    """Positions within the request are passed on as slots."""

    def __call__(self, state: Any, *, block_table: torch.Tensor, **tensors: Any) -> None:
        pages = torch.arange(block_table.shape[1]).expand_as(block_table).contiguous()
        super().__call__(state, block_table=pages, **tensors)


class RawSums(FlashMlaSparse):
    """Rows that select nothing have the log-sum-exp that FlashMLA gives."""

    def __call__(self, state: Any, *, lse: Any, **tensors: Any) -> None:
        super().__call__(state, lse=lse, **tensors)
        if lse is not None:
            lse.masked_fill_(lse == -math.inf, math.inf)


def padding(value: int) -> Callable[[Callable[..., Any], dict[str, Any]], Any]:
    def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
        return function(**{**given, "indices": given["indices"].masked_fill(given["indices"] < 0, value)})

    return call


def unpadded(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    return function(**{**given, "indices": given["indices"][..., :40].contiguous()})


def with_all(**named: Any) -> Callable[[Callable[..., Any], dict[str, Any]], Any]:
    return lambda function, given: function(**{**given, **named})


def whole_width(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    return function(**{**given, "seq_lens": torch.full_like(given["seq_lens"], given["max_seq_len"])})


class RowsOfNothing(FlashInferSparse):
    """What a row that selects nothing gives is left as it comes."""

    def __init__(self) -> None:
        super().__init__(replace(self.limits, empty_rows=True))


def mate(**limits: Any) -> Any:
    return FlashMlaSparse(replace(MATE_SPARSE, **limits), module="mate.flashmla")


DECODE, PREFILL, PLAN, TRTLLM = sparse.DECODE, sparse.PREFILL, sparse.PLAN, sparse.TRTLLM
SOUND = {"nvidia_sgl": FlashMlaSparse, "moore_mate": mate, "flashinfer_07": FlashInferSparse}
DRAWS = 40  # cases: right adapters pass as many
# By its name: the fake, the check that fails it, and the wrong adapter.
SPARSE_MUTANTS: dict[str, tuple[str, str, Callable[[], FusedOp]]] = {
    "logical positions": ("nvidia_sgl", "formula", LogicalPositions),
    "sums as they come": ("nvidia_sgl", "drawn", RawSums),
    **{
        name: ("nvidia_sgl", check, lambda call=call: altered(FlashMlaSparse(), *call))
        for name, check, call in (
            ("padded with a slot", "drawn", (PREFILL, padding(0))),
            ("padded with a slot, bytes", "drawn", (DECODE, padding(0))),
            ("padded with -2, bytes", "drawn", (DECODE, padding(-2))),
            ("not padded", "formula", (PREFILL, unpadded)),
            ("no scale, bytes", "drawn", (DECODE, without("softmax_scale"))),
            ("current kernels", "formula", (PREFILL, without("use_legacy"))),
        )
    },
    "heads not padded": (
        "nvidia_sgl", "formula", lambda: FlashMlaSparse(replace(FlashMlaSparse.limits, heads=None))
    ),
    "mate: heads not padded": ("moore_mate", "formula", lambda: mate(heads=None)),
    "mate: not padded": ("moore_mate", "formula", lambda: altered(mate(), PREFILL, unpadded)),
    "mate: padded with a slot": ("moore_mate", "drawn", lambda: altered(mate(), DECODE, padding(0))),
    "mate: planned for others": ("moore_mate", "drawn", lambda: altered(mate(), PLAN, with_all(topk=64))),
    "mate: planned for no bytes": (
        "moore_mate", "drawn", lambda: altered(mate(), PLAN, without("num_heads_q"))
    ),
    "flashinfer: rows of nothing": ("flashinfer_07", "drawn", RowsOfNothing),
    **{
        f"flashinfer: {name}": (
            "flashinfer_07", check, lambda call=call: altered(FlashInferSparse(), TRTLLM, call)
        )
        for name, check, call in (
            ("base 2", "formula", without("return_lse_base")),
            ("all of the width", "drawn", whole_width),
            ("any kernel", "formula", without("backend")),
            ("no scale", "formula", without("bmm1_scale")),
            ("as if dense", "formula", without("sparse_mla_top_k")),
            ("a workspace that is not zero", "formula", with_all(workspace_buffer=torch.ones(9).byte())),
        )
    },
    "flashinfer: heads not padded": (
        "flashinfer_07", "drawn", lambda: FlashInferSparse(replace(FlashInferSparse.limits, max_heads=None))
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", SPARSE_MUTANTS)
def test_the_suite_fails_a_wrong_adapter_of_sparse_attention(
    installed: Any, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    folder, check, make = SPARSE_MUTANTS[mutant]
    for adapter in (FlashMlaSparse, FlashInferSparse):
        monkeypatch.setattr(adapter, "preflight", lambda self, spec: [])  # which finds most of them
    with installed(folder):
        only, count = f"sparse_latent_attention.{check}", DRAWS if check == "drawn" else 0
        results = [judged_op(op, only, draws=count) for op in (SOUND[folder](), make())]
    right = "incomplete" if count else "pass"  # as few draws are no proof
    assert [[result.status for result in part] for part in results] == [[right], ["fail"]], results


# ---------------------------------------------------------------------------------------- one query a row


def steps_forgotten(op: PagedLatentOp) -> PagedLatentOp:
    """Every token of a request sees all its keys."""
    prepare = op.prepare

    def wrong(spec: Any, batch: Any) -> Any:
        state = prepare(spec, batch)
        lens = {
            tuple(row.tolist()): int(n)
            for row, n in zip(batch.block_table, batch.kv_lens_device, strict=True)
        }
        groups = []
        for group in state.groups:
            keys = torch.tensor([lens[tuple(row.tolist())] for row in group.block_table]).int()
            groups.append(replace(group, given_lens=keys.clamp(min=1), longest=999))
        return replace(state, groups=tuple(groups))

    op.prepare = wrong  # type: ignore[method-assign]
    return op


def bound(value: Callable[[dict[str, Any]], int]) -> Callable[[Callable[..., Any], dict[str, Any]], Any]:
    return lambda function, keywords: function(**{**keywords, "max_context_len": value(keywords)})


class Scaled(IxformerMla):
    """The scale is that of the latent's width."""

    def launch(self, plan: Any, call: Launch) -> Any:
        return super().launch(plan, replace(call, scale=576**-0.5))


class BaseTwo(IxformerMla):
    def _tokens_first(self, lse: torch.Tensor) -> torch.Tensor:
        return super()._tokens_first(lse) / math.log(2)


IXFORMER_MUTANTS: dict[str, Callable[[], FusedOp]] = {
    "steps forgotten": lambda: steps_forgotten(IxformerMla()),
    "bound too low": lambda: altered(
        IxformerMla(), latent.IXFORMER, bound(lambda k: int(k["context_lens"].min()))
    ),
    "scale": Scaled,
    "base": BaseTwo,
    "empty rows launched": lambda: IxformerMla(replace(IxformerMla.limits, empty_rows=True)),
}


@pytest.mark.parametrize("mutant", IXFORMER_MUTANTS)
def test_the_check_fails_a_wrong_ixformer(installed: Any, check_latent: Any, mutant: str) -> None:
    with installed("ixformer"):
        check_latent(IxformerMla())
        with pytest.raises(FAILS, match=rf"{WRONG}|nobody knows"):
            check_latent(IXFORMER_MUTANTS[mutant]())


# --------------------------------------------------------------------------------------------- flashinfer


class Unconverted(FlashInferMla):
    """The log-sum-exp is taken as it comes."""

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state, **tensors)
        tensors["lse"] /= math.log(2)


class PlannedOnce(FlashInferMla):
    """A step's plan is kept for the next."""

    def __init__(self) -> None:
        super().__init__()
        self._first: Any = None

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(spec, batch)
        self._first = self._first or state
        return replace(state, plan=self._first.plan)


class Unmasked(FlashInferMla):
    def _state(self, spec: Any, batch: Any) -> Any:
        state = super()._state(spec, batch)
        return replace(state, plan={**state.plan, "causal": False})


class StaleEmpty(FlashInferMla):
    def _state(self, spec: Any, batch: Any) -> Any:
        return replace(super()._state(spec, batch), empty=None)


class WholeTable(FlashInferMla):
    """Pages are taken from the table's columns in order, whosever they are."""

    def _state(self, spec: Any, batch: Any) -> Any:
        state = super()._state(spec, batch)
        indices = batch.block_table.t().reshape(-1)[: len(state.plan["kv_indices"])]
        return replace(state, plan={**state.plan, "kv_indices": indices})


class Shared(FlashInferMla):
    """One wrapper for all plans, whichever was planned last."""

    def _pool(self, device: Any) -> Any:
        pool = super()._pool(device)
        planned = pool.planned
        pool.planned = lambda *key: pool.turns[-1].wrapper if len(pool.turns) > 1 else planned(*key)
        return pool


@pytest.mark.parametrize("release", ["flashinfer", "flashinfer_07"])
@pytest.mark.parametrize("mutant", [Unconverted, PlannedOnce, Unmasked, StaleEmpty, WholeTable, Shared])
def test_the_check_fails_a_wrong_flashinfer(
    installed: Any, check_latent: Any, mutant: Callable[[], FusedOp], release: str
) -> None:
    with installed(release):
        check_latent(FlashInferMla(), heads=(4, 16))
        with pytest.raises(FAILS, match=rf"{WRONG}|does not fit"):
            check_latent(mutant(), heads=(4, 16))


# ------------------------------------------------------------------------------------------ varlen


class AlwaysCausal(FlashAttnVarlen):
    def prepare(self, spec: Any, batch: Any) -> Any:
        return replace(super().prepare(spec, batch), causal=True)


class NeverCausal(FlashAttnVarlen):
    def prepare(self, spec: Any, batch: Any) -> Any:
        return replace(super().prepare(spec, batch), causal=False)


class ValuesBehind(FlashAttnVarlen):
    """Values are padded in front and cut behind."""

    def attend(self, state: Any, given: Any, out: Any) -> Any:
        return super().attend(state, {**given, "v": given["v"].roll(192 - 128, dims=2)}, out)


class RawLogs(FlashAttnVarlen):
    """The log-sum-exp is passed on as it is: heads first, +inf without keys."""

    @staticmethod
    def _logs(sums: torch.Tensor, state: Any, lse: torch.Tensor) -> torch.Tensor:
        return sums if sums.shape == lse.shape else sums.transpose(0, 1)


class DefaultScale(FlashAttnVarlen):
    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(state, **{**tensors, "softmax_scale": 192**-0.5})


def check_expanded(run_expanded: Any, assert_right: Any, op: FusedOp) -> None:
    """Hold an op to segments that are prefill, behind a history, unmasked, square and empty."""
    for causal in (True, False):
        assert_right(*run_expanded(op, (5, 1, 9), (9, 1, 33), causal=causal))
        assert_right(*run_expanded(op, (3, 1), (3, 7), causal=causal, heads=4))
        assert_right(*run_expanded(op, (2, 1), (0, 5), causal=causal))


@pytest.mark.parametrize("mutant", [AlwaysCausal, NeverCausal, ValuesBehind, RawLogs, DefaultScale])
def test_the_check_fails_a_wrong_varlen(
    installed: Any, run_expanded: Any, assert_right: Any, mutant: Callable[[], FusedOp]
) -> None:
    with installed("flash_attn_2"):
        check_expanded(run_expanded, assert_right, FlashAttnVarlen())
        with pytest.raises(AssertionError, match=WRONG):
            check_expanded(run_expanded, assert_right, mutant())
