"""A folder of safetensors: its index and files, headers, rows of a tensor, and what config.json says of them.

Weights stay on disk until they are asked for; FP8 blocks become numbers then. No file stays open or mapped.
"""

from __future__ import annotations

import hashlib
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
from mla.config.layer_config import json_object
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


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a file, and turn any failure into a `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        text = shortened(escaped(" ".join(str(error).split())))
        raise CheckpointError(
            f"checkpoint file '{file}' cannot be read, it is truncated or damaged: {text}."
        ) from error


# ------------------------------------------------------------------------------------------- folder

_INDEX = ".safetensors.index.json"
_PICKLE = "is a pickle, and opening a pickle can run any code: convert it to safetensors"
_REFUSED = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".pkl", ".ckpt"), _PICKLE),
    ".gguf": "is GGUF, whose quantized weights are not read: use the safetensors it was made from",
}


class Folder:
    """A checkpoint folder. Its files may be links, but only within the folder or its hub cache."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"checkpoint '{path}' is not a directory.")
        names = _names(path)
        self._files = [name for name in names if name.endswith(".safetensors")]
        indexes = [name for name in names if name.endswith(_INDEX)]
        if len(indexes) > 1 and f"model{_INDEX}" not in indexes:
            raise CheckpointError(f"checkpoint '{path}' has several indexes: {', '.join(indexes)}.")
        self.index = f"model{_INDEX}" if f"model{_INDEX}" in indexes else next(iter(indexes), None)

    def tensors(self) -> Iterator[tuple[str, str]]:
        """Yield (file name, tensor name). With an index opens no file; otherwise reads only headers."""
        if self.index is not None:
            weight_map = (self.json(self.index) or {}).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
                raise CheckpointError(
                    f"'{self.path / self.index}' has no weight_map from tensor names to file names, so it is "
                    "not an index."
                )
            yield from ((name, key) for key, name in weight_map.items())
            return
        if not self._files:
            refuse_other_formats(self.path)
            raise CheckpointError(f"checkpoint '{self.path}' holds no *.safetensors files.")
        for name in self._files:
            yield from ((name, key) for key in self.headers(name))

    def headers(self, name: str) -> dict[str, StoredTensor]:
        """Return what the header of a file says of each tensor. Raises `CheckpointError`.

        That is also for a file that lies elsewhere, and for what is no safetensors file.
        """
        if (suffix := PurePosixPath(name).suffix) != ".safetensors":
            raise self._refusal(name, _REFUSED.get(suffix, "is not a *.safetensors file"))
        try:
            file = outside.inside(self.path, name)
            start, _ = outside.start(file, len(_LFS))
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error
        if start == _LFS:  # which the library would call damaged
            raise self._refusal(name, "is only a Git LFS pointer: fetch its content with `git lfs pull`")
        with opened(file) as tensors:
            parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  # it is no mapping
            return {
                key: StoredTensor(file, key, tuple(part.get_shape()), part.get_dtype())
                for key, part in parts.items()
            }

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the object a JSON file holds, or None if there is no such file. Raises `CheckpointError`."""
        if not os.path.lexists(self.path / name):
            return None
        try:
            data = outside.read(name, self.path)
        except OSError as error:
            raise self._unreadable(name, error) from error
        return json_object(data, f"'{self.path / name}'", CheckpointError)

    def _unreadable(self, name: str, error: OSError | ValueError) -> CheckpointError:
        if isinstance(error, FileNotFoundError):
            return self._refusal(name, "is missing")
        why = getattr(error, "strerror", None) or shortened(str(error))  # a name that no file can have
        return self._refusal(name, f"cannot be opened: {why}")

    def _refusal(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"file {quoted(name)} of checkpoint '{self.path}' {why}.")


def _names(folder: str | Path) -> list[str]:
    """Return the names in a folder; none where it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def refuse_other_formats(folder: str | Path) -> None:
    """Raise `CheckpointError` for a folder that holds weights in unsupported formats only."""
    names = _names(folder)
    if any(name.endswith((".safetensors", _INDEX)) for name in names):
        return
    for name in names:
        if reason := _REFUSED.get(PurePosixPath(name).suffix):
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
        main = layer is not None and (self.layers is None or layer < self.layers)
        return main and self.mla_layers is not None and layer not in self.mla_layers

    def block_size(self, tensor: str) -> tuple[int, int]:
        """Return how many rows and columns share one FP8 scale, as declared: shapes do not determine it."""
        declared = self.quantization
        for key, known in (("quant_method", ("fp8",)), ("fmt", ("e4m3", None))):
            if declared.get(key) not in known:
                raise CheckpointError(
                    f"{tensor} is FP8, but '{self.source}' declares quantization_config.{key} "
                    f"{quoted(declared.get(key))}: only {known[0]!r} is read."
                )
        match declared.get("weight_block_size"):
            case [int(rows), int(columns)] if min(rows, columns) > 0:
                return rows, columns
        raise CheckpointError(
            f"{tensor} is FP8, but quantization_config.weight_block_size in '{self.source}' is "
            f"{quoted(declared.get('weight_block_size'))}: [128, 128] or other positive integers are needed."
        )


def read_facts(folder: Folder) -> Facts:
    """Read the facts from the folder's config.json, if it has one. Raises `CheckpointError`."""
    values = folder.json("config.json") or {}
    inner = language_model(values)
    layers, drafts = (inner.get(key) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    quantization = inner.get("quantization_config") or values.get("quantization_config")
    return Facts(
        str(folder.path / "config.json"),
        layers if isinstance(layers, int) else None,
        mla_layers(inner),
        drafts if isinstance(drafts, int) else 0,
        quantization if isinstance(quantization, dict) else {},
    )


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
            rounded = self._numbers(start, stop, part.columns, scale).to(out.dtype)
            if not finite(rounded):
                what = f"NaN or infinity, or numbers beyond the range of {out.dtype},"
                raise CheckpointError(f"{self.tensor} holds {what} in rows {start} to {stop - 1}.")
            out[start - first : stop - first].copy_(rounded)
            advance(rounded.numel() * _BYTES[self.tensor.dtype])

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
    raise `CheckpointError`. `progress(done_bytes, total_bytes)` is called after each block.
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
        self._weights[name].read_into(out, self._advance, part)

    def _advance(self, done: int) -> None:
        self._done = min(self._done + done, self.nbytes)  # a weight may be read again
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
    read = torch.empty((rows, *shape[1:]), dtype=dtype, device="cpu")
    for start in sorted({place * (shape[0] - rows) // (SAMPLED_ROWS - 1) for place in range(SAMPLED_ROWS)}):
        layer.read_into(name, read, Part(slice(start, start + rows)))
        digest.update(bytes(read.view(torch.uint8).flatten().tolist()))  # torch may be without numpy
    return digest.hexdigest()[:16]
