"""Draw the operands of one op's problem at a layer's scales, and compute the results in float64."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from mla.layer.rope import RotaryTable
from mla.verify.op_check import Tensors
from mla.verify.op_oracle import attend, product, true_norm, true_rotation

if TYPE_CHECKING:
    from mla.bench.subjects.op.problem import OpProblem

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Normal = Callable[..., torch.Tensor]  # shape, scale -> N(0, scale^2) in the run's dtype

# The most bytes of float64 logits in one step of the attention oracle.
LOGITS_BYTES = 256 << 20


def _linear(problem: OpProblem, normal: Normal) -> None:
    spec = problem.spec
    x, weight = normal(problem.pool_rows, spec.in_features), _weight(problem, normal, spec.out_features)
    problem.given = {"x": x, "weight": weight}
    if problem.config.attention_bias and problem.role in ("qkv_a_proj", "o_proj"):
        problem.given["bias"] = normal(spec.out_features)
    _multiply(problem)


def _batched_linear(problem: OpProblem, normal: Normal) -> None:
    spec = problem.spec
    x = normal(problem.pool_rows, spec.groups, spec.in_features)
    problem.given = {"x": x, "weight": _weight(problem, normal, spec.groups, spec.out_features)}
    _multiply(problem)


def _weight(problem: OpProblem, normal: Normal, *rows: int) -> torch.Tensor:
    features = problem.spec.in_features
    return normal(*rows, features, scale=features**-0.5)


def _multiply(problem: OpProblem) -> None:
    """Compute the products of all blocks of columns, and their sum."""
    x, weight, bias = (problem.given.get(name) for name in ("x", "weight", "bias"))
    assert x is not None
    assert weight is not None
    products = [product(x[..., part], weight[..., part]) for part in problem.columns]
    if len(products) == 1 and bias is None:
        problem.parts, problem.truth = products[0][None], {"out": products[0]}
        return
    problem.parts = torch.stack(products)
    problem.truth = {"out": problem.parts.sum(0) + (0 if bias is None else bias.double())}


def _rms_norm(problem: OpProblem, normal: Normal) -> None:
    features = problem.spec.features
    x, weight = normal(problem.pool_rows, features), _norm_weight(normal, features)
    problem.given = {"x": x, "weight": weight}
    problem.truth = {"out": true_norm(x, weight, problem.config.rms_norm_eps)}


def _norm_weight(normal: Normal, features: int) -> torch.Tensor:
    weight = normal(features, scale=0.1)
    return 1 + weight


def _rotate_query(problem: OpProblem, normal: Normal) -> None:
    spec = problem.spec
    x, cos_sin = normal(problem.pool_rows, spec.num_heads, spec.qk_rope_head_dim), _angles(problem)
    problem.given = {"x": x, "cos_sin": cos_sin}
    problem.truth = {"out": true_rotation(x, cos_sin, problem.config.rope_interleave)}


def _write_latent(problem: OpProblem, normal: Normal) -> None:
    config, c = problem.config, problem.spec.kv_lora_rank
    kv_a, weight = normal(problem.pool_rows, config.latent_dim), _norm_weight(normal, c)
    cos_sin = _angles(problem)
    problem.given = {"kv_a": kv_a, "weight": weight, "cos_sin": cos_sin}
    problem.truth = {
        "latent": true_norm(kv_a[:, :c], weight, config.rms_norm_eps),
        "key": true_rotation(kv_a[:, c:], cos_sin, config.rope_interleave),
    }


def _angles(problem: OpProblem) -> torch.Tensor:
    """Return [P, r] fp32: cosines and sines of the new tokens' positions, and of others before them."""
    scenario, longest = problem.scenario, max(problem.kv_lens)
    pairs = zip(scenario.history, problem.kv_lens, strict=True)
    table = RotaryTable(problem.config, torch.device("cpu"))
    table.reserve(longest)
    new = torch.cat([torch.arange(*pair) for pair in pairs])
    others = torch.arange(problem.pool_rows - len(new)) * longest // problem.pool_rows
    return table.gather(torch.cat((new, others)))


def _latent_attention(problem: OpProblem, normal: Normal) -> None:
    spec, c = problem.spec, problem.spec.kv_lora_rank
    q = normal(problem.pool_size[0], problem.pool_width)
    q[..., :c] *= (spec.qk_nope_head_dim / c) ** 0.5  # the scale after W_UK
    keys = normal(sum(problem.kv_lens), c + spec.qk_rope_head_dim)
    problem.given = {"q": q, "keys": keys}
    problem.truth = _attend(problem, q, keys[:, None], keys[:, None, :c])


def _expanded_attention(problem: OpProblem, normal: Normal) -> None:
    spec, keys = problem.spec, sum(problem.kv_lens)
    width = problem.pool_width
    q, k = normal(problem.pool_size[0], width), normal(keys, spec.num_heads, width)
    v = normal(keys, spec.num_heads, spec.v_head_dim)
    problem.given = {"q": q, "k": k, "v": v}
    problem.truth = _attend(problem, q, k, v)


def _attend(problem: OpProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Attend the pool of queries q [n, dk]: a call's own, request by request, and the alternatives."""
    heads, scale = problem.spec.num_heads, problem.spec.softmax_scale
    tokens, keys = problem.scenario.query_lens, problem.kv_lens
    own = q[: problem.rows * heads].unflatten(0, (-1, heads))
    found = []
    for request in zip(own.split(tokens), k.split(keys), v.split(keys), strict=True):
        parts = [attend(*some, scale, True) for some in _by_heads(*request)]
        found.append([torch.cat(part, dim=1).flatten(0, 1) for part in zip(*parts, strict=True)])
    found.append(_attend_alternatives(problem, q, k, v))
    out, lse = (torch.cat(part) for part in zip(*found, strict=True))
    return {"out": out, "lse": lse}


def _attend_alternatives(
    problem: OpProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> list[torch.Tensor]:
    """Return out and lse of the alternatives: each sees the keys that the query it stands for sees."""
    heads, scale, others = problem.spec.num_heads, problem.spec.softmax_scale, problem.choices - 1
    queries, keys = problem.scenario.query_lens, problem.kv_lens
    starts, first_keys = [0, *accumulate(queries)], [0, *accumulate(keys)]
    alternatives = q[problem.rows * heads :].split(others)
    found = []
    for home, some in zip(problem.homes, alternatives, strict=True):
        token, head = divmod(home, heads)
        request = bisect_right(starts, token) - 1
        seen = keys[request] - queries[request] + token - starts[request] + 1
        rows = slice(first_keys[request], first_keys[request] + seen)
        one = slice(head, head + 1) if k.shape[1] > 1 else slice(None)
        found.append([part[0] for part in attend(some[None], k[rows, one], v[rows, one], scale, False)])
    return [torch.cat(part) for part in zip(*found, strict=True)]


def _by_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Triple]:
    """Yield heads of q with their keys and values, which all heads may share."""
    count = max(1, LOGITS_BYTES // (8 * q.shape[0] * k.shape[0]))
    for start in range(0, q.shape[1], count):
        heads = slice(start, start + count)
        k_part, v_part = (x if x.shape[1] == 1 else x[:, heads] for x in (k, v))
        yield q[:, heads], k_part, v_part


DRAWERS: dict[str, Callable[[OpProblem, Normal], None]] = {
    "linear": _linear,
    "batched_linear": _batched_linear,
    "rms_norm": _rms_norm,
    "rotate_query": _rotate_query,
    "write_latent": _write_latent,
    "latent_attention": _latent_attention,
    "expanded_attention": _expanded_attention,
}
