"""What an attention op may keep between calls: its plan, and nothing of the numbers it was given."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from mla.cases.case import OpCase
from mla.cases.memory import Tensors
from mla.cases.played import host_of
from mla.conformance.checks import op_check
from mla.conformance.checks.attention import BOTH, LATENT, Make, decode, require_lse, usual
from mla.conformance.checks.device import NO_GRAPH, MatmulLoad, best, elapsed, load_of, median
from mla.conformance.checks.sparse import EITHER
from mla.conformance.trial import Refused, Trial, expect
from mla.parallel.layer import merge
from mla.parallel.layout import Share

PAGED = {**LATENT, **EITHER}
ALL = {**BOTH, **EITHER}
UNITS = 4  # of pending work that a plan might wait for ...
BUSY = 3  # ... as often: on a device that does not queue, work takes its time
ALIVE = 20  # states at a time
NOT_SAFE = "the op's state does not declare that a captured call follows its batch (graph_safe)"


@functools.lru_cache(maxsize=1)
def pending_of(work: MatmulLoad) -> float:
    """Return how many milliseconds that work takes, measured once."""
    return work.milliseconds(UNITS)


@op_check("prepare", "state", "a plan step that waits for the device or copies lengths back from it", ALL)
def prepare(trial: Trial, make: Make) -> None:
    """Preparing a batch does not wait for pending work on the device."""
    case = trial.fitted(make(*usual(make)))
    with trial.case(case.label):
        call = trial.serve(case)
        call.prepare()  # one-time setup does not count
        work = load_of(trial.subject)
        pending = pending_of(work)

        def busy() -> float:
            work.read()
            work.submit(UNITS)
            return elapsed(call.prepare)

        behind = median(busy, BUSY)
        work.read()
        waited = behind - best(lambda: elapsed(call.prepare))
        expect(waited < 0.5 * pending, f"prepare() waited {waited:.3g} of {pending:.3g} ms of pending work")


@op_check("alive", "state", "states in a ring of a few, or scratch memory that later states take over", ALL)
def alive(trial: Trial, make: Make) -> None:
    """Many states live at a time, and are called in any order."""
    case = trial.fitted(make((1, 2), (5, 9), 2))
    first, second = case.kv_lens
    cases = [case.but(kv_lens=(first + i, second + 2 * i)) for i in range(ALIVE)]
    order = tuple((state, 1) for state in (*range(ALIVE)[::-1], *range(ALIVE)))
    with trial.case(f"{ALIVE} states, the first {case.label}"):
        trial.play(*cases, order=order, early=True)


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
        trial.right(held, call.judge(held, only=("out", "coarse")))


@op_check("graph", "state", "a call that waits, allocates or reads inputs on the host while captured", PAGED)
def graph(trial: Trial, make: Make) -> None:
    """A captured call gives the right output for other queries and other cache contents."""
    first = trial.fitted(make((1, 1, 1), (50, 10, 100)))
    with trial.case(first.label):
        captured(trial, first, first.but(seed=1), follows=False)


@op_check("graph_lengths", "state", "a schedule or a longest length that is frozen at capture", PAGED)
def graph_lengths(trial: Trial, make: Make) -> None:
    """A captured call follows lengths and block tables that change in place, if its state declares it."""
    first, second = (trial.fitted(make((1,) * 4, kv_lens)) for kv_lens in ((50, 10, 100, 3), (100, 65, 1, 0)))
    second = second.but(seed=1)
    with trial.case(f"{first.label}, then {second.label}"):
        captured(trial, first, second, follows=True)


# -------------------------------------------------------------------------------------------------- shares


@op_check(
    "shares",
    "numbers",
    "a log-sum-exp that does not weigh parts of a context: in another base, or without keys",
    LATENT,
)
def shares(trial: Trial, make: Make) -> None:
    """Every 2nd, or 3rd, token attended apart and merged gives what all do; some shares have no keys."""
    require_lse(trial)
    for world in (2, 3):
        for case in (decode(70, 2, 1, 129), make((3, 1, 5), (5, 66, 5))):
            case = trial.fitted(case)
            with trial.case(f"{case.label} in {world} shares"):
                whole = trial.serve(case)
                parts = [_attend(trial, case, Share(rank, world)) for rank in range(world)]
                out, sums = (torch.stack([part[name] for part in parts]) for name in ("out", "lse"))
                merged = torch.empty_like(out[0])
                merge(out, sums, merged)
                trial.right(whole, whole.wrong({"out": merged}))


def _attend(trial: Trial, case: OpCase, share: Share) -> Tensors:
    """Return out [T, h, c] and lse [T, h] of one share, where each new token is a request of its own."""
    whole, keys = host_of(case.but(dtype=trial.dtype)), []
    for latents, new, length in zip(
        whole.given["keys"].split(case.kv_lens), case.query_lens, case.kv_lens, strict=True
    ):
        held = latents[share.rank :: share.world]
        seen = share.held(torch.arange(length - new, length) + 1)
        keys += [held[:count] for count in seen.tolist()]
    lengths = tuple(map(len, keys))
    part = case.but(query_lens=(1,) * len(lengths), kv_lens=lengths)
    given = {"q": whole.given["q"], "keys": torch.cat(keys)}
    call = trial.serve(part, given=given)
    trial.check(call)
    return call.results()
