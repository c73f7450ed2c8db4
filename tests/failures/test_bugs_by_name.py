"""Broken kernels of the usual kinds: the sentence points at the bug."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mla.failures.call import Watched, Watcher
from mla.reference import REFERENCE
from mla_backends.api import AttentionSpec, FusedOp

PAGE, HEADS, C, R = 16, 8, 32, 8
SPEC = AttentionSpec(HEADS, C, 16, R, 12, 0.2, torch.float32, torch.device("cpu"))
DECODE = ((1,) * 20, tuple(range(16, 116, 5)))
PREFILL = ((40, 30), (48, 96))
Tensors = dict[str, Any]


class Mutant(FusedOp):
    """The reference, and then, or before, a bug."""

    contract = "latent_attention/1"

    def __init__(
        self, after: Callable[[Any, Tensors], None], before: Callable[[Any, Tensors], Tensors]
    ) -> None:
        self._after, self._before = after, before

    def prepare(self, spec: Any, batch: Any) -> Any:
        return spec, batch

    def __call__(self, state: Any, **tensors: Any) -> None:
        spec, batch = state
        right = REFERENCE["latent_attention"]
        right(right.prepare(spec, batch), **self._before(batch, tensors))
        self._after(batch, tensors)


def reason(
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    after: Callable[[Any, Tensors], None] = lambda batch, tensors: None,
    before: Callable[[Any, Tensors], Tensors] = lambda batch, tensors: tensors,
) -> str:
    """Return what is said of a broken op."""
    watcher = Watcher(lambda: None)
    op = Watched("latent_attention", "mine", Mutant(after, before), watcher, reads_lse=False)
    query_lens, kv_lens = lengths
    random = torch.Generator().manual_seed(0)
    width = -(-max(kv_lens) // PAGE)
    table = torch.randperm(len(kv_lens) * width, generator=random).view(-1, width).int()
    cache = torch.randn(table.numel() + 2, PAGE, C + R, generator=random)
    batch = Batch(query_lens, kv_lens, table)
    q = torch.randn(sum(query_lens), HEADS, C + R, generator=random)
    tables = {"block_table": table, "kv_lens": batch.kv_lens_device, "cu_q": batch.cu_q}
    results = {"out": torch.empty(len(q), HEADS, C), "lse": torch.empty(len(q), HEADS)}
    op(op.prepare(SPEC, batch), q=q, cache=cache, **tables, softmax_scale=SPEC.softmax_scale, **results)
    return "" if watcher.wrong is None else watcher.wrong.reason


class Batch:
    """The contract's view of a batch."""

    page_size = PAGE

    def __init__(self, query_lens: tuple[int, ...], kv_lens: tuple[int, ...], table: torch.Tensor) -> None:
        self.query_lens, self.kv_lens, self.block_table = query_lens, kv_lens, table
        self.kv_lens_device = torch.tensor(kv_lens, dtype=torch.int32)
        self.cu_q = torch.tensor((0, *query_lens), dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("lengths", [DECODE, PREFILL])
def test_a_right_op_is_right(lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert reason(lengths) == ""


@pytest.mark.parametrize("limit", [5, 16, 19])
def test_requests_beyond_a_limit(limit: int) -> None:
    said = reason(DECODE, after=lambda batch, tensors: tensors["out"][limit:].zero_())
    if limit == 19:  # one request: its name is enough
        assert said.startswith("out: 8 of 160 rows are wrong; request 19, position 110, head ")
    elif limit == 16:
        assert "32 of 160 rows are wrong, every row of requests 16..19; " in said
    else:
        assert "every row of requests 5..19; " in said


def test_tokens_beyond_a_tile() -> None:
    said = reason(PREFILL, after=lambda batch, tensors: tensors["out"][24:40].mul_(1.5))
    assert "128 of 560 rows are wrong, only request 0; " in said
    both = lambda batch, tensors: [tensors["out"][a:b].mul_(1.5) for a, b in ((24, 40), (64, 70))]  # noqa: E731
    assert "every row from new token 24 of its request on; " in reason(PREFILL, after=both)


def test_keys_beyond_a_limit() -> None:
    """Rows that see more than 40 keys are wrong, whatever request they belong to."""

    def shorter(batch: Any, tensors: Tensors) -> Tensors:
        cache, table = tensors["cache"].clone(), batch.block_table
        for row, length in zip(table, batch.kv_lens, strict=True):
            for position in range(40, length):
                cache[row[position // PAGE], position % PAGE] = -1.0
        return {**tensors, "cache": cache}

    assert "rows are wrong, every row from position 40 on; " in reason(PREFILL, before=shorter)


def test_a_last_page_that_is_not_read() -> None:
    def without_partial_page(batch: Any, tensors: Tensors) -> Tensors:
        cache = tensors["cache"].clone()
        for row, length in zip(batch.block_table, batch.kv_lens, strict=True):
            if length % PAGE:
                cache[row[length // PAGE]] = -1.0
        return {**tensors, "cache": cache}

    said = reason(DECODE, before=without_partial_page)
    assert "rows are wrong, every row of the requests whose last page is not full; request " in said


@pytest.mark.parametrize(("first", "named"), [(6, "heads 6 and 7"), (7, "head 7")])
def test_the_rest_of_a_tile_of_heads(first: int, named: str) -> None:
    said = reason(DECODE, after=lambda batch, tensors: tensors["out"][:, first:].zero_())
    assert f"rows are wrong, {named} of every row; request " in said


def test_an_output_that_is_a_copy() -> None:
    def elsewhere(batch: Any, tensors: Tensors) -> Tensors:
        return {**tensors, "out": tensors["out"].clone()}

    said = reason(DECODE, before=elsewhere)
    assert said == "out: it was probably not written: all 160 rows are NaN, as before the call"


def test_two_requests_that_change_places() -> None:
    def swap(batch: Any, tensors: Tensors) -> None:
        tensors["out"][[3, 11]] = tensors["out"][[11, 3]]

    assert "16 of 160 rows are wrong, every row of requests 3 and 11; " in reason(DECODE, after=swap)


def test_a_row_off_here_and_there_has_a_name_and_no_pattern() -> None:
    def noise(batch: Any, tensors: Tensors) -> None:
        for row, head in ((1, 2), (4, 5), (9, 0), (13, 7), (17, 3), (18, 6), (2, 4), (6, 1)):
            tensors["out"][row, head] *= 1.1

    said = reason(DECODE, after=noise)
    assert said.startswith("out: 8 of 160 rows are wrong; request ")
    assert "page" in said
