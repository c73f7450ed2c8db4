"""Buffers that stay and numbers that change, on which a captured step depends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from mla.conformance.checks.attention.common import decode
from mla.conformance.checks.graph import NO_GRAPH
from mla.conformance.problems.attention import AttentionProblem
from mla.conformance.problems.attention_call import fitted, judge_out, serve
from mla.conformance.problems.layer import LayerProblem, judge, prepare_layer
from mla.conformance.registry import LAYER, OP, check
from mla.conformance.trial import Refused, Trial

NOT_SAFE = "the op's state does not declare that a captured call follows its batch (graph_safe)"
# Two requests cross the end of a page within eight steps, and one of them is the longest.
STEPPING = LayerProblem((1, 1, 1, 1), (60, 10, 125, 65), steps=8)


@check(
    "layer.update",
    scope=LAYER,
    catches="a plan that is remembered for the batch object, not for its lengths",
    fails="state",
)
def update(trial: Trial) -> None:
    """A batch updated in place to the next step's lengths runs like that step's own batch."""
    for mode in ("absorbed", "auto"):
        with trial.case(f"{mode}, {STEPPING.label}"):
            ready = prepare_layer(trial, STEPPING, mode)
            batch = ready.extend_in_shape()
            outputs = [ready.forward(0, batch).cpu()]
            for step in range(1, STEPPING.steps):
                batch.update_(ready.extend_in_shape())
                outputs.append(ready.forward(step, batch).cpu())
            judge(trial, STEPPING, torch.stack(outputs))


def captured(trial: Trial, first: AttentionProblem, second: AttentionProblem, follows: bool) -> None:
    """Capture a call for one problem, then replay it with the inputs of the other, and back again."""
    op, call = serve(trial, first)
    state = call.prepare(op)
    if follows and not getattr(state, "graph_safe", False):
        raise Refused(NOT_SAFE)
    out, lse = call.outputs()

    def work() -> None:
        op(state, **call.inputs, softmax_scale=first.scale, out=out, lse=lse)

    replay = capture(trial, work)
    for problem in (second, first, second):
        call.refill(problem)
        out.fill_(torch.nan)
        replay()
        trial.backend.synchronize()
        judge_out(trial, problem, out)


def capture(trial: Trial, work: Callable[[], None]) -> Callable[[], None]:
    """Run `work` once, so that one-time setup is not captured, then capture it."""
    work()
    trial.backend.synchronize()
    replay = trial.backend.graph(work)
    if replay is None:
        raise Refused(NO_GRAPH)
    return replay


@check(
    "latent.graph",
    scope=OP,
    kind="latent_attention",
    catches="a call that waits, allocates or reads its inputs on the host while captured",
    fails="state",
)
def latent_graph(trial: Trial) -> None:
    """A captured call gives the right output for other queries and other cache contents."""
    first = fitted(trial, decode(50, 10, 100))
    with trial.case(first.label):
        captured(trial, first, replace(first, seed=1), follows=False)


@check(
    "latent.graph_lengths",
    scope=OP,
    kind="latent_attention",
    catches="a schedule or a longest length that is frozen at capture",
    fails="state",
)
def latent_graph_lengths(trial: Trial) -> None:
    """A captured call follows lengths and block tables that change in place, if its state declares it."""
    first = fitted(trial, decode(50, 10, 100, 3))
    second = fitted(trial, decode(100, 65, 1, 0, seed=1))
    with trial.case(f"{first.label}, then {second.label}"):
        captured(trial, first, second, follows=True)


@check(
    "layer.graph",
    scope=LAYER,
    catches="an op that waits, allocates or reads its inputs on the host while captured",
    fails="state",
)
def graph(trial: Trial) -> None:
    """A captured forward gives the right output for new inputs and other cache contents."""
    first, second = (LayerProblem((1, 1, 1), (50, 10, 100), seed=seed) for seed in (0, 1))
    with trial.case(first.label):
        ready, other = (prepare_layer(trial, problem, "absorbed") for problem in (first, second))
        batch, hidden, pages = ready.extend(), ready.hidden[0], ready.cache.pages[0]
        out = ready.forward(0, batch)

        def forward() -> None:
            ready.layer(hidden, batch, pages, out=out)

        replay = capture(trial, forward)
        for one in (other, prepare_layer(trial, first, "absorbed"), other):
            hidden.copy_(one.hidden[0])
            pages.copy_(one.cache.pages[0])
            out.fill_(torch.nan)
            replay()
            trial.backend.synchronize()
            judge(trial, one.problem, out[None].cpu())


@check(
    "layer.graph_lengths",
    scope=LAYER,
    catches="a plan whose lengths or angles are frozen at capture",
    fails="state",
)
def graph_lengths(trial: Trial) -> None:
    """A captured plan and forward follow the batch as update_() advances it in place."""
    with trial.case(STEPPING.label):
        ready = prepare_layer(trial, STEPPING, "absorbed")
        batch, pages = ready.extend_in_shape(), ready.cache.pages[0]
        plan = ready.layer.plan(batch)
        if plan.absorbed is None or not getattr(plan.absorbed.state, "graph_safe", False):
            raise Refused(NOT_SAFE)
        hidden = ready.hidden[0].clone()
        out = torch.empty_like(hidden)

        def forward() -> None:
            batch.update_(batch)  # drops the plan, so that planning is captured as well
            ready.layer(hidden, batch, pages, out=out)

        replay = capture(trial, forward)
        outputs = []
        for step in range(STEPPING.steps):
            if step:
                batch.update_(ready.extend_in_shape())
            hidden.copy_(ready.hidden[step])
            replay()
            trial.backend.synchronize()
            outputs.append(out.cpu().clone())
        judge(trial, STEPPING, torch.stack(outputs))
