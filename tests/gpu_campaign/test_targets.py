"""Kernels in turns, and the targets: what is met, what is not, and what nobody has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.gpu.report import in_turns, predictions, targets
from mla.bench import results
from mla.bench.results.schema import Case, Check, Cost, Latency, Run, Timing

STORED = Path(__file__).parents[2] / "benchmarks" / "results"
V2 = "cpu-epyc-zen4-avx512-bf16-2vcpu-deepseek-v2-lite.json"
R1 = "cpu-epyc-zen5-avx512-bf16-2vcpu-deepseek-r1.json"
H100 = "NVIDIA H100 80GB HBM3"
GRAPH_DEVICE, EAGER_HOST = ("graph", True), ("eager", False)
OK = Check(status="ok", reason="")


def latency(ms: float) -> Latency:
    return Latency(median=ms, ci95=None, p10=ms, p90=ms, samples=[ms])


def timed(case: Case, times: dict[tuple[str, bool], float], **changes: Any) -> Case:
    """Return a case with these milliseconds; what is timed as graphs has a slow cold sibling."""
    others = [
        Timing(mode=mode, cache=cache, clock="event" if device else "host", passes=1, check=OK,
               latency_ms=latency(ms * factor))
        for (mode, device), ms in times.items() if (mode, device) != EAGER_HOST
        for cache, factor in (("warm", 1.0), ("cold", 9.0))
    ]  # type: ignore[misc]  # fmt: skip
    eager = latency(times[EAGER_HOST]) if EAGER_HOST in times else None
    return msgspec.structs.replace(case, timings=others, latency_ms=eager, **changes)


def layer(file: str, mode: str, ops: dict[str, str], times: dict[tuple[str, bool], float]) -> Run:
    """Return a run of the layer with one case."""
    run = results.read(STORED / file)
    case = next(timed for timed in run.cases if (timed.mode, timed.implementation) == (mode, "mla"))
    return msgspec.structs.replace(run, cases=[timed(case, times, ops=ops)])


def op(
    name: str, ms: float | None, heads: int = 16, gigabytes: float = 2.0, shape: str = "a", **more: Any
) -> Case:
    """Return a case of absorbed attention alone; a thousand FLOPs per byte."""
    case, count = results.read(STORED / V2).cases[0], int(gigabytes * 1e9)
    times = {} if ms is None else {GRAPH_DEVICE: ms, EAGER_HOST: ms + 1}
    cost = Cost(flops=1000 * count, bytes=count)
    ops = {"latent_attention": name}
    return timed(case, times, scenario=shape, op="latent_attention", ops=ops, heads=heads, cost=cost, **more)


def in_one(*cases: Case) -> dict[str, Run]:
    run = results.read(STORED / V2)
    return {"latent-heads-16": msgspec.structs.replace(run, cases=list(cases))}


def verdicts(card: str = H100, **evidence: Any) -> list[tuple[str, str, str]]:
    return [(row[1], row[2], row[3]) for row in targets.rows(targets.Evidence(**evidence), card)]


CEILINGS = {in_turns.COPY: 2e12, in_turns.PRODUCT: 2e15}  # 2 GB take a millisecond, as do their FLOPs


def test_kernels_are_compared_on_one_shape_and_in_one_way() -> None:
    together = (
        op("triton_latent", 2.0), op("flashinfer", 1.0), op("flash_mla", 0.8), op("slow", 4.0),
        op("triton_latent", 3.0, shape="b"),
        op("flashinfer", None, shape="b", check=Check(status="not run", reason="no")),
    )  # fmt: skip
    rows = in_turns.rows(in_one(*together), CEILINGS)
    by = {(row[0], row[1]): row[2:] for row in rows}
    assert by["a", "triton_latent"] == [
        "2000", "graph, device clock", "1000", "1000", "50 %", "50 %", "0.40x", "0.50x", "ok",
    ]  # fmt: skip
    assert by["a", "flash_mla"][-3:-1] == ["1.25x", "1.25x"]
    assert by["a", "flashinfer"][-3:-1] == ["0.80x", "-"]
    assert by["b", "triton_latent"][-3:-1] == ["-", "-"], "nobody else has a number there"
    assert by["b", "flashinfer"] == ["-"] * 8 + ["not run no"]
    eager = timed(op("flashinfer", 1.0), {EAGER_HOST: 1.5})
    assert in_turns.ratio(op("triton_latent", 2.0), eager) == 0.5, "3 ms on the host against 1.5 there"


def test_nothing_that_was_not_run_is_met_or_missed() -> None:
    assert {row[0] for row in verdicts()} == {"not run"}
    small = in_one(op("triton_latent", 1.0, gigabytes=0.5))
    for evidence in ({"rivals": small, "ceilings": CEILINGS}, {"rivals": in_one(op("triton_latent", 1.0))}):
        rows = verdicts(**evidence)
        assert rows == [("not run", "-", "no such result")] * len(targets.TARGETS), "too small; no ceiling"


@pytest.mark.parametrize(("ms", "result"), [(0.16, "met"), (0.161, "not met")])
def test_decode_of_the_default_config_is_judged_in_a_graph(ms: float, result: str) -> None:
    """16 tokens in 0.16 ms are 100,000 a second."""
    ops = {"latent_attention": "triton_latent"}
    run = layer(V2, "decode", ops, {("graph", False): ms, EAGER_HOST: 0.01, GRAPH_DEVICE: 0.01})
    verdict = verdicts(layers={"a": run})[0]
    assert verdict == (result, f"{16 / ms * 1e3:.4g} tok/s", "decode, mla: graph, host clock")
    eager = layer(V2, "decode", ops, {EAGER_HOST: 0.01})
    assert verdicts(layers={"a": eager})[0][0] == "not run"


def test_prefill_and_a_step_of_r1_have_their_own_clocks() -> None:
    prefill = layer(V2, "prefill", {"expanded_attention": "triton_expanded"}, {EAGER_HOST: 0.3})
    step = layer(R1, "decode", {"latent_attention": "triton_latent"}, {GRAPH_DEVICE: 0.2, EAGER_HOST: 5.0})
    judged = verdicts(layers={"a": prefill, "b": step})
    assert judged[1] == ("met", "0.3 ms", "prefill, mla: eager, host clock")
    assert judged[2] == ("met", "0.2 ms", "decode, mla: graph, device clock")


def test_the_layer_with_another_kernel_says_nothing_unless_ours_was_run_besides() -> None:
    times = {("graph", False): 0.1, EAGER_HOST: 0.1}
    other = layer(V2, "decode", {"latent_attention": "flash_mla"}, times)
    assert verdicts(layers={"a": other})[0][0] == "not run"
    ours = layer(V2, "decode", {"latent_attention": "triton_latent"}, times)
    assert verdicts(layers={"a": other, "own-deepseek-v2-lite": ours})[0][0] == "met"
    slow = layer(
        V2, "decode", {"latent_attention": "triton_latent"}, {("graph", False): 0.5, EAGER_HOST: 0.1}
    )
    both = verdicts(layers={"own-deepseek-v2-lite": ours, "a": slow})
    assert both[0][0] == "met", "the run with the tuning comes first"


def test_shares_are_judged_by_the_lowest_of_the_large_shapes() -> None:
    rivals = in_one(
        op("triton_latent", 1.1), op("triton_latent", 1.15, shape="b"), op("flash_mla", 9.0, shape="b"),
        op("triton_latent", 9.0, shape="small", gigabytes=0.9),
        op("triton_latent", 1.6, heads=128, shape="c"),
    )  # fmt: skip
    judged = verdicts(rivals=rivals, ceilings=CEILINGS)
    assert judged[3] == ("met", "87%", "b, the lowest of 2")
    assert judged[4] == ("not met", "62%", "c")


def test_a_large_shape_without_a_number_leaves_the_target_open_and_a_wrong_one_misses_it() -> None:
    def judged(status: Any) -> tuple[str, str, str]:
        other = op("triton_latent", None, shape="b", check=Check(status=status, reason="it is off"))
        return verdicts(rivals=in_one(op("triton_latent", 1.0), other), ceilings=CEILINGS)[3]

    assert judged("not run") == ("not run", "-", "b: not run it is off")
    assert judged("wrong") == ("not met", "wrong", "b: wrong it is off, the lowest of 2")


@pytest.mark.parametrize(("other", "target", "least"), [("flash_mla", 5, 0.9), ("flashinfer", 6, 0.85)])
def test_the_ratio_to_another_kernel_is_judged_on_every_shape(other: str, target: int, least: float) -> None:
    pairs = [(1.0, least), (1.0, 0.8)]
    cases = [
        op(name, ms, shape=str(number))
        for number, pair in enumerate(pairs)
        for name, ms in zip(("triton_latent", other), pair, strict=True)
    ]
    result, number, of = verdicts(rivals=in_one(*cases))[target]
    assert (result, number) == ("not met", "0.80x")
    assert of == "1, the lowest of 2"
    assert verdicts(rivals=in_one(*cases[:2]))[target][0] == "met"


@pytest.mark.parametrize("pair", [(0.2, 0.09), (0.09, 0.05), (0.09, 0.2)])
def test_what_may_be_the_hosts_time_is_not_judged(pair: tuple[float, float]) -> None:
    def both(shape: str, *times: float) -> list[Case]:
        names = ("triton_latent", "flashinfer")
        return [op(name, ms, shape=shape) for name, ms in zip(names, times, strict=True)]

    long = both("long", 0.1, 0.1)
    assert verdicts(rivals=in_one(*both("short", *pair), *long))[6][2] == "long"
    assert verdicts(rivals=in_one(*both("short", *pair)))[6][0] == "not run"
    on_host = [timed(case, {EAGER_HOST: 5.0}) for case in long]
    assert verdicts(rivals=in_one(*on_host))[6][0] == "not run"


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "above"), (1.02, "as predicted"), (9.0, "below")])
def test_a_result_stands_beside_what_was_predicted(factor: float, verdict: str) -> None:
    """16 heads on an H100 are bound by memory: at best they take the bandwidth of the data sheet."""
    ms = 2e9 / 3.35e12 * 1e3 * factor
    cases = op("triton_latent", ms), op("flash_mla", ms), op("triton_latent", ms, gigabytes=0.5, shape="b")
    (row,) = predictions.rows(in_one(*cases), H100)
    assert row[:3] == ["a", "memory", "bandwidth"]
    assert row[-2:] == [f"{100 / factor:.0f} %", verdict]
    assert predictions.rows(in_one(*cases), "Tesla V100") == []


def test_another_card_is_named() -> None:
    rivals = in_one(op("triton_latent", 1.0))
    assert verdicts("NVIDIA H200", rivals=rivals, ceilings=CEILINGS)[3][0] == "met (no H100)"
    assert "this is NVIDIA H200, and says nothing about one" in targets.note("NVIDIA H200")
    assert "this is" not in targets.note(H100)
