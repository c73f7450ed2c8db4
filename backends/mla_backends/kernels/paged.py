"""What kernels for absorbed attention over pages share: rows planned, queries laid out, results written."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView, FusedOp
from mla_backends.kernels.limits import LatentLimits
from mla_backends.kernels.rows import Group, groups
from mla_backends.kernels.scratch import Scratch
from mla_backends.kernels.vendor import KernelRefused, VendorModule
from mla_backends.torch_backend.graph import capturing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """One launch of a planned batch."""

    group: Group
    kv_lens: torch.Tensor  # [rows] int32, as the kernel is given them
    plan: Any  # the vendor's


@dataclass(frozen=True)
class PagedState:
    """A planned batch: valid as long as the batch is, for every layer with the same spec."""

    parts: tuple[Part, ...]
    heads: int  # what the kernel is given, padding included
    capturable: bool = True
    captured: bool = False  # planned inside a graph, which plans anew whenever it is replayed

    @property
    def graph_safe(self) -> bool:
        """Whether a captured call follows the batch when its lengths are updated in place."""
        return self.capturable and all(part.group.follows_batch for part in self.parts)


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch."""

    q: torch.Tensor  # [rows, s, h, c + r]; h with padding
    cache: torch.Tensor  # [pages, page, c + r]
    block_table: torch.Tensor  # [rows, n] int32
    kv_lens: torch.Tensor  # [rows] int32
    longest: int  # an upper bound of kv_lens, known on the host
    scale: float
    latent: int  # c
    out: torch.Tensor | None  # [rows, s, h, c] of the caller, where a kernel may write in place
    captured: bool


Result = tuple["torch.Tensor", "torch.Tensor | None"]  # out [rows, s, h, c], lse in the declared layout


class PagedLatentOp(FusedOp):
    """Base of adapters whose kernel takes rows with equally many queries. Subclasses plan and launch.

    Costs besides the kernel, per launch: a copy into `out` unless the kernel writes to it directly, and one
    into `lse` if there is one; a copy of q where its rows are scattered, strided or padded; a little where a
    row has no key.
    """

    contract = OPS["latent_attention"]
    lse_optional = True

    def __init__(self, vendor: VendorModule, limits: LatentLimits) -> None:
        self._vendor = vendor
        self.limits = limits
        self._scratch = Scratch()

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        return (self._vendor.reasons() or self.interface_reasons()) + self.limits.reasons(spec)

    def interface_reasons(self) -> list[str]:
        """Return how the vendor's functions differ from what is expected."""
        return []

    def unsupported_batch(
        self,
        spec: AttentionSpec,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        page_size: int | None = None,
    ) -> list[str]:
        rows = self.limits.row_reasons(spec.num_heads, query_lens, kv_lens)
        return self.limits.page_reasons(page_size) + rows

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> PagedState:
        """Plan the batch without waiting for the device. Raises `KernelRefused` for pages it cannot read."""
        self.limits.check_page(batch.page_size)
        heads = self.limits.padded_heads(spec.num_heads) or spec.num_heads
        found = groups(batch, self.limits.queries_per_row(heads))
        captured = capturing(spec.device)
        parts = tuple(self._part(group, heads, batch.page_size, captured) for group in found)
        return PagedState(parts, heads, self.limits.graph, captured)

    def _part(self, group: Group, heads: int, page_size: int, captured: bool) -> Part:
        kv_lens = self._lens(group, captured)
        return Part(group, kv_lens, self.plan(kv_lens, group.queries * heads))

    def _lens(self, group: Group, captured: bool) -> torch.Tensor:
        """Return lengths the kernel takes; a replay may find rows empty that are not empty now."""
        if not self.limits.empty_rows and (group.has_empty or captured):
            return group.kv_lens.clamp(min=1)  # what such a row gives is overwritten
        return group.kv_lens

    def plan(self, kv_lens: torch.Tensor, query_rows: int) -> Any:
        """Build what the vendor shares between calls, for rows with `query_rows` query heads in total."""
        return None

    @abstractmethod
    def launch(self, plan: Any, call: Launch) -> Result:
        """Run the kernel once."""

    def __call__(
        self, state: PagedState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [T, h, c], lse [T, h] fp32
    ) -> None:  # fmt: skip
        captured = capturing(q.device)
        if captured:
            self._check_capture(state)
        if cache.stride(-1) != 1:
            raise KernelRefused("the latent cache must be contiguous in its last dimension.")
        for part in state.parts:
            if captured != state.captured:  # the plan is of another time than this launch
                part = self._part(part.group, state.heads, cache.shape[1], captured=True)
            call = self._call(part, state.heads, q, cache, float(softmax_scale), out, captured)
            self._write(part.group, call, self.launch(part.plan, call), out, lse)

    def _check_capture(self, state: PagedState) -> None:
        """Raise `KernelRefused` for what a replay would get wrong."""
        if not self.limits.graph:
            raise KernelRefused(f"{self._vendor.name} waits for the device, so no graph can capture it.")
        if not state.graph_safe:
            raise KernelRefused(
                "a graph of this batch would not follow its lengths: capture batches whose requests all have "
                "the same number of new tokens."
            )

    def _call(
        self,
        part: Part,
        heads: int,
        q: torch.Tensor,
        cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        captured: bool,
    ) -> Launch:
        group = part.group
        table = group.block_table.contiguous()  # not every kernel is known to read its strides
        return Launch(
            q=self._queries(group, heads, q, captured),
            cache=cache,
            block_table=table,
            kv_lens=part.kv_lens,
            longest=table.shape[1] * cache.shape[1] if captured else max(1, group.longest),
            scale=scale,
            latent=out.shape[2],
            out=_in_place(group, heads, out),
            captured=captured,
        )

    def _queries(self, group: Group, heads: int, q: torch.Tensor, captured: bool) -> torch.Tensor:
        """Return the group's queries [rows, s, heads, c + r], contiguous; padding heads are zero."""
        import torch

        shape = (group.rows, group.queries, heads, q.shape[2])
        tokens = group.tokens
        if isinstance(tokens, slice) and heads == q.shape[1] and q[tokens].is_contiguous():
            return q[tokens].view(shape)
        wide = self._scratch.take("q", (group.rows * group.queries, *shape[2:]), q, fresh=captured)
        if isinstance(tokens, slice):
            wide[:, : q.shape[1]].copy_(q[tokens])
        else:
            torch.index_select(q, 0, tokens, out=wide[:, : q.shape[1]])
        return wide.view(shape)

    def _write(
        self, group: Group, call: Launch, result: Result, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        """Convert the kernel's results to the contract's layout, base and empty rows."""
        value, sums = result
        heads, count = out.shape[1], group.rows * group.queries
        rows, empty = value.reshape(count, -1, out.shape[2])[:, :heads], None
        if group.has_empty or call.captured:
            empty = (group.kv_lens == 0).repeat_interleave(group.queries, output_size=count)[:, None]
            rows = rows.masked_fill(empty[..., None], 0)
        if empty is not None or value is not call.out:
            _store(group, out, rows)
        if lse is None:
            return
        if sums is None:
            lse[group.tokens] = math.nan
            return
        logs = self._tokens_first(sums).reshape(count, -1)[:, :heads]
        _store(group, lse, logs if empty is None else logs.masked_fill(empty, -math.inf))

    def _tokens_first(self, lse: torch.Tensor) -> torch.Tensor:
        """Return the natural log-sum-exp as [rows, s, h], by the declared layout: shapes can be ambiguous."""
        if self.limits.lse_base == "2":
            lse = lse * math.log(2)
        return lse.transpose(1, 2) if self.limits.lse_layout == "heads_first" else lse


def _in_place(group: Group, heads: int, out: torch.Tensor) -> torch.Tensor | None:
    """Return the group's part of `out` [T, h, c] as [rows, s, h, c] where a kernel could write it itself."""
    if not isinstance(group.tokens, slice) or heads != out.shape[1]:
        return None
    target = out[group.tokens]
    return target.view(group.rows, group.queries, *out.shape[1:]) if target.is_contiguous() else None


def _store(group: Group, target: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy a group's rows to their places in `target` [T, ...]."""
    if isinstance(group.tokens, slice):
        target[group.tokens].copy_(rows)
    else:
        target.index_copy_(0, group.tokens, rows.to(target.dtype))
