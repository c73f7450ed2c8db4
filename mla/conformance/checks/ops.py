"""What is asked of ops beyond a call: their contract, packing, planning, graphs, and places beyond 32 bits.

Each on offer must name its contract, and refuse with reasons before anything is launched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mla.cache.formats import find_format, index_codec
from mla.cases import KINDS
from mla.cases.case import OpCase
from mla.cases.memory import allocate
from mla.cases.played import Scene
from mla.config import MLAConfig
from mla.conformance.checks.borders import (
    ATTENTION,
    EXAMPLES,
    PREFILL,
    SEVERAL,
    SMALL_SPEC,
    SPARSE,
    batch,
    both_ways,
    decode,
    op_check,
)
from mla.conformance.checks.device import NO_GRAPH, best, elapsed, load_of, median
from mla.conformance.drawn import draw
from mla.conformance.registry import DRAWN, check
from mla.conformance.trial import DTYPES, BackendUnderTest, Refused, Trial, expect, kind_of
from mla.layer.ops import Ops, preflight_reasons
from mla.verify.tolerances import same_bits
from mla_backends import host
from mla_backends.api import (
    AttentionSpec,
    FusedOp,
    IndexerSpec,
    LinearSpec,
    NormSpec,
    Packed,
    claimed_formats,
)
from mla_backends.errors import describe, out_of_memory

PAGED, WRITES = ("latent_attention", *SPARSE), ("write_latent", "write_index_key")
UNITS = 4  # of pending work that a plan might wait for ...
BUSY = 3  # ... as often: on a device that does not queue, work takes its time
NOT_SAFE = "the op's state does not declare that a captured call follows its batch (graph_safe)"
# What few layers have, in place of small widths of latents.
ODD: Mapping[type, Mapping[str, Any]] = {
    LinearSpec: {"in_features": 33, "out_features": 70},
    NormSpec: {"features": 33},
    IndexerSpec: {"head_dim": 30, "rope_head_dim": 14, "topk": 7},
    AttentionSpec: SMALL_SPEC,
}


@check("ops.known", catches="an op with a misspelt contract or cache format, which would silently never run")
def known(trial: Trial) -> None:
    """Every op has a unique name, a known contract, and claims known cache formats."""
    offered = trial.backend.ops()
    expect(isinstance(offered, Mapping), f"ops() returned a {type(offered).__name__}, not a mapping")
    expect(list(offered) == list(trial.backend.ops()), "ops() returns different names when called again")
    for name, op in _some(offered).items():
        with trial.case(str(name)):
            expect(isinstance(name, str) and bool(name), f"an op is named {name!r}")
            Ops(MLAConfig(256, 16), {name: op}, torch.float32, trial.device)
            expect(isinstance(op.nan_safe_tail, bool), f"nan_safe_tail is {op.nan_safe_tail!r}")
            for claimed in claimed_formats(op):
                if KINDS[kind_of(op)].spec is IndexerSpec:
                    index_codec(claimed, 128)
                else:
                    find_format(f"{claimed}1" if claimed.endswith(":") else claimed)


@check("ops.reasons", catches="a support query that raises, launches work, or gives no list of reasons")
def reasons(trial: Trial) -> None:
    """For any layer, and any lengths, an op answers with a list of sentences, the same every time."""
    lengths = (((1,), (1,)), ((0, 1), (0, 0)), ((3, 1, 128), (3, 70_000, 200)), ((1,) * 300, (5,) * 300))
    for name, op in _some(trial.backend.ops()).items():
        with trial.case(name):
            for spec in specs(op, trial.subject):
                _expect_reasons("unsupported_reasons()", [op.unsupported_reasons(spec) for _ in range(2)])
                for batch in lengths if KINDS[kind_of(op)].prepares else ():
                    asked = [op.unsupported_batch(spec, *batch) for _ in range(2)]
                    _expect_reasons("unsupported_batch()", asked)


@check("ops.preflight", catches="a preflight that raises, or answers yes or no; remarks that are not a list")
def preflight(trial: Trial) -> None:
    """Asked for a layer that it supports, an op says with lists of sentences whether and how it runs here."""
    for name, op in _some(trial.backend.ops()).items():
        with trial.case(name):
            served = (spec for spec in specs(op, trial.subject) if not op.unsupported_reasons(spec))
            for spec in itertools.islice(served, 1):  # it may compile
                preflight_reasons(name, op, spec, trial.subject.say)  # says so, and keeps the answer
                _expect_reasons("preflight()", [op.preflight(spec)] * 2)
                _expect_reasons("remarks", [op.remarks] * 2)


def _some(offered: Mapping[str, FusedOp]) -> Mapping[str, FusedOp]:
    if not offered:
        raise Refused("the backend offers no ops")
    return offered


def specs(op: FusedOp, subject: BackendUnderTest) -> Iterator[Any]:
    """Yield specs of the op's kind, common and odd ones."""
    kind = kind_of(op)
    usual, odd = EXAMPLES[kind], ODD[KINDS[kind].spec]
    for dtype in (*DTYPES, torch.float64):
        for case in (usual, usual.but(**odd)):
            for heads in (1, 3, 16, 128):
                names = {"num_heads", "groups"} & {*vars(case.spec)} if kind != "linear" else ()
                yield case.but(dtype=dtype, device=subject.device, **dict.fromkeys(names, heads)).spec


def _expect_reasons(what: str, asked: list[Any]) -> None:
    for answer in asked:
        right = isinstance(answer, (list, tuple)) and all(
            isinstance(reason, str) and reason for reason in answer
        )
        expect(right, f"{what} returned {answer!r}, not a list of sentences")
    expect(list(asked[0]) == list(asked[1]), f"{what} returned {asked[0]!r} and then {asked[1]!r}")


# ------------------------------------------------------------------------------------- packing and planning


@op_check(
    "pack",
    "contract",
    ("linear", "batched_linear"),
    "a layout that loses bits, so that a checkpoint cannot be saved again",
)
def pack(trial: Trial, kind: str) -> None:
    """unpack(pack(weight)) is the weight, bit for bit, whatever its strides."""
    for case in (EXAMPLES[kind], EXAMPLES[kind].but(tokens=1, in_features=96, out_features=70)):
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


@op_check(
    "prepare",
    "state",
    (*ATTENTION, *SPARSE),
    "a plan step that waits for the device or copies lengths back from it",
)
def prepare(trial: Trial, kind: str) -> None:
    """Preparing a batch does not wait for pending work on the device."""
    case = trial.fitted(batch(kind, *SEVERAL))
    with trial.case(case.label):
        call = trial.serve(case)
        call.prepare()  # one-time setup does not count
        work = load_of(trial.subject)
        pending = work.milliseconds(UNITS)

        def busy() -> float:
            work.read()
            work.submit(UNITS)
            return elapsed(call.prepare)

        behind = median(busy, BUSY)
        work.read()
        waited = behind - best(lambda: elapsed(call.prepare))
        expect(waited < 0.5 * pending, f"prepare() waited {waited:.3g} of {pending:.3g} ms of pending work")


# -------------------------------------------------------------------------------------------------- graphs


def capture(trial: Trial, work: Callable[[], None]) -> Callable[[], None]:
    """Run `work` once, so that one-time setup is not captured, then capture it."""
    work()
    trial.backend.synchronize()
    replay = trial.backend.graph(work)
    if replay is None:
        raise Refused(NO_GRAPH)
    return replay


def captured(trial: Trial, first: OpCase, second: OpCase, follows: bool) -> None:
    """Capture a call for one case, then replay it with the inputs of the other, and back again."""
    call = trial.serve(first)
    call.prepare()
    if follows and not getattr(call.leading[0], "graph_safe", False):
        raise Refused(NOT_SAFE)
    replay = capture(trial, lambda: call.op(*call.leading, **call.arguments))
    for case in (second, first, second):
        held = trial.serve(case)
        call.restore(held)
        replay()
        trial.backend.synchronize()
        trial.right(held, call.judge(held, only=("out", "out_in_bf16")))


@op_check("graph", "state", PAGED, "a call that waits, allocates or reads inputs on the host while captured")
def graph(trial: Trial, kind: str) -> None:
    """A captured call gives the right output for other queries and other cache contents."""
    first = trial.fitted(decode(kind, (50, 10, 100)))
    with trial.case(first.label):
        captured(trial, first, first.but(seed=1), follows=False)


@op_check("graph_lengths", "state", PAGED, "a schedule or a longest length that is frozen at capture")
def graph_lengths(trial: Trial, kind: str) -> None:
    """A captured call follows lengths and block tables that change in place, if its state declares it."""
    first, second = (trial.fitted(decode(kind, keys)) for keys in ((50, 10, 100, 3), (100, 65, 1, 0)))
    with trial.case(f"{first.label}, then {second.label}"):
        captured(trial, first, second.but(seed=1), follows=True)


# -------------------------------------------------------------------------------------------------- places
# Requests are short and lie in large memory, of which nothing else is ever touched.

ELSEWHERE = "places that are computed in 32 bits, and lie elsewhere in memory"
FAR_TOKENS = 35
# Numbers from the first to the last: beyond what 32 bits count, unsigned and signed. Beyond the last, signed
# bytes have run out, in a dtype of two.
PLACES = (1 << 32, 1 << 31, 1 << 30)
BITS = 17  # slots beyond what 16 bits count, in a cache that is small enough for any device


@contextmanager
def far(trial: Trial, tensors: int = 1, what: str = "from the first to the last") -> Iterator[int]:
    """Yield the farthest place that so many tensors have memory for, and note it.

    Raises `Refused` if there is none, and for an error that says that memory was short, as copies may cause.
    """
    numbers = _reach(trial, tensors)
    trial.note = f"{numbers * trial.dtype.itemsize / 1e9:.2g} GB {what}"
    try:
        yield numbers
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one, where torch has it
        if out_of_memory(describe(error)):
            raise Refused("there is not as much memory as it takes") from error
        raise
    finally:
        trial.backend.empty_cache()


def _reach(trial: Trial, tensors: int) -> int:
    """Return how many numbers each of the tensors may span. Many of them at the farthest take too much."""
    least = 0
    for numbers in PLACES if tensors <= 2 else PLACES[1:] or PLACES:
        least = numbers * trial.dtype.itemsize * tensors
        # Little of a tensor on the host is ever touched, unless an op makes a copy of a cache in float32.
        copied = 4 * numbers if tensors == 1 else 0
        needed, free = (
            (least + copied, host.memory_available())
            if trial.device.type == "cpu"
            else (least + least // 4, trial.backend.memory().free)
        )
        if free is None:
            raise Refused("how much memory is free is not known")
        if needed <= free:
            return numbers
    raise Refused(f"there is no room for {least / 1e9:.2g} GB")


@op_check("far_rows", "index", KINDS, ELSEWHERE)
def far_rows(trial: Trial, kind: str) -> None:
    """Rows of operands and outputs may lie apart, the last of them beyond 32 bits."""
    example = EXAMPLES[kind]
    case = (
        batch(kind, (4, 30, 1), (4, 131, 5), 2) if example.entry.prepares else example.but(tokens=FAR_TOKENS)
    )
    keyed = kind == "expanded_attention"  # which has keys and values as well
    for way in map(trial.fitted, both_ways(case) if keyed else [case]):
        with trial.case(f"{way.label}, rows far apart"), far(trial, 5 if keyed else 2) as numbers:
            apart = numbers // (FAR_TOKENS - 2) // 1024 * 1024  # the last is beyond, and all are aligned
            trial.play(Scene((way.but(apart=apart),)))


@op_check("far_pages", "index", PAGED, ELSEWHERE)
def far_pages(trial: Trial, kind: str) -> None:
    """Pages whose place in memory is beyond 32 bits are read where they are."""
    for case in map(trial.fitted, (decode(kind, (33, 130, 7)), batch(kind, *PREFILL))):
        with trial.case(f"{case.label}, pages far away"), far(trial, what="from the start") as numbers:
            page = case.layout.page_size * sum(case.shape(case.entry.cached))
            trial.play(Scene((case.but(pages_before=-(-numbers // page)),)))


@op_check("slots", "index", WRITES, "slots or pages that are counted in 8 to 16 bits")
def slots(trial: Trial, kind: str) -> None:
    """Rows are written to slots all over a cache of 131072 and more, and beside them nothing is."""
    for page_size in (64, 1):
        case = EXAMPLES[kind].but(page_size=page_size, interleaved=page_size > 1)
        with trial.case(f"{case.label}, slots to {1 << BITS}"):
            _write_apart(trial, case, _beside_powers(1 << BITS))


@op_check("far_slots", "index", WRITES, ELSEWHERE)
def far_slots(trial: Trial, kind: str) -> None:
    """Rows whose place in memory is beyond 32 bits are written where they belong."""
    case = EXAMPLES[kind]
    with trial.case(f"{case.label}, slots far away"), far(trial, what="from the start") as numbers:
        end = numbers // sum(case.shape(case.entry.cached))
        _write_apart(trial, case, [*_beside_powers(end), *range(end - 2, end + 3)])


def _beside_powers(end: int) -> Iterator[int]:
    """Yield slots beside powers of two, and one between them, so that any mask or limit shows."""
    for power in range(2, math.ceil(math.log2(end)) + 1):
        yield from (slot for slot in (2**power, 2**power + 1, 3 * 2 ** (power - 1) - 1) if slot < end + 2)


def _write_apart(trial: Trial, case: OpCase, some: Iterable[int]) -> None:
    """Write to some slots of a cache whose memory is otherwise not touched, which costs little on a host."""
    chosen = torch.tensor(sorted(set(some)))
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    call, around = trial.serve(case.but(tokens=len(chosen))), torch.cat((chosen - 1, chosen + 1)).unique()
    beside = around[(around >= 0) & ~torch.isin(around, chosen)].to(trial.device)
    pages = int(chosen.max()) // case.layout.page_size + 2
    shape = pages, case.layout.page_size, *case.shape(case.entry.cached)
    cache = allocate(shape, trial.dtype, trial.device)
    rows, on_device = cache.flatten(0, 1), chosen.to(trial.device)
    rows[on_device] = rows[beside] = torch.nan
    call.replace(slots=on_device, cache=cache)
    trial.right(call, call.call())
    expect(bool(rows[beside].isnan().all()), "a slot other than those written has changed")


# --------------------------------------------------------------------------------------------------- draws


@op_check(DRAWN, DRAWN, KINDS, "combinations of sizes, numbers, memory and calls that no table has")
def drawn(trial: Trial, kind: str) -> None:
    """Cases drawn over all axes at once are right; the smallest wrong one is shown."""
    with trial.case("drawn"):
        draw(trial)
