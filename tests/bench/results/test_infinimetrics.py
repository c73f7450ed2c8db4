"""`export --format infinimetrics`, read as InfiniMetrics reads it.

The rules below are what its importer, its executor and its dashboard do with a document, at commit 9facb015
of github.com/InfiniTensor/InfiniMetrics (db/utils.py, db/importer.py, infinimetrics/executor.py,
dashboard/utils/data_utils.py, dashboard/pages/operator.py): it publishes no JSON schema.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.results.infinimetrics import documents, file_name
from mla.bench.results.schema import Run, Timing

Bench = Callable[..., Any]
MakeRun = Callable[..., Run]
Document = dict[str, Any]

CATEGORIES = ("hardware", "operator", "infer", "comm", "train")
ACCELERATOR = dict.fromkeys(("model", "driver", "cuda", "type"), str)
ACCELERATOR |= {"count": int, "memory_gb_per_card": int}


def faults(document: Document) -> list[str]:
    """Return what its importer or a page of its dashboard would stumble over."""
    required = {"run_id": str, "testcase": str, "config": dict, "metrics": list, "time": str}
    misfits = [key for key, kind in required.items() if not isinstance(document.get(key), kind)]
    if misfits:
        return misfits
    parts = document["testcase"].split(".")
    if len(parts) != 3 or parts[0] not in CATEGORIES or not all(parts):
        misfits.append("testcase: <category>.<framework>.<test_name>")
    datetime.datetime.strptime(document["time"], "%Y-%m-%d %H:%M:%S")
    code = document.get("result_code")
    if type(code) is not int or (code != 0) != bool(document.get("error_msg")):
        misfits.append("result_code: 0, or another number and an error_msg")
    if "output_dir" in document["config"]:
        misfits.append("config.output_dir would move where it looks for files")
    return (
        misfits
        + environment_faults(document)
        + [fault for each in document["metrics"] for fault in metric(each)]
    )


def environment_faults(document: Document) -> list[str]:
    environment = document.get("environment", {})
    faults = [key for key in ("cluster_scale", "topology", "cluster") if key not in environment]
    for node in environment.get("cluster", []):
        if not all(set(framework) >= {"name", "version"} for framework in node["framework"]):
            faults.append("framework")
        for accelerator in node["machine"]["accelerators"]:
            faults += [key for key, kind in ACCELERATOR.items() if not isinstance(accelerator.get(key), kind)]
    return faults


def metric(record: Document) -> list[str]:
    keys = {"name", "type", "value", "raw_data_url", "unit"}
    if set(record) != keys or record["type"] != "scalar" or record["raw_data_url"] != "":
        return [f"not a scalar: {record}"]
    number = type(record["value"]) in (int, float) and math.isfinite(record["value"])
    verdict = record["name"] == "operator.tensor_accuracy" and record["value"] in ("PASS", "FAIL")
    return [] if number or verdict else [f"value of {record['name']}"]


def shown(document: Document) -> Document:
    """Return what the operator page shows: it looks for words in names, and the last one found counts."""
    by_word: Document = {}
    for metric in document["metrics"]:
        word = next(
            (word for word in ("latency", "flops", "bandwidth", "accuracy") if word in metric["name"]), None
        )
        if word:
            by_word[word] = metric["value"]
    return by_word


def with_timings(make_run: MakeRun, **changes: Any) -> Run:
    run = make_run(**changes)
    (case,) = run.cases
    right: Document = {
        "passes": case.passes,
        "check": results.Check(status="ok"),
        "latency_ms": case.latency_ms,
    }
    case.timings = [
        Timing(mode=mode, cache=cache, clock=clock, **right)
        for mode, cache, clock in (("eager", "cold", "host"), ("graph", "warm", "device"))
    ]
    return run


def test_a_measured_case_is_a_valid_document(make_run: MakeRun) -> None:
    run = with_timings(
        make_run,
        samples=[2.0, 1.0, 3.0, 2.0, 2.5, 1.5, 2.0],
        roofline=results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory"),
    )
    (document,) = json.loads(json.dumps(documents(run)))
    assert faults(document) == []
    assert shown(document) == {"latency": 2.0, "flops": 0.5, "bandwidth": 0.5, "accuracy": "PASS"}
    named = {metric["name"]: (metric["value"], metric["unit"]) for metric in document["metrics"]}
    assert named["operator.time_cold"] == (2.0, "ms")
    assert named["operator.share_of_limit"] == (50.0, "%")
    assert len(named) == len(document["metrics"])
    assert document["config"]["batch_size"] == 2


@pytest.mark.parametrize("status", ["wrong", "doubtful", "not run"])
def test_a_case_without_a_number_fails_and_says_why(make_run: MakeRun, status: Any) -> None:
    run = with_timings(make_run, check=results.Check(status=status, reason="because"))
    run.cases[0].latency_ms = run.cases[0].tokens_per_s = None
    (document,) = documents(run)
    assert faults(document) == []
    assert document["result_code"] != 0
    assert document["success"] == 1
    assert document["error_msg"] == "because"
    assert shown(document) == ({"accuracy": "FAIL"} if status == "wrong" else {})
    assert not [metric for metric in document["metrics"] if metric["unit"]], "a number would have one"


@pytest.mark.parametrize(
    "name", ["summary", "dispatcher_summary 1", "a.b.c", "..", "16q1s4k heads=8", "解码"]
)
def test_no_name_hides_a_result(make_run: MakeRun, name: str) -> None:
    """Files with `summary` in their names are skipped, and dots divide a test case."""
    (document,) = documents(make_run(scenario=name, implementation="mla[linear=my.op]"))
    assert faults(document) == []
    assert not {"summary", "dispatcher"} & set(file_name(document).lower().split("_"))
    assert "/" not in file_name(document)


def test_runs_of_one_time_differ_in_what_the_dashboard_tells_apart(make_run: MakeRun) -> None:
    run = make_run()
    run.cases = [make_run(implementation=name).cases[0] for name in ("mla", "mla-reference", "transformers")]
    exported = documents(run)
    assert len({document["run_id"][:12] for document in exported}) == 3
    assert documents(run) == exported, "a second import finds the same run_id and skips it"


def test_a_run_without_a_date_is_refused_in_a_sentence(bench: Bench, make_run: MakeRun) -> None:
    run = make_run()
    run.created = "yesterday"
    results.write(run, Path("a.json"))
    done = bench("export", "a.json", "--format", "infinimetrics")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: cannot export a run whose `created` is not a time: 'yesterday'.\n"


def two_cases(make_run: MakeRun) -> Path:
    run = make_run()
    run.cases.append(make_run(implementation="mla-reference").cases[0])
    results.write(run, Path("run.json"))
    return Path("run.json")


def test_a_folder_gets_a_file_per_case(bench: Bench, make_run: MakeRun) -> None:
    words = ("export", str(two_cases(make_run)), "--format", "infinimetrics")
    done = bench(*words, "-o", "output")
    assert (done.code, done.out) == (0, "")
    assert done.err == "exported 2 documents of 2 cases in 1 file\n"
    files = sorted(Path("output").glob("*_results.json"))
    assert [faults(json.loads(path.read_text())) for path in files] == [[], []]
    lines = [json.loads(line) for line in bench(*words).out.splitlines()]
    assert sorted(lines, key=file_name) == [json.loads(path.read_text()) for path in files]


def test_several_documents_do_not_fit_into_one_file(bench: Bench, make_run: MakeRun) -> None:
    path = str(two_cases(make_run))
    done = bench("export", path, "--format", "infinimetrics", "-o", "all.json")
    assert done.code == 2
    assert done.err == (
        "error: InfiniMetrics reads one result per file, and these are 2: give -o a folder, such as -o all.\n"
    )
    assert not Path("all.json").exists()
    results.write(make_run(), Path("one.json"))
    assert bench("export", "one.json", "--format", "infinimetrics", "-o", "all.json").code == 0
    assert faults(json.loads(Path("all.json").read_text())) == []
