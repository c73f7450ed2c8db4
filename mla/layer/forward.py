"""`Step`: one step of the layer, op by op, and the two paths of its attention.

The ops come with every call, so that the same code runs them, records them or times them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch

from mla.cache.formats import Codec, codec_of, decode_slots
from mla.cache.ragged_batch import RaggedBatch
from mla.config import MLAConfig
from mla.layer.ops import Ops
from mla.layer.packed_weights import PackedWeights
from mla.layer.plan import (
    WORKSPACE_BYTES,
    AbsorbedGroup,
    ExpandedGroup,
    StepPlan,
    make_plan,
    rebuilt_bytes,
)
from mla.layer.rope import query_factors
from mla.layer.workspace import (
    Absorbed,
    Projected,
    StepViews,
    Turn,
    Workspace,
    require_pages,
)
from mla_backends.api import Backend, BatchView

INDEX_EPS = 1e-6  # of the LayerNorm of index keys, in the classes of all families


def gate_heads(heads: torch.Tensor, gate: torch.Tensor) -> None:
    """Multiply heads [T, h, v] by the sigmoid of gate [T, h] or [T, h * v]; both are overwritten.

    Sigmoid and product are each rounded once to the dtype, as the models' own code does.
    """
    heads.mul_(gate.sigmoid_().unflatten(1, (heads.shape[1], -1)))


def rebuild_keys(
    step: Step, ops: Ops, slots: torch.Tensor, pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k [s, h, n + r] and v [s, h, v] of the cached tokens at `slots` [s], in scratch memory.

    Valid until the next call.
    """
    config = step.config
    n, c, h = config.qk_nope_head_dim, config.kv_lora_rank, config.num_attention_heads
    take = step.scratch.for_round(rebuilt_bytes(config, step.scratch.itemsize, slots.shape[0]))
    latents = take("latents", slots.shape[0], config.latent_dim)
    if step.codec is None:
        torch.index_select(pages.view(-1, config.latent_dim), 0, slots, out=latents)
    else:
        decode_slots(step.codec, pages.flatten(0, 1), slots, latents)
    kv = take("kv_b", slots.shape[0], ops["kv_b_proj"].spec.out_features)
    step.linear(ops, "kv_b_proj", latents[:, :c], kv)
    k_nope, v = kv.unflatten(1, (h, -1)).split((n, config.v_head_dim), dim=2)
    k = take("k", slots.shape[0], h, config.qk_head_dim)
    k[..., :n] = k_nope
    k[..., n:] = latents[:, None, c:]
    return k, v


def paged(pages: torch.Tensor, batch: BatchView) -> dict[str, torch.Tensor]:
    """Return what an op that reads a cache is told of a batch."""
    return {
        "cache": pages,
        "block_table": batch.block_table,
        "kv_lens": batch.kv_lens_device,
        "cu_q": batch.cu_q,
    }


@dataclass(frozen=True, eq=False)
class Step:
    """Queries, latents, attention on either path, gate, output. Stateless except for scratch memory.

    An indexer picks the keys that queries attend (DeepSeek-V3.2, section 2.1):

        q = rotate(wq_b(q_latent))           [T, H, D], of the normed query latent
        k = rotate(LayerNorm(wk(x)))         [T, D], with bias; cached
        w = weights_proj(x) * (H D)^-0.5     [T, H], in float32
        score[t, s] = sum over h of w[t, h] * max(0, q[t, h] . k[s])

    Only the first r channels are rotated, by the angles of attention but in a layout of their own. Weights
    carry all factors on scores; they may be negative.
    """

    config: MLAConfig
    weights: PackedWeights
    scratch: Workspace
    views: StepViews  # of `scratch`
    codec: Codec | None  # of the cache
    stored: Mapping[str, str]  # what ops are told of the cache, beside its pages
    index_stored: Mapping[str, str]  # and of the index cache
    lse_optional: bool  # the expanded op may leave it out, and nothing reads it
    softmax_scale: float
    rebuild: Callable[..., tuple[torch.Tensor, torch.Tensor]] = rebuild_keys
    gate: Callable[[torch.Tensor, torch.Tensor], None] = gate_heads

    @classmethod
    def of(cls, config: MLAConfig, ops: Ops, weights: PackedWeights, scratch: Workspace) -> Step:
        """Return the step of one layer."""
        cached = ops["latent_attention"].spec
        codec = codec_of(cached.cache_format, cached.kv_lora_rank, cached.qk_rope_head_dim)
        optional = ops["expanded_attention"].op.lse_optional and not config.sink_logits
        indexed = stored_as(ops, "write_index_key") if config.index_n_heads else {}
        views = StepViews(config, ops, scratch)
        stored, scale = stored_as(ops), config.softmax_scale
        return cls(config, weights, scratch, views, codec, stored, indexed, optional, scale)

    def run(
        self,
        ops: Ops,
        hidden: torch.Tensor,  # [T, d]
        batch: RaggedBatch,
        plan: StepPlan,
        pages: torch.Tensor,  # [pages, page, c + r]
        out: torch.Tensor,  # [T, d]
        index_pages: torch.Tensor | None = None,  # [pages, page, D], where the layer has an indexer
        selection: torch.Tensor | None = None,  # [T, topk] int32, of another layer
    ) -> torch.Tensor | None:
        """Write the latents of the batch's new tokens to `pages` and the layer's output to `out`.

        Return the selection [T, topk] that was attended; None for all keys. Nothing is checked, and `plan`
        must be that of `batch`.
        """
        projected = self._project(ops, hidden)
        self._scale_queries(projected.q, batch)
        queries = self._rotated_with_latents(ops, projected, plan)
        self._write_latent(ops, projected.kv_a, batch, plan, pages, **queries)
        if index_pages is not None:
            self.write_index_keys(ops, hidden, batch, plan, index_pages)
            if selection is None and plan.absorbed is not None and plan.absorbed.is_sparse:
                selection = self.select(ops, hidden, projected, plan.absorbed, index_pages)
        self.attend(ops, projected, plan, pages, bool(queries), selection)
        if projected.gate is not None:
            self.linear(ops, "g_proj", hidden, projected.gate)
            self.gate(projected.heads, projected.gate)
        self.linear(ops, "o_proj", projected.heads_flat, out, bias="o_proj.bias")
        return selection

    def scales(self, batch: RaggedBatch) -> bool:
        """Return whether any query's factor is other than 1."""
        scaling = self.config.query_scaling
        return scaling is not None and max(batch.kv_lens) > scaling.period

    def linear(self, ops: Ops, role: str, x: torch.Tensor, out: torch.Tensor, bias: str = "") -> None:
        """Write the product of x and a role's weight, plus the bias of a name, to `out`."""
        ops[role].op(self.weights.packed[role], x=x, bias=self.weights.vectors.get(bias), out=out)

    def _project(self, ops: Ops, hidden: torch.Tensor) -> Projected:
        """Return the step's views, with q not yet rotated and kv_a neither normed nor rotated."""
        views = self.views.projected(hidden.shape[0])
        self.linear(ops, "qkv_a_proj", hidden, views.first, bias="qkv_a_proj.bias")
        if views.q_normed is not None:
            weight, eps = self.weights.vectors["q_a_layernorm.weight"], self.config.rms_norm_eps
            ops["q_a_layernorm"].op(x=views.q_a, weight=weight, eps=eps, out=views.q_normed)
            self.linear(ops, "q_b_proj", views.q_normed, views.q_flat)
        return views

    def _scale_queries(self, q: torch.Tensor, batch: RaggedBatch) -> None:
        """Scale q [T, h, n + r] by position, in place, where the config says so."""
        scaling = self.config.query_scaling
        if scaling is None or not self.scales(batch):
            return
        factors = batch.memo(scaling, lambda: query_factors(scaling, batch.positions)[:, None, None])
        q.mul_(factors)

    def _rotate(self, ops: Ops, x: torch.Tensor, cos_sin: torch.Tensor, out: torch.Tensor) -> None:
        ops["rotate_query"].op(x=x, cos_sin=cos_sin, interleaved=self.config.rope_interleave, out=out)

    def _rotated_with_latents(
        self, ops: Ops, projected: Projected, plan: StepPlan
    ) -> dict[str, torch.Tensor]:
        """Return x and out of the rotation that the cache write does as well; {} where it does not.

        It does where the backend has one launch for both, and all tokens are absorbed. Where ops are watched
        or timed, others stand in for them, and each is called by itself.
        """
        rotates, group = getattr(ops["write_latent"].op, "rotates", None), plan.absorbed
        if rotates is None or rotates is not ops["rotate_query"].op:
            return {}
        if group is None or group.cos_sin is not plan.cos_sin:
            return {}
        views = self.views.absorbed(projected, group.tokens)
        return {"x": views.q_pe, "out": views.latent_pe}

    def _write_latent(
        self,
        ops: Ops,
        kv_a: torch.Tensor,
        batch: RaggedBatch,
        plan: StepPlan,
        pages: torch.Tensor,
        **queries: torch.Tensor,
    ) -> None:
        ops["write_latent"].op(
            kv_a=kv_a,
            weight=self.weights.vectors["kv_a_layernorm.weight"],
            eps=self.config.rms_norm_eps,
            cos_sin=plan.cos_sin,
            interleaved=self.config.rope_interleave,
            slots=batch.slots,
            cache=pages,
            **self.stored,
            **queries,
        )

    # ------------------------------------------------------------------------------------- indexer
    def write_index_keys(
        self, ops: Ops, hidden: torch.Tensor, batch: RaggedBatch, plan: StepPlan, pages: torch.Tensor
    ) -> None:
        """Write the index keys of hidden [T, d] to the index `pages` [pages, page, D].

        Every step does, also one that attends all keys: a later one selects among them.
        """
        k, vectors = self.views.indexed(hidden.shape[0]).k, self.weights.vectors
        self.linear(ops, "index_k_proj", hidden, k)
        ops["write_index_key"].op(
            k=k,
            weight=vectors["indexer.k_norm.weight"],
            bias=vectors["indexer.k_norm.bias"],
            eps=INDEX_EPS,
            cos_sin=plan.cos_sin,
            interleaved=self.config.indexer_rope_interleave,
            slots=batch.slots,
            cache=pages,
            **self.index_stored,
        )

    def select(
        self, ops: Ops, hidden: torch.Tensor, projected: Projected, group: AbsorbedGroup, pages: torch.Tensor
    ) -> torch.Tensor:
        """Return the positions [T, topk] int32 that score best, in scratch memory; -1 behind the last.

        The index keys of the step must have been written. Valid until the layer's next step.
        """
        views, interleaved = self.views.indexed(hidden.shape[0]), self.config.indexer_rope_interleave
        self.linear(ops, "index_q_proj", cast("torch.Tensor", projected.q_normed), views.q_flat)
        rotate = ops["rotate_index_query"].op
        rotate(x=views.q_pe, cos_sin=group.cos_sin, interleaved=interleaved, out=views.q_pe)
        views.hidden.copy_(hidden)
        self.linear(ops, "index_weights_proj", views.hidden, views.weights)
        views.weights.mul_(self.config.index_scale)
        queries = {"q": views.q, "weights": views.weights, "out": views.selection}
        ops["select_latents"].op(group.select, **queries, **paged(pages, group.batch), **self.index_stored)
        return views.selection

    # ----------------------------------------------------------------------------------- attention
    def attend(
        self,
        ops: Ops,
        projected: Projected,
        plan: StepPlan,
        pages: torch.Tensor,
        rotated: bool = False,
        selection: torch.Tensor | None = None,
    ) -> None:
        """Attend with `projected.q` over the latents in `pages` [pages, page, c + r], to `projected.heads`.

        `rotated`: q_pe of the absorbed group already is, in its place in the latent queries. A sparse group
        attends its `selection` [t, topk] int32.
        """
        if plan.absorbed is not None:
            self.absorbed(ops, projected, plan.absorbed, pages, rotated, selection)
        if plan.expanded is not None:
            self.expanded(ops, projected, plan.expanded, pages)

    def absorbed(
        self,
        ops: Ops,
        projected: Projected,
        group: AbsorbedGroup,
        pages: torch.Tensor,
        rotated: bool = False,
        selection: torch.Tensor | None = None,
    ) -> None:
        """Attend with q_nope W_UK, joined with the rotated q_pe, over the latents; then apply W_UV."""
        more = {} if selection is None else {"selection": selection}
        views, packed = self.views.absorbed(projected, group.tokens), self.weights.packed
        ops["w_uk"].op(packed["w_uk"], x=views.q_nope, out=views.latent_nope)
        if not rotated:
            self._rotate(ops, views.q_pe, group.cos_sin, views.latent_pe)
        self._over_latents(ops, group, views, pages, **more)
        ops["w_uv"].op(packed["w_uv"], x=views.latent_out, out=views.heads)
        self.scratch.put(projected.heads, group.tokens, views.heads)

    def _over_latents(
        self,
        ops: Ops,
        group: AbsorbedGroup,
        views: Absorbed,
        pages: torch.Tensor,
        **more: torch.Tensor,
    ) -> None:
        """Write the attention of `views.latent_q` to `views.latent_out`."""
        ops[group.role].op(
            group.state,
            q=views.latent_q,
            softmax_scale=self.softmax_scale,
            out=views.latent_out,
            lse=views.lse,
            **paged(pages, group.batch),
            **more,
            **self.stored,
        )
        if views.lse is not None:
            self.weights.leave_to_sinks(views.latent_out, views.lse)

    def expanded(self, ops: Ops, projected: Projected, group: ExpandedGroup, pages: torch.Tensor) -> None:
        """Rebuild k and v of the context round by round and run multi-head attention.

        Several rounds are merged in fp32, as rounding after every round would add up.
        """
        q, take = self.scratch.rows("expanded_q", projected.q, group.tokens), self.scratch.take
        rotary = q[..., self.config.qk_nope_head_dim :]
        self._rotate(ops, rotary, group.cos_sin, rotary)
        out = self.scratch.target("expanded_heads", projected.heads, group.tokens, q.shape[0])
        at_once = len(group.rounds) == 1
        lse = None if at_once and self.lse_optional else take("lse", *q.shape[:2], dtype=torch.float32)
        total = out if at_once else take("merged", *out.shape, dtype=torch.float32)
        for part in group.rounds:
            k, v = self.rebuild(self, ops, part.slots, pages)
            for piece in part.pieces:
                rows, part_out = piece.queries, out[piece.queries]
                operands = {"q": q[rows], "k": k, "v": v, "out": part_out}
                attend = partial(
                    ops["expanded_attention"].op, piece.state, softmax_scale=self.softmax_scale, **operands
                )
                if piece.merge and lse is not None:
                    new_lse = take("part_lse", *lse[rows].shape, dtype=torch.float32)
                    attend(lse=new_lse)
                    _merge(total[rows], lse[rows], part_out, new_lse)
                    continue
                attend(lse=None if lse is None else lse[rows])
                if not at_once:
                    total[rows] = part_out
        if not at_once:
            out.copy_(total)
        if lse is not None:
            self.weights.leave_to_sinks(out, lse)
        self.scratch.put(projected.heads, group.tokens, out)


def _merge(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Merge two attentions over disjoint keys, in place: weights are exp(lse), normalised."""
    total = torch.logaddexp(lse, new_lse)
    old_weight, new_weight = ((part - total).exp()[..., None] for part in (lse, new_lse))
    out.mul_(old_weight).add_(new_out * new_weight)
    lse.copy_(total)


def stored_as(ops: Ops, role: str = "latent_attention") -> Mapping[str, str]:
    """Return what the ops of a cache are told of it, beside its pages: nothing where it is plain."""
    name = ops[role].spec.cache_format
    return {"cache_format": name} if name else {}


# --------------------------------------------------------------------------------------------- core
# `AttentionCore`: what a layer does between its projections, for callers that have projections of their own.
#
# Queries come in rotated, and latents lie in pages, normed and rotated: so this is `MLA` without everything
# that depends on positions.
class AttentionCore:
    """Attention of rotated queries over latents, absorbed or expanded, with the weight `kv_b_proj` alone.

    Arguments are those of `MLA`. Cores that run one after the other may share `scratch`, whose `turn` a
    thread holds from `queries` until it has read the result.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        backend: Backend | None = None,
        dtype: torch.dtype = torch.bfloat16,
        scratch: Workspace | None = None,
        cache_format: str | None = None,
        index_format: str | None = None,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.device = backend.device if backend is not None and backend.device else torch.device("cpu")
        given = config, backend.ops() if backend else {}, dtype, self.device
        self.ops = Ops(*given, cache_format=cache_format, index_format=index_format)
        # Of the pages that it reads; "" for numbers of the dtype, and where there are none.
        self.cache_format: str = self.ops["latent_attention"].spec.cache_format
        indexed = "select_latents" in self.ops
        self.index_format: str = self.ops["select_latents"].spec.index_format if indexed else ""
        turn = Turn.of(backend)
        self.scratch = scratch or Workspace(dtype, self.device, keeps=WORKSPACE_BYTES, turn=turn)
        self._at = torch.empty(0, device=self.device).device  # as tensors say it: with an index
        self._weights = PackedWeights(config, self.ops, dtype, self.device)
        straight = replace(config, rope_interleave=False)  # as queries come in
        self._step = Step.of(straight, self.ops, self._weights, self.scratch)

    def load(self, kv_b_proj: torch.Tensor) -> None:
        """Pack the weight [h (n + v), c]. Raises `WeightError` for another shape."""
        with self.scratch.turn:
            self._weights.load_kv_b(kv_b_proj)

    def kv_b_proj(self) -> torch.Tensor:
        """Return the weight [h (n + v), c] as it was loaded, bit for bit."""
        with self.scratch.turn:
            return self._weights.unpack("kv_b_proj").clone()

    def weight_bytes(self) -> int:
        """Return the bytes that the packed weight keeps alive."""
        return self._weights.nbytes()

    def queries(self, tokens: int) -> torch.Tensor:
        """Return memory [T, h, n + r] for the queries of T tokens; what it held before is lost."""
        return self.scratch.take("q", tokens, self.config.num_attention_heads, self.config.qk_head_dim)

    @torch.no_grad()
    def select(
        self, q: torch.Tensor, weights: torch.Tensor, batch: RaggedBatch, index_pages: torch.Tensor
    ) -> torch.Tensor:
        """Return what the batch's new tokens select: positions [T, topk] int32, -1 behind the last.

        Takes rotated queries q [T, H, D], weights [T, H] fp32 with every factor, and index keys of all tokens
        in `index_pages` [pages, page, D or bytes].
        """
        choice = self.ops["select_latents"]
        out = torch.empty(batch.num_tokens, self.config.index_topk, dtype=torch.int32, device=self.device)
        state, stored = choice.prepare(batch), self._step.index_stored
        choice.op(state, q=q, weights=weights, out=out, **paged(index_pages, batch), **stored)
        return out

    @torch.no_grad()
    def __call__(
        self, batch: RaggedBatch, pages: torch.Tensor, selection: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend the T new tokens of a batch with what `queries(T)` was given; return [T, h, v].

        `pages` [pages, page, c + r] hold the latents of all tokens, the new ones included; of these, only a
        `selection` [T, topk] int32 is attended where there is one. The result is scratch memory, valid until
        the next call. Raises ValueError for pages of another cache.
        """
        require_pages(pages, self.ops, (None, batch.page_size), self._at)
        q = self.queries(batch.num_tokens)
        heads = self.scratch.take("heads", *q.shape[:2], self.config.v_head_dim)
        flat = q.flatten(1)
        projected = Projected(flat, flat, None, flat, q, flat, heads, heads.flatten(1))
        selected = selection is not None
        keys = (self.ops[role].key() for role in ("latent_attention", "expanded_attention"))
        plan = batch.memo((*keys, selected), lambda: self._plan(batch, selected))
        self._step.attend(self.ops, projected, plan, pages, selection=selection)
        return heads

    def _plan(self, batch: RaggedBatch, selected: bool) -> StepPlan:
        """Plan a batch, whose queries are turned by no angle: cosines of 1 and sines of 0 change no bit."""
        half = self.config.qk_rope_head_dim // 2
        unturned = torch.zeros(batch.num_tokens, 2 * half, dtype=torch.float32, device=self.device)
        unturned[:, :half] = 1
        return make_plan(self.config, self.ops, unturned, batch, "auto", WORKSPACE_BYTES, selected)
