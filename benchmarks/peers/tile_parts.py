#!/usr/bin/env python3
"""What bounds sparse attention by AMX tiles: its copies and products alone, without softmax.

\b
    python benchmarks/peers/tile_parts.py -o parts.json

16 requests that each select 2048 of 32k latents at random, at DeepSeek-V3.2's dimensions, blocked as in the
kernel (`tile_parts.cpp`). The limit is that of the runner. Parts take turns; the median of 15 rounds.
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path
from statistics import median

import click
import msgspec
import torch

from mla import load_backend
from mla.bench.limits.microbench import Microbenchmark
from mla_backend_cpu import compilation

PARTS = ("products from registers", "copies", "scores", "values", "copies, scores and values")
ROUNDS, BLOCKS, ROWS = 15, 256, 16 * 32768
FLOPS = 2 * 128 * (576 + 512) * 16 * 2048


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
def main(output: Path) -> None:
    """Carry out the command line."""
    if reason := compilation.tiles_refused():
        raise click.ClickException(f"This needs AMX tiles: {reason}.")
    threads = torch.get_num_threads()
    cache = torch.randn(1024, 576).bfloat16().repeat(ROWS // 1024, 1)
    products = Microbenchmark(load_backend("cpu"), torch.device("cpu"), torch.bfloat16)
    rates = [products.square().value]
    calls: dict[str, list[float]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "parts.so")
        flags = (*compilation.FLAGS, *compilation.LEVELS[0].flags, f"-I{compilation.SOURCES}", "-shared")
        source = str(Path(__file__).with_suffix(".cpp"))
        subprocess.run([*compilation.find_compiler(), *flags, source, "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run_part
        run.restype, run.argtypes = ctypes.c_double, [ctypes.c_int64, ctypes.c_void_p, *3 * [ctypes.c_int64]]
        for _ in range(ROUNDS):
            for i, part in enumerate(PARTS):
                calls[part].append(run(i, cache.data_ptr(), ROWS, BLOCKS, threads) * 128 / threads / BLOCKS)
    limit = FLOPS / max(*rates, products.square().value)
    report = {"threads": threads, "torch": str(torch.__version__), "limit_ms": round(1e3 * limit, 3)}
    shares = {part: (median(seconds), limit / median(seconds)) for part, seconds in calls.items()}
    report["parts"] = {
        part: {"ms": round(1e3 * s, 3), "of_limit": round(share, 3)} for part, (s, share) in shares.items()
    }
    output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    main()
