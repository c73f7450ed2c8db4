"""Fused ops over the compiled kernels: projections and row-wise ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mla_backend_cpu import tuning
from mla_backend_cpu.library import Library
from mla_backends import FusedOp
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


def threads() -> int:
    """Return torch's number of threads, which the backend has set."""
    import torch

    return torch.get_num_threads()


def is_direct(x: torch.Tensor) -> bool:
    """Return whether elements of the last dimension are adjacent: the kernels read them as vectors."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as the kernels read it. It may be a copy: bind it to a name, so that it outlives the call."""
    return x if is_direct(x) else x.contiguous()


def check(wrong: bytes | None) -> None:
    """Raise ValueError if a kernel reports that its arguments are invalid."""
    if wrong is not None:
        raise ValueError(wrong.decode())


def pages(cache: torch.Tensor) -> int:
    """Return the address of the pages. Raises ValueError unless they are contiguous."""
    if not cache.is_contiguous():
        raise ValueError("the native ops need a cache with contiguous pages; this one is strided.")
    return cache.data_ptr()


def multiple(name: str, value: int, of: int) -> list[str]:
    """Return a reason unless `value` is a multiple of `of`."""
    return [] if value % of == 0 else [f"{name} {value} is not a multiple of {of}"]


def whole_pages(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialized memory, aligned to a huge page if it is large enough for one."""
    import torch

    spare = HUGE_PAGE // dtype.itemsize
    if elements < spare:
        return torch.empty(elements, dtype=dtype, device="cpu")
    memory = torch.empty(
        elements + spare, dtype=dtype, device="cpu"
    )  # pages that are not written take no memory
    begin = -memory.data_ptr() % HUGE_PAGE // dtype.itemsize
    return memory[begin : begin + elements]


class _Product(NativeOp):
    """Weights in panels of 16 outputs: of pairs of inputs in bf16, of single ones in fp32."""

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
        groups, (outputs, inputs) = (weight.shape[0] if weight.dim() == 3 else 1), weight.shape[-2:]
        panels = -(-outputs // 16)
        packed = whole_pages(groups * panels * 16 * inputs, weight.dtype)
        group = weight.stride(0) if weight.dim() == 3 else 0
        self._function("mla_pack", packed)(
            weight.data_ptr(), group, weight.stride(-2), weight.stride(-1), groups, outputs, inputs,
            packed.data_ptr(), threads(),
        )  # fmt: skip
        return Packed((packed, tuple(weight.shape)), packed.nbytes)

    def unpack(self, packed: Packed) -> torch.Tensor:
        data, shape = packed.data
        weight = data.new_empty(shape)
        groups = shape[0] if len(shape) == 3 else 1
        self._function("mla_unpack", data)(data.data_ptr(), groups, *shape[-2:], weight.data_ptr(), threads())
        return weight

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

    def __call__(
        self, packed: Packed, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        data, (outputs, inputs) = packed.data
        x, target, bias = rows(x), rows(out), None if bias is None else rows(bias)
        self._function("mla_linear", data)(
            x.data_ptr(), x.stride(0), data.data_ptr(), None if bias is None else bias.data_ptr(),
            target.data_ptr(), target.stride(0), x.shape[0], inputs, outputs,
            *self._ways(data, x.shape[0]), threads(),
        )  # fmt: skip
        if target is not out:
            out.copy_(target)


class NativeBatchedLinear(_Product):
    """out[t, h, o] = sum_i x[t, h, i] W[h, o, i]."""

    contract = "batched_linear/1"

    def __call__(self, packed: Packed, *, x: torch.Tensor, out: torch.Tensor) -> None:
        data, (heads, outputs, inputs) = packed.data
        x, target = rows(x), rows(out)
        self._function("mla_batched_linear", data)(
            x.data_ptr(), *x.stride()[:2], data.data_ptr(), target.data_ptr(), *target.stride()[:2],
            x.shape[0], heads, inputs, outputs, *self._ways(data, x.shape[0]), threads(),
        )  # fmt: skip
        if target is not out:
            out.copy_(target)


class NativeRmsNorm(NativeOp):
    """x / rms(x) * weight, rounded once."""

    contract = "rms_norm/1"

    def misfits(self, spec: NormSpec) -> list[str]:
        return multiple("the width", spec.features, 16)

    def __call__(self, *, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        x, weight, target = rows(x), rows(weight), rows(out)
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
        x, cos_sin, target = rows(x), rows(cos_sin), rows(out)
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
        return [
            *multiple("kv_lora_rank", spec.kv_lora_rank, 16),
            *multiple("qk_rope_head_dim", spec.qk_rope_head_dim, 32),
        ]

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
        kv_a, weight, cos_sin, slots = rows(kv_a), rows(weight), rows(cos_sin), rows(slots)
        wrong = self.functions.mla_write_latent(
            kv_a.data_ptr(), kv_a.stride(0), weight.data_ptr(), eps, cos_sin.data_ptr(), cos_sin.stride(0),
            slots.data_ptr(), pages(cache), cache.shape[0] * cache.shape[1], kv_a.shape[0], weight.shape[0],
            cos_sin.shape[1], interleaved, threads(),
        )  # fmt: skip
        check(wrong)
