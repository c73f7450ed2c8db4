"""Selections in fixed shapes, as on a device, and the bytes of index keys: drawn cases have the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla.cache.formats import IndexFp8, find_format, index_codec, index_keys
from mla.cases.case import OpCase
from mla.cases.memory import Layout
from mla.cases.played import Laid
from mla.errors import CacheFormatError
from mla.reference import REFERENCE, sparse
from mla_backends.api import IndexerSpec


@pytest.mark.parametrize("bytes_at_once", [1, 1 << 20])
@pytest.mark.parametrize(("queries", "kv_lens"), [(1, (40, 3, 17)), (2, (33, 2, 70)), (3, (9, 3))])
@pytest.mark.parametrize("index_format", ["", "fp8"])
def test_a_decode_step_on_a_device_follows_lengths_that_were_not_planned(
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    kv_lens: tuple[int, ...],
    index_format: str,
    bytes_at_once: int,
) -> None:
    """Its launches are the same whatever the lengths, and what a request does not own is NaN."""
    monkeypatch.setattr(sparse, "LOGITS_BYTES", bytes_at_once)
    op, new = REFERENCE["select_latents"], (queries,) * len(kv_lens)
    for topk in (1, 5, 16, 70):
        stored = {"index_format": index_format, "token_bytes": 12} if index_format else {}
        spec = IndexerSpec(3, 8, 4, topk, torch.float32, torch.device("cpu"), **stored)
        layout = Layout(4, shuffle=1, unowned=torch.nan)
        cases = (OpCase("select_latents", spec, new, lens, layout=layout) for lens in (new, kv_lens))
        planned, call = (Laid(case, op) for case in cases)
        batch = planned.pool.entry.batch(planned.arguments, planned.case.lengths)
        state = op.prepare(replace(spec, device=torch.device("meta")), batch)
        assert state.graph_safe
        assert call.call(None, (state,)) == ""


def test_bytes_of_a_page_are_all_values_and_then_all_scales() -> None:
    codec, page = IndexFp8(8), 4
    keys = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1.0], [1e4]]
    )
    cache = torch.zeros(2, page, codec.token_bytes, dtype=torch.uint8)
    codec.write(cache, torch.tensor([1, 6, 3]), keys)
    scales = cache.view(2, -1)[:, page * 8 :].contiguous().view(torch.float32)
    for slot, key in zip((1, 6, 3), keys, strict=True):
        scale = scales[slot // page, slot % page]
        assert scale == 2.0 ** torch.ceil(torch.log2(key.abs().max().clamp_min(1e-4) / 448))
        codes = cache.view(2, -1)[slot // page, slot % page * 8 :][:8].view(torch.float8_e4m3fn)
        assert torch.equal(codes.float(), (key / scale).to(torch.float8_e4m3fn).float())
    back = index_keys(cache, codec).view(-1, 8)[[1, 6, 3]]
    assert torch.equal(back, codec.decode(codec.rows(cache).flatten(0, 1)[[1, 6, 3]])[0])
    assert ((back - keys).abs() <= keys.abs() * codec.relative / 2 + codec.least).all()


def test_an_unknown_index_format_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown index format 'fp9'.*Formats: plain, fp8"):
        index_codec("fp9", 128)
    for other in (8, ["fp8"], b"fp8"):
        with pytest.raises(CacheFormatError, match=r"unknown index format .* Formats: plain, fp8\.$"):
            index_codec(other, 128)  # type: ignore[arg-type]
        with pytest.raises(CacheFormatError, match=r"unknown cache format .* Formats: bf16"):
            find_format(other)  # type: ignore[arg-type]
