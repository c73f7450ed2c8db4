"""The `flash_attn_varlen_func` adapter on fakes of three releases, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import MLA, LatentCache, MLAConfig
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict
from mla_backends.kernels import FlashAttnVarlen, VarlenLimits
from mla_backends.testing import HostBackend

RELEASES: dict[str, Callable[[], FlashAttnVarlen]] = {
    "flash_attn_2": FlashAttnVarlen,
    "flash_attn_2_old": FlashAttnVarlen,
    "flash_attn_3": lambda: FlashAttnVarlen(VarlenLimits(pads_values=False), module="flash_attn_interface"),
}
each_release = pytest.mark.parametrize("release", RELEASES)
segments = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 60)), min_size=1, max_size=5)


@each_release
@settings(max_examples=25, deadline=None)
@given(drawn=segments, causal=st.booleans(), heads=st.integers(1, 6))
def test_any_segments_are_right(
    installed: Any,
    run_expanded: Any,
    assert_right: Any,
    release: str,
    drawn: Any,
    causal: bool,
    heads: int,
) -> None:
    query_lens, kv_lens = [new for new, _ in drawn], [new * causal + old for new, old in drawn]
    with installed(release):
        found, truth = run_expanded(RELEASES[release](), query_lens, kv_lens, causal=causal, heads=heads)
        if sum(query_lens):
            assert_right(found, truth)


@each_release
def test_heads_dtypes_and_queries_without_keys(
    installed: Any, run_expanded: Any, assert_right: Any, release: str
) -> None:
    with installed(release):
        op = RELEASES[release]()
        for dtype in (torch.bfloat16, torch.float16):
            assert_right(*run_expanded(op, (5, 1, 20), (9, 1, 33), heads=128, dtype=dtype))
        for causal in (True, False):
            assert_right(*run_expanded(op, (2, 4, 1), (0, 2, 5), causal=causal))
            assert_right(*run_expanded(op, (2, 1), (0, 0), causal=causal))


@pytest.mark.parametrize(
    ("limits", "changes", "reason"),
    [
        (VarlenLimits(), {"dtype": torch.float32}, "it computes in bfloat16 or float16, not float32"),
        (VarlenLimits(max_width=128), {}, "it takes heads of at most 128, not 192"),
        (VarlenLimits(), {"v_head_dim": 256}, "it takes values no wider than keys, not 256 and 192"),
        (VarlenLimits(device_reason=lambda device: "it needs another chip"), {}, "it needs another chip"),
    ],
)
def test_a_layer_it_cannot_serve_is_refused(
    installed: Any, make_spec: Any, limits: VarlenLimits, changes: Any, reason: str
) -> None:
    with installed("flash_attn_2") as fakes:
        assert FlashAttnVarlen(limits).unsupported_reasons(make_spec(**changes)) == [reason]
        assert not fakes.CALLS


@each_release
def test_a_layer_on_the_adapter_is_right_in_one_round_and_in_several(
    installed: Any, tiny_config: MLAConfig, release: str
) -> None:
    config = tiny_config
    for workspace in (1 << 28, 300_000):  # the second cuts a history of 70 into rounds that are merged by lse
        with installed(release):
            backend = HostBackend(ops={"flash_attn": RELEASES[release]()})
            layer = MLA(config, backend=backend, attention="expanded", workspace_bytes=workspace)
            assert layer.ops.names()["expanded_attention"] == "flash_attn", layer.ops.explain()
            state = random_state_dict(config, 0, torch.bfloat16)
            layer.load_state_dict(state)
            cache = LatentCache(config, max_tokens=64 * 12)
            ids = cache.new_sequences(3)
            history = [(torch.randn(n, 512).bfloat16(), torch.randn(n, 64).bfloat16()) for n in (70, 0, 64)]
            for sequence, past in zip(ids, history, strict=True):
                cache.load(sequence, *past)
            hidden = torch.randn(12, 64).bfloat16()
            out = layer(hidden, cache.extend(ids, [3, 8, 1]), cache.pages[0]).double()
            truth = oracle(config, state, hidden, [3, 8, 1], history)
            assert ((out - truth).norm(dim=-1) <= 2e-2 * truth.norm(dim=-1)).all()


@pytest.fixture
def tiny_config() -> MLAConfig:
    return MLAConfig(
        name="narrow",
        hidden_size=64,
        num_attention_heads=5,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
