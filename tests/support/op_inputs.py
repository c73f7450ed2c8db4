"""Random inputs of the ops around attention, and how far one rounding takes a result."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1.05 * 2.0**-8}  # rounding once, and fp32 noise


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    turn = draw(tokens, width // 2, seed=seed) * 3
    return torch.cat((turn.cos(), turn.sin()), dim=1)
