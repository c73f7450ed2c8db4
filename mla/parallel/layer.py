"""`ParallelMLA`: one rank's part of an MLA layer, and `HeadShard`: the weights of its heads.

Where the context is spread over ranks, all ranks' queries attend this rank's tokens, and parts are merged:
queries are exchanged for some new tokens, and results. The out of attention and its log-sum-exp travel in one
message, row by row: a message costs more than its few bytes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mla.cache.ragged_batch import RaggedBatch
from mla.checkpoint import LazyState, Part, StoredLayer
from mla.config import MLAConfig
from mla.errors import UnsupportedOps, WeightError
from mla.layer.attention import MLA
from mla.layer.forward import Step, paged
from mla.layer.ops import Ops
from mla.layer.packed_weights import SharedWeights, check_weights
from mla.layer.plan import AbsorbedGroup, StepPlan
from mla.layer.workspace import Absorbed, Projected, Workspace
from mla.parallel.cache import Part as StepPart
from mla.parallel.cache import ShardedBatch
from mla.parallel.groups import Groups, lse_of
from mla.weights import SINKS, weight_shapes

FP32 = torch.float32
# Weights in which heads lie one below the other.
_ROWS = ("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight", "g_proj.weight", SINKS)


# ---------------------------------------------------------------------------------------------------- weights
class HeadShard(LazyState):
    """Part `part` of `parts` of a layer's heads, with all weights that heads share.

    A checkpoint on disk is read by range: of the weights of heads, nothing but this part. The output's
    bias is in part 0 only, and zero elsewhere: outputs are added up. Raises `WeightError` where the state
    does not fit `config`, which is the whole layer's.
    """

    def __init__(
        self, state: Mapping[str, torch.Tensor], config: MLAConfig, part: int, parts: int, strict: bool = True
    ) -> None:
        self._whole = weight_shapes(config)
        check_weights(state, self._whole, strict)
        self._shapes = weight_shapes(config.with_heads(config.num_attention_heads // parts))
        super().__init__(self._shapes)
        self._state, self._part = state, part

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._state.dtype(name) if isinstance(self._state, LazyState) else self._state[name].dtype

    def read_into(self, name: str, out: torch.Tensor) -> None:
        if name == "o_proj.bias" and self._part:
            out.zero_()
            return
        part = self._range(name)
        if isinstance(self._state, StoredLayer):
            self._state.read_into(name, out, part)
        else:
            weight = self._state[name].detach()
            out.copy_(weight[part.rows] if weight.dim() == 1 else weight[part])

    def _range(self, name: str) -> Part:
        """Return which rows and columns of a weight this part has."""
        if name in _ROWS:
            return Part(rows=self._slice(self._shapes[name][0]))
        if name == "o_proj.weight":
            return Part(columns=self._slice(self._shapes[name][1]))
        return Part()

    def _slice(self, size: int) -> slice:
        return slice(self._part * size, (self._part + 1) * size)


# ---------------------------------------------------------------------------------------------------- context
def merge(
    parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, scratch: Sequence[torch.Tensor] | None = None
) -> None:
    """Merge attention over disjoint keys: parts [n, ..., c] with natural lse [n, ...] fp32, to out [..., c].

    Each part weighs exp(lse) of the whole. One without keys is 0 with lse -inf, as ops write it, and weighs
    nothing; some part must have keys, as every token sees itself. Sums are in fp32 and rounded once. With
    `scratch`, of `merge_scratch`, nothing is allocated.
    """
    weights, merged, part = scratch or merge_scratch(parts, Workspace(out.dtype, out.device))
    torch.softmax(lse[..., None], dim=0, out=weights)
    merged.copy_(parts[0]).mul_(weights[0])
    for index in range(1, len(parts)):
        merged.addcmul_(part.copy_(parts[index]), weights[index])
    out.copy_(merged)


def merge_scratch(parts: torch.Tensor, scratch: Workspace) -> Sequence[torch.Tensor]:
    """Return fp32 memory to merge parts [n, ..., c] in: weights [n, ..., 1], a sum and a part [..., c]."""
    count, *rows, c = parts.shape
    shapes = {"merge_weights": (count, *rows, 1), "merge_sum": (*rows, c), "merge_part": (*rows, c)}
    return [scratch.take(name, *shape, dtype=FP32) for name, shape in shapes.items()]


class Exchange:
    """Scratch memory for t new tokens of a step, of which this rank has h heads, and views of it.

    `gathered` [world, t, h, c + r] are queries as they arrive, `q` [t, world h, c + r] a copy by token (of
    one token, the same memory), `out` [t, world h, c] and `lse` [t, world h] fp32 attention over this rank's
    tokens. `sent` and `received` [world, t, h, width] are rows of out and lse.
    """

    def __init__(
        self, scratch: Workspace, world: int, shape: tuple[int, int, int], c: int, ordered: bool
    ) -> None:
        """Make memory for this rank's queries of `shape` [t, h, c + r] in `scratch`.

        `ordered`: attention has its tokens in another order. Then `ordered_q` is in that order, and
        `ordered_out` and `ordered_lse` are in the order of the step again.
        """
        tokens, h, width = shape
        row, take, heads = _row(c, scratch.itemsize), scratch.take, (tokens, world * h)
        self.gathered, received = take("gathered", world, *shape), take("received", world, tokens, h, row)
        self.q = self.gathered.view(*heads, width) if tokens == 1 else take("gathered_q", *heads, width)
        self.out, self.lse = take("context_out", *heads, c), take("context_lse", *heads, dtype=FP32)
        self.ordered_q, self.ordered_out, self.ordered_lse = self.q, self.out, self.lse
        if ordered:
            self.ordered_q, self.ordered_out = (
                take("ordered_q", *heads, width),
                take("ordered_out", *heads, c),
            )
            self.ordered_lse = take("ordered_lse", *heads, dtype=FP32)
        self.sent, self.received = take("sent", world, tokens, h, row), received
        self._parts, self._part_lse = received[..., :c], lse_of(received)  # of every rank
        self._merging = merge_scratch(self._parts, scratch)
        views = (
            x.unflatten(1, (world, h)).transpose(0, 1) for x in (self.q, self.ordered_out, self.ordered_lse)
        )
        self._q, out, lse = views  # by rank
        self._by_rank = (self.sent[..., :c], out), (lse_of(self.sent), lse)  # copies: target and source

    def gather(self, groups: Groups, q: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """Return the queries [t, world h, c + r] of all ranks, of which this one has q [t, h, c + r]."""
        groups.gather_context(q, self.gathered)
        if q.shape[0] > 1:
            self._q.copy_(self.gathered)
        return self.q if order is None else torch.index_select(self.q, 0, order, out=self.ordered_q)

    def merge(self, groups: Groups, back: torch.Tensor | None, out: torch.Tensor) -> None:
        """Merge what all ranks found for this one's heads, and write it to out [t, h, c]."""
        if back is not None:
            torch.index_select(self.out, 0, back, out=self.ordered_out)
            torch.index_select(self.lse, 0, back, out=self.ordered_lse)
        for target, source in self._by_rank:
            target.copy_(source)
        groups.exchange_context(self.sent, self.received)
        merge(self._parts, self._part_lse, out, self._merging)

    def lse_of_all(self) -> torch.Tensor:
        """Return the log-sum-exp [t, h] over all ranks' tokens, once they are merged."""
        return self._part_lse.logsumexp(0)


def _row(c: int, itemsize: int) -> int:
    """Return the width of a row of out and lse: with what aligns the lse, and the elements that it takes."""
    per = max(1, FP32.itemsize // itemsize)
    return -(-c // per) * per + per


def scratch_per_token(config: MLAConfig, dcp: int, itemsize: int) -> int:
    """Return the bytes that an `Exchange` takes at most, for one new token; `config`: of one rank."""
    heads, c = config.num_attention_heads, config.kv_lora_rank
    numbers = 3 * config.latent_dim + 2 * c + 2 * _row(c, itemsize)  # of queries, and of results
    weights = 3 * FP32.itemsize  # lse twice, and what a part weighs
    return dcp * heads * (numbers * itemsize + weights) + heads * 2 * c * FP32.itemsize


@dataclass(frozen=True, eq=False)
class ContextStep(Step):
    """`Step` where the context is spread over ranks.

    It writes this rank's new latents, and attends absorbed, this rank's pages and those of all others.
    """

    groups: Groups = field(kw_only=True)

    def tokens_at_once(self, workspace: int) -> int:
        """Return how many tokens' queries and results of all ranks fit into so many bytes, at least one."""
        per_token = scratch_per_token(self.config, self.groups.layout.dcp, self.scratch.itemsize)
        return max(1, workspace // per_token)

    def _over_latents(
        self, ops: Ops, group: AbsorbedGroup, views: Absorbed, pages: torch.Tensor, **more: Any
    ) -> None:
        for part, state in group.state:
            exchange, out = self._exchange(part), views.latent_out[part.tokens]
            ops["latent_attention"].op(
                state,
                q=exchange.gather(self.groups, views.latent_q[part.tokens], part.order),
                softmax_scale=self.softmax_scale,
                out=exchange.out,
                lse=exchange.lse,
                **paged(pages, part),
                **self.stored,
            )
            exchange.merge(self.groups, part.back, out)
            if self.config.sink_logits:
                self.weights.leave_to_sinks(out, exchange.lse_of_all())

    def _exchange(self, part: StepPart) -> Exchange:
        """Return memory for the exchanges of a part."""
        count, ordered = part.tokens.stop - part.tokens.start, part.order is not None
        config, world = self.config, self.groups.layout.dcp
        shape = (count, config.num_attention_heads, config.latent_dim)
        return self.scratch.views(
            ("exchange", count, ordered),
            lambda: Exchange(self.scratch, world, shape, config.kv_lora_rank, ordered),
        )

    def _rotated_with_latents(
        self, ops: Ops, projected: Projected, plan: StepPlan
    ) -> dict[str, torch.Tensor]:
        """Return {}: a rank writes the latents of other tokens than it has queries of."""
        return {}

    def _write_latent(
        self, ops: Ops, kv_a: torch.Tensor, batch: Any, plan: StepPlan, pages: torch.Tensor, **queries: Any
    ) -> None:
        count, scratch = batch.local.shape[0], self.scratch
        if not count:
            return
        if count < batch.num_tokens:
            rows = scratch.take("local_kv_a", count, kv_a.shape[1])
            angles = scratch.take("local_cos_sin", count, plan.cos_sin.shape[1], dtype=FP32)
            kv_a = torch.index_select(kv_a, 0, batch.local, out=rows)
            plan = replace(plan, cos_sin=torch.index_select(plan.cos_sin, 0, batch.local, out=angles))
        super()._write_latent(ops, kv_a, batch, plan, pages)


# ------------------------------------------------------------------------------------------------------ layer
class ParallelMLA(MLA):
    """The heads, and with `dcp` the tokens, that one rank of `groups` has of the layer `config`.

    All ranks load the same state dict, of which each keeps its part, and are called with the same `hidden`;
    each returns the whole output. Batches come from a `LatentCache` of all tokens, or with `dcp` from a
    `ShardedCache`. With `dcp` every request is attended absorbed, which for long prompts costs more FLOPs.
    Other arguments are `MLA`'s. Raises `UsageError` where heads, or an indexer's contexts, cannot be split.
    """

    _groups: Groups
    _batches = (RaggedBatch, ShardedBatch)

    def __init__(self, config: MLAConfig, groups: Groups, **arguments: Any) -> None:
        groups.layout.check(config)
        if groups.layout.dcp > 1 and arguments.get("attention") == "expanded":
            raise UnsupportedOps("dcp supports attention='absorbed' only.")
        share = config.with_heads(config.num_attention_heads // groups.layout.head_parts)
        self._groups = groups  # before the layer is made, which asks for them
        super().__init__(share, **arguments)
        self._whole, attention = config, self.ops["latent_attention"]
        if groups.layout.dcp > 1 and not attention.op.writes_lse:
            raise UnsupportedOps(
                f"op '{attention.name}' writes no log-sum-exp, and dcp needs it to merge parts of a context: "
                "use a layout without dcp, or another op (`--ops reference`)."
            )
        if groups.layout.dcp > 1:
            self.step = self._context = ContextStep(**vars(self.step), groups=groups)

    def _calls_ops_alone(self) -> bool:
        alone = type(self) is ParallelMLA and self._groups.layout.dcp == 1  # heads are added up afterwards
        return alone and self.config.is_ops_alone

    def _attended_by(self) -> int:
        return self._groups.layout.dcp

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> None:
        """Pack this rank's part of the whole layer's weights; as `MLA.load_state_dict`."""
        layout, rank = self._groups.layout, self._groups.rank
        part = HeadShard(state_dict, self._whole, layout.head_part(rank), layout.head_parts, strict)
        super().load_state_dict(part, strict)

    def _make_plan(self, batch: RaggedBatch | ShardedBatch, selected: bool) -> StepPlan:
        if isinstance(batch, RaggedBatch):
            return super()._make_plan(batch, selected)
        cos_sin = self._angles(batch)
        choice = self.ops["latent_attention"]
        parts = batch.parts(self._context.tokens_at_once(self.workspace_bytes))
        if not parts:
            return StepPlan(cos_sin, None, None)
        states = tuple((part, choice.prepare(part)) for part in parts)
        everything = slice(0, batch.num_tokens)
        return StepPlan(cos_sin, AbsorbedGroup(everything, cos_sin, parts[0], states), None)

    def state_dict(self, **arguments: Any) -> dict[str, Any]:  # type: ignore[override]
        """Raise `WeightError`: this rank has a part of the weights, which no name stands for."""
        raise WeightError(
            "a rank has only a part of the weights: keep the state dict that they were loaded from."
        )

    def share_weights(self, shared: SharedWeights) -> None:
        """Raise `WeightError`: another layer's part may be another one."""
        raise WeightError("layers over several ranks share no weights: each packs its own part.")

    @torch.no_grad()
    def forward(
        self,
        hidden: torch.Tensor,  # [T, d], the same on every rank
        batch: RaggedBatch | ShardedBatch,
        pages: torch.Tensor,  # [pages, page, c + r]: this layer's part of this rank's cache
        index_pages: torch.Tensor | None = None,  # [pages, page, D]: the same on every rank
        selection: torch.Tensor | None = None,  # [T, topk] int32
        out: torch.Tensor | None = None,  # [T, d]
    ) -> torch.Tensor:
        """Attend the batch's new tokens and return the output [T, d] of all heads, as `MLA.forward` does."""
        if isinstance(batch, ShardedBatch) != (self._groups.layout.dcp > 1):
            raise ValueError(
                f"layout '{self._groups.layout}' takes batches of a "
                f"{'ShardedCache' if self._groups.layout.dcp > 1 else 'LatentCache'}."
            )
        if out is not None:
            self._check_out(out, batch)  # type: ignore[arg-type]
        whole = out if out is None or out.is_contiguous() else None  # memory, not rows, is added up
        part = super().forward(hidden, batch, pages, index_pages, selection, whole)  # type: ignore[arg-type]
        self._groups.add_heads(part)  # out of turn: others need not wait for other ranks
        return part if out is None or part is out else out.copy_(part)
