"""The contract between `mla` and an accelerator: what a backend must provide, and what it may offer.

A backend *must* name itself, probe, set up a device and synchronize; all else has a default that means
"unknown" or "not offered". Fused ops are optional: the core runs a plain PyTorch reference of every op in
`OPS` wherever a backend offers nothing better. A host without torch can import this package.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mla_backends.errors import BackendOptionError

if TYPE_CHECKING:
    import torch

    from mla_backends.registry import Entry

__all__ = [
    "API_VERSION",
    "OPS",
    "AttentionSpec",
    "Availability",
    "Backend",
    "BatchView",
    "DeviceInfo",
    "FusedOp",
    "HostTimer",
    "IndexerSpec",
    "LinearSpec",
    "MemoryInfo",
    "NormSpec",
    "OpCall",
    "Packed",
    "Peak",
    "SegmentLengths",
    "Timer",
]

API_VERSION = 1


@dataclass(frozen=True)
class Availability:
    """What `Backend.probe` found. When `ok` is false, `reason` and `hint` are printed to the user."""

    ok: bool
    reason: str = ""  # why the device cannot be used, one clause
    hint: str = ""  # what the user can do about it, one clause
    evidence: Mapping[str, str] = field(default_factory=dict)  # marker -> what was seen


@dataclass(frozen=True)
class Peak:
    """A peak rate of the device, and the source of the figure (a URL, or how it was measured)."""

    value: float
    source: str


@dataclass(frozen=True)
class DeviceInfo:
    """Facts about a device. None means unknown; zero is never used for unknown."""

    name: str
    memory_bytes: int | None = None
    cache_bytes: int | None = None  # last-level cache, which decides whether weights stay warm
    bandwidth: Peak | None = None  # bytes per second
    flops: Mapping[str, Peak] = field(default_factory=dict)  # dtype name -> dense FLOP per second


@dataclass(frozen=True)
class MemoryInfo:
    """Device memory in bytes. None means unknown."""

    free: int | None = None
    total: int | None = None
    allocated: int | None = None
    peak: int | None = None


# ---------------------------------------------------------------------------------------------- ops
# The ops a backend may replace: what is fixed when a layer is built, and how each is called.

# Kind of op -> its contract: name and version of the semantics that `FusedOp` describes.
OPS = {
    "linear": "linear/1",
    "batched_linear": "batched_linear/1",
    "rms_norm": "rms_norm/1",
    "rotate_query": "rotate_query/1",
    "write_latent": "write_latent/2",
    "latent_attention": "latent_attention/2",
    "expanded_attention": "expanded_attention/1",
    "write_index_key": "write_index_key/1",
    "select_latents": "select_latents/1",
    "sparse_latent_attention": "sparse_latent_attention/1",
}
# Earlier versions are called as ever: they differ in nothing where the cache is plain.
EARLIER = {"write_latent": ("write_latent/1",), "latent_attention": ("latent_attention/1",)}


def current(contract: str, kind: str) -> bool:
    """Return whether an op of this contract is called for a kind of op."""
    return contract == OPS[kind] or contract in EARLIER.get(kind, ())


def claimed_formats(op: FusedOp) -> Collection[str]:
    """Return the cache formats that an op claims; a string is one name, not a collection of letters."""
    return (op.cache_formats,) if isinstance(op.cache_formats, str) else op.cache_formats


def format_refusals(op: FusedOp, spec: Any) -> list[str]:
    """Return why `op` does not serve the cache format of `spec`: it claims another; empty if it can."""
    name, claimed = getattr(spec, "cache_format", ""), claimed_formats(op)
    base, scaled, _ = name.partition(":")
    if not name or name in claimed or (scaled and f"{base}:" in claimed):
        return []
    if why := op.refused_formats.get(base):
        return [f"it does not serve the cache format '{name}': {why}"]
    claims = f"only {', '.join(sorted(claimed))}" if claimed else "none"
    claims += " in addition to the layer's dtype"
    return [f"it does not know the cache format '{name}': it claims {claims}"]


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
    # Of the latent cache: "" is plain, rows [c + r] in `dtype`; else the name of a format, and its bytes.
    cache_format: str = ""
    token_bytes: int = 0
    topk: int = 0  # of `sparse_latent_attention`: the width of a selection


@dataclass(frozen=True)
class IndexerSpec:
    """Everything about the indexer of sparse attention that is fixed when the layer is built."""

    num_heads: int
    head_dim: int
    rope_head_dim: int  # the FIRST channels of queries and keys, which are rotated
    topk: int
    dtype: torch.dtype
    device: torch.device
    # Of the index cache: "" is plain, rows [head_dim] in `dtype`; "fp8" has pages of bytes (`FusedOp`).
    index_format: str = ""
    token_bytes: int = 0

    @property
    def cache_format(self) -> str:
        """The format of the cache that ops of this spec read and write."""
        return self.index_format


class BatchView(Protocol):
    """The lengths and tables of the requests an attention op is prepared for.

    Lengths exist twice: as host tuples, for decisions that must not wait for the device, and as device
    tensors, for kernels. `kv_lens` includes the new tokens, `query_lens`. `block_table[i, j]` is the page
    that holds tokens `j * page_size ...` of request i; `page_size` is a power of two, 1
    included.
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

    `data` is whatever the op wants, of any type: only the op that packed it looks at it; by default it is the
    weight as it was given. `nbytes` is the memory it keeps alive. A layer packs each weight once and calls
    the op with the result as often as it likes. Weights of other layers have the same shapes, and another
    weight may later lie where a dropped one was, so neither finds a packed weight again.
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
    - ``write_latent/2``: ``op(kv_a=[T, c + r], weight=[c], eps=float, cos_sin=[T, r] fp32,
      interleaved=bool, slots=[T] int64, cache=[pages, page, c + r])``: RMSNorm the first c, rotate the
      last r, and write both to row `slots[t]` of the flattened cache, ``cache.view(-1, c + r)``; where the
      op declares `rotates`, it may be given x and out of that op too, for the same tokens and angles
    - ``latent_attention/2``: ``op(state, q=[T, h, c + r], cache=[pages, page, c + r],
      block_table=[B, n] int32, kv_lens=[B] int32, cu_q=[B + 1] int32, softmax_scale=float,
      out=[T, h, c], lse=[T, h] fp32)``: causal and ragged, k is the whole row and v its first c;
      lse is the natural logarithm; a request without keys gives out 0 and lse -inf
    - ``expanded_attention/1``: ``op(state, q=[Tq, h, n + r], k=[Tk, h, n + r], v=[Tk, h, v],
      softmax_scale=float, out=[Tq, h, v], lse=[Tq, h] fp32)`` with ``state = op.prepare(spec, lengths)``
      from ``SegmentLengths``; when causal, the last query of a segment sees the last key, and there are as
      many keys as queries at least, or none; a segment without keys gives out 0 and lse -inf

    Sparse attention, with D channels of an indexer, whose first R are rotated:

    - ``write_index_key/1``: ``op(k=[T, D], weight=[D], bias=[D], eps=float, cos_sin=[T, R] fp32,
      interleaved=bool, slots=[T] int64, cache=[pages, page, D])``: LayerNorm all of k, rotate its first R
      channels, round once, and write row `slots[t]` of the flattened cache
    - ``select_latents/1``: ``op(state, q=[T, H, D], weights=[T, H] fp32, cache=[pages, page, D],
      block_table=[B, n] int32, kv_lens=[B] int32, cu_q=[B + 1] int32, out=[T, topk] int32)``: token j of the
      request scores ``sum over h of weights[t, h] * max(0, q[t, h] . cache[j])`` in fp32, and the k best of
      those that query t sees are selected. out[t]: min(topk, seen) distinct positions within the request, in
      any order, then -1. Ties fall any way; weights may be negative and hold every scale
    - ``sparse_latent_attention/1``: as ``latent_attention/2``, with ``selection=[T, topk] int32`` behind
      cu_q: query t attends to the positions within its request that selection[t] names, all of which it
      sees, and to no other. They are distinct, in any order; -1 is none, and stands behind the others. A
      query that selects nothing gets out 0 and lse -inf

    An index cache of ``cache_format="fp8"`` is [pages, page, D + 4] uint8, and splits each page: first its
    page * D values in e4m3, token after token, and then its page float32 scales. An op of
    `select_latents` whose scores are rounded to bfloat16 declares `scores_in_bf16`.

    Where `spec.cache_format` is not "", ops of the cache are also given ``cache_format=NAME``, and cache is
    [pages, page, spec.token_bytes] uint8: of the latent cache, rows of a token's bytes, as the format's codec
    (`mla.cache.formats`) writes them of the latent and key, rounded to the layer's dtype first where the op
    declares `encodes_rounded`. Attention is over the decoded bytes, new tokens included. An op lists what it
    serves in `cache_formats`: formats that it reads as their codecs do, scales included. For the plain cache,
    version 1 is the same.

    `cos_sin[t]` holds the r/2 cosines and then the r/2 sines of token t's position. Angle i turns one pair
    (a, b) into (a cos - b sin, b cos + a sin), and both stay in their places: `x[2 i]` and `x[2 i + 1]` if
    `interleaved`, `x[i]` and `x[i + r/2]` if not.

    Operands of all ops but attention: x, kv_a, cos_sin and out may be slices of wider contiguous tensors, so
    every stride but the last may be larger than the shape says; elements of the last dimension are adjacent.
    bias, weight, slots and the cache are contiguous. No two of them overlap, except where out may be x. What
    lies between, before and behind their rows belongs to others and may be NaN: it is not written, and no
    result depends on it. Slots are distinct, and come in any order.

    Alignment: where every width of the spec (heads and topk are none) is a multiple of 16 bytes, so are
    address and strides, the last apart, of every operand in the layer's dtype, and of cos_sin. In other
    layers these, and integers, weights of heads and lse everywhere, are aligned to their own numbers and no
    more; so are the hidden states that a caller hands to a layer. An op that needs more looks at addresses
    and strides, and copies, takes another way, or raises `BackendError`.

    Values are any that layers have: rows of zeros, such as padding, rotations by angle 0, rows and channels a
    thousand times larger than others, denormals, logits in the thousands of either sign. An op may take
    denormals for 0, and write 0 in their place.

    Sums, norms and rotations are in fp32 and rounded once, to the dtype of the output. Rows do not depend on
    each other. An op may keep packed weights and scratch memory, but nothing that a later result depends on:
    the caller changes operands in place, passes others at the same address, and keeps outputs.

    `kv_lens[b]` counts every token that request b attends to, its new ones included: they are in the cache
    before attention is called. The rows `cu_q[b]` to `cu_q[b + 1]` of q and out are its new tokens; the last
    of them sees all `kv_lens[b]` tokens, and each earlier one sees one token fewer than the next.

    Operands of attention, and of a selection: the cache, kv_lens and cu_q are contiguous; all others may be
    strided, but elements of their last dimension are adjacent. Entries of block_table past the pages
    of a request name some page of the cache, which may hold NaN. Slots past a request's end hold finite
    numbers of up to 1e4 in size, or NaN as well where an op declares `nan_safe_tail`. Requests with a common
    prefix may share its pages, and a request may name a page twice: attention only reads them. q, k, v, the
    cache and out are in the layer's dtype, lse is in fp32. out and lse overlap no other operand, q included.
    There is at least one request or segment; T, Tq and Tk may be 0.

    A call keeps nothing that it was given: the caller may overwrite inputs and outputs after it, and pass
    others, of another layer, with the same state. Only what `prepare` gets lives as long as the state.

    Every refusal happens on the host before anything is launched: `unsupported_reasons` when the layer is
    built, `unsupported_batch` when a batch is planned.
    """

    contract: str
    nan_safe_tail = False  # slots past a request's end may hold NaN
    writes_lse = True  # attention fills lse; where the kernel has none, it is NaN
    cache_formats: Collection[str] = ()  # that it serves beside the plain one; "fp8:" is fp8 over any scale
    refused_formats: Mapping[str, str] = {}  # that a user may expect of its kernel -> why it has them not
    encodes_rounded = False  # write_latent encodes what it first rounds to the layer's dtype
    scores_in_bf16 = False  # select_latents compares scores that are rounded to bfloat16
    lse_optional = False  # attention may be called with lse=None where nobody reads it
    rotates: FusedOp | None = None  # the `rotate_query` op whose work `write_latent` can do in its own launch
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


# ------------------------------------------------------------------------------------------- timers
class Timer(Protocol):
    """Times one region. `clock` labels the method in every result."""

    clock: str

    def start(self) -> None: ...

    def stop(self) -> float:
        """Return the milliseconds since `start`, all submitted work included."""
        ...


class HostTimer:
    """Host wall clock between two synchronizations: what a caller of the layer experiences."""

    clock = "host"

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._start = 0

    def start(self) -> None:
        self._synchronize()
        self._start = time.perf_counter_ns()

    def stop(self) -> float:
        self._synchronize()
        return (time.perf_counter_ns() - self._start) / 1e6


# ------------------------------------------------------------------------------------------ backend

MOST_THREADS = 4096  # of a host; more are a typo


class Backend(ABC):
    """One kind of device. `TorchBackend` implements the optional part for devices with a torch module.

    Example:

    ```python
    from mla_backends import Availability, TorchBackend, hookimpl

    class Acme(TorchBackend):
        name = "acme"
        api_version = 1               # the contract it was written for
        device_type = "acme"          # torch.acme exists after this import
        requires = ("torch_acme",)

    @hookimpl
    def mla_backend(options):
        return Acme(options)
    ```
    """

    name: str
    api_version: int  # no default: a plugin must not inherit whatever version happens to be installed
    device: torch.device | None = None  # what `setup` returned
    entry: Entry | None = None  # where the registry found it: name, distribution and version

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        """Keep the user's `-O key=value` options; a subclass lists those it knows in `known_options`.

        Raises `BackendOptionError` for others; a subclass raises it for invalid values as well.
        """
        self.options = dict(options or {})
        unknown = sorted(set(self.options) - set(self.known_options()))
        if unknown:
            raise BackendOptionError.unknown(self.name, unknown, self.known_options())
        threads = str(self.options.get("threads", 1))
        if not re.fullmatch("[0-9]{1,4}", threads) or not 1 <= int(threads) <= MOST_THREADS:
            raise BackendOptionError(
                f"backend '{self.name}' needs 1 to {MOST_THREADS} threads, got '{threads}'."
            )

    def __repr__(self) -> str:
        options = f", options={self.options}" if self.options else ""
        return f"{type(self).__name__}({self.name!r}, device={str(self.device)!r}{options})"

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        """Names of the options this backend understands. `threads` is passed by `--threads`."""
        return ("threads",)

    @abstractmethod
    def probe(self) -> Availability:
        """Return whether the device can be used. No exception, no subprocess, no device context, < 50 ms."""

    @abstractmethod
    def setup(self, index: int | None = None) -> torch.device:
        """Make device `index` (default: the current one) usable and return it.

        The device equals that of a tensor made on it (`cpu`, not `cpu:0`). Raises `BackendError`.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all submitted work is done."""

    def device_count(self) -> int | None:
        """Return how many devices this process sees, also before `setup`; None if they cannot be counted.

        Tasks on one node then take device (local task number) modulo this; with None, the current one.
        """
        return None

    def device_info(self) -> DeviceInfo:
        """Describe the device; unknown facts are None."""
        return DeviceInfo(name=self.name)

    def collectives(self) -> str | None:
        """Return the name under which torch.distributed knows this device's library, such as "nccl".

        None where none is known: the device cannot take part in a run over several ranks.
        """
        return None

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the floating dtypes the device computes natively (not emulated)."""
        import torch

        return (torch.bfloat16, torch.float32)

    def timer(self) -> Timer:
        """Return a timer on the host's clock, synchronization included; no number is from it, see README."""
        return HostTimer(self.synchronize)

    def device_timer(self) -> Timer | None:
        """Return a timer on the device's own clock; None if it has none."""
        return None

    def graph(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        """Capture `fn` and return its replay, or None if the stack has no graphs.

        `fn` has run before. It may run again here, to warm up, and is to be captured once; its operands stay
        where they are, and a replay reads and writes them there. Calling `fn` again is no replay.
        """
        return None

    def memory(self) -> MemoryInfo:
        """Return memory counters of the device; unknown ones are None."""
        return MemoryInfo()

    def empty_cache(self) -> None:  # noqa: B027  # optional on purpose
        """Release cached memory to the device."""

    def environment(self) -> Mapping[str, str]:
        """Report driver, SDK and library versions, for the result file."""
        return {}

    def sensors(self) -> Mapping[str, str]:
        """Report what changes while the device works (clocks, power, temperature), units in the names.

        Called before and after timed passes, never in between. Empty if there are no sensors.
        """
        return {}

    def remarks(self) -> Sequence[str]:
        """Return what the user should know before a run, such as a default; called after `setup`."""
        return ()

    def ops(self) -> Mapping[str, FusedOp]:
        """Return fused ops by implementation name, best first; `contract` names the op that each replaces."""
        return {}

    def sequence(self, calls: Sequence[OpCall], moving: Sequence[torch.Tensor]) -> Callable[..., None] | None:
        """Return one callable that makes all `calls` in order; None to have them made one by one.

        For hosts on which dispatching a call takes as long as a small op. The layer asks when a forward
        repeats on the same memory, and calls the result with tensors that replace `moving`, of the same
        shapes, dtypes and strides, which it must not keep alive. They appear in `calls` as themselves, never
        as views. All other tensors stay those of `calls`; their contents may change, and so may the number of
        host threads. Errors are those of the ops.
        """
        return None
