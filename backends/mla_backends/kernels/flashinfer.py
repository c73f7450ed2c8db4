"""FlashInfer's `BatchMLAPagedAttentionWrapper`: ragged absorbed attention, causal, on pages of any size.

Up to 0.6, tables are arguments of `plan`, and queries and cache come in parts. Since 0.7 tables come as one
object, queries and cache as pairs, and what `run` returns is declared to `plan`; the older ways still work
there and warn. (Read in flashinfer 0.6.18, 0.7.2.post1 and 0.7.4, whose kernels for Hopper read e4m3 caches.)
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView
from mla_backends.errors import describe, one_line
from mla_backends.kernels.paged import LatentLimits
from mla_backends.kernels.vendor import (
    DeviceReason,
    KernelRefused,
    VendorModule,
    VendorOp,
    accepts,
    capturing,
    multiprocessors,
)
from mla_backends.upload import integers, upload

if TYPE_CHECKING:
    import torch

CLASS = "BatchMLAPagedAttentionWrapper"
TABLES = "MLAPlanMetadata"
FLAT = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
PLAN = (
    "num_heads", "head_dim_ckv", "head_dim_kpe", "page_size", "causal", "sm_scale", "q_data_type",
    "kv_data_type",
)  # fmt: skip
PARTS = ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
PAIRS = ("query", "kv_cache")
RUN = ("out", "lse", "return_lse", "return_lse_base_on_e")
SCALES = ("ckv_scale", "kpe_scale")
LAYOUTS = {"query_layout": "split", "kv_cache_layout": "split"}
OLDEST = (0, 6, 11)  # whose kernels are the first that compute the place of a page in 64 bits (its PR 3136)


class Release:
    """The installed flashinfer, imported when it is first asked about."""

    def __init__(self, vendor: VendorModule) -> None:
        self.vendor = vendor

    def reasons(self) -> list[str]:
        """Return why the release is not used, or how its class differs from what is expected."""
        version = str(getattr(importlib.import_module("flashinfer"), "__version__", ""))
        if () < tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
            why = f"flashinfer {version} reads other pages in large caches: use 0.6.11 or newer"
            return [self.vendor.with_hint(why)]
        tables = ("metadata",) if self._structured else FLAT
        operands = PAIRS if self.takes("run", *PAIRS) else PARTS
        wanted = {f"{CLASS}.plan": (*tables, *PLAN), f"{CLASS}.run": (*operands, *RUN)}
        return self.vendor.differences(wanted)

    @property
    def wrapper(self) -> Any:
        """The class."""
        return getattr(self.vendor, CLASS)

    def takes(self, method: str, *names: str) -> bool:
        """Return whether `plan` or `run` has all these arguments."""
        return all(accepts(getattr(self.wrapper, method), name) for name in names)

    @property
    def declares_lse(self) -> bool:
        """Whether a plan says if its runs return the log-sum-exp."""
        return self._structured and self.takes("plan", "lse_mode")

    @property
    def _structured(self) -> bool:
        return self.takes("plan", "metadata") and hasattr(self.vendor, TABLES)

    def plan_arguments(self, plan: Mapping[str, Any], lse: bool) -> dict[str, Any]:
        """Return the arguments of `plan` from those of the flat form; `lse`: runs will return it."""
        if not self._structured:
            return dict(plan)
        given = {name: value for name, value in plan.items() if name not in FLAT}
        tables = getattr(self.vendor, TABLES).csr(**{name: plan[name] for name in FLAT})
        options = {**LAYOUTS, "lse_mode": "basee" if lse else "none"}
        if "float8" in str(plan["kv_data_type"]):
            options["scale_mode"] = "kv-per-tensor"
        taken = {name: value for name, value in options.items() if self.takes("plan", name)}
        return {"metadata": tables, **given, **taken}

    def run_arguments(
        self, q: torch.Tensor, cache: torch.Tensor, latent: int, scale: float | None
    ) -> dict[str, Any]:
        """Return what `run` is given of q [T, h, c + r] and cache [pages, page, c + r], with `latent` = c.

        `scale` is that of e4m3 numbers in the cache.
        """
        parts = (q[..., :latent], q[..., latent:], cache[..., :latent], cache[..., latent:])
        scales = {} if scale is None else dict.fromkeys(SCALES, scale)
        if self.takes("run", *PAIRS):
            return {"query": parts[:2], "kv_cache": parts[2:], **scales}
        return dict(zip(PARTS, parts, strict=True)) | scales


# ------------------------------------------------------------------------------------------ batches
# Batches that FlashInfer's kernels cannot serve, though nothing stops them from trying.
#
# Its scheduler packs all heads of a request's new tokens into rows, cuts these into tiles of 64, or 128 where
# requests have more than 64 on average, and each tile's keys into parts. (Read in scheduler.cuh, mla.cuh and
# mla_hopper.cuh of include/flashinfer/attention in 0.6.18; 0.7.2 refuses the same batches when it plans.)
#
# Keys that rows of a tile see are rounded down to whole tokens, so tiles must not end between the heads of
# one. With HEADS none does where every request has new tokens; others are left out of the plan.

HEADS = (1, 2, 4, 8, 16, 32, 64, 128)  # to which other numbers are padded
WORK_ITEMS = 16_384  # places in the tables of a plan


def work_reasons(heads: int, query_lens: Sequence[int], device: torch.device) -> list[str]:
    """Return why the tables of a plan may overflow, which memory behind them pays for (empty if they do not).

    Parts are at least as long as a cluster's fair share of all tiles' keys. So there are fewer additional
    parts than clusters, and the bound is above the true count by less than one per multiprocessor.
    """
    rows = sum(query_lens) * heads
    tile = 128 if rows // max(1, len(query_lens)) > 64 else 64  # of one block, or of a cluster of two
    items = sum(-(-count * heads // tile) for count in query_lens) + multiprocessors(device) // (tile // 64)
    if items <= WORK_ITEMS:
        return []
    return [
        f"its tables hold {WORK_ITEMS} parts of work, and {sum(query_lens)} new tokens of {heads} heads may "
        f"need {items}"
    ]


# -------------------------------------------------------------------------------------------- pages
@functools.lru_cache(maxsize=4)  # in 63 of 64 decode steps with pages of 64 tokens, no request gets a new one
def _places(rows: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return where pages lie in a flattened table, [sum(counts)] int64: `counts[i]` from place `rows[i]` on.

    FlashInfer takes the pages of all requests back to back. Waits for nothing.
    """
    import torch

    total = sum(counts)
    if not total:
        return torch.empty(0, dtype=torch.int64, device=device)
    shifts = (row - start for row, start in zip(rows, accumulate(counts, initial=0), strict=False))
    shift, repeats = upload(integers((*shifts, *counts), wide=True), device).view(2, -1)
    # With the size of the result given, the device is not asked for the sum of the repeats.
    return torch.repeat_interleave(shift, repeats, output_size=total).add_(torch.arange(total, device=device))


# ----------------------------------------------------------------------------------------- wrappers
# Wrappers that take turns: each holds one plan, and its pinned memory may still be on its way.
#
# Planning writes tables into pinned memory that the device reads later, so a wrapper is planned again only
# when its last plan has arrived.

WORKSPACE_BYTES = 128 << 20  # what the library's documentation recommends for split contexts
TURNS = 4  # how many batches may be planned ahead of the device


@dataclass
class Turn:
    """A wrapper, what it is planned for, and an event behind its last plan."""

    wrapper: Any
    arrived: Any  # None where nothing is late
    planned_for: tuple[FlashInferState, bool] | None = None


class Wrappers:
    """The wrappers of one device, which share the workspace of split contexts."""

    def __init__(self, release: Release, device: torch.device) -> None:
        import torch

        self._release, self._device = release, device
        with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.turns: list[Turn] = []

    def planned(self, state: FlashInferState, lse: bool) -> Any:
        """Return a wrapper that is planned for exactly this state: one that still is, else the oldest.

        `lse`: the next run returns the log-sum-exp. A wrapper is planned once the device has read what its
        last plan left in pinned memory. Raises `KernelRefused` for what the library says it does not support;
        whatever else it raises stays as it is: a run names the op that raised.
        """
        lse = lse and self._release.declares_lse
        for turn in self.turns:
            if turn.planned_for == (state, lse):
                return turn.wrapper
        turn = self.turns.pop(0) if len(self.turns) >= TURNS else self._turn()
        self.turns.append(turn)
        turn.planned_for = None
        if turn.arrived is not None:
            turn.arrived.synchronize()
        try:
            turn.wrapper.plan(**self._release.plan_arguments(state.plan, lse))
        except ValueError as error:  # the library's own refusals are of this kind
            raise KernelRefused(f"flashinfer refuses this batch ({one_line(describe(error))}).") from error
        turn.planned_for = (state, lse)
        if turn.arrived is not None:
            turn.arrived.record()
        return turn.wrapper

    def _turn(self) -> Turn:
        import torch

        with torch.inference_mode(False):  # it makes memory of its own
            wrapper = self._release.wrapper(self._workspace)
        event = getattr(getattr(torch, self._device.type, None), "Event", None)
        return Turn(wrapper, event() if event is not None and self._device.type != "cpu" else None)


# ----------------------------------------------------------------------------------------------- op

COMPILES = "it compiles its kernel for this device at first use (a minute or more)"


@dataclass(frozen=True, eq=False)
class FlashInferState:
    """What a wrapper is planned with: host lengths, and the pages of all requests back to back."""

    plan: dict[str, Any]  # in the flat form of `Release.plan_arguments`
    empty: torch.Tensor | None  # [n] int64: tokens that see no key


class FlashInferMla(VendorOp):
    """`flashinfer.mla.BatchMLAPagedAttentionWrapper`. It writes to `out` and `lse` itself.

    Plans are made on the host from host tensors, so that nothing is copied back from the device; a capture is
    therefore refused.
    """

    contract = OPS["latent_attention"]
    cache_formats = ("fp8", "fp8:")
    compiles = COMPILES
    module = "flashinfer.mla"
    needs: Mapping[str, Mapping[str, Any]] = {CLASS: {}}
    limits = LatentLimits(page_sizes=None, heads=HEADS, pads_heads_to=HEADS, graph=False)

    def __init__(
        self,
        limits: LatentLimits | None = None,
        *,
        install: str = "",
        e4m3_reason: DeviceReason | None = None,
    ) -> None:
        """Take the kernel's limits on this vendor's devices, and the hint for a missing flashinfer.

        `e4m3_reason` says why a device cannot read e4m3 caches, "" if it can.
        """
        super().__init__(limits, install=install)
        self.release = Release(self._vendor)
        self._e4m3_reason = e4m3_reason
        self._wrappers: dict[torch.device, Wrappers] = {}
        self._wants_lse = False  # what the last call wanted: the next plan is made for it

    # ------------------------------------------------------------------------------------------- refusals

    def interface_reasons(self) -> list[str]:
        return self.release.reasons()

    def layer_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = super().layer_reasons(spec)
        if not spec.cache_format:
            return reasons
        device = self._e4m3_reason(spec.device) if self._e4m3_reason else ""
        reasons += [device] if device else []
        if not self._vendor.reasons() and not self.release.takes("run", *SCALES):
            reasons.append("this flashinfer reads no e4m3 cache: upgrade to 0.7.4 or newer")
        if str(spec.dtype) != "torch.bfloat16":
            reasons.append(f"it reads an e4m3 cache with bfloat16 queries only, not {spec.dtype}")
        return reasons

    def preflight(self, spec: AttentionSpec) -> list[str]:
        self.cure = f"install the CUDA toolkit, or `{compiled_kernels()}`"
        if reasons := super().preflight(spec):
            self._wrappers.pop(spec.device, None)  # its workspace would be kept for nothing
        return reasons

    def unsupported_batch(
        self, spec: Any, query_lens: Sequence[int], kv_lens: Sequence[int], page_size: int | None = None
    ) -> list[str]:
        reasons = self.limits.page_reasons(page_size)
        if not sum(query_lens):
            reasons.append("a batch must have new tokens")
        if any(keys < count != 1 for count, keys in zip(query_lens, kv_lens, strict=True)):
            reasons.append("a request must not have more new tokens than keys")
        busy = [count for count in query_lens if count]
        return reasons + work_reasons(self._heads(spec), busy, spec.device)

    def _heads(self, spec: AttentionSpec) -> int:
        """Return how many heads the kernel is given."""
        return self.limits.padded_heads(spec.num_heads) or spec.num_heads

    # --------------------------------------------------------------------------------------------- plans

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> FlashInferState:
        """Plan the batch on the host. Raises `KernelRefused` inside a graph."""
        _check_capture(spec.device)
        state = self._state(spec, batch)
        self._pool(spec.device).planned(state, self._wants_lse)
        return state

    def _pool(self, device: torch.device) -> Wrappers:
        if device not in self._wrappers:
            self._wrappers[device] = Wrappers(self.release, device)
        return self._wrappers[device]

    def _state(self, spec: AttentionSpec, batch: BatchView) -> FlashInferState:
        import torch

        table, requests = batch.block_table, enumerate(zip(batch.query_lens, batch.kv_lens, strict=True))
        busy = [(row, count, keys) for row, (count, keys) in requests if count]
        counts = [count for _, count, _ in busy]
        pages = tuple(-(-keys // batch.page_size) for _, _, keys in busy)
        places = _places(tuple(row * table.shape[1] for row, _, _ in busy), pages, table.device)
        starts = list(accumulate(counts, initial=0))
        # Requests without keys have one token: `unsupported_batch`.
        empty = [first for first, (_, _, keys) in zip(starts, busy, strict=False) if not keys]
        return FlashInferState(
            plan={
                "qo_indptr": integers(starts),
                "kv_indptr": integers(accumulate(pages, initial=0)),
                "kv_indices": table.reshape(-1).index_select(0, places),
                "kv_len_arr": integers(keys for _, _, keys in busy),
                "num_heads": self._heads(spec),
                "head_dim_ckv": spec.kv_lora_rank,
                "head_dim_kpe": spec.qk_rope_head_dim,
                "page_size": batch.page_size,
                "causal": True,
                "sm_scale": float(spec.softmax_scale),
                "q_data_type": spec.dtype,
                "kv_data_type": torch.float8_e4m3fn if spec.cache_format else spec.dtype,
            },
            empty=upload(integers(empty, wide=True), table.device) if empty else None,
        )

    # --------------------------------------------------------------------------------------------- calls

    def __call__(
        self, state: FlashInferState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r] or e4m3 codes
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # [T, h, c], [T, h] fp32
        cache_format: str = "",
    ) -> None:  # fmt: skip
        import torch

        scale = float(cache_format.partition(":")[2] or 1) if cache_format else None
        cache = cache.view(torch.float8_e4m3fn) if cache_format else cache
        _check_capture(q.device)
        self._wants_lse = lse is not None
        wrapper = self._pool(q.device).planned(state, self._wants_lse)
        heads, planned, target, sums = q.shape[1], state.plan["num_heads"], out, lse
        if planned > heads:
            target, narrow_q, q = self._wide("out", out, planned), q, self._wide("q", q, planned)
            q[:, :heads] = narrow_q
        if lse is not None and (planned > heads or not lse.is_contiguous()):
            sums = self._wide("lse", lse, planned)
        given = self.release.run_arguments(q, cache, out.shape[-1], scale)
        wanted = {} if sums is None else {"lse": sums, "return_lse": True, "return_lse_base_on_e": True}
        wrapper.run(**given, out=target, **wanted)
        for wide, narrow in ((target, out), (sums, lse)):
            if narrow is not None and wide is not None and wide is not narrow:
                narrow.copy_(wide[:, :heads])
        if state.empty is not None:
            out.index_fill_(0, state.empty, 0)
            if lse is not None:
                lse.index_fill_(0, state.empty, -math.inf)

    def _wide(self, name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Return memory like x [T, h, ..] with so many heads, those of no call full of zeros."""
        return self._scratch.take(name, (x.shape[0], heads, *x.shape[2:]), x)


def _check_capture(device: torch.device) -> None:
    if capturing(device):
        raise KernelRefused("flashinfer plans on the host, so no graph can capture it.")


def compiled_kernels() -> str:
    """Return the command that installs compiled kernels, for the CUDA of the torch that is installed."""
    import torch

    cuda = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cuXXX"
    return f"pip install flashinfer-jit-cache --index-url https://flashinfer.ai/whl/{cuda}"
