"""One call of an op, recorded before it was made: everything that is needed to make it again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch

from mla.cases import KINDS
from mla.cases.case import Kind, OpCase, entry_of
from mla.cases.memory import Layout, Tensors, poison
from mla.errors import MLAError
from mla.text import dtype_name, size
from mla_backends.api import FusedOp, SegmentLengths

# A call that reads more is not kept.
MAX_CALL_BYTES = 2 << 30
CONTEXT = "kv_b_proj"  # the role whose rows are all cached tokens
Lengths = tuple[Sequence[int], Sequence[int]]  # per request: new tokens, and keys


class TooLarge(MLAError):
    """A call that reads more than is kept."""


class CallFacts(msgspec.Struct, kw_only=True):
    """What is not a tensor."""

    kind: str  # of op
    role: str  # in the layer; that of an op alone is its kind
    op: str  # the name that the backend gave it
    spec_type: str
    spec: dict[str, Any]
    scalars: dict[str, float | bool | str]
    absent: list[str]  # arguments that were None
    views: dict[str, View]
    pages: Pages | None = None
    query_lens: list[Count] = []
    kv_lens: list[Count] = []
    causal: bool = True
    writes_lse: bool = True


def format_in(spec: Mapping[str, Any]) -> Any:
    """Return the format of the cache of an op, given the fields of its spec; "" where it is plain."""
    return spec.get("cache_format") or spec.get("index_format", "")


@dataclass(frozen=True)
class RecordedCall:
    """A call on the host. `memory` holds the operands before it; outputs were NaN where that was possible."""

    facts: CallFacts
    memory: Tensors
    weight: torch.Tensor | None = None  # as `pack` was given it
    kept_pages: torch.Tensor | None = None  # [k] int64
    pages: torch.Tensor | None = None  # [k, page, c + r]: their contents

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer."""
        dtype: torch.dtype = getattr(torch, self.facts.spec["dtype"])
        return dtype

    @property
    def entry(self) -> Kind:
        """The entry of the call's kind."""
        return entry_of(self.facts.kind, format_in(self.facts.spec))

    @property
    def case(self) -> OpCase:
        """The call without its operands, on the host."""
        facts = self.facts
        layout = Layout(facts.pages.shape[1] if facts.pages else 1)
        lengths = (tuple(facts.query_lens), tuple(facts.kv_lens))
        spec, context = self.spec(torch.device("cpu")), facts.role == CONTEXT
        return OpCase(facts.kind, spec, *lengths, context=context, causal=facts.causal, layout=layout)

    def spec(self, device: torch.device) -> Any:
        """Return the spec on a device."""
        return self.entry.spec(**{**self.facts.spec, "dtype": self.dtype, "device": device})

    def operand(self, name: str) -> torch.Tensor:
        """Return one operand, on the host."""
        view = self.facts.views[name]
        return view.of(self.memory[view.memory])

    def pieces(self, device: torch.device) -> Tensors:
        """Return fresh copies of the operands' memory on a device."""
        return {name: piece.to(device, copy=True) for name, piece in self.memory.items()}

    def cache(self, device: torch.device) -> torch.Tensor | None:
        """Return a fresh copy of the cache, if the op gets one."""
        if self.facts.pages is None or self.pages is None or self.kept_pages is None:
            return None
        cache = self.facts.pages.empty(self.pages.dtype, device)
        cache[self.kept_pages.to(device)] = self.pages.to(device)
        return cache

    def arguments(self, pieces: Mapping[str, torch.Tensor], cache: torch.Tensor | None) -> dict[str, Any]:
        """Return the arguments of the call, in this memory."""
        tensors = {name: view.of(pieces[view.memory]) for name, view in self.facts.views.items()}
        given = {} if cache is None else {"cache": cache}
        return {**tensors, **given, **self.facts.scalars, **dict.fromkeys(self.facts.absent)}

    def leading(self, op: FusedOp, spec: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what precedes the arguments: the packed weight, or a state that `op` prepares."""
        if self.weight is not None:
            return (op.pack(self.weight.to(spec.device, copy=True)),)
        batch = self.entry.batch(arguments, self.case.lengths)
        return () if batch is None else (op.prepare(spec, batch),)


@dataclass(frozen=True)
class Known:
    """What a call's tensors do not say."""

    kind: str
    role: str
    op: str
    spec: Any
    weight: torch.Tensor | None = None
    lengths: SegmentLengths | None = None  # of expanded attention
    writes_lse: bool = True


def record(known: Known, tensors: Mapping[str, Any], of_step: Lengths | None = None) -> RecordedCall:
    """Copy a call to the host before it is made. Raises `TooLarge`.

    `of_step`: new tokens and keys per request, to name the rows of ops that are not told.
    """
    located, pieces = views(without_cache(tensors))
    cache = tensors.get("cache")
    kept = None if cache is None else KINDS[known.kind].touched(tensors, cache.shape[1])
    _require_room(known, pieces, cache, kept)
    lengths = _lengths(known, tensors, of_step)
    facts = CallFacts(
        kind=known.kind,
        role=known.role,
        op=known.op,
        spec_type=type(known.spec).__name__,
        spec=_plain(known.spec),
        scalars={
            name: value for name, value in tensors.items() if isinstance(value, (bool, int, float, str))
        },
        absent=[name for name, value in tensors.items() if value is None],
        views=located,
        pages=None if cache is None or kept is None else _describe_pages(cache, kept),
        query_lens=lengths[0],
        kv_lens=lengths[1],
        causal=known.lengths.causal if known.lengths else True,
        writes_lse=known.writes_lse,
    )
    return RecordedCall(
        facts,
        {name: piece.to("cpu", copy=True) for name, piece in pieces.items()},
        None if known.weight is None else known.weight.detach().to("cpu", copy=True),
        kept,
        None if cache is None or kept is None else cache[kept.to(cache.device)].cpu(),
    )


def without_cache(tensors: Mapping[str, Any]) -> Tensors:
    """Return the tensors of a call that are copied whole, with what is between their rows."""
    return {name: tensor for name, tensor in tensors.items() if torch.is_tensor(tensor) and name != "cache"}


def _plain(spec: Any) -> dict[str, Any]:
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {**values, "dtype": dtype_name(spec.dtype), "device": ""}


def _require_room(
    known: Known, pieces: Tensors, cache: torch.Tensor | None, kept: torch.Tensor | None
) -> None:
    needed = sum(piece.nbytes for piece in pieces.values())
    needed += 0 if known.weight is None else known.weight.nbytes
    needed += 0 if cache is None or kept is None else len(kept) * cache[0].nbytes
    if needed > MAX_CALL_BYTES:
        raise TooLarge(
            f"a call of {known.role} reads {size(needed)}, more than the {size(MAX_CALL_BYTES)} that are "
            "kept: choose a smaller shape."
        )


def _lengths(
    known: Known, tensors: Mapping[str, Any], of_step: Lengths | None
) -> tuple[list[int], list[int]]:
    if known.lengths is not None:
        return list(known.lengths.query_lens), list(known.lengths.kv_lens)
    if "cu_q" in tensors:
        return tensors["cu_q"].cpu().diff().tolist(), tensors["kv_lens"].cpu().tolist()
    rows = tensors[KINDS[known.kind].varied[0]].shape[0]
    whole = of_step[known.role == CONTEXT] if of_step else ()
    return ([], []) if of_step is None or sum(whole) != rows else (list(of_step[0]), list(of_step[1]))


def _describe_pages(cache: torch.Tensor, kept: torch.Tensor) -> Pages:
    """Describe a cache; what is in its other pages is that of the first of them."""
    unread = torch.ones(cache.shape[0], dtype=torch.bool, device="cpu")
    unread[kept] = False
    first = int(unread.int().argmax()) if bool(unread.any()) else None
    value = torch.nan if first is None else cache[first].flatten()[0].item()
    return Pages(list(cache.shape), list(cache.stride()), None if value != value else float(value))


def poison_outputs(tensors: Mapping[str, Any]) -> None:
    """Poison `out` and `lse`, unless they share memory with what the op reads."""
    operands = [tensor for name, tensor in tensors.items() if torch.is_tensor(tensor) and name not in OUTPUTS]
    read = set(map(storage, operands))
    for name in OUTPUTS:
        out = tensors.get(name)
        if out is not None and storage(out) not in read:
            poison(out)


# ---------------------------------------------------------------------------------------------------- memory

# Tensors as they lie in memory: with their strides, what is between their rows, and what they share.

# What an op writes, besides the cache.
OUTPUTS = ("out", "lse")
# So many numbers before and behind an output are copied with it, if its memory has them: an op may hit them.
BESIDE = 1 << 16
# A size, a stride or a length in a file.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class View(msgspec.Struct, frozen=True):
    """Where a tensor lies in a copied piece of memory."""

    memory: str
    offset: Count
    shape: list[Count]
    stride: list[Count]

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a piece of memory."""
        return torch.as_strided(memory, self.shape, self.stride, self.offset)


class Pages(msgspec.Struct, frozen=True):
    """A paged cache of which only some pages were copied; `fill` is in all others."""

    shape: list[Count]
    stride: list[Count]
    fill: float | None  # None is NaN

    @property
    def numbers(self) -> int:
        """How many numbers the cache holds."""
        return math.prod(self.shape)

    def empty(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a cache that holds `fill` everywhere."""
        cache = torch.empty_strided(self.shape, self.stride, dtype=dtype, device=device)
        return cache.fill_(torch.nan if self.fill is None else self.fill)


def views(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, View], dict[str, torch.Tensor]]:
    """Return where tensors lie, and the pieces of memory [n] that hold them, not yet copied.

    A piece is named after its first tensor, and holds all that lies between the tensors of one storage;
    beside outputs it holds more.
    """
    located: dict[str, View] = {}
    pieces: dict[str, torch.Tensor] = {}
    for members in _by_storage(tensors):
        first = min(int(tensor.storage_offset()) for tensor in members.values())
        stop = max(int(tensor.storage_offset()) + extent(tensor) for tensor in members.values())
        if not members.keys().isdisjoint(OUTPUTS):
            first, stop = _widened(next(iter(members.values())), first, stop)
        name = next(iter(members))
        pieces[name] = members[name].as_strided((stop - first,), (1,), first)
        for member, tensor in members.items():
            offset = int(tensor.storage_offset() - first)
            located[member] = View(name, offset, list(tensor.shape), list(tensor.stride()))
    return located, pieces


def _widened(tensor: torch.Tensor, first: int, stop: int) -> tuple[int, int]:
    """Return a range of a tensor's storage with as much, or `BESIDE`, on either side where there is any."""
    beside = max(BESIDE, stop - first)
    return max(0, first - beside), min(tensor.untyped_storage().nbytes() // tensor.itemsize, stop + beside)


def _by_storage(tensors: Mapping[str, torch.Tensor]) -> Iterator[Tensors]:
    groups: dict[Any, Tensors] = {}
    for name, tensor in tensors.items():
        groups.setdefault((storage(tensor), tensor.dtype), {})[name] = tensor
    yield from groups.values()


def storage(tensor: torch.Tensor) -> tuple[str, int]:
    """Return what identifies the memory that a tensor is a view of."""
    return (str(tensor.device), tensor.untyped_storage().data_ptr())


def extent(tensor: torch.Tensor) -> int:
    """Return how many numbers lie from the tensor's first to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def covered(view: View, size: int) -> torch.Tensor:
    """Return which numbers [size] of its piece of memory a tensor consists of."""
    inside = torch.zeros(size, dtype=torch.bool, device="cpu")
    if math.prod(view.shape):
        view.of(inside).fill_(True)
    return inside
