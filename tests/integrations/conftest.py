"""Tiny models of `transformers`, which run on one thread: two would wait for each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mla

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Restore the number of threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def native() -> str:
    """Name the instruction set of the CPU's compiled kernels, for tests of bfloat16 that need them."""
    kernels = mla.load_backend("cpu").environment()["kernels"]
    if kernels == "off" or kernels.startswith("none"):
        pytest.skip(f"compiled kernels for the CPU are {kernels}")
    return kernels.partition(";")[0]


@pytest.fixture
def model() -> Any:
    """A tiny DeepSeek-V3."""
    from tiny_models import make_model

    return make_model("deepseek_v3")


Generate = Callable[..., torch.Tensor]


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of unequal length, padded on the left."""
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
