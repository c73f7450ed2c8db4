#!/usr/bin/env python3
"""Time every kernel of a backend that serves one attention op, in turns: `python -m mla.bench` with all.

    python benchmarks/gpu/rivals.py --backend nvidia --op latent_attention --heads 16 -a batch=1,8 -a kv=4k

It takes the options of that command, adds --implementations, and becomes it. Without --op, the layer runs
with each absorbed attention, beside its own choice and the reference. Kernels that do not run here are left
out, each with its reason on stderr.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from mla.bench.cli.run import run as bench
from mla.bench.plan.options import RunOptions
from mla.command import console
from mla.command.exit_codes import Exit, guarded
from mla.errors import UnsupportedOps, UsageError

if TYPE_CHECKING:
    from mla.config import MLAConfig
    from mla_backends.api import Backend


OPS = ("latent_attention", "expanded_attention", "sparse_latent_attention", "select_latents")
ASK = "ask"  # first word of the child's command line


def options_of(words: list[str]) -> RunOptions:
    """Return the options of the run. Raises `click.ClickException` and `UsageError`."""
    options = RunOptions(**bench.make_context("rivals.py", list(words)).params)
    if options.backend is None or options.op not in (*OPS, None):
        raise UsageError(f"rivals.py needs --backend NAME, and --op {', '.join(OPS)} or no --op.")
    if options.implementations:
        raise UsageError("rivals.py names the --implementations itself: leave them out.")
    return options


def serving(backend: Backend, kind: str, config: MLAConfig) -> tuple[list[str], list[str]]:
    """Return the ops that serve this kind in a layer in bfloat16, and why each other one does not."""
    import torch

    from mla.layer.ops import attention_spec, indexer_spec, refusals

    assert backend.device is not None
    spec: Any = attention_spec(config, torch.bfloat16, backend.device)
    if kind == "select_latents":
        spec = indexer_spec(config, torch.bfloat16, backend.device)
    elif kind == "sparse_latent_attention":
        spec = replace(spec, topk=config.index_topk)
    names, reasons = [], []
    for name, op in backend.ops().items():
        if op.contract.partition("/")[0] != kind:
            continue
        if why := refusals(name, op, kind, spec, console.note):
            reasons.append(f"{name} is left out: {'; '.join(why)}")
        else:
            names.append(name)
    return names, reasons


def implementations(words: list[str]) -> str:
    """Return what is to take turns, as --implementations has it. Raises `UnsupportedOps` if no op serves."""
    from mla import MLAConfig, load_backend
    from mla.config.presets import DEFAULT_CONFIG

    options = options_of(words)
    config = MLAConfig.named(options.config or DEFAULT_CONFIG)
    kind = options.op or OPS[0]
    backend = load_backend(str(options.backend), options=options.key_values())
    names, reasons = serving(backend, kind, config.with_heads(options.heads or config.num_attention_heads))
    if not names:
        raise UnsupportedOps(f"no kernel of {kind} runs here: {'; '.join(reasons) or 'none is offered'}.")
    for reason in reasons:
        console.note(reason)
    rivals = [f"mla[{kind}={name}]" for name in names]
    return ",".join(rivals if options.op else ["mla", *rivals, f"mla[{kind}=reference]"])


def bench_words(words: list[str], named: str, gone: float) -> list[str]:
    """Return the words of the run, whose budget is shorter by the seconds that are gone."""
    added = ["--implementations", named]
    budget = options_of(words).budget
    if budget is not None:  # of a word that is given twice, the last counts
        added += ["--budget", f"{max(1.0, budget - gone):.0f}s"]
    return ["-m", "mla.bench", *words, *added]


def main(words: list[str]) -> int:
    """Become the run. A child asks the kernels, so that nothing of them is left on the device."""
    if words[:1] == [ASK]:
        console.out(f"{implementations(words[1:])}\n")
        return Exit.OK
    began = time.monotonic()
    options_of(words)
    asked = subprocess.run(
        [sys.executable, __file__, ASK, *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if asked.returncode:
        return asked.returncode
    named = asked.stdout.splitlines()[-1]
    command = [sys.executable, *bench_words(words, named, time.monotonic() - began)]
    return os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
