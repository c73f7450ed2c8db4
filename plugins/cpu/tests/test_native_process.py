"""What a process notices of the kernels: one OpenMP runtime, the threads it asked for, and steady memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from native_cases import levels_here

from mla_backend_cpu import compilation

#: A layer small enough that a step takes a fraction of a millisecond, with every native op in use.
SETUP = """if True:
    import json, os, pathlib, re
    import torch, mla
    from mla.weights import random_state_dict

    backend = mla.load_backend("cpu", options={"threads": THREADS})
    config = mla.MLAConfig(
        hidden_size=64, num_attention_heads=2, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
    )
    layer = mla.MLA(config, backend=backend)
    layer.load_state_dict(random_state_dict(config))
    cache = mla.LatentCache(config, max_tokens=512, device=backend.device)
    ids = cache.new_sequences(3)
    names = set(layer.ops.names().values())

    def step(tokens=1):
        batch = cache.extend(ids, [tokens, 1, 1])
        hidden = torch.ones(tokens + 2, 64).bfloat16()
        return layer(hidden, batch, cache.pages[0])

    def status(field):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
"""


def run(code: str, threads: str = "2", **variables: str) -> Any:
    """Run code after `SETUP` in a process of its own and return what it prints as JSON."""
    setup = SETUP.replace("THREADS", repr(threads))
    lines = "\n".join("    " + line for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", setup + lines],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("no_level_named")
def test_one_openmp_runtime_is_loaded_and_every_op_is_native() -> None:
    code = """
step()
maps = pathlib.Path("/proc/self/maps").read_text()
runtimes = set(re.findall(r"\\S*/lib(?:g|i)?omp[^/\\s]*", maps))
gain = float(backend.environment().get("native_product_gain", 1))
print(json.dumps([sorted(names), gain, sorted(runtimes), "/kernels.so" in maps]))"""
    names, gain, runtimes, loaded = run(code)
    assert all(name.startswith("native_") for name in names) or (
        gain < 1 and "native_latent_attention" in names
    )
    assert len(runtimes) == 1
    assert loaded


def test_thousands_of_decode_steps_take_no_more_memory() -> None:
    code = """
def decode(count):
    for i in range(count):
        if i % 100 == 0:
            for sequence in ids: cache.truncate(sequence, 0)
        step()
    return status("VmRSS")
step(300)
before, after = decode(500), decode(2500)
print(json.dumps([before, after]))"""
    before, after = run(code)
    assert after - before <= 256  # KiB, of some 300,000: 105 bytes a step


@pytest.mark.parametrize("count", ["1", "2"])
def test_no_more_threads_run_than_asked_for(count: str) -> None:
    code = """
before = status("Threads")
step(300)
for _ in range(5): step()
print(json.dumps([before, status("Threads"), torch.get_num_threads(), backend.environment()["threads"]]))"""
    before, after, used, said = run(code, threads=count, OMP_NUM_THREADS="3")
    assert used == int(count)
    assert said == count
    assert after - before <= int(count) - 1


@pytest.mark.parametrize("level", [compilation.EMULATED, levels_here()[0]])
def test_the_conformance_checks_pass(level: str) -> None:
    """The checks of the reference ops are left out: they are not of this plugin."""
    options = ("--backend", "cpu", "-O", f"native={level}", "--quick", "--dtype", "bfloat16", "--draws", "20")
    options += ("--only", "*[*native_*]")
    if level != compilation.EMULATED:  # it differs from the others inside its kernels alone
        options += ("--only", "device", "--only", "layer")
    done = subprocess.run(
        [sys.executable, "-m", "mla.conformance", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    prefix = "amx_emulated_" if level == compilation.EMULATED else ""
    assert f"`{prefix}native_latent_attention`" in done.stdout
