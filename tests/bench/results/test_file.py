"""The result file: a round trip, refusals in one sentence, and all or nothing on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla.bench.results.file import decode, encode, write
from mla.bench.results.schema import SCHEMA_VERSION, Run
from mla.command.files import check_writable
from mla.errors import ResultError

MakeRun = Callable[..., Run]


def test_a_run_survives_the_round_trip_with_every_digit(make_run: MakeRun) -> None:
    run = make_run(samples=[0.1 + 0.2, 1 / 3, 1e-9, 123456789.123456789])
    assert decode(encode(run)) == run


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema_version": "one"}, "Expected `int`, got `str` - at `$.schema_version`"),
        ({"cases": [{}]}, "Object missing required field `scenario` - at `$.cases[0]`"),
        ({"cases": None}, "Expected `array`, got `null` - at `$.cases`"),
        ({"backend": {}}, "Object missing required field `name` - at `$.backend`"),
    ],
)
def test_a_fault_is_named_with_its_place(make_run: MakeRun, change: dict[str, Any], expected: str) -> None:
    document = {**msgspec.json.decode(encode(make_run())), **change}
    with pytest.raises(ResultError) as refused:
        decode(msgspec.json.encode(document))
    assert str(refused.value) == f"not a result file: {expected}."


def test_a_file_of_version_1_loads_with_what_it_did_not_say(make_run: MakeRun) -> None:
    document = msgspec.json.decode(encode(make_run()))
    document["schema_version"] = 1
    for case in document["cases"]:
        for name in ("base", "point", "dtype", "heads", "layers", "op", "timings", "stages"):
            del case[name]
    run = decode(msgspec.json.encode(document))
    assert run.schema_version == 1
    assert [case.base for case in run.cases] == [case.scenario for case in run.cases]
    assert {case.dtype for case in run.cases} == {run.dtype}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_throughput_of_an_older_file_is_made_again(make_run: MakeRun, version: int) -> None:
    """It was that of the median pass: here 57 124 tokens a second, where 192 take 9.98 ms on average."""
    run = make_run([1.56, 18.35, 18.24, 1.85, 1.56, 18.31], query_lens=[96, 96])
    rate = run.cases[0].tokens_per_s
    assert rate is not None
    run.schema_version, rate.median = version, 57_124.0
    throughput = decode(encode(run)).cases[0].tokens_per_s
    assert throughput is not None
    assert throughput.median == pytest.approx(1e3 * 192 * 6 / 59.87)


@pytest.mark.parametrize("samples", [[0.0] * 6, []])
def test_the_throughput_of_an_older_file_stays_where_samples_do_not_tell(
    make_run: MakeRun, samples: list[float]
) -> None:
    run = make_run()
    run.schema_version, (case,) = 3, run.cases
    assert case.latency_ms is not None
    case.latency_ms = msgspec.structs.replace(case.latency_ms, samples=samples) if samples else None
    assert decode(encode(run)) == run


def test_a_file_of_a_newer_version_is_refused(make_run: MakeRun) -> None:
    document = {**msgspec.json.decode(encode(make_run())), "schema_version": 99, "cases": "anything"}
    said = f"schema version 99, but this mla reads only up to {SCHEMA_VERSION}"
    with pytest.raises(ResultError, match=said):
        decode(msgspec.json.encode(document))


def test_write_replaces_a_file_whole(tmp_path: Path, make_run: MakeRun) -> None:
    path = tmp_path / "run.json"
    path.write_text("old " * 100000)
    write(make_run(), path)
    assert decode(path.read_bytes()) == make_run()
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, make_run: MakeRun) -> None:
    path = tmp_path / "run.json"
    path.mkdir()  # as if somebody made it during the run
    with pytest.raises(ResultError, match=r"^cannot write '.*run\.json': [^\n]+\.$"):
        write(make_run(), path)
    assert os.listdir(tmp_path) == ["run.json"]
    assert os.listdir(path) == []


def test_a_result_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path, make_run: MakeRun) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    run = make_run()
    run.argv = ["\udcff"]
    with pytest.raises(UnicodeEncodeError):
        write(run, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_check_writable_refuses_what_no_file_can_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "pipe": "it is a pipe that no process reads from",
        "n" * 300: "File name too long",
    }.items():
        with pytest.raises(ResultError) as refused:
            check_writable(tmp_path / name)
        assert str(refused.value) == f"cannot write '{tmp_path / name}': {reason}."
