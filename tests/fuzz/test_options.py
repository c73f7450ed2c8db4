"""What is typed on a command line is read, or refused in a sentence: never another exception."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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
from mla.bench.workload import grid
from mla.bench.workload.scenario import Scenario
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


def layout_is_right(layout: Layout) -> bool:
    size = math.prod(getattr(layout, axis) for axis in AXES)
    return layout.world == size and Layout.parse(str(layout)) == layout


def link_is_right(link: Link) -> bool:
    possible = all(0 <= line.alpha < math.inf and line.beta > 0 for line in link.lines.values())
    return possible and Link.parse(str(link)).lines.keys() == link.lines.keys()


DURATIONS = ("90", "10m", "1.5h"), "0123456789.smhe- ²٣"
NUMBERS = ("0", "1", "64", "4k"), "0123456789-+_.ek "
INTEGERS = ("runs", "passes", "layers", "warmups", "page-size", "seed", "heads", "batch", "kv")
# What reads a word; words that it reads, letters to damage them with; what holds of what is read.
Words = tuple[tuple[str, ...], str]
READ: dict[str, tuple[Callable[[str], Any], Words, Callable[[Any], bool]]] = {
    "parallel": (
        lambda text: option(run, "--parallel", text),
        (("tp=2,dcp=2", "dp=4", "tp=4096,dp=1,dcp=3"), "tpdc=,0123456789 "),
        layout_is_right,
    ),
    **{
        flag: (partial(option, run, f"--{flag}"), DURATIONS, lambda seconds: 0 < seconds < math.inf)
        for flag in ("budget", "hang-after")
    },
    **{
        flag: (partial(option, run, f"--{flag}"), NUMBERS, lambda number: isinstance(number, int))
        for flag in INTEGERS
    },
    "fail-slower": (
        lambda text: option(run, "--fail-slower", text),
        (("3%", "0.5", "1e2"), "0123456789.%e-infa"),
        lambda share: 0 <= share < 10,
    ),
    "link": (
        Link.parse,
        (
            ("alpha=5us,beta=300GB/s", "ideal", "all-reduce:alpha=1e-3s,beta=inf TiB/s;all-gather:alpha=0ns"),
            "alphbet=0123456789.-:;,/GBinfus ",
        ),
        link_is_right,
    ),
    "options of a backend": (
        lambda text: Cpu(key_values(text.split())),
        (("native=off", "threads=2 native=auto"), "nativethreads=0123456789 -"),
        bool,
    ),
    "ways of timing": (
        lambda text: variants.parse(text, text, text),
        (("eager", "warm,cold", "host,device"), "eagr, "),
        bool,
    ),
    "names of checks": (
        selection.split,
        (
            ("latent.tiles", "*.drawn", "latent.tiles[my_op-bfloat16]#3", "latent#" + "9" * 5000),
            "latn.*[]#0123 ",
        ),
        bool,
    ),
}


@pytest.mark.parametrize("what", READ)
@FUZZ
@given(data=st.data())
def test_words(what: str, data: st.DataObject) -> None:
    read, words, right = READ[what]
    text = data.draw(damaged_text(*words))
    value = attempt(lambda: read(text))
    assert value is None or right(value)


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
