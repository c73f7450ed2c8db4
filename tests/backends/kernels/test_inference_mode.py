"""Memory that is kept may be made in inference mode, and written outside it later; or the reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch

from mla import LatentCache, MLAConfig
from mla_backends import FusedOp
from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashInferMla,
    FlashMla,
    IxformerMla,
    LatentLimits,
    SdpaExpanded,
    TokenspeedMla,
    TorchVarlen,
)

PADDED = LatentLimits(heads=(8,), pads_heads_to=(8,), lse_layout="tokens_first", empty_rows=False)
LATENT: dict[str, tuple[str, Callable[[], FusedOp]]] = {
    "flash_mla": ("nvidia_b", FlashMla),
    "flash_mla, heads padded": ("moore_mate", lambda: FlashMla(PADDED)),
    "tokenspeed": ("tokenspeed", TokenspeedMla),
    "flashinfer": ("flashinfer", FlashInferMla),
    "ixformer": ("ixformer", IxformerMla),
}
EXPANDED: dict[str, Callable[[], FusedOp]] = {
    "sdpa": lambda: SdpaExpanded(pads_values=True),
    "flash_attn": FlashAttnVarlen,
    "torch": TorchVarlen,
}
BATCHES = {"decode": ([1, 1, 1], [9, 70, 3]), "scattered": ([3, 1, 3], [40, 70, 3])}
READ = {"_places"}  # kept, and never written again
order = pytest.mark.parametrize(
    "modes", [(True, False, True), (False, True, False)], ids=["inside", "outside"]
)


def held(owner: object) -> list[torch.Tensor]:
    """Return the tensors that an op keeps to write to. What a plan holds is only read."""
    owners: list[torch.Tensor] = []
    if isinstance(owner, torch.Tensor):
        owners.append(owner)
    elif isinstance(owner, (dict, list)):
        owners += chain.from_iterable(map(held, owner.values() if isinstance(owner, dict) else owner))
    elif type(owner).__module__.startswith("mla") and not dataclasses.is_dataclass(owner):
        owners += held({name: part for name, part in vars(owner).items() if name not in READ})
    return owners


@order
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", LATENT)
def test_absorbed_attention(
    name: str, batch: str, modes: tuple[bool, ...], installed: Any, make_problem: Any, assert_right: Any
) -> None:
    folder, make = LATENT[name]
    with installed(folder):
        op, problem = make(), make_problem(*BATCHES[batch], heads=4)
        for mode in modes:
            with torch.inference_mode(mode):
                assert_right(problem.run(op), problem.truth())
        assert not any(tensor.is_inference() for tensor in held(op))


@order
@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_attention(
    name: str, modes: tuple[bool, ...], installed: Any, run_expanded: Any, assert_right: Any
) -> None:
    with installed("flash_attn_2"):
        from fake_kernels import torch_flash

        op = EXPANDED[name]()
        with torch_flash.registered(torch_flash.cuda, "CPU"):
            for mode in modes:
                with torch.inference_mode(mode):
                    results, truth = run_expanded(op, (5, 1, 20), (9, 1, 33))
                if name == "sdpa":  # old releases of torch round logits and weights on the CPU
                    torch.testing.assert_close(results[0].double(), truth[0], rtol=0, atol=0.03)
                else:
                    assert_right(results, truth)
        assert held(op)
        assert not any(tensor.is_inference() for tensor in held(op))


@order
def test_a_cache(modes: tuple[bool, ...]) -> None:
    config = MLAConfig(hidden_size=48, num_attention_heads=3, kv_lora_rank=32)
    with torch.inference_mode(modes[0]):
        cache = LatentCache(config, max_tokens=256, page_size=4)
    for mode in modes[1:]:
        with torch.inference_mode(mode):
            ids = cache.new_sequences(9)
            cache.extend(ids, [5] * 9)
            cache.pages.zero_()
            cache.truncate(ids[0], 1)
            cache.release(ids[1:])
