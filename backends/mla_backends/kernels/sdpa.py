"""`torch.nn.functional.scaled_dot_product_attention` as an expanded attention, wherever torch supports it.

torch picks the kernel. Its FlashAttention needs values as wide as keys and takes no mask. So values are
padded on request, and only where there is no mask: what serves a mask takes both widths as they are. There is
no log-sum-exp, so all keys of a segment must be present at once (`writes_lse` is False).

A segment with history needs a mask, as torch's own causal rule aligns the first query with the first key. The
bias `torch.nn.attention.bias.causal_lower_right` would spare it, but calls CUDA's private operators by
itself, also on stacks that only imitate torch.cuda. `TorchVarlen` serves the same devices and tries its
kernel first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_backends.api import OPS, AttentionSpec, FusedOp, SegmentLengths
from mla_backends.kernels.scratch import Scratch
from mla_backends.kernels.vendor import capturing

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
    pads: bool  # segments without a mask need values as wide as keys


class SdpaExpanded(FusedOp):
    """One segment after another through torch's attention; a causal one ends at its last key.

    `pads_values`: give v the width of k with zeros, at the cost of a copy. A function decides per layer, from
    its widths and what its device's fastest kernel takes. Allocates as torch does.
    """

    contract = OPS["expanded_attention"]
    writes_lse = False
    lse_optional = True

    def __init__(self, *, pads_values: bool | Callable[[AttentionSpec], bool] = False) -> None:
        self._pads_values = pads_values
        self._scratch = Scratch()

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
        pads = self._pads(spec) and any(isinstance(mask, bool) for mask in masks)
        return SdpaState(batch.query_lens, batch.kv_lens, blind, masks, pads)

    def _pads(self, spec: AttentionSpec) -> bool:
        if spec.v_head_dim >= spec.qk_nope_head_dim + spec.qk_rope_head_dim:
            return False
        return self._pads_values if isinstance(self._pads_values, bool) else self._pads_values(spec)

    def __call__(
        self, state: SdpaState, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        if lse is not None:
            lse.fill_(float("nan"))
        wide = self._padded(k, v) if state.pads else v
        by_query = (tensor.split(state.query_lens) for tensor in (q, out))
        by_key = (tensor.split(state.kv_lens) for tensor in (k, v, wide))
        parts = zip(*by_query, *by_key, state.blind, state.masks, strict=True)
        for one_q, one_out, one_k, one_v, one_wide, blind, mask in parts:
            one_out[:blind] = 0
            if blind < one_q.shape[0]:
                values = one_wide if isinstance(mask, bool) else one_v
                found = _attend(one_q[blind:], one_k, values, mask, softmax_scale)
                one_out[blind:] = found[..., : v.shape[2]]

    def _padded(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return v with zeros after its own columns, as wide as k."""
        wide = self._scratch.take(f"v{v.shape[2]}", tuple(k.shape), v, fresh=capturing(v.device))
        wide[..., : v.shape[2]].copy_(v)
        return wide


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
