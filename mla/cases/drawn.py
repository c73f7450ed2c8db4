"""Cases drawn over all axes at once, with hypothesis: biased to borders, and to relations between numbers.

A `Scene` is calls of one op, one after another. `scenes` draws them; what is drawn shrinks to what is small.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from mla.cases.case import KINDS, OpCase
from mla.cases.memory import Layout, edges
from mla.cases.stress import Stress, words
from mla.cases.values import patterns_of
from mla_backends.api import AttentionSpec, LinearSpec, NormSpec

Draw = Callable[..., Any]
Pairs = list[tuple[int, int]]  # per request: new tokens and keys
Serves = Callable[[Any], bool]
Takes = Callable[[Any, tuple[int, ...], tuple[int, ...], "int | None"], bool]  # of a spec: lengths, page size

# Sizes of tiles, pages, splits and blocks, and their neighbours.
BORDERS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    *(n + by for bits in range(4, 13) for n in (1 << bits,) for by in (-1, 0, 1)),
)
FEW = (1, 1, 0, 2)  # rows
PAGE_SIZES = (64, 16, 1, 32, 128, 2, 4, 8, 256)
DEEPSEEK = (
    512,
    64,
    128,
    128,
)  # c, r, n and v: what every model of the family has, and many kernels serve alone
SMALL = (32, 8, 16, 12)
ORDERS = ("shuffled", "rising", "falling", "a run", "a shuffled run")  # of slots
HEADS = (1, 2, 3, 4, 5, 8, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 48, 63, 64, 65, 96, 127, 128, 130)
MORE_HEADS = (4, 16, 64, 128)  # what an op is given that refuses fewer
# The most numbers of operands, and pairs of a query and a key, that a case has; one of a few has more.
NUMBERS, LOGITS, MORE, HUGE_MORE = 1 << 18, 1 << 17, 8, 32
MOST_REQUESTS, MOST_KEYS, HUGE = 300, 5000, (1 << 17) + 70
OFTEN = (20, 130, 1100)  # calls
MOST_PRODUCTS = 1 << 25  # of a projection, which devices are slow in that lack the dtype
FAR, MOST_CACHED = 1 << 15, 1 << 25  # slots that 16 bits do not name, and numbers of a cache with as many


@dataclass(frozen=True)
class Scene:
    """Calls of one op, one after another. Every case has a state, or a packed weight, of its own."""

    cases: tuple[OpCase, ...]
    order: tuple[tuple[int, int], ...] = ((0, 1),)  # which case is called, and how often in a row
    one_memory: bool = False  # cases of the same shapes lie at the same addresses, one after the other
    kept: bool = True  # a state is prepared, or a weight packed, once for all calls of its case
    early: bool = False  # ... before the first call of any
    lent: bool = False  # the state of the first case serves others of the same lengths
    held: float = math.nan  # what outputs hold before a call
    lse: bool = True  # attention is given an lse to write
    in_place: bool = False  # a rotation writes to what it reads

    @property
    def label(self) -> str:
        """The scene in one line."""
        words = [self.cases[0].label]
        words += [f"then {one.label}" for one in self.cases[1:]]
        if self.order != ((0, 1),):
            called = " ".join(f"{index + 1}" + f"x{times}" * (times > 1) for index, times in self.order)
            words.append(f"called {called}" if len(self.cases) > 1 else f"called {sum_of(self.order)} times")
            words += ["prepared anew every time"] * (not self.kept) + ["all prepared before"] * self.early
            words += ["in the same memory"] * self.one_memory + ["with one state"] * self.lent
        words += [f"out holds {self.held:g} before"] * (self.held == self.held)
        words += ["without lse"] * (not self.lse) + ["in place"] * self.in_place
        return "; ".join(words)


def sum_of(order: Sequence[tuple[int, int]]) -> int:
    """Return the number of calls."""
    return sum(times for _, times in order)


# ---------------------------------------------------------------------------------------------- numbers


@functools.cache
def near(most: int, least: int = 1, step: int = 1) -> st.SearchStrategy[int]:
    """Draw a number: a border, a multiple of `step` or its neighbour, or any."""
    borders = [number for number in BORDERS if least <= number <= most] or [least]
    ways = [st.sampled_from(borders), st.integers(least, most)]
    if step > 1 and most >= step:
        multiple = st.integers(1, most // step).map(lambda count: count * step)
        ways += [
            multiple,
            st.builds(lambda n, by: min(most, max(least, n + by)), multiple, st.sampled_from((0, -1, 1))),
        ]
    return st.one_of(ways)


def some(draw: Draw, one_in: int) -> bool:
    """Return whether something happens that is rare; shrinks to no."""
    return bool(draw(st.integers(0, one_in - 1)) == one_in - 1)


# ---------------------------------------------------------------------------------------------- lengths


@st.composite
def requests(draw: Draw, page: int, causal: bool) -> Pairs:
    """Draw new tokens and keys per request, in one of the relations that kernels tell apart."""
    kind = draw(
        st.sampled_from(
            (
                "alone",
                "decode",
                "mixed",
                "equal",
                "full pages",
                "prefill",
                "many",
                "uneven",
                "one long",
                "history",
            )
        )
    )
    keys = near(700, step=page)
    if kind == "alone":
        new = draw(st.one_of(st.just(1), near(140)))
        pairs = [(new, new + draw(st.one_of(st.integers(0, 700), near(MOST_KEYS, 0, page))))]
    elif kind == "decode":
        pairs = [(1, draw(keys)) for _ in range(draw(near(24)))]
    elif kind == "equal":
        new, old = draw(st.one_of(st.just(1), near(40))), draw(st.one_of(st.just(0), near(300, step=page)))
        count = draw(near(20))
        old += -(new + old) % page if draw(st.booleans()) else 0  # which fill whole pages
        pairs = [(new, new + old)] * count
    elif kind == "full pages":
        pairs = [(1, page * draw(st.integers(1, max(1, 512 // page)))) for _ in range(draw(near(12)))]
    elif kind == "prefill":
        pairs = [(new, new) for new in draw(st.lists(near(150), min_size=1, max_size=6))]
    elif kind == "many":
        count, most = draw(st.integers(10, MOST_REQUESTS)), draw(st.integers(1, 4))
        pattern = draw(st.lists(st.tuples(st.integers(1, most), near(70, 0, page)), min_size=1, max_size=5))
        pairs = [(new, new + old) for new, old in itertools.islice(itertools.cycle(pattern), count)]
    elif kind == "uneven":  # as many tokens as requests, and not one each
        lengths = draw(st.permutations([2, 0, 1, 1] * draw(st.integers(1, 3))))
        pairs = [(new, new + draw(near(130, 0, page))) for new in lengths]
    elif kind == "one long":
        shorts = [(1, draw(near(9))) for _ in range(draw(near(60)))]
        at, long = draw(st.integers(0, len(shorts))), draw(near(MOST_KEYS, 200, page))
        pairs = [*shorts[:at], (draw(st.sampled_from((1, 1, 3))), long), *shorts[at:]]
    elif kind == "history":
        new = draw(near(130, 20))
        pairs = [(new, new + draw(near(2200, 500, page))), *[(1, 5)] * draw(st.integers(0, 2))]
    else:
        pairs = [
            (new, new + old)
            for new, old in draw(
                st.lists(
                    st.tuples(near(40), st.one_of(st.just(0), near(400, step=page))), min_size=1, max_size=8
                )
            )
        ]
    if some(draw, 5):  # nothing new of some, no keys of others
        at = draw(st.integers(0, len(pairs)))
        empty = st.sampled_from(((0, 5), (0, page), (1, 0), (0, 0), (0, 70)))
        pairs = [*pairs[:at], *draw(st.lists(empty, min_size=1, max_size=3)), *pairs[at:]]
    if not causal and some(draw, 2):
        pairs = (
            [(draw(near(60)), keys) for _, keys in pairs[:6]]
            if draw(st.booleans())
            else [(k, n) for n, k in pairs]
        )
    return [(new, keys) for new, keys in pairs if not causal or keys >= new or not keys]


SMALLEST: Pairs = [(1, 1)]


def fitting(pairs: Pairs, fits: Callable[[Pairs], bool]) -> Pairs:
    """Return fewer requests, the longest kept, or shorter ones, until they fit."""
    while not fits(pairs) and pairs != SMALLEST:
        if len(pairs) > 1:
            longest = max(range(len(pairs)), key=lambda i: pairs[i][0] * pairs[i][1])
            first = max(0, min(longest - 1, len(pairs) // 4))
            pairs = pairs[first : max(longest + 1, first + len(pairs) * 3 // 4)][: max(1, len(pairs) - 1)]
            continue
        ((new, keys),) = pairs
        less = new // 2 if new > 1 else new
        pairs = [(less, max(less, keys - (new - less) if new > 1 else keys // 2))]
    return pairs


# ------------------------------------------------------------------------------------------------ specs


@dataclass(frozen=True)
class Field:
    """What is drawn from: one kind of op in one dtype, and what the op serves of it."""

    kind: str
    dtype: torch.dtype
    device: torch.device
    serves: Serves = lambda spec: True
    lse_optional: bool = False
    takes: Takes = lambda spec, new, keys, page: True

    def pages(self, spec: Any) -> list[int]:
        """Return the page sizes that the op serves; all of them if it serves none."""
        return [size for size in PAGE_SIZES if self.takes(spec, (1,), (size,), size)] or [*PAGE_SIZES]

    def attention(self, heads: int, dims: Sequence[int], scale: float = 1.0) -> AttentionSpec:
        """Return the spec of attention with widths c, r, n and v."""
        c, r, n, v = dims
        return AttentionSpec(heads, c, n, r, v, scale * (n + r) ** -0.5, self.dtype, self.device)


def some_rows(draw: Draw, width: int, page: int = 1) -> int:
    """Draw a number of rows that each hold so many numbers; one of a few times has many."""
    rows = draw(st.one_of(near(300, step=page), near(4200), st.sampled_from(FEW)))
    return min(rows, max(1, NUMBERS * (MORE if some(draw, 8) else 1) // width))


@st.composite
def linear_cases(draw: Draw, field: Field) -> OpCase:
    groups = draw(st.sampled_from(HEADS)) if field.kind == "batched_linear" else 1
    width = st.one_of(near(600), near(600, step=16))
    inputs, outputs = draw(width), draw(width)
    if some(draw, 8):  # one side very wide
        inputs, outputs = draw(st.permutations((draw(st.integers(1, 16)), draw(st.integers(2048, 40_000)))))
    groups = max(1, min(groups, NUMBERS // (inputs * outputs)))
    rows = min(some_rows(draw, groups * max(inputs, outputs)), MOST_PRODUCTS // (groups * inputs * outputs))
    spec = LinearSpec(inputs, outputs, groups, field.dtype, field.device)
    if not field.serves(spec):
        spec = replace(spec, in_features=128, out_features=96, groups=min(groups, 4))
    biased = field.kind == "linear" and draw(st.booleans())
    return OpCase(field.kind, spec, (rows,), (rows,), stress=Stress(), biased=biased)


@st.composite
def norm_cases(draw: Draw, field: Field) -> OpCase:
    features = draw(st.one_of(near(700), near(8200)))
    spec = NormSpec(features, field.dtype, field.device)
    if not field.serves(spec):
        spec = replace(spec, features=512)
    rows = some_rows(draw, spec.features)
    eps = draw(st.sampled_from((1e-6, 1e-5, 1e-2)))
    return OpCase(field.kind, spec, (rows,), (rows,), stress=Stress(), eps=eps)


@st.composite
def rotation_cases(draw: Draw, field: Field) -> OpCase:
    half = draw(st.one_of(st.just(32), st.integers(1, 70)))
    heads = draw(st.sampled_from(HEADS))
    spec = field.attention(heads, (512, 2 * half, 128, 128))
    if not field.serves(spec):
        spec = field.attention(heads, DEEPSEEK)
    rows = some_rows(draw, heads * spec.qk_rope_head_dim)
    return OpCase(field.kind, spec, (rows,), (rows,), stress=Stress(), interleaved=draw(st.booleans()))


def dims(draw: Draw) -> tuple[int, ...]:
    """Draw widths c, r, n and v."""
    if draw(st.booleans()):
        return DEEPSEEK
    if draw(st.booleans()):
        return SMALL
    c, n, v = (draw(st.one_of(near(300), near(600, step=8))) for _ in range(3))
    return c, 2 * draw(st.integers(1, 40)), n, v


@st.composite
def write_cases(draw: Draw, field: Field) -> OpCase:
    spec = field.attention(16, dims(draw))
    if not field.serves(spec):
        spec = field.attention(16, DEEPSEEK)
    page = draw(st.sampled_from(PAGE_SIZES))
    width = spec.kv_lora_rank + spec.qk_rope_head_dim
    rows = some_rows(draw, width, page)
    pages = FAR // page + draw(st.integers(1, 9)) if some(draw, 40) and width * FAR <= MOST_CACHED else 0
    return OpCase(
        field.kind, spec, (rows,), (rows,), interleaved=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-6, 1e-5))), layout=Layout(page_size=page, pages=pages),
        stress=Stress(order=draw(st.sampled_from(ORDERS))),
    )  # fmt: skip


@st.composite
def attention_cases(draw: Draw, field: Field) -> OpCase:
    latent = field.kind == "latent_attention"
    scale = draw(st.sampled_from((1.0, 1.0, 0.5, 1.6)))
    widths, heads = dims(draw), draw(st.sampled_from(HEADS))
    causal = latent or draw(st.integers(0, 2)) > 0
    page = draw(st.sampled_from(PAGE_SIZES))

    def spec_of(count: int) -> AttentionSpec:
        spec = field.attention(count, widths, scale)
        return spec if field.serves(spec) else field.attention(count, DEEPSEEK, scale)

    if not field.serves(spec_of(heads)):
        heads = next((count for count in MORE_HEADS if field.serves(spec_of(count))), heads)
    if latent and page not in (served := field.pages(spec_of(heads))):
        page = served[PAGE_SIZES.index(page) % len(served)]
    pairs = draw(requests(page, causal))
    more = MORE if some(draw, 8) or any(keys > 900 for _, keys in pairs) else 1
    if latent and widths == SMALL and some(draw, 40):
        more, pairs, heads = HUGE_MORE, [(1, 5), (1, draw(st.integers(HUGE, HUGE + 200)))], min(heads, 2)

    def fits(pairs: Pairs, count: int) -> bool:
        c, r, n, _ = widths
        of = page if latent else 1  # what keys come by
        tokens, keys = sum(new for new, _ in pairs), sum(-(-keys // of) * of for _, keys in pairs)
        size = (c + r if latent else n + r) * (tokens * count + keys * (1 if latent else count))
        return size <= NUMBERS * more and count * sum(new * keys for new, keys in pairs) <= LOGITS * min(
            more, 4
        )

    if not fits(pairs, heads):  # rather fewer heads than fewer requests
        fewer = (count for count in HEADS if count < heads and field.serves(spec_of(count)))
        heads = max((count for count in fewer if fits(pairs, count)), default=heads)
    pairs = fitting(pairs, lambda pairs: fits(pairs, heads))
    pairs = served_lengths(field, spec_of(heads), pairs, page if latent else None)
    new, keys = (tuple(column) for column in zip(*pairs, strict=True))
    layout = Layout(page_size=page)
    return OpCase(field.kind, spec_of(heads), new, keys, causal=causal, stress=Stress(), layout=layout)


def served_lengths(field: Field, spec: AttentionSpec, pairs: Pairs, page: int | None) -> Pairs:
    """Return the lengths, or those most like them that an op takes which refuses them; else as they are."""
    whole = [(new, keys) for new, keys in pairs if new and keys] or SMALLEST
    decode = [(1, keys) for _, keys in whole]
    tried = (
        pairs, whole, decode, [(min(pair), min(pair)) for pair in whole], whole[:1], decode[:1],
        [(1, keys + -keys % (page or 1)) for _, keys in decode], [whole[0]] * len(whole), SMALLEST,
    )  # fmt: skip

    def takes(pairs: Pairs) -> bool:
        new, keys = (tuple(column) for column in zip(*pairs, strict=True))
        return field.takes(spec, new, keys, page)

    return next(filter(takes, tried), pairs)


CASES: Mapping[str, Callable[[Field], st.SearchStrategy[OpCase]]] = {
    "linear": linear_cases,
    "batched_linear": linear_cases,
    "rms_norm": norm_cases,
    "rotate_query": rotation_cases,
    "write_latent": write_cases,
    "latent_attention": attention_cases,
    "expanded_attention": attention_cases,
}


# ----------------------------------------------------------------------------------------------- memory

# Operands that are contiguous by contract, and those that are aligned to their own numbers alone.
CONTIGUOUS = frozenset({"bias", "weight", "slots", "cache", "kv_lens", "cu_q"})
UNALIGNED = frozenset({"lse", "slots", "block_table", "kv_lens", "cu_q"})


def unit(case: OpCase, name: str) -> int:
    """Return how many numbers of an operand its addresses and strides are multiples of, by the contract."""
    bytes_each = case.dtype(name).itemsize
    widths = [getattr(case.spec, field) for letter, field in case.entry.letters.items() if letter != "h"]
    aligned = all(width * case.spec.dtype.itemsize % 16 == 0 for width in widths)
    return 16 // bytes_each if aligned and name not in UNALIGNED else 1


@st.composite
def layouts(draw: Draw, case: OpCase) -> Layout:
    """Draw how a case lies in memory."""
    names = [
        *case.entry.operands,
        *(["weight"] if case.entry.packed else []),
        *(["cache"] if case.entry.cached else []),
    ]
    gaps = {}
    wide = draw(st.sampled_from(("none", "none", "some", "all")))
    for name in names:
        if wide == "all" or (wide == "some" and draw(st.booleans())):
            step, inner = unit(case, name), len(case.entry.operands.get(name, case.entry.packed).split()) > 2
            shift, row, part = (step * draw(st.sampled_from((1, 0, 2, 5))) for _ in range(3))
            gaps[name] = (
                (shift, 0, 0)
                if name in CONTIGUOUS and not (name == "weight" and case.entry.packed)
                else (shift, row, part * inner)
            )
    layout = replace(case.layout, gaps=gaps)
    if not (case.entry.cached and case.entry.prepares):
        return layout
    size = layout.page_size
    layout = replace(
        layout,
        shuffle=draw(st.integers(0, 3)),
        spare=draw(st.sampled_from((1, 3))),
        columns=draw(st.sampled_from((1, 0, 3))),
        unowned=draw(st.sampled_from((math.nan, 0.0))),
    )
    needed, width = sum(-(-keys // size) for keys in case.kv_lens) + 3, case.shape(case.entry.cached)[0]
    if some(draw, 6):
        count = draw(near(70_000, 200))
        if needed <= len(edges(count)) and count * size * width <= 4 * NUMBERS:
            layout = replace(layout, pages=count)
    if some(draw, 4) and len(case.kv_lens) > 1:
        full = [min(one, other) // size for one, other in itertools.pairwise(case.kv_lens)]
        layout = replace(
            layout,
            shared=(0, *(count if some(draw, 2) else min(count, draw(st.integers(0, 2))) for count in full)),
        )
    return replace(layout, repeated=some(draw, 12) and not any(layout.shared))


# --------------------------------------------------------------------------------------------- numbers

# Names of what may be unusual about numbers, beside the patterns of `mla.cases.values` -> fields of `Stress`.
ROWWISE: Mapping[str, Mapping[str, Any]] = {
    "three sizes": {"spread": 10},
    "large": {"gain": 30.0},
    "small": {"gain": 1e-2},
}
PRODUCTS: Mapping[str, Mapping[str, Any]] = {"cancels": {"cancels": True}, "outlier": {"outlier": True}}
SIZES: Mapping[str, Mapping[str, Any]] = {"small rows": {"size": 1e-3}, "large rows": {"size": 300.0}}
LOGITS_OF: Mapping[str, Mapping[str, Any]] = {
    "large logits": {"gain": 30.0},
    "huge logits": {"gain": 1000.0},
    "even": {"gain": 0.1},
}
# Of these a case has one at most: the product of two is beyond fp16.
LARGE_ONES = frozenset(
    ("one large row", "one large channel", "three sizes", "large", "outlier", "large rows")
) | frozenset(("large logits", "huge logits", "all logits low", "rising logits", "falling logits"))


def stresses(kind: str) -> Mapping[str, Mapping[str, Any]]:
    """Return what may be unusual about the numbers of a kind, by name."""
    if KINDS[kind].prepares:
        return LOGITS_OF
    if kind in ("rms_norm", "write_latent"):
        return {"three sizes": ROWWISE["three sizes"], **SIZES}
    return {**ROWWISE, **(PRODUCTS if KINDS[kind].packed else {})}


@st.composite
def numbers(draw: Draw, case: OpCase) -> Mapping[str, Any]:
    """Draw what is unusual about the numbers of a case: fields of it, and of its stress."""
    own, patterns = stresses(case.kind), patterns_of(case.kind)
    chosen = draw(
        st.one_of(st.just([]), st.lists(st.sampled_from([*patterns, *own]), max_size=2, unique=True))
    )
    large = [name for name in chosen if name in LARGE_ONES]
    chosen = sorted({*chosen} - {*large[1:]})
    found: dict[str, Any] = {"aimed": True} if case.entry.prepares and draw(st.booleans()) else {}
    for name in chosen:
        found |= own.get(name, {})
    return {**found, "values": tuple(name for name in chosen if name in patterns)}


# ---------------------------------------------------------------------------------------------- scenes


@st.composite
def scenes(draw: Draw, field: Field) -> Scene:
    """Draw calls of one op."""
    case = draw(CASES[field.kind](field))
    case = case.but(**draw(numbers(case)), seed=draw(st.integers(0, 3)))
    case = replace(case, layout=draw(layouts(case)))
    scene = Scene((case,), held=draw(st.sampled_from((math.nan, 0.0, 1.0))))
    if field.lse_optional and case.entry.prepares and some(draw, 4):
        scene = replace(scene, lse=False)
    if case.entry.in_place and some(draw, 4):
        scene = replace(scene, in_place=True)
    return draw(sequences(field, scene)) if some(draw, 3) else scene


@st.composite
def sequences(draw: Draw, field: Field, scene: Scene) -> Scene:
    """Draw what is called after the first case, and in which order."""
    (case,) = scene.cases
    kind = draw(
        st.sampled_from(("again", "other numbers", "fewer", "more", "other order", "others", "often"))
    )
    kept, early = draw(st.booleans()), draw(st.booleans())
    if kind == "again":
        return replace(scene, order=((0, 1), (0, draw(st.integers(1, 3)))), kept=kept)
    if kind == "often":
        times = draw(st.sampled_from(OFTEN))
        return replace(scene, cases=(small(case),), order=((0, 1), (0, times)), kept=True)
    if kind == "others":
        other = draw(CASES[field.kind](field))
        other = replace(other, layout=draw(layouts(other)))
    else:
        other = derived(case, kind)
    other = replace(other, seed=case.seed + 1)
    order = draw(
        st.sampled_from(
            (
                ((0, 1), (1, 1)),
                ((0, 1), (1, 1), (0, 1)),
                ((1, 1), (0, 1), (1, 2)),
                ((0, 2), (1, 1), (0, 1), (1, 1)),
            )
        )
    )
    as_first = replace(case.stress, order=other.stress.order)  # type: ignore[type-var]  # which all here have
    alike = replace(other, seed=case.seed, values=case.values, stress=as_first) == case
    memory = alike and draw(st.booleans())
    return replace(
        scene, cases=(case, other), order=order, kept=kept, early=early,
        one_memory=memory, lent=alike and case.entry.prepares and draw(st.booleans()),
    )  # fmt: skip


def small(case: OpCase) -> OpCase:
    """Return a case of the same spec that takes little time."""
    new, keys = min(case.query_lens[0], 3), min(case.kv_lens[0], 70)
    layout = replace(case.layout, shared=(), repeated=False, pages=0)
    return replace(case, query_lens=(new,), kv_lens=(max(new, keys),), layout=layout)


def derived(case: OpCase, kind: str) -> OpCase:
    """Return another case of the same spec: fewer or more tokens, or the same in another order."""
    pairs = list(zip(case.query_lens, case.kv_lens, strict=True))
    rowwise = not case.entry.prepares
    if kind == "fewer":
        pairs = [(pairs[0][0] // 2,) * 2] if rowwise else pairs[: max(1, len(pairs) // 2)]
    elif kind == "more":
        pairs = [(pairs[0][0] + 1,) * 2] if rowwise else [(new, keys + bool(keys)) for new, keys in pairs]
    elif kind == "other order":
        pairs = pairs[::-1]
    if kind == "other numbers" or pairs == list(zip(case.query_lens, case.kv_lens, strict=True)):
        return case
    new, keys = (tuple(column) for column in zip(*pairs, strict=True))
    layout = replace(case.layout, shared=(), repeated=False, pages=0)
    return replace(case, query_lens=new, kv_lens=keys, layout=layout)


def axes(scene: Scene) -> Iterator[tuple[str, Any]]:
    """Yield what a scene has along each axis: numbers, or words."""
    for case in scene.cases:
        yield "rows", case.rows
        if case.entry.prepares or case.entry.cached:
            yield "requests", len(case.kv_lens)
            yield "keys of a request", max(case.kv_lens)
        if case.entry.cached:
            yield "page", case.layout.page_size
        for field in case.entry.letters.values():
            yield field, getattr(case.spec, field)
        assert case.stress is not None
        yield "numbers", ", ".join([*words(case.stress, Stress()), *case.values]) or "ordinary"
        memory = [name for name in ("gaps", "repeated", "pages") if getattr(case.layout, name)]
        yield "memory", ", ".join(memory + ["shared"] * any(case.layout.shared)) or "plain"
    yield "calls", sum_of(scene.order)
