"""Checks that every small op has: registered once per kind, with a problem of that kind as an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from mla.conformance.problems.small_ops import LatentWrite, MatMul, Norm, Rotation, SmallProblem
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial

# Narrow, but of widths that kernels serve.
EXAMPLES: Mapping[str, SmallProblem] = {
    "linear": MatMul(7, 128, 96),
    "batched_linear": MatMul(7, 128, 64, groups=4),
    "rms_norm": Norm(),
    "rotate_query": Rotation(heads=2),
    "write_latent": LatentWrite(),
}
PRODUCTS = ("linear", "batched_linear")

Body = Callable[[Trial, SmallProblem], None]


def small_check(
    name: str, *, catches: str, fails: str, kinds: Iterable[str] = EXAMPLES
) -> Callable[[Body], Body]:
    """Register a function of a trial and an example as check `name` of every kind."""

    def register(body: Body) -> Body:
        for kind in kinds:
            check(f"{kind}.{name}", catches=catches, scope=OP, kind=kind, fails=fails)(
                _of(body, EXAMPLES[kind])
            )
        return body

    return register


def _of(body: Body, example: SmallProblem) -> Callable[[Trial], None]:
    def run(trial: Trial) -> None:
        body(trial, example)

    run.__doc__ = body.__doc__
    return run


def vary(problem: SmallProblem, **changes: Any) -> SmallProblem:
    """Return another problem of the same kind."""
    return replace(problem, **changes)
