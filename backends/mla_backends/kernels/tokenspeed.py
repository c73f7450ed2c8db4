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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mla_backends.api import AttentionSpec, BatchView
from mla_backends.kernels.expanded import VarlenLimits, VarlenOp, VarlenState
from mla_backends.kernels.paged import (
    E4M3_QUERIES,
    Group,
    LatentLimits,
    Launch,
    PagedLatentOp,
    PagedState,
    Part,
    Result,
)
from mla_backends.kernels.vendor import DeviceReason, KernelRefused, VendorModule, is_aligned

if TYPE_CHECKING:
    import torch

MODULE, DECODE, PREFILL = "tokenspeed_mla", "tokenspeed_mla_decode", "tokenspeed_mla_prefill"
DECODE_ARGUMENTS = (
    "query", "kv_cache", "workspace_buffer", "kv_lora_rank", "qk_rope_head_dim", "block_tables", "seq_lens",
    "max_seq_len", "softmax_scale", "out", "causal_mask", "return_lse",
)  # fmt: skip
PREFILL_ARGUMENTS = (
    "query", "key", "value", "seq_lens", "cum_seq_lens", "max_seq_len", "batch_size", "softmax_scale",
    "is_causal", "return_lse", "cum_seq_lens_q", "max_seq_len_q", "out",
)  # fmt: skip
CURE = "pip install -U tokenspeed-mla, which brings the CuTe DSL it needs"
TILE = 128  # keys, and query rows
LIMITS = LatentLimits(
    page_sizes=(32, 64),  # those its callers use; it accepts powers of two from 2 to 128
    max_heads=128,
    max_queries=4,  # as documented; every number is compiled by itself
    max_rows=16_000,  # rows times queries are one dimension of a grid
    lse_layout="tokens_first",
    lse_base="2",
    empty_rows=False,
)
PREFILL_LIMITS = VarlenLimits(dtypes=("bfloat16",), pads_values=False, max_unlisted=0)


def unavailable() -> list[str]:
    """Return why the package cannot run, where it knows: its import succeeds even without CuTe DSL."""
    why = getattr(importlib.import_module(MODULE), "_IMPORT_ERROR", None)
    return [] if why is None else [f"{MODULE} cannot load CuTe DSL ({why}); {CURE}"]


class TokenspeedMla(PagedLatentOp):
    """`tokenspeed_mla.tokenspeed_mla_decode` with 16-bit caches.

    Costs besides the kernel: what `PagedLatentOp` says, a table per batch, and a workspace of about 40 MB per
    device. Graphs: the table of a captured call is made inside the graph, so a replay follows the batch.
    """

    compiles = "tokenspeed_mla's decode kernel"
    cure = CURE
    refused_formats = E4M3_QUERIES

    def __init__(self, limits: LatentLimits = LIMITS, *, install: str = "") -> None:
        """Take the kernel's limits, and the hint for a missing package."""
        super().__init__(VendorModule(MODULE, {DECODE: DECODE_ARGUMENTS, "get_num_sm": ()}, install), limits)
        self._workspaces: dict[torch.device, torch.Tensor] = {}

    def interface_reasons(self) -> list[str]:
        return unavailable()

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> PagedState:
        """Plan the batch, with a table per launch, without waiting for the device."""
        self._workspace(batch.block_table)  # memory that a graph uses is not taken while it is captured
        return super().prepare(spec, batch)

    def _part(self, group: Group, heads: int, page_size: int, captured: bool) -> Part:
        part = super()._part(group, heads, page_size, captured)
        return replace(part, plan=own_pages(group.block_table, part.kv_lens, page_size))

    def launch(self, plan: Any, call: Launch) -> Result:
        if not is_aligned(call.cache):
            raise KernelRefused("the rows of the latent cache must start at multiples of 16 bytes.")
        result = self._vendor.tokenspeed_mla_decode(
            query=call.q if is_aligned(call.q) else call.q.clone(),
            kv_cache=call.cache,
            workspace_buffer=self._workspace(call.block_table),
            kv_lora_rank=call.latent,
            qk_rope_head_dim=call.q.shape[3] - call.latent,
            block_tables=plan,
            seq_lens=call.kv_lens,
            max_seq_len=call.longest,
            softmax_scale=call.scale,
            out=call.out if call.out is not None and is_aligned(call.out) else None,
            causal_mask=True,
            return_lse=call.with_lse,  # which costs it a launch that fills it with zeros
        )
        return result if call.with_lse else (result, None)

    def _workspace(self, table: torch.Tensor) -> torch.Tensor:
        """Return memory for the partial results of any batch, on the device of its table.

        Rows times splits are at most half a tile of query rows per multiprocessor, each partial result with
        its log-sum-exp in float32; twice that is taken.
        """
        import torch

        device = table.device
        if device not in self._workspaces:
            size = self._vendor.get_num_sm(device) * TILE * (512 + 1) * 4
            self._workspaces[device] = self._scratch.take("workspace", (size,), table.view(torch.int8))
        return self._workspaces[device]


def own_pages(table: torch.Tensor, kv_lens: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the table [rows, n] for whole tiles, with a row's last page wherever it has no more pages.

    `table` is [rows, m] int32, `kv_lens` [rows] int32, at least 1. Nothing waits for the device.
    """
    import torch

    per_tile = max(1, TILE // page_size)
    width = -(-table.shape[1] // per_tile) * per_tile
    last = torch.div(kv_lens - 1, page_size, rounding_mode="floor")
    return table.gather(1, torch.minimum(torch.arange(width, device=table.device), last[:, None]))


class TokenspeedPrefill(VarlenOp):
    """`tokenspeed_mla.tokenspeed_mla_prefill`, bfloat16 keys of 192 and values of 128."""

    compiles = "tokenspeed_mla's prefill kernel"
    cure = CURE
    contiguous = True
    overwrites_blind = True

    def __init__(self, device_reason: DeviceReason | None = None, *, install: str = "") -> None:
        """Take why a device cannot run it ("" if it can), and the hint for a missing package."""
        limits = replace(PREFILL_LIMITS, device_reason=device_reason)
        super().__init__(VendorModule(MODULE, {PREFILL: PREFILL_ARGUMENTS}, install), limits)

    def interface_reasons(self) -> list[str]:
        return unavailable()

    def attend(
        self, state: VarlenState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        value, sums = self._vendor.tokenspeed_mla_prefill(
            query=q,
            key=k,
            value=v,
            seq_lens=state.kv_lens,
            cum_seq_lens=state.cu_k,
            max_seq_len=state.longest_k,
            batch_size=state.kv_lens.shape[0],
            softmax_scale=softmax_scale,
            is_causal=state.causal,
            return_lse=True,
            cum_seq_lens_q=state.cu_q,
            max_seq_len_q=state.longest_q,
            out=out if out.is_contiguous() and is_aligned(out) else None,
        )
        return value, sums.t()
