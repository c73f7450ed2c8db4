"""The pages of all requests back to back, which is how FlashInfer takes a block table."""

from __future__ import annotations

from array import array
from itertools import accumulate
from typing import TYPE_CHECKING

from mla_backends.upload import upload

if TYPE_CHECKING:
    import torch


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
    host = array("q", (i * width - start for i, start in zip(range(len(counts)), starts, strict=False)))
    host.extend(counts)
    shifts, repeats = upload(torch.frombuffer(host, dtype=torch.int64), device).view(2, -1)
    # With the size of the result given, the device is not asked for the sum of the repeats.
    shift = torch.repeat_interleave(shifts, repeats, output_size=total)
    return shift.add_(torch.arange(total, device=device))
