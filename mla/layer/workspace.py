"""`Workspace`: named scratch memory that grows to the largest step and is then never allocated again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch

from mla.config import MLAConfig
from mla.layer.ops import Ops
from mla_backends.api import Backend
from mla_backends.operands import misfit

Views = TypeVar("Views")
MAX_VIEWS = 256  # sets of views kept; prompts come in any length

Tokens = slice | torch.Tensor  # rows of a step: contiguous, or by index


_Lock: Any = type(threading.RLock())  # knows which thread holds it


class Turn(_Lock):  # type: ignore[misc]
    """The lock that a thread holds while it uses scratch memory and ops. A copy is another lock.

    `with` raises RuntimeError in a thread whose turn it is already: a signal handler, a finalizer or an op
    that calls a layer would overwrite what the call that it interrupts has in scratch memory.
    """

    def __enter__(self) -> bool:
        if self._is_owned():
            raise RuntimeError(
                "this thread is already running a layer of this backend: a signal handler, a finalizer or an "
                "op cannot call another one. Give it a backend of its own, or let it run afterwards."
            )
        return bool(_Lock.__enter__(self))

    @classmethod
    def of(cls, backend: Backend | None) -> Turn:
        """Return the turn that all callers of a backend's ops share; a new one without a backend."""
        return cls() if backend is None else cast("Turn", vars(backend).setdefault("_turn", cls()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()


class Workspace:
    """Scratch tensors of one layer. A name's memory is reused by every step, in `turn`."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, keeps: int | None = None, turn: Turn | None = None
    ) -> None:
        """Make no memory yet. `keeps`: the most bytes that `for_round` keeps; None is any."""
        self._dtype, self._device, self._keeps = dtype, device, keeps
        self.turn = turn or Turn()
        self._held: dict[str, torch.Tensor] = {}
        self._views: dict[Hashable, Any] = {}

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the layer's dtype."""
        return self._dtype.itemsize

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return uninitialised memory of this shape; what the name held before is lost."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
                held = torch.empty(size, dtype=dtype or self._dtype, device=self._device)
            self._held[name] = held
            self._views.clear()  # they may view memory that is gone
        return held[:size].view(shape)

    def for_round(self, nbytes: int) -> Callable[..., torch.Tensor]:
        """Return `take` for a round of `nbytes` bytes, or what makes memory that is not kept after the round.

        Every layer of a model has a workspace: were the memory of an exceptionally long context kept, it
        would be needed once per layer. The device's allocator hands it from one layer to the next instead.
        """
        if self._keeps is None or nbytes <= self._keeps:
            return self.take
        return lambda name, *shape: torch.empty(shape, dtype=self._dtype, device=self._device)

    def views(self, key: Hashable, build: Callable[[], Views]) -> Views:
        """Return views of this memory, built once per key: making a dozen costs more than a small op.

        `build` may take memory, and must give the same views for the same key while no memory grows.
        """
        if key not in self._views:
            built = build()  # may grow memory and so forget all views
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            self._views[key] = built
        return cast("Views", self._views[key])

    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(held.nbytes for held in self._held.values())

    def rows(self, name: str, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return a group's rows of x to read: a view when they are contiguous, else a copy."""
        if isinstance(tokens, slice):
            return x[tokens]
        return torch.index_select(x, 0, tokens, out=self.take(name, tokens.shape[0], *x.shape[1:]))

    def target(self, name: str, x: torch.Tensor, tokens: Tokens, count: int) -> torch.Tensor:
        """Return where to write a group's rows of x: in place when contiguous, else memory for `put`."""
        return x[tokens] if isinstance(tokens, slice) else self.take(name, count, *x.shape[1:])

    @staticmethod
    def put(x: torch.Tensor, tokens: Tokens, target: torch.Tensor) -> None:
        """Scatter what was written to `target` into x, unless it was written in place."""
        if not isinstance(tokens, slice):
            x.index_copy_(0, tokens, target)


# -------------------------------------------------------------------------------------------- views
# What a step reads and writes: whether it fits, and views of scratch memory, reused for the same shape.
#
# Slicing costs the host as much as a small op, and a decode step takes a dozen views, so they are made once.
def require(name: str, x: Any, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless x is a plain tensor of this shape (None: any size) and dtype on `device`."""
    if wrong := misfit(x, shape, dtype, device):
        if hasattr(x, "pages"):
            wrong = f"is a {type(x).__name__}: pass `cache.pages[i]`, the part of layer i."
        raise ValueError(f"{name} {wrong}")


def require_pages(pages: Any, ops: Ops, shape: Sequence[int | None], device: torch.device) -> None:
    """Raise ValueError unless these are pages [pages, page, ..] of a cache as the ops expect it."""
    spec = ops["latent_attention"].spec
    if spec.cache_format:
        name, width, dtype = f"pages of {spec.cache_format}", spec.token_bytes, torch.uint8
    else:
        name, width, dtype = "pages", spec.kv_lora_rank + spec.qk_rope_head_dim, spec.dtype
    require(name, pages, (*shape, width), dtype, device)


def require_index_pages(pages: Any, ops: Ops, config: MLAConfig, like: torch.Tensor) -> None:
    """Raise ValueError unless these are the index pages that belong to the pages `like`, or None for none.

    They are [pages, page, D] in the layer's dtype, or [pages, page, token_bytes] uint8 of an index format:
    like pages of latents in number and size, as both have one block table.
    """
    if not config.index_n_heads:
        if pages is not None:
            raise ValueError("this layer has no indexer: leave index_pages out, and give out by name.")
        return
    if pages is None:
        raise ValueError("this layer has an indexer: pass index_pages, as cache.of_layer(i) returns them.")
    spec = ops["write_index_key"].spec
    width, dtype = (spec.token_bytes, torch.uint8) if spec.index_format else (spec.head_dim, spec.dtype)
    require("index_pages", pages, (*like.shape[:2], width), dtype, like.device)
    if not pages.is_contiguous():
        raise ValueError("index_pages must be contiguous.")


def check_batch(batch: Any, kinds: tuple[Any, ...], device: torch.device) -> None:
    """Raise ValueError unless this is a batch of these kinds on `device`, and `StaleBatch`."""
    if not isinstance(batch, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"batch must be a {names}, as `cache.extend` returns, got a {type(batch).__name__}.")
    if not batch.kv_lens:
        raise ValueError("the batch has no requests: leave such a step out.")
    batch.check_current()
    if batch.slots.device != device:
        raise ValueError(f"the batch's tables must be on {device}, and are on {batch.slots.device}.")


class Projected(NamedTuple):
    """Where the projections of a step are written."""

    first: torch.Tensor  # [T, q or q_a, then c + r]
    q_a: torch.Tensor  # [T, q_lora_rank], or q itself without one
    q_normed: torch.Tensor | None
    q_flat: torch.Tensor  # [T, h * (n + r)]
    q: torch.Tensor  # [T, h, n + r]
    kv_a: torch.Tensor  # [T, c + r]
    heads: torch.Tensor  # [T, h, v], of both paths of attention
    heads_flat: torch.Tensor  # [T, h * v]
    gate: torch.Tensor | None = None  # [T, h] or [T, h * v], see `MLAConfig.output_gate`


class Indexed(NamedTuple):
    """Where the indexer of a step writes.

    `hidden` is a float32 copy of the step's input, which the float32 product of head weights takes.
    """

    q_flat: torch.Tensor  # [T, H * D]
    q: torch.Tensor  # [T, H, D]
    q_pe: torch.Tensor  # [T, H, r]: its first channels
    k: torch.Tensor  # [T, D]
    hidden: torch.Tensor  # [T, d] fp32
    weights: torch.Tensor  # [T, H] fp32
    selection: torch.Tensor  # [T, topk] int32


class Absorbed(NamedTuple):
    """Queries of an absorbed group, and where its latent queries and outputs go."""

    q_nope: torch.Tensor  # [t, h, n]
    q_pe: torch.Tensor  # [t, h, r]
    latent_q: torch.Tensor  # [t, h, c + r]
    latent_nope: torch.Tensor  # its first c
    latent_pe: torch.Tensor  # its last r
    latent_out: torch.Tensor  # [t, h, c]
    lse: torch.Tensor | None  # [t, h] fp32; None where it is not read and the op may skip it
    heads: torch.Tensor  # [t, h, v]: the step's own rows, or memory to scatter them from


class StepViews:
    """Where the stages of a layer read and write, by the number of tokens."""

    def __init__(self, config: MLAConfig, ops: Ops, scratch: Workspace) -> None:
        self._config, self._ops, self._scratch = config, ops, scratch

    def projected(self, tokens: int) -> Projected:
        """Return where the projections of this many tokens are written."""
        return self._scratch.views(("projected", tokens), lambda: self._projected(tokens))

    def _projected(self, tokens: int) -> Projected:
        config, spec = self._config, self._ops["qkv_a_proj"].spec
        first = self._scratch.take("qkv_a", tokens, spec.out_features)
        q_a, kv_a = first.split((spec.out_features - config.latent_dim, config.latent_dim), dim=1)
        normed, q = None, q_a
        if config.q_lora_rank is not None:
            normed = self._scratch.take("q_a", *q_a.shape)
            q = self._scratch.take("q", tokens, self._ops["q_b_proj"].spec.out_features)
        per_head = q.unflatten(1, (config.num_attention_heads, config.qk_head_dim))
        heads = self._scratch.take("heads", tokens, config.num_attention_heads, config.v_head_dim)
        gate = self._scratch.take("gate", tokens, config.gate_width) if config.gate_width else None
        return Projected(first, q_a, normed, q, per_head, kv_a, heads, heads.flatten(1), gate)

    def indexed(self, tokens: int) -> Indexed:
        """Return where the indexer writes for this many tokens."""
        return self._scratch.views(("indexed", tokens), lambda: self._indexed(tokens))

    def _indexed(self, tokens: int) -> Indexed:
        config, take = self._config, self._scratch.take
        q = take("index_q", tokens, config.index_n_heads, config.index_head_dim)
        k = take("index_k", tokens, config.index_head_dim)
        hidden = take("index_hidden", tokens, config.hidden_size, dtype=torch.float32)
        weights = take("index_weights", tokens, config.index_n_heads, dtype=torch.float32)
        selection = take("selection", tokens, config.index_topk, dtype=torch.int32)
        q_pe = q[..., : config.qk_rope_head_dim]
        return Indexed(q.flatten(1), q, q_pe, k, hidden, weights, selection)

    def absorbed(self, projected: Projected, tokens: Tokens) -> Absorbed:
        """Return a group's queries and where its latent queries and outputs go."""
        if not isinstance(tokens, slice):  # the rows are copied for every step
            q = self._scratch.rows("absorbed_q", projected.q, tokens)
            return self._absorbed_memory(q, projected.heads, tokens)
        key = ("absorbed", projected.q.shape[0], tokens.start, tokens.stop)
        return self._scratch.views(
            key, lambda: self._absorbed_memory(projected.q[tokens], projected.heads, tokens)
        )

    def _absorbed_memory(self, q: torch.Tensor, heads: torch.Tensor, tokens: Tokens) -> Absorbed:
        n, c, h = self._config.qk_nope_head_dim, self._config.kv_lora_rank, self._config.num_attention_heads
        latent_q = self._scratch.take("latent_q", q.shape[0], h, self._config.latent_dim)
        latent_out = self._scratch.take("latent_out", q.shape[0], h, c)
        lse = None
        roles = ("latent_attention", *("sparse_latent_attention",) * bool(self._config.index_topk))
        if self._config.sink_logits or not all(self._ops[role].op.lse_optional for role in roles):
            lse = self._scratch.take("lse", q.shape[0], h, dtype=torch.float32)
        target = self._scratch.target("absorbed_heads", heads, tokens, q.shape[0])
        parts = (q[..., :n], q[..., n:], latent_q, latent_q[..., :c], latent_q[..., c:])
        return Absorbed(*parts, latent_out, lse, target)
