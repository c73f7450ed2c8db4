"""Read one attention layer's weights from a folder of safetensors, under Hugging Face names.

Serves BF16, FP16 and FP32 tensors named `model.layers.N.self_attn.*`, `self_attn.*` or bare. Tensors of other
layers are never read. Everything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from mla.config import MLAConfig
from mla.errors import MLAError
from mla.weights import weight_shapes

_NAME = re.compile(r"^(?:.*\blayers\.(?P<layer>\d+)\.)?(?:self_attn\.)?(?P<name>[a-z_]+\.(?:weight|bias))$")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CheckpointError(MLAError):
    """A checkpoint that cannot serve a layer; names file, tensor and cause."""


def read_layer(folder: str | Path, config: MLAConfig, layer: int | None = None) -> dict[str, torch.Tensor]:
    """Return name -> host tensor of one layer. `layer` None: the only one there is.

    Raises `CheckpointError`.
    """
    folder = Path(folder)
    found = _locate(folder, set(weight_shapes(config)))
    if layer is None:
        if len(found) > 1:
            listed = ", ".join(str(one) for one in sorted(found, key=str))
            raise CheckpointError(
                f"checkpoint '{folder}' holds layers {listed}: choose one with layer=N (--layer N)."
            )
        layer = next(iter(found))
    if layer not in found:
        raise CheckpointError(f"checkpoint '{folder}' has no attention weights of layer {layer}.")
    weights = {}
    for name in weight_shapes(config):
        if name not in found[layer]:
            raise CheckpointError(f"checkpoint '{folder}' has no tensor '{name}' for layer {layer}.")
        weights[name] = _read(*found[layer][name])
    return weights


def _locate(folder: Path, wanted: set[str]) -> dict[int | None, dict[str, tuple[Path, str]]]:
    """Return layer -> weight name -> (file, tensor name); only headers are read."""
    found: dict[int | None, dict[str, tuple[Path, str]]] = {}
    for file, key in _keys(folder):
        match = _NAME.match(key)
        if match and match["name"] in wanted:
            layer = int(match["layer"]) if match["layer"] else None
            found.setdefault(layer, {})[match["name"]] = (file, key)
    if not found:
        raise CheckpointError(f"checkpoint '{folder}' holds no MLA attention weights in *.safetensors files.")
    return found


def _keys(folder: Path) -> Iterator[tuple[Path, str]]:
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                yield from ((file, key) for key in tensors.keys())  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"checkpoint file '{file}' cannot be read: {error}.") from error


def _read(file: Path, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(key)
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"tensor '{key}' in '{file}' is {tensor.dtype}: only BF16, FP16 and FP32 are read."
        )
    return tensor
