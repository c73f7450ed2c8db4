"""Adapters on fakes pass the suite that judges backends; what they refuse is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from judged import faults, judged_op
from smaller_cases import make_smaller

from mla_backend_moore.kernels import CAPABILITY, kernels
from mla_backends import FusedOp
from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashInferMla,
    FlashInferSparse,
    FlashMla,
    FlashMlaSparse,
    IxformerMla,
    LatentLimits,
    TokenspeedMla,
    TokenspeedPrefill,
    VarlenLimits,
)

# An adapter for each of its ways; `test_flash_mla` and its neighbours hold every generation to float64.
DRAWS = 20  # of each dtype: few, as what stands in for a vendor's kernel is slow
OFFERS: dict[str, Callable[[], FusedOp]] = {
    "nvidia_sgl": FlashMla,
    "nvidia_sgl sparse": FlashMlaSparse,
    "metax": lambda: FlashMla(LatentLimits(max_rows=4095, empty_rows=False, graph=False)),
    "moore_mate": lambda: kernels(lambda: CAPABILITY)["mate"],
    "moore_mate sparse": lambda: kernels(lambda: CAPABILITY)["mate_sparse"],
    "flashinfer_07 sparse": FlashInferSparse,
    "ixformer_old": IxformerMla,
    "flashinfer": FlashInferMla,
    "flashinfer_07": FlashInferMla,
    "tokenspeed": TokenspeedMla,
    "tokenspeed prefill": TokenspeedPrefill,
    "flash_attn_2": FlashAttnVarlen,
    "flash_attn_3": lambda: FlashAttnVarlen(VarlenLimits(pads_values=False), module="flash_attn_interface"),
}


@pytest.mark.parametrize("folder", OFFERS)
def test_an_adapter_passes_the_suite(installed: Any, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    make_smaller(monkeypatch)
    with installed(folder.partition(" ")[0]):
        op = OFFERS[folder]()
        kind = op.contract.partition("/")[0]
        kind = kind if kind.startswith("sparse") else kind.partition("_")[0]
        results = judged_op(op, f"{kind}.*")
        draws = judged_op(op, f"{kind}.drawn", dtypes=(torch.bfloat16, torch.float16), draws=DRAWS)
    assert len(results) > 5
    assert faults(results) == []
    assert [fault for fault in faults(draws) if "drawn cases were judged" not in fault[1]] == []
    assert any(draw.drawn and draw.drawn.judged for draw in draws)
    assert sum(result.status == "pass" for result in results) >= 0.4 * len(results)
    assert all(result.reason for result in results if result.status == "refused")
