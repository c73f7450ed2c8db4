"""`--layers N`: numbers per layer, and N layers that are all right, each with memory of its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoint_maker as maker
import pytest
import torch

import mla
from mla.bench import results
from mla.bench.subjects.base import LayerChecker
from mla.bench.subjects.inputs import make_inputs
from mla.bench.subjects.layer import MlaLayer, layer_state
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.weights import random_state_dict

if TYPE_CHECKING:
    from mla import MLAConfig

Bench = Callable[..., Any]
Mutation = Callable[[MlaLayer], None]
VIRTUAL = ("--backend", "fake-virtual-clock")
LAYERS = 3
DECODE = Scenario(name="d", mode="decode", query_lens=(1, 1), history=(5, 30), runs=3, layers=LAYERS)
EMPTY = Scenario(name="e", mode="prefill", query_lens=(4, 20), history=(0, 0), layers=LAYERS)
MIXED = Scenario(name="m", mode="prefill", query_lens=(30, 3), history=(5, 30), layers=LAYERS)
SCENARIOS = {scenario.name: scenario for scenario in (DECODE, EMPTY, MIXED)}


def read() -> list[results.Case]:
    return results.decode(Path("run.json").read_bytes()).cases


def test_times_are_per_layer_and_work_is_that_of_one(bench: Bench, small: list[str]) -> None:
    bench(*VIRTUAL, *small, "-o", "run.json", fakes=["virtual_clock"])
    alone = read()
    done = bench(*VIRTUAL, *small, "--layers", "4", "-v", "-o", "run.json", fakes=["virtual_clock"])
    assert done.code == 0
    for single, case in zip(alone, read(), strict=True):
        assert (single.layers, case.layers, case.check.status) == (1, 4, "ok")
        assert case.latency_ms is not None
        assert single.latency_ms is not None
        assert case.latency_ms.samples == [sample / 4 for sample in single.latency_ms.samples]
        assert case.latency_ms.median == single.latency_ms.median / 4
        assert case.tokens_per_s is not None
        assert single.tokens_per_s is not None
        assert case.tokens_per_s.median == pytest.approx(4 * single.tokens_per_s.median)
        assert case.cost == single.cost
        assert case.memory.cache_bytes == 4 * single.memory.cache_bytes
        assert case.memory.weight_bytes == 4 * single.memory.weight_bytes
        floor, fraction = case.roofline.floor_ms, case.roofline.fraction
        assert floor is not None
        assert fraction == pytest.approx(floor / case.latency_ms.median)
    assert done.out.splitlines()[-2:] == [
        "Prefill Latency [per layer of 4]: unreliable (0.25 .. 1.00 ms)",
        "Decode Throughput [per layer of 4]: 3200 tok/s",
    ]
    assert "decode per layer of 4" in done.out
    assert "history 5 to 9, 4 layers, 6 passes of 4" in done.err


def test_a_case_repeats_itself_from_its_own_line(bench: Bench, small: list[str]) -> None:
    bench(*VIRTUAL, *small, "--layers", "2", "-o", "run.json", fakes=["virtual_clock"])
    _, decode = read()
    assert bench(*shlex.split(decode.repro)[3:], "-o", "run.json").code == 0
    (again,) = read()
    assert (again.layers, again.check) == (2, decode.check)


def test_a_workload_may_say_how_many(bench: Bench, small: list[str]) -> None:
    path = Path("tiny.toml")
    path.write_text(path.read_text().replace("runs = 4\n", "runs = 4\nlayers = 3\n"))
    assert bench(*VIRTUAL, *small, "-o", "run.json", fakes=["virtual_clock"]).code == 0
    assert [case.layers for case in read()] == [1, 3]


def test_a_wrong_op_is_named_with_its_layer(bench: Bench, small: list[str]) -> None:
    """Each layer has an op of its own, which the check calls 4 times and is wrong the fourth time."""
    late = ["-O", "fault=late", "-O", "after=3", "--warmups", "0"]
    words = [*late, "--layers", "3", "--scenario", "decode", "-o", "run.json"]
    done = bench("--backend", "fake-wrong-op", *small, *words, fakes=["wrong_op"])
    assert done.code == 4
    wrong = read()[0]
    assert re.match(r"layer \d: 2 of 8 output rows are too far from the oracle; ", wrong.check.reason)
    assert wrong.latency_ms is None


def test_a_checkpoint_s_layer_may_be_repeated(bench: Bench, small: list[str], tmp_path: Path) -> None:
    made = maker.LAYOUTS["bare-names"].make(tmp_path / "model")
    words = ["--model-path", str(made.folder), "--layer", "3", "--layers", "2"]
    assert bench("--backend", "cpu", *small[2:], *words, "-o", "run.json").code == 0
    assert {(case.layers, case.check.status) for case in read()} == {(2, "ok")}
    assert not {case.implementation for case in read()} - {"mla", "mla-reference"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "0"], "Error: Invalid value for '--layers': 0 is not in the range"),
        (["--layers", "5000"], "Error: Invalid value for '--layers': 5000 is not in the range"),
        (
            ["--layers", "2", "--implementations", "mla,transformers"],
            "error: transformers runs one layer at a time: leave it out, or --layers.",
        ),
        (["--layers", "2", "--op", "linear"], "error: --layers is about the whole layer, and linear is"),
        (["--layers", "1000", "--config", "deepseek-r1"], "error: this run needs about "),
    ],
)
def test_what_makes_no_sense_is_refused(bench: Bench, words: list[str], message: str) -> None:
    done = bench("--backend", "cpu", *words)
    assert done.code == 2
    assert done.error.startswith(message)


# --------------------------------------------------------------------------------- what a stack must catch


@pytest.fixture
def make_stack(tiny: Callable[..., MLAConfig]) -> Callable[..., tuple[MlaLayer, LayerChecker]]:
    """Return a maker of a loaded stack and its checker; keyword arguments replace fields of the config."""

    def make(scenario: Scenario, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        config = tiny(**changes)
        backend = mla.load_backend("cpu", threads=1)
        setting = Setting(config, backend, dtype, "auto", 16, 0, layers=scenario.layers)
        state = random_state_dict(config, 0, dtype)
        inputs = make_inputs(config, scenario, 0, dtype)
        stack = MlaLayer(setting, state, "mla-reference", "reference")
        stack.load(scenario, inputs)
        checker = LayerChecker(config, state, inputs, dtype, lambda: checker.expected)
        return stack, checker

    return make


def run(stack: MlaLayer, scenario: Scenario, number: int = 0, mutate: Mutation = lambda stack: None) -> None:
    """Run a pass; `mutate` is called before every forward."""
    stack.restore(number)
    for index in range(scenario.inputs):
        stack.before(index)
        mutate(stack)
        stack.step(index)
        stack.after(index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 24, "attention_bias": True, "rope_interleave": False},
        {"q_lora_rank": 24, "q_latent_scale": 1.5, "kv_latent_scale": 2.0},
    ],
)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_layer_of_a_stack_is_right(
    make_stack: Callable[..., Any], name: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    stack, checker = make_stack(SCENARIOS[name], dtype, **changes)
    for number in (0, 1, 2):
        run(stack, SCENARIOS[name], number)
        assert stack.check(checker).status == "ok"


def same_weights(stack: MlaLayer) -> None:
    stack.layers[1:] = [stack.layers[0]] * (LAYERS - 1)


def same_output_weights_alone(stack: MlaLayer) -> None:
    for layer in stack.layers[1:]:
        layer._weights.packed["o_proj"] = stack.layers[0]._weights.packed["o_proj"]


def same_cache(stack: MlaLayer) -> None:
    stack._pages[1:] = [stack._pages[0]] * (LAYERS - 1)


def last_cache(stack: MlaLayer) -> None:
    stack._pages[:-1] = [stack._pages[-1]] * (LAYERS - 1)


def swapped_caches(stack: MlaLayer) -> None:
    stack._pages[1], stack._pages[2] = stack._pages[2], stack._pages[1]


def same_output(stack: MlaLayer) -> None:
    stack.outs[1:] = [stack.outs[0]] * (LAYERS - 1)


@pytest.mark.parametrize(
    "mutate", [same_weights, same_output_weights_alone, same_cache, last_cache, swapped_caches, same_output]
)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_layer_that_uses_what_is_another_s_is_wrong(
    make_stack: Callable[..., Any], name: str, mutate: Mutation
) -> None:
    stack, checker = make_stack(SCENARIOS[name])
    run(stack, SCENARIOS[name], mutate=mutate)
    verdict = stack.check(checker)
    assert verdict.status == "wrong"
    assert verdict.reason.startswith("layer ")


def test_every_layer_has_weights_and_a_cache_of_its_own(make_stack: Callable[..., Any]) -> None:
    stack, _ = make_stack(DECODE)
    for role in stack.layer.ops.names():
        packed = [layer._weights.packed.get(role) for layer in stack.layers]
        if packed[0] is not None:
            assert len({weight.data.data_ptr() for weight in packed}) == LAYERS, role
    assert len({pages.data_ptr() for pages in stack._pages}) == LAYERS


def test_rolling_keeps_the_checkpoint_s_layer_as_it_is(tiny: Callable[..., MLAConfig]) -> None:
    state = random_state_dict(tiny(), 0, torch.float32)
    before = {name: weight.clone() for name, weight in state.items()}
    assert not torch.equal(layer_state(state, 1)["o_proj.weight"], state["o_proj.weight"])
    assert all(torch.equal(state[name], weight) for name, weight in before.items())
