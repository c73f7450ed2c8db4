"""The ops a backend may replace: what is fixed when a layer is built, and how each is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# Kind of op -> its contract: name and version of the semantics that `FusedOp` describes.
OPS = {
    "linear": "linear/1",
    "batched_linear": "batched_linear/1",
    "rms_norm": "rms_norm/1",
    "rotate_query": "rotate_query/1",
    "write_latent": "write_latent/1",
    "latent_attention": "latent_attention/1",
    "expanded_attention": "expanded_attention/1",
}


@dataclass(frozen=True)
class LinearSpec:
    """One weight of the layer: `linear` has groups == 1, `batched_linear` one weight per head."""

    in_features: int
    out_features: int
    groups: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm of the query latent."""

    features: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class AttentionSpec:
    """Everything about attention that is fixed when the layer is built."""

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    softmax_scale: float
    dtype: torch.dtype
    device: torch.device


class BatchView(Protocol):
    """The lengths and tables of the requests an attention op is prepared for.

    Lengths exist twice: as host tuples, for decisions that must not wait for the device, and as device
    tensors, for kernels. `kv_lens` includes the new tokens, `query_lens`. `block_table[i, j]` is the page
    that holds tokens `j * page_size ...` of request i.
    """

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int

    @property
    def block_table(self) -> torch.Tensor: ...  # [B, max_pages] int32

    @property
    def kv_lens_device(self) -> torch.Tensor: ...  # [B] int32

    @property
    def cu_q(self) -> torch.Tensor: ...  # [B + 1] int32


@dataclass(frozen=True)
class Packed:
    """A weight in the layout that one op uses, and all that the op may remember of it.

    `nbytes` is the memory it keeps alive. A layer packs each weight once and calls the op with the result as
    often as it likes. Weights of other layers have the same shapes, and another weight may later lie where a
    dropped one was, so neither finds a packed weight again.
    """

    data: Any
    nbytes: int


class FusedOp(ABC):
    """One implementation of one op. Subclasses set `contract` and implement `__call__`.

    Calls, by contract, with T rows, which may be 0; an op writes its outputs, and nothing else:

    - ``linear/1``: ``op(packed, x=[T, i], bias=[o] or None, out=[T, o])``
    - ``batched_linear/1``: ``op(packed, x=[T, h, i], out=[T, h, o])``
    - ``rms_norm/1``: ``op(x=[T, d], weight=[d], eps=float, out=[T, d])``
    - ``rotate_query/1``: ``op(x=[T, h, r], cos_sin=[T, r] fp32, interleaved=bool, out=[T, h, r])``;
      out may be x
    - ``write_latent/1``: ``op(kv_a=[T, c + r], weight=[c], eps=float, cos_sin=[T, r] fp32,
      interleaved=bool, slots=[T] int64, cache=[pages, page, c + r])``: RMSNorm the first c, rotate the
      last r, and write both to row `slots[t]` of the flattened cache, ``cache.view(-1, c + r)``
    - ``latent_attention/1``: ``op(state, q=[T, h, c + r], cache=[pages, page, c + r],
      block_table=[B, n] int32, kv_lens=[B] int32, cu_q=[B + 1] int32, softmax_scale=float,
      out=[T, h, c], lse=[T, h] fp32)``: causal and ragged, k is the whole row and v its first c;
      lse is the natural logarithm; a request without keys gives out 0 and lse -inf
    - ``expanded_attention/1``: ``op(state, q=[Tq, h, n + r], k=[Tk, h, n + r], v=[Tk, h, v],
      softmax_scale=float, out=[Tq, h, v], lse=[Tq, h] fp32)`` with ``state = op.prepare(spec, lengths)``
      from ``SegmentLengths``; when causal, the last query of a segment sees the last key

    `cos_sin[t]` holds the r/2 cosines and then the r/2 sines of token t's position. Angle i turns one pair
    (a, b) into (a cos - b sin, b cos + a sin), and both stay in their places: `x[2 i]` and `x[2 i + 1]` if
    `interleaved`, `x[i]` and `x[i + r/2]` if not.

    Operands of all ops but attention: x, kv_a, cos_sin and out may be slices of wider contiguous tensors, so
    every stride but the last may be larger than the shape says; elements of the last dimension are adjacent.
    bias, weight, slots and the cache are contiguous. No two of them overlap, except where out may be x. What
    lies between, before and behind their rows belongs to others and may be NaN: it is not written, and no
    result depends on it. Slots are distinct, and come in any order.

    Sums, norms and rotations are in fp32 and rounded once, to the dtype of the output. Rows do not depend on
    each other. An op may keep packed weights and scratch memory, but nothing that a later result depends on:
    the caller changes operands in place, passes others at the same address, and keeps outputs.

    `kv_lens[b]` counts every token that request b attends to, its new ones included: they are in the cache
    before attention is called. The rows `cu_q[b]` to `cu_q[b + 1]` of q and out are its new tokens; the last
    of them sees all `kv_lens[b]` tokens, and each earlier one sees one token fewer than the next.

    Operands of attention: q, k, v, out, lse and block_table may be strided, but elements of their last
    dimension are adjacent; the cache, kv_lens and cu_q are contiguous. Entries of block_table past the pages
    of a request name some page of the cache, which may hold NaN. Requests with a common prefix may share
    its pages: attention only reads them. q, k, v, the cache and out are in the layer's dtype, lse is in fp32.
    out and lse overlap no other operand, q included. There is at least one request or segment; T, Tq and Tk
    may be 0.

    A call keeps nothing that it was given: the caller may overwrite inputs and outputs after it, and pass
    others, of another layer, with the same state. Only what `prepare` gets lives as long as the state.

    Every refusal happens on the host before anything is launched: `unsupported_reasons` when the layer is
    built, `unsupported_batch` when a batch is planned.
    """

    contract: str
    nan_safe_tail = False  # slots past a request's end may hold NaN
    writes_lse = True  # attention fills lse; where the kernel has none, it is NaN
    lse_optional = False  # attention may be called with lse=None where nobody reads it
    compiles = ""  # what `preflight` compiles or loads, for the line that is printed while it does
    # What a user should know of how it runs here, one sentence each, such as a smaller tile than planned.
    # Read after `preflight`, and again once it has run.
    remarks: Sequence[str] = ()

    def unsupported_reasons(self, spec: Any) -> list[str]:
        """Return why this op cannot serve `spec` (empty if it can)."""
        return []

    def preflight(self, spec: Any) -> list[str]:
        """Return why this op cannot run here although `unsupported_reasons(spec)` is empty.

        For kernels that are compiled or loaded at their first use: plan one tiny problem, and return what
        that raises as a reason with its cure. May take minutes, which is why probes do not call it; the core
        does so once per process and spec, before anything is timed.
        """
        return []

    def unsupported_batch(
        self, spec: Any, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> list[str]:
        """Return why this op cannot serve these lengths (empty if it can).

        `page_size` is that of the cache; None for ops that do not use pages.
        """
        return []

    def pack(self, weight: torch.Tensor) -> Packed:
        """Lay out `weight` ([o, i], or [h, o, i] for batched_linear; of any strides) once, at load.

        Neither this nor a call writes to it, and it stays as it is for as long as the result lives, which may
        therefore be the weight itself.
        """
        return Packed(weight, weight.numel() * weight.element_size())

    def unpack(self, packed: Packed) -> torch.Tensor:
        """Return the weight `pack` was given, bit for bit."""
        return packed.data

    def prepare(self, spec: Any, batch: Any) -> Any:
        """Build what every call with this batch shares, once per batch, without waiting for the device.

        Raises `BackendError` when the op turns out not to serve the batch. A state whose `graph_safe` is True
        promises that a captured call follows the batch's device tensors when they change in place.
        """
        return None

    @abstractmethod
    def __call__(self, *args: Any, **tensors: Any) -> None: ...


@dataclass(frozen=True)
class OpCall:
    """One call of an op: ``op(*arguments, **tensors)``."""

    op: FusedOp
    arguments: tuple[Any, ...]
    tensors: Mapping[str, Any]


@dataclass(frozen=True)
class SegmentLengths:
    """Lengths of a ragged `expanded_attention` call: q and k rows of the segments lie back to back."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    causal: bool
