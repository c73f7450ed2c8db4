"""What a quantised cache may hold after a write: the codec's bytes of numbers next to the true ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from mla.cache.formats import Codec
from mla.verify.places import Places, describe

# How far a right op may be from the truth before it encodes: of a number, and of the largest of its row.
NOISE, ROW_NOISE = 2.0**-16, 2.0**-21
PART = 1 << 15  # numbers that are converted at once: these stay in a processor's cache
UNKNOWN = -1.0  # stands for a byte that may be one of several
MOST_BYTES = 4  # of a number, or a scale

Tensors = dict[str, torch.Tensor]


def stored_truth(latent: torch.Tensor, key: torch.Tensor, codec: Codec, dtype: torch.dtype) -> Tensors:
    """Return what may be stored of a true latent [T, c] and key [T, r] in a layer of `dtype`, in float64.

    `low` and `high` [T, c + r]: of decoded numbers, one code around the codec's. `bytes` and `codes`
    [T, token_bytes]: of an op that encodes what it has rounded to `dtype`, and of any other; `UNKNOWN` where
    bytes of the latents next to the true ones differ.
    """
    count = max(1, PART // (codec.c + codec.r))
    parts = [_stored(pair, codec, dtype) for pair in zip(latent.split(count), key.split(count), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def in_parts(convert: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Return what `convert` makes of rows [s, w], a few at a time: of each row alone."""
    return torch.cat([convert(some) for some in rows.split(max(1, PART // max(1, rows[:1].numel())))])


def _stored(parts: tuple[torch.Tensor, ...], codec: Codec, dtype: torch.dtype) -> Tensors:
    """Return `stored_truth` of a few rows."""
    info = torch.finfo(dtype)
    largest = [x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1) for x in parts]
    if codec.joined:
        largest = [torch.maximum(*largest)] * 2
    most = torch.cat([of.expand_as(x) for of, x in zip(largest, parts, strict=True)], dim=1)
    x = torch.cat(parts, dim=1)
    sizes = x.abs()
    noise = NOISE * sizes + ROW_NOISE * most
    rounding = info.eps * sizes + info.tiny * info.eps  # of ops that round to `dtype` before they encode
    step = codec.of_largest * most + codec.relative * sizes + rounding + noise + codec.least
    near = torch.stack((x, x - noise, x + noise))
    known, centre = _agreed(codec, near if codec.steady else near[:1])
    codes = known if codec.steady else torch.full_like(known, UNKNOWN)
    stored = codes if dtype == torch.float32 else _agreed(codec, near.to(dtype))[0]
    return {"low": centre - step, "high": centre + step, "bytes": stored, "codes": codes}


def _agreed(codec: Codec, near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes [T, token_bytes] that numbers [n, T, c + r] near the true ones share, in float64.

    The true ones come first, and then the least and the largest; with them, what their bytes are decoded to.
    No byte is certain of a row whose scales differ: numbers that are the same are then decoded to others.
    """
    numbers = near.float()
    rows = codec.encode(*numbers.flatten(0, 1).split((codec.c, codec.r), dim=1)).unflatten(0, near.shape[:2])
    decoded = torch.cat(codec.decode(rows.flatten(0, 1)), dim=1).view_as(numbers)
    same = (rows == rows[0]).all(0)
    for _ in range(MOST_BYTES - 1):  # the lowest comes first: below one that differs, any may lie between
        same = same & pad(same[:, 1:], (0, 1), value=True)
    same &= ~((decoded[1:] != decoded[-1]) & (numbers[1:] == numbers[-1])).any(0).any(1, keepdim=True)
    return torch.where(same, rows[0].double(), UNKNOWN), decoded[0].double()


def judge_decoded(
    result: torch.Tensor, low: torch.Tensor, high: torch.Tensor, places: Places | None
) -> tuple[float, str]:
    """Return how many codes decoded numbers [T, w] are from the codec's at most, and the fault."""
    centre, step = (low + high) / 2, (high - low) / 2
    far = ((result.double() - centre).abs() / step).nan_to_num(nan=math.inf)
    worst = far.max().item() if far.numel() else 0.0
    if worst <= 1:
        return worst, ""
    return worst, _rows((far > 1).any(1), "are more than one code from the codec's", places)


def _rows(bad: torch.Tensor, what: str, places: Places | None) -> str:
    where = f": {describe(bad, places)}" if places is not None else ""
    return f"{int(bad.sum())} of {len(bad)} rows {what}{where}"


def judge_bytes(result: torch.Tensor, right: torch.Tensor, places: Places | None) -> tuple[float, str]:
    """Return infinity for bytes [T, w] other than the codec's, and where they are; else 0."""
    wrong = (right >= 0) & (result.double() != right)
    if not bool(wrong.any()):
        return 0.0, ""
    first = int(wrong.any(0).nonzero()[0])
    return math.inf, _rows(
        wrong.any(1), f"hold other bytes than the codec makes, byte {first} the first", places
    )
