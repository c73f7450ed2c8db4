"""`list --configs`: every preset with its numbers and the place they were read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from mla import MLAConfig
from mla.config.presets import PRESETS

Bench = Callable[..., Any]


COLUMNS = ["name", "hidden", "heads", "q_lora", "latent", "nope/v", "source"]


def test_the_table_has_a_line_per_preset_and_ends_with_its_source(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = bench("list", "--configs")
    assert (done.code, done.err) == (0, "")
    header, *lines = done.out.splitlines()
    assert header.split() == COLUMNS
    assert [line.split()[0] for line in lines] == list(PRESETS)
    for line, preset in zip(lines, PRESETS.values(), strict=True):
        assert line.index("  " + preset.checkpoint) == header.index("  source")
        assert line.endswith(preset.checkpoint)
    rows = {line.split()[0]: line[: header.index("source")].split() for line in lines}
    assert " ".join(rows["deepseek-v2-lite"][1:]) == "2048 16 - 512+64 128/128"
    assert " ".join(rows["minicpm3-4b"][1:]) == "2560 40 768 256+32 64/64"


@pytest.mark.parametrize("option", ["--configs", "--workloads"])
def test_a_list_fits_the_width_and_cuts_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    cells = []
    for wide in (90, 300):
        monkeypatch.setenv("COLUMNS", str(wide))
        table = bench("list", option).out
        assert max(map(len, table.splitlines())) <= wide
        cells.append(sorted("".join(table.split())))
    assert cells[0] == cells[1]


def test_json_holds_whole_configs_for_machines(bench: Bench) -> None:
    done = bench("list", "--configs", "--json")
    assert (done.code, done.err) == (0, "")
    by_name = {record["name"]: record for record in json.loads(done.out)}
    assert list(by_name) == list(PRESETS)
    assert by_name["kimi-k2"]["rope_scaling"]["factor"] == 32.0
    assert by_name["glm-4.7-flash"]["checkpoint"] == "zai-org/GLM-4.7-Flash"
    for name, preset in by_name.items():
        assert preset["softmax_scale"] == MLAConfig.preset(name).softmax_scale
        assert preset["source"].startswith("https://")
