"""What an attention op may keep between calls: its plan, and nothing of the numbers it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mla.cases.memory import Layout
from mla.conformance.checks.attention.common import (
    MIXED,
    SEGMENTS,
    Register,
    decode,
    expanded,
    expanded_check,
    latent,
    latent_check,
)
from mla.conformance.problems.attention import AttentionProblem
from mla.conformance.problems.attention_call import (
    AttentionCall,
    check_out,
    fitted,
    judge_both,
    judge_out,
    serve,
)
from mla.conformance.problems.load import best, elapsed, load_of, usual
from mla.conformance.trial import Trial, expect
from mla.verify.tolerances import same_bits

KIND = "state"
UNITS = 4  # of pending work that a plan might wait for
CALLS = 300  # of one state: beyond what a counter of 8 bits holds
ALIVE = 20  # states at a time, and calls after one whose outputs are kept


def state_checks(
    register: Callable[[str, str, str], Register], problem: AttentionProblem, other: AttentionProblem
) -> None:
    """Register what holds for the prepared state of either op; `other` is a batch of other lengths."""

    @register("reuse", "a plan that is used up by one layer, or scratch memory that two batches share", KIND)
    def reuse(trial: Trial) -> None:
        """One prepared state serves several layers, with another batch's calls in between."""
        check_reuse(trial, problem, other)

    @register("prepare", "a plan step that waits for the device or copies lengths back from it", KIND)
    def prepare(trial: Trial) -> None:
        """Preparing a batch does not wait for pending work on the device."""
        check_prepare(trial, problem)

    @register(
        "refilled", "keys that are gathered once per state, or a result that is remembered by addresses", KIND
    )
    def refilled(trial: Trial) -> None:
        """One state on the same memory follows what that memory holds."""
        check_refilled(trial, replace(problem, heads=4))

    @register("kept", "an output that is written again at a later call, or an input that is read again", KIND)
    def kept(trial: Trial) -> None:
        """What a call wrote stays as it is, and its inputs may be overwritten afterwards."""
        check_kept(trial, replace(problem, heads=4), replace(other, heads=4))

    @register("again", "a counter or a ring of buffers that runs out after some calls", KIND)
    def again(trial: Trial) -> None:
        """The same call gives the same result hundreds of times."""
        check_again(trial, replace(other, heads=2))

    @register("alive", "states in a ring of a few, or scratch memory that later states take over", KIND)
    def alive(trial: Trial) -> None:
        """Many states live at a time, and are called in any order."""
        check_alive(trial, replace(problem, query_lens=(1, 2), kv_lens=(5, 9), heads=2))


state_checks(latent_check, latent(*MIXED), latent((1, 12, 1), (65, 40, 9)))
state_checks(expanded_check, expanded(*SEGMENTS), expanded((1, 12, 1), (65, 40, 9)))


def check_reuse(trial: Trial, first: AttentionProblem, second: AttentionProblem) -> None:
    """Run one state for two layers with different numbers, with another batch's calls in between."""
    first, second = fitted(trial, first), fitted(trial, second)
    with trial.case(f"{first.label}, and {second.label} in between"):
        op, layer = serve(trial, first)
        _, next_layer = serve(trial, replace(first, seed=first.seed + 1))
        _, other = serve(trial, second)
        states = [call.prepare(op) for call in (layer, other)]
        for call, state in zip((layer, other, next_layer, other, layer), states * 3, strict=False):
            judge_both(trial, call, call.run(op, state))


def check_prepare(trial: Trial, problem: AttentionProblem) -> None:
    """Check that preparing a batch does not wait for pending work on the device."""
    problem = fitted(trial, problem)
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        call.prepare(op)  # one-time setup does not count
        work = load_of(trial.subject)
        pending = work.milliseconds(UNITS)

        def busy() -> float:
            work.read()
            work.submit(UNITS)
            return elapsed(lambda: call.prepare(op))

        behind = usual(busy)
        work.read()
        waited = behind - best(lambda: elapsed(lambda: call.prepare(op)))
        expect(waited < 0.5 * pending, f"prepare() waited {waited:.3g} of {pending:.3g} ms of pending work")


def check_refilled(trial: Trial, problem: AttentionProblem) -> None:
    """Change the keys under one state, then the queries as well, and then back; all in the same memory."""
    problem = fitted(trial, problem)
    keys, both = replace(problem, seed=1, query_seed=problem.seed), replace(problem, seed=1)
    queries = replace(problem, query_seed=1)
    with trial.case(problem.label):
        op, call = serve(trial, problem)
        state = call.prepare(op)
        out, lse = call.outputs()
        for now in (problem, keys, both, queries, problem):
            call.refill(now)
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
            call.attend(op, state, out, lse)
            judge_both(trial, call, (out, lse), now)


def check_kept(trial: Trial, first: AttentionProblem, second: AttentionProblem) -> None:
    """Keep the outputs of a call while its inputs become NaN and others follow, of its state and another."""
    first, second = fitted(trial, first), fitted(trial, second)
    with trial.case(f"{first.label}, then {second.label}"):
        op, call = serve(trial, first)
        _, layer = serve(trial, replace(first, seed=first.seed + 1))
        _, other = serve(trial, second)
        state = call.prepare(op)
        found = call.outputs()
        call.attend(op, state, *found)
        before = [tensor.cpu().clone() for tensor in found]
        for name in ("q", "cache", "k", "v"):
            if name in call.inputs:
                call.inputs[name].fill_(torch.nan)
        first_later = ((other, None), (layer, state), (layer, None))
        for later, of in (*first_later, *((layer, state),) * ALIVE):
            judge_out(trial, later.problem, later.run(op, of)[0], later.places())
        for name, then, now in zip(("out", "lse"), before, found, strict=True):
            expect(same_bits(then, now), f"`{name}` of an earlier call was written again")


def check_again(trial: Trial, problem: AttentionProblem) -> None:
    """Make one call again and again; what differs from the first result is compared with the truth."""
    problem = fitted(trial, problem)
    with trial.case(f"{problem.label}, {CALLS} times"):
        op, call = serve(trial, problem)
        state = call.prepare(op)
        first = call.run(op, state)[0]
        judge_out(trial, problem, first, call.places())
        out, lse = call.outputs()
        for _ in range(CALLS):
            out.fill_(torch.nan)
            op(state, **call.inputs, softmax_scale=problem.scale, out=out, lse=lse)
            if not torch.equal(out.cpu(), first):
                judge_out(trial, problem, out, call.places())


def check_alive(trial: Trial, problem: AttentionProblem) -> None:
    """Prepare many batches of lengths of their own, then call all, the last first and the first first."""
    problem = fitted(trial, problem)
    first, second = problem.kv_lens
    problems = [replace(problem, kv_lens=(first + i, second + 2 * i)) for i in range(ALIVE)]
    with trial.case(f"{ALIVE} states, the first {problem.label}"):
        served = [serve(trial, one) for one in problems]
        pairs = [(call, call.prepare(op)) for op, call in served]
        found = [(call, call.run(served[0][0], state)) for call, state in (*pairs[::-1], *pairs)]
        for call, outputs in found:
            judge_both(trial, call, outputs)


@latent_check("stepping", "lengths that are remembered from the first time a batch was prepared", KIND)
def stepping(trial: Trial) -> None:
    """The same requests, one token longer each step, are attended in full every step."""
    check_out(trial, *(decode(length, length - 30) for length in range(62, 67)))


@latent_check("tables", "a block table or lengths that are kept for every batch of the same shape", KIND)
def tables(trial: Trial) -> None:
    """States of equal shapes, alive at the same time, keep their own tables and lengths apart."""
    first, swapped = (fitted(trial, decode(*lengths, heads=4)) for lengths in ((33, 7, 100), (100, 33, 7)))
    with trial.case(f"{first.label}, {swapped.label}"):
        op, one = serve(trial, first)
        calls = [one]
        calls += [serve(trial, replace(first, seed=1), Layout(shuffle=1))[1]]
        calls += [serve(trial, swapped)[1], serve(trial, replace(swapped, seed=1), Layout(shuffle=2))[1]]
        _alternate(trial, op, calls)


@expanded_check("lengths", "lengths that are kept for every batch of the same shape", KIND)
def lengths(trial: Trial) -> None:
    """States of equal shapes, alive at the same time, keep their own lengths apart."""
    batches = (((5, 1, 3), (9, 40, 3)), ((3, 5, 1), (3, 9, 40)), ((3, 5, 1), (40, 9, 3)))
    problems = [fitted(trial, expanded(*both, heads=4)) for both in batches]
    problems += [replace(problems[0], causal=False)]
    with trial.case(", ".join(problem.label for problem in problems)):
        served = [serve(trial, problem) for problem in problems]
        _alternate(trial, served[0][0], [call for _, call in served])


def _alternate(trial: Trial, op: Any, calls: list[AttentionCall]) -> None:
    """Prepare all, then call all in turn, twice."""
    states = [call.prepare(op) for call in calls]
    for call, state in [*zip(calls, states, strict=True)] * 2:
        judge_both(trial, call, call.run(op, state))
