"""What a quantised cache may hold after a write: the codec's bytes of numbers next to the true ones."""

from __future__ import annotations

import math

import torch

from mla.cache.formats import Codec
from mla.verify.places import Places, describe

# How far a right op may be from the truth before it encodes: of a number, and of the largest of its row.
NOISE, ROW_NOISE = 2.0**-16, 2.0**-21
UNKNOWN = -1.0  # stands for a byte that may be one of several

Tensors = dict[str, torch.Tensor]


def stored_truth(latent: torch.Tensor, key: torch.Tensor, codec: Codec, dtype: torch.dtype) -> Tensors:
    """Return what may be stored of a true latent [T, c] and key [T, r] in a layer of `dtype`, in float64.

    `low` and `high` [T, c + r]: of decoded numbers, one code around the codec's. `bytes` and `codes`
    [T, token_bytes]: of an op that encodes what it has rounded to `dtype`, and of any other; `UNKNOWN` where
    bytes of the latents next to the true ones differ.
    """
    info, parts = torch.finfo(dtype), (latent, key)
    largest = [x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1) for x in parts]
    if codec.joined:
        largest = [torch.maximum(*largest)] * 2
    x, most = (
        torch.cat(parts, dim=1),
        torch.cat([m.expand_as(x) for m, x in zip(largest, parts, strict=True)], 1),
    )
    sizes = x.abs()
    noise = NOISE * sizes + ROW_NOISE * most
    rounding = info.eps * sizes + info.tiny * info.eps  # of ops that round to `dtype` before they encode
    step = codec.of_largest * most + codec.relative * sizes + rounding + noise + codec.least
    near, kinds = torch.stack((x, x - noise, x + noise)), (torch.float32, dtype)
    numbers = torch.stack([near.to(kind).float() for kind in kinds])  # [2, 3, T, w]
    rows = codec.encode(*numbers.flatten(0, 2).split([part.shape[1] for part in parts], dim=1))
    decoded = torch.cat(codec.decode(rows), dim=1).view_as(numbers)
    codes, stored = map(_agreed, rows.unflatten(0, numbers.shape[:3]), decoded, numbers)
    unknown = torch.full_like(codes, UNKNOWN)
    centre = decoded[0, 0].double()
    return {
        "low": centre - step,
        "high": centre + step,
        "bytes": stored if codec.steady or dtype != torch.float32 else unknown,
        "codes": codes if codec.steady else unknown,
    }


def _agreed(rows: torch.Tensor, decoded: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the bytes [T, token_bytes] that the true, the least and the largest numbers share.

    These have `rows` [3, T, token_bytes]: of `numbers` [3, T, w], given back as `decoded`. No byte is certain
    of a row whose scales differ: numbers that are the same are then decoded to others.
    """
    rescaled = ((decoded[1] != decoded[2]) & (numbers[1] == numbers[2])).any(1, keepdim=True)
    same = (rows[0] == rows[1]) & (rows[0] == rows[2]) & ~rescaled
    return torch.where(same, rows[0].double(), UNKNOWN)


def judge_decoded(
    result: torch.Tensor, low: torch.Tensor, high: torch.Tensor, places: Places | None
) -> tuple[float, str]:
    """Return how many codes decoded numbers [T, w] are from the codec's at most, and the fault."""
    if result.shape != low.shape:
        return math.inf, f"shape {list(result.shape)} instead of {list(low.shape)}"
    centre, step = (low + high) / 2, (high - low) / 2
    far = ((result.double() - centre).abs() / step).nan_to_num(nan=math.inf)
    worst = far.max().item() if far.numel() else 0.0
    if worst <= 1:
        return worst, ""
    bad = (far > 1).any(1)
    where = f": {describe(bad, places)}" if places is not None else ""
    return worst, f"{int(bad.sum())} of {len(bad)} rows are more than one code from the codec's{where}"


def judge_bytes(result: torch.Tensor, right: torch.Tensor, places: Places | None) -> tuple[float, str]:
    """Return infinity for bytes [T, w] other than the codec's, and where they are; else 0."""
    if result.shape != right.shape:
        return math.inf, f"shape {list(result.shape)} instead of {list(right.shape)}"
    wrong = (right >= 0) & (result.double() != right)
    if not bool(wrong.any()):
        return 0.0, ""
    bad = wrong.any(1)
    where = f": {describe(bad, places)}" if places is not None else ""
    first = int(wrong.any(0).nonzero()[0])
    counted = f"{int(bad.sum())} of {len(bad)} rows"
    return math.inf, f"{counted} hold other bytes than the codec makes, byte {first} the first{where}"
