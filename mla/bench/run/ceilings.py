"""Measure what a device reaches, next to what its backend declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
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

    from mla_backends.api import Backend

# Footprints: powers of 4 from the smallest to the largest, or to so many caches, or a share of memory.
LEAST_BYTES, MOST_BYTES, CACHES, MEMORY_SHARE = 256 << 10, 1 << 30, 4, 4
# New tokens of a forward in the standard scenarios: a decode step and a prefill.
TOKENS = (16, 704)
# Seconds after which nothing more is begun.
MOST_SECONDS = 60
# Projections of the default config that every new token passes, or every rebuilt key.
PROJECTIONS = ("qkv_a_proj", "kv_b_proj", "o_proj")


# What is about to be measured, and a function that does it.
Task = tuple[str, Callable[[], Iterable[Ceiling]]]


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
    """Return what there is to measure: reading, copying, squares, and the default config's projections."""
    from mla.bench.limits.microbench import Microbenchmark
    from mla.config import MLAConfig
    from mla.config.presets import DEFAULT_CONFIG
    from mla.layer.ops import Ops

    assert backend.device is not None
    sizes = footprints(backend.device_info().cache_bytes, backend.memory().free)
    first = Microbenchmark(backend, backend.device, dtypes[0])
    tasks: list[Task] = [
        (f"{work} of {size(count)}", partial(map, measure, [count]))
        for work, measure in (("read", first.read), ("copy", first.copy))
        for count in sizes
    ]
    for dtype in dtypes:
        benchmark, name = Microbenchmark(backend, backend.device, dtype), dtype_name(dtype)
        ops = Ops(MLAConfig.preset(DEFAULT_CONFIG), {}, dtype, backend.device)
        tasks.append((f"square {name} products", benchmark.squares))
        for spec, tokens in product((ops[role].spec for role in PROJECTIONS), TOKENS):
            sides = tokens, spec.in_features, spec.out_features
            what = f"{name} product {' x '.join(map(str, sides))}"
            tasks.append((what, partial(map, benchmark.product, *([side] for side in sides))))
    return tasks


def run_tasks(tasks: list[Task]) -> tuple[list[Ceiling], bool]:
    """Carry out the tasks; return what was measured, and whether an interrupt ended it.

    What fails is named and skipped, and so is what is left after `MOST_SECONDS`.
    """
    ceilings: list[Ceiling] = []
    end = now_ns() + 1e9 * MOST_SECONDS
    with Progress(len(tasks)) as progress:
        for number, (what, measure) in enumerate(tasks):
            if now_ns() >= end:
                note(f"skipped after {MOST_SECONDS} s: {', '.join(left for left, _ in tasks[number:])}")
                break
            progress.advance(what, 0)
            try:
                with plugin_code():
                    ceilings += measure()
            except KeyboardInterrupt:
                return ceilings, True
            except Exception as error:  # noqa: BLE001  # whatever a device refuses, the rest is worth having
                note(f"skipped: {what}: {type(error).__name__}: {first_line(error)}")
            progress.advance(what, 1)
    return ceilings, False


def declared(backend: Backend) -> list[Ceiling]:
    """Return the peaks that the backend declares."""
    info = backend.device_info()
    peak = info.bandwidth
    peaks = [Ceiling(work="read", value=peak.value, source=peak.source)] if peak else []
    return peaks + [
        Ceiling(work="matmul", value=flops.value, source=flops.source, dtype=dtype)
        for dtype, flops in info.flops.items()
    ]


def report(opened: OpenedBackend, ceilings: list[Ceiling], interrupted: bool) -> CeilingRun:
    """Return the result file."""
    return CeilingRun(
        report="ceilings",
        schema_version=CEILINGS_VERSION,
        **provenance(opened.backend, opened.version),
        measured=ceilings,
        declared=declared(opened.backend),
        interrupted=interrupted,
    )
