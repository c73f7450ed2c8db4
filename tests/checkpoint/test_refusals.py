"""What the loader refuses: one sentence that names file, tensor and cause, and never another exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_maker as maker
import pytest
import torch
from checkpoint_checks import refused
from safetensors.torch import save_file

import mla
from mla.checkpoint import CheckpointError, read_layer

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], Tensors]
FILE = "model.safetensors"
O_PROJ, BAD = f"{maker.LAYER}o_proj.weight", (torch.nan, torch.inf, -1.0)


def make(folder: Path, layout: str = "fp8") -> tuple[maker.Made, Tensors]:
    """Write a ragged layer, and return it with the tensors of its file."""
    from safetensors.torch import load_file

    made = maker.LAYOUTS[layout].make(folder / "model", "ragged")
    return made, load_file(made.folder / FILE)


def put(tensors: Tensors, **changes: Any) -> Tensors:
    """Replace tensors of the layer; None removes one."""
    changed = tensors | {f"{maker.LAYER}{name.replace('__', '.')}": value for name, value in changes.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


def spoilt(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Return a copy whose last element is `value`."""
    copy = tensor.clone() if tensor.element_size() > 1 else tensor.float()
    copy.view(-1)[-1] = value
    return copy.to(tensor.dtype)


def without(name: str) -> Damage:
    return lambda t: put(t, **{name: None})


def beside(name: str, tensor: torch.Tensor | None = None) -> Damage:
    """Add a tensor to the layer's, or replace one."""
    return lambda t: put(t, **{name: torch.ones(2) if tensor is None else tensor})


def o_proj(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda t: put(t, o_proj__weight=change(t[O_PROJ]))


def o_scale(scale: torch.Tensor) -> Damage:
    return beside("o_proj__weight_scale_inv", scale)


E4M3, FOREIGN = torch.float8_e4m3fn, "output; this layer does not compute that"
PLAIN: list[tuple[Damage, str]] = [
    (without("o_proj__weight"), r"has no tensor 'o_proj.weight' next to 'model\.layers\.3\."),
    (without("q_a_layernorm__weight"), "has no tensor 'q_a_layernorm.weight' next to"),
    (o_proj(lambda x: x.T.contiguous()), r"'model.*o_proj.weight' .* \[36, 72\], .* \[72, 36\] \(it is tr"),
    (o_proj(lambda x: x[1:]), r"has shape \[71, 36\], the config asks for \[72, 36\]\."),
    (beside("kv_a_layernorm__weight", torch.tensor(1.0)), r"has shape \[\], the config asks for \[40\]"),
    (o_proj(lambda x: x.to(torch.int8)), r"o_proj.weight' in .* is I8: only BF16, F16, F32"),
    (o_proj(torch.Tensor.double), "o_proj.weight' in .* is F64: only"),
    (o_proj(lambda x: x.to(torch.float8_e5m2)), "is F8_E5M2: only"),
    (o_proj(lambda x: x.to(E4M3)), "is FP8 but has no scale"),
    (beside("kv_a_layernorm__weight", torch.ones(40).to(E4M3)), "layernorm.* F8_E4M3: only .* of matrices"),
    (o_scale(torch.ones(5, 2)), "is BF16 but has a scale, .*it is unclear if"),
    (o_proj(lambda x: spoilt(x, torch.nan)), "o_proj.weight' .* holds NaN or infinity, .* in rows 0 to 71"),
    (o_proj(lambda x: spoilt(x, -torch.inf)), "o_proj.weight' .* holds NaN or infinity"),
    (beside("o_proj__bias", torch.ones(72)), r"is a bias that the config does not announce"),
    (beside("q_proj__weight"), "q_proj.weight' in .* does not fit the config, whose q_lora"),
    (beside("indexer__wq_b__weight"), "indexer.wq_b.weight' in .* belongs to an indexer"),
    (beside("sinks"), r"sinks' in .* which the config does not announce \(sink_logits\)\.$"),
    (beside("attention_sink"), "'model.layers.3.self_attn.attention_sink' in .* is not"),
    (beside("g_proj__weight"), r"g_proj.weight' in .* and the config has no gate \(output_gate\)\.$"),
    (beside("q_gate_proj__weight"), FOREIGN),
    (beside("gate_proj__weight"), FOREIGN),
    (beside("k_norm__weight"), "k_norm.weight' in .* is not one of this layer's weights"),
    (beside("o_proj__weight_scale"), "belongs to a quantization that is not read"),
    (lambda t: put(t, o_proj__weight=None, o_proj__qweight=torch.ones(2)), "belongs to a quantization"),
    (beside("wo__weight"), r"holds 'o_proj.weight' twice: .*(o_proj|wo).weight' in 'model.safetensors'\. "),
    (lambda t: {"lm_head.weight": torch.ones(2)}, r"holds no MLA attention weights, such as 'model\.layers"),
    (lambda t: {}, "holds no MLA attention weights"),
]


FP8: list[tuple[Damage, str]] = [
    (without("o_proj__weight_scale_inv"), "o_proj.weight' in .* is FP8 but has no scale"),
    (o_scale(torch.ones(5, 3)), r"scale_inv' .* shape \[5, 3\]: .* blocks of \[16, 20\] needs \[5, 2\]"),
    (o_scale(torch.ones(4, 2)), r"has shape \[4, 2\]"),
    (o_scale(torch.ones(1)), r"has shape \[1\]"),
    (o_scale(torch.ones(5, 2).int()), "o_proj.weight_scale_inv' in .* is I32"),
    *((o_scale(spoilt(torch.ones(5, 2), bad)), "scale_inv' in .* holds NaN, inf") for bad in BAD),
    (o_proj(lambda x: spoilt(x, torch.nan)), "o_proj.weight' in .* holds NaN or infinity"),
    (o_scale(torch.full((5, 2), 3e38)), "o_proj.weight' in .* holds NaN or infinity"),
    (o_proj(lambda x: x.view(torch.int8)), "is I8: only"),
]


@pytest.mark.parametrize(
    ("layout", "damage", "reason"),
    [*(("full-names", *row) for row in PLAIN), *(("fp8", *row) for row in FP8)],
)
def test_broken_tensors_are_named(layout: str, damage: Damage, reason: str, tmp_path: Path) -> None:
    made, tensors = make(tmp_path, layout)
    save_file(damage(tensors), made.folder / FILE)
    refused(made.folder, made.config, reason)


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        (None, r"is FP8, but '.*config.json' declares quantization_config.quant_method None: only 'fp8'"),
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"fmt": "e5m2"}, "fmt 'e5m2': only 'e4m3'"),
        ({"weight_block_size": None}, "weight_block_size in '.*config.json' is None: .128, 128. or other"),
        ({"weight_block_size": [128]}, r"is \[128\]"),
        ({"weight_block_size": [0, 128]}, r"is \[0, 128\]"),
        ({"weight_block_size": ["128", 128]}, r"is \['128', 128\]"),
        ({"weight_block_size": [16, 16]}, r"in blocks of \[16, 16\] needs"),
        ("fp8", "quant_method None: only"),
    ],
)
def test_fp8_needs_a_declared_block(declared: Any, reason: str, tmp_path: Path) -> None:
    made, _ = make(tmp_path)
    values = dict(made.values)
    official = values.pop("quantization_config")
    if declared is not None:
        values["quantization_config"] = {**official, **declared} if isinstance(declared, dict) else declared
    (made.folder / "config.json").write_text(json.dumps(values))
    refused(made.folder, made.config, reason)


def test_numbers_beyond_the_layers_dtype_are_refused(tmp_path: Path) -> None:
    made, tensors = make(tmp_path, "fp32")
    save_file(put(tensors, o_proj__weight=spoilt(tensors[O_PROJ], 1e30)), made.folder / FILE)
    with pytest.raises(
        CheckpointError, match=r"o_proj.* numbers beyond the range of torch.float16, in rows 0"
    ):
        dict(read_layer(made.folder, made.config, dtype=torch.float16))
    assert read_layer(made.folder, made.config)["o_proj.weight"].isfinite().all()


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"q_lora_rank": None}, r"q_a_\w+.weight' in .* does not fit the config, which has no q_lora_rank"),
        ({"num_attention_heads": 4}, r"q_b_proj.weight' in .* has shape .* the config asks for"),
        ({"attention_bias": True}, "has no tensor 'q_a_proj.bias'|has no tensor 'kv_a_proj_with_mqa.bias'"),
    ],
)
def test_another_models_config_is_refused(other: dict[str, Any], reason: str, tmp_path: Path) -> None:
    made, _ = make(tmp_path)
    refused(made.folder, mla.MLAConfig.from_dict({**made.values, **other}), reason)
