"""`Scratch`: memory an adapter needs besides the vendor's; it grows to the largest call and is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Scratch:
    """Named buffers per trailing shape, dtype and device, zero where they were never written."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], torch.Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], like: torch.Tensor, fresh: bool = False
    ) -> torch.Tensor:
        """Return memory of this shape in the dtype and on the device of `like`; contents stay, row for row.

        `fresh` returns separate memory, full of zeros: what a graph captures must outlive a later growth.
        """
        if fresh:
            return _zeros(shape, like)
        key = (name, shape[1:], like.dtype, like.device)
        held = self._held.get(key)
        if held is None or held.shape[0] < shape[0]:
            held = self._held[key] = _zeros(shape, like)
        return held[: shape[0]]


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
        return like.new_zeros(shape)
