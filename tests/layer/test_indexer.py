"""A layer with an indexer: what it selects and attends, in float64; and when it attends everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_cases import LAYER_BOUND

from mla import MLA, LatentCache, MLAConfig
from mla.cases.layer import LayerCall, LayerCase
from mla.errors import UnsupportedOps
from mla.layer.forward import INDEX_EPS
from mla.layer.workspace import Workspace
from mla.reference import REFERENCE
from mla.verify.layer_oracle import TrueLayer, oracle
from mla.weights import random_state_dict
from mla_backends.api import FusedOp
from mla_backends.testing import HostBackend

# Lengths below, at and above a selection of 16: prefill, decode and several new tokens, mixed.
STEPS = (((30, 1, 5), (0, 60, 40)), ((1, 1, 1), (15, 16, 90)), ((3, 0, 17), (2, 40, 20)))
INDEXER = {"q_lora_rank": 24, "index_topk": 16, "index_n_heads": 4, "index_head_dim": 20}


@pytest.fixture
def sparse(tiny: Any) -> Any:
    """Return a maker of configs with an indexer."""
    return lambda **changes: tiny(**{**INDEXER, **changes})


def scores(
    case: Any, config: MLAConfig | None = None, index: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Return the true scores [t, s + t] of each request, -inf for keys that come later."""
    truth = TrueLayer(config or case.config, case.state)
    requests = zip(case.hidden.split(list(case.batch.query_lens)), index or case.index, strict=True)
    return [_scores(truth, hidden, past.double()) for hidden, past in requests]


def _scores(truth: TrueLayer, hidden: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """As the paper has them: each head's weight times the positive part of query times key, summed."""
    positions = torch.arange(len(past), len(past) + len(hidden))
    keys = torch.cat((past, truth.index_keys(hidden, positions)))
    q, weights = truth.index_queries(hidden, positions)
    scores = (torch.einsum("thd,sd->ths", q, keys).relu() * weights[..., None]).sum(1)
    return scores.masked_fill(torch.arange(len(keys)) > positions[:, None], -torch.inf)


def misses(case: Any, truths: Sequence[torch.Tensor], tolerance: float) -> list[str]:
    """Return what is wrong with what the layer selected, by the scores of what it selected."""
    wrong, topk = [], case.config.index_topk
    rows = zip(torch.cat([*case.layer.selection]).view(-1, topk), _rows(truths), strict=True)
    for number, (chosen, row) in enumerate(rows):
        seen = int(row.isfinite().sum())
        count = min(topk, seen)
        kept = chosen[:count].long()
        if (chosen[count:] != -1).any() or len({*kept.tolist()}) != count or not (kept >= 0).all():
            wrong.append(f"query {number}: {chosen.tolist()} are not {count} positions, then -1")
        elif (kept >= seen).any():
            wrong.append(f"query {number} selects what it does not see")
        elif (
            count and row[kept].min() < row[:seen].topk(count).values[-1] - tolerance * row[:seen].abs().max()
        ):
            wrong.append(f"query {number} selects a key that scores too little")
    return wrong


def best(row: torch.Tensor, count: int) -> torch.Tensor:
    """Return the last of the `count` best scores."""
    return row.topk(count).values[-1]


def _rows(truths: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [row for truth in truths for row in truth]


@pytest.mark.parametrize(("query_lens", "history"), STEPS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_selects_by_true_scores_and_attends_its_selection(
    make_case: Any, sparse: Any, assert_rows_close: Any, query_lens: Any, history: Any, interleaved: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    config = sparse(indexer_rope_interleave=interleaved)
    case = make_case(query_lens, history, config, dtype=dtype)
    out = case.run()
    assert not misses(case, scores(case), 1e-5 if dtype == torch.float32 else 3e-2)
    assert_rows_close(out, case.truth(), LAYER_BOUND[dtype])
    other = scores(case, replace(config, indexer_rope_interleave=not interleaved))
    assert misses(case, other, 3e-2)  # by the other layout, what it selected would be wrong


@pytest.mark.parametrize("attention", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("lengths", [((16, 1, 3), (0, 15, 9)), ((1, 1), (3, 15))])
def test_contexts_within_the_selection_run_exactly_as_without_an_indexer(
    make_case: Any, sparse: Any, attention: str, lengths: Any
) -> None:
    """And write the index keys that a later step reads."""
    case = make_case(*lengths, sparse(), attention=attention)
    plain = {name: weight for name, weight in case.state.items() if not name.startswith("indexer.")}
    dense = MLA(replace(case.config, index_topk=0, index_n_heads=0), dtype=torch.float32, attention=attention)
    dense.load_state_dict(plain)
    pages = case.cache.pages[0].clone()
    out = case.run()
    assert torch.equal(out, dense(case.hidden, case.batch, pages))
    assert torch.equal(pages.nan_to_num(), case.cache.pages[0].nan_to_num())
    assert case.layer.selection is None
    for sequence, keys, new in zip(case.ids, case.index, lengths[0], strict=True):
        written = case.cache.read_index(sequence)
        assert written.isfinite().all()
        assert len(written) == len(keys) + new
        assert torch.equal(written[: len(keys)], keys)


def test_one_long_context_makes_the_whole_batch_sparse(make_case: Any, sparse: Any) -> None:
    """Short requests then select all that they see, and get what dense attention gives."""
    case = make_case([2, 1], [5, 40], sparse())
    out = case.run()
    assert case.layer.selection[0].tolist()[6:] == [-1] * 10
    assert sorted(case.layer.selection[1].tolist()[:7]) == list(range(7))
    given = (case.config, case.state, case.hidden[:2], [2], case.history[:1])
    assert (out[:2] - oracle(*given)).norm() <= 1e-5 * out[:2].norm()


@pytest.mark.parametrize("index_format", [None, "fp8"])
@pytest.mark.parametrize("cache_format", [None, "fp8_ds_mla", "int8", "q8_0"])
def test_every_format_of_both_caches(sparse: Any, cache_format: str | None, index_format: str | None) -> None:
    """Steps in a row read what earlier ones wrote, on both sides of the border."""
    config = sparse(index_head_dim=32, qk_rope_head_dim=32)
    layer = MLA(config, dtype=torch.float32, cache_format=cache_format, index_format=index_format)
    layer.load_state_dict(random_state_dict(config, dtype=torch.float32))
    call = LayerCall(LayerCase((4, 1, 2), (9, 30, 0), config, steps=5), layer, page_size=4)
    verdict = call.check(call.run())
    assert (verdict.status, verdict.reason) == ("ok", "")


@pytest.mark.parametrize("lengths", STEPS)
def test_steps_in_a_row_are_one_prefill(make_case: Any, sparse: Any, lengths: Any) -> None:
    """Token by token, and in one piece, index keys are the same and so are selections."""
    case = make_case([33], [0], sparse())
    whole = case.run()
    chosen = [{*row.tolist()} for row in case.layer.selection]
    cache = LatentCache(case.config, max_tokens=64, page_size=4, dtype=torch.float32, shuffle=3)
    (sequence,) = cache.new_sequences(1)
    step = lengths[0][0]
    for first in range(0, 33, step):
        hidden = case.hidden[first : first + step]
        out = case.layer(hidden, cache.extend([sequence], [len(hidden)]), *cache.of_layer(0))
        assert (out - whole[first : first + step]).norm() <= 1e-5 * out.norm()
        if case.layer.selection is not None:
            assert [{*row.tolist()} for row in case.layer.selection] == chosen[first : first + step]
    assert (cache.read_index(sequence) - case.cache.read_index(case.ids[0])).abs().max() <= 1e-5


def test_a_layer_that_shares_has_no_indexer_and_attends_what_it_is_given(
    make_case: Any, sparse: Any, assert_rows_close: Any
) -> None:
    model = sparse(indexer_types=("full", "shared", "shared"))
    case = make_case([3, 1, 0], [0, 50, 20], model)
    case.run()
    config = model.of_layer(1)
    layer = MLA(config, dtype=torch.float32)
    state = random_state_dict(config, 5, torch.float32)
    assert not any(name.startswith("indexer.") for name in state)
    layer.load_state_dict(state)
    cache = LatentCache(model, max_tokens=200, page_size=16, num_layers=3, dtype=torch.float32)
    assert cache.index_pages.shape[0] == 1
    assert cache.of_layer(1)[1] is None
    (sequence,) = cache.new_sequences(1)
    kv, pe = case.history[1]
    cache.load(sequence, kv, pe, 1)
    batch = cache.extend([sequence], [1])
    given = case.layer.selection[3:4].clone()
    out = layer(case.hidden[3:4], batch, *cache.of_layer(1), given)
    assert layer.selection is given
    truth = oracle(config, state, case.hidden[3:4], [1], [(kv, pe)], selection=given)
    assert_rows_close(out, truth, 1e-5)
    with pytest.raises(ValueError, match="shares a selection: pass selection=, the `selection` of the last"):
        layer(case.hidden[3:4], batch, cache.pages[1])
    with pytest.raises(ValueError, match="this layer has no indexer: leave index_pages out"):
        layer(case.hidden[3:4], batch, cache.pages[1], cache.index_pages[0], given)


def test_a_given_selection_is_attended_whatever_the_lengths(
    make_case: Any, sparse: Any, assert_rows_close: Any
) -> None:
    """By a layer with an indexer, too, which writes its keys all the same; and a row may select nothing."""
    case = make_case([2, 1], [3, 40], sparse())
    rows = [[3, 0, 2], [], [39, 7, 40]]
    given = torch.tensor([row + [-1] * (16 - len(row)) for row in rows], dtype=torch.int32)
    out = case.run(selection=given)
    assert_rows_close(out[[0, 2]], case.truth()[[0, 2]], 1e-5)
    assert (out[1] == 0).all()
    assert all(case.cache.read_index(sequence).isfinite().all() for sequence in case.ids)
    with pytest.raises(ValueError, match=r"selection must be \[3, 16\] torch.int32, got \[3, 15\]"):
        case.run(selection=given[:, :15])


def test_operands_that_do_not_fit_are_refused(make_case: Any, sparse: Any, tiny: Any) -> None:
    case = make_case([1], [20], sparse())
    pages, index = case.cache.of_layer(0)
    for wrong, message in (
        (None, "this layer has an indexer: pass index_pages"),
        (index[:, :4], r"index_pages must be \[\d+, 16, 20\] torch.float32, got \[\d+, 4, 20\]"),
        (index.double(), "index_pages must be .* got .*float64"),
        (index.mT.contiguous().mT, "index_pages must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            case.layer(case.hidden, case.batch, pages, wrong)
    dense = make_case([1], [20], tiny())
    for arguments, message in (
        ({"index_pages": index}, "no indexer: leave index_pages out"),
        ({"selection": torch.zeros(1, 16, dtype=torch.int32)}, "attends all keys .*: leave selection out"),
    ):
        with pytest.raises(ValueError, match=message):
            dense.layer(dense.hidden, dense.batch, dense.cache.pages[0], **arguments)


def test_weights_come_back_and_the_indexer_s_own_are_wide(sparse: Any) -> None:
    config = sparse()
    layer, state = MLA(config), random_state_dict(config, 1)
    layer.load_state_dict(state)
    assert layer.ops["index_weights_proj"].spec.dtype == torch.float32
    for name, weight in layer.state_dict().items():
        assert torch.equal(weight, state[name]), name
        assert weight.dtype == (torch.float32 if name == "indexer.weights_proj.weight" else torch.bfloat16)
    assert "topk=16 (indexer: 4 heads)" in repr(layer)
    assert "topk=16 (indexer: another layer's)" in repr(MLA(replace(config, index_n_heads=0)))


def test_nothing_is_allocated_in_a_step_like_the_last(
    make_case: Any, sparse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([3, 1], [5, 40], sparse())
    case.run()
    case.run()  # with views of all memory
    held, first = case.layer.scratch_bytes(), case.layer.selection.data_ptr()
    taken: list[str] = []
    monkeypatch.setattr(Workspace, "take", lambda self, name, *shape, **more: taken.append(name))
    case.run()
    assert not taken
    assert (case.layer.scratch_bytes(), case.layer.selection.data_ptr()) == (held, first)


class Spy(FusedOp):
    """An op that counts its calls."""

    def __init__(self, kind: str) -> None:
        self.contract, self._op, self.calls = REFERENCE[kind].contract, REFERENCE[kind], 0
        self.nan_safe_tail = True

    def prepare(self, spec: Any, batch: Any) -> Any:
        return self._op.prepare(spec, batch)

    def __call__(self, *arguments: Any, **tensors: Any) -> None:
        self.calls += 1
        self.seen = tensors
        self._op(*arguments, **tensors)


def test_a_backend_s_ops_serve_it_and_the_reference_stands_in(make_case: Any, sparse: Any) -> None:
    spies = {kind: Spy(kind) for kind in ("write_index_key", "select_latents")}
    case = make_case([2, 1], [5, 40], sparse(), ops=spies)
    assert torch.equal(case.run(), make_case([2, 1], [5, 40], sparse()).run())
    assert [spy.calls for spy in spies.values()] == [1, 1]
    assert spies["write_index_key"].seen["eps"] == INDEX_EPS == 1e-6
    weights = spies["select_latents"].seen["weights"]
    expected = case.hidden @ case.state["indexer.weights_proj.weight"].T * (4 * 20) ** -0.5
    assert (weights - expected).abs().max() <= 1e-6
    short = make_case([2, 1], [5, 3], sparse(), ops=spies)
    short.run()
    assert [spy.calls for spy in spies.values()] == [2, 1]  # nothing is selected
    with pytest.raises(UnsupportedOps, match="no fused select_latents"):
        MLA(sparse(), ops="mine", backend=HostBackend(ops={"mine": Refusing("select_latents")}))


class Refusing(Spy):
    def unsupported_reasons(self, spec: Any) -> list[str]:
        return ["no"]


@pytest.mark.parametrize("mutate", [{"index_topk": 15}, {"rope_theta": 77.0}, {"index_n_heads": 0}])
def test_the_checks_above_see_a_wrong_layer(make_case: Any, sparse: Any, mutate: dict[str, Any]) -> None:
    """Another width, other angles, and no indexer at all."""
    case = make_case([3, 1], [0, 60], sparse())
    if mutate == {"index_n_heads": 0}:
        with pytest.raises(ValueError, match="has an indexer"):
            case.layer(case.hidden, case.batch, case.cache.pages[0])
        return
    case.run()
    other = replace(case.config, **mutate)
    if "rope_theta" in mutate:
        assert misses(case, scores(case, other), 3e-2)
    else:
        case.config = other
        with pytest.raises(RuntimeError):
            misses(case, scores(case), 1e-5)
