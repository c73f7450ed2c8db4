"""FLOPs and bytes that are needed, from actual lengths."""

from mla.cost.by_op import (
    attended_pairs,
    expanded_attention_cost,
    latent_attention_cost,
    linear_cost,
    rms_norm_cost,
    rotate_query_cost,
    write_latent_cost,
)
from mla.cost.step import (
    ABSORBED,
    EXPANDED,
    PathChooser,
    absorbed_flops,
    expanded_flops,
    kv_b_parameters,
    parameters,
    projection_parameters,
    step_bytes,
    step_flops,
)
from mla.cost.work import Work

__all__ = [
    "ABSORBED",
    "EXPANDED",
    "PathChooser",
    "Work",
    "absorbed_flops",
    "attended_pairs",
    "expanded_attention_cost",
    "expanded_flops",
    "kv_b_parameters",
    "latent_attention_cost",
    "linear_cost",
    "parameters",
    "projection_parameters",
    "rms_norm_cost",
    "rotate_query_cost",
    "step_bytes",
    "step_flops",
    "write_latent_cost",
]
