"""Where tokens of a paged cache lie, for kernels that take their places and no block table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def selected_slots(
    selection: torch.Tensor,  # [T, topk] int32, positions within the request, or -1
    block_table: torch.Tensor,  # [B, n] int32
    cu_q: torch.Tensor,  # [B + 1] int32
    page_size: int,
) -> torch.Tensor:
    """Return the slots [T, topk] int64 of a selection in the flattened cache, -1 where it names none.

    Waits for no device: a kernel that wants physical slots can have these in a graph.
    """
    import torch

    tokens = torch.arange(selection.shape[0], dtype=cu_q.dtype, device=cu_q.device)
    request = torch.searchsorted(cu_q, tokens, right=True) - 1
    position = selection.long().clamp_min(0)
    page = block_table[request[:, None], position // page_size].long()
    return torch.where(selection < 0, -1, page * page_size + position % page_size)
