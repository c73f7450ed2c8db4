"""FlashInfer's `BatchMLAPagedAttentionWrapper`: ragged absorbed attention, causal, on pages of any size.

The class has three generations, told apart by their arguments. Oldest: flat tables, log-sum-exp to base 2.
Then, up to 0.6, the natural logarithm can be asked for. Since 0.7 tables come as one object, queries and
cache as pairs, and what `run` returns is declared to `plan`; the older ways still work there and warn.
(Read in flashinfer 0.2.5, 0.6.18, 0.7.2.post1 and 0.7.4, whose kernels for Hopper read e4m3 caches.)
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView
from mla_backends.errors import describe, one_line
from mla_backends.kernels.paged import LatentLimits
from mla_backends.kernels.vendor import (
    DeviceReason,
    KernelRefused,
    Scratch,
    VendorModule,
    VendorOp,
    accepts,
    capturing,
    missing,
)
from mla_backends.selftest import try_latent
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
RUN = ("out", "lse", "return_lse")
NATURAL = "return_lse_base_on_e"
SCALES = ("ckv_scale", "kpe_scale")
LAYOUTS = {"query_layout": "split", "kv_cache_layout": "split"}
# The first release whose kernels compute the place of a page in 64 bits (flashinfer PR 3136).
WIDE_PAGES = (0, 6, 11)


class Release:
    """The installed flashinfer, imported when it is first asked about."""

    def __init__(self, install: str) -> None:
        self.vendor = VendorModule("flashinfer.mla", (CLASS,), install)

    def reasons(self) -> list[str]:
        """Return how the class differs from what is expected (empty if it does not)."""
        plan = (*PLAN, "metadata") if self._structured else (*FLAT, *PLAN)
        run = (*(PAIRS if self.takes("run", *PAIRS) else PARTS), *RUN)
        return missing(self.wrapper.plan, f"{CLASS}.plan", plan) + missing(
            self.wrapper.run, f"{CLASS}.run", run
        )

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

    @functools.cached_property
    def wide_pages(self) -> bool:
        """Whether pages are found beyond 2^32 numbers; False where the version is unknown."""
        try:
            version = str(getattr(importlib.import_module("flashinfer"), "__version__", ""))
        except Exception:  # noqa: BLE001  # a broken package raises anything; `reasons` says so
            return False
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
        if numbers is None:
            return False
        release = tuple(map(int, numbers.groups()))
        return release > WIDE_PAGES or (release == WIDE_PAGES and "dev" not in version)

    @property
    def _structured(self) -> bool:
        return self.takes("plan", "metadata") and hasattr(self.vendor, TABLES)

    def plan_arguments(self, plan: Mapping[str, Any], lse: bool) -> dict[str, Any]:
        """Return the arguments of `plan` from those of the flat form; `lse`: runs will return it."""
        if not self._structured:
            return dict(plan)
        given = {name: value for name, value in plan.items() if name not in FLAT}
        tables = getattr(self.vendor, TABLES).csr(**{name: plan[name] for name in FLAT})
        layouts = {name: value for name, value in LAYOUTS.items() if self.takes("plan", name)}
        modes = {"lse_mode": "basee" if lse else "none"} if self.declares_lse else {}
        if "float8" in str(plan["kv_data_type"]) and self.takes("plan", "scale_mode"):
            modes["scale_mode"] = "kv-per-tensor"
        return {"metadata": tables, **given, **layouts, **modes}

    def run(
        self,
        wrapper: Any,
        q: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        scale: float | None = None,
    ) -> None:
        """Run a planned wrapper: q [T, h, c + r], cache [pages, page, c + r], out [T, h, c].

        `lse` [T, h] fp32, contiguous, gets the natural logarithm; None where nobody reads it. `scale` is that
        of e4m3 numbers in the cache.
        """
        latent = out.shape[-1]
        parts = (q[..., :latent], q[..., latent:], cache[..., :latent], cache[..., latent:])
        if self.takes("run", *PAIRS):
            given: dict[str, Any] = {"query": parts[:2], "kv_cache": parts[2:]}
        else:
            given = dict(zip(PARTS, parts, strict=True))
        if scale is not None:
            given |= dict.fromkeys(SCALES, scale)
        if lse is None:
            wrapper.run(**given, out=out)
            return
        natural = {NATURAL: True} if self.takes("run", NATURAL) else {}
        wrapper.run(**given, out=out, lse=lse, return_lse=True, **natural)
        if not natural:
            lse.mul_(math.log(2))


# ------------------------------------------------------------------------------------------ batches
# Batches that FlashInfer's kernels cannot serve, though nothing stops them from trying.
#
# Its scheduler packs all heads of a request's new tokens into rows, cuts these into tiles of 64, or 128 where
# requests have more than 64 on average, and each tile's keys into parts. (Read in scheduler.cuh, mla.cuh and
# mla_hopper.cuh of include/flashinfer/attention in 0.6.18; 0.7.2 refuses the same batches when it plans.)

WORK_ITEMS = 16_384  # places in the tables of a plan
FAR_NUMBERS = 1 << 32  # numbers: a page that starts beyond is read elsewhere, in releases before 0.6.11
MULTIPROCESSORS = 256  # where the device does not say; more than any has


def work_reasons(heads: int, query_lens: Sequence[int], device: torch.device) -> list[str]:
    """Return why the tables of a plan may overflow, which memory behind them pays for (empty if they do not).

    Parts are at least as long as a cluster's fair share of all tiles' keys. So there are fewer additional
    parts than clusters, and the bound is above the true count by less than one per multiprocessor.
    """
    tile = _tile(heads, query_lens)
    items = sum(-(-count * heads // tile) for count in query_lens) + multiprocessors(device) // (tile // 64)
    if items <= WORK_ITEMS:
        return []
    return [
        f"its tables hold {WORK_ITEMS} parts of work, and {sum(query_lens)} new tokens of {heads} heads may "
        f"need {items}"
    ]


def tile_reasons(heads: int, query_lens: Sequence[int]) -> list[str]:
    """Return that tiles end between the heads of a token, whose last key may be lost (empty if none does).

    Keys that rows of a tile see are rounded down to whole tokens. Of LIMITS, only 128 heads are cut, where
    hardly any request has new tokens.
    """
    tile = _tile(heads, query_lens)
    return [f"its tiles of {tile} rows cut tokens of {heads} heads"] if tile % heads else []


def far_reasons(kv_lens: Sequence[int], page_size: int | None, width: int) -> list[str]:
    """Return why pages of this batch must start beyond `FAR_NUMBERS` (empty if they need not)."""
    size = page_size or 1
    numbers = sum(-(-keys // size) for keys in kv_lens) * size * width
    return [too_far(numbers)] if numbers > FAR_NUMBERS else []


def too_far(numbers: int) -> str:
    """Say why a cache of so many numbers is refused."""
    return (
        f"this flashinfer finds pages in the first 2^32 numbers of a cache only, and this one has {numbers}: "
        "upgrade flashinfer to 0.6.11 or newer"
    )


def _tile(heads: int, query_lens: Sequence[int]) -> int:
    """Return the rows of a tile: those of one block or of a cluster of two."""
    return 128 if sum(query_lens) * heads // max(1, len(query_lens)) > 64 else 64


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has, or more."""
    import torch

    function = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    properties = None if function is None or device.type == "cpu" else function(device)
    return int(getattr(properties, "multi_processor_count", None) or MULTIPROCESSORS)


# -------------------------------------------------------------------------------------------- pages
# The pages of all requests back to back, which is how FlashInfer takes a block table.
class PageIndex:
    """Gathers them on the device. Where they lie in the table is kept for the next batch with as many.

    In 63 of 64 decode steps with pages of 64 tokens, one request in a batch of one gets no new page.
    """

    def __init__(self) -> None:
        self._key: tuple[tuple[int, ...], int, torch.device] | None = None
        self._places: torch.Tensor | None = None

    def gather(self, table: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        """Return the first `counts[i]` pages of each row of `table` [B, n] int32, as [sum(counts)]."""
        key = (counts, table.shape[1], table.device)
        if self._places is None or key != self._key:
            self._key, self._places = key, _places(*key)
        return table.reshape(-1).index_select(0, self._places)


def _places(counts: tuple[int, ...], width: int, device: torch.device) -> torch.Tensor:
    """Return where the pages lie in the flattened table [sum(counts)] int64. Waits for nothing."""
    import torch

    total = sum(counts)
    if not total:
        return torch.empty(0, dtype=torch.int64, device=device)
    starts = accumulate(counts, initial=0)
    shifts = (i * width - start for i, start in zip(range(len(counts)), starts, strict=False))
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

    def __init__(self, release: Release, backend: str, device: torch.device) -> None:
        import torch

        self._release, self._backend, self._device = release, backend, device
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
            if turn.planned_for is not None and turn.planned_for[0] is state and turn.planned_for[1] is lse:
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
            wrapper = self._release.wrapper(self._workspace, backend=self._backend)
        event = getattr(getattr(torch, self._device.type, None), "Event", None)
        return Turn(wrapper, event() if event is not None and self._device.type != "cpu" else None)


# ----------------------------------------------------------------------------------------------- op
# The op: which layers and batches it serves, what it plans, and its call.
#
# Plans are made on the host from host tensors, so that nothing is copied back from the device.

# Tiles of its kernels hold whole tokens with these heads, to which others are padded: see `tile_reasons`.
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
LIMITS = LatentLimits(page_sizes=None, heads=HEADS, pads_heads_to=HEADS, graph=False)
COMPILES = "it compiles its kernel for this device at first use (a minute or more)"


@dataclass(frozen=True, eq=False)
class FlashInferState:
    """What a wrapper is planned with: host lengths, and the pages of all requests back to back."""

    plan: dict[str, Any]  # in the flat form of `Release.plan_arguments`
    empty: torch.Tensor | None  # [n] int64: tokens that see no key


class FlashInferMla(VendorOp):
    """`flashinfer.mla.BatchMLAPagedAttentionWrapper`. It writes to `out` and `lse` itself.

    `backend` is the library's own choice of kernel ("auto", "fa2", "fa3"). Graphs: the plan lives on the
    host, so a capture is refused.
    """

    contract = OPS["latent_attention"]
    cache_formats = ("fp8", "fp8:")
    lse_optional = True
    compiles = COMPILES

    def __init__(
        self,
        limits: LatentLimits = LIMITS,
        *,
        backend: str = "auto",
        install: str = "",
        e4m3_reason: DeviceReason | None = None,
    ) -> None:
        """Take the kernel's limits on this vendor's devices, and the hint for a missing flashinfer.

        `e4m3_reason` says why a device cannot read e4m3 caches, "" if it can.
        """
        self._e4m3_reason = e4m3_reason
        self.release = Release(install)
        super().__init__(self.release.vendor)
        self.limits, self._scratch = replace(limits, graph=False), Scratch()
        self._backend = backend
        self._wrappers: dict[torch.device, Wrappers] = {}
        self._pages = PageIndex()
        self._wants_lse = False  # what the last call wanted: the next plan is made for it

    # ------------------------------------------------------------------------------------------- refusals

    @property
    def cure(self) -> str:  # type: ignore[override]
        """How to get kernels where none can be compiled."""
        return f"install the CUDA toolkit, or `{compiled_kernels()}`"

    def interface_reasons(self) -> list[str]:
        return self.release.reasons()

    def layer_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = self.limits.reasons(spec)
        if not spec.cache_format:
            return reasons
        device = self._e4m3_reason(spec.device) if self._e4m3_reason else ""
        reasons += [device] if device else []
        if not self._vendor.reasons() and not self.release.takes("run", *SCALES):
            reasons.append("this flashinfer reads no e4m3 cache: upgrade to 0.7.4 or newer")
        if str(spec.dtype) != "torch.bfloat16":
            reasons.append(f"it reads an e4m3 cache with bfloat16 queries only, not {spec.dtype}")
        return reasons

    def attempt(self, spec: AttentionSpec) -> str:
        return try_latent(self, spec, (self.limits.page_sizes or (64,))[0])

    def preflight(self, spec: AttentionSpec) -> list[str]:
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
        heads = self.limits.padded_heads(spec.num_heads) or spec.num_heads
        reasons += work_reasons(heads, query_lens, spec.device) + tile_reasons(heads, query_lens)
        far = far_reasons(kv_lens, page_size, spec.kv_lora_rank + spec.qk_rope_head_dim)
        return reasons + (far if far and not self.release.wide_pages else [])

    # --------------------------------------------------------------------------------------------- plans

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> FlashInferState:
        """Plan the batch on the host. Raises `KernelRefused` inside a graph."""
        _check_capture(spec.device)
        state = self._state(spec, batch)
        self._pool(spec.device).planned(state, self._wants_lse)
        return state

    def _pool(self, device: torch.device) -> Wrappers:
        if device not in self._wrappers:
            self._wrappers[device] = Wrappers(self.release, self._backend, device)
        return self._wrappers[device]

    def _state(self, spec: AttentionSpec, batch: BatchView) -> FlashInferState:
        import torch

        pages = tuple(-(-keys // batch.page_size) for keys in batch.kv_lens)
        starts = accumulate(batch.query_lens, initial=0)
        requests = zip(starts, batch.query_lens, batch.kv_lens, strict=False)
        empty = [first for first, count, keys in requests if count and not keys]  # one token each
        return FlashInferState(
            plan={
                "qo_indptr": integers(accumulate(batch.query_lens, initial=0)),
                "kv_indptr": integers(accumulate(pages, initial=0)),
                "kv_indices": self._pages.gather(batch.block_table, pages),
                "kv_len_arr": integers(batch.kv_lens),
                "num_heads": self.limits.padded_heads(spec.num_heads) or spec.num_heads,
                "head_dim_ckv": spec.kv_lora_rank,
                "head_dim_kpe": spec.qk_rope_head_dim,
                "page_size": batch.page_size,
                "causal": True,
                "sm_scale": float(spec.softmax_scale),
                "q_data_type": spec.dtype,
                "kv_data_type": torch.float8_e4m3fn if spec.cache_format else spec.dtype,
            },
            empty=upload(integers(empty, wide=True), batch.block_table.device) if empty else None,
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

        stored = float(cache_format.partition(":")[2] or 1) if cache_format else None
        cache = cache.view(torch.float8_e4m3fn) if cache_format else cache
        _check_capture(q.device)
        self._check_places(cache)
        self._wants_lse = lse is not None
        wrapper = self._pool(q.device).planned(state, self._wants_lse)
        heads, target = q.shape[1], out
        sums = lse if lse is None or lse.is_contiguous() else self._wide("lse", lse, heads)
        if (planned := state.plan["num_heads"]) > heads:
            target, given = self._wide("out", out, planned), q
            q = self._wide("q", q, planned)
            q[:, :heads] = given
            sums = None if lse is None else self._wide("lse", lse, planned)
        self.release.run(wrapper, q, cache, target, sums, stored)
        if target is not out:
            out.copy_(target[:, :heads])
        if lse is not None and sums is not None and sums is not lse:
            lse.copy_(sums[:, :heads])
        if state.empty is not None:
            out.index_fill_(0, state.empty, 0)
            if lse is not None:
                lse.index_fill_(0, state.empty, -math.inf)

    def _wide(self, name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Return memory like x [T, h, ..] with so many heads, those of no call full of zeros."""
        return self._scratch.take(name, (x.shape[0], heads, *x.shape[2:]), x)

    def _check_places(self, cache: torch.Tensor) -> None:
        """Raise `KernelRefused` for a cache in which an old release loses its way."""
        numbers = cache.shape[0] * cache.stride(0)
        if numbers > FAR_NUMBERS and not self.release.wide_pages:
            raise KernelRefused(f"{too_far(numbers)}.")


def _check_capture(device: torch.device) -> None:
    if capturing(device):
        raise KernelRefused("flashinfer plans on the host, so no graph can capture it.")


def compiled_kernels() -> str:
    """Return the command that installs compiled kernels, for the CUDA of the torch that is installed."""
    import torch

    cuda = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cuXXX"
    return f"pip install flashinfer-jit-cache --index-url https://flashinfer.ai/whl/{cuda}"
