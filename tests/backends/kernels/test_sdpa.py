"""torch's own attention behind the contract, against float64 and inside a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from float64_attention import attend_segments
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import MLA, LatentCache, MLAConfig
from mla.errors import UnsupportedBatch
from mla.weights import random_state_dict
from mla_backends.api import AttentionSpec, SegmentLengths
from mla_backends.kernels import SdpaExpanded
from mla_backends.testing import HostBackend

CPU = torch.device("cpu")
SPEC = AttentionSpec(3, 32, 16, 8, 12, 0.3, torch.float32, CPU)
Segments = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(Segments, st.booleans(), st.booleans(), st.integers(0, 99))
def test_it_is_right_whatever_the_segments(segments: Any, causal: bool, pads: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = SegmentLengths(*(tuple(side) for side in zip(*segments, strict=True)), causal)
    tokens, keys = sum(lengths.query_lens), sum(lengths.kv_lens)
    q, k = (torch.randn(count, 3, 24, generator=generator) for count in (tokens, keys))
    v = torch.randn(keys, 3, 20, generator=generator)[..., 8:]
    out, lse = torch.full((tokens, 3, 12), torch.nan), torch.zeros(tokens, 3)
    op = SdpaExpanded(pads_values=pads)
    assert op.unsupported_reasons(SPEC) == []
    op(op.prepare(SPEC, lengths), q=q, k=k, v=v, softmax_scale=0.3, out=out, lse=lse)
    queries, segments = list(lengths.query_lens), list(lengths.kv_lens)
    pieces = zip(q.split(queries), k.split(segments), v.split(segments), strict=True)
    truth, _ = attend_segments(pieces, 0.3, causal)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    assert lse.isnan().all()


def test_a_layer_runs_on_it_and_refuses_to_merge_without_sums() -> None:
    config = MLAConfig(hidden_size=48, num_attention_heads=3, kv_lora_rank=32)
    backend = HostBackend(ops={"sdpa": SdpaExpanded(pads_values=True)})
    state = random_state_dict(config, dtype=torch.float32)
    outputs = []
    for made in (backend, None):
        layer = MLA(config, backend=made, dtype=torch.float32, attention="expanded")
        layer.load_state_dict(state)
        cache = LatentCache(config, max_tokens=512, dtype=torch.float32, device=CPU)
        batch = cache.extend(cache.new_sequences(3), [70, 1, 33])
        hidden = torch.randn(104, 48, generator=torch.Generator().manual_seed(3))
        outputs.append(layer(hidden, batch, cache.pages[0]))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    tight = MLA(config, backend=backend, dtype=torch.float32, attention="expanded", workspace_bytes=1 << 14)
    tight.load_state_dict(state)
    cache = LatentCache(config, max_tokens=512, dtype=torch.float32, device=CPU)
    batch = cache.extend(cache.new_sequences(1), [70])
    with pytest.raises(UnsupportedBatch, match="'sdpa' returns no log-sum-exp"):
        tight.plan(batch)
