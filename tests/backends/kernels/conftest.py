"""What the tests of vendor kernels share: fake packages on the path, attention problems, their truth."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from float64_attention import attend_segments

from mla import MLA, MLAConfig
from mla.cases.layer import LayerCall, LayerCase
from mla_backends import FusedOp
from mla_backends.api import AttentionSpec, SegmentLengths
from mla_backends.kernels import flashinfer, sparse
from mla_backends.testing import HostBackend

FAKES = Path(__file__).resolve().parents[2] / "fakes" / "kernels"
PACKAGES = (
    "flash_mla",
    "mate",
    "ixformer",
    "flashinfer",
    "flash_attn",
    "flash_attn_interface",
    "tokenspeed_mla",
)
LATENT, ROTARY, NOPE, VALUE = 512, 64, 128, 128
SCALE = 1.3 * (NOPE + ROTARY) ** -0.5  # neither the width's root nor that of the head
# Per (token, head): one rounding of the output.
BOUND = {torch.bfloat16: 1.05 * 2.0**-8, torch.float16: 1.05 * 2.0**-11}
LSE_BOUND = 2e-5
CPU = torch.device("cpu")
Outputs = tuple[torch.Tensor, torch.Tensor]


# ---------------------------------------------------------------------------------------------- fakes


@pytest.fixture(autouse=True, scope="module")
def small_workspaces() -> Iterator[None]:
    """Do without 128 MiB that the fakes never touch."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (flashinfer, sparse):
            patch.setattr(module, "WORKSPACE_BYTES", 1024)
        yield


@pytest.fixture(scope="session")
def installed() -> Callable[[str], Any]:
    """Return a context in which the named fake is what importing its package gives."""

    @contextmanager
    def installed(folder: str) -> Iterator[Any]:
        assert (FAKES / folder).is_dir(), folder
        added = [str(FAKES / folder), str(FAKES / "common")]
        sys.path[:0] = added
        forget()
        try:
            yield importlib.import_module("fake_kernels")
        finally:
            forget()
            sys.path[:] = [path for path in sys.path if path not in added]

    def forget() -> None:
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.partition(".")[0] in (*PACKAGES, "fake_kernels")]:
            del sys.modules[name]

    return installed


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., AttentionSpec]:
    """Return a maker of DeepSeek's attention; keyword arguments replace fields."""

    def make(**changes: Any) -> AttentionSpec:
        usual = {
            "num_heads": 16,
            "kv_lora_rank": LATENT,
            "qk_nope_head_dim": NOPE,
            "qk_rope_head_dim": ROTARY,
            "v_head_dim": VALUE,
            "softmax_scale": SCALE,
            "dtype": torch.bfloat16,
            "device": CPU,
        }
        return AttentionSpec(**{**usual, **changes})

    return make


# ----------------------------------------------------------------------------------- absorbed attention


@dataclass
class Problem:
    """One `latent_attention` call. Pages nobody owns are NaN, slots past a request's end hold 1e4."""

    spec: AttentionSpec
    view: SimpleNamespace
    q: torch.Tensor
    cache: torch.Tensor
    owned: list[torch.Tensor] = field(default_factory=list)  # per request its latents [s, c + r]

    def refusals(self, op: FusedOp) -> list[str]:
        spec, view = self.spec, self.view
        return op.unsupported_reasons(spec) + op.unsupported_batch(spec, view.query_lens, view.kv_lens)

    def run(self, op: FusedOp, state: Any = None, **given: Any) -> Outputs:
        """Return out and lse, which held NaN before the call. `given`: other operands."""
        assert self.refusals(op) == []
        outputs = {
            "out": torch.full((*self.q.shape[:2], LATENT), torch.nan, dtype=self.q.dtype),
            "lse": torch.full(self.q.shape[:2], torch.nan),
            "softmax_scale": self.spec.softmax_scale,
            **given,
        }
        op(
            op.prepare(self.spec, self.view) if state is None else state,
            q=self.q,
            cache=self.cache,
            block_table=self.view.block_table,
            kv_lens=self.view.kv_lens_device,
            cu_q=self.view.cu_q,
            **outputs,
        )
        return outputs["out"], outputs["lse"]

    def truth(self) -> Outputs:
        """Return out and lse in float64, by the definition, request by request."""
        pieces = zip(self.q.split(list(self.view.query_lens)), self.owned, strict=True)
        return attend_segments(((q, rows, rows[:, :LATENT]) for q, rows in pieces), SCALE)


@pytest.fixture(scope="session")
def make_problem(make_spec: Any) -> Callable[..., Problem]:
    """Return a maker of problems over shuffled pages; unused columns of the table name a page of NaN."""

    def make(
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        heads: int = 16,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // page_size) for length in kv_lens]
        order = torch.randperm(sum(counts) + 1, generator=generator).int()
        table = order[:1].repeat(len(kv_lens), max(1, *counts) + 1)
        cache = torch.full((len(order), page_size, LATENT + ROTARY), torch.nan, dtype=dtype)
        owned = [torch.randn(s, LATENT + ROTARY, generator=generator).to(dtype) for s in kv_lens]
        for row, pages, latents in zip(table, order[1:].split(counts), owned, strict=True):
            row[: len(pages)] = pages
            cache[pages.long()] = 1e4
            place = torch.arange(len(latents))
            cache[pages[place // page_size].long(), place % page_size] = latents
        view = SimpleNamespace(
            query_lens=tuple(query_lens),
            kv_lens=tuple(kv_lens),
            page_size=page_size,
            block_table=table,
            kv_lens_device=torch.tensor(kv_lens, dtype=torch.int32),
            cu_q=torch.tensor([sum(query_lens[:i]) for i in range(len(query_lens) + 1)], dtype=torch.int32),
        )
        q = torch.randn(sum(query_lens), heads, LATENT + ROTARY, generator=generator).to(dtype)
        return Problem(make_spec(num_heads=heads, dtype=dtype), view, q, cache, owned)

    return make


@pytest.fixture(scope="session")
def assert_right() -> Callable[..., None]:
    """Return a check of out and lse against the truth, per token and head; lse may be omitted."""

    def check(results: Outputs, truth: Outputs, with_lse: bool = True) -> None:
        (out, lse), (true_out, true_lse) = results, truth
        assert out.shape == true_out.shape
        assert out.isfinite().all(), "the output has NaN or infinity"
        scale = true_out.norm(dim=-1)
        error = (out.double() - true_out).norm(dim=-1)
        worst = torch.where(scale > 0, error / scale.clamp_min(1e-300), error * math.inf).nan_to_num(0.0)
        assert worst.max() <= BOUND[out.dtype], f"worst row error {worst.max():.2g}"
        if with_lse:
            gap = torch.where(lse.double() == true_lse, 0.0, (lse.double() - true_lse).abs())
            assert gap.max() <= LSE_BOUND, f"worst lse error {gap.max():.2g}"

    return check


@pytest.fixture(scope="session")
def check_latent(make_problem: Any, assert_right: Any) -> Callable[..., None]:
    """Return a check of an op over the batches in which wrong arguments show."""
    steps = (
        ((1, 1, 1, 1), (33, 64, 129, 7)),  # decode
        ((1, 1, 1, 1), (34, 65, 130, 8)),  # its next step: other lengths in the same shapes
        ((5, 1, 20), (5, 1, 20)),  # prefill
        ((4, 4), (9, 66)),  # equal, with a history; as many heads as queries below
        ((3, 1, 9, 1, 3), (40, 7, 70, 65, 128)),  # scattered groups
        ((1, 1, 1), (0, 40, 0)),  # rows a graph pads its batch with
    )

    def check(op: FusedOp, heads: Sequence[int] = (16,), with_lse: bool = True, **kwargs: Any) -> None:
        for count in heads:
            for query_lens, kv_lens in steps:
                problem = make_problem(query_lens, kv_lens, heads=count, **kwargs)
                assert_right(problem.run(op), problem.truth(), with_lse)

    return check


@pytest.fixture(scope="session")
def check_strided(make_problem: Any, assert_right: Any) -> Callable[[FusedOp], None]:
    """Return a check of an op with queries and an output that are slices of wider tensors."""

    def check(op: FusedOp) -> None:
        problem = make_problem([3, 1, 3], [40, 70, 3])
        tokens, heads, width = problem.q.shape
        wide = torch.full((tokens, heads + 1, width + 32), torch.nan, dtype=problem.q.dtype)
        wide[:, :heads, 16 : 16 + width] = problem.q
        problem.q = wide[:, :heads, 16 : 16 + width]
        room = torch.full((tokens, heads + 1, 544), torch.nan, dtype=problem.q.dtype)
        assert_right(problem.run(op, out=room[:, :heads, 16:528]), problem.truth())
        room[:, :heads, 16:528] = torch.nan
        assert room.isnan().all(), "memory beside out was written"

    return check


# ----------------------------------------------------------------------------------- expanded attention


@pytest.fixture(scope="session")
def run_expanded(make_spec: Any) -> Callable[..., tuple[Outputs, Outputs]]:
    """Return a function that runs an expanded attention op and returns what it gave and the truth."""

    def run(
        op: FusedOp,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        causal: bool = True,
        heads: int = 4,
        dtype: torch.dtype = torch.bfloat16,
    ) -> tuple[Outputs, Outputs]:
        spec, generator = make_spec(num_heads=heads, dtype=dtype), torch.Generator().manual_seed(1)
        assert op.unsupported_reasons(spec) + op.unsupported_batch(spec, query_lens, kv_lens) == []
        shapes = ((sum(query_lens), NOPE + ROTARY), (sum(kv_lens), NOPE + ROTARY), (sum(kv_lens), 300))
        q, k, wide = (torch.randn(t, heads, d, generator=generator).to(dtype) for t, d in shapes)
        v = wide[..., 100 : 100 + VALUE]  # as the layer has it: a slice of the keys' projection
        out = torch.full((len(q), heads, VALUE), torch.nan, dtype=dtype)
        lse = torch.full(q.shape[:2], torch.nan)
        state = op.prepare(spec, SegmentLengths(tuple(query_lens), tuple(kv_lens), causal))
        op(state, q=q, k=k, v=v, softmax_scale=SCALE, out=out, lse=lse)
        segments = zip(
            *(x.split(list(n)) for x, n in ((q, query_lens), (k, kv_lens), (v, kv_lens))), strict=True
        )
        return (out, lse), attend_segments(segments, SCALE, causal)

    return run


# ----------------------------------------------------------------------------------------- whole layers


@pytest.fixture(scope="session")
def check_layer() -> Callable[[str, Callable[[], FusedOp]], None]:
    """Return a check of a layer on an op, in one round and in several, which are merged by lse."""

    def check(role: str, make: Callable[[], FusedOp]) -> None:
        case = LayerCase((3, 8, 1), (70, 0, 64), MLAConfig(64, 5), dtype=torch.bfloat16)
        for workspace in (1 << 28, 300_000):  # the second cuts a history of 70
            backend = HostBackend(ops={"op": make()})
            layer = MLA(case.config, backend=backend, attention="expanded", workspace_bytes=workspace)
            assert layer.ops.names()[role] == "op", layer.ops.explain()
            layer.load_state_dict(case.host.state)
            result = case.host.check(LayerCall(case, layer).run())
            assert result.status == "ok", result.reason

    return check
