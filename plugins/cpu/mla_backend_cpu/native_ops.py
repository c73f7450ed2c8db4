"""Fused ops over the compiled kernels: projections, row-wise ops and attention.

What the kernels take is asked before an address is taken: plain tensors with memory, of the right shape.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

from mla_backend_cpu import products
from mla_backend_cpu.library import Library
from mla_backends import BackendError, FusedOp
from mla_backends.api import AttentionSpec, LinearSpec, Packed, SegmentLengths
from mla_backends.operands import misfit

if TYPE_CHECKING:
    import torch


def operand(
    name: str, x: Any, dtype: torch.dtype, *shape: int | None, direct: bool = False, written: bool = False
) -> torch.Tensor:
    """Return x. Raises ValueError unless it is a plain host tensor of this dtype and shape (None: any).

    `direct`: as the kernels read it. It may be a copy: bind it to a name, so that it outlives the call.
    `written`: raises ValueError too if its elements share memory, as expanded ones do.
    """
    if wrong := misfit(x, shape, dtype, _host()) or _lost(x) or (_shared(x) if written else ""):
        raise ValueError(f"{name} {wrong}")
    return _direct(name, x) if direct else x


def _direct(name: str, x: torch.Tensor) -> torch.Tensor:
    return x if is_direct(x) else operand(name, x.contiguous(), x.dtype, *x.shape)  # which a mode may fake


rows = functools.partial(operand, direct=True)
output = functools.partial(operand, direct=True, written=True)  # of a copy, the caller copies back


#: Address and bytes of caches in a storage; another one may get its memory.
_advised: WeakKeyDictionary[torch.UntypedStorage, set[tuple[int, int]]] = WeakKeyDictionary()


def pages(kernels: Library, cache: Any, coded: bool, width: int) -> torch.Tensor:
    """Return the cache [pages, page, width], a large one on huge pages from its first use on.

    Rows of a selection are far apart, and looking up small pages took a third of the time of selecting.
    Raises ValueError unless it is contiguous, with slots.
    """
    import torch

    operand("cache", cache, torch.uint8 if coded else torch.bfloat16, None, None, width)
    if not cache.is_contiguous():
        raise ValueError("the native ops need a cache with contiguous pages; this one is strided.")
    if not cache.shape[1]:
        raise ValueError("cache has pages without a slot.")
    if (place := (cache.data_ptr(), cache.nbytes))[1] >= CACHE_BYTES:
        advised = _advised.setdefault(cache.untyped_storage(), set())
        if place not in advised:
            advised.add(place)
            kernels.functions.mla_huge_pages(*place)
    return cache


def is_direct(x: torch.Tensor) -> bool:
    """Return whether elements of the last dimension are adjacent: the kernels read them as vectors."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _shared(x: torch.Tensor) -> str:
    """Return that elements of x share memory; "" if none do."""
    if x.is_contiguous():
        return ""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return f"has strides {list(x.stride())}, so several elements share memory."
        reach += (size - 1) * stride
    return ""


def span(x: torch.Tensor) -> int:
    """Return how many elements of its storage x reaches over."""
    if x.is_contiguous() or not x.numel():
        return x.numel()
    reach = 1
    for size, stride in zip(x.shape, x.stride()):  # noqa: B905  # `strict` costs time
        reach += (size - 1) * stride
    return reach


@functools.cache
def _host() -> torch.device:
    import torch

    return torch.device("cpu")


def _lost(x: torch.Tensor) -> str:
    """Return why x has no memory, or less than its shape says; "" if it has."""
    try:
        spare = x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize
        used = x.nbytes if x.is_contiguous() else span(x) * x.itemsize
    except RuntimeError:
        return "has no memory of its own, as inside vmap and other transforms: pass a plain tensor."
    if used and (used > spare or not x.data_ptr()):
        return "has lost its memory: its storage was resized."
    return ""


# ------------------------------------------------------------------------------------- cache formats
# How a run of columns is stored: `Kind` of native/formats.h.
PLAIN, E4M3_FIXED, E4M3_POWER, E4M3_ANY, INT8, INT8_BLOCKS = range(6)

Runs = list[tuple[int, int, int, int]]  # columns, kind, the byte of the first code and of the scale


def _flat(c: int, r: int) -> Runs:
    return [(c, E4M3_FIXED, 0, 0), (r, E4M3_FIXED, c, 0)]


def _tiled(c: int, r: int, kind: int) -> Runs:
    starts = range(0, c, 128)
    tiles = [(min(128, c - at), kind, at, c + 4 * i) for i, at in enumerate(starts)]
    return [*tiles, (r, PLAIN, c + 4 * len(starts), 0)]


# Name -> how rows of a latent of c and a key of r columns are stored; `mla.cache.formats` defines the bytes.
_FORMATS: Mapping[str, Callable[[int, int], Runs]] = {
    "fp8": _flat,
    "fp8_ds_mla": functools.partial(_tiled, kind=E4M3_POWER),
    "fp8_ds_mla_any": functools.partial(_tiled, kind=E4M3_ANY),
    "int8": lambda c, r: [(c, INT8, 0, c + r), (r, INT8, c, c + r + 4)],
    "q8_0": lambda c, r: [(32, INT8_BLOCKS, 34 * i + 2, 34 * i) for i in range((c + r) // 32)],
}
# Those that the ops of the cache serve; "fp8:" is fp8 over any scale.
CACHE_FORMATS = (*_FORMATS, "fp8:")
_BYTES = {PLAIN: 2}  # of a code; 1 for others
_SCALE_BYTES = {PLAIN: 0, E4M3_FIXED: 0, INT8_BLOCKS: 2}  # 4 for others


class Layout(NamedTuple):
    """How rows of the cache are stored, as the kernels take it."""

    runs: array[int] | None  # None: plain bf16
    bytes: int  # of a row
    scale: float = 0.0  # of formats whose rows hold none

    @property
    def row(self) -> tuple[bool, int]:
        """Whether rows are bytes, and how many elements they have."""
        return self.runs is not None, self.bytes if self.runs is not None else self.bytes // 2

    @property
    def arguments(self) -> tuple[int | None, int, int, float]:
        """The address of the runs, their number, the bytes of a row and the scale."""
        if self.runs is None:
            return None, 0, self.bytes, 0.0
        return self.runs.buffer_info()[0], len(self.runs) // 4, self.bytes, self.scale


@functools.cache  # which keeps what recorded calls point to
def layout_of(cache_format: str, c: int, r: int) -> Layout:
    """Return the layout of a latent of c columns and a key of r. Raises ValueError for an unknown format."""
    if not cache_format:
        return Layout(None, 2 * (c + r))
    name, _, scale = cache_format.partition(":")
    if name not in _FORMATS:
        raise ValueError(f"the native ops do not know the cache format '{cache_format}'.")
    if name == "q8_0" and (c + r) % 32:
        raise ValueError(f"kv_lora_rank + qk_rope_head_dim {c + r} is not a multiple of 32.")
    runs = _FORMATS[name](c, r)
    size = sum(columns * _BYTES.get(kind, 1) + _SCALE_BYTES.get(kind, 4) for columns, kind, *_ in runs)
    return Layout(array("q", (number for run in runs for number in run)), size, float(scale or 1))


# --------------------------------------------------------------------------------------- native ops
# Fused ops over the compiled kernels: projections and row-wise ops.

WIDE_TOKENS = 16  # from here on, widening x first pays, if fp32 products are faster
CACHE_BYTES = 32 << 20  # of a cache that is put on huge pages
HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on arm64 with small pages of 4 KiB


class NativeOp(FusedOp):
    """What all ops on the kernels share."""

    multiples: Mapping[str, int] = {}  # sizes by their names in the spec -> what they are multiples of

    def __init__(self, kernels: Library, *, insist: bool = True) -> None:
        """`insist`: the user chose these kernels, so they serve even if others are likely faster."""
        self.kernels = kernels
        self._insist = insist
        self.functions = kernels.functions

    def unsupported_reasons(self, spec: Any) -> list[str]:
        import torch

        if spec.dtype != torch.bfloat16:
            return [f"it computes in bfloat16, but this layer is {spec.dtype}"]
        return self.misfits(spec)

    def misfits(self, spec: Any) -> list[str]:
        """Return why the kernels cannot serve these sizes."""
        return self.misfitting(*(getattr(spec, name) for name in self.multiples))

    def misfitting(self, *sizes: int) -> list[str]:
        """Return which of the sizes in `multiples` are none of these."""
        named = zip(self.multiples.items(), sizes, strict=True)
        return [f"{name} {n} is not a multiple of {of}" for (name, of), n in named if n <= 0 or n % of]

    def calling(self, functions: Any) -> NativeOp:
        """Return this op with other functions in the place of its kernels."""
        made = object.__new__(type(self))
        vars(made).update(vars(self), functions=functions)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeOp:
        """Return the op itself: it keeps nothing but the kernels."""
        return self

    def __reduce__(self) -> NoReturn:
        """Raise `BackendError`: the kernels are this process's, and weights are packed for them."""
        raise BackendError(
            "native ops, and layers whose weights they have packed, cannot be pickled: save the layer's "
            "state_dict(), and load it into a new one."
        )


def threads() -> int:
    """Return torch's number of threads, which the backend has set."""
    import torch

    return torch.get_num_threads()


def check(wrong: bytes | None) -> None:
    """Raise MemoryError if a kernel reports that memory ran out, ValueError if its arguments are invalid."""
    if wrong is not None:
        raise (MemoryError if wrong.startswith(b"out of memory") else ValueError)(wrong.decode())


def finish(wrong: bytes | None, target: torch.Tensor, out: torch.Tensor) -> None:
    """Raise what a kernel reports, as `check` does; copy what it wrote to a copy of `out` back."""
    check(wrong)
    if target is not out:
        out.copy_(target)


def require_sizes(*reasons: str) -> None:
    """Raise ValueError with the first reason why the kernels cannot serve these sizes, if there is one."""
    if reasons:
        raise ValueError(f"{reasons[0]}.")


def whole_pages(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialized memory, aligned to a huge page if it is large enough for one."""
    import torch

    spare = HUGE_PAGE // dtype.itemsize
    if elements < spare:
        return operand("memory", torch.empty(elements, dtype=dtype, device="cpu"), dtype, elements)
    memory = torch.empty(elements + spare, dtype=dtype, device="cpu")  # unwritten pages take no memory
    operand("memory", memory, dtype, elements + spare)
    begin = -memory.data_ptr() % HUGE_PAGE // dtype.itemsize
    return memory[begin : begin + elements]


class _Product(NativeOp):
    """Weights in panels of 16 outputs: of pairs of inputs in bf16, of single ones in fp32.

    Packed data are the panels and the weight's shape, [o, i] or [h, o, i].
    """

    dims: int  # of a weight
    multiples: Mapping[str, int] = {"in_features": 2}  # in bf16

    def unsupported_reasons(self, spec: LinearSpec) -> list[str]:
        import torch

        if spec.dtype not in (torch.bfloat16, torch.float32):
            return [f"it computes in bfloat16 and float32, but this layer is {spec.dtype}"]
        return self.misfits(spec)

    def misfits(self, spec: LinearSpec) -> list[str]:
        import torch

        fp32 = spec.dtype == torch.float32
        if not self._insist and (fp32 or products.torch_has_tiles()):
            gain = products.product_gain(self.kernels, fp32)
            if gain < 1:
                return [f"its products were measured at {gain:.2f}x the speed of torch's"]
        return [] if fp32 else super().misfits(spec)

    def pack(self, weight: torch.Tensor) -> Packed:
        import torch

        dtype = torch.float32 if getattr(weight, "dtype", None) == torch.float32 else torch.bfloat16
        shape = tuple(operand("weight", weight, dtype, *[None] * self.dims).shape)
        groups, (outputs, inputs) = (shape[0] if self.dims == 3 else 1), shape[-2:]
        require_sizes(*(self.misfitting(inputs) if dtype == torch.bfloat16 else ()))
        packed = whole_pages(groups * -(-outputs // 16) * 16 * inputs, dtype)
        self._function("mla_pack", packed)(
            weight.data_ptr(), weight.stride(0) if self.dims == 3 else 0, *weight.stride()[-2:], groups,
            outputs, inputs, packed.data_ptr(), threads(),
        )  # fmt: skip
        return Packed((packed, shape), packed.nbytes)

    def unpack(self, packed: Packed) -> torch.Tensor:
        data, shape = packed.data
        weight = operand("weight", data.new_empty(shape), data.dtype, *shape)
        groups = shape[0] if self.dims == 3 else 1
        self._function("mla_unpack", data)(data.data_ptr(), groups, *shape[-2:], weight.data_ptr(), threads())
        return weight

    def _function(self, name: str, packed: torch.Tensor) -> Any:
        """Return the function for the dtype of the packed weight."""
        return getattr(self.functions, name if packed.itemsize == 2 else f"{name}_fp32")

    def _wide(self, packed: torch.Tensor, tokens: int) -> bool:
        """Return whether bf16 pairs are widened."""
        kernels = self.kernels
        pairs = packed.itemsize == 2 and kernels.dot_bf16 and not kernels.tiles
        return pairs and tokens >= WIDE_TOKENS and products.widening_gain(kernels) > 1

    def _multiply(
        self, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Multiply x [T, i] or [T, h, i] by a weight [o, i] or [h, o, i] into out [T, o] or [T, h, o]."""
        data, (*heads, outputs, inputs) = packed.data
        x = rows("x", x, data.dtype, None, *heads, inputs)
        bias = None if bias is None else rows("bias", bias, data.dtype, outputs)
        target = output("out", out, data.dtype, x.shape[0], *heads, outputs)
        wrong = self._function("mla_linear", data)(
            x.data_ptr(), *_steps(x), data.data_ptr(), None if bias is None else bias.data_ptr(),
            target.data_ptr(), *_steps(target), x.shape[0], *(heads or (1,)), inputs, outputs,
            self._wide(data, x.shape[0]), threads(),
        )  # fmt: skip
        finish(wrong, target, out)


def _steps(x: torch.Tensor) -> tuple[int, ...]:
    """Return the distances of rows and of heads: of [T, h, i], or of [T, i], where it is 0."""
    return x.stride()[:2] if x.dim() == 3 else (x.stride(0), 0)


class NativeLinear(_Product):
    """y = x W^T + b."""

    contract = "linear/1"
    dims = 2

    def __call__(
        self, packed: Packed, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        self._multiply(packed, x, bias, out)


class NativeBatchedLinear(_Product):
    """out[t, h, o] = sum_i x[t, h, i] W[h, o, i]."""

    contract = "batched_linear/1"
    dims = 3

    def __call__(self, packed: Packed, *, x: torch.Tensor, out: torch.Tensor) -> None:
        self._multiply(packed, x, None, out)


class NativeRmsNorm(NativeOp):
    """x / rms(x) * weight, rounded once."""

    contract = "rms_norm/1"
    multiples: Mapping[str, int] = {"features": 16}

    def __call__(self, *, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        import torch

        x = rows("x", x, torch.bfloat16, None, None)
        require_sizes(*self.misfitting(x.shape[1]))
        weight = rows("weight", weight, torch.bfloat16, x.shape[1])
        target = output("out", out, torch.bfloat16, *x.shape)
        self.functions.mla_rms_norm(
            x.data_ptr(), x.stride(0), weight.data_ptr(), eps, target.data_ptr(), target.stride(0),
            *x.shape, threads(),
        )  # fmt: skip
        finish(None, target, out)


class NativeRotateQuery(NativeOp):
    """Rotate every head of x by its token's angles."""

    contract = "rotate_query/1"
    multiples: Mapping[str, int] = {"qk_rope_head_dim": 32}

    def __call__(
        self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor
    ) -> None:
        import torch

        x = rows("x", x, torch.bfloat16, None, None, None)
        tokens, _, width = x.shape
        require_sizes(*self.misfitting(width))
        cos_sin = rows("cos_sin", cos_sin, torch.float32, tokens, width)
        target = output("out", out, torch.bfloat16, *x.shape)
        self.functions.mla_rotate(
            x.data_ptr(), *x.stride()[:2], cos_sin.data_ptr(), cos_sin.stride(0), target.data_ptr(),
            *target.stride()[:2], *x.shape, interleaved, threads(),
        )  # fmt: skip
        finish(None, target, out)


class NativeWriteLatent(NativeOp):
    """Norm the latent, rotate the shared key, scatter both to the cache, encoded if it stores codes."""

    contract = "write_latent/2"
    cache_formats = CACHE_FORMATS
    encodes_rounded = True
    multiples: Mapping[str, int] = {"kv_lora_rank": 16, "qk_rope_head_dim": 32}

    def __call__(
        self,
        *,
        kv_a: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        cos_sin: torch.Tensor,
        interleaved: bool,
        slots: torch.Tensor,
        cache: torch.Tensor,
        cache_format: str = "",
    ) -> None:
        import torch

        kv_a = rows("kv_a", kv_a, torch.bfloat16, None, None)
        weight = rows("weight", weight, torch.bfloat16, None)
        tokens, width, latent = *kv_a.shape, weight.shape[0]
        require_sizes(*self.misfitting(latent, width - latent))
        cos_sin = rows("cos_sin", cos_sin, torch.float32, tokens, width - latent)
        layout = layout_of(cache_format, latent, width - latent)
        slots, cache = rows("slots", slots, torch.int64, tokens), pages(self.kernels, cache, *layout.row)
        wrong = self.functions.mla_write_latent(
            kv_a.data_ptr(), kv_a.stride(0), weight.data_ptr(), eps, cos_sin.data_ptr(), cos_sin.stride(0),
            slots.data_ptr(), cache.data_ptr(), *layout.arguments, cache.shape[0] * cache.shape[1], tokens,
            latent, width - latent, interleaved, threads(),
        )  # fmt: skip
        check(wrong)


# --------------------------------------------------------------------------------- native attention
# Fused attention over the compiled kernels, absorbed and expanded.
class NativeLatentAttention(NativeOp):
    """Absorbed attention straight from the pages; long requests are split over the threads."""

    contract = "latent_attention/2"
    cache_formats = CACHE_FORMATS
    nan_safe_tail = True
    multiples: Mapping[str, int] = {"kv_lora_rank": 32, "qk_rope_head_dim": 2}

    def __call__(
        self, state: None, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [T, h, c], lse [T, h] fp32
        cache_format: str = "", selection: torch.Tensor | None = None,  # [T, k] int32
    ) -> None:  # fmt: skip
        import torch

        q = rows("q", q, torch.bfloat16, None, None, None)
        tokens, heads, width = q.shape
        chosen = None if selection is None else rows("selection", selection, torch.int32, tokens, None)
        selected = (None, 0, -1) if chosen is None else (chosen.data_ptr(), chosen.stride(0), chosen.shape[1])
        target = output("out", out, torch.bfloat16, tokens, heads, None)
        require_sizes(*self.misfitting(out.shape[2], width - out.shape[2]))
        kv_lens = rows("kv_lens", kv_lens, torch.int32, None)
        requests = kv_lens.shape[0]
        cu_q = rows("cu_q", cu_q, torch.int32, requests + 1)
        table = rows("block_table", block_table, torch.int32, requests, None)
        layout = layout_of(cache_format, out.shape[2], width - out.shape[2])
        cache = pages(self.kernels, cache, *layout.row)
        lse = operand("lse", lse, torch.float32, tokens, heads, written=True)
        wrong = self.functions.mla_latent_attention(
            q.data_ptr(), *q.stride()[:2], tokens, cache.data_ptr(), *layout.arguments, cache.shape[0],
            table.data_ptr(), table.stride(0), table.shape[1], kv_lens.data_ptr(), cu_q.data_ptr(),
            requests, cache.shape[1], heads, width, out.shape[2], softmax_scale,
            target.data_ptr(), *target.stride()[:2], lse.data_ptr(), *lse.stride(), *selected, threads(),
        )  # fmt: skip
        finish(wrong, target, out)


Lengths = tuple["array[int]", "array[int]", bool]  # of queries and keys, as the kernel reads them; causal


class NativeExpandedAttention(NativeOp):
    """Ordinary multi-head attention over ragged segments."""

    contract = "expanded_attention/1"
    multiples: Mapping[str, int] = {"v_head_dim": 32, "qk_head_dim": 2}

    def misfits(self, spec: AttentionSpec) -> list[str]:
        return self.misfitting(spec.v_head_dim, spec.qk_nope_head_dim + spec.qk_rope_head_dim)

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> Lengths:
        return array("q", batch.query_lens), array("q", batch.kv_lens), batch.causal

    def __call__(
        self, state: Lengths, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        import torch

        q = rows("q", q, torch.bfloat16, None, None, None)
        tokens, heads, width = q.shape
        k = rows("k", k, torch.bfloat16, None, heads, width)
        v = rows("v", v, torch.bfloat16, k.shape[0], heads, None)
        require_sizes(*self.misfitting(v.shape[2], width))
        target = output("out", out, torch.bfloat16, tokens, heads, v.shape[2])
        lse = operand("lse", lse, torch.float32, tokens, heads, written=True)
        (query_lens, segments), (kv_lens, _) = state[0].buffer_info(), state[1].buffer_info()
        wrong = self.functions.mla_expanded_attention(
            q.data_ptr(), *q.stride()[:2], tokens, k.data_ptr(), *k.stride()[:2], k.shape[0],
            v.data_ptr(), *v.stride()[:2], heads, width, v.shape[2], softmax_scale,
            target.data_ptr(), *target.stride()[:2], lse.data_ptr(), *lse.stride(),
            query_lens, kv_lens, segments, state[2], threads(),
        )  # fmt: skip
        finish(wrong, target, out)
