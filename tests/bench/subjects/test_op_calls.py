"""`--op`: every call has operands and results of its own, and every pass is judged."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from float64_attention import attend_segments
from op_bench import ROLES, OpBench
from wrapped_op import WrappedOp

from mla import MLAConfig
from mla.bench.subjects import base as shelf
from mla.bench.subjects import op as problems
from mla.bench.subjects.op import OpImplementation, buffers, output_bytes
from mla.bench.subjects.setting import Setting
from mla.bench.workload.grid import OpScenario
from mla.cases import varied as pools
from mla.verify.op_oracle import product, true_norm, true_rotation
from mla_backends.testing import HostBackend

Make = Callable[..., OpBench]
Requests = list[tuple[int, int]]  # cached and new tokens
SHAPES = {
    "one token and head": {"heads": 1, "requests": [(5, 1)]},
    "a few": {"heads": 3, "requests": [(3, 2)] * 3},
    "a prompt": {"heads": 2, "requests": [(0, 40), (7, 33)]},
}


@pytest.fixture
def make(tiny: Callable[..., MLAConfig]) -> Make:
    def make(role: str, heads: int = 3, **words: Any) -> OpBench:
        dims = {"num_attention_heads": heads, "q_lora_rank": 24, "qk_rope_head_dim": 32}
        config = tiny(**dims, attention_bias=True, rope_interleave=False)
        return OpBench(config, role, **words)

    return make


def operands(impl: OpImplementation) -> dict[str, torch.Tensor]:
    """Return copies of what a call reads, except its weights and tables."""
    given = {
        name: impl._call.arguments.get(name) for name in ("x", "q", "k", "v", "kv_a", "cos_sin", "cache")
    }
    return {name: tensor.clone() for name, tensor in given.items() if tensor is not None}


# ------------------------------------------------------------------------------- what is expected of a call


def computed(bench: OpBench, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute in float64 what a call must write, from the operands that the op was given."""
    problem, config = bench.problem.case, bench.setting.config
    held, eps = bench.problem.given, config.rms_norm_eps
    if problem.kind.endswith("linear"):
        return {"out": product(given["x"], held["weight"], held.get("bias"))}
    if problem.kind == "rms_norm":
        return {"out": true_norm(given["x"], held["weight"], eps)}
    if problem.kind == "rotate_query":
        return {"out": true_rotation(given["x"], given["cos_sin"], config.rope_interleave)}
    if problem.kind == "write_latent":
        latent, key = given["kv_a"].split((config.kv_lora_rank, config.qk_rope_head_dim), dim=1)
        turned = true_rotation(key, given["cos_sin"], config.rope_interleave)
        return {"latent": true_norm(latent, held["weight"], eps), "key": turned}
    keys, values = given.get("k"), given.get("v")
    if keys is None or values is None:  # the cached rows are the problem's, turned
        keys = held["keys"] * given["signs"]
        values = keys[:, : config.kv_lora_rank]
    parts = (given["q"].split(problem.query_lens), *(x.split(problem.kv_lens) for x in (keys, values)))
    out, lse = attend_segments(zip(*parts, strict=True), problem.spec.softmax_scale)
    return {"out": out, "lse": lse}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("role", ROLES)
def test_expected_results_are_those_of_the_operands_given(make: Make, role: str, shape: str) -> None:
    bench = make(role, **SHAPES[shape], runs=3)
    impl = bench.implementation()
    for number in (0, 4):
        impl.restore(number)
        for index in range(3):
            impl.before(index)
            given = operands(impl)
            given["signs"] = bench.problem.pass_signs(number).get("keys", torch.ones(1))
            truth = impl.truth_of(index)
            for name, right in computed(bench, given).items():
                expected = bench.problem.expected(truth, name)
                torch.testing.assert_close(expected, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("role", ROLES)
def test_an_honest_op_is_right_in_every_pass(make: Make, role: str, dtype: torch.dtype) -> None:
    bench = make(role, dtype=dtype)
    impl = bench.implementation(WrappedOp(ROLES[role]))
    for number in range(5):
        check = bench.run(impl, number)
        assert (check.status, check.reason) == ("ok", "")
        assert check.error_ratio is not None
        assert check.error_ratio <= 0.75


# ------------------------------------------------------------------------------------ operands of one's own


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("role", ROLES)
def test_no_two_calls_get_the_same_operands(make: Make, role: str, shape: str) -> None:
    bench = make(role, **SHAPES[shape], runs=40)
    impl = bench.implementation()
    seen = set()
    for number in range(5):
        impl.restore(number)
        for index in range(40):
            impl.before(index)
            tensors = [tensor for name, tensor in operands(impl).items() if name != "cos_sin"]
            seen.add(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors))
    assert len(seen) == 200


@pytest.mark.parametrize("role", ROLES)
def test_implementations_get_the_same_operands_at_fixed_addresses(make: Make, role: str) -> None:
    bench = make(role)
    ours, other = bench.implementation(WrappedOp(ROLES[role])), bench.implementation()
    bench.run(ours, 0), bench.run(other, 0), bench.run(ours, 7)  # another history
    bench.run(other, 7)
    assert ours.outputs().keys() == other.outputs().keys() == set(range(12))
    assert all(torch.equal(result, other.outputs()[index]) for index, result in ours.outputs().items())
    addresses = set()
    for impl in (ours, other):
        impl.restore(3)
    for index in range(4):
        for impl in (ours, other):
            impl.before(index)
        left, right = operands(ours), operands(other)
        assert all(torch.equal(left[name].nan_to_num(7), right[name].nan_to_num(7)) for name in left)
        tensors = (ours._call.arguments[name] for name in left)
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
    assert len(addresses) == 1


# ------------------------------------------------------------------------------------------------ opponents


class Memo(WrappedOp):
    """Remembers results by `key`, and repeats them where the key comes again."""

    def __init__(self, kind: str, key: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(kind)
        self._key, self._kept = key, dict[Any, list[torch.Tensor]]()
        self.hits = 0

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        key = self._key(tensors)
        if key in self._kept:
            self.hits += 1
            for target, kept in zip(self._written(tensors), self._kept[key], strict=True):
                target.copy_(kept)
            return
        super().__call__(*leading, **tensors)
        self._kept[key] = [target.clone() for target in self._written(tensors)]

    def _written(self, tensors: dict[str, Any]) -> list[torch.Tensor]:
        if "slots" in tensors:
            flat = tensors["cache"].view(-1, tensors["cache"].shape[-1])
            return [Rows(flat, tensors["slots"])]  # type: ignore[list-item]
        return [tensors[name] for name in ("out", "lse") if name in tensors]


class Rows:
    """The rows of a cache that belong to slots, as something to copy to and from."""

    def __init__(self, flat: torch.Tensor, slots: torch.Tensor) -> None:
        self._flat, self._slots = flat, slots

    def copy_(self, rows: torch.Tensor) -> None:
        self._flat[self._slots] = rows

    def clone(self) -> torch.Tensor:
        return self._flat[self._slots]


def varied(tensors: dict[str, Any]) -> torch.Tensor:
    return next(tensors[name] for name in ("x", "q", "kv_a") if name in tensors)


KEYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "all of it": lambda t: varied(t).contiguous().numpy().tobytes(),
    "its sizes": lambda t: varied(t).abs().contiguous().numpy().tobytes(),
    "six numbers": lambda t: tuple(varied(t).flatten()[:6].tolist()),
    "one number": lambda t: varied(t).flatten()[-1].item(),
    "two sizes": lambda t: tuple(varied(t).flatten()[:2].abs().tolist()),
    "the sum of sizes": lambda t: round(varied(t).double().abs().sum().item(), 3),
    "the address of an input": lambda t: varied(t).data_ptr(),
    "both addresses": lambda t: (varied(t).data_ptr(), t.get("out", t.get("cache")).data_ptr()),
    "the shape": lambda t: varied(t).shape,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("role", ROLES)
def test_a_remembered_result_is_wrong(make: Make, role: str, key: str, shape: str) -> None:
    """Or is never asked for again, which does no harm."""
    bench = make(role, **SHAPES[shape], runs=8)
    op = Memo(ROLES[role], KEYS[key])
    impl = bench.implementation(op)
    for number in range(6):
        before = op.hits
        check = bench.run(impl, number)
        assert (check.status == "wrong") == (op.hits > before)
    if key.startswith(("the address", "both", "the shape")):
        assert op.hits >= 40


class Lazy(WrappedOp):
    """Computes a call if `wanted` says so, of its number and its output."""

    def __init__(self, kind: str, wanted: Callable[[int, torch.Tensor], bool]) -> None:
        super().__init__(kind)
        self._wanted, self._numbers = wanted, itertools.count()

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        out = tensors.get("out")
        if out is None:
            out = tensors["cache"].view(-1, tensors["cache"].shape[-1])[tensors["slots"]]
        if self._wanted(next(self._numbers), out):
            super().__call__(*leading, **tensors)


LAZY: dict[str, tuple[str, Callable[[int, torch.Tensor], bool]]] = {
    "the first of a pass": ("calls 2, 3, 4, .. of the pass; 11 of 12", lambda call, out: call % 12 == 0),
    "the last of a pass": ("calls 1, 2, 3, .. of the pass; 11 of 12", lambda call, out: call % 12 == 11),
    "two of three": ("calls 2, 5, 8, .. of the pass; 4 of 12", lambda call, out: call % 3 != 1),
    "all but one": ("call 8 of the pass; 1 of 12", lambda call, out: call % 12 != 7),
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("role", ROLES)
def test_calls_that_are_not_computed_are_named(make: Make, role: str, lazy: str) -> None:
    bench = make(role)
    named, wanted = LAZY[lazy]
    impl = bench.implementation(Lazy(ROLES[role], wanted))
    for number in range(3):
        check = bench.run(impl, number)
        assert check.status == "wrong"
        assert "NaN" in check.reason
        assert check.reason.endswith(f"({named} checked)")


@pytest.mark.parametrize("role", ROLES)
def test_an_output_that_holds_numbers_does_not_stand_for_a_result(make: Make, role: str) -> None:
    """It never does: an op that stops at finite numbers computes every call."""
    bench = make(role)
    computing = []

    def nothing_there(call: int, out: torch.Tensor) -> bool:
        computing.append(not bool(out.isfinite().any()))
        return computing[-1]

    impl = bench.implementation(Lazy(ROLES[role], nothing_there))
    assert [bench.run(impl, number).status for number in range(3)] == ["ok"] * 3
    assert computing == [True] * 36


class Mutating(WrappedOp):
    """Writes to an operand once it has been read."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(kind)
        self._name = name

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        super().__call__(*leading, **tensors)
        tensors[self._name].flatten(0, -2)[-1, 0] += 1


@pytest.mark.parametrize(
    ("role", "name"),
    [
        ("qkv_a_proj", "x"),
        ("w_uk", "x"),
        ("q_a_layernorm", "x"),
        ("rotate_query", "cos_sin"),
        ("write_latent", "kv_a"),
        ("latent_attention", "q"),
        ("expanded_attention", "q"),
    ],
)
def test_an_op_that_writes_to_what_it_reads_is_wrong(make: Make, role: str, name: str) -> None:
    bench = make(role, requests=[(0, 6)])  # flattened in place
    check = bench.run(bench.implementation(Mutating(ROLES[role], name)), 2)
    assert (check.status, check.reason) == ("wrong", f"the op wrote to its input {name}")


def test_keys_gathered_in_an_earlier_pass_are_wrong(make: Make) -> None:
    """Caches of equal lengths at one address, whose content changed in place."""
    bench = make("latent_attention")
    kept: dict[int, torch.Tensor] = {}

    class Stale(WrappedOp):
        def __call__(self, *leading: Any, cache: torch.Tensor, **tensors: Any) -> None:
            cache = kept.setdefault(cache.data_ptr(), cache.clone())
            super().__call__(*leading, cache=cache, **tensors)

    impl = bench.implementation(Stale("latent_attention"))
    assert [bench.run(impl, number).status for number in range(3)] == ["ok", "wrong", "wrong"]


# --------------------------------------------------------------------------------------- which calls are kept


@pytest.mark.parametrize("role", ["qkv_a_proj", "latent_attention", "write_latent"])
def test_a_call_in_ten_that_goes_wrong_is_found_where_few_are_kept(
    make: Make, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 30 calls are kept here: 44 judged calls, 22 passes, miss it once in 100 runs, and 132 never."""
    monkeypatch.setattr("mla.bench.subjects.op.buffers", lambda *numbers: 3)
    bench = make(role, runs=30)
    race = random.Random(5)
    impl = bench.implementation(Lazy(ROLES[role], lambda call, out: race.random() > 0.1))
    checks = [bench.run(impl, number) for number in range(66)]
    assert {check.status for check in checks} == {"ok", "wrong"}
    assert {check.reason.split("; ")[-1] for check in checks} <= {"", "1 of 2 checked)", "2 of 2 checked)"}


@pytest.mark.parametrize("batch", [1, 16, 200])
@pytest.mark.parametrize("role", ROLES)
def test_of_six_passes_enough_calls_are_judged_to_find_one_wrong_call_in_ten(
    tiny: Callable[..., MLAConfig], role: str, batch: int
) -> None:
    config = tiny(num_attention_heads=16, q_lora_rank=512, kv_lora_rank=512, hidden_size=2048)
    for calls in (20, 100, 1000):
        problem = undrawn(config, role, [(0, 2)] * batch, calls)
        made = buffers(problem)
        judged = 6 * (made if made == calls else made - 1)
        assert 1 - 0.9**judged >= 0.99
        assert output_bytes(problem) <= shelf.SHELF_BYTES


def test_memory_bounds_the_buffers(tiny: Callable[..., MLAConfig]) -> None:
    assert [buffers(undrawn(tiny(), "o_proj", [(0, 1 << 22)], calls)) for calls in (100, 1)] == [3, 1]


def undrawn(config: MLAConfig, role: str, requests: Requests, runs: int) -> pools.Pool:
    history, query_lens = zip(*requests, strict=True)
    lengths = {"query_lens": query_lens, "history": history}
    scenario = OpScenario(name=role, base=role, role=role, runs=runs, **lengths)
    return problems.op_problem(Setting(config, HostBackend(), torch.float32, "auto", 4, 0), scenario)


def test_a_pool_too_large_to_be_split_by_columns_moves_whole_rows(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PARTS_BYTES", 0)
    for role in ("kv_b_proj", "qkv_a_proj"):  # without and with a bias
        bench = make(role)
        assert len(bench.problem.columns) == 1
        assert bench.run(bench.implementation(WrappedOp("linear")), 3).status == "ok"
