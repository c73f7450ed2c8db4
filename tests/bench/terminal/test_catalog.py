"""`list --configs`: every preset with its numbers and the place they were read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mla import MLAConfig
from mla.config.presets import PRESETS

Bench = Callable[..., Any]


def test_the_table_has_a_line_per_preset_and_ends_with_its_source(bench: Bench) -> None:
    done = bench("list", "--configs")
    assert (done.code, done.err) == (0, "")
    header, *lines = done.out.splitlines()
    assert header.split() == ["name", "hidden", "heads", "q_lora", "latent", "nope/v", "rotation", "source"]
    assert [line.split()[0] for line in lines] == list(PRESETS)
    for line, preset in zip(lines, PRESETS.values(), strict=True):
        assert line.endswith("  " + preset.source)
        assert line.index(preset.source) == header.index("source")
    rows = {line.split()[0]: line.split("  https:")[0].split() for line in lines}
    assert " ".join(rows["deepseek-v2-lite"][1:]) == "2048 16 - 512+64 128/128 theta 10000 yarn 40"
    assert " ".join(rows["minicpm3-4b"][1:]) == "2560 40 768 256+32 64/64 half-split theta 10000 longrope"
    assert rows["longcat-flash"][-2:] == ["theta", "10000000"]
    assert rows["kimi-linear-48b"][-1] == "none"


def test_json_holds_whole_configs_for_machines(bench: Bench) -> None:
    done = bench("list", "--configs", "--json")
    assert (done.code, done.err) == (0, "")
    found = {record["name"]: record for record in json.loads(done.out)}
    assert list(found) == list(PRESETS)
    assert found["kimi-k2"]["rope_scaling"]["factor"] == 32.0
    assert found["glm-4.7-flash"]["checkpoint"] == "zai-org/GLM-4.7-Flash"
    for name, one in found.items():
        assert one["softmax_scale"] == MLAConfig.preset(name).softmax_scale
        assert one["source"].startswith("https://")


def test_it_needs_no_torch(process: Bench) -> None:
    """Naming configs must work where the vendor's torch is not installed yet."""
    blocker = "import sys; sys.modules['torch'] = None; "
    code = blocker + "from mla.bench.cli.main import main; sys.exit(main(['list', '--configs']))"
    done = process(flags=("-c", code))
    assert done.code == 0
    assert "deepseek-r1" in done.out
