"""Graphs: a captured function must read and write the same memory again, every time."""

from __future__ import annotations

import torch

from mla.conformance.registry import check
from mla.conformance.trial import Refused, Trial, expect
from mla.verify.tolerances import same_bits

NO_GRAPH = "the backend offers no graphs"


@check("device.graph", catches="a replay that returns the captured outputs, or reads inputs that were copied")
def graph(trial: Trial) -> None:
    """A replay uses the current values of its inputs, every time they change."""
    dtype = trial.backend.dtypes()[0]
    x, y = (torch.zeros(8, 8, dtype=dtype, device=trial.device) for _ in range(2))

    def work() -> None:
        torch.mm(x, x, out=y)
        y.add_(x)

    work()
    trial.backend.synchronize()
    replay = trial.backend.graph(work)
    if replay is None:
        raise Refused(NO_GRAPH)
    for value in (0.5, 3.0, -2.0):
        x.copy_(torch.eye(8, dtype=dtype) * value)
        replay()
        trial.backend.synchronize()
        expected = torch.eye(8, dtype=dtype) * (value * value + value)
        expect(
            same_bits(y, expected), f"after the input became {value:g} I, a replay gave a different result"
        )
