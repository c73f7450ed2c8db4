"""Small ops: where rows lie, far apart in memory or all over a cache, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mla.conformance.checks.attention import index
from mla.conformance.checks.small_ops.kinds import EXAMPLES, small_check, vary
from mla.conformance.checks.small_ops.write_latent import write_check
from mla.conformance.problems.attention import DEEPSEEK
from mla.conformance.problems.small_call import SmallCall, WriteCall, check_small
from mla.conformance.problems.small_ops import LatentWrite, SmallProblem
from mla.conformance.trial import Trial, expect

ORDERS = ("rising", "falling", "a run", "a shuffled run", "shuffled")
BITS = 17  # slots beyond what 16 bits count, in a cache that is small enough for any device


@write_check("order", "slots that are taken to rise, or to follow each other", "order")
def order(trial: Trial) -> None:
    """Slots may come in any order, with and without gaps."""
    check_small(trial, *(LatentWrite(t, order=order) for order in ORDERS for t in (2, 9, 130)))


@write_check("slots", "slots or pages that are counted in 8 to 16 bits", "index")
def slots(trial: Trial) -> None:
    """Rows are written to slots all over a cache of 131072 and more, and beside them nothing is."""
    for page_size in (64, 1) if trial.quick else (64, 1, 16, 256):
        check_sparse(trial, list(_beside_powers(1 << BITS)), page_size)


@write_check("far_slots", "places of rows that are computed in 32 bits", "index")
def far_slots(trial: Trial) -> None:
    """Rows whose place in memory is beyond 32 bits are written where they belong."""
    numbers = index.reach(trial, index.PLACES)
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
    kinds=[kind for kind in EXAMPLES if kind != "write_latent"],
)
def far_rows(trial: Trial, example: SmallProblem) -> None:
    """Rows of a tensor that is larger than 32 bits count are read and written where they are."""
    numbers = index.reach(trial, index.PLACES)
    trial.note = f"{numbers * trial.dtype.itemsize / 1e9:.2g} GB from the first to the last"
    try:
        with trial.case(example.label):
            call = SmallCall(trial, vary(example, tokens=5))
            x, out = call.inputs["x"].part, call.blank().part
            wide = torch.empty(5, numbers // 4, dtype=trial.dtype, device=trial.device)
            far_x, far_out = wide[:, : x[0].numel()], wide[:, -out[0].numel() :]
            far_x, far_out = far_x.unflatten(1, x.shape[1:]), far_out.unflatten(1, out.shape[1:])
            call.call(x=far_x.copy_(x), out=far_out.copy_(out))
            call.judge_rows(far_out.cpu())
    finally:
        trial.backend.empty_cache()


def _beside_powers(end: int) -> Iterator[int]:
    """Yield slots beside powers of two, and one between them, so that any mask or limit shows."""
    for power in range(2, math.ceil(math.log2(end)) + 1):
        yield from (slot for slot in (2**power, 2**power + 1, 3 * 2 ** (power - 1) - 1) if slot < end + 2)


def check_sparse(trial: Trial, slots: list[int], page_size: int) -> None:
    """Write to some slots of a cache whose memory is otherwise not touched, which costs little on a host."""
    order = torch.Generator().manual_seed(0)
    chosen = torch.tensor(sorted(set(slots)))[torch.randperm(len(set(slots)), generator=order)]
    problem = LatentWrite(len(chosen), page_size=page_size)
    with trial.case(f"{len(chosen)} slots to {int(chosen.max())}, page {page_size}"):
        call, beside = WriteCall(trial, problem), _beside(chosen).to(trial.device)
        pages = int(chosen.max()) // page_size + 2
        shape = (pages, page_size, problem.dims.latent)
        cache = torch.empty(shape, dtype=trial.dtype, device=trial.device)
        rows, on_device = cache.flatten(0, 1), chosen.to(trial.device)
        rows[on_device] = rows[beside] = torch.nan
        call.call(slots=on_device, cache=cache)
        call.judge_rows(rows[on_device].cpu())
        expect(bool(rows[beside].isnan().all()), "a slot beside those that are written has changed")


def _beside(slots: torch.Tensor) -> torch.Tensor:
    """Return the slots before and behind those."""
    around = torch.cat((slots - 1, slots + 1)).unique()
    return around[(around >= 0) & ~torch.isin(around, slots)]
