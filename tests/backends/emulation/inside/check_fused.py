"""Each vendor's own kernels through its plugin: chosen, right, free of waits, and refused with a reason."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from judged import judged
from smaller_cases import make_smaller
from tiny_run import HEADLINE

import mla
from mla.bench import results
from mla.bench.measure import evidence
from mla.conformance.report import CheckResult
from mla.conformance.trial import Drawing
from mla.weights import random_state_dict

# backend -> [(folder of the fake, role, name of the op)]
KERNELS = {
    "moore": [
        ("moore_mate", "latent_attention", "mate"),
        ("moore_mate", "expanded_attention", "mate_varlen"),
        ("torch_flash.musa", "expanded_attention", "torch_varlen"),
    ],
    "nvidia": [
        ("nvidia_b", "latent_attention", "flash_mla"),
        ("nvidia_c", "latent_attention", "flash_mla"),
        ("nvidia_sgl", "latent_attention", "flash_mla"),
        ("tokenspeed", "latent_attention", "tokenspeed"),
        ("tokenspeed", "expanded_attention", "tokenspeed_prefill"),
        ("flashinfer", "latent_attention", "flashinfer"),
        ("flashinfer_07", "latent_attention", "flashinfer"),
        ("flash_attn_2", "expanded_attention", "flash_attn"),
        ("flash_attn_3", "expanded_attention", "flash_attn_3"),
        ("torch_flash.cuda", "expanded_attention", "torch_varlen"),
    ],
    "metax": [
        ("metax", "latent_attention", "flash_mla"),
        ("flash_attn_2", "expanded_attention", "flash_attn"),
    ],
    "iluvatar": [
        ("ixformer", "latent_attention", "ixformer"),
        ("ixformer_old", "latent_attention", "ixformer"),
    ],
}
BACKEND = os.environ["EMULATED_BACKEND"]
# Generations of a kernel that differ from another one in nothing a run can see; a run is not tried with them.
ALIKE = (
    "nvidia_b",
    "nvidia_c",
    "flashinfer_07",
    "flash_attn_3",
    "ixformer_old",
    "torch_flash.musa",
)
LIVES = {name: [case for case in cases if case[0] not in ALIKE] for name, cases in KERNELS.items()}
# What a run replays: op and scenario. Decode takes one new token per request, the prefill 3 and 5.
REPLAYED = {
    "nvidia": {
        ("flash_mla", "decode"),
        ("tokenspeed", "decode"),
        ("flash_attn", "prefill"),
        ("tokenspeed_prefill", "prefill"),
        ("torch_varlen", "prefill"),
    },
    "metax": {("flash_attn", "prefill")},
    "iluvatar": {("ixformer", "decode")},
    "moore": {("mate_varlen", "prefill")},
}[BACKEND]
KERNEL_WIDTHS = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 64,
    "v_head_dim": 16,
}
# Where an op serves other shapes than those above.
_DEEPSEEKS = {"qk_nope_head_dim": 128, "v_head_dim": 128}
SHAPES = {"flash_attn_3": _DEEPSEEKS, "mate_varlen": _DEEPSEEKS, "tokenspeed_prefill": _DEEPSEEKS}


def _case(case: tuple[str, str, str]) -> str:
    """Return the folder, or the op where a folder has two."""
    folder, _, op = case
    return op if folder in ("tokenspeed", "moore_mate") else folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try every kernel of the vendor where a test does not choose itself."""
    chosen = any(mark.args[0] == "kernel" for mark in metafunc.definition.iter_markers("parametrize"))
    if "kernel" in metafunc.fixturenames and not chosen:
        cases = KERNELS[BACKEND]
        metafunc.parametrize("kernel", cases, ids=[_case(case) for case in cases], indirect=True)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, vendor_package: Any) -> tuple[str, str]:
    """Put a fake package on the path and return (role, name of the op)."""
    folder, role, op = request.param
    vendor_package(folder)
    return role, op


each_life = pytest.mark.parametrize("kernel", LIVES[BACKEND], ids=_case, indirect=True)
# Of which the suite is asked: a release without a log-sum-exp as well.
JUDGED = [case for case in KERNELS[BACKEND] if case[0] not in ALIKE or case[0] == "ixformer_old"]


def make_layer(backend: Any, kernel: tuple[str, str], heads: int = 8) -> tuple[mla.MLA, dict[str, Any]]:
    role, op = kernel
    config = mla.MLAConfig(**{**KERNEL_WIDTHS, **SHAPES.get(op, {}), "num_attention_heads": heads})
    mode = "absorbed" if role == "latent_attention" else "expanded"
    layer = mla.MLA(config, backend=backend, attention=mode)
    state = random_state_dict(config)
    layer.load_state_dict(state)
    return layer, state


@pytest.fixture
def unexamined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold times against no other evidence: `check_life` does, and it is half of a run's time."""
    monkeypatch.setattr(evidence, "doubts", lambda *_: [])
    monkeypatch.setattr(evidence, "on_new_lengths", lambda *_, **__: (None, ""))


def written(kernel: tuple[str, str], done: Any, tmp_path: Path) -> Any:
    """Return the cases of a run that ended well."""
    assert done.code == 0, done.err
    return results.decode((tmp_path / "run.json").read_bytes()).cases


def config_of(kernel: tuple[str, str], tmp_path: Path) -> str:
    """Write a config that the kernel serves, and return which attention it is for."""
    role, op = kernel
    (tmp_path / "tiny.json").write_text(json.dumps({**KERNEL_WIDTHS, **SHAPES.get(op, {})}))
    return "absorbed" if role == "latent_attention" else "expanded"


@pytest.mark.usefixtures("unexamined")
@each_life
def test_a_run_is_right_and_replays_what_the_kernel_lets_be_captured(
    kernel: Any, bench: Any, tmp_path: Path
) -> None:
    """What cannot be captured is skipped with its reason, and costs nothing else."""
    role, op = kernel
    chosen = ("--implementations", "mla", "-O", "graph=on", "-o", "run.json")
    done = bench("--attention", config_of(kernel, tmp_path), *chosen)
    cases = written(kernel, done, tmp_path)
    assert [case.ops[role] for case in cases] == [op, op]
    for case in cases:
        assert {timing.check.status for timing in case.timings if timing.mode == "eager"} == {"ok"}
        graphs = [timing for timing in case.timings if timing.mode == "graph"]
        assert len(graphs) == 4  # warm and cold, on both clocks
        if (op, case.scenario) in REPLAYED:
            assert {timing.check.status for timing in graphs} == {"ok"}
            assert case.launch_bound is not None
        else:
            assert {(timing.check.status, bool(timing.check.reason)) for timing in graphs} == {
                ("not run", True)
            }
            assert f"skipped: graph of {case.scenario}, mla: {graphs[0].check.reason}" in done.err
            assert case.launch_bound is None


def test_a_decode_step_through_the_kernel_does_not_wait(kernel: Any, backend: Any) -> None:
    """The fakes look behind the emulation for their numbers; what the adapter does is what is watched."""
    layer, _ = make_layer(backend, kernel)
    cache = mla.LatentCache(layer.config, max_tokens=1024, device=backend.device)
    ids = cache.new_sequences(3)
    cache.extend(ids, [60, 5, 1])
    cache.pages.zero_()
    hidden = torch.randn(3, 64).bfloat16().to(backend.device)

    def step() -> None:
        batch = cache.extend(ids, [1, 1, 1])
        layer.plan(batch)
        layer(hidden, batch, cache.pages[0])

    step()
    # Before a wrapper is planned anew, the device must have read its plan of several steps ago.
    old_plans = ("event.synchronize",) if kernel[1] == "flashinfer" else ()
    with emulated.forbidden_waits(allowed=old_plans) as state:
        for _ in range(8):
            step()
    assert set(state.waits) <= set(old_plans)


DRAWS = 25  # whose heads are padded in every way, and fill more than one kernel's tile


def conform(name: str, *only: str, **known: Any) -> list[CheckResult]:
    """Return how the suite's own checks end, in bfloat16; none fails."""
    results = judged(mla.load_backend(name, options={"graph": "on"}), *only, **known)
    assert not [(result.id, result.reason) for result in results if result.status == "fail"]
    return results


@pytest.mark.parametrize("kernel", JUDGED, ids=_case, indirect=True)
def test_what_the_layer_does_not_look_at_is_right_too(
    kernel: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all the log-sum-exp, whose layout and base differ between vendors, for any number of heads."""
    make_smaller(monkeypatch)
    role, op = kernel
    group = "latent" if role == "latent_attention" else "expanded"
    wanted = [f"{group}.{check}[{op}-bfloat16]" for check in ("formula", "drawn")]
    expected = dict(zip(wanted, ("pass", "incomplete"), strict=True))
    ended = conform(name, *wanted, drawing=Drawing(DRAWS))
    assert {result.id: result.status for result in ended} == expected


# Kernels whose planning follows a batch that is updated in place; others refuse a capture with a sentence.
FOLLOW = ("nvidia_sgl", "tokenspeed", "ixformer")
# Kernels that attend a selection, and wait: elsewhere the reference does, or a kernel that follows its batch.
WAIT = ("mate",)


@pytest.mark.parametrize(
    "kernel", [case for case in LIVES[BACKEND] if case[1] == "latent_attention"], ids=_case, indirect=True
)
def test_a_captured_step_follows_its_batch_or_is_refused(
    kernel: Any, name: str, request: pytest.FixtureRequest
) -> None:
    """The suite's own checks: other inputs, and lengths that change in place; each layer by its own ops."""
    case, checks = request.node.callspec.id, ("graph", "graph_lengths")
    ended = {
        result.check: (result.cases.passed, [refusal.case.split(",")[0] for refusal in result.refusals])
        for result in conform(name, "layer.graph*")
    }
    refused = ["plain"] * (case not in FOLLOW) + ["indexer of halves"] * (case in WAIT)
    assert ended == {f"layer.{check}": (2 - len(refused), refused) for check in checks}
    of_op = {r.check: r.status for r in conform(name, f"latent.graph*[{kernel[1]}-bfloat16]")}
    assert of_op == {f"latent.{check}": "pass" if case in FOLLOW else "refused" for check in checks}


OTHER_CARDS = {
    "moore": ("MTT S80", "capability 3.1 (MTT S5000) only, but this device reports 2.1"),
    "nvidia": ("Tesla T4", "but this is sm_75"),
}


@pytest.mark.only(*OTHER_CARDS)
def test_a_card_the_kernel_was_not_built_for_is_refused(name: str, kernel: Any, state: Any) -> None:
    card, reason = OTHER_CARDS[name]
    state.card = replace(emulated.CARDS[card], products=("bfloat16", "float16", "float32"))
    layer, _ = make_layer(mla.load_backend(name), kernel)
    assert layer.ops[kernel[0]].name in ("reference", "sdpa")
    assert any(reason in line for line in layer.ops.explain())


def test_what_a_kernel_cannot_serve_is_refused_when_the_layer_is_built(kernel: Any, backend: Any) -> None:
    role, op = kernel
    changed = {"kv_lora_rank": 256} if role == "latent_attention" else {"qk_nope_head_dim": 256}
    why = mla.MLA(mla.MLAConfig(**{**KERNEL_WIDTHS, **changed}), backend=backend).ops[role].reasons
    limits = (
        "it is made for latents of 512 + 64, not 256 + 64",
        "it takes heads of at most 256, not 320",
        "not 320 and 16",
    )
    assert any(f"'{op}' not used because" in sentence and sentence.endswith(limits) for sentence in why), why


PAGED = [
    case
    for case in LIVES[BACKEND]
    if case[1] == "latent_attention" and case[2] not in ("flashinfer", "ixformer")
]


@pytest.mark.parametrize("kernel", PAGED, ids=_case, indirect=True)  # others read pages of any size
def test_pages_a_kernel_cannot_read_are_a_reason(kernel: Any, bench: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(KERNEL_WIDTHS))
    sizes = "32 or 64" if kernel[1] == "tokenspeed" else "64"
    reason = f"it reads pages of {sizes} tokens, but this cache has pages of 16"
    done = bench("--page-size", "16", "--attention", "absorbed", "--scenario", "decode", *HEADLINE)
    assert done.code == 3  # only the reference was measured, and nothing of the backend
    assert reason in done.err
