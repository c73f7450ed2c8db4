"""What a step on one share writes and attends, against counting the tokens one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import LatentCache, MLAConfig
from mla.errors import CacheFull, StaleBatch
from mla.parallel.cache import Part, ShardedCache
from mla.parallel.layout import Share
from mla_backends.upload import upload_into

CONFIG = MLAConfig(8, 2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)
WORLDS = st.integers(1, 5)
# A step of one new token each, as of a decode, is worked out in another way.
STEP = st.just([1, 1, 1]) | st.lists(st.integers(0, 9), min_size=3, max_size=3)
STEPS = st.lists(STEP, min_size=1, max_size=5)


@given(WORLDS, st.integers(0, 60))
@settings(deadline=None)
def test_a_share_is_what_counting_gives(world: int, length: int) -> None:
    counts = [sum(i % world == rank for i in range(length)) for rank in range(world)]
    for rank in range(world):
        share = Share(rank, world)
        assert share.held(torch.tensor([length])).item() == share.held(length) == counts[rank]
        owned = share.owns(torch.arange(length)).tolist()
        assert owned == [i % world == rank for i in range(length)]
        assert owned == [share.owns(i) for i in range(length)]
    assert Share(0, world).first(length) == max(counts)


@given(WORLDS, STEPS, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_every_token_is_written_once_and_sees_all_before_it(
    world: int, steps: list[list[int]], most: int
) -> None:
    """Follow what each slot of each rank holds; every query must see this rank's tokens up to its own."""
    caches = [
        ShardedCache(CONFIG, Share(rank, world), max_tokens=600 * world, page_size=4, shuffle=1)
        for rank in range(world)
    ]
    held: list[dict[int, tuple[int, int]]] = [{} for _ in caches]  # slot -> request, position
    *_, ids = [cache.new_sequences(3) for cache in caches]
    lengths = [0, 0, 0]
    for step in steps:
        new = [(r, lengths[r] + j) for r in range(3) for j in range(step[r])]
        lengths = [length + count for length, count in zip(lengths, step, strict=True)]
        written: list[int] = []
        for cache, slots in zip(caches, held, strict=True):
            batch = cache.extend(ids, step)
            written += batch.local.tolist()
            slots.update(
                {
                    slot: new[token]
                    for token, slot in zip(batch.local.tolist(), batch.slots.tolist(), strict=True)
                }
            )
            assert batch.positions.tolist() == [position for _, position in new]
            seen = [visible for part in batch.parts(most) for visible in attended(part, slots)]
            for token, (request, position) in enumerate(new):
                mine = [i for i in range(position + 1) if i % world == cache.share.rank]
                assert seen[token] == [(request, i) for i in mine]
        assert sorted(written) == list(range(len(new)))


def attended(part: Part, slots: dict[int, tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return, for every new token in its place, the tokens that attention shows to it by its contract."""
    size, shown = part.page_size, list[list[tuple[int, int]]]()
    for row, (count, keys) in enumerate(zip(part.query_lens, part.kv_lens, strict=True)):
        assert count == part.cu_q[row + 1] - part.cu_q[row]
        assert keys == part.kv_lens_device[row]
        table = part.block_table[row].tolist()
        held = [slots[table[i // size] * size + i % size] for i in range(keys)]
        assert count == 1 or keys >= count, "the contract has no query without keys among others"
        shown += [held[: keys - (count - 1 - j)] for j in range(count)]
    order = range(len(shown)) if part.order is None else part.order.tolist()
    back: list[list[tuple[int, int]]] = [[]] * len(shown)
    for seen, token in zip(shown, order, strict=True):
        back[token] = seen
    if part.back is not None:
        assert [shown[place] for place in part.back.tolist()] == back
    return back


def test_queries_share_rows_where_they_can() -> None:
    """A row per token reads the keys once per token: of 64 new tokens on two ranks, two rows are enough."""
    cache = ShardedCache(CONFIG, Share(0, 2), max_tokens=256)
    (part,) = cache.extend(cache.new_sequences(1), [64]).parts(64)
    assert part.query_lens == (32, 32)
    later = ShardedCache(CONFIG, Share(1, 2), max_tokens=256)
    batch = later.extend(later.new_sequences(1), [64])
    (part,) = batch.parts(64)
    assert part.query_lens == (1, 31, 32)  # the first token of all sees none of this rank's
    assert part.kv_lens == (0, 31, 32)
    assert [piece.tokens for piece in batch.parts(48)] == [slice(0, 48), slice(48, 64)]
    assert batch.memory.block_table.shape[0] <= 4, "a table of one row for each token is too large"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_ranks_are_full_at_the_same_time(rank: int) -> None:
    cache = ShardedCache(CONFIG, Share(rank, 3), max_tokens=3 * 8, page_size=4)
    ids = cache.new_sequences(1)
    cache.extend(ids, [24])
    before = cache.generation
    with pytest.raises(CacheFull):
        cache.extend(ids, [1])
    assert (cache.length(ids[0]), cache.generation) == (24, before)
    cache.truncate(ids[0], 9)  # of which a rank has three, in one page
    assert cache.free_pages == 1
    cache.extend(ids, [15])
    cache.release(ids)
    with pytest.raises(ValueError, match="no sequence"):
        cache.length(ids[0])


def test_a_batch_is_void_once_the_cache_has_changed() -> None:
    cache = ShardedCache(CONFIG, Share(0, 2), max_tokens=64)
    ids = cache.new_sequences(1)
    batch = cache.extend(ids, [2])
    batch.check_current()
    cache.extend(ids, [2])
    with pytest.raises(StaleBatch):
        batch.check_current()


@pytest.mark.parametrize("tokens", [11, 2])
def test_a_history_is_spread_over_the_ranks(tokens: int) -> None:
    kv, pe, keys = torch.randn(tokens, 6), torch.randn(tokens, 2), torch.randn(tokens, 4)
    gathered = torch.zeros(tokens, 8)
    config = replace(CONFIG, q_lora_rank=8, index_topk=4, index_n_heads=1, index_head_dim=4)
    for rank in range(3):
        cache = ShardedCache(config, Share(rank, 3), max_tokens=64, page_size=4, dtype=torch.float32)
        (sequence,) = cache.new_sequences(1)
        cache.load(sequence, kv, pe, index=keys)
        cache.load(sequence, kv, pe, index=keys)  # of another layer, say
        assert cache.length(sequence) == tokens
        owned = range(rank, tokens, 3)
        index = cache.read_index(sequence)
        assert index is not None
        assert torch.equal(index, keys[list(owned)])
        gathered[list(owned)] = torch.cat(cache.read(sequence), dim=1)
        assert torch.equal(torch.cat(cache.read(cache.copy(sequence, cache)), dim=1), gathered[list(owned)])
    assert torch.equal(gathered, torch.cat((kv, pe), dim=1))
    whole = LatentCache(CONFIG, max_tokens=64, page_size=4)
    assert whole.num_pages == 3 * cache.num_pages - 2  # 22 of 64 tokens a rank, in pages of 4


@pytest.mark.parametrize("query_lens", [[1, 1], [5, 1], [5, 5]])
def test_a_table_of_pages_that_is_on_the_device_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch, query_lens: list[int]
) -> None:
    """The same step again costs the numbers alone, also where rows are fewer than there is room for."""
    cache = ShardedCache(CONFIG, Share(0, 2), max_tokens=256, page_size=16)
    ids = cache.new_sequences(2)
    cache.extend(ids, [4, 4])
    sent: list[int] = []

    def noted(host: torch.Tensor, target: torch.Tensor) -> None:
        sent.append(target.numel())
        upload_into(host, target)

    monkeypatch.setattr("mla.cache.ragged_batch.upload_into", noted)
    tables = []
    for _ in range(3):
        batch = cache.extend(ids, query_lens)
        tables.append(batch.memory.block_table.clone())
        (part,) = batch.parts(64)
        assert len(part.block_table) == len(part.kv_lens)
    whole, numbers, again = sent
    assert numbers == again == whole - tables[0].numel()
    assert all(torch.equal(table, tables[0]) for table in tables)
