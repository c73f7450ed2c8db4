"""TokenSpeed's kernels for SM100, SM103 and SM107, compiled by CuTe DSL at first use.

Read in the wheels tokenspeed-mla 0.1.8 to 2.0.4 (2026-11). What their documents do not say of
`tokenspeed_mla_decode`, absorbed attention, with 16-bit caches:

- The keys of a row are read in tiles of 128, and what the table names behind a row's last page, or page 0
  where the table ends, is multiplied by zero: NaN in a page of another request would reach the result. The
  kernel is therefore given a table of its own, which repeats a row's last page.
- A row without keys is written only where `local_visible_lens` is passed, so such rows are given one key.
- The workspace must be int8, against the docstring.
- Tensors must start, and their rows too, at multiples of 16 bytes.

`tokenspeed_mla_prefill` is ordinary causal attention over ragged segments (read in vLLM at 055e47c too, which
runs it in bfloat16). The package's README promises only fp8 for these widths, so a small case is computed
first. q, k and v are read as if they were contiguous. The log-sum-exp is natural, unlike that of decoding.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mla_backends.api import AttentionSpec, BatchView
from mla_backends.kernels.expanded import Attended, VarlenLimits, VarlenOp, VarlenState
from mla_backends.kernels.paged import (
    E4M3_QUERIES,
    Group,
    LatentLimits,
    Launch,
    PagedLatentOp,
    PagedState,
    Result,
)
from mla_backends.kernels.vendor import KernelRefused, VendorOp, is_aligned, multiprocessors

if TYPE_CHECKING:
    import torch

DECODE, PREFILL = "tokenspeed_mla_decode", "tokenspeed_mla_prefill"
DECODE_ARGUMENTS = {
    "query": "rows", "kv_cache": "cache", "workspace_buffer": "workspace", "kv_lora_rank": "latent",
    "qk_rope_head_dim": "rope", "block_tables": "own_pages", "seq_lens": "kv_lens", "max_seq_len": "longest",
    "softmax_scale": "scale", "out": "target", "causal_mask": True, "return_lse": "with_lse",
}  # fmt: skip
PREFILL_ARGUMENTS = {
    "query": "q", "key": "k", "value": "v", "seq_lens": "kv_lens", "cum_seq_lens": "cu_k",
    "max_seq_len": "longest_k", "batch_size": "count", "softmax_scale": "scale", "is_causal": "causal",
    "return_lse": True, "cum_seq_lens_q": "cu_q", "max_seq_len_q": "longest_q", "out": "target",
}  # fmt: skip
TILE = 128  # keys, and query rows


class Tokenspeed(VendorOp):
    """Either kernel of the package."""

    module = "tokenspeed_mla"
    cure = "pip install -U tokenspeed-mla, which brings the CuTe DSL it needs"

    def interface_reasons(self) -> list[str]:
        """Return why the package cannot run, where it knows: its import succeeds even without CuTe DSL."""
        why = getattr(importlib.import_module(self.module), "_IMPORT_ERROR", None)
        return [] if why is None else [f"{self.module} cannot load CuTe DSL ({why}); {self.cure}"]


class TokenspeedMla(Tokenspeed, PagedLatentOp):
    """`tokenspeed_mla.tokenspeed_mla_decode` with 16-bit caches.

    Costs besides the kernel: what `PagedLatentOp` says, a table per batch, zeros in the log-sum-exp where it
    is read, and a workspace of about 40 MB per device. Graphs: the table of a captured call is made inside
    the graph, so a replay follows the batch.
    """

    needs: Mapping[str, Mapping[str, Any]] = {DECODE: DECODE_ARGUMENTS}
    limits = LatentLimits(
        page_sizes=(32, 64),  # those its callers use; it accepts powers of two from 2 to 128
        max_heads=128,
        max_queries=4,  # as documented; every number is compiled by itself
        max_rows=16_000,  # rows times queries are one dimension of a grid
        lse_layout="tokens_first",
        lse_base="2",
        empty_rows=False,
    )
    compiles = "tokenspeed_mla's decode kernel"
    refused_formats = E4M3_QUERIES

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> PagedState:
        """Plan the batch, with a table per launch, without waiting for the device."""
        self._workspace(batch.block_table)  # memory that a graph uses is not taken while it is captured
        return super().prepare(spec, batch)

    def _planned(self, group: Group, heads: int, page_size: int, captured: bool) -> Group:
        group = super()._planned(group, heads, page_size, captured)
        return replace(group, plan=own_pages(group.block_table, group.given_lens, page_size))

    def launch(self, plan: Any, call: Launch) -> Result:
        if not is_aligned(call.cache):
            raise KernelRefused("the rows of the latent cache must start at multiples of 16 bytes.")
        more = {
            "rows": call.q if is_aligned(call.q) else call.q.clone(), "rope": call.q.shape[3] - call.latent,
            "workspace": self._workspace(call.block_table), "own_pages": plan,
            "target": call.out if call.out is not None and is_aligned(call.out) else None,
        }  # fmt: skip
        result = self._call(DECODE, call, more)
        return result if call.with_lse else (result, None)

    def _workspace(self, table: torch.Tensor) -> torch.Tensor:
        """Return memory for the partial results of any batch, on the device of its table.

        Rows times splits are at most half a tile of query rows per multiprocessor, each partial result with
        its log-sum-exp in float32; twice that is taken.
        """
        import torch

        size = multiprocessors(table.device) * TILE * (512 + 1) * 4
        return self._scratch.take("workspace", (size,), table, dtype=torch.int8)


def own_pages(table: torch.Tensor, kv_lens: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the table [rows, n] for whole tiles, with a row's last page wherever it has no more pages.

    `table` is [rows, m] int32, `kv_lens` [rows] int32, at least 1. Nothing waits for the device.
    """
    import torch

    per_tile = max(1, TILE // page_size)
    width = -(-table.shape[1] // per_tile) * per_tile
    last = torch.div(kv_lens - 1, page_size, rounding_mode="floor")
    return table.gather(1, torch.minimum(torch.arange(width, device=table.device), last[:, None]))


class TokenspeedPrefill(Tokenspeed, VarlenOp):
    """`tokenspeed_mla.tokenspeed_mla_prefill`, bfloat16 keys of 192 and values of 128."""

    needs: Mapping[str, Mapping[str, Any]] = {PREFILL: PREFILL_ARGUMENTS}
    limits = VarlenLimits(dtypes=("bfloat16",), pads_values=False, max_unlisted=0)
    compiles = "tokenspeed_mla's prefill kernel"
    contiguous = True

    def attend(self, state: VarlenState, given: Mapping[str, Any], out: torch.Tensor) -> Attended:
        target = out if out.is_contiguous() and is_aligned(out) else None
        more = {**given, "target": target, "count": len(state.kv_lens)}
        value, sums = self._call(PREFILL, state, more)
        return value, sums.t()
