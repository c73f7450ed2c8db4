"""Cut a ragged batch into groups of rows with equally many queries, which is what a vendor's kernel takes.

A row is a run of one request's queries together with the keys that the last of them sees. Requests with
equally many new tokens share one launch, so a decode step is one launch and a mixed batch one per distinct
number of new tokens; no key is read more often than the kernel's own tiling requires.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mla_backends.api import OPS, AttentionSpec, BatchView
from mla_backends.kernels.vendor import (
    DeviceReason,
    KernelRefused,
    VendorOp,
    capturing,
    either,
    layer_reasons,
)
from mla_backends.upload import integers, upload

if TYPE_CHECKING:
    import torch


class Row(NamedTuple):
    """Queries of one request, from token `first` on; the last sees `keys` keys, each before it one less."""

    request: int
    first: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Group:
    """Rows that one launch serves."""

    rows: int
    queries: int  # per row
    tokens: slice | torch.Tensor  # of the batch, row after row; an index where they are not contiguous
    block_table: torch.Tensor  # [rows, n] int32
    kv_lens: torch.Tensor  # [rows] int32
    longest: int  # the most keys of a row
    has_empty: bool  # some row sees no key
    follows_batch: bool  # the tables are the batch's own, so a captured graph sees what they are updated to
    given_lens: torch.Tensor  # [rows] int32: kv_lens, or as the kernel takes them once it is planned
    plan: Any = None  # the vendor's


def cut(query_lens: Sequence[int], kv_lens: Sequence[int], most: int | None) -> Iterator[Row]:
    """Cut each request into rows of at most `most` queries (None: any), which see none of no keys."""
    start = 0
    for request, (count, keys) in enumerate(zip(query_lens, kv_lens, strict=True)):
        for first in range(0, count, most or count or 1):
            last = min(first + (most or count), count)
            seen = max(0, keys - (count - last))  # queries behind the row have more
            yield Row(request, start + first, last - first, seen)
        start += count


def groups(batch: BatchView, most: int | None) -> tuple[Group, ...]:
    """Group a batch's rows by their number of queries. Waits for nothing on the device."""
    rows = sorted(cut(batch.query_lens, batch.kv_lens, most), key=lambda row: row.queries)  # which is stable
    if not rows:
        return ()  # no new tokens
    members = [list(alike) for _, alike in groupby(rows, key=lambda row: row.queries)]
    if len(members) == 1 and [row.request for row in rows] == list(range(len(batch.query_lens))):
        return (_group(rows, None, batch),)
    columns = ((row.request for row in rows), (row.keys for row in rows), (row.first for row in rows))
    index = upload(integers(chain(*columns), wide=True), batch.block_table.device).view(3, -1)
    parts = index.split([len(alike) for alike in members], dim=1)
    return tuple(_group(alike, part, batch) for alike, part in zip(members, parts, strict=True))


def _group(rows: Sequence[Row], index: torch.Tensor | None, batch: BatchView) -> Group:
    """Gather what a part of the batch needs; `index` [3, rows] int64 holds request, keys and first query.

    None: the rows are the requests, one by one.
    """
    import torch

    queries, first, keys = rows[0].queries, rows[0].first, [row.keys for row in rows]
    tokens: slice | torch.Tensor = slice(first, first + queries * len(rows))
    table, kv_lens = batch.block_table, batch.kv_lens_device
    if index is not None:
        table, kv_lens = table.index_select(0, index[0]), index[1].int()
        if any(row.first != first + i * queries for i, row in enumerate(rows)):
            tokens = (index[2][:, None] + torch.arange(queries, device=index.device)).view(-1)
    whole = index is None
    return Group(len(rows), queries, tokens, table, kv_lens, max(keys), min(keys) == 0, whole, kv_lens)


# ------------------------------------------------------------------------------------------- limits
# What a vendor's kernel can do, as data that the vendor's plugin declares, and the checks that follow.

# Why kernels that could read an e4m3 cache do not serve it: `FusedOp.refused_formats`.
E4M3_QUERIES: Mapping[str, str] = {
    "fp8": "its kernel takes e4m3 queries with such a cache, and the format does not round queries"
}


@dataclass(frozen=True)
class LatentLimits:
    """What one kernel for absorbed attention serves. The defaults are those of FlashMLA on Hopper.

    Declare conservatively what has not been confirmed: `empty_rows=False` costs a little, a wrong True gives
    wrong numbers.
    """

    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    widths: tuple[tuple[int, int], ...] = ((512, 64),)  # (kv_lora_rank, qk_rope_head_dim)
    page_sizes: tuple[int, ...] | None = (64,)  # None: any
    heads: tuple[int, ...] | None = None  # head counts the kernel takes; None: any
    max_heads: int | None = None  # None: any
    pads_heads_to: tuple[int, ...] = ()  # head counts that others are padded to with zeros, where declared
    max_queries: int | None = None  # query tokens of one request in one row; None: any
    max_query_rows: int | None = None  # query tokens times heads in one row; None: any
    max_rows: int | None = None  # rows of one launch; None: any
    max_bytes: int | None = None  # of a cache, for selected latents; None: any
    lse_layout: Literal["heads_first", "tokens_first"] = "heads_first"  # [rows, h, s], or [rows, s, h]
    lse_base: Literal["e", "2"] = "e"
    empty_rows: bool = True  # rows without keys may be launched
    graph: bool = True  # calls can be captured
    device_reason: DeviceReason | None = None

    def padded_heads(self, heads: int) -> int | None:
        """Return how many heads the kernel is given for `heads`; None if it serves no such layer."""
        few = self.max_heads is None or heads <= self.max_heads
        if few and (self.heads is None or heads in self.heads):
            return heads
        return min((count for count in self.pads_heads_to if count >= heads), default=None)

    def queries_per_row(self, heads: int) -> int | None:
        """Return the most query tokens of a request that may share a row; None: any."""
        limits = [self.max_queries] if self.max_queries else []
        if self.max_query_rows:
            limits.append(max(1, self.max_query_rows // heads))
        return min(limits, default=None)

    def reasons(self, spec: AttentionSpec) -> list[str]:
        """Return why the kernel cannot serve layers like `spec` (empty if it can)."""
        reasons = layer_reasons(self.device_reason, self.dtypes, spec)
        if (spec.kv_lora_rank, spec.qk_rope_head_dim) not in self.widths:
            made_for = either(f"{c} + {r}" for c, r in self.widths)
            reasons.append(
                f"it is made for latents of {made_for}, not {spec.kv_lora_rank} + {spec.qk_rope_head_dim}"
            )
        if self.padded_heads(spec.num_heads) is None:
            listed = (*(self.heads or ()), *self.pads_heads_to)
            served = either(listed) if listed else f"at most {self.max_heads}"
            reasons.append(f"it serves {served} heads, not {spec.num_heads}")
        return reasons

    def row_reasons(self, heads: int, query_lens: Sequence[int], kv_lens: Sequence[int]) -> list[str]:
        """Return why a launch cannot hold the rows of a batch (empty if it can)."""
        if self.max_rows is None or sum(query_lens) <= self.max_rows:  # a row has at least one query
            return []
        most = self.queries_per_row(self.padded_heads(heads) or heads)
        sizes = Counter(row.queries for row in cut(query_lens, kv_lens, most))
        rows = max(sizes.values(), default=0)
        if rows <= self.max_rows:
            return []
        return [f"it takes at most {self.max_rows} rows at a time, and this batch has {rows}"]

    def page_reasons(self, page_size: int | None) -> list[str]:
        """Return why the kernel cannot read pages of this size (empty if it can, or for None)."""
        if page_size is None or self.page_sizes is None or page_size in self.page_sizes:
            return []
        return [
            f"it reads pages of {either(self.page_sizes)} tokens, but this cache has pages of {page_size}"
        ]


# -------------------------------------------------------------------------------------------- paged
# What kernels for absorbed attention over pages share: rows planned, queries laid out, results written.
@dataclass(frozen=True)
class PagedState:
    """A planned batch: valid as long as the batch is, for every layer with the same spec."""

    groups: tuple[Group, ...]
    heads: int  # what the kernel is given, padding included
    capturable: bool = True
    captured: bool = False  # planned inside a graph, which plans anew whenever it is replayed

    @property
    def graph_safe(self) -> bool:
        """Whether a captured call follows the batch when its lengths are updated in place."""
        return self.capturable and all(group.follows_batch for group in self.groups)


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
    with_lse: bool  # somebody reads it


Result = tuple["torch.Tensor", "torch.Tensor | None"]  # out [rows, s, h, c], lse in the declared layout


class PagedLatentOp(VendorOp):
    """Base of adapters whose kernel takes rows with equally many queries. Subclasses plan and launch.

    Costs besides the kernel, per launch: a copy into `out` unless the kernel writes to it directly, and one
    into `lse` if there is one; a copy of q where its rows are scattered, strided or padded; a little where a
    row has no key.
    """

    contract = OPS["latent_attention"]
    limits: LatentLimits

    def unsupported_batch(
        self, spec: Any, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> list[str]:
        rows = self.limits.row_reasons(spec.num_heads, query_lens, kv_lens)
        return self.limits.page_reasons(page_size) + rows

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> PagedState:
        """Plan the batch without waiting for the device."""
        heads = self.limits.padded_heads(spec.num_heads) or spec.num_heads
        captured, cuts = capturing(spec.device), groups(batch, self.limits.queries_per_row(heads))
        planned = tuple(self._planned(group, heads, batch.page_size, captured) for group in cuts)
        return PagedState(planned, heads, self.limits.graph, captured)

    def _planned(self, group: Group, heads: int, page_size: int, captured: bool) -> Group:
        """Return the group with its plan and the lengths that the kernel takes.

        A replay may find rows empty that are not empty now.
        """
        lens = group.kv_lens
        if not self.limits.empty_rows and (group.has_empty or captured):
            lens = lens.clamp(min=1)  # what such a row gives is overwritten
        return replace(group, given_lens=lens, plan=self.plan(lens, group.queries * heads))

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
        for group in state.groups:
            if captured != state.captured:  # the plan is of another time than this launch
                group = self._planned(group, state.heads, cache.shape[1], captured=True)
            table = group.block_table.contiguous()  # not every kernel is known to read its strides
            call = Launch(
                q=self._queries(group, state.heads, q, captured),
                cache=cache,
                block_table=table,
                kv_lens=group.given_lens,
                longest=table.shape[1] * cache.shape[1] if captured else max(1, group.longest),
                scale=float(softmax_scale),
                latent=out.shape[2],
                out=_in_place(group, state.heads, out),
                captured=captured,
                with_lse=lse is not None,
            )
            self._write(group, call, self.launch(group.plan, call), out, lse)

    def _check_capture(self, state: PagedState) -> None:
        """Raise `KernelRefused` for what a replay would get wrong."""
        if not self.limits.graph:
            raise KernelRefused(f"{self._vendor.name} waits for the device, so no graph can capture it.")
        if not state.graph_safe:
            raise KernelRefused(
                "a graph of this batch would not follow its lengths: capture batches whose requests all have "
                "the same number of new tokens."
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
