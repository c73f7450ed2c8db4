"""One rank of a test: runs every case of its world, and writes how far its outputs are from float64.

RANK.json then maps each case to its worst error of a row, or to what it raised.
"""

from __future__ import annotations

import dataclasses
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from sequencing import Sequencing

from mla import LatentCache, MLAConfig
from mla.config import QueryScaling, YarnScaling
from mla.parallel import groups as groups_module
from mla.parallel.cache import ShardedCache
from mla.parallel.groups import Groups
from mla.parallel.layer import ParallelMLA
from mla.parallel.layout import Layout, Share
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict

PLAIN = MLAConfig(48, 8, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
CONFIGS = {
    "plain": PLAIN,
    "lora": dataclasses.replace(
        PLAIN,
        q_lora_rank=24,
        q_latent_scale=1.5,
        kv_latent_scale=0.75,
        rope_interleave=False,
        rope_scaling=YarnScaling(40, 64, mscale=0.707, mscale_all_dim=0.707),
    ),
    "bias": dataclasses.replace(
        PLAIN, q_lora_rank=24, attention_bias=True, query_scaling=QueryScaling(0.1, 16)
    ),
    "odd": dataclasses.replace(PLAIN, kv_lora_rank=7, qk_nope_head_dim=5, v_head_dim=3, rope_theta=None),
}
# History of each request, and the new tokens of each step; the last two have ranks without any token.
BATCHES: dict[str, tuple[Sequence[int], Sequence[Sequence[int]]]] = {
    "prefill": ((0, 0, 0), [(5, 1, 20)]),
    "mixed": ((40, 7, 16, 0), [(3, 9, 1, 30)]),
    "decode": ((33, 47, 65), [(1, 1, 1)] * 5),
    "several tokens": ((33, 47, 5), [(2, 3, 4), (3, 2, 1)]),
    "idle request": ((33, 7), [(1, 0), (0, 2)]),
    "idle step": ((33, 7), [(1, 1), (0, 0), (2, 1)]),
    "one token": ((0,), [(1,)]),
    "two tokens": ((1, 0), [(1, 1), (1, 1)]),
}
LAYOUTS = {2: ("tp=2", "dcp=2", "dp=2"), 4: ("tp=4", "dcp=4", "tp=2,dcp=2", "dp=2,tp=2")}


class Case(NamedTuple):
    """One layer on one batch."""

    layout: str
    batch: str
    config: str = "plain"
    dtype: torch.dtype = torch.float32
    workspace: int = 1 << 20  # bytes: with a small one, a step is attended in several parts
    hops: int = groups_module.MOST_HOPS  # of more, outputs are added up in float32
    at_once: bool = False  # the backend makes a forward that comes again in one call

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        rest = f"workspace {self.workspace}, hops {self.hops}"
        return f"{self.layout}: {self.batch}, {self.config}, {kind}, {rest}" + ", at once" * self.at_once


def cases(world: int) -> Iterator[Case]:
    """Yield the cases of so many ranks: every layout with every batch, and more of what differs."""
    for layout in LAYOUTS[world]:
        for batch in BATCHES:
            yield Case(layout, batch)
        for config in ("lora", "bias", "odd"):
            yield Case(layout, "mixed", config)
        yield Case(layout, "mixed", "lora", torch.bfloat16)
        yield Case(layout, "mixed", "lora", torch.bfloat16, hops=1)
        yield Case(layout, "decode", "lora", at_once=True)
        if "dcp" in layout:
            yield Case(layout, "mixed", "odd", torch.bfloat16)  # an lse that must be aligned among odd rows
            for batch in ("mixed", "decode", "two tokens"):
                yield Case(layout, batch, workspace=1 << 15)


def worst_error(case: Case, groups: Groups) -> float:
    """Return the largest error of a row of the outputs of all steps, on this rank."""
    config, (past, steps) = CONFIGS[case.config], BATCHES[case.batch]
    part = slice(groups.place.dp, None, groups.layout.dp)  # this rank's requests
    past, steps = past[part], [step[part] for step in steps]
    if not past:
        return 0.0
    groups_module.MOST_HOPS = case.hops
    state = random_state_dict(config, 0, case.dtype)
    backend = Sequencing() if case.at_once else None
    layer = ParallelMLA(config, groups, dtype=case.dtype, workspace_bytes=case.workspace, backend=backend)
    layer.load_state_dict(state)
    generator = torch.Generator().manual_seed(1 + groups.place.dp)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    history = [(draw(count, config.kv_lora_rank), draw(count, config.qk_rope_head_dim)) for count in past]
    hidden = [[draw(new, config.hidden_size) for new in step] for step in steps]
    cache = make_cache(case, config, groups, tokens=sum(past) + sum(map(sum, steps)))
    ids = cache.new_sequences(len(past))
    for sequence, tokens in zip(ids, history, strict=True):
        cache.load(sequence, *tokens)
    outputs = [
        layer(torch.cat(new), cache.extend(ids, list(map(len, new))), cache.pages[0]) for new in hidden
    ]
    if backend is not None:  # collectives cannot be recorded
        assert (backend.ran > 0) == (groups.layout.dcp == 1)
    return compare(config, state, history, hidden, outputs)


def make_cache(case: Case, config: MLAConfig, groups: Groups, tokens: int) -> LatentCache | ShardedCache:
    """Return a cache in which every slot that is not written is NaN."""
    room = 2 * (tokens + 8 * 16 * groups.layout.dcp)
    cache: LatentCache | ShardedCache
    if groups.layout.dcp > 1:
        share = Share(groups.place.dcp, groups.layout.dcp)
        cache = ShardedCache(config, share, max_tokens=room, page_size=8, dtype=case.dtype, shuffle=3)
    else:
        cache = LatentCache(config, max_tokens=room, page_size=8, dtype=case.dtype, shuffle=3)
    cache.pages.fill_(torch.nan)
    return cache


def compare(
    config: MLAConfig,
    state: dict[str, torch.Tensor],
    history: Sequence[tuple[torch.Tensor, torch.Tensor]],
    hidden: Sequence[Sequence[torch.Tensor]],  # [step][request] [q, d]
    outputs: Sequence[torch.Tensor],  # [step] [T, d]
) -> float:
    """Return the worst row error against one forward in float64 over the new tokens of all steps."""
    worst = 0.0
    for request, tokens in enumerate(history):
        new = [step[request] for step in hidden]
        truth = oracle(config, state, torch.cat(new), [sum(map(len, new))], [tokens])
        split = [
            out.split([len(part) for part in step])[request]
            for out, step in zip(outputs, hidden, strict=True)
        ]
        joined = torch.cat(split).double()
        if not joined.isfinite().all():
            return float("inf")
        errors = (joined.double() - truth).norm(dim=-1) / truth.norm(dim=-1)
        worst = max([worst, *errors.tolist()])
    return worst


def main(words: Sequence[str]) -> int:
    """Run all cases of a world of the variables' size, and return 0."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = Path("store").resolve()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    groups = {layout: Groups(Layout.parse(layout)) for layout in LAYOUTS[world]}
    errors: dict[str, float | str] = {}
    for case in cases(world):
        try:
            errors[str(case)] = worst_error(case, groups[case.layout])
        except Exception:  # noqa: BLE001  # whatever it is, the test shows it
            errors[str(case)] = traceback.format_exc()
            break  # the other ranks wait for this one
    Path(f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()
    return 0
