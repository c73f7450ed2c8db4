"""The contract between `mla` and an accelerator: what a backend must say, and what it may offer.

A backend is a plain object. It *must* name itself, probe, set up a device and synchronize; all else has a
default that means "unknown" or "not offered". Fused ops are optional: the core has a plain PyTorch
reference for every op of `OPS`, and runs it wherever a backend offers nothing better.

Importing this module does not import torch, so a plugin can be discovered on a host without it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mla_backends.errors import BackendOptionError

if TYPE_CHECKING:
    import torch

API_VERSION = 1

#: The ops a backend may replace, each with the version of its semantics (see the class docstrings below).
OPS = {
    "linear": "linear/1",
    "batched_linear": "batched_linear/1",
    "rms_norm": "rms_norm/1",
    "rotate_query": "rotate_query/1",
    "write_latent": "write_latent/1",
    "latent_attention": "latent_attention/1",
    "expanded_attention": "expanded_attention/1",
}


# ---------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class Availability:
    """What `Backend.probe` found. When `ok` is false, `reason` and `hint` are printed to the user."""

    ok: bool
    reason: str = ""  # why the device cannot be used, one clause
    hint: str = ""  # what the user can do about it, one clause
    evidence: Mapping[str, str] = field(default_factory=dict)  # marker -> what was seen


@dataclass(frozen=True)
class Peak:
    """A ceiling of the device and where the figure comes from (a URL, or how it was measured)."""

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
    """Device memory in bytes. None means the stack does not say."""

    free: int | None = None
    total: int | None = None
    allocated: int | None = None
    peak: int | None = None


# ---------------------------------------------------------------------------------------------- timing


class Timer(Protocol):
    """Times one region. `clock` labels the method in every result."""

    clock: str

    def start(self) -> None: ...

    def stop(self) -> float:
        """Return the milliseconds since `start`, all submitted work included."""
        ...


class HostTimer:
    """Host wall clock between two synchronizations: what a caller of the layer feels."""

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


# ---------------------------------------------------------------------------------------------- ops


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
    tensors, for kernels. `block_table[i, j]` is the page that holds tokens `j * page_size ...` of request i.
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
    """A weight in the layout one op wants. `nbytes` counts what it keeps alive."""

    data: Any
    nbytes: int


class FusedOp(ABC):
    """One implementation of one op. Subclasses set `contract` and implement `__call__`.

    Calls, by contract (tensors may be strided unless an op says otherwise; `out` tensors are written):

    - ``linear/1``: ``op(packed, x=[T, i], bias=[o] or None, out=[T, o])``
    - ``batched_linear/1``: ``op(packed, x=[T, h, i], out=[T, h, o])``
    - ``rms_norm/1``: ``op(x=[T, d], weight=[d], eps=float, out=[T, d])``
    - ``rotate_query/1``: ``op(x=[T, h, r], cos_sin=[T, r] fp32, interleaved=bool, out=[T, h, r])``;
      out may be x
    - ``write_latent/1``: ``op(kv_a=[T, c + r], weight=[c], eps=float, cos_sin=[T, r] fp32,
      interleaved=bool, slots=[T] int64, cache=[pages, page, c + r])``: RMSNorm the first c, rotate the
      last r, scatter both to the slots
    - ``latent_attention/1``: ``op(state, q=[T, h, c + r], cache=[pages, page, c + r],
      block_table=[B, n] int32, kv_lens=[B] int32, cu_q=[B + 1] int32, softmax_scale=float,
      out=[T, h, c], lse=[T, h] fp32)``: causal and ragged, k is the whole row and v its first c;
      lse is the natural logarithm; a request without keys gives out 0 and lse -inf
    - ``expanded_attention/1``: ``op(state, q=[Tq, h, n + r], k=[Tk, h, n + r], v=[Tk, h, v],
      softmax_scale=float, out=[Tq, h, v], lse=[Tq, h] fp32)`` with ``state = op.prepare(spec, lengths)``
      from ``SegmentLengths``; when causal, the last query of a segment sees the last key

    `cos_sin[t]` holds the r/2 cosines and then the r/2 sines of token t's position.

    Every refusal happens on the host before anything is launched: `unsupported_reasons` when the layer is
    built, `unsupported_batch` when a batch is planned.
    """

    contract: str
    nan_safe_tail = False  # slots past a request's end may hold NaN
    writes_lse = True  # attention fills lse; where the kernel has none, it is NaN

    def unsupported_reasons(self, spec: Any) -> list[str]:
        """Return why this op cannot serve `spec` (empty: it can)."""
        return []

    def unsupported_batch(
        self, spec: Any, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> list[str]:
        """Return why this op cannot serve these lengths (empty: it can).

        `page_size` is that of the cache; None for ops that see no pages.
        """
        return []

    def pack(self, weight: torch.Tensor) -> Packed:
        """Lay out `weight` ([o, i], or [h, o, i] for batched_linear) once, at load."""
        return Packed(weight, weight.numel() * weight.element_size())

    def unpack(self, packed: Packed) -> torch.Tensor:
        """Return the weight `pack` was given, bit for bit."""
        return packed.data

    def prepare(self, spec: Any, batch: Any) -> Any:
        """Build what every call with this batch shares, once per batch, without waiting for the device.

        Raises `BackendError` when the op cannot serve the batch after all. A state whose `graph_safe` is True
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


# ---------------------------------------------------------------------------------------------- backend


class Backend(ABC):
    """One kind of device. `TorchBackend` implements the optional part for devices with a torch module.

    Example::

        from mla_backends import Availability, TorchBackend, hookimpl

        class Acme(TorchBackend):
            name = "acme"
            api_version = 1               # the contract it was written for
            device_type = "acme"          # torch.acme exists after this import
            requires = ("torch_acme",)

        @hookimpl
        def mla_backend(options):
            return Acme(options)
    """

    name: str
    api_version: int  # no default: a plugin must not inherit whatever version happens to be installed
    device: torch.device | None = None  # what `setup` returned

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        """Keep the user's `-O key=value` options; a subclass names those it knows in `known_options`.

        Raises `BackendOptionError` for others; a subclass does so for values that it does not take.
        """
        self.options = dict(options or {})
        unknown = sorted(set(self.options) - set(self.known_options()))
        if unknown:
            raise BackendOptionError.unknown(self.name, unknown, self.known_options())
        threads = str(self.options.get("threads", 1))
        if not threads.isdecimal() or int(threads) < 1:
            raise BackendOptionError(
                f"backend '{self.name}' needs a positive number of threads, got '{threads}'."
            )

    @classmethod
    def known_options(cls) -> tuple[str, ...]:
        """Names of the options this backend understands. `threads` is passed by `--threads`."""
        return ("threads",)

    @abstractmethod
    def probe(self) -> Availability:
        """Say whether the device can be used. No exception, no subprocess, no device context, < 50 ms."""

    @abstractmethod
    def setup(self, index: int | None = None) -> torch.device:
        """Make device `index` (default: the current one) usable and return it.

        The device equals that of a tensor made on it (`cpu`, not `cpu:0`). Raises `BackendError`.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all submitted work is done."""

    def device_count(self) -> int | None:
        """Return how many devices this process sees, before `setup` as well; None: they cannot be counted.

        Tasks on one node then take device (local task number) modulo this; with None, the current one.
        """
        return None

    def device_info(self) -> DeviceInfo:
        """Describe the device; unknown facts are None."""
        return DeviceInfo(name=self.name)

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the floating dtypes the device computes natively (not emulated)."""
        import torch

        return (torch.bfloat16, torch.float32)

    def timer(self) -> Timer:
        """Return a timer for the headline numbers: host clock, synchronization included."""
        return HostTimer(self.synchronize)

    def device_timer(self) -> Timer | None:
        """Return a timer on the device's own clock; None where there is none."""
        return None

    def graph(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        """Capture `fn` and return its replay, or None where the stack has no graphs."""
        return None

    def memory(self) -> MemoryInfo:
        """Return memory counters of the device; unknown ones are None."""
        return MemoryInfo()

    def empty_cache(self) -> None:  # noqa: B027  # optional on purpose
        """Give cached memory back to the device."""

    def environment(self) -> Mapping[str, str]:
        """Report driver, SDK and library versions, for the result file."""
        return {}

    def sensors(self) -> Mapping[str, str]:
        """Report what changes while the device works (clocks, power, temperature), units in the names.

        Asked before and after timed passes, never between. Empty where there are no sensors.
        """
        return {}

    def ops(self) -> Mapping[str, FusedOp]:
        """Return fused ops by implementation name, best first; each says in `contract` which op it is."""
        return {}

    def sequence(self, calls: Sequence[OpCall], moving: Sequence[torch.Tensor]) -> Callable[..., None] | None:
        """Return one callable that makes `calls` in their order, or None: then they are made one by one.

        For hosts on which handing over a call takes as long as a small op. The layer asks when a forward
        comes a second time on the same memory, and calls the result with tensors that stand in for `moving`,
        of the same shapes, dtypes and strides, which it must not keep alive. They appear in `calls` as
        themselves, never as views. All other tensors stay those of `calls`; what they hold may change, and so
        may the number of host threads. Errors are those of the ops.
        """
        return None
