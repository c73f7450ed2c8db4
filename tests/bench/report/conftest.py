"""Two runs that have everything a result file can hold, made without a device: the numbers mean nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla.bench import results
from mla.bench.report import page
from mla.bench.results.cases import latency_of, throughput_of

# Relative speed of the two cards' implementations.
SLOWNESS = {"mla": 1.0, "mla-reference": 3.0}
CEILINGS = {"read": 3.0e12, "copy": 2.6e12, "matmul": 9.0e14}


def noisy(median: float, rng: random.Random, steps: int) -> list[list[float]]:
    """Return six passes of noisy samples around `median`, growing a little within every pass."""
    return [
        [
            median * (1 + 0.1 * step / steps + 0.02 * rng.random() + 0.8 * (rng.random() > 0.995))
            for step in range(steps)
        ]
        for _ in range(6)
    ]


def latency(passes: list[list[float]]) -> results.Latency:
    """Return their statistics, with a drift and outliers that are the same on every machine."""
    return msgspec.structs.replace(latency_of(passes), drift=0.004, outliers=3)


def roofline(cost: results.Cost, median: float, slow: float) -> results.Roofline:
    """Return the distance to the card's limits."""
    memory = 1e3 * cost.bytes * slow / CEILINGS["read"]
    compute = 1e3 * cost.flops * slow / CEILINGS["matmul"]
    return results.Roofline(
        floor_ms=max(memory, compute),
        fraction=max(memory, compute) / median,
        bound="memory" if memory >= compute else "compute",
        peak_source="measured: sum, 512 MiB",
    )


def build(
    make: Callable[..., results.Case], slow: float, implementation: str, scenario: str, **changes: Any
) -> results.Case:
    """Return a case with numbers that follow from its lengths."""
    rng = random.Random(f"{slow} {implementation} {scenario}")
    query, history = changes.pop("query_lens", [1] * 16), changes.pop("history", [200] * 16)
    tokens, attended = sum(query), sum(query) + sum(history)
    pairs = sum(q * (h + q) for q, h in zip(query, history, strict=True))
    cost = results.Cost(flops=4 * 10**7 * tokens + 280_000 * pairs, bytes=3 * 10**7 + 1200 * attended)
    median = slow * SLOWNESS[implementation] * (0.02 + 1e3 * (cost.bytes / 2e12 + cost.flops / 5e14))
    passes = noisy(median, rng, 40)
    estimate = latency(passes)
    fields: dict[str, Any] = {
        "scenario": scenario,
        "mode": "prefill" if max(query) > 1 else "decode",
        "implementation": implementation,
        "query_lens": query,
        "history": history,
        "steps_per_pass": 40,
        "passes": 6,
        "interleaved_with": [name for name in SLOWNESS if name != implementation],
        "latency_ms": estimate,
        "tokens_per_s": throughput_of(passes, tokens),
        "switch_steps": [0, 80, 160],
        "cost": cost,
        "roofline": roofline(cost, estimate.median, slow),
        "repro": f"python -m mla.bench --scenario '{scenario}' --implementations {implementation}",
        "base": scenario.partition(" ")[0],
        "ops": {"linear": "fused_linear", "latent_attention": "fused_attention", "rms_norm": "reference"}
        if implementation == "mla"
        else {"linear": "reference", "latent_attention": "reference", "rms_norm": "reference"},
        "heads": 16,
    }
    return make(**{**fields, **changes})


def timings(timed_case: results.Case, slow: float) -> list[results.Timing]:
    """Return the same case timed with a cold cache, as a graph, and by the device."""
    assert timed_case.latency_ms is not None
    rng, median, made = random.Random(timed_case.scenario), timed_case.latency_ms.median, []
    refused = results.Check(status="not run", reason="no graph of this op can be captured")
    ways: list[tuple[Any, Any, str, float]] = [
        ("eager", "cold", "host", 1.5),
        ("graph", "warm", "host", 0.6),
        ("graph", "warm", "device events", 0.5),
        ("graph", "cold", "host", 0),
    ]
    for mode, cache, clock, factor in ways:
        right = results.Check(status="ok") if factor else refused
        found = latency(noisy(median * factor, rng, 10)) if factor else None
        way = {"mode": mode, "cache": cache, "clock": clock, "passes": 6 * bool(factor)}
        made.append(results.Timing(**way, check=right, latency_ms=found))
    return made


def stages(timed_case: results.Case) -> list[results.Stage]:
    """Return the parts of a forward."""
    assert timed_case.latency_ms is not None
    shares = {"projections": 0.4, "attention": 0.35, "o_proj": 0.2, "cache write": 0.05, "launches": 0.15}
    made = []
    for name, share in {**shares, "attention: w_uk": 0.1}.items():
        limit = results.Roofline(floor_ms=0.1, fraction=0.5 * share, bound="memory")
        ms = share * timed_case.latency_ms.median
        made.append(results.Stage(name=name, ms=ms, cost=timed_case.cost, roofline=limit))
    return made


def ceilings(slow: float) -> list[results.Ceiling]:
    """Return what a card reached: reading from memory and from its cache, copying, products."""
    read, copy, matmul = (CEILINGS[work] / slow for work in ("read", "copy", "matmul"))
    return [
        results.Ceiling(work="read", value=read, source="measured: sum", footprint_bytes=512 << 20),
        results.Ceiling(work="read", value=3 * read, source="measured: sum", footprint_bytes=32 << 20),
        results.Ceiling(work="copy", value=copy, source="measured: copy_"),
        results.Ceiling(work="matmul", value=matmul, source="measured: mm", dtype="bfloat16"),
    ]


def scenarios(make: Callable[..., results.Case], slow: float) -> list[results.Case]:
    """Return the two standard scenarios, taken apart and timed in other ways, and a wrong case."""
    cases = []
    for name in SLOWNESS:
        prefill = {"query_lens": [64, 128, 256, 256], "history": [512, 0, 0, 256]}
        for built in (build(make, slow, name, "prefill", **prefill), build(make, slow, name, "decode")):
            built.timings, built.stages = timings(built, slow), stages(built)
            built.launch_bound = built.mode == "decode"
            built.device_state = [
                {"sm clock": "1980 MHz", "power": "310 W"},
                {"sm clock": "1755 MHz", "power": "650 W"},
            ]
            cases.append(built)
    wrong = build(make, slow, "mla", "long-prefill", query_lens=[4096], history=[0])
    wrong.latency_ms = wrong.tokens_per_s = None
    wrong.roofline = results.Roofline()
    wrong.check = results.Check(
        status="wrong", error_ratio=31.0, relative_error=0.3, reason="row 17 is off by 31 times its bound"
    )
    return [*cases, wrong]


def grid(make: Callable[..., results.Case], slow: float) -> list[results.Case]:
    """Return a decode scenario laid out over history and batch."""
    return [
        build(
            make,
            slow,
            "mla",
            f"sweep [kv={kv}, batch={batch}]",
            query_lens=[1] * batch,
            history=[kv] * batch,
            point={"kv": kv, "batch": batch},
        )
        for batch in (1, 16)
        for kv in (256, 4096, 65536)
    ]


def rich_runs(make_run: Callable[..., results.Run], make: Callable[..., results.Case]) -> list[results.Run]:
    """Return runs of two cards, the second 1.3 times as slow."""
    runs = []
    for device, slow in (("Card One 80GB", 1.0), ("Card Two", 1.3)):
        run = make_run()
        run.backend.device, run.git_commit = device, "0123456789abcdef0123456789abcdef01234567-dirty"
        run.config = {"name": "deepseek-v2-lite", "hidden_size": 2048, "rope_scaling": {"factor": 40.0}}
        run.cases = scenarios(make, slow) + grid(make, slow)
        run.ceilings = ceilings(slow)
        runs.append(run)
    return runs


@pytest.fixture
def rich(make_run: Callable[..., results.Run], case: Callable[..., results.Case]) -> list[results.Run]:
    """Return the two runs, to change and to render."""
    return rich_runs(make_run, case)


@pytest.fixture(scope="session")
def rich_page(make_run: Callable[..., results.Run], case: Callable[..., results.Case]) -> str:
    """Return the report about the two runs, rendered once."""
    return page.render(["one.json", "two.json"], rich_runs(make_run, case))


@pytest.fixture
def files(rich: Sequence[results.Run], tmp_path: Path) -> list[str]:
    """Write the two runs and return their names."""
    names = ["one.json", "two.json"]
    for name, run in zip(names, rich, strict=True):
        results.write(run, tmp_path / name)
    return names
