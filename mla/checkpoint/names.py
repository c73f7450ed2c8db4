"""What a tensor's name says: the attention it belongs to, and which of its weights it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

# DeepSeek's own names (`inference/convert.py` of DeepSeek-V3) -> Hugging Face's.
_OWN = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}
KNOWN = frozenset(_OWN.values())
# Other attentions do not have these, so any one of them identifies MLA.
_SIGNATURE = frozenset(f"{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))
# First words of names outside attention, where the attention's own names have no prefix.
_OTHERS = re.compile(
    r"(model|language_model|layers|lm_head|head|embed(_tokens)?|norm|mlp|ffn|block_sparse_moe"
    r"|(input|post_attention)_layernorm|(attn|ffn)_norm)(\.|$)"
)
_IN_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?)layers\.(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL)
_IN_MODULE = re.compile(
    r"(?P<prefix>(?:.*?\.)?)(?P<module>self_attn|attn)\.(?:(?P<part>[0-9]{1,3})\.)?(?P<name>.+)", re.DOTALL
)


@dataclass(frozen=True)
class Location:
    """One attention of a checkpoint.

    `layer` is None where names carry no number. `part` counts the attentions of a layer that has several.
    """

    prefix: str  # before `layers.N.` or `self_attn.`, such as "model."
    layer: int | None
    module: str  # "self_attn", "attn" or "" for bare names
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
    head = _OWN.get(head, head)
    if head in KNOWN and tail == "scale":
        tail = "weight_scale_inv"
    return f"{head}.{tail}" if tail else head


def is_mla(names: frozenset[str] | set[str]) -> bool:
    """Return whether these are the weight names of a latent attention."""
    return not _SIGNATURE.isdisjoint(names)
