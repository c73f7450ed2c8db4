"""Probe, setup and the runner, as a user of each backend meets them."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import emulated
import pytest
import torch
from tiny_run import HEADLINE

import mla
from mla.bench import results
from mla_backends.api import OPS
from mla_backends.errors import DeviceUnavailable
from mla_backends.registry import create


def test_the_probe_says_what_it_saw(name: str, vendor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vendor.variable, "0,1")
    available = create(name).probe()
    assert available.ok, available.reason
    assert vendor.mark in available.evidence
    assert available.evidence[f"torch.{vendor.device}"] == "available"
    assert available.evidence[vendor.variable] == "0,1"


def test_the_probe_leaves_the_device_alone(name: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever opens a context on a real device must not be called: properties, memory, tensors."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the probe touched the device")

    for function in ("get_device_properties", "get_device_name", "get_device_capability", "mem_get_info"):
        monkeypatch.setattr(module, function, fail)
    for function in ("set_device", "synchronize", "current_stream", "Stream", "Event"):
        monkeypatch.setattr(module, function, fail)
    monkeypatch.setattr(emulated.STATE, "block", fail)
    variables = dict(os.environ)
    assert create(name).probe().ok
    assert dict(os.environ) == variables


def test_an_absent_card_is_a_sentence(name: str, vendor: Any, bench: Any, state: Any) -> None:
    state.count = 0
    done = bench()
    assert done.code == 3
    assert done.error.startswith(f"error: backend '{name}' has no usable device: torch.{vendor.device}.")
    assert f"`{vendor.tool}` lists the device" in done.error
    assert not done.out


def test_what_a_stack_warns_about_becomes_the_reason(
    name: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch warns about a driver that is too old, and then says no more than that there is no device."""

    def warn() -> bool:
        warnings.warn("The driver on your system is too old\nPlease update it", stacklevel=2)
        return False

    monkeypatch.setattr(module, "is_available", warn)
    assert create(name).probe().reason.endswith(" is False; The driver on your system is too old")


def test_a_stack_that_fails_when_asked_is_a_reason(
    name: str, vendor: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bool:
        raise RuntimeError("driver and runtime differ\nsee the log")

    monkeypatch.setattr(module, "is_available", fail)
    available = create(name).probe()
    assert not available.ok
    expected = f"torch.{vendor.device}.is_available() raised RuntimeError: driver and runtime differ"
    assert available.reason == expected
    assert vendor.tool in available.hint


# ---------------------------------------------------------------------------------------------- setup


def test_setup_returns_the_device_of_its_tensors(name: str, vendor: Any, state: Any) -> None:
    first, second = mla.load_backend(name), mla.load_backend(name, index=1)
    assert first.device == torch.device(vendor.device, 0)
    assert second.device == torch.device(vendor.device, 1)
    assert torch.empty(1, device=vendor.device).device == second.device
    assert state.current == 1


def test_a_driver_that_fails_at_setup_is_a_sentence(
    name: str, vendor: Any, bench: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: Any = None) -> None:
        raise RuntimeError("system not yet initialized\nset DEBUG=1 for more")

    monkeypatch.setattr(module, "synchronize", fail)
    done = bench()
    assert done.code == 3
    reason = "the device failed to start: RuntimeError: system not yet initialized;"
    assert f"backend '{name}' has no usable device: {reason}" in done.error
    assert f"`{vendor.tool}`" in done.error


def test_a_device_that_vanished_after_the_probe(name: str, state: Any, module: Any) -> None:
    backend = create(name)
    assert backend.probe().ok
    state.count = 0
    with pytest.raises(DeviceUnavailable, match="torch sees 0 devices"):
        backend.setup()


def test_a_run_ends_in_a_result_file(name: str, vendor: Any, bench: Any, tmp_path: Any) -> None:
    done = bench("-o", "run.json")
    assert done.code in (0, 6), done.err  # a busy machine may cost a number
    assert done.code or "Decode Throughput: " in done.out
    run = results.decode((tmp_path / "run.json").read_bytes())
    assert {case.check.status for case in run.cases} <= ({"ok", "doubtful"} if done.code else {"ok"})
    assert run.backend.name == name
    assert run.backend.device == emulated.STATE.card.name
    assert run.environment["backend.device"] == f"{vendor.device}:0"
    assert all(case.memory.peak_bytes for case in run.cases)
    assert all(case.clock == "host" for case in run.cases)


@pytest.mark.only("moore", "nvidia")  # once per way of attaching the device
def test_a_run_on_the_second_card(name: str, vendor: Any, bench: Any, tmp_path: Any) -> None:
    assert bench("--device", "1", "--scenario", "decode", *HEADLINE, "-o", "run.json").code == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["environment"]["backend.device"] == f"{vendor.device}:1"


@pytest.mark.only("nvidia")  # once will do: no op depends on the vendor
@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_alone(op: str, bench: Any, tmp_path: Any) -> None:
    dims = json.loads((tmp_path / "tiny.json").read_text())
    lora = {**dims, "q_lora_rank": 48, "attention_bias": True}
    indexer = {"model_type": "deepseek_v32", "index_n_heads": 3, "index_head_dim": 16, "index_topk": 7}
    sparse = op in ("write_index_key", "select_latents", "sparse_latent_attention")
    (tmp_path / "lora.json").write_text(json.dumps({**lora, **indexer} if sparse else lora))
    words = ("--workload", "standard", "--config", "lora.json", "--batch", "2", "--q-len", "2")
    done = bench(*words, "--op", op, "--runs", "2", "--passes", "2", *HEADLINE, "-o", "run.json")
    assert done.code == 0, done.err
    run = results.decode((tmp_path / "run.json").read_bytes())
    assert {case.check.status for case in run.cases} == {"ok"}


@pytest.mark.only("nvidia")
def test_layers_of_a_stack_run_one_after_the_other(bench: Any, tmp_path: Any) -> None:
    done = bench("--layers", "2", "--cache", "warm", "--clock", "host", "-o", "run.json")
    assert done.code in (0, 6), done.err  # a busy machine may cost a number
    run = results.decode((tmp_path / "run.json").read_bytes())
    assert {case.layers for case in run.cases} == {2}
    assert {case.check.status for case in run.cases} <= {"ok", "doubtful"}
