"""torch's own attention behind the contract, against float64 and inside a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from float64_attention import attend_segments
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import MLA, LatentCache, MLAConfig
from mla.weights import random_state_dict
from mla_backends.api import AttentionSpec, SegmentLengths
from mla_backends.kernels import SdpaExpanded, expanded
from mla_backends.testing import HostBackend

CPU = torch.device("cpu")
SPEC = AttentionSpec(3, 32, 16, 8, 12, 0.3, torch.float32, CPU)
Lengths = st.tuples(st.integers(0, 9), st.integers(0, 40)).map(lambda pair: (pair[0], sum(pair)))
Segments = st.lists(Lengths | st.tuples(st.integers(0, 9), st.just(0)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(Segments, st.booleans(), st.booleans(), st.integers(0, 99))
def test_it_is_right_whatever_the_segments(segments: Any, causal: bool, pads: bool, seed: int) -> None:
    check_segments(SdpaExpanded(pads_values=pads), segments, causal, seed)


def check_segments(op: SdpaExpanded, segments: Any, causal: bool, seed: int = 0) -> None:
    """Hold an op to the truth, with and without memory for the log-sum-exp."""
    generator = torch.Generator().manual_seed(seed)
    lengths = SegmentLengths(*(tuple(side) for side in zip(*segments, strict=True)), causal)
    tokens, keys = sum(lengths.query_lens), sum(lengths.kv_lens)
    q, k = (torch.randn(count, 3, 24, generator=generator) for count in (tokens, keys))
    v = torch.randn(keys, 3, 20, generator=generator)[..., 8:]
    out, again = (torch.full((tokens, 3, 12), torch.nan) for _ in range(2))
    lse = torch.zeros(tokens, 3)
    assert op.unsupported_reasons(SPEC) == []
    state = op.prepare(SPEC, lengths)
    op(state, q=q, k=k, v=v, softmax_scale=0.3, out=out, lse=lse)
    op(state, q=q, k=k, v=v, softmax_scale=0.3, out=again, lse=None)
    assert op.lse_optional
    assert torch.equal(out, again)
    queries, segments = list(lengths.query_lens), list(lengths.kv_lens)
    pieces = zip(q.split(queries), k.split(segments), v.split(segments), strict=True)
    truth, _ = attend_segments(pieces, 0.3, causal)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    assert lse.isnan().all()


class FirstKey(SdpaExpanded):
    """The first query of a segment with history sees the first key only, as torch's own rule has it."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(spec, batch)
        masks = [mask.tril(0) if isinstance(mask, torch.Tensor) else mask for mask in state.masks]
        return replace(state, masks=tuple(masks))


class TorchsRule(SdpaExpanded):
    """A segment with history is left to torch's own rule."""

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(spec, batch)
        return replace(state, masks=tuple(True for _ in state.masks))


@pytest.mark.parametrize("mutant", [FirstKey, TorchsRule, SdpaExpanded])
def test_the_check_fails_a_wrong_sdpa(mutant: type[SdpaExpanded], monkeypatch: pytest.MonkeyPatch) -> None:
    segments, right = [(5, 5), (3, 40), (1, 7)], expanded.padded
    check_segments(SdpaExpanded(pads_values=True), segments, causal=True)
    if mutant is SdpaExpanded:  # values are padded in front and cut behind
        monkeypatch.setattr(expanded, "padded", lambda *given: right(*given).roll(12, dims=2))
    with pytest.raises(AssertionError, match="not close"):
        check_segments(mutant(pads_values=True), segments, causal=True)


def test_values_are_padded_only_where_the_device_wants_it_and_there_is_no_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, bool]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Any, k: Any, v: Any, **rest: Any) -> torch.Tensor:
        seen.append((v.shape[-1], rest["attn_mask"] is None))
        return attention(q, k, v, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    segments = [(5, 5), (3, 40), (1, 7)]  # the second needs a mask
    for wants, width in ((True, 24), (False, 12)):
        seen.clear()
        check_segments(SdpaExpanded(pads_values=wants), segments, causal=True)
        assert seen == 2 * [(width, True), (12, False), (width, True)]


def test_values_are_not_copied_where_nobody_would_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded, "padded", None)
    check_segments(SdpaExpanded(pads_values=True), [(3, 40)], causal=True)


def test_padded_values_never_hold_what_another_call_left() -> None:
    """A longer call before, and one of another width: the zeros behind the values stay zeros."""
    op = SdpaExpanded(pads_values=True)
    for segments in ([(9, 9), (30, 30)], [(4, 4)], [(12, 12)]):
        check_segments(op, segments, causal=True)
    (held,) = op._scratch._held.values()
    assert held.shape == (39, 3, 24)
    assert not held[..., 12:].any()


def test_a_layer_runs_on_it_however_small_its_workspace() -> None:
    """It cannot merge rounds, so the second layer rebuilds more at a time than it was given for that."""
    config = MLAConfig(hidden_size=48, num_attention_heads=3, kv_lora_rank=32)
    backend = HostBackend(ops={"sdpa": SdpaExpanded(pads_values=True)})
    state = random_state_dict(config, dtype=torch.float32)
    outputs = []
    for made, workspace in ((backend, 1 << 28), (backend, 1 << 14), (None, 1 << 28)):
        layer = MLA(
            config, backend=made, dtype=torch.float32, attention="expanded", workspace_bytes=workspace
        )
        layer.load_state_dict(state)
        cache = LatentCache(config, max_tokens=512, dtype=torch.float32, device=CPU)
        batch = cache.extend(cache.new_sequences(3), [70, 1, 33])
        hidden = torch.randn(104, 48, generator=torch.Generator().manual_seed(3))
        outputs.append(layer(hidden, batch, cache.pages[0]))
    for output in outputs[:-1]:
        torch.testing.assert_close(output, outputs[-1], atol=1e-5, rtol=1e-4)
