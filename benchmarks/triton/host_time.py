#!/usr/bin/env python3
"""Time what an op does on the host, from its call to the launcher, which starts nothing.

    OMP_NUM_THREADS=1 python -m benchmarks.triton.host_time

Prints the median and the 95th percentile in microseconds. `plan` is what a batch is prepared with, once per
step of a decode, the rest one call of an op. Triton's own launch comes on top.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from time import perf_counter_ns
from typing import Any

from benchmarks.triton.problems import MULTIPROCESSORS, PROBLEMS, decode, prefill
from benchmarks.triton.shipped import H100
from mla.cases.played import Laid
from mla_backends.triton_ops import Launcher, triton_ops

STEP = (4096,) * 16  # keys of 16 requests


class Idle(Launcher):
    """Starts nothing, and keeps nothing."""

    def start(
        self,
        kernel: Any,
        grid: Any,
        arguments: Mapping[str, Any],
        *,
        warps: int = 4,
        stages: int = 1,
        programs: int = 1,
    ) -> None:
        self.launches += 1


def calls() -> dict[str, Callable[[], object]]:
    """Return by name what is timed."""
    ops = triton_ops(H100.tuning, MULTIPROCESSORS, Idle())
    split, whole = decode(16, keys=STEP, with_lse=True), decode(16, keys=(60,) * 16)
    small = {name: PROBLEMS[name].bound(ops) for name in ("write_latent", "rotate_query", "rms_norm")}
    return {
        "latent attention, with merge": split.bound(ops),
        "latent attention, one part": whole.bound(ops),
        "expanded attention": prefill().bound(ops),
        **small,
        "plan of latent attention": Laid(split.case, ops["triton_latent"]).prepare,
    }


def microseconds(call: Callable[[], object], times: int) -> list[float]:
    """Return how long each of many calls took, after some that are not counted."""
    for _ in range(times // 10):
        call()
    samples = []
    for _ in range(times):
        start = perf_counter_ns()
        call()
        samples.append((perf_counter_ns() - start) / 1000)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton.host_time")
    parser.add_argument("--times", type=int, default=5000, help="calls of each op")
    times = parser.parse_args().times
    gc.disable()
    print("| op | median us | 95 % below |\n|---|---|---|")  # noqa: T201
    for name, call in calls().items():
        samples = microseconds(call, times)
        print(f"| {name} | {median(samples):.1f} | {quantiles(samples, n=20)[-1]:.1f} |")  # noqa: T201


if __name__ == "__main__":
    main()
