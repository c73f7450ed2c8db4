"""Memory that one op alone needs, from lengths."""

from __future__ import annotations

from mla.bench.subjects.op.problem import LOGITS_BYTES, op_problem
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.grid import Point

#: The reference's logits, gathered keys, and their fp32 copies, at most.
WORKSPACE = 1 << 30


def device_bytes(setting: Setting, scenario: Point) -> int:
    """Return what one implementation holds: operands, twice for packing or wider rows, and scratch memory."""
    problem = op_problem(setting, scenario)
    cached = _cache_bytes(setting, scenario) if problem.kind in ("latent_attention", "write_latent") else 0
    return 2 * problem.work.bytes + cached + WORKSPACE


def host_bytes(setting: Setting, scenario: Point) -> int:
    """Return what the host holds: operands and results, those again in float64, and the reference's."""
    operands = op_problem(setting, scenario).work.bytes
    wide = operands * 8 // setting.dtype.itemsize
    return operands + wide + device_bytes(setting, scenario) + 3 * LOGITS_BYTES


def _cache_bytes(setting: Setting, scenario: Point) -> int:
    size = setting.page_size
    pages = sum(-(-length // size) for length in scenario.final_lens) + SPARE_PAGES
    return pages * size * setting.config.latent_dim * setting.dtype.itemsize
