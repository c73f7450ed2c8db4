"""`fingerprint`: whether two folders hold the same weights, without reading them whole."""

from __future__ import annotations

import hashlib

import torch

from mla.checkpoint.stored import Part, StoredLayer

ROWS = 8  # of each weight, evenly spread: any training has changed some of them


def fingerprint(layer: StoredLayer) -> dict[str, str]:
    """Return name -> digest of a weight's shape, of its dtype and of some of its rows.

    Raises `CheckpointError` as reading does.
    """
    return {name: _digest(layer, name) for name in layer}


def _digest(layer: StoredLayer, name: str) -> str:
    shape, dtype = layer.shape(name), layer.dtype(name)
    digest = hashlib.sha256(f"{shape} {dtype}".encode())
    rows = shape[0] if len(shape) == 1 else 1  # a vector is read whole
    for start in sorted({place * (shape[0] - rows) // (ROWS - 1) for place in range(ROWS)}):
        read = torch.empty((rows, *shape[1:]), dtype=dtype, device="cpu")
        layer.read_into(name, read, Part(slice(start, start + rows)))
        digest.update(bytes(read.view(torch.uint8).flatten().tolist()))  # torch may be without numpy
    return digest.hexdigest()[:16]
