"""What may be unusual about the numbers of a case: rows of zeros, one large row, logits in the thousands.

A pattern changes operands as `Kind.draw` returns them, in place. It follows from the case alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from mla.cases.memory import Pages, Tensors

if TYPE_CHECKING:
    from mla.cases.case import OpCase

Pattern = Callable[["OpCase", Tensors], None]

OUTLIER = 1000.0  # times other values
LOW_LOGITS = (16.0, -2000.0)  # a channel of every key, and of every query: all logits are far below 0
RISE, STEEP = 12.0, 2000.0  # by which logits rise, or fall, from the first key to the last


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


def zero_rows(case: OpCase, given: Tensors) -> None:
    for operand in rows(case, given):
        operand[::3] = 0


def all_zero(case: OpCase, given: Tensors) -> None:
    for operand in rows(case, given):
        operand.zero_()


def large_row(case: OpCase, given: Tensors) -> None:
    operand = next(rows(case, given), None)
    if operand is not None:
        operand[len(operand) // 2] *= OUTLIER


def large_channel(case: OpCase, given: Tensors) -> None:
    operand = next(rows(case, given), None)
    if operand is not None:
        operand[..., operand.shape[-1] // 2] *= OUTLIER


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


# --------------------------------------------------------------------------------------------- attention


def keys(given: Tensors) -> torch.Tensor:
    """Return the keys [K, 1 or h, w] of all requests."""
    return given["k"] if "k" in given else given["keys"][:, None]


def low(case: OpCase, given: Tensors) -> None:
    keys(given)[..., 0] = LOW_LOGITS[0]
    given["q"][..., 0] = LOW_LOGITS[1]


def _requests(case: OpCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first key [K], and the number of keys [K], of the request of every key."""
    lengths = torch.tensor(case.kv_lens)
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths), lengths.repeat_interleave(lengths)


def equal_keys(case: OpCase, given: Tensors) -> None:
    keys(given)[:] = keys(given)[_requests(case)[0]]


def _slope(case: OpCase, given: Tensors, rise: float) -> None:
    """Let logits rise along the last channel of keys, which all queries weigh alike."""
    first, lengths = _requests(case)
    keys(given)[..., -1] = ((torch.arange(len(first)) - first) / lengths)[:, None].to(given["q"].dtype)
    limit = largest(given["q"])  # what a small scale asks for may be beyond the dtype
    given["q"][..., -1] = max(-limit, min(limit, rise / case.spec.softmax_scale))


def rising(case: OpCase, given: Tensors) -> None:
    _slope(case, given, RISE)


def falling(case: OpCase, given: Tensors) -> None:
    _slope(case, given, -RISE)


def steep(case: OpCase, given: Tensors) -> None:
    """What a query may not see is far above what it sees."""
    _slope(case, given, STEEP)


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


_OF_ROWS = {
    "rows of zeros": zero_rows,
    "all zero": all_zero,
    "one large row": large_row,
    "one large channel": large_channel,
    "denormals": denormals,
}
_OF_WEIGHTS = {"weights of zero": zero_weights}
_OF_ANGLES = {"angle 0": no_turn}
_OF_ATTENTION = {
    "all logits low": low,
    "equal keys": equal_keys,
    "rising logits": rising,
    "falling logits": falling,
    "steep logits": steep,
}
_OF_SCORES = {"negative weights": negative, "crowded scores": crowded}
_OF_SELECTIONS = {"fewer selected": fewer}
PATTERNS: Mapping[str, Pattern] = {
    **_OF_ROWS, **_OF_WEIGHTS, **_OF_ANGLES, **_OF_ATTENTION, **_OF_SCORES, **_OF_SELECTIONS
}  # fmt: skip

# Of these a case has one at most: the product of two is beyond fp16.
LARGE_ONES = frozenset(
    ("one large row", "one large channel", "three sizes", "large", "outlier", "large rows")
) | frozenset(
    ("large logits", "huge logits", "all logits low", "rising logits", "falling logits", "steep logits")
)


def patterns_of(kind: str) -> list[str]:
    """Return the names of the patterns that operands of a kind can have."""
    names = [*_OF_ROWS]
    if kind in ("rms_norm", "write_latent", "write_index_key"):
        names += _OF_WEIGHTS
    if kind in ("rotate_query", "write_latent", "write_index_key"):
        names += _OF_ANGLES
    if kind.endswith("attention"):
        names = [*_OF_ATTENTION, *(name for name in names if name != "one large row")]
    if kind == "sparse_latent_attention":
        names += _OF_SELECTIONS
    if kind == "select_latents":
        names += ["equal keys", *_OF_SCORES]
    return names
