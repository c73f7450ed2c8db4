"""A layer over a quantised cache: both paths attend what is stored, and stored bytes are only copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla import MLA, LatentCache, MLAConfig
from mla.cache.formats import codec_of
from mla.errors import UnsupportedOps
from mla.reference import REFERENCE
from mla.weights import random_state_dict
from mla_backends.api import FusedOp
from mla_backends.testing import HostBackend

CONFIG = MLAConfig(
    hidden_size=96,
    num_attention_heads=3,
    kv_lora_rank=160,  # a tile and a part of one
    qk_rope_head_dim=32,
    qk_nope_head_dim=24,
    v_head_dim=20,
    q_lora_rank=None,
)
FORMATS = ["fp8", "fp8:0.5", "fp8_ds_mla", "fp8_ds_mla_any", "int8", "q8_0", "bf16"]
FP32 = torch.float32
STATE = random_state_dict(CONFIG, 0, FP32)


def layer(**arguments: Any) -> MLA:
    made = MLA(CONFIG, dtype=FP32, **arguments)
    made.load_state_dict(STATE)
    return made


def cache(name: str | None, tokens: int = 400) -> LatentCache:
    return LatentCache(CONFIG, max_tokens=tokens, page_size=16, dtype=FP32, cache_format=name, shuffle=1)


class Rounding(FusedOp):
    """Writes plain numbers, rounded as a format does."""

    contract = "write_latent/1"

    def __init__(self, name: str) -> None:
        codec = codec_of(name, CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim)
        assert codec is not None
        self.codec = codec

    def __call__(self, *, cache: torch.Tensor, slots: torch.Tensor, **operands: Any) -> None:
        REFERENCE["write_latent"](cache=cache, slots=slots, **operands)
        flat = cache.flatten(0, 1)
        rows = flat[slots].split((CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim), dim=1)
        flat[slots] = torch.cat(self.codec.decode(self.codec.encode(*rows)), dim=1)


@pytest.mark.parametrize("attention", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", FORMATS)
def test_paths_attend_what_is_stored(name: str, attention: str) -> None:
    """The outputs are those of a plain cache that holds the decoded latents, of old and new tokens."""
    small = {"workspace_bytes": 40_000} if attention == "expanded" else {}  # several rounds
    stored = layer(attention=attention, cache_format=name, **small)
    plain = layer(attention=attention, backend=HostBackend(ops={"rounding": Rounding(name)}), **small)
    caches = cache(name), cache(None)
    draw = torch.Generator().manual_seed(1)
    history = [torch.randn(70, width, generator=draw) * 3 for width in (160, 32)]
    ids = [each.new_sequences(2) for each in caches]
    caches[0].load(ids[0][0], *history)
    caches[1].load(ids[1][0], *caches[0].read(ids[0][0]))
    for new in ((20, 45), (1, 1)):
        hidden = torch.randn(sum(new), 96, generator=draw)
        outputs = [
            each(hidden, held.extend(of, new), held.pages[0])
            for each, held, of in zip((stored, plain), caches, ids, strict=True)
        ]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for sequence in range(2):
        for kept, same in zip(
            *(held.read(of[sequence]) for held, of in zip(caches, ids, strict=True)), strict=True
        ):
            torch.testing.assert_close(kept, same, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_only_copied(name: str) -> None:
    """Truncating, extending and releasing other sequences leave the bytes of a prefix as they were."""
    held, draw = cache(name, tokens=96), torch.Generator().manual_seed(2)
    rows = [torch.randn(40, width, generator=draw) for width in (160, 32)]
    first, other = held.new_sequences(2)
    held.load(first, *rows)
    held.load(other, *rows)
    assert held.pages.dtype == torch.uint8
    codec = codec_of(held.cache_format, 160, 32)
    assert codec is not None
    assert torch.equal(held.pages[0].flatten(0, 1)[held.slots(first)], codec.encode(*rows))
    kept = held.pages[0].flatten(0, 1)[held.slots(first)][:20].clone()
    held.truncate(first, 20)
    held.release([other])
    held.extend([first], [30])
    assert torch.equal(held.pages[0].flatten(0, 1)[held.slots(first)][:20], kept)
    assert not held.pages[0].flatten(0, 1)[held.slots(first)][32:].any(), "freed pages are zeros"
    with pytest.raises(RuntimeError, match=rf"bytes of {name}: read\(\) decodes them"):
        _ = held.kv_cache


def test_a_format_of_the_layer_s_dtype_is_the_plain_cache() -> None:
    assert cache("fp32").pages.dtype == FP32
    assert layer(cache_format="fp32").ops["latent_attention"].spec.cache_format == ""


def test_pages_of_another_format_are_refused() -> None:
    held = cache("int8")
    batch = held.extend(held.new_sequences(1), [2])
    with pytest.raises(ValueError, match=r"pages of fp8 must be .* got \[25, 16, 200\] torch.uint8"):
        layer(cache_format="fp8")(torch.zeros(2, 96), batch, held.pages[0])
    with pytest.raises(ValueError, match=r"pages must be \[25, 16, 192\] torch.float32, got .* torch.uint8"):
        layer()(torch.zeros(2, 96), batch, held.pages[0])


class Plain(FusedOp):
    """An attention of version 1."""

    contract = "latent_attention/1"

    def prepare(self, spec: Any, batch: Any) -> Any:
        return REFERENCE["latent_attention"].prepare(spec, batch)

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        REFERENCE["latent_attention"](*leading, **tensors)


class Claims(Plain):
    contract = "latent_attention/2"
    cache_formats = ("fp8:", "int8")


def test_an_op_serves_the_formats_it_claims() -> None:
    """The reference serves what none claims, and says why, unless an op is required."""
    backend = HostBackend(ops={"old": Plain(), "new": Claims()})

    def chosen(name: str | None, **more: Any) -> Any:
        return layer(backend=backend, cache_format=name, **more).ops["latent_attention"]

    assert chosen(None).name == "old"
    assert (chosen("int8").name, chosen("fp8:0.5").name) == ("new", "new")
    refused = chosen("q8_0")
    assert refused.name == "reference"
    assert refused.reasons == (
        "fused op 'old' not used because it does not know the cache format 'q8_0': it claims none in "
        "addition to the layer's dtype",
        "fused op 'new' not used because it does not know the cache format 'q8_0': it claims only fp8:, int8 "
        "in addition to the layer's dtype",
    )
    with pytest.raises(UnsupportedOps, match="does not know the cache format 'q8_0'"):
        chosen("q8_0", ops="new")


def test_a_claim_that_is_a_string_is_one_name() -> None:
    """And not all names that are a part of it."""
    careless = Plain()
    careless.contract, careless.cache_formats = "latent_attention/2", "fp8_ds_mla"
    backend = HostBackend(ops={"careless": careless})
    assert layer(backend=backend, cache_format="fp8_ds_mla").ops["latent_attention"].name == "careless"
    assert layer(backend=backend, cache_format="fp8").ops["latent_attention"].name == "reference"
