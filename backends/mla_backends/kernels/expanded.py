"""Kernels for the expanded path, over ragged segments: `flash_attn_varlen_func`, torch's own, and SDPA.

FlashAttention 2, and what vendors ship under its name, needs values as wide as keys: they are padded with
zeros and the result is cut. FlashAttention 3 takes 192 and 128 as they are.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, FusedOp, SegmentLengths
from mla_backends.kernels.vendor import (
    DeviceReason,
    KernelRefused,
    Scratch,
    VendorOp,
    accepts,
    either,
    is_aligned,
    layer_reasons,
    padded,
)
from mla_backends.selftest import try_expanded
from mla_backends.upload import integers, upload

if TYPE_CHECKING:
    import torch

FUNCTION = "flash_attn_varlen_func"
ARGUMENTS = {
    "q": "q", "k": "k", "v": "v", "cu_seqlens_q": "cu_q", "cu_seqlens_k": "cu_k", "max_seqlen_q": "longest_q",
    "max_seqlen_k": "longest_k", "softmax_scale": "scale", "causal": "causal",
}  # fmt: skip
# Arguments that ask for the log-sum-exp; releases that have neither always return it.
ASKS = ("return_attn_probs", "return_softmax_lse")


@dataclass(frozen=True)
class VarlenLimits:
    """What one build of the function serves. The defaults are those of FlashAttention 2."""

    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    max_width: int = 256  # of keys
    multiple_of: int = 1  # of which the widths that the kernel is given must be multiples
    pads_values: bool = True  # values must always be as wide as keys
    unpadded: tuple[tuple[int, int], ...] = ((192, 128),)  # else these widths are taken too, keys and values
    max_unlisted: int | None = None  # of widths that are not in `unpadded`; None: `max_width`
    blind_tokens: bool = True  # a batch may have tokens that see no key
    device_reason: DeviceReason | None = None

    def pads(self, key_width: int, value_width: int) -> bool:
        """Return whether values of this width are padded to the width of such keys."""
        return value_width != key_width and (
            self.pads_values or (key_width, value_width) not in self.unpadded
        )

    def reasons(self, spec: AttentionSpec) -> list[str]:
        """Return why the function cannot serve layers like `spec` (empty if it can)."""
        reasons = layer_reasons(self.device_reason, self.dtypes, spec)
        width, values = spec.qk_nope_head_dim + spec.qk_rope_head_dim, spec.v_head_dim
        most = self.max_unlisted
        if most is not None and (width, values) not in self.unpadded and max(width, values) > most:
            listed = [f"{keys} and {narrower}" for keys, narrower in self.unpadded]
            listed += [f"of at most {most}"] if most else []
            return [*reasons, f"it takes heads of {either(listed)}, not {width} and {values}"]
        if width > self.max_width:
            reasons.append(f"it takes heads of at most {self.max_width}, not {width}")
        given = width if self.pads(width, values) else values
        reasons += [
            f"it takes heads in multiples of {self.multiple_of}, not {size}"
            for size in dict.fromkeys((width, given))
            if size % self.multiple_of
        ]
        if self.pads(width, values) and values > width:
            reasons.append(f"it takes values no wider than keys, not {values} and {width}")
        return reasons


@dataclass(frozen=True)
class VarlenState:
    """Planned segments."""

    cu_q: torch.Tensor  # [n + 1] int32
    cu_k: torch.Tensor  # [n + 1] int32
    kv_lens: torch.Tensor  # [n] int32
    longest_q: int
    longest_k: int
    causal: bool


Attended = tuple["torch.Tensor", "torch.Tensor"]


class VarlenOp(VendorOp):
    """One launch for all segments, in a subclass's `attend`, of a kernel in the form of FlashAttention's.

    The plan holds the lengths it was made with, so a captured graph does not follow later ones. Costs besides
    the kernel: a copy into `out` unless it writes there, one into `lse` where it is asked for, and one of v
    where it is padded.
    """

    contract = OPS["expanded_attention"]
    contiguous = False  # the kernel reads q, k and v as if they were, whatever their strides are

    @abstractmethod
    def attend(self, state: VarlenState, given: Mapping[str, Any], out: torch.Tensor) -> Attended:
        """Return out [Tq, h, v], or [Tq, h, as wide as v], and the natural log-sum-exp.

        Given are q [Tq, h, n + r], k [Tk, h, n + r], v [Tk, h, v], or padded to the width of k, and the
        scale. The log-sum-exp is [h, Tq], or [n, h, longest].
        """

    def unsupported_batch(
        self, spec: Any, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> list[str]:
        blind = any(keys < queries for queries, keys in zip(query_lens, kv_lens, strict=True))
        unknown = blind and not self.limits.blind_tokens
        return ["what it gives for a token without keys is not documented"] if unknown else []

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> VarlenState:
        """Copy the bounds of the segments to the device, without waiting for it."""
        count, lengths = len(batch.query_lens), (batch.query_lens, batch.kv_lens)
        bounds = chain(*(accumulate(lens, initial=0) for lens in lengths), batch.kv_lens)
        cu_q, cu_k, kv_lens = upload(integers(bounds), spec.device).split([count + 1, count + 1, count])
        longest_q, longest_k = (max(lens, default=0) for lens in lengths)
        return VarlenState(cu_q, cu_k, kv_lens, longest_q, longest_k, batch.causal)

    def __call__(
        self, state: VarlenState, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        if state.longest_q == 0:
            return
        if state.longest_k == 0:
            out.zero_()
            if lse is not None:
                lse.fill_(-math.inf)
            return
        if self.limits.pads(k.shape[2], v.shape[2]):
            v = padded(self._scratch, k, v)
        given = {name: self._as_read(operand) for name, operand in (("q", q), ("k", k), ("v", v))}
        value, sums = self.attend(state, {**given, "scale": float(softmax_scale)}, out)
        if value is not out:
            out.copy_(value[..., : out.shape[2]])
        if lse is not None:
            lse.copy_(self._logs(sums, state, lse))

    @staticmethod
    def _logs(sums: torch.Tensor, state: VarlenState, lse: torch.Tensor) -> torch.Tensor:
        """Return the log-sum-exp as [Tq, h], with -inf for queries without keys, where kernels give +inf."""
        import torch

        if sums.dim() == 3:  # of torch_musa, and of old releases
            token = torch.arange(lse.shape[0], dtype=torch.int32, device=lse.device)
            segment = torch.bucketize(token, state.cu_q[1:], right=True)
            sums = sums[segment, :, token - state.cu_q.index_select(0, segment)].t()
        return sums.t().masked_fill(sums.t() == math.inf, -math.inf)

    def _as_read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor, or a copy where its rows start elsewhere than at multiples of 16 bytes.

        Kernels load so many at a time and check the last stride only. Widths that are no multiples of 8 are
        padded, and thereby copied, by the kernel's own wrapper.
        """
        import torch

        fits = is_aligned(tensor) and (tensor.is_contiguous() or not self.contiguous)
        if fits or tensor.shape[-1] % 8:
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)


class FlashAttnVarlen(VarlenOp):
    """`flash_attn.flash_attn_varlen_func`, or that of another `module` such as `flash_attn_interface`."""

    module = "flash_attn"
    needs: Mapping[str, Mapping[str, Any]] = {FUNCTION: ARGUMENTS}
    limits = VarlenLimits()

    def attend(self, state: VarlenState, given: Mapping[str, Any], out: torch.Tensor) -> Attended:
        """Call the function. Raises `KernelRefused` when it returns no log-sum-exp."""
        function = getattr(self._vendor, FUNCTION)
        asks = {name: True for name in ASKS if accepts(function, name)}
        result = self._call(FUNCTION, state, given, **asks)
        if not isinstance(result, tuple):
            raise KernelRefused(
                f"{self._vendor.name}.{FUNCTION} returns no log-sum-exp; use another release."
            )
        return result[0], result[1]


# ------------------------------------------------------------------------------------- torch varlen
# The FlashAttention that torch itself brings, over ragged segments: `aten::_flash_attention_forward`.
#
# The operator is private, but its first ten arguments and its first two results are the same in torch 2.4 to
# 2.13 (schemas of 2.5, 2.12 and 2.13; what is newer only adds keywords). Its public twin, `varlen_attn` in
# `torch.nn.attention.varlen` (torch 2.10), is not used: it always passes window sizes, which torch_musa
# refuses, and fills a tensor that nobody reads.
#
# Whether the operator has a kernel is looked up when a layer is built. Whether that kernel is right is tried
# on tiny segments before its first use: stacks of other vendors register it too, and do not document with
# which key their causal mask is aligned.

OPERATOR = "_flash_attention_forward"
# Queries and keys of tiny segments: one without history, one with it, a single query, no queries, no keys.
TRIED = ((5, 3, 1, 0, 2), (5, 70, 9, 3, 0))


class TorchVarlen(VarlenOp):
    """torch's own FlashAttention: needs no package besides torch. fp16 and bf16, heads of at most 256."""

    module = "torch"
    label = "torch's own flash attention"
    cure = "use a torch that is built with it, or another op (`--ops reference` takes none of its kind)"
    needs: Mapping[str, Mapping[str, Any]] = {}
    # Its kernel takes equal widths, in multiples of 8: torch's SDPA pads to that before it calls it.
    limits = VarlenLimits(multiple_of=8)

    def layer_reasons(self, spec: AttentionSpec) -> list[str]:
        why = _no_kernel(spec.device)
        return ([why] if why else []) + super().layer_reasons(spec)

    def attempt(self, spec: AttentionSpec) -> str:
        """Attend a few tiny segments and compare with the definition: reads back, so never while timing."""
        for causal, how in ((True, "causal"), (False, "without a mask")):
            if wrong := try_expanded(self, replace(spec, num_heads=2), TRIED, causal):
                return f"{wrong} ({how})"
        return ""

    def attend(self, state: VarlenState, given: Mapping[str, Any], out: torch.Tensor) -> Attended:
        """Call the operator, without dropout (0.0) and without a debug mask (False)."""
        import torch

        result = getattr(torch.ops.aten, OPERATOR)(
            given["q"], given["k"], given["v"], state.cu_q, state.cu_k, state.longest_q, state.longest_k,
            0.0, state.causal, False, scale=given["scale"],
        )  # fmt: skip
        return result[0], result[1]


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


# --------------------------------------------------------------------------------------------- sdpa
# `torch.nn.functional.scaled_dot_product_attention` as an expanded attention, wherever torch supports it.
#
# torch picks the kernel. Its FlashAttention needs values as wide as keys and takes no mask. So values are
# padded on request, and only where there is no mask: what serves a mask takes both widths as they are. There
# is no log-sum-exp, so all keys of a segment must be present at once (`writes_lse` is False).
#
# A segment with history needs a mask, as torch's own causal rule aligns the first query with the first key.
# The bias `torch.nn.attention.bias.causal_lower_right` would spare it, but calls CUDA's private operators by
# itself, also on stacks that only imitate torch.cuda. `TorchVarlen` serves the same devices and tries its
# kernel first.

MAX_MASK = 1 << 28  # elements of the largest mask; only a causal segment with history needs one


@dataclass(frozen=True)
class SdpaState:
    """Lengths of the segments, and per segment what hides the future: a mask, torch's rule, or nothing."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    masks: tuple[torch.Tensor | bool, ...]  # [queries, keys] bool; True: causal without history; False: none


class SdpaExpanded(FusedOp):
    """One segment after another through torch's attention; a causal one ends at its last key.

    `pads_values`: give v the width of k with zeros, at the cost of a copy. Allocates as torch does.
    """

    contract = OPS["expanded_attention"]
    writes_lse = False
    lse_optional = True

    def __init__(self, *, pads_values: bool = False) -> None:
        self._pads_values = pads_values
        self._scratch = Scratch()

    def unsupported_batch(
        self, spec: Any, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> list[str]:
        pairs = zip(query_lens, kv_lens, strict=True)
        largest = max((queries * keys for queries, keys in pairs if 1 < queries < keys), default=0)
        too_large = f"its mask would have {largest} elements, more than {MAX_MASK}"
        return [too_large] if largest > MAX_MASK else []

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> SdpaState:
        """Build the masks of causal segments with history on the device."""
        pairs = zip(batch.query_lens, batch.kv_lens, strict=True)
        masks = tuple(batch.causal and _mask(queries, keys, spec.device) for queries, keys in pairs)
        return SdpaState(batch.query_lens, batch.kv_lens, masks)

    def __call__(
        self, state: SdpaState, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        if lse is not None:
            lse.fill_(float("nan"))
        unmasked = any(isinstance(mask, bool) for mask in state.masks)
        pads = self._pads_values and unmasked and v.shape[2] < k.shape[2]
        wide = padded(self._scratch, k, v) if pads else v
        by_query = (tensor.split(state.query_lens) for tensor in (q, out))
        by_key = (tensor.split(state.kv_lens) for tensor in (k, v, wide))
        parts = zip(*by_query, *by_key, state.masks, strict=True)
        for queries, target, keys, values, wide_values, mask in parts:
            if not len(keys):
                target.zero_()
            elif len(queries):
                given = wide_values if isinstance(mask, bool) else values
                target.copy_(_attend(queries, keys, given, mask, softmax_scale)[..., : v.shape[2]])


def _mask(queries: int, keys: int, device: torch.device) -> torch.Tensor | bool:
    """Return what hides the future from the last `queries` of `keys` tokens."""
    import torch

    if queries <= 1 or not keys:
        return False
    if queries == keys:
        return True
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | bool, scale: float
) -> torch.Tensor:
    """Return [t, h, d] of one segment."""
    import torch

    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))  # [1, h, t, d]
    causal, visible = (mask, None) if isinstance(mask, bool) else (False, mask)
    value = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, scale=scale
    )
    return value[0].transpose(0, 1)
