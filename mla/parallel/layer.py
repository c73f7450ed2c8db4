"""`ParallelMLA`: one rank's part of an MLA layer, and `HeadShard`: the weights of its heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mla.cache.ragged_batch import RaggedBatch
from mla.checkpoint import LazyState, Part, StoredLayer
from mla.config import MLAConfig
from mla.errors import UnsupportedOps, WeightError
from mla.layer.attention import MLA
from mla.layer.packed_weights import SharedWeights, check_weights
from mla.layer.plan import AbsorbedGroup, StepPlan
from mla.parallel.cache import ShardedBatch
from mla.parallel.context import ContextPath, ContextStep
from mla.parallel.groups import Groups
from mla.weights import weight_shapes

_ROWS = ("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight")  # heads lie one below the other


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

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # without reading the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class ParallelMLA(MLA):
    """The heads, and with `dcp` the tokens, that one rank of `groups` has of the layer `config`.

    All ranks load the same state dict, of which each keeps its part, and are called with the same `hidden`;
    each returns the whole output. Batches come from a `LatentCache` of all tokens, or with `dcp` from a
    `ShardedCache`. With `dcp` every request is attended absorbed, which for long prompts costs more FLOPs.
    Other arguments are `MLA`'s. Raises `UsageError` where the heads cannot be split.
    """

    _groups: Groups
    _batches = (RaggedBatch, ShardedBatch)

    def __init__(self, config: MLAConfig, groups: Groups, **arguments: Any) -> None:
        groups.layout.check(config)
        if groups.layout.dcp > 1 and arguments.get("attention") == "expanded":
            raise UnsupportedOps("dcp supports attention='absorbed' only: leave 'expanded' out.")
        own = config.with_heads(config.num_attention_heads // groups.layout.head_parts)
        self._groups = groups  # before the layer is made, which asks for them
        super().__init__(own, **arguments)
        self._whole = config
        if groups.layout.dcp > 1:
            self._require_lse()
            plain = {field.name: getattr(self.step, field.name) for field in dataclasses.fields(self.step)}
            self._context = ContextPath(own, self._weights, self._scratch, self.step.views, groups)
            self.step = ContextStep(**plain, context=self._context)

    def _calls_ops_alone(self) -> bool:
        return type(self) is ParallelMLA and self._groups.layout.dcp == 1  # heads are added up afterwards

    def _attended_by(self) -> int:
        return self._groups.layout.dcp

    def _require_lse(self) -> None:
        choice = self.ops["latent_attention"]
        if not choice.op.writes_lse:
            raise UnsupportedOps(
                f"op '{choice.name}' writes no log-sum-exp, and dcp needs it to merge parts of a context: "
                "use a layout without dcp, or another op (`--ops reference`)."
            )

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> None:
        """Pack this rank's part of the whole layer's weights; as `MLA.load_state_dict`."""
        layout, rank = self._groups.layout, self._groups.rank
        part = HeadShard(state_dict, self._whole, layout.head_part(rank), layout.head_parts, strict)
        super().load_state_dict(part, strict)

    def _make_plan(self, batch: RaggedBatch | ShardedBatch) -> StepPlan:
        if isinstance(batch, RaggedBatch):
            return super()._make_plan(batch)
        memory = batch.memory.keep(self._plan_key, lambda: self.rotary.empty(batch.num_tokens))
        self.rotary.reserve(max(batch.kv_lens))
        cos_sin = self.rotary.gather(batch.positions, memory)
        choice = self.ops["latent_attention"]
        parts = batch.parts(self._context.tokens_at_once(self.workspace_bytes))
        for part in parts:
            choice.check_batch(part.rows.query_lens, part.rows.kv_lens, part.rows.page_size)
        if not parts:
            return StepPlan(cos_sin, None, None)
        states = tuple((part, choice.op.prepare(choice.spec, part.rows)) for part in parts)
        everything = slice(0, batch.num_tokens)
        return StepPlan(cos_sin, AbsorbedGroup(everything, cos_sin, parts[0].rows, states), None)

    def state_dict(self, **arguments: Any) -> dict[str, Any]:  # type: ignore[override]
        """Raise `WeightError`: this rank has a part of the weights, which no name stands for."""
        raise WeightError(
            "a layer over several ranks has a part of the weights: its state dict is that of all."
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
        own = out
        if out is not None and not out.is_contiguous():
            self.check(hidden, batch, pages, out)  # type: ignore[arg-type]
            own = torch.empty_like(out).contiguous()
        own = super().forward(hidden, batch, pages, own)  # type: ignore[arg-type]
        self._groups.add_heads(own)  # memory, not rows, and out of turn: others need not wait for other ranks
        return own if out is None else own if own is out else out.copy_(own)
