"""The op: which layers and batches it serves, what it plans, and its call.

Plans are made on the host from host tensors, so that nothing is copied back from the device.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mla_backends.api import OPS, AttentionSpec, BatchView, FusedOp
from mla_backends.errors import BackendError, describe, one_line
from mla_backends.kernels.flashinfer import batches
from mla_backends.kernels.flashinfer.pages import PageIndex
from mla_backends.kernels.flashinfer.release import Release
from mla_backends.kernels.flashinfer.wrappers import Wrappers
from mla_backends.kernels.limits import LatentLimits
from mla_backends.kernels.trial import device_trouble, try_latent
from mla_backends.kernels.vendor import KernelRefused, capturing
from mla_backends.upload import upload

if TYPE_CHECKING:
    import torch

LIMITS = LatentLimits(page_sizes=None, graph=False)
COMPILES = "it compiles its kernel for this device at first use (a minute or more)"


@dataclass(frozen=True, eq=False)
class FlashInferState:
    """What a wrapper is planned with: host lengths, and the pages of all requests back to back."""

    plan: dict[str, Any]  # in the flat form of `Release.plan_arguments`
    empty: torch.Tensor | None  # [n] int64: tokens that see no key


class FlashInferMla(FusedOp):
    """`flashinfer.mla.BatchMLAPagedAttentionWrapper`. It writes to `out` and `lse` itself.

    `backend` is the library's own choice of kernel ("auto", "fa2", "fa3"). Graphs: the plan lives on the
    host, so a capture is refused.
    """

    contract = OPS["latent_attention"]
    lse_optional = True
    compiles = COMPILES

    def __init__(self, limits: LatentLimits = LIMITS, *, backend: str = "auto", install: str = "") -> None:
        """Take the kernel's limits on this vendor's devices, and the hint for a missing flashinfer."""
        self.release = Release(install)
        self.limits = replace(limits, pads_heads_to=(), graph=False)
        self._backend = backend
        self._wrappers: dict[torch.device, Wrappers] = {}
        self._pages = PageIndex()
        self._wants_lse = False  # what the last call wanted: the next plan is made for it

    # ------------------------------------------------------------------------------------------- refusals

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        return self.release.reasons() + self.limits.reasons(spec)

    def preflight(self, spec: AttentionSpec) -> list[str]:
        """Return why the kernel cannot be compiled, loaded or run here, after one tiny batch."""
        try:
            wrong = try_latent(self, spec, (self.limits.page_sizes or (64,))[0])
        except (BackendError, ValueError, TypeError) as error:
            wrong = f"refuses a tiny batch ({one_line(describe(error))})"
        except Exception as error:  # noqa: BLE001  # compilers and loaders raise anything
            wrong = device_trouble(error) or (
                f"cannot compile its kernel here ({one_line(describe(error))}): {_cure()}"
            )
        if not wrong:
            return []
        self._wrappers.pop(spec.device, None)  # its workspace would be kept for nothing
        return [f"flashinfer {wrong}"]

    def unsupported_batch(
        self,
        spec: AttentionSpec,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        page_size: int | None = None,
    ) -> list[str]:
        found = self.limits.page_reasons(page_size)
        if not sum(query_lens):
            found.append("a batch must have new tokens")
        if any(keys < count != 1 for count, keys in zip(query_lens, kv_lens, strict=True)):
            found.append("a request must not have more new tokens than keys")
        found += batches.work_reasons(spec.num_heads, query_lens, spec.device)
        found += batches.tile_reasons(spec.num_heads, query_lens, kv_lens, spec.device)
        far = batches.far_reasons(kv_lens, page_size, spec.kv_lora_rank + spec.qk_rope_head_dim)
        return found + (far if far and not self.release.wide_pages else [])

    # --------------------------------------------------------------------------------------------- plans

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> FlashInferState:
        """Plan the batch on the host. Raises `KernelRefused` for pages the kernel cannot read."""
        self.limits.check_page(batch.page_size)
        _check_capture(spec.device)
        state = self._state(spec, batch)
        self._pool(spec.device).planned(state, self._wants_lse)
        return state

    def _pool(self, device: torch.device) -> Wrappers:
        if device not in self._wrappers:
            self._wrappers[device] = Wrappers(self.release, self._backend, device)
        return self._wrappers[device]

    def _state(self, spec: AttentionSpec, batch: BatchView) -> FlashInferState:
        pages = tuple(-(-keys // batch.page_size) for keys in batch.kv_lens)
        starts = accumulate(batch.query_lens, initial=0)
        requests = zip(starts, batch.query_lens, batch.kv_lens, strict=False)
        empty = [first for first, count, keys in requests if count and not keys]  # one token each
        return FlashInferState(
            plan={
                "qo_indptr": _ints(accumulate(batch.query_lens, initial=0), "i"),
                "kv_indptr": _ints(accumulate(pages, initial=0), "i"),
                "kv_indices": self._pages.gather(batch.block_table, pages),
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
            empty=upload(_ints(empty, "q"), batch.block_table.device) if empty else None,
        )

    # --------------------------------------------------------------------------------------------- calls

    def __call__(
        self, state: FlashInferState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # [T, h, c], [T, h] fp32
    ) -> None:  # fmt: skip
        _check_capture(q.device)
        self._check_call(state, cache, float(softmax_scale))
        self._wants_lse = lse is not None
        wrapper = self._pool(q.device).planned(state, self._wants_lse)
        sums = lse if lse is None or lse.is_contiguous() else lse.new_empty(lse.shape)
        self.release.run(wrapper, q, cache, out, sums)
        if lse is not None and sums is not None and sums is not lse:
            lse.copy_(sums)
        if state.empty is not None:
            out.index_fill_(0, state.empty, 0)
            if lse is not None:
                lse.index_fill_(0, state.empty, -math.inf)

    def _check_call(self, state: FlashInferState, cache: torch.Tensor, scale: float) -> None:
        """Raise `KernelRefused` for what a plan cannot know."""
        if scale != state.plan["sm_scale"]:
            raise KernelRefused("flashinfer was planned with a different softmax scale.")
        numbers = cache.shape[0] * cache.stride(0)
        if numbers > batches.FAR and not self.release.wide_pages:
            raise KernelRefused(f"{batches.too_far(numbers)}.")


def _check_capture(device: torch.device) -> None:
    if capturing(device):
        raise KernelRefused("flashinfer plans on the host, so no graph can capture it.")


def _cure() -> str:
    """Return how to get a compiled kernel."""
    return f"install the CUDA toolkit, or `{compiled_kernels()}`"


def compiled_kernels() -> str:
    """Return the command that installs compiled kernels, for the CUDA of the torch that is installed."""
    import torch

    cuda = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cuXXX"
    return f"pip install flashinfer-jit-cache --index-url https://flashinfer.ai/whl/{cuda}"


def _ints(values: Iterable[int], code: str) -> torch.Tensor:
    """Return a host tensor of int32 ("i") or int64 ("q")."""
    import torch

    buffer, dtype = array(code, values), torch.int32 if code == "i" else torch.int64
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype, device="cpu")
