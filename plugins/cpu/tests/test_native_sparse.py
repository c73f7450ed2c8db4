"""What drawn cases of sparse attention do not ask, at every level."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from native_cases import BF16, FINE, draw, laid_out, latent_case
from sparse_problem import SparseBatch, indexer_spec

from mla.cache.formats import IndexFp8, index_keys
from mla_backend_cpu.library import Library
from mla_backend_cpu.sparse_ops import NativeSelectLatents, NativeSparseAttention

Threads = Callable[[int], contextlib.AbstractContextManager[None]]


# --------------------------------------------------------------------------------------------- selection
def check_selection(
    kernels: Library,
    batch: SparseBatch,
    heads: int,
    width: int,
    topk: int,
    index_format: str = "",
) -> torch.Tensor:
    """Select, and hold each choice to its true score: only rounding may make one that is left out better."""
    op = NativeSelectLatents(kernels)
    assert op.unsupported_reasons(indexer_spec(heads, width, 16, topk, dtype=BF16)) == []
    keys = batch.normal(sum(batch.kv_lens), width, dtype=BF16)
    q = batch.normal(batch.tokens, heads, width, dtype=BF16)
    weights = batch.normal(batch.tokens, heads)
    cache = batch.index_cache(keys, index_format)
    if index_format:
        keys = index_keys(cache, IndexFp8(width)).flatten(0, 1)[batch.pages.slots]
    out = torch.full((batch.tokens, topk + 3), 7, dtype=torch.int32)
    named = {"cache_format": index_format} if index_format else {}
    given = {"q": laid_out(q, "columns"), "weights": laid_out(weights, "columns"), **batch.tables}
    op(None, **given, cache=cache, out=out[:, :topk], **named)
    assert (out[:, topk:] == 7).all()
    sizes = batch.true_scores(q.abs(), weights.abs(), keys.abs())
    for row, true, size in zip(out[:, :topk], batch.true_scores(q, weights, keys), sizes, strict=True):
        count = min(topk, len(true))
        assert (row[count:] == -1).all()
        chosen = row[:count].long()
        assert torch.equal(chosen.sort().values, chosen), "in the order of positions, which is that of pages"
        assert len(chosen.unique()) == count
        assert ((chosen >= 0) & (chosen < len(true))).all()
        if count:
            bound = (width + heads + 8) * FINE * size
            assert (true[chosen] + bound[chosen] >= (true - bound).topk(count).values[-1]).all()
    return out[:, :topk]


@pytest.mark.parametrize(
    ("heads", "width", "index_format"),
    [(5, 32, ""), (5, 32, "fp8"), (32, 128, ""), (64, 128, ""), (64, 128, "fp8")],
)
def test_a_long_request_is_split_over_threads(
    kernels: Library, threads: Threads, heads: int, width: int, index_format: str
) -> None:
    """With 32 and 64 heads of 128 channels, tiles hold scores until the next keys are multiplied."""
    batch = SparseBatch((2, 1), (9001, 40), page_size=64)
    for topk in (50, 2048, 6000):
        batch.draw.manual_seed(topk)
        with threads(1):
            alone = check_selection(kernels, batch, heads, width, topk, index_format)
        batch.draw.manual_seed(topk)
        with threads(5):
            assert torch.equal(check_selection(kernels, batch, heads, width, topk, index_format), alone)


def test_infinite_keys_and_scores_of_any_sign_lose_no_position(kernels: Library, threads: Threads) -> None:
    """Their own scores may be NaN; the selection stays complete, and what is finite is in order."""
    batch = SparseBatch((3,), (5000,), page_size=16)
    keys, q = draw(5000, 32), draw(3, 3, 32, seed=1)
    keys[::7] = torch.inf
    keys[1::7, ::2] = -torch.inf
    weights = torch.tensor([[1.0, -1, 0.5], [-1, -1, -1], [torch.inf, 0, -0.0]])
    for count in (1, 3):
        out = torch.empty(3, 1800, dtype=torch.int32)
        with threads(count):
            tensors = {"q": q, "weights": weights, "cache": batch.index_cache(keys), **batch.tables}
            NativeSelectLatents(kernels)(None, **tensors, out=out)
        for t, row in enumerate(out):
            assert len(row.unique()) == 1800
            assert ((row >= 0) & (row < 4998 + t)).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 30, -1], "selection names position 30 for token 1, whose request has 30"),
        ([0, -2, -1], "selection names position -2 for token 1"),
        ([0, -1, 3], "selection of token 1 names a position behind a -1"),
    ],
)
def test_a_selection_that_names_nothing_is_refused(kernels: Library, row: list[int], message: str) -> None:
    case = latent_case([2], [30])
    view, selection = case.view(), torch.tensor([[0, 1, -1], row], dtype=torch.int32)
    tensors = {"q": case.q, "cache": case.cache, "block_table": case.table, "kv_lens": view.kv_lens_device}
    out, lse = torch.empty(2, 3, 64, dtype=BF16), torch.empty(2, 3)
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(kernels)(
            None, **tensors, cu_q=view.cu_q, selection=selection, softmax_scale=0.1, out=out, lse=lse
        )
