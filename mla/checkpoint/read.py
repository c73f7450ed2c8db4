"""`read_layer`: from a folder and a config to one layer's stored weights, or to the reason for refusing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from mla.checkpoint import files
from mla.checkpoint.choose import Wanted, choose
from mla.checkpoint.errors import CheckpointError
from mla.checkpoint.facts import Facts, read_facts
from mla.checkpoint.files import StoredTensor
from mla.checkpoint.folder import Folder
from mla.checkpoint.names import KNOWN, Location, is_mla, locate
from mla.checkpoint.stored import DTYPES, FP8, ReadProgress, StoredLayer, StoredWeight
from mla.config import MLAConfig
from mla.weights import weight_shapes
from mla_backends.outside import quoted

Keys = dict[str, list[tuple[str, str]]]  # Hugging Face name -> (file name, tensor name)

# Tensors of an attention that are not weights: tables every implementation computes.
_IGNORED = "rotary_emb."
_SCALE = "_scale_inv"
# Why a tensor of the layer may not be ignored, by the start or the end of its name.
_REASONS = (
    (r"indexer\.", "belongs to an indexer that picks the tokens to attend"),
    (r"sinks?\b|.*\.sinks?$", "is an attention sink"),
    (r"(q_)?g(ate)?_proj\b", "gates the attention's output"),
    (r".*(bias)$", "is a bias that the config does not announce (attention_bias)"),
    (
        r".*\.(weight_scale|weight_packed|qweight|qzeros|scales|g_idx|input_scale|SCB|weight_scale_2)$",
        "belongs to a quantization that is not read: only FP8 with a weight_scale_inv per block is",
    ),
    (r"q_proj\.", "does not fit the config, whose q_lora_rank asks for q_a_proj and q_b_proj"),
    (r"q_(a_proj|a_layernorm|b_proj)\.", "does not fit the config, which has no q_lora_rank"),
)


def read_layer(
    folder: str | Path,
    config: MLAConfig,
    layer: Wanted = None,
    *,
    dtype: torch.dtype | None = None,
    progress: ReadProgress | None = None,
) -> StoredLayer:
    """Return the weights of one layer, checked against `config` and still on disk.

    `layer` is a number, or "N.M" for attention M of a layer that has several, or None for the only main
    layer: layers for multi-token prediction are chosen by number only. A folder of one layer whose names
    carry no number serves any; one renumbered to 0 does if its config.json has num_hidden_layers 1.

    Tensors arrive in `dtype`, or as stored (FP8 as BF16), rounded once; `progress(done_bytes, total_bytes)`
    is called while they are read. Raises `CheckpointError`: here for names, shapes and dtypes, and for values
    when a weight is read.
    """
    stored = Folder(folder)
    facts = read_facts(stored)
    keys = _find(stored, layer, facts)
    shapes = weight_shapes(config)
    _check_names(stored, keys, shapes)
    wanted = [name for one in shapes for name in (one, one + _SCALE) if name in keys]
    tensors = _headers(stored, {name: keys[name][0] for name in wanted})
    weights = {
        name: _weight(tensors[name], tensors.get(name + _SCALE), shape, facts)
        for name, shape in shapes.items()
    }
    return StoredLayer(weights, dtype, progress)


def _find(folder: Folder, layer: Wanted, facts: Facts) -> Keys:
    """Return the tensors of the chosen layer's attention."""
    locations: dict[Location, Keys] = {}
    for file, key in folder.tensors():
        located = locate(key)
        if located is not None:
            location, name = located
            locations.setdefault(location, {}).setdefault(name, []).append((file, key))
    served = [location for location, keys in locations.items() if is_mla(set(keys)) and not location.is_draft]
    if not served:
        raise CheckpointError(
            f"checkpoint '{folder.path}' holds no MLA attention weights, such as "
            "'model.layers.0.self_attn.kv_a_proj_with_mqa.weight'."
        )
    return locations[choose(served, layer, facts, str(folder.path))]


def _check_names(folder: Folder, keys: Keys, shapes: Mapping[str, object]) -> None:
    """Refuse tensors that are duplicated, foreign to this layer, or missing."""
    for name, entries in keys.items():
        if len(entries) > 1:
            raise CheckpointError(f"checkpoint '{folder.path}' holds '{name}' twice: {_twice(*entries[:2])}.")
        if name not in shapes and name.removesuffix(_SCALE) not in shapes and not name.startswith(_IGNORED):
            file, key = entries[0]
            raise CheckpointError(f"tensor {quoted(key)} in '{folder.path / file}' {_unexpected(name)}.")
    for name in shapes:
        if name not in keys:
            file, key = next(iter(keys.values()))[0]
            raise CheckpointError(
                f"checkpoint '{folder.path}' has no tensor '{name}' next to {quoted(key)} in {quoted(file)}."
            )


def _twice(one: tuple[str, str], other: tuple[str, str]) -> str:
    words = f"{quoted(one[1])} in {quoted(one[0])} and {quoted(other[1])} in {quoted(other[0])}"
    return (
        words
        if one[0] == other[0]
        else f"{words}, and the parts of a tensor-parallel conversion are not joined"
    )


def _unexpected(name: str) -> str:
    """Return why a tensor is refused: without it, the layer would compute something else."""
    for pattern, reason in _REASONS:
        if re.match(pattern, name):
            served = name.partition(".")[0] in KNOWN
            return reason if served else f"{reason}, which this layer does not compute"
    return "is not one of this layer's weights, and ignoring it could change the result"


def _headers(folder: Folder, entries: Mapping[str, tuple[str, str]]) -> dict[str, StoredTensor]:
    """Return what the files say about the weights, opening only the files that should hold them."""
    by_file: dict[str, dict[str, str]] = {}
    for name, (file, key) in entries.items():
        by_file.setdefault(file, {})[key] = name
    found = {}
    for file, names in by_file.items():
        tensors = files.headers(folder.file(file), names)
        for key, name in names.items():
            if key not in tensors:
                raise CheckpointError(
                    f"'{folder.path / str(folder.index)}' says that tensor {quoted(key)} is in "
                    f"{quoted(file)}, which does not hold it."
                )
            found[name] = tensors[key]
    return found


def _weight(
    tensor: StoredTensor, scale: StoredTensor | None, shape: tuple[int, ...], facts: Facts
) -> StoredWeight:
    if tensor.shape != shape:
        transposed = " (it is transposed)" if tensor.shape == shape[::-1] else ""
        raise CheckpointError(
            f"{tensor} has shape {list(tensor.shape)}, the config asks for {list(shape)}{transposed}."
        )
    if tensor.dtype == FP8 and len(shape) == 2:
        return _fp8(tensor, scale, facts)
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{tensor} is {tensor.dtype}: only BF16, F16, F32 and, for matrices, F8_E4M3 with scales are "
            "read."
        )
    if scale is not None:
        raise CheckpointError(
            f"{tensor} is {tensor.dtype} and yet has a scale, {quoted(scale.key)}: it is unclear whether "
            "that still has to be applied."
        )
    return StoredWeight(tensor)


def _fp8(tensor: StoredTensor, scale: StoredTensor | None, facts: Facts) -> StoredWeight:
    if scale is None:
        raise CheckpointError(f"{tensor} is FP8 and has no scale, without which its numbers mean nothing.")
    block = facts.block_size(str(tensor))
    grid = tuple(-(-length // size) for length, size in zip(tensor.shape, block, strict=True))
    if scale.shape != grid:
        raise CheckpointError(
            f"{scale} has shape {list(scale.shape)}: {list(tensor.shape)} in blocks of {list(block)} needs "
            f"{list(grid)}."
        )
    if scale.dtype not in DTYPES:
        raise CheckpointError(f"{scale} is {scale.dtype}: scales are read as F32, BF16 or F16.")
    return StoredWeight(tensor, scale, block)
