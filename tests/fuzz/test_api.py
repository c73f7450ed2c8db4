"""Whatever a layer and a cache are given: the right result, or an error of ours and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from damage import few
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mla import MLA, LatentCache, MLAConfig, load_backend
from mla.errors import MLAError
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict

T = TypeVar("T")
FUZZ = settings.get_profile("fuzz")
DIMS = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
CONFIG = MLAConfig(hidden_size=64, num_attention_heads=3, **DIMS)
BF16, OURS = torch.bfloat16, (ValueError, TypeError, MLAError)

# Other tensors of the same values, and tensors or objects of others.
SAME: Mapping[str, Callable[[Any], Any]] = {
    "itself": lambda x: x,
    "a copy": torch.clone,
    "strided": lambda x: torch.cat((x, x + 1), -1)[..., : x.shape[-1]],
    "every other": lambda x: torch.stack((x, x + 1), -1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "offset": lambda x: torch.cat((x[:1], x))[1:],
    "negated twice": lambda x: torch._neg_view(-x),
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
    "with a gradient": lambda x: x.clone().requires_grad_() * 1,
}
OTHER: Mapping[str, Callable[[Any], Any]] = {
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int64": lambda x: x.long(),
    "complex": lambda x: x.float() + 1j,
    "conjugated": lambda x: (x.float() + 1j).conj(),
    "sparse": lambda x: x.to_sparse(),
    "a row less": lambda x: x[:-1],
    "a row more": lambda x: torch.cat((x, x[:1])),
    "a column less": lambda x: x[..., :-1],
    "a dimension more": lambda x: x[None],
    "one value": lambda x: x.sum(),
    "nothing": lambda x: None,
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.float().numpy(),
}
STEPS = st.lists(st.sampled_from([*SAME, *OTHER]) | st.sampled_from([*SAME]), max_size=2)


def result_or_error(call: Callable[[], T]) -> T | None:
    """Return what a call returns; None for an error of ours, which says something."""
    try:
        return call()
    except OURS as error:
        said = str(error)
    assert said.strip()
    return None


def changed(x: Any, steps: list[str]) -> Any:
    """Return a tensor after some changes, or after those before one that it cannot go through."""
    for step in steps:
        try:
            x = (SAME | OTHER)[step](x.detach())
        except (RuntimeError, AttributeError, TypeError, IndexError, UserWarning):
            return x
    return x


# ---------------------------------------------------------------------------------------------- the layer


class Scene:
    """A layer, two requests with a history, and what a step of both must give."""

    def __init__(self, native: bool) -> None:
        state = random_state_dict(CONFIG)
        self.layer = MLA(CONFIG, backend=load_backend("cpu") if native else None)
        self.layer.load_state_dict(state)
        draw = torch.Generator().manual_seed(0)
        self.cache = LatentCache(CONFIG, max_tokens=256, page_size=16)
        ids = self.cache.new_sequences(2)
        lengths = ((20, 64), (20, 32)), ((33, 64), (33, 32))
        history = [tuple(torch.randn(*shape, generator=draw).to(BF16) for shape in pair) for pair in lengths]
        for sequence, (kv, pe) in zip(ids, history, strict=True):
            self.cache.load(sequence, kv, pe)
        self.hidden = torch.randn(5, 64, generator=draw).to(BF16)
        self.batch = self.cache.extend(ids, [4, 1])
        self.truth = oracle(CONFIG, state, self.hidden, (4, 1), history)  # type: ignore[arg-type]
        self.pages = self.cache.pages[0].clone()


@pytest.fixture(scope="module")
def scenes() -> tuple[Scene, Scene]:
    return Scene(native=False), Scene(native=True)


@FUZZ
@given(native=st.booleans(), hidden=STEPS, pages=STEPS, out=st.none() | STEPS)
def test_forward(
    scenes: tuple[Scene, Scene], native: bool, hidden: list[str], pages: list[str], out: list[str] | None
) -> None:
    scene = scenes[native]
    held = scene.pages.clone()
    target = None if out is None else changed(torch.zeros_like(scene.hidden), out)
    arguments = changed(scene.hidden, hidden), scene.batch, changed(held, pages), target
    if (output := result_or_error(lambda: scene.layer(*arguments))) is None:
        assert torch.equal(held, scene.pages), "pages are written before an error"
        return
    assert output is target or target is None
    error = (output.double() - scene.truth).norm(dim=1) / scene.truth.norm(dim=1)
    assert error.max() < 2e-2


# ---------------------------------------------------------------------------------------------- the cache

ODD: Mapping[str, Callable[[list[int]], Any]] = {
    "a list": list,
    "a tuple": tuple,
    "a tensor": lambda x: torch.tensor(x, dtype=torch.int64),
    "an array": lambda x: np.array(x, dtype=np.int32),
    "tensors": lambda x: [torch.tensor(number) for number in x],
    "floats": lambda x: [float(number) for number in x],
    "halves": lambda x: [number + 0.5 for number in x],
    "texts": lambda x: [str(number) for number in x],
    "a text": lambda x: "".join(map(str, x)),
    "lists": lambda x: [[number] for number in x],
    "nothing": lambda x: None,
    "none": lambda x: [None for _ in x],
    "an iterator": iter,
    "a number": len,
    "negative": lambda x: [-1 - number for number in x],
    "huge": lambda x: [2**70 + number for number in x],
    "on meta": lambda x: torch.tensor(x, dtype=torch.int64, device="meta"),
}
KINDS = st.sampled_from([*ODD]) | st.just("a list")


def state(cache: LatentCache) -> Any:
    """Return all of a cache that a call which raises must keep."""
    lengths = {
        sequence: (type(cache.length(sequence)), cache.length(sequence)) for sequence in cache.sequences
    }
    slots = [cache.slots(sequence).tolist() for sequence in cache.sequences]
    return lengths, slots, cache.free_pages, cache.generation, cache.pages.tolist()


def call(cache: LatentCache, do: Callable[[], object]) -> bool:
    """Return whether a call works. One that does not raises an error of ours and changes nothing."""
    before = state(cache)
    if result_or_error(lambda: (do(),)) is None:
        assert state(cache) == before
        return False
    assert all(kind is int for kind, _ in state(cache)[0].values()), "a length is no plain integer"
    return True


@pytest.fixture
def cache() -> LatentCache:
    return LatentCache(CONFIG, max_tokens=64, page_size=4, dtype=torch.float32)


@few(2)
@example(lens=[0], kinds=("on meta", "a list"))
@given(lens=st.lists(st.integers(0, 5), min_size=1, max_size=3), kinds=st.tuples(KINDS, KINDS))
def test_extend(cache: LatentCache, lens: list[int], kinds: tuple[str, str]) -> None:
    cache.release(cache.sequences)
    ids = cache.new_sequences(len(lens))
    if call(cache, lambda: cache.extend(ODD[kinds[0]](ids), ODD[kinds[1]](lens))):
        assert [cache.length(sequence) for sequence in ids] == lens
    call(cache, lambda: cache.truncate(ids[0], ODD[kinds[1]](lens)))
    call(cache, lambda: cache.new_sequences(ODD[kinds[0]](lens)))
    call(cache, lambda: cache.release(ODD[kinds[0]](ids)))


@few(2)
@example(kv=[], pe=["negated twice", "fake"], layer=0)
@given(kv=STEPS, pe=STEPS, layer=st.sampled_from([0, 0, 0, 1, -1, None, "0", 0.0, 2**70]))
def test_load(cache: LatentCache, kv: list[str], pe: list[str], layer: Any) -> None:
    cache.release(cache.sequences)
    (sequence,) = cache.new_sequences(1)
    parts = [torch.arange(5.0)[:, None].expand(-1, width).contiguous() for width in (64, 32)]
    latents = [changed(part, steps) for part, steps in zip(parts, (kv, pe), strict=True)]
    if call(cache, lambda: cache.load(sequence, *latents, layer=layer)):
        assert all(latent.device.type == "cpu" and not latent.is_complex() for latent in latents)
        for held, whole in zip(cache.read(sequence), parts, strict=True):
            assert torch.equal(held, torch.cat((whole, whole))[: len(held)])
