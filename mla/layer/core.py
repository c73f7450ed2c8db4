"""`AttentionCore`: what a layer does between its projections, for callers that have projections of their own.

Queries come in rotated, and latents lie in pages, normed and rotated: so this is `MLA` without everything
that depends on positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from mla.cache.ragged_batch import RaggedBatch, plain
from mla.config import MLAConfig
from mla.errors import WeightError
from mla.layer.absorbed import AbsorbedPath
from mla.layer.expanded import ExpandedPath, Rebuild
from mla.layer.expansion import WORKSPACE_BYTES, Growth
from mla.layer.ops import Ops
from mla.layer.packed_weights import PackedWeights
from mla.layer.plan import StepPlan, make_plan
from mla.layer.views import Projected, StepViews, check_batch, require
from mla.layer.workspace import Turn, Workspace
from mla_backends.api import Backend


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
        attention: str = "auto",
        ops: str = "auto",
        overrides: Mapping[str, str] = MappingProxyType({}),
        workspace_bytes: int = WORKSPACE_BYTES,
        scratch: Workspace | None = None,
    ) -> None:
        self.config, self.dtype, self._attention, self._limit = config, dtype, attention, workspace_bytes
        self.device = backend.device if backend is not None and backend.device else torch.device("cpu")
        offered = backend.ops() if backend else {}
        self.ops = Ops(config, offered, dtype, self.device, ops, overrides)
        turn = Turn.of(backend)
        self.scratch = scratch or Workspace(dtype, self.device, keeps=workspace_bytes, turn=turn)
        self._at = torch.empty(0, device=self.device).device  # as tensors say it: with an index
        self._weights = PackedWeights(config, self.ops, dtype, self.device)
        self._growth = Growth(backend)
        self._views = StepViews(config, self.ops, self.scratch)
        scale = config.softmax_scale
        rebuild = Rebuild(config, self._weights, self.scratch)
        optional = self.ops["expanded_attention"].op.lse_optional
        self._absorbed = AbsorbedPath(self._weights, self.scratch, self._views, False, scale)
        self._expanded = ExpandedPath(self.scratch, rebuild, config.qk_nope_head_dim, False, scale, optional)

    def load(self, kv_b_proj: torch.Tensor) -> None:
        """Pack the weight [h (n + v), c]. Raises `WeightError` for another shape."""
        with self.scratch.turn:
            self._weights.load_kv_b(kv_b_proj)

    def kv_b_proj(self) -> torch.Tensor:
        """Return the weight [h (n + v), c] as it was loaded, bit for bit."""
        with self.scratch.turn:
            return self._weights.unpacked_kv_b()

    def weight_bytes(self) -> int:
        """Return the bytes that the packed weight keeps alive."""
        return self._weights.nbytes()

    def queries(self, tokens: int) -> torch.Tensor:
        """Return memory [T, h, n + r] for the queries of so many tokens; what it held before is lost."""
        return self.scratch.take("q", tokens, self.config.num_attention_heads, self.config.qk_head_dim)

    @torch.no_grad()
    def __call__(self, q: torch.Tensor, batch: RaggedBatch, pages: torch.Tensor) -> torch.Tensor:
        """Attend the batch's new tokens with q [T, h, n + r], best made by `queries`; return [T, h, v].

        `pages` [pages, page, c + r] hold the latents of all tokens, the new ones included. The result is
        scratch memory, valid until the next call. Raises ValueError when a tensor does not fit, and
        RuntimeError in a thread that does not hold `scratch.turn`.
        """
        if not self._weights.packed:
            raise WeightError("this attention core has no weight yet: call load() first.")
        if not self.scratch.turn.held:
            raise RuntimeError("hold `core.scratch.turn` from queries() until the result has been read.")
        config = self.config
        check_batch(batch, (RaggedBatch,), self._at)
        shape = (batch.num_tokens, config.num_attention_heads, config.qk_head_dim)
        require("q", q, shape, self.dtype, self._at)
        require("pages", pages, (None, batch.page_size, config.latent_dim), self.dtype, self._at)
        own = self.queries(batch.num_tokens)  # which views are kept of
        q = q if q.data_ptr() == own.data_ptr() and q.stride() == own.stride() else own.copy_(q)
        heads = self.scratch.take("heads", *q.shape[:2], self.config.v_head_dim)
        flat = q.flatten(1)
        projected = Projected(flat, flat, None, flat, q, flat, heads, heads.flatten(1))
        plan = batch.memo(self._key(), lambda: self._plan(batch))
        if plan.absorbed is not None:
            self._absorbed.run(self.ops, projected, plan.absorbed, pages)
        if plan.expanded is not None:
            self._expanded.run(self.ops, projected, plan.expanded, pages)
        return heads

    def _key(self) -> object:
        roles = ("latent_attention", "expanded_attention")
        return (*(self.ops[role].key() for role in roles), self._attention, self._limit)

    def _plan(self, batch: RaggedBatch) -> StepPlan:
        """Plan a batch, whose queries are turned by no angle: cosines of 1 and sines of 0 change no bit."""
        half = self.config.qk_rope_head_dim // 2
        unturned = plain(torch.zeros(batch.num_tokens, 2 * half, dtype=torch.float32, device=self.device))
        unturned[:, :half] = 1
        return make_plan(self.config, self.ops, unturned, batch, self._attention, self._limit, self._growth)
