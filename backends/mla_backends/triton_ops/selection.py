"""`select_latents`: a launch that scores all keys, and torch's top-k over the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_backends.api import OPS, BatchView, IndexerSpec
from mla_backends.kernels.vendor import DeviceReason
from mla_backends.selftest import try_select
from mla_backends.triton_ops.attention import PartsMemory
from mla_backends.triton_ops.launcher import KernelOp, Launcher, stored, wide
from mla_backends.triton_ops.tuning import MIN_SIDE

if TYPE_CHECKING:
    import torch

MAX_DEPTH, MAX_HEADS = 256, 128
KEYS, WARPS = 64, 4  # of a program
# Bytes of the scores that are held at once; tokens beyond them take turns.
SCORES_BYTES = 256 << 20
PAGE, ODD_PAGE = 64, 1  # of the tiny problems


@dataclass(frozen=True)
class SelectState:
    """A planned batch. Lengths are read on the device, so a captured call follows them."""

    width: int  # the most keys that a request may grow to
    together: int  # tokens that are scored in one launch
    scores: torch.Tensor  # fp32 [together * width] at least
    graph_safe = True


class SelectLatents(KernelOp):
    """The best keys of every token by an indexer's scores, in fp32.

    A kernel writes the scores of some tokens, at most SCORES_BYTES of them, and torch's top-k reads them.
    Width is that of the block table, so that a captured call serves requests that have grown.
    """

    contract = OPS["select_latents"]
    dtypes = ("bfloat16", "float16")
    cache_formats = ("fp8",)
    nan_safe_tail = True

    def __init__(self, launcher: Launcher, device_reason: DeviceReason | None = None) -> None:
        super().__init__(launcher, device_reason)
        self._memory = PartsMemory()

    def shape_reasons(self, spec: IndexerSpec) -> list[str]:
        heads, depth = spec.num_heads, spec.head_dim
        reasons = []
        if heads > MAX_HEADS or depth > MAX_DEPTH:
            reasons.append(f"it holds at most {MAX_HEADS} heads of {MAX_DEPTH}, not {heads} of {depth}")
        if spec.cache_format and depth % 4:
            reasons.append(f"it reads scales behind keys of a multiple of 4, not {depth}")
        return reasons

    def attempt(self, spec: IndexerSpec) -> str:
        return try_select(self, spec, PAGE) or try_select(self, spec, ODD_PAGE)

    def prepare(self, spec: IndexerSpec, batch: BatchView) -> SelectState:
        """Take memory for the scores of as many tokens as it holds at once."""
        width = max(1, batch.block_table.shape[1] * batch.page_size)
        together = max(1, min(sum(batch.query_lens), SCORES_BYTES // (4 * width)))
        return SelectState(width, together, self._memory.take(together * width, batch.block_table))

    def __call__(
        self, state: SelectState, *,
        q: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor,  # [T, H, D], [T, H], [pages, page, D]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        out: torch.Tensor,  # [T, topk] int32
        cache_format: str = "",
    ) -> None:  # fmt: skip
        from mla_backends.triton_ops.jit.selection import score_latents

        facts, _ = stored(cache, cache_format, self.launcher)
        arguments = {
            "q": q, "weights": weights, "cache": cache,
            "block_table": block_table, "kv_lens": kv_lens, "cu_q": cu_q,
            "q_token": q.stride(0), "q_head": q.stride(1), "weights_token": weights.stride(0),
            "table_row": block_table.stride(0), "requests": cu_q.shape[0] - 1, "width": state.width,
            "HEADS": q.shape[1], "WIDE_HEADS": wide(q.shape[1], MIN_SIDE),
            "DEPTH": q.shape[2], "WIDE": wide(q.shape[2], MIN_SIDE), "PAGE": cache.shape[1], "KEYS": KEYS,
            "FORMAT": facts["FORMAT"], "NATIVE": facts["NATIVE"], "EARLY": self.launcher.early,
        }  # fmt: skip
        for first in range(0, q.shape[0], state.together):
            chosen = out[first : first + state.together]
            scores = state.scores[: len(chosen) * state.width].view(-1, state.width)
            grid = (len(chosen), -(-state.width // KEYS))
            self.start(score_latents, grid, {**arguments, "scores": scores, "first": first}, WARPS)
            _take_best(scores, chosen)


def _take_best(scores: torch.Tensor, chosen: torch.Tensor) -> None:
    """Write the places of the best scores [t, width] to `chosen` [t, topk], and -1 where one is -inf.

    Hidden keys score -inf, and top-k orders what it finds: no host needs to know how many a token sees.
    """
    import torch

    count = min(chosen.shape[1], scores.shape[1])
    values, places = scores.topk(count, dim=1)  # in order: what is not seen comes last
    chosen[:, :count] = places.masked_fill_(values == -torch.inf, -1)
    chosen[:, count:] = -1
