"""A small case for every op, with the widths of DeepSeek-V3: what they launch is what a layer launches.

What kernels are specialised for (strides, alignment, heads, page sizes) is as in a layer. Lengths and numbers
of requests, which are run-time arguments, are small. Tensors are on the CPU, where nothing can be started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.triton.recording import Launch, Recorder
from mla.cache.formats import find_format
from mla.cases.case import Lengths, OpCase
from mla.cases.memory import Layout
from mla.cases.played import Laid, Scene
from mla.cases.stress import Stress
from mla_backends.api import AttentionSpec, FusedOp, IndexerSpec, NormSpec
from mla_backends.triton_ops import Tuning, triton_ops

MULTIPROCESSORS = 132
CPU = torch.device("cpu")
SPEC = AttentionSpec(16, 512, 128, 64, 128, 0.1, torch.bfloat16, CPU)
INDEXER = IndexerSpec(64, 128, 64, 2048, torch.bfloat16, CPU)
KEYS = (700, 90, 300)  # of the requests of a decode step
OPS = {
    "latent_attention": "triton_latent",
    "sparse_latent_attention": "triton_sparse_latent",
    "select_latents": "triton_select",
    "expanded_attention": "triton_expanded",
    "rms_norm": "triton_rms_norm",
    "rotate_query": "triton_rotate_query",
    "write_latent": "triton_write_latent",
}


@dataclass(frozen=True)
class Problem:
    """One call of an op."""

    case: OpCase
    with_lse: bool = True

    def but(self, with_lse: bool | None = None, **changes: Any) -> Problem:
        """Return another one. A name is `with_lse`, or one that `OpCase.but` takes."""
        wanted = self.with_lse if with_lse is None else with_lse
        return replace(self, case=self.case.but(**changes), with_lse=wanted)

    def stored(self, name: str) -> Problem:
        """Return the problem over a cache of this format."""
        codec = find_format(name).codec(self.case.spec.kv_lora_rank, self.case.spec.qk_rope_head_dim)
        return self.but(cache_format=name, token_bytes=codec.token_bytes)

    def bound(self, ops: Mapping[str, FusedOp]) -> Callable[[], None]:
        """Return the call, with operands in memory; planning is done."""
        call = Laid(self.case, ops[OPS[self.case.kind]], Scene((self.case,), lse=self.with_lse))
        call.prepare()
        return call.run


def decode(heads: int, queries: int = 1, keys: Lengths = KEYS, **changes: Any) -> Problem:
    """Return a step of `latent_attention`, without its log-sum-exp."""
    case = OpCase("latent_attention", SPEC, (queries,) * len(keys), keys, stress=Stress())
    return Problem(case, with_lse=False).but(num_heads=heads, **changes)


def sparse(heads: int, topk: int = 2048) -> Problem:
    """Return a step of `sparse_latent_attention`, without its log-sum-exp."""
    case = OpCase("sparse_latent_attention", SPEC, (1,) * len(KEYS), KEYS, stress=Stress())
    return Problem(case, with_lse=False).but(num_heads=heads, topk=topk)


def select(**changes: Any) -> Problem:
    """Return a step of `select_latents`."""
    return Problem(OpCase("select_latents", INDEXER, (1,) * len(KEYS), KEYS, stress=Stress())).but(**changes)


def prefill(queries: int = 80, **changes: Any) -> Problem:
    """Return two segments for `expanded_attention`, without its log-sum-exp."""
    case = OpCase("expanded_attention", SPEC, (queries,) * 2, (80, 110), stress=Stress())
    return Problem(case, with_lse=False).but(**changes)


def small(kind: str, spec: Any = SPEC) -> Problem:
    """Return two rows for a small op: slices of joined projections."""
    return Problem(OpCase(kind, spec, (2,), (2,), stress=Stress(), layout=SLICES))


SLICES = Layout(gaps=dict.fromkeys(("x", "kv_a", "cos_sin", "out"), (0, 16, 16)))
FORMATS = ("fp8", "fp8_ds_mla", "fp8_ds_mla_any", "int8", "q8_0")
FP16_NO_ROPE: dict[str, Any] = {"dtype": torch.float16, "qk_rope_head_dim": 0}


def _steps(heads: int) -> dict[str, Problem]:
    """Return decode steps of so many heads. A page that no tile divides is compiled as one token is."""
    steps = {
        "": decode(heads),
        ", page 1, lse": decode(heads, page_size=1, with_lse=True),
        ", fp16, no rope": decode(heads, **FP16_NO_ROPE),
        ", 2 new tokens": decode(heads, queries=2),
        ", 2 or 1 new": decode(heads, query_lens=(2, 2, 1)),
    }
    steps |= {f", {name}": decode(heads).stored(name) for name in FORMATS}
    return {f"latent: {heads} heads{name}": step for name, step in steps.items()}


PROBLEMS: dict[str, Problem] = {  # by the name in the table
    **_steps(16),
    "latent: 16 heads, 4 new tokens": decode(16, queries=4),  # of which a tile of many rows has several
    "latent: 16 heads of 256, one part": decode(16, keys=(60, 40), kv_lora_rank=256),
    **_steps(128),
    "sparse: 16 heads": sparse(16),
    "sparse: 128 heads": sparse(128),
    "sparse: 16 heads, fp8_ds_mla": sparse(16).stored("fp8_ds_mla"),
    "sparse: 128 heads, fp8_ds_mla": sparse(128).stored("fp8_ds_mla"),
    "sparse: 16 heads, q8_0": sparse(16).stored("q8_0"),
    "select": select(),
    "select, fp8": select(index_format="fp8", token_bytes=132),
    "expanded: causal": prefill(),
    "expanded: all keys, lse": prefill(causal=False, with_lse=True),
    "expanded: causal, fp16, no rope": prefill(**FP16_NO_ROPE),
    "expanded: causal, ragged": prefill(query_lens=(80, 50)),
    "expanded: 32 queries": prefill(32),
    "rms_norm": small("rms_norm", NormSpec(1536, torch.bfloat16, CPU)),
    "rotate_query": small("rotate_query"),
    "write_latent": small("write_latent"),
    **{f"write_latent, {name}": small("write_latent").stored(name) for name in FORMATS},
}
MERGE, BEST = "merge", "select: the best"  # what problems that are split, or select, launch beside
MERGE_LSE = f"{MERGE}, lse"
ATTENTION = ("latent: 16 heads", "latent: 128 heads", "expanded: causal")  # whose steps are predicted


def launches(tuning: Tuning, *card: bool) -> dict[str, Launch]:
    """Return by name what the problems launch with a tuning; `card` are the arguments of `Launcher`."""
    launched: dict[str, Launch] = {}
    for name, problem in PROBLEMS.items():
        recorder = Recorder(*card)
        problem.bound(triton_ops(tuning, MULTIPROCESSORS, recorder))()
        launched[name], *merge = recorder.recorded
        for launch in merge:
            named = {True: MERGE_LSE, False: MERGE, None: BEST}
            launched.setdefault(named[launch.arguments.get("HAS_LSE")], launch)
    return launched
