"""`LatentCache`: pages, lengths, load and read, and errors that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mla import LatentCache
from mla.errors import CacheFull
from mla.parallel.cache import ShardedCache
from mla.parallel.layout import Share


@pytest.fixture(scope="module")
def make_cache(tiny: Any) -> Callable[..., LatentCache]:
    def make(max_tokens: int = 64, page_size: int = 16, **kwargs: Any) -> LatentCache:
        kwargs.setdefault("dtype", torch.float32)
        return LatentCache(tiny(), max_tokens=max_tokens, page_size=page_size, **kwargs)

    return make


def snapshot(cache: LatentCache, ids: list[int]) -> tuple[Any, ...]:
    """Return all that an operation which claims to change nothing must keep."""
    return (
        [cache.length(sequence) for sequence in ids],
        [cache.slots(sequence).tolist() for sequence in ids],
        cache.free_pages,
        cache.generation,
        cache.pages.tolist(),
    )


def latents(cache: LatentCache, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = (cache.config.kv_lora_rank, cache.config.qk_rope_head_dim)
    kv, pe = (torch.randn(count, width, generator=generator).to(cache.pages.dtype) for width in widths)
    return kv, pe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_load_and_read_are_a_round_trip_per_layer(
    make_cache: Any, page_size: int, dtype: torch.dtype
) -> None:
    cache = make_cache(256, page_size, num_layers=2, shuffle=3, dtype=dtype)
    ids = cache.new_sequences(3)
    stored = {}
    for sequence, count in zip(ids, (65, 1, 16), strict=True):
        for layer in range(2):
            stored[sequence, layer] = latents(cache, count, seed=10 * sequence + layer)
            cache.load(sequence, *stored[sequence, layer], layer=layer)
    for (sequence, layer), expected in stored.items():
        for actual, given_ in zip(cache.read(sequence, layer), expected, strict=True):
            assert torch.equal(actual, given_)


def test_freed_pages_are_zero_in_every_layer_and_kept_pages_keep_their_content(make_cache: Any) -> None:
    cache = make_cache(64, num_layers=2)
    ids = cache.new_sequences(2)
    cache.extend(ids, [33, 16])
    cache.pages.fill_(7.0)
    slots = cache.slots(ids[0])
    cache.truncate(ids[0], 17)
    rows = cache.pages.view(2, -1, cache.config.latent_dim)
    assert (rows[:, slots[32:]] == 0).all()
    assert (rows[:, slots[:17]] == 7).all()
    cache.release(ids)
    assert (cache.pages == 0).all()


def test_kv_cache_and_pe_cache_are_views_of_the_pages(make_cache: Any) -> None:
    cache = make_cache()
    (sequence,) = cache.new_sequences(1)
    cache.load(sequence, *latents(cache, 16))
    page = cache.slots(sequence)[0].item() // 16
    for view, kept in zip((cache.kv_cache, cache.pe_cache), cache.read(sequence), strict=True):
        assert torch.equal(view[0, page], kept)
        assert view.untyped_storage().data_ptr() == cache.pages.untyped_storage().data_ptr()


def test_a_full_cache_changes_nothing(make_cache: Any) -> None:
    cache = make_cache(80)
    ids = cache.new_sequences(3)
    cache.load(ids[0], *latents(cache, 20))
    batch = cache.extend(ids[1:], [1, 1])
    before = snapshot(cache, ids)
    with pytest.raises(CacheFull, match=r"1 free pages of 16 tokens and this step needs 3"):
        cache.extend(ids, [13, 17, 16])  # one page each, which any of them alone would get
    assert snapshot(cache, ids) == before
    with pytest.raises(CacheFull):
        cache.load(cache.new_sequences(1)[0], *latents(cache, 17))
    assert snapshot(cache, ids) == before
    batch.check_current()
    assert cache.extend(ids, [12, 15, 15]).kv_lens == (32, 16, 16)  # what is left fits to the last slot


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.of_layer(4), "no layer 4: it has 1, numbered from 0"),
        (lambda cache: cache.read(0, -1), "no layer -1: it has 1, numbered from 0"),
        (lambda cache: cache.new_sequences(-1), r"new_sequences\(\) takes a count from 0 on, got -1"),
        (lambda cache: LatentCache(cache.config, max_tokens=3, dtype=torch.int8), "floating-point one"),
        (lambda cache: LatentCache(cache.config, max_tokens=3, dtype="bf16"), "got 'bf16'"),
        (lambda cache: LatentCache("v3", max_tokens=64), r"config must be an MLAConfig, as .*, got 'v3'\."),
        (lambda cache: cache.extend([0, 1], [1]), "got 2 sequences and 1 query_lens"),
        (lambda cache: cache.extend([0, 1], [1, -1]), "must not be negative, got -1"),
        (lambda cache: cache.extend([0, 0], [1, 1]), "only once"),
        (lambda cache: cache.extend([9], [1]), "no sequence 9"),
        (lambda cache: cache.truncate(0, 9), "cannot truncate a sequence of 5 tokens to 9"),
        (lambda cache: cache.load(0, *latents(cache, 2)), "got 2 tokens for a sequence of 5"),
    ],
)
def test_what_a_cache_cannot_be_asked_is_refused_by_sentence(
    tiny: Any, shared: bool, call: Callable[[LatentCache], Any], message: str
) -> None:
    cache = shared_or_not(tiny, shared)
    with pytest.raises(ValueError, match=message):
        call(cache)


def test_extending_again_after_truncate_takes_the_same_pages(make_cache: Any) -> None:
    cache = make_cache(256, shuffle=5)
    ids = cache.new_sequences(2)
    cache.extend(ids, [70, 20])
    slots = cache.slots(ids[0])
    for length in (64, 17, 0):
        cache.truncate(ids[0], length)
        assert torch.equal(cache.slots(ids[0]), slots[:length])
        cache.extend([ids[0]], [70 - length])
        assert torch.equal(cache.slots(ids[0]), slots)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"page_size": 48}, "power of two, got 48"),
        ({"page_size": 0}, "power of two"),
        ({"max_tokens": 0}, "must be positive"),
        ({"num_layers": 0}, "must be positive"),
        ({"page_size": True}, "power of two, got True"),
        ({"page_size": 16.0}, "power of two, got 16.0"),
        ({"max_tokens": 64.5}, "whole numbers"),
    ],
)
def test_sizes_that_make_no_cache_are_refused(make_cache: Any, kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(**kwargs)


def test_shuffle_hands_pages_out_in_another_order(make_cache: Any) -> None:
    orders = []
    for shuffle in (None, 1, 1, 2):
        cache = make_cache(64 * 16, shuffle=shuffle)
        ids = cache.new_sequences(1)
        cache.extend(ids, [64 * 16])
        orders.append(cache.slots(ids[0]).tolist())
    assert orders[0] == list(range(64 * 16))
    assert orders[1] == orders[2] != orders[0]
    assert orders[3] not in orders[:3]
    assert all(sorted(order) == orders[0] for order in orders)


def test_a_block_table_that_is_used_again_names_the_pages_of_now(make_cache: Any) -> None:
    cache = make_cache(256, 16)
    a, b = cache.new_sequences(2)
    first = cache.extend([a, b], [15, 40]).block_table
    assert torch.equal(cache.extend([a, b], [1, 1]).block_table, first)  # no page changed
    swapped = cache.extend([b, a], [1, 0]).block_table
    assert torch.equal(swapped, first.flip(0))
    cache.extend([a, b], [0, 1])
    cache.truncate(b, 10)  # two pages fewer: they may be somebody else's now
    assert cache.extend([a, b], [0, 1]).block_table.shape == (2, 1)
    (c,) = cache.new_sequences(1)
    cache.extend([c], [30])
    table = cache.extend([a, b, c], [1, 10, 1]).block_table
    for row, sequence in enumerate((a, b, c)):
        slots = cache.slots(sequence)
        assert table[row, : len(slots[::16])].tolist() == (slots[::16] // 16).tolist()


def test_a_copy_that_does_not_fit_leaves_no_sequence(make_cache: Any) -> None:
    cache = make_cache(max_tokens=16, page_size=4)
    (sequence,) = cache.new_sequences(1)
    cache.extend([sequence], [9])
    with pytest.raises(CacheFull, match="1 free pages of 4 tokens and this step needs 3"):
        cache.copy(sequence, cache)
    assert cache.sequences == [sequence]


def everything(cache: Any) -> tuple[Any, ...]:
    """Return all that a cache says of itself."""
    lengths = {sequence: cache.length(sequence) for sequence in (0, 1)}
    return cache.generation, lengths, cache.free_pages, cache.sequences, cache.pages.clone().view(torch.int32)


def shared_or_not(tiny: Any, shared: bool) -> Any:
    arguments = {"max_tokens": 512, "page_size": 16, "dtype": torch.float32}
    made: Any = ShardedCache(tiny(), Share(0, 2), **arguments) if shared else LatentCache(tiny(), **arguments)
    made.new_sequences(2)
    made.extend([0], [5])
    return made


@pytest.mark.parametrize("shared", [False, True])
def test_what_raises_changes_nothing(tiny: Any, shared: bool) -> None:
    cache = shared_or_not(tiny, shared)
    kv, pe = torch.randn(7, tiny().kv_lora_rank), torch.randn(7, tiny().qk_rope_head_dim)
    fake = FakeTensorMode().from_tensor
    wrong: dict[str, Any] = {
        "lengths of fractions": lambda: cache.extend([0, 1], [1, 1.5]),
        "a tensor of fractions": lambda: cache.extend([0, 1], torch.ones(2)),
        "a length": lambda: cache.extend([0], 1),
        "text": lambda: cache.extend([0, 1], ["1", "1"]),
        "no number": lambda: cache.extend([0, 1], [1, None]),
        "a negative length": lambda: cache.extend([0, 1], [1, -1]),
        "an unknown sequence": lambda: cache.extend([0, 7], [1, 1]),
        "a sequence twice": lambda: cache.extend([0, 0], [1, 1]),
        "too few lengths": lambda: cache.extend([0, 1], torch.ones(1, dtype=torch.int32)),
        "too many tokens": lambda: cache.extend([0, 1], [1, 10**12]),
        "pe elsewhere": lambda: cache.load(1, kv, pe.to("meta")),
        "kv elsewhere": lambda: cache.load(1, kv.to("meta"), pe),
        "a fake pe": lambda: cache.load(1, kv, fake(pe)),
        "a complex kv": lambda: cache.load(1, kv.cfloat(), pe),
        "integers": lambda: cache.load(1, kv.long(), pe),
        "a sparse kv": lambda: cache.load(1, kv.to_sparse(), pe),
        "another length": lambda: cache.load(1, kv, pe[1:]),
        "a wrong width": lambda: cache.load(1, kv[:, 1:], pe),
        "a list": lambda: cache.load(1, kv.tolist(), pe),
        "no tensor": lambda: cache.load(1, kv, None),
        "an unknown layer": lambda: cache.load(1, kv, pe, layer=1),
        "a part of a layer": lambda: cache.load(1, kv, pe, layer=0.5),
        "a longer sequence": lambda: cache.load(0, kv, pe),
        "half a token": lambda: cache.truncate(0, 2.5),
        "no length": lambda: cache.truncate(0, -1),
        "a length to come": lambda: cache.truncate(0, 6),
        "a list of sequences": lambda: cache.release([0, "1"]),
    }
    if not shared:
        wrong["a wide table"] = lambda: cache.extend([0], [1], table_tokens=10**18)
        wrong["half a table"] = lambda: cache.extend([0], [1], table_tokens=10.5)
    before = everything(cache)
    for name, call in wrong.items():
        with pytest.raises((ValueError, CacheFull, *([RuntimeError] if name == "a wide table" else []))):
            call()
        *facts, pages = everything(cache)
        assert facts == list(before[:-1]), name
        assert torch.equal(pages, before[-1]), name


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("of", [np.array, torch.tensor, lambda values: tuple(map(np.int64, values))])
def test_lengths_are_integers_of_any_kind(tiny: Any, shared: bool, of: Any) -> None:
    cache, plain = (shared_or_not(tiny, shared) for _ in range(2))
    for new in ([1, 1], [3, 20]):
        batch, expected = cache.extend(of([0, 1]), of(new)), plain.extend([0, 1], new)
        assert batch.query_lens == expected.query_lens
        assert batch.kv_lens == expected.kv_lens
        assert all(type(length) is int for length in (*batch.query_lens, *batch.kv_lens))
        assert torch.equal(batch.slots, expected.slots)
    cache.truncate(of([0])[0], of([2])[0])
    cache.release(of([1]))
    assert cache.length(0) == 2


def test_history_in_another_dtype_or_negated_is_stored_as_its_values(tiny: Any) -> None:
    cache = shared_or_not(tiny, False)
    kv, pe = torch.randn(7, tiny().kv_lora_rank), torch.randn(7, tiny().qk_rope_head_dim, requires_grad=True)
    cache.load(1, torch._neg_view(kv), pe.double())
    assert not cache.pages.requires_grad
    assert torch.equal(torch.cat(cache.read(1), 1), torch.cat((-kv, pe), 1))


def test_sizes_are_integers_of_any_kind(make_cache: Any) -> None:
    cache = make_cache(max_tokens=np.int64(64), page_size=torch.tensor(16), num_layers=np.int32(2))
    assert cache.pages.shape[:3] == (2, 4, 16)
    assert cache.extend(cache.new_sequences(1), [20]).block_table.tolist() == [[0, 1]]


@pytest.mark.parametrize("new", [[1, 1], [40, 0], [200, 1]])
@pytest.mark.parametrize("fault", ["BatchMemory.fill", "upload_into"])
def test_a_step_that_cannot_be_described_leaves_lengths_as_they_were(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, new: list[int], fault: str
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    cache, size = shared_or_not(tiny, False), 16
    before = [cache.length(sequence) for sequence in (0, 1)]
    with monkeypatch.context() as broken:
        broken.setattr(f"mla.cache.ragged_batch.{fault}", fail)
        with pytest.raises(MemoryError):
            cache.extend([0, 1], new)
    assert [cache.length(sequence) for sequence in (0, 1)] == before
    assert all(map(torch.equal, cache.read(cache.copy(0, cache)), cache.read(0)))
    batch = cache.extend([0, 1], [1, 1])
    for request, length in enumerate(before):
        page = batch.block_table_host[request, length // size]
        assert batch.slots[request] == page * size + length % size


def test_a_cache_shows_its_pages_and_how_full_they_are(make_cache: Any) -> None:
    cache = make_cache(64, 16, num_layers=2)
    cache.extend(cache.new_sequences(2), [17, 1])
    shape = list(cache.pages.shape)
    assert repr(cache) == (
        f"LatentCache(pages={shape} torch.float32 on cpu, sequences=2, tokens=18, free_pages=1)"
    )
