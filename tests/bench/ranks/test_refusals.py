"""What costs a case on one device costs no more on several: an op that refuses, memory that is short."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ranks_of_a_run import BOUND, Start

from mla.bench import results
from mla.bench.ranks.crew import Crew, error_of
from mla.bench.ranks.layers import Follower, LeadLayer
from mla.errors import OutOfMemory, UnsupportedBatch
from mla.parallel.layout import Layout
from mla_backends.host import memory_available
from mla_backends.testing import HostBackend

REFUSING = "rank_refusals:Refusing"
TILE = "the card has no room for such a tile"


def run(
    start: Start, rank: str, at: str, what: str, *words: str, layout: str = "tp=2", **more: Any
) -> tuple[Any, dict[str, results.Case]]:
    """Run a layout with such a fault; return the ranks, ended, and the cases of `mla` by scenario."""
    fault = ("-O", f"rank={rank}", "-O", f"at={at}", "-O", f"what={what}", "--attention", "absorbed")
    world = Layout.parse(layout).world
    words = ("--parallel", layout, "-o", "run.json", *fault, *words)
    ranks = start(*words, backend=REFUSING, world=world, **more)
    codes = ranks.wait(BOUND)
    assert len(set(codes)) == 1, (codes, *map(ranks.err, range(world)))
    cases = results.read(ranks.folder / "run.json").cases
    return ranks, {f"{case.scenario} {case.implementation}": case for case in cases}


@pytest.mark.parametrize("rank", ["1", "all"])
def test_an_op_that_refuses_a_batch_costs_that_case(start: Start, rank: str) -> None:
    """The prefill's batch is planned when its layer is loaded."""
    ranks, cases = run(start, rank, "prepare", "refuse")
    assert ranks.code(0) == 0
    prefill, decode = cases["prefill mla"], cases["decode mla"]
    assert (prefill.check.status, prefill.latency_ms) == ("not run", None)
    named = "" if rank == "all" else f"rank {rank}: "
    assert prefill.check.reason.startswith(f"{named}op 'attention' of latent_attention: {TILE}. Use the ref")
    assert f"prefill, mla is skipped: {prefill.check.reason}" in ranks.err(0)
    assert decode.check.status == "ok"
    assert decode.latency_ms is not None
    assert ranks.err(1) == ""


def test_a_weight_that_a_rank_cannot_pack_costs_its_implementation(start: Start) -> None:
    words = ("--implementations", "mla,mla-reference", "--scenario", "decode")
    ranks, cases = run(start, "1", "pack", "refuse", *words)
    assert ranks.code(0) == 3  # of mla, nothing ran
    assert TILE in cases["decode mla"].check.reason
    assert cases["decode mla"].check.reason.startswith("rank 1: ")
    assert cases["decode mla-reference"].latency_ms is not None


def test_where_memory_is_short_on_a_rank_the_next_scenario_runs(start: Start) -> None:
    ranks, cases = run(start, "1", "pack", "memory", "-O", "times=1")
    assert ranks.code(0) == 0, ranks.err(0)
    (skipped,) = (case for case in cases.values() if case.latency_ms is None)
    assert skipped.check.reason == "rank 1: no memory for a tile"
    assert f"{skipped.scenario} is skipped: {skipped.check.reason}" in ranks.err(0)
    assert [case.check.status for case in cases.values()].count("ok") == 1


def test_where_it_is_short_on_rank_0_no_other_is_left_waiting(start: Start) -> None:
    ranks, cases = run(start, "0", "pack", "memory")
    assert ranks.code(0) == 3
    assert [case.check.reason for case in cases.values()] == ["no memory for a tile"] * 2


@pytest.mark.parametrize(
    ("rank", "what", "said"), [("0", "refuse", TILE), ("1", "memory", "no memory"), ("all", "refuse", TILE)]
)
def test_what_fails_in_a_forward_ends_all(start: Start, rank: str, what: str, said: str) -> None:
    """Others wait in a collective by then, which cannot be taken back."""
    ranks, cases = run(start, rank, "call", what)
    assert ranks.code(0) == 3
    assert said in ranks.err(0)
    assert f"rank {rank}".replace("all", "") in ranks.err(0).splitlines()[-1]
    assert all(case.latency_ms is None for name, case in cases.items() if "prefill" in name)


@pytest.mark.parametrize(
    ("rank", "at", "layout", "apart"),
    [
        ("none", "call", "tp=2", True),
        ("0", "prepare", "tp=2", False),  # while it is loaded, elsewhere
    ],
)
def test_no_rank_keeps_a_layer_that_rank_0_does_not_measure(
    start: Start, rank: str, at: str, layout: str, apart: bool
) -> None:
    other = "mla[latent_attention=reference]"
    several = ("--implementations", f"mla,{other}", "--scenario", "prefill", "-O", "count=1")
    free = memory_available()
    assert free is not None
    # Two ranks with one implementation each, and a reference, are planned with 3/4 of it; with two, 5/4.
    constants = {"mla.bench.plan.memory.WORKSPACE": free // 4} if apart else {}
    ranks, cases = run(start, rank, at, "refuse", *several, layout=layout, constants=constants)
    assert ("is not interleaved" in ranks.err(0)) == apart
    assert cases[f"prefill {other}"].latency_ms is not None, ranks.err(0)
    assert (cases["prefill mla"].latency_ms is None) == (rank != "none")
    assert set(map(int, (ranks.folder / "loaded.txt").read_text().split())) == {0}


def test_the_first_rank_that_failed_is_named() -> None:
    refused, short = UnsupportedBatch("no tile"), OutOfMemory("no memory")
    for failure, kind, sentence in (
        ([None, refused], UnsupportedBatch, "rank 1: no tile"),
        ([refused, refused], UnsupportedBatch, "no tile"),
        ([short, refused], OutOfMemory, "rank 0: no memory"),
        ([None, short, short], OutOfMemory, "rank 1: no memory"),
    ):
        error = error_of(failure)
        assert (type(error), str(error)) == (kind, sentence)
    assert error_of([None, None]) is None


class Two:
    """How one of two ranks talks to another one that has all the memory it needs."""

    layout = Layout(dp=2)

    def __init__(self, rank: int) -> None:
        self.rank, self.told, self.gave = rank, [], None

    def gather(self, mine: Any) -> list[Any]:
        self.gave = mine
        return [] if self.rank else [mine, None]

    def attempt(self, *arguments: Any, **more: Any) -> list[Any]:
        return Crew.attempt(self, *arguments, **more)  # type: ignore[arg-type]

    def awaited(self, implementation: str) -> Any:
        return Crew.awaited(self, implementation)  # type: ignore[arg-type]

    def tell(self, *command: Any) -> None:
        self.told.append(command)


def no_memory(*_: Any) -> None:
    raise MemoryError("no memory for inputs")


@pytest.mark.parametrize("what", ["feed", "bench"])
def test_short_memory_for_other_inputs_or_lengths_is_told_to_all_ranks(what: str) -> None:
    part: Any = SimpleNamespace(name="mla", held_to_reference=False, scenario=None)
    part.load = part.make_bench = no_memory
    setting: Any = SimpleNamespace(backend=HostBackend())
    scenario: Any = SimpleNamespace(name="decode")
    inputs: Any = SimpleNamespace(seed=2, fresh=lambda seed: None)
    first: Any = Two(0)
    lead = LeadLayer(setting, part, first)
    prepare: Any = lead.lengths_bench if what == "bench" else partial(lead.load, scenario, inputs)
    with pytest.raises(OutOfMemory, match=r"^rank 0: no memory for inputs$"):
        prepare()
    second: Any = Two(1)
    plan = SimpleNamespace(name="decode", point=scenario)
    request: Any = SimpleNamespace(setting=setting, scenarios=[plan])
    follower = Follower(request, second)
    fixture: Any = SimpleNamespace(point=scenario, inputs=inputs)
    follower._fixture, follower._layers = fixture, {"mla": part}
    for number, (command, *arguments) in enumerate(first.told):
        getattr(follower, command)(*arguments)
        assert number or repr(second.gave) == repr(OutOfMemory("no memory for inputs"))
    assert not follower._layers
