"""Forwards on lengths that nothing has seen before: every pass repeats its lengths, a server never does.

A schedule that is kept per tuple of lengths, or a kernel that is compiled for one, costs nothing in a pass.
Here it does. Each new tuple is run once, and then again: the forwards differ in nothing but having been seen.
The outputs of one of them, a random choice, are judged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter_ns as now_ns
from typing import Any, NamedTuple

import torch

from mla.bench.results.schema import NewLengths
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import Scenario
from mla.cache.ragged_batch import BatchMemory, RaggedBatch
from mla.cost import PathChooser
from mla.errors import UnsupportedBatch
from mla.layer.plan import check_lengths
from mla_backends import BackendError

# New tuples of lengths; how often each is run again; and the seconds after which no further one is begun.
TUPLES, AGAIN, SECONDS = 6, 2, 2.0
# A length shrinks by at most a part, so that the work stays much the same, or by so many tokens.
PART, TOKENS = 8, 16
# Draws after which there are no new tuples to be had.
DRAWS = 20

_random = random.SystemRandom()  # otherwise two implementations of one run would see the same
_seen: set[Lengths] = set()


class Lengths(NamedTuple):
    """The lengths of a batch, per request."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


@dataclass
class Times:
    """Milliseconds of forwards, and of planning alone."""

    forward: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)


class Told(NamedTuple):
    """What came out of it: nothing where the scenario leaves no room for other lengths."""

    times: NewLengths | None = None
    doubt: str = ""  # why the outputs are wrong


def measure(
    one: Implementation,
    scenario: Scenario,
    checker: Any = None,
    now: Callable[[], int] = now_ns,
    beat: Callable[[], None] = lambda: None,
) -> Told:
    """Time forwards of a loaded layer on new lengths.

    `now` returns nanoseconds; `beat` is called after every forward. Lengths are at most those of the
    scenario, so that no memory grows. The history is left as it was.
    """
    new, again, start = Times(), Times(), now()
    bench = LayerBench(one, now) if isinstance(one, MlaLayer) else _bench(one)
    if bench is None:
        return Told()
    for lengths in new_lengths(bench.layer, scenario):
        try:
            bench.run(lengths, (new, *[again] * AGAIN), beat)
        except (UnsupportedBatch, BackendError):  # such lengths are refused, as late as it may be
            continue
        if now() - start > 1e9 * SECONDS:
            break
    doubt = bench.doubt(checker) if isinstance(bench, LayerBench) and checker is not None else ""
    one.restore()
    return Told(_summary(new, again, scenario.layers), doubt) if new.forward else Told()


def _bench(one: Any) -> Any:
    """Return what runs forwards of a layer over ranks on new lengths, as `LayerBench` does; None: nothing."""
    make = getattr(one, "lengths_bench", None)
    return make() if make else None


def _summary(new: Times, again: Times, layers: int) -> NewLengths:
    medians = (median(times) / layers for times in (new.forward, again.forward, new.plan, again.plan))
    ms, repeated_ms, plan_ms, repeated_plan_ms = medians
    return NewLengths(
        forwards=len(new.forward),
        ms=ms,
        repeated_ms=repeated_ms,
        plan_ms=plan_ms,
        repeated_plan_ms=repeated_plan_ms,
    )


def new_lengths(one: MlaLayer, scenario: Scenario) -> Iterator[Lengths]:
    """Yield tuples of lengths that this process has not run, and that take the paths of the scenario's."""
    shrinking = [_amounts(*pair) for pair in zip(scenario.query_lens, scenario.history, strict=True)]
    planned = Lengths(scenario.query_lens, scenario.kv_lens(0))
    paths = _paths(one, planned)
    for _ in range(TUPLES):
        for _ in range(DRAWS):
            shrunk = _shrunk(scenario, [next(amounts) for amounts in shrinking])
            known = shrunk == planned or shrunk in _seen
            if not known and _paths(one, shrunk) == paths and _served(one, shrunk):
                _seen.add(shrunk)
                yield shrunk
                break


def _amounts(new: int, history: int) -> Iterator[int]:
    """Yield by how much to shrink one request, each amount once before one comes again; 0 if by nothing."""
    length = history or new
    room = min(length if history else length - 1, max(TOKENS, length // PART))
    amounts = list(range(1, room + 1)) or [0]
    while True:
        _random.shuffle(amounts)
        yield from amounts


def _shrunk(scenario: Scenario, amounts: Sequence[int]) -> Lengths:
    """Return the scenario's lengths with less history, or fewer new tokens in a request that has none."""
    requests = list(zip(scenario.query_lens, scenario.history, amounts, strict=True))
    decode = scenario.mode == "decode"
    query_lens = tuple(new if past or decode else new - less for new, past, less in requests)
    kept = (past - less if past else 0 for _, past, less in requests)
    return Lengths(query_lens, tuple(past + new for past, new in zip(kept, query_lens, strict=True)))


def _paths(one: MlaLayer, lengths: Lengths) -> list[str]:
    if one.setting.attention != "auto":
        return []
    chooser = PathChooser(one.setting.config)
    return [chooser.path(*pair) for pair in zip(*lengths, strict=True)]


def _served(one: MlaLayer, lengths: Lengths) -> bool:
    """Return whether the ops accept these lengths."""
    setting = one.setting
    try:
        check_lengths(setting.config, one.layer.ops, *lengths, setting.page_size, setting.attention)
    except UnsupportedBatch:
        return False
    return True


class LayerBench:
    """Runs forwards of a layer in this process on any lengths, without changing what is cached."""

    def __init__(self, one: MlaLayer, now: Callable[[], int] = now_ns, judged: bool = True) -> None:
        """`judged`: outputs of one of the tuples are kept, for `doubt`."""
        self.layer, self._now, self.judged = one, now, judged
        one.restore()
        one.before(0)
        full = one.batch if one.scenario.mode == "prefill" else one.extend()
        self._table, self._device = full.block_table_host, full.device
        self._memory = self._memory_for(full.num_tokens)
        self._ran = 0  # tuples of lengths
        self._kept: tuple[Lengths, torch.Tensor] | None = None  # one of them, with its outputs in layer 0

    def _memory_for(self, tokens: int) -> BatchMemory:
        return BatchMemory(tokens, self._table, self._device)

    def _batch(self, lengths: Lengths) -> RaggedBatch:
        cache = self.layer.cache
        if not self._memory.fits(sum(lengths.query_lens), self._table):
            self._memory = self._memory_for(sum(lengths.query_lens))
        return RaggedBatch(
            *lengths, self._table, cache.page_size, self._device, source=cache, memory=self._memory
        )

    def run(self, lengths: Lengths, rounds: Sequence[Times], beat: Callable[[], None]) -> None:
        """Time a forward for each of `rounds`, tables, plan and all; `beat` is called after every one.

        Afterwards, the cache holds what it did. Raises `UnsupportedBatch` or `BackendError` for lengths that
        an op refuses.
        """
        slots = self._batch(lengths).slots.clone()  # which the forwards write, in all layers
        saved = self._rows().index_select(1, slots)
        out = self.layer.out.narrow(-2, 0, len(slots))
        try:
            for place, times in enumerate(rounds):
                out.fill_(torch.nan)
                self._time(lengths, times, out)
                if place == 0 and self.judged:
                    self._keep(lengths, out)
                beat()
        finally:
            self._rows().index_copy_(1, slots, saved)

    def _keep(self, lengths: Lengths, out: torch.Tensor) -> None:
        """Keep outputs [.., t, d], or those kept so far instead: each tuple is as likely to be judged."""
        self._ran += 1
        if not _random.randrange(self._ran):
            self._kept = lengths, (out[0] if out.dim() > 2 else out).to("cpu", copy=True)

    def _rows(self) -> torch.Tensor:
        pages = self.layer.cache.pages
        return pages.view(pages.shape[0], -1, pages.shape[-1])

    def _time(self, lengths: Lengths, times: Times, out: torch.Tensor) -> None:
        one, synchronize, x = (
            self.layer,
            self.layer.setting.backend.synchronize,
            self.layer.x[: out.shape[-2]],
        )
        synchronize()
        start = self._now()
        batch = self._batch(lengths)
        planning = self._now()
        one.layer.plan(batch)
        planned = self._now()
        one.forward(batch, x, out)
        synchronize()
        times.forward.append((self._now() - start) / 1e6)
        times.plan.append((planned - planning) / 1e6)

    def doubt(self, checker: Any) -> str:
        """Return why the outputs of one of the tuples that ran are wrong, or nothing."""
        if self._kept is None:
            return ""
        lengths, out = self._kept
        check = checker.on_lengths(*lengths, out)
        return f"outputs on unseen lengths are wrong: {check.reason}" if check.reason else ""
