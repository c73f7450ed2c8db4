"""FlashAttention over ragged segments, for the expanded path: `flash_attn_varlen_func` and its relatives.

FlashAttention 2, and what vendors ship under its name, needs values as wide as keys: they are padded with
zeros and the result is cut. FlashAttention 3 takes 192 and 128 as they are.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from array import array
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, FusedOp, SegmentLengths
from mla_backends.kernels.limits import dtype_reasons
from mla_backends.kernels.scratch import Scratch
from mla_backends.kernels.vendor import KernelRefused, VendorModule, accepts, capturing, missing
from mla_backends.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

FUNCTION = "flash_attn_varlen_func"
ARGUMENTS = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
)
# Arguments that ask for the log-sum-exp; releases that have neither always return it.
ASKS = ("return_attn_probs", "return_softmax_lse")


@dataclass(frozen=True)
class VarlenLimits:
    """What one build of the function serves. The defaults are those of FlashAttention 2."""

    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    max_width: int = 256  # of keys
    multiple_of: int = 1  # of which the widths that the kernel is given must be multiples
    pads_values: bool = True  # values must always be as wide as keys
    unpadded: tuple[tuple[int, int], ...] = (
        (192, 128),
    )  # else these widths of keys and values are taken too
    device_reason: Callable[[torch.device], str] | None = None  # why this device cannot run it; "" if it can

    def pads(self, key_width: int, value_width: int) -> bool:
        """Return whether values of this width are padded to the width of such keys."""
        return value_width != key_width and (
            self.pads_values or (key_width, value_width) not in self.unpadded
        )

    def reasons(self, spec: AttentionSpec) -> list[str]:
        """Return why the function cannot serve layers like `spec` (empty if it can)."""
        why = self.device_reason(spec.device) if self.device_reason else ""
        found = [why] if why else []
        found += dtype_reasons(self.dtypes, spec)
        width = spec.qk_nope_head_dim + spec.qk_rope_head_dim
        if width > self.max_width:
            found.append(f"it takes heads of at most {self.max_width}, not {width}")
        given = width if self.pads(width, spec.v_head_dim) else spec.v_head_dim
        found += [
            f"it takes heads in multiples of {self.multiple_of}, not {one}"
            for one in dict.fromkeys((width, given))
            if one % self.multiple_of
        ]
        if self.pads(width, spec.v_head_dim) and spec.v_head_dim > width:
            found.append(f"it takes values no wider than keys, not {spec.v_head_dim} and {width}")
        return found


@dataclass(frozen=True)
class VarlenState:
    """Planned segments."""

    cu_q: torch.Tensor  # [n + 1] int32
    cu_k: torch.Tensor  # [n + 1] int32
    longest_q: int
    longest_k: int
    causal: bool


class VarlenOp(FusedOp):
    """One launch for all segments. A subclass calls the kernel in `attend`.

    Costs besides the kernel: a copy into `out`, one into `lse` where it is asked for, and one of v where it
    is padded. The plan holds the lengths it was made with, so a captured graph does not follow later ones.
    """

    contract = OPS["expanded_attention"]
    lse_optional = True

    def __init__(self, limits: VarlenLimits) -> None:
        """Take the kernel's limits on this vendor's devices."""
        self.limits = limits
        self._scratch = Scratch()

    @abstractmethod
    def attend(
        self,
        state: VarlenState,
        q: torch.Tensor,  # [Tq, h, n + r]
        k: torch.Tensor,  # [Tk, h, n + r]
        v: torch.Tensor,  # [Tk, h, v], or padded to the width of k
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [Tq, h, as wide as v] and the natural log-sum-exp, [h, Tq] or [segments, h, longest]."""

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        return self.limits.reasons(spec)

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> VarlenState:
        """Copy the bounds of the segments to the device, without waiting for it."""
        import torch

        count = len(batch.query_lens) + 1
        bounds = array("i", accumulate(batch.query_lens, initial=0))
        bounds.extend(accumulate(batch.kv_lens, initial=0))
        both = upload(torch.frombuffer(bounds, dtype=torch.int32), spec.device)
        longest_q, longest_k = (max(lengths, default=0) for lengths in (batch.query_lens, batch.kv_lens))
        return VarlenState(both[:count], both[count:], longest_q, longest_k, batch.causal)

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
        v = self._values(k, v)
        value, sums = self.attend(state, _aligned(q), _aligned(k), _aligned(v), float(softmax_scale))
        out.copy_(value[..., : out.shape[2]])
        if lse is not None:
            lse.copy_(self._logs(sums, state, lse))

    def _values(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return v as the kernel needs it: as wide as k, with zeros after its own columns."""
        if not self.limits.pads(k.shape[2], v.shape[2]):
            return v
        wide = self._scratch.take(f"v{v.shape[2]}", tuple(k.shape), v, fresh=capturing(v.device))
        wide[..., : v.shape[2]].copy_(v)
        return wide

    @staticmethod
    def _logs(sums: torch.Tensor, state: VarlenState, lse: torch.Tensor) -> torch.Tensor:
        """Return the log-sum-exp as [Tq, h] with -inf for queries without keys, where kernels give +inf.

        Old releases return [segments, h, longest] instead of [h, Tq].
        """
        import torch

        if sums.dim() == 3:
            token = torch.arange(lse.shape[0], dtype=torch.int32, device=lse.device)
            segment = torch.bucketize(token, state.cu_q[1:], right=True)
            place = token - state.cu_q.index_select(0, segment)
            sums = sums[segment, :, place]
        else:
            sums = sums.transpose(0, 1)
        return sums.masked_fill(sums == math.inf, -math.inf)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy where its rows start elsewhere than at multiples of 16 bytes.

    Kernels load so many at a time and check the last stride only. Widths that are no multiples of 8 are
    padded, and thereby copied, by the kernel's own wrapper.
    """
    import torch

    odd = any(stride % 8 for stride in tensor.stride()[:-1]) or tensor.data_ptr() % 16
    if odd and tensor.shape[-1] % 8 == 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


class FlashAttnVarlen(VarlenOp):
    """`flash_attn.flash_attn_varlen_func`, or that of another `module` such as `flash_attn_interface`."""

    def __init__(
        self, limits: VarlenLimits | None = None, *, module: str = "flash_attn", install: str = ""
    ) -> None:
        """Take the function's limits on this vendor's devices, and the hint for a missing module."""
        super().__init__(limits or VarlenLimits())
        self._vendor = VendorModule(module, (FUNCTION,), install)

    @property
    def _function(self) -> Any:
        return getattr(self._vendor, FUNCTION)

    @functools.cached_property
    def _options(self) -> dict[str, bool]:
        return {name: True for name in ASKS if accepts(self._function, name)}

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        found = self._vendor.reasons() or missing(self._function, FUNCTION, ARGUMENTS)
        return found + super().unsupported_reasons(spec)

    def attend(
        self,
        state: VarlenState,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the function. Raises `KernelRefused` when it returns no log-sum-exp."""
        result = self._function(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=state.cu_q,
            cu_seqlens_k=state.cu_k,
            max_seqlen_q=state.longest_q,
            max_seqlen_k=state.longest_k,
            softmax_scale=softmax_scale,
            causal=state.causal,
            **self._options,
        )
        if not isinstance(result, tuple):
            raise KernelRefused(
                f"{self._vendor.name}.{FUNCTION} returns no log-sum-exp; use another release."
            )
        value, sums = result[:2]
        return value, sums
