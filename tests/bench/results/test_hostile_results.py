"""Hostile result files: impossible numbers, contradictions, and text that would act on a terminal.

Whatever a file holds, a command either works or says in one sentence what is wrong with the file. Damage
of any kind is drawn in `tests/fuzz`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla.bench import results
from mla.bench.results.file import decode_any
from mla.bench.results.schema import CeilingRun
from mla_backends.outside import escaped

MakeRun = Callable[..., results.Run]
Bench = Callable[..., Any]
Document = dict[str, Any]

STORED = sorted((Path(__file__).parents[3] / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="session")
def document(make_run: MakeRun) -> Document:
    """Return a valid file that has every part a file can have."""
    run = make_run([2.0, 1.0, 3.0, 2.0, 2.0, 2.5, 1.5], timings=[_timing()], stages=[_stage()], heads=4)
    (case,) = run.cases
    assert case.latency_ms is not None
    case.latency_ms.drift, case.latency_ms.outliers = 0.01, 1
    case.roofline = results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory", peak_source="measured")
    case.new_lengths = results.NewLengths(
        forwards=9, ms=2.0, repeated_ms=1.9, plan_ms=0.2, repeated_plan_ms=0.1
    )
    case.agreement = [
        results.Agreement(implementation="mla-reference", relative_difference=1e-3, speed_ratio=2.0)
    ]
    case.point, case.device_state = {"kv": 4}, [{"when": "before", "clock": "1 MHz"}]
    run.cases += make_run([4.0] * 7, implementation="mla-reference", point={"kv": 4}).cases
    run.ceilings = [results.Ceiling(work="read", value=1e11, source="measured", lowest=9e10)]
    run.plan = results.Plan(
        options=["--seed", "0"], scenarios=["prefill"], implementations=["mla"], digest="0"
    )
    parsed: Document = msgspec.json.decode(results.encode(run))
    return parsed


def _timing() -> results.Timing:
    latency = results.Latency(median=2.0, ci95=(1.0, 3.0), p10=1.2, p90=2.8, samples=[1.0, 2.0, 3.0])
    check = results.Check(status="ok")
    return results.Timing(mode="graph", cache="warm", clock="host", passes=3, check=check, latency_ms=latency)


def _stage() -> results.Stage:
    return results.Stage(name="o_proj", ms=0.5, cost=results.Cost(flops=1, bytes=1))


def changed(document: Document, path: str, value: Any) -> Document:
    """Return a copy in which the field at a path such as `cases.0.passes` has another value."""
    copied = copy.deepcopy(document)
    *folders, last = path.split(".")
    place: Any = copied
    for name in folders:
        place = place[int(name) if isinstance(place, list) else name]
    place[int(last) if isinstance(place, list) else last] = value
    return copied


def test_the_document_is_valid(document: Document) -> None:
    assert len(results.decode(json.dumps(document).encode()).cases) == 2


BEYOND_64_BITS, SUBNORMAL = 10**30, 5e-324
LATENCY = "cases.0.latency_ms"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((f"{LATENCY}.median", value) for value in (0, 1e999, None)),
        (f"{LATENCY}.ci95", [-1, 2]),
        (f"{LATENCY}.samples", []),
        ("cases.0.passes", -3),
        *(("cases.0.query_lens", value) for value in ([], [BEYOND_64_BITS, 1])),
        ("cases.0.cost.flops", 0.5),
        ("cases.0.check.status", "fine"),
        ("schema_version", 0),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(
    document: Document, bench: Bench, path: str, value: Any
) -> None:
    Path("x.json").write_text(json.dumps(changed(document, path, value)).replace("Infinity", "1e999"))
    done = bench("show", "x.json")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: 'x.json' is not a result file: ")
    place = re.search(r"at `\$\.?([^`]*)`\.\n$", done.err)
    assert place is not None, done.err
    assert path.split(".")[0] in place[1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"config":' * 10**5,
        b'{"schema_version": NaN}',
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b'{"\x1b[31m": 1',
        b"PK\x03\x04",
    ],
)
def test_what_is_no_json_of_ours_is_refused_in_a_sentence(bench: Bench, data: bytes) -> None:
    Path("x.json").write_bytes(data)
    for words in (
        ("show", "x.json"),
        ("compare", "x.json", "x.json"),
        ("report", "x.json", "--html", "x.html"),
    ):
        assert_one_sentence(bench(*words))


def assert_one_sentence(done: Any) -> None:
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith(
        ("error: 'x.json' is not a ", "error: 'x.json' is a result file of schema ")
    ), done
    assert done.err.count("\n") == 1
    assert escaped(done.err[:-1]) == done.err[:-1]


OF_CASES = "scenario base implementation repro check.reason clock ops timings.0.method stages.0.name"


@pytest.mark.parametrize(
    "path",
    [
        *(f"cases.0.{name}" for name in (*OF_CASES.split(), "agreement.0.implementation")),
        *("backend.device", "environment", "argv", "config", "ceilings.0.source"),
    ],
)
@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\nb", "a\u2028b", "\u202egnp", "a\rb", "\x9b31m"])
def test_text_from_a_file_is_escaped_everywhere(
    document: Document, ceiling_run: CeilingRun, path: str, text: str
) -> None:
    shapes: dict[str, Any] = {"cases.0.ops": {text: text}, "environment": {text: text}, "argv": [text]}
    shapes["config"] = {text: [text, {"deep": text}]}
    ceiling_run.backend.device = ceiling_run.measured[0].source = text
    data = json.dumps(changed(document, path, shapes.get(path, text))).encode()
    for stored in (results.decode(data), decode_any(results.encode(ceiling_run))):
        assert all(string.isprintable() for string in strings(msgspec.to_builtins(stored)))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_of_every_version_still_load(path: Path, bench: Bench) -> None:
    """Also those of versions 1 and 2, with everything that newer columns and lines need."""
    assert results.read(path).schema_version in (1, 2, 3, 4)
    for kind in ("table", "md", "csv", "json"):
        assert bench("show", str(path), "--format", kind).code == 0
    assert bench("compare", str(path), str(path)).code == 0


@pytest.mark.parametrize("words", [("compare",), ("report", "--html", "x.html")])
def test_another_file_of_this_program_is_named(
    bench: Bench, document: Document, ceiling_run: CeilingRun, words: tuple[str, ...]
) -> None:
    Path("good.json").write_text(json.dumps(document))
    Path("x.json").write_bytes(results.encode(ceiling_run))
    command, *options = words
    for files in (("x.json", "good.json"), ("good.json", "x.json")):
        done = bench(command, *files, *options)
        assert (done.code, done.err) == (
            2,
            "error: 'x.json' is not a result file: it holds ceilings; `mla-bench show` prints them.\n",
        )
    Path("x.json").write_text('{"schema_version": 3, "checks": []}')
    assert "it holds a report of `mla-conformance`" in bench(command, "x.json", "good.json", *options).err


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("measured.0.value", 0),
        ("declared.0.value", SUBNORMAL),
        ("measured.0.footprint_bytes", -1),
        ("schema_version", 0),
    ],
)
def test_impossible_ceilings_are_refused(
    ceiling_run: CeilingRun, bench: Bench, path: str, value: Any
) -> None:
    document: Document = msgspec.json.decode(results.encode(ceiling_run))
    Path("x.json").write_text(json.dumps(changed(document, path, value)))
    assert_one_sentence(bench("show", "x.json"))
