"""Results as InfiniMetrics keeps them: one JSON document per case, which its importer and dashboard read.

Written from github.com/InfiniTensor/InfiniMetrics at 9facb015: `docs/output_format.md`, and what only its
code says, `db/utils.py` (what counts as a result), `infinimetrics/executor.py` (environment) and
`dashboard/utils/visualizations/operator.py` (metrics, which it finds by words in their names).
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from mla.bench.results.cases import KINDS
from mla.bench.results.rows import Cell, Row, cell
from mla.bench.results.schema import Case, Run
from mla.errors import ResultError

CATEGORY = "operator"
# Result codes: what was tested is at fault (there INTERNAL), or there is no number otherwise (GENERIC).
CODES = {"ok": 0, "wrong": 2, "doubtful": 5, "not run": 5}

_FIELDS = ("scenario", "batch_spec", "mode", "implementation", "query_lens", "history", "heads", "layers")
# Metric -> column of the flat row, and unit. The dashboard finds the first three by words in their names, and
# lists the others only: none of their names may hold such a word.
_METRICS = {
    "latency": ("latency_ms", "ms"),
    "flops": ("needed_tflop_per_s", "TFLOPS"),
    "bandwidth": ("needed_gb_per_s", "GB/s"),
    "time_p10": ("latency_p10_ms", "ms"),
    "time_p90": ("latency_p90_ms", "ms"),
    "time_ci95_low": ("latency_ci95_low_ms", "ms"),
    "time_ci95_high": ("latency_ci95_high_ms", "ms"),
    **{f"time_{kind}": (f"{kind}_ms", "ms") for kind in KINDS},
    "throughput": ("tokens_per_s", "tokens/s"),
    "share_of_limit": ("limit_percent", "%"),
}

Document = dict[str, Any]

# How a document begins: only ours have such a digest.
START = re.compile(
    rb'\{\s*"run_id": "[0-9a-f]{12}_\d{8}_\d{6}",\s*"time": "[^"]*",\s*"testcase": "operator\.'
)


def documents(run: Run) -> list[Document]:
    """Return a document for every case. Raises `ResultError` for a run that has no date."""
    try:
        created = datetime.datetime.fromisoformat(run.created)
    except ValueError as error:
        raise ResultError(f"cannot export a run whose `created` is not a time: '{run.created}'.") from error
    return [_document(run, case, created) for case in run.cases]


def file_name(document: Mapping[str, Any]) -> str:
    """Return the name of a document's file, which no scenario can make look like a summary."""
    return f"{document['run_id']}_results.json"


def _document(run: Run, case: Case, created: datetime.datetime) -> Document:
    code = CODES[case.check.status]
    # The same whenever this case is exported.
    digest = hashlib.sha256(msgspec.json.encode((run.created, run.backend, case))).hexdigest()[:12]
    document: Document = {
        # The digest comes first, since the dashboard tells runs of one time apart by twelve letters.
        "run_id": f"{digest}_{created:%Y%m%d_%H%M%S}",
        "time": f"{created:%Y-%m-%d %H:%M:%S}",
        "testcase": ".".join((CATEGORY, _word(case.implementation), _word(case.scenario))),
        "success": int(code != 0),  # theirs: 1 stands for a failure
        "environment": _environment(run),
        "result_code": code,
        "config": _config(run, case),
        "metrics": list(_metrics(Row(run, case))),
        "resolved": {"nodes": 1, "gpus_per_node": 1, "device_used": 1},
    }
    return document | {"error_msg": case.check.reason} if code else document


def _word(text: str) -> str:
    """Return a name as one part of a test case, whose parts are divided by dots."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", text).strip("_") or "unnamed"


def _environment(run: Run) -> Document:
    facts, device = run.environment, run.backend
    accelerator = {
        "model": device.device,
        "count": 1,
        "memory_gb_per_card": (device.memory_bytes or 0) >> 30,
        "driver": facts.get("backend.driver", "Unknown"),
        "cuda": facts.get("backend.torch.version.cuda", "Unknown"),
        "type": device.name,
    }
    machine = {
        "cpu_model": facts.get("processor", "Unknown"),
        "memory_gb": 0,  # of the host, which a result does not hold
        "accelerators": [accelerator],
    }
    frameworks = [{"name": name, "version": facts.get(name, "unknown")} for name in ("mla", "torch")]
    return {
        "cluster_scale": 1,
        "topology": "1x1 ring mesh",
        "cluster": [{"machine": machine, "framework": frameworks}],
        "facts": dict(facts),
    }


def _config(run: Run, case: Case) -> Document:
    tokens, hidden = sum(case.query_lens), run.config.get("hidden_size")
    tensor = {"shape": [tokens, hidden], "dtype": case.dtype}
    layer = [] if case.op or not isinstance(hidden, int) else [tensor]
    return {
        "operator": case.op or "mla_layer",
        "device": run.backend.name,
        "dtype": case.dtype,
        "batch_size": len(case.query_lens),
        "warmup_iterations": case.warmups,
        "measured_iterations": case.passes * case.steps_per_pass,
        "inputs": [{"name": "hidden", **tensor} for tensor in layer],
        "outputs": [{"name": "out", **tensor} for tensor in layer],
        **{name: getattr(case, name) for name in _FIELDS},
        "page_size": case.point.get("page_size", run.page_size),
        "attention": run.attention,
        "ops": case.ops,
        "model": run.config,
        "check": case.check.status,
        "repro": case.repro,
    }


def _metrics(row: Row) -> Iterator[Document]:
    """Yield the metrics that may leave a case: without its numbers, only what the check said."""
    known: dict[str, tuple[Cell, str]] = {
        name: (cell(row, of), unit) for name, (of, unit) in _METRICS.items()
    }
    if row.check.status in ("ok", "wrong"):
        known = {"tensor_accuracy": ("PASS" if row.check.status == "ok" else "FAIL", ""), **known}
    for name, (value, unit) in known.items():
        if value:  # an op without FLOPs has no rate of them
            name = f"{CATEGORY}.{name}"
            yield {"name": name, "type": "scalar", "value": value, "raw_data_url": "", "unit": unit}
