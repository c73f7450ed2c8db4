"""Compare the implementations of one scenario with each other: outputs and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mla.bench.results.schema import Agreement, Case
from mla.verify.tolerances import relative_error


def compare(cases: Sequence[Case], outputs: Mapping[str, torch.Tensor]) -> None:
    """Fill the `agreement` of every case with the others; `outputs` are on the host, by implementation."""
    compared = [case for case in cases if case.implementation in outputs]
    for case in compared:
        case.agreement = [_agreement(case, other, outputs) for other in compared if other is not case]


def _agreement(case: Case, other: Case, outputs: Mapping[str, torch.Tensor]) -> Agreement:
    mine, theirs = outputs[case.implementation], outputs[other.implementation]
    return Agreement(
        implementation=other.implementation,
        relative_difference=relative_error((mine, theirs)),
        speed_ratio=_speed_ratio(case, other),
    )


def _speed_ratio(case: Case, other: Case) -> float | None:
    """Return the ratio of the median latencies, which stand in the table beside it."""
    if case.latency_ms is None or other.latency_ms is None:
        return None
    return other.latency_ms.median / case.latency_ms.median
