"""`latent_attention`: flash decoding over the pages, one launch, and a second where requests are split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mla_backends.api import OPS, AttentionSpec, BatchView
from mla_backends.kernels.trial import try_latent
from mla_backends.triton_ops.kernel_op import DeviceReason, KernelOp, wide
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.memory import PartsMemory
from mla_backends.triton_ops.splits import Splits, split
from mla_backends.triton_ops.tuning import LEAST, Tile, Tuning, tile_for

if TYPE_CHECKING:
    import torch

MOST_LATENT, MOST_ROPE = 512, 128
UNKNOWN_MULTIPROCESSORS = 128  # requests are split as for a large device
# Of the merge: parts that a step reads at once, as it waits for each, and warps that hold them.
MERGED_PARTS, MERGE_WARPS = 32, 8
# Programs of the merge, about. With more rows each takes several: most have nothing to merge in such a batch.
MERGE_PROGRAMS = 4096
# The tiny problems: keys of their two requests, of which the longer is split, and sizes of pages.
TRIED_KEYS = (300, 3)
PAGE, ODD_PAGE = 64, 1


@dataclass(frozen=True)
class LatentState:
    """A planned batch. Lengths are read on the device, so a captured call follows them."""

    requests: int
    rows: int  # new tokens times heads, of all requests
    longest: int  # of the request with the most
    ragged: bool  # requests have different numbers of new tokens
    splits: Splits
    tile: Tile
    parts: torch.Tensor  # fp32: [T, h, max_splits, c], then [T, h, max_splits]
    graph_safe = True

    def blocks(self, rows: int) -> tuple[int, int]:
        """Return how many blocks of so many rows a request has where all have equally many, and all have."""
        blocks = -(-self.longest // rows)
        return blocks, self.rows // rows + self.requests if self.ragged else self.requests * blocks


class Variant(NamedTuple):
    """What else than its tile a launch is compiled for."""

    device: torch.device
    dtype: torch.dtype
    latent: int
    rope: int
    page: int
    ragged: bool
    causal: bool
    with_lse: bool

    def __str__(self) -> str:
        words = ["ragged"] * self.ragged + ["several new tokens"] * self.causal + ["with lse"] * self.with_lse
        return ", ".join((f"latents of {self.latent} + {self.rope}, pages of {self.page}", *words))


class LatentAttention(KernelOp):
    """Absorbed attention over pages of any size, with any number of heads and of new tokens per request.

    `multiprocessors` None means unknown.
    """

    contract = OPS["latent_attention"]
    dtypes = ("bfloat16", "float16")
    nan_safe_tail = True
    lse_optional = True
    tiled = "latent attention"

    def __init__(
        self,
        launcher: Launcher,
        tuning: Tuning,
        multiprocessors: int | None = None,
        device_reason: DeviceReason | None = None,
    ) -> None:
        super().__init__(launcher, device_reason)
        self.tuning = tuning
        self._multiprocessors = multiprocessors or UNKNOWN_MULTIPROCESSORS
        self._memory = PartsMemory()

    def shape_reasons(self, spec: AttentionSpec) -> list[str]:
        latent, rope = spec.kv_lora_rank, spec.qk_rope_head_dim
        if latent <= MOST_LATENT and rope <= MOST_ROPE:
            return []
        return [f"it holds latents of at most {MOST_LATENT} + {MOST_ROPE}, not {latent} + {rope}"]

    def attempt(self, spec: AttentionSpec) -> str:
        """Try every tile as the layer calls it, and once ragged, with odd pages and the log-sum-exp."""
        wrong = ""
        for least in self.tuning.latent:
            queries = -(-least // spec.num_heads)
            wrong = wrong or try_latent(self, spec, PAGE, ((queries,) * 2, TRIED_KEYS), with_lse=False)
        return wrong or try_latent(self, spec, ODD_PAGE, ((1, 2), TRIED_KEYS))

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> LatentState:
        """Choose tile and splits from the lengths on the host, and take memory for the parts."""
        heads, longest = spec.num_heads, max(batch.query_lens)
        tile = tile_for(self.tuning.latent, longest * heads)
        rows = [count * heads for count in batch.query_lens]
        capacity = batch.block_table.shape[1] * batch.page_size
        sizes = (capacity, 4 * spec.kv_lora_rank, tile, self._multiprocessors)
        splits = split(rows, batch.kv_lens, *sizes)
        parts = sum(rows) * splits.max_splits if splits.max_splits > 1 else 0
        memory = self._memory.take(parts * (spec.kv_lora_rank + 1), batch.block_table)
        ragged = min(batch.query_lens) < longest
        return LatentState(len(rows), sum(rows), longest * heads, ragged, splits, tile, memory)

    def __call__(
        self, state: LatentState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [T, h, c], lse [T, h] fp32
    ) -> None:  # fmt: skip
        if q.shape[0] == 0:
            return
        latent = out.shape[2]
        shared = _shared(state, q.shape[1], kv_lens, cu_q, out, lse)
        rope = q.shape[2] - latent
        arguments = {
            **shared,
            "q": q,
            "cache": cache,
            "block_table": block_table,
            "scale": softmax_scale * math.log2(math.e),
            "q_token": q.stride(0),
            "q_head": q.stride(1),
            "table_row": block_table.stride(0),
            "ROPE": rope,
            "WIDE_ROPE": wide(rope, LEAST),
            "PAGE": cache.shape[1],
            "CAUSAL": state.longest > q.shape[1],
            "FORMAT": "plain",
        }
        self._attend(state, arguments)
        if state.splits.max_splits > 1:
            self._merge(state, shared)

    def _attend(self, state: LatentState, arguments: dict[str, Any]) -> None:
        from mla_backends.triton_ops.jit.latent import attend_latent

        page, whole = arguments["PAGE"], wide(arguments["LATENT"], LEAST)

        def start(tile: Tile) -> None:
            blocks, programs = state.blocks(tile.rows)
            halves = tile.halves and whole > LEAST
            # Keys of several pages in a step take more registers.
            keys = tile.keys if page % tile.keys == 0 else max(LEAST, tile.keys // 2)
            sizes = {"blocks": blocks, "ROWS": tile.rows, "KEYS": keys}
            pieces = {"PIECE": whole // 2 if halves else whole, "HALVES": halves}
            self.launcher.start(
                attend_latent,
                (programs, state.splits.max_splits),
                {**arguments, **sizes, **pieces},
                warps=tile.warps,
                stages=tile.stages,
            )

        q, sizes = arguments["q"], (arguments["LATENT"], arguments["ROPE"], page)
        flags = (state.ragged, arguments["CAUSAL"], arguments["HAS_LSE"])
        self.launcher.start_tiled(self.tiled, state.tile, Variant(q.device, q.dtype, *sizes, *flags), start)

    def _merge(self, state: LatentState, shared: dict[str, Any]) -> None:
        from mla_backends.triton_ops.jit.latent import merge_latent

        rows = max(1, state.rows // MERGE_PROGRAMS)
        blocks, programs = state.blocks(rows)
        sizes = {"blocks": blocks, "rows": rows, "WIDE_LATENT": wide(shared["LATENT"]), "PARTS": MERGED_PARTS}
        self.start(merge_latent, (programs,), {**shared, **sizes}, MERGE_WARPS)


def _shared(
    state: LatentState,
    heads: int,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    latent, splits = out.shape[2], state.splits
    of_parts = state.rows * splits.max_splits * latent if splits.max_splits > 1 else 0
    return {
        "kv_lens": kv_lens,
        "cu_q": cu_q,
        "out": out,
        "lse": state.parts if lse is None else lse,
        "part_out": state.parts,
        "part_lse": state.parts[of_parts:],
        "out_token": out.stride(0),
        "out_head": out.stride(1),
        "lse_token": 0 if lse is None else lse.stride(0),
        "lse_head": 0 if lse is None else lse.stride(1),
        "requests": state.requests,
        "keys_per_split": splits.keys_per_split,
        "max_splits": splits.max_splits,
        "RAGGED": state.ragged,
        "HEADS": heads,
        "LATENT": latent,
        "HAS_LSE": lse is not None,
    }
