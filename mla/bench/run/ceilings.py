"""`ceilings`: measure what a device reaches at best, beside what its backend declares."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mla.bench import results
from mla.bench.plan import resolve
from mla.bench.results import ceilings_file
from mla.bench.results.schema import Ceiling
from mla.bench.terminal.ceilings import render
from mla.command import console, environment, files
from mla.command.exit_codes import Exit
from mla.command.options import key_values
from mla.command.progress import Progress
from mla.errors import UsageError, did_you_mean
from mla.text import dtype_name, first_line, size
from mla_backends.discovery import locate

if TYPE_CHECKING:
    import torch

    from mla.bench.limits.microbench import Microbenchmark
    from mla_backends.api import Backend

#: Short and long names of what --dtype takes.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEFAULT_DTYPES = ("bf16", "fp32")
#: Footprints: powers of 4 from the smallest to the largest, or to so many caches, or a share of memory.
SMALLEST, LARGEST, CACHES, MEMORY_SHARE = 256 << 10, 1 << 30, 4, 4
#: New tokens of a forward in the standard scenarios: a decode step and a prefill.
TOKENS = (16, 704)
#: Projections of the default config that every new token passes, or every rebuilt key.
PROJECTIONS = ("qkv_a_proj", "kv_b_proj", "o_proj")


@dataclass(frozen=True)
class CeilingOptions:
    """The command line of `ceilings`, one field per option."""

    backend: str | None
    device: int | None
    backend_options: tuple[str, ...]
    threads: int | None
    dtype: str | None
    output: Path | None
    kind: str

    def dtype_names(self) -> list[str]:
        """Return what --dtype lists, under torch's names. Raises `UsageError`."""
        words = list(DEFAULT_DTYPES) if self.dtype is None else self.dtype.split(",")
        names = [DTYPES.get(word.strip(), word.strip()) for word in words]
        for name in names:
            if name not in DTYPES.values():
                known = [*DTYPES, *DTYPES.values()]
                raise UsageError(
                    f"unknown dtype '{name}'.{did_you_mean(name, known)} --dtype takes {', '.join(DTYPES)}, "
                    "comma-separated."
                )
        return list(dict.fromkeys(names))


@dataclass
class _Found:
    """What was measured so far."""

    ceilings: list[Ceiling] = field(default_factory=list)
    interrupted: bool = False


#: What is about to be measured, and a function that does it.
Task = tuple[str, Callable[[], list[Ceiling]]]


def run(options: CeilingOptions) -> int:
    """Carry out `ceilings`."""
    if mixed := environment.mixed_installation():
        console.note(mixed)
    names, pairs = options.dtype_names(), key_values(options.backend_options)
    if options.output:
        files.check_writable(options.output)
    name = resolve.only_usable() if options.backend is None else options.backend
    import mla

    backend = mla.load_backend(name, options.device, options.threads, pairs)
    found = _measure(_tasks(backend, _native(backend, names, explicit=options.dtype is not None)))
    report = _report(backend, locate(name).version, found)
    try:
        if options.output:
            results.write(report, options.output)
    finally:
        console.out(render(report, options.kind))
    return _verdict(found)


def _verdict(found: _Found) -> Exit:
    if found.interrupted:
        console.note("interrupted: the result holds what was measured until then")
        return Exit.INTERRUPTED
    return Exit.OK if found.ceilings else Exit.NOTHING_RAN


def _native(backend: Backend, names: list[str], *, explicit: bool) -> list[torch.dtype]:
    """Return the dtypes to measure; those the user named must be native, others are left out."""
    import torch

    dtypes = [getattr(torch, name) for name in names]
    if explicit:
        for dtype in dtypes:
            resolve.check_dtype(backend, dtype)
    native = backend.dtypes()
    return [dtype for dtype in dtypes if dtype in native] or list(native)


def footprints(cache: int | None, free: int | None) -> list[int]:
    """Return the bytes that are read and copied, ascending: powers of 4, and the largest power of 2."""
    limits = [LARGEST]
    limits += [CACHES * cache] if cache else []
    limits += [free // MEMORY_SHARE] if free else []
    limit = max(SMALLEST, min(limits))
    sizes = [size for size in (SMALLEST << 2 * power for power in range(16)) if size <= limit]
    last = 1 << limit.bit_length() - 1
    return [*sizes, last] if last > sizes[-1] else sizes


def _tasks(backend: Backend, dtypes: list[torch.dtype]) -> list[Task]:
    from mla.bench.limits.microbench import Microbenchmark

    assert backend.device is not None
    benchmarks = [Microbenchmark(backend, backend.device, dtype) for dtype in dtypes]
    counts = footprints(backend.device_info().cache_bytes, backend.memory().free)
    tasks: list[Task] = []
    for work, measure in (("read", benchmarks[0].read), ("copy", benchmarks[0].copy)):
        tasks += [_memory_task(work, measure, count) for count in counts]
    for benchmark, dtype in zip(benchmarks, dtypes, strict=True):
        tasks += _product_tasks(benchmark, dtype, backend)
    return tasks


def _memory_task(work: str, measure: Callable[[int], Ceiling], count: int) -> Task:
    return f"{work} of {size(count)}", lambda: [measure(count)]


def _product_tasks(benchmark: Microbenchmark, dtype: torch.dtype, backend: Backend) -> Iterator[Task]:
    """Yield squares as one task, and the default config's projections for few and for many tokens."""
    name = dtype_name(dtype)
    yield f"square {name} products", lambda: list(benchmark.squares())
    for inputs, outputs in _projections(dtype, backend):
        for tokens in TOKENS:
            yield _product_task(benchmark, name, (tokens, inputs, outputs))


def _product_task(benchmark: Microbenchmark, name: str, shape: tuple[int, int, int]) -> Task:
    return f"{name} product {' x '.join(map(str, shape))}", lambda: [benchmark.product(*shape)]


def _projections(dtype: torch.dtype, backend: Backend) -> list[tuple[int, int]]:
    """Return inputs and outputs of the default config's projections."""
    from mla.config import MLAConfig
    from mla.config.presets import DEFAULT_CONFIG
    from mla.layer.ops import Ops

    assert backend.device is not None
    ops = Ops(MLAConfig.preset(DEFAULT_CONFIG), {}, dtype, backend.device)
    specs = [ops[role].spec for role in PROJECTIONS]
    return [(spec.in_features, spec.out_features) for spec in specs]


def _measure(tasks: list[Task]) -> _Found:
    """Carry out the tasks; one that fails is named and left out."""
    found = _Found()
    with Progress(len(tasks)) as progress:
        for what, measure in tasks:
            progress.advance(what, 0)
            try:
                found.ceilings += measure()
            except KeyboardInterrupt:
                found.interrupted = True
                break
            except Exception as error:  # noqa: BLE001  # whatever a device refuses, the rest is worth having
                reason = first_line(error)
                console.note(f"left out: {what}: {type(error).__name__}: {reason}")
            progress.advance(what, 1)
    return found


def _declared(backend: Backend) -> list[Ceiling]:
    info = backend.device_info()
    peak = info.bandwidth
    found = [Ceiling(work="read", value=peak.value, source=peak.source)] if peak else []
    return found + [
        Ceiling(work="matmul", value=one.value, source=one.source, dtype=dtype)
        for dtype, one in info.flops.items()
    ]


def _report(backend: Backend, version: str | None, found: _Found) -> ceilings_file.CeilingRun:
    return ceilings_file.CeilingRun(
        report="ceilings",
        schema_version=ceilings_file.SCHEMA_VERSION,
        argv=["python -m mla.bench", *sys.argv[1:]],
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        git_commit=environment.git_commit(),
        backend=environment.backend_facts(backend, version),
        environment=environment.environment(backend),
        measured=found.ceilings,
        declared=_declared(backend),
        interrupted=found.interrupted,
    )
