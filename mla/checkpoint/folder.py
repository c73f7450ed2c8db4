"""A folder of safetensors: its index and files, headers, rows of a tensor, and what config.json says of them.

Weights stay on disk until they are asked for; FP8 blocks become numbers then. No file stays open or mapped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from mla.config import MLAConfig
from mla.config.families import language_model, mla_layers
from mla.errors import MLAError
from mla_backends import outside
from mla_backends.outside import escaped, quoted, shortened


class CheckpointError(MLAError):
    """A checkpoint that cannot serve a layer; names file, tensor and cause."""


# -------------------------------------------------------------------------------------------- files
# Safetensors files: headers, and rows of a tensor. No file stays open or mapped.

_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what the header says. `dtype` is spelled as in the header, such as "BF16"."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"tensor {quoted(self.key)} in '{self.file}'"

    def rows(self, start: int, stop: int, columns: slice = slice(None)) -> torch.Tensor:
        """Return rows [start, stop) of dimension 0, or some columns of them, as a view of the file.

        The file is mapped while the view lives, and again for every block: the pages read through a mapping
        count as this process's memory until it ends, so one mapping of a whole tensor would double what
        loading needs.
        """
        with opened(self.file) as tensors:
            stored = tensors.get_slice(self.key)
            part: torch.Tensor = stored[start:stop] if columns == slice(None) else stored[start:stop, columns]
        return part


def headers(file: Path) -> dict[str, StoredTensor]:
    """Return what the header says of each tensor. Raises `CheckpointError`."""
    _sniff(file)
    with opened(file) as tensors:
        parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  # it is no mapping
        return {
            key: StoredTensor(file, key, tuple(part.get_shape()), part.get_dtype())
            for key, part in parts.items()
        }


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a file, and turn any failure into a `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except MemoryError as error:
        raise CheckpointError(f"checkpoint file '{file}' cannot be read: memory is short.") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        text = shortened(escaped(" ".join(str(error).split())))
        raise CheckpointError(
            f"checkpoint file '{file}' cannot be read, it is truncated or damaged: {text}."
        ) from error


def _sniff(file: Path) -> None:
    """Raise `CheckpointError` for a pointer in the place of a file, which the library would call damaged."""
    try:
        start, _ = outside.start(file, len(_LFS))
    except OSError as error:
        raise CheckpointError(f"checkpoint file '{file}' cannot be read: {error.strerror}.") from error
    if start == _LFS:
        raise CheckpointError(
            f"checkpoint file '{file}' is only a Git LFS pointer: fetch its content with `git lfs pull`."
        )


# ------------------------------------------------------------------------------------------- folder

_INDEX = ".safetensors.index.json"
_REFUSED = {
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".pkl", ".ckpt"),
        "is a pickle, and opening a pickle can run any code: convert it to safetensors",
    ),
    ".gguf": "is GGUF, whose quantized weights are not read: use the safetensors it was made from",
}


class Folder:
    """A checkpoint folder. Its files may be links, but only within the folder or its hub cache."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"checkpoint '{path}' is not a directory.")
        self.index = self._index()

    def tensors(self) -> Iterator[tuple[str, str]]:
        """Yield (file name, tensor name). With an index opens no file; otherwise reads only headers."""
        if self.index is not None:
            yield from self._indexed(self.index)
            return
        names = self._names(".safetensors")
        if not names:
            refuse_other_formats(self.path)
            raise CheckpointError(f"checkpoint '{self.path}' holds no *.safetensors files.")
        for name in names:
            yield from ((name, key) for key in headers(self.file(name)))

    def file(self, name: str) -> Path:
        """Return the path of a regular file. Raises `CheckpointError` for one that lies elsewhere."""
        with self._refusals(name):
            path = outside.inside(self.path, name)
            outside.start(path, 0)
            return path

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the object a JSON file holds, or None if there is no such file."""
        if not os.path.lexists(self.path / name):
            return None
        path = self.path / name
        with self._refusals(name):
            data = outside.read(name, self.path)
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"'{path}' is not valid JSON: {shortened(str(error))}.") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"'{path}' must hold a JSON object, got {type(values).__name__}.")
        return values

    @contextmanager
    def _refusals(self, name: str) -> Iterator[None]:
        """Say in one sentence why a file cannot be opened."""
        where = f"file {quoted(name)} of checkpoint '{self.path}'"
        try:
            yield
        except FileNotFoundError as error:
            raise CheckpointError(f"{where} is missing.") from error
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            why = getattr(error, "strerror", None) or shortened(str(error))
            raise CheckpointError(f"{where} cannot be opened: {why}.") from error

    def _index(self) -> str | None:
        names = self._names(_INDEX)
        if len(names) > 1 and f"model{_INDEX}" not in names:
            raise CheckpointError(f"checkpoint '{self.path}' has several indexes: {', '.join(names)}.")
        return f"model{_INDEX}" if f"model{_INDEX}" in names else next(iter(names), None)

    def _indexed(self, index: str) -> Iterator[tuple[str, str]]:
        weight_map = (self.json(index) or {}).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(
                f"'{self.path / index}' has no weight_map from tensor names to file names, so it is not an "
                "index."
            )
        for name in sorted(set(weight_map.values())):
            _check_indexed(self.path / index, name)
        for key, name in weight_map.items():
            yield name, key

    def _names(self, ending: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.path) if name.endswith(ending))
        except OSError as error:
            raise CheckpointError(f"checkpoint '{self.path}' cannot be listed: {error.strerror}.") from error


def _check_indexed(index: Path, name: str) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise CheckpointError(f"'{index}' names the file {quoted(name)}, which lies outside the directory.")
    if parts.suffix != ".safetensors":
        reason = _REFUSED.get(parts.suffix, "is not a *.safetensors file")
        raise CheckpointError(f"'{index}' names the file {quoted(name)}, which {reason}.")


def refuse_other_formats(folder: str | Path) -> None:
    """Raise `CheckpointError` for a folder that holds weights in unsupported formats only."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    if any(name.endswith((".safetensors", _INDEX)) for name in names):
        return
    for name in names:
        reason = _REFUSED.get(PurePosixPath(name).suffix)
        if reason:
            raise CheckpointError(f"file {quoted(name)} of checkpoint '{folder}' {reason}.")


# -------------------------------------------------------------------------------------------- facts
# What config.json says about the files, besides the layer's dimensions: layer counts and quantization.
@dataclass(frozen=True)
class Facts:
    """Layer counts and quantization; `layers` is None where the config does not give it."""

    source: str
    layers: int | None = None
    mla_layers: tuple[int, ...] | None = None  # of a model whose other layers attend in another way
    draft_layers: int = 0  # for multi-token prediction; numbered after the main ones
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def is_draft(self, layer: int | None) -> bool:
        """Return whether a layer predicts further tokens, and so is not a main layer."""
        if self.layers is None or layer is None:
            return False
        return self.layers <= layer < self.layers + self.draft_layers

    def attends_otherwise(self, layer: int | None) -> bool:
        """Return whether a layer is one of the main ones that are not MLA."""
        if self.mla_layers is None or layer is None or layer in self.mla_layers:
            return False
        return self.layers is None or layer < self.layers

    def block_size(self, tensor: str) -> tuple[int, int]:
        """Return how many rows and columns share one FP8 scale, as declared: shapes do not determine it."""
        for key, known in (("quant_method", ("fp8",)), ("fmt", ("e4m3", None))):
            if self.quantization.get(key) not in known:
                raise CheckpointError(
                    f"{tensor} is FP8, but '{self.source}' declares quantization_config.{key} "
                    f"{quoted(self.quantization.get(key))}: only {known[0]!r} is read."
                )
        block = self.quantization.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(map(_is_count, block)) or 0 in block:
            raise CheckpointError(
                f"{tensor} is FP8, but quantization_config.weight_block_size in '{self.source}' is "
                f"{quoted(block)}: two positive integers are needed, such as [128, 128]."
            )
        return block[0], block[1]


def read_facts(folder: Folder) -> Facts:
    """Read the facts from the folder's config.json, if it has one. Raises `CheckpointError`."""
    name = "config.json"
    source = str(folder.path / name)
    values = folder.json(name)
    if values is None:
        return Facts(source)
    inner = language_model(values)
    quantization = inner.get("quantization_config") or values.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"quantization_config in '{source}' must be a JSON object.")
    layers = _count(inner, "num_hidden_layers", source)
    drafts = _count(inner, "num_nextn_predict_layers", source) or 0
    return Facts(source, layers, mla_layers(inner), drafts, quantization)


def _count(values: Mapping[str, Any], key: str, source: str) -> int | None:
    count = values.get(key)
    if count is not None and not _is_count(count):
        raise CheckpointError(f"{key} in '{source}' must be a whole number, got {quoted(count)}.")
    return count


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# --------------------------------------------------------------------------------------------- stored weights


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
    """A state dict whose weights, named by the keys of `names`, are made when they are asked for."""

    def __init__(self, names: Mapping[str, object]) -> None:
        self._names = names

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

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
        super().__init__(weights)
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
