"""The fused ops on compiled kernels, or the reason why there are none here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_backend_cpu.build import BuildError
from mla_backend_cpu.library import load
from mla_backend_cpu.native_attention import NativeExpandedAttention, NativeLatentAttention
from mla_backend_cpu.native_ops import (
    NativeBatchedLinear,
    NativeLinear,
    NativeOp,
    NativeRmsNorm,
    NativeRotateQuery,
    NativeWriteLatent,
)
from mla_backends import BackendError, FusedOp

_OPS: Mapping[str, type[NativeOp]] = {
    "native_linear": NativeLinear,
    "native_batched_linear": NativeBatchedLinear,
    "native_rms_norm": NativeRmsNorm,
    "native_rotate_query": NativeRotateQuery,
    "native_write_latent": NativeWriteLatent,
    "native_latent_attention": NativeLatentAttention,
    "native_expanded_attention": NativeExpandedAttention,
}


class NotBuilt(FusedOp):
    """Stands for an op whose kernels are missing, so that `--list-ops` can say why."""

    def __init__(self, contract: str, reason: str) -> None:
        self.contract = contract
        self._reason = reason

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return [self._reason]

    def __call__(self, *args: Any, **tensors: Any) -> None:
        raise RuntimeError(self._reason)


def native_ops(level: str) -> dict[str, FusedOp]:
    """Return the ops by name; `level` is "auto", "off" or an instruction set.

    Raises `BackendError` where an instruction set was named and cannot be had.
    """
    reason = "the option native=off forbids it"
    if level != "off":
        try:
            kernels = load(level)
            return {name: op(kernels, insist=level != "auto") for name, op in _OPS.items()}
        except BuildError as error:
            if level != "auto":  # the user named it: nothing else may run in its place
                raise BackendError(f"backend 'cpu' has no kernels for native={level}: {error}.") from error
            reason = str(error)
    return {name: NotBuilt(op.contract, reason) for name, op in _OPS.items()}


def describe(level: str) -> str:
    """Return the instruction set in use, or why there is none."""
    if level == "off":
        return "off"
    try:
        return load(level).level
    except BuildError as error:
        return f"none: {error}"
