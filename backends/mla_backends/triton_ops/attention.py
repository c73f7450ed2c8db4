"""`latent_attention`, flash decoding over pages, and `expanded_attention`, flash attention over segments.

Keys of a batch of `latent_attention` are split over programs, so that all multiprocessors have work; a second
launch merges the parts of requests that are split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView, SegmentLengths
from mla_backends.kernels.vendor import DeviceReason
from mla_backends.selftest import try_expanded, try_latent
from mla_backends.torch_backend import capturing
from mla_backends.triton_ops.launcher import (
    CACHE_FORMATS,
    IN_TWO_PARTS,
    KernelOp,
    Launcher,
    format_reasons,
    stored,
    strides,
    wide,
)
from mla_backends.triton_ops.tuning import MIN_SIDE, Tile, Tuning, tile_for
from mla_backends.upload import upload

if TYPE_CHECKING:
    import torch

# ------------------------------------------------------------------------------------------- splits

# A part of fewer keys costs more to merge than it saves.
MIN_PART_KEYS = 64
# Parts of one request.
MAX_SPLITS = 256
# Bytes of the parts of a batch, whatever its lengths; with very many rows nothing is split.
PARTS_BYTES = 256 << 20
# What a program costs besides its keys, and what a merge costs: its launch, and every step in which it waits
# for the parts that it reads at once. In keys, and estimates.
PROGRAM_KEYS, MERGE_KEYS, MERGE_STEP_KEYS = 96, 48, 16
MERGED_PARTS = 32
# Waves of programs that are considered; more do not balance any better.
WAVES = 4
# Ragged requests whose programs are counted; of more they are estimated, because planning is part of a step.
COUNTED = 16


@dataclass(frozen=True)
class Splits:
    """The run-time arguments of the kernels: requests of up to `keys_per_split` keys have one part."""

    keys_per_split: int
    max_splits: int  # of any request that fits the block table


@dataclass(frozen=True)
class _Load:
    """Blocks of rows and keys of the requests that have some."""

    blocks: list[int]
    keys: list[int]
    longest: int
    equal: bool  # all have as many keys
    all_blocks: int
    total: int  # keys, block by block

    def programs(self, part: int) -> int:
        """Return how many programs there are with parts of at most this many keys."""
        if self.equal:
            return self.all_blocks * -(-self.longest // part)
        if len(self.keys) > COUNTED:  # half a part more for each, as lengths are of all kinds
            return self.total // part + (self.all_blocks + 1) // 2
        return sum(blocks * -(-keys // part) for blocks, keys in zip(self.blocks, self.keys, strict=True))

    def cost(self, part: int, at_once: int) -> float:
        """Return an estimate of the time with such parts, in keys: of whole waves, or of a full device."""
        programs = self.programs(part)
        waves = -(-programs // at_once) * (part + PROGRAM_KEYS)
        packed = (self.total + programs * PROGRAM_KEYS) / at_once + part + PROGRAM_KEYS
        parts = -(-self.longest // part)
        merge = MERGE_KEYS + MERGE_STEP_KEYS * -(-parts // MERGED_PARTS) if parts > 1 else 0
        return min(waves, packed) + merge


def split(
    query_rows: Sequence[int],
    kv_lens: Sequence[int],
    capacity: int,
    row_bytes: int,
    tile: Tile,
    multiprocessors: int,
) -> Splits:
    """Return the splits for requests with so many query rows (new tokens times heads) and keys.

    `capacity`: the most keys that a request may grow to; `row_bytes`: of one part of a query row.
    """
    requests = zip(query_rows, kv_lens, strict=True)
    busy = [(-(-rows // tile.rows), keys) for rows, keys in requests if rows and keys]
    if not busy:
        return Splits(max(MIN_PART_KEYS, capacity), 1)
    blocks, keys = (list(column) for column in zip(*busy, strict=True))
    longest, total = max(keys), sum(map(mul, blocks, keys))
    load = _Load(blocks, keys, longest, min(keys) == longest, sum(blocks), total)
    at_once = multiprocessors * tile.programs
    part = min(_candidates(load, at_once), key=lambda keys: load.cost(keys, at_once))
    # A little longer, so that a captured step has as many parts when its lengths have grown a little.
    reach = min(capacity, part + part // 16 + (MIN_PART_KEYS if part == load.longest else 0))
    chosen = -(-reach // tile.keys) * tile.keys
    useful = max(-(-longest // chosen), -(-WAVES * at_once // load.all_blocks))
    most = min(MAX_SPLITS, PARTS_BYTES // (sum(query_rows) * row_bytes), useful)
    return Splits(chosen, max(1, min(most, -(-capacity // chosen))))


def _candidates(load: _Load, at_once: int) -> Iterator[int]:
    """Yield lengths of parts: none is split, or the programs make up so many waves."""
    yield load.longest
    blocks = load.all_blocks
    for waves in range(1, WAVES + 1):
        programs = waves * at_once
        lengths = [-(-load.longest // max(1, programs // blocks))]
        if not load.equal:
            lengths.append(-(-load.total // max(1, programs - blocks // 2)))
        yield from (min(load.longest, max(MIN_PART_KEYS, length)) for length in lengths)


# ------------------------------------------------------------------------------------------- memory
# `PartsMemory`: where the parts of split requests are kept between two launches.
class PartsMemory:
    """Floats that all batches share, one after another; what a graph captures has its own.

    It grows by powers of two, so that lengths that grow step by step seldom need more. What was outgrown is
    kept, because a graph that was captured with a plan made before may still write to it.
    """

    def __init__(self) -> None:
        self._held: dict[torch.device, list[torch.Tensor]] = {}

    def take(self, floats: int, like: torch.Tensor) -> torch.Tensor:
        """Return at least so many floats, of any value, on the device of `like`."""
        import torch

        if capturing(like.device):
            return like.new_empty(max(1, floats), dtype=torch.float32)
        held = self._held.setdefault(like.device, [])
        if not held or held[-1].shape[0] < floats:
            with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
                held.append(like.new_empty(1 << max(0, floats - 1).bit_length(), dtype=torch.float32))
        return held[-1]


# ------------------------------------------------------------------------------------------- latent

MAX_LATENT, MAX_ROPE = 512, 128
# What a launch is compiled for, and a tile fits or not.
LATENT_VARIANT = ("LATENT", "ROPE", "PAGE", "FORMAT", "TOPK", "RAGGED", "CAUSAL", "HAS_LSE")
EXPANDED_VARIANT = ("WIDTH", "VALUES", "RAGGED", "CAUSAL", "HAS_LSE")
UNKNOWN_MULTIPROCESSORS = 128  # requests are split as for a large device
# Of a program of the merge: channels of a row, and warps; and of a multiprocessor, such programs at a time.
MERGED_CHANNELS, MERGE_WARPS, MERGES = 128, 4, 8
# Programs that share the rows of the merge, about. With more rows each takes several: most have nothing to
# merge in such a batch.
MERGE_PROGRAMS = 4096
# Of the tiny problems: keys of their two requests, of which the longer is split, and sizes of pages.
TINY_KEYS = (300, 3)
PAGE, ODD_PAGE = 64, 1


@dataclass(frozen=True)
class Rows:
    """Rows of requests (new tokens times heads), or of segments (queries)."""

    requests: int
    rows: int  # of all requests
    longest: int  # of the request with the most
    ragged: bool  # requests have different numbers of rows

    def blocks(self, rows: int) -> tuple[int, int]:
        """Return how many blocks of so many rows a request has where all have equally many, and all have."""
        blocks = -(-self.longest // rows)
        return blocks, self.rows // rows + self.requests if self.ragged else self.requests * blocks


def facts_of(rows: Sequence[int]) -> tuple[int, int, int, bool]:
    """Return the fields of `Rows`, of requests that have so many."""
    return len(rows), sum(rows), max(rows), min(rows) < max(rows)


@dataclass(frozen=True)
class LatentState(Rows):
    """A planned batch. Lengths are read on the device, so a captured call follows them."""

    splits: Splits
    tile: Tile
    parts: torch.Tensor  # fp32: [T, h, max_splits, c], then [T, h, max_splits]
    graph_safe = True


class LatentAttention(KernelOp):
    """Absorbed attention over pages of any size, with any number of heads and of new tokens per request.

    `multiprocessors` None means unknown.
    """

    contract = OPS["latent_attention"]
    dtypes = ("bfloat16", "float16")
    cache_formats = CACHE_FORMATS
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
        if latent <= MAX_LATENT and rope <= MAX_ROPE:
            return format_reasons(spec)
        return [f"it holds latents of at most {MAX_LATENT} + {MAX_ROPE}, not {latent} + {rope}"]

    def attempt(self, spec: AttentionSpec) -> str:
        """Try every tile as the layer calls it, and once ragged, with odd pages and the log-sum-exp."""
        for least in self.tuning.latent:
            queries = -(-least // spec.num_heads)
            if wrong := try_latent(self, spec, PAGE, ((queries,) * 2, TINY_KEYS), with_lse=False):
                return wrong
        return try_latent(self, spec, ODD_PAGE, ((1, 2), TINY_KEYS))

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> LatentState:
        """Choose tile and splits from the lengths on the host, and take memory for the parts."""
        capacity = batch.block_table.shape[1] * batch.page_size
        return self._planned(spec, batch.block_table, batch.query_lens, batch.kv_lens, capacity)

    def _planned(
        self,
        spec: AttentionSpec,
        like: torch.Tensor,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        capacity: int,
    ) -> LatentState:
        """Return the state for these lengths; `capacity` and `like` as of `split` and `PartsMemory`."""
        rows = [count * spec.num_heads for count in query_lens]
        tile = tile_for(self.tuning.of_latents(spec.cache_format, sparse=spec.topk > 0), max(rows))
        splits = split(rows, kv_lens, capacity, 4 * spec.kv_lora_rank, tile, self._multiprocessors)
        parts = sum(rows) * splits.max_splits if splits.max_splits > 1 else 0
        memory = self._memory.take(parts * (spec.kv_lora_rank + 1), like)
        return LatentState(*facts_of(rows), splits, tile, memory)

    def __call__(
        self, state: LatentState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r] or bytes
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [T, h, c], lse [T, h] fp32
        selection: torch.Tensor | None = None,  # [T, topk] int32, of sparse attention
        cache_format: str = "",
    ) -> None:  # fmt: skip
        if q.shape[0] == 0:
            return
        latent, splits, heads = out.shape[2], state.splits, q.shape[1]
        of_parts = state.rows * splits.max_splits * latent if splits.max_splits > 1 else 0
        shared = {
            "kv_lens": kv_lens, "cu_q": cu_q, "requests": cu_q.shape[0] - 1,
            "out": out, "lse": state.parts if lse is None else lse, **strides(out=out, lse=lse),
            "part_out": state.parts, "part_lse": state.parts[of_parts:],
            "keys_per_split": splits.keys_per_split, "max_splits": splits.max_splits,
            "RAGGED": state.ragged, "HEADS": heads, "LATENT": latent, "HAS_LSE": lse is not None,
            "EARLY": self.launcher.early, "TOPK": 0 if selection is None else selection.shape[1],
        }  # fmt: skip
        rope = q.shape[2] - latent
        facts, stored_scale = stored(cache, cache_format, self.launcher)
        arguments = {
            **shared, **facts, "q": q, **strides(q=q), "cache": cache,
            "block_table": block_table, "table_row": block_table.stride(0),
            "selection": selection, "selection_row": None if selection is None else selection.stride(0),
            "scale": softmax_scale * math.log2(math.e) * stored_scale, "stored_scale": stored_scale,
            "ROPE": rope, "WIDE_ROPE": wide(rope, MIN_SIDE), "PAGE": cache.shape[1],
            "CAUSAL": state.longest > heads,
        }  # fmt: skip
        self._attend(state, arguments)
        if splits.max_splits > 1:
            self._merge(state, shared)

    def _attend(self, state: LatentState, arguments: dict[str, Any]) -> None:
        from mla_backends.triton_ops.jit.latent import attend_latent

        page, whole = arguments["PAGE"], wide(arguments["LATENT"], MIN_SIDE)

        def start(tile: Tile) -> None:
            if arguments["FORMAT"] != "plain":
                tile = tile.of_bytes(arguments["FORMAT"] in IN_TWO_PARTS)
            if page % tile.keys or arguments["TOPK"]:
                tile = tile.across_pages()
            blocks, programs = state.blocks(tile.rows)
            halves = tile.halves and whole > MIN_SIDE
            sizes = {"blocks": blocks, "ROWS": tile.rows, "KEYS": tile.keys, "SPREAD": tile.spread}
            pieces = {"PIECE": whole // 2 if halves else whole, "HALVES": halves}
            grid = (programs, state.splits.max_splits)
            self.launcher.start(attend_latent, grid, {**arguments, **sizes, **pieces}, **tile.resources)

        self.launcher.start_tiled(self.tiled, state.tile, arguments, LATENT_VARIANT, start)

    def _merge(self, state: LatentState, shared: dict[str, Any]) -> None:
        from mla_backends.triton_ops.jit.latent import merge_latent

        rows = max(1, state.rows // MERGE_PROGRAMS)
        blocks, programs = state.blocks(rows)
        channels = min(MERGED_CHANNELS, wide(shared["LATENT"]))
        sizes = {"blocks": blocks, "rows": rows, "CHANNELS": channels, "PARTS": MERGED_PARTS}
        grid = (programs, -(-shared["LATENT"] // channels))
        arguments = {**shared, **sizes}
        self.launcher.start(merge_latent, grid, arguments, warps=MERGE_WARPS, programs=MERGES)


class SparseLatentAttention(LatentAttention):
    """The same to the keys that each token selects: a token is planned, and split, as a request is.

    Keys are gathered by position and page, in the order of the selection, whatever the page size.
    """

    contract = OPS["sparse_latent_attention"]
    tiled = "sparse latent attention"

    def attempt(self, spec: AttentionSpec) -> str:
        """Try it as the layer calls it, and with odd pages and the log-sum-exp."""
        return try_latent(self, spec, PAGE, with_lse=False) or try_latent(self, spec, ODD_PAGE)

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> LatentState:
        """Choose tile and splits for tokens of `topk` keys, or of all that their requests have."""
        lengths = zip(batch.query_lens, batch.kv_lens, strict=True)
        keys = [min(kv_len, spec.topk) for count, kv_len in lengths for _ in range(count)]
        queries = [1] * len(keys) or [0]
        return self._planned(spec, batch.block_table, queries, keys or [0], spec.topk)


# ----------------------------------------------------------------------------------------- expanded

MAX_WIDTH = 256


@dataclass(frozen=True)
class ExpandedState(Rows):
    """Planned segments."""

    cu_q: torch.Tensor  # [segments + 1] int32
    cu_k: torch.Tensor  # [segments + 1] int32
    causal: bool


class ExpandedAttention(KernelOp):
    """Ordinary multi-head attention; keys may be wider than values."""

    contract = OPS["expanded_attention"]
    dtypes = ("bfloat16", "float16")
    lse_optional = True
    tiled = "expanded attention"

    def __init__(self, launcher: Launcher, tuning: Tuning, device_reason: DeviceReason | None = None) -> None:
        super().__init__(launcher, device_reason)
        self.tuning = tuning

    def shape_reasons(self, spec: AttentionSpec) -> list[str]:
        widths = (spec.qk_nope_head_dim + spec.qk_rope_head_dim, spec.v_head_dim)
        if max(widths) <= MAX_WIDTH:
            return []
        return [f"it holds keys and values of at most {MAX_WIDTH}, not {widths[0]} and {widths[1]}"]

    def attempt(self, spec: AttentionSpec) -> str:
        """Try every tile as the layer calls it, for one prompt and for several; then what rounds need."""
        wrong = ""
        for least in self.tuning.expanded:
            for lengths in (((least, 3), (least + 70, 70)), ((least, least), (least + 70, least))):
                wrong = wrong or try_expanded(self, spec, lengths, with_lse=False)
        wrong = wrong or try_expanded(self, spec)
        return wrong or try_expanded(self, spec, ((2, 2), (2, 70)), causal=False)

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> ExpandedState:
        import torch

        starts = [list(accumulate(lengths, initial=0)) for lengths in (batch.query_lens, batch.kv_lens)]
        cu_q, cu_k = upload(torch.tensor(starts, dtype=torch.int32, device="cpu"), spec.device).unbind()
        return ExpandedState(*facts_of(batch.query_lens), cu_q, cu_k, batch.causal)

    def __call__(
        self, state: ExpandedState, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        if q.shape[0] == 0:
            return
        from mla_backends.triton_ops.jit.expanded import attend_expanded

        width, values = q.shape[2], v.shape[2]
        front = max(MIN_SIDE, 1 << (width.bit_length() - 1))
        arguments = {
            "q": q, "k": k, "v": v, "out": out, "lse": out if lse is None else lse,
            **strides(q=q, k=k, v=v, out=out, lse=lse),
            "cu_q": state.cu_q, "cu_k": state.cu_k, "segments": state.requests,
            "scale": softmax_scale * math.log2(math.e),
            "RAGGED": state.ragged, "WIDTH": width, "VALUES": values, "FRONT": front,
            "BACK": wide(max(0, width - front), MIN_SIDE), "WIDE_VALUES": wide(values, MIN_SIDE),
            "CAUSAL": state.causal, "HAS_LSE": lse is not None, "EARLY": self.launcher.early,
        }  # fmt: skip

        def start(tile: Tile) -> None:
            blocks, programs = state.blocks(tile.rows)
            sizes = {"blocks": blocks, "ROWS": tile.rows, "KEYS": tile.keys}
            grid = (programs, q.shape[1])
            self.launcher.start(attend_expanded, grid, {**arguments, **sizes}, **tile.resources)

        tile = tile_for(self.tuning.expanded, state.longest)
        self.launcher.start_tiled(self.tiled, tile, arguments, EXPANDED_VARIANT, start)
