"""Write checkpoint folders as they are found on disk: real safetensors, in every layout the loader serves.

`LAYOUTS` maps a name to a function that writes one folder and returns what must be read from it. Sizes are
"tiny", "ragged" (odd, with FP8 blocks cut off by the edges) and "real" (DeepSeek-R1's). As a program it
writes one folder, to try a command on without the weights of a model:

    python tests/support/checkpoint_maker.py fp8-sharded real /tmp/layer
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint_tensors import (
    LAYER,
    SIZES,
    State,
    Values,
    deepseek_names,
    dequantized,
    fp8,
    named,
    neighbours,
    plain,
    values_of,
)
from safetensors.torch import save_file

from mla.config import MLAConfig


@dataclass
class Made:
    """A folder, how to ask for its layer, and what must be read: Hugging Face names, stored dtype or BF16."""

    folder: Path
    state: State
    values: Values  # of the language model
    layer: int | str | None = None

    @property
    def config(self) -> MLAConfig:
        """The layer's config, without the parts of config.json that wrap it."""
        return MLAConfig.from_dict(self.values)


# ---------------------------------------------------------------------------------------------- files


def quantization(block: Sequence[int]) -> Values:
    """Return the official quantization_config."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }


def write(
    folder: Path, values: Mapping[str, Any], *shards: State, index: bool = False, metadata: bool = True
) -> Path:
    """Write config.json and one safetensors file per shard, named as on the hub; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    if index:
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        about = {"metadata": {"total_size": size}} if metadata else {}
        content = {**about, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def hub_cache(folder: Path) -> Path:
    """Turn a folder into a snapshot of a hub cache, its files links to blobs; return the snapshot."""
    entry = folder.parent / "models--maker--layer"
    snapshot, blobs = entry / "snapshots" / "0123abcd", entry / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sorted(folder.iterdir()):
        blob = blobs / hashlib.sha256(file.name.encode()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    folder.rmdir()
    return snapshot


def halves(tensors: State) -> tuple[State, State]:
    """Split the tensors over two shards: first all weights but the last, then that one and the scales."""
    names = [name for name in tensors if not name.endswith(("_scale_inv", ".scale"))]
    first = {name: tensors[name] for name in names[:-1]}
    return first, {name: tensor for name, tensor in tensors.items() if name not in first}


# ---------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """One way to lay out a layer."""

    dtype: torch.dtype = torch.bfloat16
    changes: Values = field(default_factory=dict)  # of the config
    quantized: bool = False
    keep: tuple[str, ...] = ()  # matrices of a quantized layer that are not
    rename: Callable[[State], State] = lambda state: named(state, LAYER)
    beside: Callable[[], State] = dict  # other tensors of the first shard
    split: bool = False
    index: bool = False
    metadata: bool = True
    wrap: Callable[[Values], Values] = lambda values: values
    finish: Callable[[Path], Path] = lambda folder: folder
    layer: int | str | None = None

    def make(self, folder: Path, size: str = "tiny", seed: int = 0) -> Made:
        """Write the layer to a folder that does not exist yet."""
        values, block = values_of(size, **self.changes), SIZES[size][1]
        stored = state = plain(values, seed, self.dtype)
        if self.quantized:
            values["quantization_config"] = quantization(block)
            stored = fp8(state, block, seed, self.keep)
            state = dequantized(stored, block)
        shards = halves(self.rename(stored)) if self.split else (self.rename(stored),)
        shards = (shards[0] | self.beside(), *shards[1:])
        write(folder, self.wrap(values), *shards, index=self.index, metadata=self.metadata)
        return Made(self.finish(folder), state, values, self.layer)


def _other_layers() -> State:
    """Return layers 2 and 4, and layer 61, which predicts a further token; none of them can be used."""
    tensors = {}
    for layer in (2, 4, 61):
        state = named(plain(values_of("tiny")), f"model.layers.{layer}.self_attn.")
        tensors.update({name: torch.full_like(weight, torch.nan) for name, weight in state.items()})
    return tensors | neighbours()


def _draft_layer(prefix: str = "") -> State:
    state = named(plain(values_of("tiny"), seed=9), f"{prefix}model.layers.61.self_attn.")
    return state | {f"{prefix}model.layers.61.eh_proj.weight": torch.ones(2)}


_KIMI_K3 = {
    "model_type": "kimi_k3",
    "rope_scaling": None,
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 0,
    "linear_attn_config": {"full_attn_layers": [4, 5], "kda_layers": [1, 2, 3]},  # counted from 1
}


def _kimi_layers() -> State:
    """Return Kimi K3's linear attention 0, whose gate has the name and shape of an MLA layer's, and MLA 4."""
    values = values_of("tiny", **_KIMI_K3)
    other = named(plain(values, seed=9), "language_model.model.layers.4.self_attn.")
    names = ("g_proj.weight", "o_proj.weight", "q_proj.weight", "b_proj.weight", "A_log", "q_conv1d.weight")
    linear = {name: torch.full((64, 64), torch.nan) for name in names}
    return other | named(linear, "language_model.model.layers.0.self_attn.")


def _ling(state: State) -> State:
    """Return weights under Ling's names."""
    prefix = LAYER.replace("self_attn", "attention")
    return {name.replace("o_proj", "dense"): weight for name, weight in named(state, prefix).items()}


def _second_attention() -> State:
    return named(plain(values_of("tiny"), seed=9), f"{LAYER}0.")


def _in_text_config(values: Values) -> Values:
    inner = {key: value for key, value in values.items() if key != "quantization_config"}
    outer = {key: value for key, value in values.items() if key == "quantization_config"}
    return {"model_type": "kimi_vl", "hidden_size": 5, "text_config": inner, **outer}


INDEXER = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 24}

LAYOUTS: dict[str, Layout] = {
    "full-names": Layout(),
    "self-attn-names": Layout(rename=lambda state: named(state, "self_attn."), layer=3),
    "bare-names": Layout(rename=dict, layer=3),
    "renumbered": Layout(
        changes={"num_hidden_layers": 1},
        rename=lambda state: named(state, "model.layers.0.self_attn."),
        layer=3,
    ),
    "whole-layer": Layout(beside=neighbours),
    "layer-alone": Layout(
        rename=lambda state: named(state, "self_attn."),
        beside=lambda: {"mlp.gate.weight": torch.ones(2), "input_layernorm.weight": torch.ones(2)},
    ),
    "sharded": Layout(split=True, index=True),
    "sharded-without-index": Layout(split=True),
    "index-without-metadata": Layout(split=True, index=True, metadata=False),
    "whole-model": Layout(beside=_other_layers, split=True, index=True, layer=3),
    "with-draft-layer": Layout(beside=_draft_layer),
    "fp16": Layout(dtype=torch.float16),
    "fp32": Layout(dtype=torch.float32),
    "q-proj": Layout(changes={"q_lora_rank": None}),
    "biases": Layout(changes={"attention_bias": True}),
    "fp8": Layout(quantized=True),
    "fp8-sharded": Layout(quantized=True, split=True, index=True, beside=neighbours),
    "fp8-sharded-without-index": Layout(quantized=True, split=True),
    "fp8-and-bf16": Layout(quantized=True, keep=("o_proj.weight", "q_b_proj.weight")),
    "own-names": Layout(rename=deepseek_names),
    "own-names-bare": Layout(rename=lambda state: deepseek_names(state, "")),
    "own-names-fp8": Layout(quantized=True, rename=deepseek_names, split=True),
    "text-config": Layout(
        quantized=True,
        rename=lambda state: named(state, f"language_model.{LAYER}"),
        beside=lambda: {
            "vision_tower.layers.3.self_attn.q_proj.weight": torch.ones(2),
            **_draft_layer("language_model."),
        },
        wrap=_in_text_config,
    ),
    "hub-cache": Layout(split=True, index=True, finish=hub_cache),
    "kimi-k3": Layout(
        changes=_KIMI_K3,
        rename=lambda state: named(state, f"language_model.{LAYER}"),
        beside=_kimi_layers,
        wrap=lambda values: {
            "model_type": "kimi_k3",
            "text_config": {**values, "model_type": "kimi_linear"},
        },
        layer=3,
    ),
    "ling-3-fp8": Layout(
        changes={
            "model_type": "bailing_hybrid",
            "q_lora_rank": None,
            "rope_scaling": None,
            "num_hidden_layers": 4,
            "layer_group_size": 4,
            "gated_attention_proj_granularity_type": "head_wise",
        },
        quantized=True,
        keep=("g_proj.weight",),
        rename=_ling,
        split=True,
        index=True,
    ),
    "deepseek-v3.2-fp8": Layout(
        changes={"model_type": "deepseek_v32", **INDEXER},
        quantized=True,
        keep=("indexer.weights_proj.weight",),
        split=True,
        index=True,
        beside=neighbours,
    ),
    "deepseek-v3.2-own-names": Layout(
        changes={"model_type": "deepseek_v32", **INDEXER}, quantized=True, rename=deepseek_names, split=True
    ),
    "two-attentions": Layout(
        rename=lambda state: named(state, f"{LAYER}1."), beside=_second_attention, layer="3.1"
    ),
}


def main(words: Sequence[str]) -> int:
    """Write one folder from the command line."""
    if len(words) != 3 or words[0] not in LAYOUTS or words[1] not in SIZES:
        print("usage: checkpoint_maker.py LAYOUT SIZE FOLDER")  # noqa: T201
        print(f"layouts: {', '.join(LAYOUTS)}\nsizes: {', '.join(SIZES)}")  # noqa: T201
        return 2
    folder = Path(words[2])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"'{folder}' exists and is not empty: name a new folder")  # noqa: T201
        return 2
    try:
        made = LAYOUTS[words[0]].make(folder, words[1])
    except FileExistsError as error:  # of the hub's cache, which is written beside the folder
        print(f"'{error.filename}' exists: name another folder")  # noqa: T201
        return 2
    print(f"{made.folder}: {'the only layer' if made.layer is None else f'layer {made.layer}'}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
