"""Exact changes of an op's operands, a different one for every call, with results that are known.

A call takes rows from a pool and turns signs, in ways that move and turn the rows of the result alike:

- projections: every block of columns of a row comes from a row of its own, with a sign of its own
- rms_norm, rotate_query, write_latent: rows change places; a sign per column, or per rotated pair of columns
- latent_attention: heads change places, and some queries are replaced by an alternative; a sign per column of
  queries and keys, which keeps the scores and turns the result
- expanded_attention: some queries are replaced; a sign per head and column of queries and keys, and of values

Signs and moves are exact in every dtype. They follow from the seed, the number of the pass and the index of
the call, so that all implementations get the same operands. Keys and values change in place, once per pass;
all else changes with every call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mla.bench.subjects.op.problem import OpProblem
from mla.verify.op_check import Tensors


@dataclass(frozen=True)
class Change:
    """The operands of one call. `signs`: of operands (per block of columns, [blocks, ..]) and of results."""

    rows: torch.Tensor  # [blocks, n] int64: which rows of the pool
    signs: Tensors = field(default_factory=dict)


def change(problem: OpProblem, number: int, index: int) -> Change:
    """Return the change of call `index` in pass `number`."""
    return _CHANGES[problem.kind](problem, number, index)


def pass_signs(problem: OpProblem, number: int) -> Tensors:
    """Return the signs of the operands that change once per pass, by name."""
    draw, spec = _random(problem, number), problem.spec
    if problem.kind == "latent_attention":
        return {"keys": _signs(draw, spec.kv_lora_rank + spec.qk_rope_head_dim)}
    if problem.kind == "expanded_attention":
        width = spec.qk_nope_head_dim + spec.qk_rope_head_dim
        return {"k": _signs(draw, spec.num_heads, width), "v": _signs(draw, spec.num_heads, spec.v_head_dim)}
    return {}


def covering(problem: OpProblem) -> Iterator[Change]:
    """Yield changes without signs that together take every row of the pool, or all but a few of many."""
    if not problem.kind.endswith("attention"):
        blocks = len(problem.columns)
        for start in range(0, problem.pool_rows, problem.rows):
            rows = torch.arange(start, start + problem.rows) % problem.pool_rows
            yield Change(rows.expand(blocks, -1))
        return
    count = problem.choices if problem.choices > 2 else 1  # of many queries, the alternatives are a few
    for choice in range(count):
        yield Change(_chosen(problem, torch.full((len(problem.homes),), choice))[None])


@dataclass(frozen=True)
class ChangedTruth:
    """What a call must write, given its change, as `mla.verify.op_check.CallTruth`."""

    problem: OpProblem
    change: Change

    def expected(self, name: str) -> torch.Tensor:
        """Return what the call must write to the result `name`, in float64 on the host."""
        problem, one = self.problem, self.change
        if problem.parts is None:
            rows = problem.truth[name].index_select(0, one.rows[0]).view(problem.shapes[name])
            return rows * one.signs[name] if name in one.signs else rows
        total = torch.zeros(problem.shapes[name], dtype=torch.float64)
        for part, rows, signs in zip(problem.parts, one.rows, one.signs["x"], strict=True):
            total += part.index_select(0, rows) * signs
        return total + problem.given["bias"].double() if "bias" in problem.given else total

    def reference_errors(self, name: str, known: torch.Tensor) -> torch.Tensor:
        """Return the reference's error in every row of the result, from those of the pool.

        Rows that it was not run on, such as those put together from others, count as its worst.
        """
        problem, shape, worst = self.problem, self.problem.shapes[name][:-1], known[known.isfinite()].max()
        if "bias" in problem.given or len(problem.columns) > 1:
            return worst.expand(shape)
        return known.nan_to_num(nan=worst.item()).index_select(0, self.change.rows[0]).view(shape)


def _random(problem: OpProblem, *numbers: int) -> torch.Generator:
    words = (problem.seed, problem.scenario.name, *numbers)
    return torch.Generator().manual_seed(random.Random(repr(words)).getrandbits(63))


def _signs(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=draw).mul_(2).sub_(1).float()


def _projection(problem: OpProblem, number: int, index: int) -> Change:
    draw, blocks, rows = _random(problem, number, index), len(problem.columns), problem.rows
    chosen = torch.stack([torch.randperm(problem.pool_rows, generator=draw)[:rows] for _ in range(blocks)])
    heads = (problem.spec.groups,) * (problem.kind == "batched_linear")
    return Change(chosen, {"x": _signs(draw, blocks, rows, *heads, 1)})


def _moved(problem: OpProblem, draw: torch.Generator, **signs: torch.Tensor) -> Change:
    return Change(torch.randperm(problem.pool_rows, generator=draw)[None, : problem.rows], signs)


def _norm(problem: OpProblem, number: int, index: int) -> Change:
    draw = _random(problem, number, index)
    signs = _signs(draw, problem.spec.features)
    return _moved(problem, draw, x=signs[None], out=signs)


def _rotation(problem: OpProblem, number: int, index: int) -> Change:
    draw, spec = _random(problem, number, index), problem.spec
    signs = _pair_signs(problem, draw, spec.num_heads, spec.qk_rope_head_dim)
    return _moved(problem, draw, x=signs[None], out=signs)


def _latent_row(problem: OpProblem, number: int, index: int) -> Change:
    draw, spec = _random(problem, number, index), problem.spec
    latent, key = _signs(draw, spec.kv_lora_rank), _pair_signs(problem, draw, spec.qk_rope_head_dim)
    return _moved(problem, draw, kv_a=torch.cat((latent, key))[None], latent=latent, key=key)


def _pair_signs(problem: OpProblem, draw: torch.Generator, *shape: int) -> torch.Tensor:
    """Return signs that are alike in the two columns of a rotated pair."""
    signs = _signs(draw, *shape[:-1], shape[-1] // 2)
    if problem.config.rope_interleave:
        return signs.repeat_interleave(2, dim=-1)
    return torch.cat((signs, signs), dim=-1)


def _chosen(problem: OpProblem, choices: torch.Tensor) -> torch.Tensor:
    """Return the queries' rows in the pool [T * h], given which alternative each home takes (0: itself)."""
    count, others = problem.rows * problem.spec.num_heads, problem.choices - 1
    rows, homes = torch.arange(count), torch.tensor(problem.homes)
    alternatives = count + torch.arange(len(homes)) * others + choices - 1
    rows[homes] = torch.where(choices > 0, alternatives, homes)
    return rows


def _some_chosen(problem: OpProblem, draw: torch.Generator, number: int, index: int) -> torch.Tensor:
    choices = torch.randint(0, problem.choices, (len(problem.homes),), generator=draw)
    order = torch.randperm(problem.choices, generator=_random(problem, number))
    choices[0] = order[index % problem.choices]  # so that a single query, too, is another one every time
    return _chosen(problem, choices)


def _latent(problem: OpProblem, number: int, index: int) -> Change:
    draw, spec = _random(problem, number, index), problem.spec
    heads = torch.randperm(spec.num_heads, generator=draw)
    rows = _some_chosen(problem, draw, number, index).view(-1, spec.num_heads)[:, heads].reshape(1, -1)
    signs = pass_signs(problem, number)["keys"]
    return Change(rows, {"q": signs[None], "out": signs[: spec.kv_lora_rank]})


def _expanded(problem: OpProblem, number: int, index: int) -> Change:
    draw, signs = _random(problem, number, index), pass_signs(problem, number)
    rows = _some_chosen(problem, draw, number, index)[None]
    return Change(rows, {"q": signs["k"][None], "out": signs["v"]})


_CHANGES: dict[str, Callable[[OpProblem, int, int], Change]] = {
    "linear": _projection,
    "batched_linear": _projection,
    "rms_norm": _norm,
    "rotate_query": _rotation,
    "write_latent": _latent_row,
    "latent_attention": _latent,
    "expanded_attention": _expanded,
}
