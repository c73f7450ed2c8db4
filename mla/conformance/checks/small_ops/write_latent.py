"""`write_latent`: norm the latent, rotate the shared key, scatter both to the cache."""

from __future__ import annotations

from collections.abc import Callable

from mla.conformance.checks.small_ops.kinds import by_turns
from mla.conformance.problems.attention import SMALL
from mla.conformance.problems.small_call import check_small, small_call
from mla.conformance.problems.small_ops import LatentWrite
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial

KIND = "write_latent"


def write_check(
    name: str, catches: str, fails: str = "formula"
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a check that runs once per op and dtype."""
    return check(f"{KIND}.{name}", catches=catches, scope=OP, kind=KIND, fails=fails)


@write_check("formula", "a key that is cached unrotated, or a latent without its norm's weight")
def formula(trial: Trial) -> None:
    """The latent is normed and the key rotated, each as accurately as the dtype allows."""
    check_small(trial, *(LatentWrite(tokens) for tokens in (1, 9, 130)))


@write_check("halves", "the `interleaved` argument ignored")
def halves(trial: Trial) -> None:
    """Not interleaved: channels i and i + r/2 of the key are rotated together."""
    check_small(trial, LatentWrite(interleaved=False))


@write_check("eps", "an eps that is fixed, or added after the square root")
def eps(trial: Trial) -> None:
    """With small inputs eps matters, and it is the one that is passed."""
    check_small(trial, *(LatentWrite(size=1e-3, eps=value) for value in (1e-6, 1e-5)))


@write_check("large", "squares that overflow a narrow dtype", "numbers")
def large(trial: Trial) -> None:
    """Inputs in the hundreds are cached as accurately as small ones."""
    check_small(trial, LatentWrite(size=500.0))


@write_check("page_sizes", "a slot that is split into page and offset with a fixed page size", "tiles")
def page_sizes(trial: Trial) -> None:
    """Slots are rows of the flattened cache, whatever the page size."""
    sizes = (1, 16, 128) if trial.quick else (1, 2, 4, 8, 16, 32, 128, 256)
    check_small(trial, *by_turns(*(LatentWrite(page_size=size) for size in sizes)))


@write_check("untouched", "a write past the row, to a neighbour's slot or to another layer", "memory")
def untouched(trial: Trial) -> None:
    """Slots that are not written keep every bit, NaN included, and so do the other layers."""
    for problem in (LatentWrite(), LatentWrite(tokens=1, page_size=16), LatentWrite(tokens=70)):
        with trial.case(problem.label):
            call = small_call(trial, problem)
            call.expect_guards(call.run())


@write_check("other_widths", "a kernel compiled for 512 + 64 that runs on other widths anyway", "tiles")
def other_widths(trial: Trial) -> None:
    """Widths other than 512 + 64 are served, or refused with a reason."""
    check_small(trial, LatentWrite(dims=SMALL, page_size=16))
