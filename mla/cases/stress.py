"""Numbers and places that show what usual ones hide: large and small rows, sums that cancel, lost keys."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mla.cases.case import OpCase

SIZES = 3  # of rows, where they are spread
EVEN = 0.1  # magnitude of queries that give all keys about the same weight
AIMED = 3.0  # logit of the key that an aimed query is for, above the logarithm of the number of keys
TILE = 64  # keys: aimed queries look at the first key of the last tile
OUTLIER = 200
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
    others: int | None = None  # the seed of weights, keys and values; by default that of the case


class Drawing:
    """Draws N(0, scale^2) for a case: rows and a bias by its seed, weights and keys by that of the others."""

    def __init__(self, case: OpCase) -> None:
        assert case.stress is not None
        self._case, self._drawn, self._own = case, 0, 2 if case.biased else 1
        self._others = case.seed if case.stress.others is None else case.stress.others

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        seed = self._case.seed if self._drawn < self._own else self._others
        numbers = _normal(1000 * seed + self._drawn, math.prod(shape)).view(shape)
        self._drawn += 1
        dtype = self._case.spec.dtype
        return numbers.to(dtype, copy=True) if scale == 1 else (numbers * scale).to(dtype)


def _normal(seed: int, count: int) -> torch.Tensor:
    """Return so many of the numbers [count] of a seed, over and over. Nobody writes to them."""
    numbers = _period(seed)
    return numbers[:count] if count <= PERIOD else numbers.repeat(-(-count // PERIOD))[:count]


@functools.lru_cache(maxsize=32)
def _period(seed: int) -> torch.Tensor:
    """Return N(0, 1) [PERIOD] fp32. Drawing takes longer than all else that is done with numbers."""
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed))


def rows(case: OpCase, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Return rows [T, ...] times `factor`, and spread."""
    turn = torch.arange(len(x)).remainder(SIZES).sub(1).mul(case.stress.spread if case.stress else 0)
    scale = torch.ldexp(torch.ones(len(x)), turn).view(-1, *(1,) * (x.dim() - 1))
    return (x.float() * factor * scale).to(x.dtype)


def products(case: OpCase, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input [T, ..., i] and the weight [..., o, i] of a projection."""
    stress, dtype = case.stress, x.dtype
    assert stress is not None
    x, weight = rows(case, x, stress.gain).float(), weight.float()
    if stress.cancels:
        half = x.shape[-1] // 2
        x[..., half : 2 * half] = x[..., :half]
        weight[..., half : 2 * half] = weight[..., half : 2 * half] / 8 - weight[..., :half]
    if stress.outlier:
        x[..., 0] *= OUTLIER
        weight[..., 0] /= OUTLIER
    return x.to(dtype), weight.to(dtype)


def queries(case: OpCase, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return queries [T * h, d] for keys [K, 1 or h, d].

    Aimed queries: three of four of a request look at one key each, the last, a tile's first, and any. The key
    has nearly all the weight, so that the output is another one without it. The rest see all keys alike: they
    miss what is lost in bulk.
    """
    stress = case.stress
    assert stress is not None
    if not stress.aimed:
        return q * stress.gain
    if not len(keys):
        return q
    query_lens, kv_lens = torch.tensor(case.query_lens), torch.tensor(case.kv_lens)
    request = torch.arange(len(kv_lens)).repeat_interleave(query_lens)[:, None]  # [T, 1], as what follows
    token = torch.arange(len(request))[:, None] - (query_lens.cumsum(0) - query_lens)[request]
    length, first = kv_lens[request], (kv_lens.cumsum(0) - kv_lens)[request]
    last = (length - query_lens[request] + token if case.causal else length - 1).clamp_min(0)
    head = torch.arange(case.spec.num_heads)[None]
    kind = (token * case.spec.num_heads + head + request) % 4
    anywhere = (token * 7919 + head * 104729 + request * 1299709) % (last + 1)
    place = torch.where(kind == 0, last, torch.where(kind == 1, last // TILE * TILE, anywhere))
    chosen = keys[(first + place).clamp_max(len(keys) - 1), head if keys.shape[1] > 1 else 0].double()
    return _toward(case, q, chosen, torch.where(length > 0, last + 1, 0), kind)


def _toward(
    case: OpCase,
    q: torch.Tensor,  # [T * h, d]
    chosen: torch.Tensor,  # [T, h, d], the key that each looks at
    count: torch.Tensor,  # [T, 1], of the keys that it attends to
    kind: torch.Tensor,  # [T, h]; 3 looks at none
) -> torch.Tensor:
    """Return queries [T * h, d] that give nearly all the weight to one key each."""
    logit = (AIMED + count.clamp_min(1).double().log()) / getattr(case.spec, "softmax_scale", 1.0)
    at = chosen * (logit / chosen.square().sum(-1).clamp_min(1))[..., None]
    q = q.unflatten(0, chosen.shape[:2])
    aimed = torch.where((kind == 3)[..., None], q * EVEN, at.to(q.dtype))
    return torch.where((count > 0)[..., None], aimed, q).flatten(0, 1)


def selecting(case: OpCase, q: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return aimed queries [T * h, d] for the keys [K, d] that each selects: rows [T, k], or -1.

    They look at the first that is selected, at the last, and at any: see `queries`.
    """
    if not len(keys):
        return q
    token, head = torch.arange(len(rows))[:, None], torch.arange(case.spec.num_heads)[None]
    count, kind = (rows >= 0).sum(1, keepdim=True), (token * case.spec.num_heads + head) % 4
    anywhere = (token * 7919 + head * 104729) % count.clamp_min(1)
    place = torch.where(kind == 0, 0, torch.where(kind == 1, (count - 1).clamp_min(0), anywhere))
    return _toward(case, q, keys[rows.gather(1, place).clamp_min(0)].double(), count, kind)


def angles(case: OpCase, count: int) -> torch.Tensor:
    """Return [count, r] fp32: cosines and then sines of angles all around the circle."""
    generator = torch.Generator().manual_seed(case.seed)
    turn = 3 * torch.randn(count, case.sizes["r"] // 2, generator=generator)
    return torch.cat((turn.cos(), turn.sin()), dim=1)


def slots(case: OpCase) -> tuple[torch.Tensor, int]:
    """Return the slots [T] int64 that a call writes, and the pages of its cache, whose last slot is spare."""
    assert case.stress is not None
    tokens, size, order = case.rows, case.layout.page_size, case.stress.order
    pages = max(-(-(tokens + min(2 * tokens, 1000)) // size) + 1, case.layout.pages)
    generator = torch.Generator().manual_seed(tokens + case.seed)
    if order == "a run":
        return torch.arange(tokens) + size // 2, pages
    if order == "a shuffled run":  # its ends are where those of a run are
        inner = 1 + torch.randperm(max(0, tokens - 2), generator=generator)
        ends = torch.arange(tokens)[:1], torch.arange(tokens)[1:][-1:]
        return torch.cat((ends[0], inner, ends[1])) + size // 2, pages
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


def words(stress: Any, usual: Any, leave_out: frozenset[str] = frozenset()) -> list[str]:
    """Return words for every field of a dataclass that is not as usual."""
    words = []
    for name, value in vars(stress).items():
        if value == getattr(usual, name) or name in leave_out:
            continue
        name = name.replace("_", " ")
        if isinstance(value, bool):
            words.append(name if value else f"not {name}")
        else:
            words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return words
