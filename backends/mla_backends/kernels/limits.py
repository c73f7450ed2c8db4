"""What a vendor's kernel can do, as data that the vendor's plugin declares, and the checks that follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mla_backends.api import AttentionSpec
from mla_backends.kernels.rows import cut
from mla_backends.kernels.vendor import KernelRefused

if TYPE_CHECKING:
    import torch

LSE_LAYOUTS = ("heads_first", "tokens_first")
LSE_BASES = ("e", "2")


@dataclass(frozen=True)
class LatentLimits:
    """What one kernel for absorbed attention serves. The defaults are those of FlashMLA on Hopper.

    Declare conservatively what has not been confirmed: `empty_rows=False` costs a little, a wrong True gives
    wrong numbers. Raises ValueError for an unknown layout or base.
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
    lse_layout: str = "heads_first"  # [rows, h, s], or "tokens_first": [rows, s, h]
    lse_base: str = "e"  # or "2"
    empty_rows: bool = True  # rows without keys may be launched
    graph: bool = True  # calls can be captured
    device_reason: Callable[[torch.device], str] | None = None  # why this device cannot run it; "" if it can

    def __post_init__(self) -> None:
        if self.lse_layout not in LSE_LAYOUTS or self.lse_base not in LSE_BASES:
            raise ValueError(f"lse_layout must be one of {LSE_LAYOUTS}, lse_base one of {LSE_BASES}.")

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
        found = []
        why = self.device_reason(spec.device) if self.device_reason else ""
        if why:
            found.append(why)
        found += dtype_reasons(self.dtypes, spec)
        if (spec.kv_lora_rank, spec.qk_rope_head_dim) not in self.widths:
            made_for = _or(f"{c} + {r}" for c, r in self.widths)
            found.append(
                f"it is made for latents of {made_for}, not {spec.kv_lora_rank} + {spec.qk_rope_head_dim}"
            )
        if self.padded_heads(spec.num_heads) is None:
            found.append(f"it serves {self._served_heads()} heads, not {spec.num_heads}")
        return found

    def _served_heads(self) -> str:
        listed = (*(self.heads or ()), *self.pads_heads_to)
        return _or(listed) if listed else f"at most {self.max_heads}"

    def row_reasons(self, heads: int, query_lens: Sequence[int], kv_lens: Sequence[int]) -> list[str]:
        """Return why a launch cannot hold the rows of a batch (empty if it can)."""
        if self.max_rows is None or sum(query_lens) <= self.max_rows:  # a row has at least one query
            return []
        most = self.queries_per_row(self.padded_heads(heads) or heads)
        lengths: Any = SimpleNamespace(query_lens=query_lens, kv_lens=kv_lens)
        sizes = Counter(row.queries for row in cut(lengths, most))
        rows = max(sizes.values(), default=0)
        if rows <= self.max_rows:
            return []
        return [f"it takes at most {self.max_rows} rows at a time, and this batch has {rows}"]

    def page_reasons(self, page_size: int | None) -> list[str]:
        """Return why the kernel cannot read pages of this size (empty if it can, or for None)."""
        if page_size is None or self.page_sizes is None or page_size in self.page_sizes:
            return []
        return [f"it reads pages of {_or(self.page_sizes)} tokens, but this cache has pages of {page_size}"]

    def check_page(self, page_size: int) -> None:
        """Raise `KernelRefused` when the kernel cannot read pages of this size."""
        for reason in self.page_reasons(page_size):
            sizes = _or(self.page_sizes or ())
            raise KernelRefused(
                f"the chosen attention op cannot serve this batch: {reason}. "
                f"Build the cache with page_size={sizes}, or use the reference ops (`--ops reference`)."
            )


def dtype_reasons(dtypes: Sequence[str], spec: AttentionSpec) -> list[str]:
    """Return why a kernel for `dtypes` cannot compute in the layer's own (empty if it can)."""
    name = str(spec.dtype).removeprefix("torch.")
    return [] if name in dtypes else [f"it computes in {_or(dtypes)}, not {name}"]


def _or(values: object) -> str:
    """Join values as "1, 2 or 3"."""
    words = list(dict.fromkeys(str(value) for value in values))  # type: ignore[attr-defined]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
