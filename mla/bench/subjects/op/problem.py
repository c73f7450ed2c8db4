"""Problems of one op: operands on the host, drawn from a seed at a layer's scales, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mla import cost
from mla.bench.subjects.inputs import generator
from mla.bench.workload.grid import Point
from mla.config import MLAConfig
from mla.layer.ops import layer_roles
from mla.layer.rope import RotaryTable
from mla.verify.op_check import Tensors
from mla.verify.op_oracle import attend, product, true_norm, true_rotation

if TYPE_CHECKING:
    from mla.bench.subjects.setting import Setting

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Bytes that the float64 logits of one step of the attention oracle may take.
LOGITS_BYTES = 256 << 20


@dataclass
class OpProblem:
    """One op at one shape. `given` are operands by their names in the contract, `truth` results in float64.

    The keys of attention are in `given` as rows of all requests, one request after the other; how they are
    laid out is up to the call.
    """

    role: str
    kind: str
    spec: Any  # as the op gets it, of the run's device
    config: MLAConfig
    scenario: Point
    seed: int
    given: Tensors = field(default_factory=dict)
    truth: Tensors = field(default_factory=dict)

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys each request attends."""
        return self.scenario.kv_lens(0)

    @property
    def rows(self) -> int:
        """Rows that go through the op: kv_b expands the whole context, all others see new tokens."""
        return sum(self.kv_lens) if self.role == "kv_b_proj" else self.scenario.tokens

    @property
    def work(self) -> cost.Work:
        """What one call needs."""
        return _COSTS[self.kind](self)

    def draw(self) -> None:
        """Fill `given` and `truth`; they depend on the seed and the scenario's name and shape only."""
        random = generator(self.seed, self.scenario.name)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=random) * scale).to(self.spec.dtype)

        _DRAWERS[self.kind](self, normal)


def op_problem(setting: Setting, scenario: Point) -> OpProblem:
    """Return the problem of a scenario in its own setting; nothing is drawn yet."""
    assert scenario.op is not None
    kind, spec = layer_roles(setting.config, setting.dtype, setting.device)[scenario.op]
    return OpProblem(scenario.op, kind, spec, setting.config, scenario, setting.seed)


Normal = Callable[..., torch.Tensor]  # shape, scale -> N(0, scale^2) in the run's dtype


def _linear(problem: OpProblem, normal: Normal) -> None:
    spec = problem.spec
    x, weight = normal(problem.rows, spec.in_features), _weight(problem, normal, spec.out_features)
    problem.given = {"x": x, "weight": weight}
    if problem.config.attention_bias and problem.role in ("qkv_a_proj", "o_proj"):
        problem.given["bias"] = normal(spec.out_features)
    problem.truth = {"out": product(x, weight, problem.given.get("bias"))}


def _batched_linear(problem: OpProblem, normal: Normal) -> None:
    spec = problem.spec
    x = normal(problem.rows, spec.groups, spec.in_features)
    weight = _weight(problem, normal, spec.groups, spec.out_features)
    problem.given, problem.truth = {"x": x, "weight": weight}, {"out": product(x, weight)}


def _weight(problem: OpProblem, normal: Normal, *rows: int) -> torch.Tensor:
    features = problem.spec.in_features
    return normal(*rows, features, scale=features**-0.5)


def _rms_norm(problem: OpProblem, normal: Normal) -> None:
    x, weight = normal(problem.rows, problem.spec.features), _norm_weight(normal, problem.spec.features)
    problem.given = {"x": x, "weight": weight}
    problem.truth = {"out": true_norm(x, weight, problem.config.rms_norm_eps)}


def _norm_weight(normal: Normal, features: int) -> torch.Tensor:
    weight = normal(features, scale=0.1)
    return 1 + weight


def _rotate_query(problem: OpProblem, normal: Normal) -> None:
    spec = problem.spec
    x, cos_sin = normal(problem.rows, spec.num_heads, spec.qk_rope_head_dim), _angles(problem)
    problem.given = {"x": x, "cos_sin": cos_sin}
    problem.truth = {"out": true_rotation(x, cos_sin, problem.config.rope_interleave)}


def _write_latent(problem: OpProblem, normal: Normal) -> None:
    config, c = problem.config, problem.spec.kv_lora_rank
    kv_a, weight, cos_sin = normal(problem.rows, config.latent_dim), _norm_weight(normal, c), _angles(problem)
    problem.given = {"kv_a": kv_a, "weight": weight, "cos_sin": cos_sin}
    problem.truth = {
        "latent": true_norm(kv_a[:, :c], weight, config.rms_norm_eps),
        "key": true_rotation(kv_a[:, c:], cos_sin, config.rope_interleave),
    }


def _angles(problem: OpProblem) -> torch.Tensor:
    """Return [T, r] fp32: cosines and sines of the new tokens' positions."""
    scenario = problem.scenario
    pairs = zip(scenario.history, problem.kv_lens, strict=True)
    table = RotaryTable(problem.config, torch.device("cpu"))
    table.reserve(max(problem.kv_lens))
    return table.gather(torch.cat([torch.arange(*pair) for pair in pairs]))


def _latent_attention(problem: OpProblem, normal: Normal) -> None:
    spec, c = problem.spec, problem.spec.kv_lora_rank
    q = normal(problem.rows, spec.num_heads, c + spec.qk_rope_head_dim)
    q[..., :c] *= (spec.qk_nope_head_dim / c) ** 0.5  # as W_UK leaves them
    keys = normal(sum(problem.kv_lens), c + spec.qk_rope_head_dim)
    problem.given = {"q": q, "keys": keys}
    problem.truth = _attend(problem, q, keys[:, None], keys[:, None, :c])


def _expanded_attention(problem: OpProblem, normal: Normal) -> None:
    spec, keys = problem.spec, sum(problem.kv_lens)
    width = spec.qk_nope_head_dim + spec.qk_rope_head_dim
    q, k = normal(problem.rows, spec.num_heads, width), normal(keys, spec.num_heads, width)
    v = normal(keys, spec.num_heads, spec.v_head_dim)
    problem.given = {"q": q, "k": k, "v": v}
    problem.truth = _attend(problem, q, k, v)


def _attend(problem: OpProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Attend request by request, so many heads at a time that logits stay small."""
    scale, tokens, keys = problem.spec.softmax_scale, problem.scenario.query_lens, problem.kv_lens
    found = []
    for request in zip(q.split(tokens), k.split(keys), v.split(keys), strict=True):
        parts = [attend(*heads, scale, True) for heads in _by_heads(*request)]
        found.append([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])
    out, lse = (torch.cat(part) for part in zip(*found, strict=True))
    return {"out": out, "lse": lse}


def _by_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Triple]:
    """Yield heads of q with their keys and values, which may be one for all."""
    count = max(1, LOGITS_BYTES // (8 * q.shape[0] * k.shape[0]))
    for start in range(0, q.shape[1], count):
        heads = slice(start, start + count)
        k_part, v_part = (x if x.shape[1] == 1 else x[:, heads] for x in (k, v))
        yield q[:, heads], k_part, v_part


_DRAWERS: dict[str, Callable[[OpProblem, Normal], None]] = {
    "linear": _linear,
    "batched_linear": _batched_linear,
    "rms_norm": _rms_norm,
    "rotate_query": _rotate_query,
    "write_latent": _write_latent,
    "latent_attention": _latent_attention,
    "expanded_attention": _expanded_attention,
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
