"""Lengths that nothing has seen before: what is kept per tuple of lengths shows, on a clock of its own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from wrapped_op import WrappedOp

from mla import MLAConfig
from mla.bench.measure import evidence
from mla.bench.measure.evidence import TUPLES, LayerBench, Lengths, new_lengths, on_new_lengths
from mla.bench.results.schema import NewLengths
from mla.bench.subjects.fixture import LayerFixture
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.cost import by_path
from mla.verify.verdict import Check
from mla_backends.testing import HostBackend

DECODE = Scenario(name="d", mode="decode", query_lens=(1,) * 3, history=(30, 21, 26), runs=3, passes=2)
PREFILL = Scenario(name="p", mode="prefill", query_lens=(9, 5), history=(24, 30), runs=3, passes=2)
PROMPT = Scenario(name="f", mode="prefill", query_lens=(24, 30), history=(0, 0), runs=3, passes=2)
SCENARIOS = {"decode": DECODE, "prefill": PREFILL, "prompt": PROMPT}


class Time:
    """Passes only when an op says so."""

    now = 0  # nanoseconds

    def spend(self, ms: float) -> None:
        self.now += int(ms * 1e6)

    def __call__(self) -> int:
        return self.now


class Op(WrappedOp):
    """Takes 1 ms per call and nothing to prepare, whatever the lengths."""

    def __init__(self, kind: str, time: Time) -> None:
        super().__init__(kind)
        self.time = time
        self.planned: list[Lengths] = []

    def prepare(self, spec: Any, batch: Any) -> Any:
        self.planned.append(Lengths(tuple(batch.query_lens), tuple(batch.kv_lens)))
        return super().prepare(spec, batch)

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        self.time.spend(1)
        super().__call__(*leading, **tensors)


class Scheduling(Op):
    """Keeps `size` schedules by a key of the lengths; one that is not there takes 20 ms."""

    def __init__(self, kind: str, time: Time, key: Callable[[Lengths], Any], size: int) -> None:
        super().__init__(kind, time)
        self._key, self._size, self._kept = key, size, list[Any]()

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(spec, batch)
        key = self._key(self.planned[-1])
        if key not in self._kept:
            self.time.spend(20)
            self._kept = [key, *self._kept][: self._size]
        return state


class Compiling(Op):
    """Compiles for 20 ms for every number of rows."""

    def __init__(self, kind: str, time: Time) -> None:
        super().__init__(kind, time)
        self._compiled = set[int]()

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        if len(tensors["x"]) not in self._compiled:
            self._compiled.add(len(tensors["x"]))
            self.time.spend(20)
        super().__call__(*leading, **tensors)


class Loaded:
    """A layer that has run a pass of its scenario, and its judge."""

    def __init__(self, config: MLAConfig, scenario: Scenario, *ops: Op, **setting: Any) -> None:
        self.scenario = scenario
        backend = HostBackend(ops={f"op{number}": op for number, op in enumerate(ops)})
        options = {"attention": "auto", "page_size": 4, "seed": 0, **setting}
        self.setting = Setting(config, backend, torch.float32, **options)
        fixture = LayerFixture(self.setting, scenario, None, lambda: None)  # type: ignore[arg-type]
        inputs, self.checker = fixture.prepare()
        layer = fixture.build("mla")
        assert isinstance(layer, MlaLayer)
        self.layer = layer
        layer.load(scenario, inputs)

    def run(self, number: int) -> Check:
        self.layer.restore(number)
        for index in range(self.scenario.steps):
            self.layer.before(index)
            self.layer.step(index)
            self.layer.after(index)
        return self.layer.check(self.checker)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture(autouse=True)
def _seen_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_seen", set())
    # One run in a hundred would draw lengths of which half have sums that were there before.
    monkeypatch.setattr(evidence, "_random", random.Random(1))


def attention(time: Time, make: Callable[..., Op] = Op, *words: Any) -> list[Op]:
    return [make(kind, time, *words) for kind in ("latent_attention", "expanded_attention")]


def measured(loaded: Loaded, time: Time) -> NewLengths:
    assert loaded.run(1).status == "ok"
    timing, doubt = on_new_lengths(loaded.layer, loaded.scenario, loaded.checker, time)
    assert doubt == ""
    assert timing is not None
    return timing


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_honest_layer_takes_as_long_on_new_lengths(
    tiny: Callable[..., MLAConfig], time: Time, name: str
) -> None:
    timing = measured(Loaded(tiny(), SCENARIOS[name], *attention(time)), time)
    assert timing.forwards == TUPLES
    assert timing.ms == timing.repeated_ms >= 1
    assert timing.plan_ms == timing.repeated_plan_ms == 0


KEYS: dict[str, tuple[Callable[[Lengths], Any], int]] = {
    "all lengths": (lambda lengths: lengths, 1000),
    "the last": (lambda lengths: lengths, 1),
    "keys alone": (lambda lengths: lengths.kv_lens, 1000),
    "their sum": (lambda lengths: sum(lengths.kv_lens), 1000),
    "one request": (lambda lengths: (lengths.query_lens[0], lengths.kv_lens[0]), 2),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_schedule_kept_by_lengths_is_not_credited(
    tiny: Callable[..., MLAConfig], time: Time, name: str, key: str
) -> None:
    timing = measured(Loaded(tiny(), SCENARIOS[name], *attention(time, Scheduling, *KEYS[key])), time)
    assert (timing.plan_ms, timing.repeated_plan_ms) == (20, 0)
    assert timing.ms == timing.repeated_ms + 20


def test_a_kernel_compiled_for_a_number_of_rows_is_not_credited(
    tiny: Callable[..., MLAConfig], time: Time
) -> None:
    """New tokens of a prompt; in decode their number never changes, and nothing is compiled again."""
    prompt = measured(Loaded(tiny(), PROMPT, Compiling("linear", time)), time)
    assert prompt.ms >= prompt.repeated_ms + 20
    decode = measured(Loaded(tiny(), DECODE, Compiling("linear", time), attention="absorbed"), time)
    assert decode.ms == decode.repeated_ms


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_cached_and_kept_stays_as_it_was(
    tiny: Callable[..., MLAConfig], time: Time, name: str, layers: int
) -> None:
    scenario = Scenario(
        **{**{f: getattr(SCENARIOS[name], f) for f in SCENARIOS[name].__struct_fields__}, "layers": layers}
    )
    loaded = Loaded(tiny(), scenario, *attention(time), layers=layers)
    loaded.run(1)
    loaded.layer.restore(2)
    pages, scratch = loaded.layer.cache.pages.clone(), loaded.layer.facts().scratch_bytes
    timing, doubt = on_new_lengths(loaded.layer, scenario, loaded.checker, time)
    assert doubt == ""
    assert timing is not None
    assert timing.ms == (2 if timing.ms > 1 else 1) * 1, "per layer"
    assert loaded.layer.facts().scratch_bytes == scratch
    loaded.layer.restore(2)
    assert torch.equal(loaded.layer.cache.pages.nan_to_num(7), pages.nan_to_num(7))
    for number in (2, 3):
        assert loaded.run(number).status == "ok"


@pytest.mark.parametrize("name", SCENARIOS)
def test_lengths_are_new_and_no_longer_than_planned(
    tiny: Callable[..., MLAConfig], time: Time, name: str
) -> None:
    scenario, ops = SCENARIOS[name], attention(time)
    loaded = Loaded(tiny(), scenario, *ops, attention="absorbed")
    first, _ = ops
    loaded.run(1)
    before = set(first.planned)
    lengths_seen: list[Lengths] = []
    for _ in range(2):
        first.planned.clear()
        on_new_lengths(loaded.layer, scenario, now=time)
        new = [lengths for lengths in first.planned if lengths not in before]
        assert new == [lengths for lengths in dict.fromkeys(new) for _ in range(3)]
        lengths_seen += dict.fromkeys(new)
    assert len(lengths_seen) == len(set(lengths_seen)) == 2 * TUPLES
    for lengths in lengths_seen:
        for now, planned in zip(lengths, (scenario.query_lens, scenario.kv_lens(0)), strict=True):
            assert all(x <= y for x, y in zip(now, planned, strict=True))
        assert min(lengths.query_lens) > 0
    for request in range(len(scenario.query_lens)):
        assert len({lengths.kv_lens[request] for lengths in lengths_seen[:TUPLES]}) == TUPLES


class Idle(Op):
    """Computes only lengths that it has planned twice."""

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        if self.planned.count(self.planned[-1]) > 1:
            super().__call__(*leading, **tensors)


@pytest.mark.parametrize("name", SCENARIOS)
def test_outputs_on_new_lengths_are_judged(tiny: Callable[..., MLAConfig], time: Time, name: str) -> None:
    loaded = Loaded(tiny(), SCENARIOS[name], *attention(time, Idle))
    loaded.run(1)
    _, doubt = on_new_lengths(loaded.layer, loaded.scenario, loaded.checker, time)
    assert doubt.startswith("outputs on unseen lengths are wrong: ")


def test_a_part_of_a_layer_over_ranks_keeps_no_outputs(tiny: Callable[..., MLAConfig], time: Time) -> None:
    loaded = Loaded(tiny(), DECODE, *attention(time, Idle))
    loaded.run(1)
    for judged in (True, False):
        bench = LayerBench(loaded.layer, time, judged)
        for lengths in new_lengths(loaded.layer, DECODE):
            bench.run(lengths, 1, lambda: None)
        assert bool(bench.doubt(loaded.checker)) == judged


@pytest.mark.parametrize(
    ("query_lens", "history", "mode"),
    [((1, 1), (0, 0), "decode"), ((3,), (0,), "decode"), ((1, 1), (0, 0), "prefill")],
)
def test_a_scenario_without_room_says_nothing(
    tiny: Callable[..., MLAConfig], time: Time, query_lens: Sequence[int], history: Sequence[int], mode: Any
) -> None:
    scenario = Scenario(name="n", mode=mode, query_lens=tuple(query_lens), history=tuple(history), runs=2)
    loaded = Loaded(tiny(), scenario)
    assert on_new_lengths(loaded.layer, scenario, loaded.checker, time) == (None, "")
    assert loaded.run(1).status == "ok"


class Even(Op):
    """Serves even numbers of keys only, and says so early or late."""

    late = False

    def unsupported_batch(self, spec: Any, query_lens: Any, kv_lens: Any, page_size: Any = None) -> list[str]:
        return [] if self.late else ["it takes even lengths"] * any(kv_len % 2 for kv_len in kv_lens)

    def prepare(self, spec: Any, batch: Any) -> Any:
        if self.late and any(kv_len % 2 for kv_len in batch.kv_lens):
            raise evidence.BackendError("it takes even lengths.")
        return super().prepare(spec, batch)


@pytest.mark.parametrize("late", [False, True])
def test_lengths_that_an_op_refuses_are_left_out(
    tiny: Callable[..., MLAConfig], time: Time, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(Even, "late", late)
    scenario = Scenario(name="e", mode="prefill", query_lens=(2,), history=(30,), runs=2, passes=2)
    op = Even("latent_attention", time)
    loaded = Loaded(tiny(), scenario, op, attention="absorbed")
    timing, _ = on_new_lengths(loaded.layer, scenario, loaded.checker, time)
    assert timing is not None
    assert 0 < timing.forwards <= TUPLES
    assert all(kv_len % 2 == 0 for lengths in op.planned for kv_len in lengths.kv_lens)
    assert loaded.run(1).status == "ok"


def test_a_slow_layer_runs_fewer(tiny: Callable[..., MLAConfig], time: Time) -> None:
    loaded = Loaded(tiny(), DECODE, *attention(time), attention="absorbed")
    beats = itertools.count()

    def beat() -> None:
        next(beats)
        time.spend(600)

    timing, _ = on_new_lengths(loaded.layer, DECODE, None, time, beat)
    assert timing is not None
    assert timing.forwards == 2  # the second ends after 3.6 of 2 seconds
    assert next(beats) == 6


def test_paths_stay_those_of_the_scenario(tiny: Callable[..., MLAConfig]) -> None:
    """Of 20 new tokens: with less than 43 of its 50 keys of history, the request would be expanded."""
    border = msgspec.structs.replace(PREFILL, query_lens=(20, 5), history=(50, 30))
    planned = by_path(tiny(), border.query_lens, border.kv_lens(0))
    drawn = list(new_lengths(Loaded(tiny(), border).layer, border))
    assert [by_path(tiny(), *lengths) for lengths in drawn] == [planned] * TUPLES
