"""Which kernels Iluvatar GPUs have for attention: that of ixformer, one query token per row."""

from __future__ import annotations

from collections.abc import Mapping

from mla_backends import FusedOp
from mla_backends.kernels import IxformerMla, SdpaExpanded


def kernels() -> Mapping[str, FusedOp]:
    """Return the ops, best first.

    Which widths CoreX's SDPA serves fast is not public. Values are padded to the width of keys, which
    FlashAttention 2 and its relatives require; not run on hardware.
    """
    return {
        "ixformer": IxformerMla(install="it comes with the CoreX SDK"),
        "sdpa": SdpaExpanded(pads_values=True),
    }
