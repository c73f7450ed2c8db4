"""Ops of sparse attention that are wrong as kernels are: id of a check -> ops that it must fail."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from wrong_attention.base import FAR, Makers, after, altered, curried, given, starts, wrong
from wrong_attention.both import empty_unwritten, waits
from wrong_attention.habits import blind_lse, reads_first, ring_of_outputs, ring_of_states, writes_again
from wrong_attention.latent import host_query
from wrong_ops import extents, habits, places
from wrong_ops.base import changing, mutant
from wrong_ops.formulas import always, next_slot_too

from mla.cache.formats import IndexFp8
from mla.reference import REFERENCE
from mla.reference.small import rms_norm, rotate
from mla.reference.sparse import index_scores

Tensor = torch.Tensor
KEY = "write_index_key"
Select, Sparse = (type(REFERENCE[kind]) for kind in ("select_latents", "sparse_latent_attention"))
PAGE = 64


def of_format(op: Any, *names: str) -> Any:
    """Return the op, which claims cache formats as well."""
    op.cache_formats = names
    return op


# ------------------------------------------------------------------------------------------- index keys


def in_its_own_way(make: Callable[..., Tensor]) -> Any:
    """Return an op that writes `make(k, weight, bias, eps)` in place of a LayerNorm, turned."""

    def body(right: Any, **tensors: Any) -> None:
        normed = make(*(tensors[name] for name in ("k", "weight", "bias", "eps")))
        r = tensors["cos_sin"].shape[1]
        turned = rotate(normed[:, :r], tensors["cos_sin"], tensors["interleaved"])
        rows = torch.cat((turned, normed[:, r:]), dim=1).to(tensors["k"].dtype)
        tensors["cache"].flatten(0, 1)[tensors["slots"]] = rows

    return mutant(KEY, body)


def layer_norm(k: Tensor, weight: Tensor, bias: Tensor, eps: float, correction: int = 0) -> Tensor:
    variance, mean = torch.var_mean(k.float(), dim=1, correction=correction, keepdim=True)
    return (k.float() - mean) * torch.rsqrt(variance + eps) * weight + bias


def last_channels(right: Any, **tensors: Any) -> None:
    """The last channels are turned, as in the latents' keys."""
    r, d = tensors["cos_sin"].shape[1], tensors["k"].shape[1]
    order = torch.arange(d).roll(r)
    names = {name: tensors[name][..., order] for name in ("k", "weight", "bias")}
    right(**{**tensors, **names})
    rows = tensors["cache"].flatten(0, 1)
    rows[tensors["slots"]] = rows[tensors["slots"]][:, order.argsort()]


def narrow_slots(bits: int) -> Any:
    return changing(KEY, "slots", lambda slots: slots & ((1 << bits) - 1))


def stores(put: Callable[[IndexFp8, Tensor, Tensor, Tensor], None]) -> Any:
    """Return an op that is right, and puts the rows [s, d + 4] of bytes its own way."""

    def body(right: Any, **tensors: Any) -> None:
        cache, slots, codec = tensors["cache"], tensors["slots"], IndexFp8(tensors["k"].shape[1])
        if not tensors.get("cache_format"):
            right(**tensors)
            return
        mine = cache.clone()
        right(**{**tensors, "cache": mine})
        put(codec, cache, slots, codec.rows(mine).flatten(0, 1)[slots])

    return of_format(mutant(KEY, body), "fp8")


def by_rows(codec: IndexFp8, cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.flatten(0, 1)[slots] = rows


def scales_first(codec: IndexFp8, cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    page = cache.shape[1]
    flat = cache.view(len(cache), -1)
    flat[:, 4 * page :].unflatten(1, (page, codec.c))[slots // page, slots % page] = rows[:, : codec.c]
    flat[:, : 4 * page].unflatten(1, (page, 4))[slots // page, slots % page] = rows[:, codec.c :]


def any_scale(codec: IndexFp8, cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    keys = codec.decode(rows)[0]
    scales = (keys.abs().amax(1, keepdim=True) / 448).clamp_min(1e-10)
    codes = (keys / scales).to(torch.float8_e4m3fn).view(torch.uint8)
    codec.put(cache, slots, torch.cat((codes, scales.view(torch.uint8)), dim=1))


# -------------------------------------------------------------------------------------------- selecting


def sees(seen: Tensor, keys: Tensor, scores: Tensor) -> Tensor:
    """Return scores [t, s], those of tokens behind `seen` [t, 1] at -inf."""
    return scores.masked_fill(torch.arange(len(keys)) >= seen, -torch.inf)


def best(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count, dim=1).indices


def selecting(
    score: Callable[..., Tensor] = index_scores,
    hide: Callable[[Tensor, Tensor, Tensor], Tensor] = sees,
    pick: Callable[[Tensor, int], Tensor] = best,
    rounds_up: bool = False,
    tail: int = -1,
) -> Any:
    """Return a selection of steps that can be changed. `rounds_up`: whole pages are read."""

    def call(
        right: Any, batch: Any, *, q: Tensor, weights: Tensor, cache: Tensor, out: Tensor, **rest: Any
    ) -> None:
        first, page = starts(batch), cache.shape[1]
        for request, (new, length) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
            rows = slice(first[request], first[request + 1])
            owned = rest["block_table"][request, : -(-length // page)]
            keys = cache[owned].flatten(0, 1).float()
            keys = keys if rounds_up else keys[:length]
            seen = torch.arange(length - new + 1, length + 1)[:, None].clamp_min(0)
            seen = -(-seen // page) * page if rounds_up else seen
            scores = hide(seen, keys, score(q[rows], weights[rows], keys))
            count = min(out.shape[1], len(keys))
            out[rows] = tail
            chosen = pick(scores, count).int()
            out[rows, :count] = chosen.masked_fill(scores.gather(1, chosen.long()) == -torch.inf, tail)

    return wrong(Select, call)


def without_relu(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("th,thd,sd->ts", weights, q.float(), keys)


def relu_behind(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    return (torch.einsum("thd,sd->ths", q.float(), keys) * weights[..., None]).relu().sum(1)


def unweighted(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    return index_scores(q, weights.sign(), keys)


def neighbour_heads(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    return index_scores(q, weights.roll(1, 1), keys)


def few_heads(most: int) -> Callable[..., Tensor]:
    return lambda q, weights, keys: index_scores(q[:, :most], weights[:, :most], keys)


def narrow(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *parts: index_scores(*parts).to(dtype).float()


@curried
def zeros_from(most: int, q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """A sum over the wrong axis, or a buffer of scores that is too short."""
    scores = index_scores(q, weights, keys)
    scores[:, most:] = 0
    return scores


def later(by: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda seen, keys, scores: sees(seen + by, keys, scores)


def of_the_last(seen: Tensor, keys: Tensor, scores: Tensor) -> Tensor:
    return sees(seen[-1:], keys, scores) if len(seen) else scores


def with_zero(seen: Tensor, keys: Tensor, scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.arange(len(keys)) >= seen, 0.0)


def by_threshold(scores: Tensor, count: int) -> Tensor:
    """What is above the last of the best, and then the last again and again."""
    chosen = best(scores, count)
    reached = scores.gather(1, chosen)
    return torch.where(reached > reached[:, -1:], chosen, chosen[:, -1:])


def first_reached(scores: Tensor, count: int) -> Tensor:
    """Whatever reaches the last of the best, in order, until there are enough."""
    reached = scores >= scores.topk(count, dim=1).values[:, -1:]
    return reached.float().sort(dim=1, descending=True, stable=True).indices[:, :count]


@curried
def overflowing(room: int, scores: Tensor, count: int) -> Tensor:
    """Of the scores that share their leading bits with the last of the best, the first few are looked at."""
    bins = scores.to(torch.bfloat16).float()
    last = bins.topk(count, dim=1).values[:, -1:]
    inside = (bins == last) & (scores > -torch.inf)
    return best(scores.masked_fill(inside & (inside.cumsum(1) > max(room, count)), -3e38), count)


def unsorted_halves(scores: Tensor, count: int) -> Tensor:
    """The best of each half are taken to be the best of all."""
    half = scores.shape[1] // 2
    if count < 2 or half < count:
        return best(scores, count)
    parts = best(scores[:, :half], count - count // 2), best(scores[:, half:], count // 2) + half
    return torch.cat(parts, dim=1)


def takes_all(batch: Any, *, out: Tensor, **rest: Any) -> None:
    """A request with just one token more than is selected counts as one that selects all."""
    first = starts(batch)
    for request, length in enumerate(batch.kv_lens):
        if length == out.shape[1] + 1:
            out[first[request] : first[request + 1]] = torch.arange(out.shape[1]).int()


def all_within(batch: Any, *, out: Tensor, **rest: Any) -> None:
    """Requests that select all select what their earlier tokens do not see."""
    first = starts(batch)
    for request, length in enumerate(batch.kv_lens):
        if length <= out.shape[1]:
            out[first[request] : first[request + 1], :length] = torch.arange(length).int()


@curried
def narrow_positions(bits: int, batch: Any, *, out: Tensor, **rest: Any) -> None:
    out[out >= 0] &= (1 << bits) - 1


def lost_requests(most: int) -> Callable[..., None]:
    return lambda batch, *, out, **rest: out[starts(batch)[min(most, len(batch.query_lens))] :].fill_(-1)


def neighbour_table(**tensors: Any) -> dict[str, Any]:
    return {"block_table": tensors["block_table"].roll(1, 0)}


def fixed_page(cache: Tensor, **tensors: Any) -> dict[str, Any]:
    """Pages are taken to have `PAGE` slots."""
    if cache.shape[1] == PAGE or cache.shape[0] * cache.shape[1] % PAGE:
        return {}
    table = tensors["block_table"]
    return {
        "block_table": table % (cache.shape[0] * cache.shape[1] // PAGE),
        "cache": cache.view(-1, PAGE, cache.shape[2]),
    }


def in_whole_pages(**tensors: Any) -> dict[str, Any]:
    """A page that two requests share is taken for one of nobody."""
    table = tensors["block_table"].clone()
    if tensors["cache"].shape[1] != 16:
        return {}
    table[1:] = torch.where(table[1:] == table[:-1], table[1:, -1:], table[1:])
    return {"block_table": table}


def reads_bytes(change: Callable[[IndexFp8, Tensor], Tensor]) -> Any:
    """Return an op that reads pages of bytes as others: `change(codec, pages)`."""

    def change_cache(**tensors: Any) -> dict[str, Any]:
        if not tensors.get("cache_format"):
            return {}
        return {"cache": change(IndexFp8(tensors["q"].shape[2]), tensors["cache"].clone())}

    return of_format(given(Select, change_cache), "fp8")


def neighbour_scales(codec: IndexFp8, pages: Tensor) -> Tensor:
    scales = codec.parts(pages)[1]
    scales.copy_(scales.roll(1, 1))
    return pages


def no_scales(codec: IndexFp8, pages: Tensor) -> Tensor:
    codec.parts(pages)[1].copy_(torch.ones(()).view(1).view(torch.uint8))
    return pages


def token_by_token(codec: IndexFp8, pages: Tensor) -> Tensor:
    mixed = torch.empty_like(pages)
    for part, columns in zip(codec.parts(mixed), pages.split((codec.c, 4), dim=2), strict=True):
        part.copy_(columns)
    return mixed


# ------------------------------------------------------------------------------------------- attending


def ignores(**tensors: Any) -> dict[str, Any]:
    """As many of the first tokens are attended to, whatever is selected."""
    selection = tensors["selection"]
    places = torch.arange(selection.shape[1], dtype=selection.dtype).expand_as(selection)
    return {"selection": torch.where(selection < 0, -1, places)}


def everything(kv_lens: Tensor, cu_q: Tensor, **tensors: Any) -> dict[str, Any]:
    """All that a token sees is attended to, whatever is selected."""
    new = cu_q.diff()
    behind = cu_q[1:].repeat_interleave(new) - torch.arange(int(cu_q[-1]))
    places = torch.arange(int(kv_lens.max()), dtype=torch.int32)
    seen = (kv_lens.repeat_interleave(new) - behind + 1)[:, None]
    return {"selection": torch.where(places < seen, places, -1).int()}


def first_1024(selection: Tensor, **_: Any) -> dict[str, Any]:
    """A block's threads read one entry each."""
    return {"selection": torch.cat((selection[:, :1024], torch.full_like(selection[:, 1024:], -1)), dim=1)}


def half_of_it(**tensors: Any) -> dict[str, Any]:
    selection = tensors["selection"].clone()
    selection[:, (selection.shape[1] + 1) // 2 :] = -1
    return {"selection": selection}


def of_the_token_before(**tensors: Any) -> dict[str, Any]:
    return {"selection": tensors["selection"].roll(1, 0)}


def as_slots(right: Any, batch: Any, **tensors: Any) -> None:
    """Positions are taken for slots of the cache."""
    table = torch.arange(tensors["cache"].shape[0], dtype=torch.int32).expand(len(batch.kv_lens), -1)
    right(**{**tensors, "block_table": table})


@curried
def minus_one_is(slot: int, selection: Tensor, kv_lens: Tensor, **tensors: Any) -> dict[str, Any]:
    """-1 is position 0, or that of the last slot in the cache, as Python has it."""
    keys = kv_lens.repeat_interleave(tensors["cu_q"].diff())[:, None]
    place = torch.zeros_like(keys) if slot == 0 else (keys - 1).clamp_min(0)
    return {"selection": torch.where((selection < 0) & (keys > 0), place.int(), selection)}


@curried
def whole_tiles(tile: int, selection: Tensor, **tensors: Any) -> dict[str, Any]:
    """The last tile of a selection is left out, if it is not whole."""
    selection, whole = selection.clone(), selection.shape[1] // tile * tile
    selection[:, whole or selection.shape[1] :] = -1
    return {"selection": selection}


def lost_heads_from(head: int) -> Callable[..., None]:
    return lambda batch, *, out, **rest: out[:, head:].zero_()


def lost_rows_from(request: int) -> Callable[..., None]:
    return lambda batch, *, out, **rest: out[starts(batch)[min(request, len(batch.query_lens))] :].zero_()


@curried
def narrow_selection(bits: int, selection: Tensor, **tensors: Any) -> dict[str, Any]:
    return {"selection": torch.where(selection < 0, -1, selection & ((1 << bits) - 1))}


def other_format(cache: Tensor, cache_format: str = "", **tensors: Any) -> dict[str, Any]:
    """Bytes are read with the keys and latents of each token moved by one."""
    return {"cache": cache.roll(1, 2)} if cache_format else {}


class FrozenTables(Sparse):  # type: ignore[misc, valid-type]
    """Says that it follows its batch, and keeps the tables of the plan."""

    lse_optional = False

    def prepare(self, spec: Any, batch: Any) -> Any:
        return SimpleNamespace(table=batch.block_table.clone(), graph_safe=True)

    def __call__(self, state: Any, **tensors: Any) -> None:
        super().__call__(None, **{**tensors, "block_table": state.table})


class FrozenSelect(Select):  # type: ignore[misc, valid-type]
    """Says that it follows its batch, and goes by the lengths of the plan."""

    lse_optional = False

    def prepare(self, spec: Any, batch: Any) -> Any:
        return altered(batch, graph_safe=True)


def wrapped(block_table: Tensor, cache: Tensor, **tensors: Any) -> dict[str, Any]:
    """The places of pages wrap around."""
    page = cache.shape[1] * cache.shape[2]
    return {"block_table": (block_table.long() * page % (FAR // 2) // page).int()}


def narrow_rows(q: Tensor, **tensors: Any) -> dict[str, Any]:
    """The places of queries are computed in 20 bits."""
    at = [q.storage_offset() + row * q.stride(0) % (1 << 20) for row in range(len(q))]
    return {"q": torch.stack([q.as_strided(q.shape[1:], q.stride()[1:], start) for start in at])}


def kept(base: type) -> list[Callable[[], Any]]:
    """Return ops that keep an output or an input beyond a call."""
    return [
        lambda: wrong(base, writes_again("out")),
        lambda: wrong(base, reads_first("q")),
        lambda: after(base, ring_of_outputs(4)),
    ]


MUTANTS: Makers = {
    "write_index_key.norm": [
        lambda: in_its_own_way(lambda k, weight, bias, eps: layer_norm(k, weight, bias, eps) - bias),
        lambda: in_its_own_way(lambda k, weight, bias, eps: layer_norm(k, weight, bias, eps, 1)),
        lambda: in_its_own_way(lambda k, weight, bias, eps: layer_norm(k, weight, bias, 1e-6)),
        lambda: in_its_own_way(lambda k, weight, bias, eps: rms_norm(k, weight, eps) + bias),
        lambda: mutant(KEY, always(True)),
        lambda: mutant(KEY, always(False)),
    ],
    "write_index_key.pages": [
        lambda: stores(by_rows),
        lambda: stores(scales_first),
        lambda: stores(any_scale),
    ],
    "write_index_key.formula": [
        lambda: in_its_own_way(lambda k, weight, bias, eps: layer_norm(k, torch.ones(()), bias, eps)),
        lambda: mutant(KEY, last_channels),
        lambda: changing(KEY, "bias", lambda bias: bias.half().float().to(bias.dtype) * 1.01),
    ],
    "write_index_key.rows": [lambda: extents.lost_from(KEY, 1024), lambda: extents.lost_at(KEY, 17)],
    "write_index_key.untouched": [lambda: mutant(KEY, next_slot_too)],
    "write_index_key.slots": [lambda n=n: narrow_slots(n) for n in (16, 14)],
    "write_index_key.far_slots": [lambda: narrow_slots(9)],
    "write_index_key.far_rows": [lambda: places.narrow_places(KEY, "k", 20)],
    "write_index_key.new_contents": [
        lambda: habits.remembers_result(KEY),
        *(lambda n=name: habits.remembers(KEY, n) for name in ("k", "weight", "bias", "cos_sin")),
    ],
    "select_latents.scores": [
        lambda: selecting(without_relu),
        lambda: selecting(relu_behind),
        lambda: selecting(unweighted),
        lambda: selecting(neighbour_heads),
        lambda: selecting(pick=unsorted_halves),
        lambda: given(Select, neighbour_table),
    ],
    "select_latents.causal": [
        lambda: selecting(hide=later(1)),
        lambda: selecting(hide=later(-1)),
        lambda: selecting(hide=of_the_last),
        lambda: selecting(rounds_up=True),
    ],
    "select_latents.negative": [lambda: selecting(hide=with_zero)],
    "select_latents.ties": [lambda: selecting(pick=by_threshold), lambda: selecting(pick=first_reached)],
    "select_latents.crowded": [
        lambda: selecting(pick=overflowing(4096)),
        lambda: selecting(pick=overflowing(2048)),
        *(lambda t=dtype: selecting(narrow(t)) for dtype in (torch.bfloat16, torch.float16)),
    ],
    "select_latents.fp8": [
        lambda: reads_bytes(neighbour_scales),
        lambda: reads_bytes(no_scales),
        lambda: reads_bytes(token_by_token),
    ],
    "select_latents.borders": [
        lambda: selecting(rounds_up=True),
        lambda: selecting(tail=0),
        lambda: after(Select, takes_all),
        lambda: after(Select, all_within),
    ],
    "select_latents.page_sizes": [lambda: given(Select, fixed_page), lambda: given(Select, in_whole_pages)],
    "select_latents.requests": [lambda n=n: after(Select, lost_requests(n)) for n in (64, 256)],
    "select_latents.heads": [lambda n=n: selecting(few_heads(n)) for n in (32, 64)],
    "select_latents.positions": [
        *(lambda n=n: after(Select, narrow_positions(n)) for n in (16, 17)),
        lambda: selecting(zeros_from(1 << 17)),
    ],
    "select_latents.far_rows": [lambda: given(Select, narrow_rows)],
    "select_latents.far_pages": [lambda: given(Select, wrapped)],
    "sparse_latent_attention.far_rows": [lambda: given(Sparse, narrow_rows)],
    "sparse_latent_attention.far_pages": [lambda: given(Sparse, wrapped)],
    "select_latents.prepare": [lambda: wrong(Select, prepare=waits)],
    "select_latents.kept": kept(Select),
    "select_latents.alive": [lambda: ring_of_states(Select, 3)],
    "select_latents.graph": [lambda: wrong(Select, host_query)],
    "select_latents.graph_lengths": [FrozenSelect],
    "sparse_latent_attention.selections": [
        lambda: given(Sparse, ignores),
        lambda: given(Sparse, half_of_it),
        lambda: given(Sparse, of_the_token_before),
        lambda: wrong(Sparse, as_slots),
        lambda: given(Sparse, neighbour_table),
        lambda: given(Sparse, first_1024),
    ],
    "sparse_latent_attention.fewer": [
        lambda: given(Sparse, minus_one_is(0)),
        lambda: given(Sparse, minus_one_is(-1)),
        lambda: after(Sparse, blind_lse(0.0)),
        lambda: after(Sparse, empty_unwritten),
    ],
    "sparse_latent_attention.formats": [lambda: of_format(given(Sparse, other_format), "fp8", "fp8_ds_mla")],
    "sparse_latent_attention.borders": [lambda n=n: given(Sparse, whole_tiles(n)) for n in (16, 64)],
    "sparse_latent_attention.page_sizes": [
        lambda: given(Sparse, fixed_page),
        lambda: given(Sparse, in_whole_pages),
    ],
    "sparse_latent_attention.requests": [lambda: after(Sparse, lost_rows_from(256))],
    "sparse_latent_attention.heads": [lambda n=n: after(Sparse, lost_heads_from(n)) for n in (32, 64)],
    "sparse_latent_attention.positions": [lambda n=n: given(Sparse, narrow_selection(n)) for n in (16, 17)],
    "sparse_latent_attention.prepare": [lambda: wrong(Sparse, prepare=waits)],
    "sparse_latent_attention.kept": kept(Sparse),
    "sparse_latent_attention.alive": [lambda: ring_of_states(Sparse, 3)],
    "sparse_latent_attention.graph": [lambda: wrong(Sparse, host_query)],
    "sparse_latent_attention.graph_lengths": [FrozenTables],
}
