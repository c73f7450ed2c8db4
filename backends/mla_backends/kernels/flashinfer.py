"""FlashInfer's `BatchMLAPagedAttentionWrapper`: ragged absorbed attention, causal, on pages of any size.

Its plan runs on the host and is given host tensors, so it copies nothing back from the device. A wrapper
holds one plan, and its pinned memory may be read by the device until the plan's copy is done: a few wrappers
take turns, and one is planned again only when its last plan has arrived.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView, FusedOp
from mla_backends.kernels.limits import LatentLimits
from mla_backends.kernels.vendor import KernelRefused, VendorModule, accepts, capturing, missing
from mla_backends.upload import upload

if TYPE_CHECKING:
    import torch

CLASS = "BatchMLAPagedAttentionWrapper"
PLAN_ARGUMENTS = (
    "qo_indptr",
    "kv_indptr",
    "kv_indices",
    "kv_len_arr",
    "num_heads",
    "head_dim_ckv",
    "head_dim_kpe",
    "page_size",
    "causal",
    "sm_scale",
    "q_data_type",
    "kv_data_type",
)
RUN_ARGUMENTS = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "out", "lse", "return_lse")
NATURAL = "return_lse_base_on_e"  # older releases return base 2 only
WORKSPACE_BYTES = 128 << 20  # what the library's documentation recommends for split contexts
TURNS = 4  # wrappers that take turns: how many batches may be planned ahead of the device
LIMITS = LatentLimits(page_sizes=None, graph=False)


@dataclass(frozen=True, eq=False)
class FlashInferState:
    """What a wrapper is planned with: host lengths, and the pages of all requests back to back."""

    plan: dict[str, Any]
    empty: torch.Tensor | None  # [n] int64: tokens that see no key


class _Turn:
    """A wrapper and the state it is planned for."""

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        import torch

        self.wrapper = wrapper
        self.state: FlashInferState | None = None
        event = getattr(getattr(torch, device.type, None), "Event", None)
        self._arrived = event() if event is not None and device.type != "cpu" else None

    def plan(self, state: FlashInferState) -> None:
        """Plan for `state`, once the device has read what the last plan left in pinned memory."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self.wrapper.plan(**state.plan)
        self.state = state
        if self._arrived is not None:
            self._arrived.record()


class _Wrappers:
    """The wrappers of one device, which share the workspace of split contexts."""

    def __init__(self, make: Any, device: torch.device) -> None:
        import torch

        self._make, self._device = make, device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._turns: list[_Turn] = []

    def planned(self, state: FlashInferState) -> Any:
        """Return a wrapper that is planned for `state`: the one that still is, else the oldest plan's."""
        turn = next((turn for turn in self._turns if turn.state is state), None)
        if turn is not None:
            return turn.wrapper
        if len(self._turns) < TURNS:
            turn = _Turn(self._make(self._workspace), self._device)
        else:
            turn = self._turns.pop(0)
        turn.plan(state)
        self._turns.append(turn)
        return turn.wrapper


class FlashInferMla(FusedOp):
    """`flashinfer.mla.BatchMLAPagedAttentionWrapper`. It writes to `out` and `lse` itself.

    `backend` is the library's own choice of kernel ("auto", "fa2", "fa3"). Graphs: the plan lives on the
    host, so a capture is refused.
    """

    contract = OPS["latent_attention"]

    def __init__(self, limits: LatentLimits = LIMITS, *, backend: str = "auto", install: str = "") -> None:
        """Take the kernel's limits on this vendor's devices, and the hint for a missing flashinfer."""
        self._vendor = VendorModule("flashinfer.mla", (CLASS,), install)
        self.limits = replace(limits, pads_heads_to=(), graph=False)
        self._backend = backend
        self._wrappers: dict[torch.device, _Wrappers] = {}

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        return (self._vendor.reasons() or self._interface_reasons()) + self.limits.reasons(spec)

    def _interface_reasons(self) -> list[str]:
        wrapper = getattr(self._vendor, CLASS)
        found = missing(wrapper.plan, f"{CLASS}.plan", PLAN_ARGUMENTS)
        return found + missing(wrapper.run, f"{CLASS}.run", RUN_ARGUMENTS)

    def unsupported_batch(
        self,
        spec: AttentionSpec,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        page_size: int | None = None,
    ) -> list[str]:
        found = self.limits.page_reasons(page_size)
        if any(keys < count != 1 for count, keys in zip(query_lens, kv_lens, strict=True)):
            found.append("a request must not have more new tokens than keys")
        return found

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> FlashInferState:
        """Plan the batch on the host. Raises `KernelRefused` for pages the kernel cannot read."""
        self.limits.check_page(batch.page_size)
        _check_capture(spec.device)
        state = self._state(spec, batch)
        self._pool(spec.device).planned(state)
        return state

    @functools.cached_property
    def _natural(self) -> bool:
        """Whether the library can return the natural logarithm."""
        return accepts(getattr(self._vendor, CLASS).run, NATURAL)

    def _pool(self, device: torch.device) -> _Wrappers:
        if device not in self._wrappers:
            wrapper, kernel = getattr(self._vendor, CLASS), self._backend
            self._wrappers[device] = _Wrappers(lambda space: wrapper(space, backend=kernel), device)
        return self._wrappers[device]

    def _state(self, spec: AttentionSpec, batch: BatchView) -> FlashInferState:
        pages = [-(-keys // batch.page_size) for keys in batch.kv_lens]
        width = batch.block_table.shape[1]
        slots = _ints((i * width + j for i, count in enumerate(pages) for j in range(count)), "q")
        starts = accumulate(batch.query_lens, initial=0)
        requests = zip(starts, batch.query_lens, batch.kv_lens, strict=False)
        empty = [first for first, count, keys in requests if count and not keys]  # one token each
        device = batch.block_table.device
        return FlashInferState(
            plan={
                "qo_indptr": _ints(accumulate(batch.query_lens, initial=0), "i"),
                "kv_indptr": _ints(accumulate(pages, initial=0), "i"),
                "kv_indices": batch.block_table.reshape(-1).index_select(0, upload(slots, device)),
                "kv_len_arr": _ints(batch.kv_lens, "i"),
                "num_heads": spec.num_heads,
                "head_dim_ckv": spec.kv_lora_rank,
                "head_dim_kpe": spec.qk_rope_head_dim,
                "page_size": batch.page_size,
                "causal": True,
                "sm_scale": float(spec.softmax_scale),
                "q_data_type": spec.dtype,
                "kv_data_type": spec.dtype,
            },
            empty=upload(_ints(empty, "q"), device) if empty else None,
        )

    def __call__(
        self, state: FlashInferState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [T, h, c], lse [T, h] fp32
    ) -> None:  # fmt: skip
        _check_capture(q.device)
        if float(softmax_scale) != state.plan["sm_scale"]:
            raise KernelRefused("flashinfer was planned with a different softmax scale.")
        wrapper, latent = self._pool(q.device).planned(state), out.shape[-1]
        options = {NATURAL: True} if self._natural else {}
        sums = lse if lse.is_contiguous() else lse.new_empty(lse.shape)
        wrapper.run(
            q_nope=q[..., :latent],
            q_pe=q[..., latent:],
            ckv_cache=cache[..., :latent],
            kpe_cache=cache[..., latent:],
            out=out,
            lse=sums,
            return_lse=True,
            **options,
        )
        if not options:
            sums.mul_(math.log(2))
        if sums is not lse:
            lse.copy_(sums)
        if state.empty is not None:
            out.index_fill_(0, state.empty, 0)
            lse.index_fill_(0, state.empty, -math.inf)


def _check_capture(device: torch.device) -> None:
    if capturing(device):
        raise KernelRefused("flashinfer plans on the host, so no graph can capture it.")


def _ints(values: Iterable[int], code: str) -> torch.Tensor:
    """Return a host tensor of int32 ("i") or int64 ("q")."""
    import torch

    buffer, dtype = array(code, values), torch.int32 if code == "i" else torch.int64
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
