"""Devices that cannot be had, in this process: every one is a sentence that says what to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import write_tiny_run

import mla
from mla.bench import results
from mla.bench.cli.main import main
from mla_backends import BackendError, BackendOptionError
from mla_backends.any_device import parse
from mla_backends.errors import describe, out_of_memory


def refusal(device: str, **options: str) -> str:
    with pytest.raises(BackendError) as caught:
        mla.load_backend("torch", options={"device": device, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("device", ["nosuch", "nn", "float32", "accelerator", "vulkan"])
def test_what_is_no_device_of_this_torch_names_those_that_are(device: str) -> None:
    said = refusal(device)
    assert f"has no torch.{device}, and torch_{device} is not installed; install the package" in said
    assert "-O import=MODULE" in said
    assert re.search(r"\(available here: cpu.*; this torch also knows cuda, .*xpu\)", said), said


def test_a_module_without_a_device_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    said = refusal("xpu:1")
    assert "torch.xpu.is_available() is False; check that this torch (" in said
    assert ") is built for xpu, that the driver lists the device" in said


@pytest.mark.parametrize("name", ["hip", "rocm"])
def test_hip_is_cuda_in_a_build_for_it_and_in_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"this torch is not a ROCm build (torch.version.hip is None), so it has no {name} device" in (
        refusal(name)
    )
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "torch.cuda.is_available() is False" in refusal(name)


@pytest.mark.parametrize(
    ("device", "package", "said"),
    [
        ("nosuch", "json", "has no torch.nosuch, and importing json does not bring it; name the module that"),
        ("cpu", "no_such_package", "no_such_package is not installed; -O import=no_such_package names it"),
    ],
)
def test_a_module_that_brings_nothing_or_is_missing_is_named(device: str, package: str, said: str) -> None:
    assert said in refusal(device, **{"import": package})


def test_names_are_lower_case_to_torch() -> None:
    assert mla.load_backend("torch", options={"device": "CPU"}).device == torch.device("cpu")


def test_options_in_place_of_an_index_are_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"options=\{'device': 'cpu'\}"):
        mla.load_backend("torch", {"device": "cpu"})


def test_without_a_name_there_must_be_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "mps", "mtia", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False, raising=False)
    with pytest.raises(BackendError, match="reports no accelerator; choose a device with -O device=NAME"):
        mla.load_backend("torch")


@pytest.mark.parametrize(
    ("text", "parts"),
    [("xpu", ("xpu", None)), ("npu:0", ("npu", 0)), (" mps:12 ", ("mps", 12)), ("XPU:1", ("xpu", 1))],
)
def test_a_device_may_carry_its_index(text: str, parts: tuple[str, int | None]) -> None:
    assert parse(text) == parts


@pytest.mark.parametrize("text", ["", "xpu:", "xpu:-1", "xpu:one", "x y", "torch.xpu", "0", ":1"])
def test_a_device_that_cannot_be_read_is_a_usage_error(text: str) -> None:
    with pytest.raises(BackendOptionError, match="takes -O device=NAME or NAME:INDEX, such as xpu or xpu:1"):
        parse(text)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "has no torch.unheard, and importing torch_unheard does not bring it; name the module"),
        ("raise OSError('libvendor.so: not found')", "importing torch_unheard raised OSError: libvendor.so"),
        ("import no_such_runtime", "importing torch_unheard raised ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "importing torch_unheard raised SystemExit: 3"),
    ],
)
def test_a_package_that_does_not_bring_its_device(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_unheard.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert said in refusal("unheard")
    finally:
        sys.modules.pop("torch_unheard", None)


def test_a_missing_kernel_is_one_clause() -> None:
    with pytest.raises(NotImplementedError) as caught:
        torch.zeros(1, device="vulkan")
    assert describe(caught.value) == (
        "NotImplementedError: Could not run 'aten::empty.memory_format' with arguments from the 'Vulkan' "
        "backend"
    )
    assert describe(ValueError("no kernel\nfor you")) == "ValueError: no kernel"
    assert describe(ValueError("none. Set CC.")) == "ValueError: none. Set CC."


def test_an_allocator_that_finds_no_memory_is_still_heard() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(describe(caught.value))


def test_the_cpu_runs_as_any_device_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--backend", "torch", "-O", "device=cpu", "--cache", "warm", "-v", "-o", "run.json")
    assert main([*words, *write_tiny_run(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count(" ok") == 2
    assert err.startswith("backend 'cpu' is made for this device and has ops of its own: ")
    assert "pip install" not in err.splitlines()[0]  # it is installed
    run = results.decode((tmp_path / "run.json").read_bytes())
    assert run.environment["backend.device_clock"].startswith("none: torch.cpu")
    assert {case.clock for case in run.cases} == {"host"}
