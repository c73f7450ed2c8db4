"""Right arithmetic in other orders and other places, as kernels do it, and arithmetic that is wrong.

Attention takes q [h, t, dk], k [h or 1, s, dk], v [h or 1, s, dv] in fp32, the softmax scale, which keys are
hidden [t, s], and the dtype of its op, and returns out [h, t, dv] and its log-sum-exp [h, t, 1]. A product
takes x [.., t, i] and a weight [.., o, i].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor, torch.dtype], Pair]
Product = Callable[[Tensor, Tensor], Tensor]

TILE = 64  # keys
SPLITS = 4
BLOCK = 16  # terms that are summed before their sum is added to others


@dataclass(frozen=True)
class Form:
    """One way to compute attention and products."""

    name: str
    attend: Attend
    product: Product


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x, rounded to the dtype and widened again."""
    return x.to(dtype).to(x.dtype)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """Sum as torch does."""
    return x @ weight.mT


def logits_of(q: Tensor, k: Tensor, scale: float, hidden: Tensor, product: Product = plain) -> Tensor:
    """Return scaled logits [h, t, s], -inf where they are hidden."""
    return (product(q, k) * scale).masked_fill_(hidden, -torch.inf)


# ------------------------------------------------------------------------------------------- the softmax


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Attend tile by tile with a running maximum; exp(s - maximum) is rounded, its sum is not."""
    top = q.new_full((*q.shape[:2], 1), -torch.inf)
    total, value = torch.zeros_like(top), q.new_zeros(*q.shape[:2], v.shape[2])
    for start in range(0, k.shape[1], TILE):
        keys = slice(start, start + TILE)
        logits = logits_of(q, k[:, keys], scale, hidden[:, keys])
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        base = new_top.clamp_min(-1e30)  # -inf - -inf is NaN
        weights, decay = (logits - base).exp_(), (top - base).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        value = value * decay + narrow(weights, dtype) @ v[:, keys]
        top = new_top
    return value / total, top + total.log()


def split(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Attend parts of the keys alone, and merge them by their log-sum-exps."""
    return _merged(*_parts(q, k, v, scale, hidden, dtype))


def rounded_parts(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Do what `split` does with parts that are kept in the op's dtype."""
    outs, sums = _parts(q, k, v, scale, hidden, dtype)
    return _merged(narrow(outs, dtype), sums)


def _parts(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Return out and log-sum-exp of every part, 0 and -inf of one that a query does not see."""
    ends = [k.shape[1] * part // SPLITS for part in range(SPLITS + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(ends) if pair[0] < pair[1]]
    computed = [flash(q, k[:, part], v[:, part], scale, hidden[:, part], dtype) for part in parts]
    outs, sums = (torch.stack(part_results) for part_results in zip(*computed, strict=True))
    return outs.nan_to_num(), sums


def _merged(outs: Tensor, sums: Tensor) -> Pair:
    whole = sums.logsumexp(0)
    return ((sums - whole).exp() * outs).sum(0), whole


def normalised(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Round the probabilities once they are divided by their sum, as `softmax(..).to(dtype) @ v` does."""
    logits = logits_of(q, k, scale, hidden)
    return narrow(logits.softmax(-1), dtype) @ v, logits.logsumexp(-1, keepdim=True)


def fast_exp(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Attend with exp2 of logits that were scaled by log2(e), whose relative error is up to 2^-22."""
    logits = logits_of(q, k, scale * math.log2(math.e), hidden)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp2_()
    noise = weights.view(torch.int32).long() * 48271 % 2049 - 1024  # of each weight its own
    weights = weights * (1 + noise * 2.0**-32)
    total = weights.sum(-1, keepdim=True)
    return narrow(weights, dtype) @ v / total, (top + total.log2()) * math.log(2)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Attend in float64: only the result will be rounded."""
    logits = logits_of(q.double(), k.double(), scale, hidden)
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1, keepdim=True)


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply in float64."""
    return x.double() @ weight.double().mT


# -------------------------------------------------------------------------------------- orders of a sum


def backwards(x: Tensor, weight: Tensor) -> Tensor:
    """Sum from the last term to the first, as far as torch lets one choose."""
    return x.flip(-1) @ weight.flip(-1).mT


def blocked(x: Tensor, weight: Tensor) -> Tensor:
    """Add the sums of blocks to one accumulator."""
    blocks = list(zip(x.split(BLOCK, -1), weight.split(BLOCK, -1), strict=True))
    total = blocks[0][0] @ blocks[0][1].mT
    for block, other in blocks[1:]:
        total += block @ other.mT
    return total


def pairwise(x: Tensor, weight: Tensor) -> Tensor:
    """Add the sums of both halves, which are summed likewise."""
    half = x.shape[-1] // 2
    if half < BLOCK:
        return x @ weight.mT
    return pairwise(x[..., :half], weight[..., :half]) + pairwise(x[..., half:], weight[..., half:])


def one_by_one(x: Tensor, weight: Tensor) -> Tensor:
    """Add term by term to one accumulator: the worst order there is."""
    total = x[..., :1] * weight[..., None, :, 0]
    for term in range(1, x.shape[-1]):
        total.addcmul_(x[..., term : term + 1], weight[..., None, :, term])
    return total


def in_order(name: str, product: Product) -> Form:
    """Return attention and products in fp32 whose sums are made by `product`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
        logits = logits_of(q, k, scale, hidden, product)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top).exp_()
        total = product(weights, weights.new_ones(1, 1, weights.shape[-1]))
        return product(weights, v.mT) / total, top + total.log()

    return Form(name, attend, product)


REFERENCE = in_order("as the reference", plain)
EXACT = Form("float64 inside", exact, exact_product)
# Different in float32 only, and slow.
ONE_BY_ONE = in_order("sums one by one", one_by_one)
RIGHT = (
    Form("flash, tiles of 64", flash, plain),
    Form("split keys, merged", split, plain),
    Form("P normalised, then rounded", normalised, plain),
    in_order("sums in blocks", blocked),
    in_order("sums backwards", backwards),
    in_order("sums in pairs", pairwise),
    Form("fast exp2", fast_exp, plain),
    Form("split keys, parts rounded", rounded_parts, plain),
    ONE_BY_ONE,
    EXACT,
)

# ------------------------------------------------------------------------------- a little wrong
# Less precise than their dtype, or off by a trifle.

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def given(change: Callable[[Tensor], Tensor]) -> Attend:
    """Return attention on queries that were changed."""
    return lambda q, *rest: REFERENCE.attend(change(q), *rest)


def spoilt(change: Callable[[Tensor], Tensor]) -> Attend:
    """Return attention whose output is changed."""

    def attend(*given: object) -> Pair:
        out, lse = REFERENCE.attend(*given)  # type: ignore[arg-type]
        return change(out), lse

    return attend


def tf32(x: Tensor) -> Tensor:
    """Return x with the ten bits of mantissa that matrix units keep of float32."""
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def last_head(out: Tensor) -> Tensor:
    """Return out [h, t, d] with one head 5 % off."""
    return torch.cat((out[:-1], 1.05 * out[-1:]))


def leftover(out: Tensor) -> Tensor:
    """Return out with a little of another row, as scratch memory may hold it."""
    return out + 2e-3 * out.flatten(0, 1).roll(1, 0).view_as(out)


def narrow_scores(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Attend with logits in the op's dtype."""
    logits = narrow(logits_of(q, k, scale, hidden), dtype)
    return logits.softmax(-1) @ v, logits.logsumexp(-1, keepdim=True)


def narrow_sums(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, dtype: torch.dtype) -> Pair:
    """Attend tile by tile, and keep the sum of values in the op's dtype."""
    logits = logits_of(q, k, scale, hidden)
    lse = logits.logsumexp(-1, keepdim=True)
    weights, total = (logits - logits.amax(-1, keepdim=True)).exp(), q.new_zeros(*q.shape[:2], v.shape[2])
    for start in range(0, k.shape[1], TILE):
        keys = slice(start, start + TILE)
        total = narrow(total + weights[..., keys] @ v[:, keys], dtype)
    return total / weights.sum(-1, keepdim=True), lse


# With the dtypes in which they are wrong. (Logits in float16 err about as much as float16 probabilities.)
WRONG: tuple[tuple[Form, tuple[torch.dtype, ...]], ...] = (
    (in_order("TF32 products", lambda x, weight: tf32(x) @ tf32(weight).mT), (F32,)),
    (replace(REFERENCE, name="queries in float16", attend=given(lambda q: narrow(q, F16))), (F32,)),
    (replace(REFERENCE, name="queries in bfloat16", attend=given(lambda q: narrow(q, BF16))), (F32,)),
    (replace(REFERENCE, name="2e-3 of another row", attend=spoilt(leftover)), (F32,)),
    (replace(REFERENCE, name="attention 1 % off", attend=spoilt(lambda out: 1.01 * out)), (F32, F16)),
    (replace(REFERENCE, name="one head of four 5 % off", attend=spoilt(last_head)), (F32, F16, BF16)),
    (replace(REFERENCE, name="logits in bfloat16", attend=narrow_scores), (BF16,)),
    (replace(REFERENCE, name="sums in the dtype, 2500 keys", attend=narrow_sums), (F16, BF16)),
)
