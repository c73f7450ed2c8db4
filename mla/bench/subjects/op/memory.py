"""The memory that one op alone needs, from its lengths."""

from __future__ import annotations

from mla.bench.subjects.memory import WORKSPACE
from mla.bench.subjects.op.drawing import LOGITS_BYTES
from mla.bench.subjects.op.outputs import buffers, numbers
from mla.bench.subjects.op.problem import OpProblem
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.grid import Point


def device_bytes(setting: Setting, problem: OpProblem) -> int:
    """Return what one implementation holds.

    These are operands, twice for packing or wider rows, the pool that they are taken from, the buffers of a
    pass's results and scratch memory.
    """
    cached = problem.kind in ("latent_attention", "write_latent")
    cache = _cache_bytes(setting, problem.scenario) if cached else 0
    return 2 * problem.work.bytes + cache + _pool_bytes(problem) + output_bytes(problem) + WORKSPACE


def host_bytes(setting: Setting, problem: OpProblem, on_device: int) -> int:
    """Return what the host holds for all implementations together; results of a pass are not among it.

    These are operands and results, those again in float64, the reference's, and what one call must write.
    """
    operands = problem.work.bytes + _pool_bytes(problem)
    wide = operands * 8 // setting.dtype.itemsize
    judged = 4 * 8 * numbers(problem)
    return operands + wide + on_device + judged + 3 * LOGITS_BYTES


def output_bytes(problem: OpProblem) -> int:
    """Return what the results of a pass take, in all their buffers."""
    count = buffers(problem, problem.scenario.steps)
    return count * numbers(problem) * problem.spec.dtype.itemsize


def _pool_bytes(problem: OpProblem) -> int:
    """Return what the pool takes, and the rows that a call takes from it before they are in place."""
    rows, taken = problem.pool_size
    return (rows + taken) * problem.pool_width * problem.spec.dtype.itemsize


def _cache_bytes(setting: Setting, point: Point) -> int:
    size = setting.page_size
    pages = sum(-(-length // size) for length in point.final_lens) + SPARE_PAGES
    return pages * size * setting.config.latent_dim * setting.dtype.itemsize
