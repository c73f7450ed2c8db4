"""Decode in fixed shapes against float64, on the host: what a device runs, captures, and takes of memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla.bench.plan.memory import WORKSPACE
from mla.bench.workload.workload_file import STANDARD, read_workload
from mla.cases.case import OpCase
from mla.cases.memory import Layout
from mla.cases.played import Laid
from mla.reference import REFERENCE
from mla.reference import attention as decode
from mla.reference.attention import MASKS_BYTES, DecodeState, fixed_shapes
from mla_backends.api import AttentionSpec

Latent = type(REFERENCE["latent_attention"])
DEVICE = torch.device("meta")  # any that is not the CPU; only its type is looked at
SPEC = AttentionSpec(3, 32, 16, 8, 12, 24**-0.5, torch.float32, torch.device("cpu"))
BF16 = torch.bfloat16


class OnDevice(Latent):  # type: ignore[misc, valid-type]
    """The reference, planned as on a device."""

    padded = True

    def prepare(self, spec: Any, batch: Any) -> Any:
        state = super().prepare(replace(spec, device=DEVICE), batch)
        assert isinstance(state, DecodeState) == self.padded
        return state


def laid(new: Any, keys: Any, op: Any = None, **changes: Any) -> Laid:
    """Return a call; slots and pages that no request owns are NaN."""
    layout = Layout(page_size=16, spare=2, shuffle=1, unowned=torch.nan)
    case = OpCase("latent_attention", SPEC, tuple(new), tuple(keys), layout=layout)
    return Laid(case.but(**changes), op or OnDevice())


def steps() -> str:
    """Run the steps in which the classic bugs show; return what is wrong."""
    lengths = [
        ([1] * 6, [33, 16, 47, 3, 65, 1]), ([1] * 3, [0, 7, 0]), ([3] * 3, [40, 3, 18]), ([2] * 2, [0, 2])
    ]  # fmt: skip
    calls = (laid(*of, dtype=dtype, aimed=aimed) for of in lengths for dtype in (torch.float32, BF16)
             for aimed in (False, True))  # fmt: skip
    return "; ".join(filter(None, (call.call() for call in calls)))


def test_a_decode_step_is_exact_to_rounding() -> None:
    assert steps() == ""


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_decode_step(data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, decode.MOST_QUERIES))
    kv_lens = data.draw(st.lists(st.just(0) | st.integers(queries, 70), min_size=1, max_size=6))
    heads, page_size = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 4, 16, 64]))
    gain = data.draw(st.sampled_from([1.0, 1000.0]))
    call = laid([queries] * len(kv_lens), kv_lens, num_heads=heads, page_size=page_size, gain=gain)
    assert call.call() == ""


def test_parts_that_are_attended_one_by_one_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "KEYS_BYTES", 2 * 8 * 40 * 96)  # two requests of six pages
    call = laid([2] * 5, [33, 16, 47, 0, 65])
    assert call.call() == ""
    assert [part.stop - part.start for part in call.leading[0].parts] == [2, 2, 1]
    assert steps() == ""


def test_a_nan_that_a_request_owns_is_not_hidden() -> None:
    call = laid([1, 1], [20, 40])
    call.prepare()
    call.arguments["cache"][call.arguments["block_table"][1, 0], 3] = torch.nan
    call.run()
    assert call.arguments["out"][0].isfinite().all()
    assert call.arguments["out"][1].isnan().all()


REFUSED = {
    "a prefill": ([9, 9], [9, 9]),
    "different numbers of new tokens": ([1, 2], [9, 9]),
    "a token without keys next to one with keys": ([3, 3], [2, 9]),
    "no new tokens": ([1, 0], [9, 9]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_batches_are_grouped(case: str) -> None:
    op = OnDevice()
    op.padded = False
    assert laid(*REFUSED[case], op).call() == ""


def batch_of(new: Any, keys: Any, page_size: int = 16, columns: int = 0, device: Any = "cpu") -> Any:
    """Return a batch whose pages are all the first one."""
    tables = torch.zeros(len(keys), max(columns, -(-max(keys) // page_size)), dtype=torch.int32)
    return SimpleNamespace(
        query_lens=tuple(new), kv_lens=tuple(keys), page_size=page_size, block_table=tables.to(device),
        kv_lens_device=torch.tensor(keys, dtype=torch.int32).to(device),
    )  # fmt: skip


def planned(*batch: Any, **widths: Any) -> DecodeState | None:
    """Return the state of a batch on a device, or None."""
    return decode.fixed_shapes(replace(SPEC, **{"device": DEVICE, **widths}), batch_of(*batch))


WIDE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("lengths", "padded"),
    [
        ([400] * 4 + [50] * 4, True),
        ([4000] + [1000] * 15, True),
        ([4000] + [100] * 15, False),  # mostly padding
        ([60] + [1] * 15, True),  # mostly padding, and little of it
    ],
)
def test_padding_has_a_limit(lengths: list[int], padded: bool) -> None:
    assert (planned([1] * len(lengths), lengths, **WIDE) is not None) == padded


@pytest.mark.parametrize("heads", [16, 128])
def test_one_graph_serves_the_standard_decode(heads: int) -> None:
    """In a block table as wide as the last step needs, every step takes the same launches."""
    (scenario,) = (candidate for candidate in read_workload(STANDARD).scenarios if candidate.mode == "decode")
    states, widest = set(), -(-max(scenario.final_lens) // 64)
    for step in (0, 15, scenario.inputs - 1):
        state = planned(
            scenario.query_lens, scenario.kv_lens(step), 64, widest, num_heads=heads, **WIDE
        )  # fmt: skip
        assert state is not None, f"step {step} is grouped"
        states.add((str(state.parts), state.keys, state.queries))
    assert len(states) == 1


def test_a_request_whose_logits_exceed_the_cap_is_grouped_and_so_is_any_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert planned([1], [40], device=torch.device("cpu")) is None
    monkeypatch.setattr(decode, "LOGITS_BYTES", 8 * 3 * 48 - 1)
    assert planned([1], [40]) is None


# ------------------------------------------------------------------------------------- what a graph repeats


@pytest.mark.parametrize("mutant", [False, True], ids=["right", "masks of the batch that was captured"])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_captured_call_follows_its_batch(
    queries: int, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another step's numbers are in its place, whose pages are as many."""
    call, later = (laid([queries] * 4, keys, aimed=True) for keys in ([60, 10, 5, 33], [7, 64, 0, 50]))
    call.prepare()
    assert call.leading[0].graph_safe
    monkeypatch.setattr(decode, "capturing", lambda device: True)
    assert bool(call.call(later, (replace(call.leading[0], captured=mutant),))) is mutant


def test_masks_that_a_graph_makes_are_not_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning is captured with the forward."""
    monkeypatch.setattr(decode, "capturing", lambda device: True)
    call = laid([1, 1], [20, 40])
    call.prepare()
    monkeypatch.setattr(decode, "_masks", lambda *given: pytest.fail("made again"))
    assert call.leading[0].captured
    assert call.call() == ""


# -------------------------------------------------------------------------------------------------- mutants

MASKS = decode._masks


def shifted(by: int, lens: torch.Tensor, *shape: int) -> Any:
    return MASKS((lens + by).clamp(min=0), *shape)


def unmasked(field: str, *given: Any) -> Any:
    made = MASKS(*given)
    return made._replace(**{field: torch.zeros_like(getattr(made, field))})


def one_query(lens: torch.Tensor, keys: int, queries: int) -> Any:
    """All new tokens see what the last one sees."""
    return MASKS(lens, keys, 1)


MUTANTS: dict[str, Callable[..., Any]] = {
    "a key too few": partial(shifted, -1),
    "a key too many": partial(shifted, 1),
    "padding kept": partial(unmasked, "foreign"),
    "padding seen": partial(unmasked, "bias"),
    "no causality": one_query,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_mask_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_masks", MUTANTS[mutant])
    assert steps()


def test_padding_that_is_multiplied_by_zero_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which NaN survives."""
    fill = torch.Tensor.masked_fill_
    multiplied = lambda x, mask, value: x.mul_(~mask) if x.dim() == 3 and value == 0 else fill(x, mask, value)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "masked_fill_", multiplied)
    assert "NaN" in steps()


# -------------------------------------------------------------------------- memory, on tensors without any

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
        self.batch = batch_of([queries] * requests, [keys] * requests, PAGE, device=DEVICE)
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
