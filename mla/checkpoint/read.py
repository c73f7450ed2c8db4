"""`read_layer`: from a folder and a config to one layer's stored weights, or to the reason for refusing."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mla.checkpoint.folder import (
    DTYPES,
    FP8,
    CheckpointError,
    Facts,
    Folder,
    ReadProgress,
    StoredLayer,
    StoredTensor,
    StoredWeight,
    read_facts,
)
from mla.config import MLAConfig
from mla.weights import SINKS, weight_shapes
from mla_backends.outside import quoted, shortened

# DeepSeek's own names (`inference/convert.py` of DeepSeek-V3) -> Hugging Face's.
_DEEPSEEK_NAMES = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    "dense": "o_proj",  # Ling's
    "g_proj": "g_proj",
}
KNOWN = frozenset(_DEEPSEEK_NAMES.values())
# Other attentions do not have these, so any one of them identifies MLA.
_SIGNATURE = frozenset(f"{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))
# First words of names outside attention, where the attention's own names have no prefix.
_OTHERS = re.compile(
    r"(model|language_model|layers|lm_head|head|embed(_tokens)?|norm|mlp|ffn|block_sparse_moe"
    r"|(input|post_attention)_layernorm|(attn|ffn)_norm)(\.|$)"
)
_IN_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?)layers\.(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL)
_IN_MODULE = re.compile(
    r"(?P<prefix>(?:.*?\.)?)(?P<module>self_attn|attn|attention)\.(?:(?P<part>[0-9]{1,3})\.)?(?P<name>.+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Location:
    """One attention of a checkpoint.

    `layer` is None where names carry no number. `part` counts the attentions of a layer that has several.
    """

    prefix: str  # before `layers.N.` or `self_attn.`, such as "model."
    layer: int | None
    module: str  # "self_attn", "attn", "attention" or "" for bare names
    part: int | None = None

    @property
    def pattern(self) -> str:
        """The pattern of names of this location, for messages."""
        layers = "" if self.layer is None else "layers.N."
        return f"{self.prefix}{layers}{self.module + '.' if self.module else ''}*"

    @property
    def is_draft(self) -> bool:
        """Return whether it belongs to a multi-token-prediction module next to the model."""
        return "mtp" in self.prefix.split(".")

    def named(self, number: int | None) -> str:
        """Return what asks for it where its layer has this number."""
        return f"{number or 0}" if self.part is None else f"{number or 0}.{self.part}"


def locate(key: str) -> tuple[Location, str] | None:
    """Return a tensor's location and its weight's Hugging Face name, or None outside attention."""
    in_layer = _IN_LAYER.fullmatch(key)
    prefix, layer, rest = ("", None, key) if in_layer is None else in_layer.group("prefix", "layer", "rest")
    number = None if layer is None else int(layer)
    in_module = _IN_MODULE.fullmatch(rest)
    if in_module is not None and not (layer and in_module["prefix"]):
        part = None if in_module["part"] is None else int(in_module["part"])
        location = Location(prefix + in_module["prefix"], number, in_module["module"], part)
        return location, _hugging_face(in_module["name"])
    if layer is None and in_module is None and not _OTHERS.match(key):
        return Location("", None, ""), _hugging_face(key)
    return None


def _hugging_face(name: str) -> str:
    """Translate DeepSeek's own name of a weight or of its scale; keep other names."""
    head, _, tail = name.partition(".")
    head = _DEEPSEEK_NAMES.get(head, head)
    if (head in KNOWN and tail == "scale") or (head == "indexer" and tail.endswith(".scale")):
        tail = f"{tail.removesuffix('scale')}weight_scale_inv"
    return f"{head}.{tail}" if tail else head


# ------------------------------------------------------------------------------------------- choose
# Choose among a checkpoint's attentions.

# A layer's number, or "N.M" for attention M of a layer that has several.
Wanted = int | str | None


def choose(
    locations: Collection[Location], wanted: Wanted, facts: Facts, folder: str
) -> tuple[Location, int | None]:
    """Return the location of the wanted layer, and the number that the model's config knows it by.

    None means the only main layer. A folder of one layer may have lost its number, or have 0 for it. Raises
    `CheckpointError`.
    """
    patterns = sorted({location.pattern for location in locations})
    if len(patterns) > 1:
        raise CheckpointError(
            f"checkpoint '{folder}' holds MLA attention weights under several names, '{patterns[0]}' and "
            f"'{patterns[1]}': it is unclear which are meant."
        )
    layers, asked = {location.layer for location in locations}, str(wanted)
    number = int(asked.partition(".")[0]) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", asked) else None
    if wanted is None:
        chosen = [location for location in locations if not facts.is_draft(location.layer)]
        number = chosen[0].layer if chosen else None
    else:
        lost = layers == {None} or (layers == {0} and facts.layers == 1)
        chosen = [each for each in locations if each.named(number if lost else each.layer) == asked]
        if (lost or not chosen) and facts.attends_otherwise(number):
            raise CheckpointError(
                f"layer {number} of checkpoint '{folder}' has another attention: its MLA layers, counted "
                f"from 0, are {shortened(', '.join(map(str, facts.mla_layers or ())))}."
            )
    if len(chosen) == 1:
        return chosen[0], number
    lack = "" if wanted is None else f"no MLA weights of layer {wanted}, only of "
    ordered = sorted(chosen or locations, key=lambda each: (each.layer or 0, each.part or 0))
    held = shortened(", ".join(each.named(each.layer) for each in ordered))
    raise CheckpointError(
        f"checkpoint '{folder}' holds {lack}layers {held}: choose one with layer=N (--layer N)."
    )


# --------------------------------------------------------------------------------------------- read

Keys = dict[str, list[tuple[str, str]]]  # Hugging Face name -> (file name, tensor name)

# Tensors of an attention that are not weights: tables every implementation computes.
_TABLES = "rotary_emb."
_SCALE = "_scale_inv"
# Why a tensor of the layer may not be ignored, by the start or the end of its name.
_REASONS = (
    (r"indexer\.", "belongs to an indexer that picks the tokens to attend"),
    (r"sinks$", "holds logits of attention sinks, which the config does not announce (sink_logits)"),
    (r"sinks?\b|.*\.sinks?$", "is an attention sink"),
    (r"g_proj\.", "gates the attention's output, and the config has no gate (output_gate)"),
    (r"(q_)?gate_proj\b", "gates the attention's output"),
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
    keys, number = _find(stored, layer, facts)
    config = config.of_layer(number or 0)
    shapes = weight_shapes(config)
    # Tensors that may be there: converters give layers that share a selection an indexer, too.
    ignored = (_TABLES, "indexer.") if config.index_topk and not config.index_n_heads else (_TABLES,)
    _check_names(stored, keys, shapes, ignored)
    wanted = [name for weight in shapes for name in (weight, weight + _SCALE) if name in keys]
    tensors = _headers(stored, {name: keys[name][0] for name in wanted})
    weights = {
        name: _weight(tensors[name], tensors.get(name + _SCALE), shape, facts)
        for name, shape in shapes.items()
    }
    return StoredLayer(weights, config, dtype, progress)


def _find(folder: Folder, layer: Wanted, facts: Facts) -> tuple[Keys, int | None]:
    """Return the tensors of the chosen layer's attention, and the layer's number."""
    locations: dict[Location, Keys] = {}
    for file, key in folder.tensors():
        located = locate(key)
        if located is not None:
            location, name = located
            locations.setdefault(location, {}).setdefault(name, []).append((file, key))
    served = [
        location for location, keys in locations.items() if _SIGNATURE & keys.keys() and not location.is_draft
    ]
    if not served:
        raise CheckpointError(
            f"checkpoint '{folder.path}' holds no MLA attention weights, such as "
            "'model.layers.0.self_attn.kv_a_proj_with_mqa.weight'."
        )
    chosen, number = choose(served, layer, facts, str(folder.path))
    return locations[chosen], number


def _check_names(folder: Folder, keys: Keys, shapes: Mapping[str, object], ignored: tuple[str, ...]) -> None:
    """Refuse tensors that are duplicated, foreign to this layer, or missing."""
    for name, entries in keys.items():
        if len(entries) > 1:
            where = " and ".join(f"{quoted(key)} in {quoted(file)}" for file, key in entries[:2])
            raise CheckpointError(
                f"checkpoint '{folder.path}' holds '{name}' twice: {where}. Parts of a tensor-parallel "
                "conversion are not joined."
            )
        if name not in shapes and name.removesuffix(_SCALE) not in shapes and not name.startswith(ignored):
            file, key = entries[0]
            raise CheckpointError(f"tensor {quoted(key)} in '{folder.path / file}' {_unexpected(name)}.")
    for name in shapes:
        if name not in keys:
            file, key = next(iter(keys.values()))[0]
            raise CheckpointError(
                f"checkpoint '{folder.path}' has no tensor '{name}' next to {quoted(key)} in {quoted(file)}."
            )


def _unexpected(name: str) -> str:
    """Return why a tensor is refused: without it, the layer would compute something else."""
    for pattern, reason in _REASONS:
        if re.match(pattern, name):
            served = name.partition(".")[0] in {*KNOWN, SINKS}
            return reason if served else f"{reason}; this layer does not compute that"
    return "is not one of this layer's weights, and ignoring it could change the result"


def _headers(folder: Folder, entries: Mapping[str, tuple[str, str]]) -> dict[str, StoredTensor]:
    """Return what the files say about the weights, opening only the files that should hold them."""
    by_file: dict[str, dict[str, str]] = {}
    for name, (file, key) in entries.items():
        by_file.setdefault(file, {})[key] = name
    stored = {}
    for file, names in by_file.items():
        tensors = folder.headers(file)
        for key, name in names.items():
            if key not in tensors:
                raise CheckpointError(
                    f"'{folder.path / str(folder.index)}' says that tensor {quoted(key)} is in "
                    f"{quoted(file)}, but that file lacks it."
                )
            stored[name] = tensors[key]
    return stored


def _weight(
    tensor: StoredTensor, scale: StoredTensor | None, shape: tuple[int, ...], facts: Facts
) -> StoredWeight:
    if tensor.shape != shape:
        transposed = " (it is transposed)" if tensor.shape == shape[::-1] else ""
        raise CheckpointError(
            f"{tensor} has shape {list(tensor.shape)}, the config asks for {list(shape)}{transposed}."
        )
    if tensor.dtype == FP8 and len(shape) == 2:
        if scale is None:
            raise CheckpointError(f"{tensor} is FP8 but has no scale.")
        return _fp8(tensor, scale, facts.block_size(str(tensor)))
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{tensor} is {tensor.dtype}: only BF16, F16, F32 and, of matrices, F8_E4M3 with scales are read."
        )
    if scale is not None:
        raise CheckpointError(
            f"{tensor} is {tensor.dtype} but has a scale, {quoted(scale.key)}: it is unclear if that has "
            "been applied."
        )
    return StoredWeight(tensor)


def _fp8(tensor: StoredTensor, scale: StoredTensor, block: tuple[int, int]) -> StoredWeight:
    grid = tuple(-(-length // size) for length, size in zip(tensor.shape, block, strict=True))
    if scale.shape != grid:
        raise CheckpointError(
            f"{scale} has shape {list(scale.shape)}: {list(tensor.shape)} in blocks of {list(block)} needs "
            f"{list(grid)}."
        )
    if scale.dtype not in DTYPES:
        raise CheckpointError(f"{scale} is {scale.dtype}: scales are read as F32, BF16 or F16.")
    return StoredWeight(tensor, scale, block)
