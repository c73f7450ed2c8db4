"""`latent_attention`: flash decoding over the pages, one launch, and a second where requests are split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView
from mla_backends.kernels.scratch import Scratch
from mla_backends.kernels.trial import try_latent
from mla_backends.torch_backend.graph import capturing
from mla_backends.triton_ops.kernel_op import DeviceReason, KernelOp, wide
from mla_backends.triton_ops.launcher import Launcher
from mla_backends.triton_ops.splits import Splits, split
from mla_backends.triton_ops.tuning import LEAST, Tile, Tuning, tile_for

if TYPE_CHECKING:
    import torch

MOST_LATENT, MOST_ROPE = 512, 128
# Of the merge: channels of a program and parts of a step, 16 KiB of registers in fp32.
MERGED_COLUMNS, MERGED_PARTS = 128, 32
# Programs of the merge, about. With more rows each takes several: most have nothing to merge in such a batch.
MERGE_PROGRAMS = 4096
PAGE_SIZE = 64  # of the tiny problem


@dataclass(frozen=True)
class LatentState:
    """A planned batch. Lengths are read on the device, so a captured call follows them."""

    longest: int  # new tokens of the request with the most
    requests: int
    splits: Splits
    tile: Tile
    part_out: torch.Tensor | None  # fp32, for [T, h, max_splits, c]; None where nothing is split
    part_lse: torch.Tensor | None  # fp32, for [T, h, max_splits]
    graph_safe = True


class LatentAttention(KernelOp):
    """Absorbed attention over pages of any size, with any number of heads and of new tokens per request.

    `multiprocessors` None means unknown: requests are then split as for a large device.
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
        self._programs = (multiprocessors or 128) * tuning.programs
        self._scratch = Scratch()

    def shape_reasons(self, spec: AttentionSpec) -> list[str]:
        latent, rope = spec.kv_lora_rank, spec.qk_rope_head_dim
        if latent <= MOST_LATENT and rope <= MOST_ROPE:
            return []
        return [f"it holds latents of at most {MOST_LATENT} + {MOST_ROPE}, not {latent} + {rope}"]

    def attempt(self, spec: AttentionSpec) -> str:
        return try_latent(self, spec, PAGE_SIZE)

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> LatentState:
        """Choose tile and splits from the lengths on the host, and take memory for the parts."""
        heads, longest = spec.num_heads, max(batch.query_lens)
        tile = tile_for(self.tuning.latent, longest * heads)
        rows = [count * heads for count in batch.query_lens]
        capacity = batch.block_table.shape[1] * batch.page_size
        splits = split(rows, batch.kv_lens, capacity, 4 * spec.kv_lora_rank, tile, self._programs)
        parts = (None, None)
        if splits.max_splits > 1:
            parts = self._parts(spec, sum(batch.query_lens), splits.max_splits, batch.block_table)
        return LatentState(longest, len(batch.query_lens), splits, tile, *parts)

    def _parts(self, spec: AttentionSpec, tokens: int, parts: int, like: torch.Tensor) -> Any:
        """Return memory for the parts: what a graph captures has its own, all other batches share some."""
        import torch

        rows = tokens * spec.num_heads * parts
        sizes = {"part_out": rows * spec.kv_lora_rank, "part_lse": rows}
        if capturing(spec.device):
            return tuple(like.new_empty(size, dtype=torch.float32) for size in sizes.values())
        floats = like.new_empty(0, dtype=torch.float32)
        # Powers of two, so that lengths that grow step by step do not make it grow as often.
        return tuple(self._scratch.take(name, (wide(size),), floats) for name, size in sizes.items())

    def __call__(
        self, state: LatentState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [T, h, c], lse [T, h] fp32
    ) -> None:  # fmt: skip
        if q.shape[0] == 0:
            return
        shared = {
            "kv_lens": kv_lens,
            "cu_q": cu_q,
            "out": out,
            "lse": out if lse is None else lse,
            "part_out": out if state.part_out is None else state.part_out,
            "part_lse": out if state.part_lse is None else state.part_lse,
            "out_token": out.stride(0),
            "out_head": out.stride(1),
            "lse_token": 0 if lse is None else lse.stride(0),
            "lse_head": 0 if lse is None else lse.stride(1),
            "keys_per_split": state.splits.keys_per_split,
            "max_splits": state.splits.max_splits,
            "HEADS": q.shape[1],
            "LATENT": out.shape[2],
            "HAS_LSE": lse is not None,
        }
        whole = wide(out.shape[2], LEAST)
        halves = self.tuning.halves and whole > LEAST
        piece = whole // 2 if halves else whole
        arguments = {
            **shared,
            "q": q,
            "cache": cache,
            "block_table": block_table,
            "scale": softmax_scale * math.log2(math.e),
            "q_token": q.stride(0),
            "q_head": q.stride(1),
            "table_row": block_table.stride(0),
            "ROPE": q.shape[2] - out.shape[2],
            "PIECE": piece,
            "HALVES": halves,
            "WIDE_ROPE": wide(q.shape[2] - out.shape[2], LEAST),
            "PAGE": cache.shape[1],
            "CAUSAL": state.longest > 1,
            "SPLIT": state.splits.max_splits > 1,
            "FORMAT": "plain",
        }
        self._attend(state, arguments, q.shape[1])
        if state.splits.max_splits > 1:
            self._merge(state, shared)

    def _attend(self, state: LatentState, arguments: dict[str, Any], heads: int) -> None:
        from mla_backends.triton_ops.jit.latent import attend_latent

        def start(tile: Tile) -> None:
            blocks = -(-state.longest * heads // tile.rows)
            grid = (state.requests * blocks, state.splits.max_splits)
            sizes = {"blocks": blocks, "ROWS": tile.rows, "KEYS": tile.keys}
            if arguments["PAGE"] % tile.keys:  # keys of several pages in a step take more registers
                sizes["KEYS"] = max(LEAST, tile.keys // 2)
            self.launcher.start(
                attend_latent, grid, {**arguments, **sizes}, warps=tile.warps, stages=tile.stages
            )

        self.launcher.start_tiled(self.tiled, state.tile, start)

    def _merge(self, state: LatentState, shared: dict[str, Any]) -> None:
        from mla_backends.triton_ops.jit.latent import merge_latent

        end, columns = state.longest * shared["HEADS"], min(MERGED_COLUMNS, wide(shared["LATENT"]))
        rows = max(1, state.requests * end // MERGE_PROGRAMS)
        blocks = -(-end // rows)
        parts = min(MERGED_PARTS, wide(state.splits.max_splits))
        sizes = {"blocks": blocks, "rows": rows, "COLUMNS": columns, "PARTS": parts}
        grid = (state.requests * blocks, -(-shared["LATENT"] // columns))
        self.start(merge_latent, grid, {**shared, **sizes}, 4)
