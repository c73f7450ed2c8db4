"""The memory that a scenario of the layer needs, from its lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mla import cost
from mla.bench.subjects.base import buffers
from mla.bench.subjects.inputs import Requests, choices, oracle_runs
from mla.bench.subjects.setting import SPARE_PAGES, Setting, implementation_setting, make_ops
from mla.bench.workload.grid import Point
from mla.bench.workload.implementations import OURS, parse_one
from mla.bench.workload.scenario import Scenario
from mla.config import MLAConfig
from mla.cost.step import head_parameters
from mla.layer.expansion import WORKSPACE_BYTES, grown_bytes, rebuilt_bytes
from mla.layer.ops import Ops
from mla.layer.rope import RotaryTable
from mla.parallel.exchange import scratch_per_token
from mla.parallel.layout import Layout
from mla.verify.oracle_cost import oracle_bytes

# The reference's logits, gathered keys, and masks of two decode steps, and what the layer rebuilds, at most.
WORKSPACE = 1 << 30
# Roles whose packed weights may be views of one tensor: they count as shared if all of them are.
GROUPS = (("qkv_a_proj",), ("q_b_proj",), ("o_proj",), ("kv_b_proj", "w_uk", "w_uv"))


@dataclass(frozen=True)
class Copies:
    """What one device holds of a layer that is spread over ranks, next to what it holds of a whole one."""

    ranks: int = 1  # that run there
    heads: int = 1  # the weights of heads
    cache: int = 1  # the latents of a request
    shards: int = 0  # further pages of a request, since each rank has a last one
    share: int = 1  # ranks that the tokens of a request are spread over
    outputs: int = 1  # that are kept
    parts: int = 0  # of the output, before they are added up
    kept: int = 0  # bytes of scratch that ranks keep while they wait for their turn, and of what they sent


def device_bytes(setting: Setting, scenario: Point) -> int:
    """Return what one implementation holds on the device.

    Of ranks that are simulated there, it is what all hold; else of the rank that holds most.
    """
    layout = None if setting.ranks is None else setting.ranks.layout
    if layout is None:
        return _held(setting, scenario, Copies())
    heads = setting.config.num_attention_heads // layout.head_parts
    own = replace(setting, config=setting.config.with_heads(heads), ranks=None)
    blocks = [Requests.of(scenario, part, layout.dp).scenario(scenario) for part in range(layout.dp)]
    if setting.here > 1:
        each = (_kept_bytes(own, one) + _with_sent(_context_bytes(own, one, layout.dcp)) for one in blocks)
        return _held(setting, scenario, _simulated(layout, layout.head_parts * sum(each)))
    held = [
        _held(own, one, Copies(share=layout.dcp, kept=_context_bytes(own, one, layout.dcp)), of=scenario)
        for one in blocks
    ]
    return max(held)


def _simulated(layout: Layout, kept: int) -> Copies:
    """Return what a device holds that runs all ranks of a layout."""
    return Copies(
        ranks=layout.world,
        heads=layout.dp,
        cache=layout.tp,
        shards=layout.dcp - 1,
        outputs=layout.dcp,
        parts=layout.head_parts,
        kept=kept,
    )


def _held(setting: Setting, scenario: Point, copies: Copies, of: Point | None = None) -> int:
    """Return the bytes of a scenario's requests; `of`: all requests, by which output buffers are counted."""
    config, size, itemsize = setting.config, setting.page_size, setting.dtype.itemsize
    lengths = [-(-length // copies.share) for length in scenario.final_lens]  # on the rank that has most
    pages = sum(-(-length // size) + copies.shards for length in lengths)
    slots = (copies.cache * pages + copies.ranks * SPARE_PAGES) * size
    activations = scenario.tokens * 4 * config.num_attention_heads * config.latent_dim
    inputs = _input_numbers(setting, scenario)
    weights = _weights(config, copies.ranks, copies.heads)
    longest = 4 * max(lengths) * config.latent_dim  # one request's keys, gathered and widened
    per_layer = weights + slots * config.latent_dim + activations
    scratch = WORKSPACE + copies.kept + (scenario.layers - 1) * _kept_bytes(setting, scenario)
    scratch += _grown_bytes(setting, scenario)
    scratch += copies.outputs * _kept_outputs(setting, scenario, of or scenario)
    scratch += copies.ranks * scenario.layers * RotaryTable.bytes_for(config, max(scenario.final_lens))
    scratch += 2 * copies.parts * scenario.tokens * config.hidden_size * itemsize
    return (longest + inputs + scenario.layers * per_layer) * itemsize + scratch


def _weights(config: MLAConfig, ranks: int, head_copies: int) -> int:
    """Return the number of packed weights of all ranks here; kv_b is packed for both its uses."""
    heads = head_parameters(config)
    shared = cost.parameters(config) - heads
    return ranks * shared + head_copies * (heads + cost.kv_b_parameters(config))


def output_bytes(setting: Setting, scenario: Point) -> int:
    """Return what the outputs of a pass take, of all layers, requests and buffers."""
    return _kept_outputs(setting, scenario, scenario)


def _kept_outputs(setting: Setting, scenario: Point, of: Point) -> int:
    """Return the bytes of a scenario's outputs, in as many buffers as there are for those `of` another."""
    each = setting.config.hidden_size * setting.dtype.itemsize
    return buffers(of.steps, of.layers * of.tokens * each) * scenario.layers * scenario.tokens * each


def gathered(setting: Setting) -> int:
    """Return how often the host holds the outputs of a pass that is being checked.

    Each is there once per rank that has it; while it comes from other processes, twice.
    """
    layout = None if setting.ranks is None else setting.ranks.layout
    if layout is None:
        return 1
    return layout.dcp if setting.here > 1 else 2 * layout.head_parts


def other_bytes(setting: Setting, scenario: Point, lazy: bool) -> int:
    """Return what a rank that has no oracle holds on its host, apart from what is on its device.

    `lazy`: it reads its own weights from a checkpoint; random ones are drawn whole, from the seed.
    """
    weights = 0 if lazy else cost.parameters(setting.config)
    history = sum(scenario.history) * setting.config.latent_dim
    numbers = weights + history + _input_numbers(setting, scenario)
    return numbers * setting.dtype.itemsize + 2 * output_bytes(setting, scenario)


def _input_numbers(setting: Setting, scenario: Point) -> int:
    """Return the hidden states' numbers: those of the present turn, the plain ones and all others."""
    count = choices(scenario, signed=not setting.config.attention_bias) - 1
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


def _context_bytes(setting: Setting, scenario: Scenario, dcp: int) -> int:
    """Return the queries and results of all ranks that share a context, on a rank with this setting."""
    if dcp == 1:
        return 0
    per_token = scratch_per_token(setting.config, dcp, setting.dtype.itemsize)
    return min(scenario.tokens * per_token, WORKSPACE_BYTES)


def _with_sent(context: int) -> int:
    """Return that with what a simulated rank has sent, which is kept: its queries, and results once."""
    return context * 5 // 4


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


def shared_bytes(setting: Setting, names: Sequence[str], with_reference: bool) -> int:
    """Return the bytes that these implementations save on the device when they exist together.

    `with_reference`: a copy of the reference, of one layer, exists as well.
    """
    parsed = [named for named in map(parse_one, names) if named.base in OURS]
    ops = [make_ops(implementation_setting(setting, named)) for named in parsed]
    reference = make_ops(implementation_setting(setting, parse_one(OURS[1]))) if with_reference else None
    groups = [group for group in GROUPS if ops and group[0] in ops[0].names()]
    return sum(_saved(group, ops, reference, setting) for group in groups)


def _saved(group: Sequence[str], ops: Sequence[Ops], reference: Ops | None, setting: Setting) -> int:
    layouts = [tuple(one[role].key() for role in group) for one in ops]
    copies = (len(layouts) - len(set(layouts))) * setting.layers
    if reference is not None:
        copies += tuple(reference[role].key() for role in group) in layouts
    specs = [ops[0][role].spec for role in group]
    size = sum(spec.groups * spec.in_features * spec.out_features for spec in specs)
    return copies * size * setting.dtype.itemsize
