"""Tiles that plugins ship, compiled for GPUs that are not here; and tiles that must not pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks.triton import compiling, fingerprint
from benchmarks.triton.cards import read
from benchmarks.triton.cases import Case, case_of
from benchmarks.triton.compiling import compile_cases
from benchmarks.triton.faults import faults
from benchmarks.triton.recording import Recorder
from benchmarks.triton.resources import _counted
from benchmarks.triton.shipped import A100, B200, H100, L40, METAX_AS_CDNA3, RTX50, Shipped
from mla_backends.triton_ops import Tile, triton_ops

# Each kernel, path and class of cards; every combination is in table.md.
SHIPPED = [
    (A100, "latent: 16 heads"),
    (A100, "latent: 128 heads, 2 or 1 new"),
    (H100, "latent: 16 heads of 256, one part"),
    (H100, "latent: 128 heads, 2 new tokens"),
    (H100, "latent: 128 heads, page 1, lse"),
    (H100, "expanded: causal"),
    (H100, "merge"),
    (A100, "merge, lse"),
    (A100, "latent: 16 heads, fp16, no rope"),
    (H100, "latent: 128 heads, fp8_ds_mla"),
    (H100, "latent: 16 heads, q8_0"),
    (B200, "latent: 16 heads, q8_0"),
    (B200, "latent: 128 heads, int8"),
    (B200, "sparse: 128 heads, fp8_ds_mla"),
    (H100, "sparse: 128 heads"),
    (H100, "select, fp8"),
    (H100, "select: the best"),
    (METAX_AS_CDNA3, "select: the best"),
    (H100, "write_latent"),
    (B200, "latent: 128 heads"),
    (B200, "expanded: 32 queries"),
    (RTX50, "latent: 128 heads, page 1, lse"),
    (METAX_AS_CDNA3, "latent: 16 heads"),
    (METAX_AS_CDNA3, "expanded: all keys, lse"),
]


def _with(shipped: Shipped, tile: Tile) -> Shipped:
    return replace(shipped, tuning=replace(shipped.tuning, latent={1: tile}))


MANY_HEADS = "latent: 128 heads"
FINE = {
    "triton": "3.8.0",
    "spilled": 0,
    "shared": 0,
    "tensor memory": 0,
    "trap": False,
    "step": None,
    "instructions": {"wgmma": 8, "early start": 1},
}
WRONG = [
    (_with(L40, Tile(64, 64, 4, 2)), [r"spills \d+ bytes", r"needs \d{3} of 99 KiB of shared memory$"]),
    (_with(B200, Tile(64, 32, 8, 2)), [r"needs 5\d\d of 512 columns", "is nothing but a trap$"]),
]


def _joined(shipped: Shipped) -> Case:
    """Return the launch that writes latents and rotates the queries of 128 heads, as a layer makes it."""
    recorder = Recorder(shipped.early, bounds=shipped.bounds)
    q, latent_q, first = (
        torch.empty(2, *shape, dtype=torch.bfloat16) for shape in ((128, 192), (128, 576), (2112,))
    )
    triton_ops(shipped.tuning, 132, recorder)["triton_write_latent"](
        kv_a=first[:, 1536:], weight=first[0, :512], eps=1e-6, cos_sin=torch.empty(2, 64), interleaved=True,
        slots=torch.arange(2), cache=torch.empty(1, 64, 576, dtype=torch.bfloat16), x=q[..., 128:],
        out=latent_q[..., 512:],
    )  # fmt: skip
    (launch,) = recorder.recorded
    return case_of(launch, shipped.target)


@pytest.fixture(scope="module")
def compiled() -> list[tuple[Case, dict[str, Any]]]:
    """Both lists, at once: one process that has imported Triton serves them all."""
    cases = [shipped.cases()[name] for shipped, name in SHIPPED]
    cases += [shipped.cases()[MANY_HEADS] for shipped, _ in WRONG]
    return list(zip(cases, compile_cases(cases), strict=True))


def test_the_compiler_is_of_the_triton_that_is_imported_here(
    compiled: list[tuple[Case, dict[str, Any]]],
) -> None:
    assert {facts["triton"] for _, facts in compiled} == {triton.__version__}


def test_what_is_shipped_has_no_fault(compiled: list[tuple[Case, dict[str, Any]]]) -> None:
    by_kernel = {
        (shipped.cards, name): faults(*kernel, shipped.shared)
        for (shipped, name), kernel in zip(SHIPPED, compiled[: len(SHIPPED)], strict=True)
    }
    assert not {where: what for where, what in by_kernel.items() if what}
    assert len(by_kernel) == len(SHIPPED)


def test_what_is_predicted_is_what_the_compiler_yields(compiled: list[tuple[Case, dict[str, Any]]]) -> None:
    """A step of what was compiled here is that of the committed predictions, if they are of this Triton."""
    committed = {
        (row["target"], row["launch"]): row["step"]
        for row in read()["rows"]
        if row["triton"] == triton.__version__
    }
    if not committed:
        pytest.skip(f"model.json has no Triton {triton.__version__}")
    table = {
        (str(shipped.target), name): answer["step"]
        for (shipped, name), (_, answer) in zip(SHIPPED, compiled[: len(SHIPPED)], strict=True)
    }
    both = table.keys() & committed.keys()
    assert len(both) >= 4
    assert {where: table[where] for where in both} == {where: committed[where] for where in both}


def test_a_cache_write_that_rotates_queries_has_no_fault() -> None:
    shipped = (A100, H100)
    cases = [_joined(each) for each in shipped]
    assert [case.arguments["HEADS"]["value"] for case in cases] == [128, 128]
    results = compile_cases(cases)
    assert [faults(*each, shipped[0].shared) for each in zip(cases, results, strict=True)] == [[], []]


@pytest.mark.parametrize("access", ["@%p1 ld.global.b32", "st.global.v4.b32", "cp.async.cg.shared.global"])
def test_a_launch_that_touches_memory_before_it_waits_does_not_start_early_soundly(access: str) -> None:
    sass, wait = "ACQBULK ;", "griddepcontrol.wait;"
    assert _counted(sass, f"ld.param.b64 %rd1; {wait} {access} [%rd1];") == {"early start": 1}
    assert _counted(sass, f"{access} [%rd1]; {wait}") == {}


def test_tiles_that_do_not_fit_are_refused(compiled: list[tuple[Case, dict[str, Any]]]) -> None:
    for (shipped, expected), kernel in zip(WRONG, compiled[len(SHIPPED) :], strict=True):
        said = faults(*kernel, shipped.shared)
        for what in expected:
            assert any(re.match(what, fault) for fault in said), (what, said)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"error": "SIGABRT: no"}, "does not compile: SIGABRT: no"),
        ({"spilled": 1}, "spills 1 bytes per thread"),
        ({"tensor memory": 576}, "needs 576 of 512 columns of tensor memory"),
        ({"instructions": {"mma": 8, "early start": 1}}, "has no wgmma instruction"),
        (
            {"step": {"flops": {"wgmma": 3 * 64 * 64 * 1088}}},
            "computes 1.50 times the products that it needs",
        ),
        ({"instructions": {"wgmma": 8}}, "may start early, and does not wait for the launch before"),
    ],
)
def test_every_fault_has_a_sentence(change: dict[str, Any], fault: str) -> None:
    case = H100.cases()[MANY_HEADS]
    assert faults(case, FINE, H100.shared) == []
    assert faults(case, {**FINE, **change}, H100.shared) == [fault]


def test_answers_are_kept_by_all_that_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Case] = []

    def answer(cases: Sequence[Case], *_: Any) -> list[dict[str, Any]]:
        asked.extend(cases)
        return [{"error": "busy"} if case.warps == 2 else {"registers": case.warps} for case in cases]

    monkeypatch.setattr(compiling, "_compiled", answer)
    case = H100.cases()["rms_norm"]
    both = [replace(case, warps=2), case]
    assert compile_cases(both, tmp_path) == [{"error": "busy"}, {"registers": case.warps}]
    assert compile_cases(both, tmp_path)[1] == {"registers": case.warps}
    assert asked == [*both, both[0]], "what failed is asked again"
    compile_cases([replace(case, registers=64), *[replace(case, stages=7)] * 2], tmp_path)
    assert len(asked) == 5
    monkeypatch.setattr(fingerprint, "code", lambda path: ("another kernel",))
    compile_cases([case], tmp_path)
    assert len(asked) == 6


def test_a_compiler_that_aborts_takes_only_its_case_along(tmp_path: Path) -> None:
    (tmp_path / "aborting.py").write_text("import os\n\nos.abort()\n")
    (tmp_path / "raising.py").write_text("raise RuntimeError('no such layout')\n")
    case = H100.cases()["rms_norm"]
    cases = [replace(case, kernel="aborting:kernel"), case, replace(case, kernel="raising:kernel")]
    aborted, fine, raised = compile_cases(cases, tmp_path)
    assert aborted["error"].startswith("SIGABRT")
    assert fine["registers"] > 0
    assert raised["error"] == "RuntimeError: no such layout"
