"""The CPU backend: device facts that are real, threads that are obeyed, and its op against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mla
from mla.weights import random_state_dict
from mla_backend_cpu import products
from mla_backend_cpu.products import MIN_TOKENS, Fp32BatchedLinear, Fp32Linear
from mla_backends import BackendError, host
from mla_backends.api import LinearSpec

CPU = torch.device("cpu")
#: One rounding to bf16 costs at most 2^-8 of a value, and a row's norm no more.
ROUNDING = 1.05 * 2**-8


def relative(actual: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return (actual.double() - true).norm(dim=-1) / true.norm(dim=-1)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3 * MIN_TOKENS), st.integers(1, 70), st.integers(1, 700), st.booleans(), st.integers(0, 9)
)
def test_linear_rounds_once_whatever_the_shape(
    tokens: int, inputs: int, outputs: int, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 2 * inputs, generator=generator).bfloat16()[:, ::2][:, :inputs]  # strided
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    bias = torch.randn(outputs, generator=generator).bfloat16() if biased else None
    out = torch.full((tokens, outputs), torch.nan, dtype=torch.bfloat16)
    op = Fp32Linear()
    op(op.pack(weight), x=x, bias=bias, out=out)
    true = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    assert (out.double() - true).abs().max() <= 2 * ROUNDING * true.abs().max()
    assert relative(out.flatten(), true.flatten()) <= ROUNDING


def test_linear_walks_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 1)  # 256 rows a block
    x, weight = (torch.randn(rows, 24).bfloat16() for rows in (MIN_TOKENS, 1000))
    out = torch.full((MIN_TOKENS, 1000), torch.nan, dtype=torch.bfloat16)
    Fp32Linear()(Fp32Linear().pack(weight), x=x, bias=None, out=out)
    assert (relative(out, x.double() @ weight.double().T) <= ROUNDING).all()


@pytest.mark.parametrize("tokens", [1, MIN_TOKENS - 1, MIN_TOKENS, 100])
def test_batched_linear_rounds_once_and_unpacks_its_weight(tokens: int) -> None:
    op, x, weight = (
        Fp32BatchedLinear(),
        torch.randn(tokens, 3, 20).bfloat16(),
        torch.randn(3, 50, 12).bfloat16(),
    )
    packed = op.pack(weight)
    out = torch.full((tokens, 3, 64), torch.nan, dtype=torch.bfloat16)
    op(packed, x=x[..., 8:], out=out[..., :50])
    true = torch.einsum("thi,hoi->tho", x[..., 8:].double(), weight.double())
    assert (relative(out[..., :50], true) <= ROUNDING).all()
    assert out[..., 50:].isnan().all()
    assert torch.equal(op.unpack(packed), weight)
    assert packed.nbytes == weight.nbytes


@pytest.mark.parametrize(
    ("dtype", "gain", "reason"),
    [
        (torch.float32, 2.0, "it widens bfloat16 weights, but this layer's are torch.float32"),
        (torch.bfloat16, 0.42, "fp32 products were measured at only 0.42x the speed of bfloat16 ones here"),
        (torch.bfloat16, 1.9, None),
    ],
)
def test_linear_says_why_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, gain: float, reason: str | None
) -> None:
    monkeypatch.setattr(products, "fp32_gain", lambda: gain)
    reasons = Fp32Linear().unsupported_reasons(LinearSpec(8, 8, 1, dtype, CPU))
    assert reasons == ([reason] if reason else [])


def test_an_option_decides_instead_of_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "fp32_gain", lambda: 0.0)
    spec = LinearSpec(8, 8, 1, torch.bfloat16, CPU)
    assert Fp32Linear("on").unsupported_reasons(spec) == []
    assert Fp32BatchedLinear("off").unsupported_reasons(spec) == ["disabled by the option fp32=off"]
    with pytest.raises(BackendError, match="takes -O fp32=auto, on or off, got 'maybe'"):
        mla.load_backend("cpu", options={"fp32": "maybe"})


def test_the_gain_is_measured_once() -> None:
    assert products.fp32_gain() > 0
    assert products.fp32_gain() == products.fp32_gain()


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_the_layer_is_right_with_and_without_the_op(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    from mla.verify.layer_oracle import oracle

    monkeypatch.setattr(products, "fp32_gain", lambda: gain)
    config = mla.MLAConfig(hidden_size=96, num_attention_heads=4, q_lora_rank=32)
    backend: Any = mla.load_backend("cpu", options={"native": "off"})  # the kernels would come first
    layer = mla.MLA(config, backend=backend)
    assert (layer.ops["o_proj"].name == "fp32_linear") == (gain > 1)
    state = random_state_dict(config)
    layer.load_state_dict(state)
    cache = mla.LatentCache(config, max_tokens=256, device=backend.device)
    batch = cache.extend(cache.new_sequences(2), [MIN_TOKENS, 7])
    hidden = torch.randn(MIN_TOKENS + 7, 96).bfloat16()
    empty = (torch.empty(0, 512), torch.empty(0, 64))
    truth = oracle(config, state, hidden, [MIN_TOKENS, 7], [empty, empty])
    assert relative(layer(hidden, batch, cache.pages[0]).flatten(), truth.flatten()) <= 2e-2


def test_threads_are_obeyed(tmp_path: Path) -> None:
    code = "import mla, torch; mla.load_backend('cpu', threads=1); print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


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


@pytest.mark.usefixtures("no_level_named")
def test_a_level_that_was_named_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_backend_cpu import instruction_sets, library

    library.loaded.cache_clear()
    monkeypatch.setattr(instruction_sets, "processor_flags", frozenset)
    try:
        with pytest.raises(BackendError, match=r"no kernels for native=avx2: this processor lacks avx2, "):
            mla.load_backend("cpu", options={"native": "avx2"})
        backend = mla.load_backend("cpu")  # nobody named one
        assert backend.environment()["kernels"] == "portable"
    finally:
        library.loaded.cache_clear()


@pytest.mark.usefixtures("no_level_named")
@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_where_torch_has_amx_a_measurement_decides_on_products(
    monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    from mla_backend_cpu import instruction_sets, products

    flags = instruction_sets.processor_flags() | {"amx_bf16"}
    monkeypatch.setattr(instruction_sets, "processor_flags", lambda: flags)
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
    from mla_backend_cpu import instruction_sets, products

    flags = instruction_sets.processor_flags() | {"amx_bf16"}
    gains = iter((0.25, 0.25, 4.0, 4.0))  # for few and many tokens, twice: under load they differ
    monkeypatch.setattr(instruction_sets, "processor_flags", lambda: flags)
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
    from mla.verify.layer_oracle import oracle
    from mla_backend_cpu import products

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
    from mla_backend_cpu import products
    from mla_backend_cpu.library import load

    assert products.product_gain(load("portable"), fp32) > 0
    assert products.PRODUCT_GAINS[fp32] > 0


@pytest.mark.usefixtures("no_level_named")
def test_the_result_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_backend_cpu import products
    from mla_backend_cpu.library import load

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
