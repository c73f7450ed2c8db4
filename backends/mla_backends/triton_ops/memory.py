"""`PartsMemory`: where the parts of split requests are kept between two launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_backends.torch_backend.graph import capturing

if TYPE_CHECKING:
    import torch


class PartsMemory:
    """Floats that all batches share, one after another; what a graph captures has its own.

    It grows by powers of two, so that lengths that grow step by step seldom need more. What was outgrown is
    kept, because a graph that was captured with a plan made before may still write to it.
    """

    def __init__(self) -> None:
        self._held: dict[torch.device, list[torch.Tensor]] = {}

    def take(self, floats: int, like: torch.Tensor) -> torch.Tensor:
        """Return at least so many floats, of any value, on the device of `like`."""
        import torch

        if capturing(like.device):
            return like.new_empty(max(1, floats), dtype=torch.float32)
        held = self._held.setdefault(like.device, [])
        if not held or held[-1].shape[0] < floats:
            with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
                held.append(like.new_empty(1 << max(0, floats - 1).bit_length(), dtype=torch.float32))
        return held[-1]
