"""All ranks of a layout in one process equal one device, and a rank that runs again repeats its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch

import mla
from mla import LatentCache, MLAConfig
from mla.cases.memory import poison
from mla.parallel.cache import ShardedCache
from mla.parallel.groups import SimulatedGroups, SimulatedWorld, summed_bytes
from mla.parallel.layer import ParallelMLA
from mla.parallel.layout import Layout, Share
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict

CONFIG = MLAConfig(
    hidden_size=48,
    num_attention_heads=8,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    q_lora_rank=24,
    attention_bias=True,
)
GATED = [replace(CONFIG, output_gate=gate, attention_bias=False) for gate in ("head", "element")]
HISTORY, NEW = (33, 1, 0, 7), (1, 2, 9, 0)  # with ranks that hold none of a request's tokens


class Simulated:
    """A layer on one batch, whose ranks are all here."""

    def __init__(self, layout: str, config: MLAConfig = CONFIG, cache_format: str | None = None) -> None:
        self.world, self.config, self.cache_format = (
            SimulatedWorld(Layout.parse(layout)),
            config,
            cache_format,
        )
        self.state = random_state_dict(config, 0, torch.float32)
        draw = torch.Generator().manual_seed(1)
        self.history = [
            (
                torch.randn(count, CONFIG.kv_lora_rank, generator=draw),
                torch.randn(count, CONFIG.qk_rope_head_dim, generator=draw),
            )
            for count in HISTORY
        ]
        self.hidden = torch.randn(sum(NEW), CONFIG.hidden_size, generator=draw)
        made = [self._rank(groups) for groups in self.world.groups]
        self.outs = [torch.full_like(self.hidden, torch.nan) for _ in made]
        self.forwards: list[Callable[[], None]] = [
            lambda rank=rank: made[rank](self.outs[rank]) for rank in range(len(made))
        ]

    def _rank(self, groups: SimulatedGroups) -> Callable[[torch.Tensor], object]:
        layout = self.world.layout
        stored: Any = {"dtype": torch.float32, "cache_format": self.cache_format}
        layer = ParallelMLA(self.config, groups, **stored)
        layer.load_state_dict(self.state)
        if layout.dcp > 1:
            share = Share(groups.place.dcp, layout.dcp)
            cache = ShardedCache(CONFIG, share, max_tokens=2048, page_size=8, shuffle=3, **stored)
        else:
            cache = LatentCache(CONFIG, max_tokens=2048, page_size=8, shuffle=3, **stored)
        poison(cache.pages)
        ids = cache.new_sequences(len(HISTORY))
        for sequence, tokens in zip(ids, self.history, strict=True):
            cache.load(sequence, *tokens)
        batch = cache.extend(ids, NEW)
        return lambda out: layer(self.hidden, batch, cache.pages[0], out)

    def run(self) -> None:
        """Run all ranks."""
        for ranks in self.world.layout.head_groups():
            self.world.run(ranks, lambda rank: self.forwards[rank]())

    def errors(self) -> Iterator[float]:
        """Yield the relative error of every rank's output."""
        expected = torch.cat(
            [
                oracle(self.config, self.state, rows, [len(rows)], [tokens])
                for rows, tokens in zip(self.hidden.split(NEW), self.history, strict=True)
                if len(rows)
            ]
        )
        for out in self.outs:
            yield float((out.double() - expected).norm() / expected.norm())


LAYOUTS = ["tp=1", "tp=8", "dcp=4", "tp=2,dcp=4", "tp=4,dcp=2", "dp=2,tp=2"]
CASES = [*((layout, CONFIG) for layout in LAYOUTS), *(("tp=2,dcp=2", config) for config in GATED)]


@pytest.mark.parametrize(("layout", "config"), CASES)
def test_all_ranks_equal_one_device(layout: str, config: MLAConfig) -> None:
    simulated = Simulated(layout, config)
    simulated.run()
    for rank, out in enumerate(simulated.outs):
        simulated.world.complete(rank, out)
    assert max(simulated.errors()) < 1e-5


@pytest.mark.parametrize("layout", ["tp=8", "tp=2,dcp=4"])
def test_ranks_store_and_attend_a_format_as_one_device_does(layout: str) -> None:
    alone, simulated = (Simulated(name, cache_format="fp8_ds_mla") for name in ("tp=1", layout))
    alone.run()
    simulated.run()
    for rank, out in enumerate(simulated.outs):
        simulated.world.complete(rank, out)
        assert (out - alone.outs[0]).norm() < 1e-4 * out.norm()
    assert min(simulated.errors()) > 1e-3


@pytest.mark.parametrize("layout", ["tp=4", "tp=2,dcp=2"])
def test_a_rank_alone_computes_its_part_anew(layout: str) -> None:
    """Its output was overwritten, and so was what others gave it: neither stands in for computing."""
    simulated = Simulated(layout)
    simulated.run()
    for rank, out in enumerate(simulated.outs):
        parts = [group.part.clone() for group in simulated.world.groups]
        for again in range(2):
            out.fill_(torch.nan)
            simulated.world.groups[rank].receive_again()
            simulated.forwards[rank]()
            assert torch.equal(out, parts[rank]), f"rank {rank}, time {again}"
        simulated.world.complete(rank, out)
    assert max(simulated.errors()) < 1e-5


def test_collectives_are_those_of_the_layout() -> None:
    simulated = Simulated("tp=2,dcp=2")
    simulated.run()
    tokens, heads, latent = sum(NEW), CONFIG.num_attention_heads // 4, CONFIG.latent_dim
    rank = [(call.kind, call.ranks, call.sent) for call in simulated.world.groups[3].calls]
    assert rank == [
        ("all-gather", 2, tokens * heads * latent * 4),  # its queries, to the other rank
        (
            "all-to-all",
            2,
            tokens * heads * (CONFIG.kv_lora_rank + 1) * 4,
        ),  # the other's heads, with their lse
        ("all-reduce", 4, 2 * simulated.hidden.nbytes * 3 // 4),
    ]


def test_ranks_that_wait_for_nobody_end() -> None:
    """A rank that leaves out a collective must not make the others wait for ever."""
    simulated = Simulated("dcp=2")
    simulated.forwards[1] = lambda: None
    with pytest.raises(RuntimeError, match="rank 0 waits for what no other rank gives"):
        simulated.run()


def test_many_ranks_add_up_in_float32() -> None:
    out = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert [summed_bytes(out, ranks) for ranks in (2, 8, 9, 32)] == [30, 30, 60, 60]


class Meeting(SimulatedGroups):
    """A rank that lets another layer of its backend compute while it waits for the others."""

    meanwhile: Callable[[], object]

    def add_heads(self, out: torch.Tensor) -> None:
        thread = Thread(target=self.meanwhile, daemon=True)
        thread.start()
        thread.join(20)


def test_other_layers_compute_while_a_rank_waits_for_the_rest_of_the_heads() -> None:
    backend, state = mla.load_backend("cpu"), random_state_dict(CONFIG)
    plain, done = mla.MLA(CONFIG, backend=backend), []
    groups = Meeting(SimulatedWorld(Layout.parse("tp=2")), 0)
    layer = ParallelMLA(CONFIG, groups, backend=backend)
    for one in (plain, layer):
        one.load_state_dict(state)

    def run(one: mla.MLA) -> torch.Tensor:
        cache = LatentCache(CONFIG, max_tokens=64)
        return one(
            torch.ones(3, 48, dtype=torch.bfloat16), cache.extend(cache.new_sequences(1), [3]), cache.pages[0]
        )

    expected = run(plain)
    groups.meanwhile = lambda: done.append(run(plain))
    run(layer)
    assert done, "it waited"
    assert torch.equal(done[0], expected)
