"""The commands of the first hour as data: they parse, their limits hold, and every question has one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import pytest

from benchmarks.gpu import ask
from benchmarks.gpu.report.targets import LARGE_BYTES
from benchmarks.gpu.tune import tune
from benchmarks.gpu.tuning.classes import FULL
from mla.bench.cli import main as bench
from mla.bench.workload import grid
from mla.conformance import cli as conformance
from mla.conformance.registry import all_checks, matches

HERE = Path(__file__).parents[2] / "benchmarks" / "gpu"
PARSERS: dict[str, click.Command] = {
    "mla.bench": bench.cli,
    "mla.conformance": conformance.cli,
    "tune.py": tune,
    "ask.py": ask.ask,
}


@dataclass(frozen=True)
class Step:
    """One line of the list."""

    limit: int
    words: tuple[str, ...]  # after `python`

    def option(self, name: str) -> str:
        return self.words[self.words.index(name) + 1]


@cache
def steps(*words: str, smoke: str = "", backend: str = "nvidia") -> dict[str, Step]:
    """Return the steps that `first_hour.sh --list` names, in its order."""
    env = {**os.environ, "PYTHON": sys.executable, "SMOKE": smoke, "BACKEND": backend}
    done = subprocess.run(
        [str(HERE / "first_hour.sh"), "--list", *words], env=env, capture_output=True, text=True, check=True
    )
    names, commands = (done.stdout.splitlines()[first::2] for first in (0, 1))
    by_name = {}
    for name, command in zip(names, commands, strict=True):
        _, _, _, limit, python, *rest = shlex.split(command)
        assert python == "python"
        by_name[name.removeprefix("# ")] = Step(int(limit), tuple(rest))
    assert len(by_name) == len(names)
    return by_name


def parse(words: tuple[str, ...]) -> None:
    """Parse a command's words as its program does. Raises `click.ClickException`."""
    module = words[0] == "-m"
    program = words[1] if module else Path(words[0]).name
    assert module or Path(words[0]).is_file()
    rest = list(words[1 + module :])
    for flag in ("-o", "--report", "--profile"):  # there is no such folder yet
        if flag in rest:
            at = rest.index(flag)
            del rest[at : at + 2]
    command = PARSERS[program]
    if isinstance(command, click.Group):
        named = rest[0] in command.commands
        command, rest = command.commands[rest[0] if named else "run"], rest[named:]
    command.make_context(program, rest)


@pytest.mark.parametrize("smoke", ["", "1"])
@pytest.mark.parametrize("backend", ["nvidia", "cpu"])
def test_every_command_parses_and_ends_within_ten_minutes(smoke: str, backend: str) -> None:
    for name, step in steps("all", smoke=smoke, backend=backend).items():
        parse(step.words)
        assert 0 < step.limit <= 600, name


@pytest.mark.parametrize("words", [("-m", "mla.bench", "--no-such-option"), ("-m", "mla.bench", "doctr")])
def test_a_command_that_does_not_parse_is_noticed(words: tuple[str, ...]) -> None:
    with pytest.raises(click.ClickException):
        parse(words)


def test_the_first_hour_is_less_than_one_and_the_most_valuable_comes_first() -> None:
    hour = steps()
    assert list(hour) == [
        "compile-tiles", "compile-ops", "facts", "rivals-16-32x64k", "rivals-128-32x64k",
        "own-deepseek-v2-lite", "own-deepseek-r1", "conformance-latent",
        *(f"tune-{each.name}" for each in FULL), "tune-choose",
        "rivals-16-32x64k-tuned", "rivals-128-32x64k-tuned", "profile",
    ]  # fmt: skip
    assert sum(step.limit for step in hour.values()) <= 45 * 60
    assert max(step.limit for step in hour.values()) <= 300, "a command that also installs has time for it"
    for heads in (16, 128):
        before, after = hour[f"rivals-{heads}-32x64k"], hour[f"rivals-{heads}-32x64k-tuned"]
        assert before.words[:-2] == after.words[:-2]
    assert list(steps("all"))[: len(hour)] == list(hour)


@pytest.mark.parametrize("heads", [16, 128])
def test_shares_are_judged_on_shapes_that_have_a_step_and_time_of_their_own(heads: int) -> None:
    def keys(step: Step) -> list[int]:
        axes = grid.parse([word for word in step.words if word.startswith(("batch=", "kv="))])
        return [int(batch) * int(kv) for batch in axes["batch"] for kv in axes["kv"]]

    every = {name: step for name, step in steps("all").items() if name.startswith(f"rivals-{heads}-")}
    key_bytes = 2 * (512 + 64)  # of bfloat16
    assert len(every) == 4  # one of them with the tuning
    for step in every.values():
        assert step.option("--heads") == str(heads)
        (count,) = keys(step)
        assert count * key_bytes >= LARGE_BYTES
        assert step.limit >= 150
    small = steps("all")[f"rivals-{heads}"]
    assert max(keys(small)) * key_bytes < LARGE_BYTES, "nothing large among the small ones"


def selected(prefix: str) -> list[str]:
    """Return the names of checks that the steps of a part of the conformance suite run."""
    patterns = [
        word
        for name, step in steps("all").items() if name.startswith(prefix)
        for flag, word in zip(step.words, step.words[1:], strict=False) if flag == "--only"
    ]  # fmt: skip
    return [each.id for each in all_checks() for pattern in patterns if matches(pattern, each.id)]


@pytest.mark.parametrize("prefix", ["conformance-full", "conformance-float16", "conformance-float32"])
def test_the_parts_of_the_conformance_suite_are_the_whole_suite(prefix: str) -> None:
    assert sorted(selected(prefix)) == sorted(each.id for each in all_checks())


def test_conformance_leaves_room_for_compilers() -> None:
    """Specializations of our kernels by step, counted with a launcher that starts nothing."""
    counted = {
        "conformance-latent": 133, "conformance-pointwise": 113, "conformance-rest": 65,
        "conformance-full-latent": 133, "conformance-full-pointwise": 113, "conformance-full-rest": 70,
    }  # fmt: skip
    every = steps("all")
    assert all(every[name].limit >= 1.2 * count for name, count in counted.items())
    assert all(every[name].option("--dtype") == "bfloat16" for name in counted)


def test_every_question_is_asked() -> None:
    asked = [name.removeprefix("ask-") for name in steps("all") if name.startswith("ask-")]
    assert asked == list(ask.QUESTIONS)


def test_steps_are_chosen_by_name_or_pattern() -> None:
    assert list(steps("facts", "rivals-*-tuned")) == [
        "facts", "rivals-16-32x64k-tuned", "rivals-128-32x64k-tuned",
    ]  # fmt: skip
    assert list(steps("layers")) == ["layers"], "also one that is not of the first hour"
