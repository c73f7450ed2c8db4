"""The whole layer compared with the float64 oracle, over the steps in which the classic bugs show."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch

from mla.cache.formats import FORMATS
from mla.cache.ragged_batch import RaggedBatch
from mla.cases.case import Lengths
from mla.cases.layer import LayerCall, LayerCase, weights
from mla.cases.memory import changed_slots
from mla.config import MLAConfig, YarnScaling
from mla.conformance.checks.ops import NOT_SAFE, capture
from mla.conformance.registry import LAYER, check
from mla.conformance.trial import CheckFailed, Refused, Trial, expect
from mla.layer.attention import MLA
from mla.layer.plan import frozen_roles
from mla.verify.tolerances import same_bits

# Small, but with the head widths that kernels are made for: without and with a query LoRA.
PLAIN_CONFIG = MLAConfig(
    256, 16, rope_scaling=YarnScaling(40, 4096, mscale=0.707, mscale_all_dim=0.707), name="plain"
)
LORA = MLAConfig(
    192, 16, q_lora_rank=128, rope_scaling=YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=1.0), name="lora"
)
# What few models have: biases, and channels rotated in halves; output gates, of Kimi K3, which keeps rotary
# channels and rotates none, and of Ling 3; no such channels; and sinks.
VARIANT = MLAConfig(192, 16, q_lora_rank=128, attention_bias=True, rope_interleave=False, name="variant")
UNUSUAL = (
    VARIANT,
    MLAConfig(192, 12, q_lora_rank=128, rope_theta=None, output_gate="element", name="gate per element"),
    MLAConfig(192, 16, output_gate="head", name="gate per head"),
    MLAConfig(192, 16, qk_rope_head_dim=0, name="no rotary channels"),
    MLAConfig(192, 16, sink_logits=True, name="sinks"),
)
# An indexer, in either layout of its rotary channels; and a layer that attends what an earlier one selected.
TOPK = 64
INDEXED = tuple(
    replace(
        LORA,
        index_topk=TOPK,
        index_n_heads=16,
        index_head_dim=128,
        indexer_rope_interleave=layout == "pairs",
        name=f"indexer of {layout}",
    )
    for layout in ("halves", "pairs")
)
SHARING = replace(INDEXED[0], index_n_heads=0, name="shared selection")
MODES = ("auto", "absorbed", "expanded")
BOTH = MODES[1:]  # which "auto" chooses between
plain = partial(LayerCase, config=PLAIN_CONFIG)
# A prefill, a decode, several tokens after a history, and a request without new tokens.
MIXED = ((20, 1, 0, 3), (0, 70, 5, 64))
# Two requests cross the end of a page within eight steps, and one of them is the longest.
STEPPING = plain((1, 1, 1, 1), (60, 10, 125, 65), steps=8)


def layer_check(
    name: str, catches: str, fails: str = "formula", *cases: LayerCase, modes: Sequence[str] = BOTH
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check that runs once per dtype and policy of ops.

    Given cases, it is what `body(trial, call, mode)` does with each of them, set up in each attention mode.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        def of_cases(trial: Trial) -> None:
            for case, mode in itertools.product(cases, modes):
                with trial.case(f"{mode}, {case.label}"):
                    body(trial, prepare(trial, case, mode), mode)

        of_cases.__doc__ = body.__doc__
        check(f"layer.{name}", catches=catches, scope=LAYER, fails=fails)(of_cases if cases else body)
        return body

    return register


def make_layer(trial: Trial, config: MLAConfig, attention: str, *, model: int = 0, **arguments: Any) -> MLA:
    """Build a layer with the backend's ops and random weights."""
    given = {"backend": trial.backend, "dtype": trial.dtype, "ops": trial.of, **arguments}
    layer = MLA(config, attention=attention, **given)
    layer.load_state_dict(weights(config, model, trial.dtype))
    return layer


def prepare(
    trial: Trial,
    case: LayerCase,
    attention: str = "auto",
    *,
    layer: MLA | None = None,
    **arguments: Any,
) -> LayerCall:
    """Set a case up in the trial's dtype."""
    layer = layer or make_layer(trial, case.config, attention, model=case.model, **arguments)
    return LayerCall(replace(case, dtype=trial.dtype), layer)


def judge(trial: Trial, call: LayerCall, outputs: Iterable[torch.Tensor]) -> None:
    """Compare the outputs [T, d] of every step with the oracle. Raises `CheckFailed`."""
    verdict = call.check(torch.stack([out.cpu() for out in outputs]))
    trial.worst = max(verdict.error_ratio or 0.0, trial.worst or 0.0)
    if verdict.status != "ok":
        raise CheckFailed(verdict.reason)


def check_layer(trial: Trial, *cases: LayerCase, modes: Sequence[str] = BOTH, **arguments: Any) -> None:
    """Run cases in these attention modes, each as one of the check."""
    for case in cases:
        for mode in modes:
            stored = [str(word) for name, word in arguments.items() if name.endswith("_format")]
            with trial.case(", ".join([*stored, mode, case.label])):
                call = prepare(trial, case, mode, **arguments)
                judge(trial, call, call.run())


@layer_check("mixed", "tokens that land in the rows of another request, or see what they should not")
def mixed(trial: Trial) -> None:
    """Prefill, decode, several tokens after a history and a request without any share a batch."""
    check_layer(trial, *(LayerCase(*MIXED, config) for config in (PLAIN_CONFIG, LORA)), modes=MODES)
    check_layer(trial, *(LayerCase((5, 1), (0, 30), config) for config in UNUSUAL))


@layer_check("decode", "a token that is cached at the wrong place, which only later steps see", "state")
def decode(trial: Trial) -> None:
    """Twenty decode steps give what one prefill of the same tokens gives."""
    check_layer(trial, plain((1, 1, 1), (50, 0, 120), steps=20), modes=("auto", "absorbed"))


FIRST_FORMAT = "fp8_ds_mla"  # the one that is rebuilt as well: that is the same code for all


@layer_check("formats", "new tokens that are attended as they were before the cache has rounded them")
def formats(trial: Trial) -> None:
    """The output is that of the bytes the step has cached, latents and index keys, within their format."""
    for name, entry in FORMATS.items():
        if entry.scale_rule != "none":
            modes = BOTH if name == FIRST_FORMAT else BOTH[:1]
            check_layer(trial, plain(*MIXED), modes=modes, cache_format=name)
    cached = LayerCase((3, 1), (70, 130), INDEXED[0])
    check_layer(trial, cached, modes=MODES[:1], cache_format=FIRST_FORMAT, index_format="fp8")


@layer_check(
    "shared_plan",
    "a plan or a sequence that one forward uses up, or that remembers its cache",
    "state",
    plain(*MIXED),
)
def shared_plan(trial: Trial, call: LayerCall, mode: str) -> None:
    """A layer runs one batch repeatedly, alternating between two caches."""
    other = prepare(trial, replace(call.case, seed=8), layer=call.layer)
    batch = call.extend()
    other.extend()  # so that its tables are the same
    for now in (call, call, other, call):  # the second one may be recorded by the backend
        judge(trial, now, [now.forward(0, batch)])


@layer_check(
    "two_layers",
    "weights or scratch memory that another layer of the same shape takes over",
    "state",
    plain(*MIXED),
)
def two_layers(trial: Trial, call: LayerCall, mode: str) -> None:
    """Two layers run a batch by turns, each on its part of the cache, and leave each other's output alone."""
    other = prepare(trial, replace(call.case, seed=8, model=1), mode)
    batch, _ = call.extend(), other.extend()  # whose tables are the same
    outputs = [(now, now.forward(0, batch)) for now in (call, other, other, call)]
    for now, out in outputs:
        judge(trial, now, [out])


@layer_check(
    "weights", "a packed layout that loses bits, so that a checkpoint cannot be saved again", "contract"
)
def state_dict(trial: Trial) -> None:
    """The layer returns the weights it was given, bit for bit."""
    for config in (PLAIN_CONFIG, VARIANT):
        with trial.case(config.name):
            given, back = weights(config, 0, trial.dtype), make_layer(trial, config, "auto").state_dict()
            expect(set(back) == set(given), "state_dict() has different names from the weights it was given")
            different = [name for name, weight in given.items() if not same_bits(back[name], weight)]
            expect(not different, f"weight {', '.join(different)} came back with different bits")


# ------------------------------------------------------------------------------------ layers that select


@layer_check("indexer", "a selection of hidden tokens, of another request's, or by keys in the other layout")
def indexer(trial: Trial) -> None:
    """Beyond top-k a token attends to the keys that score best; the output is judged given the selection."""
    halves, pairs = INDEXED
    unseen = LayerCase(*_any_lengths(trial.subject.drawing.seed), halves)
    crossing = LayerCase((9, 1, 0, 3, 2), (58, 130, 5, 64, 10), halves)
    check_layer(trial, crossing, LayerCase((2, 1), (70, 9), pairs), unseen, modes=("auto",))


def _any_lengths(seed: int) -> tuple[Lengths, Lengths]:
    """Return new and old tokens of requests on both sides of top-k."""
    random = Random(seed)
    new = [random.choice((0, 1, 1, 2, 5, 17)) for _ in range(4)]
    return (1, *new), (random.randrange(TOPK, 3 * TOPK), *(random.randrange(2 * TOPK) for _ in new))


@layer_check(
    "shared_selection", "attention to all keys, or to those of another token, where some are selected"
)
def shared_selection(trial: Trial) -> None:
    """A layer without an indexer attends what it is given, in any order, within top-k as well."""
    case = LayerCase((3, 1, 2), (70, 130, 4), SHARING)
    with trial.case(case.label):
        call = prepare(trial, case)
        selection = any_selection(case.query_lens, case.history).to(trial.device)
        judge(trial, call, [call.forward(0, call.extend(), selection)])


def any_selection(query_lens: Lengths, history: Lengths) -> torch.Tensor:
    """Return positions [T, TOPK] int32 that tokens see, and -1 behind them; the last token selects none."""
    positions = [old + token for new, old in zip(query_lens, history, strict=True) for token in range(new)]
    selection, random = torch.full((len(positions), TOPK), -1, dtype=torch.int32), Random(0)
    for row, position in zip(selection[:-1], positions, strict=False):
        chosen = random.sample(range(position + 1), min(position + 1, TOPK - 5))
        row[: len(chosen)] = torch.tensor(chosen)
    return selection


@layer_check(
    "no_tokens",
    "an empty batch that raises, or that a later one suffers from",
    "emptiness",
    plain((2, 1), (70, 0)),
)
def no_tokens(trial: Trial, call: LayerCall, mode: str) -> None:
    """A batch without new tokens gives no rows, changes nothing, and the next one is right."""
    before = call.cache.pages[0].cpu().clone()
    for _ in range(2):
        nothing = call.cache.extend(call.ids, [0, 0])
        out = call.layer(call.hidden[0, :0], nothing, call.cache.pages[0])
        expect(out.shape == (0, call.case.config.hidden_size), f"its output is {list(out.shape)}")
    count, first = changed_slots(call.cache.pages[0], before)
    expect(not count, f"{count} slots have changed, the first is {first}")
    judge(trial, call, call.run())


# -------------------------------------------------------------------------------- what changes in place


@layer_check(
    "update",
    "a plan that is remembered for the batch object, or index keys that only steps that read them write",
    "state",
    STEPPING,
    LayerCase((1, 2), (TOPK - 5, TOPK - 6), INDEXED[0], steps=5),  # whose contexts grow beyond top-k
    modes=("absorbed", "auto"),
)
def update(trial: Trial, call: LayerCall, mode: str) -> None:
    """A batch updated in place to the next step's lengths runs like that step's own batch."""
    batch = call.extend(in_shape=True)
    outputs = [call.forward(0, batch)]
    for step in range(1, call.case.steps):
        batch.update_(call.extend(in_shape=True))
        outputs.append(call.forward(step, batch))
    judge(trial, call, outputs)


CAPTURED = "an op that waits, allocates or reads its inputs on the host while captured"


@layer_check("graph", CAPTURED, "state")
def graph(trial: Trial) -> None:
    """A captured forward gives the right output for new inputs and other cache contents."""
    for config in (PLAIN_CONFIG, INDEXED[0]):
        first, second = (LayerCase((1, 1, 1), (50, 10, 100), config, seed=seed) for seed in (7, 8))
        with trial.case(first.label):
            call, other, again = (prepare(trial, case, "absorbed") for case in (first, second, first))
            batch, hidden, cached = call.extend(), call.hidden[0], (call.cache.pages, call.cache.index_pages)
            out = call.forward(0, batch)
            replay = capture(trial, partial(_forward, call, batch, hidden, out))
            for now in (other, again, other):
                hidden.copy_(now.hidden[0])
                for pages, others in zip(cached, (now.cache.pages, now.cache.index_pages), strict=True):
                    pages.copy_(others)
                out.fill_(torch.nan)
                replay()
                trial.backend.synchronize()
                if config.index_topk:
                    call.take()
                    now.taken = call.taken[-1:]
                judge(trial, now, [out])


@layer_check("graph_lengths", "a plan whose lengths or angles are frozen at capture", "state")
def graph_lengths(trial: Trial) -> None:
    """A captured plan and forward follow the batch as update_() advances it in place."""
    for case in (STEPPING, replace(STEPPING, config=INDEXED[0])):
        with trial.case(case.label):
            call = prepare(trial, case, "absorbed")
            batch, hidden = call.extend(in_shape=True), call.hidden[0].clone()
            if frozen_roles(call.layer.plan(batch)):
                raise Refused(NOT_SAFE)
            out = torch.empty_like(hidden)
            replay, outputs = capture(trial, partial(_replan, call, batch, hidden, out)), []
            call.taken.clear()
            for step in range(case.steps):
                if step:
                    batch.update_(call.extend(in_shape=True))
                hidden.copy_(call.hidden[step])
                replay()
                trial.backend.synchronize()
                outputs.append(out.clone())
                if case.config.index_topk:
                    call.take()
            judge(trial, call, outputs)


def _forward(call: LayerCall, batch: RaggedBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
    call.layer(hidden, batch, *call.cache.of_layer(0), out=out)


def _replan(call: LayerCall, batch: RaggedBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
    batch.update_(batch)  # drops the plan, so that planning is captured as well
    _forward(call, batch, hidden, out)
