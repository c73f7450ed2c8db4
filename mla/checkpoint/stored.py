"""Weights that stay on disk until they are asked for, and how FP8 blocks become numbers."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla.checkpoint.folder import CheckpointError, StoredTensor
from mla.config import MLAConfig

ReadProgress = Callable[[int, int], object]  # bytes read, bytes of all

# Elements read at a time: with fp32 copies, about 10 MiB of scratch memory.
BLOCK = 1 << 20
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FP8 = "F8_E4M3"
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, FP8: 1}


class Part(NamedTuple):
    """Some rows and columns of a weight; of a vector, rows."""

    rows: slice = slice(None)
    columns: slice = slice(None)


WHOLE = Part()


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a file. FP8 has a `scale` [ceil(o / block[0]), ceil(i / block[1])], one per block."""

    tensor: StoredTensor
    scale: StoredTensor | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers: as stored, or BF16 for FP8."""
        return torch.bfloat16 if self.scale else DTYPES[self.tensor.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        stored = (self.tensor, self.scale) if self.scale else (self.tensor,)
        return sum(math.prod(tensor.shape) * _BYTES[tensor.dtype] for tensor in stored)

    def read_into(self, out: torch.Tensor, advance: Callable[[int], None], part: Part = WHOLE) -> None:
        """Write the numbers, rounded once to `out`'s dtype; `advance` gets the bytes of every block.

        Of a `part`, nothing else is read from the file, and `out` has its shape.
        """
        scale = self._read_scale()
        advance(0 if self.scale is None else math.prod(self.scale.shape) * _BYTES[self.scale.dtype])
        first, end, _ = part.rows.indices(self.tensor.shape[0])
        step = max(1, BLOCK // max(1, math.prod(out.shape[1:])))
        for start in range(first, end, step):
            stop = min(end, start + step)
            numbers = self._numbers(start, stop, part.columns, scale)
            rounded = numbers.to(out.dtype)
            if not finite(rounded):
                raise CheckpointError(self._not_finite(numbers, start, stop, out.dtype))
            out[start - first : stop - first].copy_(rounded)
            advance(numbers.numel() * _BYTES[self.tensor.dtype])

    def _read_scale(self) -> torch.Tensor | None:
        if self.scale is None:
            return None
        scale = self.scale.rows(0, self.scale.shape[0]).float()
        if not finite(scale) or scale.min() < 0:
            raise CheckpointError(f"{self.scale} holds NaN, infinity or a negative scale.")
        return scale

    def _numbers(self, start: int, stop: int, columns: slice, scale: torch.Tensor | None) -> torch.Tensor:
        """Return rows as stored, or FP8 times its scale in fp32."""
        rows = self.tensor.rows(start, stop, columns)
        if scale is None:
            return rows
        wide = rows.half().float()  # exact, and several times faster than .float() alone
        height, width = self.block
        by_row = scale[torch.arange(start, stop, device="cpu") // height]  # [rows, blocks in a row]
        if columns != slice(None):
            return wide.mul_(by_row[:, torch.arange(self.tensor.shape[1], device="cpu")[columns] // width])
        whole = wide.shape[1] // width
        wide[:, : whole * width].unflatten(1, (whole, width)).mul_(by_row[:, :whole, None])
        wide[:, whole * width :].mul_(by_row[:, whole:])  # the last block is cut off by the edge
        return wide

    def _not_finite(self, numbers: torch.Tensor, start: int, stop: int, dtype: torch.dtype) -> str:
        where = f"{self.tensor} holds"
        if finite(numbers):
            return f"{where} numbers beyond the range of {dtype} in rows {start} to {stop - 1}."
        return f"{where} NaN or infinity in rows {start} to {stop - 1}."


def finite(tensor: torch.Tensor) -> bool:
    """Return whether all elements are finite: NaN and infinity survive in the minimum or the maximum."""
    least, greatest = tensor.aminmax()
    return math.isfinite(least) and math.isfinite(greatest)


class LazyState(Mapping[str, torch.Tensor]):
    """A state dict whose weights are made when they are asked for."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `state[name]` has."""

    @abstractmethod
    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Write a weight into `out`, of its shape, on any device and in any dtype, rounded once."""

    def __getitem__(self, name: str) -> torch.Tensor:
        out = torch.empty(self.shape(name), dtype=self.dtype(name), device="cpu")
        self.read_into(name, out)
        return out


class StoredLayer(LazyState):
    """One layer's weights by Hugging Face name, on disk: shapes and dtypes are checked, values unread.

    `layer[name]` reads one weight to the host, in `dtype` if given, else as stored (FP8 as BF16);
    `read_into` writes it to existing memory, on any device and in any dtype, rounded once. Both
    raise `CheckpointError`. `progress(done_bytes, total_bytes)` is called after each block of a first read.
    """

    def __init__(
        self,
        weights: Mapping[str, StoredWeight],
        config: MLAConfig,
        dtype: torch.dtype | None = None,
        progress: ReadProgress | None = None,
    ) -> None:
        self._weights, self._dtype, self._progress = weights, dtype, progress
        self.config = config  # of this layer among those of its model
        self._unread = set(weights)
        self._done = 0
        self.nbytes = sum(weight.nbytes for weight in weights.values())  # in the files

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape without reading it."""
        return self._weights[name].tensor.shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of `layer[name]`."""
        return self._dtype or self._weights[name].dtype

    def read_into(self, name: str, out: torch.Tensor, part: Part = WHOLE) -> None:
        """Write a weight, or a part of it, into `out`, block by block."""
        counted = name in self._unread
        self._weights[name].read_into(out, self._advance if counted else lambda done: None, part)
        self._unread.discard(name)

    def _advance(self, done: int) -> None:
        self._done += done
        if self._progress is not None:
            self._progress(self._done, self.nbytes)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


# -------------------------------------------------------------------------------------- fingerprint
# `fingerprint`: whether two folders hold the same weights, without reading them whole.

SAMPLED_ROWS = 8  # of each weight, evenly spread: any training has changed some of them


def fingerprint(layer: StoredLayer) -> dict[str, str]:
    """Return name -> digest of a weight's shape, of its dtype and of some of its rows.

    Raises `CheckpointError` as reading does.
    """
    return {name: _digest(layer, name) for name in layer}


def _digest(layer: StoredLayer, name: str) -> str:
    shape, dtype = layer.shape(name), layer.dtype(name)
    digest = hashlib.sha256(f"{shape} {dtype}".encode())
    rows = shape[0] if len(shape) == 1 else 1  # a vector is read whole
    for start in sorted({place * (shape[0] - rows) // (SAMPLED_ROWS - 1) for place in range(SAMPLED_ROWS)}):
        read = torch.empty((rows, *shape[1:]), dtype=dtype, device="cpu")
        layer.read_into(name, read, Part(slice(start, start + rows)))
        digest.update(bytes(read.view(torch.uint8).flatten().tolist()))  # torch may be without numpy
    return digest.hexdigest()[:16]
