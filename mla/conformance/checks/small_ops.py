"""Checks of projections, norm, rotation and cache write: what they compute, and where kernels fail."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mla.cases.case import OpCase
from mla.cases.memory import allocate, copy_rows
from mla.cases.stress import Stress
from mla.conformance.checks import op_cases, op_check
from mla.conformance.checks.attention import DEEPSEEK
from mla.conformance.checks.sparse import WRITE_KEY
from mla.conformance.reach import far, memory_may_end
from mla.conformance.trial import Trial, expect
from mla.verify.tolerances import same_bits
from mla_backends.api import AttentionSpec, LinearSpec, NormSpec, Packed

CPU, FP32 = torch.device("cpu"), torch.float32
ROTARY_SPEC = AttentionSpec(**DEEPSEEK, num_heads=16, dtype=FP32, device=CPU)


def small(kind: str, spec: Any, tokens: int) -> OpCase:
    """Return a case of an op that works row by row."""
    return OpCase(kind, spec, (tokens,), (tokens,), stress=Stress())


# Narrow, but multiples of 128, which some kernels want. Draws try odd ones.
EXAMPLES: Mapping[str, OpCase] = {
    "linear": small("linear", LinearSpec(256, 128, 1, FP32, CPU), 7),
    "batched_linear": small("batched_linear", LinearSpec(128, 128, 2, FP32, CPU), 7),
    "rms_norm": small("rms_norm", NormSpec(512, FP32, CPU), 7),
    "rotate_query": small("rotate_query", ROTARY_SPEC, 7).but(num_heads=2),
    "write_latent": small("write_latent", ROTARY_SPEC, 9),
    "write_index_key": WRITE_KEY,
}
PRODUCTS, NORM, ROTATE, WRITE = (
    ("linear", "batched_linear"),
    ("rms_norm",),
    ("rotate_query",),
    ("write_latent", "write_index_key"),
)
HEADED = ("batched_linear", "rotate_query")


def of(kinds: Iterable[str]) -> Mapping[str, OpCase]:
    """Return the examples of some kinds."""
    return {kind: EXAMPLES[kind] for kind in kinds}


def other_way(case: OpCase) -> OpCase:
    """Return the case with a bias, or rotated in halves; of other kinds the case itself."""
    if case.kind == "linear":
        return case.but(biased=True)
    return case.but(interleaved=False) if "interleaved" in case.entry.scalars else case


def both_ways(cases: Iterable[OpCase]) -> Iterator[OpCase]:
    """Yield each case, and its other way if it has one."""
    yield from dict.fromkeys(way for case in cases for way in (case, other_way(case)))


def by_turns(cases: Iterable[OpCase]) -> Iterator[OpCase]:
    """Yield every third case the other way, as sizes of tiles are even, and the last one both ways."""
    *most, last = cases
    yield from (other_way(case) if number % 3 == 2 else case for number, case in enumerate(most))
    yield from both_ways([last])


def of_tokens(case: OpCase, *counts: int) -> Iterator[OpCase]:
    """Yield the case with so many tokens."""
    return (case.but(tokens=count) for count in counts)


# ------------------------------------------------------------------------------------------------- formula


@op_cases(
    "product",
    "tiles",
    "a weight that is transposed or a neighbour's, or a last tile missing",
    of(PRODUCTS),
)
def product(example: OpCase) -> Iterator[OpCase]:
    """The product is correct for one token and for many."""
    groups = 16 if example.kind == "batched_linear" else 1
    for tokens, inputs, outputs in ((1, 128, 256), (7, 128, 256), (130, 128, 256), (5, 33, 17)):
        yield example.but(tokens=tokens, in_features=inputs, out_features=outputs, groups=groups)


@op_cases("formula", "formula", "a norm over the wrong width, or without its weight", of(NORM))
def norm_formula(example: OpCase) -> Iterator[OpCase]:
    """x / sqrt(mean(x^2) + eps) * weight, over rows of any width."""
    for width in (1536, 33):
        yield from of_tokens(example.but(features=width), 1, 70)


@op_cases(
    "formula",
    "formula",
    "a key that is cached unrotated, or what is normed without its norm's weight",
    of(WRITE),
)
def write_formula(example: OpCase) -> Iterator[OpCase]:
    """Latents and index keys are normed and keys rotated, each as accurately as the dtype allows."""
    return of_tokens(example, 9, 1, 130)


@op_check(
    "pack", "contract", "a layout that loses bits, so that a checkpoint cannot be saved again", of(PRODUCTS)
)
def pack(trial: Trial, example: OpCase) -> None:
    """unpack(pack(weight)) is the weight, bit for bit, whatever its strides."""
    for case in (example, example.but(tokens=1, in_features=96, out_features=70)):
        with trial.case(case.label):
            call = trial.serve(case)
            weight = call.pool.given["weight"]
            on_device = weight.to(trial.device, copy=True)
            for name, given in {"contiguous": on_device, "transposed": on_device.mT.contiguous().mT}.items():
                packed = call.op.pack(given)
                expect(isinstance(packed, Packed), f"pack() returned a {type(packed).__name__}")
                expect(packed.nbytes > 0, f"nbytes is {packed.nbytes}")
                expect(same_bits(given, weight), f"pack() changed the weight it was given ({name})")
                expect(same_bits(call.op.unpack(packed), weight), f"unpack() returns different bits ({name})")


# -------------------------------------------------------------------------------------------- grid and tiles

# A prime, so that no tile divides it. A kernel that is wrong from any row on up to it is wrong here, whatever
# the number was.
MOST_ROWS = 5003
# Every rest of small tiles; then beside powers of two, which sizes of blocks and their multiples are.
ROW_COUNTS = (*range(1, 34), 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2049)
# More rows than the 65535 blocks of a grid's second and third dimension; and their widths.
BEYOND_GRID, NARROW_WIDTH = 66_001, 16
# Every rest of a tile of up to 32 heads, and what layers have.
HEADS = (*range(1, 34), 40, 48, 63, 64, 65, 96, 127, 128)


@op_cases("rows", "grid", "rows beyond a launch grid, or no multiple of its blocks", EXAMPLES)
def rows(example: OpCase) -> Iterator[OpCase]:
    """From one row to thousands, every row is right."""
    widths = {"kv_lora_rank", "qk_rope_head_dim", "in_features", "out_features", "features", "head_dim"}
    widths |= {"rope_head_dim"}
    narrow = dict.fromkeys(widths & set(example.entry.letters.values()), NARROW_WIDTH)
    few = [*of_tokens(example, *ROW_COUNTS), example.but(**narrow, tokens=BEYOND_GRID)]
    return by_turns([*few, example.but(tokens=MOST_ROWS)])


@op_cases("rows_and_heads", "grid", "tokens times heads that a launch grid does not hold", of(HEADED))
def rows_and_heads(example: OpCase) -> Iterator[OpCase]:
    """Tokens times heads may exceed 65535."""
    case = _of_heads(example, 128).but(tokens=521)
    yield other_way(case.but(out_features=64) if example.kind == "batched_linear" else case)


@op_cases(
    "heads",
    "tiles",
    "heads left over by a tile of heads, or a head count that is assumed",
    of(HEADED),
)
def heads(example: OpCase) -> Iterator[OpCase]:
    """Any number of heads from 1 to 128 is served, or refused with a reason."""
    narrow = {"in_features": 64, "out_features": 64} if example.kind == "batched_linear" else {}
    for case in of_tokens(example.but(**narrow), 1, 3):
        yield from by_turns(_of_heads(case, count) for count in HEADS)


def _of_heads(case: OpCase, count: int) -> OpCase:
    return case.but(**{"groups" if case.kind == "batched_linear" else "num_heads": count})


# ------------------------------------------------------------------------------------------------ numbers


@op_cases("outlier", "numbers", "a scale that an outlier sets for a whole row", of(PRODUCTS))
def outlier(example: OpCase) -> Iterator[OpCase]:
    """An input that is far larger than others, and counts as much, costs no accuracy."""
    return of_tokens(example.but(outlier=True), 1, 66)


# ------------------------------------------------------------------------------------------ memory and places

BITS = 17  # slots beyond what 16 bits count, in a cache that is small enough for any device


@op_check("slots", "index", "slots or pages that are counted in 8 to 16 bits", of(WRITE))
def slots(trial: Trial, example: OpCase) -> None:
    """Rows are written to slots all over a cache of 131072 and more, and beside them nothing is."""
    for page_size in (64, 1):
        check_sparse(trial, example, list(_beside_powers(1 << BITS)), page_size)


@op_check("far_slots", "index", "places of rows that are computed in 32 bits", of(WRITE))
def far_slots(trial: Trial, example: OpCase) -> None:
    """Rows whose place in memory is beyond 32 bits are written where they belong."""
    with far(trial, what="from the start") as numbers:
        end = numbers // sum(example.shape(example.entry.cached))
        check_sparse(trial, example, [*_beside_powers(end), *range(end - 2, end + 3)], 64)


def _beside_powers(end: int) -> Iterator[int]:
    """Yield slots beside powers of two, and one between them, so that any mask or limit shows."""
    for power in range(2, math.ceil(math.log2(end)) + 1):
        yield from (slot for slot in (2**power, 2**power + 1, 3 * 2 ** (power - 1) - 1) if slot < end + 2)


def check_sparse(trial: Trial, example: OpCase, some: Sequence[int], page_size: int) -> None:
    """Write to some slots of a cache whose memory is otherwise not touched, which costs little on a host."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.tensor(sorted(set(some)))[torch.randperm(len(set(some)), generator=random)]
    case = example.but(tokens=len(chosen), page_size=page_size, interleaved=page_size > 1)
    with trial.case(f"{case.label}, slots to {int(chosen.max())}"), memory_may_end():
        call, around = trial.serve(case), torch.cat((chosen - 1, chosen + 1)).unique()
        beside = around[(around >= 0) & ~torch.isin(around, chosen)].to(trial.device)
        pages = int(chosen.max()) // page_size + 2
        cache = allocate((pages, page_size, *case.shape(case.entry.cached)), trial.dtype, trial.device)
        rows, on_device = cache.flatten(0, 1), chosen.to(trial.device)
        rows[on_device] = rows[beside] = torch.nan
        call.replace(slots=on_device, cache=cache)
        trial.check(call)
        expect(bool(rows[beside].isnan().all()), "a slot other than those written has changed")


@op_check("far_rows", "index", "places of rows that are computed in 32 bits", EXAMPLES)
def far_rows(trial: Trial, example: OpCase) -> None:
    """Rows of a tensor that is larger than 32 bits count are read and written where they are."""
    with far(trial) as numbers:
        case = example.but(tokens=5)
        with trial.case(case.label), memory_may_end():
            _check_far_rows(trial, case, numbers // 4)


def _check_far_rows(trial: Trial, case: OpCase, apart: int) -> None:
    """Lay the rows of the first operand so many numbers apart, and those of the output behind them."""
    call = trial.serve(case)
    wide = allocate((case.rows, apart), trial.dtype, trial.device)
    name = case.entry.varied[0]
    rows, out = call.arguments[name], call.arguments.get("out")
    there = {name: copy_rows(wide[:, : rows[0].numel()].unflatten(1, rows.shape[1:]), rows)}
    if out is not None:  # and no cache, whose own check is far_slots
        there["out"] = copy_rows(wide[:, -out[0].numel() :].unflatten(1, out.shape[1:]), out)
    call.replace(**there)
    trial.check(call)
