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
    parts, info = (latent, key), torch.finfo(dtype)
    centre, steps = torch.cat(codec.decode(codec.encode(latent.float(), key.float())), dim=1).double(), []
    largest_of = [x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1) for x in parts]
    if codec.joined:
        largest_of = [torch.maximum(*largest_of)] * 2
    noise = [NOISE * x.abs() + ROW_NOISE * most for x, most in zip(parts, largest_of, strict=True)]
    for x, by, largest in zip(parts, noise, largest_of, strict=True):
        rounding = (
            info.eps * x.abs() + info.tiny * info.eps
        )  # of ops that round to `dtype` before they encode
        steps.append(codec.of_largest * largest + codec.relative * x.abs() + rounding + by)
    step = torch.cat(steps, dim=1) + codec.least
    near = [[x + sign * by for x, by in zip(parts, noise, strict=True)] for sign in (-1, 0, 1)]
    unknown = torch.full((len(latent), codec.token_bytes), UNKNOWN, dtype=torch.float64)
    return {
        "low": centre - step,
        "high": centre + step,
        "bytes": _agreed(codec, near, dtype) if codec.steady or dtype != torch.float32 else unknown,
        "codes": _agreed(codec, near, torch.float32) if codec.steady else unknown,
    }


def _agreed(codec: Codec, near: list[list[torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    """Return the bytes [T, token_bytes] that latents and keys near the true ones share in `dtype`.

    No byte is certain of a row whose scales differ: numbers that are the same are then decoded to others.
    """
    numbers = [[part.to(dtype).float() for part in parts] for parts in near]
    rows = [codec.encode(*parts) for parts in numbers]
    decoded = [torch.cat(codec.decode(stored), dim=1) for stored in rows]
    low, high = (torch.cat(numbers[end], dim=1) for end in (0, 2))
    rescaled = ((decoded[0] != decoded[2]) & (low == high)).any(1, keepdim=True)
    same = (rows[0] == rows[1]) & (rows[1] == rows[2]) & ~rescaled
    return torch.where(same, rows[1].double(), UNKNOWN)


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
