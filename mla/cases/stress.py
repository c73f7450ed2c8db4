"""The numbers and slots of a case, and what is unusual about them: it shows what usual ones hide.

`Stress` says how numbers are drawn; a pattern then changes operands as `Kind.draw` returns them, in place.
Both follow from the case alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mla.cases.memory import Pages, Tensors

if TYPE_CHECKING:
    from mla.cases.case import OpCase

SIZES = 3  # of rows, where they are spread
EVEN = 0.1  # magnitude of queries that give all keys about the same weight
AIMED = 3.0  # logit of the key that an aimed query is for, above the logarithm of the number of keys
TILE = 64  # keys: aimed queries look at the first key of the last tile
OUTLIER, LARGE = 200, 1000.0  # times other values: of an input, and of a row or a channel
LOW_LOGITS = (16.0, -2000.0)  # a channel of every key, and of every query: all logits are far below 0
RISE, STEEP = 12.0, 2000.0  # by which logits rise, or fall, from the first key to the last
PERIOD = (1 << 19) - 1  # of drawn numbers; a prime, so that rows of one operand are all different


@dataclass(frozen=True)
class Stress:
    """What is unusual about the operands of a case; all else is N(0, 1), and weights N(0, 1 / fan_in)."""

    gain: float = 1.0  # of the results; in attention, of the logits
    size: float = 1.0  # of what is normed
    spread: int = 0  # rows are times 2^-spread, 1 and 2^spread by turns
    cancels: bool = False  # the first half of every sum nearly cancels the second
    outlier: bool = False  # the first input is 200 times as large as others, and its weights are as small
    aimed: bool = False  # queries see to it that no key can be lost unseen: see `queries`
    order: str = "shuffled"  # of slots: see `slots`


USUAL = Stress()


def drawing(case: OpCase) -> Callable[..., torch.Tensor]:
    """Return what draws N(0, scale^2) for a case: one operand after another, by its seed."""
    numbers = itertools.count(1000 * case.seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        count = math.prod(shape)
        period = _period(next(numbers))
        drawn = period[:count] if count <= PERIOD else period.repeat(-(-count // PERIOD))[:count]
        return (drawn.view(shape) * scale).to(case.spec.dtype)

    return normal


@functools.lru_cache(maxsize=32)
def _period(seed: int) -> torch.Tensor:
    """Return N(0, 1) [PERIOD] fp32. Drawing takes longer than all else that is done with numbers."""
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed))


def spread(case: OpCase, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Return rows [T, ...] times `factor`, and spread."""
    turn = torch.arange(len(x)).remainder(SIZES).sub(1).mul(case.stress.spread)
    scale = torch.ldexp(torch.ones(len(x)), turn).view(-1, *(1,) * (x.dim() - 1))
    return (x.float() * factor * scale).to(x.dtype)


def products(case: OpCase, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input [T, ..., i] and the weight [..., o, i] of a projection."""
    dtype, x, weight = x.dtype, spread(case, x, case.stress.gain).float(), weight.float()
    if case.stress.cancels:
        half = x.shape[-1] // 2
        x[..., half : 2 * half] = x[..., :half]
        weight[..., half : 2 * half] = weight[..., half : 2 * half] / 8 - weight[..., :half]
    if case.stress.outlier:
        x[..., 0] *= OUTLIER
        weight[..., 0] /= OUTLIER
    return x.to(dtype), weight.to(dtype)


def queries(
    case: OpCase, q: torch.Tensor, keys: torch.Tensor, selected: torch.Tensor | None = None
) -> torch.Tensor:
    """Return queries [T * h, d] for keys [K, 1 or h, d]: all of those before them, or `selected` [T, k].

    Aimed queries: three of four look at one key each, the last, a tile's first, and any. The key has nearly
    all the weight, so that the output is another one without it. The rest see all keys alike: they miss what
    is lost in bulk.
    """
    if not case.stress.aimed:
        return q * case.stress.gain
    if not len(keys):
        return q
    first, count = torch.tensor(case.spans, dtype=torch.int64).view(-1, 2, 1).unbind(1)  # each [T, 1]
    if selected is not None:
        count = (selected >= 0).sum(1, keepdim=True)
    row, head = torch.arange(len(count))[:, None], torch.arange(case.spec.num_heads)[None]
    kind, last = (row + head) % 4, (count - 1).clamp_min(0)
    anywhere = (row * 7919 + head * 104729) % (last + 1)
    place = torch.where(kind == 0, last, torch.where(kind == 1, last // TILE * TILE, anywhere))
    at = first + place if selected is None else selected.gather(1, place)
    chosen = keys[at.clamp(0, len(keys) - 1), head if keys.shape[1] > 1 else 0].double()  # [T, h, d]
    logit = (AIMED + count.clamp_min(1).double().log()) / getattr(case.spec, "softmax_scale", 1.0)
    toward = chosen * (logit / chosen.square().sum(-1).clamp_min(1))[..., None]
    q = q.unflatten(0, chosen.shape[:2])
    aimed = torch.where((kind == 3)[..., None], q * EVEN, toward.to(q.dtype))
    return torch.where((count > 0)[..., None], aimed, q).flatten(0, 1)


def slots(case: OpCase) -> tuple[torch.Tensor, int]:
    """Return the slots [T] int64 that a call writes, and the pages of its cache, whose last slot is spare."""
    tokens, size, order = case.rows, case.layout.page_size, case.stress.order
    pages = max(-(-(tokens + min(2 * tokens, 1000)) // size) + 1, case.layout.pages)
    generator = torch.Generator().manual_seed(tokens + case.seed)
    if order in ("a run", "a shuffled run"):
        run = torch.arange(tokens)
        if order == "a shuffled run":  # its ends are where those of a run are
            run[1:-1] = 1 + torch.randperm(max(0, tokens - 2), generator=generator)
        return run + size // 2, pages
    slots = torch.randperm(pages * size - 1, generator=generator)[:tokens]
    return slots if order == "shuffled" else slots.sort(descending=order == "falling").values, pages


@functools.lru_cache(maxsize=8)
def held_before(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return what a cache [pages, page, w] holds before a write, on the host; its last page is NaN."""
    if not dtype.is_floating_point:
        return torch.full(shape, 77, dtype=dtype)
    count = math.prod(shape)
    before = torch.arange(251).to(dtype).repeat(-(-count // 251))[:count].view(shape)
    before[-1] = math.nan
    return before


def words(stress: Any, usual: Any) -> list[str]:
    """Return words for every field of a dataclass that is not as usual."""
    words = []
    for name, value in vars(stress).items():
        if value == getattr(usual, name):
            continue
        name = name.replace("_", " ")
        if isinstance(value, bool):
            words.append(name if value else f"not {name}")
        else:
            words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return words


# ---------------------------------------------------------------------------------------------- patterns

Pattern = Callable[["OpCase", Tensors], None]


def shape(case: OpCase, given: Tensors) -> Tensors:
    """Apply the patterns that a case names. Keys in pages that requests share are the same.

    All operands are finite.
    """
    _share(case, given)
    for name in case.values:
        PATTERNS[name](case, given)
    _share(case, given)
    for operand in given.values():
        if operand.dtype == torch.float16:  # what is drawn overflows in no other dtype
            operand.clamp_(-largest(operand), largest(operand))
    return given


def largest(operand: torch.Tensor) -> float:
    """Return the largest number that operands hold: far from what overflows in their dtype."""
    dtype = operand.dtype
    return torch.finfo(dtype).max / 4 if dtype.is_floating_point else torch.iinfo(dtype).max


def _share(case: OpCase, given: Tensors) -> None:
    if "keys" in given and (case.layout.shared or case.layout.repeated):
        given["keys"] = given["keys"][Pages.of(case.kv_lens, case.layout).first]


def rows(case: OpCase, given: Tensors) -> Iterator[torch.Tensor]:
    """Yield the operands that have a row per token, or per key, angles apart."""
    for name in (*case.entry.varied, "keys", "k", "v"):
        if name in given and name != "cos_sin" and given[name].numel():
            yield given[name]


def zeros(case: OpCase, given: Tensors, every: int) -> None:
    for operand in rows(case, given):
        operand[::every] = 0


def large(case: OpCase, given: Tensors, dim: int) -> None:
    """Make one row large, or one channel."""
    for operand in itertools.islice(rows(case, given), 1):
        operand.select(dim, operand.shape[dim] // 2).mul_(LARGE)


def denormals(case: OpCase, given: Tensors) -> None:
    """No row is made of nothing else: devices may take them for 0."""
    for operand in rows(case, given):
        some = operand[..., 2::4]
        some[:] = torch.where(operand[..., :1] == 0, some, torch.finfo(operand.dtype).tiny / 4)


def zero_weights(case: OpCase, given: Tensors) -> None:
    given["weight"][..., ::2] = 0


def no_turn(case: OpCase, given: Tensors) -> None:
    """Every other token is rotated by angle 0, the first among them."""
    cosines, sines = given["cos_sin"].chunk(2, dim=1)
    cosines[::2], sines[::2] = 1, 0


def keys(given: Tensors) -> torch.Tensor:
    """Return the keys [K, 1 or h, w] of all requests."""
    return given["k"] if "k" in given else given["keys"][:, None]


def low(case: OpCase, given: Tensors) -> None:
    keys(given)[..., 0] = LOW_LOGITS[0]
    given["q"][..., 0] = LOW_LOGITS[1]


def equal_keys(case: OpCase, given: Tensors) -> None:
    keys(given)[:] = keys(given)[case.requests_of_keys[0]]


def slope(case: OpCase, given: Tensors, rise: float) -> None:
    """Let logits rise along the last channel of keys, which all queries weigh alike.

    If steep, what a query may not see is far above what it sees.
    """
    first, lengths = case.requests_of_keys
    keys(given)[..., -1] = ((torch.arange(len(first)) - first) / lengths)[:, None].to(given["q"].dtype)
    limit = largest(given["q"])  # what a small scale asks for may be beyond the dtype
    given["q"][..., -1] = max(-limit, min(limit, rise / case.spec.softmax_scale))


def negative(case: OpCase, given: Tensors) -> None:
    """No score is above 0, and every other head is alone with what it sees of a key."""
    given["weights"].abs_().neg_()
    given["weights"][::2] *= 1e-3


def crowded(case: OpCase, given: Tensors) -> None:
    """All scores have the same leading bits."""
    random = torch.rand(len(given["keys"]), generator=torch.Generator().manual_seed(case.seed))
    for name, low in (("keys", random), ("q", 2.0**-9)):
        given[name].zero_()
        given[name][:, 0], given[name][:, 1] = 1, low
    given["weights"].abs_()


def fewer(case: OpCase, given: Tensors) -> None:
    """Queries select fewer than they may, the first none."""
    selection = given["selection"]
    count = (torch.arange(len(selection)) * 7919) % (selection.shape[1] + 1)
    selection.masked_fill_(torch.arange(selection.shape[1]) >= count[:, None], -1)


PRODUCTS, SELECT, SPARSE = ("linear", "batched_linear"), ("select_latents",), ("sparse_latent_attention",)
NORMS, TURN = ("rms_norm", "write_latent", "write_index_key"), ("rotate_query",)
ATTENTION = ("latent_attention", "expanded_attention", *SPARSE)
BY_ROW = (*PRODUCTS, *NORMS, *TURN)
ALL = (*BY_ROW, *ATTENTION, *SELECT)
# What may be unusual about numbers -> of which kinds of ops, and a pattern or fields of `Stress`.
UNUSUAL: Mapping[str, tuple[Sequence[str], Pattern | Mapping[str, Any]]] = {
    "rows of zeros": (ALL, partial(zeros, every=3)),
    "all zero": (ALL, partial(zeros, every=1)),
    "one large row": ((*BY_ROW, *SELECT), partial(large, dim=0)),
    "one large channel": (ALL, partial(large, dim=-1)),
    "denormals": (ALL, denormals),
    "weights of zero": (NORMS, zero_weights),
    "angle 0": ((*TURN, *NORMS[1:]), no_turn),
    "all logits low": (ATTENTION, low),
    "equal keys": ((*ATTENTION, *SELECT), equal_keys),
    "rising logits": (ATTENTION, partial(slope, rise=RISE)),
    "falling logits": (ATTENTION, partial(slope, rise=-RISE)),
    "steep logits": (ATTENTION, partial(slope, rise=STEEP)),
    "negative weights": (SELECT, negative),
    "crowded scores": (SELECT, crowded),
    "fewer selected": (SPARSE, fewer),
    "three sizes": (BY_ROW, {"spread": 10}),
    "large": ((*PRODUCTS, *TURN), {"gain": 30.0}),
    "small": ((*PRODUCTS, *TURN), {"gain": 1e-2}),
    "cancels": (PRODUCTS, {"cancels": True}),
    "outlier": (PRODUCTS, {"outlier": True}),
    "small rows": (NORMS, {"size": 1e-3}),
    "large rows": (NORMS, {"size": 300.0}),
    "large logits": ((*ATTENTION, *SELECT), {"gain": 30.0}),
    "huge logits": ((*ATTENTION, *SELECT), {"gain": 1000.0}),
    "even": ((*ATTENTION, *SELECT), {"gain": EVEN}),
}
PATTERNS: Mapping[str, Pattern] = {name: how for name, (_, how) in UNUSUAL.items() if callable(how)}
# Of these a case has one at most: the product of two is beyond fp16.
LARGE_ONES = frozenset((
    "one large row", "one large channel", "three sizes", "large", "outlier", "large rows", "large logits",
    "huge logits", "all logits low", "rising logits", "falling logits", "steep logits",
))  # fmt: skip
