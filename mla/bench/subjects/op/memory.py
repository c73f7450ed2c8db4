"""The memory that one op alone needs, from its lengths."""

from __future__ import annotations

from mla.bench.subjects.memory import WORKSPACE
from mla.bench.subjects.op.problem import LOGITS_BYTES, OpProblem
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.grid import Point


def device_bytes(setting: Setting, problem: OpProblem) -> int:
    """Return what one implementation holds: operands, twice for packing or wider rows, and scratch memory."""
    cached = problem.kind in ("latent_attention", "write_latent")
    return 2 * problem.work.bytes + (_cache_bytes(setting, problem.scenario) if cached else 0) + WORKSPACE


def host_bytes(setting: Setting, problem: OpProblem, on_device: int) -> int:
    """Return what the host holds: operands and results, those again in float64, and the reference's."""
    operands = problem.work.bytes
    wide = operands * 8 // setting.dtype.itemsize
    return operands + wide + on_device + 3 * LOGITS_BYTES


def _cache_bytes(setting: Setting, point: Point) -> int:
    size = setting.page_size
    pages = sum(-(-length // size) for length in point.final_lens) + SPARE_PAGES
    return pages * size * setting.config.latent_dim * setting.dtype.itemsize
