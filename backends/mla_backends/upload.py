"""`upload`: host tables to the device without waiting for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of `host` on `device`. The copy may still be under way when this returns."""
    return host.to(device, non_blocking=True)
