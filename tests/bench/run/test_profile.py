"""`--profile`: one trace of every case, recorded when all timing is over; no reason to lose a result."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mla.bench import results
from mla.bench.measure import engine
from mla.bench.run import profile

Bench = Callable[..., Any]
Event = dict[str, Any]

SEVERAL = ("--backend", "several_ops:SeveralOps")
VIRTUAL = ("--backend", "fake-virtual-clock")
SECOND = "mla[latent_attention=second]"
QUICK = ("--passes", "2", "--runs", "4", "--warmups", "1")
OPENED = "open it at https://ui.perfetto.dev or chrome://tracing"


def read(path: str) -> list[Event]:
    data = Path(path).read_bytes()
    trace = json.loads(gzip.decompress(data) if path.endswith(".gz") else data)
    assert trace["displayTimeUnit"] == "ms"
    events: list[Event] = trace["traceEvents"]
    return events


def ranges(events: list[Event]) -> list[Event]:
    """Return our ranges by their start."""
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    return sorted(annotations, key=lambda event: (event["ts"], -event["dur"]))


def inside(outer: Event, events: list[Event]) -> list[Event]:
    end = outer["ts"] + outer["dur"]
    return [
        e
        for e in events
        if e is not outer and outer["ts"] <= e.get("ts", -1) and e["ts"] + e.get("dur", 0) <= end
    ]


def samples() -> dict[tuple[str, str], Any]:
    run = results.decode(Path("run.json").read_bytes())
    return {(case.scenario, case.implementation): case.latency_ms for case in run.cases}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_every_case_has_its_pass_with_a_range_per_op(bench: Bench, small: list[str], name: str) -> None:
    names = f"mla,{SECOND},mla-reference"
    done = bench(*SEVERAL, *small, *QUICK, "--implementations", names, "--profile", name)
    assert done.code == 0, done.err
    assert f"profile    {name}: one more pass of every case, once all are timed\n" in done.err
    assert done.error.startswith("profile    6 passes, eager, with ")
    assert done.error.endswith(f" operators of torch in '{name}': {OPENED}")
    events = read(name)
    passes = [event for event in ranges(events) if " / " in event["name"]]
    assert [event["name"] for event in passes] == [
        f"{scenario} / {part}" for scenario in ("prefill", "decode") for part in names.split(",")
    ]
    for timed_pass, op in zip(passes, ("first", "second", "reference") * 2, strict=True):
        forwards = [
            event for event in inside(timed_pass, ranges(events)) if event["name"].startswith("forward ")
        ]
        assert [event["name"] for event in forwards] == [f"forward {i}" for i in range(len(forwards))]
        assert len(forwards) == (2 if timed_pass["name"].startswith("prefill") else 4)
        for forward in forwards:
            ops = [event["name"] for event in inside(forward, ranges(events))]
            assert {f"latent_attention ({op})", "write_latent (reference)"} <= set(ops)
            assert ops[0].startswith("qkv_a_proj (")
            assert ops[-1].startswith("o_proj (")
        operators = [event for event in inside(timed_pass, events) if event.get("cat") == "cpu_op"]
        assert len(operators) > 10 * len(forwards)
    assert all(first["ts"] + first["dur"] < second["ts"] for first, second in itertools.pairwise(passes))


def test_an_op_alone_and_several_layers_have_their_ranges(bench: Bench, small: list[str]) -> None:
    op = ["--op", "latent_attention", "--kv", "5", "--profile", "op.json", "--implementations"]
    assert bench(*SEVERAL, *small[:2], *QUICK[:4], "--cache", "warm", *op, f"mla,{SECOND}").code == 0
    names = [event["name"] for event in ranges(read("op.json"))]
    assert names.count("latent_attention (first)") == names.count("latent_attention (second)") == 4
    words = ["--scenario", "decode", "--layers", "3", "--implementations", "mla", "--profile", "layers.json"]
    assert bench(*SEVERAL, *small, *QUICK, *words).code == 0
    names = [event["name"] for event in ranges(read("layers.json"))]
    forward = [name.partition(" (")[0] for name in names if "o_proj" in name][:3]
    assert forward == ["layer 0: o_proj", "layer 1: o_proj", "layer 2: o_proj"]
    assert all(names.count(f"layer {index}: o_proj (rows)") == 4 for index in range(3))
    assert "o_proj (rows)" not in names


def test_ops_that_run_as_one_call_are_recorded_one_by_one(bench: Bench, small: list[str]) -> None:
    words = ["--backend", "cpu", "--threads", "1", "--implementations", "mla", "--scenario", "decode"]
    assert bench(*words, *small, *QUICK, "--attention", "absorbed", "--profile", "trace.json").code == 0
    names = [event["name"].partition(" ")[0] for event in ranges(read("trace.json"))]
    assert names.count("latent_attention") == names.count("o_proj") == names.count("forward") == 4


def test_a_long_pass_is_cut_to_its_first_forwards(bench: Bench, small: list[str]) -> None:
    words = ["--scenario", "decode", "--passes", "1", "--runs", "30", "--profile", "trace.json"]
    assert bench(*VIRTUAL, *small, *words, fakes=["virtual_clock"]).code == 0
    names = [event["name"] for event in ranges(read("trace.json"))]
    assert names.count("o_proj (reference)") == profile.TRACE_FORWARDS
    assert f"forward {profile.TRACE_FORWARDS - 1}" in names


def test_nothing_is_recorded_before_all_is_timed_and_nothing_timed_changes(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is scripted, so numbers are equal only if the same forwards were timed in the same order."""
    given = ["-O", "script=1~9*50", "--implementations", "mla,mla-reference", "-o", "run.json"]
    words = [*VIRTUAL, *small, *given]
    assert bench(*words, fakes=["virtual_clock"]).code == 0
    plain, log = samples(), []
    measure, record = engine.measure, profile.record
    monkeypatch.setattr(engine, "measure", lambda *args: (log.append("timed"), measure(*args))[1])
    monkeypatch.setattr(profile, "record", lambda *args: (log.append("recorded"), record(*args))[1])
    assert bench(*words, "--profile", "trace.json").code == 0
    assert samples() == plain
    assert log == ["timed"] * 2 + ["recorded"] * 4


def test_a_case_without_a_number_is_not_recorded(bench: Bench, small: list[str]) -> None:
    words = ["--scenario", "decode", "-O", "wrong=second", "--profile", "trace.json"]
    done = bench(*SEVERAL, *small, *QUICK, *words, "--implementations", f"mla,{SECOND}")
    assert done.code == 4
    assert [event["name"] for event in ranges(read("trace.json")) if " / " in event["name"]] == [
        "decode / mla"
    ]
    done = bench(*SEVERAL, *small, *QUICK, *words, "--implementations", SECOND, "--profile", "none.json")
    assert done.code == 4
    assert done.error == "profile    nothing was recorded, so 'none.json' was not written"
    assert not Path("none.json").exists()


@pytest.mark.parametrize("broken", ["profile", "supported_activities", "export"])
def test_a_profiler_that_fails_costs_no_result(
    bench: Bench, small: list[str], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kineto in this build\nand a page about it")

    owner, name = (
        (torch.profiler.profile, "export_chrome_trace") if broken == "export" else (torch.profiler, broken)
    )
    monkeypatch.setattr(owner, name, fail)
    done = bench(*VIRTUAL, *small, "--profile", "trace.json", "-o", "run.json", fakes=["virtual_clock"])
    assert done.code == 0
    assert done.out.splitlines()[-1] == "Decode Throughput: 800.0 tok/s"
    assert all(samples().values())
    failure, written = done.err.splitlines()[-2:]
    assert re.fullmatch(
        r"profiling failed at (prefill|decode) / mla: RuntimeError: no kineto in this build \(.*\); "
        "the result is complete",
        failure,
    )
    assert written == "profile    nothing was recorded, so 'trace.json' was not written"
    assert not Path("trace.json").exists()


def test_what_was_recorded_before_a_failure_is_kept(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = iter([profile.record])
    monkeypatch.setattr(profile, "record", lambda *args: next(recorders)(*args))
    done = bench(*VIRTUAL, *small, "--profile", "trace.json", fakes=["virtual_clock"])
    assert done.code == 0
    assert re.search(
        r"^profiling failed at .* / mla: StopIteration: .*; the result is complete$", done.err, re.M
    )
    assert done.error.startswith("profile    1 pass, eager, with ")
    assert len(read("trace.json")) > 10


def test_ctrl_c_keeps_the_result_and_the_passes_so_far(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, calls = profile.record, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return record(*args)

    monkeypatch.setattr(profile, "record", interrupted)
    done = bench(*VIRTUAL, *small, "--profile", "trace.json", "-o", "run.json", fakes=["virtual_clock"])
    assert done.code == 130
    assert "profiling was interrupted: the result is complete, the trace is not" in done.err
    assert all(samples().values())
    assert len({event["name"] for event in ranges(read("trace.json")) if " / " in event["name"]}) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--profile", "trace.txt"],
            "--profile writes a Chrome trace, FILE.json or FILE.json.gz, got 'trace.txt'.",
        ),
        (["--profile", "no/trace.json"], "cannot write 'no/trace.json': there is no folder 'no'."),
        (["--profile", "taken.json"], "cannot write 'taken.json': it is a folder."),
        (
            ["--profile", "run.json", "-o", "taken.json/../run.json"],
            "--profile and the result would both write 'run.json': name another file.",
        ),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_run(
    bench: Bench, small: list[str], words: list[str], sentence: str
) -> None:
    Path("taken.json").mkdir()
    done = bench(*VIRTUAL, *small, *words, fakes=["virtual_clock"])
    assert (done.code, done.err) == (2, f"error: {sentence}\n")


# ------------------------------------------------------------------------------------- joining passes


def one_pass(start: float, *links: Any) -> dict[str, Any]:
    events: list[Event] = [
        {"ph": "M", "name": "process_name", "ts": 0, "pid": 1, "args": {"name": "python"}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": start, "dur": 5, "pid": 1},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": start + 3, "dur": 10, "pid": 0},
    ]
    events += [{"ph": phase, "id": id, "cat": "ac2g", "ts": start + 1} for id in links for phase in "sf"]
    return {"schemaVersion": 1, "displayTimeUnit": "ms", "traceName": "tmp/x", "traceEvents": events}


def test_passes_lie_end_to_end_whenever_they_were_recorded() -> None:
    joined = profile.Trace()
    for start in (7e12, 1e3, 9e15):
        joined.add(one_pass(start))
    trace = json.loads(joined.encode())
    assert (joined.passes, joined.operators, joined.launches) == (3, 3, 3)
    assert {key for key in trace if key != "traceEvents"} == {"madeBy", "schemaVersion", "displayTimeUnit"}
    starts = [event["ts"] for event in trace["traceEvents"] if event["name"] == "aten::mm"]
    assert starts == [0, 13 + profile.GAP_US, 2 * (13 + profile.GAP_US)]
    kernels = [event["ts"] for event in trace["traceEvents"] if event["name"] == "gemm"]
    assert [kernel - start for kernel, start in zip(kernels, starts, strict=True)] == [3] * 3


def test_arrows_never_lead_from_one_pass_to_another() -> None:
    joined = profile.Trace()
    for _ in range(3):
        joined.add(one_pass(5, 1, 2))
    links = [
        (event["ts"], event["id"]) for event in json.loads(joined.encode())["traceEvents"] if "id" in event
    ]
    by_id = {id: {at for at, other in links if other == id} for _, id in links}
    assert len(by_id) == 6
    assert all(len(places) == 1 for places in by_id.values())
