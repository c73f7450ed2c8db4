"""`--stages`: exclusive times of every part, on a clock that is scripted segment by segment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mla import MLAConfig
from mla.bench import results
from mla.bench.measure.variants import STAGE_FORWARDS, stage_forwards
from mla.bench.results.schema import Cost, Roofline, Run, Stage
from mla.bench.run import profile
from mla.bench.run.profile import STAGES, Stopwatch
from mla.bench.subjects.layer import MlaLayer
from mla.bench.terminal.run_table import render
from mla.bench.workload.scenario import Scenario
from mla.layer.ops import Ops

Bench = Callable[..., Any]
VIRTUAL = ("--backend", "fake-virtual-clock", "--implementations", "mla")


class Script:
    """A clock that returns the next scripted time for every region it is stopped in."""

    clock = "script"

    def __init__(self, *times: float) -> None:
        self._times = list(times)
        self.running = False

    def start(self) -> None:
        assert not self.running
        self.running = True

    def stop(self) -> float:
        assert self.running
        self.running = False
        return self._times.pop(0)


def test_a_region_inside_another_interrupts_it() -> None:
    watch = Stopwatch(Script(1, 20, 300, 4000, 50000))
    innermost = watch.region("innermost")(lambda: None)  # 300
    inner = watch.region("inner")(innermost)  # 20, and 4000 afterwards
    watch.region("outer")(inner)()  # 1, and 50000 in the end
    assert watch.take() == {"outer": 50001, "inner": 4020, "innermost": 300}
    assert watch.take() == {}


def test_a_region_that_raises_is_closed() -> None:
    clock = Script(1, 2, 3)
    watch = Stopwatch(clock)
    with pytest.raises(ZeroDivisionError), watch.region("outer"):
        watch.region("inner")(lambda: 1 / 0)()
    assert not clock.running
    assert watch.take() == {"outer": 4, "inner": 2}


@pytest.mark.parametrize("rank", [None, 24])
def test_every_role_of_the_layer_belongs_to_one_stage(tiny: Any, rank: int | None) -> None:
    parts = [part for parts in STAGES.values() for part in parts]
    assert len(parts) == len(set(parts))
    for gate in (None, "head"):
        config: MLAConfig = tiny(q_lora_rank=rank, output_gate=gate)
        assert set(Ops(config, {}, torch.bfloat16, torch.device("cpu")).names()) < set(parts)


# Milliseconds of an absorbed decode step, part after part, and of the layer's own code around each.
STEP = {
    "extend": 20,
    "plan": 30,
    "qkv_a_proj": 40,
    "write_latent": 50,
    "w_uk": 60,
    "rotate_query": 70,
    "latent_attention": 80,
    "w_uv": 90,
    "o_proj": 100,
}
AROUND = 1


def script() -> str:
    return ",".join(f"{AROUND},{ms}" for ms in STEP.values()) + f",{AROUND}"


def cases(bench: Bench, small: list[str], *words: str, code: int = 0) -> list[results.Case]:
    done = bench(*VIRTUAL, *small, "-o", "run.json", *words, fakes=["virtual_clock"])
    assert done.code == code, done.err
    return results.read(Path("run.json")).cases


def test_the_stages_of_a_decode_step_are_those_of_the_clock(bench: Bench, small: list[str]) -> None:
    (case,) = cases(bench, small, "--stages", "--scenario", "decode", "-O", f"script={script()}")
    assert {stage.name: stage.ms for stage in case.stages} == {
        "query and latent projections": 40,
        "cache write": 50,
        "attention": 60 + 70 + 80 + 90,
        "attention: w_uk": 60,
        "attention: rotate_query": 70,
        "attention: latent_attention": 80,
        "attention: w_uv": 90,
        "output projection": 100,
        "bookkeeping": 20 + 30,
        "bookkeeping: extend": 20,
        "bookkeeping: plan": 30,
        "between ops": (len(STEP) + 1) * AROUND,
    }


def test_an_expanded_prefill_counts_its_planning_and_its_rebuilt_keys(bench: Bench, small: list[str]) -> None:
    words = ("--stages", "--scenario", "prefill", "--attention", "expanded", "-O", "script=1")
    (case,) = cases(bench, small, *words)
    assert {stage.name: stage.ms for stage in case.stages if ": " not in stage.name} == {
        "query and latent projections": 1,
        "cache write": 1,
        "attention": 5,
        "output projection": 1,
        "bookkeeping": 3,  # extend and plan before the forward, which then only looks the plan up
        "between ops": 8,
    }
    parts = {stage.name.partition(": ")[2]: stage.ms for stage in case.stages if ": " in stage.name}
    assert parts == {
        "rotate_query": 1,
        "kv_b_proj": 1,
        "gather": 2,  # before and after kv_b_proj
        "expanded_attention": 1,
        "extend": 1,
        "plan": 2,
    }


def test_the_stages_cost_what_the_case_costs_and_have_rooflines(bench: Bench, small: list[str]) -> None:
    run = cases(bench, small, "--stages")
    assert [case.scenario for case in run] == ["prefill", "decode"]
    for case in run:
        whole = [stage for stage in case.stages if ": " not in stage.name]
        for kind in ("flops", "bytes"):
            total = sum(getattr(stage.cost, kind) for stage in whole if stage.cost)
            assert abs(total - getattr(case.cost, kind)) <= len(case.stages)  # averages are rounded
        assert {stage.name for stage in whole if stage.cost is None} == {"bookkeeping", "between ops"}
        for stage in case.stages:
            assert (stage.roofline is None) == (stage.cost is None)
            assert stage.roofline is None or stage.roofline.fraction is not None


@pytest.mark.parametrize(
    ("mode", "runs", "forwards"), [("decode", 8, 24), ("decode", 50, 50), ("prefill", 8, 20)]
)
def test_a_growing_cache_is_timed_in_whole_passes(mode: Any, runs: int, forwards: int) -> None:
    scenario = Scenario(name="d", mode=mode, query_lens=(1,), history=(1,), runs=runs)
    assert stage_forwards(scenario) == forwards


def test_headline_passes_run_the_ops_themselves(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    headline: list[int] = []
    timed: list[int] = []
    regions: list[str] = []
    region = Stopwatch.region

    def seen(self: Stopwatch, name: str) -> Any:
        regions.append(name)
        return region(self, name)

    def counting(step: Callable[[Any, Any], None], counts: list[int]) -> Callable[[Any, Any], None]:
        def counted(layer: Any, argument: Any) -> None:
            before = len(regions)
            step(layer, argument)
            counts.append(len(regions) - before)

        return counted

    monkeypatch.setattr(Stopwatch, "region", seen)
    monkeypatch.setattr(MlaLayer, "step", counting(MlaLayer.step, headline))
    monkeypatch.setattr(profile, "watched_step", counting(profile.watched_step, timed))
    (case,) = cases(bench, small, "--stages", "--scenario", "decode")
    forwards = (
        4 + case.warmups + case.passes * (1 + case.steps_per_pass)
    )  # one that warms up before each pass
    assert headline == [0] * forwards
    assert timed == [timed[0]] * STAGE_FORWARDS
    assert timed[0] > 0


def test_a_case_that_is_wrong_when_its_stages_are_timed_loses_its_numbers(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = profile.watched_step

    def corrupt(layer: MlaLayer, watch: Stopwatch) -> None:
        step(layer, watch)
        layer.out[0] *= 2

    monkeypatch.setattr(profile, "watched_step", corrupt)
    (case,) = cases(bench, small, "--stages", "--scenario", "decode", code=4)
    assert case.check.status == "wrong"
    assert case.check.reason.startswith("right in timed passes and wrong when its stages were timed: ")
    assert (case.latency_ms, case.tokens_per_s, case.stages) == (None, None, [])
    assert case.roofline == Roofline()


def test_an_interrupt_while_stages_are_timed_keeps_the_numbers(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "watched_step", interrupt)
    (case,) = cases(bench, small, "--stages", code=130)
    assert case.interrupted
    assert case.latency_ms is not None
    assert case.stages == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--layers", "2"], "--stages times one layer: leave out --layers."),
        (["--workload", "two.toml"], "--stages times one layer: leave out --layers."),
        (["--op", "o_proj"], "--stages is about the whole layer, and o_proj is timed alone: leave one out."),
        (
            ["--implementations", "transformers"],
            "--stages times the parts of mla and mla-reference: run one of them.",
        ),
    ],
)
def test_what_has_no_stages_is_refused_before_the_backend_is_opened(
    bench: Bench, words: list[str], sentence: str
) -> None:
    """Opening one may build its kernels for minutes; `nowhere` cannot be opened at all."""
    two = "[[scenario]]\nname = 'two'\nmode = 'decode'\nquery_lens = [1]\nhistory = [1]\nlayers = 2\n"
    Path("two.toml").write_text(two)
    done = bench("--backend", "nowhere", "--stages", *words)
    assert (done.code, done.error) == (2, f"error: {sentence}")


STAGES_OF_A_CASE = [
    Stage(
        name="query and latent projections",
        ms=1.0,
        cost=Cost(flops=10**9, bytes=2 * 10**6),
        roofline=Roofline(floor_ms=0.25, fraction=0.25, bound="compute", peak_source="x"),
    ),
    Stage(name="attention", ms=2.5, cost=Cost(flops=0, bytes=10**7), roofline=Roofline()),
    Stage(name="attention: gather", ms=0.5),
    Stage(name="between ops", ms=0.5),
]


def test_stages_are_printed_below_the_table(make_run: Callable[..., Run]) -> None:
    lines = render(make_run(stages=STAGES_OF_A_CASE), "table").splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("stages of "))
    assert lines[first : first + 10] == [
        "stages of prefill, mla",
        "",
        "stage                          ms  share %  FLOP/s  GB/s  % of limit",
        "query and latent projections    1     25.0     1 T     2      25 com",
        "attention                     2.5     62.5       -     4           -",
        "attention: gather             0.5     12.5       -     -           -",
        "between ops                   0.5     12.5       -     -           -",
        "",
        "Each is timed alone, with a synchronization before and after: the sum is 4 ms, a forward takes 2 "
        "ms. Bookkeeping is not part of a prefill's latency.",
        "",
    ]
    assert lines[-1] == "Prefill Latency: 2 ms"


def test_stages_are_a_table_of_their_own_in_markdown(make_run: Callable[..., Run]) -> None:
    text = render(make_run(stages=STAGES_OF_A_CASE), "md")
    assert "\n\n| stage | ms | share % | FLOP/s | GB/s | % of limit |\n| --- |" in text
    assert "\n| attention: gather | 0.5 | 12.5 | - | - | - |\n" in text


def test_show_prints_stages_and_limits_without_torch(
    process: Bench, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(stages=STAGES_OF_A_CASE)
    run.ceilings = [results.Ceiling(work="read", value=5e10, source="measured: sum, 3 MiB")]
    results.write(run, tmp_path / "run.json")
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = process("show", "run.json", path=[tmp_path])
    assert done.code == 0
    assert "stages of prefill, mla\n" in done.out
    said = "\nread bandwidth: 50 GB/s (measured: sum, 3 MiB)\n\nprefill: only mla has a number: 2 ms"
    assert said not in done.out
    assert said in process("show", "run.json", "-v", path=[tmp_path]).out
