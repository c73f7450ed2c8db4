"""Workload files: what they mean, and one sentence for everything that is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla.bench.workload.scenario import MAX_COUNT, MAX_REQUESTS, Scenario
from mla.bench.workload.workload_file import parse_lengths, read_workload, select
from mla.errors import UsageError

LENGTHS = st.integers(0, 10**6)
RUNS = st.tuples(LENGTHS, st.integers(1, 50))
GOOD = {"name": '"a"', "mode": '"decode"', "query_lens": "[1]", "history": "[3]"}


def table(**changes: str) -> str:
    """Return one [[scenario]] table; an empty value leaves the key out."""
    lines = [f"{key} = {value}" for key, value in {**GOOD, **changes}.items() if value]
    return "\n".join(["[[scenario]]", *lines, ""])


def sentence(path: Path, text: str | bytes) -> str:
    """Return the one line that refuses a workload file."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as refused:
        read_workload(str(path))
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert str(path) in message
    return message


def test_the_shipped_workload_is_the_two_standard_scenarios() -> None:
    prefill, decode = read_workload("standard").scenarios
    assert (prefill.name, prefill.mode) == ("prefill", "prefill")
    assert prefill.query_lens == (64, 128, 256, 256)
    assert prefill.history == (512, 0, 0, 256)
    assert prefill.rounds * prefill.steps == 100
    assert (decode.name, decode.mode) == ("decode", "decode")
    assert decode.query_lens == (1,) * 16
    assert decode.history == (50,) * 4 + (100,) * 4 + (200,) * 4 + (400,) * 4
    assert (decode.steps, decode.rounds) == (100, 6)
    assert decode.final_lens == tuple(length + 100 for length in decode.history)


@given(runs=st.lists(RUNS, max_size=20), lengths=st.lists(LENGTHS, max_size=20))
def test_a_starred_item_stands_for_that_many_lengths(runs: list[tuple[int, int]], lengths: list[int]) -> None:
    starred = [f"{length}*{count}" for length, count in runs]
    expected = (*(length for length, count in runs for _ in range(count)), *lengths, *lengths)
    assert parse_lengths([*starred, *lengths, *map(str, lengths)]) == expected


@given(item=st.one_of(st.floats(), st.booleans(), st.none(), st.dates(), st.text(alphabet="ab*. x")))
def test_anything_else_is_refused(item: object) -> None:
    with pytest.raises(ValueError, match="is neither a length nor"):
        parse_lengths([item])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": ""}, "scenario '?': it has no name."),
        ({"history": "", "mode": ""}, "it has no mode and no history."),
        ({"name": "5"}, "scenario 5: Expected `str`, got `int` - at `$.name`"),
        ({"name": '" "'}, "' ' is not a valid name: use one line of text"),
        ({"name": r'"a\nb"'}, r"'a\nb' is not a valid name: use one line of text"),
        ({"mode": '"train"'}, "Invalid enum value 'train' - at `$.mode`"),
        ({"query_lens": "[0]"}, "query_lens must be positive, got 0"),
        ({"history": "[-1]"}, "history must not be negative, got -1"),
        ({"query_lens": "[1, 2]"}, "query_lens has 2 requests, history 1"),
        ({"query_lens": "[]", "history": "[]"}, "query_lens is empty"),
        ({"query_lens": "[1.5]"}, '1.5 is neither a length nor "length*count"'),
        ({"query_lens": '["4*x"]'}, "'4*x' is neither a length nor"),
        *(
            ({"query_lens": f'["1*{count}"]'}, f"'1*{count}' must repeat between 1 and 65536 times")
            for count in (0, -1, MAX_REQUESTS + 1, 99999999999999)
        ),
        ({"history": "[2147483647]"}, f"no request may grow beyond {MAX_COUNT} tokens"),
        ({"history": f"[{'9' * 400}]"}, f"no request may grow beyond {MAX_COUNT} tokens"),
        ({"runs": "0"}, "Expected `int` >= 1 - at `$.runs`"),
        ({"runs": "9999999999999"}, "Expected `int` <= 2147483647 - at `$.runs`"),
        ({"rnus": "5"}, "unknown key 'rnus'. Did you mean 'runs'? Choose from: name, mode, query_lens, hi"),
    ],
)
def test_every_mistake_in_a_scenario_is_named(tmp_path: Path, changes: dict[str, str], expected: str) -> None:
    assert expected in sentence(tmp_path / "w.toml", table(**changes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = [", "is not valid TOML: "),
        ("x = " + "[" * 20000, "is not valid TOML: "),
        (f"x = {'9' * 5000}", "is not valid TOML: "),
        (b"\xff\xfe", "cannot read workload"),
        ("", "Object missing required field `scenario`; it needs [[scenario]] tables"),
        ("scenario = 5", "Expected `array`, got `int` - at `$.scenario`"),
        ("scenario = []", "needs at least one scenario, each with a unique name"),
        (2 * table(), "needs at least one scenario, each with a unique name"),
        ("runs = 5\n" + table(), "Object contains unknown field `runs`"),
    ],
)
def test_every_mistake_in_a_file_is_named(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert expected in sentence(tmp_path / "w.toml", text)


@pytest.mark.parametrize("source", ["nothing.toml", ".", "", "n" * 300])
def test_a_file_that_cannot_be_read_is_named(source: str) -> None:
    with pytest.raises(UsageError, match=r"^cannot read workload '.*': [^\n]+\.$"):
        read_workload(source)


def test_select_keeps_the_asked_order_and_asks_once() -> None:
    scenarios = read_workload("standard").scenarios
    prefill, decode = scenarios
    assert select(scenarios, []) == [prefill, decode]
    assert select(scenarios, ["decode", "prefill", "decode"]) == [decode, prefill]


@given(runs=st.integers(1, 500), passes=st.integers(1, 60))
def test_a_prefill_never_runs_less_than_asked_nor_an_empty_pass(runs: int, passes: int) -> None:
    scenario = Scenario(name="a", mode="prefill", query_lens=(1,), history=(0,), runs=runs, passes=passes)
    assert runs <= scenario.rounds * scenario.steps < runs + scenario.rounds
    assert scenario.rounds <= passes


def test_decode_lengths_grow_with_each_step_and_prefill_lengths_do_not() -> None:
    lengths = {"query_lens": (1, 2), "history": (5, 0), "runs": 3}
    decode = Scenario(name="a", mode="decode", **lengths)  # type: ignore[arg-type]
    prefill = Scenario(name="a", mode="prefill", **lengths)  # type: ignore[arg-type]
    assert [decode.kv_lens(step) for step in range(3)] == [(6, 2), (7, 4), (8, 6)]
    assert decode.final_lens == (8, 6)
    assert [prefill.kv_lens(step) for step in range(3)] == [(6, 2)] * 3
    assert prefill.final_lens == (6, 2)
