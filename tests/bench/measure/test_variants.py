"""Runs on scripted clocks: what variants, statistics and warm-ups make of known milliseconds is exact."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results

Bench = Callable[..., Any]

HEADLINE = ("--mode", "eager", "--cache", "warm", "--clock", "host")
GRAPHS = ("-O", "graphs=on", "--cache", "warm")


@pytest.fixture
def virtual(bench: Bench, small: list[str]) -> Bench:
    """Return `bench` for one scenario of `mla` on scripted clocks, with the variants that are asked for."""
    config = small[: small.index("--cache")]

    def virtual(*words: str, scenario: str = "decode", **options: str) -> Any:
        pairs = [word for key, value in options.items() for word in ("-O", f"{key}={value}")]
        chosen = ["--scenario", scenario, "--implementations", "mla", "-o", "run.json", "-v"]
        fixed = ("--backend", "fake-virtual-clock")
        return bench(*fixed, *config, *chosen, *pairs, *words, fakes=["virtual_clock"])

    return virtual


def only_case() -> results.Case:
    (case,) = results.decode(Path("run.json").read_bytes()).cases
    return case


def headline() -> results.Latency:
    latency = only_case().latency_ms
    assert latency is not None
    return latency


def medians() -> dict[tuple[str, str, str], float | None]:
    return {
        (timing.mode, timing.cache, timing.clock): timing.latency_ms.median if timing.latency_ms else None
        for timing in only_case().timings
    }


def remarks(done: Any) -> list[str]:
    heads = ("noisy: ", "drifts: ", "outliers: ", "not settled: ", "skipped: ")
    return [line.partition(":")[0] for line in done.err.splitlines() if line.startswith(heads)]


# ------------------------------------------------------------------------------------------- variants


def test_by_default_warm_and_cold_are_timed(virtual: Bench) -> None:
    done = virtual(script="2/2/3")
    assert done.code == 0
    assert "timed      eager; warm, cold; host clock" in done.err
    assert medians() == {("eager", "cold", "host"): 3}
    (cold,) = only_case().timings
    assert cold.passes == 6
    assert re.match(r"\d+ MiB read and written before every timed forward, for a last-level", cold.method)
    assert only_case().launch_bound is None


def test_every_combination_is_timed_by_its_own_clock(virtual: Bench) -> None:
    done = virtual(script="8/8/9/4/5/8", device_script="1/6/7/2/3", graphs="on")
    assert done.code == 0
    assert headline().median == 8
    assert medians() == {
        ("eager", "warm", "virtual device"): 6,
        ("eager", "cold", "host"): 9,
        ("eager", "cold", "virtual device"): 7,
        ("graph", "warm", "host"): 4,
        ("graph", "warm", "virtual device"): 2,
        ("graph", "cold", "host"): 5,
        ("graph", "cold", "virtual device"): 3,
    }
    line = (
        "decode, mla: cold 9 ms (1.12x warm), device 6 ms, device cold 7 ms, graph 4 ms, graph cold 5 ms, "
        "graph device 2 ms, graph device cold 3 ms; launch bound"
    )
    assert line in done.out.splitlines()
    assert "cold ms" in done.out


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
def test_replays_are_checked_and_right(virtual: Bench, scenario: str) -> None:
    """A decode pass crosses the end of a page, and is still replayed from one graph."""
    text = Path("tiny.toml").read_text().replace("history = [5, 9]", "history = [5, 62]")
    Path("tiny.toml").write_text(text)
    assert virtual(*GRAPHS, scenario=scenario).code == 0
    (graph,) = only_case().timings
    assert (graph.mode, graph.check.status, graph.passes) == ("graph", "ok", 6)
    replayed = "replay of one captured graph, its block table as wide as the pass needs"
    assert graph.method == (
        replayed if scenario == "decode" else "replay of one captured forward of the prepared batch"
    )


def test_on_the_device_clock_a_replay_is_timed_without_the_hosts_part(virtual: Bench) -> None:
    virtual(*GRAPHS, "--mode", "graph", "--clock", "device", device_script="1")
    (graph,) = only_case().timings
    assert graph.method.endswith("; bookkeeping of the host outside the timed region")


@pytest.mark.parametrize(
    ("scenario", "after"), [("prefill", 1), ("decode", 4), ("decode", 27)], ids=["prefill", "first", "last"]
)
def test_a_replay_that_does_nothing_is_wrong(virtual: Bench, scenario: str, after: int) -> None:
    """It is right in the pass that is checked before timing, and stops in the first or the last timed one."""
    done = virtual("--cache", "warm", "--warmups", "0", scenario=scenario, graphs="stale", after=str(after))
    assert done.code == 4
    case = only_case()
    assert case.check.status == "wrong"
    start = "graph, warm cache, host clock: right at first, wrong in pass "
    assert case.check.reason.startswith(start)
    assert "hold NaN or infinity" in case.check.reason
    assert case.latency_ms is None
    assert [timing.latency_ms for timing in case.timings] == [None]
    assert case.check.reason in done.out


def test_a_capture_that_is_refused_is_left_out_with_its_reason(virtual: Bench) -> None:
    done = virtual("--cache", "warm", graphs="refuse")
    assert done.code == 0
    assert "skipped: graph of decode, mla: the virtual driver is busy" in done.err.splitlines()
    (graph,) = only_case().timings
    assert (graph.check.status, graph.check.reason, graph.latency_ms) == (
        "not run",
        "the virtual driver is busy",
        None,
    )
    assert only_case().launch_bound is None


def test_a_capture_that_is_refused_is_an_error_when_asked_for(virtual: Bench) -> None:
    done = virtual("--mode", "graph", graphs="refuse")
    assert done.code == 3
    assert done.error == (
        "error: --mode graph: decode, mla cannot be replayed from graphs: the virtual driver is busy."
    )


def test_an_op_that_plans_on_the_host_is_not_captured(virtual: Bench) -> None:
    done = virtual("--mode", "graph", "--ops", "reference", graphs="on")
    assert done.code == 3
    reason = "op 'reference' (latent_attention) does not promise that a captured call follows growing lengths"
    assert reason in done.error
    assert virtual("--mode", "graph", "--ops", "reference", scenario="prefill", graphs="on").code == 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--mode", "graph"], 3, "error: backend 'virtual' offers no graphs (required by"),
        (
            ["--clock", "device"],
            3,
            "error: backend 'virtual' has no device timer (required by --clock device).",
        ),
        (["--cache", "cool"], 2, "error: --cache takes warm and cold, got 'cool'. Did you mean 'cold'?"),
        (["--mode", "graphs"], 2, "error: --mode takes eager and graph, got 'graphs'. Did you mean 'graph'?"),
        (["--clock", " , "], 2, "error: --clock takes host and device, got nothing."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_timed_is_a_sentence(
    virtual: Bench, words: Sequence[str], code: int, sentence: str
) -> None:
    done = virtual(*words)
    assert done.code == code
    assert done.error.startswith(sentence)
    assert done.out == ""


# ---------------------------------------------------------------------------------------- launch bound


@pytest.mark.parametrize(
    ("eager", "graph", "device", "expected"),
    [
        ("2.7", "2", "2", True),
        ("2.5", "2", "2", False),
        ("2.5", "2.4", "1.9", True),
        ("2.5", "1.9", "2.4", True),
        ("2", "3", "3", False),
    ],
)
def test_launch_bound_compares_eager_with_the_replay(
    virtual: Bench, eager: str, graph: str, device: str, expected: bool
) -> None:
    virtual(*GRAPHS, script=f"{eager}/1/{graph}/1", device_script=f"1/1/{device}")
    assert only_case().launch_bound is expected


# ------------------------------------------------------------------------------------------ statistics


def test_noise_gives_exactly_its_interval(virtual: Bench) -> None:
    """Medians of the 6 passes are 1.9, 2.1, 2.0, 2.2, 1.8, 2.0."""
    done = virtual(*HEADLINE, script=",".join(f"{m}*4" for m in (1.9, 2.1, 2.0, 2.2, 1.8, 2.0)) + "/2")
    latency = headline()
    assert (latency.median, latency.ci95, latency.outliers) == (2.0, (1.8, 2.2), 0)
    assert done.out.splitlines()[-1] == "Decode Throughput: 1000 tok/s"
    assert remarks(done) == []
    assert " 2.0  1.8 .. 2.2 " in done.out


def test_a_steady_drift_is_measured_and_said(virtual: Bench) -> None:
    """24 samples from 1.00 to 1.23: 0.04 more with every pass, whose median is 1.115."""
    done = virtual(*HEADLINE, script="1~1.23*24/1")
    assert headline().drift == pytest.approx(6 * 0.04 / 1.115)
    assert headline().outliers == 0
    assert remarks(done) == ["drifts"]
    assert "decode, mla: 22 % slower over its passes" in done.err


def test_a_hang_is_kept_and_named(virtual: Bench) -> None:
    done = virtual(*HEADLINE, "--runs", "20", script="1*70,60000,1*49/1")
    latency = headline()
    assert (latency.outliers, max(latency.samples), latency.median, len(latency.samples)) == (
        1,
        60000,
        1,
        120,
    )
    assert "1 of 120 samples, the slowest 60000 times the median" in done.err


# --------------------------------------------------------------------------------------------- warm-up


def test_a_warm_up_that_does_not_settle_is_said(virtual: Bench) -> None:
    done = virtual(*HEADLINE, "--warmups", "3", script="1/1*5,2*5")
    assert (only_case().warmups, only_case().settled) == (103, False)
    assert remarks(done) == ["not settled"]
    assert "latencies still changed after 103 warm-up forwards" in done.err


# ------------------------------------------------------------------------------------------ the result


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("1200", {"clock_mhz": "1200"}),
        ("broken", {"sensors": "unknown (RuntimeError: the sensor does not answer)"}),
    ],
)
def test_sensors_are_in_the_result_and_cost_nothing(virtual: Bench, after: str, said: dict[str, str]) -> None:
    assert virtual(*HEADLINE, sensors=f"1755,{after}").code == 0
    assert only_case().device_state == [{"when": "before", "clock_mhz": "1755"}, {"when": "after", **said}]


def test_a_repro_line_repeats_the_variants(virtual: Bench) -> None:
    virtual("--mode", "eager", "--cache", "cold", "--clock", "host")
    assert " --mode eager --cache cold --clock host " in only_case().repro
