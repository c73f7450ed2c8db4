"""The CPU backend: device facts that are real, threads that are obeyed, and its op against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_cases import load

import mla
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict
from mla_backend_cpu import compilation, products
from mla_backends import BackendError, host


def relative(actual: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return (actual.double() - true).norm(dim=-1) / true.norm(dim=-1)


THREADS = """
import os, sys, mla
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
facts = mla.load_backend("cpu", threads=int(sys.argv[2]) or None, options={"native": "off"}).environment()
print(facts["threads"], facts["threads_from"])
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU leaves nothing to decide")
@pytest.mark.parametrize(
    ("cpus", "option", "variables", "expected"),
    [
        (1, 0, {}, "1 the CPUs it may use"),
        (1, 0, {"SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "2"}, "1 the CPUs it may use"),
        (2, 0, {}, "2 the CPUs it may use"),
        (2, 0, {"SLURM_CPUS_PER_TASK": "1"}, "1 SLURM_CPUS_PER_TASK"),  # a cluster that binds no task
        (2, 0, {"SLURM_CPUS_PER_TASK": "64"}, "2 the CPUs it may use"),
        (2, 0, {"OMP_NUM_THREADS": "1"}, "1 OMP_NUM_THREADS"),
        (2, 2, {"SLURM_CPUS_PER_TASK": "1"}, "2 the option threads"),
    ],
)
def test_threads_are_the_least_that_anything_allows_unless_a_number_is_given(
    tmp_path: Path, cpus: int, option: int, variables: dict[str, str], expected: str
) -> None:
    names = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(cpus), str(option)],
        cwd=tmp_path,
        env={**clean, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


def test_there_is_only_one_cpu() -> None:
    with pytest.raises(BackendError, match="backend 'cpu' has no device 3: it has 1, numbered from 0"):
        mla.load_backend("cpu", index=3)
    assert mla.load_backend("cpu", index=0).device == torch.empty(0).device


def test_the_host_is_described_truthfully() -> None:
    assert 1 <= host.cpu_limit() <= (os.cpu_count() or 1)
    total, available, peak = host.memory_total(), host.memory_available(), host.peak_resident()
    assert total is not None
    assert available is not None
    assert peak is not None
    assert 0 < available <= total
    assert 1 << 24 < peak < total
    assert host.processor_name()


@pytest.mark.usefixtures("no_level_named", "nothing_loaded")
def test_a_level_that_was_named_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "processor_flags", frozenset)
    with pytest.raises(BackendError, match=r"no kernels for native=avx2: this processor lacks avx2, "):
        mla.load_backend("cpu", options={"native": "avx2"})
    assert mla.load_backend("cpu").environment()["kernels"] == "portable"  # nobody named one


@pytest.mark.usefixtures("no_level_named")
@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_where_torch_has_amx_a_measurement_decides_on_products(
    monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    flags = compilation.processor_flags() | {"amx_bf16"}
    monkeypatch.setattr(compilation, "processor_flags", lambda: flags)
    monkeypatch.setattr(products, "product_gain", lambda kernels, fp32: gain)
    config, backend = mla.MLAConfig(hidden_size=64, num_attention_heads=2), mla.load_backend("cpu")
    ops = mla.MLA(config, backend=backend).ops
    assert (ops["o_proj"].name == "native_linear") == (gain > 1)
    assert (ops["w_uk"].name == "native_batched_linear") == (gain > 1)
    assert any("measured at 0.50x the speed of torch's" in line for line in ops["o_proj"].reasons) == (
        gain < 1
    )
    assert ops["latent_attention"].name == "native_latent_attention"
    assert backend.environment()["native_product_gain"] == f"{gain:.2f}"
    named = mla.load_backend("cpu", options={"native": "portable"})
    assert mla.MLA(config, backend=named).ops["o_proj"].name == "native_linear"
    assert "native_product_gain" not in named.environment()


@pytest.mark.usefixtures("no_level_named")
def test_a_result_names_the_gain_that_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = compilation.processor_flags() | {"amx_bf16"}
    gains = iter((0.25, 0.25, 4.0, 4.0))  # for few and many tokens, twice: under load they differ
    monkeypatch.setattr(compilation, "processor_flags", lambda: flags)
    monkeypatch.setattr(products, "PRODUCT_GAINS", {})
    monkeypatch.setattr(products, "fastest", lambda theirs, ours: (next(gains), 1.0))
    products.product_gain.cache_clear()
    try:
        backend = mla.load_backend("cpu")
        mla.MLA(mla.MLAConfig(hidden_size=64, num_attention_heads=2), backend=backend)
        assert backend.environment()["native_product_gain"] == "0.25"
    finally:
        products.product_gain.cache_clear()


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_a_float32_layer_gets_packed_products_where_they_beat_torch(
    monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    monkeypatch.setattr(products, "product_gain", lambda kernels, fp32: gain if fp32 else 1 / gain)
    config = mla.MLAConfig(hidden_size=64, num_attention_heads=2)
    layer = mla.MLA(config, backend=mla.load_backend("cpu"), dtype=torch.float32)
    assert (layer.ops["o_proj"].name == "native_linear") == (gain > 1)
    assert (layer.ops["w_uk"].name == "native_batched_linear") == (gain > 1)
    state = random_state_dict(config, dtype=torch.float32)
    layer.load_state_dict(state)
    cache = mla.LatentCache(config, max_tokens=128, device="cpu", dtype=torch.float32)
    batch = cache.extend(cache.new_sequences(2), [9, 1])
    hidden = torch.randn(10, 64)
    empty = (torch.empty(0, 512), torch.empty(0, 64))
    truth = oracle(config, state, hidden, [9, 1], [empty, empty])
    assert relative(layer(hidden, batch, cache.pages[0]).flatten(), truth.flatten()) <= 1e-5


@pytest.mark.parametrize("fp32", [False, True])
def test_the_gain_over_torch_is_measured(fp32: bool) -> None:
    assert products.product_gain(load("portable"), fp32) > 0
    assert products.PRODUCT_GAINS[fp32] > 0


@pytest.mark.usefixtures("no_level_named")
def test_the_result_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load("auto")
    monkeypatch.setattr(products, "widening_gain", lambda kernels: 0.5)
    monkeypatch.setattr(products, "PRODUCT_GAINS", {True: 1.25})
    environment = mla.load_backend("cpu").environment()
    assert environment["native_product_gain_fp32"] == "1.25"
    assert ("native_fp32_gain" in environment) == (kernels.dot_bf16 and not kernels.tiles)


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_CPU_NATIVE", "sse")
    with pytest.raises(BackendError, match="got 'sse' from MLA_CPU_NATIVE"):
        mla.load_backend("cpu")
