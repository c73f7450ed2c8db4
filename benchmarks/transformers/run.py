"""A model of `transformers` with one layer of real dimensions, against itself with our ops.

    python -m benchmarks.transformers.run --backend cpu -o benchmarks/transformers/results/NAME.json

Random weights. Sides run in turns: `transformers` with sdpa and eager in three dtypes, while they are at most
twice as slow as the fastest; and our ops, with the stock dynamic cache and with a paged one. Phases: a decode
step; 64 tokens appended to a history; prefill of a whole prompt. On a host, each phase is measured in two
processes: with glibc's default allocator, and with one that keeps freed memory in the process.
`python -m benchmarks.transformers.summary` makes tables and pictures of the result.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

import mla

try:
    import mla.integrations.transformers as _  # noqa: F401
except ImportError as error:
    sys.exit(f"error: {error}")
from benchmarks.transformers import worker
from benchmarks.transformers.meters import require_meter
from benchmarks.transformers.record import LAYERS, RECORD, Record, write
from benchmarks.transformers.work import PHASES
from mla.bench.measure.passes import CacheFlush
from mla.command import files
from mla.command.console import note
from mla.command.environment import environment, git_commit
from mla.errors import MLAError
from mla_backends import BackendError, host
from mla_backends.api import Backend

HISTORIES = (64, 512, 2048, 4096, 16384, 65536)
PACKAGES = ("torch", "transformers")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return 0; 1 where one sentence on stderr says why there is no number."""
    words = list(arguments if arguments is not None else sys.argv[1:])
    asked = _parse(words)
    try:
        _run(asked, words)
    except (MLAError, BackendError, torch.OutOfMemoryError) as error:
        note(f"error: {error}")
        return 1
    return 0


def _run(asked: argparse.Namespace, words: Sequence[str]) -> None:
    """Measure, and write after every length."""
    backend = mla.load_backend(asked.backend)
    device = backend.device or torch.device("cpu")
    require_meter(device)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    files.check_writable(asked.output, RECORD)
    allocators = list(worker.ALLOCATORS)[: 2 if device.type == "cpu" else 1]
    shown = [asked.output.name if word == str(asked.output) else word for word in words]
    record = _record(backend, asked, allocators, shown)
    for task in _tasks(asked, allocators):
        with worker.process(task) as rows:
            for length in sorted(asked.history):
                if task.phase != "prefill" or length <= asked.longest_prefill:
                    record.rows += rows(length)
                    write(record, asked.output)
    note(f"written to {asked.output}")


def _tasks(asked: argparse.Namespace, allocators: Sequence[str]) -> Iterator[worker.Task]:
    """Yield the processes: settings of the allocator in turns, the first one last every second time."""
    tokens = asked.batch * (max(asked.history) + 1024)
    for turn, (config, phase) in enumerate(product(asked.config or LAYERS, asked.phase or PHASES)):
        for allocator in allocators[:: -1 if turn % 2 else 1]:
            yield worker.Task(
                config, asked.backend, phase, allocator, asked.batch, tokens, asked.rounds, asked.seconds
            )


def _record(
    backend: Backend, asked: argparse.Namespace, allocators: Sequence[str], words: list[str]
) -> Record:
    """Return a record without rows."""
    return Record(
        device=backend.device_info().name,
        label=asked.label,
        threads=torch.get_num_threads(),
        backend=asked.backend,
        versions={package: version(package) for package in PACKAGES},
        commit=git_commit(),
        environment=environment(backend) | _allocation(),
        allocators={allocator: worker.ALLOCATORS[allocator] for allocator in allocators},
        memory_bytes=host.memory_total(),
        flush=CacheFlush(backend).method(),
        date=date.today().isoformat(),
        arguments=words,
    )


def _allocation() -> dict[str, str]:
    """Return what memory of the host depends on, besides our own settings."""
    facts = {"libc": " ".join(platform.libc_ver()), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if HUGE_PAGES.is_file():
        facts["transparent_hugepage"] = HUGE_PAGES.read_text().strip()
    return facts | {
        key: value for key, value in os.environ.items() if key == "LD_PRELOAD" or key.startswith("MALLOC_")
    }


def _count(word: str) -> int:
    """Return a number of at least one."""
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"'{word}' is not a number of at least 1")
    return int(word)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--label", default="", help="of the machine, in headings of a second one's tables")
    parser.add_argument("--config", action="append", choices=LAYERS, help="may be repeated; default: all")
    parser.add_argument("--batch", type=_count, default=1, help="requests of a forward")
    parser.add_argument("--history", type=_count, nargs="+", default=list(HISTORIES), help="tokens of each")
    parser.add_argument("--phase", action="append", choices=PHASES, help="may be repeated; default: all")
    parser.add_argument(
        "--longest-prefill", type=int, default=16384, help="tokens of a whole prompt, at most"
    )
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a side in a round, about")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
