"""How many buffers the results of a pass get, and their copies on the host."""

from __future__ import annotations

from math import prod

import torch

from mla.bench.subjects import shelf
from mla.bench.subjects.op.problem import OpProblem
from mla.verify.op_check import Tensors

# So many numbers are kept of a pass, which bounds the time that judging them takes; but at least so many
# calls. Of 6 passes these are 48: if one call in ten goes wrong, one of them does in 99 of 100 runs.
KEPT_NUMBERS, KEPT_CALLS = 1 << 21, 8

# Bound before any plugin loads, which may replace methods of torch.
_empty_like, _copy, _fill = torch.empty_like, torch.Tensor.copy_, torch.Tensor.fill_


def numbers(problem: OpProblem) -> int:
    """Return how many numbers one call writes."""
    return sum(map(prod, problem.shapes.values()))


def buffers(problem: OpProblem, calls: int) -> int:
    """Return how many buffers for results a pass of `calls` gets."""
    written = numbers(problem)
    kept = max(KEPT_CALLS, KEPT_NUMBERS // written)
    return min(kept + 1, shelf.buffers(calls, written * problem.spec.dtype.itemsize))


def poison(results: Tensors) -> None:
    """Overwrite results with NaN."""
    for result in results.values():
        _fill(result, torch.nan)


def on_host(results: Tensors) -> Tensors:
    """Return copies on the host."""
    return {name: _copy(_empty_like(result, device="cpu"), result) for name, result in results.items()}
