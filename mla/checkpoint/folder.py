"""The files of a checkpoint folder, and which of them may be opened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from mla.checkpoint import files
from mla.checkpoint.errors import CheckpointError
from mla_backends import outside
from mla_backends.outside import quoted, shortened

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
            yield from ((name, key) for key in files.keys(self.file(name)))

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
            hint = self._stale_index() if name.endswith(".safetensors") else ""
            raise CheckpointError(f"{where} is missing{hint}.") from error
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
