"""`select_latents` of one decode step of DeepSeek-V3.2: ours over paged index keys, and the peer's indexer.

ik_llama.cpp selects. llama.cpp has an op for the scores alone, so that its time lacks the selection. Keys of
the peer lie in one piece, each request in a node of one graph.

A result is judged by the lead of each key that it selects over the last one of the best, by true scores: ties
may fall either way, but what is left out, or selected twice, counts by its lead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.peers.ggml.peer import Peer, PeerWork
from benchmarks.peers.ggml.ways import Way, in_layer, own
from mla import MLAConfig, cost
from mla.bench.subjects.setting import Setting, make_ops
from mla.cache import LatentCache
from mla.cache.ragged_batch import RaggedBatch
from mla.cases.case import generator
from mla.text import dtype_name
from mla.verify.selections import true_scores

ROLE, CONFIG = "select_latents", "deepseek-v3.2"


@dataclass(frozen=True)
class SelectionCase:
    """Requests that decode one token each. `lengths`: keys of each, the new one included."""

    lengths: tuple[int, ...]
    op = "selection"

    @property
    def name(self) -> str:
        """The case's name, such as select-16x32768."""
        return f"select-{len(self.lengths)}x{self.lengths[0]}"


def selection_cases() -> list[SelectionCase]:
    """Return one request of three lengths, and a batch."""
    return [*(SelectionCase((length,)) for length in (4096, 32768, 131072)), SelectionCase((32768,) * 16)]


class Selection:
    """q [requests, H, D] and keys [sum of lengths, D] in the layer's dtype, fp32 weights [requests, H]."""

    def __init__(self, case: SelectionCase, setting: Setting) -> None:
        self.case, self.notes = case, list[str]()
        self.setting = replace(setting, config=MLAConfig.named(CONFIG))
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

    def paged(self) -> tuple[LatentCache, RaggedBatch]:
        """Return a cache that holds the keys in shuffled pages, and the batch of the new tokens."""
        lengths, setting = self.case.lengths, self.setting
        narrow = replace(setting.config, kv_lora_rank=16, qk_rope_head_dim=16)  # latents are not read
        pages = sum(-(-length // setting.page_size) for length in lengths)
        cache = LatentCache(
            narrow, max_tokens=pages * setting.page_size, page_size=setting.page_size, dtype=setting.dtype,
            shuffle=setting.seed,
        )  # fmt: skip
        sequences = cache.new_sequences(len(lengths))
        cache.extend(sequences, [length - 1 for length in lengths])
        batch = cache.extend(sequences, [1] * len(lengths))
        for sequence, keys in zip(sequences, self.keys.split(lengths), strict=True):
            cache.write_index(0, cache.slots(sequence), keys)
        return cache, batch

    def ways(self, peer: Peer, close: Callable[..., object]) -> Iterator[Way]:
        """Yield the op that a layer of this setting uses, the reference, and the peer's ways."""
        cache, batch = self.paged()
        for party, choice in in_layer(self.chosen, ROLE).items():
            out = torch.empty(len(self.case.lengths), self.most, dtype=torch.int32)
            call = partial(
                choice.op, choice.op.prepare(choice.spec, batch), q=self.q, weights=self.weights,
                cache=cache.index_pages[0], out=out, block_table=batch.block_table,
                kv_lens=batch.kv_lens_device, cu_q=batch.cu_q,
            )  # fmt: skip
            yield own(choice.name, party, dtype_name(self.setting.dtype), call, out, self.of_positions)
        for type_ in peer.types("index"):
            work = peer.selection(self.q, self.keys, self.weights, self.case.lengths, type_, self.most)
            close(work.close)
            name = f"peer {type_}{'' if peer.selects else ', scores alone'}"
            yield Way(name, "peer", type_, work.time, partial(self._of_peer, peer, work))

    def _of_peer(self, peer: Peer, work: PeerWork) -> torch.Tensor:
        made = work.result()
        return self.of_positions(made.view(-1, self.most)) if peer.selects else self.of_scores(made)
