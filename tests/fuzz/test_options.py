"""What is typed on a command line is read, or refused in a sentence: never another exception."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import pytest
from damage import LONGEST_TYPED, damaged_text
from damage import attempt as attempt_within
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla.bench.cli.run import run
from mla.bench.measure import variants
from mla.bench.workload import grid, implementations
from mla.bench.workload.grid import batch_scenarios
from mla.bench.workload.scenario import MAX_COUNT, MAX_REQUESTS, Scenario
from mla.command import launcher
from mla.command.options import key_values
from mla.conformance import selection
from mla.parallel.layout import AXES, Layout, Link
from mla_backend_cpu import Cpu
from mla_backends import host

T = TypeVar("T")
FUZZ = settings.get_profile("fuzz")
SCENARIO = Scenario(name="a", mode="decode", query_lens=(1, 2), history=(3, 0))


def attempt(call: Callable[[], T]) -> T | None:
    """Return what a call returns, or None for an error; a user's own words may make it a long one."""
    return attempt_within(call, LONGEST_TYPED)


def option(command: click.Command, flag: str, word: str) -> Any:
    """Return what click makes of the word behind a flag."""
    name = next(parameter.name for parameter in command.params if flag in parameter.opts)
    assert name is not None
    return command.make_context("x", [f"{flag}={word}"]).params[name]


@FUZZ
@given(damaged_text(("4q8s2049_16q1s3072", "q1", "2q1ks4k,q8"), "0123456789qsk_, Q"))
def test_batch_specs(text: str) -> None:
    for scenario in attempt(lambda: batch_scenarios([text])) or ():
        assert 0 < len(scenario.query_lens) <= MAX_REQUESTS
        assert 0 < min(scenario.query_lens) <= max(scenario.final_lens) <= MAX_COUNT
        assert attempt(lambda name=scenario.name: batch_scenarios([name])) == [scenario]


AXIS = (
    "kv=1k..64k*4",
    "batch=1,8,64",
    "q_len=1..8+1",
    "dtype=bf16,fp32",
    "page_size=16",
    "heads=2m",
    "topk=64..1k*4",
)
NAMED = ("selection=random,recent", "selection=tied,clustered")


@FUZZ
@given(st.lists(damaged_text((*AXIS, *NAMED), "0123456789kKmM.,*+=batch ²٣"), min_size=1, max_size=3))
def test_axes(words: list[str]) -> None:
    for point in attempt(lambda: grid.points_of([SCENARIO], grid.parse(words))) or ():
        assert point.tokens > 0
        flags = point.arguments[2:]
        assert grid.points_of([SCENARIO], grid.parse(flags[1::2])) == [point], "its own command repeats it"


@FUZZ
@given(damaged_text(("tp=2,dcp=2", "dp=4", "tp=4096,dp=1,dcp=3"), "tpdc=,0123456789 "))
def test_layouts(text: str) -> None:
    layout = attempt(lambda: option(run, "--parallel", text))
    if layout is not None:
        assert layout.world == math.prod(getattr(layout, axis) for axis in AXES)
        assert Layout.parse(str(layout)) == layout


@FUZZ
@given(
    st.sampled_from(("--budget", "--hang-after")), damaged_text(("90", "10m", "1.5h"), "0123456789.smhe- ²٣")
)
def test_durations(flag: str, text: str) -> None:
    seconds = attempt(lambda: option(run, flag, text))
    assert seconds is None or 0 < seconds < math.inf


@FUZZ
@given(damaged_text(("3%", "0.5", "1e2"), "0123456789.%e-infa"))
def test_percentages(text: str) -> None:
    share = attempt(lambda: option(run, "--fail-slower", text))
    assert share is None or 0 <= share < 10


NAMED = ("mla", "mla-reference,transformers", "mla[latent_attention=mine,linear=reference]")


@FUZZ
@given(damaged_text(NAMED, "mla[]=, -"))
def test_implementations(text: str) -> None:
    names = attempt(lambda: implementations.parse(text)) or []
    assert implementations.parse(",".join(map(str, names))) == names


LINKS = (
    "alpha=5us,beta=300GB/s",
    "all-reduce:alpha=1e-3s,beta=inf TiB/s;all-gather:alpha=0ns,beta=1kb/s",
    "ideal",
)


@FUZZ
@given(damaged_text(LINKS, "alphbet=0123456789.-:;,/GBinfus "))
def test_links(text: str) -> None:
    link = attempt(lambda: Link.parse(text))
    if link is not None:
        assert all(0 <= line.alpha < math.inf and line.beta > 0 for line in link.lines.values())
        assert Link.parse(str(link)).lines.keys() == link.lines.keys()


@FUZZ
@given(st.lists(damaged_text(("native=off", "threads=2"), "nativethreads=0123456789 -"), max_size=3))
def test_options_of_a_backend(words: list[str]) -> None:
    attempt(lambda: Cpu(key_values(words)))


@FUZZ
@given(damaged_text(("eager", "warm,cold", "host,device"), "eagr, "))
def test_ways_of_timing(text: str) -> None:
    attempt(lambda: variants.parse(text, text, text))


@FUZZ
@example("latent#" + "9" * 5000)
@given(
    damaged_text(("latent.tiles", "latent", "*.drawn", "latent.tiles[my_op-bfloat16]#3"), "latn.*[]#0123 ")
)
def test_names_of_checks(text: str) -> None:
    attempt(lambda: selection.split(text))


INTEGERS = (
    "--runs",
    "--passes",
    "--layers",
    "--warmups",
    "--page-size",
    "--seed",
    "--heads",
    "--batch",
    "--kv",
)


@FUZZ
@given(st.sampled_from(INTEGERS), damaged_text(("0", "1", "64", "4k"), "0123456789-+_.ek "))
def test_numbers(flag: str, text: str) -> None:
    attempt(lambda: option(run, flag, text))


MORE = ("RANK", "SLURM_PROCID", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "SLURM_CPUS_PER_TASK")
VARIABLES = (*launcher.LOCAL, *launcher.TASKS, *MORE)
ASKED: tuple[Callable[[], object], ...] = (
    launcher.rank,
    launcher.count,
    launcher.local_number,
    lambda: launcher.start_words(8),
    lambda: host.thread_limit(1),
    lambda: launcher.result_path(Path("run-%3t.json")),
)


@FUZZ
@given(st.dictionaries(st.sampled_from(VARIABLES), damaged_text(("0", "4"), "0123456789 -²٣"), min_size=1))
@example({"RANK": "9" * 5000})
@example({"SLURM_CPUS_PER_TASK": "9" * 5000})
def test_variables_of_a_launcher(variables: dict[str, str]) -> None:
    held = {name: text.replace("\0", "").replace("\ud800", "") for name, text in variables.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        for name, text in held.items():
            patch.setenv(name, text)
        for ask in ASKED:
            attempt(ask)
