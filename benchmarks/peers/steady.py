"""Check that memory does not grow over 10,000 decode steps of our layer."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.peers.faults import minor_faults
from mla.bench import results
from mla.bench.plan.request import Request
from mla.bench.subjects.inputs import make_inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.workload_file import load_workload
from mla.command import console
from mla.command.exit_codes import Exit
from mla.weights import random_state_dict

STEPS, EVERY = 10_000, 1_000
# Growth of the resident set in bytes over the second half that is not a leak: about 52 bytes per step.
TOLERATED = 256 << 10


class MemoryReading(msgspec.Struct):
    """Memory after a number of steps."""

    steps: int
    resident_bytes: int
    tensors: int  # live
    tensor_bytes: int  # of their storages, each counted once
    page_faults: int  # minor ones since the last reading


class Steady(msgspec.Struct):
    """The schema of `--memory -o FILE`."""

    environment: dict[str, str]
    config: str
    scenario: str
    readings: list[MemoryReading]


def report(request: Request, output: Path | None) -> int:
    """Run the steps, print the readings, and return 1 if the resident set or the tensors grew."""
    readings = run(request)
    console.out("   steps   resident MiB   tensors   tensor MiB   page faults since\n")
    for one in readings:
        sizes = f"{one.resident_bytes / 2**20:15.2f}{one.tensors:10d}{one.tensor_bytes / 2**20:13.2f}"
        console.out(f"{one.steps:8d}{sizes}{one.page_faults:20d}\n")
    if output:
        from mla.command.environment import environment

        facts = environment(request.setting.backend)
        results.write(Steady(facts, request.setting.config.name, "decode", readings), output)
    steady, sentence = verdict(readings)
    console.out(f"{sentence}\n")
    return Exit.OK if steady else Exit.REGRESSION


def verdict(readings: Sequence[MemoryReading]) -> tuple[bool, str]:
    """Return whether memory was steady over the second half, and a sentence with the figures."""
    half, last = readings[len(readings) // 2], readings[-1]
    resident, tensors = last.resident_bytes - half.resident_bytes, last.tensor_bytes - half.tensor_bytes
    steady = resident <= TOLERATED and tensors <= 0
    return steady, (
        f"{'steady' if steady else 'growing'}: from {half.steps} to {last.steps} steps the resident set "
        f"changed by {resident / 2**10:.0f} KiB and tensors by {tensors} bytes"
    )


def run(request: Request) -> list[MemoryReading]:
    """Decode in passes of the standard scenario, as the runner does, with a reading every thousand steps."""
    setting = request.setting
    scenario = load_workload("standard")[1]
    inputs = make_inputs(setting.config, scenario, setting.seed, setting.dtype)
    ours = MlaLayer(setting, random_state_dict(setting.config, setting.seed, setting.dtype))
    ours.load(scenario, inputs)
    readings, mark = [read(0, 0)], minor_faults()
    for done in range(scenario.steps, STEPS + 1, scenario.steps):
        for index in range(scenario.steps):
            ours.before(index)
            ours.step(index)
            ours.after(index)
        ours.restore()
        if done % EVERY == 0:
            faults = minor_faults() - mark
            readings.append(read(done, faults))
            mark = minor_faults()
    return readings


def read(steps: int, faults: int) -> MemoryReading:
    """Read the current memory use."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return MemoryReading(steps, pages * 4096, len(alive), sum(storages.values()), faults)
