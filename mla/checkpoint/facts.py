"""What config.json says about the files, besides the layer's dimensions: layer counts and quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mla.checkpoint.errors import CheckpointError
from mla.checkpoint.folder import Folder
from mla.config.families import language_model
from mla_backends.outside import quoted


@dataclass(frozen=True)
class Facts:
    """Layer counts and quantization; `layers` is None where the config does not give it."""

    source: str
    layers: int | None = None
    draft_layers: int = 0  # for multi-token prediction; numbered after the main ones
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def is_draft(self, layer: int | None) -> bool:
        """Return whether a layer predicts further tokens, and so is not a main layer."""
        if self.layers is None or layer is None:
            return False
        return self.layers <= layer < self.layers + self.draft_layers

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
    return Facts(source, layers, drafts, quantization)


def _count(values: Mapping[str, Any], key: str, source: str) -> int | None:
    count = values.get(key)
    if count is not None and not _is_count(count):
        raise CheckpointError(f"{key} in '{source}' must be a whole number, got {quoted(count)}.")
    return count


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
