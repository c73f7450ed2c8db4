"""All ranks of a layout, each a thread, equal one device; one alone attends what it has; merging parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from layer_of_a_rank import PLAIN
from torch.utils._python_dispatch import TorchDispatchMode

import mla
from mla import LatentCache, MLAConfig
from mla.cases.memory import poison
from mla.errors import UsageError
from mla.layer.plan import WORKSPACE_BYTES
from mla.layer.workspace import Workspace
from mla.parallel.cache import ShardedCache
from mla.parallel.groups import SimulatedGroups
from mla.parallel.layer import (
    Exchange,
    HeadShard,
    ParallelMLA,
    merge,
    merge_scratch,
    scratch_per_token,
)
from mla.parallel.layout import Layout, Share
from mla.verify.layer_oracle import Held, State, oracle
from mla.weights import random_state_dict

CONFIG = replace(PLAIN, q_lora_rank=24, attention_bias=True)
GATED = [replace(CONFIG, output_gate="head"), replace(CONFIG, output_gate="element", sink_logits=True)]
HISTORY, NEW = (33, 1, 0, 7), (1, 2, 9, 0)  # with ranks that hold none of a request's tokens


@dataclass
class World:
    """Ranks that are threads."""

    layout: Layout
    patience: float = 20.0  # seconds that a rank waits for the others
    given: dict[int, torch.Tensor] = field(default_factory=dict)  # by rank, of the collective that runs

    def __post_init__(self) -> None:
        self._barrier = Barrier(self.layout.world, timeout=self.patience)

    def exchange(self, rank: int, given: torch.Tensor, ranks: Sequence[int]) -> list[torch.Tensor]:
        """Return what each of these ranks gave, once all of the world have given something."""
        self.given[rank] = given.clone()
        self._barrier.wait()
        received = [self.given[other] for other in ranks]
        self._barrier.wait()
        return received


class Threads(SimulatedGroups):
    """A rank's end of the collectives, which are real."""

    def __init__(self, world: World, rank: int) -> None:
        super().__init__(world.layout, rank)
        self._world = world

    def _exchange(self, x: torch.Tensor, groups: list[list[int]]) -> list[torch.Tensor]:
        return self._world.exchange(self.rank, x, next(group for group in groups if self.rank in group))

    def add_heads(self, out: torch.Tensor) -> None:
        super().add_heads(out)
        out.copy_(torch.stack(self._exchange(out, self.layout.groups(self.layout.head_parts))).sum(0))

    def gather_context(self, x: torch.Tensor, out: torch.Tensor) -> None:
        super().gather_context(x, out)
        out.copy_(torch.stack(self._exchange(x, self.layout.groups(self.layout.dcp))))

    def exchange_context(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        super().exchange_context(parts, out)
        given = self._exchange(parts, self.layout.groups(self.layout.dcp))
        out.copy_(torch.stack([other[self.place.dcp] for other in given]))


DRAW = torch.Generator().manual_seed(1)
TOKENS = [
    (
        torch.randn(count, CONFIG.kv_lora_rank, generator=DRAW),
        torch.randn(count, CONFIG.qk_rope_head_dim, generator=DRAW),
    )
    for count in HISTORY
]
HIDDEN = torch.randn(sum(NEW), CONFIG.hidden_size, generator=DRAW)


def state_of(config: MLAConfig) -> State:
    return random_state_dict(config, 0, torch.float32)


def rank_forward(
    groups: SimulatedGroups, config: MLAConfig = CONFIG, cache_format: str | None = None, **more: Any
) -> Callable[[torch.Tensor], object]:
    """Return the forward of a rank, which writes an output [T, d]."""
    layout = groups.layout
    stored: Any = {"dtype": torch.float32, "cache_format": cache_format}
    layer = ParallelMLA(config, groups, **stored, **more)
    layer.load_state_dict(state_of(config))
    if layout.dcp > 1:
        share = Share(groups.place.dcp, layout.dcp)
        cache = ShardedCache(config, share, max_tokens=2048, page_size=8, shuffle=3, **stored)
    else:
        cache = LatentCache(config, max_tokens=2048, page_size=8, shuffle=3, **stored)
    poison(cache.pages)
    ids = cache.new_sequences(len(HISTORY))
    for sequence, tokens in zip(ids, TOKENS, strict=True):
        index = tokens[0][:, : config.index_head_dim] if config.index_n_heads else None
        cache.load(sequence, *tokens, index=index)
    batch = cache.extend(ids, NEW)
    return lambda out: layer(HIDDEN, batch, *cache.of_layer(0), out=out)


def error(out: torch.Tensor, config: MLAConfig, state: State, held: Held | None = None) -> float:
    """Return the relative error of an output of all requests."""
    parts = [
        oracle(config, state, rows, [len(rows)], [tokens], held)
        for rows, tokens in zip(HIDDEN.split(NEW), TOKENS, strict=True)
        if len(rows)
    ]
    expected = torch.cat(parts)
    return float((out.double() - expected).norm() / expected.norm())


def outputs(layout: str, config: MLAConfig, cache_format: str | None = None) -> list[torch.Tensor]:
    """Return the output of every rank."""
    world = World(Layout.parse(layout))
    ranks = [Threads(world, rank) for rank in range(world.layout.world)]
    forwards = [rank_forward(rank, config, cache_format) for rank in ranks]
    outs = [torch.full_like(HIDDEN, torch.nan) for _ in ranks]
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(lambda forward, out: forward(out), forwards, outs))
    return outs


LAYOUTS = ["tp=1", "tp=8", "dcp=4", "tp=2,dcp=4", "tp=4,dcp=2", "dp=2,tp=2"]
CASES = [*((layout, CONFIG) for layout in LAYOUTS), *(("tp=2,dcp=2", config) for config in GATED)]


@pytest.mark.parametrize(("layout", "config"), CASES)
def test_all_ranks_equal_one_device(layout: str, config: MLAConfig) -> None:
    assert max(error(out, config, state_of(config)) for out in outputs(layout, config)) < 1e-5


def test_ranks_of_heads_select_alike() -> None:
    """Each has the whole indexer and all index pages; with parts of contexts, none could select."""
    config = replace(CONFIG, index_topk=8, index_n_heads=4, index_head_dim=12)
    (alone,) = outputs("tp=1", config)
    assert error(alone, config, state_of(config)) > 1e-2  # than all keys give
    for out in outputs("tp=4", config):
        assert (out - alone).norm() < 1e-5 * alone.norm()
    with pytest.raises(UsageError, match="an indexer needs whole contexts to select from: leave out dcp"):
        outputs("tp=2,dcp=2", config)


@pytest.mark.parametrize("layout", ["tp=8", "tp=2,dcp=4"])
def test_ranks_store_and_attend_a_format_as_one_device_does(layout: str) -> None:
    (alone,) = outputs("tp=1", CONFIG, "fp8_ds_mla")
    for out in outputs(layout, CONFIG, "fp8_ds_mla"):
        assert (out - alone).norm() < 1e-4 * out.norm()
        assert error(out, CONFIG, state_of(CONFIG)) > 1e-3


ALONE = [*((layout, CONFIG) for layout in ("tp=4", "dcp=8")), *(("tp=2,dcp=2", config) for config in GATED)]


@pytest.mark.parametrize(("layout", "config"), ALONE)
@pytest.mark.parametrize("workspace", [WORKSPACE_BYTES, 0])
def test_a_rank_alone_computes_its_share_anew(layout: str, config: MLAConfig, workspace: int) -> None:
    """Rehearsed or not: its output was overwritten, and what others send stands in for no computing.

    Without room, it receives several messages in the same memory.
    """
    parsed = Layout.parse(layout)
    part = config.with_heads(config.num_attention_heads // parsed.head_parts)
    for rank in range(parsed.world):
        groups, out = SimulatedGroups(parsed, rank), torch.empty_like(HIDDEN)
        forward = rank_forward(groups, config, workspace_bytes=workspace)
        shard = dict(HeadShard(state_of(config), config, parsed.head_part(rank), parsed.head_parts))
        held = Share(groups.place.dcp, parsed.dcp).owns if parsed.dcp > 1 else None
        groups.rehearse(lambda: forward(out))  # noqa: B023
        for _ in range(3):
            assert error(out, part, shard, held) < 1e-5, rank
            out.fill_(torch.nan)
            forward(out)


def test_collectives_are_those_of_the_layout() -> None:
    groups = SimulatedGroups(Layout.parse("tp=2,dcp=2"), 3)
    forward = rank_forward(groups)
    groups.rehearse(lambda: forward(torch.empty_like(HIDDEN)))
    tokens, heads, latent = sum(NEW), CONFIG.num_attention_heads // 4, CONFIG.latent_dim
    assert [(call.kind, call.ranks, call.sent) for call in groups.calls] == [
        ("all-gather", 2, tokens * heads * latent * 4),  # its queries, to the other rank
        ("all-to-all", 2, tokens * heads * (CONFIG.kv_lora_rank + 1) * 4),  # its heads, with their lse
        ("all-reduce", 4, 2 * HIDDEN.nbytes * 3 // 4),
    ]


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


class Calls(TorchDispatchMode):
    """Notes what torch is asked to compute, and which ops return memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = (*args, *(kwargs or {}).values())
        given = {x.untyped_storage().data_ptr() for x in operands if is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if is_tensor(result) and result.untyped_storage().data_ptr() not in given:
            self.made.append(str(func))
        return result


@pytest.mark.parametrize("ranks", [2, 8, 9, 32])
def test_a_rank_alone_widens_what_many_would_add_up(ranks: int) -> None:
    groups, out = SimulatedGroups(Layout(tp=ranks), 0), torch.ones(3, 5, dtype=torch.bfloat16)
    with Calls() as calls:
        groups.add_heads(out)
    widened = ["aten._to_copy.default", "aten.copy_.default"]
    assert (calls.names, groups.calls[0].nbytes) == (([], 30) if ranks <= 8 else (widened, 60))
    assert bool((out == 1).all())


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
    groups = Meeting(Layout.parse("tp=2"), 0)
    layer = ParallelMLA(CONFIG, groups, backend=backend)
    for each_layer in (plain, layer):
        each_layer.load_state_dict(state)

    def run(each_layer: mla.MLA) -> torch.Tensor:
        cache = LatentCache(CONFIG, max_tokens=64)
        return each_layer(
            torch.ones(3, 48, dtype=torch.bfloat16), cache.extend(cache.new_sequences(1), [3]), cache.pages[0]
        )

    expected = run(plain)
    groups.meanwhile = lambda: done.append(run(plain))
    run(layer)
    assert done, "it waited"
    assert torch.equal(done[0], expected)


# --------------------------------------------------------------------------------------------- merge
# Merging attention over disjoint keys.
def attend(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and the natural log-sum-exp of plain attention."""
    logits = q @ keys.T
    return logits.softmax(dim=-1) @ keys, logits.logsumexp(dim=-1)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-3])
def test_parts_give_the_whole(scale: float) -> None:
    q, keys = scale * torch.randn(7, 5).double(), torch.randn(40, 5).double()
    parts = [attend(q, keys[i::3]) for i in range(3)]
    out = torch.empty(7, 5)
    merge(
        torch.stack([part for part, _ in parts]).float(), torch.stack([lse for _, lse in parts]).float(), out
    )
    assert (out - attend(q, keys)[0]).abs().max() < 1e-5 * max(1, scale)


def test_a_part_without_keys_weighs_nothing() -> None:
    parts = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    out = torch.full((1, 2), torch.nan)
    merge(parts, torch.tensor([[700.0], [-torch.inf]]), out)
    assert out.tolist() == [[1.0, 2.0]]


def test_a_merge_in_memory_of_its_own_makes_no_more() -> None:
    parts, lse, out = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2), torch.empty(4, 2, 8)
    held = merge_scratch(parts, Workspace(torch.float32, torch.device("cpu")))
    made = {}
    for memory in (None, held):
        with Calls() as calls:
            merge(parts, lse, out, memory)
        made[memory is held] = calls.made
    assert made[False]
    assert made[True] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("c", [32, 33])
def test_memory_for_an_exchange_is_what_is_planned(dtype: torch.dtype, c: int) -> None:
    """An lse takes two elements of bf16, and an odd row one more before it."""
    config = replace(PLAIN, num_attention_heads=3, kv_lora_rank=c)
    scratch = Workspace(dtype, torch.device("cpu"))
    Exchange(scratch, 2, (5, 3, config.latent_dim), c, ordered=True)
    assert scratch.nbytes() == 5 * scratch_per_token(config, 2, dtype.itemsize)
