"""Problems of one op: the shapes, seeded operands on the host and the expected results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from mla import cost
from mla.bench.subjects.inputs import generator
from mla.bench.subjects.op import drawing
from mla.bench.workload.grid import Point
from mla.config import MLAConfig
from mla.layer.ops import layer_roles
from mla.verify.op_check import Tensors

if TYPE_CHECKING:
    from mla.bench.subjects.setting import Setting

Shapes = dict[str, tuple[int, ...]]

# The fewest rows of a pool, so that even a call of one row gets another one than most others.
POOL_ROWS = 64
# Blocks of columns of a projection's input that each call fills from rows of their own, and the most bytes of
# float64 products that this may take; beyond them, whole rows change places.
BLOCKS, PARTS_BYTES = 4, 256 << 20
# Queries that have alternatives, and the number of different calls that these must allow.
HOMES, VARIETY, MOST_CHOICES = 20, 2**20, 128


@dataclass
class OpProblem:
    """One op at one shape. `given`: operands by their names in the contract; `truth`: results in float64.

    No two calls get the same operands (`mla.bench.subjects.op.changes`). What changes from call to call is
    therefore a *pool* of more rows than one call takes, each with a row of `truth`. The queries of attention
    are rows [T * h] and then alternatives of some of them. The keys are rows, one request after another; the
    call lays them out. `parts` [blocks, P, .., o] are the products of a projection by block of columns.
    """

    role: str
    kind: str
    spec: Any  # as passed to the op, for the run's device
    config: MLAConfig
    scenario: Point
    seed: int
    given: Tensors = field(default_factory=dict)
    truth: Tensors = field(default_factory=dict)
    parts: torch.Tensor | None = None

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Number of keys each request attends to."""
        return self.scenario.kv_lens(0)

    @property
    def rows(self) -> int:
        """Number of rows the op processes: the whole context for kv_b, new tokens for all others."""
        return sum(self.kv_lens) if self.role == "kv_b_proj" else self.scenario.tokens

    @property
    def pool_rows(self) -> int:
        """Number of rows in the pool of an op that treats every row alone."""
        return max(self.rows, POOL_ROWS)

    @property
    def columns(self) -> list[slice]:
        """The blocks of columns that are filled from rows of their own; one block for most ops."""
        if not self.kind.endswith("linear") or BLOCKS * self._product_bytes > PARTS_BYTES:
            return [slice(None)]
        ends = [self.spec.in_features * part // BLOCKS for part in range(BLOCKS + 1)]
        return [slice(*pair) for pair in pairwise(ends)]

    @property
    def _product_bytes(self) -> int:
        return 8 * self.pool_rows * self.spec.groups * self.spec.out_features

    @property
    def homes(self) -> list[int]:
        """The queries, as rows t * h + head, that have alternatives: evenly spread."""
        queries = self.rows * self.spec.num_heads
        count = min(queries, HOMES)
        return [number * queries // count for number in range(count)]

    @property
    def choices(self) -> int:
        """Number of alternatives of such a query, itself included."""
        return min(ceil(VARIETY ** (1 / len(self.homes))), MOST_CHOICES)

    @property
    def pool_size(self) -> tuple[int, int]:
        """Number of rows in the pool, and of those that one call takes."""
        if not self.kind.endswith("attention"):
            return self.pool_rows, self.rows
        queries = self.rows * self.spec.num_heads
        return queries + len(self.homes) * (self.choices - 1), queries

    @property
    def pool_width(self) -> int:
        """Number of columns of a row of the pool."""
        return _WIDTHS[self.kind](self)

    @property
    def shapes(self) -> Shapes:
        """The shapes of one call's results."""
        return _SHAPES[self.kind](self)

    @property
    def work(self) -> cost.Work:
        """FLOPs and bytes of one call."""
        return _COSTS[self.kind](self)

    def draw(self) -> None:
        """Fill `given` and `truth`, which depend only on the seed and the scenario's name and shape."""
        random = generator(self.seed, self.scenario.name)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=random) * scale).to(self.spec.dtype)

        drawing.DRAWERS[self.kind](self, normal)


def op_problem(setting: Setting, scenario: Point) -> OpProblem:
    """Return the problem of a scenario in its setting, not yet drawn."""
    assert scenario.op is not None
    kind, spec = layer_roles(setting.config, setting.dtype, setting.device)[scenario.op]
    return OpProblem(scenario.op, kind, spec, setting.config, scenario, setting.seed)


_WIDTHS: dict[str, Callable[[OpProblem], int]] = {
    "linear": lambda one: one.spec.in_features,
    "batched_linear": lambda one: one.spec.groups * one.spec.in_features,
    "rms_norm": lambda one: one.spec.features,
    "rotate_query": lambda one: one.spec.num_heads * one.spec.qk_rope_head_dim,
    "write_latent": lambda one: one.config.latent_dim,
    "latent_attention": lambda one: one.config.latent_dim,
    "expanded_attention": lambda one: one.config.qk_head_dim,
}
_SHAPES: dict[str, Callable[[OpProblem], Shapes]] = {
    "linear": lambda one: {"out": (one.rows, one.spec.out_features)},
    "batched_linear": lambda one: {"out": (one.rows, one.spec.groups, one.spec.out_features)},
    "rms_norm": lambda one: {"out": (one.rows, one.spec.features)},
    "rotate_query": lambda one: {"out": (one.rows, one.spec.num_heads, one.spec.qk_rope_head_dim)},
    "write_latent": lambda one: {
        "latent": (one.rows, one.spec.kv_lora_rank),
        "key": (one.rows, one.spec.qk_rope_head_dim),
    },
    "latent_attention": lambda one: {
        "out": (one.rows, one.spec.num_heads, one.spec.kv_lora_rank),
        "lse": (one.rows, one.spec.num_heads),
    },
    "expanded_attention": lambda one: {
        "out": (one.rows, one.spec.num_heads, one.spec.v_head_dim),
        "lse": (one.rows, one.spec.num_heads),
    },
}
_COSTS: dict[str, Callable[[OpProblem], cost.Work]] = {
    "linear": lambda one: cost.linear_cost(one.spec, one.rows),
    "batched_linear": lambda one: cost.linear_cost(one.spec, one.rows),
    "rms_norm": lambda one: cost.rms_norm_cost(one.spec, one.rows),
    "rotate_query": lambda one: cost.rotate_query_cost(one.spec, one.rows),
    "write_latent": lambda one: cost.write_latent_cost(one.spec, one.rows),
    "latent_attention": lambda one: cost.latent_attention_cost(
        one.spec, one.scenario.query_lens, one.kv_lens
    ),
    "expanded_attention": lambda one: cost.expanded_attention_cost(
        one.spec, one.scenario.query_lens, one.kv_lens
    ),
}
