"""The checks: of the device, of the ops on offer, of each kind of op by tables of cases, of a whole layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from mla.cases import KINDS
from mla.cases.case import OpCase
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial

Example = TypeVar("Example")  # a case, or what makes cases of an op
Cases = Callable[[Example], Iterable[OpCase]]


def op_check(
    name: str, fails: str, catches: str, examples: Mapping[str, Example]
) -> Callable[[Callable[[Trial, Example], None]], Callable[[Trial, Example], None]]:
    """Register a function of a trial and an example as check `name` of several ops.

    `examples`: by kind of op, or by the first word of an attention's.
    """

    def register(body: Callable[[Trial, Example], None]) -> Callable[[Trial, Example], None]:
        for group, example in examples.items():

            def run(trial: Trial, example: Example = example) -> None:
                body(trial, example)

            run.__doc__ = body.__doc__
            kind = group if group in KINDS else f"{group}_attention"
            check(f"{group}.{name}", catches=catches, scope=OP, kind=kind, fails=fails)(run)
        return body

    return register


def op_cases(
    name: str, fails: str, catches: str, examples: Mapping[str, Example], **how: Any
) -> Callable[[Cases[Example]], Cases[Example]]:
    """Register the cases that a function makes of an op's example as a check: the op's results are right.

    `how`: see `Trial.check_cases`.
    """

    def register(cases: Cases[Example]) -> Cases[Example]:
        def body(trial: Trial, example: Example) -> None:
            trial.check_cases(cases(example), **how)

        body.__doc__ = cases.__doc__
        op_check(name, fails, catches, examples)(body)
        return cases

    return register
