"""A plugin that replaces part of what judges it gets no number, and neither does anybody beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mla.bench import results

Bench = Callable[..., Any]

# At import, as a plugin's own module is loaded: before most of the program is.
AT_IMPORT = """
import functools, time
from mla.bench.measure import passes
from mla_backends.testing import HostBackend

counter, inner = time.perf_counter_ns, passes.PassRunner.run
time.perf_counter_ns = lambda: counter() // 10

@functools.wraps(inner)
def run(self, *arguments):
    return inner(self, *arguments)

passes.PassRunner.run = run

class Foe(HostBackend):
    name = "foe"
"""
# When its device is set up, and an honest module beside it.
AT_SETUP = """
import mla.reference
from mla_backends.testing import HostBackend

class Slow(type(mla.reference.REFERENCE["linear"])):
    pass

class Foe(HostBackend):
    name = "foe"
    def setup(self, index=None):
        mla.reference.REFERENCE["linear"] = Slow()
        return super().setup(index)
"""


def cases() -> list[results.Case]:
    return results.decode(Path("run.json").read_bytes()).cases


def test_what_a_plugin_patches_at_import_costs_every_number(process: Bench, small: list[str]) -> None:
    Path("foe.py").write_text(AT_IMPORT)
    done = process("--backend", "foe:Foe", *small, "--dtype", "float32", "--passes", "1", "-o", "run.json")
    assert done.code not in (0, 1, 3, 4)
    assert {case.check.status for case in cases()} == {"doubtful"}
    for case in cases():
        assert "PassRunner.run by module foe" in case.check.reason
        assert "time.perf_counter_ns by module foe" in case.check.reason
        assert (case.latency_ms, case.tokens_per_s, case.roofline) == (None, None, results.Roofline())
        assert all(timing.latency_ms is None for timing in case.timings)
    assert "PassRunner.run by module foe" in done.out


def test_a_reference_that_a_plugin_replaces_is_named(process: Bench, small: list[str]) -> None:
    Path("foe.py").write_text(AT_SETUP)
    process("--backend", "foe:Foe", *small, "--dtype", "float32", "--passes", "1", "-o", "run.json")
    assert {case.check.status for case in cases()} == {"doubtful"}
    assert all("mla.reference.REFERENCE['linear'] by module foe" in case.check.reason for case in cases())
