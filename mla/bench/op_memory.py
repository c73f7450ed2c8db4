"""Memory that one op alone needs, from lengths."""

from __future__ import annotations

from mla.bench.implementations import SPARE_PAGES, Setting
from mla.bench.op_problem import LOGITS_BYTES, OpProblem
from mla.bench.op_scenario import OpScenario
from mla.config import MLAConfig
from mla.ops import layer_roles

#: The reference's logits, gathered keys, and their fp32 copies, at most.
WORKSPACE = 1 << 30


def device_bytes(setting: Setting, config: MLAConfig, scenario: OpScenario) -> int:
    """Return what one implementation holds: operands, twice for packing or wider rows, and scratch memory."""
    problem = _problem(setting, config, scenario)
    cached = (problem.kind in ("latent_attention", "write_latent")) * _cache_bytes(setting, config, scenario)
    return 2 * problem.work.bytes + cached + WORKSPACE


def host_bytes(setting: Setting, config: MLAConfig, scenario: OpScenario) -> int:
    """Return what the host holds: operands and results, those again in float64, and the yardstick's."""
    operands = _problem(setting, config, scenario).work.bytes
    wide = operands * 8 // setting.dtype.itemsize
    return operands + wide + device_bytes(setting, config, scenario) + 3 * LOGITS_BYTES


def _problem(setting: Setting, config: MLAConfig, scenario: OpScenario) -> OpProblem:
    kind, spec = layer_roles(config, setting.dtype, setting.device)[scenario.role]
    return OpProblem(scenario.role, kind, spec, config, scenario, setting.seed)


def _cache_bytes(setting: Setting, config: MLAConfig, scenario: OpScenario) -> int:
    size = setting.page_size
    pages = sum(-(-length // size) for length in scenario.final_lens) + SPARE_PAGES
    return pages * size * config.latent_dim * setting.dtype.itemsize
