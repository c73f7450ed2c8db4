"""Ceilings that take no time to measure, and some that were never measured."""

from __future__ import annotations

import pytest

from mla.bench import results
from mla.bench.limits import microbench
from mla.bench.results.schema import Ceiling, CeilingRun
from mla.bench.run import ceilings as ceilings_command


def measure_limits_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take little time for limits, which may come out low: for runs whose limits are not looked at."""
    monkeypatch.setattr(microbench, "SIDES", (256, 512))
    monkeypatch.setattr(microbench, "REPEAT_S", 0.0)
    monkeypatch.setattr(microbench, "REPEATS", 2)


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little, and once."""
    monkeypatch.setattr(microbench, "SIDES", (16, 32))
    monkeypatch.setattr(microbench, "REPEAT_S", 0.0)
    monkeypatch.setattr(microbench, "REPEATS", 1)
    monkeypatch.setattr(ceilings_command, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings_command, "TOKENS", (2, 3))


@pytest.fixture
def ceiling_run() -> CeilingRun:
    """Return ceilings of a device with a cache of 4 MiB and declared peaks."""
    facts = results.BackendFacts(name="x", version=None, device="X1", memory_bytes=None, cache_bytes=4 << 20)
    return CeilingRun(
        report="ceilings",
        schema_version=1,
        argv=[],
        created="2000-01-01T00:00:00+00:00",
        git_commit=None,
        backend=facts,
        environment={"torch_threads": "3"},
        measured=[
            Ceiling(work="read", value=4e11, source="measured: sum, 4 MiB", footprint_bytes=4 << 20),
            Ceiling(work="read", value=1.5e11, source="measured: dot, 16 MiB", footprint_bytes=16 << 20),
            Ceiling(work="copy", value=1e11, source="measured: neg, 16 MiB", footprint_bytes=16 << 20),
            Ceiling(work="matmul", value=5e11, source="measured: torch.mm, 1 x 2 x 3", dtype="bfloat16"),
            Ceiling(work="matmul", value=5e11, source="measured: torch.mm, 1 x 2 x 3", dtype="float32"),
        ],
        declared=[
            Ceiling(work="read", value=2e11, source="https://x.example/sheet"),
            Ceiling(work="matmul", value=2e12, source="https://x.example/flops", dtype="bfloat16"),
        ],
    )
