"""Every mistake in a kernel turns a check red, and the kernels as they are turn none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import interpreting
import mutants
import pytest
from kernel_problems.expanded import ExpandedProblem
from kernel_problems.latent import LatentProblem
from kernel_problems.small import NormProblem, RotationProblem, WriteProblem
from mutating import Mutant

from mla_backends.triton_ops.latent import Splits

FAR = 1_100_000_000  # the third row is beyond 32 bits
NARROW = {"latent": 48, "rope": 8}
LATENT = (
    LatentProblem((1, 1, 1), (1, 33, 70), heads=20, page=3, splits=Splits(32, 3), **NARROW),
    LatentProblem((1, 1), (49, 64), heads=2, page=32, splits=Splits(20, 4), magnitude=100.0, **NARROW),
    LatentProblem((2, 3, 0, 2), (1, 40, 0, 30), heads=12, page=1, **NARROW),
    LatentProblem((2, 1), (600, 3), heads=1, page=16, splits=Splits(16, 40), halves=False, **NARROW),
    LatentProblem((1,), (20,), heads=1, page=1, far=True),
    LatentProblem((1,), (70,), heads=1, page=64, far=True),
    LatentProblem((3,), (5,), heads=1, step=FAR, **NARROW),
)
EXPANDED = (
    ExpandedProblem((5, 1, 20), (5, 70, 33), heads=2, nope=16, rope=8, values=12),
    ExpandedProblem((2, 3), (40, 1), heads=2, nope=16, rope=8, values=12, causal=False),
    ExpandedProblem((3, 2), (1, 20), heads=2, nope=16, rope=8, values=12),
    ExpandedProblem((3,), (3,), heads=1, nope=16, rope=8, values=12, step=FAR),
)
SMALL = (
    NormProblem(3, 100),
    RotationProblem(2, 3),
    RotationProblem(2, 20, width=24, interleaved=False),
    WriteProblem(5, latent=100, rope=8),
)
MUTANTS: list[tuple[Mutant, tuple[Any, ...]]] = [
    *((one, LATENT) for one in mutants.LATENT),
    *((one, (*LATENT, *EXPANDED)) for one in (*mutants.SOFTMAX, *mutants.PLACES)),
    *((one, EXPANDED) for one in mutants.EXPANDED),
    *((one, SMALL) for one in mutants.SMALL),
]


def caught(problems: tuple[Any, ...]) -> bool:
    """Return whether a problem shows a mistake: a wrong result, or a fault. Anything else is raised."""
    try:
        return any(problem.wrong() for problem in problems)
    except interpreting.KernelFault:
        return True


@pytest.mark.parametrize(("mutant", "problems"), MUTANTS, ids=lambda one: getattr(one, "name", ""))
def test_a_mistake_is_caught(mutant: Mutant, problems: tuple[Any, ...], tmp_path: Path) -> None:
    with mutant.installed(tmp_path):
        assert caught(problems)


def test_kernels_without_a_mistake_pass(tmp_path: Path) -> None:
    with Mutant("nothing", "latent", old='"""\n\nimport', new='"""\n\nimport').installed(tmp_path):
        assert not caught((*LATENT, *EXPANDED, *SMALL))


def test_a_mistake_that_the_source_has_no_place_for_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(LookupError, match=r"latent\.py has this 0 times"),
        Mutant("gone", "latent", old="no such text", new="").installed(tmp_path),
    ):
        pass
