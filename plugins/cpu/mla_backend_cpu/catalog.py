"""The fused ops on compiled kernels, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_backend_cpu import products
from mla_backend_cpu.cache import note
from mla_backend_cpu.library import Library, loaded
from mla_backend_cpu.native_ops import (
    NativeBatchedLinear,
    NativeExpandedAttention,
    NativeLatentAttention,
    NativeLinear,
    NativeOp,
    NativeRmsNorm,
    NativeRotateQuery,
    NativeWriteLatent,
)
from mla_backend_cpu.sparse_ops import NativeSelectLatents, NativeSparseAttention, NativeWriteIndexKey
from mla_backends import BackendError, FusedOp

OPS: Mapping[str, type[NativeOp]] = {
    "native_linear": NativeLinear,
    "native_batched_linear": NativeBatchedLinear,
    "native_rms_norm": NativeRmsNorm,
    "native_rotate_query": NativeRotateQuery,
    "native_write_latent": NativeWriteLatent,
    "native_latent_attention": NativeLatentAttention,
    "native_expanded_attention": NativeExpandedAttention,
    "native_write_index_key": NativeWriteIndexKey,
    "native_select_latents": NativeSelectLatents,
    "native_sparse_attention": NativeSparseAttention,
}
# Those that do nothing but call one kernel; a subclass may do more.
RECORDABLE = frozenset(OPS.values()) - {NativeExpandedAttention}


class NotBuilt(FusedOp):
    """Stands in for an op whose kernels are missing, so that `--list-ops` can say why."""

    def __init__(self, contract: str, reason: str) -> None:
        self.contract = contract
        self._reason = reason

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return [self._reason]

    def __call__(self, *args: Any, **tensors: Any) -> None:
        raise RuntimeError(self._reason)


def in_use(level: str) -> Library | str:
    """Return the kernels for "auto" or an instruction set, or why there are none; "off" asks for none."""
    return "disabled by the option native=off" if level == "off" else loaded(level)


def native_ops(level: str) -> dict[str, FusedOp]:
    """Return the ops by name; `level` is "auto", "off" or an instruction set.

    Raises `BackendError` if an instruction set was named and is not available.
    """
    kernels = in_use(level)
    if isinstance(kernels, Library):
        prefix = f"{kernels.level}_" if kernels.emulated else ""  # emulation must show wherever ops are named
        return {f"{prefix}{name}": op(kernels, insist=level != "auto") for name, op in OPS.items()}
    if level not in ("auto", "off"):  # the user named it: nothing else may run instead
        raise BackendError(f"backend 'cpu' has no kernels for native={level}: {kernels}.")
    return {name: NotBuilt(op.contract, kernels) for name, op in OPS.items()}


def facts(level: str) -> dict[str, str]:
    """Return the kernels in use or why there are none, who built them, and what was measured to choose a way.

    `native_fp32_gain`: widened values against bf16 pairs, where the processor multiplies these.
    `native_product_gain`: these kernels' products against torch's, where that may use AMX.
    `native_product_gain_fp32`: the same for float32 layers, once one was made.
    """
    kernels = in_use(level)
    if isinstance(kernels, str):
        return {"kernels": "off" if level == "off" else f"none: {kernels}"}
    passed_over = [f"not {name}: {reason}" for name, reason in kernels.passed_over.items()]
    facts = {"kernels": "; ".join((kernels.level, *passed_over))}
    facts["kernels_from"] = kernels.origin
    if kernels.dot_bf16 and not kernels.tiles:
        facts["native_fp32_gain"] = f"{products.widening_gain(kernels):.2f}"
    if level == "auto" and products.torch_has_tiles():
        facts["native_product_gain"] = f"{products.product_gain(kernels, False):.2f}"
    if level == "auto" and True in products.PRODUCT_GAINS:
        facts["native_product_gain_fp32"] = f"{products.PRODUCT_GAINS[True]:.2f}"
    return facts


_TOLD: set[str] = set()  # what this process has told its user


def told(level: str) -> list[str]:
    """Return a sentence if kernels are missing, or better ones, to somebody who prints it."""
    sentences = _remarks(level)
    _TOLD.update(sentences)
    return sentences


def tell(level: str) -> None:
    """Print the same, once per process, unless somebody has printed it."""
    for sentence in _remarks(level):
        if sentence not in _TOLD:
            _TOLD.add(sentence)
            note(sentence)


def _remarks(level: str) -> list[str]:
    kernels = in_use(level)
    if isinstance(kernels, str):
        lost = f"no CPU kernels: the reference ops run, which is several times slower, since {kernels}"
        return [] if level == "off" else [lost]
    return [
        f"CPU kernels for {kernels.level} instead of {better}: {reason}"
        for better, reason in kernels.passed_over.items()
    ]
