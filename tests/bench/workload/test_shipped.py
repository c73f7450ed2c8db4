"""The shipped workloads: all are listed, described and as published."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from mla.bench.cli.devices import shipped_workloads, workloads_table
from mla.bench.workload.grid import op_of_batch, points_of
from mla.bench.workload.scenario import Scenario
from mla.bench.workload.workload_file import PRESETS, read_workload
from mla.config import MLAConfig
from mla.errors import UsageError

PUBLISHED = [name for name in PRESETS if name not in ("smoke", "standard", "full", "sparse", "sparse-layer")]
TABLE = "[[scenario]]\nbatch_spec = {}\n"


def test_every_file_is_a_preset() -> None:
    files = resources.files("mla.bench.workload").iterdir()
    assert sorted(Path(str(file)).stem for file in files if str(file).endswith(".toml")) == sorted(PRESETS)


def test_the_list_names_each_with_a_line_and_a_source() -> None:
    by_name = {workload["name"]: workload for workload in shipped_workloads()}
    assert list(by_name) == list(PRESETS)
    assert all(facts["about"] and "\n" not in facts["about"] for facts in by_name.values())
    for source in (by_name[name]["source"] for name in PUBLISHED):
        assert re.match(r"https://github\.com/[\w-]+/[\w-]+/blob/[0-9a-f]{40}/", source)
    lines = workloads_table().splitlines()
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == list(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_workload_fits_its_own_config(name: str) -> None:
    """Heads of a grid are a tensor-parallel rank's; a kernel alone may have any number."""
    workload = read_workload(name)
    assert workload.config
    config = MLAConfig.preset(workload.config)
    for point in points_of(workload.scenarios, {}):
        assert point.batch_spec
        assert point.base.endswith(point.batch_spec)
        heads = point.heads or config.num_attention_heads
        assert workload.op or config.num_attention_heads % heads == 0
        assert workload.op or point.heads is None or "heads" in point.point, "or nobody checks it"


def test_the_production_mix_is_one_list_at_three_geometries() -> None:
    mixes = [name for name in PRESETS if name.startswith("production-mix")]
    lists = {name: {scenario.batch_spec for scenario in read_workload(name).scenarios} for name in mixes}
    assert len(lists) == 3
    assert len(lists["production-mix"]) == 26
    assert all(specs == lists["production-mix"] for specs in lists.values())
    heads = {name: {point.heads for point in points_of(read_workload(name).scenarios, {})} for name in mixes}
    assert heads == {
        "production-mix": {16},
        "production-mix-mistral-small-4": {16},
        "production-mix-kimi-k3": {96, 12},
    }


def test_a_list_of_specs_makes_a_scenario_of_each(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('config = "kimi-k2"\n' + TABLE.format('["q4s8", "2q1"]') + 'name = "mine"\nruns = 7\n')
    workload = read_workload(str(path))
    assert workload.config == "kimi-k2"
    first, second = workload.scenarios
    assert (first.name, first.query_lens, first.history, first.runs) == ("mine q4s8", (4,), (4,), 7)
    assert (second.name, second.query_lens, second.history, second.runs) == ("mine 2q1", (1, 1), (0, 0), 7)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (TABLE.format('"q1s"'), "batch spec 'q1s': segment 1, 'q1s' (character 1), is not "),
        (TABLE.format("7"), 'batch_spec takes a text such as "16q1s4k", or a list of them, got 7.'),
        (TABLE.format('["q1", 7]'), "or a list of them, got ['q1', 7]."),
        (TABLE.format("[]"), "or a list of them, got []."),
        (TABLE.format('"q1"') + "querylens = 1", "'querylens'. Choose from: name, runs, passes, warmups, "),
        (TABLE.format('["q1", "q1"]'), "each with a unique name"),
        (TABLE.format('"q1"') + 'mode = "decode"', "a batch_spec says what 'mode' would: leave 'mode' out."),
        (TABLE.format('"q1"') + "history = [1]", "a batch_spec says what 'history' would"),
        (TABLE.format('"q1"') + "name = 3", "Expected `str`, got `int`"),
        ("config = 3\n" + TABLE.format('"q1"'), "Expected `str | null`, got `int`"),
        ("scenarios = []\n" + TABLE.format('"q1"'), "unknown field `scenarios`"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_workload(str(path))
    assert sentence in str(refused.value)
    assert str(refused.value).startswith(f"workload '{path}'")


def test_a_path_of_a_config_starts_at_the_folder_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner" / "model").mkdir(parents=True)
    path = tmp_path / "inner" / "mine.toml"
    for config, expected in {
        "one.json": "inner/one.json",
        "../one.json": "inner/../one.json",
        "model": "inner/model",
        "/elsewhere/one.json": "/elsewhere/one.json",
        "kimi-k2": "kimi-k2",
    }.items():
        path.write_text(f'config = "{config}"\n' + TABLE.format('"q1"'))
        monkeypatch.chdir(tmp_path)
        assert read_workload("inner/mine.toml").config == expected
        monkeypatch.chdir(path.parent)
        assert read_workload("mine.toml").config == expected.removeprefix("inner/")


def test_an_op_takes_the_lengths_of_specs_of_one_layer() -> None:
    with pytest.raises(UsageError, match="scenario 'prefill' has none"):
        op_of_batch("linear", read_workload("standard").scenarios[0], None)
    deep = Scenario(name="q1", mode="prefill", query_lens=(1,), history=(0,), batch_spec="q1", layers=2)
    with pytest.raises(UsageError, match="scenario 'q1' has layers = 2, and linear is timed alone: "):
        op_of_batch("linear", deep, None)
