"""Measuring in a process of its own, which the allocator's setting is given to when it starts."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

import mla
from benchmarks import allocator
from benchmarks.transformers.record import Row
from benchmarks.transformers.sides import Side, make_sides
from benchmarks.transformers.turns import measure
from benchmarks.transformers.work import Work
from mla.bench.measure.passes import CacheFlush
from mla.config import MLAConfig
from mla.errors import MLAError
from mla_backends.api import Backend

# Settings of the host's allocator. A device's memory is not its business: there, the first is enough.
ALLOCATORS = {"default": "", "kept": allocator.TUNABLES}


@dataclass(frozen=True)
class Task:
    """What a process measures, at one length after the other."""

    config: str
    backend: str
    phase: str
    allocator: str
    requests: int
    tokens: int  # that a cache must hold, at most
    rounds: int
    seconds: float


class Ended(MLAError):
    """The process is gone."""


@contextlib.contextmanager
def process(task: Task) -> Iterator[Callable[[int], list[Row]]]:
    """Yield what measures a length, in a process that ends with the block."""
    spawn = multiprocessing.get_context("spawn")
    with allocator.setting(ALLOCATORS[task.allocator]), ProcessPoolExecutor(1, mp_context=spawn) as pool:

        def rows(length: int) -> list[Row]:
            try:
                return pool.submit(run, task, length).result()
            except BrokenProcessPool as error:
                what = f"{task.phase} with {length} tokens, {task.allocator} allocator"
                raise Ended(f"the process died in {what}: was there too little memory?") from error

        yield rows


def run(task: Task, length: int) -> list[Row]:
    """Measure one length, in this process."""
    config, backend, flush, sides = _prepared(task)
    work = Work(task.config, config, backend, flush, task.phase, length, task.requests, task.allocator)
    return measure(work, sides, task.rounds, task.seconds)


@functools.cache
def _prepared(task: Task) -> tuple[MLAConfig, Backend, CacheFlush, Sequence[Side]]:
    config, backend = MLAConfig.named(task.config), mla.load_backend(task.backend)
    device = backend.device or torch.device("cpu")
    sides = list(make_sides(config, task.backend, device, task.tokens))
    return config, backend, CacheFlush(backend), sides
