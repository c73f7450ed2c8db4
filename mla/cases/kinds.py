"""The kinds of ops in the contract: their operands, truth, cost, place in memory, and how calls differ."""

# ruff: noqa: RUF012  # tables that nobody writes to

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from mla import cost
from mla.cache.formats import Codec, codec_of, latents
from mla.cases import stress
from mla.cases.case import BYTES, KINDS, Kind, Lengths, Normal, OpCase
from mla.cases.memory import Pages, Tensors, changed_slots, poison
from mla.cases.varied import Call, Pool, Products, Queries, draw_signs
from mla.verify.layer_check import TAIL, stands_for
from mla.verify.op_oracle import Weights, attend_requests, lost_weights, product, true_norm, true_rotation
from mla.verify.places import Places
from mla.verify.stored import in_parts, judge_bytes, judge_decoded, stored_truth
from mla_backends.api import AttentionSpec, FusedOp, LinearSpec, NormSpec, SegmentLengths

LINEAR = {"i": "in_features", "o": "out_features", "h": "groups"}
TABLES = {"block_table": "B m", "kv_lens": "B", "cu_q": "B+1"}
ATTENTION = {
    "h": "num_heads",
    "c": "kv_lora_rank",
    "n": "qk_nope_head_dim",
    "r": "qk_rope_head_dim",
    "v": "v_head_dim",
}
DEEPSEEK: Mapping[str, Any] = {
    "num_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "softmax_scale": 192**-0.5,
}


class Linear(Kind):
    """A projection, with or without a bias."""

    spec, letters, pool = LinearSpec, LINEAR, Products
    title = "{q} tokens, {i} to {o}"
    operands = {"x": "T i", "bias": "o", "out": "T o"}
    results = {"out": "T o"}
    packed = "o i"
    usual = {"in_features": 128, "out_features": 96, "groups": 1}
    cost = staticmethod(cost.linear_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        features = case.spec.in_features
        x = normal(rows, *case.shape(self.operands["x"])[1:])
        biased = case.biased and "bias" in self.operands
        bias = {"bias": normal(case.spec.out_features)} if biased else {}
        weight = normal(*case.shape(self.packed), scale=features**-0.5)
        x, weight = stress.products(case, x, weight)
        return {"x": x, "weight": weight, **bias}

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        return {"out": product(given["x"], given["weight"], given.get("bias"))}


class BatchedLinear(Linear):
    """A projection with a weight per head."""

    title = "{q} tokens, {h} heads, {i} to {o}"
    operands = {"x": "T h i", "out": "T h o"}
    results = {"out": "T h o"}
    packed = "h o i"
    usual = {**Linear.usual, "groups": 4}


class RmsNorm(Kind):
    """The norm of the query latent."""

    spec, letters, pool = NormSpec, {"d": "features"}, Pool
    title = "{q} tokens, {d} features"
    operands = {"x": "T d", "weight": "d", "out": "T d"}
    results = {"out": "T d"}
    scalars = {"eps": float}
    weights = ("weight",)
    usual = {"features": 512}
    cost = staticmethod(cost.rms_norm_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        features = case.spec.features
        x = stress.spread(case, normal(rows, features), case.stress.size)
        return {"x": x, "weight": normal(features) * case.stress.gain}  # one that nobody can do without

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        return {"out": true_norm(given["x"], given["weight"], given["eps"])}

    def signs(self, case: OpCase, draw: torch.Generator) -> Tensors:
        signs = draw_signs(draw, case.spec.features)
        return {"x": signs, "out": signs}


class RotateQuery(Kind):
    """The rotation of the last channels of every head."""

    spec, letters, pool, usual = AttentionSpec, ATTENTION, Pool, DEEPSEEK
    title = "{q} tokens, {h} heads of {r}"
    operands = {"x": "T h r", "cos_sin": "T r", "out": "T h r"}
    results = {"out": "T h r"}
    scalars = {"interleaved": bool}
    varied = ("x", "cos_sin")
    in_place = True
    cost = staticmethod(cost.rotate_query_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        x = normal(rows, case.spec.num_heads, case.spec.qk_rope_head_dim)
        return {"x": stress.spread(case, x, case.stress.gain), "cos_sin": case.angles(rows)}

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        return {"out": true_rotation(given["x"], given["cos_sin"], given["interleaved"])}

    def signs(self, case: OpCase, draw: torch.Generator) -> Tensors:
        signs = pair_signs(case, draw, case.spec.num_heads, case.spec.qk_rope_head_dim)
        return {"x": signs, "out": signs}


def pair_signs(case: OpCase, draw: torch.Generator, *shape: int) -> torch.Tensor:
    """Return signs that are alike in the two columns of a rotated pair."""
    signs = draw_signs(draw, *shape[:-1], shape[-1] // 2)
    return signs.repeat_interleave(2, dim=-1) if case.interleaved else torch.cat((signs, signs), dim=-1)


class WritesSlots(Kind):
    """An op that writes `rows` to the slots of a cache; every other slot holds a marker."""

    def written(self, arguments: Mapping[str, Any]) -> Tensors:
        cache, slots = self.by_token(arguments["cache"]), arguments["slots"]
        return {"rows": cache.flatten(0, 1).index_select(0, slots.to(cache.device))}

    def touched(self, arguments: Mapping[str, Any], page_size: int) -> torch.Tensor:
        return (arguments["slots"].cpu() // page_size).unique()

    def place(self, call: Call) -> None:
        case = call.case
        if case.rope is None:
            slots, count = stress.slots(case)
            call.lay("slots", slots, fill=count * case.layout.page_size - 1)
            return
        call.pages = pages = Pages.of(case.kv_lens, case.layout)
        call.lay("slots", pages.slots[[first + seen - 1 for first, seen in case.spans]])
        cache = call.blank("cache", (pages.count, case.layout.page_size, *case.shape(self.cached)))
        call.arguments["cache"] = cache.fill_(stands_for(TAIL, cache.dtype))

    def blank(self, case: OpCase) -> Tensors:
        shape = (stress.slots(case)[1], case.layout.page_size, *case.shape(self.cached))
        return {"cache": stress.held_before(shape, case.dtype("cache"))}

    def offer(self, call: Call, results: Tensors) -> None:
        cache = call.arguments["cache"]
        cache.view(-1, cache.shape[2])[call.arguments["slots"]] = poison(cache.new_empty(1))

    def strays(self, case: OpCase, arguments: Mapping[str, Any]) -> str:
        cache = self.by_token(arguments["cache"])
        before = torch.tensor(stands_for(TAIL, cache.dtype), dtype=cache.dtype)  # where nobody writes
        before = self.blank(case)["cache"] if case.rope is None else before
        count, first = changed_slots(cache, before, arguments["slots"])
        clause = f"{count} slots other than those of the new tokens have changed, the first is {first}"
        return clause if count else ""


class WriteLatent(WritesSlots):
    """The norm and rotation of new latents, to the slots of a cache."""

    spec, letters, pool, usual = AttentionSpec, ATTENTION, Pool, DEEPSEEK
    title = "{q} tokens, page {page}, latents of {c} and {r}"
    operands = {"kv_a": "T c+r", "weight": "c", "cos_sin": "T r", "slots": "T"}
    results = {"latent": "T c", "key": "T r"}
    scalars = {"eps": float, "interleaved": bool}
    varied = ("kv_a", "cos_sin")
    cached = "c+r"
    cost = staticmethod(cost.write_latent_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        c = case.spec.kv_lora_rank
        kv_a = normal(rows, *case.shape(self.operands["kv_a"])[1:])
        kv_a = stress.spread(case, kv_a, case.stress.size)
        kv_a[:, c:] *= case.stress.gain
        return {"kv_a": kv_a, "weight": normal(c) * case.stress.gain, "cos_sin": case.angles(rows)}

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        latent, key = given["kv_a"].split((spec.kv_lora_rank, spec.qk_rope_head_dim), dim=1)
        turned = true_rotation(key, given["cos_sin"], given["interleaved"])
        return {"latent": true_norm(latent, given["weight"], given["eps"]), "key": turned}

    def signs(self, case: OpCase, draw: torch.Generator) -> Tensors:
        latent = draw_signs(draw, case.spec.kv_lora_rank)
        key = pair_signs(case, draw, case.spec.qk_rope_head_dim)
        return {"kv_a": torch.cat((latent, key)), "latent": latent, "key": key}

    def written(self, arguments: Mapping[str, Any]) -> Tensors:
        rows, c = super().written(arguments)["rows"], arguments["weight"].shape[0]
        return {"latent": rows[:, :c], "key": rows[:, c:]}


ENDS = ("low", "high")  # between which a decoded number is


class OfBytes(Kind):
    """What an op over a cache of bytes differs in; it precedes the op's own class."""

    cached = "b"
    widths: tuple[str, ...] = ("kv_lora_rank", "qk_rope_head_dim")  # of a row's numbers: fields of the spec
    find: Callable[..., Codec | None] = staticmethod(codec_of)  # of a format's name, and widths

    def __init__(self) -> None:
        self.letters = {**self.letters, "b": "token_bytes"}
        self.scalars = {**self.scalars, "cache_format": str}
        self.dtypes = {**self.dtypes, **dict.fromkeys(("cache", *BYTES), torch.uint8)}
        super().__init__()

    def codec(self, spec: Any) -> Codec:
        """Return the codec of the cache of a spec."""
        return cast("Codec", self.find(spec.cache_format, *(getattr(spec, name) for name in self.widths)))


class Stores(OfBytes):
    """Rows that are written are held to the codec, and never to what other ops err."""

    def __init__(self) -> None:
        self.decoded = self.results  # what bytes are decoded to, in order
        self.results = {**self.decoded, **dict.fromkeys(BYTES, "T b")}
        width = "+".join(words.split()[1] for words in self.decoded.values())
        self.truths = {**self.results, **dict.fromkeys(ENDS, f"T {width}")}
        self.dtypes = {**self.dtypes, **dict.fromkeys(self.decoded, torch.float32)}
        super().__init__()

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        true = super().truth(spec, given, lengths)
        latent, *rest = true.values()
        key = rest[0] if rest else latent[:, :0]
        return true | stored_truth(latent, key, self.codec(spec), spec.dtype)

    def signs(self, case: OpCase, draw: torch.Generator) -> Tensors:
        return {}  # bytes have none

    def written(self, arguments: Mapping[str, Any]) -> Tensors:
        rows = WritesSlots.written(cast("WritesSlots", self), arguments)["rows"]
        widths = [arguments[name].shape[-1] for name in ("weight", "cos_sin")[: len(self.widths)]]
        parts = cast("Codec", self.find(arguments["cache_format"], *widths)).decode(rows)
        return {**dict(zip(self.decoded, parts, strict=False)), **dict.fromkeys(BYTES, rows)}

    def judged(self, op: FusedOp) -> list[str]:
        return [*self.decoded, "bytes" if op.encodes_rounded else "codes"]

    def fault(
        self, name: str, result: torch.Tensor, truth: Tensors, *, places: Places | None = None, **known: Any
    ) -> tuple[float, str]:
        if name in BYTES:
            return judge_bytes(result, truth[name], places)
        widths = [truth[part].shape[1] for part in self.decoded]
        place = [*self.decoded].index(name)
        low, high = (truth[end].split(widths, dim=1)[place] for end in ENDS)
        return judge_decoded(result, low, high, places)


class Reads(OfBytes):
    """Keys are drawn, and then encoded: the truth is that of the decoded numbers."""

    def encoded(self, case: OpCase, given: Tensors) -> Tensors:
        codec = self.codec(case.spec)
        widths = codec.c, codec.r
        keys = in_parts(lambda rows: codec.encode(*rows.split(widths, dim=1)), given["keys"])
        return {**given, "keys": keys}

    def keys(self, spec: Any, given: Mapping[str, torch.Tensor]) -> Any:
        keys = in_parts(partial(latents, codec=self.codec(spec)), given["keys"])
        return super().keys(spec, {"keys": keys})  # type: ignore[misc]  # of an op that has keys


def over_bytes(*parts: type[Kind]) -> Kind:
    """Return the entry of an op over a cache of bytes: what that differs in, then the op's own class."""
    entry: Kind = type(f"Stored{parts[-1].__name__}", parts, {})()
    return entry


class OfQueries(Kind):
    """An op of queries over keys, with a prepared state."""

    prepares = True

    def rows(self, case: OpCase) -> int:
        return case.rows * case.spec.num_heads  # each of them varies by itself

    def work(self, case: OpCase) -> cost.Work:
        return self.cost(case.spec, case.query_lens, case.kv_lens)


class Attention(OfQueries):
    """Queries over keys and values, with a log-sum-exp."""

    spec, letters, pool, usual = AttentionSpec, ATTENTION, Queries, DEEPSEEK
    title = "q {q} kv {kv}, {h} heads, keys of {n} and {r}"
    scalars = {"softmax_scale": float}
    varied = ("q",)

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        out, lse = self.attend(given, *self.keys(spec, given), lengths)
        return {"out": out, "lse": lse}

    def attend(
        self, given: Mapping[str, Any], k: torch.Tensor, v: torch.Tensor, lengths: SegmentLengths,
        change: Weights = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attend to k and v in float64: out [T, h, dv] and lse [T, h]. `change`: of weights."""
        return attend_requests(given["q"], k, v, lengths, given["softmax_scale"], change)

    def lost(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> torch.Tensor:
        """Return by how much [T, h] float64 a right op errs where small weights are rounded to float16.

        They err all alike, of which the sum has a norm, or at random, of which squares add.
        """
        k, v = self.keys(spec, given)
        alike, _ = self.attend(given, k, v, lengths, lost_weights)
        sizes = v.double().square().sum(-1, keepdim=True)
        squares, _ = self.attend(given, k, sizes, lengths, lambda weights: lost_weights(weights).square())
        return alike.norm(dim=-1) + squares[..., 0].sqrt()

    def keys(self, spec: Any, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys [K, 1 or h, dk] and values [K, 1 or h, dv]."""
        raise NotImplementedError


@dataclass
class Batch:
    """The contract's `BatchView`."""

    query_lens: Lengths
    kv_lens: Lengths
    page_size: int
    block_table: torch.Tensor
    kv_lens_device: torch.Tensor
    cu_q: torch.Tensor


class OverPages(OfQueries):
    """An op whose queries see the keys of their requests, in pages of a cache."""

    def given(self, arguments: Mapping[str, Any], lengths: SegmentLengths) -> Mapping[str, Any]:
        cache, keys = self.by_token(arguments["cache"]), []
        for row, length in zip(arguments["block_table"].long(), lengths.kv_lens, strict=True):
            keys.append(cache[row[: -(-length // cache.shape[1])]].flatten(0, 1)[:length])
        return {**arguments, "keys": torch.cat(keys)}

    def touched(self, arguments: Mapping[str, Any], page_size: int) -> torch.Tensor:
        table, lengths = arguments["block_table"].cpu(), arguments["kv_lens"].cpu()
        owned = torch.arange(table.shape[1], device="cpu")[None] < -(-lengths // page_size)[:, None]
        return table[owned].long().unique()

    def place(self, call: Call) -> None:
        case, tail = call.case, torch.nan if call.op.nan_safe_tail else TAIL  # past a request's end
        call.pages = pages = Pages.of(case.kv_lens, replace(case.layout, tail=tail))
        call.lay_pages(pages, call.pool.given["keys"])
        kv_lens, cu_q = torch.tensor(case.kv_lens), torch.tensor([0, *case.query_lens]).cumsum(0)
        call.lay_tables({"kv_lens": kv_lens, "cu_q": cu_q, "block_table": pages.table})

    def batch(self, arguments: Mapping[str, Any], lengths: SegmentLengths) -> Batch:
        tables = (arguments[name] for name in ("block_table", "kv_lens", "cu_q"))
        return Batch(lengths.query_lens, lengths.kv_lens, arguments["cache"].shape[1], *tables)


class LatentAttention(OverPages, Attention):
    """Attention over latents in pages; values are the first columns of keys."""

    title = "q {q} kv {kv}, {h} heads, page {page}, latents of {c} and {r}"
    operands = {"q": "T h c+r", **TABLES, "out": "T h c", "lse": "T h"}
    results = {"out": "T h c", "lse": "T h"}
    cached = "c+r"
    cost = staticmethod(cost.latent_attention_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        width = case.shape(self.operands["q"])[2]
        q, keys = normal(rows, width), normal(sum(case.kv_lens), width)
        return {"q": stress.queries(case, q, keys[:, None]), "keys": keys}

    def keys(self, spec: Any, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        keys = given["keys"][:, None]
        return keys, keys[..., : spec.kv_lora_rank]


class ExpandedAttention(Attention):
    """Attention over keys and values of every head."""

    operands = {"q": "T h n+r", "k": "K h n+r", "v": "K h v", "out": "T h v", "lse": "T h"}
    results = {"out": "T h v", "lse": "T h"}
    cost = staticmethod(cost.expanded_attention_cost)

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        k, v = (case.shape(self.operands[name]) for name in ("k", "v"))
        given = {"q": normal(rows, k[2]), "k": normal(*k), "v": normal(*v)}
        return given | {"q": stress.queries(case, given["q"], given["k"])}

    def keys(self, spec: Any, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return given["k"], given["v"]

    def batch(self, arguments: Mapping[str, Any], lengths: SegmentLengths) -> SegmentLengths:
        return lengths


KINDS.update(
    linear=Linear(),
    batched_linear=BatchedLinear(),
    rms_norm=RmsNorm(),
    rotate_query=RotateQuery(),
    write_latent=WriteLatent(),
    latent_attention=LatentAttention(),
    expanded_attention=ExpandedAttention(),
)
KINDS["write_latent"].stored = over_bytes(Stores, WriteLatent)
KINDS["latent_attention"].stored = over_bytes(Reads, LatentAttention)
