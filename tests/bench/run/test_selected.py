"""Layers with an indexer: each forward is judged by its own selection, and each part by what it was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import DIMS

from mla import MLA
from mla.bench import results
from mla.bench.subjects.layer import MlaLayer
from mla.cache.formats import IndexFp8, codec_of
from mla.layer.forward import Step
from mla.reference import small, sparse

Bench = Callable[..., Any]
Patch = pytest.MonkeyPatch

INDEXER = {"model_type": "deepseek_v32", "q_lora_rank": 48, "index_n_heads": 3, "index_head_dim": 16}
TOPK = 24
WORKLOAD = """
[[scenario]]
name = "decode"
mode = "decode"
query_lens = [1, 2, 1]
history = [40, 100, 5]
runs = 2

[[scenario]]
name = "prefill"
mode = "prefill"
query_lens = [30, 7, 40]
history = [0, 60, 100]
runs = 4

[[scenario]]
name = "dense"
mode = "decode"
query_lens = [1, 2]
history = [3, 18]
runs = 2
"""
COUNTS = ("--passes", "2", "--warmups", "0", "--page-size", "16", "--seed", "3")
FAULTY = ("--backend", "faulty_backend:FaultyBackend")


@pytest.fixture
def measure(bench: Bench, tmp_path: Path) -> Bench:
    """Return `bench` for layers of a tiny config with an indexer."""
    config = {**DIMS, **INDEXER, "index_topk": TOPK}
    (tmp_path / "sparse.json").write_text(json.dumps(config))
    (tmp_path / "sparse.toml").write_text(WORKLOAD)
    options = ["--config", "sparse.json", "--workload", "sparse.toml", *COUNTS]

    def measure(*words: str) -> Any:
        where = [] if "--backend" in words else ["--backend", "torch", "-O", "device=cpu"]
        return bench(*where, *options, *words)

    return measure


def cases() -> list[results.Case]:
    return results.decode(Path("run.json").read_bytes()).cases


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_is_right_beyond_topk_and_within(measure: Bench, dtype: str) -> None:
    done = measure("--dtype", dtype, "-o", "run.json", "--implementations", "mla-reference")
    assert done.code == 0, done.out + done.err
    size = 2 if dtype == "bfloat16" else 4
    for case in cases():
        assert (case.check.status, case.latency_ms is not None) == ("ok", True)
        assert case.check.error_ratio is not None
        assert case.check.error_ratio > 0
        spare, lengths = 16, [past + new for past, new in zip(case.history, case.query_lens, strict=True)]
        if case.mode == "decode":
            lengths = [past + 2 * new for past, new in zip(case.history, case.query_lens, strict=True)]
        pages = spare + sum(-(-length // 16) for length in lengths)
        assert case.memory.cache_bytes == pages * 16 * (32 + 8 + 16) * size
        assert case.ops["select_latents"] == "reference"


def test_a_quantised_cache_is_attended_as_it_is_stored(measure: Bench) -> None:
    done = measure(
        "--cache-format", "int8", "--scenario", "prefill", "--scenario", "decode", "-o", "run.json"
    )
    assert done.code == 0, done.out + done.err
    assert {case.check.status for case in cases()} == {"ok"}


@pytest.mark.parametrize(
    "words",
    [
        ("--workload", "sparse.toml", "--scenario", "decode"),
        ("--workload", "sparse.toml", "--scenario", "prefill", "--cache-format", "int8"),
        ("--op", "select_latents", "--batch", "3", "--kv", "90"),
        ("--op", "write_index_key", "--batch", "3", "--kv", "90"),
    ],
)
def test_the_format_of_index_keys_is_an_axis(measure: Bench, bench: Bench, words: tuple[str, ...]) -> None:
    """Of the layer and of its ops; fp8 moves and takes fewer bytes."""
    options = ["--backend", "torch", "-O", "device=cpu", "--config", "sparse.json"]
    done = bench(
        *options,
        "--implementations",
        "mla",
        *words,
        "--runs",
        "2",
        *COUNTS,
        "-a",
        "index_format=plain,fp8",
        "-o",
        "run.json",
    )
    assert done.code == 0, done.out + done.err
    plain, coded = sorted(cases(), key=lambda case: case.point["index_format"] == "fp8")
    assert plain.check.status == coded.check.status == "ok"
    assert coded.cost.bytes < plain.cost.bytes
    assert coded.memory.cache_bytes < plain.memory.cache_bytes


@pytest.fixture
def stack(measure: Bench, tmp_path: Path) -> Bench:
    """Return `measure` for four layers, of which the second and the fourth share a selection."""
    kinds = {"model_type": "glm_moe_dsa", "index_topk_pattern": "FSFS"}
    (tmp_path / "stack.json").write_text(json.dumps({**DIMS, **INDEXER, **kinds, "index_topk": TOPK}))
    options = ("--config", "stack.json", "--layers", "4", "--implementations", "mla", "-o", "run.json")
    return lambda *words: measure(*options, *words)


def test_layers_in_a_row_share_selections(stack: Bench, measure: Bench) -> None:
    assert measure("--implementations", "mla", "-o", "run.json").code == 0
    alone = {case.base: case for case in cases()}
    done = stack("--dtype", "float32", "--index-format", "fp8")
    assert done.code == 0, done.out + done.err
    done = stack()
    assert done.code == 0, done.out + done.err
    for case in cases():
        assert (case.check.status, case.layers) == ("ok", 4)
        single = alone[case.base]
        index_bytes = single.memory.cache_bytes * 16 // (32 + 8 + 16)
        assert case.memory.cache_bytes == 4 * single.memory.cache_bytes - 2 * index_bytes
        assert case.memory.weight_bytes < 4 * single.memory.weight_bytes
        assert case.cost.flops < single.cost.flops


@pytest.mark.parametrize("words", [("tp=2",), ("tp=2,dp=2", "--index-format", "fp8")])
def test_ranks_that_are_predicted_select_for_themselves(
    measure: Bench, monkeypatch: Patch, words: tuple[str, ...]
) -> None:
    """Each is judged by its own selection, and a wrong one costs it the number."""
    options = ("--simulate", "--implementations", "mla-reference", "-o", "run.json", "--parallel", *words)
    done = measure(*options, "--scenario", "decode", "--scenario", "prefill")
    assert done.code == 0, done.out + done.err
    assert {case.check.status for case in cases()} == {"ok"}
    KEYS_ARE_OTHERS(monkeypatch)
    assert measure(*options, "--scenario", "prefill").code == 4
    reasons = [case.check.reason for case in cases()]
    assert all("on rank " in reason and "selections leave out" in reason for reason in reasons)


def own_selection_of_the_second(patch: Patch) -> None:
    """What is shared moves by one token."""
    right = MLA.forward

    def forward(
        layer: MLA, hidden: Any, batch: Any, pages: Any, index: Any = None, selection: Any = None, **rest: Any
    ) -> Any:
        if selection is not None:
            selection = torch.where(selection > 0, selection - 1, selection)
        return right(layer, hidden, batch, pages, index, selection, **rest)

    patch.setattr(MLA, "forward", forward)


def loaded(change: Callable[[MlaLayer], None]) -> Callable[[Patch], None]:
    """Return a mutant that changes layers once they are loaded."""
    right = MlaLayer.load

    def load(layer: MlaLayer, scenario: Any, inputs: Any) -> None:
        right(layer, scenario, inputs)
        change(layer)

    return lambda patch: patch.setattr(MlaLayer, "load", load)


def the_first_index_pages(layer: MlaLayer) -> None:
    first, *_ = layer._index_pages
    layer._index_pages = [pages if pages is None else first for pages in layer._index_pages]


def the_first_pages(layer: MlaLayer) -> None:
    layer._pages[2] = layer._pages[0]


@pytest.mark.parametrize(
    ("mutant", "reason"),
    [
        (own_selection_of_the_second, "layer 1: "),
        (loaded(the_first_index_pages), "layer 2: "),
        (loaded(the_first_pages), "layer "),
    ],
)
def test_a_wrong_layer_of_several_is_named(
    stack: Bench, monkeypatch: Patch, mutant: Callable[[Patch], None], reason: str
) -> None:
    mutant(monkeypatch)
    assert stack("--scenario", "decode", "--scenario", "prefill").code == 4
    assert [case.check.status for case in cases()] == ["wrong", "wrong"]
    assert all(case.check.reason.startswith(reason) for case in cases())


def test_index_keys_of_bytes_that_are_written_wrong_are_found(
    measure: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that is twice as large is within what rounding to four bits does, but not near enough."""
    right = IndexFp8.encode

    def doubled(codec: IndexFp8, kv: torch.Tensor, pe: torch.Tensor | None = None) -> torch.Tensor:
        return right(codec, kv * 1.1, pe)

    monkeypatch.setattr(
        IndexFp8, "write", lambda codec, cache, slots, keys: codec.put(cache, slots, doubled(codec, keys))
    )
    assert measure("--index-format", "fp8", "--scenario", "prefill", "-o", "run.json").code == 4
    assert all("rows of its index keys of request " in case.check.reason for case in cases())


def test_a_format_of_index_keys_that_are_not_there_is_refused(bench: Bench, measure: Bench) -> None:
    assert "unknown index format 'fp9'. Did you mean 'fp8'?" in measure("--index-format", "fp9").error
    dense = bench("--index-format", "fp8", "--batch-spec", "2q1s40")
    assert dense.code == 2
    assert dense.error == (
        "error: --index-format stores index keys, and 'deepseek-v2-lite' has no indexer: omit it."
    )


def test_other_codes_than_those_next_to_the_truth_are_wrong(
    measure: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(*given: Any) -> Any:
        codec: Any = codec_of(*given)
        last = torch.tensor([1] * 32 + [0] * 16).to(torch.uint8)
        return SimpleNamespace(encode=lambda kv, pe: codec.encode(kv, pe) ^ last)

    monkeypatch.setattr(small, "codec_of", coarse)
    words = ("--cache-format", "int8", "--dtype", "float32", "--scenario", "prefill", "-o", "run.json")
    done = measure(*words)
    assert done.code == 4, done.out + done.err
    assert all("rows of its cached latents of request 0 are wrong" in case.check.reason for case in cases())


@pytest.mark.parametrize(
    ("op", "fault", "reason"),
    [
        ("select_latents", "scale", "selections name a token"),
        ("select_latents", "stops", ""),
        ("sparse_latent_attention", "head", "output rows are too far from the oracle"),
        ("write_index_key", "scale", "rows of its index keys of request "),
        ("rotate_query", "scale", "rows of its index queries are wrong"),
    ],
)
@pytest.mark.parametrize("scenario", ["decode", "prefill"])
def test_a_wrong_op_costs_the_layer_its_numbers(
    measure: Bench, op: str, fault: str, reason: str, scenario: str
) -> None:
    words = (*FAULTY, "-O", f"op={op}", "-O", f"fault={fault}", "--scenario", scenario, "-o", "run.json")
    assert measure(*words).code == 4
    wrong, right = cases()
    assert (wrong.check.status, wrong.latency_ms) == ("wrong", None)
    assert reason in wrong.check.reason
    assert right.check.status == "ok", "the reference selects for itself"


def test_attention_within_topk_is_the_dense_one(measure: Bench) -> None:
    words = (*FAULTY, "--scenario", "dense", "-O", "fault=scale")
    assert measure(*words, "-O", "op=sparse_latent_attention").code == 0
    assert measure(*words, "-O", "op=select_latents").code == 0
    assert measure(*words, "-O", "op=write_index_key").code == 4, "keys are written for later"


# ------------------------------------------------------------------------------------ indexers that are wrong

Mutant = Callable[[Patch], None]


def scored(score: Callable[..., torch.Tensor]) -> Mutant:
    right = sparse.index_scores
    wrong: Any = lambda q, weights, keys: score(right, q, weights, keys)  # noqa: E731
    return lambda patch: patch.setattr(sparse, "index_scores", wrong)


def written(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutant:
    right = sparse.WriteIndexKey.__call__
    wrong: Any = lambda op, **given: right(op, **given | change(given))  # noqa: E731
    return lambda patch: patch.setattr(sparse.WriteIndexKey, "__call__", wrong)


def chosen(change: Callable[[torch.Tensor, torch.Tensor], object]) -> Mutant:
    right = sparse._take_best

    def take(scores: torch.Tensor, last: torch.Tensor, out: torch.Tensor) -> None:
        right(scores, last, out)
        change(out, last[:, 0] + 1)

    return lambda patch: patch.setattr(sparse, "_take_best", take)


def weights_unscaled(patch: Patch) -> None:
    right = Step.select

    def select(step: Step, ops: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        selection = right(step, ops, hidden, *rest)
        step.views.indexed(len(hidden)).weights.div_(step.config.index_scale)
        return selection

    patch.setattr(Step, "select", select)


def the_most_recent(out: torch.Tensor, seen: torch.Tensor) -> None:
    out.copy_((seen[:, None] - 1 - torch.arange(out.shape[1])).clamp_min(-1))


KEYS_ARE_OTHERS = scored(lambda right, q, w, k: right(q, w, k.roll(1, 0)))
MUTANTS: dict[str, Mutant] = {
    "without ReLU": scored(lambda right, q, w, k: torch.einsum("thk,th->tk", q.float() @ k.float().T, w)),
    "ReLU behind the weight": scored(
        lambda right, q, w, k: ((q.float() @ k.float().T) * w[..., None]).relu().sum(1)
    ),
    "a head is lost": scored(lambda right, q, w, k: right(q[:, 1:], w[:, 1:], k)),
    "keys are others": KEYS_ARE_OTHERS,
    "the other rope layout": written(lambda given: {"interleaved": not given["interleaved"]}),
    "no bias": written(lambda given: {"bias": given["bias"] * 0}),
    "weights unscaled": weights_unscaled,
    "one too few": chosen(lambda out, seen: out[:, -1].fill_(-1)),
    "a token twice": chosen(lambda out, seen: out[:, 1].copy_(out[:, 0])),
    "causality off by one": chosen(lambda out, seen: out[:, 0].copy_(seen)),
    "the most recent": chosen(the_most_recent),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_indexer_is_caught(measure: Bench, monkeypatch: Patch, mutant: Mutant) -> None:
    mutant(monkeypatch)
    words = ("--implementations", "mla-reference", "-o", "run.json", "--scenario", "prefill")
    assert measure(*words, "--scenario", "decode").code == 4
    assert [case.check.status for case in cases()] == ["wrong", "wrong"]
    assert all("index" in case.check.reason or "selection" in case.check.reason for case in cases())


# ------------------------------------------------------------------------------------------ what is beside it
def test_stages_have_the_indexer(measure: Bench) -> None:
    assert measure("--scenario", "decode", "--implementations", "mla", "--stages", "-o", "run.json").code == 0
    stages = {stage.name: stage for stage in cases()[0].stages}
    parts = ("index_k_proj", "write_index_key", "index_q_proj", "index_weights_proj", "select_latents")
    assert {f"indexer: {part}" for part in parts} < set(stages)
    cost = stages["attention: sparse_latent_attention"].cost
    assert cost is not None
    keys = [(41 + 42) / 2, 101 + 102, 6.5]  # that are seen, and of them at most TOPK are attended
    pairs = 4 * TOPK - TOPK + 6.5
    assert cost.flops == round(2 * 4 * pairs * (2 * 32 + 8))
    scores = stages["indexer: select_latents"].cost
    assert scores is not None
    assert scores.flops == pytest.approx(2 * 3 * 16 * (sum(keys) + 2), abs=2 * 3 * 16)


def test_the_call_of_a_wrong_indexer_is_kept_and_replayed(measure: Bench, bench: Bench) -> None:
    words = (*FAULTY, "-O", "op=select_latents", "-O", "fault=scale", "--scenario", "decode")
    done = measure(*words, "--dump-failure", "kept")
    assert "select_latents (op 'faulty') is the first wrong op of this forward" in done.err
    assert bench("replay", "kept").code == 4
    assert bench("replay", "kept", "--op", "reference").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--parallel", "dcp=2", "--simulate"],
            "needs whole contexts to select from: leave out dcp of --parallel.",
        ),
        (
            ["--implementations", "mla,transformers-eager"],
            "is judged by the selection that it reports: leave out transformers-eager.",
        ),
    ],
)
def test_what_is_not_measured_yet_is_refused(measure: Bench, words: list[str], message: str) -> None:
    done = measure(*words)
    assert done.code == 2
    assert done.error == f"error: a layer with an indexer {message}"
