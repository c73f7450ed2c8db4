"""Shapes, and who computes them: the op that our layer uses, the plain reference, and the peer.

Ours reads pages in shuffled order. The peer gets what favours it: the keys of a request lie in one piece,
padded to the blocks that its kernel takes and no further, and mask, graph and work memory are made before.
Several requests of attention are tried as a call for each in one graph, and as one call over all keys with a
mask, as llama.cpp does where all requests share one cache; both with every type of cache of the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch

from benchmarks.peers.ggml.peer import Peer, PeerWork
from benchmarks.peers.ggml.ways import Way, own
from mla import MLAConfig
from mla.bench.subjects.setting import Setting, make_ops
from mla.bench.workload.workload_file import read_workload
from mla.cases.case import OpCase
from mla.cases.memory import Layout
from mla.cases.played import Host
from mla.cases.varied import Call
from mla.layer.ops import layer_roles
from mla.reference import REFERENCE
from mla.text import dtype_name
from mla.verify.selections import true_scores

Op = Literal["attention", "selection", "product"]
Answer = Callable[[torch.Tensor], torch.Tensor]  # what an op wrote -> what is judged
Offer = tuple[str, str, PeerWork, Answer]  # of the peer: name, type, work
ROWS = (16, 704)  # tokens of the two standard scenarios
ROLE, INDEXER = "latent_attention", "deepseek-v3.2"
Q8 = "q8_0"  # the format that the peer has as well


@dataclass(frozen=True)
class Shape:
    """What a layer asks of the op of a role. `kv_lens`: keys of requests that decode one token each.

    `stored` is the format of both caches; "" is plain numbers. A product has `rows` of input.
    """

    op: Op
    name: str
    role: str
    kv_lens: tuple[int, ...] = ()
    heads: int = 0  # 0: the config's
    stored: str = ""
    rows: int = 0

    def within(self, setting: Setting) -> Setting:
        """Return the setting of the layer that asks."""
        config = MLAConfig.named(INDEXER) if self.op == "selection" else setting.config
        config = config.with_heads(self.heads or config.num_attention_heads)
        return replace(setting, config=config, cache_format=self.stored or None)

    def case(self, setting: Setting) -> OpCase:
        """Return the call of the op in a layer of this setting."""
        of = setting.config, setting.dtype, setting.device, 1, setting.cache_format
        kind, spec = layer_roles(*of)[self.role]
        keys = self.kv_lens or (self.rows,)
        tokens = (1,) * len(keys) if self.kv_lens else keys
        layout = Layout(setting.page_size, shuffle=setting.seed)
        return OpCase(kind, spec, tokens, keys, seed=setting.seed, layout=layout)


def shapes(setting: Setting) -> list[Shape]:
    """Return attention of few and many requests, selections, and the projections of a layer."""
    decode = next(each for each in read_workload("standard").scenarios if each.mode == "decode")
    requests = [
        *((f"1x{length}-h{heads}", heads, (length,)) for heads in (16, 128) for length in (400, 4096, 16384)),
        ("decode-h16", 16, tuple(decode.kv_lens(decode.steps // 2))),
        ("16x4096-h16", 16, (4096,) * 16),
    ]
    stored = [("1x400-h16", 16, (400,)), *((f"16x16384-h{heads}", heads, (16384,) * 16) for heads in (1, 16))]
    selected = [(length,) for length in (4096, 32768, 131072)] + [(32768,) * 16]
    roles = layer_roles(setting.config, setting.dtype, setting.device).items()
    projections = {
        (spec.in_features, spec.out_features): role for role, (kind, spec) in roles if kind == "linear"
    }
    return [
        *(Shape("attention", name, ROLE, keys, heads) for name, heads, keys in requests),
        *(Shape("attention", f"{name}-{Q8}", ROLE, keys, heads, Q8) for name, heads, keys in stored),
        *(Shape("selection", f"select-{len(keys)}x{keys[0]}", "select_latents", keys) for keys in selected),
        *(
            Shape("product", f"{rows}x{inputs}x{outputs}", role, rows=rows)
            for rows in ROWS
            for (inputs, outputs), role in projections.items()
        ),
    ]  # fmt: skip


class Problem:
    """A shape with operands, which all ways share. They are drawn in the layer's dtype."""

    def __init__(self, shape: Shape, setting: Setting) -> None:
        self.shape, self.setting = shape, shape.within(setting)
        self.case = shape.case(self.setting)
        self.host = Host(self.case)
        if shape.op == "selection":
            parts = (self.host.given[name] for name in ("q", "weights"))
            per_request = zip(*parts, self._keys.split(shape.kv_lens), strict=True)
            self._scores = [true_scores(q[None], of[None], keys)[0][0] for q, of, keys in per_request]
            self._last = [scores.topk(self.case.spec.topk).values[-1] for scores in self._scores]

    @property
    def _keys(self) -> torch.Tensor:
        """The keys of all requests [K, w], as numbers."""
        keys = cast(Any, self.host.entry).keys(self.case.spec, self.host.given)
        return keys[0][:, 0] if isinstance(keys, tuple) else keys

    def truth(self) -> torch.Tensor:
        """Return the result in float64; of a selection, the leads that `of_positions` returns."""
        if self.shape.op == "selection":
            return self.of_scores(torch.cat(self._scores))
        return self.host.truth["out"]

    def of_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the leads [K] of selected keys over the last one of the best; NaN where a position is none.

        By true scores. Ties may fall either way, but what is left out, or selected twice, counts by its lead.
        """
        parts = []
        for chosen, scores, last in zip(positions.long(), self._scores, self._last, strict=True):
            inside = (chosen >= 0) & (chosen < len(scores))
            times = torch.bincount(chosen[inside], minlength=len(scores))
            parts.append((scores - last) * times if inside.all() else torch.full_like(scores, torch.nan))
        return torch.cat(parts)

    def of_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the leads [K] of what is best by scores [K]."""
        parts = scores.split(self.shape.kv_lens)
        return self.of_positions(torch.stack([part.topk(self.case.spec.topk).indices for part in parts]))

    def ways(self, peer: Peer, close: Callable[..., object]) -> Iterator[Way]:
        """Yield all ways; `close` takes what frees those of the peer."""
        yield from self._ours()
        kinds = {"attention": self._attended, "selection": self._selected, "product": self._multiplied}
        for name, type_, work, answer in kinds[self.shape.op](peer):
            close(work.close)
            yield Way(f"peer {name}", "peer", type_, work.time, partial(_answered, work, answer))

    def _ours(self) -> Iterator[Way]:
        """Yield the op that a layer uses, and the reference if that is another one."""
        chosen = make_ops(self.setting, self.shape.role)[self.shape.role]
        plain = () if chosen.name == "reference" else (("reference", "reference", REFERENCE[self.case.kind]),)
        answer = self.of_positions if self.shape.op == "selection" else torch.Tensor.clone
        dtype = self.shape.stored or dtype_name(self.setting.dtype)
        for party, name, op in (("ours", chosen.name, chosen.op), *plain):
            call = Call(self.host, op, self.case.spec)  # type: ignore[arg-type]  # nothing varies
            self.host.entry.offer(call, call.buffers(1)[0])
            call.prepare()
            yield own(name, party, dtype, call.run, call.arguments["out"], answer)

    def _attended(self, peer: Peer) -> Iterator[Offer]:
        shape, spec, q = self.shape, self.case.spec, self.host.given["q"]
        for type_ in [kind for kind in peer.types("caches") if (kind == Q8) == (shape.stored == Q8)]:
            for layout in ("separate", "unified")[: len(shape.kv_lens)]:
                sizes = shape.kv_lens, spec.softmax_scale, spec.kv_lora_rank
                work = peer.attention(q, self._keys, *sizes, type_, layout)
                yield f"{type_}{' unified' * (layout == 'unified')}", type_, work, torch.Tensor.clone

    def _selected(self, peer: Peer) -> Iterator[Offer]:
        """llama.cpp has an op for the scores alone, so that its time lacks the selection."""
        given, most = self.host.given, self.case.spec.topk

        def positions(made: torch.Tensor) -> torch.Tensor:
            return self.of_positions(made.view(-1, most))

        answer, lacks = (positions, "") if peer.selects else (self.of_scores, ", scores alone")
        for type_ in peer.types("index"):
            work = peer.selection(given["q"], self._keys, given["weights"], self.shape.kv_lens, type_, most)
            yield f"{type_}{lacks}", type_, work, answer

    def _multiplied(self, peer: Peer) -> Iterator[Offer]:
        for type_ in peer.types("weights"):
            work = peer.product(self.host.given["weight"], self.host.given["x"], type_)
            yield type_, {"f32": "float32"}.get(type_, type_), work, torch.Tensor.clone


def _answered(work: PeerWork, answer: Answer) -> torch.Tensor:
    return answer(work.result())
