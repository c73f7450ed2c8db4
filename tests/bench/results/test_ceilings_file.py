"""A file of ceilings: a round trip, refusals in one sentence, and shares of the declared peaks."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mla.bench import results
from mla.bench.cli import stored
from mla.bench.results.file import decode_any
from mla.bench.results.schema import CeilingRun
from mla.errors import ResultError


def test_the_share_of_the_declared_peak_is_of_the_same_work_beyond_the_cache(ceiling_run: CeilingRun) -> None:
    assert list(map(ceiling_run.fraction, ceiling_run.measured)) == [None, 0.75, 0.5, 0.25, None]


def test_ceilings_survive_the_round_trip_and_faults_are_named(
    ceiling_run: CeilingRun, tmp_path: Path
) -> None:
    data = results.encode(ceiling_run)
    assert decode_any(data) == ceiling_run
    document = msgspec.json.decode(data)
    for change, expected in (
        ({"measured": [{}]}, "Object missing required field `work` - at `$.measured[0]`"),
        ({"backend": 1}, "Expected `object`, got `int` - at `$.backend`"),
    ):
        (tmp_path / "bad.json").write_bytes(msgspec.json.encode({**document, **change}))
        with pytest.raises(ResultError) as refused:
            stored.stored(tmp_path / "bad.json", "table")
        assert str(refused.value) == f"'{tmp_path / 'bad.json'}' is not a result file: {expected}."
    with pytest.raises(ResultError, match="schema version 9, but this mla reads only up to 1"):
        decode_any(msgspec.json.encode({**document, "schema_version": 9}))
