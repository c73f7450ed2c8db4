"""`RaggedBatch`: slots, positions and tables of a step; subsets, in-place updates and the memo."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import LatentCache, RaggedBatch
from mla.errors import StaleBatch


def make_batch(
    tiny: Any, new: list[int], old: list[int], page_size: int = 16
) -> tuple[LatentCache, Any, Any]:
    size = sum(new) + sum(old) + 5 * page_size * len(new)
    cache = LatentCache(tiny(), max_tokens=size, page_size=page_size, shuffle=1, dtype=torch.float32)
    ids = cache.new_sequences(len(new))
    cache.extend(ids, old)
    return cache, ids, cache.extend(ids, new)


def check_tables(cache: LatentCache, ids: list[int], batch: Any, new: list[int]) -> None:
    """Hold every table of the newest batch against what the cache says of its sequences."""
    page_size, old = cache.page_size, [cache.length(i) - n for i, n in zip(ids, new, strict=True)]
    assert batch.num_tokens == sum(new)
    assert batch.query_lens == tuple(new)
    assert batch.kv_lens == tuple(n + o for n, o in zip(new, old, strict=True))
    assert batch.positions.tolist() == [o + i for n, o in zip(new, old, strict=True) for i in range(n)]
    expected = [cache.slots(sequence)[o:] for sequence, o in zip(ids, old, strict=True)]
    assert torch.equal(batch.slots, torch.cat(expected))
    assert batch.kv_lens_device.tolist() == list(batch.kv_lens)
    assert batch.cu_q.tolist() == list(batch.cu_q_host)
    for sequence, row, kv_len in zip(ids, batch.block_table, batch.kv_lens, strict=True):
        position = torch.arange(kv_len)
        slots = row[position // page_size].long() * page_size + position % page_size
        assert torch.equal(slots, cache.slots(sequence))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=6),
    st.sampled_from([1, 2, 16, 64]),
)
def test_every_new_token_knows_its_position_and_slot(
    tiny: Any, requests: list[tuple[int, int]], page_size: int
) -> None:
    new, old = (list(lengths) for lengths in zip(*requests, strict=True))
    cache, ids, batch = make_batch(tiny, new, old, page_size)
    check_tables(cache, ids, batch, new)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_steps_that_share_memory_keep_their_tables_apart(tiny: Any, data: st.DataObject) -> None:
    cache = LatentCache(tiny(), max_tokens=4000, page_size=4, shuffle=2, dtype=torch.float32)
    ids = cache.new_sequences(3)
    widths = st.sampled_from([0, 0, 5, 24, 24])
    kept = cache.extend(ids, [1, 1, 1], table_tokens=data.draw(widths))
    for _ in range(12):
        new = data.draw(st.sampled_from([[1, 1, 1], [1, 1, 1], [2, 0, 1], [1, 5, 2]]))
        batch = cache.extend(ids, new, table_tokens=data.draw(widths))
        check_tables(cache, ids, batch, new)
        action = data.draw(st.sampled_from(["go on", "update", "truncate", "replace", "reorder"]))
        if action == "update" and new == [1, 1, 1] and batch.block_table.shape == kept.block_table.shape:
            check_tables(cache, ids, kept.update_(batch), new)
        elif action == "truncate":
            cache.truncate(ids[0], cache.length(ids[0]) // 2)
        elif action == "replace":
            cache.release([ids.pop()])
            ids += cache.new_sequences(1)
        elif action == "reorder":
            ids.reverse()


def test_a_subset_describes_only_its_requests(tiny: Any) -> None:
    _, _, batch = make_batch(tiny, [3, 1, 4], [0, 40, 20])
    part = batch.subset([2, 0])
    assert (part.query_lens, part.kv_lens) == ((4, 3), (24, 3))
    assert torch.equal(part.block_table, batch.block_table[[2, 0]])
    assert torch.equal(part.slots, torch.cat((batch.slots[4:], batch.slots[:3])))


def test_update_takes_new_lengths_and_keeps_every_address(tiny: Any) -> None:
    cache, ids, batch = make_batch(tiny, [1, 1], [5, 20])
    names = ("slots", "positions", "block_table", "kv_lens_device", "cu_q")
    addresses = [getattr(batch, name).data_ptr() for name in names]
    memo = batch.memo("key", object)
    fresh = cache.extend(ids, [1, 1])
    with pytest.raises(StaleBatch):
        batch.check_current()
    assert batch.update_(fresh) is batch
    batch.check_current()
    assert batch.kv_lens == fresh.kv_lens == (7, 22)
    assert [getattr(batch, name).data_ptr() for name in names] == addresses
    for name in names:
        assert torch.equal(getattr(batch, name), getattr(fresh, name)), name
    assert batch.memo("key", object) is not memo, "what was prepared for the old lengths is forgotten"
    stale = cache.extend(ids, [1, 1])
    cache.extend(ids, [0, 0])
    with pytest.raises(StaleBatch):
        batch.update_(stale)


def test_steps_of_a_reserved_width_stay_where_a_graph_reads_them(tiny: Any) -> None:
    """They keep shape and addresses over page borders and between steps of other widths, so it is no copy."""
    cache, ids, narrow = make_batch(tiny, [1, 1], [5, 14])
    kept = cache.extend(ids, [1, 1], table_tokens=50)
    assert narrow.block_table.shape == (2, 1)
    assert kept.block_table.shape == (2, 4)
    start = kept.memory.buffer.data_ptr()
    for _ in range(20):
        cache.extend(ids, [0, 0])
        fresh = cache.extend(ids, [1, 1], table_tokens=50)
        check_tables(cache, ids, kept.update_(fresh), [1, 1])
        assert fresh.memory.buffer.data_ptr() == start
    assert narrow.memory.buffer.data_ptr() != start
    assert kept.block_table.max() < cache.num_pages, "the rest of a row names pages too"
    assert cache.extend(ids, [1, 30], table_tokens=50).block_table.shape == (2, 5)


def test_a_batch_does_not_keep_its_cache(make_case: Any) -> None:
    """Its plan refers to it, and only Python's collector, which counts no bytes, would find that cycle."""
    case = make_case([3, 1], [5, 20])
    case.run()
    pages, batch = weakref.ref(case.cache.pages), case.batch
    gc.disable()
    try:
        case.cache = None
        assert pages() is None
    finally:
        gc.enable()
    with pytest.raises(StaleBatch, match="the cache of this batch is gone: keep it"):
        batch.check_current()  # nobody can tell whether it changed before
    assert not batch.fits(1), "pages of another cache are still none of its own"


def test_update_refuses_other_shapes_and_changes_nothing(tiny: Any) -> None:
    cache, ids, batch = make_batch(tiny, [1, 1], [5, 20])
    with pytest.raises(ValueError, match="same query_lens"):
        batch.update_(cache.extend(ids, [1, 2]))
    cache.extend(ids, [0, 12])
    wider = cache.extend(ids, [1, 1])
    with pytest.raises(ValueError, match="same width"):
        batch.update_(wider)
    assert batch.kv_lens == (6, 21)


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "table", "page_size", "message"),
    [
        ([1], [9], torch.zeros(1, 1, dtype=torch.int32), 24, "page_size must be a power of two, got 24"),
        ([1], [17], torch.zeros(1, 1, dtype=torch.int32), 16, r"block_table \[1, 1\] has too few pages "),
        ([0], [17], torch.zeros(1, 1, dtype=torch.int32), 16, "has too few pages"),
        ([1], [2**40], torch.zeros(1, 1, dtype=torch.int32), 16, "at most 2147483647 tokens"),
        ([1], [2**40], torch.zeros(1, 1, dtype=torch.int32), 2**40, "at most 2147483647 tokens"),
        ([1.0], [9], torch.zeros(1, 1, dtype=torch.int32), 16, "query_lens must be whole numbers"),
        ([1], [9.5], torch.zeros(1, 1, dtype=torch.int32), 16, "kv_lens must be whole numbers"),
        ([1], 9, torch.zeros(1, 1, dtype=torch.int32), 16, "kv_lens must be a list of whole numbers, got 9"),
        ([1], [9], [[0]], 16, r"block_table must be \[1, any\] torch.int32, got a list"),
        ([1, 1], [9], torch.zeros(2, 1, dtype=torch.int32), 16, "must include the new tokens"),
        ([3], [2], torch.zeros(1, 1, dtype=torch.int32), 16, "must include the new tokens"),
        ([-1], [2], torch.zeros(1, 1, dtype=torch.int32), 16, "must include the new tokens"),
        ([1], [9], torch.zeros(1, 1, dtype=torch.int64), 16, "block_table must be .*int32, got"),
        ([1], [9], torch.zeros(2, 1, dtype=torch.int32), 16, "block_table must be"),
        ([1], [9], torch.zeros(1, dtype=torch.int32), 16, "block_table must be"),
        ([1], [9], torch.zeros(1, 1, dtype=torch.int32, device="meta"), 16, "block_table must be"),
    ],
)
def test_what_describes_no_step_is_refused(
    query_lens: Any, kv_lens: Any, table: Any, page_size: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RaggedBatch(query_lens, kv_lens, table, page_size, torch.device("cpu"))


def test_lengths_of_a_batch_without_a_cache_are_integers_of_any_kind() -> None:
    table = torch.zeros(2, 1, dtype=torch.int32)
    lengths = np.array([1, 2]), torch.tensor([3, 4])
    batch = RaggedBatch(*lengths, table, np.int64(16), torch.device("cpu"))  # type: ignore[arg-type]
    assert (batch.query_lens, batch.kv_lens, batch.page_size) == ((1, 2), (3, 4), 16)
    assert all(type(number) is int for number in (*batch.query_lens, *batch.kv_lens, batch.page_size))


def test_a_batch_of_a_cache_is_copied_but_not_pickled(tiny: Any) -> None:
    cache, _, batch = make_batch(tiny, [1, 2], [5, 6])
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(batch)
    for copied in (copy.copy(batch), copy.deepcopy(batch)):
        copied.check_current()
        assert torch.equal(copied.slots, batch.slots)
    alone = RaggedBatch([1], [9], torch.zeros(1, 1, dtype=torch.int32), 16, torch.device("cpu"))
    assert torch.equal(pickle.loads(pickle.dumps(alone)).positions, alone.positions)
    assert pickle.loads(pickle.dumps(cache)).length(0) == cache.length(0)


def test_a_batch_shows_its_lengths(tiny: Any) -> None:
    cache = LatentCache(tiny(), max_tokens=640, page_size=16)
    shown = repr(cache.extend(cache.new_sequences(2), [3, 1]))
    assert shown == (
        "RaggedBatch(query_lens=[3, 1], kv_lens=[3, 1], block_table=[2, 1], page_size=16, device=cpu)"
    )
