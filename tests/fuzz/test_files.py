"""Files from outside, damaged: each is read, or ends in one printable sentence that names what is wrong."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ceiling_cases import ceiling_run
from checkpoint_tensors import values_of
from damage import Data, assert_sentence, attempt, damaged, damaged_bytes, damaged_json, few
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mla import MLAConfig
from mla.bench import results
from mla.bench.cli.main import main
from mla.bench.results.schema import CeilingRun
from mla.bench.workload.grid import points_of
from mla.bench.workload.workload_file import read_workload
from mla.conformance.selection import Xfails
from mla.layer.rope import inverse_frequencies
from mla_backends.triton_ops.tuning import Tile, Tuning, read_tuning, tile_for, write_tuning

__all__ = ["ceiling_run"]

FUZZ = settings.get_profile("fuzz")
RESULT = (Path(__file__).parent / "seeds" / "result.json").read_bytes()
CODES = (0, 1, 4, 5, 6)  # of commands that have read their files


def run(*words: str) -> int:
    """Run a command, which works or says in a sentence what is wrong; all that is printed is printable."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(list(words))
    assert all(line.isprintable() for line in (out.getvalue() + err.getvalue()).split("\n"))
    if code not in CODES:
        assert code == 2, err.getvalue()
        assert out.getvalue() == ""
        assert_sentence(err.getvalue())
    return code


# ---------------------------------------------------------------------------------------------- configs

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
CONFIGS = (
    values_of("tiny"),
    {**values_of("tiny"), "model_type": "minicpm3", "rope_scaling": LONGROPE, "name": "x"},
    {"model_type": "kimi_vl", "text_config": values_of("tiny"), "quantization_config": {"fmt": "e4m3"}},
)


@FUZZ
@given(st.sampled_from(CONFIGS).flatmap(damaged_json))
def test_configs(data: bytes) -> None:
    Path("config.json").write_bytes(data)
    config = attempt(lambda: MLAConfig.named("config.json"))
    if config is not None:
        assert inverse_frequencies(config).isfinite().all()
        assert 0 < config.softmax_scale < float("inf")


# ---------------------------------------------------------------------------------------------- workloads

SCENARIO = {
    "name": "a",
    "mode": "decode",
    "query_lens": ["1*4", 2],
    "history": [0, "5*4"],
    "runs": 3,
    "warmups": 0,
}
SPEC = {"name": "b", "batch_spec": ["4q8s2k_q1", "q2"], "passes": 2, "layers": 2}
WORKLOAD = {
    "about": "x",
    "config": "deepseek-v2-lite",
    "scenario": [{**SCENARIO, "heads": 2, "axes": {"kv": "1..8+1", "dtype": ["bf16"]}}, SPEC],
}


def toml(document: Any) -> str:
    """Return a tree as TOML: its top with a line for each key, the rest inline."""
    if isinstance(document, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(value)}" for key, value in document.items()) + "}"
    if isinstance(document, list):
        return f"[{', '.join(map(toml, document))}]"
    return json.dumps(document).replace("Infinity", "inf").replace("NaN", "nan").replace("null", '""')


def lines(document: Any) -> Data:
    """Return the text of a workload file."""
    keys = document.items() if isinstance(document, dict) else [("scenario", document)]
    return Data("".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in keys).encode())


@FUZZ
@given(damaged(WORKLOAD).map(lines) | damaged_bytes(lines(WORKLOAD)))
def test_workloads(data: bytes) -> None:
    Path("x.toml").write_bytes(data)
    workload = attempt(lambda: read_workload("x.toml"))
    points = attempt(lambda: points_of(workload.scenarios, {})) if workload else None
    for point in points or ():
        assert point.name.isprintable()
        assert min(point.query_lens) > 0 <= min(point.history)


# ---------------------------------------------------------------------------------------------- tunings

TILES = {1: Tile(16, 32, 4, 2), 64: Tile(64, 64, 8, 1, halves=False, programs=2)}


@FUZZ
@given(st.data())
def test_tunings(data: st.DataObject) -> None:
    write_tuning("x.json", Tuning(TILES, TILES), {"card": "H1", "date": "2026-01-01"})
    Path("x.json").write_bytes(data.draw(damaged_json(json.loads(Path("x.json").read_text()))))
    tuning = attempt(lambda: read_tuning("x.json"))
    if tuning is not None:
        assert tuning.source.isprintable()
        assert tile_for(tuning.latent, 40).rows >= 16


# ---------------------------------------------------------------------------------------------- failures

XFAILS = b"# known\nlatent.tiles: it rounds twice\nlatent[my_op-bfloat16]: slow\n*.drawn: no strides\n"


@FUZZ
@given(damaged_bytes(XFAILS))
def test_expected_failures(data: bytes) -> None:
    Path("x.txt").write_bytes(data)
    xfails = attempt(lambda: Xfails.read(Path("x.txt")))
    assert xfails is None or all(map(str.strip, xfails.entries.values()))


# ---------------------------------------------------------------------------------------------- results


def test_the_seed_is_read_by_every_command() -> None:
    Path("x.json").write_bytes(RESULT)
    Path("other.json").write_bytes(RESULT)
    for words in QUICK:
        assert run(*words) in CODES, words


QUICK: Sequence[Sequence[str]] = (
    ("show", "x.json"),
    ("show", "x.json", "--format", "md"),
    ("show", "x.json", "--format", "csv"),
    ("show", "x.json", "--format", "json"),
    ("compare", "other.json", "x.json", "--fail-slower", "3%"),
    ("compare", "x.json", "other.json", "--format", "md"),
    ("export", "x.json", "-o", "x.csv"),
    ("export", "x.json", "--format", "infinimetrics", "-o", "documents"),
)


@settings(FUZZ, max_examples=4 * FUZZ.max_examples)  # what a file may hold contradicts itself in many ways
@example(Data(RESULT.replace(b'"torch_threads": "2"', b'"torch_threads": "' + b"9" * 5000 + b'"')))
@given(damaged_json(json.loads(RESULT)))
def test_results(data: bytes) -> None:
    Path("x.json").write_bytes(data)
    Path("other.json").write_bytes(RESULT)
    *read, _ = [run(*words) in CODES for words in QUICK]  # the last also needs a date
    assert all(read) or not any(read), "one command reads what another refuses"


@few(25)
@given(damaged(json.loads(RESULT)))
def test_reports(tree: Any) -> None:
    Path("x.json").write_text(json.dumps(tree))
    assume(attempt(lambda: results.read(Path("x.json"))))
    Path("other.json").write_bytes(RESULT)
    assert run("report", "x.json", "other.json", "--html", "x.html") == 0


@FUZZ
@given(data=st.data())
def test_ceilings(ceiling_run: CeilingRun, data: st.DataObject) -> None:
    Path("x.json").write_bytes(data.draw(damaged_json(json.loads(results.encode(ceiling_run)))))
    for kind in ("table", "md", "csv", "json"):
        run("show", "x.json", "--format", kind)
