"""What a run will do follows from its scenarios, the backend's ops and the implementations named."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mla import MLAConfig
from mla.bench.plan.request import plan_scenarios
from mla.bench.subjects.setting import Setting
from mla.bench.workload.grid import Point
from mla.reference import REFERENCE
from mla_backends.testing import HostBackend

CONFIG = MLAConfig(hidden_size=64, num_attention_heads=2, kv_lora_rank=32)
POINT = Point(name="d", base="d", mode="decode", query_lens=(1, 1), history=(3, 9), runs=4)


def test_baselines_join_what_nobody_chose() -> None:
    setting = Setting(CONFIG, HostBackend(ops={"mine": REFERENCE["linear"]}), torch.float32, "auto", 64, 0)
    with_baseline = plan_scenarios(setting, [POINT], baselines=["transformers"])[1]
    assert with_baseline == ["mla", "mla-reference", "transformers"]
    assert plan_scenarios(setting, [POINT], ["mla"], baselines=["transformers"])[1] == ["mla"]


@pytest.mark.parametrize(
    ("fused", "names", "chosen", "references"),
    [
        (True, [], ["mla", "mla-reference"], 1),
        (False, [], ["mla"], 0),
        (True, ["mla"], ["mla"], 1),
        (True, ["mla-reference"], ["mla-reference"], 0),
        (False, ["mla"], ["mla"], 0),
    ],
)
def test_fused_ops_bring_the_reference_and_its_memory(
    fused: bool, names: Sequence[str], chosen: list[str], references: int
) -> None:
    backend = HostBackend(ops={"mine": REFERENCE["linear"]} if fused else {})
    setting = Setting(CONFIG, backend, torch.float32, "auto", 64, 0)
    (plan,), implementations = plan_scenarios(setting, [POINT], names)
    assert implementations == chosen
    each = plan.memory.per_implementation
    assert plan.memory.per_reference == references * each
    total = (len(chosen) + references) * each
    assert plan.memory.device_bytes(len(chosen)) == total
