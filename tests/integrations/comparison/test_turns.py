"""The order in which sides of the comparison run, what is left out, and what is on the clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.transformers import meters, sides, turns
from benchmarks.transformers.meters import Sample
from benchmarks.transformers.record import Row, read
from benchmarks.transformers.work import Work
from mla.config import MLAConfig
from mla_backends import host

RECORDS = sorted((Path(__file__).resolve().parents[3] / "benchmarks/transformers/results").glob("*.json"))
R1 = MLAConfig.named("deepseek-r1")


class Turns:
    """Stands for `Work`: sides take so many ms; some do not fit the memory, or run out of it in a round."""

    def __init__(self, ms: dict[str, float], full: Sequence[str] = (), refused: Sequence[str] = ()) -> None:
        self.ms, self.full, self.refused = ms, full, refused
        self.taken: list[str] = []
        ours = {name: "cpu" if name.startswith("mla") else "" for name in ms}
        self.sides = [sides.Side(name, SimpleNamespace(dtype=torch.bfloat16), 0, ours[name]) for name in ms]

    def row(self, side: sides.Side) -> Row:
        return Row(config="x", phase="decode", history=7, new_tokens=1, side=side.name, dtype=side.dtype)

    def refusal(self, side: sides.Side) -> str:
        return "needs about 9 GiB" if side.name in self.refused else ""

    def weigh(self, side: sides.Side, row: Row) -> torch.Tensor:
        return torch.tensor([1.01 if side.backend else 1.0])

    def forwards(self, side: sides.Side, count: int) -> Iterator[Sample]:
        self.taken.append(f"{side.name} {count}")
        if side.name in self.full and len(self.taken) > len(self.ms):  # beyond the trials
            raise torch.OutOfMemoryError("none left")
        yield from [Sample(self.ms[side.name], 1.0, torch.empty(0))] * count

    def measure(self, rounds: int = 3) -> dict[str, Row]:
        work: Any = self
        return {row.side: row for row in turns.measure(work, self.sides, rounds, 0.1)}


def test_sides_take_turns_and_every_second_round_goes_backwards() -> None:
    work = Turns({"sdpa": 10.0, "eager": 15.0, "mla": 200.0, "mla-paged": 1.0})
    rows = work.measure()
    there = ["sdpa 10", "eager 6", "mla 1", "mla-paged 20"]
    assert work.taken == ["sdpa 2", "eager 2", "mla 2", "mla-paged 2", *there, *there[::-1], *there]
    assert [len(one) for one in rows["eager"].model_ms] == [6, 6, 6]
    assert rows["mla"].deviation == pytest.approx(0.01)
    assert rows["eager"].deviation == 0
    assert rows["sdpa"].deviation is None  # the first


def test_a_side_of_transformers_is_left_out_where_another_is_more_than_twice_as_fast() -> None:
    ms = {"slow": 21.0, "fastest": 10.0, "twice": 20.0, "mla": 90.0, "mla-paged": 1.0}
    rows = Turns(ms).measure()
    left_out = {name: row.left_out for name, row in rows.items() if row.left_out}
    assert left_out == {"slow": "2.1x as slow as the fastest"}
    assert [name for name, row in rows.items() if row.model_ms] == [name for name in ms if name != "slow"]


def test_a_side_without_memory_on_a_device_is_left_out_and_others_go_on() -> None:
    rows = Turns({"sdpa": 10.0, "eager": 10.0, "mla": 10.0}, full=["eager"]).measure()
    assert {name: len(row.model_ms) for name, row in rows.items()} == {"sdpa": 3, "eager": 0, "mla": 3}
    assert rows["eager"].left_out == "the device has too little memory for it"


def test_ours_alone_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Turns({"sdpa": 10.0, "mla": 10.0, "mla-paged": 10.0}, refused=["sdpa"])
    rows = work.measure(rounds=1)
    assert [row.deviation for row in rows.values()] == [None, None, None]
    monkeypatch.setattr(work, "weigh", lambda side, row: torch.tensor([float(len(side.name))]))
    with pytest.raises(turns.Disagreement):  # but they are held against each other
        work.measure()


def _work(phase: str, length: int, requests: int = 1, flush: Any = None) -> Work:
    backend: Any = SimpleNamespace(synchronize=lambda: None)
    return Work("deepseek-r1", R1, backend, flush, phase, length, requests)


def _side(name: str, dtype: str = "bfloat16", device: str = "cpu") -> Any:
    model = SimpleNamespace(dtype=getattr(torch, dtype), device=torch.device(device))
    return SimpleNamespace(name=name, backend="cpu" if name.startswith("mla") else "", model=model)


def test_what_would_not_fit_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory_available", lambda: 18 << 30)
    prompt = _work("prefill", 4096)
    assert prompt.refusal(_side("eager")) == "needs about 21 GiB, and 18 are available"
    assert not prompt.refusal(_side("eager", device="meta"))
    assert not prompt.refusal(_side("mla"))
    assert prompt.refusal(_side("sdpa")).startswith("needs about 21 GiB")
    assert "needs about 26 GiB" in _work("prefill", 4096, requests=8).refusal(_side("mla"))
    monkeypatch.setattr(host, "memory_available", lambda: None)
    assert not prompt.refusal(_side("eager"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_estimates_cover_what_was_measured(path: Path) -> None:
    rows = [row for row in read(path).rows if row.transient_bytes > 1 << 30]
    assert rows
    for row in rows:
        work = Work(
            row.config, MLAConfig.named(row.config), *2 * [None], row.phase, row.history or row.new_tokens
        )
        assert 0.4 < row.transient_bytes / work.estimate(_side(row.side, row.dtype)) < 1.15, row


def test_caches_are_swept_before_every_forward_and_off_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = [0.0], list[str]()

    def take(name: str, seconds: float, result: Any = None) -> Any:
        log.append(name)
        now[0] += seconds
        return result

    def model(**_: Any) -> None:
        take("forward", 1.0)
        layer(torch.zeros(1, 1, 3))

    layer = torch.nn.Module()
    layer.forward = lambda hidden: (take("attention", 0.5, hidden), None)  # type: ignore[method-assign]
    model.model = SimpleNamespace(layers=[SimpleNamespace(self_attn=layer)])  # type: ignore[attr-defined]
    model.device = torch.device("cpu")  # type: ignore[attr-defined]
    side: Any = SimpleNamespace(model=model, select=lambda: None, cache=lambda *_: take("cache", 0, {}))
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    once = ["sweep", "forward", "attention"]
    for phase, expected in (("decode", ["cache", *3 * once]), ("append", [*2 * ["cache", *once], "cache"])):
        log.clear()
        found = list(_work(phase, 9, flush=lambda: take("sweep", 60.0)).forwards(side, 2))
        assert log == expected
        assert [(one.model_ms, one.attention_ms) for one in found] == [(1500, 500)] * 2
