"""Small ops: what is kept from one call to the next. Nothing may be, apart from scratch memory."""

from __future__ import annotations

import torch

from mla.conformance.checks.small_ops.kinds import PRODUCTS, small_check, vary
from mla.conformance.problems.small_call import SmallCall, check_once, small_call
from mla.conformance.problems.small_ops import SmallProblem, host
from mla.conformance.trial import Trial, expect
from mla.verify.tolerances import same_bits

# How many calls of other tokens lie between two of equally many.
TURNS = (7, 7, 130, 1, 7, 33, 130, 7, 7)
# So much larger that a trace of it shows among small numbers; float16 ends at 65504.
LARGE = {torch.bfloat16: 2.0**16, torch.float16: 2.0**8, torch.float32: 2.0**16}


@small_check(
    "earlier_outputs",
    catches="an output that is kept and written to by a later call, or a weight kept for another",
    fails="state",
)
def earlier_outputs(trial: Trial, example: SmallProblem) -> None:
    """Calls on other tensors, with other weights of the same shape, leave earlier outputs as they were."""
    problems = [vary(example, tokens=t, seed=s, model=s % 3) for s, t in enumerate(TURNS)]
    with trial.case(f"{len(problems)} calls, {example.label}"):
        calls = [small_call(trial, problem) for problem in problems]
        outs = [check_once(call) for call in calls]
        then = [call.found(out).clone() for call, out in zip(calls, outs, strict=True)]
        for call in (*calls[::-1], *calls[::2]):  # and each weight once more, by turns
            check_once(call)
        for call, out, first in zip(calls, outs, then, strict=True):
            same = same_bits(call.found(out), first)
            expect(same, f"a later call changed the output of an earlier one ({call.problem.label})")
            call.expect_guards(out)
            call.expect_inputs()


@small_check("new_contents", catches="a result or an input that is remembered by its address", fails="state")
def new_contents(trial: Trial, example: SmallProblem) -> None:
    """Tensors whose contents have changed in place are read again, and outputs are written again."""
    biased = (vary(example, biased=True),) if example.kind == "linear" else ()
    for problem in (example, *biased):
        with trial.case(problem.label):
            call = small_call(trial, problem)
            out = check_once(call)
            for seed, cleared in ((1, False), (2, True), (0, False)):
                call.take(small_call(trial, vary(problem, seed=seed)))
                if cleared:
                    out.part.fill_(torch.nan)
                call.run(out)
                call.judge(out)


@small_check(
    "call_before", catches="scratch memory that still holds something of the call before", fails="state"
)
def call_before(trial: Trial, example: SmallProblem) -> None:
    """A call whose numbers are small is right after one whose numbers are large."""
    gain = LARGE[trial.dtype]
    with trial.case(f"gains of {gain:g} and 1, {example.label}"):
        (many, few), (large_many, large_few) = (
            [small_call(trial, vary(example, tokens=t, gain=g, seed=int(g > 1))) for t in (130, 7)]
            for g in (1.0, gain)
        )
        for call in (large_many, few, large_few, few, large_many, many, large_few, many):
            call.judge(call.run())


@small_check(
    "packed_again",
    catches="a packed weight that is found again by the address or the shape of the weight",
    fails="state",
    kinds=PRODUCTS,
)
def packed_again(trial: Trial, example: SmallProblem) -> None:
    """Other weights that are packed from the same memory, one after the other, are other weights."""
    with trial.case(example.label):
        op = trial.require(example.spec(trial.dtype, trial.device))
        memory = _weight(trial, example).to(trial.device, copy=True)
        for model in (0, 1, 2, 1):
            problem = vary(example, model=model)
            memory.copy_(_weight(trial, problem))
            call = SmallCall(trial, problem, packed=op.pack(memory))
            for _ in range(2):
                check_once(call)
            kept = same_bits(op.unpack(call.packed), _weight(trial, problem)) if call.packed else False
            expect(kept, "the op wrote to its weight")
            del call


def _weight(trial: Trial, problem: SmallProblem) -> torch.Tensor:
    weight = host(problem, trial.dtype).weight
    assert weight is not None, "only products have one"
    return weight
