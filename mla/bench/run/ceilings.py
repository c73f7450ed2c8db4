"""Measure what a device reaches, next to what its backend declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter_ns as now_ns
from typing import TYPE_CHECKING

from mla.bench.plan.request import provenance
from mla.bench.results.schema import CEILINGS_VERSION, Ceiling, CeilingRun
from mla.command.console import note
from mla.command.display import Progress
from mla.command.options import OpenedBackend
from mla.text import dtype_name, size
from mla_backends.errors import first_line, plugin_code

if TYPE_CHECKING:
    import torch

    from mla.bench.limits.microbench import Microbenchmark
    from mla_backends.api import Backend

# Footprints: powers of 4 from the smallest to the largest, or to so many caches, or a share of memory.
LEAST_BYTES, MOST_BYTES, CACHES, MEMORY_SHARE = 256 << 10, 1 << 30, 4, 4
# New tokens of a forward in the standard scenarios: a decode step and a prefill.
TOKENS = (16, 704)
# Seconds after which nothing more is begun.
MOST_SECONDS = 60
# Projections of the default config that every new token passes, or every rebuilt key.
PROJECTIONS = ("qkv_a_proj", "kv_b_proj", "o_proj")


@dataclass
class Findings:
    """What was measured so far."""

    ceilings: list[Ceiling] = field(default_factory=list)
    interrupted: bool = False


# What is about to be measured, and a function that does it.
Task = tuple[str, Callable[[], list[Ceiling]]]


def footprints(cache: int | None, free: int | None) -> list[int]:
    """Return the bytes that are read and copied, ascending: powers of 4, and the largest power of 2."""
    limits = [MOST_BYTES]
    limits += [CACHES * cache] if cache else []
    limits += [free // MEMORY_SHARE] if free else []
    limit = max(LEAST_BYTES, min(limits))
    sizes = [size for size in (LEAST_BYTES << 2 * power for power in range(16)) if size <= limit]
    last = 1 << limit.bit_length() - 1
    return [*sizes, last] if last > sizes[-1] else sizes


def all_tasks(backend: Backend, dtypes: list[torch.dtype]) -> list[Task]:
    """Return what there is to measure: reading, copying, and products."""
    from mla.bench.limits.microbench import Microbenchmark

    assert backend.device is not None
    benchmarks = [Microbenchmark(backend, backend.device, dtype) for dtype in dtypes]
    sizes = footprints(backend.device_info().cache_bytes, backend.memory().free)
    tasks: list[Task] = []
    for work, measure in (("read", benchmarks[0].read), ("copy", benchmarks[0].copy)):
        tasks += [(f"{work} of {size(count)}", partial(_listed, measure, count)) for count in sizes]
    for benchmark, dtype in zip(benchmarks, dtypes, strict=True):
        tasks += _product_tasks(benchmark, dtype, backend)
    return tasks


def _listed(measure: Callable[..., Ceiling], *amounts: int) -> list[Ceiling]:
    return [measure(*amounts)]


def _product_tasks(benchmark: Microbenchmark, dtype: torch.dtype, backend: Backend) -> Iterator[Task]:
    """Yield squares as one task, and the default config's projections for few and for many tokens."""
    name = dtype_name(dtype)
    yield f"square {name} products", lambda: list(benchmark.squares())
    for inputs, outputs in _projections(dtype, backend):
        for tokens in TOKENS:
            shape = tokens, inputs, outputs
            what = f"{name} product {' x '.join(map(str, shape))}"
            yield what, partial(_listed, benchmark.product, *shape)


def _projections(dtype: torch.dtype, backend: Backend) -> list[tuple[int, int]]:
    """Return inputs and outputs of the default config's projections."""
    from mla.config import MLAConfig
    from mla.config.presets import DEFAULT_CONFIG
    from mla.layer.ops import Ops

    assert backend.device is not None
    ops = Ops(MLAConfig.preset(DEFAULT_CONFIG), {}, dtype, backend.device)
    specs = [ops[role].spec for role in PROJECTIONS]
    return [(spec.in_features, spec.out_features) for spec in specs]


def run_tasks(tasks: list[Task]) -> Findings:
    """Carry out the tasks; what fails is named and skipped, and so is what is left after `MOST_SECONDS`."""
    findings = Findings()
    end = now_ns() + 1e9 * MOST_SECONDS
    with Progress(len(tasks)) as progress:
        for number, (what, measure) in enumerate(tasks):
            if now_ns() >= end:
                note(f"skipped after {MOST_SECONDS} s: {', '.join(left for left, _ in tasks[number:])}")
                break
            progress.advance(what, 0)
            try:
                with plugin_code():
                    findings.ceilings += measure()
            except KeyboardInterrupt:
                findings.interrupted = True
                break
            except Exception as error:  # noqa: BLE001  # whatever a device refuses, the rest is worth having
                reason = first_line(error)
                note(f"skipped: {what}: {type(error).__name__}: {reason}")
            progress.advance(what, 1)
    return findings


def declared(backend: Backend) -> list[Ceiling]:
    """Return the peaks that the backend declares."""
    info = backend.device_info()
    peak = info.bandwidth
    peaks = [Ceiling(work="read", value=peak.value, source=peak.source)] if peak else []
    return peaks + [
        Ceiling(work="matmul", value=flops.value, source=flops.source, dtype=dtype)
        for dtype, flops in info.flops.items()
    ]


def report(opened: OpenedBackend, findings: Findings) -> CeilingRun:
    """Return the result file."""
    return CeilingRun(
        report="ceilings",
        schema_version=CEILINGS_VERSION,
        **provenance(opened.backend, opened.version),
        measured=findings.ceilings,
        declared=declared(opened.backend),
        interrupted=findings.interrupted,
    )
