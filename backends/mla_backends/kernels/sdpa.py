"""`torch.nn.functional.scaled_dot_product_attention` as an expanded attention, wherever torch supports it.

torch picks the kernel; values narrower than keys are padded on request, because some kernels need equal
widths. It gives no log-sum-exp, so all keys of a segment must be present at once (`writes_lse` is False).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_backends.api import OPS, AttentionSpec, FusedOp, SegmentLengths

if TYPE_CHECKING:
    import torch

MASK = 1 << 28  # elements of the largest mask; only a causal segment with history needs one


@dataclass(frozen=True)
class SdpaState:
    """Lengths of the segments, and per segment what hides the future: a mask, torch's rule, or nothing."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    blind: tuple[int, ...]  # leading queries that see no key
    masks: tuple[torch.Tensor | bool, ...]  # [queries, keys] bool; True: causal without history; False: none


class SdpaExpanded(FusedOp):
    """One segment after another through torch's attention; a causal one ends at its last key.

    `pads_values`: give v the width of k with zeros, at the cost of a copy. Allocates as torch does.
    """

    contract = OPS["expanded_attention"]
    writes_lse = False

    def __init__(self, *, pads_values: bool = False) -> None:
        self._pads_values = pads_values

    def unsupported_batch(
        self,
        spec: AttentionSpec,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        page_size: int | None = None,
    ) -> list[str]:
        pairs = zip(query_lens, kv_lens, strict=True)
        largest = max((queries * keys for queries, keys in pairs if 1 < queries < keys), default=0)
        return [f"its mask would have {largest} elements, more than {MASK}"] if largest > MASK else []

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> SdpaState:
        """Build the masks of causal segments with history on the device."""
        pairs = list(zip(batch.query_lens, batch.kv_lens, strict=True))
        blind = tuple(_blind(queries, keys, batch.causal) for queries, keys in pairs)
        masks = tuple(
            batch.causal and _mask(queries - hidden, keys, spec.device)
            for (queries, keys), hidden in zip(pairs, blind, strict=True)
        )
        return SdpaState(batch.query_lens, batch.kv_lens, blind, masks)

    def __call__(
        self, state: SdpaState, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        import torch

        lse.fill_(float("nan"))
        width = v.shape[2]
        if self._pads_values and width < k.shape[2]:
            v = torch.nn.functional.pad(v, (0, k.shape[2] - width))
        by_query = (tensor.split(state.query_lens) for tensor in (q, out))
        by_key = (tensor.split(state.kv_lens) for tensor in (k, v))
        parts = zip(*by_query, *by_key, state.blind, state.masks, strict=True)
        for one_q, one_out, one_k, one_v, blind, mask in parts:
            one_out[:blind] = 0
            if blind < one_q.shape[0]:
                found = _attend(one_q[blind:], one_k, one_v, mask, softmax_scale)
                one_out[blind:] = found[..., :width]


def _blind(queries: int, keys: int, causal: bool) -> int:
    """Return how many queries see no key at all."""
    return queries if keys == 0 else max(0, queries - keys) if causal else 0


def _mask(queries: int, keys: int, device: torch.device) -> torch.Tensor | bool:
    """Return what hides the future from the last `queries` of `keys` tokens."""
    import torch

    if queries <= 1:
        return False
    if queries == keys:
        return True
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | bool, scale: float
) -> torch.Tensor:
    """Return [t, h, d] of one segment."""
    import torch

    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))  # [1, h, t, d]
    causal, visible = (mask, None) if isinstance(mask, bool) else (False, mask)
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, scale=scale
    )
    return found[0].transpose(0, 1)
