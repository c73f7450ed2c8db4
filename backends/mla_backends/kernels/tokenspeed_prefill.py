"""`tokenspeed_mla_prefill`: ordinary causal attention over ragged segments on SM100, SM103 and SM107.

Read in the wheels tokenspeed-mla 0.1.8 to 2.0.4 (2026-11) and in vLLM (commit 055e47c), which runs it in
bfloat16; the package's README promises only fp8 for these widths, so `preflight` computes a small case first.
q, k and v are read as if they were contiguous, whatever their strides are. The log-sum-exp is natural here,
unlike that of decoding.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from mla_backends.api import OPS, AttentionSpec, FusedOp, SegmentLengths
from mla_backends.kernels.limits import dtype_reasons
from mla_backends.kernels.tokenspeed import CURE, MODULE, aligned, unavailable
from mla_backends.kernels.trial import failures, remembered, try_expanded
from mla_backends.kernels.vendor import VendorModule, missing
from mla_backends.upload import upload

if TYPE_CHECKING:
    import torch

FUNCTION = "tokenspeed_mla_prefill"
ARGUMENTS = (
    "query",
    "key",
    "value",
    "seq_lens",
    "cum_seq_lens",
    "max_seq_len",
    "batch_size",
    "softmax_scale",
    "is_causal",
    "return_lse",
    "cum_seq_lens_q",
    "max_seq_len_q",
    "out",
)
WIDTHS = (192, 128)  # of keys and values


@dataclass(frozen=True)
class SegmentsState:
    """Planned segments."""

    cu_q: torch.Tensor  # [n + 1] int32
    cu_k: torch.Tensor  # [n + 1] int32
    kv_lens: torch.Tensor  # [n] int32
    longest_q: int
    longest_k: int
    causal: bool
    blind: torch.Tensor | None  # queries before the first key of a segment that has keys, int64


class TokenspeedPrefill(FusedOp):
    """`tokenspeed_mla.tokenspeed_mla_prefill`, bfloat16 keys of 192 and values of 128.

    Costs besides the kernel: a copy of v, as the layer's is a slice, and one into `lse`. The plan holds the
    lengths it was made with, so a captured graph does not follow later ones.
    """

    contract = OPS["expanded_attention"]
    lse_optional = True
    compiles = "tokenspeed_mla's prefill kernel"

    def __init__(
        self, device_reason: Callable[[torch.device], str] | None = None, *, install: str = ""
    ) -> None:
        """Take why a device cannot run it ("" if it can), and the hint for a missing package."""
        self._vendor = VendorModule(MODULE, (FUNCTION,), install)
        self._device_reason = device_reason
        self._tried: dict[AttentionSpec, list[str]] = {}

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        found = self._vendor.reasons() or self._interface_reasons()
        why = self._device_reason(spec.device) if self._device_reason else ""
        widths = (spec.qk_nope_head_dim + spec.qk_rope_head_dim, spec.v_head_dim)
        return [
            *found,
            *([why] if why else []),
            *dtype_reasons(("bfloat16",), spec),
            *([] if widths == WIDTHS else [f"it takes keys of 192 and values of 128, not {widths}"]),
        ]

    def _interface_reasons(self) -> list[str]:
        return unavailable() or missing(self._vendor.tokenspeed_mla_prefill, FUNCTION, ARGUMENTS)

    def preflight(self, spec: AttentionSpec) -> list[str]:
        """Compile the kernel and compute a small case; return why it does not work here."""
        return remembered(self._tried, spec, lambda: failures(lambda: try_expanded(self, spec), MODULE, CURE))

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> SegmentsState:
        """Copy the bounds of the segments to the device, without waiting for it."""
        import torch

        count = len(batch.query_lens)
        bounds = array("i", accumulate(batch.query_lens, initial=0))
        bounds.extend(accumulate(batch.kv_lens, initial=0))
        bounds.extend(batch.kv_lens)
        table = upload(torch.frombuffer(bounds, dtype=torch.int32), spec.device)
        cu_q, cu_k, kv_lens = table.split([count + 1, count + 1, count])
        longest_q, longest_k = (max(lengths, default=0) for lengths in (batch.query_lens, batch.kv_lens))
        blind = _blind(batch, spec.device)
        return SegmentsState(cu_q, cu_k, kv_lens, longest_q, longest_k, batch.causal, blind)

    def __call__(
        self, state: SegmentsState, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, 192], [Tk, h, 192], [Tk, h, 128]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # [Tq, h, 128], [Tq, h] fp32
    ) -> None:  # fmt: skip
        if state.longest_q == 0:
            return
        if state.longest_k == 0:
            out.zero_()
            if lse is not None:
                lse.fill_(-math.inf)
            return
        value, sums = self._vendor.tokenspeed_mla_prefill(
            query=_dense(q),
            key=_dense(k),
            value=_dense(v),
            seq_lens=state.kv_lens,
            cum_seq_lens=state.cu_k,
            max_seq_len=state.longest_k,
            batch_size=state.kv_lens.shape[0],
            softmax_scale=float(softmax_scale),
            is_causal=state.causal,
            return_lse=True,
            cum_seq_lens_q=state.cu_q,
            max_seq_len_q=state.longest_q,
            out=out if out.is_contiguous() and aligned(out) else None,
        )
        if value is not out:
            out.copy_(value)
        if lse is not None:
            lse.copy_(sums)
        if state.blind is not None:
            out.index_fill_(0, state.blind, 0)
            if lse is not None:
                lse.index_fill_(0, state.blind, -math.inf)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as the kernel reads it: contiguous, and aligned."""
    import torch

    if tensor.is_contiguous() and aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _blind(batch: SegmentLengths, device: torch.device) -> torch.Tensor | None:
    """Return the queries that see no key although their segment has some; None if there are none."""
    import torch

    if not batch.causal:
        return None
    starts = accumulate(batch.query_lens, initial=0)
    found = array("q")
    for first, queries, keys in zip(starts, batch.query_lens, batch.kv_lens, strict=False):
        found.extend(range(first, first + queries - keys) if keys else ())
    return upload(torch.frombuffer(found, dtype=torch.int64), device) if found else None
