"""`rms_norm`, `rotate_query` and `write_latent`: one launch each, and one for the last two of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, NormSpec
from mla_backends.kernels.vendor import DeviceReason
from mla_backends.selftest import try_rms_norm, try_rotate_query, try_write_latent
from mla_backends.triton_ops.launcher import (
    CACHE_FORMATS,
    KernelOp,
    Launcher,
    format_reasons,
    stored,
    strides,
    wide,
)

if TYPE_CHECKING:
    import torch

# The most elements that one program holds: a row of a norm must fit.
MAX_WIDTH = 16384
# Elements of one program of a rotation, and its warps.
BLOCK_ELEMENTS, ROTATING_WARPS = 1024, 4


class RmsNorm(KernelOp):
    """x / rms(x) * weight, a program per row."""

    contract = OPS["rms_norm"]
    attempt = try_rms_norm

    def shape_reasons(self, spec: NormSpec) -> list[str]:
        return _width_reasons(spec.features)

    def __call__(self, *, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        from mla_backends.triton_ops.jit.pointwise import rms_norm

        if x.shape[0] == 0:
            return
        width = x.shape[1]
        arguments = {
            "x": x, "x_row": x.stride(0), "out": out, "out_row": out.stride(0), "weight": weight, "eps": eps,
            "WIDTH": width, "WIDE": wide(width), "EARLY": self.launcher.early,
        }  # fmt: skip
        self.launcher.start(rms_norm, (x.shape[0],), arguments, warps=_warps(width))


class RotateQuery(KernelOp):
    """Rotate every head by its token's angles, a program per token and block of heads."""

    contract = OPS["rotate_query"]
    attempt = try_rotate_query

    def __call__(
        self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor
    ) -> None:
        from mla_backends.triton_ops.jit.pointwise import rotate_query

        tokens, _, width = x.shape
        if tokens == 0 or width == 0:
            return
        rotated, blocks = _rotation(x, out)
        arguments = {
            **rotated, "cos_sin": cos_sin, "cos_sin_row": cos_sin.stride(0),
            "PAIRS": width // 2, "WIDE_PAIRS": wide(width // 2), "INTERLEAVED": bool(interleaved),
            "EARLY": self.launcher.early,
        }  # fmt: skip
        self.launcher.start(rotate_query, (tokens, blocks), arguments, warps=ROTATING_WARPS)


class WriteLatent(KernelOp):
    """Norm the latent, rotate the shared key, scatter both to the cache: a program per token.

    A format encodes what fp32 gives, which is not rounded before. The queries of `rotates` are rotated in the
    same launch, by programs of their own.
    """

    contract = OPS["write_latent"]
    cache_formats = CACHE_FORMATS
    attempt = try_write_latent

    def __init__(
        self,
        launcher: Launcher,
        device_reason: DeviceReason | None = None,
        rotates: RotateQuery | None = None,
    ) -> None:
        super().__init__(launcher, device_reason)
        self.rotates = rotates

    def shape_reasons(self, spec: AttentionSpec) -> list[str]:
        return _width_reasons(spec.kv_lora_rank) + format_reasons(spec)

    def __call__(
        self, *,
        kv_a: torch.Tensor, weight: torch.Tensor, eps: float,  # [T, c + r], [c]
        cos_sin: torch.Tensor, interleaved: bool,  # [T, r] fp32
        slots: torch.Tensor, cache: torch.Tensor,  # [T] int64, [pages, page, c + r] or bytes
        x: torch.Tensor | None = None, out: torch.Tensor | None = None,  # [T, h, r]
        cache_format: str = "",
    ) -> None:  # fmt: skip
        from mla_backends.triton_ops.jit.pointwise import write_latent

        if kv_a.shape[0] == 0:
            return
        width, pairs = weight.shape[0], (kv_a.shape[1] - weight.shape[0]) // 2
        rotated, blocks, warps = NO_ROTATION | {"x": kv_a, "out": cache}, 0, _warps(width)
        if x is not None and out is not None and pairs:
            (rotated, blocks), warps = _rotation(x, out), max(warps, ROTATING_WARPS)
        facts, scale = stored(cache, cache_format, self.launcher)
        arguments = {
            **rotated, **facts, "stored_scale": scale, "kv_a": kv_a, "kv_a_row": kv_a.stride(0),
            "weight": weight, "eps": eps, "cos_sin": cos_sin, "cos_sin_row": cos_sin.stride(0),
            "slots": slots, "cache": cache, "LATENT": width, "WIDE_LATENT": wide(width),
            "PAIRS": pairs, "WIDE_PAIRS": wide(pairs), "INTERLEAVED": bool(interleaved),
            "EARLY": self.launcher.early,
        }  # fmt: skip
        self.launcher.start(write_latent, (kv_a.shape[0], 1 + blocks), arguments, warps=warps)


NO_ROTATION = {"x_token": 0, "x_head": 0, "out_token": 0, "out_head": 0, "HEADS": 0, "BLOCK": 1}


def _rotation(x: torch.Tensor, out: torch.Tensor) -> tuple[dict[str, Any], int]:
    """Return what a kernel that rotates x [T, h, r] is told of it and of out, and the programs of a token."""
    heads, pairs = x.shape[1], wide(x.shape[2] // 2)
    block = min(wide(heads), max(1, BLOCK_ELEMENTS // pairs))
    arguments = {"x": x, "out": out, **strides(x=x, out=out), "HEADS": heads, "BLOCK": block}
    return arguments, -(-heads // block)


def _warps(width: int) -> int:
    """Return how many warps share a row of this many elements."""
    return min(8, max(1, wide(width) // 256))


def _width_reasons(width: int) -> list[str]:
    if width <= MAX_WIDTH:
        return []
    return [f"a program holds a row of at most {MAX_WIDTH} elements, not {width}"]
