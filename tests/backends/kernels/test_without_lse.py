"""Adapters that may be called without a log-sum-exp give the same bits, and launch less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_adapters import LATENT, Launches

from mla_backends import FusedOp
from mla_backends.kernels import paged

# Those whose calls a graph can capture.
ADAPTERS = {name: latent for name, latent in LATENT.items() if latent.make().limits.graph}
STEPS = (((1, 1, 1), (33, 64, 129)), ((1, 1, 1), (0, 40, 0)), ((3, 1, 9, 1), (40, 7, 70, 65)))


def run(op: FusedOp, problem: Any, with_lse: bool) -> torch.Tensor:
    return problem.run(op)[0] if with_lse else problem.run(op, lse=None)[0]


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_output_is_the_same_without_lse(
    installed: Any, make_problem: Any, name: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "capturing", lambda device: captured)
    for heads in (4, 16):
        with installed(ADAPTERS[name].folder):
            op = ADAPTERS[name].make()
            assert op.lse_optional
            for query_lens, kv_lens in STEPS[
                : 2 if captured else 3
            ]:  # a graph takes equal numbers of queries
                problem = make_problem(query_lens, kv_lens, heads=heads)
                with Launches() as full:
                    expected = run(op, problem, True)
                with Launches() as fewer:
                    out = run(op, problem, False)
                assert out.isfinite().all()
                assert torch.equal(out, expected)
                assert fewer.count.total() < full.count.total()
