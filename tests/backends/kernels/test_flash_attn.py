"""The `flash_attn_varlen_func` adapter on fakes of three releases, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_backends.kernels import FlashAttnVarlen, VarlenLimits

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
        results, truth = run_expanded(RELEASES[release](), query_lens, kv_lens, causal=causal, heads=heads)
        if sum(query_lens):
            assert_right(results, truth)


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
    installed: Any, check_layer: Any, release: str
) -> None:
    with installed(release):
        check_layer("expanded_attention", RELEASES[release])
