"""How each model family's own code reads its config.json, as data.

The core never asks for a family: `MLAConfig.from_dict` turns these tables into numbers once. Defaults and
fixed values are those of the classes in `transformers`, which the tests compare with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from mla.errors import ConfigError, did_you_mean
from mla_backends.outside import escaped, quoted, shortened


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from a plain reading of its keys."""

    architecture: str = ""  # identifies the family where model_type is missing
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what an absent key means
    # What an absent field means where that depends on other keys and fields, given by name.
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that no key changes
    demands: Mapping[str, Any] = field(default_factory=dict)  # keys with one supported value, if present
    needs: frozenset[str] = frozenset()  # keys that may not be null
    ignores: frozenset[str] = frozenset()  # keys refused elsewhere that change nothing or are read here
    rope_types: Mapping[str, str] = field(default_factory=dict)  # its own spelling -> the common one
    rotates: bool = True
    scales_queries: bool = False  # by position, see QueryScaling
    rotary_share_of_head: bool = False  # partial_rotary_factor is a part of n + r, not of r
    indexes: bool = False  # an indexer picks the keys that queries see; its keys are fields of `MLAConfig`


# The two latent norms of every class pass no eps, so it is 1e-6 even where config.json says 1e-5.
_EPS = {"rms_norm_eps": 1e-6}
_DIMS = {"q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_INTERLEAVED = {**_EPS, "rope_interleave": True}


def _indexer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which layers are "full", with an indexer, or "shared", by the last full one's selection.

    () means that all are full. As GlmMoeDsaConfig of `transformers`, vLLM and SGLang read these keys.
    """
    pattern, every = values.get("index_topk_pattern"), values.get("index_topk_freq")
    if pattern is not None:
        if not isinstance(pattern, (str, list)):
            raise ConfigError(f"index_topk_pattern must be a string or a list, got {quoted(pattern)}.")
        return tuple({"F": "full", "S": "shared"}.get(str(kind), kind) for kind in pattern)
    count, offset = values.get("num_hidden_layers"), values.get("index_skip_topk_offset", 2)
    if every is None or every < 2:
        return ()
    if count is None or offset is None:
        raise ConfigError("index_topk_freq needs num_hidden_layers, and index_skip_topk_offset.")
    return tuple("shared" if max(i - offset + 1, 0) % every else "full" for i in range(count))


def _sparse(interleaved: bool) -> dict[str, Any]:
    """Return what families with an indexer have in common, as arguments of `Family`."""
    return {
        "derived": {"indexer_types": _indexer_types},
        "fixed": {**_INTERLEAVED, "indexer_rope_interleave": interleaved},
        "demands": {"indexer_rope_interleave": interleaved},  # its classes know one layout, and ask no key
        "needs": frozenset({"q_lora_rank", "index_topk", "index_n_heads"}),
        "ignores": frozenset({*INDEXER_KEYS, *_SHARING_KEYS}),
        "indexes": True,
    }


def _ling_gate(gated_attention_proj_granularity_type: Any = "head_wise", **others: Any) -> Any:
    """Return the output gate of a granularity; an unknown one as it is, which no config takes."""
    kind = gated_attention_proj_granularity_type
    return {"head_wise": "head", "element_wise": "element"}.get(str(kind), kind)


INDEXER_KEYS = ("index_topk", "index_n_heads", "index_head_dim", "indexer_types")
_SHARING_KEYS = (
    "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern",
    "index_share_for_mtp_iteration",  # drafts reuse a selection, and each has an indexer too
)  # fmt: skip
_INDEXED = {**_DIMS, "index_topk": 2048, "index_head_dim": 128}

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", defaults=_DIMS, fixed=_INTERLEAVED),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", defaults=_DIMS, fixed=_EPS),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM", defaults={**_INDEXED, "index_n_heads": 64}, **_sparse(interleaved=False)
    ),
    "glm_moe_dsa": Family(  # GLM-5 and later
        "GlmMoeDsaForCausalLM",
        defaults={
            **_INDEXED,
            "q_lora_rank": 2048,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "index_n_heads": 32,
        },
        **_sparse(interleaved=True),
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        defaults={"q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256},
        fixed=_EPS,
    ),
    "youtu": Family("YoutuForCausalLM", defaults=_DIMS, fixed=_EPS),
    "axk1": Family("AXK1ForCausalLM", defaults=_DIMS, fixed=_EPS, needs=frozenset({"q_lora_rank"})),
    "sarvam_mla": Family(
        "SarvamMLAForCausalLM",
        defaults={**_DIMS, "q_lora_rank": None},
        fixed=_EPS,
        ignores=frozenset({"use_qk_norm"}),  # a key of its mixture-of-experts sibling
        rope_types={"deepseek_yarn": "yarn"},
    ),
    "minicpm3": Family(
        "MiniCPM3ForCausalLM",
        defaults={"q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
        derived={"v_head_dim": lambda values: values["hidden_size"] // values["num_attention_heads"]},
        fixed={**_EPS, "rope_interleave": False},
    ),
    "longcat_flash": Family(
        "LongcatFlashForCausalLM",
        defaults={**_DIMS, "rope_theta": 1e7},
        derived={
            "q_latent_scale": lambda values: (values["hidden_size"] / (values["q_lora_rank"] or 1)) ** 0.5,
            "kv_latent_scale": lambda values: (values["hidden_size"] / values["kv_lora_rank"]) ** 0.5,
        },
        fixed=_INTERLEAVED,
        demands={"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
        needs=frozenset({"q_lora_rank"}),
    ),
    "mistral4": Family(
        "Mistral4ForCausalLM",
        defaults={
            "q_lora_rank": 1024,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 128.0,
                "original_max_position_embeddings": 8192,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        fixed=_EPS,
        scales_queries=True,
        rotary_share_of_head=True,
    ),
    "kimi_linear": Family(  # its latent attention layers; the others are not MLA
        "KimiLinearForCausalLM",
        defaults={**_DIMS, "q_lora_rank": None},
        fixed=_INTERLEAVED,
        demands={"mla_use_nope": True},
        rotates=False,
    ),
    "kimi_k3": Family(  # as the engines that serve it do: no class of `transformers` computes it
        "KimiK3ForConditionalGeneration",
        defaults={**_DIMS, "q_lora_rank": None},
        derived={"output_gate": lambda values: "element" if values.get("mla_use_output_gate") else None},
        demands={"mla_use_nope": True},
        ignores=frozenset({"mla_use_output_gate"}),
        rotates=False,
    ),
    "bailing_hybrid": Family(  # Ling 3
        "BailingMoeV3ForCausalLM",
        defaults={**_DIMS, "q_lora_rank": None, "rope_theta": 6e6},
        derived={"output_gate": lambda values: _ling_gate(**values)},
        fixed=_INTERLEAVED,
        ignores=frozenset({"use_qk_norm", "partial_rotary_factor"}),  # of its layers that are not MLA
    ),
}

# For configs that name no family: the keys mean what they say.
UNNAMED = Family()

# Other names of the families above.
ALIASES: Mapping[str, str] = {"kimi_k2": "deepseek_v3", "AXK1": "axk1"}

_INDEXER = "an indexer picks which keys a query sees"

# Families that are refused, and why. So are their parts (`<name>_text`).
REFUSED: Mapping[str, str] = {
    "glm5_next": "its indexer scores pools of tokens",
    "mistral_large4": "it learns its rotary frequencies, and layers share caches",
    "axk2": "its output gate reads the query latent",
    **dict.fromkeys(("hy_v4", "hy_v4_vl"), "its indexer rotates the last channels of a key, not the first"),
    **dict.fromkeys(("minimax_m3", "minimax_m3_vl"), "its indexer picks grouped keys and values: no latent"),
    "dots3_note": "its layers differ in dimensions and windows, and it norms the rotary key",
    "gigachat3_5": "gates multiply its latent norms",
    **dict.fromkeys(("deepseek_v4", "deepseek_v41"), "it has one shared key and value head and no latent"),
    "deepseek_ocr2": "its kv_lora_rank was removed, so it has no latent",
    # Architectures that share their model type with another attention, or that have none.
    "BailingMoeV2_5ForCausalLM": "it is Ling 2.5, and its model type is read as Ling 3",
    "GigaChat35ForCausalLM": "gates multiply its latent norms",
    "LongcatCausalLM": "its indexer always picks the first and the last tokens as well",
}

# Keys that mean a different attention when set, at any depth, and what they mean. Refused in every family.
CHANGES: Mapping[str, str] = {
    **dict.fromkeys(INDEXER_KEYS, _INDEXER),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), "queries see a window of keys only"),
    **dict.fromkeys(("use_nsa", "sparse_attention_config"), "queries see some keys only"),
    **dict.fromkeys(("attention_sinks", "use_attention_sinks"), "attention has sinks of unknown kind"),
    **dict.fromkeys(
        ("mla_use_output_gate", "attn_output_gate", "attention_output_gate", "gated_norm_rank"),
        "a gate of unknown shape multiplies the output of attention",
    ),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm"), "queries and keys are normed per head"),
    **dict.fromkeys(("attn_logit_softcapping", "attention_logit_cap"), "logits are capped"),
    **dict.fromkeys(("kv_source_layers", "num_kv_shared_layers"), "layers share caches"),
    **dict.fromkeys(("no_rope_layers", "nope_layers"), "only some layers rotate"),
    "mla_use_nope": "nothing is rotated",
    **dict.fromkeys(
        ("use_mla_nope", "skip_rope"), "no key has rotary channels, whatever qk_rope_head_dim says"
    ),
    **dict.fromkeys(("mla_scale_q_lora", "mla_scale_kv_lora"), "latents are scaled"),
}

# Other keys whose names say that they choose what queries see. Refused unless the family's table has them.
_CHOOSES = re.compile(
    r"index|dsa|sparse|sparsity|window|top_?k|compress|shar(e|ing)|chunk|sink|kpool|swa_|(^|_)[cmn]sa(_|$)"
    r"|local_(attn|attention|token)"
)
_UNKNOWN = "it may change which keys a query sees, and its meaning in this family is unknown"

# Of those, names that say nothing of which keys a query sees, by what they are about: patterns of `fnmatch`.
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "a mixture of experts": (
        "*_expert", "*_experts", "*_expert_*", "*_experts_*", "topk_group", "topk_groups", "topk_method",
        "norm_topk_prob", "moe_topk", "moe_router_topk*", "use_grouped_topk", "decoder_sparse_step",
    ),
    "how a feed-forward network is computed": ("chunk_size_feed_forward",),
    "sampling": ("top_k",),
    "tokens that stand for images or sounds": ("*_token_index",),
    "sliding_window, which is judged itself": ("max_window_layers", "use_sliding_window"),
}  # fmt: skip
# Parts of a config.json that describe no layer of the language model.
_APART = (
    "vision_config",
    "audio_config",
    "quantization_config",
    "compression_config",
    "id2label",
    "label2id",
)
_DEEPEST = 20  # objects in objects; no real config has five

# What `layer_types` may name in any family, and in one with an indexer.
_LAYER_TYPES = {"full_attention", "linear_attention"}
_INDEXED_TYPES = {*_LAYER_TYPES, "indexed_attention", "deepseek_sparse_attention"}
# Numbers that lists are sized by.
_COUNTS = (
    "num_hidden_layers", "num_nextn_predict_layers", "layer_group_size", "index_topk_freq",
    "index_skip_topk_offset",
)  # fmt: skip

# Keys of any family with one supported value.
DEMANDS: Mapping[str, Any] = {"use_mla": True, "attention_method": "MLA"}

# Keys that count only while another key is not false.
SWITCHES: Mapping[str, str] = {"sliding_window": "use_sliding_window"}

# Keys under which a multimodal model's config.json holds its language model's.
WRAPPERS = ("text_config", "language_config", "llm_config")


def language_model(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config.json, or all of a text model's."""
    if "kv_lora_rank" not in values:
        for key in WRAPPERS:
            if isinstance(values.get(key), Mapping):
                return values[key]
    return values


def of_whole(whole: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's `part` of a config with the family of the `whole`, where that is the one.

    Kimi K3's part calls itself kimi_linear, and so does that part alone, which has its output gate.
    """
    kind = whole.get("model_type")
    if part.get("model_type") == "kimi_linear" and part.get("mla_use_output_gate"):
        kind = "kimi_k3"
    return {**part, "model_type": kind} if isinstance(kind, str) and kind in FAMILIES else part


def refuse(name: str, values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a family that is known to be unsupported, regardless of its other keys."""
    architectures = values.get("architectures")
    kinds = [values.get("model_type"), *(architectures if isinstance(architectures, list) else ())]
    for what, kind in zip(("model type", *("architecture",) * len(kinds)), kinds, strict=False):
        reason = REFUSED.get(kind.removesuffix("_text")) if isinstance(kind, str) else None
        if reason is not None:
            raise ConfigError(f"config '{name}': {what} '{kind}' is not supported: {reason}.")


def mla_layers(values: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the numbers, from 0, of a model's MLA layers; None where its keys name none.

    Kimi counts from 1 in its list; Ling attends with the last layer of each group and a rest that fills none.
    """
    hybrid, kinds = values.get("linear_attn_config"), values.get("layer_types")
    count, group = values.get("num_hidden_layers"), values.get("layer_group_size")
    listed = hybrid.get("full_attn_layers") if isinstance(hybrid, Mapping) else None
    if isinstance(listed, list) and all(isinstance(layer, int) for layer in listed):
        return tuple(layer - 1 for layer in listed)
    if isinstance(kinds, list) and "linear_attention" in kinds:
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if isinstance(count, int) and isinstance(group, int) and 0 < group <= count < 1 << 16:
        rest = count // group * group
        return tuple(layer for layer in range(count) if (layer + 1) % group == 0 or layer >= rest)
    return None


def find_family(name: str, values: Mapping[str, Any]) -> tuple[str | None, Family]:
    """Return the family's common name and its table; `architectures` stands in for a missing model_type.

    A config with neither is read as it stands. Raises `ConfigError` for an unknown name: such a model may do
    something to its queries or keys that no key reveals.
    """
    kind, architectures = values.get("model_type"), values.get("architectures")
    if kind is None and isinstance(architectures, list) and architectures:
        known = {family.architecture: key for key, family in FAMILIES.items()}
        kind = known.get(str(architectures[0]), str(architectures[0]))
    if kind is None:
        return None, UNNAMED
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(
            f"config '{name}': model type {quoted(kind)} is unknown, and its attention may differ from what "
            f"its keys say.{did_you_mean(str(kind), list(FAMILIES))} Known: {', '.join(FAMILIES)}. If it is "
            "DeepSeek-V3's attention, say so with model_type 'deepseek_v3'."
        )
    return kind, FAMILIES[kind]


def _refused_keys(
    values: Mapping[Any, Any], part: Mapping[str, Any], read: set[str], path: str = "", depth: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield the path of each set key that no reader knows, and why it is refused; inner keys come first.

    `read` are the keys that are known in `part`, the object of the language model, and nowhere else.
    """
    if depth > _DEEPEST:
        yield path, f"it is nested deeper than {_DEEPEST} objects"
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        if key in _APART or not isinstance(value, (bool, int, float, str, list, tuple, Mapping)) or not value:
            continue
        inner = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(inner, Mapping):
            yield from _refused_keys(inner, part, read, here, depth + 1)
        known = values is part and key in read
        if known or values.get(SWITCHES.get(key, "")) is False:
            continue
        harmless = any(fnmatchcase(str(key), pattern) for names in HARMLESS.values() for pattern in names)
        if key in CHANGES or (_CHOOSES.search(str(key).lower()) and not harmless):
            yield here, CHANGES.get(key, _UNKNOWN)


def _check_counts(name: str, values: Mapping[str, Any]) -> None:
    for key in _COUNTS:
        if (value := values.get(key)) is not None and not (type(value) is int and 0 <= value < 1 << 16):
            raise ConfigError(
                f"config '{name}': {key} must be an integer of 0 to 65535, got {quoted(value)}."
            )


def check_keys(name: str, family: Family, whole: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for keys that mean a different attention than this family's, at any depth.

    `whole` is the config.json. Keys that are not set, as null, false, 0 or an empty list, are ignored.
    """
    values = language_model(whole)
    read = {*family.ignores, *family.demands, "sink_logits"}  # the last is a field of `MLAConfig`
    for path, reason in _refused_keys(whole, values, read):
        where = shortened(escaped(path))
        raise ConfigError(f"config '{name}': {where} is set, so {reason}; that is not supported.")
    _check_counts(name, values)
    kinds = values.get("layer_types")
    for kind in kinds if isinstance(kinds, list) else ():
        if isinstance(kind, str) and kind not in (_INDEXED_TYPES if family.indexes else _LAYER_TYPES):
            raise ConfigError(f"config '{name}': layer_types names {quoted(kind)}; that is not supported.")
    for key, only in {**DEMANDS, **family.demands}.items():
        value = values.get(key, only)
        alike = value.upper() == only.upper() if isinstance(value, str) and isinstance(only, str) else False
        if value is not None and value != only and not alike:
            raise ConfigError(f"config '{name}': {key} {quoted(value)} is not supported; {only!r} is.")
    for key in family.needs:
        if values.get(key, family.defaults.get(key)) is None:
            raise ConfigError(f"config '{name}': {key} must not be null in this family.")
