"""`tokenspeed_mla_decode`: absorbed attention on SM100, SM103 and SM107, compiled by CuTe DSL at first use.

Read in the wheels tokenspeed-mla 0.1.8 to 2.0.4 (2026-11). What their documents do not say of 16-bit caches:

- The keys of a row are read in tiles of 128, and what the table names behind a row's last page, or page 0
  where the table ends, is multiplied by zero: NaN in a page of another request would reach the result. The
  kernel is therefore given a table of its own, which repeats a row's last page.
- A row without keys is written only where `local_visible_lens` is passed, so such rows are given one key.
- The workspace must be int8, against the docstring.
- Tensors must start, and their rows too, at multiples of 16 bytes.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mla_backends.api import AttentionSpec, BatchView
from mla_backends.kernels.limits import LatentLimits
from mla_backends.kernels.paged import Launch, PagedLatentOp, PagedState, Part, Result
from mla_backends.kernels.rows import Group
from mla_backends.kernels.trial import failures, remembered, try_latent
from mla_backends.kernels.vendor import KernelRefused, VendorModule, missing

if TYPE_CHECKING:
    import torch

MODULE = "tokenspeed_mla"
FUNCTION = "tokenspeed_mla_decode"
ARGUMENTS = (
    "query",
    "kv_cache",
    "workspace_buffer",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "block_tables",
    "seq_lens",
    "max_seq_len",
    "softmax_scale",
    "out",
    "causal_mask",
    "return_lse",
)
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


class TokenspeedMla(PagedLatentOp):
    """`tokenspeed_mla.tokenspeed_mla_decode` with 16-bit caches.

    Costs besides the kernel: what `PagedLatentOp` says, a table per batch, and a workspace of about 40 MB per
    device. Graphs: the table of a captured call is made inside the graph, so a replay follows the batch.
    """

    compiles = "tokenspeed_mla's decode kernel"

    def __init__(self, limits: LatentLimits = LIMITS, *, install: str = "") -> None:
        """Take the kernel's limits, and the hint for a missing package."""
        super().__init__(VendorModule(MODULE, (FUNCTION, "get_num_sm"), install), limits)
        self._workspaces: dict[torch.device, torch.Tensor] = {}
        self._tried: dict[AttentionSpec, list[str]] = {}

    def interface_reasons(self) -> list[str]:
        return unavailable() or missing(self._vendor.tokenspeed_mla_decode, FUNCTION, ARGUMENTS)

    def preflight(self, spec: AttentionSpec) -> list[str]:
        """Compile the kernel for one new token per request, and return why it does not work here."""
        page = (self.limits.page_sizes or (64,))[-1]
        return remembered(
            self._tried, spec, lambda: failures(lambda: try_latent(self, spec, page), MODULE, CURE)
        )

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> PagedState:
        """Plan the batch, with a table per launch, without waiting for the device."""
        self._workspace(spec.device)  # memory that a graph uses is not taken while it is captured
        return super().prepare(spec, batch)

    def _part(self, group: Group, heads: int, page_size: int, captured: bool) -> Part:
        part = super()._part(group, heads, page_size, captured)
        return replace(part, plan=own_pages(group.block_table, part.kv_lens, page_size))

    def launch(self, plan: Any, call: Launch) -> Result:
        if not aligned(call.cache):
            raise KernelRefused("the rows of the latent cache must start at multiples of 16 bytes.")
        out, lse = self._vendor.tokenspeed_mla_decode(
            query=call.q if aligned(call.q) else call.q.clone(),
            kv_cache=call.cache,
            workspace_buffer=self._workspace(call.q.device),
            kv_lora_rank=call.latent,
            qk_rope_head_dim=call.q.shape[3] - call.latent,
            block_tables=plan,
            seq_lens=call.kv_lens,
            max_seq_len=call.longest,
            softmax_scale=call.scale,
            out=call.out if call.out is not None and aligned(call.out) else None,
            causal_mask=True,
            return_lse=True,
        )
        return out, lse

    def _workspace(self, device: torch.device) -> torch.Tensor:
        """Return memory for the partial results of any batch.

        Rows times splits are at most half a tile of query rows per multiprocessor, each partial result with
        its log-sum-exp in float32; twice that is taken.
        """
        import torch

        if device not in self._workspaces:
            size = self._vendor.get_num_sm(device) * TILE * (512 + 1) * 4
            with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
                self._workspaces[device] = torch.empty(size, dtype=torch.int8, device=device)
        return self._workspaces[device]


def aligned(tensor: torch.Tensor) -> bool:
    """Return whether a tensor of 16-bit numbers and its rows start at multiples of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:-1])


def own_pages(table: torch.Tensor, kv_lens: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the table [rows, n] for whole tiles, with a row's last page wherever it has no more pages.

    `table` is [rows, m] int32, `kv_lens` [rows] int32, at least 1. Nothing waits for the device.
    """
    import torch

    per_tile = max(1, TILE // page_size)
    width = -(-table.shape[1] // per_tile) * per_tile
    last = torch.div(kv_lens - 1, page_size, rounding_mode="floor")
    return table.gather(1, torch.minimum(torch.arange(width, device=table.device), last[:, None]))


def unavailable() -> list[str]:
    """Return why the package cannot run, where it knows: its import succeeds even without CuTe DSL."""
    why = getattr(importlib.import_module(MODULE), "_IMPORT_ERROR", None)
    return [] if why is None else [f"{MODULE} cannot load CuTe DSL ({why}); {CURE}"]
