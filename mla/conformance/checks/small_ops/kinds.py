"""Checks that every small op has: registered once per kind, with a problem of that kind as an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mla.conformance.problems.small_ops import LatentWrite, MatMul, Norm, Rotation, SmallProblem
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial

# Narrow, but multiples of 128, which some kernels want. Checks of widths try odd ones.
EXAMPLES: Mapping[str, SmallProblem] = {
    "linear": MatMul(7, 256, 128),
    "batched_linear": MatMul(7, 128, 128, groups=2),
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


def other_way(problem: SmallProblem) -> SmallProblem:
    """Return the problem with a bias, or rotated in halves; of other kinds the problem itself."""
    if problem.kind == "linear":
        return vary(problem, biased=True)
    if isinstance(problem, (Rotation, LatentWrite)):
        return vary(problem, interleaved=False)
    return problem


def both_ways(*problems: SmallProblem) -> Iterator[SmallProblem]:
    """Yield each problem, and its other way if it has one."""
    yield from dict.fromkeys(way for problem in problems for way in (problem, other_way(problem)))


def by_turns(*problems: SmallProblem) -> Iterator[SmallProblem]:
    """Yield every third problem the other way, as sizes of tiles are even, and the last one both ways."""
    *most, last = problems
    yield from (other_way(one) if number % 3 == 2 else one for number, one in enumerate(most))
    yield from both_ways(last)
