"""`MLA`: DeepSeek's Multi-head Latent Attention as one ragged layer over a paged latent cache.

A step goes through four stages: queries, latents, attention, output. Attention has two paths over the same
cache. *Absorbed*: W_UK is applied to the query and W_UV to the result, so that all heads attend one latent
key per token. *Expanded*: keys and values are rebuilt per head. Per request the cheaper one is taken."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from mla.cache.formats import stored_index_format
from mla.cache.ragged_batch import RaggedBatch, check_dtype
from mla.checkpoint import read_layer, refuse_other_formats
from mla.config import MLAConfig
from mla.config.layer_config import require_config
from mla.errors import WeightError
from mla.layer.forward import Step
from mla.layer.ops import Ops
from mla.layer.packed_weights import PackedWeights, SharedWeights
from mla.layer.plan import SPARSE_ROLES, WORKSPACE_BYTES, StepPlan, is_sparse, make_plan
from mla.layer.rope import RotaryTable
from mla.layer.workspace import (
    Turn,
    Workspace,
    check_batch,
    require,
    require_index_pages,
    require_pages,
)
from mla.text import size
from mla_backends.api import Backend, FusedOp, OpCall


class Repeated:
    """The last forward of a layer, as one call once it is repeated."""

    def __init__(self, backend: Backend | None) -> None:
        self._sequence = None if backend is None else backend.sequence
        if getattr(self._sequence, "__func__", None) is Backend.sequence:  # it always declines
            self._sequence = None
        self.forget()

    @property
    def offered(self) -> bool:
        """Whether there is a backend that may make sequences."""
        return self._sequence is not None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the backend and its addresses: a copy calls its ops one by one."""
        return Repeated, (None,)

    def forget(self) -> None:
        """Release the recording."""
        self._owners: tuple[object, ...] = ()
        self._layout: tuple[object, ...] = ()
        self._asked = False  # whether the backend has been asked for the call
        self._call: Callable[..., None] | None = None

    def find(
        self,
        owners: tuple[object, ...],
        layout: tuple[object, ...],
        record: Callable[[list[OpCall]], object],
        moving: Sequence[torch.Tensor],
    ) -> Callable[..., None] | None:
        """Return a function that runs this forward in one call; None the first time, and where there is none.

        The addresses in a recording depend on `owners`, by identity, and on `layout`, by value; and on the
        weights, so callers that replace weights must call `forget`. The number of owners never changes.
        """
        if layout != self._layout or any(a is not b for a, b in zip(owners, self._owners, strict=True)):
            self.forget()
            self._owners, self._layout = owners, layout
        elif not self._asked:
            calls: list[OpCall] = []
            record(calls)
            self._asked, self._call = True, self._sequence(calls, moving) if self._sequence else None
        return self._call


# ---------------------------------------------------------------------------------------- attention

ATTENTION_MODES = ("auto", "absorbed", "expanded")

# The specs a plan depends on -> an object that stands for them.
_PLAN_KEYS: dict[Hashable, object] = {}


class MLA(nn.Module):
    """One attention layer on one device, for inference.

    `attention`: "auto", "absorbed" or "expanded". `ops`: "auto" takes the backend's fused ops where they
    serve this layer, "reference" never does, "fused" and names of ops require them (`mla.layer.ops.choose`)
    and raise `UnsupportedOps` where they cannot serve; `overrides` (role -> name of an op, or "reference")
    come before it. Without a backend the layer runs the reference on the CPU.
    `cache_format` is that of the `LatentCache` it works on: both paths attend what is stored, new tokens too;
    `index_format` ("fp8"; None and "plain": `dtype`) is that of its index keys. With `config.index_topk`, a
    batch with a context beyond that is attended absorbed and sparse, to the keys that `selection` then names;
    any other exactly as without.
    `workspace_bytes` caps the keys and values that the expanded path rebuilds at a time. An op without a
    log-sum-exp gets all of a request at once, beyond the cap.
    Weights arrive through `load_state_dict` under Hugging Face names.
    Any thread may call a layer; those that call layers of one backend take turns, and a call from within a
    call raises RuntimeError.
    """

    _batches: tuple[type, ...] = (RaggedBatch,)

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
        cache_format: str | None = None,
        index_format: str | None = None,
    ) -> None:
        super().__init__()
        require_config(config)
        if backend is not None and not isinstance(backend, Backend):
            kind = type(backend).__name__
            raise ValueError(f"backend must be what mla.load_backend() returns, got a {kind}.")
        if attention not in ATTENTION_MODES:
            raise ValueError(f"attention must be one of {ATTENTION_MODES}, got {attention!r}.")
        if backend is not None and backend.device is None:
            raise ValueError(f"backend '{backend.name}' is not set up; use mla.load_backend().")
        self.config = config
        if not isinstance(overrides, Mapping):
            raise ValueError(f"overrides must map roles to names of ops, got {overrides!r:.80}.")
        if not isinstance(workspace_bytes, int) or workspace_bytes < 0:
            raise ValueError(f"workspace_bytes must be a number of bytes, got {workspace_bytes!r:.80}.")
        stored_index_format(index_format, config.index_topk)
        self.dtype = check_dtype(dtype)
        self.attention = attention
        self.workspace_bytes = workspace_bytes
        self.device = backend.device if backend is not None and backend.device else torch.device("cpu")
        offered = backend.ops() if backend else {}
        shares = self._attended_by()
        chosen = (config, offered, dtype, self.device, ops, overrides)
        self.ops = Ops(*chosen, attended_by=shares, cache_format=cache_format, index_format=index_format)
        self.rotary = RotaryTable(config, self.device)
        self._weights = PackedWeights(config, self.ops, dtype, self.device)
        self._scratch = Workspace(dtype, self.device, keeps=workspace_bytes, turn=Turn.of(backend))
        self._at = self.rotary.table.device  # as tensors say it: with an index
        kind = self.device.type
        self._autocast = kind if torch.amp.is_autocast_available(kind) else ""  # what of it there may be
        self.step = Step.of(config, self.ops, self._weights, self._scratch)
        self.selection: torch.Tensor | None = None  # [T, topk] int32, of the last forward; None: all keys
        self._repeated = Repeated(backend if self._calls_ops_alone() else None)
        self._plan_key = self._make_plan_key()

    def extra_repr(self) -> str:
        """Return what `repr` shows: the model, shapes, dtype and device, ops, and the weights held."""
        config, names = self.config, list(self.ops.names().values())
        fused = len(names) - names.count("reference")
        weights = f"{size(self.weight_bytes())} of weights" if self._weights.packed else "no weights"
        indexer = f"{config.index_n_heads} heads" if config.index_n_heads else "another layer's"
        sparse = f"topk={config.index_topk} (indexer: {indexer}), " if config.index_topk else ""
        return (
            f"{config.name!r}, hidden={config.hidden_size}, heads={config.num_attention_heads}, "
            f"latent={config.kv_lora_rank}+{config.qk_rope_head_dim}, {self.dtype} on {self.device}, "
            f"attention={self.attention!r}, {sparse}{fused} of {len(names)} ops fused, {weights}"
        )

    def _calls_ops_alone(self) -> bool:
        """Return whether a step consists of op calls alone, so that it can be recorded."""
        return type(self) is MLA and self.config.is_ops_alone  # a subclass may do more

    def _attended_by(self) -> int:
        """Return how many tensor-parallel shards share this attention."""
        return 1

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        layer: int | str | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
        **arguments: Any,
    ) -> MLA:
        """Build the layer of a checkpoint folder (config.json and *.safetensors); `arguments` as for MLA.

        `layer` None means the only main layer; "3.1" the second of a layer's two attentions.
        `progress` is called with the bytes read and the total. Raises `ConfigError` or `CheckpointError`.
        """
        refuse_other_formats(folder)  # such folders lack a config.json, and that error would say less
        stored = read_layer(folder, MLAConfig.from_pretrained(folder), layer, progress=progress)
        built = cls(stored.config, **arguments)
        built.load_state_dict(stored)
        return built

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> None:
        """Pack weights (Hugging Face names) for this layer's ops, one at a time.

        Raises `WeightError` naming the tensor when one is missing, has the wrong shape or is unknown
        (unknown ones are accepted with `strict=False`); the layer then keeps the weights it had.
        """
        with self._scratch.turn:
            self._weights.load(state_dict, strict)
            self._repeated.forget()

    def share_weights(self, shared: SharedWeights) -> None:
        """At the next load, take what another layer packed with the same ops from `shared`, and add the rest.

        All layers that share must load the same state dict.
        """
        self._weights.shared = shared

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the plain weights under Hugging Face names, bit for bit as loaded."""
        state = {} if destination is None else destination
        with self._scratch.turn:
            self._require_weights()
            state.update({prefix + name: weight for name, weight in self._weights.state_dict().items()})
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load as part of a larger module, whose state dict holds this layer's weights under `prefix`."""
        names = (name for name in state_dict if name.startswith(prefix))
        self.load_state_dict({name.removeprefix(prefix): state_dict[name] for name in names})

    def replace_ops(self, replace: Callable[[str, FusedOp], Any]) -> None:
        """Put `replace(role, op)` in place of every op; from now on they are called one by one.

        What is put there has the attributes of the op that plans need: `prepare`, `unsupported_batch`, ...
        """
        with self._scratch.turn:
            self.ops = self.ops.replaced(replace)
            self._repeated = Repeated(None)

    def weight_bytes(self) -> int:
        """Return the bytes that the packed weights keep alive."""
        return self._weights.nbytes()

    def scratch_bytes(self) -> int:
        """Return the bytes of scratch memory kept between steps."""
        return self._scratch.nbytes()

    def _apply(self, fn: Any, recurse: bool = True) -> MLA:
        raise RuntimeError(
            "an MLA layer cannot be moved or cast: its weights are packed for one device. "
            "Build it with the backend and dtype you want."
        )

    def _require_weights(self) -> None:
        if not self._weights.packed:
            raise WeightError("this MLA layer has no weights yet: call load_state_dict() first.")

    def plan(self, batch: RaggedBatch) -> StepPlan:
        """Return how this layer runs `batch`; made once, shared by layers with equal specs."""
        with self._scratch.turn:
            return self._planned(batch)

    def _planned(self, batch: RaggedBatch, selected: bool = False) -> StepPlan:
        key = (self._plan_key, self.attention, self.workspace_bytes, selected)
        return batch.memo(key, lambda: self._make_plan(batch, selected))

    def _make_plan(self, batch: RaggedBatch, selected: bool) -> StepPlan:
        way = (self.attention, self.workspace_bytes, selected)
        return make_plan(self.config, self.ops, self._angles(batch), batch, *way)

    def _angles(self, batch: Any) -> torch.Tensor:
        """Return the cosines and sines [T, r] of a batch's positions, in memory that is the batch's."""
        self.rotary.reserve(max(batch.kv_lens))
        shape, table = (batch.num_tokens, self.config.qk_rope_head_dim), self.rotary.table
        memory = batch.memory.keep(self._plan_key, lambda: table.new_empty(shape))
        return torch.index_select(table, 0, batch.positions, out=memory)

    def _make_plan_key(self) -> object:
        """Return a stand-in for the specs a plan depends on: one object for layers with equal specs."""
        key = (
            self.ops["latent_attention"].key(),
            self.ops["expanded_attention"].key(),
            *(self.ops[role].key() for role in SPARSE_ROLES if role in self.ops),
            self.config.rope_theta,
            self.config.rope_scaling,
        )
        return _PLAN_KEYS.setdefault(key, object())  # hashing the specs on every step would cost more

    def forward(
        self,
        hidden: torch.Tensor,  # [T, d], like all tensors here in the layer's dtype
        batch: RaggedBatch,
        pages: torch.Tensor,  # [pages, page, c + r or bytes]: this layer's part of LatentCache.pages
        index_pages: torch.Tensor | None = None,  # [pages, page, D or bytes]: of LatentCache.index_pages
        selection: torch.Tensor | None = None,  # [T, topk] int32: what an earlier layer's `selection` was
        out: torch.Tensor | None = None,  # [T, d], made where None
    ) -> torch.Tensor:
        """Attend the batch's new tokens, write their latents to the cache and return [T, d].

        A layer with an indexer takes `index_pages`, and leaves in its `selection` what it attended: positions
        within each request, -1 behind the last, valid until its next forward; None where that was all keys.
        A `selection` that is given is attended instead, and must hold no key that a query does not see.
        Running the same batch again gives the same result, also under autocast. Raises `StaleBatch` when the
        cache has changed since `batch` was made, and ValueError when a tensor does not fit.
        """
        if is_compiling():  # asked here because a decorator would cost every call
            alone: Any = torch.compiler.disable(MLA.forward)  # steps are the host's, and ops a backend's
            return alone(self, hidden, batch, pages, index_pages, selection, out)
        if self._autocast and torch.is_autocast_enabled(self._autocast):
            with torch.autocast(self._autocast, enabled=False):
                return MLA.forward(self, hidden, batch, pages, index_pages, selection, out)
        with self._scratch.turn, torch.set_grad_enabled(False):  # half of what the decorator no_grad costs
            self.check(hidden, batch, pages, index_pages, selection, out)
            if out is None:
                out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            if hidden.stride(-1) != 1:  # the contract promises ops rows of adjacent elements
                hidden = hidden.contiguous()
            plan = self._planned(batch, selection is not None)
            at_once = self._at_once(hidden, batch, plan, pages, out)
            if at_once is not None:
                at_once(hidden, pages, out)
                return out
            attended = self.step.run(self.ops, hidden, batch, plan, pages, out, index_pages, selection)
            if self.config.index_topk:
                self.selection = attended
            return out

    def _at_once(
        self, hidden: torch.Tensor, batch: RaggedBatch, plan: StepPlan, pages: torch.Tensor, out: torch.Tensor
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None:
        """Return a function that runs this forward in one call, if it is a repeated one of ops alone."""
        if not self._repeated.offered:
            return None
        group = plan.absorbed
        if group is None or group.batch is not batch or self.step.scales(batch):
            self._repeated.forget()
            return None
        ops, views = self.ops, self.step.views.projected(batch.num_tokens)
        owners = (ops, views, batch.memory, group.cos_sin, group.state)
        x, y, z = hidden.data_ptr(), pages.data_ptr(), out.data_ptr()
        same = (x == y, x == z, y == z)  # which of them start at the same address
        layout = (hidden.stride(), pages.shape, pages.stride(), out.stride(), same)

        def record(calls: list[OpCall]) -> None:
            def recorded(role: str, op: Any) -> Callable[..., None]:
                return lambda *arguments, **tensors: calls.append(OpCall(op, arguments, tensors))

            self.step.run(ops.replaced(recorded), hidden, batch, plan, pages, out)

        return self._repeated.find(owners, layout, record, (hidden, pages, out))

    def check(
        self,
        hidden: torch.Tensor,
        batch: RaggedBatch,
        pages: torch.Tensor,
        index_pages: torch.Tensor | None,
        selection: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> None:
        """Raise what `forward` raises when the tensors or the batch do not fit this layer.

        The positions in a selection are not read: that would wait for the device.
        """
        self._require_weights()
        check_batch(batch, self._batches, self._at)
        config, tokens = self.config, batch.num_tokens
        require("hidden", hidden, (tokens, config.hidden_size), self.dtype, self._at)
        shape = (*getattr(pages, "shape", (None,))[:1], batch.page_size)
        require_pages(pages, self.ops, shape, self._at)
        if not batch.fits(pages.shape[0]):
            raise ValueError(
                f"pages [{pages.shape[0]}, ...] are not of the cache this batch describes: pass those."
            )
        if out is not None:
            self._check_out(out, batch)
            if out.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr():
                raise ValueError("out shares memory with pages, whose latents it would overwrite.")
        if not config.index_topk and index_pages is None and selection is None:
            return
        require_index_pages(index_pages, self.ops, config, pages)
        if selection is not None:
            if not config.index_topk:
                raise ValueError("this layer attends all keys (index_topk 0): leave selection out.")
            require("selection", selection, (tokens, config.index_topk), torch.int32, self._at)
        elif not config.index_n_heads and is_sparse(config, batch.query_lens, batch.kv_lens):
            raise ValueError(
                "this layer shares a selection: pass selection=, the `selection` of the last layer before it "
                "with an indexer."
            )

    def _check_out(self, out: torch.Tensor, batch: RaggedBatch) -> None:
        width = self.config.hidden_size
        require("out", out, (batch.num_tokens, width), self.dtype, self._at)
        row, column = out.stride()
        if column != 1 or (row < width and batch.num_tokens > 1):
            raise ValueError(
                f"out has strides {[row, column]}: its elements must be adjacent, and no rows share memory."
            )
