"""What a decode step in fixed shapes takes of the device, on tensors without memory."""

from __future__ import annotations

import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla.bench.plan.memory import WORKSPACE
from mla.reference import REFERENCE
from mla.reference.attention import MASKS_BYTES, DecodeState, fixed_shapes
from mla_backends.api import AttentionSpec

DEVICE = torch.device("meta")
LATENT, ROPE, PAGE = 512, 64, 64


class Peak(TorchDispatchMode):
    """Notes the most bytes that live at once, of what is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: set[int] = set()
        self._owners: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in given:
                self._note(tensor)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if not self._owners[key]:
            self.live += size
            self.most = max(self.most, self.live)
        self._owners[key] += 1
        weakref.finalize(tensor, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            self.live -= size

    def known(self, *tensors: torch.Tensor) -> Peak:
        """Count no views of these."""
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        return self


class Step:
    """A decode step of equal lengths."""

    def __init__(self, requests: int, queries: int, keys: int, heads: int) -> None:
        self.spec = AttentionSpec(heads, LATENT, 128, ROPE, 128, 0.1, torch.bfloat16, DEVICE)
        pages = -(-keys // PAGE)
        self.batch: Any = SimpleNamespace(
            query_lens=(queries,) * requests,
            kv_lens=(keys,) * requests,
            page_size=PAGE,
            block_table=torch.empty(requests, pages, dtype=torch.int32, device=DEVICE),
            kv_lens_device=torch.empty(requests, dtype=torch.int32, device=DEVICE),
        )
        self.q = torch.empty(requests * queries, heads, LATENT + ROPE, dtype=torch.bfloat16, device=DEVICE)
        self.cache = torch.empty(pages, PAGE, LATENT + ROPE, dtype=torch.bfloat16, device=DEVICE)
        self.out, self.lse = self.q[..., :LATENT].clone(), self.q[..., 0].float()

    def plan(self) -> DecodeState | None:
        return fixed_shapes(self.spec, self.batch)

    def peak(self, state: DecodeState) -> int:
        """Return the most bytes that attending takes, besides a part's queries and values in fp32."""
        tables = (self.batch.block_table, self.batch.kv_lens_device)
        tensors = (self.q, self.cache, *tables, self.out, self.lse)
        masks = [mask for part in state.masks for mask in part]
        with Peak().known(*tensors, *masks) as peak:
            state.attend(self.q, self.cache, *tables, 0.1, self.out, self.lse)
        part = state.parts[0].stop * state.queries
        return peak.most - 4 * (self.q[:part].numel() + self.out[:part].numel())


def kept(state: DecodeState) -> int:
    return sum(mask.untyped_storage().nbytes() for part in state.masks for mask in part)


# Requests, queries, keys, heads; whether fixed shapes serve it.
STEPS = {
    "drafted tokens": (32, 4, 65536, 128, True),
    "drafted tokens, few heads": (32, 4, 65536, 16, True),
    "many requests": (2048, 1, 4096, 128, True),
    "too many requests": (8192, 1, 4096, 128, False),
    "many requests with drafted tokens": (512, 8, 4096, 128, True),
    "short requests": (8192, 1, 64, 128, True),
    "many keys": (2, 1, 262144, 128, True),
    "too many keys in all": (128, 1, 262144, 128, False),
    "many queries": (16, 8, 32768, 128, True),
    "many heads": (64, 2, 32768, 512, True),
    "few heads": (512, 8, 8192, 1, False),
    "few heads, and fewer requests": (256, 8, 8192, 1, True),
}


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("replayed", [False, True], ids=["planned", "captured"])
def test_what_a_step_takes_is_bounded_whatever_its_shape(
    case: str, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks live as long as a plan, and the last step's plan may still be alive."""
    *shape, served = STEPS[case]
    step = Step(*shape)
    state = step.plan()
    assert (state is not None) == served
    if state is None:
        return
    assert kept(state) <= MASKS_BYTES
    if replayed:
        monkeypatch.setattr("mla.reference.attention.capturing", lambda device: True)
    longest = 8 * step.batch.kv_lens[0] * (LATENT + ROPE)  # planned apart from the workspace
    assert step.peak(state) + 2 * MASKS_BYTES <= max(WORKSPACE, longest + MASKS_BYTES)


def test_masks_are_made_for_no_head_and_a_batch_whose_masks_are_too_large_is_grouped() -> None:
    single, many = (Step(16, 4, 16384, heads).plan() for heads in (1, 128))
    assert single is not None
    assert many is not None
    assert kept(single) == kept(many) == 16 * 16384 * (4 * 4 + 1)
    keys = MASKS_BYTES // (64 * (4 * 2 + 1)) // PAGE * PAGE
    step = Step(64, 2, keys + PAGE, 16)
    assert Step(64, 2, keys, 16).plan() is not None
    assert not isinstance(REFERENCE["latent_attention"].prepare(step.spec, step.batch), DecodeState)
