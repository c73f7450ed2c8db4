"""One op alone, run pass by pass as the runner does, with whatever op a test puts in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mla.bench.subjects.fixture import OpFixture
from mla.bench.subjects.op import OpImplementation
from mla.bench.subjects.setting import Setting
from mla.bench.workload.grid import OpScenario
from mla.config import MLAConfig
from mla.verify.verdict import Check
from mla_backends import FusedOp
from mla_backends.testing import HostBackend

# An op of every kind, and the roles that differ in how their operands lie in memory.
ROLES = {
    "qkv_a_proj": "linear",
    "kv_b_proj": "linear",
    "w_uk": "batched_linear",
    "q_a_layernorm": "rms_norm",
    "rotate_query": "rotate_query",
    "write_latent": "write_latent",
    "latent_attention": "latent_attention",
    "expanded_attention": "expanded_attention",
}
# A layer with an indexer.
INDEXED = MLAConfig(
    64, 2, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    index_topk=6, index_n_heads=3, index_head_dim=16,
)  # fmt: skip


class OpBench:
    """One problem, its judge and implementations of it."""

    def __init__(
        self,
        config: MLAConfig,
        role: str,
        dtype: torch.dtype = torch.float32,
        requests: Sequence[tuple[int, int]] = ((3, 2),) * 3,  # cached and new tokens
        runs: int = 12,
    ) -> None:
        history, query_lens = zip(*requests, strict=True)
        self.scenario = OpScenario(
            name=role, base=role, role=role, query_lens=query_lens, history=history, runs=runs
        )
        self.setting = Setting(config, HostBackend(), dtype, "auto", 4, 0)
        self.fixture = OpFixture(self.setting, self.scenario)
        self.problem, self.checker = self.fixture.prepare()

    def implementation(self, op: FusedOp | None = None) -> OpImplementation:
        """Return one that is loaded; without `op` it runs the reference."""
        impl = self.fixture.build("mla-reference")
        assert isinstance(impl, OpImplementation)
        if op is not None:
            impl.replace_ops(lambda role, old: op)
        impl.load(self.scenario, self.problem)
        return impl

    def run(
        self, impl: OpImplementation, number: int, each: Callable[[int], None] = lambda index: None
    ) -> Check:
        """Run and judge pass `number`; `each` is called after every call."""
        impl.restore(number)
        for index in range(self.scenario.steps):
            impl.before(index)
            impl.step(index)
            each(index)
            impl.after(index)
        return impl.check(self.checker)
