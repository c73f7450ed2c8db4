"""Ten times to look at before and after a change of shape: nothing asserts them.

    python -m benchmarks.frozen_times [NOTE] >> benchmarks/frozen_times.md

adds a row to that table. Commands are processes: CPU seconds of the fastest of three, imports included.
Forwards are those of a tiny layer on one thread, where Python is all that takes time.
"""

from __future__ import annotations

import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mla import MLA, LatentCache, MLAConfig
from mla.weights import random_state_dict
from mla_backends import host

DIMS: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24}
RUN = Path(__file__).parent / "results" / "cpu-xeon-amx-2vcpu-deepseek-v2-lite.json"
BACKEND = ("--backend", "mla_backends.testing:HostBackend", "--dtype", "float32")
COUNTS = ("--batch", "4", "--kv", "100", "--runs", "4", "--passes", "2", "--mode", "eager", "--cache", "warm")
QUICK = ("--quick", "--draws", "0")
PROCESSES: dict[str, Sequence[str]] = {
    "import mla": ("-c", "import mla"),
    "import of the layer": ("-c", "from mla import MLA"),
    "bench --help": ("-m", "mla.bench", "--help"),
    "bench show": ("-m", "mla.bench", "show", str(RUN)),
    "conformance --list": ("-m", "mla.conformance", "--list"),
    "an op": ("-m", "mla.bench", *BACKEND, "--config", "tiny.json", "--op", "latent_attention", *COUNTS),
    "conformance of writing": ("-m", "mla.conformance", *BACKEND, *QUICK, "--only", "write_latent"),
    "conformance of a decode": ("-m", "mla.conformance", *BACKEND, *QUICK, "--only", "latent.formula"),
}


def cpu_seconds(words: Sequence[str], folder: str) -> float:
    """Return the CPU seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def forward_us(query_len: int) -> float:
    """Return the microseconds of a forward of two requests: the median of 300."""
    config = MLAConfig(**DIMS, name="tiny")
    layer = MLA(config, dtype=torch.float32)
    layer.load_state_dict(random_state_dict(config, 0, torch.float32))
    cache = LatentCache(config, max_tokens=1024, dtype=torch.float32)
    batch = cache.extend(cache.new_sequences(2), query_lens=[query_len, query_len])
    hidden = torch.randn(2 * query_len, config.hidden_size)

    times = timeit.repeat(lambda: layer(hidden, batch, cache.pages[0]), repeat=300, number=1)
    return 1e6 * statistics.median(times)


def main(note: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tiny.json").write_text(json.dumps(DIMS))
        rows = {name: min(cpu_seconds(words, folder) for _ in range(3)) for name, words in PROCESSES.items()}
    cells = [*(f"{seconds:.2f} s" for seconds in rows.values()), *(f"{forward_us(n):.0f} us" for n in (1, 8))]
    where = (str(datetime.date.today()), host.processor_name(), f"torch {torch.__version__}", note)
    print(f"| {', '.join(filter(None, where))} | {' | '.join(cells)} |")  # noqa: T201


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
