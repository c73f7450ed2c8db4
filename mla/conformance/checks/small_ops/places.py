"""Small ops: where rows lie, far apart in memory or all over a cache, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mla.conformance.checks.small_ops.kinds import both_ways, small_check, vary
from mla.conformance.checks.small_ops.write_latent import write_check
from mla.conformance.problems.attention import DEEPSEEK
from mla.conformance.problems.reach import allocate, memory_may_end, reach
from mla.conformance.problems.small_call import WriteCall, check_small, small_call
from mla.conformance.problems.small_ops import LatentWrite, SmallProblem
from mla.conformance.trial import Trial, expect

ORDERS = ("rising", "falling", "a run", "a shuffled run", "shuffled")
BITS = 17  # slots beyond what 16 bits count, in a cache that is small enough for any device


@write_check("order", "slots that are taken to rise, or to follow each other", "order")
def order(trial: Trial) -> None:
    """Slots may come in any order, with and without gaps."""
    check_small(trial, *both_ways(*(LatentWrite(t, order=order) for order in ORDERS for t in (2, 9, 130))))


@write_check("slots", "slots or pages that are counted in 8 to 16 bits", "index")
def slots(trial: Trial) -> None:
    """Rows are written to slots all over a cache of 131072 and more, and beside them nothing is."""
    for page_size in (64, 1) if trial.quick else (64, 1, 16, 256):
        check_sparse(trial, list(_beside_powers(1 << BITS)), page_size)


@write_check("far_slots", "places of rows that are computed in 32 bits", "index")
def far_slots(trial: Trial) -> None:
    """Rows whose place in memory is beyond 32 bits are written where they belong."""
    numbers = reach(trial)
    trial.note = f"{numbers * trial.dtype.itemsize / 1e9:.2g} GB from the start"
    try:
        end = numbers // DEEPSEEK.latent
        check_sparse(trial, [*_beside_powers(end), *range(end - 2, end + 3)], 64)
    finally:
        trial.backend.empty_cache()


@small_check(
    "far_rows",
    catches="places of rows that are computed in 32 bits",
    fails="index",
)
def far_rows(trial: Trial, example: SmallProblem) -> None:
    """Rows of a tensor that is larger than 32 bits count are read and written where they are."""
    numbers = reach(trial)
    trial.note = f"{numbers * trial.dtype.itemsize / 1e9:.2g} GB from the first to the last"
    try:
        _check_far_rows(trial, vary(example, tokens=5), numbers // 4)
    finally:
        trial.backend.empty_cache()


def _check_far_rows(trial: Trial, problem: SmallProblem, apart: int) -> None:
    """Lay the rows of the first operand so many numbers apart, and those of the output behind them."""
    with trial.case(problem.label), memory_may_end():
        call = small_call(trial, problem)
        wide = allocate((problem.tokens, apart), trial.dtype, trial.device)
        name, out = next(iter(call.host.rows)), call.blank()
        rows = call.inputs[name].part
        far = {name: wide[:, : rows[0].numel()].unflatten(1, rows.shape[1:]).copy_(rows)}
        if isinstance(call, WriteCall):  # to a cache, whose own check is far_slots
            call.call(**far, cache=out.part)
            call.judge(out)
            call.expect_guards(out)
            return
        far["out"] = wide[:, -out.part[0].numel() :].unflatten(1, out.part.shape[1:]).copy_(out.part)
        call.call(**far)
        call.judge_rows(far["out"].cpu())


def _beside_powers(end: int) -> Iterator[int]:
    """Yield slots beside powers of two, and one between them, so that any mask or limit shows."""
    for power in range(2, math.ceil(math.log2(end)) + 1):
        yield from (slot for slot in (2**power, 2**power + 1, 3 * 2 ** (power - 1) - 1) if slot < end + 2)


def check_sparse(trial: Trial, slots: list[int], page_size: int) -> None:
    """Write to some slots of a cache whose memory is otherwise not touched, which costs little on a host."""
    order = torch.Generator().manual_seed(0)
    chosen = torch.tensor(sorted(set(slots)))[torch.randperm(len(set(slots)), generator=order)]
    problem = LatentWrite(len(chosen), page_size=page_size, interleaved=page_size > 1)
    with trial.case(f"{problem.label}, slots to {int(chosen.max())}"), memory_may_end():
        call, beside = WriteCall(trial, problem), _beside(chosen).to(trial.device)
        pages = int(chosen.max()) // page_size + 2
        shape = (pages, page_size, problem.dims.latent)
        cache = allocate(shape, trial.dtype, trial.device)
        rows, on_device = cache.flatten(0, 1), chosen.to(trial.device)
        rows[on_device] = rows[beside] = torch.nan
        call.call(slots=on_device, cache=cache)
        call.judge_rows(rows[on_device].cpu())
        expect(bool(rows[beside].isnan().all()), "a slot beside those that are written has changed")


def _beside(slots: torch.Tensor) -> torch.Tensor:
    """Return the slots before and behind those."""
    around = torch.cat((slots - 1, slots + 1)).unique()
    return around[(around >= 0) & ~torch.isin(around, slots)]
