"""`--op`: every op of the contract alone, checked like the layer, and everything that may be typed wrong."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.workload.grid import SELECTIONS, SPARSE
from mla.bench.workload.scenario import size
from mla.cases import sparse
from mla_backends.api import OPS

Bench = Callable[..., Any]

QUICK = ("--runs", "3", "--passes", "5", "--warmups", "1")
SHAPE = ("--batch", "3", "--q-len", "2", "--heads", "4")
FAULTY = ("--backend", "faulty_backend:FaultyBackend")
READS_HISTORY = ("write_latent", "latent_attention", "expanded_attention", *SPARSE)
PREPARED = ("latent_attention", "expanded_attention", "select_latents", "sparse_latent_attention")
ROLES = {
    "linear": ["qkv_a_proj", "kv_b_proj", "o_proj", "q_b_proj"],
    "batched_linear": ["w_uk", "w_uv"],
    "rms_norm": ["q_a_layernorm"],
}


@pytest.fixture
def config(tmp_path: Path) -> None:
    """Write a tiny config with a query LoRA, halves rotated and biases: all that changes an op."""
    dims = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "attention_bias": True,
        "rope_interleave": False,
    }
    (tmp_path / "tiny.json").write_text(json.dumps(dims))
    indexer = {"index_n_heads": 3, "index_head_dim": 16, "index_topk": 7}
    (tmp_path / "sparse.json").write_text(json.dumps({**dims, **indexer, "model_type": "deepseek_v32"}))


@pytest.fixture
def measure(bench: Bench, config: None) -> Bench:
    """Return `bench` for one op of the tiny config on a backend whose op of that kind has a fault."""

    def measure(op: str, *words: str, fault: str = "none", kind: str = "") -> Any:
        backend = [*FAULTY, "-O", f"op={kind or op}", "-O", f"fault={fault}"]
        kv = ["--kv", "21"] * (op in READS_HISTORY)
        heads = SHAPE if op not in ("rms_norm", "write_latent", *SPARSE[:2]) else SHAPE[:4]
        config = "sparse.json" if op in SPARSE else "tiny.json"
        options = ["--config", config, "--page-size", "16", "--cache", "warm", "-o", "run.json"]
        return bench(*backend, *options, "--op", op, *kv, *heads, *QUICK, *words)

    return measure


def cases() -> list[results.Case]:
    return results.decode(Path("run.json").read_bytes()).cases


@pytest.mark.parametrize(
    ("op", "dtype"),
    [*((op, "bfloat16") for op in OPS), ("linear", "float16"), ("latent_attention", "float32")],
)
def test_every_op_is_right_alone_and_timed_beside_the_reference(measure: Bench, op: str, dtype: str) -> None:
    done = measure(op, "--dtype", dtype)
    assert done.code == 0, done.out + done.err
    roles = ROLES.get(op, [op])
    assert [case.op for case in cases()] == [role for role in roles for _ in range(2)]
    assert [case.implementation for case in cases()] == ["mla", "mla-reference"] * len(roles)
    for case in cases():
        fused = "faulty" if case.implementation == "mla" else "reference"
        assert case.ops == {case.op: fused}
        assert (case.check.status, case.check.error_ratio is not None) == ("ok", True)
        assert case.latency_ms is not None
        assert len(case.latency_ms.samples) == 3 * 5
        assert (case.passes, case.steps_per_pass) == (5, 3)
        assert min(case.cost.flops, case.cost.bytes) > 0
        assert (case.plan_ms is not None) == (op in PREPARED)
        assert case.query_lens == [2, 2, 2]
        assert (case.memory.cache_bytes > 0) == (op in ("write_latent", "latent_attention", *SPARSE))


@pytest.mark.parametrize(
    ("op", "fault"), [*((op, "scale") for op in OPS), ("latent_attention", "head"), ("linear", "half")]
)
def test_a_wrong_op_gets_no_number(measure: Bench, op: str, fault: str) -> None:
    done = measure(op, fault=fault)
    assert done.code == 4
    wrong = [case for case in cases() if case.implementation == "mla"]
    for case in wrong:
        assert case.check.status == "wrong"
        assert (case.latency_ms, case.tokens_per_s, case.passes) == (None, None, 0)
        assert case.check.reason in done.out
    assert all(case.latency_ms for case in cases() if case.implementation == "mla-reference")
    assert f"Op [{wrong[0].scenario}]: no number, check: wrong\n" in done.out


@pytest.mark.parametrize("op", OPS)
def test_results_of_an_earlier_pass_do_not_count(measure: Bench, op: str) -> None:
    """1 call checks it, and so it stops in the first pass."""
    assert measure(op, "--warmups", "0", fault="stops").code == 4
    reason = cases()[0].check.reason
    assert reason.startswith("right at first, wrong in pass 1: ")
    assert reason.endswith("(calls 1, 2, 3 of the pass; 3 of 3 checked)")
    assert cases()[0].latency_ms is None


@pytest.mark.parametrize("op", ["latent_attention", "expanded_attention"])
def test_the_log_sum_exp_is_checked_where_an_op_has_one(measure: Bench, op: str) -> None:
    assert measure(op, fault="lse").code == 4
    assert cases()[0].check.reason.startswith("lse: ")
    assert measure(op, fault="no_lse").code == 0


def test_a_write_beside_the_new_tokens_slots_is_wrong(measure: Bench) -> None:
    assert measure("write_latent", fault="stray").code == 4
    strays = "1 slots other than those of the new tokens have changed, the first is slot 0 of page 0"
    assert cases()[0].check.reason == strays


@pytest.mark.parametrize("op", SPARSE[1:])
def test_selections_are_an_axis_and_topk_is_another(measure: Bench, op: str) -> None:
    """Of 3 requests with 21 cached tokens and 2 new ones each, recent selections share most of theirs."""
    assert tuple(sparse.SELECTIONS) == SELECTIONS
    axes = ("-a", f"selection={','.join(SELECTIONS)}", "-a", "topk=2,5", "--implementations", "mla-reference")
    assert measure(op, *axes).code == 0
    points = [(case.point["selection"], case.point["topk"]) for case in cases()]
    assert points == [(how, k) for how in SELECTIONS for k in (2, 5)]
    assert {case.check.status for case in cases()} == {"ok"}
    moved = {point: case.cost.bytes for point, case in zip(points, cases(), strict=True)}
    assert moved["recent", 2] < moved["recent", 5]
    if op == "sparse_latent_attention":
        assert moved["recent", 5] < moved["random", 5], "bytes are of different tokens"
    name = cases()[3].scenario
    assert name.endswith("topk=5 selection=recent")
    _, _, _, *words = shlex.split(cases()[3].repro)
    assert measure(op, *words[words.index("-a") :]).code == 0
    assert cases()[0].scenario == name


def test_several_ops_are_timed_in_a_run_each_once(measure: Bench) -> None:
    """An axis that leaves an op as it is does not repeat it."""
    ops = ("--op", "write_index_key,select_latents,w_uk", "--kv", "30", "-a", "topk=3,9")
    done = measure("sparse_latent_attention", *ops)
    assert done.code == 0, done.err
    assert [case.op for case in cases()] == ["write_index_key", "select_latents", "w_uk", "select_latents"]


def test_a_case_repeats_itself_from_its_own_line(bench: Bench, measure: Bench) -> None:
    measure("latent_attention", "--seed", "5")
    first = cases()[0]
    assert first.scenario == "latent_attention batch=3 kv=21 q_len=2 heads=4"
    _, _, _, *words = shlex.split(first.repro)
    assert bench(*words, "-o", "run.json").code == 0
    (again,) = cases()
    assert (again.scenario, again.implementation, again.repro) == (first.scenario, "mla", first.repro)
    assert again.check == first.check
    assert (again.query_lens, again.history, again.steps_per_pass) == ([2] * 3, [21] * 3, 3)


def test_a_role_names_one_weight(measure: Bench, bench: Bench) -> None:
    assert measure("o_proj", kind="linear").code == 0
    assert [case.scenario for case in cases()] == ["o_proj batch=3 q_len=2 heads=4"] * 2
    first = cases()[0]
    bench(*shlex.split(first.repro)[3:], "-o", "run.json")
    assert cases()[0].check == first.check


def test_kv_b_is_applied_to_the_whole_context(measure: Bench) -> None:
    measure("kv_b_proj", "--kv", "30", kind="linear")
    assert cases()[0].cost.flops == 2 * (3 * (30 + 2)) * 32 * 4 * (16 + 12)


def test_without_a_fused_op_the_reference_runs_once(measure: Bench) -> None:
    done = measure("rotate_query", kind="rms_norm")
    assert "mla-reference is skipped: no fused op was chosen" in done.err
    assert [case.implementation for case in cases()] == ["mla"]
    assert done.out.splitlines()[-1].startswith("Op Latency [rotate_query batch=3 q_len=2 heads=4]: ")


def test_a_prompt_without_history_is_a_shape_like_any(measure: Bench) -> None:
    for op in ("latent_attention", "expanded_attention", "write_latent"):
        assert measure(op, "--kv", "0").code == 0
        assert cases()[0].history == [0, 0, 0]


def test_latents_without_rotary_channels_are_written_alone_and_no_query_is_rotated(measure: Bench) -> None:
    dims = json.loads(Path("tiny.json").read_text())
    Path("tiny.json").write_text(json.dumps({**dims, "qk_rope_head_dim": 0}))
    done = measure("write_latent")
    assert done.code == 0, done.error
    assert {case.check.status for case in cases()} == {"ok"}
    done = measure("rotate_query")
    assert done.code == 2
    assert done.error.startswith(
        "error: a layer of config 'tiny.json' has no rotate_query, because it has no rotary channels: choose "
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--op", "latent_atention"],
            "error: unknown op 'latent_atention'. Did you mean 'latent_attention'? --op takes: linear, ",
        ),
        (
            ["--op", "rms_norm"],
            "error: a layer of config 'deepseek-v2-lite' has no rms_norm, because it does not compress its "
            "queries: choose a config that does, such as --config deepseek-r1.",
        ),
        (["--op", "o_proj", "--kv", "4k"], "error: --kv has no effect on o_proj: omit it."),
        (["--op", "w_uk", "-a", "cache_format=int8"], "error: cache_format has no effect on w_uk: omit it."),
        (
            ["--op", "latent_attention", "--topk", "4", "--selection", "tied"],
            "error: topk and selection have no effect on latent_attention: omit them.",
        ),
        (["--topk", "4"], "error: topk applies to one op: add --op sparse_latent_attention. A layer takes "),
        (
            ["--op", "latent_attention", "--preset", "sparse"],
            "error: workload 'sparse' is for write_index_key, select_latents, sparse_latent_attention, and "
            "latent_attention selects nothing: leave --op out, or give its batches with --batch-spec.",
        ),
        (
            ["--op", "select_latents"],
            "error: a layer of config 'deepseek-v2-lite' has no select_latents, because it has no indexer: "
            "choose a config that does, such as --config deepseek-v3.2.",
        ),
        (["--op", "o_proj, o_prj"], "error: unknown op 'o_prj'. Did you mean 'o_proj'? --op takes: linear, "),
        (["--op", "o_proj,linear"], "error: 'o_proj batch=16 heads=16' would be measured twice: "),
        (["--op", "write_latent", "--heads", "2"], "error: --heads has no effect on write_latent: omit it."),
        (["--batch", "4"], "error: --batch shapes one op: it needs --op; a workload has its own lengths"),
        (["--op", "linear", "--scenario", "decode"], "error: --op takes the lengths of batch specs, and"),
        (["--op", "linear", "--workload", "x.toml"], "error: cannot read workload 'x.toml': No such file"),
        (["--op", "linear", "--model-path", "x"], "error: --model-path is about the whole layer, and"),
        (["--op", "linear", "--attention", "absorbed"], "error: --attention is about the whole layer, and "),
        (["--op", "linear", "--implementations", "transformers"], "error: transformers runs the whole layer"),
        (["--op", "linear", "--kv", "4q"], "Error: Invalid value for '--kv': '4q' is not a valid length:"),
        (["--op", "linear", "--batch", "0"], "Error: Invalid value for '--batch': 0 is not in the range"),
        (["--op", "latent_attention", "--kv", "2000m"], "error: this run needs about "),
        (
            ["--op", "latent_attention", "--q-len", "2", "-a", "q_len=1,2"],
            "error: --q-len and an axis of that name are mutually exclusive",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(bench: Bench, words: list[str], message: str) -> None:
    done = bench("--backend", "cpu", *words)
    assert done.code == 2
    assert done.out == ""
    assert done.error.startswith(message)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("4096", 4096), ("4k", 4096), ("1M", 2**20)])
def test_lengths_may_be_written_short(text: str, value: int) -> None:
    assert size(text) == value


def test_axes_lay_a_grid_over_an_op_whose_points_rerun(bench: Bench, small: list[str]) -> None:
    words = ["--op", "latent_attention", "-a", "kv=8,16", "-a", "dtype=bf16,fp32", "--batch", "2"]
    options = ["--backend", "cpu", "--config", "tiny.json", "--runs", "2", "--passes", "6", "--warmups", "0"]
    assert bench(*options, *words, "--implementations", "mla", "-o", "grid.json").code == 0
    cases = results.read(Path("grid.json")).cases
    assert [(case.point["kv"], case.dtype) for case in cases] == [
        (8, "bfloat16"), (8, "float32"), (16, "bfloat16"), (16, "float32"),
    ]  # fmt: skip
    assert {case.op for case in cases} == {"latent_attention"} == {case.base for case in cases}
    case = cases[3]
    assert bench(*shlex.split(case.repro)[3:], "-o", "again.json").code == 0
    (again,) = results.read(Path("again.json")).cases
    for name in ("scenario", "point", "dtype", "history", "query_lens", "heads", "op"):
        assert getattr(again, name) == getattr(case, name), name
