"""Files from outside, damaged: each is read, or ends in one printable sentence that names what is wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ceiling_cases import ceiling_run
from checkpoint_tensors import values_of
from damage import Data, assert_sentence, attempt, damaged, damaged_bytes, damaged_json, few
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from kept_calls import EVERY_KIND, watched_call

from mla import MLAConfig
from mla.bench import results
from mla.bench.cli.main import main
from mla.bench.results.schema import CeilingRun
from mla.bench.workload.grid import points_of
from mla.bench.workload.workload_file import read_workload
from mla.cases import KINDS
from mla.conformance.selection import Xfails
from mla.failures.file import KEY, NAME, Origin, read, replay, write_call
from mla.layer.rope import inverse_frequencies
from mla_backends.testing import HostBackend
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


@functools.cache
def kept(kind: str, cache_format: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the document and the tensors of a call that was kept."""
    small = {"num_heads": 2} if "num_heads" in KINDS[kind].usual else {}
    origin = Origin(backend="host", options=[], device="cpu", command="again", where="here", reason="wrong")
    write_call(Path(), watched_call(kind, cache_format, **small), origin)
    with safetensors.safe_open(NAME, framework="pt") as file:
        document = json.loads(file.metadata()[KEY])
    return document, safetensors.torch.load(Path(NAME).read_bytes())


def spoilt(draw: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> None:
    """Replace one tensor by one of another shape, dtype or content."""
    name = draw(st.sampled_from(sorted(tensors)))
    held = tensors[name]
    kinds = ("drop", "narrow", "flat", "empty", "dtype", "low", "high")
    kind = draw(st.sampled_from(kinds))
    most = 2**30 if held.dtype in (torch.int32, torch.int64) else 1
    changed = {
        "narrow": lambda: held.narrow(-1, 0, max(1, held.shape[-1] - 1)),
        "flat": held.flatten,
        "empty": lambda: held[:0],
        "dtype": lambda: held.to(draw(st.sampled_from((torch.int32, torch.int64, torch.float32)))),
        "low": lambda: held - most,
        "high": lambda: held + most,
    }
    tensors.pop(name)
    if kind != "drop":
        tensors[name] = changed[kind]().contiguous()


@settings(FUZZ, max_examples=4 * FUZZ.max_examples)
@given(st.sampled_from(EVERY_KIND), st.data())
def test_kept_failures(kind: tuple[str, str], data: st.DataObject) -> None:
    """A replay of one is a verdict or a sentence, and takes no more memory than its tensors bear."""
    document, tensors = kept(*kind)
    if data.draw(st.booleans()):
        document = {**document, "call": data.draw(damaged(document["call"]))}
    else:
        spoilt(data.draw, tensors := dict(tensors))
    words = {KEY: json.dumps(document, ensure_ascii=True)}
    Path(NAME).write_bytes(safetensors.torch.save(tensors, words))
    if data.draw(st.integers(0, 3)) == 0:
        Path(NAME).write_bytes(data.draw(damaged_bytes(Path(NAME).read_bytes())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mla_backends.host.memory_available", lambda: 64 << 20)
        failure = attempt(lambda: read(Path()))
        if failure is not None and failure.document.call is not None:
            attempt(lambda: replay(failure, HostBackend(), "reference"))


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
