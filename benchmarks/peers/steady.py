#!/usr/bin/env python3
"""Check that memory does not grow over 10,000 decode steps of our CPU layer.

\b
    python benchmarks/peers/steady.py -o steady.json

Reads resident set, live tensors and page faults every 1000 steps. Exit code 1 if memory grew
in the second half.
"""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import click
import msgspec
import torch

from mla import MLAConfig, load_backend
from mla.bench import results
from mla.bench.subjects.inputs import make_inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.workload.workload_file import read_workload
from mla.command import console
from mla.command.environment import environment
from mla.command.exit_codes import Exit, guarded
from mla.config import presets
from mla.weights import random_state_dict

STEPS, STEPS_PER_READING = 10_000, 1_000
# Growth of the resident set in bytes over the second half that is not a leak: about 52 bytes per step.
TOLERATED_BYTES = 256 << 10


class MemoryReading(msgspec.Struct):
    """Memory after a number of steps."""

    steps: int
    resident_bytes: int
    tensors: int  # live
    tensor_bytes: int  # of their storages, each counted once
    page_faults: int  # minor ones since the last reading


class Steady(msgspec.Struct):
    """The schema of `-o FILE`."""

    environment: dict[str, str]
    config: str
    scenario: str
    readings: list[MemoryReading]


def verdict(readings: Sequence[MemoryReading]) -> tuple[bool, str]:
    """Return whether memory was steady over the second half, and a sentence with the figures."""
    half, last = readings[len(readings) // 2], readings[-1]
    resident, tensors = last.resident_bytes - half.resident_bytes, last.tensor_bytes - half.tensor_bytes
    steady = resident <= TOLERATED_BYTES and tensors <= 0
    return steady, (
        f"{'steady' if steady else 'growing'}: from {half.steps} to {last.steps} steps the resident set "
        f"changed by {resident / 2**10:.0f} KiB and tensors by {tensors} bytes"
    )


def decode(setting: Setting, steps: int = STEPS) -> list[MemoryReading]:
    """Decode in passes of the standard scenario, as the runner does, with a reading every thousand steps."""
    scenario = next(each for each in read_workload("standard").scenarios if each.mode == "decode")
    layer = MlaLayer(setting, random_state_dict(setting.config, setting.seed, setting.dtype))
    layer.load(scenario, make_inputs(setting.config, scenario, setting.seed, setting.dtype))
    readings, faults = [read(0, 0)], minor_faults()
    for done in range(scenario.steps, steps + 1, scenario.steps):
        for index in range(scenario.steps):
            layer.before(index)
            layer.step(index)
            layer.after(index)
        layer.restore()
        if done % STEPS_PER_READING == 0:
            readings.append(read(done, minor_faults() - faults))
            faults = minor_faults()
    return readings


def minor_faults() -> int:
    """Return the page faults of this process, over all threads, that needed no disk access."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def read(steps: int, faults: int) -> MemoryReading:
    """Read the current memory use."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return MemoryReading(steps, pages * 4096, len(alive), sum(storages.values()), faults)


@click.command(help=__doc__)
@click.option("--config", default=presets.DEFAULT_CONFIG, show_default=True, help="Preset, or a config.json.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the readings as JSON.")
def steady(config: str, output: Path | None) -> int:
    """Carry out the command line."""
    setting = Setting(MLAConfig.named(config), load_backend("cpu"), torch.bfloat16, "auto", 64, seed=0)
    with torch.no_grad():
        readings = decode(setting)
    console.out("   steps   resident MiB   tensors   tensor MiB   page faults since\n")
    for reading in readings:
        sizes = f"{reading.resident_bytes / 2**20:15.2f}{reading.tensors:10d}"
        sizes += f"{reading.tensor_bytes / 2**20:13.2f}"
        console.out(f"{reading.steps:8d}{sizes}{reading.page_faults:20d}\n")
    if output:
        facts = environment(setting.backend)
        results.write(Steady(facts, setting.config.name or config, "decode", readings), output)
    is_steady, sentence = verdict(readings)
    console.out(f"{sentence}\n")
    return Exit.OK if is_steady else Exit.REGRESSION


if __name__ == "__main__":
    sys.exit(guarded(lambda: steady(standalone_mode=False)))
