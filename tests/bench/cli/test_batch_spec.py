"""`--batch-spec` and workloads of batch specs: the run, what repeats it, and what cannot go together."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.cli.run import run
from mla.bench.plan.options import RunOptions, case_command
from mla.bench.plan.request import Request
from mla.bench.plan.resolve import resolve

Bench = Callable[..., Any]

CPU = ("--backend", "cpu", "--threads", "1", "--page-size", "16", "--cache", "warm")
TINY_CONFIG = ("--config", "tiny.json")
COUNTS = ("--runs", "6", "--passes", "6", "--warmups", "1")
SPEC = "2q3s20_q5_3q1s9"
LENGTHS = ([3, 3, 5, 1, 1, 1], [17, 17, 0, 8, 8, 8])
OPS_FILE = """
config = "tiny.json"
op = "latent_attention"

[[scenario]]
name = "odd"
batch_spec = ["2q1s9", "q3s7"]
heads = 3
runs = 2
passes = 2
warmups = 0
"""


AXES_FILE = """
config = "tiny.json"

[[scenario]]
batch_spec = ["2q1s9", "q3s7"]
axes.heads = [4, 2]
axes.page_size = [16, 32]
axes.dtype = "fp32"
"""


@pytest.fixture
def files(small: list[str]) -> None:
    Path("ops.toml").write_text(OPS_FILE)
    Path("axes.toml").write_text(AXES_FILE)


def planned(*words: str) -> Request:
    """Return what a command line would run, without running it."""
    with run.make_context("run", ["--backend", "cpu", "--implementations", "mla", *words]) as context:
        return resolve(RunOptions(**context.params))


def read(path: str) -> results.Run:
    return results.decode(Path(path).read_bytes())


def test_a_spec_is_one_forward_at_exactly_its_lengths(bench: Bench, small: list[str]) -> None:
    """No cache grows from forward to forward: vLLM's tool repeats one batch as well."""
    specs = ("--batch-spec", f"{SPEC},q7", "--implementations", "mla", "-v", "-o", "run.json")
    done = bench(*CPU, *TINY_CONFIG, *COUNTS, *specs)
    assert done.code == 0, done.err
    first, second = sorted(read("run.json").cases, key=lambda case: len(case.scenario), reverse=True)
    assert (first.scenario, first.batch_spec, first.mode) == (SPEC, SPEC, "prefill")
    assert (first.query_lens, first.history) == LENGTHS
    assert first.check.status == second.check.status == "ok"
    assert first.passes * first.steps_per_pass == 6
    assert f"\nBatch Latency [{SPEC}]: " in done.out
    assert "scenario   " + f"{SPEC}: 6 requests, 14 new tokens per forward, history 0 to 17" in done.err


def test_a_spec_runs_below_one_op_with_heads_of_its_own(bench: Bench, small: list[str]) -> None:
    words = (*COUNTS, "--op", "latent_attention", "--batch-specs", SPEC, "--heads", "3", "-o", "run.json")
    done = bench(*CPU, *TINY_CONFIG, *words)
    assert done.code == 0, done.err
    cases = read("run.json").cases
    assert {case.scenario for case in cases} == {f"latent_attention {SPEC} heads=3"}
    assert {(case.op, case.batch_spec, case.heads, case.check.status) for case in cases} == {
        ("latent_attention", SPEC, 3, "ok")
    }
    assert all((case.query_lens, case.history) == LENGTHS for case in cases)


@pytest.mark.parametrize(
    "words",
    [
        (*TINY_CONFIG, "--batch-spec", SPEC, "--heads", "2"),
        (*TINY_CONFIG, "--batch-spec", f"{SPEC},q1", "-a", "heads=4", "-a", "dtype=fp32,bf16"),
        (*TINY_CONFIG, "--batch-spec", SPEC, "--op", "w_uk", "--heads", "2"),
        (*TINY_CONFIG, "--op", "w_uk", "-a", "heads=3,5"),
        (*TINY_CONFIG, "--batch-spec", SPEC, "--op", "linear"),
        (*TINY_CONFIG, "--batch-spec", SPEC, "--layers", "2"),
        (*TINY_CONFIG, "--workload", "tiny.toml", "-a", "kv=4,8", "-a", "dtype=fp32", "-a", "batch=1,3"),
        ("--workload", "ops.toml"),
        ("--workload", "ops.toml", "--heads", "5"),
        ("--workload", "axes.toml"),
        ("--workload", "axes.toml", "--page-size", "64", "--dtype", "bfloat16"),
        ("--workload", "axes.toml", "-a", "page_size=128", "--dtype", "bfloat16"),
        ("--workload", "axes.toml", "--op", "latent_attention", "--heads", "3", "--page-size", "64"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("files")
def test_the_repro_line_of_a_case_plans_it_again(words: tuple[str, ...]) -> None:
    request = planned(*words, "--runs", "7")
    for plan in request.scenarios:
        (again,) = planned(*shlex.split(case_command(request.command, plan.point, "mla"))[3:]).scenarios
        assert again.point == plan.point
        names = ("dtype", "page_size", "config", "ops", "attention", "seed")
        assert all(getattr(again.setting, name) == getattr(plan.setting, name) for name in names)
        if SPEC in words:
            lengths = list(plan.point.query_lens), list(plan.point.history)
            assert lengths == LENGTHS, "also of a role without a history"


@pytest.mark.parametrize(
    ("words", "heads", "sizes", "dtypes"),
    [
        ((), {4, 2}, {16, 32}, {"float32"}),
        (("--page-size", "64"), {4, 2}, {64}, {"float32"}),
        (("-a", "page_size=128", "--dtype", "bfloat16"), {4, 2}, {128}, {"bfloat16"}),
        (("-a", "heads=1"), {1}, {16, 32}, {"float32"}),
        (("--op", "latent_attention", "--heads", "3"), {3}, {16, 32}, {"float32"}),
        (("--op", "latent_attention", "-a", "heads=3", "--page-size", "64"), {3}, {64}, {"float32"}),
    ],
)
@pytest.mark.usefixtures("files")
def test_an_option_replaces_an_axis_of_the_file(
    words: tuple[str, ...], heads: set[int], sizes: set[int], dtypes: set[str]
) -> None:
    points = planned("--workload", "axes.toml", *words).points
    assert len(points) == 2 * len(heads) * len(sizes) * len(dtypes)
    assert {point.heads for point in points} == heads
    assert {point.page_size for point in points} == sizes
    assert {point.dtype for point in points} == dtypes


@pytest.mark.usefixtures("files")
def test_a_workload_brings_its_config_and_op_and_options_come_first() -> None:
    request = planned("--workload", "ops.toml")
    assert request.setting.config.name == "tiny.json"
    assert [point.name for point in request.points] == [
        "latent_attention odd 2q1s9 heads=3", "latent_attention odd q3s7 heads=3",
    ]  # fmt: skip
    other = json.loads(Path("tiny.json").read_text()) | {"kv_lora_rank": 16}
    Path("other.json").write_text(json.dumps(other))
    request = planned("--workload", "ops.toml", "--config", "other.json", "--op", "w_uv")
    assert (request.setting.config.name, request.setting.config.kv_lora_rank) == ("other.json", 16)
    assert request.points[1].name == "w_uv odd q3s7 heads=3"


@pytest.mark.parametrize(
    ("line", "words", "sentence"),
    [
        ("heads = 99", (), "scenario 'q1': 99 heads do not divide the 4 heads of tiny.json"),
        ("axes.heads = 3", (), "scenario 'q1 heads=3': 3 heads do not divide the 4 heads of tiny.json"),
        ("layers = 2", ("--op", "linear"), "scenario 'q1' has layers = 2, and linear is timed alone"),
        ("axes.page_size = 16", ("-a", "page_size=16", "--page-size", "32"), "--page-size and an axis page"),
    ],
)
def test_what_a_file_cannot_mean_is_named(
    bench: Bench, small: list[str], line: str, words: tuple[str, ...], sentence: str
) -> None:
    Path("odd.toml").write_text(f'config = "tiny.json"\n[[scenario]]\nbatch_spec = "q1"\n{line}\n')
    done = bench("--backend", "cpu", "--workload", "odd.toml", *words, "--dry-run")
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith(f"error: {sentence}")


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        (("--workload", "ops.toml", "--layers", "2"), "--layers is", " by workload 'ops.toml'"),
        (("--workload", "ops.toml", "--stages"), "--stages is", " by workload 'ops.toml'"),
        (("--workload", "ops.toml", "--parallel", "tp=3"), "--parallel is", " by workload 'ops.toml'"),
        (("--batch-spec", "q1", "--op", "linear", "--layers", "2"), "--layers is", ""),
    ],
)
@pytest.mark.usefixtures("files")
def test_an_option_of_the_layer_beside_one_op_names_where_the_op_is_from(
    bench: Bench, words: tuple[str, ...], start: str, end: str
) -> None:
    done = bench("--backend", "cpu", *words)
    assert (done.code, done.out) == (2, "")
    said = rf"error: {start} about the whole layer, and \S+ is timed alone{end}: leave one out\."
    assert re.fullmatch(said, done.error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["q1s"], "batch spec 'q1s': segment 1, 'q1s' (character 1), is not [COUNT]qLEN[k][sLE"),
        (["q1", "--workload", "mine.toml"], "--batch-spec and --workload are mutually exclusive: "),
        (["q1", "--preset", "smoke"], "--batch-spec and --preset are mutually exclusive: "),
        (["q1", "--scenario", "decode"], "--batch-spec and --scenario are mutually exclusive: "),
        (["q1", "--op", "linear", "--batch", "2"], "--batch and --batch-spec are mutually exclusive: "),
        (["q1", "--kv", "0"], "--kv and --batch-spec are mutually exclusive: both give the lengths"),
        (["q1", "-a", "kv=1,2"], "axis kv: the lengths of 'q1' come from a batch spec: list a spec"),
        (["q1", "-a", "heads=2", "--heads", "4"], "--heads and an axis of that name are mutually excl"),
        (["q1", "--heads", "3"], "scenario 'q1 heads=3': 3 heads do not divide the 16 heads of "),
    ],
)
def test_what_contradicts_a_spec_is_refused(bench: Bench, words: list[str], message: str) -> None:
    done = bench("--backend", "cpu", "--batch-spec", *words)
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith(f"error: {message}")
