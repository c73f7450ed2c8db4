"""Which `flash_mla` has dense decoding, told by what it accepts, and that no plan outlives its lengths."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla import MLA, LatentCache, MLAConfig
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict
from mla_backends.kernels import FlashMla, LatentLimits, PagedLatentOp
from mla_backends.selftest import try_latent
from mla_backends.testing import HostBackend

GENERATIONS = ("nvidia_b", "nvidia_c", "nvidia_sgl")
HINT = "pip install what-has-it"
# ------------------------------------------------------------------------------------------- detection


def test_a_release_with_sparse_attention_only_is_refused_with_what_works(
    installed: Any, make_spec: Any
) -> None:
    with installed("nvidia_d") as fakes:
        reasons = FlashMla(install=HINT).unsupported_reasons(make_spec())
        assert reasons == [
            "this flash_mla has sparse attention only: dense decoding is in sgl-flash-mla, and in FlashMLA "
            f"up to commit 9241ae3 of 2026-04-29 ({HINT})"
        ]
        assert not fakes.CALLS


def function(*more: str) -> Callable[..., Any]:
    """Return a function that takes the nine arguments of all releases, and `more`."""
    nine = (
        "q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None, "
        "softmax_scale=None, causal=False"
    )
    scope: dict[str, Any] = {}
    exec(f"def flash_mla_with_kvcache({', '.join((nine, *more))}): pass", scope)
    return scope["flash_mla_with_kvcache"]


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ((), ""),
        (("is_fp8_kvcache=False", "indices=None"), ""),
        (("is_fp8_kvcache=False", "indices=None", "enable_batch_invariant=False"), ""),  # dense, and new
        (("is_fp8_kvcache=True", "indices=None"), "sparse attention only"),
        (("*", "is_fp8_kvcache=True", "use_legacy=False"), ""),
        (("is_fp8_kvcache=True", "indices=None", "use_legacy=False"), ""),
        (("**more",), ""),
    ],
)
def test_what_tells_them_apart(
    installed: Any, make_spec: Any, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], refused: str
) -> None:
    with installed("nvidia_c"):
        import flash_mla

        monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", function(*more))
        reasons = FlashMla().unsupported_reasons(make_spec())
        assert len(reasons) == bool(refused)
        assert refused in "".join(reasons)


# ------------------------------------------------------------------------------------------- preflight


@pytest.mark.parametrize("folder", GENERATIONS)
def test_a_kernel_that_works_passes_its_preflight(installed: Any, make_spec: Any, folder: str) -> None:
    with installed(folder) as fakes:
        op = FlashMla()
        assert op.preflight(make_spec()) == op.preflight(make_spec(num_heads=4)) == []
        assert fakes.CALLS["flash_mla_with_kvcache"] == 4  # each with its log-sum-exp and without


def test_what_a_kernel_raises_on_this_card_becomes_a_reason(installed: Any, make_spec: Any) -> None:
    with installed("nvidia_sgl") as fakes:
        fakes.CAPABILITY["flash_mla"] = (10, 0)
        (reason,) = FlashMla(install=HINT).preflight(make_spec())
        assert reason.startswith("flash_mla raises RuntimeError: Dense decode MLA is only supported on SM90a")
        assert reason.endswith(HINT)
        fakes.HAS_LEGACY["flash_mla"] = False  # a package without its dense half
        assert FlashMla(install=HINT).preflight(make_spec())[0].endswith(HINT)


class Shifted(FlashMla):
    """A kernel that gives a neighbour's results."""

    def launch(self, plan: Any, call: Any) -> Any:
        out, lse = super().launch(plan, call)
        return out.roll(1, dims=0), lse


class Louder(FlashMla):
    """A log-sum-exp in another base."""

    def launch(self, plan: Any, call: Any) -> Any:
        out, lse = super().launch(plan, call)
        return out, lse * 1.4427


@pytest.mark.parametrize(
    ("op", "wrong"), [(Shifted, "gives wrong results"), (Louder, "gives a wrong log-sum-exp")]
)
def test_a_kernel_that_is_wrong_is_not_chosen(
    installed: Any, make_spec: Any, op: type[PagedLatentOp], wrong: str
) -> None:
    with installed("nvidia_c"):
        assert try_latent(op(), make_spec(), 64) == wrong
        assert wrong in op().preflight(make_spec())[0]


# ------------------------------------------------------------------------------------------------ rows


def test_more_rows_than_a_planner_can_hold_are_refused(installed: Any, make_spec: Any) -> None:
    limits = LatentLimits(max_rows=11_000)
    with installed("nvidia_c"):
        op, spec = FlashMla(limits), make_spec()
        assert op.unsupported_batch(spec, [1] * 11_000, [9] * 11_000, 64) == []
        assert op.unsupported_batch(spec, [1] * 11_001, [9] * 11_001, 64) == [
            "it takes at most 11000 rows at a time, and this batch has 11001"
        ]
        assert op.unsupported_batch(spec, [30_000], [30_000], 64) == []  # one row of many queries
        mixed = [1] * 9000 + [2] * 9000  # two launches
        assert op.unsupported_batch(spec, mixed, [9] * 18_000, 64) == []


def test_long_prompts_that_are_cut_count_as_the_rows_they_become(installed: Any, make_spec: Any) -> None:
    with installed("nvidia_c"):
        op = FlashMla(LatentLimits(max_rows=100, max_queries=4))
        assert op.unsupported_batch(make_spec(), [400], [400], 64) == []
        assert "this batch has 101" in op.unsupported_batch(make_spec(), [404], [404], 64)[0]


# ------------------------------------------------------------------------------- plans in a layer's life

NARROW = MLAConfig(
    name="narrow",
    hidden_size=64,
    num_attention_heads=5,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


class Life:
    """A layer, its cache and what is in it."""

    def __init__(self, op: FlashMla) -> None:
        self.layer = MLA(NARROW, backend=HostBackend(ops={"flash_mla": op}), attention="absorbed")
        self.state = random_state_dict(NARROW, 0, torch.bfloat16)
        self.layer.load_state_dict(self.state)
        self.cache = LatentCache(NARROW, max_tokens=64 * 12)
        self.cache.pages.zero_()
        self.ids = self.cache.new_sequences(2)
        self.cache.extend(self.ids, [70, 3])

    def step(self, batch: Any) -> bool:
        """Run the layer on one new token per request; return whether it is right."""
        past = [self.cache.read(sequence) for sequence in self.ids]
        history = [(kv[:-1].clone(), pe[:-1].clone()) for kv, pe in past]
        hidden = torch.randn(2, 64).bfloat16()
        out = self.layer(hidden, batch, self.cache.pages[0]).double()
        truth = oracle(NARROW, self.state, hidden, [1, 1], history)
        return bool(((out - truth).norm(dim=-1) <= 2e-2 * truth.norm(dim=-1)).all())


def each_step(life: Life) -> list[bool]:
    """Decode with a new batch per step."""
    return [life.step(life.cache.extend(life.ids, [1, 1])) for _ in range(3)]


def in_place(life: Life) -> list[bool]:
    """Decode in the memory of the first batch."""
    batch = life.cache.extend(life.ids, [1, 1])
    outputs = [life.step(batch)]
    for _ in range(2):
        batch.update_(life.cache.extend(life.ids, [1, 1]))
        outputs.append(life.step(batch))
    return outputs


@pytest.mark.parametrize("steps", [each_step, in_place])
@pytest.mark.parametrize("folder", ["nvidia_c", "nvidia_sgl"])
def test_no_step_follows_the_splits_of_another(
    installed: Any, folder: str, steps: Callable[[Life], list[bool]]
) -> None:
    with installed(folder):
        assert steps(Life(FlashMla())) == [True] * 3


def test_a_state_is_planned_before_its_first_call_and_for_its_own_lengths(
    installed: Any, make_problem: Any, assert_right: Any
) -> None:
    """The object is filled in the first call: states prepared together must not share one."""
    with installed("nvidia_sgl"):
        op = FlashMla()
        problems = [make_problem([1, 1], lens, seed=i) for i, lens in enumerate(([33, 64], [34, 65], [5, 9]))]
        states = [op.prepare(problem.spec, problem.view) for problem in problems]
        for _ in range(2):
            for problem, state in zip(problems, states, strict=True):
                assert_right(problem.run(op, state), problem.truth())


def test_a_captured_call_leaves_the_plan_of_its_state_alone(
    installed: Any, make_problem: Any, assert_right: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, capture and a later eager call of one state, whose lengths are the same."""
    with installed("nvidia_sgl") as fakes:
        op, problem = FlashMla(), make_problem([1, 1], [33, 64])
        state = op.prepare(problem.spec, problem.view)
        calls = SimpleNamespace(captured=False)
        monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: calls.captured, raising=False)
        for calls.captured in (False, True, True, False):
            assert_right(problem.run(op, state), problem.truth())
        assert fakes.CALLS["get_mla_metadata"] == 3
