"""Every adapter on the fake of its package, against float64: any batch, any layout, captured or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kernel_adapters import EXPANDED, LATENT, Expanded, Latent

from mla_backends.kernels import (
    FlashAttnVarlen,
    FlashMla,
    LatentLimits,
    TokenspeedMla,
    TokenspeedPrefill,
    TorchVarlen,
    VarlenLimits,
)

each_latent = pytest.mark.parametrize("latent", LATENT.values(), ids=LATENT)
each_expanded = pytest.mark.parametrize("name", EXPANDED)


# ----------------------------------------------------------------------------------------------- absorbed


@each_latent
def test_every_kind_of_batch_is_right(installed: Any, check_latent: Any, latent: Latent) -> None:
    with installed(latent.folder):
        op = latent.make()
        check_latent(op, heads=latent.heads)
        for page_size in latent.pages:
            dtype = torch.float16 if "float16" in op.limits.dtypes else torch.bfloat16
            check_latent(op, dtype=dtype, page_size=page_size)


@each_latent
def test_strided_queries_and_outputs(installed: Any, check_strided: Any, latent: Latent) -> None:
    with installed(latent.folder):
        check_strided(latent.make())


GRAPHS = {name: latent for name, latent in LATENT.items() if latent.make().limits.graph}


@pytest.mark.parametrize("latent", GRAPHS.values(), ids=GRAPHS)
def test_a_captured_call_follows_lengths_that_are_updated_in_place(
    installed: Any, make_problem: Any, assert_right: Any, latent: Latent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a state on tables overwritten since, as a replay does; rows became and ceased to be empty.

    The host knows shorter lengths: what it makes of them is a constant of the graph.
    """
    with installed(latent.folder):
        op = latent.make()
        old, new = make_problem([1] * 4, [33, 190, 0, 5]), make_problem([1] * 4, [190, 0, 64, 6], seed=1)
        old.view.kv_lens = (33, 7, 0, 5)
        state = op.prepare(old.spec, old.view)
        assert state.graph_safe
        monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
        old.run(op, state)
        old.view.block_table.copy_(new.view.block_table)
        old.view.kv_lens_device.copy_(new.view.kv_lens_device)
        new.view = old.view
        assert_right(new.run(op, state), new.truth())


# ----------------------------------------------------------------------------------------------- expanded


@pytest.fixture(scope="session")
def offered(installed: Any) -> Callable[[str], Any]:
    """Return a context in which an adapter of expanded attention runs; it yields the adapter and its op."""

    @contextmanager
    def offered(name: str) -> Iterator[tuple[Expanded, Any]]:
        expanded = EXPANDED[name]
        with installed(expanded.folder):
            from fake_kernels import torch_flash

            kernel = getattr(torch_flash, expanded.kernel or "cuda")
            with torch_flash.registered(kernel, "CPU"):
                yield expanded, expanded.make()

    return offered


@each_expanded
def test_long_and_wide_segments_and_queries_without_keys_are_right(
    offered: Any, run_expanded: Any, assert_right: Any, make_spec: Any, name: str
) -> None:
    with offered(name) as (expanded, op):
        for causal in (True, False):
            assert_right(*run_expanded(op, (300,), (301,), causal=causal, heads=2))
            assert_right(*run_expanded(op, (5, 1, 20), (9, 1, 33), causal=causal, heads=128))
            if expanded.empty:
                assert_right(*run_expanded(op, (2, 4, 1), (0, 4, 5), causal=causal))
                assert_right(*run_expanded(op, (2, 1), (0, 0), causal=causal))
        if not op.unsupported_reasons(make_spec(dtype=torch.float16)):
            assert_right(*run_expanded(op, (5, 1, 20), (9, 1, 33), dtype=torch.float16))


@each_expanded
def test_a_layer_is_right_in_one_round_and_in_several(offered: Any, check_layer: Any, name: str) -> None:
    with offered(name) as (expanded, _):
        check_layer("expanded_attention", expanded.make)


# ----------------------------------------------------------------------------------------------- refusals


def another_chip(device: torch.device) -> str:
    return "it needs another chip"


OF_LATENTS = "it is made for latents of 512 + 64, not 256 + 64"
TWO_BYTES = "it computes in bfloat16 or float16, not float32"
MLA, LEFT, VARLEN, TORCH = "nvidia_c", "tokenspeed", "flash_attn_2", TorchVarlen


@pytest.mark.parametrize(
    ("folder", "make", "changes", "reason"),
    [
        (MLA, FlashMla, {"dtype": torch.float32}, TWO_BYTES),
        (MLA, FlashMla, {"kv_lora_rank": 256}, OF_LATENTS),
        (MLA, lambda: FlashMla(LatentLimits(heads=(64, 128))), {}, "it serves 64 or 128 heads, not 16"),
        (
            MLA,
            lambda: FlashMla(LatentLimits(heads=(8,), pads_heads_to=(8,))),
            {},
            "it serves 8 heads, not 16",
        ),
        (MLA, lambda: FlashMla(LatentLimits(device_reason=another_chip)), {}, "it needs another chip"),
        (LEFT, TokenspeedMla, {"num_heads": 129}, "it serves at most 128 heads, not 129"),
        (LEFT, TokenspeedMla, {"kv_lora_rank": 256}, OF_LATENTS),
        (LEFT, TokenspeedMla, {"dtype": torch.float32}, TWO_BYTES),
        (LEFT, TokenspeedPrefill, {"dtype": torch.float16}, "it computes in bfloat16, not float16"),
        (
            LEFT,
            TokenspeedPrefill,
            {"v_head_dim": 192},
            "it takes heads of 192 and 128, not 192 and 192",
        ),
        (VARLEN, FlashAttnVarlen, {"dtype": torch.float32}, TWO_BYTES),
        (
            VARLEN,
            lambda: FlashAttnVarlen(VarlenLimits(max_width=128)),
            {},
            "it takes heads of at most 128, not 192",
        ),
        (VARLEN, FlashAttnVarlen, {"v_head_dim": 256}, "it takes values no wider than keys, not 256 and 192"),
        (
            VARLEN,
            lambda: FlashAttnVarlen(VarlenLimits(device_reason=another_chip)),
            {},
            "it needs another chip",
        ),
        (VARLEN, TORCH, {"dtype": torch.float32}, TWO_BYTES),
        (VARLEN, TORCH, {"qk_nope_head_dim": 256}, "it takes heads of at most 256, not 320"),
        (VARLEN, TORCH, {"qk_nope_head_dim": 100}, "it takes heads in multiples of 8, not 164"),
        (VARLEN, TORCH, {"v_head_dim": 200}, "it takes values no wider than keys, not 200 and 192"),
    ],
)
def test_a_layer_it_cannot_serve_is_refused_before_anything_runs(
    installed: Any, make_spec: Any, folder: str, make: Any, changes: Any, reason: str
) -> None:
    with installed(folder) as fakes:
        from fake_kernels import torch_flash

        with torch_flash.registered(torch_flash.cuda, "CPU"):
            assert make().unsupported_reasons(make_spec(**changes)) == [reason]
            assert make is not TORCH or TORCH().unsupported_reasons(make_spec(v_head_dim=100)) == []  # padded
        assert not fakes.CALLS
