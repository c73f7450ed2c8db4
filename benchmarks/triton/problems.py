"""Tiny problems for every op, with the widths of DeepSeek-V3: what they launch is what a layer launches.

What kernels are specialised for (strides, alignment, heads, page sizes) is as in a layer. Lengths and numbers
of requests, which are run-time arguments, are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.triton.recording import Launch, Recorder
from mla_backends.api import AttentionSpec, FusedOp, SegmentLengths
from mla_backends.triton_ops import Tuning, triton_ops

LATENT, NOPE, VALUES, QUERY_LATENT = 512, 128, 128, 1536
KEYS = (700, 90, 300)  # of the requests
SCALE, EPS = 0.1, 1e-6
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Decode:
    """A batch for `latent_attention`."""

    heads: int
    queries: int = 1
    page: int = 64
    rope: int = 64
    dtype: torch.dtype = torch.bfloat16
    with_lse: bool = False


@dataclass(frozen=True)
class Prefill:
    """Segments for `expanded_attention`."""

    causal: bool
    heads: int = 16
    rope: int = 64
    dtype: torch.dtype = torch.bfloat16


# Name in the table -> problem. Any page size that no tile divides is compiled like 1.
DECODES = {
    "16 heads": Decode(16),
    "16 heads, page 1, lse": Decode(16, page=1, with_lse=True),
    "16 heads, fp16, no rope": Decode(16, rope=0, dtype=torch.float16),
    "16 heads, 2 new tokens": Decode(16, queries=2),
    "128 heads": Decode(128),
    "128 heads, page 1, lse": Decode(128, page=1, with_lse=True),
    "128 heads, fp16, no rope": Decode(128, rope=0, dtype=torch.float16),
    "128 heads, 2 new tokens": Decode(128, queries=2),
}
PREFILLS = {
    "causal": Prefill(True),
    "all keys, lse": Prefill(False),
    "causal, fp16, no rope": Prefill(True, rope=0, dtype=torch.float16),
}


def launches(tuning: Tuning) -> dict[str, Launch]:
    """Return by name what all problems launch with a tuning, and each small kernel once."""
    found = {}
    for name, decode in DECODES.items():
        attend, merge = _recorded(tuning, lambda ops, it=decode: _decode(ops, it))
        found[f"latent: {name}"] = attend
        found.setdefault("merge", merge)
    for name, prefill in PREFILLS.items():
        (found[f"expanded: {name}"],) = _recorded(tuning, lambda ops, it=prefill: _prefill(ops, it))
    for name, run in (("rms_norm", _norm), ("rotate_query", _rotate), ("write_latent", _write)):
        (found[name],) = _recorded(tuning, run)
    return found


def _recorded(tuning: Tuning, run: Any) -> list[Launch]:
    recorder = Recorder()
    run(triton_ops(tuning, 132, recorder))
    return recorder.recorded


def _decode(ops: dict[str, FusedOp], it: Decode) -> None:
    op = ops["triton_latent"]
    pages = [-(-keys // it.page) for keys in KEYS]
    tokens, width = it.queries * len(KEYS), LATENT + it.rope
    batch = SimpleNamespace(
        query_lens=(it.queries,) * len(KEYS),
        kv_lens=KEYS,
        page_size=it.page,
        block_table=torch.zeros(len(KEYS), max(pages) + 2, dtype=torch.int32),
        kv_lens_device=torch.tensor(KEYS, dtype=torch.int32),
        cu_q=torch.arange(len(KEYS) + 1, dtype=torch.int32) * it.queries,
    )
    state = op.prepare(_spec(it.heads, it.rope, it.dtype), batch)
    out = torch.empty(tokens, it.heads, LATENT, dtype=it.dtype)
    op(
        state,
        q=torch.empty(tokens, it.heads, width, dtype=it.dtype),
        cache=torch.empty(sum(pages), it.page, width, dtype=it.dtype),
        block_table=batch.block_table,
        kv_lens=batch.kv_lens_device,
        cu_q=batch.cu_q,
        softmax_scale=SCALE,
        out=out,
        lse=torch.empty(tokens, it.heads) if it.with_lse else None,
    )


def _prefill(ops: dict[str, FusedOp], it: Prefill) -> None:
    op, lengths = ops["triton_expanded"], SegmentLengths((512, 300), (512, 700), causal=it.causal)
    q_rows, k_rows, width = sum(lengths.query_lens), sum(lengths.kv_lens), NOPE + it.rope
    state = op.prepare(_spec(it.heads, it.rope, it.dtype), lengths)
    op(
        state,
        q=torch.empty(q_rows, it.heads, width, dtype=it.dtype),
        k=torch.empty(k_rows, it.heads, width, dtype=it.dtype),
        v=torch.empty(k_rows, it.heads, VALUES, dtype=it.dtype),
        softmax_scale=SCALE,
        out=torch.empty(q_rows, it.heads, VALUES, dtype=it.dtype),
        lse=None if it.causal else torch.empty(q_rows, it.heads),
    )


def _norm(ops: dict[str, FusedOp]) -> None:
    x = torch.empty(2, QUERY_LATENT + LATENT + 64, dtype=torch.bfloat16)  # a slice of the joined projection
    weight, out = torch.empty_like(x[0, :QUERY_LATENT]), torch.empty_like(x[:, :QUERY_LATENT])
    ops["triton_rms_norm"](x=x[:, :QUERY_LATENT], weight=weight, eps=EPS, out=out)


def _rotate(ops: dict[str, FusedOp]) -> None:
    x = torch.empty(2, 16, NOPE + 64, dtype=torch.bfloat16)[..., NOPE:]
    out = torch.empty(2, 16, LATENT + 64, dtype=torch.bfloat16)[..., LATENT:]
    ops["triton_rotate_query"](x=x, cos_sin=torch.empty(2, 64), interleaved=True, out=out)


def _write(ops: dict[str, FusedOp]) -> None:
    width = LATENT + 64
    ops["triton_write_latent"](
        kv_a=torch.empty(2, width, dtype=torch.bfloat16),
        weight=torch.empty(LATENT, dtype=torch.bfloat16),
        eps=EPS,
        cos_sin=torch.empty(2, 64),
        interleaved=True,
        slots=torch.zeros(2, dtype=torch.int64),
        cache=torch.empty(2, 64, width, dtype=torch.bfloat16),
    )


def _spec(heads: int, rope: int, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(heads, LATENT, NOPE, rope, VALUES, SCALE, dtype, CPU)
