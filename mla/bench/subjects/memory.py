"""The memory that a scenario of the layer needs, from its lengths."""

from __future__ import annotations

from dataclasses import dataclass

from mla import cost
from mla.bench.subjects import shelf, turns
from mla.bench.subjects.inputs import oracle_runs
from mla.bench.subjects.setting import SPARE_PAGES, Setting, make_ops
from mla.bench.workload.grid import Point
from mla.bench.workload.scenario import Scenario
from mla.config import MLAConfig
from mla.cost.step import head_parameters
from mla.layer.expansion import WORKSPACE_BYTES, grown_bytes, rebuilt_bytes
from mla.verify.oracle_cost import oracle_bytes

# The reference's logits, gathered keys, and masks of two decode steps, and what the layer rebuilds, at most.
WORKSPACE = 1 << 30


def device_bytes(setting: Setting, scenario: Point) -> int:
    """Return what one implementation holds on the device, of all ranks that are simulated there."""
    config, size = setting.config, setting.page_size
    copies = copies_of(setting)
    pages = sum(-(-length // size) + copies.shards for length in scenario.final_lens)
    slots = (copies.cache * pages + setting.here * SPARE_PAGES) * size
    activations = copies.queries * scenario.tokens * 4 * config.num_attention_heads * config.latent_dim
    inputs = _input_numbers(setting, scenario)
    weights = _weights(config, setting.here, copies.heads)
    longest = 4 * max(scenario.final_lens) * config.latent_dim  # one request's keys, gathered and widened
    per_layer = weights + slots * config.latent_dim + activations
    scratch = WORKSPACE + (scenario.layers - 1) * _kept_bytes(setting, scenario)
    scratch += _grown_bytes(setting, scenario) + output_bytes(setting, scenario)
    scratch += 2 * copies.parts * scenario.tokens * config.hidden_size * setting.dtype.itemsize
    return (longest + inputs + scenario.layers * per_layer) * setting.dtype.itemsize + scratch


@dataclass(frozen=True)
class Copies:
    """How often the ranks that are simulated on one device hold what one device holds once."""

    heads: int = 1  # the weights of heads
    cache: int = 1  # the latents of a request
    shards: int = 0  # further pages of a request, since each rank has a last one
    queries: int = 1  # those of all heads, and outputs that are kept
    parts: int = 0  # of the output, before they are added up


def copies_of(setting: Setting) -> Copies:
    """Return what is there more than once."""
    layout = getattr(setting.ranks, "layout", None) if setting.here > 1 else None
    if layout is None:
        return Copies()
    return Copies(layout.dp, layout.tp, layout.dcp - 1, layout.dcp, layout.head_parts)


def _weights(config: MLAConfig, ranks: int, head_copies: int) -> int:
    """Return the number of packed weights of all ranks here; kv_b is packed for both its uses."""
    heads = head_parameters(config)
    shared = cost.parameters(config) - heads
    return ranks * shared + head_copies * (heads + cost.kv_b_parameters(config))


def output_bytes(setting: Setting, scenario: Point) -> int:
    """Return what the outputs of a pass take, of all layers and in all their buffers."""
    size = scenario.layers * scenario.tokens * setting.config.hidden_size * setting.dtype.itemsize
    return copies_of(setting).queries * shelf.buffers(scenario.steps, size) * size


def _input_numbers(setting: Setting, scenario: Point) -> int:
    """Return the hidden states' numbers: those of the present turn, the plain ones and all others."""
    count = turns.choices(scenario, signed=not setting.config.attention_bias) - 1
    rows = scenario.inputs * scenario.tokens
    others = len(scenario.query_lens) if scenario.mode == "prefill" else rows
    return (2 * rows + count * others) * setting.config.hidden_size


def _expanded_lens(setting: Setting, scenario: Scenario) -> list[int]:
    """Return the final lengths of the requests whose keys and values are rebuilt in any forward."""
    lengths = list(scenario.final_lens)
    if setting.attention != "auto":
        return lengths if setting.attention == cost.EXPANDED else []
    chooser = cost.PathChooser(setting.config)
    ends = zip(scenario.query_lens, scenario.kv_lens(0), lengths, strict=True)
    return [
        last
        for new, first, last in ends
        if new and cost.EXPANDED in (chooser.path(new, first), chooser.path(new, last))
    ]


def _kept_bytes(setting: Setting, scenario: Scenario) -> int:
    """Return the rebuilt keys and values that each layer keeps memory for; absorbed attention has none."""
    lengths = _expanded_lens(setting, scenario)
    return min(rebuilt_bytes(setting.config, setting.dtype.itemsize, sum(lengths)), WORKSPACE_BYTES)


def _grown_bytes(setting: Setting, scenario: Scenario) -> int:
    """Return what the longest request takes where its op needs all of it at once; layers use it in turn."""
    keys = max(_expanded_lens(setting, scenario), default=0)
    config, itemsize = setting.config, setting.dtype.itemsize
    if rebuilt_bytes(config, itemsize, keys) <= WORKSPACE_BYTES or _merges(setting):
        return 0
    return grown_bytes(config, itemsize, keys)


def _merges(setting: Setting) -> bool:
    """Return whether the op can merge parts of a context. Raises `UnsupportedOps`."""
    return make_ops(setting)["expanded_attention"].op.writes_lse


def host_bytes(setting: Setting, scenario: Point) -> int:
    """Return what the host holds for all implementations together; outputs of a pass are not among it.

    These are weights, inputs, the oracle in float64, and one forward's rows with those that are expected.
    """
    config, itemsize = setting.config, setting.dtype.itemsize
    copies = 1 if scenario.layers == 1 else 2  # of the layer that is being rolled
    weights = cost.parameters(config) * (copies * itemsize + 8)
    history = sum(scenario.history) * config.latent_dim * itemsize
    judged = scenario.tokens * config.hidden_size * (itemsize + 4 * 8)
    return weights + history + judged + oracle_bytes(config, oracle_runs(config, scenario), itemsize)
