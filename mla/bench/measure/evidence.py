"""Evidence against a number whose outputs are right: what speaks against the time, and forwards that tell.

A backend is trusted code, and may be wrong: its `synchronize` may return early, its device's clock may count
something else, and its kernels may keep results of earlier calls. And every pass repeats its lengths, which a
server never does: a schedule that is kept per tuple of lengths, or a kernel that is compiled for one, costs
nothing in a pass. It does where lengths are new: each tuple of them is run once, and then again, so that the
forwards differ in nothing but having been seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from statistics import fmean, median
from time import perf_counter_ns as now_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mla.bench.results.schema import NewLengths
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import Scenario
from mla.cache.ragged_batch import BatchMemory, RaggedBatch
from mla.cost import by_path
from mla.errors import UnsupportedBatch
from mla.layer.plan import check_lengths
from mla_backends import BackendError
from mla_backends.api import Timer

if TYPE_CHECKING:
    from mla.bench.measure.passes import PassRunner, PassTimes
    from mla.bench.measure.variants import Steps

# A device's clock is believed that agrees with the host's within this ratio, and so many milliseconds a
# forward, in one of TURNS windows of at least so many milliseconds.
AGREES, EACH, WINDOW, TURNS = 0.10, 0.02, 20.0, 5
# The most forwards of a window.
MAX_FORWARDS = 4096
# A forward ends late if a copy to the host waits for so many milliseconds more once its clock has stopped,
# beyond AGREES of its time. So may this share of the forwards, and these few, on a busy machine.
LATE_MS, LATE_SHARE, LATE_FORWARDS = 0.05, 0.1, 2
# Forwards on new inputs: of a decode, or timed ones of passes that time only some. They may take so many
# times as long as in the passes, and so many milliseconds longer.
DECODE_STEPS, TIMED_STEPS, SLOWER, MIN_EXCESS_MS = 8, 3, 1.5, 0.05
# Rounds of them: others only make forwards slower, so the fastest on new inputs counts.
ROUNDS = 12

# New tuples of lengths; how often each is run again; and the seconds after which no further one is begun.
TUPLES, AGAIN, TUPLES_S = 6, 2, 2.0
# A length shrinks by at most a part, so that the work stays much the same, or by so many tokens.
PART, TOKENS = 8, 16
# Draws after which there are no new tuples to be had.
DRAWS = 20

_random = random.SystemRandom()  # otherwise two implementations of one run would see the same
_seen: set[Lengths] = set()


class Unseen:
    """Inputs of a layer that none of its forwards has seen, with an oracle of their own.

    Both serve all variants and implementations of a scenario. They are drawn again once they have
    contradicted a time: who remembers them is known from then on.
    """

    def __init__(self, plain: Any, checker: Any, count: int) -> None:
        """Draw inputs and run the oracle, which may take minutes.

        `plain`: the inputs of the passes; `count`: forwards that are judged at most.
        """
        self.plain, self._checker, self._count = plain, checker, count
        self.draw()
        self.judge()

    def draw(self) -> None:
        """Draw other inputs."""
        self.inputs, self._judge = self.plain.fresh(_random.getrandbits(63)), None

    def judge(self) -> Any:
        """Return the checker of a pass on these inputs."""
        self._judge = self._judge or self._checker.of(self.inputs, self._count)
        return self._judge


def forwards(steps: Steps, prefill: bool) -> int:
    """Return how many forwards of a pass are run on inputs that nothing has seen."""
    most = 1 if prefill else DECODE_STEPS if len(steps.timed) == len(steps.run) else TIMED_STEPS
    return steps.timed[min(len(steps.timed), most) - 1] + 1


def doubts(
    runner: PassRunner, new: Unseen | None, numbers: Iterator[int], beat: Callable[[], None]
) -> Iterator[str]:
    """Yield why the times of one variant cannot be right, a clause each.

    Forwards are run, whose passes take `numbers`; `beat` is called after each.
    """
    yield from filter(None, (late_doubt(runner.passes), device_doubt(runner, numbers, beat)))
    if new is not None and (doubt := fresh_doubt(runner, new, numbers, beat)):
        yield doubt


def late_doubt(passes: Sequence[PassTimes]) -> str:
    """Return why forwards were not done when their clock stopped, or nothing."""
    pairs = [pair for times in passes for pair in zip(times.late, times.inside, strict=True)]
    late = [(rest, ms) for rest, ms in pairs if rest > AGREES * ms + LATE_MS]
    if len(late) <= max(LATE_FORWARDS, LATE_SHARE * len(pairs)):
        return ""
    rest, ms = (median(values) for values in zip(*late, strict=True))
    return (
        f"the device worked on for {rest:.3g} ms after {len(late)} of {len(pairs)} timed forwards of "
        f"{ms:.3g} ms, as if `synchronize` returned early"
    )


def device_doubt(runner: PassRunner, numbers: Iterator[int], beat: Callable[[], None]) -> str:
    """Return why the device's clock cannot be right, or nothing; passes take `numbers`."""
    timer = runner.timer
    if timer is None:
        return ""
    each = median(ms for times in runner.passes for ms in times.inside)
    count = min(MAX_FORWARDS, max(3, ceil(WINDOW / max(each, 1e-3))))
    for _ in range(TURNS):
        beat()
        device, host = _window(runner, timer, count, numbers)
        if abs(device - host) <= AGREES * host + EACH * count:
            runner.confirmed = True
            return ""
    return (
        f"{count} forwards take {device:.3g} ms by the clock '{timer.clock}', but {host:.3g} ms by the host's"
    )


def _window(runner: PassRunner, timer: Timer, count: int, numbers: Iterator[int]) -> tuple[float, float]:
    """Return the milliseconds of several forwards at once, on the device's clock and on the host's.

    On the host's clock they end when a copy has waited for their outputs. If those are not there even then,
    as where a backend queues what torch does not know of, they end when the timer says so.
    """
    forwards, indices = runner.forwards, runner.steps.run
    forwards.restore(next(numbers))
    runner.wait()
    timer.start()
    start = now_ns()
    for place in range(count):
        index = indices[place % len(indices)]
        if place and index == indices[0]:
            forwards.restore(next(numbers))
        forwards.before(index)
        forwards.step(index)
    runner.wait()
    done = now_ns()
    out = getattr(forwards, "out", None)
    is_there = out is not None and not bool(out.reshape(-1)[-1:].isnan().any())
    taken = timer.stop()
    return taken, ((done if is_there else now_ns()) - start) / 1e6


def fresh_doubt(runner: PassRunner, new: Unseen, numbers: Iterator[int], beat: Callable[[], None]) -> str:
    """Return how forwards on inputs that nothing has seen contradict the passes of a layer, or nothing.

    Hidden states and history are new: nothing can have been remembered for them. Slow ones speak against the
    passes only where the same forwards on the inputs of the passes, run in turn with them, are not slow: in
    most rounds, as on a busy machine one of them may be the only one that ran undisturbed.
    """
    layer, scenario = runner.implementation, new.plain.scenario
    prefill = scenario.mode == "prefill"
    count = forwards(runner.steps, prefill)
    known = _known(runner, len(runner.steps.run) if prefill else count)
    fresh, again = list[float](), list[float]()
    for _ in range(ROUNDS):
        runner.rewarm(next(numbers))
        layer.load(scenario, new.inputs)
        fresh.append(median(runner.run(0, beat, count).samples))
        if not _slower(fresh[-1], known):
            return _wrong_outputs(runner, new)
        layer.load(scenario, new.plain)
        again.append(median(runner.run(next(numbers), beat, count).samples))
        new.draw()
    if _slower(min(fresh), median(again)):
        return (
            f"forwards on fresh inputs take {min(fresh):.3g} ms, those of the passes {known:.3g} ms, as if "
            "results were remembered"
        )
    layer.load(scenario, new.inputs)
    runner.run(0, beat, count)
    return _wrong_outputs(runner, new)


def _wrong_outputs(runner: PassRunner, new: Unseen) -> str:
    """Judge the pass that ran on the new inputs, and load those of the passes again."""
    reason = runner.implementation.check(new.judge()).reason
    runner.implementation.load(new.plain.scenario, new.plain)
    if not reason:
        return ""
    new.draw()
    return f"outputs on fresh inputs are wrong: {reason}"


def _slower(new: float, known: float) -> bool:
    return new > SLOWER * known and new - known > MIN_EXCESS_MS


def _known(runner: PassRunner, count: int) -> float:
    """Return the milliseconds that the first `count` forwards of the passes took.

    The median is the latency, and throughput follows from the average: neither may be too low.
    """
    pairs = [pair for ms in runner.samples.passes for pair in zip(runner.steps.timed, ms, strict=True)]
    taken = [ms for index, ms in pairs if index < count]
    return min(median(taken), fmean(taken))


# ----------------------------------------------------------------------------------------- new lengths


class Lengths(NamedTuple):
    """The lengths of a batch, per request."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


class Sample(NamedTuple):
    """Milliseconds of a forward with all that it takes, and of planning it."""

    forward: float
    plan: float


def on_new_lengths(
    impl: Implementation,
    scenario: Scenario,
    checker: Any = None,
    now: Callable[[], int] = now_ns,
    beat: Callable[[], None] = lambda: None,
) -> tuple[NewLengths | None, str]:
    """Time forwards of a loaded layer on new lengths; return also why outputs are wrong, or "".

    None where the scenario leaves no room for other lengths. `checker` judges the outputs of a tuple, a
    random choice. `now` returns nanoseconds; `beat` is called after every forward. Lengths are at most those
    of the scenario, so that no memory grows. The history is left as it was.
    """
    new, again, start = list[Sample](), list[Sample](), now()
    over_ranks = getattr(impl, "lengths_bench", lambda: None)  # of a layer over ranks, made as `LayerBench`
    bench = LayerBench(impl, now) if isinstance(impl, MlaLayer) else over_ranks()
    if bench is None:
        return None, ""
    for lengths in new_lengths(bench.layer, scenario):
        try:
            first, *repeated = bench.run(lengths, 1 + AGAIN, beat)
        except (UnsupportedBatch, BackendError):  # such lengths are refused, as late as it may be
            continue
        new.append(first)
        again += repeated
        if now() - start > 1e9 * TUPLES_S:
            break
    doubt = bench.doubt(checker) if isinstance(bench, LayerBench) and checker is not None else ""
    impl.restore()
    if not new:
        return None, ""
    times = (median(ms) / scenario.layers for samples in (new, again) for ms in zip(*samples, strict=True))
    names = ("ms", "plan_ms", "repeated_ms", "repeated_plan_ms")
    return NewLengths(forwards=len(new), **dict(zip(names, times, strict=True))), doubt


def new_lengths_s(runner: PassRunner) -> float:
    """Return the seconds that forwards on new lengths take."""
    return runner.forward_s * TUPLES * (1 + AGAIN)


def new_lengths(impl: MlaLayer, scenario: Scenario) -> Iterator[Lengths]:
    """Yield tuples of lengths that this process has not run, and that take the paths of the scenario's."""
    requests = list(zip(scenario.query_lens, scenario.history, strict=True))
    amounts = [_amounts(scenario.mode, *lens) for lens in requests]
    planned = Lengths(scenario.query_lens, scenario.kv_lens(0))
    config, attention = impl.setting.config, impl.setting.attention
    paths = by_path(config, *planned, attention)
    _seen.add(planned)
    left = TUPLES
    for draw in range(TUPLES * DRAWS):
        less = [each[draw % len(each)] for each in amounts]
        shrunk = [_shrunk(*lens, by) for lens, by in zip(requests, less, strict=True)]
        lengths = Lengths(*zip(*shrunk, strict=True))
        same = lengths not in _seen and by_path(config, *lengths, attention) == paths
        if same and _served(impl, lengths):
            _seen.add(lengths)
            yield lengths
            left -= 1
        if not left:
            return


def _amounts(mode: str, new: int, history: int) -> list[int]:
    """Return by how much to shrink one request, in random order; 0 if by nothing."""
    length = history or new
    most = length if history else 0 if mode == "decode" else length - 1  # new tokens of a step stay
    room = min(most, max(TOKENS, length // PART))
    return _random.sample(range(1, room + 1), room) or [0]


def _shrunk(new: int, history: int, less: int) -> tuple[int, int]:
    """Return new and attended tokens of a request with less history, or fewer new ones if it has none."""
    return (new, history + new - less) if history else (new - less, new - less)


def _served(impl: MlaLayer, lengths: Lengths) -> bool:
    """Return whether the ops accept these lengths."""
    setting = impl.setting
    try:
        check_lengths(setting.config, impl.layer.ops, *lengths, setting.page_size, setting.attention)
    except UnsupportedBatch:
        return False
    return True


class LayerBench:
    """Runs forwards of a layer in this process on any lengths, without changing what is cached."""

    def __init__(self, impl: MlaLayer, now: Callable[[], int] = now_ns, judged: bool = True) -> None:
        """`judged`: outputs of one of the tuples are kept, for `doubt`."""
        self.layer, self._now, self.judged = impl, now, judged
        impl.restore()
        impl.before(0)
        full = impl.batch if impl.scenario.mode == "prefill" else impl.extend()
        self._table, self._device = full.block_table_host, full.device
        self._memory = BatchMemory(full.num_tokens, self._table.shape, self._device)
        self._ran = 0  # tuples of lengths
        self._kept: tuple[Any, ...] = ()  # one of them, its outputs in layer 0, and what judges these

    def _batch(self, lengths: Lengths) -> RaggedBatch:
        cache = self.layer.cache
        size = sum(lengths.query_lens), self._table.shape, self._device
        self._memory = BatchMemory.of(self._memory, *size)
        return RaggedBatch(
            *lengths, self._table, cache.page_size, self._device, source=cache, memory=self._memory
        )

    def run(self, lengths: Lengths, count: int, beat: Callable[[], None]) -> list[Sample]:
        """Time `count` forwards, tables, plan and all; `beat` is called after every one.

        Outputs [layers, t, d] of a tuple are kept, or those kept so far: each is as likely to be judged.
        Afterwards, the cache holds what it did. Raises `UnsupportedBatch` or `BackendError` for lengths that
        an op refuses.
        """
        slots, cache = self._batch(lengths).slots, self.layer.cache
        pages = (slots // cache.page_size).unique()  # which the forwards write, in all layers
        held = cache.pages, cache.index_pages
        saved = [kept.index_select(1, pages) for kept in held]
        out, samples = self.layer.out.narrow(-2, 0, len(slots)), list[Sample]()
        try:
            for place in range(count):
                out.fill_(torch.nan)
                samples.append(self._time(lengths, out))
                if place == 0 and self.judged:
                    self._ran += 1
                    if not _random.randrange(self._ran):
                        taken = self.layer.evidence(*lengths)
                        self._kept = *lengths, out[0].to("cpu", copy=True), *taken
                beat()
            return samples
        finally:
            for kept, before in zip(held, saved, strict=True):
                kept.index_copy_(1, pages, before)

    def _time(self, lengths: Lengths, out: torch.Tensor) -> Sample:
        impl, synchronize = self.layer, self.layer.setting.backend.synchronize
        x, outs = impl.x[: out.shape[-2]], list(out)
        synchronize()
        start = self._now()
        batch = self._batch(lengths)
        planning = self._now()
        impl.layer.plan(batch)
        planned = self._now()
        impl.forward(batch, x, outs)
        synchronize()
        return Sample((self._now() - start) / 1e6, (planned - planning) / 1e6)

    def doubt(self, checker: Any) -> str:
        """Return why the outputs of one of the tuples that ran are wrong, or nothing."""
        reason = checker.on_lengths(*self._kept).reason if self._kept else ""
        return f"outputs on unseen lengths are wrong: {reason}" if reason else ""
