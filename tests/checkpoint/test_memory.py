"""How much memory reading takes, in processes of their own: the layer, and little beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import checkpoint_maker as maker
import pytest
import torch

# Reads a tiny layer first, so that what is imported and allocated once does not count. Linux keeps the peak
# of resident memory, pages of mapped files included; writing 5 resets it.
SCRIPT = """
import json, math, sys
import torch
import mla
from mla.weights import weight_shapes
from mla_backends.testing import HostBackend

class Copying(mla_backends.FusedOp):
    contract = "linear/1"
    def pack(self, weight):
        return mla_backends.api.Packed(weight.clone(), weight.nbytes)
    def __call__(self, *args, **tensors): ...

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

warm_up, folder, layer = sys.argv[1:4]
backend = HostBackend(ops={"copying": Copying()} if COPY else {})
mla.MLA.from_pretrained(warm_up, layer=3, backend=backend)
try:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = memory("VmRSS")
except OSError:  # not allowed here: the growth beyond the peak so far is the best there is
    before = memory("VmHWM")
built = mla.MLA.from_pretrained(folder, layer=int(layer), backend=backend)
grown = memory("VmHWM") - before
size = sum(2 * math.prod(shape) for shape in weight_shapes(built.config).values())
if len(sys.argv) > 4:
    torch.save({name: built.state_dict()[name] for name in sys.argv[4:]}, "read.pt")
print(json.dumps([grown, size]))
"""
PEAK = 1.3  # of the layer


def grown(folder: Path, warm_up: Path, cwd: Path, *names: str, copy: bool = False) -> float:
    """Return how much a process grows while it reads layer 3, relative to the layer in BF16."""
    cwd.mkdir(exist_ok=True)
    script = f"COPY = {copy}\nimport mla_backends\nimport mla_backends.api\n{SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(warm_up), str(folder), "3", *names],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, size = json.loads(done.stdout)
    return peak / size


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that is removed at once: pytest keeps its own for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_reading_real_layers_takes_little_more_memory_than_they_do(work: Path) -> None:
    """DeepSeek-R1's dimensions, 374 MB in BF16, of which kv_b is packed for both its uses."""
    warm_up = maker.LAYOUTS["fp8"].make(work / "warm_up").folder
    made = maker.LAYOUTS["fp8-sharded"].make(work / "model", "real")
    names = ("kv_a_proj_with_mqa.weight", "q_a_proj.weight", "kv_a_layernorm.weight")
    assert grown(made.folder, warm_up, work, *names) <= PEAK
    read = torch.load(work / "read.pt", weights_only=True)
    assert all(torch.equal(read[name], made.state[name]) for name in names)
    maker.write(made.folder, made.values, maker.named(made.state, maker.LAYER))
    (made.folder / "model.safetensors.index.json").unlink()
    for shard in made.folder.glob("model-*"):
        shard.unlink()
    assert grown(made.folder, warm_up, work, copy=True) <= PEAK  # by ops that lay weights out anew


def test_other_layers_in_the_same_file_stay_on_disk(work: Path) -> None:
    warm_up = maker.LAYOUTS["full-names"].make(work / "warm_up").folder
    values = maker.values_of("ragged", hidden_size=4000, num_attention_heads=256, v_head_dim=64)
    size = sum(weight.nbytes for weight in maker.plain(values).values())
    assert size > 70e6
    layers = [maker.named(maker.plain(values), f"model.layers.{number}.self_attn.") for number in range(2, 5)]
    folder = maker.write(work / "model", values, layers[0] | layers[1] | layers[2])
    assert grown(folder, warm_up, work) <= PEAK
