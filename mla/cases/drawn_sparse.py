"""Drawn cases of the ops of sparse attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hypothesis import strategies as st

from mla.cache.index_formats import index_codec
from mla.cases.case import OpCase
from mla.cases.drawn import (
    FAR_SLOTS,
    HEADS,
    HUGE,
    HUGE_ROOM,
    LOGITS,
    LONG_ROOM,
    MAX_CACHED,
    NUMBERS,
    ORDERS,
    PAGE_SIZES,
    ROOMS,
    Draw,
    Field,
    Pairs,
    among,
    attention_case,
    columns,
    fitting,
    requests,
    served_lengths,
    some,
    some_rows,
    whole,
)
from mla.cases.memory import Layout
from mla.cases.sparse import SELECTIONS, V32
from mla.cases.stress import Stress
from mla_backends.api import IndexerSpec

TOPKS = (16, 1, 2, 3, 5, 8, 31, 32, 33, 63, 64, 65, 100, 128)
MORE_TOPKS = (64, 128, 512, 1024, 2048)  # what an op is given that refuses others
DIMS = (128, 16, 32, 64, 24, 40, 96, 256)
SELECT_HEADS = tuple(count for count in HEADS if count <= 65)


def index_spec(draw: Draw, field: Field, heads: int, topk: int) -> IndexerSpec:
    """Draw an indexer, and a format of its cache: in the widths of V3.2 for an op that serves no others."""
    d = draw(among(*DIMS)) if draw(st.booleans()) else 2 * draw(whole(1, 70))
    r = draw(among(d // 4 * 2, 0, 2, d // 2 * 2))
    tried = [IndexerSpec(heads, d, r, topk, field.dtype, field.device)]
    tried += [replace(tried[0], **{**V32, "num_heads": count, "topk": k}) for k in (topk, *MORE_TOPKS)
              for count in (heads, V32["num_heads"])]  # fmt: skip
    spec = next(filter(field.serves, tried), tried[0])
    name = draw(among(*field.formats)) if field.formats and draw(st.booleans()) else ""
    codec = index_codec(name, spec.head_dim)
    stored = replace(spec, index_format=name, token_bytes=codec.token_bytes if codec else 0)
    return stored if field.serves(stored) else spec


def index_case(draw: Draw, field: Field) -> OpCase:
    """Draw a write of index keys; one in 40 is to more than FAR_SLOTS slots, if its width allows."""
    spec, page = index_spec(draw, field, 4, 64), draw(among(*PAGE_SIZES))
    rows = some_rows(draw, spec.head_dim, page)
    far = some(draw, 40) and spec.head_dim * FAR_SLOTS <= MAX_CACHED
    case = OpCase(field.kind, spec, (rows,), (rows,), stress=Stress(order=draw(among(*ORDERS))))
    layout = Layout(page_size=page, pages=FAR_SLOTS // page + 3 if far else 0)
    return replace(case, interleaved=draw(st.booleans()), eps=draw(among(1e-6, 1e-5, 1e-2)), layout=layout)


def select_case(draw: Draw, field: Field) -> OpCase:
    """Draw a selection whose operands have about NUMBERS numbers at most, and its scores LOGITS.

    Heads are dropped before requests are. One case in 40 of narrow keys has a request of HUGE tokens or more,
    whose positions need 18 bits.
    """
    heads, topk = draw(among(*SELECT_HEADS)), draw(among(*TOPKS))
    spec, page = index_spec(draw, field, heads, topk), draw(among(*PAGE_SIZES))
    if page not in (served := field.pages(spec)):
        page = served[PAGE_SIZES.index(page) % len(served)]
    pairs, room = requests(draw, page, True), draw(among(*ROOMS))
    if any(keys > 900 for _, keys in pairs):
        room = max(room, LONG_ROOM)
    if spec.head_dim <= 32 and some(draw, 40):
        room, pairs = HUGE_ROOM, [(1, 5), (1, draw(whole(HUGE, HUGE + 200)))]

    def fits(pairs: Pairs, count: int) -> bool:
        tokens, keys = sum(new for new, _ in pairs), sum(-(-keys // page) * page for _, keys in pairs)
        scores = count * sum(new * keys for new, keys in pairs)
        return spec.head_dim * (tokens * count + keys) <= NUMBERS * room and scores <= LOGITS * room

    if not fits(pairs, spec.num_heads):  # rather fewer heads than fewer requests
        fewer = [replace(spec, num_heads=count) for count in HEADS[::-1] if count < spec.num_heads]
        spec = next((less for less in fewer if fits(pairs, less.num_heads) and field.serves(less)), spec)
    pairs = fitting(pairs, lambda pairs: fits(pairs, spec.num_heads))
    new, keys = columns(served_lengths(field, spec, pairs, page))
    layout, how = Layout(page_size=page), draw(among(*SELECTIONS))
    return OpCase(field.kind, spec, new, keys, layout=layout, selection=how)


def sparse_case(draw: Draw, field: Field) -> OpCase:
    """Draw a case of attention; few queries of it gather many keys."""
    usual = {k: replace(field, topk=k).attention(64, (512, 64, 128, 128)) for k in MORE_TOPKS}
    topk = draw(among(*TOPKS))
    if not field.serves(replace(usual[64], topk=topk)):
        topk = next((k for k, spec in usual.items() if field.serves(spec)), topk)
    case = attention_case(draw, replace(field, topk=topk))
    return replace(case, selection=draw(among(*SELECTIONS)))


CASES: Mapping[str, Callable[[Draw, Field], OpCase]] = {
    "write_index_key": index_case,
    "select_latents": select_case,
    "sparse_latent_attention": sparse_case,
}
