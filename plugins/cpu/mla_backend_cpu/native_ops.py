"""Fused ops over the compiled kernels: projections and row-wise ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from mla_backend_cpu import tuning
from mla_backend_cpu.library import Library
from mla_backend_cpu.operands import operand, output, pages, rows
from mla_backends import BackendError, FusedOp
from mla_backends.api import AttentionSpec, LinearSpec, NormSpec, Packed

if TYPE_CHECKING:
    import torch

WIDE_TOKENS = 16  # from here on, widening x first pays, if fp32 products are faster
HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on arm64 with small pages of 4 KiB


class NativeOp(FusedOp):
    """What all ops on the kernels share."""

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
        return []

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


def multiple(name: str, value: int, of: int) -> list[str]:
    """Return a reason unless `value` is a multiple of `of`."""
    return [] if value > 0 and value % of == 0 else [f"{name} {value} is not a multiple of {of}"]


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


class Panels(NamedTuple):
    """A packed weight [o, i] or [h, o, i]."""

    data: torch.Tensor
    shape: tuple[int, ...]


class _Product(NativeOp):
    """Weights in panels of 16 outputs: of pairs of inputs in bf16, of single ones in fp32."""

    dims: int  # of a weight

    def unsupported_reasons(self, spec: LinearSpec) -> list[str]:
        import torch

        if spec.dtype not in (torch.bfloat16, torch.float32):
            return [f"it computes in bfloat16 and float32, but this layer is {spec.dtype}"]
        return self.misfits(spec)

    def misfits(self, spec: LinearSpec) -> list[str]:
        import torch

        fp32 = spec.dtype == torch.float32
        if not self._insist and (fp32 or tuning.torch_has_tiles()):
            gain = tuning.product_gain(self.kernels, fp32)
            if gain < 1:
                return [f"its products were measured at {gain:.2f}x the speed of torch's"]
        return [] if fp32 else multiple("in_features", spec.in_features, 2)

    def pack(self, weight: torch.Tensor) -> Packed:
        import torch

        dtype = torch.float32 if getattr(weight, "dtype", None) == torch.float32 else torch.bfloat16
        shape = tuple(operand("weight", weight, dtype, *[None] * self.dims).shape)
        groups, (outputs, inputs) = (shape[0] if self.dims == 3 else 1), shape[-2:]
        require_sizes(*(multiple("in_features", inputs, 2) if dtype == torch.bfloat16 else ()))
        packed = whole_pages(groups * -(-outputs // 16) * 16 * inputs, dtype)
        self._function("mla_pack", packed)(
            weight.data_ptr(), weight.stride(0) if self.dims == 3 else 0, *weight.stride()[-2:], groups,
            outputs, inputs, packed.data_ptr(), threads(),
        )  # fmt: skip
        return Packed(Panels(packed, shape), packed.nbytes)

    def unpack(self, packed: Packed) -> torch.Tensor:
        data, shape = self._opened(packed)
        weight = operand("weight", data.new_empty(shape), data.dtype, *shape)
        groups = shape[0] if self.dims == 3 else 1
        self._function("mla_unpack", data)(data.data_ptr(), groups, *shape[-2:], weight.data_ptr(), threads())
        return weight

    def _opened(self, packed: Packed) -> Panels:
        """Return what is packed. Raises ValueError unless an op of this kind has packed it."""
        held = getattr(packed, "data", None)
        if isinstance(held, Panels) and len(held.shape) == self.dims:
            return held
        raise ValueError(f"packed was not made by pack() of {type(self).__name__}.")

    def _function(self, name: str, packed: torch.Tensor) -> Any:
        """Return the function for the dtype of the packed weight."""
        return getattr(self.functions, name if packed.itemsize == 2 else f"{name}_fp32")

    def _ways(self, packed: torch.Tensor, tokens: int) -> tuple[bool, ...]:
        """Return the argument that says whether bf16 pairs are widened, where the function takes one."""
        if packed.itemsize == 4:
            return ()
        kernels = self.kernels
        pairs = kernels.dot_bf16 and not kernels.tiles
        return (pairs and tokens >= WIDE_TOKENS and tuning.fp32_gain(kernels) > 1,)


class NativeLinear(_Product):
    """y = x W^T + b."""

    contract = "linear/1"
    dims = 2

    def __call__(
        self, packed: Packed, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        data, (outputs, inputs) = self._opened(packed)
        x = rows("x", x, data.dtype, None, inputs)
        bias = None if bias is None else rows("bias", bias, data.dtype, outputs)
        target = output("out", out, data.dtype, x.shape[0], outputs)
        wrong = self._function("mla_linear", data)(
            x.data_ptr(), x.stride(0), data.data_ptr(), None if bias is None else bias.data_ptr(),
            target.data_ptr(), target.stride(0), x.shape[0], inputs, outputs,
            *self._ways(data, x.shape[0]), threads(),
        )  # fmt: skip
        check(wrong)
        if target is not out:
            out.copy_(target)


class NativeBatchedLinear(_Product):
    """out[t, h, o] = sum_i x[t, h, i] W[h, o, i]."""

    contract = "batched_linear/1"
    dims = 3

    def __call__(self, packed: Packed, *, x: torch.Tensor, out: torch.Tensor) -> None:
        data, (heads, outputs, inputs) = self._opened(packed)
        x = rows("x", x, data.dtype, None, heads, inputs)
        target = output("out", out, data.dtype, x.shape[0], heads, outputs)
        wrong = self._function("mla_batched_linear", data)(
            x.data_ptr(), *x.stride()[:2], data.data_ptr(), target.data_ptr(), *target.stride()[:2],
            x.shape[0], heads, inputs, outputs, *self._ways(data, x.shape[0]), threads(),
        )  # fmt: skip
        check(wrong)
        if target is not out:
            out.copy_(target)


class NativeRmsNorm(NativeOp):
    """x / rms(x) * weight, rounded once."""

    contract = "rms_norm/1"

    def misfits(self, spec: NormSpec) -> list[str]:
        return multiple("the width", spec.features, 16)

    def __call__(self, *, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        import torch

        x = rows("x", x, torch.bfloat16, None, None)
        require_sizes(*multiple("the width", x.shape[1], 16))
        weight = rows("weight", weight, torch.bfloat16, x.shape[1])
        target = output("out", out, torch.bfloat16, *x.shape)
        self.functions.mla_rms_norm(
            x.data_ptr(), x.stride(0), weight.data_ptr(), eps, target.data_ptr(), target.stride(0),
            *x.shape, threads(),
        )  # fmt: skip
        if target is not out:
            out.copy_(target)


class NativeRotateQuery(NativeOp):
    """Rotate every head of x by its token's angles."""

    contract = "rotate_query/1"

    def misfits(self, spec: AttentionSpec) -> list[str]:
        return multiple("qk_rope_head_dim", spec.qk_rope_head_dim, 32)

    def __call__(
        self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor
    ) -> None:
        import torch

        x = rows("x", x, torch.bfloat16, None, None, None)
        tokens, _, width = x.shape
        require_sizes(*multiple("qk_rope_head_dim", width, 32))
        cos_sin = rows("cos_sin", cos_sin, torch.float32, tokens, width)
        target = output("out", out, torch.bfloat16, *x.shape)
        self.functions.mla_rotate(
            x.data_ptr(), *x.stride()[:2], cos_sin.data_ptr(), cos_sin.stride(0), target.data_ptr(),
            *target.stride()[:2], *x.shape, interleaved, threads(),
        )  # fmt: skip
        if target is not out:
            out.copy_(target)


class NativeWriteLatent(NativeOp):
    """Norm the latent, rotate the shared key, scatter both to the cache."""

    contract = "write_latent/1"

    def misfits(self, spec: AttentionSpec) -> list[str]:
        return self._sizes(spec.kv_lora_rank, spec.qk_rope_head_dim)

    def _sizes(self, latent: int, rotary: int) -> list[str]:
        return [*multiple("kv_lora_rank", latent, 16), *multiple("qk_rope_head_dim", rotary, 32)]

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
    ) -> None:
        import torch

        kv_a = rows("kv_a", kv_a, torch.bfloat16, None, None)
        weight = rows("weight", weight, torch.bfloat16, None)
        tokens, width, latent = *kv_a.shape, weight.shape[0]
        require_sizes(*self._sizes(latent, width - latent))
        cos_sin = rows("cos_sin", cos_sin, torch.float32, tokens, width - latent)
        slots, cache = rows("slots", slots, torch.int64, tokens), pages(cache, width)
        wrong = self.functions.mla_write_latent(
            kv_a.data_ptr(), kv_a.stride(0), weight.data_ptr(), eps, cos_sin.data_ptr(), cos_sin.stride(0),
            slots.data_ptr(), cache.data_ptr(), cache.shape[0] * cache.shape[1], tokens, latent,
            width - latent, interleaved, threads(),
        )  # fmt: skip
        check(wrong)
