"""Record passes with torch's profiler, and join them to one Chrome trace.

A recorded pass is never a timed one. Each op of ours is a range of its own inside the range of a forward, so
that a viewer shows what each launches, and the gaps between.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from mla.bench.subjects.base import Implementation
from mla.bench.workload.scenario import Scenario
from mla.command.files import TRACE_START

# The most forwards of a recorded pass: enough to see launches and gaps, and a file that viewers still open.
FORWARDS = 10
# Microseconds between passes on the time axis of the trace.
GAP = 1000.0
# Phases of events whose id links them to others of the same pass.
_LINKED = frozenset("stfbne")
# What the profiler writes anew for every pass.
_OF_ONE_PASS = frozenset({"traceEvents", "traceName", "trace_id", "baseTimeNanoseconds"})


class Trace:
    """Passes in the order they are added, end to end: whatever happened between them is left out."""

    def __init__(self) -> None:
        self.passes = self.operators = self.launches = 0
        self._facts: dict[str, Any] = {}
        self._events: list[bytes] = []
        self._end = 0.0
        self._ids = 0

    def add(self, document: Mapping[str, Any]) -> None:
        """Append what the profiler wrote about one pass: an object with a list `traceEvents`."""
        events = [dict(event) for event in document["traceEvents"]]
        start = min(float(event["ts"]) for event in events if event["ph"] == "X")
        end, ids = self._end, self._ids
        for event in events:
            if "ts" in event:
                event["ts"] = max(self._end, self._end + float(event["ts"]) - start)
                end = max(end, event["ts"] + float(event.get("dur", 0)))
            if event["ph"] in _LINKED and isinstance(event.get("id"), int):
                event["id"] += self._ids + 1
                ids = max(ids, event["id"])
        self._end, self._ids = end + GAP, ids
        facts = {name: value for name, value in document.items() if name not in _OF_ONE_PASS}
        self._facts = self._facts or facts
        self._events.append(msgspec.json.encode(events)[1:-1])
        self.passes += 1
        self.operators += sum(event.get("cat") == "cpu_op" for event in events)
        self.launches += sum(event.get("cat") == "kernel" for event in events)

    def encode(self) -> bytes:
        """Return the trace as JSON."""
        facts = msgspec.json.encode(self._facts)[1:-1]
        head = TRACE_START + b"," + facts + b"," * bool(facts)
        return head + b'"traceEvents":[' + b",\n".join(self._events) + b"]}\n"


class Ranged:
    """Stands in for an op: every call is a range of the profile, and all else is the op's own."""

    def __init__(self, name: str, op: Any) -> None:
        self._name, self._op = name, op

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        with torch.profiler.record_function(self._name):
            self._op(*leading, **tensors)


def with_ranges(one: Implementation) -> Implementation:
    """Return an implementation, before it is loaded, with each op of ours in a range "role (op)".

    Of several layers, the range says which: "layer 3: role (op)".
    """
    names = one.facts().ops
    if replace_ops := getattr(one, "replace_ops", None):  # ours
        replace_ops(lambda where, op: Ranged(f"{where} ({names[where.rpartition(': ')[2]]})", op))
    return one


def record(
    one: Implementation, scenario: Scenario, synchronize: Callable[[], None], beat: Callable[[], None]
) -> Mapping[str, Any]:
    """Run the first forwards of a pass, eagerly, and return what the profiler wrote about them.

    One forward runs unrecorded before; `beat` is called after each.
    """

    def forward(index: int) -> None:
        one.before(index)
        one.meet()
        with torch.profiler.record_function(f"forward {index}"):
            one.step(index)
        one.after(index)
        beat()

    one.restore()
    forward(0)
    one.restore()
    synchronize()
    title = torch.profiler.record_function(f"{scenario.name} / {one.name}")
    with torch.profiler.profile(activities=activities(one.setting.device)) as found, title:
        for index in range(min(scenario.steps, FORWARDS)):
            forward(index)
        synchronize()
    return _exported(found)


def activities(device: torch.device) -> list[Any]:
    """Return what the profiler can record of this device and its host."""
    host = torch.profiler.ProfilerActivity.CPU
    supported = sorted(torch.profiler.supported_activities(), key=str)
    return [one for one in supported if one == host or device.type != "cpu"]


def _exported(found: Any) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        document = json.loads(file.read_bytes(), strict=False)  # names may hold control characters
    assert isinstance(document, dict)
    return document
