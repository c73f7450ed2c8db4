"""`flash_mla`, under which NVIDIA, MetaX and Moore Threads ship absorbed attention, in three generations.

The generations differ in what plans a batch (`get_mla_metadata`): two tensors, or an object that the first
call fills and None. The adapter relies on what it gets, never on a version, and passes keywords only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mla_backends.kernels.limits import LatentLimits
from mla_backends.kernels.paged import Launch, PagedLatentOp, Result
from mla_backends.kernels.vendor import VendorModule, missing

if TYPE_CHECKING:
    import torch

ARGUMENTS = (
    "q",
    "k_cache",
    "block_table",
    "cache_seqlens",
    "head_dim_v",
    "tile_scheduler_metadata",
    "num_splits",
    "softmax_scale",
    "causal",
)


class FlashMla(PagedLatentOp):
    """`flash_mla_with_kvcache` of any generation; `module` may be another that has the same functions.

    Graphs: a call that is being captured plans again, inside the graph, so that every replay plans for the
    current lengths. Capture batches of one query length; `RaggedBatch.update_()` then reaches the kernel.
    """

    def __init__(
        self, limits: LatentLimits | None = None, *, module: str = "flash_mla", install: str = ""
    ) -> None:
        """Take the kernel's limits on this vendor's devices, and the hint for a missing module."""
        vendor = VendorModule(module, ("get_mla_metadata", "flash_mla_with_kvcache"), install)
        super().__init__(vendor, limits or LatentLimits())

    def interface_reasons(self) -> list[str]:
        name = f"{self._vendor.name}.flash_mla_with_kvcache"
        return missing(self._vendor.flash_mla_with_kvcache, name, ARGUMENTS)

    def plan(self, kv_lens: torch.Tensor, query_rows: int) -> Any:
        """Return the scheduler metadata and the splits: for one batch, whose layers share them."""
        return self._vendor.get_mla_metadata(kv_lens, query_rows, 1)

    def launch(self, plan: Any, call: Launch) -> Result:
        if call.captured:
            plan = self.plan(call.kv_lens, call.q.shape[1] * call.q.shape[2])
        metadata, splits = plan
        out, lse = self._vendor.flash_mla_with_kvcache(
            q=call.q,
            k_cache=call.cache.unsqueeze(2),
            block_table=call.block_table,
            cache_seqlens=call.kv_lens,
            head_dim_v=call.latent,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
            softmax_scale=call.scale,
            causal=True,
        )
        return out, lse
