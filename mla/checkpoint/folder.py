"""The files of a checkpoint folder, and which of them may be opened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mla.checkpoint import files
from mla.checkpoint.errors import CheckpointError

_INDEX = ".safetensors.index.json"
# No config or index comes close to this; a larger file is not parsed.
_MAX_JSON = 64 << 20
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
        self.root = _root(Path(os.path.realpath(self.path)))
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
            yield from ((name, key) for key in files.keys(self.file(name)))

    def file(self, name: str) -> Path:
        """Return the path of a regular file. Raises `CheckpointError` for one that lies elsewhere."""
        where = f"file {name!r} of checkpoint '{self.path}'"
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{where} lies outside the directory, so it is not opened.")
        try:
            path = self.path / name
            real = Path(os.path.realpath(path))
            exists, regular = real.exists(), real.is_file()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{where} cannot be opened: {error}.") from error
        if not real.is_relative_to(self.root):
            raise CheckpointError(f"{where} is a link that leaves the directory, so it is not opened.")
        if not exists:
            hint = self._stale_index() if name.endswith(".safetensors") else ""
            raise CheckpointError(f"{where} is missing{hint}.")
        if not regular:
            raise CheckpointError(f"{where} is not a regular file.")
        return path

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the object a JSON file holds, or None if there is no such file."""
        if not os.path.lexists(self.path / name):
            return None
        path = self.file(name)
        try:
            if path.stat().st_size > _MAX_JSON:
                raise CheckpointError(f"'{path}' is larger than {_MAX_JSON >> 20} MiB, so it is not parsed.")
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"'{path}' is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"'{path}' must hold a JSON object, got {type(values).__name__}.")
        return values

    def _index(self) -> str | None:
        names = self._names(_INDEX)
        if len(names) > 1 and f"model{_INDEX}" not in names:
            raise CheckpointError(f"checkpoint '{self.path}' has several indexes: {', '.join(names)}.")
        return f"model{_INDEX}" if f"model{_INDEX}" in names else next(iter(names), None)

    def _indexed(self, index: str) -> Iterator[tuple[str, str]]:
        weight_map = (self.json(index) or {}).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(one, str) for one in weight_map.values()):
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

    def _stale_index(self) -> str:
        """Return a hint where the index seems to be that of another checkpoint."""
        present = self._names(".safetensors")
        if self.index is None or not present or any(name in present for name, _ in self._indexed(self.index)):
            return ""
        return (
            f"; '{self.index}' names none of the files that are here ('{present[0]}', ...): remove the index "
            "if it is another checkpoint's"
        )


def _check_indexed(index: Path, name: str) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise CheckpointError(f"'{index}' names the file {name!r}, which lies outside the directory.")
    if parts.suffix != ".safetensors":
        reason = _REFUSED.get(parts.suffix, "is not a *.safetensors file")
        raise CheckpointError(f"'{index}' names the file {name!r}, which {reason}.")


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
            raise CheckpointError(f"file {name!r} of checkpoint '{folder}' {reason}.")


def _root(folder: Path) -> Path:
    """Return the folder that links may point into: this one, or the hub cache entry it is a snapshot of."""
    for parent in folder.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return folder
