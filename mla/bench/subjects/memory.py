"""The memory that a scenario of the layer needs, from its lengths."""

from __future__ import annotations

from mla import cost
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.grid import Point
from mla.bench.workload.scenario import Scenario
from mla.layer.plan import WORKSPACE_BYTES

# The reference's logits, rebuilt keys and values, and their fp32 copies, at most.
WORKSPACE = 1 << 30


def device_bytes(setting: Setting, scenario: Point) -> int:
    """Return what one implementation holds on the device."""
    config, size = setting.config, setting.page_size
    slots = (sum(-(-length // size) for length in scenario.final_lens) + SPARE_PAGES) * size
    activations = scenario.tokens * 4 * config.num_attention_heads * config.latent_dim
    hidden = 2 * scenario.inputs * scenario.tokens * config.hidden_size
    weights = cost.parameters(config) + cost.kv_b_parameters(config)  # kv_b is packed for both its uses
    longest = 4 * max(scenario.final_lens) * config.latent_dim  # one request's keys, gathered and widened
    per_layer = weights + slots * config.latent_dim + activations + hidden
    scratch = WORKSPACE + (scenario.layers - 1) * _kept_bytes(setting, scenario)
    return (longest + scenario.layers * per_layer) * setting.dtype.itemsize + scratch


def _kept_bytes(setting: Setting, scenario: Scenario) -> int:
    """Return the rebuilt keys and values that each layer keeps memory for; absorbed attention has none."""
    if setting.attention == "absorbed" or (max(scenario.query_lens) == 1 and setting.attention == "auto"):
        return 0
    config = setting.config
    row = config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    size = sum(scenario.final_lens) * row * config.num_attention_heads * setting.dtype.itemsize
    return min(size, WORKSPACE_BYTES)


def host_bytes(setting: Setting, scenario: Point) -> int:
    """Return what the host holds: weights, inputs, and the oracle in float64."""
    config = setting.config
    copies = 1 if scenario.layers == 1 else 2  # of the layer that is being rolled
    weights = cost.parameters(config) * (copies * setting.dtype.itemsize + 8)
    rows = scenario.inputs * scenario.tokens
    oracle = 8 * rows * (3 * config.hidden_size + 4 * config.num_attention_heads * config.qk_head_dim)
    logits = (
        3
        * 8
        * max(
            new * scenario.inputs * final
            for new, final in zip(scenario.query_lens, scenario.final_lens, strict=True)
        )
    )
    history = sum(scenario.history) * config.latent_dim * (8 + setting.dtype.itemsize)
    return weights + oracle + logits + history
