"""`latent_attention` of one decode step: ours over paged latents, and the peer's flash attention.

The peer gets what favours it: the keys of a request lie in one piece, padded to the blocks that its kernel
takes and no further, and mask, graph and work memory are made before. Several requests are tried in both
ways: a call for each of them in one graph, and one call over all keys with a mask, as llama.cpp does where
all requests share one cache. Both are tried with every type of cache that the peer computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.peers.ggml.peer import Peer
from benchmarks.peers.ggml.ways import Way, in_layer, own
from mla import cost
from mla.bench.subjects.setting import Setting, make_ops
from mla.bench.workload.workload_file import read_workload
from mla.cache import LatentCache
from mla.cache.formats import codec_of
from mla.cache.ragged_batch import RaggedBatch
from mla.cases.case import generator
from mla.layer.ops import Choice, attention_spec
from mla.text import dtype_name
from mla.verify.op_oracle import attend

ROLE = "latent_attention"
Q8 = "q8_0"  # the format that the peer has as well


@dataclass(frozen=True)
class AttentionCase:
    """Requests that decode one token each. `lengths`: keys of each, the new one included.

    `stored` is the format of both caches; "" is plain numbers.
    """

    name: str
    heads: int
    lengths: tuple[int, ...]
    stored: str = ""
    op = "attention"


def attention_cases() -> list[AttentionCase]:
    """Return one request of three lengths at few and many heads, and batches of 16 requests."""
    single = [
        AttentionCase(f"1x{length}-h{heads}", heads, (length,))
        for heads in (16, 128)
        for length in (400, 4096, 16384)
    ]
    decode = next(each for each in read_workload("standard").scenarios if each.mode == "decode")
    middle = decode.kv_lens(decode.steps // 2)
    return [
        *single,
        AttentionCase("decode-h16", 16, tuple(middle)),
        AttentionCase("16x4096-h16", 16, (4096,) * 16),
        AttentionCase(f"1x400-h16-{Q8}", 16, (400,), Q8),
        *(AttentionCase(f"16x16384-h{heads}-{Q8}", heads, (16384,) * 16, Q8) for heads in (1, 16)),
    ]


def _codes(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers [s, w] near N(0, 1) that bfloat16 and q8_0 hold exactly: seven bits over 2^-5."""
    codes = (numbers.float() * 32).round().clamp_(-127, 127)
    codes[:, ::32] = 127
    return (codes / 32).to(numbers.dtype)


class Attention:
    """The operands of a case, in the layer's dtype: q [requests, h, c + r], keys [sum of lengths, c + r]."""

    def __init__(self, case: AttentionCase, setting: Setting) -> None:
        self.case, self.notes = case, list[str]()
        self.setting = setting = replace(setting, config=setting.config.with_heads(case.heads))
        random, width = generator(setting.seed, case.name), setting.config.latent_dim

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random).to(setting.dtype)

        self.q = normal(len(case.lengths), case.heads, width)
        self.keys = normal(sum(case.lengths), width)
        if case.stored:
            self.keys = _codes(self.keys)
        spread = setting.config.kv_lora_rank, setting.config.qk_rope_head_dim
        self.codec = codec_of(case.stored, *spread)
        plain = attention_spec(setting.config, setting.dtype, setting.device)
        size = self.codec.token_bytes if self.codec else 0
        self.spec = replace(plain, cache_format=case.stored, token_bytes=size)

    @property
    def flops(self) -> int:
        """FLOPs of one call."""
        return cost.latent_attention_cost(self.spec, [1] * len(self.case.lengths), self.case.lengths).flops

    def truth(self) -> torch.Tensor:
        """Return the result [requests, h, c] in float64."""
        scale, values = self.spec.softmax_scale, self.keys[:, : self.setting.config.kv_lora_rank]
        parts = zip(self.q, self.keys.split(self.case.lengths), values.split(self.case.lengths), strict=True)
        return torch.cat([attend(q[None], k[:, None], v[:, None], scale, True)[0] for q, k, v in parts])

    def paged(self) -> tuple[LatentCache, RaggedBatch]:
        """Return a cache that holds the keys in shuffled pages, and the batch of the new tokens."""
        config, size, c = self.setting.config, self.setting.page_size, self.setting.config.kv_lora_rank
        pages = sum(-(-length // size) for length in self.case.lengths)
        cache = LatentCache(
            config,
            max_tokens=pages * size,
            page_size=size,
            dtype=self.setting.dtype,
            cache_format=self.case.stored or None,
            shuffle=self.setting.seed,
        )
        sequences = cache.new_sequences(len(self.case.lengths))
        requests = self.keys.split(self.case.lengths)
        for sequence, rows in zip(sequences, requests, strict=True):
            cache.load(sequence, rows[:-1, :c], rows[:-1, c:])
        batch = cache.extend(sequences, [1] * len(requests))
        newest = torch.stack([rows[-1] for rows in requests])
        if self.codec is not None:
            newest = self.codec.encode(*newest.split((c, config.qk_rope_head_dim), dim=1))
        cache.pages[0].flatten(0, 1).index_copy_(0, batch.slots, newest)
        return cache, batch

    def ways(self, peer: Peer, close: Callable[..., object]) -> Iterator[Way]:
        """Yield the op that a layer of this setting uses, the reference, and the peer's ways."""
        stored = self.case.stored
        chosen = make_ops(replace(self.setting, cache_format=stored or None), ROLE)[ROLE]
        cache, batch = self.paged()
        for party, choice in in_layer(chosen, ROLE).items():
            if party == "ours" or not stored:
                yield self._own(party, choice, cache, batch)
        for type_ in [kind for kind in peer.types("caches") if (kind == stored if stored else kind != Q8)]:
            for layout in ("separate", "unified")[: len(self.case.lengths)]:
                sizes = (self.case.lengths, self.spec.softmax_scale, self.spec.kv_lora_rank)
                work = peer.attention(self.q, self.keys, *sizes, type_, layout)
                close(work.close)
                name = f"peer {type_}{' unified' if layout == 'unified' else ''}"
                yield Way(name, "peer", type_, work.time, work.result)

    def _own(self, party: str, choice: Choice, cache: LatentCache, batch: RaggedBatch) -> Way:
        heads, c = self.q.shape[:2], self.setting.config.kv_lora_rank
        out = torch.empty(*heads, c, dtype=self.setting.dtype)
        stored = {"cache_format": self.case.stored} if self.case.stored else {}
        call = partial(
            choice.op, choice.op.prepare(choice.spec, batch), q=self.q, cache=cache.pages[0],
            block_table=batch.block_table, kv_lens=batch.kv_lens_device, cu_q=batch.cu_q,
            softmax_scale=choice.spec.softmax_scale, out=out, lse=torch.empty(heads), **stored,
        )  # fmt: skip
        kind = self.case.stored or dtype_name(self.setting.dtype)
        return own(choice.name, party, kind, call, out)
