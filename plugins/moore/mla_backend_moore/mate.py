"""MATE's two attention kernels for the MTT S5000. Both are compiled with mcc when they are first called.

(Read in MATE 0.2.2, commit 3f58cc3 of 2026-05-26. A later source, yeahdongcn/mate at bbcd8b8 with the sparse
kernels of 0.2.4 and newer, has the same dense signatures, plans and layouts; the releases are not public.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mla_backends.api import AttentionSpec
from mla_backends.kernels import FlashAttnVarlen, FlashMla, LatentLimits, VarlenLimits
from mla_backends.kernels.trial import failures, try_expanded, try_latent

if TYPE_CHECKING:
    import torch

COMPILES = "it compiles its kernel for this device at first use (a minute or more)"
INSTALL = "see https://github.com/MooreThreads/mate; the package of that name on PyPI is another"
CURE = "install the MUSA toolkit with mcc, or a MATE with kernels built ahead of time"
HEADS = (8, 16, 32, 64, 128)  # what MATE's own tests cover; other head counts are padded
# Not documented: what rows without keys give, and whether planning can be captured into a graph.
LATENT = LatentLimits(
    heads=HEADS, pads_heads_to=HEADS, lse_layout="tokens_first", empty_rows=False, graph=False
)
# `_check_valid_asm_input` in mate/mha_interface.py: 192 and 128, or values as wide as keys of at most 128.
# Other widths have kernels too, which its tests cover for 128 and 256 only.
VARLEN = VarlenLimits(pads_values=False)

Reason = Callable[["torch.device"], str]


class MateMla(FlashMla):
    """`mate.flashmla`: plans are two tensors, the log-sum-exp is [rows, s, h]."""

    def __init__(self, device_reason: Reason) -> None:
        super().__init__(
            replace(LATENT, device_reason=device_reason),
            module="mate.flashmla",
            install=INSTALL,
            compiles=COMPILES,
        )

    def preflight(self, spec: AttentionSpec) -> list[str]:
        return failures(lambda: try_latent(self, spec, 64), "mate.flashmla", CURE)


class MateVarlen(FlashAttnVarlen):
    """`mate.mha_interface.flash_attn_varlen_func`: keys of 192 and values of 128 as they are, with lse."""

    compiles = COMPILES

    def __init__(self, device_reason: Reason) -> None:
        super().__init__(
            replace(VARLEN, device_reason=device_reason), module="mate.mha_interface", install=INSTALL
        )

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        found = super().unsupported_reasons(spec)
        widths = (spec.qk_nope_head_dim + spec.qk_rope_head_dim, spec.v_head_dim)
        if widths not in self.limits.unpadded and max(widths) > 128:
            found.append(f"it takes heads of 192 and 128 or of at most 128, not {widths[0]} and {widths[1]}")
        return found

    def preflight(self, spec: AttentionSpec) -> list[str]:
        return failures(lambda: try_expanded(self, spec), "mate.mha_interface", CURE)

    def unsupported_batch(
        self, spec: Any, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> list[str]:
        lengths = zip(query_lens, kv_lens, strict=True)
        blind = any(keys < queries for queries, keys in lengths)
        return ["what it gives for a token without keys is not documented"] if blind else []
