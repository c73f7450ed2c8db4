"""`select_latents`: a launch that scores all keys, and one that selects the best of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_backends.api import OPS, BatchView, IndexerSpec
from mla_backends.errors import describe, one_line
from mla_backends.kernels.vendor import DeviceReason
from mla_backends.selftest import device_trouble, try_select
from mla_backends.triton_ops.attention import PartsMemory
from mla_backends.triton_ops.launcher import KernelOp, Launcher, stored, strides, wide
from mla_backends.triton_ops.tuning import MIN_SIDE

if TYPE_CHECKING:
    import torch

MAX_DEPTH, MAX_HEADS = 256, 128
KEYS, WARPS = 64, 4  # of a program that scores
TILE, BITS, BEST_WARPS = 4096, 6, 16  # scores of a step, and bits of a digit, of a program that selects
SCORE_ALL = -(1 << 31)  # in place of how few keys are selected without scores
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

    A kernel writes the scores of some tokens, at most SCORES_BYTES of them, and another selects. Width is
    that of the block table, so that a captured call serves requests that have grown. Torch's top-k selects
    where the second kernel fails its trial, as in a Triton without `histogram`, and `remarks` says so.
    """

    contract = OPS["select_latents"]
    dtypes = ("bfloat16", "float16")
    cache_formats = ("fp8",)
    nan_safe_tail = True

    def __init__(self, launcher: Launcher, device_reason: DeviceReason | None = None) -> None:
        super().__init__(launcher, device_reason)
        self._memory = PartsMemory()
        self._lack = ""  # why the kernel that selects is not taken

    @property
    def remarks(self) -> list[str]:  # type: ignore[override]
        """Say that torch selects, and why."""
        return [f"torch's top-k selects, as our kernel {self._lack}"] if self._lack else []

    def shape_reasons(self, spec: IndexerSpec) -> list[str]:
        heads, depth = spec.num_heads, spec.head_dim
        reasons = []
        if heads > MAX_HEADS or depth > MAX_DEPTH:
            reasons.append(f"it holds at most {MAX_HEADS} heads of {MAX_DEPTH}, not {heads} of {depth}")
        if spec.cache_format and depth % 4:
            reasons.append(f"it reads scales behind keys of a multiple of 4, not {depth}")
        return reasons

    def attempt(self, spec: IndexerSpec) -> str:
        try:
            self._lack = self._trial(spec)
        except Exception as error:  # compilers raise anything
            if device_trouble(error):
                raise
            self._lack = f"raises {one_line(describe(error))}"
        wrong = self._trial(spec) if self._lack else ""
        if wrong:
            self._lack = ""
        return wrong

    def _trial(self, spec: IndexerSpec) -> str:
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
        from mla_backends.triton_ops.jit.selection import score_latents, take_best

        facts, _ = stored(cache, cache_format, self.launcher)
        tables = {
            "kv_lens": kv_lens, "cu_q": cu_q, "requests": cu_q.shape[0] - 1, "width": state.width,
            "EARLY": self.launcher.early,
        }  # fmt: skip
        scored = {
            **tables, "q": q, "weights": weights, "cache": cache, "block_table": block_table,
            **strides(q=q), "weights_token": weights.stride(0),
            "table_row": block_table.stride(0), "few": SCORE_ALL if self._lack else out.shape[1],
            "HEADS": q.shape[1], "WIDE_HEADS": wide(q.shape[1], MIN_SIDE),
            "DEPTH": q.shape[2], "WIDE": wide(q.shape[2], MIN_SIDE), "PAGE": cache.shape[1], "KEYS": KEYS,
            "FORMAT": facts["FORMAT"], "NATIVE": facts["NATIVE"],
        }  # fmt: skip
        best = {
            **tables, "out": out, "out_token": out.stride(0), "topk": out.shape[1],
            "TILE": TILE, "BITS": BITS,
        }  # fmt: skip
        for first in range(0, q.shape[0], state.together):
            chosen = out[first : first + state.together]
            scores = state.scores[: len(chosen) * state.width].view(-1, state.width)
            turn = {"scores": scores, "first": first}
            grid = (len(chosen), -(-state.width // KEYS))
            self.launcher.start(score_latents, grid, {**scored, **turn}, warps=WARPS)
            if self._lack:
                _take_best(scores, chosen)
            else:
                self.launcher.start(take_best, (len(chosen),), {**best, **turn}, warps=BEST_WARPS)


def _take_best(scores: torch.Tensor, chosen: torch.Tensor) -> None:
    """Write the places of the best scores [t, width] to `chosen` [t, topk], and -1 where one is -inf.

    Hidden keys score -inf, and top-k orders what it finds: no host needs to know how many a token sees.
    """
    import torch

    count = min(chosen.shape[1], scores.shape[1])
    values, places = scores.topk(count, dim=1)  # in order: what is not seen comes last
    chosen[:, :count] = places.masked_fill_(values == -torch.inf, -1)
    chosen[:, count:] = -1
