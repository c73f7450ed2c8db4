"""The command line that a result gives for each case: it measures the same again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mla.bench import results

Bench = Callable[..., Any]
CPU = ("--backend", "cpu", "--threads", "1", "--implementations", "mla")
VIRTUAL = ("--backend", "fake-virtual-clock")


def read(path: str) -> results.Run:
    return results.decode(Path(path).read_bytes())


def test_the_repro_line_reruns_the_case(bench: Bench, small: list[str]) -> None:
    options = "--seed 5 --attention expanded -O script=5,7 --passes 3 --warmups 0"
    bench(*VIRTUAL, *small, *options.split(), "-o", "first.json", fakes=["virtual_clock"])
    for case in read("first.json").cases:
        python, flag, module, *words = shlex.split(case.repro)
        assert (python, flag, module) == ("python", "-m", "mla.bench")
        assert bench(*words, "-o", "again.json").code == 0
        (again,) = read("again.json").cases
        again.memory.peak_bytes = case.memory.peak_bytes
        again.plan_ms = case.plan_ms
        again.roofline = case.roofline  # the limits were measured once more meanwhile
        assert again == case


def test_the_repro_line_repeats_every_option_that_was_given(bench: Bench, small: list[str]) -> None:
    options = ["--device", "0", "--dtype", "float32", "--page-size", "1", "--ops", "reference", "--runs", "3"]
    bench(*CPU, *small, *options, "--passes", "1", "-o", "run.json")
    for case in read("run.json").cases:
        assert shlex.join(options[:2]) in case.repro
        assert all(shlex.join(options[place : place + 2]) in case.repro for place in range(0, 10, 2))
        assert "--threads 1" in case.repro
        assert case.repro.endswith(f"--scenario {case.scenario} --implementations mla")
