"""`expanded_attention`: flash attention over ragged segments in one launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from mla_backends.api import OPS, AttentionSpec, SegmentLengths
from mla_backends.selftest import try_expanded
from mla_backends.triton_ops.launcher import DeviceReason, KernelOp, Launcher, wide
from mla_backends.triton_ops.tuning import LEAST, Tile, Tuning, tile_for
from mla_backends.upload import upload

if TYPE_CHECKING:
    import torch

MOST_WIDTH = 256


@dataclass(frozen=True)
class ExpandedState:
    """Planned segments."""

    cu_q: torch.Tensor  # [segments + 1] int32
    cu_k: torch.Tensor  # [segments + 1] int32
    segments: int
    queries: int  # of all segments
    longest: int  # of the segment with the most
    ragged: bool  # segments have different numbers of queries
    causal: bool


class Variant(NamedTuple):
    """What else than its tile a launch is compiled for."""

    device: torch.device
    dtype: torch.dtype
    width: int
    values: int
    ragged: bool
    causal: bool
    with_lse: bool

    def __str__(self) -> str:
        words = ["ragged"] * self.ragged + ["causal"] * self.causal + ["with lse"] * self.with_lse
        return ", ".join((f"keys of {self.width}, values of {self.values}", *words))


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
        if max(widths) <= MOST_WIDTH:
            return []
        return [f"it holds keys and values of at most {MOST_WIDTH}, not {widths[0]} and {widths[1]}"]

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
        longest = max(batch.query_lens)
        ragged = min(batch.query_lens) < longest
        queries = sum(batch.query_lens)
        return ExpandedState(cu_q, cu_k, len(batch.query_lens), queries, longest, ragged, batch.causal)

    def __call__(
        self, state: ExpandedState, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        if q.shape[0] == 0:
            return
        from mla_backends.triton_ops.jit.expanded import attend_expanded

        arguments = _arguments(state, q, k, v, softmax_scale, out, lse)

        def start(tile: Tile) -> None:
            blocks = -(-state.longest // tile.rows)
            programs = state.segments * blocks
            if state.ragged:
                programs = state.queries // tile.rows + state.segments
            sizes = {"blocks": blocks, "ROWS": tile.rows, "KEYS": tile.keys}
            self.launcher.start(
                attend_expanded,
                (programs, q.shape[1]),
                {**arguments, **sizes},
                warps=tile.warps,
                stages=tile.stages,
            )

        tile = tile_for(self.tuning.expanded, state.longest)
        flags = (state.ragged, state.causal, lse is not None)
        variant = Variant(q.device, q.dtype, q.shape[2], v.shape[2], *flags)
        self.launcher.start_tiled(self.tiled, tile, variant, start)


def _arguments(
    state: ExpandedState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> dict[str, Any]:
    """Return the kernel's arguments but those of the tile."""
    width, values = q.shape[2], v.shape[2]
    front = max(LEAST, 1 << (width.bit_length() - 1))
    found: dict[str, Any] = {
        "q": q, "k": k, "v": v, "cu_q": state.cu_q, "cu_k": state.cu_k,
        "out": out, "lse": out if lse is None else lse, "scale": softmax_scale * math.log2(math.e),
    }  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        found[f"{name}_token"], found[f"{name}_head"] = tensor.stride(0), tensor.stride(1)
    return {
        **found,
        "lse_token": 0 if lse is None else lse.stride(0),
        "lse_head": 0 if lse is None else lse.stride(1),
        "segments": state.segments,
        "RAGGED": state.ragged,
        "WIDTH": width,
        "VALUES": values,
        "FRONT": front,
        "BACK": wide(max(0, width - front), LEAST),
        "WIDE_VALUES": wide(values, LEAST),
        "CAUSAL": state.causal,
        "HAS_LSE": lse is not None,
    }
