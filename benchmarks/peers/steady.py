#!/usr/bin/env python3
"""Check that memory does not grow over 10,000 decode steps of our CPU layer.

\b
    python benchmarks/peers/steady.py

Reads resident set and live tensors every 1000 steps. Exit code 1 if memory grew in the second half.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[2]))

import click
import torch

from mla import MLAConfig, load_backend
from mla.bench.subjects.inputs import make_inputs
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.workload.workload_file import read_workload
from mla.command import console
from mla.command.exit_codes import Exit, guarded
from mla.config import presets
from mla.weights import random_state_dict

STEPS, STEPS_PER_READING = 10_000, 1_000
# Growth of the resident set in bytes over the second half that is not a leak: about 52 bytes per step.
TOLERATED_BYTES = 256 << 10


class Reading(NamedTuple):
    """Memory after a number of steps, in bytes; each storage of live tensors counts once."""

    steps: int
    resident: int
    tensors: int


def verdict(readings: Sequence[Reading]) -> tuple[bool, str]:
    """Return whether memory was steady over the second half, and a sentence with the figures."""
    half, last = readings[len(readings) // 2], readings[-1]
    resident, tensors = last.resident - half.resident, last.tensors - half.tensors
    is_steady = resident <= TOLERATED_BYTES and tensors <= 0
    return is_steady, (
        f"{'steady' if is_steady else 'growing'}: from {half.steps} to {last.steps} steps the resident set "
        f"changed by {resident / 2**10:.0f} KiB and tensors by {tensors} bytes"
    )


def read(steps: int) -> Reading:
    """Read the current memory use."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Reading(steps, pages * 4096, sum(storages.values()))


@click.command(help=__doc__)
@click.option("--config", default=presets.DEFAULT_CONFIG, show_default=True, help="Preset, or a config.json.")
@torch.no_grad()
def steady(config: str) -> int:
    """Decode in passes of the standard scenario, as the runner does, with a reading every thousand steps."""
    setting = Setting(MLAConfig.named(config), load_backend("cpu"), torch.bfloat16, "auto", 64, seed=0)
    scenario = next(each for each in read_workload("standard").scenarios if each.mode == "decode")
    layer = MlaLayer(setting, random_state_dict(setting.config, setting.seed, setting.dtype))
    layer.load(scenario, make_inputs(setting.config, scenario, setting.seed, setting.dtype))
    readings = []
    for done in range(0, STEPS + 1, scenario.steps):
        if done % STEPS_PER_READING == 0:
            readings.append(read(done))
            sizes = (size / 2**20 for size in readings[-1][1:])
            console.out("{:8d} steps: resident {:.2f} MiB, tensors {:.2f} MiB\n".format(done, *sizes))
        for index in range(scenario.steps):
            layer.before(index)
            layer.step(index)
            layer.after(index)
        layer.restore()
    is_steady, sentence = verdict(readings)
    console.out(f"{sentence}\n")
    return Exit.OK if is_steady else Exit.REGRESSION


if __name__ == "__main__":
    sys.exit(guarded(lambda: steady(standalone_mode=False)))
