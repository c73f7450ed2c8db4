"""Tiny problems for every op, with the widths of DeepSeek-V3: what they launch is what a layer launches.

What kernels are specialised for (strides, alignment, heads, page sizes) is as in a layer. Lengths and numbers
of requests, which are run-time arguments, are small. Tensors are on the CPU, where nothing can be started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.triton.recording import Launch, Recorder
from mla_backends.api import AttentionSpec, FusedOp, SegmentLengths
from mla_backends.triton_ops import Tuning, triton_ops

NOPE, VALUES, QUERY_LATENT, KV_LATENT, ROPE = 128, 128, 1536, 512, 64
MULTIPROCESSORS = 132
SCALE, EPS = 0.1, 1e-6
CPU = torch.device("cpu")

Ops = Mapping[str, FusedOp]
Problem = Callable[[Ops], Callable[[], None]]  # ops -> a call of one of them


@dataclass(frozen=True)
class Decode:
    """A batch for `latent_attention`."""

    heads: int
    queries: int = 1
    ragged: bool = False  # the last request has one new token less
    keys: tuple[int, ...] = (700, 90, 300)  # of the requests
    page: int = 64
    latent: int = KV_LATENT
    rope: int = ROPE
    dtype: torch.dtype = torch.bfloat16
    with_lse: bool = False

    def __call__(self, ops: Ops) -> Callable[[], None]:
        op, batch = ops["triton_latent"], self.batch()
        tokens = sum(batch.query_lens)
        empty = partial(torch.empty, dtype=self.dtype)
        return partial(
            op,
            op.prepare(self.spec(), batch),
            q=empty(tokens, self.heads, self.latent + self.rope),
            cache=empty(16, self.page, self.latent + self.rope),
            block_table=batch.block_table,
            kv_lens=batch.kv_lens_device,
            cu_q=batch.cu_q,
            softmax_scale=SCALE,
            out=empty(tokens, self.heads, self.latent),
            lse=torch.empty(tokens, self.heads) if self.with_lse else None,
        )

    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.heads, self.latent, NOPE, self.rope, VALUES, SCALE, self.dtype, CPU)

    def batch(self) -> Any:
        """Return what `BatchView` asks for, with room for one more page."""
        requests, pages = len(self.keys), -(-max(self.keys) // self.page)
        queries = [self.queries] * requests
        queries[-1] -= self.ragged
        return SimpleNamespace(
            query_lens=tuple(queries),
            kv_lens=self.keys,
            page_size=self.page,
            block_table=torch.zeros(requests, pages + 1, dtype=torch.int32),
            kv_lens_device=torch.tensor(self.keys, dtype=torch.int32),
            cu_q=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        )


@dataclass(frozen=True)
class Prefill:
    """Segments for `expanded_attention`."""

    causal: bool = True
    queries: int = 512  # of each segment
    heads: int = 16
    rope: int = ROPE
    dtype: torch.dtype = torch.bfloat16
    with_lse: bool = False

    def __call__(self, ops: Ops) -> Callable[[], None]:
        op = ops["triton_expanded"]
        lengths = SegmentLengths((self.queries,) * 2, (512, 700), causal=self.causal)
        rows, keys = sum(lengths.query_lens), sum(lengths.kv_lens)
        spec = AttentionSpec(self.heads, KV_LATENT, NOPE, self.rope, VALUES, SCALE, self.dtype, CPU)
        empty = partial(torch.empty, dtype=self.dtype)
        return partial(
            op,
            op.prepare(spec, lengths),
            q=empty(rows, self.heads, NOPE + self.rope),
            k=empty(keys, self.heads, NOPE + self.rope),
            v=empty(keys, self.heads, VALUES),
            softmax_scale=SCALE,
            out=empty(rows, self.heads, VALUES),
            lse=torch.empty(rows, self.heads) if self.with_lse else None,
        )


def rms_norm(ops: Ops) -> Callable[[], None]:
    x = _empty(2, QUERY_LATENT + KV_LATENT + ROPE)[:, :QUERY_LATENT]  # a slice of the joined projection
    out = _empty(2, QUERY_LATENT)
    return partial(ops["triton_rms_norm"], x=x, weight=_empty(QUERY_LATENT), eps=EPS, out=out)


def rotate_query(ops: Ops) -> Callable[[], None]:
    x, out = _empty(2, 16, NOPE + ROPE)[..., NOPE:], _empty(2, 16, KV_LATENT + ROPE)[..., KV_LATENT:]
    op = ops["triton_rotate_query"]
    return partial(op, x=x, cos_sin=torch.empty(2, ROPE), interleaved=True, out=out)


def write_latent(ops: Ops) -> Callable[[], None]:
    return partial(
        ops["triton_write_latent"],
        kv_a=_empty(2, KV_LATENT + ROPE),
        weight=_empty(KV_LATENT),
        eps=EPS,
        cos_sin=torch.empty(2, ROPE),
        interleaved=True,
        slots=torch.zeros(2, dtype=torch.int64),
        cache=_empty(2, 64, KV_LATENT + ROPE),
    )


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


# Name in the table -> problem. A page that no tile divides is compiled as one token is.
PROBLEMS: dict[str, Problem] = {
    "latent: 16 heads": Decode(16),
    "latent: 16 heads, page 1, lse": Decode(16, page=1, with_lse=True),
    "latent: 16 heads, fp16, no rope": Decode(16, rope=0, dtype=torch.float16),
    "latent: 16 heads, 2 new tokens": Decode(16, queries=2),
    "latent: 16 heads, 2 or 1 new": Decode(16, queries=2, ragged=True),
    "latent: 16 heads of 256, one part": Decode(16, keys=(60, 40), latent=256),
    "latent: 128 heads": Decode(128),
    "latent: 128 heads, page 1, lse": Decode(128, page=1, with_lse=True),
    "latent: 128 heads, fp16, no rope": Decode(128, rope=0, dtype=torch.float16),
    "latent: 128 heads, 2 new tokens": Decode(128, queries=2),
    "latent: 128 heads, 2 or 1 new": Decode(128, queries=2, ragged=True),
    "expanded: causal": Prefill(),
    "expanded: all keys, lse": Prefill(causal=False, with_lse=True),
    "expanded: causal, fp16, no rope": Prefill(rope=0, dtype=torch.float16),
    "expanded: 32 queries": Prefill(queries=32),
    "rms_norm": rms_norm,
    "rotate_query": rotate_query,
    "write_latent": write_latent,
}
MERGE = "merge"  # what problems that are split launch beside


def launches(tuning: Tuning) -> dict[str, Launch]:
    """Return by name what the problems launch with a tuning."""
    found: dict[str, Launch] = {}
    for name, problem in PROBLEMS.items():
        recorder = Recorder()
        problem(triton_ops(tuning, MULTIPROCESSORS, recorder))()
        found[name], *merge = recorder.recorded
        for launch in merge:
            found.setdefault(MERGE, launch)
    return found
