"""--simulate: what is run, what is predicted, and that nobody takes the one for the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_run import write_tiny_run

from mla.bench import results
from mla.bench.ranks import launch, pulse
from mla.bench.results.schema import Cost, LinkLine, RankFacts, Spread
from mla.config import MLAConfig
from mla.parallel.groups import SimulatedGroups
from mla.parallel.layer import ParallelMLA
from mla.parallel.layout import Layout, rank_work

Bench = Callable[..., Any]
# Two messages of an all-reduce between two ranks: two seconds that no forward here takes.
SLOW, SECONDS = "alpha=1s,beta=1GB/s", 2.0


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Return the options of a run in a blink: two requests of different length, and reference ops alone."""
    options = write_tiny_run(tmp_path, passes=1, prefill_runs=1, decode_runs=2, history=(5, 9))
    return ["--backend", "cpu", *options, "--implementations", "mla-reference"]


@pytest.fixture
def simulate(bench: Bench, tiny: list[str]) -> Callable[..., results.Run]:
    """Return a function that simulates a layout and returns the result."""

    def simulate(layout: str, *words: str) -> results.Run:
        done = bench(*tiny, "--parallel", layout, "--simulate", *words, "-o", "run.json")
        assert done.code == 0, done.err
        return results.read(Path("run.json"))

    return simulate


@pytest.mark.parametrize(
    ("layout", "timed", "words"),
    [
        ("tp=2,dcp=2", [0, 1], ()),
        ("dcp=4", [0, 1, 2, 3], ()),
        ("dp=2,tp=2", [0, 2], ()),
        ("tp=2,dcp=2", [0, 1], ("--cache-format", "fp8")),
    ],
)
def test_every_share_that_differs_is_timed(
    simulate: Callable[..., results.Run], layout: str, timed: list[int], words: tuple[str, ...]
) -> None:
    for case in simulate(layout, *words).cases:
        assert case.check.status == "ok"
        spread = case.spread
        assert spread is not None
        assert spread.predicted
        assert [share.rank for share in spread.ranks] == list(range(4))
        assert spread.timed_ranks == timed
        assert case.latency_ms is not None
        slowest = [max(times) for times in zip(*(share.samples for share in spread.ranks), strict=True)]
        assert case.latency_ms.samples == slowest
        assert spread.compute_ms == pytest.approx(case.latency_ms.median)  # an ideal link adds nothing
        assert [share.cost for share in spread.ranks] == [
            expected_cost(case, layout, rank) for rank in range(4)
        ]


def expected_cost(case: results.Case, text: str, rank: int) -> Cost:
    """Return the mean work of a rank over a pass; with dp=2, of the two requests it has one."""
    layout, attention = Layout.parse(text), "absorbed" if "dcp" in text else "auto"
    requests = slice(rank // 2, rank // 2 + 1) if layout.dp == 2 else slice(None)
    new, past = case.query_lens[requests], case.history[requests]
    grown = range(1, 1 + case.steps_per_pass) if case.mode == "decode" else [1]
    works = [
        rank_work(
            MLAConfig.named("tiny.json"),
            layout,
            rank,
            new,
            [old + times * more for old, more in zip(past, new, strict=True)],
            itemsize=2,
            attention=attention,
            token_bytes=(32 + 8) * ("fp8" in case.scenario),  # 0: numbers of `itemsize`
        )
        for times in grown
    ]
    flops, moved = (sum(column) / len(works) for column in zip(*works, strict=True))
    return Cost(flops=round(flops), bytes=round(moved))


def test_a_part_of_dp_with_the_same_lengths_is_not_timed_again(
    simulate: Callable[..., results.Run], tmp_path: Path
) -> None:
    write_tiny_run(tmp_path, passes=1, prefill_runs=1, decode_runs=2, history=(9, 9))
    run = simulate("dp=2", "--scenario", "decode")
    assert [case.spread.timed_ranks for case in run.cases if case.spread] == [[0]]


def test_collectives_are_added_and_every_place_says_so(bench: Bench, tiny: list[str]) -> None:
    done = bench(*tiny, "--parallel", "tp=2", "--simulate", "--link", SLOW, "-o", "run.json")
    assert "simulated  2 ranks of tp=2 on this device" in done.err
    assert "decode: mla-reference (predicted) 2" in done.err  # more than two seconds
    for case in results.read(Path("run.json")).cases:
        assert case.latency_ms is not None
        assert case.spread is not None
        assert case.spread.compute_ms is not None
        assert min(case.latency_ms.samples) > 1e3 * SECONDS
        added = case.latency_ms.median - case.spread.compute_ms
        assert added == pytest.approx(case.spread.ranks[0].collective_ms) == pytest.approx(2e3, rel=1e-3)
        assert "--simulate --link alpha=1e+06us,beta=1GB/s" in case.repro
        assert "torchrun" not in case.repro
    for kind in ("table", "md"):
        printed = bench("show", "run.json", "--format", kind, "-v").out
        named = [line for line in printed.splitlines() if "mla-reference" in line]
        assert len(named) >= 6
        assert all("mla-reference (predicted)" in line for line in named)
    table = bench("show", "run.json", "--format", "csv").out
    assert ",predicted," in table.splitlines()[0]
    assert ",true," in table.splitlines()[1]
    assert bench("report", "run.json", "--html", "run.html").code == 0
    page = Path("run.html").read_text()
    assert "mla-reference (predicted)" in page
    assert bench("report", "run.json", "--pictures", "pictures").code == 0
    titled = [path for path in Path("pictures").glob("*latency*") if "mla-reference" in path.read_text()]
    assert titled
    assert all("mla-reference (predicted)" in path.read_text() for path in titled)
    assert "alpha=1e+06us,beta=1GB/s (given)" in page


def test_predictions_and_measurements_are_not_compared(
    bench: Bench, simulate: Callable[..., results.Run]
) -> None:
    run = simulate("tp=2", "--link", SLOW)
    alone = [msgspec.structs.replace(case, spread=None) for case in run.cases]
    results.write(msgspec.structs.replace(run, cases=alone), Path("measured.json"))
    refused = bench("compare", "measured.json", "run.json")
    assert refused.code == 5
    assert "the new run is predicted, and the other measured" in refused.out
    results.write(msgspec.structs.replace(run, created="2001-01-01T00:00:00+00:00"), Path("later.json"))
    same = bench("compare", "run.json", "later.json")
    assert same.code == 0
    assert "mla-reference (predicted): too few passes" in same.out
    assert "both are predicted" in same.out
    for case in run.cases:
        assert case.spread is not None
        case.spread.link = []
    results.write(run, Path("ideal.json"))
    assert "both are predicted, on links that differ" in bench("compare", "ideal.json", "run.json").out


def test_a_prediction_is_resumed_on_its_own_link_alone(
    bench: Bench, tiny: list[str], simulate: Callable[..., results.Run]
) -> None:
    simulate("tp=2", "--link", SLOW)
    other = bench(*tiny, "--parallel", "tp=2", "--simulate", "--resume", "run.json")
    assert other.code == 2
    assert "--link was alpha=1e+06us,beta=1GB/s and is ideal" in other.error
    assert bench(*tiny, "--parallel", "tp=2", "--simulate", "--link", SLOW, "--resume", "run.json").code == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_share_that_computes_nothing_while_it_is_timed_is_wrong(
    bench: Bench, tiny: list[str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The outputs that are checked are those of the forward that was timed, of every rank that was."""
    forward = ParallelMLA.forward

    def lazy(layer: ParallelMLA, *arguments: Any, out: torch.Tensor) -> torch.Tensor:
        groups = layer._groups
        assert isinstance(groups, SimulatedGroups)
        return forward(layer, *arguments, out=out) if groups._rehearses or groups.rank != rank else out

    monkeypatch.setattr(ParallelMLA, "forward", lazy)
    done = bench(*tiny, "--parallel", "dcp=2", "--simulate")
    assert done.code == 4
    assert f"on rank {rank}" in done.out


def test_the_link_of_a_run_over_real_ranks_is_used(
    bench: Bench, tiny: list[str], simulate: Callable[..., results.Run], make_run: Callable[..., results.Run]
) -> None:
    line = LinkLine(collective="all-reduce", alpha_s=0.25, beta=None)
    ranks = [
        RankFacts(
            rank=rank, samples=[1.0], collective_ms=0.5, collective_bytes=1, cache_bytes=1, weight_bytes=1
        )
        for rank in range(2)
    ]
    spread = Spread(layout="tp=2", library="gloo", ranks=ranks, link=[line], link_source="measured there")
    results.write(make_run([1.0], spread=spread), Path("real.json"))
    simulated = simulate("tp=4", "--link", "real.json").cases[0].spread
    assert simulated is not None
    assert simulated.link == [line]
    assert simulated.link_source == "measured there, real.json"
    assert simulated.ranks[3].collective_ms == pytest.approx(6 * 250)
    predicted = bench(*tiny, "--parallel", "tp=2", "--simulate", "--link", "run.json")
    assert predicted.code == 2
    assert "'run.json' holds no measured link" in predicted.error  # but what another one was
    lacks = bench(*tiny, "--parallel", "dcp=2", "--simulate", "--link", "real.json")
    assert lacks.code == 2
    assert "--link 'real.json' lacks all-gather, needed by layout 'dcp=2'" in lacks.error


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (("--simulate",), {}, "--simulate predicts the ranks of a layout: add --parallel"),
        (("--parallel", "tp=2", "--link", "ideal"), {}, "add --simulate"),
        (("--parallel", "tp=2", "--simulate", "--link", "measured"), {}, "got 'measured'"),
        (("--parallel", "tp=2", "--simulate", "--link", "alpha=5"), {}, "a link is written as in"),
        (("--parallel", "dcp=64,tp=8", "--simulate"), {}, "256 at most"),
        (("--parallel", "tp=3", "--simulate"), {}, "splits heads over 3 ranks"),
        (("--parallel", "tp=2", "--simulate"), {"WORLD_SIZE": "2", "RANK": "0"}, "2 were started: start one"),
    ],
)
def test_mistakes_are_one_sentence(
    bench: Bench,
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    variables: dict[str, str],
    message: str,
) -> None:
    for module in (launch, pulse):
        monkeypatch.setattr(module, "WORD", 0.1)  # nobody is there to hear it
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = bench(*tiny, *words)
    assert done.code == 2
    assert message in done.error
    assert done.out == ""


def test_what_does_not_fit_is_said_before_anything_runs(
    bench: Bench, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latents of two million tokens are here once: in four parts with dcp=4, of one rank with tp=4."""
    monkeypatch.setattr("mla_backends.host.memory_available", lambda: int(3.6 * 2**30))
    long = ("--scenario", "decode", "-a", "kv=1m", "--dry-run", "--simulate", "--parallel")
    assert bench(*tiny, *long, "dcp=4").code == 0
    assert bench(*tiny, *long, "tp=4").code == 0
    monkeypatch.setattr("mla_backends.host.memory_available", lambda: 1 << 30)
    refused = bench(*tiny, *long, "tp=4")
    assert refused.code == 2
    assert "this run needs about" in refused.error
