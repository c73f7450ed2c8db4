"""Index keys in the cache: in every operation, in pages of their own under the block table of the latents."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from mla import MLA, LatentCache, MLAConfig
from mla.errors import CacheFormatError

D = 20
LAYERS = ("full", "shared", "full")
History = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def model(tiny: Any) -> MLAConfig:
    return tiny(q_lora_rank=24, index_topk=8, index_n_heads=2, index_head_dim=D, indexer_types=LAYERS)


@pytest.fixture(scope="module")
def make(model: MLAConfig) -> Callable[..., LatentCache]:
    def cache(max_tokens: int = 64, page_size: int = 4, **kwargs: Any) -> LatentCache:
        given = {"dtype": torch.float32, "num_layers": 3, "shuffle": 5, **kwargs}
        return LatentCache(model, max_tokens=max_tokens, page_size=page_size, **given)

    return cache


def history(config: MLAConfig, count: int, seed: int) -> History:
    draw = torch.Generator().manual_seed(seed)
    widths = (config.kv_lora_rank, config.qk_rope_head_dim, D)
    kv, pe, index = (torch.randn(count, width, generator=draw) for width in widths)
    return kv, pe, index


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("index_format", ["", "plain", "fp8"])
def test_layers_with_an_indexer_have_index_pages_and_others_none(
    make: Any, page_size: int, index_format: str
) -> None:
    cache = make(256, page_size, index_format=index_format)
    width, dtype = (D + 4, torch.uint8) if index_format == "fp8" else (D, torch.float32)
    assert cache.index_pages.shape == (2, cache.num_pages, page_size, width)
    assert cache.index_pages.dtype == dtype
    assert cache.index_layers == (0, 2)
    ids, stored = cache.new_sequences(3), {}
    for sequence, count in zip(ids, (65, 1, 16), strict=True):
        for layer in range(3):
            kv, pe, index = stored[sequence, layer] = history(cache.config, count, 9 * sequence + layer)
            cache.load(sequence, kv, pe, layer, index=index if layer != 1 else None)
    for (sequence, layer), (kv, pe, index) in stored.items():
        assert all(map(torch.equal, cache.read(sequence, layer), (kv, pe)))
        pages, index_pages = cache.of_layer(layer)
        assert pages.data_ptr() == cache.pages[layer].data_ptr()
        stored_keys = cache.read_index(sequence, layer)
        if layer == 1:
            assert index_pages is stored_keys is None
            continue
        assert index_pages.data_ptr() == cache.index_pages[layer // 2].data_ptr()
        bound = 2.0**-4 * index.abs() + 2.0**-10 if index_format == "fp8" else torch.zeros(())
        assert ((stored_keys - index).abs() <= bound).all()


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_bytes_of_a_page_are_all_values_and_then_all_scales(make: Any, page_size: int) -> None:
    """Parsed here by hand, as DeepGEMM and vLLM lay a page out."""
    cache = make(64, page_size, index_format="fp8")
    (sequence,) = cache.new_sequences(1)
    kv, pe, index = history(cache.config, 13, 1)
    cache.load(sequence, kv, pe, index=index * torch.logspace(-6, 3, 13)[:, None])
    stored_keys = cache.read_index(sequence)
    for token, slot in enumerate(cache.slots(sequence).tolist()):
        page = bytes(cache.index_pages[0, slot // page_size].flatten().tolist())
        place, values = slot % page_size, page_size * D
        codes = torch.frombuffer(bytearray(page[place * D : (place + 1) * D]), dtype=torch.float8_e4m3fn)
        four = bytearray(page[values + 4 * place : values + 4 * place + 4])
        scale = torch.frombuffer(four, dtype=torch.float32)
        assert torch.equal(codes.float() * scale, stored_keys[token])
        assert torch.frexp(scale)[0] == 0.5  # a power of two


@pytest.mark.parametrize("index_format", ["", "fp8"])
def test_freed_index_pages_are_zero_and_kept_ones_keep_their_keys(make: Any, index_format: str) -> None:
    cache = make(index_format=index_format)
    first, second = cache.new_sequences(2)
    for sequence in (first, second):
        kv, pe, index = history(cache.config, 11, sequence)
        cache.load(sequence, kv, pe, index=index)
    kept, other = cache.read_index(first)[:5], cache.read_index(second)
    dropped = cache.slots(first)[8:] // cache.page_size
    cache.truncate(first, 5)
    assert torch.equal(cache.read_index(first), kept)
    assert torch.equal(cache.read_index(second), other)
    assert not cache.index_pages[:, dropped].any()
    cache.release([first, second])
    assert not cache.index_pages.any()


def test_a_load_that_does_not_fit_changes_nothing(make: Any, tiny: Any) -> None:
    cache = make()
    (sequence,) = cache.new_sequences(1)
    kv, pe, index = history(cache.config, 6, 1)
    for keys, message in (
        (None, r"load\(\) takes index \[s, 20\] of floating-point numbers, got NoneType"),
        (index[:5], r"index must be \[6, 20\] .* got \[5, 20\]"),
        (index[:, :8], r"got \[6, 8\]"),
        (index.int(), r"takes index \[s, 20\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.load(sequence, kv, pe, index=keys)
    with pytest.raises(ValueError, match=r"index keys of a layer without an indexer: leave index= out"):
        cache.load(sequence, kv, pe, 1, index=index)
    dense = LatentCache(tiny(), max_tokens=8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"index keys of a layer without an indexer: leave index= out"):
        dense.load(dense.new_sequences(1)[0], kv, pe, index=index)
    assert (cache.length(sequence), cache.free_pages, cache.generation) == (0, 16, 0)
    assert not cache.pages.any()
    assert dense.index_pages.numel() == 0
    assert dense.read_index(0) is None
    with pytest.raises(CacheFormatError, match="unknown index format 'fp9'"):
        make(index_format="fp9")
    for made in (MLA, partial(LatentCache, max_tokens=8)):
        with pytest.raises(CacheFormatError, match="no index keys: leave index_format out"):
            made(tiny(), dtype=torch.float32, index_format="fp8")
    specs = MLA(cache.config, dtype=torch.float32, index_format="plain").ops["select_latents"].spec
    assert specs.index_format == make(index_format="plain").index_format == ""


def test_copies_and_what_is_printed(make: Any) -> None:
    cache = make(index_format="fp8")
    (sequence,) = cache.new_sequences(1)
    kv, pe, index = history(cache.config, 6, 1)
    cache.load(sequence, kv, pe, index=index)
    keys = cache.read_index(sequence)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(other.read_index(sequence), keys)
        other.truncate(sequence, 0)
    assert torch.equal(cache.read_index(sequence), keys)
    cache.read_index(sequence).zero_()
    assert torch.equal(cache.read_index(sequence), keys)
    again = cache.new_sequences(1)[0]
    cache.load(again, *cache.read(sequence), index=keys)
    assert torch.equal(cache.read_index(again), keys)  # bytes of powers of two come back as they were
    assert "torch.float32 + 24 of 2 indexers on cpu" in repr(cache)
