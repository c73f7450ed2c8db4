"""Iluvatar's `ixformer.inference.functions`: absorbed attention of one query token per row.

A request with several new tokens becomes one row per token, each with its own length and the request's block
table; there is no mask to pass. Such rows read the request's keys once per token, unlike one row of many.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from mla_backends.kernels.limits import LatentLimits
from mla_backends.kernels.paged import Launch, PagedLatentOp, Result
from mla_backends.kernels.vendor import KernelRefused, VendorModule, accepts, missing

FUNCTION = "vllm_paged_attention_mla"
ARGUMENTS = ("output", "query", "kv_cache", "scale", "block_tables", "context_lens", "max_context_len")
LSE, GRAPH = "return_softmax_lse", "use_cuda_graph"
# What rows without keys give, and which pages are too small, is not known for this closed library.
LIMITS = LatentLimits(page_sizes=None, max_queries=1, empty_rows=False, lse_layout="tokens_first")


class IxformerMla(PagedLatentOp):
    """`vllm_paged_attention_mla`. Releases without a log-sum-exp leave NaN in `lse`: `writes_lse` is False.

    Graphs: the host's upper bound of the lengths is the block table's capacity, so replays may grow into it.
    """

    def __init__(self, limits: LatentLimits = LIMITS, *, install: str = "") -> None:
        """Take the kernel's limits; regardless of them, a row holds one query token."""
        vendor = VendorModule("ixformer.inference.functions", (FUNCTION,), install)
        super().__init__(vendor, replace(limits, max_queries=1))

    @property
    def writes_lse(self) -> bool:  # type: ignore[override]
        return not self._vendor.reasons() and LSE in self._flags

    @property
    def _function(self) -> Any:
        return getattr(self._vendor, FUNCTION)

    @functools.cached_property
    def _flags(self) -> frozenset[str]:
        """Return which of its newer arguments the installed function has."""
        return frozenset(name for name in (LSE, GRAPH) if accepts(self._function, name))

    def interface_reasons(self) -> list[str]:
        return missing(self._function, FUNCTION, ARGUMENTS)

    def launch(self, plan: Any, call: Launch) -> Result:
        if not call.cache.is_contiguous():
            raise KernelRefused("ixformer reads a contiguous latent cache only, and this one is a slice.")
        wanted = (LSE, GRAPH) if call.captured else (LSE,)
        options = {name: True for name in wanted if name in self._flags}
        rows, _, heads, _ = call.q.shape
        out = call.out
        if out is None:
            out = self._scratch.take("out", (rows, 1, heads, call.latent), call.q, fresh=call.captured)
        result = self._function(
            output=out[:, 0],
            query=call.q[:, 0],
            kv_cache=call.cache,
            scale=call.scale,
            block_tables=call.block_table,
            context_lens=call.kv_lens,
            max_context_len=call.longest,
            **options,
        )
        return out, result[1][:, None] if LSE in options else None
