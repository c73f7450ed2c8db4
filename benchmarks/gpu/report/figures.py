"""Figures of a campaign's result files: against the original's, and against the card's own ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from mla.bench.results.schema import Case, Latency, Run

# Published by the original test for its own implementation, whose sizes are those of the default config
# (hidden 2048, 16 heads): README.md of InfiniLM's test/models/deepseek_r1, which does not name its card.
ORIGINAL_CONFIG = "deepseek-v2-lite"
ORIGINAL_PREFILL_MS = 2.22
ORIGINAL_DECODE_TOKENS = 2224.27
FOOTNOTE = """\
original: 2.22 ms per prefill batch and 2224.27 tok/s of decode, means over 100 runs, published in the README
of InfiniLM's test/models/deepseek_r1 for its own implementation with deepseek-v2-lite's sizes; it names no
card, and has no figure for other configs. Figures here are means too. ratio: how many times as fast.
"""


def standard_rows(runs: Mapping[str, Run]) -> list[list[str]]:
    """Return a row per timing of the standard scenarios, on the host's clock."""
    cases = [(run, case) for run in runs.values() for case in run.cases]
    return [_standard_row(run, case, *timing) for run, case in cases for timing in _timings(case)]


def _timings(case: Case) -> Iterator[tuple[str, str, Latency | None]]:
    """Yield mode, cache and latency of the headline, and of what was timed besides on the host's clock."""
    yield "eager", "warm", case.latency_ms
    for timing in case.timings:
        if timing.clock in ("host", case.clock):
            yield timing.mode, timing.cache, timing.latency_ms


def _standard_row(run: Run, case: Case, mode: str, cache: str, latency: Latency | None) -> list[str]:
    name, config = f"{case.scenario}, {case.implementation}", Path(str(run.config.get("name", ""))).name
    if latency is None:
        return [config, name, mode, cache, "-", "-", "-", f"{case.check.status} {case.check.reason}".strip()]
    mean, tokens = statistics.fmean(latency.samples), sum(case.query_lens)
    comparable = config == ORIGINAL_CONFIG and cache == "warm"
    if case.mode == "prefill":
        figure, original, ratio = f"{mean:.4g} ms", f"{ORIGINAL_PREFILL_MS} ms", ORIGINAL_PREFILL_MS / mean
    else:
        rate = tokens / mean * 1e3
        figure, original = f"{rate:.4g} tok/s", f"{ORIGINAL_DECODE_TOKENS} tok/s"
        ratio = rate / ORIGINAL_DECODE_TOKENS
    compared = [original, f"{ratio:.3g}x"] if comparable else ["-", "-"]
    return [config, name, mode, cache, figure, *compared, case.check.status]


def attention_rows(runs: Mapping[str, Run], ceilings: Mapping[str, float]) -> list[list[str]]:
    """Return a row per case: its latency, and what it needs as shares of the measured ceilings."""
    return [
        [
            step, f"{case.scenario}, {case.implementation}", _op(case), *_shares(case, ceilings),
            f"{case.check.status} {case.check.reason}".strip(),
        ]
        for step, run in runs.items()
        for case in run.cases
    ]  # fmt: skip


def _op(case: Case) -> str:
    """Return the implementations of attention that ran."""
    used = [case.ops.get(role) for role in ("latent_attention", "expanded_attention")]
    return " ".join(dict.fromkeys(name for name in used if name))


def _shares(case: Case, ceilings: Mapping[str, float]) -> list[str]:
    if case.latency_ms is None:
        return ["-", "-", "-"]
    seconds = case.latency_ms.median / 1e3
    work = {"copy": case.cost.bytes, "matmul": case.cost.flops}
    shares = (
        f"{100 * work[kind] / seconds / ceilings[kind]:.0f} %" if ceilings.get(kind) else "-" for kind in work
    )
    return [f"{case.latency_ms.median:.4g}", *shares]
