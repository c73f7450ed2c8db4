"""Compare the implementations of one scenario with each other: outputs and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mla.bench.results.compare import compare_cases
from mla.bench.results.schema import Agreement, Case
from mla.verify.tolerances import relative_error

Outputs = Mapping[int, torch.Tensor]  # of the forwards of one pass, on the host


def compare(cases: Sequence[Case], outputs: Mapping[str, Outputs]) -> None:
    """Fill the `agreement` of every case with the others; `outputs` are of the same inputs."""
    compared = [case for case in cases if case.implementation in outputs]
    for case in compared:
        pairs = ((other, _pairs(case, other, outputs)) for other in compared if other is not case)
        case.agreement = [_agreement(case, other, common) for other, common in pairs if common]


def _pairs(
    case: Case, other: Case, outputs: Mapping[str, Outputs]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the outputs of the forwards that both kept."""
    mine, theirs = outputs[case.implementation], outputs[other.implementation]
    return [(mine[index], theirs[index]) for index in sorted(mine.keys() & theirs.keys())]


def _agreement(case: Case, other: Case, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Agreement:
    return Agreement(
        implementation=other.implementation,
        relative_difference=relative_error(*pairs),
        speed_ratio=compare_cases(other, case).speedup,
    )
