"""`select_latents` of one decode step of DeepSeek-V3.2: ours over paged index keys, and the peer's indexer.

ik_llama.cpp selects. llama.cpp has an op for the scores alone, so that its time lacks the selection. Keys of
the peer lie in one piece, each request in a node of one graph.

A result is judged by the lead of each key that it selects over the last one of the best, by true scores: ties
may fall either way, but what is left out, or selected twice, counts by its lead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.peers.ggml.peer import Peer, PeerWork
from benchmarks.peers.ggml.ways import Way, in_process
from mla import MLAConfig, cost
from mla.bench.subjects.setting import Setting, make_ops
from mla.cache import LatentCache
from mla.cases.case import generator
from mla.layer.ops import Choice
from mla.reference import REFERENCE
from mla.text import dtype_name
from mla.verify.selections import true_scores

ROLE, CONFIG = "select_latents", "deepseek-v3.2"


@dataclass(frozen=True)
class SelectionCase:
    """Requests that decode one token each. `lengths`: keys of each, the new one included."""

    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """The case's name, such as select-16x32768."""
        return f"select-{len(self.lengths)}x{self.lengths[0]}"


def selection_cases() -> list[SelectionCase]:
    """Return one request of three lengths, and a batch."""
    return [*(SelectionCase((length,)) for length in (4096, 32768, 131072)), SelectionCase((32768,) * 16)]


class SelectionData:
    """q [requests, H, D] and keys [sum of lengths, D] in the layer's dtype, fp32 weights [requests, H]."""

    def __init__(self, case: SelectionCase, setting: Setting) -> None:
        self.case, self.setting = case, replace(setting, config=MLAConfig.named(CONFIG))
        config, random = self.setting.config, generator(setting.seed, case.name)
        sizes = len(case.lengths), config.index_n_heads, config.index_head_dim
        self.q = torch.randn(sizes, generator=random).to(setting.dtype)
        self.weights = torch.randn(sizes[:2], generator=random)
        self.keys = torch.randn(sum(case.lengths), sizes[2], generator=random).to(setting.dtype)
        self.chosen = make_ops(self.setting, ROLE)[ROLE]
        parts = zip(self.q, self.weights, self.keys.split(case.lengths), strict=True)
        self._scores = [true_scores(q[None], w[None], keys)[0][0] for q, w, keys in parts]
        self._last = [scores.topk(self.most).values[-1] for scores in self._scores]

    @property
    def most(self) -> int:
        """How many keys a query selects."""
        return self.setting.config.index_topk

    @property
    def flops(self) -> int:
        """FLOPs of one call."""
        return cost.select_latents_cost(
            self.chosen.spec, [1] * len(self.case.lengths), self.case.lengths
        ).flops

    def truth(self) -> torch.Tensor:
        """Return the leads [sum of lengths] of the best keys over the last one, in float64; 0 elsewhere."""
        return self.of_scores(torch.cat(self._scores))

    def of_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the leads of positions [requests, most]; NaN where there is one that is none."""
        parts = []
        for chosen, scores, last in zip(positions.long(), self._scores, self._last, strict=True):
            inside = (chosen >= 0) & (chosen < len(scores))
            times = torch.bincount(chosen[inside], minlength=len(scores))
            parts.append((scores - last) * times if inside.all() else torch.full_like(scores, torch.nan))
        return torch.cat(parts)

    def of_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the leads of what is best by these scores [sum of lengths]."""
        parts = scores.split(self.case.lengths)
        return self.of_positions(torch.stack([part.topk(self.most).indices for part in parts]))


def own_ways(data: SelectionData) -> Iterator[Way]:
    """Yield the op that a layer of this setting uses, and the reference if that is another one."""
    lengths, setting = data.case.lengths, data.setting
    narrow = replace(setting.config, kv_lora_rank=16, qk_rope_head_dim=16)  # latents are not read
    pages = sum(-(-length // setting.page_size) for length in lengths)
    cache = LatentCache(
        narrow, max_tokens=pages * setting.page_size, page_size=setting.page_size, dtype=setting.dtype,
        shuffle=setting.seed,
    )  # fmt: skip
    sequences = cache.new_sequences(len(lengths))
    cache.extend(sequences, [length - 1 for length in lengths])
    batch = cache.extend(sequences, [1] * len(lengths))
    for sequence, keys in zip(sequences, data.keys.split(lengths), strict=True):
        cache.write_index(0, cache.slots(sequence), keys)
    plain = Choice("reference", REFERENCE[ROLE], data.chosen.spec)
    for choice in [data.chosen, *([plain] if data.chosen.name != "reference" else [])]:
        out = torch.empty(len(lengths), data.most, dtype=torch.int32)
        state = choice.op.prepare(choice.spec, batch)

        def call(choice: Choice = choice, out: torch.Tensor = out, state: object = state) -> None:
            choice.op(
                state, q=data.q, weights=data.weights, cache=cache.index_pages[0], out=out,
                block_table=batch.block_table, kv_lens=batch.kv_lens_device, cu_q=batch.cu_q,
            )  # fmt: skip

        def result(call: Callable[[], None] = call, out: torch.Tensor = out) -> torch.Tensor:
            out.fill_(-1)
            call()
            return data.of_positions(out)

        party = "reference" if choice is plain else "ours"
        yield Way(choice.name, party, dtype_name(setting.dtype), in_process(call), result)


def peer_ways(data: SelectionData, peer: Peer, close: Callable[..., object]) -> Iterator[Way]:
    """Yield the peer's ways; `close` takes what frees each of them."""
    for type_ in peer.types("index"):
        work = peer.selection(data.q, data.keys, data.weights, data.case.lengths, type_, data.most)
        close(work.close)

        def result(work: PeerWork = work) -> torch.Tensor:
            made = work.result()
            return data.of_positions(made.view(-1, data.most)) if peer.selects else data.of_scores(made)

        yield Way(f"peer {type_}{'' if peer.selects else ', scores alone'}", "peer", type_, work.time, result)
