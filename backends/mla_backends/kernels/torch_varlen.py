"""The FlashAttention that torch itself brings, over ragged segments: `aten::_flash_attention_forward`.

The operator is private, but its first ten arguments and its first two results are the same in torch 2.4 to
2.13 (schemas of 2.5, 2.12 and 2.13; what is newer only adds keywords). Its public twin, `varlen_attn` in
`torch.nn.attention.varlen` (torch 2.10), is not used: it always passes window sizes, which torch_musa
refuses, and fills a tensor that nobody reads.

Whether the operator has a kernel is looked up when a layer is built. Whether that kernel is right is tried on
tiny segments before its first use: stacks of other vendors register it too, and do not document with which
key their causal mask is aligned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mla_backends.api import AttentionSpec, SegmentLengths
from mla_backends.errors import describe, one_line
from mla_backends.kernels.flash_attn import VarlenLimits, VarlenOp, VarlenState

if TYPE_CHECKING:
    import torch

    Segment = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

OPERATOR = "_flash_attention_forward"
# The kernel takes equal widths, in multiples of 8: torch's SDPA pads to that before it calls the same one.
LIMITS = VarlenLimits(multiple_of=8)
# What the tiny problem holds: (what a segment tries, its queries, its keys).
TRIED = (
    ("a segment without history", 5, 5),
    ("a segment with history", 3, 70),
    ("a single query", 1, 9),
    ("more queries than keys", 4, 2),
    ("no queries", 0, 3),
    ("queries without keys", 2, 0),
)
TRIED_HEADS = 2
TOLERANCE = 0.05  # of values and sums of order 1: far above rounding, far below one key too many or too few


class TorchVarlen(VarlenOp):
    """torch's own FlashAttention: needs no package besides torch. fp16 and bf16, heads of at most 256."""

    def __init__(self, limits: VarlenLimits = LIMITS) -> None:
        super().__init__(limits)

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        why = _no_kernel(spec.device)
        return ([why] if why else []) + super().unsupported_reasons(spec)

    def preflight(self, spec: AttentionSpec) -> list[str]:
        """Attend a few tiny segments and compare with the definition: reads back, so never while timing."""
        try:
            wrong = self._first_wrong(spec)
        except Exception as error:  # noqa: BLE001  # a build without the kernel raises anything
            return [f"this torch cannot run its own flash attention here ({one_line(describe(error))})"]
        return [f"torch's own flash attention is wrong here for {wrong}"] if wrong else []

    def attend(
        self,
        state: VarlenState,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the operator, without dropout (0.0) and without a debug mask (False)."""
        import torch

        result = getattr(torch.ops.aten, OPERATOR)(
            q,
            k,
            v,
            state.cu_q,
            state.cu_k,
            state.longest_q,
            state.longest_k,
            0.0,
            state.causal,
            False,
            scale=softmax_scale,
        )
        return result[0], result[1]

    def _first_wrong(self, spec: AttentionSpec) -> str:
        """Return what the first segment with a wrong result tries; "" if all are right."""
        segments = _draw(spec)
        for causal in (True, False):
            found = self._run(spec, segments, causal)
            for (label, *_), segment, out, lse in zip(TRIED, segments, *found, strict=True):
                true_out, true_lse = _attend(segment, spec.softmax_scale, causal)
                if not (_close(out, true_out) and _close(lse, true_lse)):
                    return f"{label} ({'causal' if causal else 'without a mask'})"
        return ""

    def _run(self, spec: AttentionSpec, segments: Sequence[Segment], causal: bool) -> list[Sequence[Any]]:
        """Return out and lse of every segment on the host; both held NaN before."""
        import torch

        q, k, v = (torch.cat(parts).to(spec.device) for parts in zip(*segments, strict=True))
        v = torch.cat((k, v), dim=2)[..., k.shape[2] :]  # as the layer has it: a slice of a projection
        out = q.new_full((*q.shape[:2], spec.v_head_dim), math.nan)
        lse = q.new_full(q.shape[:2], math.nan, dtype=torch.float32)
        query_lens, kv_lens = (tuple(one[side].shape[0] for one in segments) for side in (0, 1))
        state = self.prepare(spec, SegmentLengths(query_lens, kv_lens, causal))
        self(state, q=q, k=k, v=v, softmax_scale=spec.softmax_scale, out=out, lse=lse)
        return [tensor.cpu().split(query_lens) for tensor in (out, lse)]


def _no_kernel(device: torch.device) -> str:
    """Return why the operator cannot be called on this kind of device; "" if it can, or if unknown."""
    import torch

    if not hasattr(torch.ops.aten, OPERATOR):
        return f"this torch has no {OPERATOR}"
    key = getattr(torch._C, "_dispatch_key_for_device", None)
    has = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    if key is None or has is None or has(f"aten::{OPERATOR}", key(device.type)):
        return ""
    return f"this torch has no flash attention of its own for devices of kind '{device.type}'"


def _draw(spec: AttentionSpec) -> list[Segment]:
    """Return q [t, h, n + r], k [s, h, n + r] and v [s, h, v] of every segment, on the host."""
    import torch

    generator = torch.Generator().manual_seed(0)  # the caller's own random numbers stay as they are
    width = spec.qk_nope_head_dim + spec.qk_rope_head_dim

    def draw(tokens: int, columns: int) -> torch.Tensor:
        return torch.randn(tokens, TRIED_HEADS, columns, generator=generator, device="cpu").to(spec.dtype)

    return [(draw(t, width), draw(s, width), draw(s, spec.v_head_dim)) for _, t, s in TRIED]


def _attend(segment: Segment, scale: float, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [t, h, v] and lse [t, h] by the definition: 0 and -inf for a query without keys."""
    import torch

    q, k, v = (tensor.float() for tensor in segment)
    logits = torch.einsum("thd,shd->ths", q, k) * scale
    if causal:
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device="cpu").tril(len(k) - len(q))
        logits = logits.masked_fill(~seen[:, None], -math.inf)
    return torch.einsum("ths,shd->thd", logits.softmax(-1).nan_to_num(0.0), v), logits.logsumexp(-1)


def _close(found: torch.Tensor, true: torch.Tensor) -> bool:
    """Return whether no element is farther from the truth than rounding takes it; infinities are equal."""
    equal = found.float() == true
    return bool((equal | ((found.float() - true).abs() <= TOLERANCE)).all())
