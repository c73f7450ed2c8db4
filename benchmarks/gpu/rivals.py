#!/usr/bin/env python3
"""Time every kernel of a backend that serves one attention op, in turns: `python -m mla.bench` with all.

    python benchmarks/gpu/rivals.py --backend nvidia --op latent_attention --heads 16 -a batch=1,8 -a kv=4k

It takes the options of that command, adds --implementations, and becomes it. Kernels that do not run here are
left out, each with its reason on stderr.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[2]))

from mla.bench.cli.run import run as bench
from mla.bench.plan.options import RunOptions
from mla.bench.workload.quantities import TIME_UNITS
from mla.command import console
from mla.command.exit_codes import guarded
from mla.errors import UnsupportedOps, UsageError

if TYPE_CHECKING:
    from mla.config import MLAConfig
    from mla_backends.api import Backend


OPS = ("latent_attention", "expanded_attention")


def options_of(words: list[str]) -> RunOptions:
    """Return the options of the run. Raises `click.ClickException` and `UsageError`."""
    options = RunOptions(**bench.make_context("rivals.py", list(words)).params)
    if options.backend is None or options.op not in OPS:
        raise UsageError(f"rivals.py needs --backend NAME, and --op {' or '.join(OPS)}.")
    if options.implementations:
        raise UsageError("rivals.py names the --implementations itself: leave them out.")
    return options


def config_of(options: RunOptions) -> MLAConfig:
    """Return the layer whose attention is measured."""
    from mla.config import MLAConfig
    from mla.config.presets import DEFAULT_CONFIG

    name = options.config or DEFAULT_CONFIG
    config = MLAConfig.from_pretrained(name) if Path(name).exists() else MLAConfig.preset(name)
    return config.with_heads(options.heads) if options.heads else config


def serving(backend: Backend, kind: str, config: MLAConfig) -> tuple[list[str], list[str]]:
    """Return the ops that serve attention of a layer in bfloat16, and why each other one does not."""
    import torch

    from mla.layer.ops import attention_spec, refusals

    assert backend.device is not None
    spec = attention_spec(config, torch.bfloat16, backend.device)
    names, reasons = [], []
    for name, op in backend.ops().items():
        if op.contract.partition("/")[0] != kind:
            continue
        if why := refusals(name, op, kind, spec, console.note):
            reasons.append(f"{name} is left out: {'; '.join(why)}")
        else:
            names.append(name)
    return names, reasons


def bench_words(words: list[str], began: float) -> list[str]:
    """Return the words of the run that times all of them. Raises `UnsupportedOps` if no op serves."""
    from mla import load_backend

    options = options_of(words)
    kind = str(options.op)
    backend = load_backend(str(options.backend), options=options.key_values())
    names, reasons = serving(backend, kind, config_of(options))
    for reason in reasons:
        console.note(reason)
    if not names:
        raise UnsupportedOps(f"no kernel of {kind} runs here: {'; '.join(reasons) or 'none is offered'}.")
    added = ["--implementations", ",".join(f"mla[{kind}={name}]" for name in names)]
    if options.budget is not None:  # what has gone by is not the run's any more; the last word counts
        left = max(TIME_UNITS["s"], options.budget - (time.monotonic() - began))
        added += ["--budget", f"{left:.0f}s"]
    return ["-m", "mla.bench", *words, *added]


def main(words: list[str]) -> int:
    """Become the run."""
    found = bench_words(words, time.monotonic())
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *found])


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
