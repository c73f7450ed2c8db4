"""Backends for the suite to judge: right ones with their own ops, and a device that is only imagined.

The CPU stands in for every device. `Asynchronous` gives it a queue, so that what does not wait shows, and
`Tape` a graph that really replays: recorded operations on the same memory, without the host's code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from smaller_cases import make_smaller
from torch.utils._python_dispatch import TorchDispatchMode

from mla.conformance.checks.attention import index
from mla.conformance.report import CheckResult
from mla.conformance.suite import carry_out, instances
from mla.conformance.trial import BackendUnderTest
from mla.conformance.xfails import Xfails
from mla_backends import Backend, FusedOp
from mla_backends.api import HostTimer, MemoryInfo, Packed
from mla_backends.testing import HostBackend


class Sound(HostBackend):
    """The CPU, as right as can be: it has graphs and a memory counter, and whatever ops it is given."""

    name = "sound"

    def synchronize(self) -> None:
        Asynchronous.wait()

    def timer(self) -> HostTimer:
        return HostTimer(self.synchronize)

    def memory(self) -> MemoryInfo:
        used = Allocated.bytes
        return MemoryInfo(allocated=used, peak=used, free=1 << 40, total=1 << 41)

    def graph(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        return Tape.capture(fn)


class Allocated(TorchDispatchMode):
    """Counts bytes of what `torch.zeros` makes, as a device's allocator would."""

    bytes: int | None = None  # None: nobody counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.zeros.default:
            Allocated.bytes = (Allocated.bytes or 0) + made.nbytes
        return made


class Asynchronous(TorchDispatchMode):
    """A device with a queue: a product takes 3 ms of its time, and reading a tensor waits for the queue.

    The queue moves only while somebody waits, so that what a test sees does not depend on a busy host.
    """

    PRODUCT_SECONDS = 3e-3
    queued = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.out:
            Asynchronous.queued += self.PRODUCT_SECONDS
        elif func is torch.ops.aten._to_copy.default:
            self.wait()
        return func(*args, **(kwargs or {}))

    @classmethod
    def wait(cls) -> None:
        time.sleep(cls.queued)
        cls.queued = 0.0


class Tape(TorchDispatchMode):
    """Records operations and repeats them on the same tensors; host code does not run again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the device was waited for during capture")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @classmethod
    def capture(cls, fn: Callable[[], None]) -> Callable[[], None]:
        tape = cls()
        with tape:
            fn()
        return tape.replay

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            fresh = func(*args, **kwargs)
            given = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
            for old, new in zip(_tensors(recorded), _tensors(fresh), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor written in place
                    old.copy_(new)


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(nested) if torch.is_tensor(leaf))


# -------------------------------------------------------------------------------------- ops that are right


class TransposedLinear(FusedOp):
    """Keeps the weight as [i, o]."""

    contract = "linear/1"

    def pack(self, weight: torch.Tensor) -> Packed:
        columns = weight.t().contiguous()
        return Packed(columns, columns.nbytes)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.data.t()

    def __call__(
        self, packed: Packed, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        product = x.float() @ packed.data.float()
        out.copy_(product if bias is None else product + bias.float())


class HeadByHead(FusedOp):
    contract = "batched_linear/1"

    def __call__(self, packed: Packed, *, x: torch.Tensor, out: torch.Tensor) -> None:
        for head, weight in enumerate(packed.data):
            out[:, head] = x[:, head].float() @ weight.float().T


class LoopLatent(FusedOp):
    """Query by query. As real kernels do, it refuses many heads and other pages than 64."""

    contract = "latent_attention/1"

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return [f"it serves up to 64 heads, not {spec.num_heads}"] if spec.num_heads > 64 else []

    def unsupported_batch(self, spec: Any, query_lens: Any, kv_lens: Any, page_size: Any = None) -> list[str]:
        return ["it serves contexts up to 2000 tokens"] if max(kv_lens, default=0) > 2000 else []

    def prepare(self, spec: Any, batch: Any) -> Any:
        from mla_backends import BackendError

        if batch.page_size != 64:
            raise BackendError(f"it reads pages of 64 tokens, not {batch.page_size}")
        return batch.query_lens, batch.kv_lens

    def __call__(
        self, state: Any, *, q: Any, cache: Any, block_table: Any, kv_lens: Any, cu_q: Any, **rest: Any
    ) -> None:
        token, (out, lse) = 0, (rest["out"], rest["lse"])
        for request, (new, length) in enumerate(zip(*state, strict=True)):
            pages = block_table[request, : -(-length // 64)].long()
            rows = cache[pages].flatten(0, 1)[:length].float()
            for visible in range(length - new + 1, length + 1):
                keys = rows[: max(0, visible)]
                logits = q[token].float() @ keys.T * rest["softmax_scale"]
                lse[token] = logits.logsumexp(-1) if len(keys) else -torch.inf
                out[token] = (
                    (logits - lse[token][:, None]).exp() @ keys[:, : out.shape[2]] if len(keys) else 0
                )
                token += 1


class DenseLatent(FusedOp):
    """Attends whole pages behind a mask made from the device's own lengths, so that a graph may replay it."""

    contract = "latent_attention/1"
    nan_safe_tail = True

    class State:
        graph_safe = True

    def prepare(self, spec: Any, batch: Any) -> Any:
        return self.State()

    def __call__(
        self, state: Any, *, q: Any, cache: Any, block_table: Any, kv_lens: Any, cu_q: Any, **rest: Any
    ) -> None:
        width, tokens = cache.shape[2], torch.arange(q.shape[0])
        rows = cache.index_select(0, block_table.flatten().long()).view(len(kv_lens), -1, width).float()
        request = torch.searchsorted(cu_q[1:], tokens, right=True)
        seen = kv_lens[request] - (cu_q[request + 1] - 1 - tokens)
        hidden = torch.arange(rows.shape[1])[None] >= seen[:, None]
        rows = rows[request].masked_fill(hidden[..., None], 0)
        logits = torch.einsum("thd,tsd->ths", q.float(), rows) * rest["softmax_scale"]
        lse = logits.masked_fill(hidden[:, None], -torch.inf).logsumexp(-1)
        weights = (logits - lse.clamp_min(-1e30)[..., None]).masked_fill(hidden[:, None], -torch.inf).exp()
        rest["out"].copy_(torch.einsum("ths,tsd->thd", weights, rows[..., : rest["out"].shape[2]]))
        rest["lse"].copy_(lse)


class LoopExpanded(FusedOp):
    contract = "expanded_attention/1"

    def prepare(self, spec: Any, batch: Any) -> Any:
        return batch

    def __call__(
        self, state: Any, *, q: Any, k: Any, v: Any, softmax_scale: float, out: Any, lse: Any
    ) -> None:
        token = first = 0
        for new, length in zip(state.query_lens, state.kv_lens, strict=True):
            for i in range(new):
                stop = length - new + i + 1 if state.causal else length
                keys, values = (part[first : first + max(0, stop)].float() for part in (k, v))
                logits = torch.einsum("hd,shd->hs", q[token].float(), keys) * softmax_scale
                lse[token] = logits.logsumexp(-1) if len(keys) else -torch.inf
                weights = (logits - lse[token][:, None]).exp()
                out[token] = torch.einsum("hs,shd->hd", weights, values) if len(keys) else 0
                token += 1
            first += length


class FusedNorm(FusedOp):
    contract = "rms_norm/1"

    def __call__(self, *, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps))


class ComplexRotation(FusedOp):
    contract = "rotate_query/1"

    def __call__(
        self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor
    ) -> None:
        turn = torch.complex(*cos_sin.chunk(2, dim=-1))[:, None]
        half = x.shape[-1] // 2
        if interleaved:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (half, 2)).contiguous())
            out.copy_(torch.view_as_real(pairs * turn).flatten(-2))
        else:
            turned = torch.complex(*x.float().chunk(2, dim=-1)) * turn
            out.copy_(torch.cat((turned.real, turned.imag), dim=-1))


class HalfByHalf(FusedOp):
    """Writes latents and keys one after the other."""

    contract = "write_latent/1"

    def __call__(
        self, *, kv_a: Any, weight: Any, eps: float, cos_sin: Any, interleaved: bool, slots: Any, cache: Any
    ) -> None:
        rows, width = cache.view(-1, cache.shape[-1]), weight.shape[0]
        norm, key = kv_a[:, :width].clone(), kv_a[:, width:].clone()
        FusedNorm()(x=norm.clone(), weight=weight, eps=eps, out=norm)
        ComplexRotation()(x=key[:, None], cos_sin=cos_sin, interleaved=interleaved, out=key[:, None])
        rows[:, :width].index_copy_(0, slots, norm)
        rows[:, width:].index_copy_(0, slots, key)


RIGHT_OPS = (
    TransposedLinear,
    HeadByHead,
    DenseLatent,
    LoopLatent,
    LoopExpanded,
    FusedNorm,
    ComplexRotation,
    HalfByHalf,
)

Run = Callable[..., list[CheckResult]]


@pytest.fixture(scope="session")
def sound() -> type[Sound]:
    """Return the class of a backend that passes; keyword `ops` gives it ops."""
    return Sound


@pytest.fixture(scope="session")
def right_ops() -> dict[str, FusedOp]:
    """Return an op of each kind that is written in another way than the reference, and right."""
    return {op.__name__.lower(): op() for op in RIGHT_OPS}


@pytest.fixture(autouse=True)
def nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the memory of caches beyond 32 bits, which some ops copy."""
    monkeypatch.setattr(index, "PLACES", (1 << 22,))


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time of large cases, for slow ops."""
    make_smaller(monkeypatch)


@pytest.fixture(scope="session")
def judge() -> Run:
    """Return a function that runs checks of a backend, on the quick grid and by default in fp32."""

    def judge(
        backend: Backend,
        *only: str,
        dtypes: tuple[torch.dtype, ...] = (torch.float32,),
        xfails: Xfails | None = None,
        **facts: Any,
    ) -> list[CheckResult]:
        subject = BackendUnderTest(backend, backend.name, quick=True, **facts)
        chosen = instances(subject, dtypes, only)
        return [carry_out(one, subject, xfails or Xfails()) for one in chosen]

    return judge


@pytest.fixture
def asynchronous() -> Iterator[type[Asynchronous]]:
    """Give the CPU a queue for one test."""
    with Asynchronous():
        yield Asynchronous


@pytest.fixture
def allocated() -> Iterator[None]:
    """Count what is allocated during one test."""
    Allocated.bytes = 0
    with Allocated():
        yield
    Allocated.bytes = None
