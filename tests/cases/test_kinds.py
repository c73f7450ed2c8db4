"""The entry of every kind of op: its truth against a slow second one, its judge, and its place in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from float64_attention import attend_segments
from op_bench import INDEXED, OpBench
from wrong_sparse import MUTANTS

from mla import MLAConfig
from mla.cases import KINDS
from mla.cases.case import OpCase
from mla.cases.memory import Layout, Pages, Piece
from mla.cases.played import Laid, Scene, host_of
from mla.cases.sparse import SELECTIONS, selected_keys, selection_of
from mla.cases.varied import Call, Pool
from mla.reference import REFERENCE
from mla.verify import op_oracle
from mla_backends.api import OPS, AttentionSpec, IndexerSpec, LinearSpec, NormSpec, SegmentLengths

CPU = torch.device("cpu")
CONFIG = MLAConfig(
    64, 3, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
)
NEW, KEYS = (3, 1, 5), (9, 1, 17)


def spec_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    if kind.endswith("linear"):
        return LinearSpec(10, 6, 3 if kind == "batched_linear" else 1, dtype, CPU)
    if kind == "rms_norm":
        return NormSpec(24, dtype, CPU)
    if kind in ("write_index_key", "select_latents"):
        return IndexerSpec(3, 16, 8, 6, dtype, CPU)
    topk = 6 if kind == "sparse_latent_attention" else 0
    return AttentionSpec(3, 32, 16, 8, 12, 0.2, dtype, CPU, topk=topk)


def case_of(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> OpCase:
    layout = Layout(4, spare=2, shuffle=3, unowned=torch.nan)
    case = OpCase(kind, spec_of(kind, dtype), NEW, KEYS, kind, 5, rope=CONFIG, layout=layout)
    return replace(case, **fields)


def pool_of(case: OpCase) -> Pool:
    pool = case.entry.pool(case, 4)
    pool.draw()
    return pool


def test_every_op_of_the_contract_has_an_entry() -> None:
    assert KINDS.keys() == OPS.keys() == REFERENCE.keys()


# ------------------------------------------------------------------------------ a second truth, row by row


def norm(row: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return row * weight / torch.sqrt((row * row).sum() / len(row) + eps)


def layer_norm(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    mean = row.sum() / len(row)
    return (row - mean) * weight / torch.sqrt(((row - mean) ** 2).sum() / len(row) + eps) + bias


def slow_scores(wide: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the scores of what each query sees, one by one."""
    spans = [
        (sum(KEYS[:b]), keys - new + i + 1)
        for b, (new, keys) in enumerate(zip(NEW, KEYS, strict=True))
        for i in range(new)
    ]
    scores = []
    for q, weights, (first, seen) in zip(wide["q"], wide["weights"], spans, strict=True):
        products = (q @ key for key in wide["keys"][first : first + seen])
        scores.append(torch.stack([(weights * product.clamp_min(0)).sum() for product in products]))
    return scores


def turned(row: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of a row [r], one by one."""
    half, out = len(row) // 2, row.clone()
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, half + pair)
        cos, sin = cos_sin[pair], cos_sin[half + pair]
        out[a], out[b] = row[a] * cos - row[b] * sin, row[a] * sin + row[b] * cos
    return out


def by_row(make: Callable[[int], torch.Tensor], rows: int) -> torch.Tensor:
    return torch.stack([make(row) for row in range(rows)])


def slow(case: OpCase, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute the results of operands [T, ...] with loops."""
    wide, spec = {name: tensor.double() for name, tensor in given.items()}, case.spec
    if case.kind == "linear":
        bias = wide.get("bias", torch.zeros(6).double())
        return {"out": by_row(lambda t: (wide["weight"] * wide["x"][t]).sum(1) + bias, case.rows)}
    if case.kind == "batched_linear":
        return {"out": by_row(lambda t: (wide["weight"] * wide["x"][t][:, None]).sum(2), case.rows)}
    if case.kind == "rms_norm":
        return {"out": by_row(lambda t: norm(wide["x"][t], wide["weight"], case.eps), case.rows)}
    if case.kind == "rotate_query":
        pairs = zip(wide["x"], wide["cos_sin"], strict=True)
        heads = [torch.stack([turned(head, c, case.interleaved) for head in x]) for x, c in pairs]
        return {"out": torch.stack(heads)}
    if case.kind == "write_latent":
        latent, key = wide["kv_a"][:, :32], wide["kv_a"][:, 32:]
        return {
            "latent": by_row(lambda t: norm(latent[t], wide["weight"], case.eps), case.rows),
            "key": by_row(lambda t: turned(key[t], wide["cos_sin"][t], case.interleaved), case.rows),
        }
    if case.kind == "write_index_key":
        rows = [layer_norm(x, wide["weight"], wide["bias"], case.eps) for x in wide["k"]]
        pairs = zip(rows, wide["cos_sin"], strict=True)
        keys = [torch.cat((turned(row[:8], c, case.interleaved), row[8:])) for row, c in pairs]
        return {"key": torch.stack(keys)}
    if case.kind == "select_latents":
        reach, floor = torch.full((9, 17), -torch.inf).double(), torch.full((9, 7), -torch.inf).double()
        for row, scores in enumerate(slow_scores(wide)):
            count = min(7, len(scores))
            reach[row, : len(scores)], floor[row, :count] = scores, scores.topk(count).values
        return {"reach": reach, "floor": floor}
    if case.kind == "sparse_latent_attention":
        rows = [
            wide["keys"][start + chosen[chosen >= 0].long()]
            for chosen, (start, _) in zip(given["selection"], case.spans, strict=True)
        ]
        parts = zip(wide["q"].split(1), rows, (row[:, :32] for row in rows), strict=True)
        out, lse = attend_segments(parts, spec.softmax_scale, False)
        return {"out": out, "lse": lse}
    keys, values = (wide["k"], wide["v"]) if "k" in wide else (wide["keys"], wide["keys"][:, :32])
    parts = (wide["q"].split(NEW), keys.split(KEYS), values.split(KEYS))
    out, lse = attend_segments(zip(*parts, strict=True), spec.softmax_scale, case.causal)
    return {"out": out, "lse": lse}


@pytest.mark.parametrize("fields", [{}, {"interleaved": False, "biased": True}])
@pytest.mark.parametrize("kind", OPS)
def test_the_truth_of_a_kind_is_that_of_loops(kind: str, fields: dict[str, Any]) -> None:
    case = case_of(kind, rope=None, **fields)
    host = host_of(case)
    given, truth = host.given, host.truth
    shapes = {name: case.shape(words) for name, words in case.entry.truths.items()}
    assert {name: tuple(tensor.shape) for name, tensor in truth.items()} == shapes
    for name, right in slow(case, given).items():
        close = 1e-4 if kind == "select_latents" else 1e-12  # scores are there with their bounds
        torch.testing.assert_close(truth[name], right, rtol=1e-10, atol=close)


@pytest.mark.parametrize("heads", [1, 3], ids=["shared keys", "keys of each head"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("logits", [op_oracle.LOGITS_BYTES, 2000], ids=["together", "a few at a time"])
def test_requests_that_are_attended_together_keep_apart(
    monkeypatch: pytest.MonkeyPatch, heads: int, causal: bool, logits: int
) -> None:
    """Requests of similar lengths are padded to the longest; some lack queries, or keys."""
    monkeypatch.setattr(op_oracle, "LOGITS_BYTES", logits)
    new, keys = (3, 0, 1, 5, 2, 4, 1, 1), (9, 4, 1, 17, 0, 4, 40, 33)
    draw = torch.Generator().manual_seed(3)
    q = torch.randn(sum(new), 3, 8, generator=draw)
    k, v = (torch.randn(sum(keys), heads, width, generator=draw) for width in (8, 5))
    out, lse = op_oracle.attend_requests(q, k, v, SegmentLengths(new, keys, causal), 0.3)
    wide = (x.expand(-1, 3, -1).split(keys) for x in (k, v))
    right = attend_segments(zip(q.split(new), *wide, strict=True), 0.3, causal)
    torch.testing.assert_close((out, lse), right, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------- called and judged


def called(pool: Pool, change: Callable[[Call], object] = lambda call: None) -> tuple[Call, str]:
    """Call the reference once; return the call and what is said of it once `change` has had its way."""
    call = Call(pool, REFERENCE[pool.case.kind], pool.case.spec)
    call.prepare()
    call.begin(1)
    (results,) = call.buffers(1)
    drawn = pool.change(1, 0)
    call.take(call.upload(drawn), results)
    call.run()
    change(call)
    call.fetch(results)
    check = pool.check(results, drawn, call.places())
    return call, "; ".join(filter(None, (check.reason, call.damage())))


def write(call: Call, number: float) -> None:
    """Put a number into the last row of what was written."""
    written = call.arguments.get("out")
    if written is None:
        cache = call.arguments["cache"]
        cache.view(-1, cache.shape[2])[call.arguments["slots"][-1]] *= number
    elif written.is_floating_point():
        written[-1] *= number
    else:
        written[-1, 0] = written[-1, 1]


@pytest.mark.parametrize("kind", OPS)
def test_what_is_wrong_is_named(kind: str) -> None:
    pool = pool_of(case_of(kind))
    for factor in (1.0002, 1.01):  # within reach of what the reference errs, and beyond
        assert "request 2, position 16" in called(pool, lambda call, factor=factor: write(call, factor))[1]
    if kind != "select_latents":
        assert "NaN" in called(pool, lambda call: write(call, torch.nan))[1]
    name = pool.entry.varied[0]
    said = called(pool, lambda call: call.arguments[name].add_(1))[1]
    assert said == f"the op wrote to its input {name}"


def test_a_write_to_a_slot_of_somebody_else_is_named() -> None:
    def stray(call: Call) -> None:
        free = set(range(call.arguments["cache"].shape[0] * 4)) - set(call.arguments["slots"].tolist())
        call.arguments["cache"].view(-1, 40)[min(free)] = 0

    said = called(pool_of(case_of("write_latent")), stray)[1]
    assert said.startswith("1 slots other than those of the new tokens have changed, the first is slot ")


# ------------------------------------------------------------------------------------------------ memory


def test_pages_belong_to_one_request_each() -> None:
    lengths = (9, 1, 17, 0)
    pages = Pages.of(lengths, Layout(4, spare=3, shuffle=1))
    owned = [row[:count].tolist() for row, count in zip(pages.table, (3, 1, 5, 0), strict=True)]
    named = [page for row in owned for page in row]
    assert (len(set(named)), pages.count) == (9, 12)
    assert named != sorted(named)
    pairs = zip(owned, lengths, strict=True)
    slots = [row[token // 4] * 4 + token % 4 for row, length in pairs for token in range(length)]
    assert pages.slots.tolist() == slots


def test_requests_share_the_pages_of_a_common_beginning() -> None:
    pages = Pages.of((9, 10), Layout(4, pages_before=1000, unowned=7.0, tail=2.0, shared=(0, 2)))
    assert (pages.count, len(pages.order)) == (1007, 7)
    rows = torch.arange(19.0)[:, None]
    rows[9:17] = rows[:8]  # the keys in common
    held = {
        int(page): block[:, 0].tolist() for page, block in zip(pages.order, pages.blocks(rows), strict=True)
    }
    first, second = (row.tolist()[:3] for row in pages.table)
    assert first[:2] == second[:2]
    assert [held[page] for page in (*first, second[2])] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 2, 2, 2], [17, 18, 2, 2]
    ]  # fmt: skip
    unnamed = [block for page, block in held.items() if page not in (*first, *second)]
    assert unnamed == [[7.0] * 4] * 3


def test_new_tokens_are_written_behind_the_history() -> None:
    case = case_of("write_latent")
    call = Call(pool_of(case), REFERENCE["write_latent"], case.spec)
    assert call.pages is not None
    slots = call.pages.slots.split(KEYS)
    behind = [row[keys - new :] for row, new, keys in zip(slots, NEW, KEYS, strict=True)]
    assert torch.equal(call.arguments["slots"], torch.cat(behind))


@pytest.mark.parametrize("nan_safe", [True, False])
def test_unowned_pages_and_tails_are_poisoned(nan_safe: bool) -> None:
    pool = pool_of(case_of("latent_attention"))
    op = type("Op", (), {"nan_safe_tail": nan_safe, "writes_lse": True})()
    call = Call(pool, op, pool.case.spec)
    cache = call.arguments["cache"]
    assert call.pages is not None
    assert torch.equal(cache.view(-1, 40)[call.pages.slots], pool.given["keys"])
    held = cache.view(-1, 40).isnan().any(1)
    tails = 3 * 4 - 9 + 4 - 1 + 5 * 4 - 17
    assert int(held.sum()) == 2 * 4 + (tails if nan_safe else 0)


def test_rows_around_a_strided_operand_are_poisoned() -> None:
    case = case_of("rms_norm", layout=Layout(gaps={"x": (2, 5, 0)}))
    x = Call(pool_of(case), REFERENCE["rms_norm"], case.spec).arguments["x"]
    assert x.stride() == (29, 1)
    assert torch.as_strided(x, (9 * 29 - 5,), (1,), 2).isnan().sum() == 9 * 29 - 5  # before the first call


@pytest.mark.parametrize("rows", [1, 3])
def test_a_write_beside_rows_is_seen_even_beside_a_single_one(rows: int) -> None:
    piece = Piece((rows, 8), torch.float32, CPU, (2, 3, 0))
    piece.seal()
    assert piece.damage("out", output=True) == ""
    piece.part.as_strided((rows, 9), piece.part.stride())[0, -1] = 5
    where = "beside rows" if rows > 1 else "behind the last row"
    assert piece.damage("out", output=True) == f"memory {where} of `out` was written"


def test_nothing_is_not_right() -> None:
    check = KINDS["linear"].judge({}, {}, {}, torch.float32)
    assert (check.status, check.relative_error) == ("wrong", None)


# ------------------------------------------------------------------------------------------ sparse attention


def sparse_case(kind: str, index_format: str = "", **fields: Any) -> OpCase:
    stored = {"index_format": index_format, "token_bytes": 20} if index_format else {}
    case = case_of(kind, query_lens=(2, 3, 1), kv_lens=(14, 3, 9), rope=None, seed=0)
    return case.but(**stored, **fields)


def test_one_query_selects_others_from_call_to_call() -> None:
    """An op that gives its last answer again is found by the next call."""
    bench = OpBench(INDEXED, "select_latents", torch.float32, ((40, 1),), runs=8)
    implementation, seen = bench.implementation(REFERENCE["select_latents"]), list[torch.Tensor]()
    bench.run(implementation, 1)
    seen = [out.sort(dim=1).values for out in implementation.outputs().values()]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("kind", ["write_index_key", "select_latents"])
def test_a_page_of_bytes_is_written_and_read_as_its_format_splits_it(kind: str) -> None:
    case = sparse_case(kind, "fp8")
    assert Laid(case, REFERENCE[kind]).call() == ""
    assert "fp8" in case.label
    wrong = (
        MUTANTS["write_index_key.pages"] if kind == "write_index_key" else MUTANTS["select_latents.fp8"][2:]
    )
    assert all(Laid(case, make()).call() for make in wrong)


def test_a_stray_byte_beside_a_page_s_tokens_is_named() -> None:
    class Stray(type(REFERENCE["write_index_key"])):  # type: ignore[misc]
        def __call__(self, **given: Any) -> None:
            super().__call__(**given)
            free = set(range(given["cache"].shape[0] * 4)) - set(given["slots"].tolist())
            page, slot = divmod(min(free), 4)
            given["cache"].view(len(given["cache"]), -1)[page, 4 * 16 + 4 * slot] = 3  # its scale

    reason = Laid(sparse_case("write_index_key", "fp8"), Stray(("fp8",))).call()
    assert reason.startswith("1 slots other than those of the new tokens have changed")


@pytest.mark.parametrize("how", SELECTIONS)
def test_drawn_selections_are_causal_distinct_and_complete(how: str) -> None:
    case = sparse_case("sparse_latent_attention", selection=how)
    for row, (_, seen) in zip(selection_of(case).tolist(), case.spans, strict=True):
        count = min(6, seen)
        assert row[count:] == [-1] * (6 - count)
        assert len({*row[:count]}) == count
        assert all(0 <= position < seen for position in row[:count])
    first = selection_of(case)[0].sort().values.tolist()
    assert (first == [7, 8, 9, 10, 11, 12]) == (how in ("recent", "clustered"))  # of one block, the last
    assert (first == [0, 1, 2, 3, 4, 5]) == (how == "tied")


@pytest.mark.parametrize("how", SELECTIONS)
def test_true_scores_lie_as_the_selection_says(how: str) -> None:
    case = sparse_case("select_latents", topk=32, query_lens=(1,), kv_lens=(600,), selection=how)
    call = Laid(case, REFERENCE["select_latents"])
    assert call.call() == ""
    chosen = call.results()["out"][0].sort().values.tolist()
    assert (chosen[0] >= 500) == (how == "recent")
    assert (len({place // 64 for place in chosen}) <= 3) == (how in ("recent", "clustered"))
    reach = call.pool.truth["reach"][0]
    assert (len(reach.unique()) <= 16) == (how == "tied")


def test_different_selected_tokens_are_counted_once() -> None:
    case = sparse_case("sparse_latent_attention", selection="recent")
    chosen = selected_keys(selection_of(case), case.spans)
    unique = {int(key) for key in chosen.flatten() if key >= 0}
    moved = case.but(selection="random").work.bytes - case.work.bytes
    assert len(unique) == 7 + 3 + 6
    assert moved % (40 * 4) == 0
    assert case.work.flops == 2 * 3 * (6 + 6 + 1 + 2 + 3 + 6) * (2 * 32 + 8)


def test_an_op_may_not_write_to_its_selection() -> None:
    class Sorts(type(REFERENCE["sparse_latent_attention"])):  # type: ignore[misc]
        def __call__(self, state: Any, **given: Any) -> None:
            super().__call__(state, **given)
            given["selection"].copy_(given["selection"].sort(dim=1).values)

    case = sparse_case("sparse_latent_attention")
    assert "the op wrote to selection" in Laid(case, Sorts()).call()
    assert Laid(case, REFERENCE[case.kind], Scene((case,), lse=False)).call() == ""
