"""Formats of the cache at every level: bytes are the codec's, and attention is over what they decode to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import BF16, angles, check_attention, draw, latent_case

from mla.cache.formats import FORMATS, find_format
from mla_backend_cpu.library import Library
from mla_backend_cpu.native_ops import CACHE_FORMATS, NativeLatentAttention, NativeWriteLatent, layout_of

formats = st.sampled_from(["fp8", "fp8:0.03", "fp8_ds_mla", "fp8_ds_mla_any", "int8", "q8_0"])
seeds = st.integers(0, 99)


def write(kernels: Library, kv_a: torch.Tensor, cache: torch.Tensor, cache_format: str) -> None:
    """Write rows [t, c + 32] to the first slots of a cache."""
    tokens, width = kv_a.shape
    NativeWriteLatent(kernels)(
        kv_a=kv_a,
        weight=draw(width - 32).exp(),
        eps=1e-6,
        cos_sin=angles(tokens, 32),
        interleaved=False,
        slots=torch.arange(tokens),
        cache=cache,
        cache_format=cache_format,
    )


def test_every_format_of_the_library_is_known_and_no_other() -> None:
    """A format that is added must be decided upon."""
    plain = {"bf16", "fp16", "fp32"}
    assert {*FORMATS} - plain == {name for name in CACHE_FORMATS if ":" not in name}
    for name in sorted(CACHE_FORMATS):
        for c, r in ((512, 64), (160, 96)):
            assert (
                layout_of(name.strip(":"), c, r).bytes == find_format(name.strip(":")).codec(c, r).token_bytes
            )


@settings(max_examples=15, deadline=None)
@given(formats, st.sampled_from([512, 128, 160, 96]), st.integers(1, 40), seeds)
def test_stored_bytes_are_those_of_the_codec(
    kernels: Library, cache_format: str, latent: int, tokens: int, seed: int
) -> None:
    codec = find_format(cache_format).codec(latent, 32)
    kv_a = draw(tokens, latent + 32, seed=seed)
    kv_a[:, latent:] *= (8 * draw(tokens, 1, seed=seed + 1)).exp()  # the norm keeps other sizes away
    kv_a[::5, latent:] = 0
    kv_a[::7, :latent] = 0
    kv_a[3::11, latent // 2] = 1e4  # the others of its scale are denormal or zero
    plain = torch.zeros(2, 32, latent + 32, dtype=BF16)
    cache = torch.full((2, 32, codec.token_bytes), 0xA5, dtype=torch.uint8)
    write(kernels, kv_a, plain, "")
    write(kernels, kv_a, cache, cache_format)
    latents, keys = plain.view(64, -1)[:tokens].split((latent, 32), dim=1)
    assert torch.equal(cache.view(64, -1)[:tokens], codec.encode(latents, keys))
    assert (cache.view(64, -1)[tokens:] == 0xA5).all()


@pytest.mark.parametrize("cache_format", ["fp8:0.03", "fp8_ds_mla_any", "int8", "q8_0"])
def test_every_code_is_decoded(kernels: Library, cache_format: str) -> None:
    """A request with one key returns its value; nobody writes -128, but it may be read."""
    codec = find_format(cache_format).codec(256, 32)
    case = latent_case([1], [1], 1, page_size=1, latent=256).stored(cache_format)
    row = case.cache[case.table[0, 0].long()].view(-1)
    at = 2 if cache_format == "q8_0" else 0
    block = 32 if cache_format == "q8_0" else 256
    for i in range(256 // block):
        codes = torch.arange(i * block, (i + 1) * block, dtype=torch.uint8)
        row[i * (block + at) + at :][:block] = codes
    value, _ = codec.decode(row[None])
    out, _ = case.run(NativeLatentAttention(kernels))
    if out.isnan().any():  # the score of a key with a NaN is one
        row[torch.tensor([127, 255])] = 0
        assert out.isnan().all()
        assert value.isnan().nonzero()[:, 1].tolist() == [127, 255]
        value, _ = codec.decode(row[None])
        out, _ = case.run(NativeLatentAttention(kernels))
    torch.testing.assert_close(out[0].float(), value.to(BF16).float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("cache_format", ["fp8_ds_mla", "int8", "q8_0"])
def test_scales_of_an_earlier_call_do_not_matter(kernels: Library, cache_format: str) -> None:
    """Keys are multiplied by groups, of which the last ones may hold what there was: NaN."""
    attention = NativeLatentAttention(kernels)
    before = latent_case([1], [600], 16, latent=256).stored(cache_format)
    before.cache.fill_(0xFF)
    for keys in (1, 17, 40, 270):
        before.run(attention)
        check_attention(latent_case([2], [keys + 1], 9, latent=256).stored(cache_format), attention)


def test_a_cache_of_another_format_is_refused(kernels: Library) -> None:
    case = latent_case([1], [20], latent=128).stored("int8")
    for name, cache, message in (
        ("fp8", case.cache, r"cache must be"),
        ("int8", case.cache.view(torch.int8), r"cache must be"),
        ("int4", case.cache, "the native ops do not know the cache format 'int4'"),
        ("", case.cache, r"cache must be"),
    ):
        with pytest.raises(ValueError, match=message):
            write(kernels, draw(2, 160), cache, name)
