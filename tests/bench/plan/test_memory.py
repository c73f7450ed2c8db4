"""The memory a run needs: of every layer, and refused before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mla
from mla.bench.plan.request import plan_scenarios
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.workload.grid import Point
from mla.weights import random_state_dict

Bench = Callable[..., Any]
CPU = ("--backend", "cpu", "--threads", "1", "--implementations", "mla")


def test_the_memory_plan_counts_every_layer() -> None:
    config, backend = mla.MLAConfig.preset("deepseek-v2-lite"), mla.load_backend("cpu", threads=1)
    setting = Setting(config, backend, torch.bfloat16, "auto", 64, 0)
    lengths = {"query_lens": (1,) * 16, "history": (1000,) * 16}
    points = [
        Point(name=f"{layers}", base="d", mode="decode", runs=10, layers=layers, **lengths)
        for layers in (1, 5)
    ]
    one, five = (plan.memory for plan in plan_scenarios(setting, points, ["mla"])[0])
    layer = MlaLayer(setting, random_state_dict(config))
    assert five.per_implementation - one.per_implementation >= 4 * layer.weight_bytes()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_run_that_cannot_fit_is_refused_before_it_allocates(
    bench: Bench, small: list[str], dry: list[str]
) -> None:
    Path("huge.toml").write_text(Path("tiny.toml").read_text().replace("[5, 9]", "[5, 2000000000]"))
    huge = ("--config", "tiny.json", "--workload", "huge.toml")
    done = bench(*CPU, *huge, "--scenario", "decode", *dry)
    assert (done.code, done.out) == (2, "")
    sentence = (
        r"error: this run needs about [\d.]+ GiB, which are [\d.]+ GiB on the device and [\d.]+ GiB on the "
        r"host; available are [\d.]+ GiB: use fewer requests, shorter histories or a smaller config\."
    )
    assert re.fullmatch(sentence, done.error)
