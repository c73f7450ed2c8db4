"""The numbers of cases: right operands of any pattern are finite, so that no right op is called wrong."""

from __future__ import annotations

import pytest
import torch

from mla.cases.case import OpCase
from mla.cases.played import CPU, Host
from mla.cases.stress import Stress
from mla.cases.values import patterns_of
from mla_backends.api import AttentionSpec

SPEC = AttentionSpec(2, 32, 400, 8, 12, 0.5 * 408**-0.5, torch.float16, CPU)


@pytest.mark.parametrize("kind", ["latent_attention", "expanded_attention"])
def test_a_small_scale_asks_for_no_query_beyond_fp16(kind: str) -> None:
    for pattern in patterns_of(kind):
        case = OpCase(kind, SPEC, (2, 1), (5, 9), stress=Stress(), values=(pattern,))
        host = Host(case)
        for tensors in (host.given, host.truth):
            assert all(bool(numbers.isfinite().all()) for numbers in tensors.values()), pattern
