"""Axes: what their values mean, which points they make, and that a point can be measured and run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla.bench import results
from mla.bench.workload.grid import MAX_POINTS, parse, points_of
from mla.bench.workload.scenario import Scenario
from mla.errors import UsageError

Bench = Callable[..., Any]

VIRTUAL = ("--backend", "fake-virtual-clock")
DECODE = Scenario(name="decode", mode="decode", query_lens=(1, 2), history=(5, 9), runs=2)
SHORT_RUN = ("--runs", "2", "--passes", "1", "--warmups", "0", "--scenario", "decode")


def sentence(*words: str) -> str:
    with pytest.raises(UsageError) as refused:
        points_of([DECODE], parse(words))
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8", (8,)),
        ("1,8, 64", (1, 8, 64)),
        ("1k,2m", (1024, 2 << 20)),
        ("1k..64k*4", (1024, 4096, 16384, 65536)),
        ("1..10*3", (1, 3, 9)),
        ("1..8+3", (1, 4, 7)),
        ("0..2+1", (0, 1, 2)),
        ("4..4*2,8,4,1K", (4, 8, 1024)),
    ],
)
def test_values_are_numbers_and_ranges(text: str, values: tuple[int, ...]) -> None:
    assert parse([f"kv={text}"]) == {"kv": values}


def test_dtypes_have_short_names() -> None:
    assert parse(["dtype=bf16,fp16,float32,bfloat16"]) == {"dtype": ("bfloat16", "float16", "float32")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kv"], "-a takes AXIS=VALUES, such as kv=1k..64k*4, got 'kv'"),
        (["btach=1"], "unknown axis 'btach'. Did you mean 'batch'? Choose from: batch, kv, q_len, "),
        (["=1"], "unknown axis ''. Choose from: "),
        (["kv=1", "kv=2"], "axis 'kv' is given twice: list all of its values in one -a"),
        (["kv="], "axis kv: '' is neither a number, such as 4k, nor a range"),
        (["kv=1..8"], "axis kv: '1..8' is neither"),
        (["kv=8..1*2"], "the range '8..1*2' does not ascend"),
        (["kv=1..8+0"], "the range '1..8+0' does not ascend"),
        (["kv=1..1m+1"], f"axis kv: '1..1m+1' exceeds {MAX_POINTS} values: give fewer"),
        (["kv=9999m"], "axis kv: 10484711424 is not between 0 and 2147483647"),
        (["batch=0"], "axis batch: 0 is not between 1 and 65536"),
        (["page_size=48"], "axis page_size: 48 is not a power of two"),
        (["dtype=bf61"], "unknown dtype 'bf61'. Did you mean 'bf16'? Choose from: bf16, "),
        (["topk=0"], "axis topk: 0 is not between 1 and 2147483647"),
        (["selection=tid"], "unknown selection 'tid'. Did you mean 'tied'? Choose from: random, "),
        (["kv=1..40+1", "batch=1..40+1"], "these axes make 1600 points, but a run has at most 1000"),
        (["kv=2147483647"], "scenario 'decode kv=2147483647': no request may grow beyond 2147483647 tokens"),
    ],
)
def test_every_mistake_is_named(words: list[str], message: str) -> None:
    assert message in sentence(*words)


def test_points_are_the_product_and_the_first_axis_varies_slowest() -> None:
    points = points_of([DECODE], parse(["kv=4,8", "batch=1,3"]))
    assert [point.name for point in points] == [
        f"decode kv={kv} batch={batch}" for kv in (4, 8) for batch in (1, 3)
    ]
    assert {point.base for point in points} == {"decode"}
    assert points[3].point == {"kv": 8, "batch": 3}
    assert (points[3].history, points[3].query_lens) == ((8, 8, 8), (1, 2, 1))
    assert points[3].arguments == ["--scenario", points[3].base, "-a", "kv=8", "-a", "batch=3"]


def test_a_batch_cuts_or_repeats_the_requests_of_the_scenario() -> None:
    single, five = points_of([DECODE], parse(["batch=1,5"]))
    assert (single.query_lens, single.history) == ((1,), (5,))
    assert (five.query_lens, five.history) == ((1, 2, 1, 2, 1), (5, 9, 5, 9, 5))


def test_without_axes_a_scenario_stays_what_it_is() -> None:
    (point,) = points_of([DECODE], {})
    same = ("name", "query_lens", "history", "runs", "passes", "mode")
    assert [getattr(point, name) for name in same] == [getattr(DECODE, name) for name in same]
    assert (point.base, point.point, point.arguments) == ("decode", {}, ["--scenario", "decode"])


def test_a_scenario_may_bring_axes_which_the_command_line_replaces() -> None:
    unlike = Scenario(
        name="own", mode="decode", query_lens=(1,), history=(0,), axes={"kv": "1..4*2", "batch": [1, "2"]}
    )
    assert len(points_of([unlike, DECODE], {})) == 6 + 1
    assert [point.name for point in points_of([unlike, DECODE], parse(["kv=7"]))] == [
        "own kv=7 batch=1",
        "own kv=7 batch=2",
        "decode kv=7",
    ]
    with pytest.raises(UsageError, match=r"^scenario 'decode': unknown axis 'vk'"):
        points_of([msgspec.structs.replace(DECODE, axes={"vk": 1})], {})


def test_two_points_of_one_name_are_refused() -> None:
    clash = msgspec.structs.replace(DECODE, name="decode kv=4")
    with pytest.raises(UsageError, match="two points are named 'decode kv=4'"):
        points_of([clash, msgspec.structs.replace(DECODE, axes={"kv": 4})], {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-a", "heads=8"], "8 heads do not divide the 4 heads of tiny"),
        (["-a", "heads=3"], "3 heads do not divide the 4 heads of tiny"),
        (["-a", "dtype=fp16"], "does not compute float16 natively"),
        (["-a", "dtype=bf16", "--dtype", "float32"], "--dtype and an axis dtype are mutually exclusive"),
        (["-a", "page_size=1", "--page-size", "64"], "--page-size and an axis page_size are mutually excl"),
        (["--preset", "smoke"], "--preset and --workload are mutually exclusive"),
    ],
)
def test_an_axis_must_fit_the_model_the_device_and_the_options(
    bench: Bench, small: list[str], words: list[str], message: str
) -> None:
    Path("tiny").mkdir()
    Path("tiny.json").rename("tiny/config.json")
    done = bench(*VIRTUAL, "--config", "tiny", *small[2:], *words, fakes=["virtual_clock"])
    assert done.code == 2
    assert message in done.error


def test_a_grid_is_measured_and_checked_point_by_point(bench: Bench, small: list[str]) -> None:
    """Several tokens per decode step included, as in multi-token prediction."""
    axes = "-a q_len=1,3 -a kv=0,70 -a heads=2 -a dtype=bf16,fp32 -a page_size=16"
    done = bench(*VIRTUAL, *small, *SHORT_RUN, *axes.split(), "-o", "run.json", fakes=["virtual_clock"])
    assert done.code == 0
    run = results.read(Path("run.json"))
    assert len(run.cases) == 8
    last = run.cases[-1]
    assert last.scenario == "decode q_len=3 kv=70 heads=2 dtype=float32 page_size=16"
    assert last.point == {"q_len": 3, "kv": 70, "heads": 2, "dtype": "float32", "page_size": 16}
    assert (last.base, last.dtype, last.heads) == ("decode", "float32", 2)
    assert (last.query_lens, last.history) == ([3, 3], [70, 70])
    assert {case.check.status for case in run.cases} == {"ok"}
    errors = {case.dtype: case.check.relative_error or 0 for case in run.cases}
    assert errors["float32"] < 1e-5 < errors["bfloat16"]
    assert (run.dtype, run.page_size) == ("bfloat16", 16)
