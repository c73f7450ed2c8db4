"""Merging attention over disjoint keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_of_a_rank import PLAIN
from torch.utils._python_dispatch import TorchDispatchMode

from mla.layer.workspace import Workspace
from mla.parallel.layer import Exchange, merge, merge_scratch, scratch_per_token


def attend(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and the natural log-sum-exp of plain attention."""
    logits = q @ keys.T
    return logits.softmax(dim=-1) @ keys, logits.logsumexp(dim=-1)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-3])
def test_parts_give_the_whole(scale: float) -> None:
    q, keys = scale * torch.randn(7, 5).double(), torch.randn(40, 5).double()
    parts = [attend(q, keys[i::3]) for i in range(3)]
    out = torch.empty(7, 5)
    merge(
        torch.stack([part for part, _ in parts]).float(), torch.stack([lse for _, lse in parts]).float(), out
    )
    assert (out - attend(q, keys)[0]).abs().max() < 1e-5 * max(1, scale)


def test_a_part_without_keys_weighs_nothing() -> None:
    parts = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    out = torch.full((1, 2), torch.nan)
    merge(parts, torch.tensor([[700.0], [-torch.inf]]), out)
    assert out.tolist() == [[1.0, 2.0]]


class MadeMemory(TorchDispatchMode):
    """Notes the ops that return memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = (*args, *(kwargs or {}).values())
        given = {x.untyped_storage().data_ptr() for x in operands if is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        if is_tensor(result) and result.untyped_storage().data_ptr() not in given:
            self.ops.append(str(func))
        return result


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def test_a_merge_in_memory_of_its_own_makes_no_more() -> None:
    parts, lse, out = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2), torch.empty(4, 2, 8)
    held = merge_scratch(parts, Workspace(torch.float32, torch.device("cpu")))
    made = {}
    for memory in (None, held):
        with MadeMemory() as mode:
            merge(parts, lse, out, memory)
        made[memory is held] = mode.ops
    assert made[False]
    assert made[True] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("c", [32, 33])
def test_memory_for_an_exchange_is_what_is_planned(dtype: torch.dtype, c: int) -> None:
    """An lse takes two elements of bf16, and an odd row one more before it."""
    config = replace(PLAIN, num_attention_heads=3, kv_lora_rank=c)
    scratch = Workspace(dtype, torch.device("cpu"))
    Exchange(scratch, 2, (5, 3, config.latent_dim), c, ordered=True)
    assert scratch.nbytes() == 5 * scratch_per_token(config, 2, dtype.itemsize)
